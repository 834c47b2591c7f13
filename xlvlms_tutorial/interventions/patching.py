"""Activation patching between two inputs, by layer and span or position."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from xlvlms_tutorial.activations.hooks import computed, reading
from xlvlms_tutorial.interventions.edits import patch
from xlvlms_tutorial.interventions.overrides import (
    Layers,
    Positions,
    checked_layers,
    checked_positions,
    fit,
    prompt_mask,
)
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_one_of

# takes the logits (b, v) of the last position, and returns one number a sample
Metric = Callable[[Float[Tensor, "b v"]], Float[Tensor, "b"]]
DIRECTIONS = ("denoise", "noise")


@dataclass(frozen=True)
class PatchingGrid:
    """What patching did to a metric, by layer, span and sample.

    Parameters
    ----------
    values : array (layers, columns, b)
        The metric of each sample with the states of one layer and one span patched.
    clean, corrupt : array (b,)
        The metric of each sample with nothing patched.
    layers : tuple of int
        The layers, in the order of the rows.
    columns : tuple
        The names of the spans, or the positions.
    direction : str
        "denoise" or "noise".

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.interventions.patching import PatchingGrid
    >>> values = np.array([[[1.0, 3.0]], [[0.0, 0.0]]])
    >>> result = PatchingGrid(values, np.full(2, 4.0), np.zeros(2), (0, 1), ("image",), "denoise")
    >>> result.shares()["image"].tolist()
    [0.5, 0.0]
    """

    values: Float[np.ndarray, "layers columns b"]
    clean: Float[np.ndarray, "b"]
    corrupt: Float[np.ndarray, "b"]
    layers: tuple[int, ...]
    columns: tuple[Hashable, ...]
    direction: str

    def shares(self) -> pd.DataFrame:
        """Return which share of the way from one input to the other each patch went.

        Use it to draw the map. The metric's means over the samples are compared.

        Returns
        -------
        DataFrame
            Layers x columns. 0: the metric stays as it was without patching. 1: it is that of the
            input whose states were patched in. NaN where both inputs have one mean.

        Examples
        --------
        >>> import numpy as np
        >>> from xlvlms_tutorial.interventions.patching import PatchingGrid
        >>> ends = np.array([4.0]), np.array([0.0])
        >>> PatchingGrid(np.array([[[1.0]]]), *ends, (0,), ("image",), "noise").shares().iloc[0, 0]
        np.float64(0.75)
        """
        changes = self.changes().mean(axis=2)
        table = pd.DataFrame(changes, list(self.layers), list(self.columns))
        return table.rename_axis("layer")

    def changes(self) -> Float[np.ndarray, "layers columns b"]:
        """Return the share of the way for each sample, in units of the samples' mean way.

        Use it for intervals over samples: the mean over the last axis is what ``shares`` gives.

        Returns
        -------
        array (layers, columns, b)
            The change of the metric by each patch over the mean change from one input to the other.

        Examples
        --------
        >>> import numpy as np
        >>> from xlvlms_tutorial.interventions.patching import PatchingGrid
        >>> ends = np.array([3.0, 1.0]), np.zeros(2)
        >>> grid = PatchingGrid(np.array([[[3.0, 0.0]]]), *ends, (0,), ("image",), "denoise")
        >>> grid.changes()[0, 0].tolist()
        [1.5, 0.0]
        """
        start, end = self.corrupt, self.clean
        if self.direction == "noise":
            start, end = end, start
        way = float((end - start).mean())
        return (self.values - start) / (way if way else float("nan"))


def patch_spans(
    vlm: VLM,
    clean: Batch,
    corrupt: Batch,
    spans: Sequence[str] | Mapping[Hashable, Positions],
    layers: Layers,
    metric: Metric,
    direction: str = "denoise",
    progress: bool = False,
) -> PatchingGrid:
    """Patch the states of one input into another, by layer and span.

    Use it to find where in depth, and at which positions, the fact lies in which two inputs differ
    (Vig et al., 2020, arXiv 2004.12265; Meng et al., 2022, arXiv 2202.05262). Both inputs run once;
    each patched pass starts at its layer from the states that were read there (all of them are held
    on the CPU: layers x b x t x d numbers an input). That this gives the logits of a whole forward
    is verified at the first and the last layer between 0 and L; where it does not,
    whole forwards are run.

    Parameters
    ----------
    vlm : VLM
        The model.
    clean, corrupt : Batch
        The two inputs, as ``vlm.batch`` makes them: row by row of one length, with the same spans
        at the same positions.
    spans : sequence of str, or mapping
        The positions that are patched together: names of spans, or a mapping of any names to
        positions: a span, "last", several in a tuple, a mask (b, t), or a function of the batch.
    layers : int or sequence of int
        The layers at which states are patched, 0 (embeddings) to L.
    metric : callable
        Takes the logits (b, v) of the last position in float32, and returns a number a sample, such
        as the difference of the logits of two answers.
    direction : "denoise" or "noise"
        "denoise" (default) patches states of the clean input into the corrupt one: what is enough
        to restore the metric? "noise" patches those of the corrupt one into the clean one: what is
        needed for it?
    progress : bool
        Whether a progress bar over layers is shown; not by default.

    Returns
    -------
    PatchingGrid
        The metric by layer, span and sample, with that of both inputs.

    Raises
    ------
    InputError
        If the inputs differ in length, spans or number of rows, there are no spans or layers, the
        direction is unknown, or the metric does not give one finite number a sample.
    LayerError
        If a layer is out of range.
    SpanError
        If the model or some sample has no such positions.
    InterventionError
        If positions are unknown or for another batch.

    Examples
    --------
    The neighbour's picture, patched in where the image tokens enter, changes all:

    >>> from xlvlms_tutorial.interventions import patch_spans
    >>> prompts = ["What colour is the sky?"] * 2
    >>> clean = vlm.batch_of(samples[:2], prompts)
    >>> corrupt = vlm.batch_of(samples[1::-1], prompts)
    >>> metric = lambda logits: logits[:, 0] - logits[0, 0]
    >>> result = patch_spans(vlm, clean, corrupt, ["image", "last"], [0, 30], metric)
    >>> result.values.shape
    (2, 2, 2)
    """
    if not isinstance(spans, Mapping):
        spans = {name: name for name in spans}
    require(spans, "no spans to patch", "name at least one, such as 'image'")
    _require_alike(clean, corrupt)
    require_one_of(direction, DIRECTIONS, "direction")
    selected = list(dict.fromkeys(checked_layers(vlm, layers, first=0)))
    require(selected, "no layers to patch at", "name at least one, 0 to L")
    masks = _masks(vlm, clean, spans)
    inputs = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    source, target = (_Run(vlm, batch, selected, metric) for batch in inputs)
    target.check_resuming(selected)
    values = []
    for layer in tqdm(selected, "patching", unit="layer", leave=False, disable=not progress):
        new, old = source.states[layer], target.states[layer]
        row = []
        for mask in masks.values():
            row.append(target.metric_from(layer, torch.where(mask[..., None], new, old)))
        values.append(row)
    ends = (source.value, target.value) if direction == "denoise" else (target.value, source.value)
    return PatchingGrid(np.array(values), *ends, tuple(selected), tuple(masks), direction)


def patch_positions(
    vlm: VLM,
    clean: Batch,
    corrupt: Batch,
    layers: Layers,
    metric: Metric,
    positions: Sequence[int] | None = None,
    direction: str = "denoise",
    progress: bool = False,
) -> PatchingGrid:
    """Patch the states of one input into another, by layer and single position.

    Use it where ``patch_spans`` has shown the span, to find the tokens in it. It costs a pass for
    each position and layer.

    Parameters
    ----------
    vlm : VLM
        The model.
    clean, corrupt : Batch
        The two inputs, of one length, as for :func:`patch_spans`.
    layers : int or sequence of int
        The layers at which states are patched, 0 to L.
    metric : callable
        As for :func:`patch_spans`.
    positions : sequence of int, optional
        Positions in the padded rows, from 0, or negative from the end; by default all that are
        padding in no row.
    direction : "denoise" or "noise"
        As for :func:`patch_spans`; "denoise" by default.
    progress : bool
        Whether a progress bar over layers is shown; not by default.

    Returns
    -------
    PatchingGrid
        The metric by layer, position and sample; its columns are the positions from 0.

    Raises
    ------
    InputError
        As for :func:`patch_spans`, or if a position is outside of the rows or padding in one.
    LayerError
        If a layer is out of range.

    Examples
    --------
    >>> from xlvlms_tutorial.interventions import patch_positions
    >>> prompts = ["What colour is the sky?"] * 2
    >>> clean = vlm.batch_of(samples[:2], prompts)
    >>> corrupt = vlm.batch_of(samples[1::-1], prompts)
    >>> metric = lambda logits: logits[:, 0]
    >>> result = patch_positions(vlm, clean, corrupt, 29, metric, positions=[3, -1])
    >>> result.columns, result.values.shape
    ((3, 30), (1, 2, 2))
    """
    _require_alike(clean, corrupt)
    length = clean.spans.shape[1]
    filled = (clean.spans != SPANS.index("padding")).all(dim=0)
    numbers = filled.nonzero().flatten().tolist() if positions is None else list(positions)
    columns: dict[Hashable, Positions] = {}
    for number in numbers:
        require(
            -length <= number < length and filled[number],
            f"position {number} of rows of {length}, outside of them or padding in one",
            "give positions that hold a token in every row",
        )
        mask = torch.zeros(clean.spans.shape, dtype=torch.bool)
        mask[:, number] = True
        columns[number % length] = mask
    return patch_spans(vlm, clean, corrupt, columns, layers, metric, direction, progress)


class _Run:
    """One input that has run: its states at the layers, and passes that start from other ones."""

    def __init__(self, vlm: VLM, batch: Batch, layers: list[int], metric: Metric) -> None:
        self.vlm = vlm
        self.run = Resumable(vlm, batch)
        self.metric = metric
        with reading(vlm, [*layers, vlm.n_layers]) as parts:
            self.logits = self.run.forward()
        self.states = {layer: states[0] for (layer, _), states in computed(parts).items()}
        self.value = self._measured(self.logits)
        self.resumes = True

    def check_resuming(self, layers: list[int]) -> None:
        """Verify that passes resumed at the outermost inner layers give the whole one's logits."""
        inner = [layer for layer in layers if 0 < layer < self.vlm.n_layers]
        for layer in {min(inner), max(inner)} if inner else ():
            logits = self._resumed(layer, self.states[layer])
            if not same_up_to_rounding(logits, self.logits.cpu(), self.vlm.dtype):
                self.resumes = False

    def metric_from(self, layer: int, states: Float[Tensor, "b t d"]) -> Float[np.ndarray, "b"]:
        """The metric of each sample with these states in place of those of a layer."""
        if self.resumes:
            return self._measured(self._resumed(layer, states))
        with patch(self.vlm, states, layer):
            return self._measured(Resumable(self.vlm, self.run.batch).forward())

    def _resumed(self, layer: int, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b v"]:
        last = self.vlm.n_layers
        if layer == last:
            final = states[:, -1]
        elif layer == 0:
            final = self.run.read(last, "last", change=patch(self.vlm, states, 0))[:, 0]
        else:
            final = self.run.read(last, "last", start=layer, states=states)[:, 0]
        return self.vlm.unembed(final).float().cpu()

    def _measured(self, logits: Float[Tensor, "b v"]) -> Float[np.ndarray, "b"]:
        values = torch.as_tensor(self.metric(logits.cpu())).double()
        require(
            values.shape == logits.shape[:1] and bool(values.isfinite().all()),
            f"a metric of shape {tuple(values.shape)} for {len(logits)} samples, or not finite",
            "return one finite number a sample, (b,)",
        )
        return values.numpy()


def _masks(
    vlm: VLM, batch: Batch, spans: Mapping[Hashable, Positions]
) -> dict[Hashable, Bool[Tensor, "b t"]]:
    """Return the positions of each span in the prompts, on the CPU."""
    masks = {}
    with vlm.run(batch):
        for name, positions in spans.items():
            mask = prompt_mask(
                vlm, checked_positions(positions), tuple(batch.spans.shape), batch.spans.device
            )
            masks[name] = fit(mask, len(batch.spans), "positions").cpu()
    return masks


def _require_alike(clean: Batch, corrupt: Batch) -> None:
    """Refuse two inputs whose positions do not stand for the same."""
    shapes = tuple(clean.spans.shape), tuple(corrupt.spans.shape)
    advice = (
        "give row by row prompts of one length: the same question about two pictures that take "
        "equally many tokens, or questions of equally many tokens"
    )
    require(
        shapes[0] == shapes[1],
        f"inputs of {shapes[0]} and {shapes[1]} (rows, positions), which cannot be patched",
        advice,
    )
    unequal = (clean.spans != corrupt.spans).any(dim=1).nonzero().flatten().tolist()
    require(
        not unequal,
        f"row {unequal[0] if unequal else 0} of the two inputs has other spans at its positions",
        advice,
    )
