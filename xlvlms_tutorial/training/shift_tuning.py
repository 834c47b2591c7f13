"""Tune a model to another domain with few labels, by many methods; what came out is shipped.

The model of the first world is adapted to postcards by day on grass and sand, and judged there, on
postcards at dusk or night on other grounds, and on scenes of the first world, which it may forget.
``python -m xlvlms_tutorial.training.shift_tuning`` makes the records of the chapter again.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.models import VLM, tune
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.tuning import Tuning
from xlvlms_tutorial.training.connector import Packed, additive_mask, pack
from xlvlms_tutorial.training.connector_runs import versions
from xlvlms_tutorial.validation import require, require_one_of

FILE = Path(__file__).parents[1] / "tutorials" / "peft.json"
MODEL = "pocket-llava"
STEPS, BATCH_SIZE, N_TEXTS, WARMUP = 50, 6, 3, 5
TRIAL = 16  # steps with each learning rate, before validation chooses one
CHECKS = (30, 50)  # steps after which validation is asked; the best of them is judged
PARTS = {"in domain": 40, "out of domain": 40, "old domain": 40}  # pictures
N_VALIDATION = 20
N_LABELS = 64
OTHER_SIZES = (16, 256)  # numbers of labels with which some ways are tried too
SOME_WAYS = ("IA3", "LoRA, r = 1", "connector", "full tuning")
SEEDS = (0, 1, 2)
N_DRAWN = {16: 110, 64: 110, 256: 300}  # pictures from which a seed takes so many labels
PLACES, TIME = ("grass", "sand"), "day"  # what is labelled
CENSUS = 900  # postcards from which those of a domain are taken; three times as many for 256 labels


@dataclass(frozen=True)
class Way:
    """A method with its size, and the learning rates that validation chooses from.

    Parameters
    ----------
    name : str
        What tables call it.
    method : str
        As ``tune`` takes it.
    rates : tuple of float
        The learning rates that are tried.
    rank : int, default 4
        As ``tune`` takes it.
    """

    name: str
    method: str
    rates: tuple[float, ...]
    rank: int = 4


WAYS = (
    Way("prompt tuning", "prompt", (3e-2, 1e-1)),
    Way("added bias", "bias", (1e-2, 3e-2)),
    Way("IA3", "ia3", (1e-2, 3e-2)),
    Way("norm tuning", "norm", (3e-3, 1e-2)),
    Way("LoRA, r = 1", "lora", (3e-3, 1e-2), 1),
    Way("random subset", "subset", (3e-3, 1e-2), 1),
    Way("parallel adapters", "adapter", (3e-3, 1e-2)),
    Way("LoRA, r = 4", "lora", (2e-3, 6e-3)),
    Way("connector", "connector", (3e-4, 1e-3)),
    Way("full tuning", "full", (1e-4, 3e-4)),
)


def labelled(samples: Sequence[Sample], n: int, factor: str = "item") -> list[Sample]:
    """Take the first pictures in which each value of a factor occurs at least once.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures whose truth is known.
    n : int
        How many to take.
    factor : str, default "item"
        The factor.

    Returns
    -------
    list of Sample
        The pictures, those that show a new value first.

    Raises
    ------
    InputError
        If there are fewer pictures than that, or fewer labels than values of the factor.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.training.shift_tuning import labelled
    >>> few = labelled(load_samples("scenes", n=60), 5, "time")
    >>> len(few), len({sample.truth["time"] for sample in few})
    (5, 3)
    """
    classes = sorted({str(sample.truth[factor]) for sample in samples})
    if n < len(classes):
        raise InputError(
            f"{n} labels for {len(classes)} classes of {factor}", "give one label a class or more"
        )
    require(n <= len(samples), f"{n} labels of {len(samples)} pictures", "draw more pictures")
    firsts, rest, values = [], [], set()
    for sample in samples:
        value = str(sample.truth[factor])
        (rest if value in values else firsts).append(sample)
        values.add(value)
    return [*firsts, *rest][:n]


def domain(part: str, split: str = "test", seed: int = 0, n: int | None = None) -> list[Sample]:
    """Draw pictures of a domain.

    Parameters
    ----------
    part : {"in domain", "out of domain", "old domain"}
        Postcards by day on grass and sand; postcards at another time on another ground; scenes of
        the world that the model was trained on.
    split : str, default "test"
        "train", "validation" or "test".
    seed : int, default 0
        Which pictures are drawn.
    n : int, optional
        How many; by default those of the test.

    Returns
    -------
    list of Sample
        The pictures with their questions.

    Examples
    --------
    >>> from xlvlms_tutorial.training.shift_tuning import domain
    >>> {sample.truth["time"] for sample in domain("in domain", n=3)}
    {'day'}
    """
    require_one_of(part, PARTS, "part")
    n = n or PARTS[part]
    if part == "old domain":
        return load_samples("scenes", n, split, seed)
    home = part == "in domain"
    samples = []
    for sample in _census(split, seed, CENSUS if n <= 110 else 3 * CENSUS):
        marks = sample.truth["time"] == TIME, sample.truth["place"] in PLACES
        if marks == (home, home):
            samples.append(sample)
    require(len(samples) >= n, f"{len(samples)} pictures of {n}", "ask for fewer")
    return samples[:n]


@lru_cache
def _census(split: str, seed: int, n: int) -> list[Sample]:
    return load_samples("postcards", n, split, seed)


class Lessons:
    """Pictures with their questions, seen by the tower once.

    Parameters
    ----------
    vlm : VLM
        The model; its tower is frozen.
    samples : sequence of Sample
        The pictures.
    """

    def __init__(self, vlm: VLM, samples: Sequence[Sample]) -> None:
        self.vlm, self.samples = vlm, list(samples)
        tokens = []
        tower = vlm.model.model.vision_tower
        for start in range(0, len(self.samples), 20):
            images = [sample.image for sample in self.samples[start : start + 20]]
            pixels = vlm.batch(images, ["?"] * len(images))["pixel_values"]
            with torch.no_grad():
                tokens.append(tower(pixels.to(vlm.model.dtype)).last_hidden_state)
        self.tokens = torch.cat(tokens)

    def packed(self, rows: Sequence[int], texts: Sequence[Sequence[int]], prefix: str) -> Packed:
        """Pack pictures with some of their questions, the learned tokens before each.

        Parameters
        ----------
        rows : sequence of int
            Numbers of the pictures.
        texts : sequence of sequences of int
            Numbers of questions, for each picture.
        prefix : str
            The places of learned tokens.

        Returns
        -------
        Packed
            A row a picture, its questions behind each other.
        """
        dialogues = []
        for row, numbers in zip(rows, texts, strict=True):
            questions = self.samples[row].questions
            dialogues.append([(prefix + questions[k].text, questions[k].answer) for k in numbers])
        model = self.vlm.model
        return pack(
            dialogues, self.vlm.tokenizer, model.config.image_token_id, self.tokens.shape[1]
        )

    def logits(self, rows: Sequence[int], packed: Packed) -> tuple[Float[Tensor, "n v"], Tensor]:
        """Return the logits that answers' tokens are predicted with, and where they stand."""
        model = self.vlm.model
        ids = packed.input_ids
        embeddings = model.get_input_embeddings()(ids).clone()
        visual = model.model.multi_modal_projector(self.tokens[list(rows)])
        first = int((ids[0] != model.config.image_token_id).int().argmin())
        embeddings[:, first : first + visual.shape[1]] = visual.to(embeddings.dtype)
        states = model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=additive_mask(packed.mask, embeddings),
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state
        predicted = packed.labels[:, 1:] != -100
        return model.lm_head(states[:, :-1][predicted]).float(), predicted

    def loss(self, prefix: str, seed: int, step: int) -> Float[Tensor, ""]:
        """Return the loss of a step: some pictures, some questions about each.

        Parameters
        ----------
        prefix : str
            The places of learned tokens.
        seed, step : int
            Draw pictures and questions.

        Returns
        -------
        Tensor ()
            Nats a token of an answer.
        """
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(self.samples), min(BATCH_SIZE, len(self.samples)), replace=False)
        texts = []
        for row in rows:
            n = len(self.samples[row].questions)
            texts.append(rng.choice(n, min(N_TEXTS, n), replace=False).tolist())
        packed = self.packed(rows.tolist(), texts, prefix)
        logits, predicted = self.logits(rows.tolist(), packed)
        weights = packed.weights[:, 1:][predicted]
        losses = nn.functional.cross_entropy(
            logits, packed.labels[:, 1:][predicted], reduction="none"
        )
        return (weights * losses).sum() / weights.sum()

    @torch.no_grad()
    def correct(self, prefix: str = "", batch_size: int = 10) -> tuple[list[list[bool]], float]:
        """Return which questions of each picture a greedy answer is right about, and the loss."""
        results, losses = [], []
        for start in range(0, len(self.samples), batch_size):
            rows = range(start, min(start + batch_size, len(self.samples)))
            texts = [range(len(self.samples[row].questions)) for row in rows]
            packed = self.packed(rows, texts, prefix)
            logits, predicted = self.logits(rows, packed)
            targets = packed.labels[:, 1:][predicted]
            losses += nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
            hit = torch.zeros_like(predicted)
            hit[predicted] = logits.argmax(dim=-1) == targets
            for line, marks in zip(hit, predicted, strict=True):
                results.append(by_run(line, marks))
        return results, float(np.mean(losses))


def by_run(hit: Bool[Tensor, "t"], marks: Bool[Tensor, "t"]) -> list[bool]:
    """Tell for each run of marked positions whether all of it was hit."""
    runs, inside = [], False
    for correct, marked in zip(hit.tolist(), marks.tolist(), strict=True):
        if marked:
            runs = [*runs[:-1], runs[-1] and correct] if inside else [*runs, correct]
        inside = marked
    return runs


def share(correct: Sequence[Sequence[bool]]) -> float:
    """Return the share of all questions that are answered rightly, over all pictures at once.

    A mean of the means of batches or pictures weighs questions unequally.

    Parameters
    ----------
    correct : sequence of sequence of bool
        For each picture, for each of its questions.

    Returns
    -------
    float
        Between 0 and 1.

    Examples
    --------
    >>> from xlvlms_tutorial.training.shift_tuning import share
    >>> share([[True, True, True], [False]])
    0.75
    """
    answers = [answer for picture in correct for answer in picture]
    return float(np.mean(answers))


class Best:
    """Keeps what was best on validation, not what was last.

    Examples
    --------
    >>> from xlvlms_tutorial.training.shift_tuning import Best
    >>> best = Best()
    >>> for step, score in ((10, 0.4), (20, 0.7), (30, 0.5)):
    ...     best.offer(score, step, {"weight": step})
    >>> best.score, best.step, best.state
    (0.7, 20, {'weight': 20})
    """

    def __init__(self) -> None:
        self.score, self.step, self.state = -np.inf, 0, {}

    def offer(self, score: float, step: int, state: Mapping[str, object]) -> None:
        """Keep the state if its score is the highest so far; the first of equal ones stays.

        Parameters
        ----------
        score : float
            On validation.
        step : int
            When the state was reached.
        state : mapping
            The trained weights by name.
        """
        if score > self.score:
            self.score, self.step, self.state = score, step, dict(state)


def fit(
    tuning: Tuning,
    lessons: Lessons,
    validation: Lessons,
    rate: float,
    seed: int = 0,
    steps: int = STEPS,
    checks: Sequence[int] = CHECKS,
) -> tuple[Best, list[float]]:
    """Train what a tuning prepared, and put back what was best on validation.

    Parameters
    ----------
    tuning : Tuning
        Of the model of the lessons.
    lessons, validation : Lessons
        What is trained on, and what chooses among the checks.
    rate : float
        The largest learning rate.
    seed : int, default 0
        Draws the pictures and questions of each step.
    steps : int, default 50
        Length of the training.
    checks : sequence of int, default (30, 50)
        After which steps validation is asked.

    Returns
    -------
    tuple of Best and list of float
        The best state, and the loss of each step.
    """
    best = Best()

    def check(done: int) -> None:
        if done in checks:
            best.offer(share(validation.correct(tuning.prefix)[0]), done, tuning.state())

    history = optimise(
        tuning.parameters,
        lambda step: lessons.loss(tuning.prefix, seed, step),
        steps,
        lambda step: rate * warmup_cosine(step, steps, WARMUP),
        at_step=check,
        disable=True,
    )
    tuning.load(best.state)
    return best, [row["loss"] for row in history]


def blind(lessons: Sequence[Sample], samples: Sequence[Sample]) -> list[list[bool]]:
    """Answer each question with the most frequent answer of its type, without looking.

    Parameters
    ----------
    lessons : sequence of Sample
        Where answers are counted.
    samples : sequence of Sample
        Whose questions are answered.

    Returns
    -------
    list of list of bool
        For each picture, for each of its questions: whether the answer is right.

    Examples
    --------
    >>> from xlvlms_tutorial.training.shift_tuning import blind
    >>> [len(answers) for answers in blind(samples, samples)] == [
    ...     len(sample.questions) for sample in samples
    ... ]
    True
    """
    counts: dict[str, Counter] = {}
    for sample in lessons:
        for question in sample.questions:
            counts.setdefault(question.type, Counter())[question.answer] += 1
    results = []
    for sample in samples:
        answers = []
        for question in sample.questions:
            frequent = counts.get(question.type, Counter()).most_common(1)
            answers.append(bool(frequent) and frequent[0][0] == question.answer)
        results.append(answers)
    return results


def digits(correct: Sequence[Sequence[bool]]) -> str:
    """Write which questions were answered rightly: a word a picture, a digit a question."""
    return " ".join("".join(str(int(answer)) for answer in picture) for picture in correct)


def run_all(file: Path | None = None, report: Callable[[str], object] = print) -> dict[str, object]:
    """Tune and judge by all ways with all seeds, and write what came out after each run.

    A run that was killed goes on: what the file has is not done again. The language model is in
    bfloat16 throughout, what is trained in float32.

    Parameters
    ----------
    file : Path, optional
        The records; by default those of the package.
    report : callable
        Is called with a line for each finished run; ``print`` by default.

    Returns
    -------
    dict
        ``settings``, ``base`` (the untuned model), ``blind`` (by seed) and ``runs``.
    """
    torch.set_num_threads(1)
    file = file or FILE
    vlm = load(MODEL, device="cpu", dtype="bfloat16")
    # of short rows a quarter faster on CPUs, forwards and backwards
    vlm.model.model.language_model.set_attn_implementation("eager")
    settings = _settings()
    records = read_json(file) if file.exists() else {"settings": settings, "runs": []}
    same = records["settings"] == settings
    require(same, f"{file!s} has runs with other settings", "remove the file")
    bench = {part: Lessons(vlm, domain(part)) for part in PARTS}
    validation = Lessons(vlm, domain("in domain", "validation", n=N_VALIDATION))
    if "base" not in records:
        records["base"] = {part: digits(lessons.correct()[0]) for part, lessons in bench.items()}
        records["blind"] = _blind(bench)
        write_json(file, records, indent=1)
    ways = [way for way in WAYS if way.name in SOME_WAYS]
    plan = [*product([N_LABELS], SEEDS, WAYS), *product(OTHER_SIZES, SEEDS, ways)]
    for n_labels, seed, way in plan:
        name = {"way": way.name, "labels": n_labels, "seed": seed}
        if any(name.items() <= run.items() for run in records["runs"]):
            continue
        start = time.process_time()
        lessons = Lessons(vlm, labels(seed, n_labels))
        before = [run for run in records["runs"] if run["way"] == way.name]
        if before:
            rate, trials = before[0]["rate"], {}
        else:
            rate, trials = _chosen_rate(vlm, way, lessons, validation)
        run = name | _run(vlm, way, lessons, validation, bench, rate, seed)
        run |= {"trials": trials, "seconds_in_all": round(time.process_time() - start, 1)}
        records["runs"].append(run)
        write_json(file, records, indent=1)
        report(f"{way.name}, {n_labels} labels, seed {seed}: {run['validation']}")
    return records


def labels(seed: int, n: int = N_LABELS) -> list[Sample]:
    """Draw the labelled pictures of a seed; fewer are the first of more."""
    return labelled(domain("in domain", "train", seed, N_DRAWN[n]), n)


def _settings() -> dict[str, object]:
    settings = {"model": MODEL, "steps": STEPS, "batch_size": BATCH_SIZE, "texts": N_TEXTS}
    settings |= {"warmup": WARMUP, "trial": TRIAL, "checks": list(CHECKS), "parts": PARTS}
    settings |= {"validation": N_VALIDATION, "dtype": "bfloat16"}
    settings |= {"labels": [N_LABELS, *OTHER_SIZES]}
    settings["rates"] = {way.name: list(way.rates) for way in WAYS}
    return settings | {"versions": versions(torch, transformers)}


def _blind(bench: Mapping[str, Lessons]) -> list[dict[str, str]]:
    rows = []
    for seed in SEEDS:
        many = labels(seed)
        rows.append({part: digits(blind(many, of.samples)) for part, of in bench.items()})
    return rows


def _chosen_rate(
    vlm: VLM, way: Way, lessons: Lessons, validation: Lessons
) -> tuple[float, dict[str, float]]:
    """Train a little with each rate; return that of the lowest loss on validation, and all."""
    losses = {}
    for rate in way.rates:
        with tune(vlm, way.method, rank=way.rank) as tuning:
            fit(tuning, lessons, validation, rate, 0, TRIAL, (TRIAL,))
            losses[rate] = round(validation.correct(tuning.prefix)[1], 4)
    return min(losses, key=losses.get), {str(rate): loss for rate, loss in losses.items()}


def _run(
    vlm: VLM,
    way: Way,
    lessons: Lessons,
    validation: Lessons,
    bench: Mapping[str, Lessons],
    rate: float,
    seed: int,
) -> dict[str, object]:
    """Train one way, and judge what was best on validation."""
    with tune(vlm, way.method, rank=way.rank, seed=seed) as tuning:
        start = time.process_time()
        best, losses = fit(tuning, lessons, validation, rate, seed)
        seconds = time.process_time() - start
        scores = {part: digits(of.correct(tuning.prefix)[0]) for part, of in bench.items()}
        run = {"parameters": tuning.count, "total": tuning.total, "rate": rate}
    run |= {"step": best.step, "validation": round(best.score, 4), "seconds": round(seconds, 1)}
    return run | {"loss": [round(loss, 3) for loss in losses[::7]], "scores": scores}


if __name__ == "__main__":
    run_all()
