"""Objects that a model sees and that are not there.

Asked for (POPE) and told of unasked (CHAIR).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from xlvlms_tutorial.errors import EstimateError, LengthError, WordListError
from xlvlms_tutorial.metrics.answers import group_labels, normalise, with_columns, yes_or_no
from xlvlms_tutorial.metrics.captions import separate
from xlvlms_tutorial.metrics.intervals import proportion, share
from xlvlms_tutorial.text import composed, forms, whole_words

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
    """Presence questions scored as by POPE, for each stratum of negatives and overall.

    Li et al. 2023, arXiv 2305.10355. Takes an
    :func:`~xlvlms_tutorial.metrics.answers.answer_table`. Columns: accuracy and yes_ratio, each
    with _low and _high; precision, recall and f1 of "yes" (NaN where undefined); unclear, the share
    of answers that are neither yes nor no; n. Unlike the authors' script, which reads every answer
    without "no" or "not" as yes, an unclear answer is not a yes and is never correct. Correct
    answers count in any case ("Yes", "yes.").

    Raises
    ------
    EstimateError
        If the table has no presence question, lacks a column, or the correct
        answer of one is neither yes nor no.
    LengthError
        If ``groups`` (one label a row of the table) has another length.
    """
    with_columns(table, ("type", "stratum", "answer", "prediction", "correct"))
    asked = (table["type"] == "presence").to_numpy() if len(table) else np.zeros(0, bool)
    if not asked.any():
        raise EstimateError(
            "presence questions", "none", "a table with one presence question or more"
        )
    labels, rows = group_labels(table, groups)[asked], table[asked]
    rows = rows.assign(answer=[normalise(str(answer)) for answer in rows["answer"]])
    if strange := set(rows["answer"]) - {"yes", "no"}:
        raise EstimateError(
            "correct answers of presence questions",
            ", ".join(map(repr, sorted(strange))),
            "yes and no",
        )
    strata = [s for s in rows["stratum"].unique() if isinstance(s, str)]
    parts = {s: (rows["stratum"] == s).to_numpy() for s in strata} | {"overall": slice(None)}
    scores = {name: _scores(rows[part], labels[part], seed) for name, part in parts.items()}
    return pd.DataFrame(list(scores.values()), index=pd.Index(scores, name="stratum"))


def _scores(rows: pd.DataFrame, labels: pd.Series, seed: int) -> dict[str, float]:
    told = rows["prediction"].map(yes_or_no)
    yes, present = (told == "yes").to_numpy(), (rows["answer"] == "yes").to_numpy()
    hits, said, there = (int(which.sum()) for which in (yes & present, yes, present))
    accuracy, ratio = (
        share(rows["correct"].to_numpy(), labels, seed=seed),
        share(yes, labels, seed=seed),
    )
    return {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "precision": _ratio(hits, said),
        "recall": _ratio(hits, there),
        "f1": _ratio(2 * hits, said + there),
        "yes_ratio": ratio.value,
        "yes_ratio_low": ratio.low,
        "yes_ratio_high": ratio.high,
        "unclear": float(told.isna().mean()),
        "n": len(rows),
    }


def chair(
    captions: Sequence[str],
    present: Sequence[Collection[str]],
    vocabulary: Sequence[str] | Mapping[str, Sequence[str]],
    seed: int = 0,
) -> pd.DataFrame:
    """Hallucinated objects in captions (Rohrbach et al. 2018, arXiv 1809.02156).

    Rows CHAIR_i and CHAIR_s; value, low, high, n. CHAIR_i is the share of named objects that are
    absent (n objects, each counted once a caption), CHAIR_s the share of captions that name an
    absent object (n captions). ``vocabulary`` lists the objects that count, or maps each to its
    synonyms. Where no caption names an object, CHAIR_i is undefined: NaN with n = 0.

    As in the authors' code the longest name wins: a hot dog is no dog, a passenger jet or a baby
    elephant (``QUALIFIERS``) names no person, a toilet seat is a toilet, home plates and train
    tracks are nothing. Unlike it, an object counts once a caption, not once a mention, and plurals
    are those of :func:`~xlvlms_tutorial.text.forms`, where theirs make "bu" of "bus".

    Raises
    ------
    EstimateError
        If there are no captions, or an object present is not in the vocabulary.
    LengthError
        If there are not as many sets of objects as captions.
    WordListError
        If the vocabulary has something that is no word, or an object's name is in a caption
        without spaces (in Chinese, for one).
    """
    if len(captions) != len(present):
        raise LengthError(captions=len(captions), present=len(present))
    words = _vocabulary(vocabulary)
    unknown = sorted(set().union(*present) - set(words))
    if unknown:
        raise EstimateError(
            "objects present",
            ", ".join(unknown),
            "words of the vocabulary, or the vocabulary widened by these",
        )
    named = list(map(_reader(words), captions))
    absent = [
        (len(objects - set(there)), len(objects))
        for objects, there in zip(named, present, strict=True)
    ]
    rows = {
        "CHAIR_i": _chair_i(np.array(absent), seed),
        "CHAIR_s": proportion([wrong > 0 for wrong, _ in absent]).asdict(),
    }
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="metric"))


def _vocabulary(given: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each object with all its names."""
    words = (
        given
        if isinstance(given, Mapping)
        else {}
        if isinstance(given, str)
        else dict.fromkeys(given, ())
    )
    listed = {
        word: [word, *([None] if isinstance(others, str) else others)]
        for word, others in words.items()
    }
    if not listed or not all(
        isinstance(name, str) and name.strip() for names in listed.values() for name in names
    ):
        raise WordListError(
            "no objects in the vocabulary, or a name that is no word",
            "give a list of names, or lists of synonyms by name",
        )
    return listed


def _reader(words: Mapping[str, Sequence[str]]) -> Callable[[str], set[str]]:
    """What finds the objects that a caption names: the longest name wins."""
    known = defaultdict(set)
    for word, names in words.items():
        for form in (form for name in names for form in forms(" ".join(name.split()))):
            known[form].add(word)
    for double, part in _DOUBLE.items():
        for form in set(forms(double)) - set(known):
            known[form] = known.get(part, set())
    names = whole_words(known, any_case=False)
    kinds = re.compile(rf"{whole_words(QUALIFIERS).pattern}\s+(?={names.pattern})")

    def named(caption: str) -> set[str]:
        caption = composed(caption)
        separate(caption, known)
        return set().union(
            *(known[" ".join(told.split())] for told in names.findall(kinds.sub("", caption)))
        )

    return named


def _chair_i(counts: np.ndarray, seed: int) -> dict[str, float]:
    if counts.size == 0 or counts[:, 1].sum() == 0:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    mentions = np.concatenate([[True] * bad + [False] * (total - bad) for bad, total in counts])
    return share(mentions, np.repeat(np.arange(len(counts)), counts[:, 1]), seed=seed).asdict()


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else np.nan
