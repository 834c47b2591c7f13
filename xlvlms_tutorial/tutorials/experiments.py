"""Run the experiment of a chapter: records, verdicts, tables, samples, exercises.

What stays in a chapter is the equation, the call that is the method, and the figure. Everything
that several chapters need around it is here.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from html import escape

import pandas as pd
import torch
from IPython.core.formatters import format_display_data
from IPython.display import display

from xlvlms_tutorial import claims
from xlvlms_tutorial.claims.pooled_ledger import MODELS, pooled_headlines
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.interventions import add
from xlvlms_tutorial.methods.steering import Run
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.models.batching import prompts_of
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view.cards import Html, style_of
from xlvlms_tutorial.view.tables import Table, badge, table

# Marks an output that is not shown where it is made, but where the page pastes it.
_PASTED = "application/papermill.record/"


class Experiment:
    """What one run of a chapter measures: its claims with their verdicts, and its checks.

    Make one at the start of a chapter, so that model, data and seed are given once.

    Parameters
    ----------
    chapter : str
        The name of the page.
    model, dataset : str
        What the page runs on.
    seeds : int or sequence of int, default 0
        The seeds of the run.
    interval_over : str, default "pictures"
        What intervals of this chapter are over, unless :meth:`record` is given something else.

    Attributes
    ----------
    records : list of dict
        What was recorded, in order.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> from xlvlms_tutorial.tutorials.experiments import Experiment
    >>> experiment = Experiment("inside", "pocket-llava", "scenes")
    >>> effect = Estimate(0.31, 0.28, 0.34, 200)
    >>> experiment.record("IMA-1", effect, "another run", "layer 8")
    'confirmed'
    >>> experiment.check("the effect is above a quarter", effect.value > 0.25)
    True
    >>> print(experiment.lines("IMA-1"))
    layer 8: IMA-1 confirmed: 0.31 [0.28, 0.34], claimed > 0
    """

    def __init__(
        self,
        chapter: str,
        model: str,
        dataset: str,
        seeds: int | Sequence[int] = 0,
        interval_over: str = "pictures",
    ) -> None:
        self.run = {"chapter": chapter, "model": model, "dataset": dataset, "seeds": seeds}
        self.interval_over = interval_over
        self.records: list[dict[str, object]] = []

    def record(
        self,
        claim_id: str,
        estimate: Estimate,
        against: str,
        variant: str = "",
        choice: str = "fixed",
        interval_over: str | None = None,
    ) -> str:
        """Record one measurement of a claim, and return its verdict.

        Parameters
        ----------
        claim_id : str
            Such as "IMA-1".
        estimate : Estimate
            The measured effect with its interval.
        against : str
            What the effect was measured against, such as "random words".
        variant : str, default ""
            What tells measurements of one claim apart: a layer, a task.
        choice : str, default "fixed"
            How a setting was picked: "fixed", on "validation", or "least favourable".
        interval_over : str, optional
            What was drawn again for the interval; by default what the experiment says.

        Returns
        -------
        str
            "confirmed", "undecided" or "refuted".
        """
        measured = claims.record(
            claim_id,
            estimate,
            against=against,
            variant=variant,
            choice=choice,
            interval_over=interval_over or self.interval_over,
            **self.run,
        )
        earlier = [record for record in self.records if _name(record) != _name(measured)]
        self.records = [*earlier, measured]
        return str(measured["verdict"])

    def check(self, statement: str, holds: object) -> bool:
        """Write down whether something that the text says holds in this run.

        Parameters
        ----------
        statement : str
            What the text says, in one short sentence.
        holds : bool
            Whether it does here; what numpy and pandas give for a truth value is taken too.

        Returns
        -------
        bool
            ``holds``.
        """
        return claims.check(statement, bool(holds), **self.run)

    def verdict(self, claim_id: str, variant: str = "") -> str:
        """Return the verdict of one measurement.

        Parameters
        ----------
        claim_id : str
            The claim.
        variant : str, default ""
            Which of its measurements, as it was recorded.

        Returns
        -------
        str
            The verdict; "not measured" where there is none.
        """
        for record in self.records:
            if _name(record) == (claim_id, variant):
                return str(record["verdict"])
        return "not measured"

    def results(self, *claim_ids: str) -> Table:
        """Return the measurements of some claims as a table for people.

        Parameters
        ----------
        *claim_ids : str
            The claims; by default all that were recorded.

        Returns
        -------
        Table
            One row a measurement: the claim, the verdict as a mark, what was measured, against
            which baseline, and the effect with its interval. A claim that this run could not
            measure has one row that says so.
        """
        rows = []
        for record in self._of(claim_ids):
            effect = f"{record['value']:.2f} [{record['low']:.2f}, {record['high']:.2f}]"
            test = claims.claim(str(record["id"])).test
            rows.append(
                {
                    "claim": record["id"],
                    "verdict": record["verdict"],  # near the left edge, in sight on a phone
                    "measured": record["variant"],
                    "against": record["against"],
                    "effect": f"{effect}, claimed {test}",
                }
            )
        measured = {row["claim"] for row in rows}
        for claim_id in claim_ids:
            if claim_id not in measured:
                rows.append({"claim": claim_id, "verdict": "not measured"})
        return table(pd.DataFrame(rows).set_index("claim"))

    def lines(self, *claim_ids: str) -> str:
        """Return the measurements of some claims as text, one a line, for checked cells.

        Parameters
        ----------
        *claim_ids : str
            The claims; by default all that were recorded.

        Returns
        -------
        str
            The lines: what was measured, then the claim with verdict and interval.
        """
        lines = [
            f"{record['variant']}: {claims.sentence(record)}" for record in self._of(claim_ids)
        ]
        return "\n".join(lines)

    def headlines(self) -> list[dict[str, object]]:
        """Return one headline a claim of this page, in the register's order.

        Only what this page measured counts; the ledger joins all pages.

        Returns
        -------
        list of dict
            As :func:`~xlvlms_tutorial.claims.headlines` gives them.
        """
        entries = []
        for claim_id, claimed in claims.CLAIMS.items():
            for record in self.records:
                if record["id"] == claim_id:
                    entries.append(asdict(claimed) | record)
        return claims.headlines(entries)

    def summary(self) -> Html:
        """Return the claims of this page with their headlines, for the box at its top.

        Returns
        -------
        :class:`~xlvlms_tutorial.view.cards.Html`
            A paragraph a claim: its id, what it says, its headline and the size of its effect; and
            the headlines of more runs, by model, where the package has them. A page pastes it by
            ``{glue} in-short`` after :func:`glue` has named it.
        """
        pooled = pooled_headlines()
        paragraphs = ""
        for line in self.headlines():
            statement = escape(str(line["statement"]))
            effect = escape(str(line["effect"]))
            paragraphs += (
                f"<p><b>{escape(str(line['id']))}</b> {statement} {badge(str(line['headline']))}"
                f"<small>effect {effect}; {_counted(line)}"
                f"{_of_more_runs(pooled.get(str(line['id']), {}))}</small></p>"
            )
        return Html(f"{style_of('sign')}{style_of('shown')}<div class='shown'>{paragraphs}</div>")

    def _of(self, claim_ids: Sequence[str]) -> list[dict[str, object]]:
        for claim_id in claim_ids:
            claims.claim(claim_id)  # one that is not in the register is refused
        return [record for record in self.records if not claim_ids or record["id"] in claim_ids]


def _name(measured: Mapping[str, object]) -> tuple[object, object]:
    return measured["id"], measured["variant"]


def _counted(line: Mapping[str, object]) -> str:
    n = line["measurements"]
    if n == 1:
        return "one measurement"
    number = f"{n} measurements"
    # the headline corrects the verdicts for their number
    return f"{number}, {line['confirmed']} confirmed after correction"


def _of_more_runs(by_model: Mapping[str, Mapping[str, object]]) -> str:
    """The headlines of one claim over runs with other samples, as HTML; "" where there are none."""
    parts = []
    for model, line in by_model.items():
        name = MODELS.get(model, model)
        parts.append(escape(f"{name}, {line['runs']} runs: {line['headline']}"))
    return f"<br>Pooled over seeds: {'; '.join(parts)}" if parts else ""


def glue(name: str, output: object) -> None:
    """Name something that a cell made, so that the page can paste it elsewhere.

    Use it for what stands in the box at the top of a chapter and is computed below: the page has
    ``{glue} name`` there, or ``{glue:figure} name`` for a figure. Nothing is shown in the cell.

    Parameters
    ----------
    name : str
        The name on this page.
    output : object
        A figure of matplotlib, a table, HTML: whatever a notebook can show.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import glue
    >>> glue("best layer", 24)
    """
    data, metadata = format_display_data(output)
    pasted = {_PASTED + kind: content for kind, content in data.items()}
    mark = {"scrapbook": {"name": name, "mime_prefix": _PASTED}}
    display(pasted, raw=True, metadata=metadata | mark)


def band_table(estimates: Mapping[Hashable, Estimate], *names: str) -> pd.DataFrame:
    """Arrange estimates in the table that figures with bands take.

    Use it before :func:`~xlvlms_tutorial.view.plots.profile` and
    :func:`~xlvlms_tutorial.view.plots.intervals`.

    Parameters
    ----------
    estimates : mapping
        Estimates by what they belong to: a layer, or a tuple such as (method, layer).
    *names : str
        The columns of the key's parts, such as "method", "layer".

    Returns
    -------
    pandas.DataFrame
        One row an estimate: the parts of its key, then value, low, high and n.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import Estimate
    >>> from xlvlms_tutorial.tutorials.experiments import band_table
    >>> estimates = {("image", 8): Estimate(0.31, 0.28, 0.34, 200)}
    >>> band_table(estimates, "modality", "layer")
      modality  layer  value   low  high    n
    0    image      8   0.31  0.28  0.34  200
    """
    rows = []
    for key, estimate in estimates.items():
        parts = key if isinstance(key, tuple) else (key,)
        require(
            len(parts) == len(names),
            f"key {key!r} with {len(names)} names",
            "name each part of the keys",
        )
        rows.append(dict(zip(names, parts, strict=True)) | estimate.asdict())
    return pd.DataFrame(rows, columns=[*names, "value", "low", "high", "n"])


def balanced_questions(
    samples: Iterable[Sample],
    per_answer: int,
    per_sample: int = 1,
    more: Mapping[str, int] | None = None,
) -> list[Sample]:
    """Take about as many questions for each answer, so that rare answers are not lost.

    Use it to make sets of questions by their answers. Where something is judged, one question a
    picture keeps the questions independent.

    Parameters
    ----------
    samples : iterable of Sample
        Pictures with questions.
    per_answer : int
        How many questions for each answer at most.
    per_sample : int, default 1
        How many questions of one picture at most.
    more : mapping of answer to int, optional
        Another number for some answers.

    Returns
    -------
    list of Sample
        Copies that hold one question each, ordered by answer; their ids end in the number of the
        question.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.experiments import balanced_questions
    >>> samples = balanced_questions(load_samples("scenes", n=20), 2, more={"yes": 3})
    >>> sum(sample.questions[0].answer == "yes" for sample in samples)
    3
    """
    limits = dict(more or {})
    by_answer: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        remaining = per_sample
        for number, question in enumerate(sample.questions):
            same = by_answer[question.answer]
            if remaining and len(same) < limits.get(question.answer, per_answer):
                same.append(replace(sample, id=f"{sample.id}/{number}", questions=(question,)))
                remaining -= 1
    return [sample for same in by_answer.values() for sample in same]


def question_of(sample: Sample) -> str:
    """Return the text of a sample's first question, which is what the model is asked.

    Parameters
    ----------
    sample : Sample
        A sample with a question.

    Returns
    -------
    str
        The question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import question_of
    >>> question_of(samples[0])[-1]
    '?'
    """
    return sample.questions[0].text


def answer_of(sample: Sample) -> str:
    """Return the right answer to a sample's first question.

    Parameters
    ----------
    sample : Sample
        A sample with a question.

    Returns
    -------
    str
        The answer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import answer_of
    >>> answer_of(samples[0]) in ("yes", "no")
    True
    """
    return sample.questions[0].answer


def describe(
    vlm: VLM,
    samples: Sequence[Sample],
    max_new_tokens: int = 32,
    prompt: str | Sequence[str] = PROMPTS["image"],
    batch_size: int = 64,
) -> list[str]:
    """Let a model describe pictures.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The pictures.
    max_new_tokens : int, default 32
        How many tokens it may write.
    prompt : str or sequence of str, default "Describe the picture."
        What it is asked: of each picture, or one for each.
    batch_size : int, default 64
        How many pictures are described at once.

    Returns
    -------
    list of str
        A caption for each picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import describe
    >>> len(describe(vlm, samples[:2], 2))
    2
    """
    images = [sample.image for sample in samples]
    prompts = prompts_of(samples, prompt)
    return vlm.generate(images, prompts, max_new_tokens, batch_size)


def describe_steered(
    vlm: VLM,
    runs: Sequence[Run],
    samples: Sequence[Sample],
    max_new_tokens: int = 32,
    prompt: str | Sequence[str] = PROMPTS["image"],
    positions: str = "all",
    batch_size: int = 96,
) -> list[list[str]]:
    """Let a model describe pictures in several ways of steering, many in one batch.

    Use it where several vectors, layers or strengths are tried: a step of a generation costs little
    more for many captions than for one. A vector of zeros is added where another layer is steered.

    Parameters
    ----------
    vlm : VLM
        The model.
    runs : sequence of Run
        The ways to steer: vectors, layer and strength.
    samples : sequence of Sample
        The pictures.
    max_new_tokens : int, default 32
        How many tokens it may write.
    prompt : str or sequence of str, default "Describe the picture."
        What it is asked: of each picture, or one for each.
    positions : str, default "all"
        Where vectors are added, as for :meth:`SteeringVectors.apply`.
    batch_size : int, default 96
        About how many captions are written at once.

    Returns
    -------
    list of list of str
        For each run a caption of each picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import Run, SteeringVectors
    >>> from xlvlms_tutorial.tutorials.experiments import describe, describe_steered
    >>> vectors = SteeringVectors({15: torch.ones(vlm.width)}, {"model": vlm.name})
    >>> runs = [Run("ones", vectors, 15, strength) for strength in (0.0, 4.0)]
    >>> unsteered, steered = describe_steered(vlm, runs, samples[:2], 2)
    >>> unsteered == describe(vlm, samples[:2], 2)
    True
    """
    n = len(samples)
    prompts = prompts_of(samples, prompt)
    at_once = max(1, batch_size // max(n, 1))
    captions = []
    for start in range(0, len(runs), at_once):
        part = runs[start : start + at_once]
        with ExitStack() as stack:
            for layer in sorted({run.layer for run in part}):
                rows = torch.zeros(len(part) * n, vlm.width)
                for number, run in enumerate(part):
                    if run.layer == layer:
                        vector = run.strength * run.vectors.checked(vlm, layer, run.strength)
                        rows[number * n : number * n + n] = vector
                stack.enter_context(add(vlm, rows, layer, positions=positions))
            pictures = list(samples) * len(part)
            written = describe(vlm, pictures, max_new_tokens, prompts * len(part), len(pictures))
        captions += [written[number * n : number * n + n] for number in range(len(part))]
    return captions


def substitute(wanted: Sequence[str], counts: Mapping[str, int], min_count: int = 1) -> list[str]:
    """Replace words that a data set lacks by those that it has most often.

    Use it so that a chapter runs on data without its words: "sand" on photographs of kitchens.

    Parameters
    ----------
    wanted : sequence of str
        The words that the chapter is written about.
    counts : mapping of str to int
        How often each word is there.
    min_count : int, default 1
        How often a word must be there to be kept, or to replace another.

    Returns
    -------
    list of str
        As many words as wanted, each once; fewer if there are not as many.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import substitute
    >>> substitute(["sand", "snow"], {"snow": 9, "table": 7, "chair": 3})
    ['table', 'snow']
    """
    frequent = [word for word, n in counts.items() if n >= min_count]
    frequent.sort(key=lambda word: -counts[word])
    others = [word for word in frequent if word not in wanted]
    words = []
    for word in wanted:
        if counts.get(word, 0) >= min_count:
            words.append(word)
        elif others:
            words.append(others.pop(0))
    return list(dict.fromkeys(words))


def try_exercise(test: Callable[..., str], *work: object) -> None:
    """Run the test of an exercise on a reader's work, and say whether it passes.

    Use it below the stub of an exercise. The stub raises ``NotImplementedError``, which means that
    the exercise waits for its reader; what a test finds wrong is raised.

    Parameters
    ----------
    test : function
        Takes the work, asserts what has to hold, returns what was learnt as a sentence.
    *work : object
        What the reader wrote, such as a function.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.experiments import try_exercise
    >>> def stub(x):
    ...     raise NotImplementedError
    >>> def exercise_1(double):
    ...     assert double(2) == 4
    ...     return "twice two is four"
    >>> try_exercise(exercise_1, stub)
    Exercise 1 waits for you: write it, then run this cell again.
    >>> try_exercise(exercise_1, lambda x: 2 * x)
    Exercise 1 passed: twice two is four
    """
    name = test.__name__.replace("_", " ").capitalize()
    try:
        learnt = test(*work)
    except NotImplementedError:
        print(f"{name} waits for you: write it, then run this cell again.")  # noqa: T201
        return
    print(f"{name} passed: {learnt}")  # noqa: T201
