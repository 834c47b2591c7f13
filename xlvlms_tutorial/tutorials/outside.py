"""Ask what a model says of objects that are not there, and check what the chapter says of it."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.evaluation import Report
from xlvlms_tutorial.metrics import Estimate, difference, proportion, yes_or_no
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.view import widgets
from xlvlms_tutorial.view.cards import Html

_NEGATIVES = 3  # kinds of absent objects that POPE asks about


def answer_cards(samples: Sequence[Sample], report: Report) -> list[Html]:
    """Make a card for each sample, with the caption and all answers; wrong ones are marked.

    Use it with :func:`~xlvlms_tutorial.view.widgets.stack`.

    Parameters
    ----------
    samples : sequence of Sample
        The samples to show, all of them in the report.
    report : Report
        What a model said of them.

    Returns
    -------
    list of :class:`~xlvlms_tutorial.view.cards.Html`
        A card a sample. Beside a wrong answer stands the right one.

    Examples
    --------
    >>> from xlvlms_tutorial import evaluate
    >>> from xlvlms_tutorial.tutorials import outside
    >>> report = evaluate(vlm, samples[:1], progress=False, caption_tokens=4, answer_tokens=4)
    >>> len(outside.answer_cards(samples[:1], report))
    1
    """
    captions = report.captions.set_index("sample")["caption"]
    cards = []
    for sample in samples:
        rows = report.answers[report.answers["sample"] == sample.id]
        lines = []
        for row in rows.itertuples():
            note = "" if row.correct else f"(is: {row.answer})"
            lines.append((row.question, row.prediction, note))
        cards.append(widgets.picture_card(sample.image, captions[sample.id], lines))
    return cards


def yes_rates(answers: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Estimate how often a model says yes to objects that are there and that are not.

    Use it beside :func:`~xlvlms_tutorial.metrics.pope`, to see what an accuracy is made of.

    Parameters
    ----------
    answers : pandas.DataFrame
        The answers of a :class:`~xlvlms_tutorial.evaluation.Report`; rows of type "presence" count.
    seed : int, default 0
        Of the bootstrap over samples.

    Returns
    -------
    pandas.DataFrame
        Columns value, low and high. Rows "present", then "absent, <kind>" for each kind of absent
        objects; only those that are asked.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import outside
    >>> answers = pd.DataFrame({"sample": list("abcd"), "type": "presence", "stratum": "random"})
    >>> answers["answer"], answers["prediction"] = ["yes", "yes", "no", "no"], "yes"
    >>> outside.yes_rates(answers)["value"].to_dict()
    {'present': 1.0, 'absent, random': 1.0}
    """
    presence = answers[answers["type"] == "presence"]
    yes = presence["prediction"].map(yes_or_no) == "yes"
    kind = ("absent, " + presence["stratum"]).mask(presence["answer"] == "yes", "present")
    rates = {}
    by_kind = dict(list(yes.groupby(kind)))
    for name in sorted(by_kind, reverse=True):
        trials = by_kind[name]
        groups = presence.loc[trials.index, "sample"]
        rates[name] = proportion(trials, groups, seed=seed).asdict()
    return pd.DataFrame(rates, index=["value", "low", "high"], dtype=float).T


def popular_minus_random(answers: pd.DataFrame, seed: int = 0) -> Estimate | None:
    """Estimate how much more often a model says yes to popular absent objects than to random ones.

    Parameters
    ----------
    answers : pandas.DataFrame
        The answers of a :class:`~xlvlms_tutorial.evaluation.Report`.
    seed : int, default 0
        Of the bootstrap over samples.

    Returns
    -------
    Estimate or None
        The difference of the two rates of yes; None where the two kinds are not asked.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import outside
    >>> answers = pd.DataFrame({"sample": list("abcd"), "type": "presence", "answer": "no"})
    >>> answers["stratum"] = ["popular", "popular", "random", "random"]
    >>> answers["prediction"] = ["yes", "yes", "no", "no"]
    >>> outside.popular_minus_random(answers).value
    1.0
    """
    absent = answers[(answers["type"] == "presence") & (answers["answer"] == "no")]
    yes = absent["prediction"].map(yes_or_no) == "yes"
    popular, random = absent["stratum"] == "popular", absent["stratum"] == "random"
    if not (popular.any() and random.any()):
        return None
    return difference(
        yes[popular],
        yes[random],
        groups_a=absent["sample"][popular],
        groups_b=absent["sample"][random],
        seed=seed,
    )


def objects_of(samples: Iterable[Sample]) -> tuple[list[set[str]], list[str]]:
    """List the objects that are in each sample, and all that samples show or ask about.

    Use it before :func:`~xlvlms_tutorial.metrics.chair`.

    Parameters
    ----------
    samples : iterable of Sample
        Samples with the factors subject and item.

    Returns
    -------
    tuple of list of set of str, and list of str
        The objects of each sample, and the vocabulary.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import outside
    >>> scene = Sample("scene", None, (), truth={"subject": "woman", "item": "key"})
    >>> outside.objects_of([scene])[1]
    ['key', 'woman']
    """
    present, vocabulary = [], set()
    for sample in samples:
        factors = {sample.truth.get(name) for name in ("subject", "item")}
        present.append({str(name) for name in factors - {None}})
        vocabulary |= present[-1]
        for question in sample.questions:
            if question.type == "presence":
                vocabulary.add(question.target)
    return present, sorted(vocabulary)


def check_types(early: pd.DataFrame, finished: pd.DataFrame, guess: pd.Series) -> dict[str, bool]:
    """Check what the chapter says about the types of questions that two models get right.

    Parameters
    ----------
    early, finished : pandas.DataFrame
        The shares of both, as of :func:`~xlvlms_tutorial.metrics.accuracy_by_type`.
    guess : pandas.Series
        The share of the most frequent answer, by type.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import outside
    >>> names = ["overall", "presence", "colour", "place", "side"]
    >>> columns = ["value", "low", "high"]
    >>> finished = pd.DataFrame([[1.0, 0.9, 1.0]] * 5, names, columns)
    >>> rows = [[0.7, 0.6, 0.8]] + [[0.5, 0.4, 0.6]] * 2 + [[1.0, 0.9, 1.0]] * 2
    >>> guess = pd.Series(0.5, names[1:])
    >>> checks = outside.check_types(pd.DataFrame(rows, names, columns), finished, guess)
    >>> set(checks.values())
    {True}
    """
    types = finished.drop(index="overall")
    failed = early["value"].reindex(["presence", "colour"])
    passed = early["value"].reindex(["place", "side"])
    presence = early.reindex(["presence"])
    chance = (presence["low"] < 0.5) & (presence["high"] > 0.5)
    statements = {
        "no type of question is far from all right": types["value"].min() > 0.9,
        "every interval lies above guessing": (types["low"] > guess.reindex(types.index)).all(),
        "the early model fails on presence and colour": (failed < 0.6).all(),
        "the early model reads place and side": (passed > 0.9).all(),
        "the early model is at chance on presence": chance.all(),
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def check_yes(early: pd.DataFrame, finished: pd.DataFrame) -> dict[str, bool]:
    """Check what the chapter says about the rates of yes of two models.

    Parameters
    ----------
    early, finished : pandas.DataFrame
        The rates of both, as of :func:`yes_rates`.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import outside
    >>> names = ["present", "absent, random", "absent, popular", "absent, adversarial"]
    >>> finished = pd.DataFrame({"value": [1.0, 0.0, 0.0, 0.0]}, names)
    >>> early = pd.DataFrame({"value": [0.8, 0.8, 0.7, 0.8]}, names)
    >>> set(outside.check_yes(early, finished).values())
    {True}
    """
    of_absent = early["value"].drop("present", errors="ignore")
    clean = finished["value"].drop("present", errors="ignore")
    gap = abs(early["value"].reindex(["present"]) - of_absent.mean())
    statements = {
        "hardly any absent object gets a yes, of whatever kind": len(clean) == _NEGATIVES
        and clean.max() < 0.05,
        "the early model says yes to most absent objects, of every kind": len(of_absent)
        == _NEGATIVES
        and of_absent.min() > 0.5,
        "the early model says yes to absent objects about as often as to present ones": (
            gap < 0.1
        ).all(),
        "the early model says yes too often": early["value"].mean() > 0.6,
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def check_chairs(experiment: Experiment, chairs: Mapping[str, pd.DataFrame]) -> None:
    """Write down which captions name objects that are not there.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    chairs : mapping of str to pandas.DataFrame
        The rates of "early" and "finished", as of :func:`~xlvlms_tutorial.metrics.chair`; nothing
        is written down if there are none.
    """
    if not chairs:
        return
    experiment.check(
        "captions of the early model name absent objects", chairs["early"]["low"].min() > 0.03
    )
    experiment.check(
        "captions of the finished model hardly name any",
        chairs["finished"]["value"].max() < 0.05,
    )


def check_first_caption(experiment: Experiment, captions: str, sample: Sample) -> None:
    """Write down whether the early model puts a zombie beside a man.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    captions : str
        What both models say of the sample: "EARLY: ... FINISHED: ...".
    sample : Sample
        The sample.
    """
    zombie = "zombie" in captions.split("FINISHED")[0]
    experiment.check(
        "the early model puts a zombie beside the first man",
        zombie and sample.truth.get("subject") == "man",
    )


def check_combinations(experiment: Experiment, seen: pd.DataFrame, unseen: pd.DataFrame) -> None:
    """Write down what captions and answers get right of combinations that training left out.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    seen, unseen : pandas.DataFrame
        Rows of :meth:`~xlvlms_tutorial.evaluation.Report.summary` by metric, of pictures with
        combinations from training and of pictures with others.
    """
    experiment.check(
        "captions of known combinations are nearly all right", seen["value"].min() > 0.95
    )
    experiment.check(
        "captions of unseen combinations fail by the colour",
        unseen["high"]["caption/colour"] < seen["low"]["caption/colour"],
    )
    whole = unseen["value"][["caption/subject", "caption/place", "qa/overall"]]
    experiment.check("subject, place and answers stay nearly all right", whole.min() > 0.9)
