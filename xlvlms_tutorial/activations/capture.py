"""Capture the residual stream of many samples.

Layers, sites and positions are selected; batches are collected in memory or in a store.
"""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchFeature

import xlvlms_tutorial
from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations, Key
from xlvlms_tutorial.activations.hooks import Layers, Sites, read, wanted
from xlvlms_tutorial.activations.rows import Positions, Rows, Selection, of_forward, of_generation
from xlvlms_tutorial.activations.store import ActivationStore, dealt, shard_plan
from xlvlms_tutorial.errors import (
    InputError,
    RunError,
    SpanError,
    TokenOfInterestError,
    infinite_state,
)
from xlvlms_tutorial.io import digest
from xlvlms_tutorial.memory import fingerprint
from xlvlms_tutorial.models.batching import (
    History,
    answers_of,
    history_of,
    prompts_of,
    require_samples,
)
from xlvlms_tutorial.models.prompts import require_texts
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.turns import Turn
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample, as_image
from xlvlms_tutorial.text import first_few
from xlvlms_tutorial.validation import require_counts

WAIT = 1800.0  # seconds, as long as torch's own processes wait for each other
_LOOK_EVERY = 0.5  # seconds
_NUMBERS = ("sample", "position", "token_index")  # columns of integers; the others are text


def capture(
    vlm: VLM,
    samples: Iterable[Sample],
    layers: Layers,
    *,
    sites: Sites = (WHOLE_BLOCK,),
    span: str | Sequence[str] | None = None,
    positions: Positions = None,
    words: str | Sequence[str] | None = None,
    side: str = "predicting",
    reduce: str | None = "mean",
    prompt: str | Callable[[Sample], str] | None = None,
    answers: Sequence[str] | Callable[[Sample], str] | None = None,
    max_new_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    store: str | Path | None = None,
    shard_size: int = 64,
    wait: float = WAIT,
    seed: int | None = None,
    progress: bool = False,
    history: History = None,
    system: str | None = None,
) -> Activations:
    """Run the model on samples and collect activations at selected layers and positions.

    Use it to get the states that the methods of this package start from. Say where to read in
    exactly one of three ways: ``span`` (all image, question or answer positions), ``positions`` (by
    number), or ``words`` (the token of interest in an answer). Answers are given (``answers``, read
    in one forward) or generated greedily (``max_new_tokens``). Without generation, a forward ends
    after the last layer that is needed. With ``store``, a capture that was killed continues where
    it stopped.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : iterable of Sample
        At least one; all of one modality.
    layers : int, iterable of int, or "all"
        The layers to read: 0 is what enters the first block, l what leaves block l, up to L.
    sites : str or sequence of str
        The sites in a layer: "resid_post" (default: the residual stream that leaves it), or one of
        its parts, such as "attn_out" or "mlp_out".
    span : str or sequence of str, optional
        The spans whose positions are read: "image", "question", "answer", ... In a generation,
        "answer" is where generated tokens were fed back, hence without the last one; everything
        else is in the prompt.
    positions : int, sequence of int, or "all", optional
        Position numbers: 0 is a sample's first token and -1 its last, padding not counted. "all"
        reads every position.
    words : str or sequence of str, optional
        Words or phrases of interest. The first of them in each answer gives one row; samples whose
        answer has none give no row.
    side : "predicting" or "token"
        Which state of a word is read. "predicting" (default) is the state that predicts the word's
        first piece. "token" is the state at its last piece, which predicts what follows.
    reduce : "mean", "last" or None
        "mean" (default) and "last" give one row a sample, None one row a position. With ``words``
        it is not used.
    prompt : str or function of a Sample, optional
        What the model is asked; by default it is asked to describe what the sample shows.
    answers : sequence of str, or function of a Sample, optional
        One answer for each sample, read as if the model had given it.
    max_new_tokens : int, optional
        The largest number of tokens to generate; by default nothing is generated.
    dtype : torch.dtype
        The dtype of the result; float32 by default.
    batch_size : int
        How many samples go through the model at once.
    store : path, optional
        A folder to write the states to, in shards. Run again after a kill, it continues and makes
        damaged shards anew. Under ``accelerate launch``, torchrun or MPI each process makes its own
        shards, waits for those of the others and returns everything. By default the states are held
        in memory only.
    shard_size : int
        How many samples go into one file of the store.
    wait : float
        Seconds without a new shard after which waiting for other processes is given up. With 0
        nothing is waited for: the result is everything if all shards are there, or else the states
        of this process's samples.
    seed : int, optional
        The seed that the samples were drawn with. It is only recorded in the provenance.
    progress : bool
        Whether a progress bar is shown.
    history : sequence of sequences of Turn, or function of a Sample, optional
        Earlier turns for each sample, such as the demonstrations of in-context learning.
    system : str, optional
        A system prompt for all.

    Returns
    -------
    Activations
        One tensor (n, d) for each layer and site. Columns of the table: sample, id; text (the
        answer, where there are answers); position, token, span (``reduce=None``); word, token_index
        (``words``).

    Raises
    ------
    InputError
        If there are no samples, or it is not said in one clear way what to read. If a state is NaN
        or infinite, or too large for ``dtype``. If a prompt or an answer is not text, is empty, or
        holds the marker of a picture for this model. If answers are generated from logits that are
        NaN or infinite. If the numbers of answers and samples differ, or the device runs out of
        memory.
    LayerError, SpanError
        If the model or the samples have no such layer, or no such positions.
    TokenOfInterestError
        If no answer has one of the words.
    StoreError
        If the store was made with other settings.
    RunError
        If the shards of another process do not come.
    DeviceMemoryError
        If the numbers of answers and samples differ, or the device runs out of memory.

    Examples
    --------
    The mean over the image positions of each sample, at two layers:

    >>> from xlvlms_tutorial.activations import capture
    >>> states = capture(vlm, samples, [12, 24], span="image")
    >>> states
    Activations(4 rows, layers 12 24, resid_post, float32, 0.0 MB)
    >>> states[24].shape
    torch.Size([4, 576])

    The states that predict a word of interest, in captions that are given:

    >>> captions = [sample.captions[0] for sample in samples]
    >>> states = capture(vlm, samples, 24, words=["mushroom", "rock"], answers=captions)
    >>> states.table["word"].tolist()
    ['mushroom', 'rock']
    """
    if not wait >= 0:  # NaN neither
        raise InputError(f"wait={wait!r}", "give seconds, or 0 to take only what this process made")
    selection = Selection.of(layers, sites, span, positions, words, reduce, dtype, side)
    if isinstance(samples, Sample):
        raise InputError("one sample", "give a list of samples")
    samples = list(samples)
    if prompt is None:  # samples of several modalities are refused when they are batched
        prompt = PROMPTS.get(samples[0].modality, PROMPTS["image"]) if samples else ""
    job = _Job(
        vlm, samples, selection, prompt, answers, max_new_tokens, batch_size, history, system
    )
    provenance = job.provenance(prompt, seed)
    n_samples = len(job.samples)
    if store is not None:
        plan = shard_plan(n_samples, shard_size)
        provenance["shard_size"] = shard_size
        shards = ActivationStore(store, provenance)
        return _stored(job, shards, plan, wait, progress)
    with _bar(progress, n_samples) as bar:
        states = job.states(range(n_samples), provenance, bar)
        return job.concluded(states)


@torch.no_grad()
def residual_stream(vlm: VLM, inputs: BatchFeature) -> Float[Tensor, "layers b t d"]:
    """Run one forward and return the residual stream of every layer.

    Use it to look at all positions of one batch; for many samples, ``capture`` selects what is
    needed. The last layer is read before the final norm, whereas the last of transformers'
    ``hidden_states`` is after it.

    Parameters
    ----------
    vlm : VLM
        The model.
    inputs : Batch or BatchFeature
        Model inputs, as ``vlm.batch`` or a processor makes them, left-padded.

    Returns
    -------
    tensor (L + 1, b, t, d)
        Layer 0 is what enters the first block, layer l what leaves block l; on the CPU in the
        model's dtype.

    Raises
    ------
    InputError
        If a layer holds NaN or infinite values; it names the first such layer.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import residual_stream
    >>> stream = residual_stream(vlm, batch)
    >>> stream.shape[:2]
    torch.Size([31, 4])
    """
    batch = inputs if isinstance(inputs, Batch) else vlm.prepare(inputs)
    stream = read(vlm, batch, "all")
    for (layer, _), states in stream.items():
        if not torch.isfinite(states).all():
            raise infinite_state(layer)
    return torch.stack(list(stream.values()))


class _Job:
    """A capture whose arguments have been checked; it runs batch by batch."""

    def __init__(
        self,
        vlm: VLM,
        samples: list[Sample],
        selection: Selection,
        prompt: str | Callable[[Sample], str],
        answers: Sequence[str] | Callable[[Sample], str] | None,
        max_new_tokens: int | None,
        batch_size: int,
        history: History = None,
        system: str | None = None,
    ) -> None:
        require_samples(samples)
        if answers is not None and max_new_tokens is not None:
            raise InputError(
                "answers and max_new_tokens given", "give answers, or let the model generate them"
            )
        if selection.words is not None and answers is None and max_new_tokens is None:
            raise InputError(
                "words without answers", "give answers, or max_new_tokens to generate them"
            )
        require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.vlm = vlm
        self.samples = samples
        self.selection = selection
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.keys = wanted(vlm, selection.layers, selection.sites)
        self.prompts = prompts_of(samples, prompt)
        self.answers = answers_of(samples, answers)
        self.history = history_of(samples, history)
        self.system = system
        ids = [sample.id for sample in samples]
        # checked before a long run rather than in it
        require_texts(vlm.processor, self.prompts, self.answers, ids)
        # words of the answers so far, for the message if no answer has a word of interest
        self.generated: Counter[str] = Counter()

    def provenance(
        self, prompt: str | Callable[[Sample], str], seed: int | None
    ) -> dict[str, object]:
        """How the states are made; long values are represented by their sha256."""
        vlm = self.vlm
        selection = self.selection
        # int(): JSON has no form for integers of numpy
        seed = None if seed is None else int(seed)
        max_new_tokens = None if self.max_new_tokens is None else int(self.max_new_tokens)
        answer_source = None
        if self.answers is not None:
            answer_source = "given"
        elif max_new_tokens is not None:
            answer_source = "generated"
        if not isinstance(prompt, str):
            prompt = getattr(prompt, "__qualname__", type(prompt).__name__)
        sha256 = partial(digest, ensure_ascii=False)
        ids = [sample.id for sample in self.samples]
        layers = {layer for layer, _ in self.keys}
        sites = dict.fromkeys(site for _, site in self.keys)
        versions = {}
        for module in (torch, transformers, xlvlms_tutorial):
            versions[module.__name__] = module.__version__
        # of conversations alone, so that what was stored before stays valid
        conversation = {}
        if self.history is not None:
            conversation["history_sha256"] = sha256(_texts_of(self.history))
        if self.system is not None:
            conversation["system"] = self.system
        return conversation | {
            "model": vlm.name,
            "revision": vlm.revision,
            "dtype": str(vlm.dtype),
            "kept_dtype": str(selection.dtype),
            "interventions": list(vlm.active),
            "prompt": prompt,
            "layers": sorted(layers),
            "sites": list(sites),
            "selection": selection.described,
            "reduce": selection.reduce,
            "max_new_tokens": max_new_tokens,
            "answers": answer_source,
            "seed": seed,
            "n_samples": len(ids),
            "ids_sha256": sha256(ids),
            "prompts_sha256": sha256(self.prompts),
            "answers_sha256": None if self.answers is None else sha256(self.answers),
            "versions": versions,
        }

    def states(self, numbers: range, provenance: dict, bar: tqdm) -> Activations:
        """Capture some of the samples.

        ``numbers`` are their numbers, ``provenance`` goes with the result, and ``bar`` shows
        progress.
        """
        parts: list[dict[Key, Tensor]] = []
        tables: list[pd.DataFrame] = []
        for start in range(numbers.start, numbers.stop, self.batch_size):
            part = range(start, min(start + self.batch_size, numbers.stop))
            rows = self._rows(part)
            tables.append(self._table(rows, part))
            _require_finite(rows.tensors, tables[-1])
            parts.append(rows.tensors)
            bar.update(len(part))
        return Activations(_joined(parts), pd.concat(tables, ignore_index=True), provenance)

    def concluded(self, states: Activations) -> Activations:
        """Return the states of all samples, with the number of those that have a word of interest.

        It raises ``TokenOfInterestError`` if none has.
        """
        n = states.table["sample"].nunique()
        if self.selection.words is None:
            if not n:
                raise SpanError(
                    "answer", "no generated token was fed back (raise max_new_tokens)", ()
                )
            if n < len(self.samples):
                warnings.warn(
                    (
                        f"{len(self.samples) - n} of {len(self.samples)} samples have no "
                        "such position and no row"
                    ),
                    stacklevel=3,
                )
            return states
        if not n:
            if not self.generated:  # all states came from the store: generate the first answers
                self._rows(range(min(self.batch_size, len(self.samples))))
            raise TokenOfInterestError(
                self.selection.words, len(self.samples), self.generated.most_common(5)
            )
        return Activations(
            states.tensors, states.table, states.provenance | {"samples_with_word": n}
        )

    def _rows(self, part: range) -> Rows:
        cut = slice(part.start, part.stop)
        answers = None if self.answers is None else self.answers[cut]
        history = None if self.history is None else self.history[cut]
        batch = self.vlm.batch_of(
            self.samples[cut], self.prompts[cut], answers, history, self.system
        )
        if self.max_new_tokens is None:
            rows = of_forward(self.vlm, batch, answers, self.selection)
        else:
            rows = of_generation(self.vlm, batch, self.max_new_tokens, self.selection)
        if self.selection.words is not None:
            for text in rows.texts:
                self.generated.update(re.findall(r"\w+", text.lower()))
        return rows

    def _table(self, rows: Rows, part: range) -> pd.DataFrame:
        columns = dict(rows.columns)
        batch_rows = columns.pop("row")
        numbers = [part[row] for row in batch_rows]
        table = {"sample": numbers, "id": [self.samples[number].id for number in numbers]}
        if rows.texts:
            table["text"] = [rows.texts[row] for row in batch_rows]
        series = {}
        for name, values in (table | columns).items():
            series[name] = pd.Series(values, dtype="int64" if name in _NUMBERS else str)
        return pd.DataFrame(series)


def _texts_of(history: Sequence[Sequence[Turn | tuple]]) -> list:
    """What earlier turns say, and a mark of the pictures that they show, for the provenance."""
    described = []
    for turns in history:
        for images, text, answer in turns:
            shown = images if isinstance(images, (list, tuple)) else [images]
            pictures = []
            for picture in shown:
                levels = np.array([] if picture is None else as_image(picture))
                pictures.append(fingerprint(torch.from_numpy(levels)).hex())
            described.append([pictures, text, answer])
        described.append(None)
    return described


def _stored(
    job: _Job, store: ActivationStore, plan: list[range], wait: float, progress: bool
) -> Activations:
    """Make the shards of this process that are missing or damaged, and read back the result.

    The result is everything once the other processes have made theirs.
    """
    rank, world = dealt()
    missing = store.missing(len(plan), rank, world)
    own_shards = plan[rank::world]
    total = sum(map(len, own_shards))
    remaining = sum(len(plan[number]) for number in missing)
    with _bar(progress, total, total - remaining) as bar:
        for number in missing:
            store.write(number, job.states(plan[number], store.provenance, bar))
    if wait:
        _await_shards(store, len(plan), rank, world, wait)
    if len(store.done) == len(plan):
        return job.concluded(store.states())
    own_samples = set(chain.from_iterable(own_shards))
    stored = own_samples & set(store.table["sample"])
    # where this process has no row, the states of all give columns and shapes
    states = store.states(samples=stored) if stored else store.states()
    return states.select(states.table["sample"].isin(own_samples))


def _await_shards(
    store: ActivationStore, n_shards: int, rank: int, world: int, wait: float
) -> None:
    """Return once the shards of the other processes exist and are intact.

    ``RunError`` names those that are missing when none has come for ``wait`` seconds.
    """
    missing = [number for number in range(n_shards) if number % world != rank]
    deadline = time.monotonic() + wait
    while pending := [number for number in missing if not store.whole(number)]:
        if len(pending) < len(missing):
            deadline = time.monotonic() + wait
        missing = pending
        if time.monotonic() > deadline:
            listed = first_few(missing, 10)
            raise RunError(
                f"process {rank} of {world} waited {wait:g} s in which no shard came; "
                f"missing are {len(missing)} shards: {listed}",
                "look whether the others still run, and raise wait if they are slow; "
                "run the same again, it continues",
            )
        time.sleep(_LOOK_EVERY)


def _joined(parts: list[dict[Key, Tensor]]) -> dict[Key, Tensor]:
    """Join the rows of all batches into one tensor for each key.

    Each batch is freed as it is copied, so that memory never holds two copies of everything.
    """
    joined = {}
    for key in list(parts[0]):
        pieces = [part.pop(key) for part in parts]
        if len(pieces) == 1:
            joined[key] = pieces[0]
            continue
        end = sum(map(len, pieces))
        joined[key] = torch.empty((end, *pieces[0].shape[1:]), dtype=pieces[0].dtype)
        while pieces:
            piece = pieces.pop()
            joined[key][end - len(piece) : end] = piece
            end -= len(piece)
    return joined


def _require_finite(tensors: dict[Key, Tensor], table: pd.DataFrame) -> None:
    for (layer, _), states in tensors.items():
        not_finite = ~torch.isfinite(states).all(dim=1)
        if not_finite.any():
            first = table.iloc[int(not_finite.nonzero()[0])]
            raise infinite_state(layer, first["sample"], first.get("position"))


def _bar(progress: bool, total: int, done: int = 0) -> tqdm:
    return tqdm(
        total=total, initial=done, desc="capture", unit="sample", leave=False, disable=not progress
    )
