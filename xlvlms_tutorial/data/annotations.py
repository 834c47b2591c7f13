"""What annotators say of a photograph, as samples.

Facts and questions of the kinds that the embedded world has.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from heapq import nsmallest
from itertools import chain
from math import isfinite

import numpy as np
from jaxtyping import Bool
from PIL import Image
from scipy.sparse import csr_matrix

from xlvlms_tutorial.samples import Question, Sample, as_image
from xlvlms_tutorial.text import NUMBER_WORDS, STYLE_WORDS, forms, whole_words, words

FACTORS = ("subject", "action", "item", "colour", "count", "side", "place", "time")
STRATA = ("random", "popular", "adversarial")
# how many of the most likely absent objects a popular or adversarial question is drawn from
NEAREST = 6
# The 80 kinds of COCO, for captions that come without a list of kinds
OBJECTS = tuple(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
    """.strip()
    .replace("\n    ", " ")
    .split(", ")
)
_SYNONYMS = {
    "person": "man woman boy girl child kid lady guy skier surfer player",
    "bicycle": "bike",
    "motorcycle": "motorbike",
    "airplane": "plane",
    "couch": "sofa",
    "tv": "television",
    "cell phone": "phone",
    "refrigerator": "fridge",
    "donut": "doughnut",
}
_PLURALS = {"knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
_ACTIONS = """
    standing walking jumping falling climbing sitting riding eating playing running holding lying
    laying sleeping skiing surfing skateboarding snowboarding swimming flying driving grazing
    looking reading cooking cutting drinking talking posing hitting swinging throwing catching
    carrying wearing working resting hanging leaning parking parked
"""
_TIMES = "day daytime dusk night nighttime dawn morning noon afternoon evening sunset sunrise"
# they name no place of their own
_VAGUE = {
    "place",
    "ground",
    "inside",
    "outside",
    "indoors",
    "outdoors",
    "open",
    "wide",
    "background",
}
_LISTS = {
    "action": frozenset(_ACTIONS.split()),
    "place": frozenset(STYLE_WORDS["place"] - _VAGUE),
    "time": frozenset(_TIMES.split()),
}
_HUES = frozenset(
    STYLE_WORDS["colour"]
    - {"colour", "color", "coloured", "colored", "colourful", "colorful", "hue", "shade", "tint"}
)
_WORDING = (
    # the first of them: from each to the end would cost quadratic time
    ("colour", r"^(?>.*?\b(what|which|tell)\b).*\bcolou?rs?\b"),
    ("count", r"\bhow many\b|^count\b|\bnumber of\b"),
    ("action", r"\bdoing\b|\bup to$|\bwhich action\b"),
    ("side", r"\b(which|what) side\b|\bleft or right\b|\bright or left\b"),
    (
        "place",
        (
            r"^where\b|\b(what|which) (kind |type |sort )?(of "
            r")?(place|room|ground|location)\b|\bground made of\b"
        ),
    ),
    (
        "presence",
        (
            r"^(is|are) there\b|^do you see\b|^can you see\b|^does the "
            r"(picture|image|photo) (show|contain|have)\b"
        ),
    ),
)


@dataclass
class Record:
    """Hold all that files say of one picture.

    Captions, boxes as (kind, x, y, width, height) in pixels, questions, facts.
    """

    id: str
    source: object = None
    captions: list[str] = field(default_factory=list)
    # None where nobody drew any, [] where there is nothing to draw
    boxes: list[tuple[str, float, float, float, float]] | None = None
    questions: list[Question] = field(default_factory=list)
    truth: dict[str, object] = field(default_factory=dict)
    split: str | None = None
    width: float | None = None
    # kinds of which a box holds more than one, so that boxes are no count
    crowds: set[str] = field(default_factory=set)


def question_type(text: str, answer: str = "") -> str:
    """Return the type of a question by its wording.

    One of the world's types, else "yes/no" by its answer, else "other".
    """
    plain = " ".join(words(text))
    kind = _worded_type(plain)
    closed = answer.strip().lower().rstrip(".") in ("yes", "no")
    if kind == "presence" and not closed and answer:
        return "other"
    return "yes/no" if closed and kind != "presence" else kind


def _worded_type(plain: str) -> str:
    """Return the first type whose wording fits a text, else "other"."""
    for kind, pattern in _WORDING:
        if re.search(pattern, plain):
            return kind
    return "other"


def answer_text(answer: object) -> str | None:
    """Convert an answer to text: a number to digits.

    Of several (plain, or records with "answer") the most frequent; None where there is none.
    """
    if isinstance(answer, list):
        counts = Counter()
        for entry in answer:
            if isinstance(entry, list):
                continue
            text = answer_text(entry.get("answer") if isinstance(entry, dict) else entry)
            if text:
                counts[text] += 1
        return counts.most_common(1)[0][0] if counts else None
    # as tables write whole numbers where some are missing
    if isinstance(answer, float) and isfinite(answer):
        return str(int(answer) if answer.is_integer() else answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    return answer if isinstance(answer, str) and answer.strip() else None


def samples_of(
    records: Sequence[Record], selected: Iterable[Record], names: Sequence[str] = (), seed: int = 0
) -> list[Sample]:
    """Make samples of records, with the world's factors as truth and questions of its types.

    The largest object (by the area of all its boxes) is the subject, the next the item; without
    boxes, the first two that captions name. The colour is the word before the item in a caption;
    action, place and time are the first word of a list in the captions. A factor of which nothing
    is said is None. Made questions only fill what a record does not ask already.

    Parameters
    ----------
    records : sequence of Record
        The whole set, by which objects are popular or keep company (POPE, Li et al.
        2023, arXiv 2305.10355).
    selected : iterable of Record
        The records that become samples.
    names : sequence of str, default ()
        The kinds of objects; by default those of COCO.
    seed : int, default 0
        Of the objects that presence questions ask for.

    Returns
    -------
    list of Sample
        One for each record that was selected.
    """
    names = tuple(names) or OBJECTS
    find = _finder(names)
    place = {name: k for k, name in enumerate(names)}
    objects = {record.id: _objects(record, find) for record in records}
    counts = Counter()
    for kinds in objects.values():
        counts.update(kinds)
    table = _table(objects.values(), place)
    pictures_of_kind = table.T.tocsr()
    company = lambda present: present @ pictures_of_kind @ table
    samples = []
    for record in selected:
        kinds = objects[record.id]
        truth = _truth(record, kinds)
        rng = np.random.default_rng([seed, *record.id.encode("utf-8", "surrogatepass")])
        questions = list(record.questions)
        types = {(question.type, question.stratum) for question in questions}
        proposed = _presence(record, kinds, place, counts, company, rng) + _facts(record, truth)
        for question in proposed:
            if (question.type, question.stratum) not in types:
                questions.append(question)
        captions = tuple(record.captions)
        truth = truth | record.truth
        regions = partial(_masks, record) if record.boxes else None
        samples.append(
            Sample(record.id, record.source, captions, tuple(questions), truth, regions=regions)
        )
    return samples


def _masks(record: Record) -> dict[str, Bool[np.ndarray, "height width"]]:
    """The pixels inside the boxes of each kind of object."""
    picture = Sample(record.id, record.source).image
    masks = {}
    for name, x, y, width, height in record.boxes:
        mask = masks.setdefault(name, np.zeros((picture.height, picture.width), dtype=bool))
        rows = slice(max(0, round(y)), max(0, round(y + height)))
        mask[rows, max(0, round(x)) : max(0, round(x + width))] = True
    return masks


def objects_in(text: str, names: Sequence[str] = OBJECTS) -> list[str]:
    """List the kinds of objects that a text names, in the order of their first mention.

    Whole words, in singular or plural.
    """
    return _finder(tuple(names) or OBJECTS)(text)


def plural(noun: str) -> str:
    """Return the plural of a noun: "knives", "people", "traffic lights"."""
    head, _, last = noun.rpartition(" ")
    if head:
        return f"{head} {plural(last)}"
    return _PLURALS.get(noun) or forms(noun)[1]


@lru_cache
def _finder(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    kinds = {}
    for name in names:
        for synonym in _SYNONYMS.get(name, "").split():
            kinds[synonym] = kinds[plural(synonym)] = name
    # a kind's own name goes before another's synonym
    for name in names:
        for form in (name, plural(name)):
            kinds[" ".join(form.lower().split())] = name
    pattern = whole_words(kinds, any_case=False)

    def find(text: str) -> list[str]:
        named = {}  # a dict keeps the order of first mentions
        for mention in pattern.findall(text.lower()):
            form = " ".join(mention.split())
            named[kinds[form]] = None
        return list(named)

    return find


def _objects(record: Record, find: Callable[[str], list[str]]) -> list[str]:
    """List the kinds of objects in a picture.

    Those with boxes, the largest first, else those in captions, the first first.
    """
    if record.boxes is None:
        return find(" . ".join(record.captions))
    area = Counter()
    for name, _, _, width, height in record.boxes:
        area[name] += width * height
    return sorted(area, key=lambda name: (-area[name], name))


def _truth(record: Record, objects: list[str]) -> dict[str, object]:
    """Return the factors of the world that the captions and boxes of a record tell of."""
    subject, item = (*objects, None, None)[:2]
    captions = [words(caption) for caption in record.captions]
    truth = {
        "subject": subject,
        "item": item,
        "colour": _colour(captions, item or subject),
        "count": _count(record, item),
        "side": _side(record, _boxes_of(record, item)),
    }
    for factor, vocabulary in _LISTS.items():
        truth[factor] = _first_of(vocabulary, captions)
    return {factor: truth[factor] for factor in FACTORS}


def _first_of(vocabulary: frozenset[str], captions: list[list[str]]) -> str | None:
    for word in chain.from_iterable(captions):
        if word in vocabulary:
            return word
    return None


def _boxes_of(record: Record, noun: str | None) -> list[tuple]:
    return [box for box in record.boxes or () if box[0] == noun]


def _count(record: Record, noun: str | None) -> int | None:
    if noun in record.crowds:
        return None
    return len(_boxes_of(record, noun)) or None


def _colour(captions: list[list[str]], noun: str | None) -> str | None:
    """Return the colour that stands right before a noun or its synonyms in a caption."""
    if noun is None:
        return None
    phrases = set()
    for name in (noun, *_SYNONYMS.get(noun, "").split()):
        for form in (name, plural(name)):
            phrases.add(tuple(form.lower().split()))
    for caption in captions:
        for k, word in enumerate(caption, 1):
            if word in _HUES and _begins(caption[k:], phrases):
                return word
    return None


def _begins(text: list[str], phrases: Iterable[tuple[str, ...]]) -> bool:
    """Return whether a text begins with one of some phrases, all of them as words."""
    return any(tuple(text[: len(phrase)]) == phrase for phrase in phrases)


def _side(record: Record, boxes: list[tuple]) -> str | None:
    """Return the side of the picture on which the middle of some boxes is."""
    if not boxes:
        return None
    width = record.width or _open(record).width
    middles = [x + box_width / 2 for _, x, _, box_width, _ in boxes]
    middle = float(np.mean(middles))
    if abs(middle - width / 2) < 1e-6 * width:
        return None
    return "left" if middle < width / 2 else "right"


def _open(record: Record) -> Image.Image:
    return as_image(record.source() if callable(record.source) else record.source)


def _table(pictures: Iterable[list[str]], place: dict[str, int]) -> csr_matrix:
    """Make a table of which kinds are in which picture, as 0 and 1.

    Pairs of kinds would be too many where a picture has many.
    """
    columns = []
    ends = [0]
    for objects in pictures:
        for name in objects:
            if name in place:
                columns.append(place[name])
        ends.append(len(columns))
    ones = np.ones(len(columns), dtype=np.int64)
    return csr_matrix((ones, columns, ends), shape=(len(ends) - 1, len(place)))


def _presence(record, objects, place, counts, company, rng) -> list[Question]:
    """Ask one question a stratum, yes as often as no.

    None where captions name no object, since then nobody looked for one.
    """
    present = set(objects)
    absent = [name for name in place if name not in present]
    if not objects and record.boxes is None or not absent:
        return []
    # of each kind, in how many pictures it keeps company with each kind that is here
    shared = company(_table([objects], place)).toarray()[0]
    rank = lambda count: nsmallest(NEAREST, absent, key=lambda name: (-count(name), place[name]))
    pools = {
        "random": absent,
        "popular": rank(counts.__getitem__),
        "adversarial": rank(lambda name: shared[place[name]]),
    }
    questions = []
    for stratum, pool in pools.items():
        yes = bool(rng.integers(2)) and bool(objects)
        choice = objects if yes else pool
        target = choice[rng.integers(len(choice))]
        text = f"{_is_there(target)} in the picture?"
        answer = "yes" if yes else "no"
        questions.append(Question("presence", text, answer, target, stratum))
    return questions


def _is_there(noun: str) -> str:
    if plural(noun) == noun and noun.endswith("s"):  # skis, scissors
        return f"Are there {noun}"
    return f"Is there {'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _facts(record: Record, truth: dict[str, object]) -> list[Question]:
    """Ask about what is known.

    The item (or, alone in the picture, the subject), and what the subject does and where.
    """
    noun = truth["item"] or truth["subject"]
    if noun is None:
        return []
    subject = truth["subject"]
    count = _count(record, noun)
    several = plural(noun)
    if count in (1, None) and several != noun:
        be, things = "is", noun
    else:
        be, things = "are", several
    number = None
    if count is not None:
        number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)
    side = f"On which side of the picture {be} the {things}?"
    facts = [
        ("colour", f"What colour {be} the {things}?", truth["colour"], noun),
        ("place", f"Where is the {subject}?", truth["place"], subject),
        ("action", f"What is the {subject} doing?", truth["action"], subject),
        ("side", side, truth["side"], noun),
        ("count", f"How many {several} are there?", number, noun),
    ]
    questions = []
    for kind, text, answer, target in facts:
        if answer:
            questions.append(Question(kind, text, answer, target))
    return questions
