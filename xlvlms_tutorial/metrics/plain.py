"""Numbers as users bring them, as plain arrays.

One guard for what would otherwise be taken for other numbers without a word.
"""

import numpy as np

from xlvlms_tutorial.errors import ActivationsError


def plain(values: object) -> np.ndarray:
    """Convert numbers to an array; of a tensor on any device its values, halves in float32.

    Raises
    ------
    ActivationsError
        If they are complex, dates, text or records, of which an array of floats keeps only a
        part, or some of them are masked.
    """
    if np.ma.is_masked(values):
        raise ActivationsError(
            "some values are masked",
            "leave out what is missing: plain arrays show what is behind the mask",
        )
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "biufO":
        raise ActivationsError(f"values of type {array.dtype}", "give real numbers")
    return array
