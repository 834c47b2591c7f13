"""Entries of files, checked while they are read.

What lacks a key is of another form, and a wrong value is told with file and key.
"""

import reprlib
from collections.abc import Callable, Iterable

from xlvlms_tutorial.data.annotations import answer_text
from xlvlms_tutorial.data.gathered import Part
from xlvlms_tutorial.data.tree import SPLITS
from xlvlms_tutorial.errors import AnnotationError

FORMS = (
    "COCO's (images and annotations), Karpathy's (images with sentences), "
    "Visual Genome's (regions), VQA's (questions; annotations), "
    "csv or json lines with a column file"
)
KNOWN = f"known forms: {FORMS}"
LARGEST = 1e9  # pixels: more than any picture has


class Stray(AnnotationError):
    """A file, or an entry of one, that lacks what every form that is known has.

    Wrong values are errors of their own.
    """


def each(entries: Iterable[object], read_one: Callable) -> list:
    """Read every entry of a file.

    A file is a stray where none fits, and wrong where some do and one does not.

    Raises
    ------
    AnnotationError
        If an entry is wrong; a :class:`Stray` if none fits.
    """
    results = []
    error = None
    for entry in entries:
        try:
            results.append(read_one(entry))
        except Stray as cause:
            error = error or cause
    if error:
        raise AnnotationError(str(error)) if results else error
    return results


def value(
    part: Part,
    section: str,
    entry: object,
    key: str,
    kind: type | tuple[type, ...] = (int, str),
    empty: bool = False,
) -> object:
    """Return a value of an entry, checked.

    Parameters
    ----------
    part : Part
        The file, for the message.
    section : str
        The list that the entry is of, for the message.
    entry : object
        The entry, which should be a dict.
    key : str
        The key of the value.
    kind : type or tuple of type, default (int, str)
        The types that the value may have.
    empty : bool, default False
        Whether a text may be empty.

    Raises
    ------
    AnnotationError
        If it is of another type, or empty; a :class:`Stray` if it is absent.
        The message names file and key.
    """
    if not isinstance(entry, dict) or key not in entry:
        raise Stray(f"{part}: an entry of {section!r} has no {key!r}", KNOWN)
    return checked(part, section, key, entry[key], kind, empty)


def checked(
    part: Part,
    section: str,
    key: str,
    value: object,
    kind: type | tuple[type, ...],
    empty: bool = False,
) -> object:
    """Return a value as it is, once its type is checked.

    Parameters
    ----------
    part : Part
        The file, for the message.
    section : str
        The entry, or the list that it is of, for the message.
    key : str
        The key of the value, for the message.
    value : object
        The value.
    kind : type or tuple of type
        The types that the value may have; booleans are none of them.
    empty : bool, default False
        Whether a text may be empty.

    Raises
    ------
    AnnotationError
        If it is of another type, or empty, or a text that cannot be written.
    """
    allowed = isinstance(value, kind) and not isinstance(value, bool)
    if allowed and isinstance(value, str):
        allowed = plain(value) and (empty or value.strip())
    if not allowed:
        raise AnnotationError(f"{part}: {key!r} of {section!r} is {reprlib.repr(value)}", KNOWN)
    return value


def plain(text: str) -> bool:
    """Return whether a text can be written in UTF-8, which half of a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def optional(part: Part, section: str, entry: dict, key: str) -> str | None:
    """Return the text of a key that need not be there, None where it is not.

    Parameters
    ----------
    part : Part
        The file, for the message.
    section : str
        The list that the entry is of, for the message.
    entry : dict
        The entry.
    key : str
        The key of the text.

    Raises
    ------
    AnnotationError
        If it is no text.
    """
    if entry.get(key) is None:
        return None
    return checked(part, section, key, entry[key], str, True)


def split_of(part: Part, split: object) -> str | None:
    """Return the split that an entry tells under any of its names, None where it tells none.

    Raises
    ------
    AnnotationError
        If there is no such split.
    """
    if split in (None, ""):
        return None
    plain = split.strip().lower() if isinstance(split, str) else None
    if plain not in SPLITS:
        raise AnnotationError(
            f"{part}: 'split' is {reprlib.repr(split)}", f"allowed: {', '.join(SPLITS)}"
        )
    return SPLITS[plain]


def measured(value: object) -> bool:
    """Return whether a value is a number that pixels can have."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -LARGEST < value < LARGEST
    )


def first_filled(entry: dict, keys: Iterable[str | None]) -> str | None:
    """Return the first of some keys under which an entry holds something, None where none does."""
    for key in keys:
        if entry.get(key) not in (None, "", []):
            return key
    return None


def answer_of(part: Part, section: str, entry: dict, keys: Iterable[str]) -> str:
    """Return the answer of an entry by the first of some keys.

    Parameters
    ----------
    part : Part
        The file, for the message.
    section : str
        The list that the entry is of, for the message.
    entry : dict
        The entry.
    keys : iterable of str
        The keys that may hold the answer: a text or a number, or several, of which the most
        frequent counts.

    Raises
    ------
    AnnotationError
        If there is none in what they hold; a :class:`Stray` if there is none of the keys.
    """
    key = first_filled(entry, keys)
    text = answer_text(entry[key]) if key else None
    if text is None or not plain(text):
        key = key or next(iter(keys))
        if key not in entry:
            raise Stray(f"{part}: an entry of {section!r} has no {key!r}", KNOWN)
        raise AnnotationError(
            f"{part}: {key!r} of {section!r} is {reprlib.repr(entry[key])}",
            "give a text, a number or a list of answers",
        )
    return text
