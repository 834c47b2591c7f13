"""Geometry of tokens over layers.

How slowly they change, how long they are, and whether a plane tells two kinds apart. After
Shukor and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (arXiv 2405.16700).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, LayerError, SelectionError
from xlvlms_tutorial.methods.alignment.scores import layers_at, shared_layers
from xlvlms_tutorial.methods.alignment.similarity import Examples, Tokens, examples, similarity
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.probes import deal_folds, held_out_labels
from xlvlms_tutorial.metrics.intervals import (
    Estimate,
    bootstrap,
    interval,
    proportion,
    resampled_shares,
)


def consecutive(x: Examples, y: Examples) -> Float[Tensor, " n"]:
    r"""Mean cosine of each token with the same token of its example at another layer.

    :math:`\mathrm{mean}_i \cos(x_i, y_i)`. The released code of arXiv 2405.16700 averages over
    pairs of different examples too; this does not.

    Raises
    ------
    ActivationsError, ComparisonError, LengthError
        If tokens are missing, NaN, infinite or zero, or the two are not of one
        width and equally many tokens.
    """
    return similarity(x, y, "token_mean", "matched")


def consecutive_profile(
    states: States, step: int = 1, place: str = WHOLE_BLOCK, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Cosine of tokens with themselves ``step`` layers on.

    Columns layer, to, value, low, high, n, rival. The value is the mean over samples of the mean
    over a sample's tokens, with a bootstrap over samples; the rival is the same for the cosine of
    each token with all other tokens, of its own and of other samples, ``step`` layers on.

    Raises
    ------
    SelectionError
        If no two captured layers are ``step`` apart, or the place was not captured.
    ActivationsError
        If there are fewer than two samples, or tokens are NaN, infinite or zero.
    """
    rows = []
    for layer, own, rival in _steps(states, step, place):
        found = bootstrap(own, n_resamples=n_resamples, seed=seed)
        rows.append(
            {"layer": layer, "to": layer + step} | found.asdict() | {"rival": float(rival.mean())}
        )
    return pd.DataFrame(rows)


def persistence(
    states: States, step: int = 1, place: str = WHOLE_BLOCK, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Cosine of tokens with themselves ``step`` layers on minus that with other tokens.

    The mean over layers, with one bootstrap over samples.

    Raises
    ------
    SelectionError, ActivationsError
        As :func:`consecutive_profile`.
    """
    excess = np.stack([own - rival for _, own, rival in _steps(states, step, place)])
    return bootstrap(excess.mean(axis=0), n_resamples=n_resamples, seed=seed)


def norms(
    states: States,
    statistic: str = "median",
    place: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Norms of tokens by layer, in columns layer, value, low, high and n.

    :math:`\frac{1}{N} \sum_i \mathrm{stat}_t \lVert x_{i,t} \rVert_2`. ``statistic``
    over a sample's tokens is "median" (as in arXiv 2405.16700), "mean", "max" or "min";
    the interval resamples samples.

    Raises
    ------
    SelectionError
        If the statistic is unknown, or the place was not captured.
    ActivationsError
        If there are fewer than two samples, or tokens are NaN or infinite.
    """
    rows = []
    for layer in layers_at(states, place):
        tokens = Tokens.of(_two_or_more(examples(states, layer, place)))
        lengths = Tokens(
            torch.linalg.vector_norm(tokens.rows, dim=1, keepdim=True), tokens.counts
        ).reduced(statistic)
        rows.append(
            {"layer": layer}
            | bootstrap(lengths[:, 0].numpy(), n_resamples=n_resamples, seed=seed).asdict()
        )
    return pd.DataFrame(rows)


def linear_probe(
    a: States,
    b: States,
    layers: Iterable[int] | None = None,
    folds: int = 5,
    place: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Balanced accuracy of a linear probe that tells rows of a from rows of b, by layer.

    Columns layer, value, low, high, n. The probe is ridge regression on :math:`\pm 1` (linear
    discriminant analysis, shrunk), both classes weighing alike, on states standardised by the
    training rows: :math:`w = \arg\min \sum_i c_i (y_i - w^\top z_i - b)^2 + \lVert w \rVert^2`. It
    has a closed form, so that 31 layers of 200 rows take a second or two. Samples are dealt to
    folds whole, so that no sample is in training and in test. The interval resamples samples; where
    all is right it is Wilson's over samples. n counts the rows.

    Raises
    ------
    ComparisonError
        If a and b hold other layers or widths.
    LayerError, SelectionError
        If a layer was not captured, or there are fewer than two folds.
    ActivationsError
        If a side has fewer samples than there are folds, or states are NaN, infinite or all equal.
    """
    held, asked = shared_layers(a, b, place), None if layers is None else list(layers)
    if outside := [layer for layer in asked or () if layer not in held]:
        raise LayerError(outside[0], held[0], held[-1])
    whole("folds", folds, least=2)
    if asked == []:
        raise SelectionError("no layers", "give at least one layer, or None for all")
    samples, kinds = _clusters(a, b)
    there = np.unique([samples, kinds], axis=1)  # a sample's many tokens count once
    if (few := np.bincount(there[1], minlength=2).min()) < folds:
        raise ActivationsError(
            f"{few} samples on one side for {folds} folds", "give at least as many samples as folds"
        )
    parts = deal_folds(*there, folds, seed)[samples]
    shares = resampled_shares(int(samples.max()) + 1, n_resamples, seed)
    rows = []
    for layer in held if asked is None else asked:
        both = _finite(torch.cat([states.tensors[layer, place] for states in (a, b)]), layer)
        right = held_out_labels(both, kinds, parts) == kinds
        rows.append({"layer": layer} | _balanced(right, samples, kinds, shares).asdict())
    return pd.DataFrame(rows)


def _two_or_more(found: list[Tensor]) -> list[Tensor]:
    if len(found) < 2:
        raise ActivationsError(
            "states of one sample", "give two samples or more: the interval resamples them"
        )
    return found


def _steps(states: States, step: int, place: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each sample's mean cosines of its tokens at each two layers ``step`` apart.

    With themselves, and with all other tokens.
    """
    layers = layers_at(states, place)
    starts = [layer for layer in layers if step > 0 and layer + step in layers]
    if not starts:
        raise SelectionError(
            f"no two layers are {step!r} apart",
            f"captured at place {place!r}: {', '.join(map(str, layers))}",
        )
    after, reached = None, None
    for layer in starts:
        unit = lambda at: Tokens.of(_two_or_more(examples(states, at, place))).unit()
        before = after if reached == layer else unit(layer)
        after, reached = unit(layer + step), layer + step
        own = (before.rows * after.rows).sum(dim=1)
        # the sum of a token's cosines with all tokens is its cosine with the sum of their
        # unit vectors: no pair is visited
        others = (before.rows @ after.rows.sum(dim=0, dtype=torch.float64).to(own.dtype) - own) / (
            len(own) - 1
        )
        yield (
            layer,
            *(
                Tokens(values[:, None], before.counts).reduced("mean")[:, 0].double().numpy()
                for values in (own, others)
            ),
        )


def _clusters(a: States, b: States) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """For each row of a, then of b, the number of its sample, and 1 for a and 0 for b.

    Numbers are the same in both.
    """
    tables = pd.concat([states.table[["sample", "id"]] for states in (a, b)], ignore_index=True)
    return tables.groupby(["sample", "id"], sort=True).ngroup().to_numpy(), np.repeat(
        [1, 0], [len(a), len(b)]
    )


def _finite(rows: Tensor, layer: int) -> Float[Tensor, "rows d"]:
    rows = rows.double()
    if not torch.isfinite(rows).all() or not (rows != rows[0]).any():
        raise ActivationsError(
            f"states at layer {layer} are NaN, infinite or all equal",
            "give states in which something can be told apart",
        )
    return rows


def _balanced(
    right: np.ndarray, samples: np.ndarray, kinds: np.ndarray, shares: np.ndarray
) -> Estimate:
    """The mean of the two classes' shares of right rows, resampled by sample."""
    count = lambda weights: np.bincount(samples, weights, minlength=shares.shape[1])
    sides = [(count((kinds == kind) & right), count(kinds == kind)) for kind in (0, 1)]
    value = float(np.mean([hits.sum() / rows.sum() for hits, rows in sides]))
    if value in (0.0, 1.0):
        found = proportion(np.full(shares.shape[1], value))
        return Estimate(value, found.low, found.high, len(right))
    with np.errstate(invalid="ignore"):  # a resample may miss one class altogether
        drawn = np.mean([(shares @ hits) / (shares @ rows) for hits, rows in sides], axis=0)
    return interval(value, drawn, len(right))
