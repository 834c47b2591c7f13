"""Check what the chapters on grounding say in words against their tables.

Each function takes tables that a chapter shows, and returns statements with whether they hold, for
:meth:`~xlvlms_tutorial.tutorials.Experiment.check`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.metrics import word_overlap
from xlvlms_tutorial.tutorials.grounding import Concepts, Words, names_value

_PROTOTYPES = ["simple", "k-means"]


def of_pictures(samples: Sequence[Sample], concepts: Concepts, used: ArrayLike) -> dict[str, bool]:
    """Check what the pictures and the words of some concepts share.

    Parameters
    ----------
    samples : sequence of Sample
        The samples that the concepts were learnt from.
    concepts : Concepts
        Their concepts.
    used : array-like of int
        The concepts to look at.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding, grounding_checks
    >>> scenes = [Sample("scene", None, (), truth={"action": "falling"})] * 2
    >>> rows = np.array([[0, 1]])
    >>> learnt = grounding.Concepts(KMeans(1), np.ones((2, 1)), {0: ["fall"]}, rows)
    >>> set(grounding_checks.of_pictures(scenes, learnt, [0]).values())
    {True}
    """
    alike, named = [], []
    for concept in np.asarray(used).tolist():
        actions = {str(samples[row].truth.get("action")) for row in concepts.rows[concept]}
        words = concepts.words[concept]
        alike.append(len(actions) == 1)
        named.append(len(actions) == 1 and any(names_value(word, *actions) for word in words))
    return {
        "pictures of the concepts used most share an action": bool(np.mean(alike) >= 0.75),
        "the words of some of them name it": any(named),
    }


def of_baselines(baselines: Mapping[str, Words]) -> dict[str, bool]:
    """Check how much the lists of words that mean nothing have in common.

    Parameters
    ----------
    baselines : mapping of str to lists of words
        The lists named "random words" and "random directions".

    Returns
    -------
    dict of str to bool
        The statement, and whether it holds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> words = {0: ["key"], 1: ["dog"]}
    >>> lists = {"random words": words, "random directions": {0: ["key"], 1: ["key"]}}
    >>> grounding_checks.of_baselines(lists)
    {'random directions share words, drawn words hardly': True}
    """
    overlap = {name: word_overlap(lists).mean() for name, lists in baselines.items()}
    holds = bool(overlap["random words"] < 0.02 and overlap["random directions"] > 0.05)
    return {"random directions share words, drawn words hardly": holds}


def of_judges(exam: pd.DataFrame) -> dict[str, bool]:
    """Check what judges make of lists whose truth is known.

    Parameters
    ----------
    exam : pandas.DataFrame
        As of :meth:`~xlvlms_tutorial.tutorials.grounding.Judges.exam`: the first column is the
        picture score.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> rows = [(1.3, 0.5), (0.6, 0.5), (0.2, 0.3), (1.3, 0.3), (1.3, 0.4)] + [(0.1, 0.2)] * 3
    >>> exam = pd.DataFrame(rows, columns=["pocket score", "BERTScore"])
    >>> set(grounding_checks.of_judges(exam).values())
    {True}
    """
    pocket = exam.iloc[:, 0].to_numpy()
    picture_cost, caption_cost = 1 - exam.iloc[1] / exam.iloc[0]
    statements = {
        "true lists score far above false ones": min(pocket[0], *pocket[-5:-3])
        > 1.5 * max(pocket[-3:]),
        "one true word scores nearly what all of them do": abs(pocket[-5] / pocket[0] - 1) < 0.25,
        "one alien word costs much of the pocket score": picture_cost > 0.2,
        "BERTScore is milder with an alien word": caption_cost < picture_cost - 0.1,
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def of_concepts(exam: pd.DataFrame, by_concept: pd.DataFrame) -> dict[str, bool]:
    """Check how own words compare with baselines and with words that are known to be true.

    Parameters
    ----------
    exam : pandas.DataFrame
        As in :func:`of_judges`.
    by_concept : pandas.DataFrame
        As of :func:`~xlvlms_tutorial.tutorials.grounding.score_concepts`, for all tokens: the index
        is token and concept.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> exam = pd.DataFrame({"pocket score": [1.3], "BERTScore": [0.5]})
    >>> values = [[0.3, 0.1, 0.0]] * 9 + [[0.1, 0.2, 0.0]]
    >>> values = pd.DataFrame(values, columns=["own", "others", "random words"])
    >>> table = pd.concat({name: values for name in exam}, axis=1)
    >>> table = pd.concat({"woman": table}, names=["token", "concept"])
    >>> set(grounding_checks.of_concepts(exam, table).values())
    {True}
    """
    picture, caption = (by_concept[metric] for metric in exam.columns)
    above = []
    for scores in (picture, caption):
        means = scores.groupby("token").mean()
        above.append(means.drop(columns="own").lt(means["own"], axis=0).all(axis=None))
    smaller = min((table["own"] > table["others"]).mean() for table in (picture, caption))
    statements = {
        "for every token own words score above every baseline": all(above),
        "most concepts beat other concepts' words": smaller > 0.5,
        "nearly all concepts are above random words by BERTScore": (
            caption["own"] > caption["random words"]
        ).mean()
        > 0.9,
        "some concepts are below other concepts' words": (picture["own"] < picture["others"]).mean()
        > 0.05,
        "true words get more than three times the score of concepts' words": exam.iloc[0, 0]
        > 3 * picture["own"].mean(),
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def of_dictionaries(compared: pd.DataFrame, top_1: pd.DataFrame) -> dict[str, bool]:
    """Check how dictionaries compare by score, by what belongs to a concept, and by overlap.

    Parameters
    ----------
    compared : pandas.DataFrame
        A row a dictionary, with what :func:`~xlvlms_tutorial.tutorials.grounding.distinctness`
        measures.
    top_1 : pandas.DataFrame
        The picture score of the top concept: a row a token, a column a dictionary.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> columns = ["own words", "word by word", "own share", "overlap"]
    >>> rows = {"simple": [0.3, 0.8, 0.2, 0.6], "k-means": [0.4, 0.9, 0.3, 0.6]}
    >>> rows["semi-nmf"] = [0.2, 0.7, 0.6, 0.2]
    >>> compared = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    >>> top_1 = pd.DataFrame({"simple": [0.3], "k-means": [0.5], "semi-nmf": [0.3]})
    >>> set(grounding_checks.of_dictionaries(compared, top_1).values())
    {True}
    """
    prototypes, semi = compared.loc[_PROTOTYPES], compared.loc["semi-nmf"]
    best = top_1[_PROTOTYPES].max(axis=1)
    shared = (prototypes["own share"] < 0.5) & (prototypes["overlap"] > 0.3)
    rises = compared["word by word"] > compared["own words"]
    ahead = prototypes["word by word"].min() > semi["word by word"]
    statements = {
        "k-means or Simple score higher for some tokens": (best > top_1["semi-nmf"] + 0.1).any(),
        "most of what k-means and Simple get, other lists of theirs get": shared.all(),
        "most of the score of Semi-NMF is the concept's own": semi["own share"] > 0.5,
        "word by word all scores rise and prototypes stay ahead": rises.all() and ahead,
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def of_truth(
    naming: pd.DataFrame, samples: Sequence[Sample], concepts: Concepts, people: Sequence[str]
) -> dict[str, bool]:
    """Check which factors the words of concepts name.

    Parameters
    ----------
    naming : pandas.DataFrame
        A row a token and factor: token, factor, own and others, as of
        :func:`~xlvlms_tutorial.tutorials.grounding.true_share`.
    samples : sequence of Sample
        The samples of one token.
    concepts : Concepts
        Its concepts.
    people : sequence of str
        The tokens that do something in their pictures.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> from xlvlms_tutorial.tutorials import grounding, grounding_checks
    >>> rows = [["woman", "action", 0.2, 0.1], ["woman", "time", 0.0, 0.0]]
    >>> rows.append(["key", "place", 0.1, 0.0])
    >>> naming = pd.DataFrame(rows, columns=["token", "factor", "own", "others"])
    >>> scenes, best = [Sample("scene", None, (), truth={"time": "night"})], np.array([[0]])
    >>> learnt = grounding.Concepts(KMeans(1), np.ones((1, 1)), {0: ["lady"]}, best)
    >>> set(grounding_checks.of_truth(naming, scenes, learnt, ["woman"]).values())
    {True}
    """
    gaps = naming.assign(gap=naming["own"] - naming["others"])
    leading = gaps.pivot(index="factor", columns="token", values="gap").idxmax()
    unnamed = []
    for concept, words in concepts.words.items():
        times = {str(samples[row].truth.get("time")) for row in concepts.rows[concept]}
        if len(times) == 1 and not any(names_value(word, *times) for word in words):
            unnamed.append(concept)
    of_time = naming.loc[naming["factor"] == "time", "own"]
    elsewhere = leading.drop(list(people), errors="ignore").isin(["place", "item", "colour"])
    statements = {
        "for people the action is named most": (leading.reindex(list(people)) == "action").all(),
        "the other tokens lean on places and things": elsewhere.all(),
        "hardly a word names the time of day": of_time.max() < 0.05,
        "some pictures share a time of day that no word names": len(unnamed) > 0,
        "most words are true of nothing in the picture": naming.groupby("token")["own"].sum().max()
        < 0.5,
    }
    return {statement: bool(holds) for statement, holds in statements.items()}


def of_readings(readings: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, bool]:
    """Check how many words are the same when the final norm is left out.

    Parameters
    ----------
    readings : mapping
        For "last layer" and "one block earlier": the words of one concept by each way of reading,
        as of :func:`~xlvlms_tutorial.tutorials.grounding_depth.three_readings`.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> names = ("with the norm", "without", "without, 3 dimensions off")
    >>> last = dict(zip(names, (["fall"], ["fall"], ["fall"])))
    >>> earlier = dict(zip(names, (["fall"], ["shall"], ["fall"])))
    >>> readings = {"last layer": last, "one block earlier": earlier}
    >>> set(grounding_checks.of_readings(readings).values())
    {True}
    """
    shares = {}
    for layer, words in readings.items():
        normed = set(words["with the norm"])
        for way in ("without", "without, 3 dimensions off"):
            shares[layer, way] = len(normed & set(words[way])) / len(normed)
    early = shares["one block earlier", "without"]
    quiet = shares["one block earlier", "without, 3 dimensions off"]
    return {
        "at the last layer both readings share most words": shares["last layer", "without"] > 0.5,
        "one block earlier they share few": early < 0.3,
        "without three dimensions the raw product has words back": quiet > early + 0.15,
    }


def of_depth(by_layer: pd.DataFrame, border: float) -> dict[str, bool]:
    """Check at which depth a factor is known, separated and readable.

    Parameters
    ----------
    by_layer : pandas.DataFrame
        A row a layer, with what :func:`~xlvlms_tutorial.tutorials.grounding_depth.depths_of_factor`
        measures.
    border : float
        The last layer that counts as early.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import grounding_checks
    >>> columns = ["known", "known, random blocks", "known, shuffled labels"]
    >>> columns += ["separated", "readable"]
    >>> rows = {5: [0.6, 0.8, 0.0, 0.1, 0.0], 30: [1.0, 0.7, 0.0, 0.6, 0.5]}
    >>> table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    >>> set(grounding_checks.of_depth(table, border=20).values())
    {True}
    """
    early = by_layer[by_layer.index <= border]
    late = by_layer[by_layer.index > border]
    trained, control = "known", "known, random blocks"
    statements = {
        "up to the border random blocks hold the action as well": (
            early[control] > early[trained] - 0.1
        ).all(),
        "after the border trained blocks hold it more plainly": (
            late[trained] > late[control] + 0.1
        ).all(),
        "with shuffled labels the probe finds nothing": by_layer["known, shuffled labels"].max()
        < 0.1,
        "the probe reads the action before there are words for it": early[trained].max() > 0.5
        and early["readable"].max() < 0.05,
        "the action decides the largest concept after the border": late["separated"].min()
        > early["separated"].max() + 0.1,
        "words do not catch up with the probe": late["readable"].max() < late[trained].min() - 0.2,
    }
    return {statement: bool(holds) for statement, holds in statements.items()}
