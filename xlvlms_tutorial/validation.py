"""Check arguments early, in the same words everywhere.

Each function returns nothing when all is well, and otherwise raises an error that says what was
wrong and what is allowed.
"""

from collections.abc import Iterable, Sized
from numbers import Integral

from xlvlms_tutorial.errors import InputError, incomparable, unequal_lengths


def require(condition: object, problem: str, advice: str) -> None:
    """Refuse an argument where a condition does not hold.

    Parameters
    ----------
    condition : bool
        What has to hold.
    problem : str
        What is wrong where it does not.
    advice : str
        What is allowed, or what to do instead.

    Raises
    ------
    InputError
        With the problem and the advice.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require
    >>> sparsity = 1.5
    >>> require(0 <= sparsity < 1, f"sparsity is {sparsity}", "give 0 or more, below 1")
    Traceback (most recent call last):
    xlvlms_tutorial.errors.InputError: sparsity is 1.5; give 0 or more, below 1.
    """
    if not condition:
        raise InputError(problem, advice)


def require_equal(what: str, first: object, second: object, advice: str) -> None:
    """Refuse two things that do not belong together because they differ.

    Parameters
    ----------
    what : str
        What is compared, in the plural, such as ``"widths"``.
    first, second : object
        The two values that have to be equal.
    advice : str
        What to do instead.

    Raises
    ------
    InputError
        With both values and the advice.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_equal
    >>> require_equal("widths", 576, 576, "give states of one model")
    >>> require_equal("widths", 576, 960, "give states of one model")
    Traceback (most recent call last):
    xlvlms_tutorial.errors.InputError: widths differ: 576 and 960; give states of one model.
    """
    if first != second:
        raise incomparable(what, first, second, advice)


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
    InputError
        With the value and all that is allowed.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_one_of
    >>> require_one_of("mean", ("mean", "max"), "reduction")
    >>> require_one_of("median", ("mean", "max"), "reduction")
    Traceback (most recent call last):
    xlvlms_tutorial.errors.InputError: unknown reduction 'median'; allowed: 'mean', 'max'.
    """
    allowed = list(allowed)
    if value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise InputError(f"unknown {name} {value!r}", f"allowed: {options}")


def require_counts(**numbers: object) -> None:
    """Refuse numbers that are not integers of 1 or more.

    Parameters
    ----------
    **numbers : int or None
        The numbers by their names. None passes: it stands for a default.

    Raises
    ------
    InputError
        With the name and the number.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_counts
    >>> require_counts(batch_size=8, max_new_tokens=None)
    >>> require_counts(batch_size=0)
    Traceback (most recent call last):
    xlvlms_tutorial.errors.InputError: batch_size is 0; give at least 1.
    """
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, Integral) and number >= 1):
            raise InputError(f"{name} is {number}", "give at least 1")


def require_same_length(**values: Sized | Integral | None) -> None:
    """Refuse lists that belong together, element by element, but differ in length.

    Parameters
    ----------
    **values : sized, int or None
        The lists (or their lengths) by their names. None is left out.

    Raises
    ------
    InputError
        With all names and lengths.

    Examples
    --------
    >>> from xlvlms_tutorial.validation import require_same_length
    >>> require_same_length(samples=["a", "b"], answers=["yes", "no"])
    >>> require_same_length(samples=["a", "b"], answers=None)
    >>> require_same_length(samples=["a", "b"], answers=["yes"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xlvlms_tutorial.errors.InputError: lists that belong ... (samples: 2, answers: 1); ...
    """
    lengths = {}
    for name, value in values.items():
        if value is not None:
            lengths[name] = value if isinstance(value, Integral) else len(value)
    if len(set(lengths.values())) > 1:
        raise unequal_lengths(**lengths)
