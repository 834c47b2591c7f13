"""Where in a picture a concept comes from.

What each image token adds to its code, or how much of it each token's own state holds.
"""

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import read, span_mask, wanted
from xlvlms_tutorial.activations.rows import SIDES
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, LengthError, SelectionError
from xlvlms_tutorial.interventions.edits import replace
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.methods.concepts.base import Dictionary
from xlvlms_tutorial.models.spans import Batch, find_words
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample

WAYS = ("occlusion", "activation")
_ADVICE = "give pictures of one size, so that the same token is the same place in all of them"


def heat(
    vlm: VLM,
    samples: Sequence[Sample],
    dictionary: Dictionary,
    concepts: Sequence[int],
    layer: int,
    words: str | Sequence[str] | None = None,
    answers: Sequence[str] | Callable[[Sample], str] | None = None,
    at: str = "predicting",
    how: str = "occlusion",
    batch_size: int = 16,
    prompt: str = PROMPTS["image"],
) -> Float[Tensor, "n c t"]:
    r"""How much each image token carries of each concept in each sample.

    (samples, concepts, image tokens), on the CPU. ``how`` "occlusion":
    :math:`z_k(h) - z_k(h^{(j)})`, the code of the state of the token of interest (``words`` in
    ``answers``; ``at`` as in ``capture``) less that with image token j replaced, where it enters
    the decoder, by the mean of that token over all samples. Positive where the token brings the
    concept about; a forward over the samples for each image token, the vision tower run twice.
    ``how`` "activation": the cosine of the concept's direction with the state of the image token
    itself at that layer, less the mean of that token over all samples; in one forward, words and
    answers play no part. :func:`grid` makes rows and columns of the tokens.

    Raises
    ------
    SelectionError
        If ``how``, ``at`` or a concept is unknown, or no sample, or words and answers for an
        occlusion are not given or do not occur.
    ComparisonError
        If dictionary and model differ in width, or the samples in their number of image tokens.
    ActivationsError
        If there is a single sample, or one token's state is the same in all, so that nothing
        is left of it without the mean.
    LayerError, SpanError
        If the model has no such layer, or no positions of a picture.
    LengthError
        If answers and samples are not equally many.
    """
    samples, concepts = list(samples), list(concepts)
    _check(vlm, samples, dictionary, concepts, layer)
    if how == "activation":
        directions = torch.as_tensor(dictionary.components_)[concepts].float()
        return _projected(vlm, samples, directions, layer, prompt, batch_size)
    if how != "occlusion":
        raise SelectionError(f"unknown way {how!r}", f"allowed: {', '.join(map(repr, WAYS))}")
    if words is None or answers is None:
        raise SelectionError(
            "an occlusion without words or answers",
            "give the words of interest and one answer a sample that has one",
        )
    if at not in SIDES:
        raise SelectionError(f"at={at!r}", f"allowed: {', '.join(map(repr, SIDES))}")
    answers = [answers(sample) for sample in samples] if callable(answers) else list(answers)
    if len(answers) != len(samples):
        raise LengthError(samples=len(samples), answers=len(answers))
    words = (words,) if isinstance(words, str) else tuple(words)
    means = _means(vlm, _batches(vlm, samples, prompt, None, batch_size))
    parts = []
    for batch in _batches(vlm, samples, prompt, answers, batch_size):
        states = _occluded(vlm, *_up_to_words(vlm, batch, words, at), layer, means)
        codes = torch.as_tensor(dictionary.transform(states.flatten(0, 1)))[:, concepts].float()
        codes = codes.reshape(*states.shape[:2], -1)
        parts.append((codes[:1] - codes[1:]).permute(1, 2, 0))
    return torch.cat(parts)


def grid(heat: Float[Tensor, "*n t"]) -> Float[Tensor, "*n side side"]:
    """Image tokens (..., t) as rows and columns of the picture.

    In the order in which towers of square pictures give them.

    Raises
    ------
    SelectionError
        If t is no square.
    ActivationsError
        If a value is NaN or infinite.
    """
    tokens = heat.shape[-1] if heat.ndim else 0
    side = round(tokens**0.5)
    if not tokens or side * side != tokens:
        raise SelectionError(
            f"{tokens} image tokens are no square",
            "reshape them as the model's tower lays them out",
        )
    if not heat.isfinite().all():
        told = f"{int((~heat.isfinite()).sum())} of {heat.numel()} values are NaN or infinite"
        raise ActivationsError(
            told, "load the model in float32 or bfloat16, and check the dictionary"
        )
    return heat.unflatten(-1, (side, side))


def _check(
    vlm: VLM, samples: list[Sample], dictionary: Dictionary, concepts: list[int], layer: int
) -> None:
    wanted(vlm, layer)
    n, width = dictionary.components_.shape
    if width != vlm.width:
        raise ComparisonError(
            "widths",
            f"a dictionary of {width}",
            f"{vlm.width} of {vlm.name}",
            "use the dictionary of this model",
        )
    for concept in concepts:
        if isinstance(concept, bool) or not isinstance(concept, Integral) or not 0 <= concept < n:
            raise SelectionError(f"concept {concept!r}", f"allowed: 0 to {n - 1}")
    if not samples or not concepts:
        raise SelectionError(
            "no samples or no concepts", "give at least two samples and one concept"
        )
    if len(samples) < 2:
        raise ActivationsError(
            "one sample is its own mean, and differs from it nowhere", "give at least two"
        )


def _batches(
    vlm: VLM, samples: list[Sample], prompt: str, answers: list[str] | None, size: int
) -> Iterator[Batch]:
    if size < 1:
        raise SelectionError(f"batch_size is {size}", "give at least 1")
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        yield vlm.batch_of(
            some, [prompt] * len(some), None if answers is None else answers[start : start + size]
        )


def _pictures(vlm: VLM, batch: Batch, like: int | None = None) -> Bool[Tensor, "b t"]:
    """Where a batch has image tokens, as many in each row.

    And as many as in the rows before, if ``like`` is given.
    """
    mask = span_mask(vlm, batch, ("image",))
    counts = mask.sum(dim=1)
    expected = int(counts[0]) if like is None else like
    if (other := counts[counts != expected]).numel():
        raise ComparisonError("numbers of image tokens", expected, int(other[0]), _ADVICE)
    return mask


def _means(vlm: VLM, batches: Iterator[Batch]) -> Float[Tensor, "t d"]:
    """The mean over samples of each image token as it enters the first block."""
    total, n = None, 0
    for batch in batches:
        mask = _pictures(vlm, batch, None if total is None else len(total))
        (states,) = read(vlm, batch, 0, positions=mask, dtype=torch.float32).values()
        added = states.reshape(len(mask), -1, states.shape[-1]).sum(dim=0, dtype=torch.float64)
        total, n = added if total is None else total + added, n + len(mask)
    return (total / n).float()


def _up_to_words(
    vlm: VLM, batch: Batch, words: tuple[str, ...], at: str
) -> tuple[Batch, Bool[Tensor, "b t"]]:
    """The batch up to the last state of interest, and where that state is in each row.

    It sees nothing of what is behind it.
    """
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    for row, answer in enumerate(batch.mask("answer")):
        places = answer.nonzero().flatten()
        hit = find_words(vlm.tokenizer, batch["input_ids"][row, places].tolist(), words)
        if hit is None:
            told = vlm.tokenizer.decode(batch["input_ids"][row, places])
            raise SelectionError(
                f"none of {', '.join(map(repr, words))} in the answer {told!r}",
                "leave out samples without these words",
            )
        mask[row, places[hit[0].start] - 1 if at == SIDES[0] else places[hit[0].stop - 1]] = True
    end, shape = int(mask.any(dim=0).nonzero().max()) + 1, batch.spans.shape
    cut = {
        name: value[:, :end] if getattr(value, "shape", ())[:2] == shape else value
        for name, value in batch.items()
    }
    return vlm.prepare(cut, batch.spans[:, :end]), mask[:, :end]


def _occluded(
    vlm: VLM, batch: Batch, mask: Bool[Tensor, "b t"], layer: int, means: Float[Tensor, "j d"]
) -> Float[Tensor, "1+j b d"]:
    """The states of interest of whole pictures, and with each image token replaced in turn.

    The vision tower runs once.
    """
    pictures, run = _pictures(vlm, batch, len(means)), Resumable(vlm, batch)
    found, number = [run.read(layer, mask, dtype=torch.float32)], pictures.cumsum(dim=1)
    for j, mean in enumerate(means, 1):
        where = pictures & (number == j)
        found.append(
            run.read(layer, mask, change=replace(vlm, mean, 0, where), dtype=torch.float32)
        )
    return torch.stack(found)


def _projected(
    vlm: VLM,
    samples: list[Sample],
    directions: Float[Tensor, "c d"],
    layer: int,
    prompt: str,
    batch_size: int,
) -> Tensor:
    found = capture(
        vlm, samples, layer, span="image", reduce=None, prompt=prompt, batch_size=batch_size
    )
    counts = found.table.groupby("sample").size()
    if (other := counts[counts != counts.iloc[0]]).size:
        raise ComparisonError("numbers of image tokens", counts.iloc[0], other.iloc[0], _ADVICE)
    states = found[layer].reshape(len(samples), -1, vlm.width)
    centred = states - states.mean(dim=0)
    length = centred.norm(dim=-1, keepdim=True)
    if (length <= 1e-6 * states.norm(dim=-1, keepdim=True)).any():
        raise ActivationsError(
            "an image token's state is its mean over the samples, and has no direction",
            "give pictures that differ",
        )
    if not (norms := directions.norm(dim=-1, keepdim=True)).all():
        raise ActivationsError(
            "a concept's direction is zero", "leave out concepts that are never used"
        )
    return torch.einsum("ntd,cd->nct", centred / length, directions / norms)
