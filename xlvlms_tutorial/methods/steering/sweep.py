"""Steering tried at many layers and strengths.

Each batch is read once, and a steered pass computes only the blocks above its layer.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from xlvlms_tutorial.activations.hooks import computed, reading
from xlvlms_tutorial.errors import LengthError, SelectionError
from xlvlms_tutorial.interventions.overrides import Positions, checked_layers
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.methods.steering.vectors import SteeringVectors
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample

Score = Callable[[list[str]], Mapping[str, float]]
Vectors = SteeringVectors | Mapping[Hashable, SteeringVectors]

_UNSTEERED = ("generated", "answer")  # positions that leave the first token as it is


class Run(NamedTuple):
    """One way to steer: by which vectors, at which layer, how strongly."""

    name: Hashable
    vectors: SteeringVectors
    layer: int
    strength: float

    def steering(self, vlm: VLM, positions: Positions) -> AbstractContextManager:
        """The context in which the model is steered in this way."""
        return self.vectors.steer(vlm, self.layer, self.strength, positions)


def sweep(
    vlm: VLM,
    vectors: Vectors,
    samples: Sequence[Sample],
    prompts: str | Sequence[str],
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    score: Score | None = None,
    *,
    positions: str | tuple[str, ...] = "all",
    max_new_tokens: int | None = None,
    answers: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """What steering does to the first token of the answers, for each layer and strength.

    Columns layer, strength, n, changed and scores. ``prompts`` is one question for all samples, or
    one for each. ``changed`` is the share of samples whose answer is no longer the one without
    steering. ``score`` gets all answers in the order of the samples, stripped, and returns numbers
    by name, one column each; with ``answers`` they are in a column of that name. Strength 0 is the
    model as it is, and costs nothing. ``vectors`` may also be several by name, for a column
    ``vector``; ``layers`` are by default all with a vector that is not zero. With
    ``max_new_tokens`` the answers are generated whole and greedily, else the first token is the
    likeliest of the whole vocabulary.

    Of first tokens, a batch goes through the model once, and steered passes start at their layer
    from the states that were read, where this gives the logits of the whole forward (which is tried
    first on two samples, for each layer); elsewhere they are whole forwards.

    Raises
    ------
    SelectionError
        If there are no samples, layers or strengths, a strength is not finite, or the positions
        leave the first token as it is.
    LayerError
        If the model or the vectors have no such layer.
    LengthError
        If samples and prompts are not equally many.
    ActivationsError, ComparisonError
        If a vector is zero, or of another model.
    """
    samples = list(samples)
    asked = [prompts] * len(samples) if isinstance(prompts, str) else list(prompts)
    _check(samples, asked, positions, max_new_tokens, batch_size)
    runs = _runs(vlm, vectors, layers, strengths)
    fast = (
        set()
        if max_new_tokens is not None
        else _fast_layers(vlm, samples, asked, {run.layer for run in runs})
    )
    said: list[list[str]] = [[] for _ in range(len(runs) + 1)]
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="sweep", unit="batch", leave=False) if progress else starts:
        part = slice(start, start + batch_size)
        batch = vlm.batch_of(samples[part], asked[part])
        for found, ids in zip(
            said, _said(vlm, batch, runs, positions, fast, max_new_tokens), strict=True
        ):
            found += [
                text.strip() for text in vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
            ]
    return _table(runs, said, score, answers, named=not isinstance(vectors, SteeringVectors))


def first_ids(
    vlm: VLM,
    batch: Batch,
    runs: Sequence[Run],
    positions: Positions = "all",
    fast: Collection[int] = (),
) -> Iterator[Int[Tensor, "b"]]:
    """The likeliest first token of each sample without steering, then for each run.

    ``fast`` layers are where passes may start.
    """
    replay = Replay(vlm, batch, set(fast) & {run.layer for run in runs if run.strength})
    base = replay.base.argmax(dim=-1)
    yield base
    for run in runs:
        if not run.strength:
            yield base
        elif run.layer in fast:
            yield replay.logits(run.layer, run.steering(vlm, positions)).argmax(dim=-1)
        else:
            with run.steering(vlm, positions):
                yield replay.forward().argmax(dim=-1)


class Replay(Resumable):
    """One forward over a batch, and the decoder again from a layer on.

    It starts with the states that were read there, without tower or connector.
    """

    def __init__(self, vlm: VLM, batch: Batch, layers: set[int]) -> None:
        super().__init__(vlm, batch)
        with reading(vlm, layers) if layers else nullcontext({}) as found:
            self.base = self.forward()
        self.states = {layer: parts[0] for (layer, _), parts in computed(found).items()}

    @torch.no_grad()
    def logits(self, layer: int, steering: AbstractContextManager) -> Float[Tensor, "b v"]:
        """The logits of the first token, from the states read at this layer."""
        last = self.read(
            self.vlm.n_layers, "last", start=layer, states=self.states[layer], change=steering
        )
        return self.vlm.unembed(last[:, 0])

    def holds(self, layer: int) -> bool:
        """Whether starting at this layer without steering gives the logits of the whole forward.

        Up to rounding.
        """
        return same_up_to_rounding(self.logits(layer, nullcontext()), self.base, self.vlm.dtype)


def fast_layers(vlm: VLM, batch: Batch, layers: set[int]) -> set[int]:
    """The layers at which steered passes of this model may start.

    None while something else changes the model.
    """
    if vlm.active:
        return set()
    replay = Replay(vlm, batch, layers)
    return {layer for layer in layers if len(replay.calls) == 1 and replay.holds(layer)}


def _fast_layers(vlm: VLM, samples: list[Sample], asked: list[str], layers: set[int]) -> set[int]:
    ends = sorted(
        {
            min(range(len(asked)), key=lambda k: len(asked[k])),
            max(range(len(asked)), key=lambda k: len(asked[k])),
        }
    )
    # unlike lengths: padding too
    return fast_layers(
        vlm, vlm.batch_of([samples[k] for k in ends], [asked[k] for k in ends]), layers
    )


def _said(
    vlm: VLM,
    batch: Batch,
    runs: list[Run],
    positions: Positions,
    fast: set[int],
    max_new_tokens: int | None,
) -> Iterator[Int[Tensor, "b t"]]:
    """The ids of the answers of a batch, without steering and then for each run."""
    if max_new_tokens is None:
        yield from (ids[:, None] for ids in first_ids(vlm, batch, runs, positions, fast))
        return
    base = vlm.generate_ids(batch, max_new_tokens)
    yield base
    for run in runs:
        with run.steering(vlm, positions) if run.strength else nullcontext():
            yield vlm.generate_ids(batch, max_new_tokens) if run.strength else base


def _check(
    samples: list[Sample],
    asked: list[str],
    positions: Positions,
    max_new_tokens: int | None,
    batch_size: int,
) -> None:
    if not samples:
        raise SelectionError("no samples", "give at least one")
    if len(asked) != len(samples):
        raise LengthError(samples=len(samples), prompts=len(asked))
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise SelectionError(
            f"batch_size {batch_size}, max_new_tokens {max_new_tokens}", "give at least 1"
        )
    named = {positions} if isinstance(positions, str) else set(positions)
    if max_new_tokens is None and named <= set(_UNSTEERED):
        raise SelectionError(
            f"positions {positions!r} leave the first token as it is",
            "give max_new_tokens, or other positions",
        )


def _runs(
    vlm: VLM, vectors: Vectors, layers: Sequence[int] | None, strengths: Sequence[float]
) -> list[Run]:
    known = {None: vectors} if isinstance(vectors, SteeringVectors) else dict(vectors)
    found = []
    for name, one in known.items():
        at = [layer for layer, norm in one.norms.items() if norm] if layers is None else layers
        found += [
            Run(name, one, layer, strength)
            for layer in checked_layers(vlm, at, first=0)
            for strength in strengths
        ]
    if not found:
        raise SelectionError(
            f"vectors {list(known)}, layers {layers!r}, strengths {strengths!r}",
            "give at least one of each",
        )
    for run in found:
        run.vectors.checked(vlm, run.layer, run.strength)
    return found


def _table(
    runs: list[Run], said: list[list[str]], score: Score | None, answers: bool, named: bool
) -> pd.DataFrame:
    base, rows = said[0], []
    for run, told in zip(runs, said[1:], strict=True):
        changed = sum(one != other for one, other in zip(told, base, strict=True)) / len(base)
        row = {
            "vector": run.name,
            "layer": run.layer,
            "strength": run.strength,
            "n": len(base),
            "changed": changed,
        }
        scores = {} if score is None else dict(score(list(told)))
        if taken := set(scores) & {*row, "answers"}:
            raise SelectionError(
                f"scores named {', '.join(map(repr, sorted(taken)))}",
                f"allowed: other names than {', '.join(row)}, answers",
            )
        rows.append(row | scores | ({"answers": told} if answers else {}))
    table = pd.DataFrame(rows)
    return table if named else table.drop(columns="vector")
