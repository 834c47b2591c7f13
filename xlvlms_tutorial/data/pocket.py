"""The embedded worlds as samples.

Scenes (unseen, or held-out combinations), clips and sounds of the first, postcards of the second.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import (
    clips,
    language,
    postcard_texts,
    postcards,
    regions,
    sounds,
    world,
)
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require, require_counts, require_one_of


class _World(NamedTuple):
    """How a world makes records, and pictures and texts of a record."""

    records: Callable
    record: Callable
    picture: Callable
    captions: Callable
    questions: Callable


_WORLDS = {
    "scenes": _World(
        world.scenes, world.Scene, world.render, language.captions, language.questions
    ),
    "postcards": _World(
        postcards.postcards,
        postcards.Postcard,
        postcards.draw,
        postcard_texts.captions,
        postcard_texts.questions,
    ),
}


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
                _Later(world.render, scene),
                tuple(captions),
                tuple(language.questions(scene)),
                _factors(scene),
                regions=_Later(regions.regions, scene),
            )
        )
    return samples


def counterfactual_samples(
    n: int, factor: str, split: str = "test", seed: int = 0
) -> list[tuple[Sample, Sample]]:
    """Draw scenes twice, the second time with another value of one factor.

    Parameters
    ----------
    n : int
        How many scenes are drawn; those in which the factor has no meaning are left out.
    factor : str
        The factor that is changed, such as "colour".
    split : str, default "test"
        "train", "validation", "test" or "composition".
    seed : int, default 0
        Which scenes are drawn.

    Returns
    -------
    list of (Sample, Sample)
        The scene as :func:`scene_samples` draws it, and the changed one; their layout is the same.
    """
    originals = scene_samples(n, split, seed)
    pairs = []
    for sample, scene in zip(originals, world.scenes(n, split, seed), strict=True):
        try:
            others = world.counterfactuals(scene, factor)
        except InputError:
            continue  # an animal has no action, a rock no colour
        if others:
            changed = others[scene.layout % len(others)]
            pairs.append((sample, _scene_sample(f"{sample.id}/{factor}", changed)))
    return pairs


def _scene_sample(name: str, scene: world.Scene) -> Sample:
    captions, questions = language.captions(scene), language.questions(scene)
    picture = _Later(world.render, scene)
    return Sample(name, picture, tuple(captions), tuple(questions), _factors(scene))


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
        frames = _Later(clips.render_clip, clip)
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
        wave = _Later(sounds.waveform, sound)
        captions = tuple(sounds.sound_captions(sound))
        questions = tuple(sounds.sound_questions(sound))
        name = f"sound-{split}-{seed}-{k:05d}"
        samples.append(Sample(name, wave, captions, questions, truth, "audio"))
    return samples


def postcard_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Draw ``n`` postcards of the second world as samples.

    Parameters
    ----------
    n : int
        How many postcards.
    split : str, default "test"
        "train", "validation" or "test".
    seed : int, default 0
        Which postcards are drawn.

    Returns
    -------
    list of Sample
        As of :func:`scene_samples`, with six captions; the factors have the same names.
    """
    samples = []
    for k, card in enumerate(postcards.postcards(n, split, seed)):
        samples.append(
            Sample(
                f"postcard-{split}-{seed}-{k:05d}",
                _Later(postcards.draw, card),
                tuple(postcard_texts.captions(card)),
                tuple(postcard_texts.questions(card)),
                _factors(card),
            )
        )
    return samples


def truth_masks(samples: Sequence[Sample]) -> dict[str, Bool[Tensor, "n 256 256"]]:
    """Return which pixels of scenes show what.

    Use it where a map, or a segmentation, is to be compared with the truth.

    Parameters
    ----------
    samples : sequence of Sample
        Samples of the embedded datasets "scenes" and "composition".

    Returns
    -------
    dict of str to Tensor of bool (n, 256, 256)
        Where the "subject", the things beside it ("item") and the "ground" are seen.

    Raises
    ------
    InputError
        If the pixels of a sample are not known.

    Examples
    --------
    >>> from xlvlms_tutorial.data import load_samples, truth_masks
    >>> masks = truth_masks(load_samples("scenes", n=2))
    >>> list(masks), tuple(masks["subject"].shape)
    (['subject', 'item', 'ground'], (2, 256, 256))
    """
    require(len(samples), "no samples", "give one or more")
    parts = []
    for sample in samples:
        source = sample.source
        has_scene = isinstance(source, _Later) and isinstance(source.record, world.Scene)
        require(
            has_scene, f"masks of sample {sample.id!r} are not known", "give samples of 'scenes'"
        )
        masks = world.masks(source.record)
        parts.append({part: torch.from_numpy(mask) for part, mask in masks.items()})
    return {part: torch.stack([masks[part] for masks in parts]) for part in parts[0]}


def crossed_samples(
    n: int, pictures: str, texts: str, split: str = "test", seed: int = 0
) -> list[Sample]:
    """Draw ``n`` pictures of one world with captions and questions in the words of one.

    Only records whose factors both worlds have are taken, whatever the worlds, so that samples with
    the same pictures differ in their words alone.

    Parameters
    ----------
    n : int
        How many samples.
    pictures : {"scenes", "postcards"}
        The world that the pictures are of.
    texts : {"scenes", "postcards"}
        The world whose words captions and questions are in.
    split : str, default "test"
        "train", "validation" or "test".
    seed : int, default 0
        Which records are drawn.

    Returns
    -------
    list of Sample
        The samples; their ids name pictures and words.

    Raises
    ------
    InputError
        If there is no such world or split, or ``n`` is below 1.
    """
    for name, value in (("pictures", pictures), ("texts", texts)):
        require_one_of(value, _WORLDS, name)
    require_counts(n=n)
    picture_world = _WORLDS[pictures]
    shared: list[tuple[object, object]] = []
    n_records = n
    while len(shared) < n:
        n_records *= 2
        shared = []
        for record in picture_world.records(n_records, split, seed):
            if all(_can_show(which, record) for which in _WORLDS.values()):
                shared.append((record, _WORLDS[texts].record(**asdict(record))))
    samples = []
    for k, (record, described) in enumerate(shared[:n]):
        samples.append(
            Sample(
                f"{pictures}-as-{texts}-{split}-{seed}-{k:05d}",
                _Later(picture_world.picture, record),
                tuple(_WORLDS[texts].captions(described)),
                tuple(_WORLDS[texts].questions(described)),
                _factors(record),
            )
        )
    return samples


def _can_show(which: _World, record: object) -> bool:
    try:
        which.record(**asdict(record))
    except InputError:
        return False
    return True


def _factors(record: world.Scene | postcards.Postcard) -> dict[str, object]:
    factors = asdict(record)
    del factors["layout"]
    return factors


@dataclass(frozen=True)
class _Later:
    """A picture, clip or sound that is made when it is used, and its record."""

    draw: Callable
    record: object

    def __call__(self) -> object:
        return self.draw(self.record)
