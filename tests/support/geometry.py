"""Geometry written out."""

import numpy as np


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """The cosine of the angle between two vectors."""
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
