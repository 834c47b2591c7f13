"""Ask a model about the second world, to see which scores depend on the first world's generator.

A model that was trained on the scenes is asked about the postcards, which another generator draws
and describes, without any further training.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import pandas as pd

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.data.pocket import crossed_samples
from xlvlms_tutorial.evaluation import Generator, Report, evaluate
from xlvlms_tutorial.metrics.answers import yes_or_no
from xlvlms_tutorial.metrics.captions import CAPTION_FACTORS, caption_attributes
from xlvlms_tutorial.metrics.intervals import difference, proportion
from xlvlms_tutorial.validation import require

WORLDS = ("scenes", "postcards")
_FACTORS = (*CAPTION_FACTORS, "time")
_CENSUS = 1000  # scenes that show every kind of object many times
_SHARED = ", kinds of both worlds"


def compare_worlds(
    vlm: Generator, n: int = 60, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Compare what a model gets right on scenes with what it gets right on postcards.

    Use it to see which results of the book depend on the generator that drew, described and judged
    the scenes. The two worlds ask for the same factors by the same names, so that one evaluation
    scores both; sprites, backgrounds, composition and wording differ, and so do some kinds of
    objects. A large difference means that the score is one on the generator that the model was
    trained on, and says little about other pictures or words; :func:`swap_words` tells these two
    apart. A score near ``constant`` means that the model does no better than if it did not look.

    Parameters
    ----------
    vlm : Generator
        The model, as :func:`~xlvlms_tutorial.loading.load` returns it. It is not trained.
    n : int, default 60
        How many pictures of each world, 10 or more. They are of the split "test".
    seed : int, default 0
        Of the pictures and of the bootstrap.
    progress : bool, default False
        Whether to show progress bars.

    Returns
    -------
    pandas.DataFrame
        One row a measurement. "caption, <factor>" is the share of captions that name the factor,
        "answer, <type>" the share of correct answers, "yes to presence questions" the share of
        answers that are yes. Rows that end in "kinds of both worlds" leave out what is about kinds
        of objects that scenes never show. Columns scenes, postcards and difference (postcards minus
        scenes) hold an :class:`~xlvlms_tutorial.metrics.Estimate` each, whose intervals come from
        resampled pictures (Wilson's for one trial a picture). The column constant is what the one
        best caption or answer would get right on these postcards, if it were always given; NaN for
        the share of yes. Measurements for which one world has no case are left out.

    Raises
    ------
    InputError
        If ``n`` is below 10, or the seed is no whole number of 0 or more. If the model returns
        another number of texts than asked.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import second_world
    >>> table = second_world.compare_worlds(vlm, n=10)
    >>> table.columns.tolist()
    ['scenes', 'postcards', 'difference', 'constant']
    >>> estimate = table.loc["answer, place", "postcards"]
    >>> bool(estimate.low <= estimate.value <= estimate.high), estimate.n
    (True, 10)
    """
    require(n >= 10, f"n is {n}", "give 10 pictures or more, so that differences have an interval")
    census = load_samples("scenes", n=_CENSUS, seed=seed)
    shared_values = {sample.truth[factor] for sample in census for factor in ("subject", "item")}
    tables = {}
    for world in WORLDS:
        samples = load_samples(world, n=n, seed=seed)
        report = evaluate(vlm, samples, seed=seed, progress=progress, dataset=world)
        tables[world] = pd.concat(
            [*_captions(report, samples, shared_values), *_answers(report, shared_values)]
        )
    rows = {}
    for name in tables["scenes"]["measurement"].unique():
        first, second = (table[table["measurement"] == name] for table in tables.values())
        if len(first) and len(second):
            rows[name] = _compared(first, second, seed)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("measurement")


def swap_words(vlm: Generator, n: int = 40, seed: int = 0, progress: bool = False) -> pd.DataFrame:
    """Ask about the pictures of both worlds in the words of both.

    Use it after :func:`compare_worlds`, to see whether a loss comes from pictures or from the
    wording of questions. All pictures show kinds of objects that both worlds have.

    Parameters
    ----------
    vlm : Generator
        The model, as :func:`~xlvlms_tutorial.loading.load` returns it. It is not trained.
    n : int, default 40
        How many pictures of each world, 2 or more. They are of the split "test".
    seed : int, default 0
        Of the pictures and of the bootstrap.
    progress : bool, default False
        Whether to show progress bars.

    Returns
    -------
    pandas.DataFrame
        One row a type of question. The columns are pairs, first the world of the pictures, then
        that of the words; the cells hold an :class:`~xlvlms_tutorial.metrics.Estimate` of the share
        of correct answers each, whose intervals come from resampled pictures.

    Raises
    ------
    InputError
        If ``n`` is below 2. If the model returns another number of texts than asked.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import second_world
    >>> table = second_world.swap_words(vlm, n=2)
    >>> table.columns.tolist()[1]
    ('scenes', 'postcards')
    >>> "place" in table.index
    True
    """
    require(n >= 2, f"n is {n}", "give 2 pictures or more, so that shares have an interval")
    columns = {}
    for pictures, texts in product(WORLDS, WORLDS):
        samples = crossed_samples(n, pictures, texts, seed=seed)
        # captions are not compared here: one token of each is little work
        report = evaluate(vlm, samples, seed=seed, progress=progress, caption_tokens=1)
        shares = {}
        for kind, trials in report.answers.groupby("type", sort=True):
            shares[kind] = proportion(trials["correct"], trials["sample"], seed=seed)
        columns[pictures, texts] = shares
    table = pd.DataFrame(columns).rename_axis("type")
    return table.rename_axis(columns=["pictures", "words"])


def _compared(first: pd.DataFrame, second: pd.DataFrame, seed: int) -> dict[str, object]:
    """One row of the comparison, from the trials of both worlds."""
    estimates = {}
    for world, trials in zip(WORLDS, (first, second), strict=True):
        estimates[world] = proportion(trials["right"], trials["sample"], seed=seed)
    estimates["difference"] = difference(
        second["right"], first["right"], second["sample"], first["sample"], seed=seed
    )
    commonest = Counter(second["truth"].dropna()).most_common(1)
    estimates["constant"] = commonest[0][1] / len(second) if commonest else float("nan")
    return estimates


def _captions(
    report: Report, samples: Sequence[Sample], shared_values: set[object]
) -> Iterator[pd.DataFrame]:
    """Trials of the captions, one a picture: measurement, sample, right, truth."""
    truths = [sample.truth for sample in samples]
    named = caption_attributes(report.captions["caption"].tolist(), truths, _FACTORS)
    for factor in _FACTORS:
        values = [truth[factor] for truth in truths]
        if factor == "colour":  # a caption is right about it only with its thing
            values = [f"{truth['colour']} {truth['item']}" for truth in truths]
        trials = pd.DataFrame(
            {"sample": report.captions["sample"], "right": named[factor], "truth": values}
        ).dropna(subset="right")
        trials["right"] = trials["right"].astype(bool)
        yield trials.assign(measurement=f"caption, {factor}")
        if factor in ("subject", "item"):
            shared = trials[trials["truth"].isin(shared_values)]
            yield shared.assign(measurement=f"caption, {factor}{_SHARED}")


def _answers(report: Report, shared_values: set[object]) -> Iterator[pd.DataFrame]:
    """Trials of the answers, one a question: measurement, sample, right, truth."""
    answers = report.answers.rename(columns={"correct": "right", "answer": "truth"})
    for kind, trials in answers.groupby("type", sort=True):
        shared = trials[trials["target"].isin(shared_values)]
        yield trials.assign(measurement=f"answer, {kind}")
        if kind == "presence":
            yield shared.assign(measurement=f"answer, {kind}{_SHARED}")
            says_yes = trials["prediction"].map(yes_or_no) == "yes"
            yield trials.assign(measurement="yes to presence questions", right=says_yes, truth=None)
