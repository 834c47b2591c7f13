"""Objects that a model reports and that are not there.

In its answers to presence questions (POPE) and in its captions (CHAIR).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.answers import group_labels, normalise, with_columns, yes_or_no
from xlvlms_tutorial.metrics.captions import separate
from xlvlms_tutorial.metrics.intervals import proportion
from xlvlms_tutorial.metrics.plain import require_estimate
from xlvlms_tutorial.text import composed, forms, whole_words
from xlvlms_tutorial.validation import require_same_length

# Right before another object's name these say of what kind it is, and name no person: a
# passenger jet, a baby elephant.
QUALIFIERS = frozenset({"adult", "baby", "passenger"})
# Double words that name another of the objects than their parts do, or none; and animals
# that a qualifier may stand before.
_DOUBLE = {
    "home plate": "",
    "train track": "",
    "toilet seat": "toilet",
    "bow tie": "tie",
    "animal": "",
    "cub": "",
}


def pope(table: pd.DataFrame, groups: ArrayLike | None = None, seed: int = 0) -> pd.DataFrame:
    """Score presence questions as POPE does, for each stratum of negatives and overall.

    Use it to see whether a model says yes to objects that are not there. An answer that is neither
    yes nor no is not a yes and is never correct, unlike in the authors' script, which reads every
    answer without "no" or "not" as yes. Correct answers count in any case ("Yes", "yes."). From
    "Evaluating Object Hallucination in Large Vision-Language Models" (Li et al. 2023, arXiv
    2305.10355). Precision, recall and F1 are those of the answer yes. Some code takes the F1 of
    "the prediction matches" instead, which is 2a / (1 + a) of the accuracy a and says nothing more.

    Parameters
    ----------
    table : pandas.DataFrame
        An :func:`~xlvlms_tutorial.metrics.answers.answer_table`; rows of type "presence" are
        scored.
    groups : array-like, optional
        One label a row of the table, usually the scene, which makes the intervals those of a
        cluster bootstrap. By default each answer is independent.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Rows by stratum, the last "overall". Columns accuracy and yes_ratio, and precision, recall
        and f1 of "yes" (NaN where undefined), each with _low and _high; unclear, the share of
        answers that are neither yes nor no; n.

    Raises
    ------
    InputError
        If the table has no presence question, lacks a column, or the correct answer of one is
        neither yes nor no. If ``groups`` has another length than the table.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> from xlvlms_tutorial.metrics import answer_table, pope
    >>> questions = [
    ...     Question("presence", "Is there a key?", answer, "key", "random")
    ...     for answer in ("yes", "no", "no", "yes")
    ... ]
    >>> scores = pope(answer_table(["Yes", "No.", "Yes.", "maybe"], questions))
    >>> scores.loc["random", ["accuracy", "precision", "recall", "unclear"]].tolist()
    [0.5, 0.5, 0.5, 0.25]
    """
    with_columns(table, ("type", "stratum", "answer", "prediction", "correct"))
    presence = (table["type"] == "presence").to_numpy(dtype=bool)
    require_estimate(
        presence.any(), "presence questions", "none", "a table with one presence question or more"
    )
    labels = group_labels(table, groups)[presence]
    rows = table[presence]
    answers = [normalise(str(answer)) for answer in rows["answer"]]
    rows = rows.assign(answer=answers)
    unexpected = sorted(set(rows["answer"]) - {"yes", "no"})
    require_estimate(
        not unexpected,
        "correct answers of presence questions",
        ", ".join(map(repr, unexpected)),
        "yes and no",
    )
    scores = {}
    for stratum in rows["stratum"].unique():
        if isinstance(stratum, str):
            part = (rows["stratum"] == stratum).to_numpy()
            scores[stratum] = _scores(rows[part], labels[part], seed)
    scores["overall"] = _scores(rows, labels, seed)
    return pd.DataFrame(list(scores.values()), index=pd.Index(scores, name="stratum"))


def _scores(rows: pd.DataFrame, labels: pd.Series, seed: int) -> dict[str, float]:
    """Score the answers to one stratum of presence questions."""
    answers = rows["prediction"].map(yes_or_no)
    yes = (answers == "yes").to_numpy()
    present = (rows["answer"] == "yes").to_numpy()
    hits = yes & present
    labels = labels.to_numpy()
    # 2 hits / (said yes + is yes): the share of hits among both, a row in both counting twice
    twice = yes.astype(int) + present.astype(int)
    scores = _with_interval("accuracy", rows["correct"].to_numpy(), labels, seed)
    scores |= _with_interval("precision", hits[yes], labels[yes], seed)
    scores |= _with_interval("recall", hits[present], labels[present], seed)
    scores |= _with_interval("f1", hits.repeat(twice), labels.repeat(twice), seed)
    scores |= _with_interval("yes_ratio", yes, labels, seed)
    scores["unclear"] = float(answers.isna().mean())
    scores["n"] = len(rows)
    return scores


def _with_interval(
    name: str, successes: np.ndarray, labels: np.ndarray, seed: int
) -> dict[str, float]:
    """Return a share and the ends of its interval, under names; NaN where nothing is counted."""
    if not len(successes):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    share = proportion(successes, labels, seed=seed)
    return {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}


def chair(
    captions: Sequence[str],
    present: Sequence[Collection[str]],
    vocabulary: Sequence[str] | Mapping[str, Sequence[str]],
    seed: int = 0,
) -> pd.DataFrame:
    """Measure objects that captions name although they are not in the picture (CHAIR).

    CHAIR_i is the share of named objects that are absent, CHAIR_s the share of captions that name
    an absent object. From "Object Hallucination in Image Captioning" (Rohrbach et al. 2018, arXiv
    1809.02156).

    As in the authors' code the longest name wins: a hot dog is no dog, a passenger jet or a baby
    elephant (``QUALIFIERS``) names no person, a toilet seat is a toilet, home plates and train
    tracks are nothing. Unlike it, an object counts once a caption, not once a mention, and plurals
    are those of :func:`~xlvlms_tutorial.text.forms`, where theirs make "bu" of "bus".

    Parameters
    ----------
    captions : sequence of str
        One caption a picture.
    present : sequence of collection of str
        The objects that are in each picture, by their names in the vocabulary.
    vocabulary : sequence of str, or mapping of str to sequence of str
        The objects that count, or each with its synonyms.
    seed : int, default 0
        Of the bootstrap over captions.

    Returns
    -------
    pandas.DataFrame
        Rows CHAIR_i (n objects, each counted once a caption) and CHAIR_s (n captions); columns
        value, low, high, n. Where no caption names an object, CHAIR_i is undefined: NaN with n = 0.

    Raises
    ------
    InputError
        If there are no captions, or an object present is not in the vocabulary. If there are not as
        many sets of objects as captions. If the vocabulary has something that is no word, or an
        object's name is in a caption without spaces (in Chinese, for one).

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import chair
    >>> table = chair(["a dog and a cat", "two dogs"], [{"dog"}, {"dog"}], ["dog", "cat"])
    >>> table["value"].round(2).to_dict()
    {'CHAIR_i': 0.33, 'CHAIR_s': 0.5}
    """
    require_same_length(captions=captions, present=present)
    words = _vocabulary(vocabulary)
    unknown = sorted(set().union(*present) - set(words))
    require_estimate(
        not unknown,
        "objects present",
        ", ".join(unknown),
        "words of the vocabulary, or the vocabulary widened by these",
    )
    named = list(map(_reader(words), captions))
    counts = []
    for named_objects, present_objects in zip(named, present, strict=True):
        n_absent = len(named_objects - set(present_objects))
        counts.append((n_absent, len(named_objects)))
    hallucinated = [n_absent > 0 for n_absent, _ in counts]
    by_object = _chair_i(np.array(counts), seed)
    by_caption = proportion(hallucinated).asdict()
    names = pd.Index(["CHAIR_i", "CHAIR_s"], name="metric")
    return pd.DataFrame([by_object, by_caption], index=names)


def _vocabulary(vocabulary: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return each object with all its names."""
    problem = InputError(
        "no objects in the vocabulary, or a name that is no word",
        "give a list of names, or lists of synonyms by name",
    )
    if isinstance(vocabulary, str):
        raise problem
    if not isinstance(vocabulary, Mapping):
        vocabulary = dict.fromkeys(vocabulary, ())
    if not vocabulary:
        raise problem
    objects = {}
    for word, synonyms in vocabulary.items():
        if isinstance(synonyms, str):
            raise problem
        objects[word] = [word, *synonyms]
        for name in objects[word]:
            if not isinstance(name, str) or not name.strip():
                raise problem
    return objects


def _reader(words: Mapping[str, Sequence[str]]) -> Callable[[str], set[str]]:
    """Make a function that finds the objects a caption names: the longest name wins."""
    objects = defaultdict(set)
    for word, names in words.items():
        for name in names:
            for form in forms(" ".join(name.split())):
                objects[form].add(word)
    for double, part in _DOUBLE.items():
        for form in set(forms(double)) - set(objects):
            objects[form] = objects.get(part, set())
    names = whole_words(objects, any_case=False)
    kinds = re.compile(rf"{whole_words(QUALIFIERS).pattern}\s+(?={names.pattern})")

    def named(caption: str) -> set[str]:
        caption = composed(caption)
        separate(caption, objects)
        result = set()
        for mention in names.findall(kinds.sub("", caption)):
            form = " ".join(mention.split())
            result |= objects[form]
        return result

    return named


def _chair_i(counts: np.ndarray, seed: int) -> dict[str, float]:
    """Estimate the share of objects named that are not there, by captions."""
    if counts.size == 0 or counts[:, 1].sum() == 0:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    mentions = []
    for absent, total in counts:
        mentions += [True] * absent + [False] * (total - absent)
    caption_of_each = np.repeat(np.arange(len(counts)), counts[:, 1])
    return proportion(mentions, caption_of_each, seed=seed).asdict()
