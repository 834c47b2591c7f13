"""States of two models with labels, and how they are said to have been made."""

import numpy as np

PROVENANCE = {"ids_sha256": "3fa9", "n_samples": 9, "selection": {"words": ["dog"]}, "reduce": None}


def moved(n=60, d=8, k=4, seed=0):
    """States of two models, and a label for each sample.

    Every concept has samples, of different numbers.
    """
    random = np.random.default_rng(seed)
    a = random.standard_normal((n, d)) + 5
    labels = np.concatenate(
        [np.arange(k), np.minimum(random.integers(0, k, n - k), random.integers(0, k, n - k))]
    )
    return (
        a,
        a + random.standard_normal((k, d))[labels] + 0.5 * random.standard_normal((n, d)),
        labels,
    )
