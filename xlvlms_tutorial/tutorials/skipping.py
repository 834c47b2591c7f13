"""Draw samples, leave work out and judge what is left, for the chapter on skipping.

The equation, the plans and the figures are in the chapter. Here is what surrounds them: which
questions are asked, how much of a score is retained, and what a slider shows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from ipywidgets import Widget
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
    count_flops,
    difference,
)
from xlvlms_tutorial.models import VLM, anatomy
from xlvlms_tutorial.tutorials.experiments import Experiment, answer_of, question_of
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import tradeoff

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


def _few_questions(sample: Sample, turn: int, others: int = 2) -> Sample:
    by_type = {question.type: question for question in sample.questions}
    first = [by_type.pop("presence")] if "presence" in by_type else []
    rest = list(by_type.values())
    k = turn % max(len(rest), 1)
    rest = rest[k:] + rest[:k]
    return replace(sample, questions=(*first, *rest[:others]))


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
    vlm: VLM, samples: Sequence[Sample], candidates: Mapping[str, Sequence[int]], k: int
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
    captions = greedy_layer_order(vlm, samples, k, candidates=candidates["captions"])
    answers = greedy_layer_order(
        vlm,
        one_question_each(samples),
        k,
        answers=answer_of,
        prompt=question_of,
        candidates=candidates["answers"],
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
    steps = [step for step in range(2, limit + 1) if every_nth_layer(n_layers, step)]
    return max(steps, default=2)


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
        entered = args[0] if args else kwargs["hidden_states"]
        return anatomy.with_states(out, entered)

    def run() -> object:
        with ExitStack() as hooks:
            for layer in layers:
                register = vlm.blocks[layer - 1].register_forward_hook
                hooks.callback(register(hand_on, with_kwargs=True).remove)
            return call()

    return run


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
    totals = {name: count_flops(call)["flops"].iloc[-1] for name, call in runs.items()}
    counted = pd.Series(totals)
    return counted / counted.iloc[0]


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
        self._reports: dict[tuple[SkipPlan, tuple[str, ...]], Report] = {}
        whole = self.report(NOTHING).scores().dropna()
        scored = [sample for sample in self.samples if sample.id in whole.index]
        self.half = scored[: len(self.samples) // 2]
        self.third = self.samples[: max(4, len(self.samples) // 3)]
        first_half = whole.loc[[sample.id for sample in self.half]]
        self.whole = whole.loc[:, (first_half > 0).sum() > 1]
        self.tasks = list(self.whole)

    def report(self, plan: SkipPlan, samples: Sequence[Sample] | None = None) -> Report:
        """Evaluate the model with a plan in force, once for each plan.

        Parameters
        ----------
        plan : SkipPlan
            What is left out.
        samples : sequence of Sample, optional
            What it is evaluated on; by default all.

        Returns
        -------
        Report
            Captions and answers.
        """
        samples = self.samples if samples is None else list(samples)
        key = _key(plan, samples)
        if key not in self._reports:
            with plan.apply(self.vlm):
                self._reports[key] = evaluate(
                    self.vlm,
                    samples,
                    seed=self.seed,
                    progress=False,
                    batch_size=48,
                    caption_tokens=20,
                    answer_tokens=4,
                )
        return self._reports[key]

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
        done = self._reports.get(_key(plan, self.samples))
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
        both = scores.index.intersection(baseline.index)
        ids = self.whole.index[self.whole.index.isin(both)]
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
        reports = [self.report(plan) for plan in (answers, NOTHING, captions)]
        by_answers, whole, by_captions = (
            report.scores() if presence else open_scores(report) for report in reports
        )
        columns = [
            by_answers["answer"],
            whole["answer"],
            by_captions["caption"],
            whole["caption"],
        ]
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
        rows = {}
        for name, plan in plans.items():
            scores = self.scores(plan, self.half if samples is None else samples)
            row = {task: self.retained(scores, task).value for task in self.tasks}
            for call_name, call in calls.items():
                shares = operations({"whole": call, "plan": applied(self.vlm, plan, call)})
                row[f"operations, {call_name}"] = shares["plan"]
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
        rest = [values[factor] - set(true_words[-1]) for factor in factors]
        other_words.append(sorted(set().union(*rest)))
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
