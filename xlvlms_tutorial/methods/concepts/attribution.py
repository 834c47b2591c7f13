"""Attribution: which image tokens a concept comes from.

Either what each image token adds to the concept's code (occlusion), or how well the activation of
the image token itself agrees with the concept's direction.
"""

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import read, span_mask, wanted
from xlvlms_tutorial.activations.rows import SIDES
from xlvlms_tutorial.errors import InputError, incomparable
from xlvlms_tutorial.interventions.edits import patch
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.methods.concepts.base import Dictionary
from xlvlms_tutorial.models.batching import answers_of, batches
from xlvlms_tutorial.models.spans import Batch, find_words
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.validation import require_counts, require_one_of

_METHODS = ("occlusion", "activation")  # the argument ``method`` of concept_heatmap
_ADVICE = "give pictures of one size, so that the same token is the same place in all of them"


def concept_heatmap(
    vlm: VLM,
    samples: Sequence[Sample],
    dictionary: Dictionary,
    concepts: Sequence[int],
    layer: int,
    words: str | Sequence[str] | None = None,
    answers: Sequence[str] | Callable[[Sample], str] | None = None,
    side: str = "predicting",
    method: str = "occlusion",
    batch_size: int = 16,
    prompt: str = PROMPTS["image"],
) -> Float[Tensor, "n c t"]:
    r"""Compute how much each image token contributes to each concept in each sample.

    Use it to see where in a picture a concept comes from; :func:`to_grid` turns the values into a
    map of rows and columns. "occlusion" measures what the token of interest loses without an image
    token and costs a forward over the samples for each image token (the vision tower runs twice in
    all). "activation" compares directions in a single forward.

    Parameters
    ----------
    vlm : VLM
        The model whose activations the dictionary was fitted on.
    samples : sequence of Sample
        Two samples or more, with pictures that have the same number of image tokens.
    dictionary : Dictionary
        A fitted dictionary, as wide as the model.
    concepts : sequence of int
        Numbers of the concepts, rows of ``dictionary.components_``.
    layer : int
        The layer of the activations, from 0 (input of the first block) to L.
    words : str or sequence of str, optional
        Words or phrases of interest; the first one that occurs in each answer is the token of
        interest. Needed for "occlusion", not used by "activation".
    answers : sequence of str or function, optional
        One answer for each sample that has one of the words, or a function of the sample that
        returns it. Needed for "occlusion", not used by "activation".
    side : {"predicting", "token"}, default "predicting"
        The position of the token of interest: the one that predicts the first piece of the word, or
        the word's last piece.
    method : {"occlusion", "activation"}, default "occlusion"
        "occlusion" is :math:`z_k(h) - z_k(h^{(j)})`: the code of the activation of the token of
        interest minus the same code with image token j replaced, where it enters the decoder, by
        the mean of that token over all samples. It is positive where the token adds to the concept.
        "activation" is the cosine of the concept's direction with the activation of the image token
        itself at the layer, centred by the mean of that token over all samples.
    batch_size : int, default 16
        Samples in a forward.
    prompt : str
        The question about each picture; by default the model is asked to describe it.

    Returns
    -------
    Tensor (samples, concepts, image tokens)
        The contributions, on the CPU.

    Raises
    ------
    InputError
        If ``method``, ``side`` or a concept is unknown, there is no sample, or the words and
        answers of an occlusion are missing or do not occur. If dictionary and model differ in
        width, or the samples in their number of image tokens. If there is a single sample, or an
        image token has the same activation in all samples, so that nothing remains of it without
        the mean. If the numbers of answers and samples differ.
    LayerError, SpanError
        If the model has no such layer, or the samples have no image tokens.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import capture
    >>> from xlvlms_tutorial.methods.concepts import PCA, to_grid, concept_heatmap
    >>> states = capture(vlm, samples, layers=15, span="image")
    >>> dictionary = PCA(n_components=2).fit(states[15])
    >>> maps = concept_heatmap(
    ...     vlm, samples, dictionary, concepts=[0, 1], layer=15, method="activation"
    ... )
    >>> maps.shape
    torch.Size([4, 2, 16])
    >>> to_grid(maps).shape
    torch.Size([4, 2, 4, 4])
    """
    samples, concepts = list(samples), list(concepts)
    _check(vlm, samples, dictionary, concepts, layer)
    require_one_of(method, _METHODS, "way")
    if method == "activation":
        directions = torch.as_tensor(dictionary.components_)[concepts].float()
        return _projected(vlm, samples, directions, layer, prompt, batch_size)
    if words is None or answers is None:
        raise InputError(
            "an occlusion without words or answers",
            "give the words of interest and one answer a sample that has one",
        )
    if side not in SIDES:
        sides = ", ".join(map(repr, SIDES))
        raise InputError(f"side={side!r}", f"allowed: {sides}")
    answers = answers_of(samples, answers)
    require_counts(batch_size=batch_size)
    words = (words,) if isinstance(words, str) else tuple(words)
    means = _means(vlm, batches(vlm, samples, prompt, batch_size=batch_size))
    parts = []
    for batch in batches(vlm, samples, prompt, answers, batch_size=batch_size):
        prefix, mask = up_to_words(vlm, batch, words, side)
        states = _occluded(vlm, prefix, mask, layer, means)
        n_passes, n_rows = states.shape[:2]
        all_codes = torch.as_tensor(dictionary.transform(states.flatten(0, 1)))
        codes = all_codes[:, concepts].float().reshape(n_passes, n_rows, -1)
        drops = codes[:1] - codes[1:]  # from the picture intact
        parts.append(drops.permute(1, 2, 0))
    return torch.cat(parts)


def to_grid(heat: Float[Tensor, "*n t"]) -> Float[Tensor, "*n side side"]:
    """Reshape values of image tokens into rows and columns of the picture.

    Use it to draw the result of :func:`heat` over a picture. It fits vision towers that cut a
    square picture into a square of patches and return them row by row.

    Parameters
    ----------
    heat : Tensor (..., t)
        One value for each image token; t is a square number.

    Returns
    -------
    Tensor (..., side, side)
        The same values with :math:`t = side^2`.

    Raises
    ------
    InputError
        If t is not a square number. If a value is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.concepts import to_grid
    >>> to_grid(torch.tensor([0.0, 1.0, 2.0, 3.0])).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    tokens = heat.shape[-1] if heat.ndim else 0
    side = round(tokens**0.5)
    if not tokens or side * side != tokens:
        raise InputError(
            f"{tokens} image tokens are no square",
            "reshape them as the model's tower lays them out",
        )
    if not heat.isfinite().all():
        bad = int((~heat.isfinite()).sum())
        raise InputError(
            f"{bad} of {heat.numel()} values are NaN or infinite",
            "load the model in float32 or bfloat16, and check the dictionary",
        )
    return heat.unflatten(-1, (side, side))


def _check(
    vlm: VLM, samples: list[Sample], dictionary: Dictionary, concepts: list[int], layer: int
) -> None:
    wanted(vlm, layer)
    n, width = dictionary.components_.shape
    if width != vlm.width:
        raise incomparable(
            "widths",
            f"a dictionary of {width}",
            f"{vlm.width} of {vlm.name}",
            "use the dictionary of this model",
        )
    for concept in concepts:
        if isinstance(concept, bool) or not isinstance(concept, Integral) or not 0 <= concept < n:
            raise InputError(f"concept {concept!r}", f"allowed: 0 to {n - 1}")
    if not samples or not concepts:
        raise InputError("no samples or no concepts", "give at least two samples and one concept")
    if len(samples) < 2:
        raise InputError(
            "one sample is its own mean, and differs from it nowhere", "give at least two"
        )


def image_mask(vlm: VLM, batch: Batch, expected: int | None = None) -> Bool[Tensor, "b t"]:
    """Mask of the image tokens of a batch of ``vlm``, the same number in each row.

    The number is ``expected``, or by default that of the first row.
    """
    mask = span_mask(vlm, batch, ("image",))
    counts = mask.sum(dim=1).tolist()
    _require_same_count(counts, counts[0] if expected is None else expected)
    return mask


def _require_same_count(counts: list[int], expected: int) -> None:
    for count in counts:
        if count != expected:
            raise incomparable("numbers of image tokens", expected, count, _ADVICE)


def _means(vlm: VLM, inputs: Iterator[Batch]) -> Float[Tensor, "t d"]:
    """The mean over samples of each image token as it enters the first block."""
    total = None
    n = 0
    for batch in inputs:
        mask = image_mask(vlm, batch, None if total is None else len(total))
        (states,) = read(vlm, batch, 0, positions=mask, dtype=torch.float32).values()
        batch_total = states.reshape(len(mask), -1, states.shape[-1]).sum(
            dim=0, dtype=torch.float64
        )
        total = batch_total if total is None else total + batch_total
        n += len(mask)
    return (total / n).float()


def up_to_words(
    vlm: VLM, batch: Batch, words: tuple[str, ...], side: str
) -> tuple[Batch, Bool[Tensor, "b t"]]:
    """The batch up to the last token of interest, and the mask of that token in each row.

    The token of interest is, in each answer, the last one of the first of ``words``, or with
    the first ``side`` of ``SIDES`` the one before the word, which predicts it. What comes after
    it is cut off: in the causal decoder of ``vlm`` it has no influence.
    """
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    for row, answer in enumerate(batch.mask("answer")):
        positions = answer.nonzero().flatten()
        ids = batch["input_ids"][row, positions]
        match = find_words(vlm.tokenizer, ids.tolist(), words)
        if match is None:
            listed = ", ".join(map(repr, words))
            raise InputError(
                f"none of {listed} in the answer {vlm.tokenizer.decode(ids)!r}",
                "leave out samples without these words",
            )
        pieces, _ = match
        position = positions[pieces.stop - 1]
        if side == SIDES[0]:
            position = positions[pieces.start] - 1
        mask[row, position] = True
    end = int(mask.any(dim=0).nonzero().max()) + 1
    inputs = {}
    for name, value in batch.items():
        per_token = getattr(value, "shape", ())[:2] == batch.spans.shape
        inputs[name] = value[:, :end] if per_token else value
    return vlm.prepare(inputs, batch.spans[:, :end]), mask[:, :end]


def _occluded(
    vlm: VLM, batch: Batch, mask: Bool[Tensor, "b t"], layer: int, means: Float[Tensor, "j d"]
) -> Float[Tensor, "1+j b d"]:
    """Activations of interest with the picture intact, then with each image token replaced.

    The vision tower runs once.
    """
    image = image_mask(vlm, batch, len(means))
    number = image.cumsum(dim=1)  # of each image token within its row, from 1
    run = Resumable(vlm, batch)
    states = [run.read(layer, mask, dtype=torch.float32)]
    for j, mean in enumerate(means, 1):
        hide = patch(vlm, mean, 0, image & (number == j))
        states.append(run.read(layer, mask, change=hide, dtype=torch.float32))
    return torch.stack(states)


def _projected(
    vlm: VLM,
    samples: list[Sample],
    directions: Float[Tensor, "c d"],
    layer: int,
    prompt: str,
    batch_size: int,
) -> Tensor:
    """Compute the cosine of each image token, centred over the samples, with each direction."""
    captured = capture(
        vlm, samples, layer, span="image", reduce=None, prompt=prompt, batch_size=batch_size
    )
    counts = captured.table.groupby("sample").size().tolist()
    _require_same_count(counts, counts[0])
    states = captured[layer].reshape(len(samples), -1, vlm.width)
    centred = states - states.mean(dim=0)
    length = centred.norm(dim=-1, keepdim=True)
    if (length <= 1e-6 * states.norm(dim=-1, keepdim=True)).any():
        raise InputError(
            "an image token's state is its mean over the samples, and has no direction",
            "give pictures that differ",
        )
    norms = directions.norm(dim=-1, keepdim=True)
    if not norms.all():
        raise InputError("a concept's direction is zero", "leave out concepts that are never used")
    return torch.einsum("ntd,cd->nct", centred / length, directions / norms)
