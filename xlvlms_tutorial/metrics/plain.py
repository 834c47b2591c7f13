"""Numbers as users bring them, as plain arrays, and checks that metrics have in common."""

from collections.abc import Iterable

import numpy as np

from xlvlms_tutorial.errors import no_estimate
from xlvlms_tutorial.validation import require


def plain(values: object) -> np.ndarray:
    """Convert numbers to an array; of a tensor on any device its values, halves in float32.

    Raises
    ------
    InputError
        If they are complex, dates, text or records, of which an array of floats keeps only a
        part, or some of them are masked.
    """
    require(
        not np.ma.is_masked(values),
        "some values are masked",
        "leave out what is missing: plain arrays show what is behind the mask",
    )
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()  # NumPy has no bfloat16
    array = np.asarray(values)
    require(array.dtype.kind in "biufO", f"values of type {array.dtype}", "give real numbers")
    return array


def require_estimate(condition: object, subject: str, problem: object, allowed: str) -> None:
    """Refuse what cannot give a number with an interval where a condition does not hold.

    Parameters
    ----------
    condition : bool
        What has to hold.
    subject : str
        What the problem is with, such as ``"values"``.
    problem : object
        What stands there instead.
    allowed : str
        What is allowed.

    Raises
    ------
    InputError
        With the problem, and what is allowed.
    """
    if not condition:
        raise no_estimate(subject, problem, allowed)


def require_level(level: float) -> None:
    """Refuse a confidence level that is not between 0 and 1.

    Raises
    ------
    InputError
        With the level.
    """
    require_estimate(0 < level < 1, "level", level, "a number between 0 and 1, such as 0.95")


def require_lists(references: Iterable[object], subject: str, allowed: str) -> None:
    """Refuse references of which one is a text in place of a list, or empty.

    Parameters
    ----------
    references : iterable of sequence of str
        The references of each candidate.
    subject : str
        What they are for, such as ``"VQA accuracy"``.
    allowed : str
        What is allowed.

    Raises
    ------
    InputError
        With the references that are no list.
    """
    for group in references:
        is_list = not isinstance(group, str) and len(group) > 0
        require_estimate(is_list, subject, f"references {group!r}", allowed)
