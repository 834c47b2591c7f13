"""Capture the residual stream of many samples.

Chosen layers, places and positions, in batches, in memory or in a store.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchFeature

import xlvlms_tutorial
from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Key, States
from xlvlms_tutorial.activations.hooks import Layers, Places, read, wanted
from xlvlms_tutorial.activations.processes import WAIT, await_others, checked_wait, making_shards
from xlvlms_tutorial.activations.rows import Positions, Rows, Selection, of_forward, of_generation
from xlvlms_tutorial.activations.store import Store, dealt, shard_plan
from xlvlms_tutorial.errors import (
    LengthError,
    SelectionError,
    SpanError,
    StateError,
    TokenOfInterestError,
)
from xlvlms_tutorial.io import digest
from xlvlms_tutorial.models.prompts import require_counts, require_texts
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample

_NUMBERS = ("sample", "position", "token_index")


def capture(
    vlm: VLM,
    samples: Iterable[Sample],
    layers: Layers,
    *,
    places: Places = (WHOLE_BLOCK,),
    span: str | Sequence[str] | None = None,
    positions: Positions = None,
    words: str | Sequence[str] | None = None,
    at: str = "predicting",
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
) -> States:
    """States (n, d) of samples at chosen layers and places, with a table of what each row is.

    Layers are 0 to L, or "all"; how all was made is kept with it. Exactly one says where: ``span``
    ("image", "question", "answer", ... or several), ``positions`` ("all", or numbers: 0 is a
    sample's first token and -1 its last), or ``words``, the token of interest: the state that
    predicts the first piece of the first of these words or phrases in an answer, one row for each
    sample that has one (with ``at="token"`` the state at the word's last piece, which predicts what
    follows). ``reduce`` "mean" or "last" gives one row a sample, None one a position. Answers are
    given (``answers``, read in one forward) or generated greedily (``max_new_tokens``); then
    "answer" is where generated tokens were fed back, hence without the last one, and all else is in
    the prompt. Without generation a forward ends after the last wanted layer. Without ``prompt``
    the model is asked to describe what a sample shows.

    With ``store`` the states go to a folder, ``shard_size`` samples a file. Run again after a
    kill it goes on, and makes damaged shards anew. Under ``accelerate launch``, torchrun or MPI
    each process makes its own shards, waits for those of the others and returns everything. It
    gives up when another process has failed, or after ``wait`` seconds without a new shard; with
    ``wait=0`` it returns what is there, or the states of its own samples. ``seed`` is only
    noted: the samples were drawn by it.

    Raises
    ------
    SelectionError
        If there are no samples, or it is not said in one clear way what to keep.
    LayerError, SpanError
        If the model or the samples have no such layer, or no such positions.
    TokenOfInterestError
        If no answer has one of the words.
    StateError
        If a state that is kept is NaN or infinite, or too large for ``dtype``.
    StoreMismatchError
        If the store was made with other settings.
    RunError
        If the shards of another process do not come.
    PromptError
        If a prompt or an answer is no text, is empty, or holds what marks a picture for this model.
    ActivationsError
        If answers are generated from logits that are NaN or infinite.
    LengthError, DeviceMemoryError
        If answers and samples are not equally many, or the device is full.
    """
    wait = checked_wait(wait)
    asked = Selection.of(layers, places, span, positions, words, reduce, dtype, at)
    if isinstance(samples, Sample):
        raise SelectionError("one sample", "give a list of samples")
    samples = list(samples)
    if prompt is None:  # samples of several modalities are refused where they are batched
        prompt = PROMPTS.get(samples[0].modality, PROMPTS["image"]) if samples else ""
    job = _Job(vlm, samples, asked, prompt, answers, max_new_tokens, batch_size)
    provenance = job.provenance(prompt, seed)
    if store is not None:
        plan = shard_plan(len(job.samples), shard_size)
        return _stored(
            job, Store(store, provenance | {"shard_size": shard_size}), plan, wait, progress
        )
    with _bar(progress, len(job.samples)) as bar:
        return job.concluded(job.states(range(len(job.samples)), provenance, bar))


@torch.no_grad()
def residual_stream(vlm: VLM, inputs: BatchFeature) -> Float[Tensor, "layers b t d"]:
    """The residual stream at every layer, on the CPU in the model's number format.

    0 is what enters the first block, l what leaves block l. The last layer is taken before the
    final norm (transformers' last ``hidden_states`` is after it).

    Raises
    ------
    StateError
        If a layer holds NaN or infinite values, with the first such layer.
    """
    stream = read(vlm, inputs if isinstance(inputs, Batch) else vlm.prepare(inputs), "all")
    for (layer, _), states in stream.items():
        if not torch.isfinite(states).all():
            raise StateError(layer)
    return torch.stack(list(stream.values()))


class _Job:
    """A capture that has been checked: what is asked of which samples, batch by batch."""

    def __init__(
        self,
        vlm: VLM,
        samples: list[Sample],
        asked: Selection,
        prompt: str | Callable[[Sample], str],
        answers: Sequence[str] | Callable[[Sample], str] | None,
        max_new_tokens: int | None,
        batch_size: int,
    ) -> None:
        if not samples:
            raise SelectionError("no samples", "give at least one")
        if answers is not None and max_new_tokens is not None:
            raise SelectionError(
                "answers and max_new_tokens given", "give answers, or let the model generate them"
            )
        if asked.words is not None and answers is None and max_new_tokens is None:
            raise SelectionError(
                "words without answers", "give answers, or max_new_tokens to generate them"
            )
        require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.vlm, self.samples, self.asked, self.batch_size, self.max_new_tokens = (
            vlm,
            samples,
            asked,
            batch_size,
            max_new_tokens,
        )
        self.keys = wanted(vlm, asked.layers, asked.places)
        self.prompts = [prompt(sample) if callable(prompt) else prompt for sample in samples]
        self.answers = [answers(sample) for sample in samples] if callable(answers) else answers
        self.answers = None if self.answers is None else list(self.answers)
        if self.answers is not None and len(self.answers) != len(samples):
            raise LengthError(samples=len(samples), answers=len(self.answers))
        # before a long run, not in it
        require_texts(vlm.processor, self.prompts, self.answers, [sample.id for sample in samples])
        # words of the answers seen so far, for the message if those of interest are never there
        self.generated: Counter[str] = Counter()

    def provenance(
        self, prompt: str | Callable[[Sample], str], seed: int | None
    ) -> dict[str, object]:
        """How the states are made; what is long is there by its sha256."""
        vlm, asked = self.vlm, self.asked
        # those of numpy are no JSON
        seed, most = (
            None if number is None else int(number) for number in (seed, self.max_new_tokens)
        )
        kind = (
            "given"
            if self.answers is not None
            else "generated"
            if self.max_new_tokens is not None
            else None
        )
        sha256 = partial(digest, ensure_ascii=False)
        return {
            "model": vlm.name,
            "revision": vlm.revision,
            "dtype": str(vlm.dtype),
            "kept_dtype": str(asked.dtype),
            "interventions": list(vlm.active),
            "prompt": prompt
            if isinstance(prompt, str)
            else getattr(prompt, "__qualname__", type(prompt).__name__),
            "layers": sorted({layer for layer, _ in self.keys}),
            "places": list(dict.fromkeys(place for _, place in self.keys)),
            "selection": asked.described,
            "reduce": asked.reduce,
            "max_new_tokens": most,
            "answers": kind,
            "seed": seed,
            "n_samples": len(self.samples),
            "ids_sha256": sha256([sample.id for sample in self.samples]),
            "prompts_sha256": sha256(self.prompts),
            "answers_sha256": None if self.answers is None else sha256(self.answers),
            "versions": {
                module.__name__: module.__version__
                for module in (torch, transformers, xlvlms_tutorial)
            },
        }

    def states(self, numbers: range, provenance: dict, bar: tqdm) -> States:
        """The states of some of the samples."""
        parts: list[dict[Key, Tensor]] = []
        tables: list[pd.DataFrame] = []
        for start in range(numbers.start, numbers.stop, self.batch_size):
            part = range(start, min(start + self.batch_size, numbers.stop))
            rows = self._rows(part)
            tables.append(self._table(rows, part))
            _require_finite(rows.tensors, tables[-1])
            parts.append(rows.tensors)
            bar.update(len(part))
        return States(_joined(parts), pd.concat(tables, ignore_index=True), provenance)

    def concluded(self, states: States) -> States:
        """The states of all samples, with how many of them have a word of interest.

        ``TokenOfInterestError`` if none has.
        """
        n = states.table["sample"].nunique()
        if self.asked.words is None:
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
            if not self.generated:  # all was in the store: look again at the first answers
                self._rows(range(min(self.batch_size, len(self.samples))))
            raise TokenOfInterestError(
                self.asked.words, len(self.samples), self.generated.most_common(5)
            )
        return States(states.tensors, states.table, states.provenance | {"samples_with_word": n})

    def _rows(self, part: range) -> Rows:
        cut = slice(part.start, part.stop)
        answers = None if self.answers is None else self.answers[cut]
        batch = self.vlm.batch_of(self.samples[cut], self.prompts[cut], answers)
        if self.max_new_tokens is None:
            rows = of_forward(self.vlm, batch, answers, self.asked)
        else:
            rows = of_generation(self.vlm, batch, self.max_new_tokens, self.asked)
        if self.asked.words is not None:
            self.generated.update(
                word for text in rows.texts for word in re.findall(r"\w+", text.lower())
            )
        return rows

    def _table(self, rows: Rows, part: range) -> pd.DataFrame:
        at = rows.columns["row"]
        columns = {
            "sample": [part[row] for row in at],
            "id": [self.samples[part[row]].id for row in at],
        }
        columns |= {"text": [rows.texts[row] for row in at]} if rows.texts else {}
        columns |= {name: values for name, values in rows.columns.items() if name != "row"}
        return pd.DataFrame(
            {
                name: pd.Series(values, dtype="int64" if name in _NUMBERS else str)
                for name, values in columns.items()
            }
        )


def _stored(job: _Job, store: Store, plan: list[range], wait: float, progress: bool) -> States:
    """Make this process's shards that are missing or damaged.

    And read back everything once the others have made theirs.
    """
    rank, world = dealt()
    missing, mine = store.missing(len(plan), rank, world), plan[rank::world]
    total = sum(map(len, mine))
    with (
        making_shards(store, rank, world),
        _bar(progress, total, total - sum(len(plan[number]) for number in missing)) as bar,
    ):
        for number in missing:
            store.write(number, job.states(plan[number], store.provenance, bar))
    if wait:
        await_others(store, len(plan), rank, world, wait)
    if len(store.done) == len(plan):
        return job.concluded(store.states())
    own = {sample for part in mine for sample in part}
    some = own & set(store.table["sample"])
    # without a row of its own: the columns and shapes of all
    states = store.states(samples=some) if some else store.states()
    return states.select(states.table["sample"].isin(own))


def _joined(parts: list[dict[Key, Tensor]]) -> dict[Key, Tensor]:
    """The rows of all batches in one tensor each.

    Every batch is let go as it is copied, so that there are never two of all.
    """
    joined = {}
    for key in list(parts[0]):
        pieces = [part.pop(key) for part in parts]
        if len(pieces) == 1:
            joined[key] = pieces[0]
            continue
        joined[key] = torch.empty(
            (sum(map(len, pieces)), *pieces[0].shape[1:]), dtype=pieces[0].dtype
        )
        end = len(joined[key])
        while pieces:
            piece = pieces.pop()
            joined[key][end - len(piece) : end] = piece
            end -= len(piece)
    return joined


def _require_finite(tensors: dict[Key, Tensor], table: pd.DataFrame) -> None:
    for (layer, _), states in tensors.items():
        bad = ~torch.isfinite(states).all(dim=1)
        if bad.any():
            first = table.iloc[int(bad.nonzero()[0])]
            raise StateError(layer, first["sample"], first.get("position"))


def _bar(progress: bool, total: int, done: int = 0) -> tqdm:
    return tqdm(
        total=total, initial=done, desc="capture", unit="sample", leave=False, disable=not progress
    )
