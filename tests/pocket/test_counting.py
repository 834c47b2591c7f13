"""What is disclosed about the worlds is what a slow count over their texts and records gives."""

from dataclasses import replace

import pandas as pd
import pytest

from tests.support.words import masked
from xlvlms_tutorial.pocket import describe_worlds, language, postcard_texts, postcards, world
from xlvlms_tutorial.text import STYLES, words


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return describe_worlds()


def slow_count(record, subjects, figures, actions, items, hues, places, times) -> list:
    records = []
    for subject in subjects:
        for action in actions if subject in figures else (None,):
            for item in items:
                for colour in hues.get(item, (None,)):
                    for count in (1, 2, 3):
                        for side in ("left", "right"):
                            for place in places:
                                for time in times:
                                    records.append(
                                        record(
                                            subject, action, item, colour, count, side, place, time
                                        )
                                    )
    return records


def test_possible_scenes_are_those_that_records_allow(table):
    scenes = slow_count(
        world.Scene,
        world.SUBJECTS,
        world.PEOPLE,
        world.ACTIONS,
        world.ITEMS,
        world.COLOURED,
        world.PLACES,
        world.TIMES,
    )
    cards = slow_count(
        postcards.Postcard,
        postcards.SUBJECTS,
        postcards.FIGURES,
        postcards.ACTIONS,
        postcards.ITEMS,
        postcards.HUES,
        postcards.PLACES,
        postcards.TIMES,
    )
    row = table.loc["possible scenes"]
    assert row["scenes"] == len(set(scenes)) and row["postcards"] == len(set(cards))
    held_out = table.loc["possible scenes with such a pair"]
    assert held_out["scenes"] == sum(scene.held_out for scene in scenes)
    assert held_out["postcards"] == 0
    pairs = world.HELD_OUT_SUBJECT_PLACE | world.HELD_OUT_ITEM_COLOUR
    assert table.loc["pairs held out of training", "scenes"] == len(pairs)


def test_values_are_those_that_drawn_records_show(table):
    drawn = {"scenes": world.scenes(3000) + world.scenes(500, "composition")}
    drawn["postcards"] = postcards.postcards(3000)
    seen = {}
    for name, records in drawn.items():
        for factor in ("subject", "action", "item", "colour", "place", "time"):
            values = {getattr(record, factor) for record in records} - {None}
            seen[name, factor] = values
            assert table.loc[f"{factor}s", name] == len(values)
    for factor in ("subject", "action", "item", "colour", "place", "time"):
        both = seen["scenes", factor] & seen["postcards", factor]
        assert table.loc[f"{factor}s", "both"] == len(both)


def test_words_are_those_of_many_texts(table):
    texts = {"scenes": [], "postcards": []}
    for scene in world.scenes(3000) + world.scenes(300, "composition"):
        texts["scenes"] += language.captions(scene)
        texts["scenes"] += [language.styled_caption(scene, style) for style in STYLES]
        for question in language.questions(scene):
            texts["scenes"] += [question.text, question.answer]
    for card in postcards.postcards(3000):
        texts["postcards"] += postcard_texts.captions(card)
        for question in postcard_texts.questions(card):
            texts["postcards"] += [question.text, question.answer]
    vocabularies = {}
    for name, lines in texts.items():
        vocabularies[name] = {word for line in lines for word in words(line)}
        assert table.loc["words", name] == len(vocabularies[name])
    both = vocabularies["scenes"] & vocabularies["postcards"]
    assert table.loc["words", "both"] == len(both)


def test_templates_are_counted_without_the_factors(table):
    factors = ("woman", "walking", "flag", "red", 2, "left", "sand", "day")
    scene, card = world.Scene(*factors), postcards.Postcard(*factors)
    row = table.loc["caption templates"]
    for name, caption, record in (
        ("scenes", language.captions, scene),
        ("postcards", postcard_texts.captions, card),
    ):
        texts = {masked(text) for text in caption(record)}
        texts |= {masked(text) for text in caption(replace(record, count=3, side="right"))}
        assert row[name] == len(texts)
    assert row["both"] == 0
    assert table.loc["templates in a style"].tolist() == [len(STYLES), 0, 0]
    wordings = sum(map(len, language._ASK.values())) + len(language._PRESENCE)
    assert table.loc["wordings of questions", "scenes"] == wordings
    wordings = sum(map(len, postcard_texts._WORDINGS.values())) + len(postcard_texts._PRESENCE)
    assert table.loc["wordings of questions", "postcards"] == wordings
    assert table.loc["wordings of questions", "both"] == 0


def test_the_table_holds_whole_numbers_and_both_is_no_more_than_either(table):
    assert table.columns.tolist() == ["scenes", "postcards", "both"]
    assert (table.dtypes == "int64").all() and (table >= 0).all(axis=None)
    assert (table["both"] <= table[["scenes", "postcards"]].min(axis=1)).all()
