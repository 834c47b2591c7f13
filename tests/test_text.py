import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket.language import STYLES, captions, styled_caption
from xlvlms_tutorial.pocket.world import scenes
from xlvlms_tutorial.text import (
    NUMBER_WORDS,
    NUMBERS,
    PREFIX,
    STYLE_WORDS,
    first_few,
    forms,
    normalise,
    sentence,
    style_rate,
    style_share,
    whole_words,
    words,
)


def test_there_is_a_list_for_each_style_of_the_world_and_no_word_is_in_two():
    assert set(STYLE_WORDS) == set(STYLES)
    for first, second in combinations(STYLE_WORDS.values(), 2):
        assert not {f for w in first for f in forms(w)} & {f for w in second for f in forms(w)}
    assert all(
        word == word.lower() and word.isalpha()
        for listed in STYLE_WORDS.values()
        for word in listed
    )


def test_the_rate_is_the_share_of_words():
    texts = ["A RED key, two blue gems.", "a robot", "", "reddish? No: bored.", "The sea's colours"]
    assert style_rate(texts, "colour").tolist() == [2 / 6, 0, 0, 1 / 3, 1 / 3]
    assert style_share(texts, "colour").tolist() == [True, False, False, True, True]
    assert style_rate(texts, "place").tolist() == [0, 0, 0, 0, 1 / 3]
    assert style_rate(texts, "mood").tolist() == [0, 0, 0, 1 / 3, 0]


def test_own_words_count_in_their_forms():
    texts = ["he walks the dogs", "walking", "a catwalk"]
    assert style_rate(texts, ["walking", "Dog"]).tolist() == [0.5, 1, 0]
    assert style_rate(texts, iter(["walking"])).tolist() == [0.25, 1, 0]


@pytest.mark.parametrize("style", STYLES)
def test_each_style_raises_its_own_rate_most_on_the_world(style):
    sampled = scenes(100, seed=2)
    plain, styled = (
        [captions(scene)[0] for scene in sampled],
        [styled_caption(scene, style) for scene in sampled],
    )
    gains = {
        name: (style_rate(styled, name) - style_rate(plain, name)).mean() for name in STYLE_WORDS
    }
    assert max(gains, key=gains.get) == style
    assert gains[style] > 0.09 and max(gain for name, gain in gains.items() if name != style) < 0.01
    assert style_share(styled, style).all()


@given(st.lists(st.text(max_size=30), max_size=4))
@settings(deadline=None, max_examples=50)
def test_rates_are_shares_whatever_the_text(texts):
    rates = style_rate(texts, "place")
    assert rates.shape == (len(texts),) and rates.dtype == np.float64
    assert ((rates >= 0) & (rates <= 1)).all()
    assert (style_share(texts, "place") == (rates > 0)).all()


def test_unknown_styles_and_useless_lists_are_refused():
    with pytest.raises(
        InputError, match="no style 'colours'; allowed: place, colour, mood, or a list of words"
    ):
        style_rate(["a"], "colours")
    for wrong in ([], ["red", "traffic light"], [""]):
        with pytest.raises(InputError):
            style_rate(["a"], wrong)


def test_forms_and_words():
    assert forms("Man") == ["man", "men"]
    assert {"riding", "ride", "rides"} <= set(forms("riding"))
    assert {"box", "boxes"} == set(forms("box"))
    assert words("It's A dog-sled; caf\u00e9!") == ["it's", "a", "dog", "sled", "caf\u00e9"]


@pytest.mark.parametrize(
    ("single", "several"),
    [
        ("goose", "geese"),
        ("policeman", "policemen"),
        ("woman", "women"),
        ("grandchild", "grandchildren"),
        ("penknife", "penknives"),
        ("foot", "feet"),
        ("wolf", "wolves"),
        ("shelf", "shelves"),
        ("sheep", "sheep"),
        ("salesperson", "salespeople"),
        ("ox", "oxen"),
        ("human", "humans"),
        ("German", "germans"),
        ("ottoman", "ottomans"),
        ("fox", "foxes"),
        ("mongoose", "mongooses"),
        ("snow goose", "snow geese"),
        ("cactus", "cactuses"),
    ],
)
def test_plurals_of_nouns_and_of_those_that_end_like_them(single, several):
    assert forms(single) == [single.lower(), several]


def test_words_of_any_script():
    assert words("\u4e00\u53ea\u732b, OK") == ["\u4e00", "\u53ea", "\u732b", "ok"]
    assert words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u092e\u0947\u0902",
    ]
    assert words("Cafe\u0301") == words("caf\u00e9") == ["caf\u00e9"]
    assert (
        style_rate(["Un cafe\u0301"], ["caf\u00e9"])
        == style_rate(["un caf\u00e9"], ["cafe\u0301"])
        == 0.5
    )
    with pytest.raises(InputError, match="is not one word"):
        style_rate(["\u4e00\u53ea\u732b"], ["\u7ea2\u8272"])


def test_forms_of_a_very_long_word_take_no_time():
    assert len(forms("a" * 200_000)) == 2  # minutes, if every vowel were tried for every other


@pytest.mark.parametrize(
    ("phrases", "text", "matches"),
    [
        (["car"], "A car, cars, scar, a-car, CAR_", ["car", "car"]),
        (["CAR"], "car Car", ["car", "Car"]),
        (
            ["light", "traffic light", "traffic lights"],
            "traffic lights and lights, a light",
            ["traffic lights", "light"],
        ),
        (["  hot   dog "], "a hot\n dog, hotdog", ["hot\n dog"]),
        (["caf\u00e9"], "un caf\u00e9; cafe, caf\u00e9s", ["caf\u00e9"]),
        (["c++", "a.m."], "c++ at 9 a.m., c+, abmb", ["c++", "a.m."]),  # marks are themselves
        (["car", ""], "a car.", ["car"]),
        ([""], "a, b", []),
        ([], "a, b", []),
    ],
)
def test_whole_words(phrases, text, matches):
    assert whole_words(phrases).findall(text) == matches
    assert whole_words(iter(phrases)).findall(text) == matches


def test_whole_words_may_differ_by_case_and_be_told_apart_by_their_lists():
    assert whole_words(["car"], any_case=False).findall("Car, car") == ["car"]
    pattern = whole_words(["dog", "hot dog"], [], ["cat", "dog"])
    assert [
        (match[0], match.lastindex) for match in pattern.finditer("a cat, a dog, a hot dog")
    ] == [
        ("cat", 3),
        ("dog", 1),
        ("hot dog", 1),
    ]
    assert whole_words().search("anything") is None


@given(st.lists(st.text("ab -", min_size=1, max_size=4), max_size=4), st.text("abB -", max_size=12))
@settings(deadline=None)
def test_whole_words_are_there_if_one_of_them_stands_between_other_than_letters(phrases, text):
    spaced = [" ".join(phrase.split()) for phrase in phrases if phrase.strip()]
    # the white space of a text counts once, as that of a phrase
    plain = re.sub(r"\s+", " ", text).lower()
    ends = [
        (start, start + len(phrase))
        for phrase in spaced
        for start in range(len(plain))
        if plain.startswith(phrase, start)
    ]
    whole = [
        (a, b) for a, b in ends if not plain[:a][-1:].isalpha() and not plain[b:][:1].isalpha()
    ]
    assert bool(whole_words(phrases).search(text)) == bool(whole)


def test_numbers_are_words_up_to_ten():
    assert [NUMBERS[word] for word in NUMBER_WORDS] == [str(k) for k in range(11)]
    assert NUMBERS["none"] == "0"


def test_words_are_compared_with_pictures_in_one_sentence():
    assert sentence(iter(["a"])) == f"{PREFIX}a."
    assert sentence({"x": "red", "y": "key"}.values()) == f"{PREFIX}red, key."


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("3.5", "3.5"),
        ("1,000.", "1000"),
        ("1,000,000", "1000000"),
        ("red,blue", "red blue"),
        ("yes.it is", "yes it is"),
        (".5", "5"),
        ("none", "0"),
        ("a boy\u2019s", "boys"),
        ("**red**", "red"),
        ("10:30", "10 30"),
        ("50%", "50"),
        ("Ten, an", "10"),
        ("...", ""),
    ],
)
def test_answers_keep_their_numbers_and_lose_their_marks(raw, clean):
    assert normalise(raw) == clean


@given(st.text("aneo 1,.'-;yt%", max_size=15))
@settings(deadline=None, max_examples=300)
def test_normalising_twice_changes_nothing(answer):
    assert normalise(normalise(answer)) == normalise(answer)


@pytest.mark.parametrize(
    ("n", "separator", "listed"),
    [(1, ", ", "3, ..."), (2, "; ", "3; 1; ..."), (3, ", ", "3, 1, 4"), (9, ", ", "3, 1, 4")],
)
def test_a_list_ends_in_an_ellipsis_only_where_it_is_cut(n, separator, listed):
    assert first_few([3, 1, 4], n, separator) == listed
