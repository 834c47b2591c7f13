"""Check arguments early, in the same words everywhere.

Each function returns nothing when all is well, and otherwise raises an error that says what was
wrong and what is allowed.
"""

from collections.abc import Iterable, Sized
from numbers import Integral

from xlvlms_tutorial.errors import LengthError, SelectionError


def require_one_of(value: object, allowed: Iterable[object], name: str) -> None:
    """Refuse a value that is not one of those allowed.

    Parameters
    ----------
    value : object
        What the caller was given.
    allowed : iterable
        The values allowed, in the order in which the message lists them.
    name : str
        What the value is, such as ``"mode"``.

    Raises
    ------
    SelectionError
        With the value and all that is allowed.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_one_of
    >>> require_one_of("mean", ("mean", "max"), "reduction")
    >>> require_one_of("median", ("mean", "max"), "reduction")
    Traceback (most recent call last):
    xlvlms_tutorial.errors.SelectionError: unknown reduction 'median'; allowed: 'mean', 'max'.
    """
    allowed = list(allowed)
    if value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise SelectionError(f"unknown {name} {value!r}", f"allowed: {options}")


def require_counts(**numbers: object) -> None:
    """Refuse numbers that are not integers of 1 or more.

    Parameters
    ----------
    **numbers : int or None
        The numbers by their names. None passes: it stands for a default.

    Raises
    ------
    SelectionError
        With the name and the number.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_counts
    >>> require_counts(batch_size=8, max_new_tokens=None)
    >>> require_counts(batch_size=0)
    Traceback (most recent call last):
    xlvlms_tutorial.errors.SelectionError: batch_size is 0; give at least 1.
    """
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, Integral) and number >= 1):
            raise SelectionError(f"{name} is {number}", "give at least 1")


def require_same_length(**values: Sized | Integral | None) -> None:
    """Refuse lists that belong together, element by element, but differ in length.

    Parameters
    ----------
    **values : sized, int or None
        The lists (or their lengths) by their names. None is left out.

    Raises
    ------
    LengthError
        With all names and lengths.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_same_length
    >>> require_same_length(samples=["a", "b"], answers=["yes", "no"])
    >>> require_same_length(samples=["a", "b"], answers=None)
    >>> require_same_length(samples=["a", "b"], answers=["yes"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xlvlms_tutorial.errors.LengthError: lists that belong ... (samples: 2, answers: 1); ...
    """
    lengths = {}
    for name, value in values.items():
        if value is not None:
            lengths[name] = value if isinstance(value, Integral) else len(value)
    if len(set(lengths.values())) > 1:
        raise LengthError(**lengths)
