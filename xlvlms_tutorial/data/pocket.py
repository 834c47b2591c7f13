"""The embedded world as samples: scenes (unseen, or held-out combinations), clips and sounds."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

from xlvlms_tutorial.pocket import clips, language, sounds, world
from xlvlms_tutorial.samples import Question, Sample


def scene_samples(
    n: int, split: str = "test", seed: int = 0, style: str | None = None
) -> list[Sample]:
    """``n`` scenes of a split with five captions (or one in a style), questions and the truth.

    The truth is the factors; pictures are drawn on demand.
    """
    tell = (
        language.captions
        if style is None
        else lambda scene: [language.styled_caption(scene, style)]
    )
    return [
        _sample(
            f"{split}-{seed}-{k:05d}",
            "image",
            _later(world.render, scene),
            tell(scene),
            language.questions(scene),
            scene,
        )
        for k, scene in enumerate(world.scenes(n, split, seed))
    ]


def clip_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """``n`` clips of a split, as :func:`scene_samples`.

    The truth also holds direction and speed.
    """
    return [
        _sample(
            f"clip-{split}-{seed}-{k:05d}",
            "video",
            _later(clips.render_clip, clip),
            clips.clip_captions(clip),
            clips.clip_questions(clip),
            clip.scene,
            {"direction": clip.direction, "speed": clip.speed},
        )
        for k, clip in enumerate(clips.clips(n, split, seed))
    ]


def sound_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """``n`` sounds of a split.

    Two seconds at 16 kHz, with captions, questions and what was mixed as truth.
    """
    found = []
    for k, sound in enumerate(sounds.sounds(n, split, seed)):
        truth = {
            "sound": sound.name,
            "loudness": sound.loudness,
            "background": sound.background,
            "recording": sound.recording,
        }
        told, asked = tuple(sounds.sound_captions(sound)), tuple(sounds.sound_questions(sound))
        found.append(
            Sample(
                f"sound-{split}-{seed}-{k:05d}",
                _later(sounds.waveform, sound),
                told,
                asked,
                truth,
                "audio",
            )
        )
    return found


def _sample(
    name: str,
    kind: str,
    source: Callable[[], object],
    told: Iterable[str],
    asked: Iterable[Question],
    scene: world.Scene,
    more: dict[str, object] | None = None,
) -> Sample:
    factors = {
        factor: value for factor, value in asdict(scene).items() if factor in world.FACTORS
    } | (more or {})
    return Sample(name, source, tuple(told), tuple(asked), factors, kind)


def _later(draw: Callable, record: object) -> Callable[[], object]:
    return lambda: draw(record)
