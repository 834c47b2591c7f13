"""Write what can be said about a postcard: captions, and questions with their answers.

The words are the second world's own; no template is one of
:mod:`xlvlms_tutorial.pocket.language`.
"""

from collections.abc import Sequence

import numpy as np

from xlvlms_tutorial.pocket.postcards import (
    CREATURES,
    FIGURE_SHARE,
    FIGURES,
    HUE_WEIGHT,
    HUELESS,
    HUES,
    ITEMS,
    SUBJECTS,
    Postcard,
)
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import NUMBER_WORDS, forms

OBJECTS = (*SUBJECTS, *ITEMS)
STRATA = ("random", "popular", "adversarial")
POPULAR = 6  # of the most frequent objects, those that the stratum "popular" draws from

_VERB = {
    "standing": "stands",
    "walking": "walks",
    "jumping": "jumps",
    "falling": "falls",
    "climbing": "climbs",
    None: "stays",
}
_PRESENCE = ("Can you see {a}?", "Is there {a} on this postcard?", "Does the image contain {a}?")
_WORDINGS = {
    "colour": (
        "What is the colour of the {things}?",
        "Of which colour {are} the {things}?",
        "Which colour was chosen for the {things}?",
    ),
    "place": (
        "What type of ground is under the {subject}?",
        "On what sort of ground is the {subject}?",
        "Which ground can be seen on this postcard?",
    ),
    "action": (
        "What can the {subject} be seen doing?",
        "Which action is the {subject} performing?",
        "What is this {subject} busy doing?",
    ),
    "side": (
        "{Are} the {things} left or right of the {subject}?",
        "To which side of the {subject} {are} the {things}?",
        "Which side of the postcard shows the {things}?",
    ),
    "count": (
        "What is the number of {plural}?",
        "How many {plural} can be counted?",
        "How many {plural} does the postcard show?",
    ),
}


def captions(card: Postcard) -> list[str]:
    """Write six reference captions of a postcard, each of which names every factor.

    Parameters
    ----------
    card : Postcard
        The postcard.

    Returns
    -------
    list of str
        The captions.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket.postcard_texts import captions
    >>> from xlvlms_tutorial.pocket.postcards import Postcard
    >>> captions(Postcard("frog", None, "key", "red", 2, "left", "sand", "dusk"))[0]
    'Greetings from the sand: a frog, and two red keys further left, one dusk.'
    """
    who, what = _one(card.subject), _things(card)
    place, time, side = card.place, card.time, card.side
    doing = f" {card.action}" if card.action else ""
    does = _VERB[card.action]
    are = "is" if card.count == 1 else "are"
    lines = (
        f"greetings from the {place}: {who}{doing}, and {what} further {side}, one {time}.",
        f"this postcard has {what} {side} of {who}{doing} over {place}; it is {time}.",
        f"{who} {does} with {place} underfoot, {what} to the {side}, in a {time} view.",
        f"a {time} postcard of {place} where {who} {does} and {what} {are} {side} of it.",
        f"seen from the front, {what} on the {side} and {who}{doing}, {place} below, {time} above.",
        f"look {side} for {what}: {who} {does} elsewhere on this {place}, and it is {time}.",
    )
    return [line[0].upper() + line[1:] for line in lines]


def popularity() -> dict[str, float]:
    """Compute the expected share of postcards that show each kind of object.

    Returns
    -------
    dict of str to float
        By the names of the kinds.
    """
    shares = dict.fromkeys(FIGURES, FIGURE_SHARE / len(FIGURES))
    shares |= dict.fromkeys(CREATURES, (1 - FIGURE_SHARE) / len(CREATURES))
    total = HUE_WEIGHT * len(HUES) + len(HUELESS)
    for item in ITEMS:
        shares[item] = (HUE_WEIGHT if item in HUES else 1.0) / total
    return shares


def absent(card: Postcard, stratum: str) -> list[str]:
    """List the objects that a presence question with the answer no may name.

    All that are absent ("random"), the most frequent of them ("popular"), or those of the families
    of what is there ("adversarial"): another creature beside a creature, another coloured thing
    beside a coloured one.

    Parameters
    ----------
    card : Postcard
        The postcard.
    stratum : {"random", "popular", "adversarial"}
        How hard the question is meant to be.

    Returns
    -------
    list of str
        The names of absent objects.
    """
    missing = [kind for kind in OBJECTS if kind not in card.objects]
    if stratum == "popular":
        return sorted(missing, key=popularity().get, reverse=True)[:POPULAR]
    if stratum == "adversarial":
        kin = [
            *(FIGURES if card.subject in FIGURES else CREATURES),
            *(HUES if card.item in HUES else HUELESS),
        ]
        return [kind for kind in missing if kind in kin]
    return missing


def questions(card: Postcard, seed: int = 0) -> list[Question]:
    """Write the questions that a postcard can answer, of the types that scenes have.

    One a type, of presence one a stratum, whose answer is yes as often as no.

    Parameters
    ----------
    card : Postcard
        The postcard.
    seed : int, default 0
        Seed of the wording, and of what presence questions are about.

    Returns
    -------
    list of Question
        The questions with their answers.
    """
    rng = np.random.default_rng([card.layout, seed, 3])

    def one_of(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    single = card.count == 1
    words = {
        "subject": card.subject,
        "things": card.item if single else _many(card.item),
        "plural": _many(card.item),
        "are": "is" if single else "are",
        "Are": "Is" if single else "Are",
    }
    answers = {
        "colour": (card.item, card.colour),
        "place": (card.subject, card.place),
        "action": (card.subject, card.action),
        "side": (card.item, card.side),
        "count": (card.item, NUMBER_WORDS[card.count]),
    }
    result = []
    for kind, (target, answer) in answers.items():
        text = one_of(_WORDINGS[kind]).format(**words)
        if answer is not None:
            result.append(Question(kind, text, answer, target))
    for stratum in STRATA:
        present = rng.random() < 0.5
        target = one_of(card.objects if present else absent(card, stratum))
        text = one_of(_PRESENCE).format(a=_one(target))
        result.append(Question("presence", text, "yes" if present else "no", target, stratum))
    return result


def _one(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _many(noun: str) -> str:
    return forms(noun)[1]


def _things(card: Postcard) -> str:
    """The things with number and colour: "two red keys", "a cactus"."""
    noun = card.item if card.count == 1 else _many(card.item)
    if card.colour:
        noun = f"{card.colour} {noun}"
    return _one(noun) if card.count == 1 else f"{NUMBER_WORDS[card.count]} {noun}"
