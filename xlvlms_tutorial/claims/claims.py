"""The register of published claims, the recorder of what chapters measure, and the verdict that follows from the numbers alone."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xlvlms_tutorial.claims import spread
from xlvlms_tutorial.errors import ClaimError, EstimateError, RecordError
from xlvlms_tutorial.io import FOLDER_VARIABLE as FOLDER_VARIABLE
from xlvlms_tutorial.io import default_folder, digest, read_json, reading, versions, write_json
from xlvlms_tutorial.metrics.intervals import Estimate

DIRECTIONS = ("greater", "less", "equal")
VERDICTS = ("confirmed", "refuted", "undecided", "not measured")
MEASURED = ("verdict", "value", "low", "high", "n", "seeds", "model", "dataset", "chapter", "variant", "versions")
BETWEEN = "between_machines"  # whether processors of other kinds, each by itself, would give another verdict

_KINDS = {
    **dict.fromkeys(("id", "model", "dataset", "chapter", "variant"), str), **dict.fromkeys(("value", "low", "high"), (int, float)),
    "n": int, "seeds": list, "versions": dict,
}  # fmt: skip

_SOURCES = {  # prefix of the id: part of the book, paper
    "IMA": ("I Alignment", "arXiv 2405.16700, Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs"),
    "COX": ("II Concepts", "arXiv 2406.08074, A Concept-Based Explainability Framework for Large Multimodal Models"),
    "SHIFT": ("III Shift and steering", "arXiv 2501.03012, Analyzing Finetuning Representation Shift for Multimodal LLMs Steering"),
    "STEER": ("III Shift and steering", "arXiv 2501.03012, Analyzing Finetuning Representation Shift for Multimodal LLMs Steering"),
    "SKIP": ("IV Skipping and pruning", "arXiv 2410.09454, Skipping Computations in Multimodal LLMs"),
    "VLM": ("Start", "arXiv 2305.10355, Evaluating Object Hallucination in Large Vision-Language Models"),
}


@dataclass(frozen=True)
class Claim:
    """A published claim as an effect with a direction.

    ``metric`` is the effect to measure, with the rival subtracted wherever there is one, so that ``null`` is a constant. "greater":
    the effect exceeds ``null - margin``; "less": it is below ``null + margin``; "equal": it differs from ``null`` by less than ``margin``.
    A margin is ours: it says what "about" or "little" is taken to mean.
    """

    id: str
    part: str
    paper: str
    where: str
    statement: str
    metric: str
    direction: str
    null: float
    rival: str
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise EstimateError(f"direction of {self.id}", self.direction, ", ".join(DIRECTIONS))
        finite = math.isfinite(self.null) and math.isfinite(self.margin)
        if not finite or self.margin < 0 or (self.direction == "equal" and self.margin == 0):
            found = f"null {self.null}, margin {self.margin}"
            raise EstimateError(f"claim {self.id}", found, 'finite numbers, a margin of 0 or more, above 0 where the direction is "equal"')

    @property
    def test(self) -> str:
        """The claim as an inequality on its effect: "> 0"."""
        if self.direction == "equal":
            return f"within {self.null:g} ± {self.margin:g}"
        return f"> {self.null - self.margin:g}" if self.direction == "greater" else f"< {self.null + self.margin:g}"


def _claim(
    name: str, where: str, statement: str, metric: str, rival: str, direction: str = "greater", null: float = 0.0, margin: float = 0.0
) -> Claim:
    part, paper = _SOURCES[name.partition("-")[0]]
    return Claim(name, part, paper, where, statement, metric, direction, null, rival, margin)


_REGISTER = (
    _claim("VLM-1", "popular against random negatives", "Models say yes to popular absent objects more often than to random absent ones.",
           "yes-rate to popular negatives minus yes-rate to random negatives", "random negatives"),
    _claim("IMA-1", "Fig. 2", "Tokens of each modality live in their own narrow cone.",
           "intra-modality minus inter-modality cosine", "shuffled modality labels"),
    _claim("IMA-2", "Fig. 2", "Perceptual tokens are easy to tell from textual ones at every layer.",
           "lowest balanced accuracy of a linear probe over the layers", "chance", null=0.5),
    _claim("IMA-3", "Fig. 3", "Tokens change slowly from block to block.",
           "cosine of a token with itself one layer on, minus that with other tokens", "other tokens' consecutive cosine"),
    _claim("IMA-4", "vocabulary distributions, Fig. 13", "Perceptual tokens are not translated into text tokens.",
           "KL of vocabulary distributions, perceptual against text, minus text against other text", "text against other text"),
    _claim("IMA-5", "Fig. 7", "Perceptual and textual tokens draw closer with depth.",
           "slope of perceptual-textual similarity over layers", "no slope"),
    _claim("IMA-6", "Fig. 7", "Perceptual and textual tokens draw closer while the connector is trained.",
           "perceptual-textual similarity after training minus before", "untrained connector"),
    _claim("IMA-7", "abstract; Fig. 22", "Perceptual and textual tokens activate similar weights.",
           "IoU of the two Wanda masks minus k/(2-k), the IoU of independent masks that keep a share k",
           "independent masks; magnitude mask removed"),
    _claim("IMA-8", "abstract; Fig. 9", "The alignment score predicts task performance.",
           "correlation of alignment with task score over checkpoints and encoders", "permutation"),
    _claim("IMA-9", "abstract", "The alignment score predicts hallucination, negatively.",
           "correlation of alignment with hallucination rate over checkpoints and encoders", "permutation", "less"),
    _claim("IMA-10", "Table 1; Fig. 34", "Better-aligned encoders have higher scores.",
           "rank correlation of encoders by alignment and by task score", "random order"),
    _claim("IMA-11", "Fig. 12", "One subnetwork serves all tasks (alpha-SubNet).",
           "task score at matched sparsity minus that of the better of magnitude and random masks", "magnitude and random masks"),
    _claim("IMA-12", "Fig. 11", "FFNs can be skipped for image tokens.",
           "task score with FFNs skipped for image tokens minus that with as many text tokens skipped", "as many text tokens"),
    _claim("COX-1", "grounding figure", "Semi-NMF concepts are grounded in images.",
           "CLIPScore of most activating samples against concept words minus against random words", "random words"),
    _claim("COX-2", "grounding figure", "Semi-NMF concepts are grounded in text.",
           "BERTScore of concept words against captions minus that of random words", "random words; noise images"),
    _claim("COX-3", "overlap table", "Semi-NMF concepts overlap less than k-means and simple ones.",
           "overlap of Semi-NMF word sets minus the smaller of those of k-means and simple", "k-means, simple", "less"),
    _claim("COX-4", "test top-1 table", "The top concept describes an unseen image.",
           "top-1 score on test images minus that of random words", "random words; ground-truth captions as ceiling"),
    _claim("COX-5", "layer figure", "Multimodal grounding appears in deep layers.",
           "grounding score of the deep layers minus that of the early ones", "shuffled layers"),
    _claim("COX-6", "this book", "Concepts track known factors of the world.",
           "mutual information of concept and factor minus that of permuted factors", "permutation of factors"),
    _claim("COX-7", "this book", "Taking a concept out of the states takes what it stands for out of the caption.",
           "share of captions that lose the value of a concept that is removed minus that when another concept is removed",
           "another concept removed"),
    _claim("SHIFT-1", "abstract", "Fine-tuning refines some concepts and replaces others.",
           "T-Overlap with the matched fine-tuned concept minus that of the same model with another seed",
           "same model, other seed", "less"),
    _claim("SHIFT-2", "abstract", "Shift vectors recover fine-tuned concepts.",
           "T-Overlap of shifted concepts with fine-tuned ones minus that of the best rival",
           "original concepts; other k-means seed; one global shift; shuffled groups; random shift of equal norm"),
    _claim("SHIFT-3", "correlation of recovery and consistency", "Recovery grows with the consistency of the shift.",
           "Pearson r of recovery and shift consistency over concepts", "permutation"),
    _claim("SHIFT-4", "correlation of recovery and magnitude", "Recovery grows with the magnitude of the shift.",
           "Pearson r of recovery and shift magnitude over concepts", "permutation"),
    _claim("STEER-1", "table of specific answers", "A mean-difference vector changes an answer to another.",
           "targeted change rate minus that of the best rival", "random vector of equal norm; logit bias; prompt"),
    _claim("STEER-2", "table of specific answers", "Steering an answer changes little elsewhere.",
           "accuracy on other question types, steered minus not steered", "same rivals at equal targeted change", "equal", margin=0.05),
    _claim("STEER-3", "Table 1", "The type of answers can be steered.",
           "share of answers of the target type minus that under the best rival", "random vector of equal norm; logit bias; prompt"),
    _claim("STEER-4", "Table 3", "The style of captions can be steered without training.",
           "rate of style words, steered minus not steered", "prompt; fine-tuned adapter as ceiling"),
    _claim("STEER-5", "gender debiasing table", "Concept-level vectors beat coarse ones for neutral wording.",
           "share converted by concept-level vectors minus that by the coarse one, at equal side effect", "coarse vector"),
    _claim("STEER-6", "sweep over layers", "Deeper layers steer answers better.", "slope of targeted change over layers", "flat"),
    _claim("STEER-7", "sweep over samples", "About 50 samples are enough.",
           "effect of a vector from 50 samples as a share of that from 500", "500 samples", null=1.0, margin=0.1),
    _claim("SKIP-1", "abstract", "Much computation can be left out at inference.",
           "task score minus that of the rival at equal time saved", "equally fast smaller interval at random layers"),
    _claim("SKIP-2", "abstract", "Question answering tolerates more skipping than captioning.",
           "retained share of the question answering score minus that of the caption score, at equal saving", "equality"),
    _claim("SKIP-3", "abstract", "Training with half of the blocks skipped keeps about 97 %.",
           "retained share of the dense score", "skipping without training", null=0.97, margin=0.02),
    _claim("SKIP-4", "abstract", "Training on a model with 70 % of its weights removed keeps about 97 %.",
           "retained share of the dense score", "pruning without training", null=0.97, margin=0.02),
    _claim("SKIP-5", "abstract", "A smaller language model, trained well, compares with a larger one.",
           "score of the smaller model as a share of that of the larger", "same model skipped to the same cost", null=1.0, margin=0.05),
    _claim("SKIP-6", "abstract", "Attention and FFN in parallel keep performance.",
           "retained share of the sequential score", "sequential skip of FFN", null=1.0, margin=0.05),
)  # fmt: skip
CLAIMS = {claim.id: claim for claim in _REGISTER}


def claim(claim_id: str) -> Claim:
    """A claim by its id.

    Raises
    ------
    ClaimError
        If the register does not hold the id.
    """
    if claim_id not in CLAIMS:
        raise ClaimError(claim_id, CLAIMS)
    return CLAIMS[claim_id]


def verdict(claimed: Claim, estimate: Estimate | None) -> str:
    """What an interval says of a claim: "confirmed" if all of it lies on the claimed side of the bar, "refuted" if none of it does.

    Elsewhere "undecided"; "not measured" without an estimate. A value on the bar is not on the claimed side.
    """
    if estimate is None:
        return "not measured"
    above, below = claimed.null - claimed.margin, claimed.null + claimed.margin
    low, high = estimate.low, estimate.high
    whole, none = {
        "greater": (low > above, high <= above),
        "less": (high < below, low >= below),
        "equal": (low > above and high < below, high <= above or low >= below),
    }[claimed.direction]
    return "confirmed" if whole else "refuted" if none else "undecided"


def record(
    claim_id: str, estimate: Estimate, *, model: str, dataset: str, seeds: int | Sequence[int | np.integer],
    chapter: str = "", variant: str = "", folder: str | Path | None = None,
) -> dict[str, object]:  # fmt: skip
    """Write one measurement of a claim, and return it with its verdict.

    Where runs as on other processors gave this measurement other intervals, its interval is joined with theirs, and a verdict that
    one of them alone would change is called undecided between machines (:mod:`~xlvlms_tutorial.claims.spread`).

    Claim, chapter, model, dataset, seeds and variant (a layer, a task, a setting) make up its name: the same run again replaces
    its own record and no other.

    Raises
    ------
    ClaimError
        If the register does not hold the id.
    RecordError
        If the estimate is not an Estimate, or model, dataset or seeds are missing.
    OutputError
        If the record cannot be written.
    """
    claimed, numbers = claim(claim_id), [int(seed) for seed in np.atleast_1d(seeds)]
    if not isinstance(estimate, Estimate):
        raise RecordError(f"record of {claim_id}", f"{estimate!r} is not an Estimate with value, low, high and n")
    if not model or not dataset or not numbers:
        raise RecordError(f"record of {claim_id}", f"model={model!r}, dataset={dataset!r}, seeds={numbers} must all be given")
    key = {"id": claim_id, "chapter": chapter, "model": model, "dataset": dataset, "seeds": numbers, "variant": variant}
    known = spread.of(key, estimate)
    wide = spread.joined(estimate, known)
    alone = {verdict(claimed, one) for one in (estimate, *known)}
    written = {
        **key, **wide.asdict(), "verdict": verdict(claimed, wide), BETWEEN: alone != {verdict(claimed, wide)},
        "alone": [float(estimate.low), float(estimate.high)], "versions": versions(),
    }  # fmt: skip
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{claim_id}-{model}-{dataset}")[:80]
    write_json(Path(folder or default_folder()) / f"{slug}-{digest(key)[:12]}.json", written)
    return written


def sentence(measured: dict[str, object]) -> str:
    """One line on a measurement: "IMA-1 confirmed: 0.31 [0.28, 0.34], claimed > 0"."""
    value, low, high = (f"{measured[name]:.3g}" for name in ("value", "low", "high"))
    between = " between machines" if measured.get(BETWEEN) else ""
    return f"{measured['id']} {measured['verdict']}{between}: {value} [{low}, {high}], claimed {claim(measured['id']).test}"


def gather(folder: str | Path | None = None) -> pd.DataFrame:
    """All records of a folder, one a row; the verdicts are computed again from the numbers.

    Raises
    ------
    RecordError
        If a record is damaged or incomplete.
    ClaimError
        If a record names a claim that the register does not hold.
    """
    return pd.DataFrame(_rows(folder), columns=["id", *MEASURED, BETWEEN])


def merge(
    folder: str | Path | None = None, path: str | Path | None = None, more: Iterable[Mapping[str, object]] = ()
) -> list[dict[str, object]]:
    """Every claim with every measurement of it, in the register's order, written to ``path`` where one is given.

    One entry a claim and measurement; a claim without one has the verdict "not measured" and None elsewhere. ``more`` are records from
    elsewhere, such as the measurements of a batch; one that a record of the folder repeats is not listed twice.

    Raises
    ------
    RecordError, ClaimError
        As :func:`gather`.
    OutputError
        If ``path`` cannot be written.
    """
    unmeasured = dict.fromkeys(MEASURED) | {"verdict": verdict(_REGISTER[0], None), BETWEEN: False}
    found: dict[str, list[dict[str, object]]] = {name: [] for name in CLAIMS}
    for row in (*_rows(folder), *(judged(record, "a record") for record in more)):
        found[row["id"]] += [] if row in found[row["id"]] else [row]
    entries = [{**asdict(known), **row} for known in _REGISTER for row in found[known.id] or [unmeasured]]
    if path is not None:
        write_json(path, entries)
    return entries


def _rows(folder: str | Path | None) -> list[dict[str, object]]:
    folder = Path(folder or default_folder())
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".json" and not file.name.startswith("."))
    except FileNotFoundError:
        return []  # nothing is measured yet
    except OSError as cause:
        raise RecordError(folder, f"no folder of records ({cause.strerror})") from cause
    return [judged(read_record(file), file) for file in files]


def read_record(file: Path) -> object:
    """What a file of :func:`record` holds; whether it is a record, :func:`judged` says.

    Raises
    ------
    RecordError
        If it is no JSON.
    """
    with reading(file, "not a record of a measurement"):
        return read_json(file)


def _of(kind: type | tuple[type, ...], value: object) -> bool:
    """Whether a value is of a kind; a list stands for one of whole numbers, and a truth value is no number."""
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_of(int, one) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def judged(record: Any, where: object) -> dict[str, object]:
    """A record with the verdict that follows from its numbers, whatever verdict it carries; ``where`` it stands is for messages.

    Raises
    ------
    RecordError
        If the record is incomplete, or its numbers are no estimate.
    ClaimError
        If it names a claim that the register does not hold.
    """
    with reading(where, "not a record of a measurement"):
        row = {name: record[name] for name in ("id", *MEASURED)}
        if wrong := [name for name, kind in _KINDS.items() if not _of(kind, row[name])]:
            raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r}")
        estimate = Estimate(**{field.name: record[field.name] for field in fields(Estimate)})
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    between = {BETWEEN: bool(record.get(BETWEEN, False))}  # results of earlier versions do not say it
    return row | {"verdict": verdict(claim(row["id"]), estimate)} | between
