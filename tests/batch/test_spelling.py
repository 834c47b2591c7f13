"""YAML as users write it: nothing is guessed, nothing hangs, and what is damaged is named."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.batch.spelling import Word, plain, read_yaml
from xlvlms_tutorial.errors import InputError

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{two}: &{two} [{','.join([f'*{anchor}'] * 9)}]\n"
    for anchor, two in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "one that holds itself"),
        ("a: &a {b: *a}", "one that holds itself"),
        (LAUGHS, "more than 100,000 values"),
        ("[" * 3000 + "]" * 3000, "nested too deep"),
        ("[" * 3000, "nested too deep"),
        ("{a: " * 3000, "nested too deep"),
        ("a: 1\na: 2", "line 2: 'a' stands twice"),
        ("[{a: 1, a: 2}]", "'a' stands twice"),
        ("x: [", "expected the node content"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!int x", "invalid literal"),
        ("{[a]: 1}", "unhashable"),
        ("a\0b", "special characters"),
        ("*nobody", "undefined alias"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_what_is_damaged_or_without_end_is_refused(text, message):
    with pytest.raises(InputError, match=f"here.*{message}"):
        read_yaml(text, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("010", 10),
        ("-3", -3),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.", 1.0),
        ("+.5e1", 5.0),
        ("true", True),
        ("FALSE", False),
        ("no", "no"),
        ("On", "On"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("null", None),
        ("'010'", "010"),
        ("!!str 10", "10"),
        ("0b1", "0b1"),
        ("=", "="),
        ("1e", "1e"),
        (".inf", float("inf")),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("base: &b {c: 1}\nmore: {<<: *b, d: 2}", {"base": {"c": 1}, "more": {"c": 1, "d": 2}}),
    ],
)
def test_a_word_by_itself_is_what_yaml_1_2_says(text, expected):
    value = plain(read_yaml(text, "here")[0])
    assert value == expected and type(value) is type(expected)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        content = read_yaml(text, "here")[0]
        plain(content)
    except InputError:
        return
    if isinstance(content, Word):  # and is never another text than was written
        assert content in text


def test_keys_are_text():
    for text in ("{1: a}", "{true: a}", "{a: {~: b}}", "[{1.5: a}]"):
        with pytest.raises(InputError, match=re.escape("is no text; put it into quotes")):
            plain(read_yaml(text, "here")[0])
    assert plain(read_yaml("{no: 1, '1': 2}", "here")[0]) == {"no": 1, "1": 2}
