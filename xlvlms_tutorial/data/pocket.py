"""The embedded world as samples: scenes (unseen, or held-out combinations), clips and sounds."""

from collections.abc import Callable
from dataclasses import asdict

from xlvlms_tutorial.pocket import clips, language, sounds, world
from xlvlms_tutorial.samples import Sample


def scene_samples(
    n: int, split: str = "test", seed: int = 0, style: str | None = None
) -> list[Sample]:
    """Draw ``n`` scenes of the embedded world as samples, with the factors as truth.

    Parameters
    ----------
    n : int
        How many scenes.
    split : str, default "test"
        "train", "validation", "test" or "composition".
    seed : int, default 0
        Which scenes are drawn.
    style : str, optional
        The style of the one caption; by default each scene has five captions.

    Returns
    -------
    list of Sample
        Pictures are drawn when they are used.
    """
    samples = []
    for k, scene in enumerate(world.scenes(n, split, seed)):
        if style is None:
            captions = language.captions(scene)
        else:
            captions = [language.styled_caption(scene, style)]
        samples.append(
            Sample(
                f"{split}-{seed}-{k:05d}",
                _later(world.render, scene),
                tuple(captions),
                tuple(language.questions(scene)),
                _factors(scene),
            )
        )
    return samples


def clip_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Draw ``n`` clips of the embedded world as samples.

    Parameters
    ----------
    n : int
        How many clips.
    split : str, default "test"
        The split.
    seed : int, default 0
        Which clips are drawn.

    Returns
    -------
    list of Sample
        As of :func:`scene_samples`; the truth also holds direction and speed.
    """
    samples = []
    for k, clip in enumerate(clips.clips(n, split, seed)):
        truth = _factors(clip.scene) | {"direction": clip.direction, "speed": clip.speed}
        frames = _later(clips.render_clip, clip)
        captions = tuple(clips.clip_captions(clip))
        questions = tuple(clips.clip_questions(clip))
        name = f"clip-{split}-{seed}-{k:05d}"
        samples.append(Sample(name, frames, captions, questions, truth, "video"))
    return samples


def sound_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Mix ``n`` sounds of the embedded world as samples.

    Parameters
    ----------
    n : int
        How many sounds.
    split : str, default "test"
        The split.
    seed : int, default 0
        Which sounds are drawn.

    Returns
    -------
    list of Sample
        Two seconds at 16 kHz, with captions, questions and what was mixed as truth.
    """
    samples = []
    for k, sound in enumerate(sounds.sounds(n, split, seed)):
        truth = {
            "sound": sound.name,
            "loudness": sound.loudness,
            "background": sound.background,
            "recording": sound.recording,
        }
        wave = _later(sounds.waveform, sound)
        captions = tuple(sounds.sound_captions(sound))
        questions = tuple(sounds.sound_questions(sound))
        name = f"sound-{split}-{seed}-{k:05d}"
        samples.append(Sample(name, wave, captions, questions, truth, "audio"))
    return samples


def _factors(scene: world.Scene) -> dict[str, object]:
    return {factor: value for factor, value in asdict(scene).items() if factor in world.FACTORS}


def _later(draw: Callable, record: object) -> Callable[[], object]:
    return lambda: draw(record)
