"""Choose the blocks to skip: at random, or those that change their input least."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import LayerError
from xlvlms_tutorial.interventions.token_skipping import check_spans
from xlvlms_tutorial.models.batching import Answers, Prompts, Samples, batches
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output
from xlvlms_tutorial.validation import require


def random_layers(n_layers: int, k: int, seed: int, protect: Collection[int] = ()) -> list[int]:
    """Draw k of the layers 1 to L at random.

    Use it as a baseline for layers that are chosen by a rule.

    Parameters
    ----------
    n_layers : int
        The number L of layers.
    k : int
        How many layers are drawn.
    seed : int
        The seed of the draw: the same seed gives the same layers.
    protect : collection of int
        Layers that are not drawn. By default all may be.

    Returns
    -------
    list of int
        The numbers of the layers, in order.

    Raises
    ------
    LayerError
        If a protected layer is none of 1 to L.
    InputError
        If k is negative, or there are fewer layers to draw from.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import random_layers
    >>> random_layers(6, 4, seed=0, protect=[1, 6])
    [2, 3, 4, 5]
    >>> random_layers(32, 4, seed=0) == random_layers(32, 4, seed=0)
    True
    """
    for layer in protect:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 1 <= layer <= n_layers:
            raise LayerError(layer, 1, n_layers)
    candidates = sorted(set(range(1, n_layers + 1)).difference(protect))
    require(
        0 <= k <= len(candidates),
        f"{k} layers",
        f"give 0 to {len(candidates)}: those of {n_layers} that are not protected",
    )
    layers = np.random.default_rng(seed).choice(candidates, k, replace=False)
    return sorted(layers.tolist())


@torch.no_grad()
def block_similarity(
    vlm: VLM,
    samples: Samples,
    span: str | Sequence[str] = ("image", "question"),
    answers: Answers = None,
    prompt: Prompts = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    r"""Measure how similar the output of each block is to its input.

    Use it as a cheap guess of which blocks can be skipped: one forward for each batch, whatever the
    number of layers. What a block's absence really costs is measured by :func:`layer_importance`.

    .. math:: \mathrm{similarity}_l = \frac{1}{n} \sum_i \cos(h_i^{l-1}, h_i^l)

    The mean is over all n positions of one kind in all samples. The cosines are computed while the
    model runs, and nothing but their sums is kept.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample, or of str
        Samples with what they show, or plain texts. All positions of plain texts are "question".
    span : str or sequence of str
        The kinds of positions that are read, such as "image", "question" or "answer". By default
        the picture and the prompt. Give "question" for plain texts.
    answers : sequence of str, or function of a sample, optional
        The text that follows each sample's prompt. By default none. Not for plain texts.
    prompt : str, or function of a sample, optional
        What the model is asked. By default a description of what the sample shows.
    batch_size : int
        How many samples go through the model together.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    DataFrame
        One row for each layer and kind of position. Columns ``layer``, from 1 to L; ``span``, the
        kind; ``similarity``, from -1 to 1; ``n``, the number of positions in the mean.

    Raises
    ------
    InputError
        If there are no samples, the batch size is below 1, or a block is never computed. If the
        numbers of answers and samples differ. If a state is zero, NaN or infinite.
    SpanError
        If a kind of position is unknown, or the model or some sample has none.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import block_similarity
    >>> texts = ["A red ball lies on the grass."]
    >>> table = block_similarity(vlm, texts, span="question")
    >>> table.columns.tolist(), len(table)
    (['layer', 'span', 'similarity', 'n'], 30)
    """
    names = check_spans(span if isinstance(span, str) else tuple(span))
    if numbered := [name for name in names if name not in SPANS]:
        raise SpanError(numbered[0], "similarity is that of all of a kind", SPANS)
    sums = torch.zeros(vlm.n_layers, len(SPANS), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    inputs = batches(
        vlm, samples, prompt, answers, batch_size=batch_size, progress=progress, desc="similarity"
    )
    for batch in inputs:
        masks = [span_mask(vlm, batch, (name,)) for name in names]
        kinds = batch.spans[torch.stack(masks).any(dim=0)]
        with _cosines(vlm, torch.isin(batch.spans, kinds)) as by_layer:
            vlm.forward(batch, logits=False, use_cache=False)
        kinds = kinds.cpu()
        for layer, cosines in by_layer.items():
            sums[layer - 1].index_add_(0, kinds, cosines)
            counts[layer - 1].index_add_(0, kinds, torch.ones_like(cosines))
    rows = []
    for layer in range(1, vlm.n_layers + 1):
        for name in names:
            index = (layer - 1, SPANS.index(name))
            n = int(counts[index])
            require(
                n, f"layer {layer} was never computed", "show a picture, or leave out what skips it"
            )
            similarity = float(sums[index] / counts[index])
            rows.append((layer, name, similarity, n))
    return pd.DataFrame(rows, columns=["layer", "span", "similarity", "n"])


def rank_by_similarity(table: pd.DataFrame, k: int | None = None) -> list[int]:
    """Order layers by how similar their output is to their input, the most similar first.

    Use it to choose the blocks to skip from the table of :func:`block_similarity`.

    Parameters
    ----------
    table : DataFrame
        The table of :func:`block_similarity`, or any with columns ``layer`` and ``similarity``.
        Several rows of a layer count by their mean.
    k : int, optional
        How many layers are given. By default all.

    Returns
    -------
    list of int
        The first k layers. Of equal similarities the layer with the smaller number comes first.

    Raises
    ------
    InputError
        If a column is missing, a similarity is NaN, or there are fewer than k layers.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.skipping import rank_by_similarity
    >>> table = pd.DataFrame({"layer": [1, 2, 3], "similarity": [0.4, 0.9, 0.8]})
    >>> rank_by_similarity(table, k=2)
    [2, 3]
    """
    missing = {"layer", "similarity"} - set(table.columns)
    require(
        not missing,
        f"a table without {' and '.join(sorted(missing))}",
        "give that of block_similarity",
    )
    require(
        not table["similarity"].isna().any(),
        "similarities that are NaN",
        "give a number for every layer",
    )
    means = table.groupby("layer")["similarity"].mean().sort_index()
    order = means.sort_values(ascending=False, kind="stable").index.tolist()
    require(
        k is None or 0 <= k <= len(order), f"{k} of {len(order)} layers", f"give 0 to {len(order)}"
    )
    return order[:k]


@contextmanager
def _cosines(vlm: VLM, mask: Bool[Tensor, "b t"]) -> Iterator[dict[int, Float[Tensor, "n"]]]:
    """The cosine of each block's input with its output, by layer, while the model runs.

    Row by row, at the positions of a mask.
    """
    by_layer: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def masked(states: Tensor) -> Tensor:
        return states[mask.to(states.device)].float()  # a copy: a block may write into its input

    def before(layer: int, states: Tensor) -> None:
        inputs[layer] = masked(states)

    def after(layer: int, states: Tensor) -> None:
        x = inputs.pop(layer)
        y = masked(states)
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
        products = (x * y).sum(dim=1)
        # rounding takes the cosine of equal states beyond 1
        cosines = (products / norms).clamp(-1, 1)
        require(
            torch.isfinite(cosines).all(),
            f"states before or after block {layer} are zero, NaN or infinite",
            "look for damaged weights",
        )
        by_layer[layer] = cosines.double().cpu()

    with ExitStack() as stack:
        for layer, block in enumerate(vlm.blocks, 1):
            stack.enter_context(on_input(block, partial(before, layer)))
            stack.enter_context(on_output(block, partial(after, layer)))
        yield by_layer
