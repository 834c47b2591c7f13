"""Read values as users spell them in YAML.

Words without quotes stay text until a chapter's default says which type is meant.
"""

import re
from collections.abc import Callable
from math import inf, nan

import yaml

from xlvlms_tutorial.errors import InputError

QUOTES = "put text with special signs into quotes"
_WORD = "!word"  # the tag of what has none
_MAX_VALUES = 100_000  # values in one file, with what aliases repeat
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# What a word means by itself, as in YAML 1.2: 010 is ten, 1e-3 a number, and
# no, 12:30 and 2026-01-01 are text
_PLAIN: tuple[tuple[str, Callable[[str], object]], ...] = (
    (r"null|Null|NULL|~|", lambda _: None),
    (r"true|True|TRUE|false|False|FALSE", lambda word: word.lower() == "true"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda word: int(word, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"\+?\.(inf|Inf|INF)", lambda _: inf),
    (r"-\.(inf|Inf|INF)", lambda _: -inf),
    (r"\.(nan|NaN|NAN)", lambda _: nan),
)


class Word(str):
    """A value that stands in YAML without quotes, as it is spelled there."""


class _Loader(yaml.SafeLoader):
    """Guesses no types: what has neither quotes nor a tag is a Word."""

    yaml_implicit_resolvers = {
        "<": [("tag:yaml.org,2002:merge", re.compile("<<$"))],
        None: [(_WORD, re.compile(""))],
    }


_Loader.add_constructor(_WORD, lambda _, node: Word(node.value))


def read_yaml(text: str, where: str, advice: str = QUOTES) -> tuple[object, yaml.Node | None]:
    """Read a YAML text with its words as they are spelled, and its tree.

    Parameters
    ----------
    text : str
        The text.
    where : str
        The file or option it comes from, for messages.
    advice : str
        What to do next, for messages; by default about quotes.

    Returns
    -------
    content : object
        The content, each value without quotes as a :class:`Word`.
    tree : yaml.Node or None
        The tree, with the lines.

    Raises
    ------
    InputError
        If it is no YAML, is nested too deep, repeats too much by aliases, holds itself, or gives a
        key twice.
    """
    try:
        tree = yaml.compose(text, _Loader)
        if tree is not None and _size(tree, {}) > _MAX_VALUES:
            raise InputError(
                f"{where}: more than {_MAX_VALUES:,} values, or one that holds itself",
                "write it without aliases (*name)",
            )
        _refuse_duplicates(where, tree)
        return yaml.load(text, _Loader), tree
    except RecursionError as cause:
        raise InputError(f"{where} cannot be read: nested too deep", advice) from cause
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as cause:
        raise InputError(
            f"{where} cannot be read: {' '.join(str(cause).split())}", advice
        ) from cause


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        parts: list[yaml.Node] = []
        for key, value in node.value:
            parts += [key, value]
        return parts
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node stands for with its aliases written out.

    Infinitely many where it holds itself.
    """
    if id(node) not in sizes:
        sizes[id(node)] = inf  # met again while it is counted, it holds itself
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in _children(node))
    return sizes[id(node)]


def _refuse_duplicates(location: str, node: yaml.Node | None) -> None:
    """Refuse a key that is given twice: YAML would silently take the last."""
    if node is None:
        return
    for child in _children(node):
        _refuse_duplicates(location, child)
    if not isinstance(node, yaml.MappingNode):
        return
    keys: set[object] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in keys:
            raise InputError(
                f"{location}, line {key.start_mark.line + 1}: {key.value!r} stands twice",
                "give each key once",
            )
        keys.add(key.value)


def plain(value: object) -> object:
    """Give each word of a value the type that it has by itself: text, number, truth value or None.

    Raises
    ------
    InputError
        If a key is no text.
    """
    return meant((), value)


def meant(default: object, value: object) -> object:
    """Give each word of a value the type of the default, where it can be read so.

    Or that of the default's elements. Where the default is text, ``no``, ``3`` and ``1e-3`` are the
    text that was written; where it is a truth value ``no`` is False; where it is a number, 1e-3 and
    010 are numbers. Elsewhere, as by :func:`plain`. What is no word is left as it is.

    Raises
    ------
    InputError
        If a key is no text.
    """
    if isinstance(value, dict):
        defaults = list(default.values()) if isinstance(default, dict) else []
        return {_key(key): _convert(defaults, element) for key, element in value.items()}
    if isinstance(value, list):
        defaults = list(default) if isinstance(default, (list, tuple)) else []
        return [_convert(defaults, element) for element in value]
    return _convert([default], value)


def _key(key: object) -> str:
    name = _plain_value(key) if isinstance(key, Word) else key
    if not isinstance(name, str):
        raise InputError(
            f"the key {name!r} is no text", f"put it into quotes, as in {{'{key}': ...}}"
        )
    return str(name)


def _convert(defaults: list[object], value: object) -> object:
    """The value as the first of the defaults takes it."""
    if isinstance(value, (dict, list)):
        kinds = dict if isinstance(value, dict) else (list, tuple)
        for default in defaults:
            if isinstance(default, kinds):
                return meant(default, value)
        return meant((), value)
    if not isinstance(value, Word):
        return value
    for default in defaults:
        kind = type(default)
        if kind is str:
            return str(value)
        if kind is bool and value.lower() in _TRUTHS:
            return _TRUTHS[value.lower()]
        if kind in (int, float):
            number = _as_number(value, kind)
            if number is not None:
                return number
    return _plain_value(value)


def _as_number(word: Word, kind: type) -> int | float | None:
    """A word as a number, also one such as 1_000; None where it is none."""
    number = _plain_value(word)
    if isinstance(number, str):
        try:
            return kind(word)
        except ValueError:
            return None
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return number if is_number else None


def _plain_value(word: Word) -> object:
    for form, read in _PLAIN:
        if re.fullmatch(form, word):
            try:
                return read(word)
            except ValueError:  # more digits than Python reads
                break
    return str(word)
