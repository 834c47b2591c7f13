"""Evaluate models with gaps before and after training, for the chapter on training through them.

The loss, the training and the figures are in the chapter. Here is what surrounds them: which
questions are asked, what is counted, what share of a score is kept, and how errors are sorted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from ipywidgets import Widget

from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.evaluation import Report, evaluate
from xlvlms_tutorial.interventions import skip
from xlvlms_tutorial.metrics import (
    CAPTION_FACTORS,
    Estimate,
    bootstrap,
    compare_times,
    count_flops,
    memory_of,
)
from xlvlms_tutorial.models import VLM, anatomy, loss_of
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.tutorials.skipping import words_to_mark
from xlvlms_tutorial.view import tradeoff
from xlvlms_tutorial.view.tables import Table, table

TASKS = ("caption", "answer")
KINDS = ("presence?", "place?", "action?", "side?", "count?", "colour?")


def draw_samples(dataset: str, n: int, seed: int = 0) -> list[Sample]:
    """Draw unseen samples with one question about presence and two of other types each.

    Use it so that no type of question is asked far more often than another: they take turns.

    Parameters
    ----------
    dataset : str
        The name of the dataset, or a folder.
    n : int
        How many samples.
    seed : int, default 0
        The seed of the draw.

    Returns
    -------
    list of Sample
        The samples, with at most three questions each.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> [len(sample.questions) for sample in skip_training.draw_samples("scenes", 2)]
    [3, 3]
    """
    samples = load_samples(dataset, n=n, seed=seed)
    return [_few_questions(sample, turn) for turn, sample in enumerate(samples)]


def _few_questions(sample: Sample, turn: int) -> Sample:
    """The sample with one question about presence and two of other types, which take turns."""
    presence, open_questions = [], []
    for question in sample.questions:
        of_type = presence if question.type == "presence" else open_questions
        of_type.append(question)
    questions = [presence[turn % len(presence)]] if presence else []
    for k in range(min(2, len(open_questions))):
        questions.append(open_questions[(turn + k) % len(open_questions)])
    return replace(sample, questions=tuple(questions))


def text_to_learn(sample: Sample) -> str:
    """Return what a model is taught to say of a sample: its first caption, else an answer.

    Parameters
    ----------
    sample : Sample
        A sample with a caption or a question.

    Returns
    -------
    str
        The text.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> sample = load_samples("scenes", 1)[0]
    >>> skip_training.text_to_learn(sample) == sample.captions[0]
    True
    """
    return sample.captions[0] if sample.captions else sample.questions[0].answer


def write_caption(vlm: VLM, samples: Sequence[Sample], n_tokens: int) -> None:
    """Generate a caption of so many tokens for each sample.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The samples.
    n_tokens : int
        Tokens of each caption.
    """
    batch = vlm.batch_of(samples, [PROMPTS["image"]] * len(samples))
    vlm.generate_ids(batch, max_new_tokens=n_tokens, min_new_tokens=n_tokens)


def training_step(vlm: VLM, samples: Sequence[Sample]) -> None:
    """Compute the gradient of the captions' loss for the connector, and forget it.

    Use it to count or time a step of training without changing the model.

    Parameters
    ----------
    vlm : VLM
        The model; its connector requires gradients afterwards.
    samples : sequence of Sample
        The batch.
    """
    anatomy.connector(vlm.model).requires_grad_(True)
    texts = [text_to_learn(sample) for sample in samples]
    loss_of(vlm, samples, PROMPTS["image"], texts).backward()
    vlm.model.zero_grad()


def time_with_gaps(
    vlm: VLM,
    gaps: Sequence[int],
    samples: Sequence[Sample],
    lessons: Sequence[Sample],
    n_tokens: int,
    max_rounds: int = 4,
) -> Table:
    """Measure the time of a caption and of a training step with gaps, as shares of without.

    Use it because operations are not seconds. The whole model is timed twice in each round: its
    second time is what the clock makes of no difference.

    Parameters
    ----------
    vlm : VLM
        The model.
    gaps : sequence of int
        The blocks that are skipped.
    samples, lessons : sequence of Sample
        What captions are written of, and what a step learns from.
    n_tokens : int
        Tokens of a caption.
    max_rounds : int, default 4
        Rounds at most, 4 or more.

    Returns
    -------
    Table
        The shares with intervals over rounds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> times = skip_training.time_with_gaps(vlm, [4, 5], samples[:1], samples[:1], 1)
    >>> list(times.cells.columns)
    ['share of the time', 'low', 'high', 'rounds']
    """
    work = {
        f"{n_tokens} tokens of a caption": partial(write_caption, vlm, samples, n_tokens),
        "a training step": partial(training_step, vlm, lessons),
    }
    tables = {}
    for name, call in work.items():
        ways = {"dense": call, "skipped": partial(_with_gaps, vlm, gaps, call)}
        times = compare_times(ways, to="dense", most=max_rounds, device=vlm.device).iloc[1:]
        tables[name] = times[["value", "low", "high", "n"]]
    columns = {"value": "share of the time", "n": "rounds"}
    return table(pd.concat(tables).rename(columns=columns))


def _with_gaps(vlm: VLM, gaps: Sequence[int], call: partial) -> None:
    with skip(vlm, gaps):
        call()


def first_loss(vlm: VLM, samples: Sequence[Sample], gaps: Sequence[int]) -> float:
    """Return the loss of captions through gaps before any training.

    Use it to compare choices of gaps by the start that they give a training.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Unseen samples.
    gaps : sequence of int
        The blocks that are skipped.

    Returns
    -------
    float
        Nats a token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> loss = skip_training.first_loss(vlm, samples[:1], [4])
    >>> loss < skip_training.first_loss(vlm, samples[:1], list(range(4, 20)))
    True
    """
    texts = [text_to_learn(sample) for sample in samples]
    with skip(vlm, gaps), torch.no_grad():
        return float(loss_of(vlm, samples, PROMPTS["image"], texts))


class Trial:
    """Evaluate stages of one model on the same samples, and say what they keep and cost.

    A stage is named by its kind and what was done: "dense", "skipped, untrained", "skipped,
    trained". Stages are compared with the one called "dense".

    Parameters
    ----------
    samples : sequence of Sample
        Unseen samples.
    lessons : sequence of Sample
        Samples of a training step whose operations are counted.
    n_tokens : int, default 8
        Tokens of the caption whose operations are counted.
    seed : int, default 0
        The seed of intervals.

    Attributes
    ----------
    reports : dict of str to Report
        The evaluations by stage.
    costs : dict of str to dict of str to float
        Operations and memory by kind.

    Examples
    --------
    >>> from xlvlms_tutorial import skip
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> unseen = skip_training.draw_samples("scenes", 4)
    >>> trial = skip_training.Trial(unseen, samples[:1], n_tokens=1)
    >>> trial.add("dense", vlm)
    >>> with skip(vlm, range(4, 16)):
    ...     trial.add("skipped, untrained", vlm)
    >>> trial.retained("skipped, untrained", "caption").value < 0.5
    True
    >>> trial.shares()["memory"].tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        lessons: Sequence[Sample],
        n_tokens: int = 8,
        seed: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.lessons = list(lessons)
        self.n_tokens = n_tokens
        self.seed = seed
        self.reports: dict[str, Report] = {}
        self.costs: dict[str, dict[str, float]] = {}

    @property
    def kinds(self) -> list[str]:
        """The types of question that the samples have, each with a question mark."""
        columns = self.facts("dense").columns
        return [kind for kind in KINDS if kind in columns]

    def add(self, stage: str, vlm: VLM, n: int | None = None) -> None:
        """Evaluate a model as it is now, and count what it costs; nothing is done twice.

        Captions and answers are cut, since a broken model does not stop by itself.

        Parameters
        ----------
        stage : str
            The name of the stage.
        vlm : VLM
            The model, with its gaps in force.
        n : int, optional
            How many samples it is evaluated on; by default all.
        """
        if stage not in self.reports:
            self.reports[stage] = evaluate(
                vlm,
                self.samples[:n],
                seed=self.seed,
                progress=False,
                batch_size=32,
                caption_tokens=24,
                answer_tokens=4,
            )
        kind = stage.partition(",")[0]
        if kind not in self.costs:
            self.costs[kind] = self._cost(vlm)

    def _cost(self, vlm: VLM) -> dict[str, float]:
        write = partial(write_caption, vlm, self.samples[:1], self.n_tokens)
        used = count_flops(write, decoder=anatomy.decoder(vlm.model))
        costs = used[used["part"] == "total"].set_index("phase")["flops"].to_dict()
        step = count_flops(partial(training_step, vlm, self.lessons))
        costs["training step"] = step["flops"].iloc[-1]
        costs["memory"] = memory_of(vlm.model)
        return costs

    def shares(self) -> pd.DataFrame:
        """Return operations and memory as shares of the dense model's.

        Returns
        -------
        pandas.DataFrame
            A row a kind; columns prefill, decode, training step and memory.
        """
        costs = pd.DataFrame(self.costs).T.rename_axis("share of dense", axis=1)
        return (costs / costs.loc["dense"]).round(2)

    def operations(self, kind: str) -> float:
        """Return the operations of a caption as a share of the dense model's.

        Parameters
        ----------
        kind : str
            Such as "skipped".

        Returns
        -------
        float
            Prefill and decode steps together.
        """
        total = {name: cost["prefill"] + cost["decode"] for name, cost in self.costs.items()}
        return total[kind] / total["dense"]

    def facts(self, stage: str) -> pd.DataFrame:
        """Return everything that is scored, a row a sample.

        Parameters
        ----------
        stage : str
            The stage.

        Returns
        -------
        pandas.DataFrame
            Columns caption and answer, the two scores; the factors that captions name; the types of
            question with a question mark; and open, the answers without presence.
        """
        report = self.reports[stage]
        correct = report.answers.astype({"correct": float}).pivot_table(
            index="sample", columns="type", values="correct"
        )
        without = correct.drop(columns="presence", errors="ignore").mean(axis=1)
        factors = report.captions.set_index("sample").drop(columns="caption")
        parts = [
            report.scores(),
            factors.astype("Float64"),
            correct.add_suffix("?"),
            without.rename("open"),
        ]
        return pd.concat(parts, axis=1).astype(float)

    def score(self, stage: str, column: str) -> float:
        """Return the mean of a column of :meth:`facts`.

        Parameters
        ----------
        stage : str
            The stage.
        column : str
            The column, such as "caption" or "presence?".

        Returns
        -------
        float
            The mean over samples.
        """
        return float(self.facts(stage)[column].mean())

    def spread(self, stage: str, column: str) -> Estimate:
        """Estimate a score with its interval over samples.

        Parameters
        ----------
        stage : str
            The stage.
        column : str
            A column of :meth:`facts`.

        Returns
        -------
        Estimate
            The mean.
        """
        return bootstrap(self.facts(stage)[column].dropna(), seed=self.seed)

    def retained(self, stage: str, column: str, to: str = "dense") -> Estimate:
        """Estimate a score as a share of another stage's on the same samples.

        Parameters
        ----------
        stage : str
            The stage.
        column : str
            A column of :meth:`facts`.
        to : str, default "dense"
            The stage it is compared with.

        Returns
        -------
        Estimate
            The share; samples are resampled in pairs.
        """
        pairs = pd.concat([self.facts(stage)[column], self.facts(to)[column]], axis=1).dropna()
        return bootstrap(pairs.to_numpy(), statistic=_ratio, seed=self.seed)

    def means(self, stages: Iterable[str], columns: Sequence[str]) -> pd.DataFrame:
        """Tabulate the means of some columns of :meth:`facts`.

        Parameters
        ----------
        stages : iterable of str
            The stages, a row each.
        columns : sequence of str
            The columns; where a stage lacks one there is no number.

        Returns
        -------
        pandas.DataFrame
            The means.
        """
        rows = {stage: self.facts(stage).reindex(columns=columns).mean() for stage in stages}
        return pd.DataFrame(rows).T.astype(float)


def _ratio(rows: np.ndarray) -> float:
    return rows[:, 0].mean() / rows[:, 1].mean()


def record_kept(experiment: Experiment, trial: Trial, claim_id: str, stage: str) -> dict[str, str]:
    """Record what a stage keeps of the dense model: captions, answers, and the least of each.

    Use it for the claims about training through gaps. Either score may hide a hole, so the factor
    and the type of question that has kept least is recorded too.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    trial : Trial
        The evaluations.
    claim_id : str
        Such as "SKIP-3".
    stage : str
        Such as "skipped, trained".

    Returns
    -------
    dict of str to str
        Which factor and which type of question kept least.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, skip_training
    >>> trial = skip_training.Trial(skip_training.draw_samples("scenes", 12), samples[:1], 1)
    >>> trial.add("dense", vlm)
    >>> experiment = Experiment("skip-training", "pocket-llava", "scenes")
    >>> least = skip_training.record_kept(experiment, trial, "SKIP-3", "dense")
    >>> experiment.verdict("SKIP-3", "captions")
    'confirmed'
    """
    least_kept = {}
    for task, columns in (("caption", CAPTION_FACTORS), ("answer", trial.kinds)):
        experiment.record(claim_id, trial.retained(stage, task), "dense model", f"{task}s")
        shares = {column: trial.retained(stage, column) for column in columns}
        lowest = min(columns, key=lambda column: shares[column].value)
        experiment.record(
            claim_id, shares[lowest], "dense model", f"{task}s, least", choice="least favourable"
        )
        least_kept[f"{task}s"] = lowest.removesuffix("?")
    share = trial.retained(stage, "open")
    experiment.record(claim_id, share, "dense model", "answers, without presence")
    return least_kept


def record_seeds(
    experiment: Experiment, claim_id: str, records: Sequence[Mapping], dense: Mapping
) -> None:
    """Record what several trainings keep of the dense model, with an interval over them.

    Use it to see whether one training was luck.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded; its intervals are over seeds.
    claim_id : str
        Such as "SKIP-3".
    records : sequence of mapping
        The records of the trainings, as ``training_record`` reads them.
    dense : mapping
        That of the dense model.
    """
    shares = pd.DataFrame([_scores_of_record(record) for record in records])
    shares = shares / _scores_of_record(dense)
    for task in shares:
        share = bootstrap(shares[task], seed=0)
        experiment.record(claim_id, share, "dense model", f"{task}, three seeds")


def _scores_of_record(record: Mapping) -> pd.Series:
    rows = pd.DataFrame(record["metrics"]["scenes"]).set_index("metric")
    open_types = []
    for name in rows.index:
        if name.startswith("qa/") and name not in ("qa/overall", "qa/presence"):
            open_types.append(name)
    captions = [f"caption/{factor}" for factor in CAPTION_FACTORS]
    return pd.Series(
        {
            "captions": _weighted_mean(rows.loc[captions]),
            "answers": rows.loc["qa/overall", "value"],
            "answers, without presence": _weighted_mean(rows.loc[open_types]),
        }
    )


def _weighted_mean(rows: pd.DataFrame) -> float:
    return float((rows["value"] * rows["n"]).sum() / rows["n"].sum())


def loss_course(records: Mapping[str, Mapping]) -> pd.DataFrame:
    """Tabulate how the loss of trainings fell, in nats a token.

    Use it to see whether a training had come to its end.

    Parameters
    ----------
    records : mapping of str to mapping
        The records of trainings of 100 noted steps, by name.

    Returns
    -------
    pandas.DataFrame
        A row a training: the first step, and the means up to 40, 70, 90 and 100 % of it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> falling = {"loss": [100.0 - k for k in range(100)]}
    >>> skip_training.loss_course({"run": falling}).loc["run"].tolist()
    [100.0, 65.5, 35.5, 15.5, 5.5]
    """
    columns = ["first step", "to 40 %", "to 70 %", "to 90 %", "to the end"]
    rows = {}
    for name, record in records.items():
        loss = record["loss"]
        means = [sum(loss[start : start + 10]) / 10 for start in (30, 60, 80, 90)]
        rows[name] = [loss[0], *means]
    return pd.DataFrame(rows, columns).T


def mistaken(report: Report, lessons: Sequence[Sample]) -> dict[str, int]:
    """Count wrong answers, and those that would answer a question of another type.

    Use it to tell a picture that is seen badly from a question that is not understood: "sand" where
    an action was asked.

    Parameters
    ----------
    report : Report
        An evaluation.
    lessons : sequence of Sample
        Samples whose questions say which answers belong to which type.

    Returns
    -------
    dict of str to int
        asked, wrong, and another question's answer; presence does not count.

    Examples
    --------
    >>> from xlvlms_tutorial import evaluate
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> report = evaluate(vlm, samples[:1], progress=False, caption_tokens=1, answer_tokens=4)
    >>> skip_training.mistaken(report, samples)["another question's answer"]
    0
    """
    type_of = {}
    for sample in lessons:
        for question in sample.questions:
            type_of[question.answer] = question.type
    answers = report.answers.query("type != 'presence'")
    wrong = answers[~answers["correct"].astype(bool)]
    types = wrong["prediction"].str.lower().str.strip(" .").map(type_of)
    of_another = types.notna() & (types != wrong["type"])
    return {
        "asked": len(answers),
        "wrong": len(wrong),
        "another question's answer": int(of_another.sum()),
    }


def slider(
    trial: Trial,
    stages: Mapping[str, str],
    gaps: Sequence[int],
    n_layers: int,
    lessons: Sequence[Sample],
    n_captions: int = 4,
) -> Widget:
    """Make the slider over stages of training: the blocks that run, and what is written.

    Parameters
    ----------
    trial : Trial
        The evaluations.
    stages : mapping of str to str
        The stages by what the slider calls them, the dense model first.
    gaps : sequence of int
        The blocks that are skipped in all others.
    n_layers : int
        Blocks of the model.
    lessons : sequence of Sample
        Samples whose values are the words that are marked.
    n_captions : int, default 4
        How many pictures are shown at most.

    Returns
    -------
    ipywidgets.Widget
        The slider, which moves without a kernel.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> trial = skip_training.Trial(skip_training.draw_samples("scenes", 4), samples[:1], 1)
    >>> trial.add("dense", vlm)
    >>> trial.add("skipped, untrained", vlm, 2)
    >>> stages = {"dense": "dense", "0 steps": "skipped, untrained"}
    >>> type(skip_training.slider(trial, stages, [4, 5], 30, samples)).__name__
    'VBox'
    """
    captions, bars, layers = {}, {}, {}
    fewest = min(len(trial.reports[stage].captions) for stage in stages.values())
    pictures = trial.samples[: min(n_captions, fewest)]
    for label, stage in stages.items():
        captions[label] = trial.reports[stage].captions["caption"].tolist()[: len(pictures)]
        share = 1.0 if stage == "dense" else trial.shares().loc["skipped", "prefill"]
        bars[label] = {"score": trial.score(stage, "caption"), "flops": share}
        layers[label] = () if stage == "dense" else tuple(gaps)
    true_words, other_words = words_to_mark(pictures, lessons)
    return tradeoff(
        [sample.image for sample in pictures],
        captions,
        pd.DataFrame(bars).T.dropna(axis=1),
        layers,
        n_layers,
        true_words,
        other_words,
        names=["training"],
        alt=[text_to_learn(sample) for sample in pictures],
    )


def check_truth(experiment: Experiment, named: pd.DataFrame, correct: pd.DataFrame) -> None:
    """Check what the chapter says of factors and types of question.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    named : pandas.DataFrame
        The share of captions that name each factor, a row a stage.
    correct : pandas.DataFrame
        The share of answers that are right, a column a type.
    """
    with_blocks_gone = ["skipped, trained", "short, trained"]
    gaps = [*with_blocks_gone, "pruned, trained"]
    early = named.loc["no gap, early"]
    first = named[["subject", "action", "place"]].mean(axis=1)
    later = first - named[["item", "colour"]].mean(axis=1)
    open_types = correct.drop(columns="presence?", errors="ignore")
    statements = {
        "the early connector is about as good at captions as the skipped one": (
            abs(early.mean() - named.loc["skipped, trained"].mean()) < 0.15
        ),
        "objects and their colours come last through skipped or removed blocks": (
            later[with_blocks_gone].min() > 0.12
        ),
        "objects are late in the early row too": early["item"] < early[["subject", "place"]].min(),
        "the pruned model lacks little of anything in captions": (
            named.loc["pruned, trained"].min() > 0.8
        ),
        "other types are nearly right in the early row": open_types.loc["no gap, early"].min()
        > 0.85,
        "with gaps some other types are not right": open_types.loc[gaps].min(axis=None) < 0.75,
    }
    if "presence?" in correct:
        presence = correct["presence?"].drop("dense")
        statements["presence is not far from chance with gaps, and in the early row"] = (
            presence.between(0.3, 0.7).all()
        )
    _check_all(experiment, statements)


def check_savings(experiment: Experiment, shares: pd.DataFrame) -> None:
    """Check what the chapter says of the cost of a model with gaps.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    shares : pandas.DataFrame
        As :meth:`Trial.shares` gives them, with a row "skipped".
    """
    used = shares.loc["skipped"]
    statements = {
        "half of the blocks is less than half of the work": (
            used[["prefill", "decode", "training step"]].min() > 0.53
        ),
        "a step of training saves about as much as the prompt": (
            abs(used["training step"] - used["prefill"]) < 0.1
        ),
        "memory does not change": used["memory"] == 1,
    }
    _check_all(experiment, statements)


def check_skipped(
    experiment: Experiment, trial: Trial, records: Sequence[Mapping[str, object]]
) -> None:
    """Check what the chapter says of the model that was trained through skipped blocks.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    trial : Trial
        The evaluations, of "skipped, untrained" and "skipped, trained" too.
    records : sequence of mapping
        What was recorded over three trainings.
    """
    before = [trial.score("skipped, untrained", task) for task in TASKS]
    after = [trial.score("skipped, trained", task) for task in TASKS]
    captions = [row["value"] for row in records if row["variant"] == "captions, three seeds"]
    statements = {
        "without training nothing is kept, with it most": max(before) < 0.1 and min(after) > 0.6,
        "over three trainings about nine tenths of captions are kept": 0.87 < captions[0] < 0.93,
    }
    if "presence?" in trial.kinds:
        statements["the skipped model answers about presence as by chance"] = (
            abs(trial.score("skipped, trained", "presence?") - 0.5) < 0.15
        )
    _check_all(experiment, statements)


def check_short(experiment: Experiment, shares: pd.DataFrame, equally_many: bool) -> None:
    """Check what the chapter says of the cost of a model without some of its blocks.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    shares : pandas.DataFrame
        As :meth:`Trial.shares` gives them, with rows "short" and "skipped".
    equally_many : bool
        Whether both models lack as many blocks.
    """
    work = ["prefill", "decode", "training step"]
    if equally_many:
        apart = abs(shares.loc["short", work] - shares.loc["skipped", work]).max()
        experiment.check("short and skipped models execute the same operations", apart < 0.01)
    frees = shares.loc["short", "memory"] < 0.9 and shares.loc["skipped", "memory"] == 1
    experiment.check("only the short model frees memory", frees)


def check_regained(experiment: Experiment, trial: Trial, kinds: Sequence[str]) -> None:
    """Check what the chapter says of scores before and after training.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    trial : Trial
        The evaluations.
    kinds : sequence of str
        The kinds of model, "skipped" and "pruned" among them.
    """
    before = trial.means([f"{kind}, untrained" for kind in kinds], TASKS)
    after = trial.means([f"{kind}, trained" for kind in kinds], TASKS)
    regained = after.loc[["skipped, trained", "pruned, trained"]]
    statements = {
        "before training all three are at the floor": before.max(axis=None) < 0.1,
        "after it more than half of the height is regained": after.min(axis=None) > 0.5,
        "answers stop earlier than captions where much is regained": (
            regained["answer"] < regained["caption"] - 0.02
        ).all(),
    }
    _check_all(experiment, statements)


def check_mistakes(
    experiment: Experiment, mistakes: Mapping[str, Mapping[str, int]], stages: Sequence[str]
) -> None:
    """Check what the chapter says of wrong answers that fit another question.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    mistakes : mapping of str to mapping
        As :func:`mistaken` gives them, by stage.
    stages : sequence of str
        The trained stages; the last one is of the short model.
    """
    short = mistakes[stages[-1]]
    share = short["another question's answer"] / max(short["wrong"], 1)
    few = max(mistakes[stage]["wrong"] for stage in stages[:-1])
    statements = {
        "skipped and pruned models make too few of these errors to say": few < 12,
        "about half of the short model's errors answer another question": 0.3 < share < 0.7,
    }
    _check_all(experiment, statements)


def check_starts(
    experiment: Experiment,
    starts: Mapping[str, float],
    plans: Mapping[str, Sequence[int]],
    vocabulary: int,
) -> None:
    """Check what the chapter says of the first loss through several halves of the blocks.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    starts : mapping of str to float
        The first loss by choice, in nats a token; "chosen" and "interval 2" among them.
    plans : mapping of str to sequence of int
        The blocks that each choice skips.
    vocabulary : int
        How many tokens a model that guesses evenly chooses from.
    """
    lowest = min(loss for name, loss in starts.items() if name != "chosen")
    one_fewer = len(plans["interval 2"]) == len(plans["chosen"]) - 1
    statements = {
        "the chosen half starts lowest": starts["chosen"] < lowest - 1,
        "interval 2 leaves out a block fewer and starts above even guessing": (
            starts["interval 2"] > math.log(vocabulary) + 1 and one_fewer
        ),
    }
    _check_all(experiment, statements)


def sure_verdicts(records: Sequence[Mapping[str, object]], near: Iterable[str]) -> pd.DataFrame:
    """Tabulate the verdicts that have a margin.

    Parameters
    ----------
    records : sequence of mapping
        What was recorded, as experiments hold it.
    near : iterable of str
        The measurements whose interval ends near the bar, as "CLAIM, VARIANT"; they are left out.

    Returns
    -------
    pandas.DataFrame
        A row a measurement, in alphabetical order; column verdict.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skip_training
    >>> rows = [{"id": "SKIP-3", "variant": "answers", "verdict": "refuted"}]
    >>> skip_training.sure_verdicts(rows, {"SKIP-3, captions"}).index.tolist()
    ['SKIP-3, answers']
    """
    verdicts = {}
    for record in records:
        name = f"{record['id']}, {record['variant']}"
        if name not in near:
            verdicts[name] = record["verdict"]
    return pd.Series(verdicts, name="verdict").rename_axis("claim").sort_index().to_frame()


def _check_all(experiment: Experiment, statements: Mapping[str, object]) -> None:
    for statement, holds in statements.items():
        experiment.check(statement, holds)
