"""Read what tuning few weights under a shift brought: scores, margins, and what was forgotten.

``python -m xlvlms_tutorial.training.shift_tuning`` tunes and judges again; what it wrote is
shipped, and :func:`load_records` reads it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.metrics.intervals import Estimate, percentile_interval, resampled_shares
from xlvlms_tutorial.models import VLM, Tuning, loss_of
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require_one_of
from xlvlms_tutorial.view import plots

FILE = Path(__file__).with_name("peft.json")
DATASET = "scenes"
PARTS = ("in domain", "out of domain", "old domain")
UNTUNED, BLIND, FULL = "no tuning", "most frequent answer", "full tuning"
N_LABELS = 64  # with which all ways were tried; some with fewer and with more
LIMIT = 0.01  # of the weights: what the claim calls few
SIMPLER = ("connector", "random subset", BLIND)


def load_records(file: Path | None = None) -> dict[str, object]:
    """Read the records of tuning under a shift.

    Parameters
    ----------
    file : Path, optional
        The records; by default those of the package.

    Returns
    -------
    dict
        ``settings``, ``base`` (the untuned model), ``blind`` (the most frequent answer of each type
        of question, by seed) and ``runs``, one a way and seed.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import load_records
    >>> load_records()["settings"]["model"]
    'pocket-llava'
    """
    return read_json(file or FILE)


def correct(
    records: Mapping[str, object], way: str, part: str, labels: int = N_LABELS
) -> tuple[Float[np.ndarray, "seeds pictures"], Float[np.ndarray, "pictures"]]:
    """Return how many questions about each picture a way answers rightly, and how many there are.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.
    way : str
        A way to tune, "no tuning" or "most frequent answer".
    part : {"in domain", "out of domain", "old domain"}
        What is judged.
    labels : int, default 64
        With how many labelled pictures.

    Returns
    -------
    tuple of array (seeds, pictures) and array (pictures,)
        The numbers.

    Raises
    ------
    InputError
        If there is no such way or part.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import correct, load_records
    >>> right, total = correct(load_records(), "no tuning", "old domain")
    >>> right.shape, bool((right <= total).all())
    ((1, 40), True)
    """
    require_one_of(part, PARTS, "part")
    rows = {UNTUNED: [records["base"]], BLIND: list(records["blind"])}
    for run in sorted(records["runs"], key=lambda run: run["seed"]):
        if run["labels"] == labels:
            rows.setdefault(run["way"], []).append(run["scores"])
    require_one_of(way, rows, "way")
    numbers = []
    for row in rows[way]:
        numbers.append([word.count("1") for word in row[part].split()])
    total = [len(word) for word in rows[way][0][part].split()]
    return np.array(numbers, dtype=float), np.array(total, dtype=float)


def score(records: Mapping[str, object], way: str, part: str, labels: int = N_LABELS) -> Estimate:
    """Return the share of all questions that are answered rightly, a mean over seeds.

    Parameters
    ----------
    records, way, part, labels
        As for :func:`correct`.

    Returns
    -------
    Estimate
        With an interval over seeds and pictures, each picture with all its questions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import load_records, score
    >>> score(load_records(), "no tuning", "old domain").value > 0.9
    True
    """
    right, total = correct(records, way, part, labels)
    return _over_seeds_and_pictures(right, total)


def margin(
    records: Mapping[str, object],
    way: str,
    baseline: str,
    part: str,
    labels: int = N_LABELS,
) -> Estimate:
    """Return by how much a way answers more than a baseline.

    Parameters
    ----------
    records, way, part
        As for :func:`correct`.
    baseline : str
        Another way.
    labels : int, default 64
        With how many labelled pictures both were tuned.

    Returns
    -------
    Estimate
        The difference of shares, paired by picture and, where both have as many, by seed.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import load_records, margin
    >>> margin(load_records(), "IA3", "IA3", "in domain").value
    0.0
    """
    first, total = correct(records, way, part, labels)
    second, _ = correct(records, baseline, part, labels)
    if len(first) != len(second):
        second = second.mean(axis=0, keepdims=True)
    return _over_seeds_and_pictures(first - second, total)


def results(records: Mapping[str, object]) -> pd.DataFrame:
    """Arrange what each way costs and what it brings.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    pandas.DataFrame
        A row a way, the fewest trained parameters first, behind "no tuning" and "most frequent
        answer". Columns parameters, percent (of the model's weights), one a part with its score,
        one with the ends of its interval ("in domain low", "in domain high" and so on), validation,
        rate, seconds (of processor time for a training) and seeds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import load_records, results
    >>> results(load_records()).index[:2].tolist()
    ['no tuning', 'most frequent answer']
    """
    runs_of: dict[str, list[dict]] = {UNTUNED: [], BLIND: []}
    for run in sorted(records["runs"], key=lambda run: run["parameters"]):
        if run["labels"] == N_LABELS:
            runs_of.setdefault(run["way"], []).append(run)
    rows = {}
    for way, runs in runs_of.items():
        row = {"parameters": 0, "percent": 0.0}
        if runs:
            row["parameters"] = runs[0]["parameters"]
            row["percent"] = 100 * runs[0]["parameters"] / runs[0]["total"]
        for part in PARTS:
            estimate = score(records, way, part)
            row |= {part: estimate.value, f"{part} low": estimate.low}
            row[f"{part} high"] = estimate.high
        for name in ("validation", "rate", "seconds"):
            row[name] = float(np.mean([run[name] for run in runs])) if runs else np.nan
        rows[way] = row | {"seeds": len(runs)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")


def by_labels(records: Mapping[str, object]) -> pd.DataFrame:
    """Arrange scores by the number of labels, of the ways that were tried with several numbers.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    pandas.DataFrame
        A row a way and number of labels, in rising order; columns as in :func:`results`: a part's
        score and the ends of its interval.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import by_labels, load_records
    >>> by_labels(load_records()).loc["IA3"].index.tolist()
    [16, 64, 256]
    """
    sizes: dict[str, set[int]] = {}
    for run in records["runs"]:
        sizes.setdefault(run["way"], set()).add(run["labels"])
    rows = {}
    for way, numbers in sizes.items():
        for labels in sorted(numbers) if len(numbers) > 1 else ():
            row = {}
            for part in PARTS:
                estimate = score(records, way, part, labels)
                row |= {part: estimate.value, f"{part} low": estimate.low}
                row[f"{part} high"] = estimate.high
            rows[way, labels] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["way", "labels"])


def best_few(records: Mapping[str, object], limit: float = LIMIT) -> str:
    """Return the way that is best on validation among those that train few weights.

    Random subsets, which nobody would choose, are left out.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.
    limit : float, default 0.01
        Below which share of the model's weights.

    Returns
    -------
    str
        Its name.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import best_few, load_records, results
    >>> records = load_records()
    >>> bool(results(records).loc[best_few(records), "percent"] < 1)
    True
    """
    table = results(records).drop(index=[UNTUNED, BLIND, "random subset"], errors="ignore")
    return str(table[table["percent"] < 100 * limit]["validation"].idxmax())


def comparisons(records: Mapping[str, object], way: str) -> pd.DataFrame:
    """Compare a way with what is simpler: the connector, a random subset, answering blindly.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.
    way : str
        The way.

    Returns
    -------
    pandas.DataFrame
        A row for each baseline and part; columns value, low, high and n: by how much the way
        answers more.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import comparisons, load_records
    >>> comparisons(load_records(), "IA3").columns.tolist()
    ['value', 'low', 'high', 'n']
    """
    rows = {}
    for baseline in SIMPLER:
        for part in PARTS:
            if baseline != way:
                rows[baseline, part] = margin(records, way, baseline, part).asdict()
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename_axis(["against", "part"])


def record(experiment: Experiment, records: Mapping[str, object]) -> dict[str, str]:
    """Record PEFT-1 and PEFT-2: the best of the few against full tuning.

    Nothing is recorded where the records are of another model or other pictures than the
    experiment.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    dict of str to str
        The verdict by claim and part.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment
    >>> from xlvlms_tutorial.tutorials.peft import load_records, record
    >>> record(Experiment("peft", "another model", "scenes"), load_records())
    {}
    """
    current = experiment.run["model"], experiment.run["dataset"]
    if current != (records["settings"]["model"], DATASET):
        return {}
    verdicts = {}
    way = best_few(records)
    for claim, part in zip(("PEFT-1", "PEFT-1", "PEFT-2"), PARTS, strict=True):
        estimate = margin(records, way, FULL, part)
        verdicts[f"{claim}, {part}"] = experiment.record(
            claim, estimate, FULL, part, "validation", "seeds and questions"
        )
    return verdicts


def check_scores(experiment: Experiment, records: Mapping[str, object]) -> None:
    """Check what the page says of all ways to tune.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    records : mapping
        From :func:`load_records`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, peft
    >>> experiment = Experiment("peft", "pocket-llava", "scenes")
    >>> peft.check_scores(experiment, peft.load_records())
    """
    home, beyond, old = PARTS
    few = best_few(records)
    table = results(records).drop(index=[UNTUNED, BLIND])
    check = experiment.check
    check(
        "untuned, the most frequent answer does better",
        margin(records, UNTUNED, BLIND, home).high < 0,
    )
    learned = [margin(records, way, UNTUNED, home).low > 0 for way in table.index]
    check("every way answers more than no tuning, in domain", all(learned))
    seeing = [margin(records, way, BLIND, home).low > 0 for way in (few, FULL)]
    check("full tuning and the best of the few see more than whoever never looks", all(seeing))
    forgotten = [margin(records, way, UNTUNED, old).high < 0 for way in table.index]
    check("every way forgets", all(forgotten))
    check("full tuning forgets most", table[old].idxmin() == FULL)
    smaller = table.index[table["parameters"] < table.loc[few, "parameters"]]
    near = [margin(records, way, FULL, home).low > -0.05 for way in smaller]
    check("no smaller way is surely within five points of full tuning, in domain", not any(near))
    check("the best of the few is the connector", few == "connector")
    apart = [margin(records, few, "random subset", part).low > 0 for part in (home, beyond)]
    check("random weights are surely worse in domain alone", apart == [True, False])


def label_gain(
    records: Mapping[str, object], way: str, part: str, fewer: int, more: int
) -> Estimate:
    """Return by how much more labels improve a way.

    Parameters
    ----------
    records, way, part
        As for :func:`correct`.
    fewer, more : int
        Numbers of labels.

    Returns
    -------
    Estimate
        The difference of shares, paired by seed and picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import label_gain, load_records
    >>> label_gain(load_records(), "IA3", "in domain", 64, 64).value
    0.0
    """
    first, total = correct(records, way, part, more)
    second, _ = correct(records, way, part, fewer)
    return _over_seeds_and_pictures(first - second, total)


def check_labels(experiment: Experiment, records: Mapping[str, object]) -> None:
    """Check what the page says of fewer and of more labels.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    records : mapping
        From :func:`load_records`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, peft
    >>> experiment = Experiment("peft", "pocket-llava", "scenes")
    >>> peft.check_labels(experiment, peft.load_records())
    """
    home, _, old = PARTS
    table = by_labels(records)
    ways = table.index.get_level_values("way").unique()
    check = experiment.check
    more = [label_gain(records, way, home, 64, 256).low > 0 for way in ways]
    check("from 64 to 256 labels no way surely gains, in domain", not any(more))
    fewer = [label_gain(records, way, home, 16, 64).value > 0 for way in ways]
    check("with 16 labels all ways score less than with 64, in domain", all(fewer))
    sizes = table.index.get_level_values("labels").unique()
    forgets = [margin(records, "connector", FULL, old, size).low > 0 for size in sizes]
    check("the connector forgets less than full tuning with any number of labels", all(forgets))
    reaches = [margin(records, "connector", FULL, home, size).low > -0.05 for size in sizes]
    check("the connector reaches full tuning in domain with any number of labels", all(reaches))


def draw(axes: Iterable[Axes], table: pd.DataFrame) -> None:
    """Draw scores against the number of trained parameters, a panel a part.

    Parameters
    ----------
    axes : iterable of Axes
        One for each part.
    table : pandas.DataFrame
        From :func:`results`.
    """
    axes = list(axes)
    tuned = table[table["parameters"] > 0]
    for ax, part in zip(axes, PARTS, strict=True):
        for marker, (way, row) in zip("osD^vP*Xhd", tuned.iterrows(), strict=False):
            reach = [[row[part] - row[f"{part} low"]], [row[f"{part} high"] - row[part]]]
            ax.errorbar(row["parameters"], row[part], reach, fmt=marker, ms=6, lw=1, label=way)
        ax.axhline(table.loc[UNTUNED, part], color=plots.INK, ls="--", lw=1, label=UNTUNED)
        ax.axhline(table.loc[BLIND, part], color=plots.MUTED, ls=":", lw=1.5, label=BLIND)
        ax.set(xscale="log", xlabel="trained parameters", title=part, ylim=(0, 1.03))
    axes[0].set(ylabel="right answers (share)")


def draw_labels(axes: Iterable[Axes], table: pd.DataFrame) -> None:
    """Draw scores against the number of labels, a panel a part.

    Parameters
    ----------
    axes : iterable of Axes
        One for each part.
    table : pandas.DataFrame
        From :func:`by_labels`.
    """
    ways = list(dict.fromkeys(table.index.get_level_values("way")))
    for ax, part in zip(axes, PARTS, strict=True):
        for number, (way, marker) in enumerate(zip(ways, "os^D", strict=False)):
            rows = table.loc[way]
            places = rows.index * 1.08 ** (number - 1.5)  # beside each other
            reach = [rows[part] - rows[f"{part} low"], rows[f"{part} high"] - rows[part]]
            ax.errorbar(places, rows[part], reach, fmt=f"{marker}-", ms=5, lw=1, label=way)
        sizes = table.index.get_level_values("labels").unique()
        ax.set(xscale="log", xlabel="labelled pictures", title=part, ylim=(0, 1.03))
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()


def train(
    vlm: VLM,
    tuning: Tuning,
    samples: Sequence[Sample],
    steps: int,
    rate: float,
    seed: int = 0,
    batch_size: int = 4,
    at_step: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Train what a tuning prepared on questions about pictures, one question a picture and step.

    Parameters
    ----------
    vlm : VLM
        The model.
    tuning : Tuning
        What ``tune`` prepared of it.
    samples : sequence of Sample
        Pictures with questions; those without any are described.
    steps : int
        Length of the training.
    rate : float
        The learning rate of Adam.
    seed : int, default 0
        Draws pictures and questions.
    batch_size : int, default 4
        Pictures a step.
    at_step : callable, optional
        Is called with the number of steps done, after each; by default nothing is done.

    Returns
    -------
    list of float
        The loss of each step, in nats a token.

    Examples
    --------
    >>> from xlvlms_tutorial.models import tune
    >>> from xlvlms_tutorial.tutorials.peft import train
    >>> with tune(vlm, "bias") as tuning:
    ...     losses = train(vlm, tuning, samples[:2], steps=2, rate=0.01, batch_size=1)
    >>> len(losses)
    2
    """
    optimiser = torch.optim.Adam(tuning.parameters.values(), lr=rate)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(samples), min(batch_size, len(samples)), replace=False)
        pictures = [samples[row] for row in rows]
        prompts, answers = [], []
        for sample in pictures:
            prompt, answer = PROMPTS["image"], (sample.captions or ("nothing",))[0]
            if sample.questions:
                question = sample.questions[rng.integers(len(sample.questions))]
                prompt, answer = question.text, question.answer
            prompts.append(tuning.prefix + prompt)
            answers.append(answer)
        loss = loss_of(vlm, pictures, prompts, answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        at_step(step + 1)
    return losses


def ask(vlm: VLM, samples: Sequence[Sample], prefix: str = "", kind: int = 0) -> list[str]:
    """Answer one question about each picture.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The pictures.
    prefix : str, default ""
        That of a tuning.
    kind : int, default 0
        Which question of each picture.

    Returns
    -------
    list of str
        The answers.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import ask
    >>> len(ask(vlm, samples[:2]))
    2
    """
    prompts = [prefix + asked(sample, kind)[0] for sample in samples]
    return vlm.generate([sample.image for sample in samples], prompts, max_new_tokens=8)


def asked(sample: Sample, kind: int = 0) -> tuple[str, str]:
    """Return a question about a picture and its right answer.

    Parameters
    ----------
    sample : Sample
        The picture.
    kind : int, default 0
        Which of its questions; the last where it has fewer.

    Returns
    -------
    tuple of str
        Both texts; the prompt for a description and a caption where nothing is asked.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.peft import asked
    >>> asked(samples[0])[0].endswith("?")
    True
    """
    if not sample.questions:
        return PROMPTS["image"], (sample.captions or ("",))[0]
    question = sample.questions[min(kind, len(sample.questions) - 1)]
    return question.text, question.answer


def _over_seeds_and_pictures(
    right: Float[np.ndarray, "seeds pictures"], total: Float[np.ndarray, "pictures"]
) -> Estimate:
    """The share of questions, with an interval from resampling both seeds and pictures."""
    n_seeds, n_pictures = right.shape
    of_pictures = resampled_shares(n_pictures, seed=0)
    of_seeds = np.ones((len(of_pictures), 1))
    if n_seeds > 1:
        of_seeds = resampled_shares(n_seeds, seed=1)
    numerators = np.einsum("rs,sp,rp->r", of_seeds, right, of_pictures)
    resampled = numerators / (of_pictures @ total)
    value = float(right.mean(axis=0).sum() / total.sum())
    return percentile_interval(value, resampled, int(total.sum()))
