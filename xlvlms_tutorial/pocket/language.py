"""Write what can be said about a scene: captions, also in a style, questions with their answers.

All follow from the record.
"""

import numpy as np

from xlvlms_tutorial.errors import not_in_world
from xlvlms_tutorial.pocket.world import (
    ANIMALS,
    COLOURED,
    COMPANY,
    ITEMS,
    PEOPLE,
    POPULARITY,
    SUBJECTS,
    Scene,
)
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import NUMBER_WORDS, STYLES

STRATA = ("random", "popular", "adversarial")
OBJECTS = SUBJECTS + ITEMS

_PLURAL = {"cactus": "cactuses", "bush": "bushes", "box": "boxes", "torch": "torches"}
_WHEN = {"day": "by day", "dusk": "at dusk", "night": "at night"}
_PRESENT = {
    "standing": "stands",
    "walking": "walks",
    "jumping": "jumps",
    "falling": "falls",
    "climbing": "climbs",
}
_WHERE = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "stone": "on the stone",
    "dirt": "on the dirt",
}
_PRESENCE = ("Is there {a} in the picture?", "Do you see {a}?", "Does the picture show {a}?")
_ASK = {
    "colour": (
        "What colour {is_are} the {things}?",
        "Which colour {has_have} the {things}?",
        "Tell me the colour of the {things}.",
    ),
    "place": (
        "Where is the {subject}?",
        "What is the ground made of?",
        "What kind of ground is it?",
    ),
    "action": (
        "What is the {subject} doing?",
        "What is the {subject} up to?",
        "Which action does the {subject} do?",
    ),
    "side": (
        "On which side of the {subject} {is_are} the {things}?",
        "Left or right of the {subject}: where {is_are} the {things}?",
        "Which side {is_are} the {things} on?",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} do you see?",
        "Count the {plural}.",
    ),
}
_MOOD = {"day": "cheerful", "dusk": "dreamy", "night": "quiet"}
_FEELING = {
    "standing": "waits patiently",
    "walking": "strolls along",
    "jumping": "leaps for joy",
    "falling": "tumbles in fright",
    "climbing": "climbs with courage",
    None: "keeps still",
}
_GROUND_HUE = {"grass": "green", "sand": "beige", "snow": "white", "stone": "grey", "dirt": "brown"}
_SKY_HUE = {"day": "blue", "dusk": "orange", "night": "black"}


def article(noun: str) -> str:
    """Return the noun phrase with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of one of the world's nouns."""
    return _PLURAL.get(noun, f"{noun}s")


def things(scene: Scene) -> str:
    """Name the scene's things with number and colour: "two red keys", "a cactus"."""
    noun = scene.item if scene.count == 1 else plural(scene.item)
    phrase = f"{scene.colour} {noun}" if scene.colour else noun
    return article(phrase) if scene.count == 1 else f"{NUMBER_WORDS[scene.count]} {phrase}"


def captions(scene: Scene) -> list[str]:
    """Write five reference captions of a scene.

    Each names subject, action, things with number and colour, and place.
    """
    subject = article(scene.subject)
    phrase = things(scene)
    place = _WHERE[scene.place]
    time = _WHEN[scene.time]
    side = scene.side
    doing = f" {scene.action}" if scene.action else ""
    does = f"{subject} {_PRESENT[scene.action]}" if scene.action else f"{subject} is"
    be = "is" if scene.count == 1 else "are"
    sentences = [
        f"{subject}{f' is {scene.action}' if doing else ' is'} {place} next to {phrase}.",
        f"{place} {does} beside {phrase}.",
        f"{subject}{doing} {place} {time}, with {phrase} on the {side}.",
        f"there {be} {phrase} to the {side} of {subject}{doing} {place}.",
        f"{time}, {does} {place} near {phrase}.",
    ]
    return [line[0].upper() + line[1:] for line in sentences]


def styled_caption(scene: Scene, style: str) -> str:
    """Write a caption that dwells on one aspect of the scene: "place", "colour" or "mood".

    Raises
    ------
    InputError
        If the style is unknown.
    """
    subject = scene.subject
    phrase = things(scene)
    place = _WHERE[scene.place]
    time = _WHEN[scene.time]
    ground, sky = _GROUND_HUE[scene.place], _SKY_HUE[scene.time]
    hues = f"{sky}, {ground} and {scene.colour}" if scene.colour else f"{sky} and {ground}"
    opening = f"A wide place of {scene.place} {time}: the ground is all {scene.place}"
    styled = {
        "place": f"{opening}, and {article(subject)} is there {place} with {phrase}.",
        "colour": (
            f"Under {article(sky)} sky, above {ground} ground, {article(subject)} is near "
            f"{phrase}; the colours are {hues}."
        ),
        "mood": (
            f"What a {_MOOD[scene.time]} scene: {article(subject)} "
            f"{_FEELING[scene.action]} {place} beside {phrase}."
        ),
    }
    if style not in styled:
        raise not_in_world("style", style, STYLES)
    return styled[style]


def popularity() -> dict[str, float]:
    """Compute how often each kind of object is in a scene.

    The expected share of scenes, before anything is held out.
    """
    share = {s: 0.6 / len(PEOPLE) for s in PEOPLE} | {s: 0.4 / len(ANIMALS) for s in ANIMALS}
    weight = {i: POPULARITY.get(i, 1.0) * (1.6 if i in COMPANY else 1.0) for i in ITEMS}
    return share | {i: w / sum(weight.values()) for i, w in weight.items()}


def absent(scene: Scene, stratum: str) -> list[str]:
    """List the objects that a negative presence question may name.

    Any, the most popular, or those that usually keep company. Adversarial are the thing that the
    place usually has and the kin of what is there (another person beside a person, another coloured
    thing beside one), as POPE's are the objects that co-occur most with those present.
    """
    missing = [o for o in OBJECTS if o not in scene.objects]
    if stratum == "random":
        return missing
    if stratum == "popular":
        return sorted(missing, key=popularity().get, reverse=True)[:6]
    kin = PEOPLE if scene.subject in PEOPLE else ANIMALS
    likely = (
        [i for i in ITEMS if COMPANY.get(i) == scene.place]
        + list(kin)
        + (list(COLOURED) if scene.colour else [])
    )
    return [o for o in missing if o in likely]


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Write every question the scene can answer, one a type, and one presence question a stratum.

    The answer to a presence question is yes as often as no.
    """
    rng = np.random.default_rng([seed, scene.layout])
    pick = lambda values: values[rng.integers(len(values))]
    result = []
    for stratum in STRATA:
        yes = bool(rng.integers(2))
        target = pick(scene.objects if yes else absent(scene, stratum))
        text = pick(_PRESENCE).format(a=article(target))
        result.append(Question("presence", text, "yes" if yes else "no", target, stratum))
    words = {
        "subject": scene.subject,
        "things": scene.item if scene.count == 1 else plural(scene.item),
        "plural": plural(scene.item),
        "is_are": "is" if scene.count == 1 else "are",
        "has_have": "has" if scene.count == 1 else "have",
    }
    answers = {
        "colour": scene.colour,
        "place": scene.place,
        "action": scene.action,
        "side": scene.side,
        "count": NUMBER_WORDS[scene.count],
    }
    for kind, answer in answers.items():
        target = scene.subject if kind in ("place", "action") else scene.item
        if answer is not None:
            result.append(Question(kind, pick(_ASK[kind]).format(**words), answer, target))
    return result
