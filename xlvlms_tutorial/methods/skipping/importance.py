"""Which blocks to leave out: some at random, or those that change their input least."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from xlvlms_tutorial.activations.hooks import span_mask
from xlvlms_tutorial.errors import ActivationsError, LayerError, LengthError, SelectionError
from xlvlms_tutorial.interventions.token_skipping import check_spans
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output
from xlvlms_tutorial.samples import PROMPTS, Sample

Samples = Sequence[Sample] | Sequence[str]
Answers = Sequence[str] | Callable[[Sample], str] | None
Prompt = str | Callable[[Sample], str] | None


def random_layers(n_layers: int, k: int, seed: int, protect: Collection[int] = ()) -> list[int]:
    """The numbers of k of the layers 1 to L, drawn at random, in order.

    Without those that are protected.

    Raises
    ------
    LayerError
        If a protected layer is none of 1 to L.
    SelectionError
        If k is negative, or there are fewer layers to draw from.
    """
    for layer in protect:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 1 <= layer <= n_layers:
            raise LayerError(layer, 1, n_layers)
    left = [layer for layer in range(1, n_layers + 1) if layer not in set(protect)]
    if not 0 <= k <= len(left):
        raise SelectionError(
            f"{k} layers", f"give 0 to {len(left)}: those of {n_layers} that are not protected"
        )
    return sorted(np.random.default_rng(seed).choice(left, k, replace=False).tolist())


@torch.no_grad()
def block_similarity(
    vlm: VLM,
    samples: Samples,
    span: str | Sequence[str] = ("image", "question"),
    answers: Answers = None,
    prompt: Prompt = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    r"""How little each block changes its input.

    Columns layer, span, similarity and n, the number of positions it is a mean of.

    .. math:: \mathrm{similarity}_l = \frac{1}{n} \sum_i \cos(h_i^{l-1}, h_i^l)

    One row for each layer and kind of position in ``span``, over all samples. The cosines are
    computed while the model runs, and nothing but their sums is kept. Answers are read too if
    given; ``prompt`` asks for a description unless it says otherwise (one text, or one for each
    sample). Samples may be plain texts: these are "question".

    Raises
    ------
    SelectionError
        If there are no samples, the batch size is below 1, or a block is never computed.
    SpanError
        If a kind of position is unknown, or the model or some sample has none.
    LengthError
        If answers and samples are not equally many.
    ActivationsError
        If a state is zero, NaN or infinite.
    """
    names = check_spans(span if isinstance(span, str) else tuple(span))
    sums = torch.zeros(vlm.n_layers, len(SPANS), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for batch in _shown(
        batches_of(vlm, samples, answers, prompt, batch_size), "similarity", progress
    ):
        kinds = batch.spans[
            torch.stack([span_mask(vlm, batch, (name,)) for name in names]).any(dim=0)
        ]
        with _cosines(vlm, torch.isin(batch.spans, kinds)) as found:
            vlm.forward(batch, logits=False, use_cache=False)
        for layer, cosines in found.items():
            sums[layer - 1].index_add_(0, kinds.cpu(), cosines)
            counts[layer - 1].index_add_(0, kinds.cpu(), torch.ones_like(cosines))
    rows = [
        (layer, name, SPANS.index(name)) for layer in range(1, vlm.n_layers + 1) for name in names
    ]
    if absent := [layer for layer, _, k in rows if not counts[layer - 1, k]]:
        raise SelectionError(
            f"layer {absent[0]} was never computed", "show a picture, or leave out what skips it"
        )
    return pd.DataFrame(
        [
            (
                layer,
                name,
                float(sums[layer - 1, k] / counts[layer - 1, k]),
                int(counts[layer - 1, k]),
            )
            for layer, name, k in rows
        ],
        columns=["layer", "span", "similarity", "n"],
    )


def similarity_order(table: pd.DataFrame, k: int | None = None) -> list[int]:
    """Layers from the one whose output is most like its input on.

    The first k of them, or all (ties by number). ``table`` is that of :func:`block_similarity`, or
    any with columns layer and similarity; several rows of a layer count by their mean.

    Raises
    ------
    SelectionError
        If a column is missing, a similarity is NaN, or there are fewer than k layers.
    """
    if missing := {"layer", "similarity"} - set(table.columns):
        raise SelectionError(
            f"a table without {' and '.join(sorted(missing))}", "give that of block_similarity"
        )
    if table["similarity"].isna().any():
        raise SelectionError("similarities that are NaN", "give a number for every layer")
    found = (
        table.groupby("layer")["similarity"]
        .mean()
        .sort_index()
        .sort_values(ascending=False, kind="stable")
        .index.tolist()
    )
    if k is not None and not 0 <= k <= len(found):
        raise SelectionError(f"{k} of {len(found)} layers", f"give 0 to {len(found)}")
    return found[:k]


def batches_of(
    vlm: VLM, samples: Samples, answers: Answers, prompt: Prompt, batch_size: int
) -> list[Batch]:
    """The batches that are run, made once.

    Of samples with their prompts and answers, or of plain texts as they are.

    Raises
    ------
    SelectionError
        If there are no samples, the batch size is below 1, or plain texts are empty,
        among samples or have answers.
    LengthError
        If answers and samples are not equally many.
    """
    samples = list(samples)
    if not samples or batch_size < 1:
        raise SelectionError(
            f"{len(samples)} samples in batches of {batch_size}", "give at least one of each"
        )
    told = [answers(sample) for sample in samples] if callable(answers) else answers
    if told is not None and len(told) != len(samples):
        raise LengthError(samples=len(samples), answers=len(told))
    cuts = [slice(start, start + batch_size) for start in range(0, len(samples), batch_size)]
    if any(isinstance(sample, str) for sample in samples):
        if told is not None or not all(
            isinstance(sample, str) and sample.strip() for sample in samples
        ):
            raise SelectionError(
                "texts with answers, empty ones, or texts among samples",
                "give plain texts alone, or samples alone",
            )
        return [
            vlm.prepare(vlm.tokenizer(samples[cut], return_tensors="pt", padding=True))
            for cut in cuts
        ]
    default = PROMPTS.get(samples[0].modality, PROMPTS["image"])
    asked = [prompt(sample) if callable(prompt) else prompt or default for sample in samples]
    return [
        vlm.batch_of(samples[cut], asked[cut], None if told is None else list(told[cut]))
        for cut in cuts
    ]


def _shown(batches: list[Batch], what: str, progress: bool) -> Iterator[Batch]:
    return iter(tqdm(batches, desc=what, unit="batch", leave=False, disable=not progress))


@contextmanager
def _cosines(vlm: VLM, mask: Bool[Tensor, "b t"]) -> Iterator[dict[int, Float[Tensor, "n"]]]:
    """The cosine of each block's input with its output, row by row, while the model runs.

    At the positions of a mask.
    """
    found: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}

    def taken(states: Tensor) -> Tensor:
        return states[mask.to(states.device)].float()  # a copy: a block may write into its input

    def before(layer: int, states: Tensor) -> None:
        entered[layer] = taken(states)

    def after(layer: int, states: Tensor) -> None:
        x, y = entered.pop(layer), taken(states)
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
        # rounding takes the cosine of equal states beyond 1
        cosines = ((x * y).sum(dim=1) / norms).clamp(-1, 1)
        if not torch.isfinite(cosines).all():
            raise ActivationsError(
                f"states before or after block {layer} are zero, NaN or infinite",
                "look for damaged weights",
            )
        found[layer] = cosines.double().cpu()

    with ExitStack() as stack:
        for layer, block in enumerate(vlm.blocks, 1):
            stack.enter_context(on_input(block, partial(before, layer)))
            stack.enter_context(on_output(block, partial(after, layer)))
        yield found
