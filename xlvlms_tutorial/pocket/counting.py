"""Count what the two worlds can show and say, from their generators."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd

from xlvlms_tutorial.pocket import language, postcard_texts, postcards, world
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import NUMBER_WORDS, STYLES, forms, whole_words, words

# wordings and objects of questions are drawn: so many draws show each of them
_DRAWS = 60


@dataclass(frozen=True)
class _World:
    """What is counted of a world: the values of its factors, and how it makes texts."""

    record: Callable
    actors: tuple[str, ...]  # subjects that do something
    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    coloured: dict[str, tuple[str, ...]]
    items: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    sides: tuple[str, ...]
    counts: tuple[int, ...]
    captions: Callable[[object], list[str]]
    styled: Callable[[object], list[str]]
    questions: Callable[[object, int], list[Question]]

    def doers(self) -> Iterator[tuple[str, str | None]]:
        """Every subject with everything that it can do."""
        for subject in self.subjects:
            for action in self.actions if subject in self.actors else (None,):
                yield subject, action

    def things(self) -> Iterator[tuple[str, str | None]]:
        """Every kind of thing in every colour that it can have."""
        for item in self.items:
            for colour in self.coloured.get(item, (None,)):
                yield item, colour

    def combinations(self) -> set[tuple]:
        """Every combination of factors that a record can have."""
        rest = (self.counts, self.sides, self.places, self.times)
        combinations = set()
        for doer, thing, *others in product(self.doers(), self.things(), *rest):
            combinations.add((*doer, *thing, *others))
        return combinations

    def colours(self) -> set[str]:
        """Every colour that a thing can have."""
        return set().union(*self.coloured.values())


def _styled(scene: world.Scene) -> list[str]:
    return [language.styled_caption(scene, style) for style in STYLES]


_SCENES = _World(
    world.Scene,
    world.PEOPLE,
    world.SUBJECTS,
    world.ACTIONS,
    world.COLOURED,
    world.ITEMS,
    world.PLACES,
    world.TIMES,
    world.SIDES,
    world.COUNTS,
    language.captions,
    _styled,
    language.questions,
)
_POSTCARDS = _World(
    postcards.Postcard,
    postcards.FIGURES,
    postcards.SUBJECTS,
    postcards.ACTIONS,
    postcards.HUES,
    postcards.ITEMS,
    postcards.PLACES,
    postcards.TIMES,
    postcards.SIDES,
    postcards.COUNTS,
    postcard_texts.captions,
    lambda card: [],
    postcard_texts.questions,
)
# can be shown by both worlds
_EXAMPLE = ("woman", "walking", "flag", "red", 2, "left", "sand", "day")


def describe_worlds() -> pd.DataFrame:
    """Count what the scenes and the postcards can show and say, and what they have in common.

    Use it to judge how far results on one generator may depend on that generator. Nothing is typed
    in: combinations are enumerated, and wordings and words are read off the texts that the
    generators write. Scenes are counted by their factors, so that pictures which differ in layout
    alone count once.

    Returns
    -------
    pandas.DataFrame
        Integers, one row a quantity, columns scenes, postcards and both (what is in both worlds):
        possible scenes; subjects, actions, items, colours, places, times; caption templates,
        templates of captions in a style and wordings of questions; words in all texts; pairs of
        attributes that training never shows, and the possible scenes that have one. Embedded models
        are trained on scenes alone, so no pair of the postcards is held out.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import describe_worlds
    >>> table = describe_worlds()
    >>> table.loc[["places", "caption templates"], "scenes"].tolist()
    [5, 5]
    >>> int(table.loc["caption templates", "both"])
    0
    """
    sides = {"scenes": _contents(_SCENES), "postcards": _contents(_POSTCARDS)}
    pairs = set(world.HELD_OUT_SUBJECT_PLACE) | set(world.HELD_OUT_ITEM_COLOUR)
    sides["scenes"]["pairs held out of training"] = pairs
    sides["scenes"]["possible scenes with such a pair"] = _held_out(_SCENES)
    sides["postcards"]["pairs held out of training"] = set()
    sides["postcards"]["possible scenes with such a pair"] = set()
    rows = {}
    for quantity, first in sides["scenes"].items():
        second = sides["postcards"][quantity]
        rows[quantity] = {
            "scenes": len(first),
            "postcards": len(second),
            "both": len(first & second),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")


def _contents(which: _World) -> dict[str, set]:
    """What a world has, by quantity."""
    example = which.record(*_EXAMPLE)
    return {
        "possible scenes": which.combinations(),
        "subjects": set(which.subjects),
        "actions": set(which.actions),
        "items": set(which.items),
        "colours": which.colours(),
        "places": set(which.places),
        "times": set(which.times),
        "caption templates": {_template(text, example) for text in which.captions(example)},
        "templates in a style": {_template(text, example) for text in which.styled(example)},
        "wordings of questions": _wordings(which, example),
        "words": _vocabulary(which),
    }


def _held_out(which: _World) -> set[tuple]:
    return {factors for factors in which.combinations() if which.record(*factors).held_out}


def _template(text: str, record: object, target: str | None = None) -> str:
    """A text with the names of factors in the place of their values."""
    if target is not None:
        text = whole_words(forms(target)).sub("<object>", text)
    values = {"count": NUMBER_WORDS[record.count]}
    for factor in ("subject", "action", "item", "colour", "side", "place", "time"):
        values[factor] = getattr(record, factor)
    for factor, value in values.items():
        text = whole_words(forms(value)).sub(f"<{factor}>", text)
    return re.sub(r"\ban?\b", "a", text.lower())


def _wordings(which: _World, example: object) -> set[tuple[str, str]]:
    """Each wording of a question with its type."""
    wordings = set()
    for seed in range(_DRAWS):
        for question in which.questions(example, seed):
            target = question.target if question.type == "presence" else None
            wordings.add((question.type, _template(question.text, example, target)))
    return wordings


def _vocabulary(which: _World) -> set[str]:
    """Every word of the texts about records that show each value of a factor, and each pair."""
    vocabulary: set[str] = set()
    for layout, covering in enumerate(_covering(which)):
        record = replace(covering, layout=layout)  # by which the wording of questions is drawn
        texts = [*which.captions(record), *which.styled(record)]
        for seed in range(3):
            for question in which.questions(record, seed):
                texts += [question.text, question.answer]
        for text in texts:
            vocabulary.update(words(text))
    return vocabulary


def _covering(which: _World) -> Iterator[object]:
    """Records with each subject and action, each thing in each number, each place, side and time.

    A word of a text depends on no more than one of these groups.
    """
    example = which.record(*_EXAMPLE)
    for subject, action in which.doers():
        for time in which.times:
            yield replace(example, subject=subject, action=action, time=time)
    for (item, colour), count in product(which.things(), which.counts):
        yield replace(example, item=item, colour=colour, count=count)
    for place, side, time in product(which.places, which.sides, which.times):
        yield replace(example, place=place, side=side, time=time)
