"""Steering tried at many layers and strengths.

Each batch is read once, and a steered pass computes only the blocks above its layer.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.hooks import computed, reading
from xlvlms_tutorial.interventions.overrides import Positions, checked_layers
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.methods.steering.vectors import SteeringVectors
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import batches, prompts_of, require_samples
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require

Score = Callable[[list[str]], Mapping[str, float]]
Vectors = SteeringVectors | Mapping[Hashable, SteeringVectors]

_UNSTEERED = ("generated", "answer")  # positions that leave the first token as it is
_JOINED = 4  # of how many batches the selected rows make one
# arguments of models and decoders that have a row for each prompt
_BY_ROW = {"input_ids", "inputs_embeds", "attention_mask", "pixel_values"}


class Run(NamedTuple):
    """One way to steer: by which vectors, at which layer, how strongly.

    :func:`sweep` makes one for each row of its table; make one to steer in the way of a row.

    Parameters
    ----------
    name : hashable
        What the vectors are called in the table, None where there is only one set of them.
    vectors : SteeringVectors
        The vectors to steer by.
    layer : int
        The layer whose vector is added there.
    strength : float
        The factor of the vector; 0 is the model as it is.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors
    >>> from xlvlms_tutorial.methods.steering.sweep import Run
    >>> vectors = SteeringVectors({24: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> run = Run("ones", vectors, layer=24, strength=2.0)
    >>> with run.steering(vlm, "all"):
    ...     print([text.split("(")[0] for text in vlm.active])
    ['add']
    """

    name: Hashable
    vectors: SteeringVectors
    layer: int
    strength: float

    def steering(self, vlm: VLM, positions: Positions) -> AbstractContextManager:
        """Return the context in which the model is steered in this way.

        Parameters
        ----------
        vlm : VLM
            The model that is steered.
        positions : str, tuple of str, or mask (b, t)
            Where the vector is added, as for :meth:`SteeringVectors.apply`.

        Returns
        -------
        context manager
            Steers inside its ``with`` block.
        """
        return self.vectors.apply(vlm, self.layer, self.strength, positions)


class Recorded:
    """Questions that ran once without steering, to be steered many times.

    Use it in place of samples where several sweeps ask the same questions: vision tower, connector
    and unsteered blocks run once for all of them. :func:`sweep` verifies on two samples that passes
    may start at a layer; it takes first-token answers only.

    Parameters
    ----------
    vlm : VLM
        The model, with nothing that changes it in force.
    samples : sequence of Sample
        The samples that are asked about.
    prompts : str or sequence of str
        One question for all samples, or one for each.
    layers : collection of int
        Layers whose activations (b, t, d) are held from the first pass on; by default none. Others
        are read when a sweep first needs them.
    batch_size : int
        The number of samples that go through the model together; by default 16.

    Attributes
    ----------
    samples : list of Sample
        What was asked about.
    order : list of int
        The numbers of the samples in the order of the batches, short questions first.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import Recorded, SteeringVectors, sweep
    >>> recorded = Recorded(vlm, samples, "What colour is the sky?")
    >>> vectors = SteeringVectors({29: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> sweep(vlm, vectors, recorded, strengths=(0.0, 4.0))["changed"][0].item()
    0.0
    >>> sweep(vlm, vectors, recorded.only([0, 2]))["n"].item()
    2
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        prompts: str | Sequence[str],
        layers: Collection[int] = (),
        batch_size: int = 16,
    ) -> None:
        require(
            not vlm.active,
            f"recording while {', '.join(vlm.active)} is in force",
            "record the model as it is, outside of the block",
        )
        self.vlm = vlm
        self.batch_size = batch_size
        self.samples = list(samples)
        _check(self.samples, "all", None, batch_size)
        self.questions = prompts_of(self.samples, prompts)
        self.resumes: dict[int, bool] = {}
        # batches of questions that are about as long hold little padding
        lengths = list(map(len, self.questions))
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__)
        ordered = [self.samples[number] for number in self.order]
        texts = [self.questions[number] for number in self.order]
        self.replays = []
        for batch in batches(vlm, ordered, texts, batch_size=batch_size):
            self.replays.append(Replay(vlm, batch, {*layers, vlm.n_layers}))

    @property
    def last_states(self) -> Float[Tensor, "n d"]:
        """What leaves the last layer at the last position of each prompt, without steering."""
        last = self.vlm.n_layers
        states = torch.cat([replay.states[last][:, -1] for replay in self.replays])
        return states[np.argsort(self.order)]

    @property
    def base(self) -> Float[Tensor, "n v"]:
        """The logits of the first token without steering, in the order of the batches."""
        return torch.cat([replay.base for replay in self.replays])

    def only(self, rows: Sequence[int]) -> "Recorded":
        """Return some of the questions, without running them again where the model allows it.

        It runs them again for models whose decoder gets more than a row for each prompt.

        Parameters
        ----------
        rows : sequence of int
            Their numbers, from 0, in ascending order.

        Returns
        -------
        Recorded
            These questions; activations are copies.
        """
        rows = sorted(rows)
        samples = [self.samples[row] for row in rows]
        questions = [self.questions[row] for row in rows]
        if not all(replay.by_row for replay in self.replays):
            return Recorded(self.vlm, samples, questions, (), self.batch_size)
        part = copy(self)
        part.samples = samples
        part.questions = questions
        parts = []
        part.order = []
        start = 0
        for replay in self.replays:
            numbers = self.order[start : start + len(replay.base)]
            inside = [row for row, number in enumerate(numbers) if number in rows]
            if inside:
                parts.append(replay.only(inside))
                part.order += [rows.index(numbers[row]) for row in inside]
            start += len(numbers)
        part.replays = []
        for first in range(0, len(parts), _JOINED):
            part.replays.append(Replay.joined(parts[first : first + _JOINED]))
        return part


def sweep(
    vlm: VLM,
    vectors: Vectors,
    samples: Sequence[Sample] | Recorded,
    prompts: str | Sequence[str] | None = None,
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
    """Measure what steering does to the answers, for each layer and strength.

    Use it on validation samples to find where and how strongly to steer, and :func:`best_setting`
    to take the best row. First-token answers are cheap: each batch goes once through the unsteered
    model, and every steered pass resumes at its layer from the activations that were read there.
    Resuming is verified on two samples for each layer; where its logits are not those of the whole
    forward, the whole forward is run.

    Parameters
    ----------
    vlm : VLM
        The model that is steered.
    vectors : SteeringVectors, or mapping of SteeringVectors
        The vectors to steer by, or several by name, for a column ``vector``.
    samples : sequence of Sample, or Recorded
        The samples that are asked about, or what was recorded of them once for several sweeps.
    prompts : str or sequence of str, optional
        One question for all samples, or one for each; by default that for what a sample shows. What
        was recorded has its own.
    layers : sequence of int, optional
        The layers that are tried, 0 to L. None (the default) tries all with a vector that is not
        zero.
    strengths : sequence of float
        The factors that are tried; by default 1 alone. 0 is the model as it is, and costs nothing.
    score : callable, optional
        A function of all answers, in the order of the samples and stripped, that returns numbers by
        name, one column each. None (the default) adds none.
    positions : str or tuple of str
        Where vectors are added, as for :meth:`SteeringVectors.apply`: by default "all".
    max_new_tokens : int, optional
        How many tokens of the answers are generated, greedily. None (the default) takes the
        likeliest first token of the whole vocabulary.
    answers : bool
        Whether the answers are returned too, in a column of that name; by default they are not.
    batch_size : int
        The number of samples that go through the model together; by default 16.
    progress : bool
        Whether a progress bar is shown; by default none is.

    Returns
    -------
    pd.DataFrame
        One row a vector, layer and strength. Columns vector (where there are several), layer,
        strength, n (samples), changed (the share of samples whose answer is no longer the one
        without steering), scores, and answers if asked for.

    Raises
    ------
    InputError
        If there are no samples, layers or strengths, a strength is not finite, or the positions
        leave the first token as it is. If samples and prompts are not equally many. If a vector is
        zero, or of another model.
    LayerError
        If the model or the vectors have no such layer.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors, sweep
    >>> vectors = SteeringVectors({29: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> table = sweep(vlm, vectors, samples, "What colour is the sky?", strengths=(0.0, 4.0))
    >>> list(table)
    ['layer', 'strength', 'n', 'changed']
    >>> table["n"].tolist()
    [4, 4]
    >>> table["changed"][0].item()
    0.0
    """
    if isinstance(samples, Recorded):
        recorded, samples, questions = samples, samples.samples, samples.questions
    else:
        recorded, samples = None, list(samples)
        questions = prompts_of(samples, prompts)
    _check(samples, positions, max_new_tokens, batch_size)
    _check_recorded(vlm, recorded, prompts, max_new_tokens)
    settings = _settings(vlm, vectors, layers, strengths)
    resumable: set[int] = set()
    if max_new_tokens is None:
        steered = {run.layer for run in settings}
        checked = {} if recorded is None else recorded.resumes
        if unchecked := steered - set(checked):
            fast = _fast_layers(vlm, samples, questions, unchecked)
            checked.update({layer: layer in fast for layer in unchecked})
        resumable = {layer for layer in steered if checked[layer]}
    texts: list[list[str]] = [[] for _ in range(len(settings) + 1)]  # first those unsteered
    if recorded is None:
        inputs = batches(
            vlm, samples, questions, batch_size=batch_size, progress=progress, desc="sweep"
        )
    else:
        inputs = recorded.replays
    for part in inputs:
        answer_ids = _answer_ids(vlm, part, settings, positions, resumable, max_new_tokens)
        for run_texts, ids in zip(texts, answer_ids, strict=True):
            decoded = vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
            run_texts.extend(map(str.strip, decoded))
    if recorded is not None:
        texts = [[run_texts[row] for row in np.argsort(recorded.order)] for run_texts in texts]
    named = not isinstance(vectors, SteeringVectors)
    return _table(settings, texts, score, answers, named)


def first_ids(
    vlm: VLM,
    batch: "Batch | Replay",
    runs: Sequence[Run],
    positions: Positions = "all",
    fast: Collection[int] = (),
) -> Iterator[Int[Tensor, "b"]]:
    """Yield the likeliest first token of each sample without steering, then for each run.

    Parameters
    ----------
    vlm : VLM
        The model that is steered.
    batch : Batch or Replay
        Prompts of one batch, or what was recorded of them.
    runs : sequence of Run
        The ways to steer.
    positions : str, tuple of str, or mask (b, t)
        Where vectors are added; by default "all".
    fast : collection of int
        The layers at which passes may start, from :func:`fast_layers`; by default none.

    Yields
    ------
    tensor (b,)
        Token ids.
    """
    steered = {run.layer for run in runs if run.strength}
    layers = set(fast) & steered
    if isinstance(batch, Replay):
        replay = batch
        replay.hold(layers)
    else:
        replay = Replay(vlm, batch, layers)
    base = replay.base.argmax(dim=-1)
    yield base
    for run in runs:
        if not run.strength:
            yield base
        elif run.layer in fast:
            yield replay.logits(run.layer, run.steering(vlm, positions)).argmax(dim=-1)
        else:
            with run.steering(vlm, positions):
                logits = vlm.forward(replay.batch, logits=False, use_cache=False).logits
            yield logits[:, -1].float().argmax(dim=-1)


class Replay(Resumable):
    """Run one forward over a batch, and the decoder again from a layer on.

    It starts with the activations that were read there, without tower or connector.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        Prompts of one batch.
    layers : set of int
        The layers at which later passes start.

    Attributes
    ----------
    base : tensor (b, V)
        The logits of the first token without steering.
    states : dict of tensor (b, t, d)
        The activations read at each of the layers.
    """

    def __init__(self, vlm: VLM, batch: Batch, layers: set[int]) -> None:
        super().__init__(vlm, batch)
        with reading(vlm, layers) if layers else nullcontext({}) as parts:
            self.base = self.forward()
        self.states: dict[int, Tensor] = {}
        self._take(parts)

    @torch.no_grad()
    def hold(self, layers: Collection[int]) -> None:
        """Read the activations at these layers, unless they are held already."""
        missing = set(layers) - set(self.states)
        if missing:
            (args, kwargs), *_ = self.calls
            with reading(self.vlm, missing, stop=True) as parts, self.vlm.run(self.batch):
                anatomy.decoder(self.vlm.model)(*args, **kwargs)
            self._take(parts)

    @property
    def by_row(self) -> bool:
        """Whether everything recorded has a row for each prompt, so that rows can be selected."""
        n = len(self.base)
        if len(self.calls) != 1 or self.calls[0][0]:
            return False
        for values in (self.batch, self.calls[0][1]):
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    continue
                if name not in _BY_ROW or len(value) != n:
                    return False
        return True

    def only(self, rows: Sequence[int]) -> "Replay":
        """Return what was recorded of some rows of the batch, where there is a row a prompt."""
        n = len(self.base)

        def selected(value: object) -> object:
            per_row = isinstance(value, Tensor) and value.ndim and len(value) == n
            return value[list(rows)] if per_row else value

        return self._mapped(selected)

    def widened(self, width: int) -> "Replay":
        """Return what was recorded with more padding on the left, up to a number of positions."""
        length = self.batch.spans.shape[1]
        if length == width:
            return self

        def padded(value: object) -> object:
            per_position = isinstance(value, Tensor) and value.shape[1:2] == (length,)
            if not per_position:
                return value
            padding = value.new_zeros((len(value), width - length, *value.shape[2:]))
            return torch.cat([padding, value], dim=1)

        return self._mapped(padded)

    @staticmethod
    def joined(parts: Sequence["Replay"]) -> "Replay":
        """Return what was recorded of several batches as one batch."""
        width = max(part.batch.spans.shape[1] for part in parts)
        first, *further = [part.widened(width) for part in parts]

        def together(value: object, *values: object) -> object:
            per_row = isinstance(value, Tensor) and value.ndim and len(value) == len(first.base)
            return torch.cat([value, *values]) if per_row else value

        return first._mapped(together, further) if further else first

    def _mapped(self, change: Callable, further: Sequence["Replay"] = ()) -> "Replay":
        """A copy in which all that has a row a prompt is changed, with that of further batches."""
        args, kwargs = self.calls[0]
        keywords = {}
        for name, value in kwargs.items():
            several = [part.calls[0][1][name] for part in further]
            keywords[name] = change(value, *several) if name in _BY_ROW else value
        inputs = {}
        for name, value in self.batch.items():
            inputs[name] = change(value, *(part.batch[name] for part in further))
        part = copy(self)
        part.batch = Batch(inputs)
        part.batch.spans = change(self.batch.spans, *(part.batch.spans for part in further))
        part.calls = [(args, keywords)]
        part.base = change(self.base, *(part.base for part in further))
        part.states = {}
        for layer in set(self.states).intersection(*(part.states for part in further)):
            part.states[layer] = change(
                self.states[layer], *(part.states[layer] for part in further)
            )
        return part

    def _take(self, parts: Mapping[tuple[int, str], list[Tensor]]) -> None:
        for (layer, _), blocks in computed(parts).items():
            self.states[layer] = blocks[0]

    @torch.no_grad()
    def logits(self, layer: int, steering: AbstractContextManager) -> Float[Tensor, "b v"]:
        """Compute the logits of the first token from the activations read at this layer."""
        last = self.read(
            self.vlm.n_layers, "last", start=layer, states=self.states[layer], change=steering
        )
        return self.vlm.unembed(last[:, 0])

    def holds(self, layer: int) -> bool:
        """Tell whether a pass from this layer on gives the logits of the whole forward.

        Without steering, up to rounding.
        """
        return same_up_to_rounding(self.logits(layer, nullcontext()), self.base, self.vlm.dtype)


def fast_layers(vlm: VLM, batch: Batch, layers: set[int]) -> set[int]:
    """Find the layers at which steered passes of this model may start.

    None while something else changes the model.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        A few prompts, on which starting at each layer is tried.
    layers : set of int
        The layers that are tried.

    Returns
    -------
    set of int
        Those from which a pass gives the logits of the whole forward, up to rounding.
    """
    if vlm.active:
        return set()
    replay = Replay(vlm, batch, layers)
    if len(replay.calls) != 1:
        return set()
    return {layer for layer in layers if replay.holds(layer)}


def _fast_layers(
    vlm: VLM, samples: list[Sample], questions: list[str], layers: set[int]
) -> set[int]:
    """The layers at which passes may start, tried on the shortest and the longest question."""
    lengths = list(map(len, questions))
    shortest = lengths.index(min(lengths))
    longest = lengths.index(max(lengths))
    tried = sorted({shortest, longest})  # unlike lengths, so that padding is tried too
    tried_samples = [samples[k] for k in tried]
    tried_questions = [questions[k] for k in tried]
    batch = vlm.batch_of(tried_samples, tried_questions)
    return fast_layers(vlm, batch, layers)


def _answer_ids(
    vlm: VLM,
    batch: "Batch | Replay",
    settings: list[Run],
    positions: Positions,
    resumable: set[int],
    max_new_tokens: int | None,
) -> Iterator[Int[Tensor, "b t"]]:
    """The ids of the answers of a batch, without steering and then for each run."""
    if max_new_tokens is None:
        for ids in first_ids(vlm, batch, settings, positions, resumable):
            yield ids[:, None]
        return
    base = vlm.generate_ids(batch, max_new_tokens)
    yield base
    for run in settings:
        if not run.strength:
            yield base
        else:
            with run.steering(vlm, positions):
                yield vlm.generate_ids(batch, max_new_tokens)


def _check(
    samples: list[Sample],
    positions: Positions,
    max_new_tokens: int | None,
    batch_size: int,
) -> None:
    """Refuse arguments of a sweep that would change or measure nothing."""
    require_samples(samples)
    require(
        batch_size >= 1 and (max_new_tokens is None or max_new_tokens >= 1),
        f"batch_size {batch_size}, max_new_tokens {max_new_tokens}",
        "give at least 1",
    )
    named = {positions} if isinstance(positions, str) else set(positions)
    require(
        max_new_tokens is not None or not named <= set(_UNSTEERED),
        f"positions {positions!r} leave the first token as it is",
        "give max_new_tokens, or other positions",
    )


def _check_recorded(
    vlm: VLM,
    recorded: Recorded | None,
    prompts: str | Sequence[str] | None,
    max_new_tokens: int | None,
) -> None:
    """Refuse what recorded questions cannot give."""
    if recorded is None:
        return
    require(
        prompts is None and max_new_tokens is None,
        "recorded questions with prompts or max_new_tokens",
        "give samples, to ask something else or to generate",
    )
    require(
        recorded.vlm is vlm and not vlm.active,
        "questions that were recorded of another model, or before it was changed",
        "give samples, or the model as it was",
    )


def _settings(
    vlm: VLM, vectors: Vectors, layers: Sequence[int] | None, strengths: Sequence[float]
) -> list[Run]:
    """All ways to steer, each checked to be possible."""
    by_name = {None: vectors} if isinstance(vectors, SteeringVectors) else dict(vectors)
    settings = []
    for name, named_vectors in by_name.items():
        tried = layers
        if tried is None:
            tried = [layer for layer, norm in named_vectors.norms.items() if norm]
        for layer in checked_layers(vlm, tried, first=0):
            for strength in strengths:
                settings.append(Run(name, named_vectors, layer, strength))
    require(
        settings,
        f"vectors {list(by_name)}, layers {layers!r}, strengths {strengths!r}",
        "give at least one of each",
    )
    for run in settings:
        run.vectors.checked(vlm, run.layer, run.strength)
    return settings


def _table(
    settings: list[Run],
    texts: list[list[str]],
    score: Score | None,
    answers: bool,
    named: bool,
) -> pd.DataFrame:
    """A row for each run, from the answers without steering and then for each run."""
    base = texts[0]
    rows = []
    for run, run_texts in zip(settings, texts[1:], strict=True):
        n_changed = 0
        for text, unsteered in zip(run_texts, base, strict=True):
            n_changed += text != unsteered
        row = {"vector": run.name, "layer": run.layer, "strength": run.strength}
        row["n"] = len(base)
        row["changed"] = n_changed / len(base)
        scores = {} if score is None else dict(score(list(run_texts)))
        reserved = set(scores) & {*row, "answers"}
        require(
            not reserved,
            f"scores named {', '.join(map(repr, sorted(reserved)))}",
            f"allowed: other names than {', '.join(row)}, answers",
        )
        row |= scores
        if answers:
            row["answers"] = run_texts
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if named else table.drop(columns="vector")
