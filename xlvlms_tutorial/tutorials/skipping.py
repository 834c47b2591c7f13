"""Draw samples, leave work out and judge what is left, for the chapter on skipping.

The equation, the plans and the figures are in the chapter. Here is what surrounds them: which
questions are asked, how much of a score is retained, and what a slider shows.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from ipywidgets import Widget
from matplotlib.axes import Axes
from scipy.stats import rankdata
from torch import Tensor, nn

from xlvlms_tutorial import claims
from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.evaluation import Report, evaluate
from xlvlms_tutorial.methods.skipping import (
    SkipPlan,
    every_nth_layer,
    greedy_layer_order,
    random_layers,
)
from xlvlms_tutorial.metrics import (
    CAPTION_FACTORS,
    Estimate,
    bootstrap,
    correlation,
    count_flops,
    difference,
)
from xlvlms_tutorial.metrics.intervals import percentile_interval
from xlvlms_tutorial.models import VLM, anatomy
from xlvlms_tutorial.tutorials.experiments import (
    Experiment,
    answer_of,
    band_table,
    question_of,
)
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import plots, tradeoff

Call = Callable[[], object]

NOTHING = SkipPlan(())  # the whole model
PROSE = (
    "The train was late, so they walked along the river to the mill.",
    "Bread needs flour, water, salt, a little yeast and much time.",
    "Her brother had kept every letter in a box under the stairs.",
    "When the rain stopped, the children ran out into the garden.",
)


def draw_samples(dataset: str, n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Draw samples that have captions and questions, with a few questions each.

    Use it where both tasks are compared. A sample gets one question about presence and two of other
    types, turn by turn, so that guessing "no" does not carry the score.

    Parameters
    ----------
    dataset : str
        The name of the dataset, or a folder.
    n : int
        How many samples; fewer where not as many have both.
    split : str, default "test"
        The split they are drawn from.
    seed : int, default 0
        The seed of the draw.

    Returns
    -------
    list of Sample
        The samples, with at most three questions each.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> first, second = skipping.draw_samples("scenes", 2)
    >>> [question.type for question in first.questions]
    ['presence', 'place', 'action']
    """
    samples = []
    for sample in load_samples(dataset, 4 * n, split, seed):
        if sample.captions and sample.questions and len(samples) < n:
            samples.append(_few_questions(sample, turn=len(samples)))
    return samples


def _few_questions(sample: Sample, turn: int, n_open: int = 2) -> Sample:
    """The sample with its question about presence and a few of other types, which take turns."""
    by_type = {question.type: question for question in sample.questions}
    presence = [by_type.pop("presence")] if "presence" in by_type else []
    questions = list(by_type.values())
    start = turn % max(len(questions), 1)
    questions = questions[start:] + questions[:start]
    return replace(sample, questions=(*presence, *questions[:n_open]))


def one_question_each(samples: Sequence[Sample], per_sample: int = 2) -> list[Sample]:
    """Split samples into copies that hold one question each.

    Use it before the loss of answers is measured, which takes one text for each sample.

    Parameters
    ----------
    samples : sequence of Sample
        Samples with questions.
    per_sample : int, default 2
        How many questions of one sample are taken, the first ones.

    Returns
    -------
    list of Sample
        The copies; their ids end in the number of the question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> samples = skipping.draw_samples("scenes", 1)
    >>> [sample.id[-2:] for sample in skipping.one_question_each(samples)]
    ['/0', '/1']
    """
    copies = []
    for sample in samples:
        for k, question in enumerate(sample.questions[:per_sample]):
            copies.append(replace(sample, id=f"{sample.id}/{k}", questions=(question,)))
    return copies


def choose_blocks(
    vlm: VLM,
    samples: Sequence[Sample],
    candidates: Mapping[str, Sequence[int]],
    k: int,
    batch_size: int = 8,
    memo: MutableMapping | None = None,
) -> dict[str, list[int]]:
    """Order the blocks that captions, and those that answers, miss least together.

    Use it for a plan by each task. One block is left out after the other, each time the candidate
    without which the loss of the task is then least.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with captions and questions, which no score is measured on.
    candidates : mapping of str to sequence of int
        The blocks to choose from, for "captions" and for "answers".
    k : int
        How many blocks are chosen.
    batch_size : int, default 8
        How many samples go through the model together.
    memo : dict, optional
        Losses that were measured on the same batches, as
        :func:`~xlvlms_tutorial.methods.skipping.layer_importance` keeps them.

    Returns
    -------
    dict of str to list of int
        The blocks by task; the first m of them are the choice of m.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> samples = skipping.draw_samples("scenes", 1, "train")
    >>> candidates = {"captions": [27, 11], "answers": [26, 11]}
    >>> skipping.choose_blocks(vlm, samples, candidates, 1)
    {'captions': [27], 'answers': [26]}
    """
    captions = greedy_layer_order(
        vlm, samples, k, candidates=candidates["captions"], batch_size=batch_size, memo=memo
    )
    answers = greedy_layer_order(
        vlm,
        one_question_each(samples),
        k,
        answers=answer_of,
        prompt=question_of,
        candidates=candidates["answers"],
        batch_size=2 * batch_size,
        memo=memo,
    )
    return {"captions": captions, "answers": answers}


def widest_interval(n_layers: int, limit: int = 4) -> int:
    """Return the largest interval up to ``limit`` by which some block of a model is skipped.

    Parameters
    ----------
    n_layers : int
        The number of blocks.
    limit : int, default 4
        The largest interval that is wanted.

    Returns
    -------
    int
        The interval; 2 for very shallow models.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> skipping.widest_interval(30), skipping.widest_interval(4)
    (4, 2)
    """
    widest = 2
    for step in range(2, limit + 1):
        if every_nth_layer(n_layers, step):
            widest = step
    return widest


def pair_starts(vlm: VLM, depths: Sequence[float]) -> list[int]:
    """Return the first blocks of pairs of neighbours at some depths, so that no two overlap.

    Parameters
    ----------
    vlm : VLM
        The model.
    depths : sequence of float
        Depths as shares of the number of blocks, rising.

    Returns
    -------
    list of int
        The first block of each pair.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> skipping.pair_starts(vlm, (0.13, 0.57, 0.58))
    [4, 17]
    """
    firsts: list[int] = []
    for depth in depths:
        layer = min(max(1, vlm.layer_at(depth)), vlm.n_layers - 1)
        if not firsts or layer > firsts[-1] + 1:
            firsts.append(layer)
    return firsts


def applied(vlm: VLM, plan: SkipPlan, call: Call) -> Call:
    """Return a call that runs with a plan in force.

    Use it to count or time the same work of several plans.

    Parameters
    ----------
    vlm : VLM
        The model.
    plan : SkipPlan
        What is left out.
    call : callable
        Called without arguments, such as a function that writes a caption.

    Returns
    -------
    callable
        The call with the plan.

    Examples
    --------
    >>> from xlvlms_tutorial import SkipPlan
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> prefill = skipping.prefill_of(vlm, 8)
    >>> without = skipping.applied(vlm, SkipPlan((5,)), prefill)
    >>> skipping.operations({"dense": prefill, "without a block": without}).round(2).tolist()
    [1.0, 0.97]
    """

    def run() -> object:
        with plan.apply(vlm):
            return call()

    return run


def discarding(vlm: VLM, layers: Sequence[int], call: Call) -> Call:
    """Return a call in which blocks run and their outputs are thrown away.

    Use it to see what experiments do that leave blocks out by a hook: scores are those of skipped
    blocks, and nothing is saved.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : sequence of int
        The blocks, from 1 to L.
    call : callable
        Called without arguments.

    Returns
    -------
    callable
        The call with the hooks, which are gone when it returns.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> prefill = skipping.prefill_of(vlm, 8)
    >>> vain = skipping.discarding(vlm, [5], prefill)
    >>> skipping.operations({"dense": prefill, "in vain": vain}).tolist()
    [1.0, 1.0]
    """

    def hand_on(block: nn.Module, args: tuple, kwargs: dict, out: Tensor | tuple) -> object:
        """Give what entered a block (in ``args`` or ``kwargs``) in place of its output ``out``."""
        entered = args[0] if args else kwargs["hidden_states"]
        return anatomy.with_states(out, entered)

    def run() -> object:
        with ExitStack() as hooks:
            for layer in layers:
                register = vlm.blocks[layer - 1].register_forward_hook
                hooks.callback(register(hand_on, with_kwargs=True).remove)
            return call()

    return run


def versions(vlm: VLM, layers: Sequence[int], plans: Mapping[str, SkipPlan], call: Call) -> dict:
    """Return a call as it is, with the outputs of blocks thrown away, and under some plans.

    Use it to count or time the same work of all.

    Parameters
    ----------
    vlm : VLM
        The model.
    layers : sequence of int
        The blocks that run in vain.
    plans : mapping of str to SkipPlan
        The plans by name.
    call : callable
        Called without arguments.

    Returns
    -------
    dict of str to callable
        The calls "dense" and "thrown away", then those by the names of the plans.

    Examples
    --------
    >>> from xlvlms_tutorial import SkipPlan
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> calls = skipping.versions(
    ...     vlm, [5], {"skipped": SkipPlan((5,))}, skipping.prefill_of(vlm, 8)
    ... )
    >>> skipping.operations(calls).round(2).to_dict()
    {'dense': 1.0, 'thrown away': 1.0, 'skipped': 0.97}
    """
    calls = {"dense": call, "thrown away": discarding(vlm, layers, call)}
    for name, plan in plans.items():
        calls[name] = applied(vlm, plan, call)
    return calls


def prefill_of(vlm: VLM, n_tokens: int, seed: int = 0) -> Call:
    """Return a call in which the language model alone reads a prompt of drawn vectors.

    Use it to count or time the blocks without the picture's tower and without decode steps.

    Parameters
    ----------
    vlm : VLM
        The model.
    n_tokens : int
        The length of the prompt.
    seed : int, default 0
        The seed of the vectors.

    Returns
    -------
    callable
        The call; it takes no arguments.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> skipping.prefill_of(vlm, 8)().last_hidden_state.shape
    torch.Size([1, 8, 576])
    """
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, n_tokens, vlm.width, generator=generator)
    decoder = anatomy.decoder(vlm.model)

    def run() -> object:
        with torch.no_grad():
            entering = states.to(vlm.device, vlm.dtype)
            return decoder(inputs_embeds=entering, use_cache=False)

    return run


def operations(runs: Mapping[str, Call]) -> pd.Series:
    """Count the operations of several calls, as shares of those of the first.

    Parameters
    ----------
    runs : mapping of str to callable
        The calls by name; the first one is the reference.

    Returns
    -------
    pandas.Series
        The shares by name.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> calls = {f"{n} tokens": skipping.prefill_of(vlm, n) for n in (8, 16)}
    >>> skipping.operations(calls).round(1).tolist()
    [1.0, 2.0]
    """
    counted = pd.Series({name: _total_flops(call) for name, call in runs.items()})
    return counted / counted.iloc[0]


def _total_flops(call: Call) -> int:
    return int(count_flops(call)["flops"].iloc[-1])


class Judge:
    """Judge what a model keeps of captions and answers when work is left out.

    The whole model is evaluated first. A task of which it can do nothing has nothing to retain, and
    drops out.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with captions and questions.
    seed : int, default 0
        The seed of intervals and of blocks drawn at random.

    Attributes
    ----------
    tasks : list of str
        Those of "caption" and "answer" that the whole model can do.
    whole : pandas.DataFrame
        The scores of the whole model, a row a sample, a column a task.
    half : list of Sample
        The first half of the samples, for what needs no narrow interval.
    third : list of Sample
        The first third of them, for what leaves nothing to measure finely.

    Examples
    --------
    >>> from xlvlms_tutorial import SkipPlan
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> judge = skipping.Judge(vlm, skipping.draw_samples("scenes", 4))
    >>> judge.tasks
    ['caption', 'answer']
    >>> scores = judge.scores(SkipPlan((27,)))
    >>> judge.retained(scores, "caption").value > 0.5
    True
    """

    def __init__(self, vlm: VLM, samples: Sequence[Sample], seed: int = 0) -> None:
        require(len(samples) > 1, f"{len(samples)} samples to judge by", "give two or more")
        self.vlm = vlm
        self.samples = list(samples)
        self.seed = seed
        self._reports: dict[tuple[SkipPlan, tuple[str, ...], str | None], Report] = {}
        whole = self.report(NOTHING).scores().dropna()
        scored = []
        for sample in self.samples:
            if sample.id in whole.index:
                scored.append(sample)
        self.half = scored[: len(self.samples) // 2]
        self.third = self.samples[: max(4, len(self.samples) // 3)]
        first_half = whole.loc[[sample.id for sample in self.half]]
        self.whole = whole.loc[:, (first_half > 0).sum() > 1]
        self.tasks = list(self.whole)

    def report(
        self,
        plan: SkipPlan,
        samples: Sequence[Sample] | None = None,
        task: str | None = None,
    ) -> Report:
        """Evaluate the model with a plan in force, once for each plan.

        Parameters
        ----------
        plan : SkipPlan
            What is left out.
        samples : sequence of Sample, optional
            What it is evaluated on; by default all.
        task : {"caption", "answer"}, optional
            The one task that is needed; by default both. The other is then cut short.

        Returns
        -------
        Report
            Captions and answers.
        """
        samples = self.samples if samples is None else list(samples)
        key = _key(plan, samples)
        if (*key, None) in self._reports:  # both tasks are done already
            task = None
        if (*key, task) not in self._reports:
            questioned = samples
            if task == "caption":
                questioned = [replace(sample, questions=()) for sample in samples]
            with plan.apply(self.vlm):
                self._reports[*key, task] = evaluate(
                    self.vlm,
                    questioned,
                    seed=self.seed,
                    progress=False,
                    batch_size=48,
                    caption_tokens=1 if task == "answer" else 20,
                    answer_tokens=4,
                )
        return self._reports[*key, task]

    def scores(self, plan: SkipPlan, samples: Sequence[Sample] | None = None) -> pd.DataFrame:
        """Score each sample with a plan in force.

        Parameters
        ----------
        plan : SkipPlan
            What is left out.
        samples : sequence of Sample, optional
            What it is evaluated on; by default all.

        Returns
        -------
        pandas.DataFrame
            A row a sample; columns caption, the share of known factors that it names, and answer,
            the share of right answers.
        """
        done = self._reports.get((*_key(plan, self.samples), None))
        if samples is not None and done is not None:
            return done.scores().loc[[sample.id for sample in samples]]
        return self.report(plan, samples).scores()

    def random_scores(self, k: int, draws: int = 3) -> pd.DataFrame:
        """Score the model without k random blocks.

        Parameters
        ----------
        k : int
            How many blocks are left out.
        draws : int, default 3
            How many times blocks are drawn, each for an equal part of the samples; for 1, the first
            third of the samples is judged.

        Returns
        -------
        pandas.DataFrame
            As :meth:`scores` gives it.
        """
        samples = self.third if draws == 1 else self.samples
        parts = []
        for draw in range(draws):
            blocks = random_layers(self.vlm.n_layers, k, self.seed + draw)
            parts.append(self.report(SkipPlan(tuple(blocks)), samples[draw::draws]).scores())
        return pd.concat(parts)

    def random_baselines(self, largest: int, half: int) -> dict[tuple[str, int], pd.DataFrame]:
        """Score the model without one, without several and without half of its blocks at random.

        Parameters
        ----------
        largest : int
            How many "several" are.
        half : int
            How many every second block is; for these one draw must do.

        Returns
        -------
        dict of (str, int) to pandas.DataFrame
            The scores by ("random", number of blocks).
        """
        scores = {("random", k): self.random_scores(k) for k in (1, largest)}
        scores["random", half] = self.random_scores(half, draws=1)
        return scores

    def reports(
        self, plans: Mapping[tuple[str, int], SkipPlan], largest: int
    ) -> dict[tuple[str, int], Report]:
        """Evaluate the model with each of some plans in force.

        Parameters
        ----------
        plans : mapping of (str, int) to SkipPlan
            The plans by the way they were chosen and the number of blocks left out.
        largest : int
            The number of blocks beyond which the first third of the samples must do.

        Returns
        -------
        dict of (str, int) to Report
            Captions and answers under each plan.
        """
        reports = {}
        for key, plan in plans.items():
            samples = self.third if len(plan.layers) > largest else self.samples
            reports[key] = self.report(plan, samples)
        return reports

    def bands(self, scores: Mapping[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
        """Tabulate the retained shares with their intervals.

        Parameters
        ----------
        scores : mapping of (str, int) to pandas.DataFrame
            Scores, as :meth:`scores` gives them, by the way blocks were chosen and their number.

        Returns
        -------
        pandas.DataFrame
            A row for each of them and each task: choice, blocks, task, value, low, high and n.
        """
        shares = {}
        for (choice, k), table in scores.items():
            for task in self.tasks:
                shares[choice, k, task] = self.retained(table, task)
        return band_table(shares, "choice", "blocks", "task")

    def retained(self, scores: pd.DataFrame, task: str) -> Estimate:
        """Estimate the mean score as a share of the whole model's on the same samples.

        Parameters
        ----------
        scores : pandas.DataFrame
            As :meth:`scores` gives it.
        task : str
            "caption" or "answer".

        Returns
        -------
        Estimate
            The share, with an interval over samples.
        """
        ids = self.whole.index[self.whole.index.isin(scores.index)]
        pair = np.c_[scores.loc[ids, task], self.whole.loc[ids, task]]
        return bootstrap(pair, statistic=_share, seed=self.seed)

    def above(self, scores: pd.DataFrame, task: str, bar: float) -> Estimate:
        """Estimate by how much the retained share is above a bar.

        Parameters
        ----------
        scores : pandas.DataFrame
            As :meth:`scores` gives it.
        task : str
            "caption" or "answer".
        bar : float
            The share that it is compared with.

        Returns
        -------
        Estimate
            The retained share minus the bar.
        """
        share = self.retained(scores, task)
        return Estimate(share.value - bar, share.low - bar, share.high - bar, share.n)

    def difference(self, scores: pd.DataFrame, baseline: pd.DataFrame, task: str) -> Estimate:
        """Estimate the mean score of one choice minus that of another, on the samples of both.

        Parameters
        ----------
        scores, baseline : pandas.DataFrame
            As :meth:`scores` gives them.
        task : str
            "caption" or "answer".

        Returns
        -------
        Estimate
            The difference, with an interval over samples.
        """
        common = scores.index.intersection(baseline.index)
        ids = self.whole.index[self.whole.index.isin(common)]
        pair = scores.loc[ids, task], baseline.loc[ids, task]
        return difference(*pair, paired=True, seed=self.seed)

    def gap(self, answers: SkipPlan, captions: SkipPlan, presence: bool = True) -> Estimate:
        """Estimate the retained share of answers minus that of captions.

        Parameters
        ----------
        answers, captions : SkipPlan
            The plan under which each task is done; twice the same for a plan that both share.
        presence : bool, default True
            Whether questions about presence count, of which guessing "no" gets half right.

        Returns
        -------
        Estimate
            The difference of the shares, with an interval over samples.
        """
        columns = []
        for plan, task in ((answers, "answer"), (captions, "caption")):
            needed = None if answers == captions else task
            for report in (self.report(plan, task=needed), self.report(NOTHING)):
                without = task == "answer" and not presence
                scores = open_scores(report) if without else report.scores()
                columns.append(scores[task])
        rows = pd.concat(columns, axis=1, join="inner").dropna()
        return bootstrap(rows, statistic=_difference_of_shares, seed=self.seed)

    def compare(
        self,
        plans: Mapping[str, SkipPlan],
        calls: Mapping[str, Call],
        samples: Sequence[Sample] | None = None,
    ) -> pd.DataFrame:
        """Tabulate what plans keep and what they cost.

        Parameters
        ----------
        plans : mapping of str to SkipPlan
            The plans by name.
        calls : mapping of str to callable
            The work that is counted, such as writing a caption.
        samples : sequence of Sample, optional
            What scores are measured on; by default the first half of the samples.

        Returns
        -------
        pandas.DataFrame
            A row a plan: the retained share of each task, and for each call the operations as a
            share of the whole model's, under the name "operations, CALL".
        """
        whole = {name: _total_flops(call) for name, call in calls.items()}
        rows = {}
        for name, plan in plans.items():
            scores = self.scores(plan, self.half if samples is None else samples)
            row = {task: self.retained(scores, task).value for task in self.tasks}
            for call_name, call in calls.items():
                flops = _total_flops(applied(self.vlm, plan, call))
                row[f"operations, {call_name}"] = flops / whole[call_name]
            rows[name] = row
        return pd.DataFrame(rows).T


def _key(plan: SkipPlan, samples: Sequence[Sample]) -> tuple[SkipPlan, tuple[str, ...]]:
    """The name of an evaluation; the order in which blocks were chosen does not matter."""
    layers = tuple(sorted(plan.layers))
    return replace(plan, layers=layers), tuple(sample.id for sample in samples)


def _share(rows: np.ndarray) -> float:
    return rows[:, 0].mean() / rows[:, 1].mean()


def _difference_of_shares(rows: np.ndarray) -> float:
    answers, all_answers, captions, all_captions = rows.mean(axis=0)
    return answers / all_answers - captions / all_captions


def fair_lines(judge: Judge, choices: Mapping[int, Mapping[str, Sequence[int]]]) -> pd.DataFrame:
    """Compare the tasks, each under its own plan, for plans made from several sets of pictures.

    Use it to see whether the verdict on SKIP-2 stays when the plans are made anew.

    Parameters
    ----------
    judge : Judge
        Who judges the plans.
    choices : mapping of int to mapping of str to sequence of int
        For each number of pictures that plans were made from, the blocks for "captions" and for
        "answers", as :func:`choose_blocks` gives them.

    Returns
    -------
    pandas.DataFrame
        A row for each reading and each set of plans, by the column questions: the retained share of
        answers minus that of captions, with its interval, and the verdict. No row where a share of
        nothing would be taken.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> judge = skipping.Judge(vlm, skipping.draw_samples("scenes", 4))
    >>> table = skipping.fair_lines(judge, {6: {"captions": [27], "answers": [27]}})
    >>> table.columns.tolist()
    ['questions', 'plans from', 'difference', 'verdict']
    """
    rows = []
    for questions, presence in (("all", True), ("without presence", False)):
        report = judge.report(NOTHING)
        whole = (report.scores() if presence else open_scores(report)).dropna()
        if (whole > 0).sum().min() <= 1:  # a share of nothing is none
            continue
        for n, blocks in choices.items():
            plans = [SkipPlan(tuple(blocks[task])) for task in ("answers", "captions")]
            gap = judge.gap(*plans, presence=presence)
            verdict = claims.verdict(claims.claim("SKIP-2"), gap)
            rows.append((questions, f"{n} pictures", str(gap), verdict))
    columns = ["questions", "plans from", "difference", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def record_shares(
    experiment: Experiment,
    judge: Judge,
    scores: Mapping[tuple[str, int], pd.DataFrame],
    largest: int,
    half: int,
) -> None:
    """Record for SKIP-1 how much can be left out, and which blocks.

    How much is the retained share minus 0.9. Which blocks is the score of a choice minus that of as
    many random blocks.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    judge : Judge
        Who judged the plans.
    scores : mapping of (str, int) to pandas.DataFrame
        Scores by the way blocks were chosen and their number; "random" is the baseline.
    largest : int
        The largest number of blocks that a plan by effect leaves out.
    half : int
        How many blocks every second one is.
    """
    n_layers = judge.vlm.n_layers
    for task in judge.tasks:
        by_task = f"by {task}s"
        for choice, k in ((by_task, 1), (by_task, largest), ("interval", half)):
            if (choice, k) in scores:
                share = judge.above(scores[choice, k], task, 0.9)
                variant = f"{choice}, {k} of {n_layers} blocks, {task}s"
                experiment.record("SKIP-1", share, "dense model", variant, _way_of(choice))
        choices = ((by_task, 1), (by_task, largest), ("similar", largest), ("interval", largest))
        for choice, k in (*choices, ("interval", half)):
            if (choice, k) in scores:
                ahead = judge.difference(scores[choice, k], scores["random", k], task)
                variant = f"{choice}, {k} of {n_layers} blocks, against random, {task}s"
                experiment.record("SKIP-1", ahead, "random blocks", variant, _way_of(choice))


def _way_of(choice: str) -> str:
    """How a plan was chosen, for the ledger."""
    return "fixed" if "interval" in choice else "validation"


def record_gaps(
    experiment: Experiment,
    judge: Judge,
    plans: Mapping[tuple[str, int], SkipPlan],
    counts: Sequence[int],
) -> None:
    """Record for SKIP-2 how much more of answers than of captions a shared plan retains.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    judge : Judge
        Who judges; nothing is recorded where the model can do only one of the tasks.
    plans : mapping of (str, int) to SkipPlan
        The plans "by captions" and "by answers", by the number of blocks left out.
    counts : sequence of int
        The numbers of blocks.
    """
    if len(judge.tasks) < 2:
        return
    for k in counts:
        for choice in ("by captions", "by answers"):
            gap = judge.gap(plans[choice, k], plans[choice, k])
            variant = f"plan {choice}, {k} blocks"
            experiment.record("SKIP-2", gap, "equal shares", variant, "validation")


def record_parallel(experiment: Experiment, judge: Judge, plans: Mapping[str, SkipPlan]) -> None:
    """Record for SKIP-6 what attention and MLP side by side retain.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    judge : Judge
        Who judges, by the first half of the samples.
    plans : mapping of str to SkipPlan
        The plans by name; those of another part than "parallel" are left out.
    """
    for name, plan in plans.items():
        if plan.part == "parallel":
            for task in judge.tasks:
                share = judge.retained(judge.scores(plan, judge.half), task)
                variant = f"{name}, {len(plan.layers)} blocks, {task}s"
                experiment.record("SKIP-6", share, "dense model", variant, _way_of(name))


def record_tokens(
    experiment: Experiment, judge: Judge, image: SkipPlan, text: SkipPlan, extent: str
) -> None:
    """Record for IMA-12 how far captions and answers are ahead without MLPs of image tokens.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    judge : Judge
        Who judges, by all samples.
    image, text : SkipPlan
        The plans without MLPs of image tokens, and of as many text tokens.
    extent : str
        How many tokens in which blocks, for the name of the measurement.
    """
    for task in judge.tasks:
        ahead = judge.difference(judge.scores(image), judge.scores(text), task)
        experiment.record("IMA-12", ahead, "as many text tokens", f"{extent}, {task}s")


def tokens_to_spare(vlm: VLM, samples: Sequence[Sample], n_tokens: int) -> int:
    """Return how many tokens of the picture, and as many of the text, every prompt has.

    Use it before the same number of both is left out.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with pictures.
    n_tokens : int
        How many tokens are wanted.

    Returns
    -------
    int
        At most ``n_tokens``.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> skipping.tokens_to_spare(vlm, skipping.draw_samples("scenes", 2), 400)
    13
    """
    images = [sample.image for sample in samples]
    spans = vlm.spans(images, [PROMPTS["image"]] * len(images))
    counts = pd.crosstab(spans["sample"], spans["span"]).min()
    return int(min(n_tokens, counts["image"], counts["template"] + counts["question"]))


def open_scores(report: Report) -> pd.DataFrame:
    """Score each sample without its questions about presence.

    Parameters
    ----------
    report : Report
        An evaluation.

    Returns
    -------
    pandas.DataFrame
        As ``report.scores()``; the column answer holds questions of other types alone.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> judge = skipping.Judge(vlm, skipping.draw_samples("scenes", 2))
    >>> skipping.open_scores(judge.report(skipping.NOTHING)).columns.tolist()
    ['caption', 'answer']
    """
    answers = report.answers.query("type != 'presence'")
    shares = answers.groupby("sample")["correct"].mean()
    scores = report.scores()
    return scores.assign(answer=shares.reindex(scores.index).astype(float))


def by_factor(report: Report) -> pd.Series:
    """Say how many captions name each factor, and how many answers of each type are right.

    Parameters
    ----------
    report : Report
        An evaluation.

    Returns
    -------
    pandas.Series
        Shares; the index has the levels ("caption" or "answer") and factor or type.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> judge = skipping.Judge(vlm, skipping.draw_samples("scenes", 2))
    >>> "subject" in skipping.by_factor(judge.report(skipping.NOTHING))["caption"]
    True
    """
    named = report.captions.drop(columns=["sample", "caption"])
    named = named.astype("Float64").mean().astype(float)
    correct = report.answers.groupby("type")["correct"].mean()
    return pd.concat({"caption": named, "answer": correct})


def facts_by_plan(
    judge: Judge,
    plans: Mapping[tuple[str, int], SkipPlan],
    reports: Mapping[tuple[str, int], Report],
) -> pd.DataFrame:
    """Tabulate :func:`by_factor` for the whole model and the plans by effect.

    Parameters
    ----------
    judge : Judge
        Who judged the plans.
    plans : mapping of (str, int) to SkipPlan
        The plans by the way they were chosen and the number of blocks left out.
    reports : mapping of (str, int) to Report
        What was evaluated under each.

    Returns
    -------
    pandas.DataFrame
        A row a factor or type of question, a column a plan.

    Examples
    --------
    >>> from xlvlms_tutorial import SkipPlan
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> judge = skipping.Judge(vlm, skipping.draw_samples("scenes", 2))
    >>> plans = {("by captions", 1): SkipPlan((27,))}
    >>> skipping.facts_by_plan(judge, plans, judge.reports(plans, 1)).columns.tolist()
    ['dense', 'by captions, 1']
    """
    columns = {"dense": by_factor(judge.report(NOTHING))}
    for choice, k in plans:
        if choice.startswith("by"):
            columns[f"{choice}, {k}"] = by_factor(reports[choice, k])
    return pd.DataFrame(columns)


def words_to_mark(
    samples: Sequence[Sample], pool: Sequence[Sample]
) -> tuple[list[list[str]], list[list[str]]]:
    """List the words that are true of each sample, and those that are true of others.

    Use it where captions are shown with right words marked and wrong ones underlined.

    Parameters
    ----------
    samples : sequence of Sample
        The samples that are shown.
    pool : sequence of Sample
        Samples whose values are those that captions may name.

    Returns
    -------
    tuple of two lists of lists of str
        The right words of each sample, and the wrong ones.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> pool = load_samples("scenes", 20)
    >>> right, wrong = skipping.words_to_mark(pool[:1], pool)
    >>> set(right[0]) & set(wrong[0])
    set()
    """
    values: dict[str, set[str]] = {factor: set() for factor in CAPTION_FACTORS}
    for sample in pool:
        for factor in CAPTION_FACTORS:
            if sample.truth.get(factor):
                values[factor].add(sample.truth[factor])
    true_words, other_words = [], []
    for sample in samples:
        factors = [factor for factor in CAPTION_FACTORS if sample.truth.get(factor)]
        true_words.append([sample.truth[factor] for factor in factors])
        wrong: set[str] = set()
        for factor in factors:
            wrong |= values[factor] - set(true_words[-1])
        other_words.append(sorted(wrong))
    return true_words, other_words


def slider(
    judge: Judge,
    plans: Mapping[tuple[str, int], SkipPlan],
    reports: Mapping[tuple[str, int], Report],
    per_block: float,
    pool: Sequence[Sample],
    n_captions: int = 4,
) -> Widget:
    """Make the slider over plans: the blocks that run, time and score, and what is written.

    Use it to see captions change as blocks go, beside what that saves.

    Parameters
    ----------
    judge : Judge
        Who judged the plans.
    plans : mapping of (str, int) to SkipPlan
        The plans by the way they were chosen and the number of blocks left out.
    reports : mapping of (str, int) to Report
        What was evaluated under each.
    per_block : float
        The share of the time that one block takes.
    pool : sequence of Sample
        Samples whose values are the words that are marked.
    n_captions : int, default 4
        How many pictures are shown, the first ones.

    Returns
    -------
    ipywidgets.Widget
        The slider, which moves without a kernel and starts at the first plan.

    Examples
    --------
    >>> from xlvlms_tutorial import SkipPlan
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> samples = skipping.draw_samples("scenes", 4)
    >>> judge = skipping.Judge(vlm, samples)
    >>> plans = {("by captions", 1): SkipPlan((27,))}
    >>> reports = {key: judge.report(plan) for key, plan in plans.items()}
    >>> type(skipping.slider(judge, plans, reports, 0.025, samples)).__name__
    'VBox'
    """
    pictures = judge.samples[:n_captions]
    start = next(iter(plans))
    settings = {(way, 0): (NOTHING, judge.report(NOTHING)) for way, _ in plans}
    for key, plan in plans.items():
        settings[key] = plan, reports[key]
    settings = dict(sorted(settings.items()))
    task = judge.tasks[0]
    captions, layers, bars = {}, {}, []
    for key, (plan, report) in settings.items():
        captions[key] = report.captions["caption"].tolist()[:n_captions]
        layers[key] = plan.layers
        score = report.scores()[task].mean() / judge.whole[task].mean()
        bars.append({"time": max(0.0, 1 - per_block * len(plan.layers)), "score": score})
    true_words, other_words = words_to_mark(pictures, pool)
    return tradeoff(
        [sample.image for sample in pictures],
        captions,
        pd.DataFrame(bars, index=pd.Index(list(settings), tupleize_cols=False)),
        layers,
        judge.vlm.n_layers,
        true_words,
        other_words,
        ("choice", "skipped"),
        start=start,
        alt=[sample.captions[0] for sample in pictures],
    )


def rank_correlations(
    change: pd.Series, effect: pd.DataFrame, first: int, seed: int = 0
) -> dict[str, Estimate]:
    """Correlate how much blocks change their input with what their absence costs, by rank.

    Use it to see whether the cheaper sign would choose the same blocks. The last block and those
    before ``first`` are left out, unless too few remain.

    Parameters
    ----------
    change : pandas.Series
        The change of the input, by block.
    effect : pandas.DataFrame
        The increase of the loss without each block, a row a block; columns captions and answers.
    first : int
        The first block that counts.
    seed : int, default 0
        The seed of the intervals.

    Returns
    -------
    dict of str to Estimate
        The rank correlation, for captions and for answers.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> change = pd.Series([0.9, 0.1, 0.2, 0.3, 0.4, 0.8], index=range(1, 7))
    >>> effect = pd.DataFrame({"captions": 2 * change, "answers": -change})
    >>> signs = skipping.rank_correlations(change, effect, first=2)
    >>> signs["captions"].value, signs["answers"].value
    (1.0, -1.0)
    """
    between = _between(effect, first)
    signs = {}
    for task in ("captions", "answers"):
        signs[task] = correlation(change[between.index], between[task], kind="spearman", seed=seed)
    return signs


def _between(effect: pd.DataFrame, first: int) -> pd.DataFrame:
    """The blocks from ``first`` to the last but one, or all where those are too few."""
    between = effect.loc[first : effect.index[-1] - 1]
    return effect if len(between) < 4 else between


def record_redundancy(
    experiment: Experiment,
    redundancy: pd.DataFrame,
    change: pd.Series,
    effect: pd.DataFrame,
    first: int,
    seed: int = 0,
) -> None:
    """Record for SKIP-7 how well measures of redundancy order blocks by what their absence costs.

    Recorded are the rank correlation, which is 0 for a random order, and by how much it is above
    that of the change of the input. The blocks are those of :func:`rank_correlations`.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    redundancy : pandas.DataFrame
        As :func:`~xlvlms_tutorial.methods.skipping.layer_redundancy` gives it: a row a block, a
        column a measure.
    change : pandas.Series
        The change of the input, by block.
    effect : pandas.DataFrame
        The increase of the loss without each block, a row a block; columns captions and answers.
    first : int
        The first block that counts.
    seed : int, default 0
        The seed of the intervals.
    """
    between = _between(effect, first)
    other = change[between.index]
    for name, measure in redundancy.loc[between.index].items():
        for task in ("captions", "answers"):
            cost = between[task]
            order = correlation(measure, cost, kind="spearman", seed=seed)
            experiment.record(
                "SKIP-7", order, "random order", f"{name}, {task}", interval_over="blocks"
            )
            ahead = _order_ahead(measure, other, cost, seed)
            variant = f"{name}, against the change of the input, {task}"
            experiment.record(
                "SKIP-7", ahead, "input-output cosine", variant, interval_over="blocks"
            )


def _order_ahead(measure: pd.Series, baseline: pd.Series, cost: pd.Series, seed: int) -> Estimate:
    """By how much one rank correlation with a cost is above another, with blocks drawn again."""
    n = len(cost)
    rows = np.vstack([np.arange(n), np.random.default_rng(seed).integers(n, size=(2000, n))])
    ranks = [rankdata(values.to_numpy()[rows], axis=1) for values in (measure, baseline, cost)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranks]
    first, second, last = (
        values / np.linalg.norm(values, axis=1, keepdims=True) for values in centred
    )
    ahead = (first * last).sum(axis=1) - (second * last).sum(axis=1)
    return percentile_interval(float(ahead[0]), ahead[1:], n)


def interval_plans(n_layers: int, sizes: Sequence[int]) -> dict[tuple[str, int], SkipPlan]:
    """Return the paper's interval as plans, for some numbers of blocks.

    Parameters
    ----------
    n_layers : int
        The number of blocks of the model.
    sizes : sequence of int
        How many blocks are left out. Numbers that no interval gives are left out.

    Returns
    -------
    dict of (str, int) to SkipPlan
        The plans by "interval" and their number of blocks.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import skipping
    >>> plans = skipping.interval_plans(30, (2, 14))
    >>> plans["interval", 2].layers
    (11, 21)
    """
    plans = {}
    for step in range(n_layers - 1, 1, -1):
        blocks = every_nth_layer(n_layers, step)
        if len(blocks) in sizes:
            plans["interval", len(blocks)] = SkipPlan(tuple(blocks))
    return plans


def draw_shares(
    axes: Sequence[Axes], shares: pd.DataFrame, tasks: Sequence[str], counts: Sequence[int]
) -> None:
    """Draw retained shares with their intervals against the number of blocks left out.

    Parameters
    ----------
    axes : sequence of matplotlib.axes.Axes
        A panel a task.
    shares : pandas.DataFrame
        As :meth:`Judge.bands` gives them.
    tasks : sequence of str
        The tasks.
    counts : sequence of int
        The numbers of blocks, which stand side by side.
    """
    places = {k: place for place, k in enumerate([0, *counts])}
    choices = shares["choice"].unique()
    for ax, task in zip(axes, tasks, strict=False):
        ax.axhline(0.9, color=plots.MUTED, linestyle=":", linewidth=1)
        for number, choice in enumerate(choices):
            rows = shares[(shares["choice"] == choice) & (shares["task"] == task)]
            x = rows["blocks"].map(places) + 0.13 * (number - len(choices) // 2)
            reach = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            line = "-" if choice.startswith("by") else ""
            ax.errorbar(
                x,
                rows["value"],
                reach,
                fmt="osD^v"[number] + line,
                markersize=5,
                elinewidth=1.2,
                linewidth=1,
                label=choice,
            )
        ax.plot(0, 1, "*", color=plots.INK, markersize=9, label="all blocks")
        ax.set(title=f"{task}s", xlabel="blocks left out", ylim=(-0.04, 1.08))
        ax.set_xticks(list(places.values()), list(places))
    axes[0].set_ylabel("retained share of the score")


def draw_costs(axes: Sequence[Axes], points: pd.DataFrame, tasks: Sequence[str]) -> None:
    """Draw retained shares against the operations of an answer.

    Parameters
    ----------
    axes : sequence of matplotlib.axes.Axes
        A panel a task.
    points : pandas.DataFrame
        A row a plan, as :meth:`Judge.compare` gives them for the call "answer".
    tasks : sequence of str
        The tasks.
    """
    for ax, task in zip(axes, tasks, strict=False):
        for marker, (name, row) in zip("osD^vP", points.iterrows(), strict=True):
            ax.plot(row["operations, answer"], row[task], marker, markersize=8, label=name)
        ax.plot(1, 1, "*", color=plots.INK, markersize=11, label="whole model")
        ax.set(title=f"{task}s", xlabel="operations of an answer (share)", ylim=(-0.04, 1.08))
    axes[0].set_ylabel("retained share of the score")


def check_effects(
    experiment: Experiment, effect: pd.DataFrame, signs: Mapping[str, Estimate]
) -> None:
    """Check what the chapter says of single blocks.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    effect : pandas.DataFrame
        The increase of the loss without each block, a row a block; columns captions, answers and
        plain text.
    signs : mapping of str to Estimate
        The rank correlation of the change of the input with the effect, by task.
    """
    ends = effect.iloc[[0, -1]][["captions", "answers"]]
    inner = effect.iloc[4:-1]
    captions = inner["captions"]
    for_answers = inner["answers"] > captions
    early = for_answers.index <= 2 / 3 * len(effect)
    agree = inner["plain text"].corr(captions, method="spearman")
    statements = {
        "without the first or the last block captions and answers break": ends.min().min() > 1,
        "between them single blocks cost many times what most cost": (
            captions.nlargest(3).min() > 4 * captions.median()
        ),
        "most early and middle blocks cost answers more": for_answers[early].mean() > 0.6,
        "most late blocks cost captions more": for_answers[~early].mean() < 0.4,
        "plain text and captions agree on the blocks": agree > 0.4,
        "plain text loses less at most blocks": (inner["plain text"] < captions).mean() > 0.6,
        "between first and last the change of the input says little": (
            max(abs(sign.value) for sign in signs.values()) < 0.5
        ),
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_fair(experiment: Experiment, fair: pd.DataFrame | None) -> None:
    """Check whether the verdict of the fair comparison depends on which pictures plans are from.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    fair : pandas.DataFrame or None
        As :func:`fair_lines` gives it; None where the model can do only one of the tasks.
    """
    n_verdicts = 0 if fair is None else fair.groupby("questions")["verdict"].nunique().max()
    statement = "the verdict of the fair line changes with two more pictures"
    experiment.check(statement, n_verdicts > 1)


def check_presence(experiment: Experiment, samples: Sequence[Sample]) -> None:
    """Check that about half of the questions about presence have the answer no.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    samples : sequence of Sample
        The samples that plans are judged by.
    """
    answers = []
    for sample in samples:
        for question in sample.questions:
            if question.type == "presence":
                answers.append(question.answer)
    share = answers.count("no") / max(len(answers), 1)
    experiment.check("about half of the answers about presence are no", 0.3 < share < 0.7)


def check_retained(experiment: Experiment, retained: pd.DataFrame, largest: int, half: int) -> None:
    """Check what the chapter says of the score that is left.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    retained : pandas.DataFrame
        The retained shares; columns choice, blocks, task and value.
    largest : int
        The largest number of blocks that a plan by effect leaves out.
    half : int
        How many blocks every second one is.
    """
    share = retained.pivot_table("value", ["choice", "blocks"], "task", sort=False)
    in_own_task = min((_of_choice(share, f"by {task}s", 1)[task] for task in share), default=0.0)
    several = share[share.index.get_level_values("blocks") == largest]
    by_rule = share[share.index.isin([("similar", largest), ("interval", largest)])]
    better = by_rule - _of_choice(share, "random", largest)
    statements = {
        "one block chosen by its effect goes unnoticed in its task": in_own_task > 0.9,
        "one random block costs much": _of_choice(share, "random", 1).min() < 0.8,
        "with three blocks gone every choice loses much of a task": (
            largest == 3 and several.min(axis=1).max() < 0.8
        ),
        "with every second block gone next to nothing is left": (
            _of_choice(share, "interval", half).max() < 0.3
        ),
        "similarity and the interval do little better than random": better.max().max() < 0.25,
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def _of_choice(share: pd.DataFrame, choice: str, k: int) -> pd.Series:
    """The retained shares of a choice by task; those of the first one where it is not there."""
    return share.loc[(choice, k)] if (choice, k) in share.index else share.iloc[0]


def check_scopes(experiment: Experiment, scoped: pd.DataFrame, tasks: Sequence[str]) -> None:
    """Check what the chapter says of prefill and decode steps.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    scoped : pandas.DataFrame
        What each scope keeps and costs; the last row is that of a quarter of the blocks.
    tasks : sequence of str
        The tasks that the whole model can do.
    """
    gained = scoped[list(tasks)] - scoped.loc["both", list(tasks)]
    last = scoped.iloc[-1]
    statements = {
        "in decode steps alone less is lost than in both": gained.loc["decode"].min() > 0.1,
        "of an answer the decode scope saves next to nothing": (
            scoped.loc["decode", "operations, answer"] > 0.98
        ),
        "a quarter gone in decode steps breaks captions, answers less": (
            len(tasks) == 2 and last["caption"] < min(0.3, last["answer"] - 0.2)
        ),
    }
    if "caption" in tasks:
        captions = gained["caption"]
        statements["in the prefill with their own cache captions lose less"] = (
            captions["prefill, own cache"] > 0.1
        )
        statements["with the previous block's cache captions lose more"] = (
            captions["prefill, previous"] < -0.1
        )
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_parts(experiment: Experiment, part: pd.DataFrame) -> None:
    """Check what the chapter says of attention and MLP side by side.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    part : pandas.DataFrame
        The retained shares of the tasks, a row a plan.
    """
    through_own = part.loc["side by side, own norm"]
    statements = {
        "through the first norm it is worse than without the MLP": (
            (part.loc["side by side"] < part.loc["no MLP"] - 0.05).all()
        ),
        "through its own norm it is better than without the MLP": (
            through_own > part.loc["no MLP"]
        ).all(),
        "through its own norm on three blocks little is lost": through_own.min() > 0.85,
        "on every second block most is lost": part.loc["own norm, interval 2"].max() < 0.5,
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_tokens(experiment: Experiment, by_token: pd.DataFrame, n_tokens: int) -> None:
    """Check what the chapter says of the MLPs of image tokens.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    by_token : pandas.DataFrame
        The retained shares of the tasks, a row a plan; the last one reaches further down.
    n_tokens : int
        How many tokens the first two plans are about.
    """
    idle = by_token.loc[[f"{n_tokens} of image", "all of image"]]
    lost = 1 - by_token.loc[f"{n_tokens} of text"]
    statements = {
        "in the last blocks the picture's MLPs do nothing": idle.min().min() > 0.95,
        "text tokens cannot do without theirs so well": lost.max() > 0.1,
        "for captions the effect is smaller": (
            len(lost) == 2 and lost["caption"] < lost["answer"] - 0.05
        ),
        "further down it begins to cost captions": (
            "caption" in by_token and by_token["caption"].iloc[-1] < 0.95
        ),
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)
