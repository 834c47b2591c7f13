"""Geometry of tokens over layers.

How slowly they change, how large their norms are, and whether a plane separates two kinds of them.
After Shukor and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (2024, arXiv 2405.16700).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.errors import LayerError
from xlvlms_tutorial.methods.alignment.scores import layers_at, shared_layers
from xlvlms_tutorial.methods.alignment.similarity import Tokens, examples
from xlvlms_tutorial.methods.concepts.base import whole
from xlvlms_tutorial.methods.probes import deal_folds, held_out_labels
from xlvlms_tutorial.metrics.intervals import (
    Estimate,
    bootstrap,
    percentile_interval,
    proportion,
    resampled_shares,
)
from xlvlms_tutorial.validation import require, require_one_of


def consecutive_profile(
    states: Activations,
    step: int = 1,
    site: str = WHOLE_BLOCK,
    others: str = "all",
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the cosine of tokens with themselves ``step`` layers later, at each layer.

    Use it to see where tokens change. The baseline is the cosine of each token with other tokens
    ``step`` layers later: tokens in a narrow cone are similar to all others, and neighbours to each
    other more than that.

    Parameters
    ----------
    states : Activations
        Captured activations with one row for each token, of two samples or more.
    step : int, default 1
        Distance of the two layers.
    site : str, default "resid_post"
        Where in the layers they were captured; "resid_post" is the residual stream after the block.
    others : {"all", "neighbour"}, default "all"
        The other tokens of the baseline: all of all samples, or the one that stands before the
        token in its sample (before the first, the last), which is the harder baseline.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each pair of layers, with columns ``layer``, ``to``, ``value`` (mean over
        samples of the mean over a sample's tokens), ``low``, ``high`` (95 % interval over samples),
        ``n`` (samples) and ``rival`` (the baseline).

    Raises
    ------
    InputError
        If no two captured layers are ``step`` apart, or the site was not captured. If there are
        fewer than two samples, or tokens are NaN, infinite or zero. If ``others`` is unknown, or
        "neighbour" with a sample of one token.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import consecutive_profile
    >>> table = pd.DataFrame({"sample": [0, 1, 2, 3], "id": list("abcd")})
    >>> states = Activations(
    ...     {(0, "resid_post"): torch.eye(4), (1, "resid_post"): torch.eye(4)}, table, {}
    ... )
    >>> consecutive_profile(states)[["layer", "to", "value", "rival"]].to_dict("records")
    [{'layer': 0, 'to': 1, 'value': 1.0, 'rival': 0.0}]
    """
    rows = []
    for layer, same, different in _steps(states, step, site, others):
        estimate = bootstrap(same, n_resamples=n_resamples, seed=seed)
        row = {"layer": layer, "to": layer + step, **estimate.asdict()}
        rows.append(row | {"rival": float(different.mean())})
    return pd.DataFrame(rows)


def persistence(
    states: Activations,
    step: int = 1,
    site: str = WHOLE_BLOCK,
    others: str = "all",
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate how much more similar tokens are to themselves than to others ``step`` layers later.

    Use it as a single number for :func:`consecutive_profile`: value minus baseline, averaged over
    layers, with one bootstrap over samples.

    Parameters
    ----------
    states : Activations
        Captured activations with one row for each token, of two samples or more.
    step : int, default 1
        Distance of the two layers.
    site : str, default "resid_post"
        Where in the layers they were captured; "resid_post" is the residual stream after the block.
    others : {"all", "neighbour"}, default "all"
        The other tokens of the baseline: all of all samples, or the one that stands before the
        token in its sample (before the first, the last), which is the harder baseline.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        The mean difference of cosines; n counts samples.

    Raises
    ------
    InputError
        If no two captured layers are ``step`` apart, or the site was not captured. If there are
        fewer than two samples, or tokens are NaN, infinite or zero. If ``others`` is unknown, or
        "neighbour" with a sample of one token.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import persistence
    >>> table = pd.DataFrame({"sample": [0, 1, 2, 3], "id": list("abcd")})
    >>> states = Activations(
    ...     {(0, "resid_post"): torch.eye(4), (1, "resid_post"): torch.eye(4)}, table, {}
    ... )
    >>> persistence(states).value
    1.0
    """
    steps = _steps(states, step, site, others)
    excess = np.stack([same - different for _, same, different in steps])
    return bootstrap(excess.mean(axis=0), n_resamples=n_resamples, seed=seed)


def norms(
    states: Activations,
    statistic: str = "median",
    site: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compute the norm of tokens at each layer.

    Use it to compare the scale of image and text tokens over depth:
    :math:`\frac{1}{N} \sum_i \mathrm{stat}_t \lVert x_{i,t} \rVert_2`.

    Parameters
    ----------
    states : Activations
        Captured activations with one row for each token, of two samples or more.
    statistic : {"median", "mean", "max", "min"}, default "median"
        Statistic over the tokens of a sample; the median is that of Shukor and Cord (2024,
        arXiv 2405.16700).
    site : str, default "resid_post"
        Where in the layers they were captured; "resid_post" is the residual stream after the block.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each layer, with columns ``layer``, ``value`` (mean over samples), ``low``,
        ``high`` (95 % interval over samples) and ``n`` (samples).

    Raises
    ------
    InputError
        If the statistic is unknown, or the site was not captured. If there are fewer than two
        samples, or tokens are NaN or infinite.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import norms
    >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
    >>> tokens = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> states = Activations({(15, "resid_post"): tokens}, table, {})
    >>> norms(states)[["layer", "value", "n"]].to_dict("records")
    [{'layer': 15, 'value': 7.5, 'n': 2}]
    """
    rows = []
    for layer in layers_at(states, site):
        tokens = Tokens.of(_two_or_more(examples(states, layer, site)))
        token_norms = torch.linalg.vector_norm(tokens.rows, dim=1, keepdim=True)
        by_sample = Tokens(token_norms, tokens.counts).reduced(statistic)[:, 0].numpy()
        estimate = bootstrap(by_sample, n_resamples=n_resamples, seed=seed)
        rows.append({"layer": layer, **estimate.asdict()})
    return pd.DataFrame(rows)


def linear_probe(
    a: Activations,
    b: Activations,
    layers: Iterable[int] | None = None,
    folds: int = 5,
    site: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compute the balanced accuracy of a linear probe of two sets of activations, at each layer.

    Use it to see where a plane separates two kinds of tokens, such as image and text: 0.5 is
    chance, 1 is a perfect separation. The probe is a ridge regression on :math:`\pm 1` (regularised
    linear discriminant analysis) in which both classes have equal weight, on activations
    standardised by the training rows:
    :math:`w = \arg\min \sum_i c_i (y_i - w^\top z_i - b)^2 + \lVert w \rVert^2`. It has a closed
    form, so that 31 layers of 200 rows take a second or two. All rows of a sample are in the same
    fold, so that no sample is in training and in test.

    Parameters
    ----------
    a : Activations
        Captured activations of the first class.
    b : Activations
        Captured activations of the second class, at the same layers and of the same width.
    layers : iterable of int, optional
        Layers among the captured ones. None means all of them.
    folds : int, default 5
        Number of folds of the cross-validation, two or more.
    site : str, default "resid_post"
        Where in the layers they were captured; "resid_post" is the residual stream after the block.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the folds and of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each layer, with columns ``layer``, ``value`` (balanced accuracy on held-out
        rows), ``low``, ``high`` (95 % interval over samples; Wilson's where all predictions are
        right, or all wrong) and ``n`` (rows).

    Raises
    ------
    InputError
        If a and b hold other layers or widths. If a layer was not captured, or there are fewer than
        two folds. If a side has fewer samples than there are folds, or states are NaN, infinite or
        all equal.
    LayerError
        If a layer was not captured, or there are fewer than two folds.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import linear_probe
    >>> random = torch.Generator().manual_seed(0)
    >>> tokens = torch.randn(10, 4, generator=random)
    >>> table = pd.DataFrame({"sample": range(10), "id": list("abcdefghij")})
    >>> image = Activations({(15, "resid_post"): tokens + 5}, table, {})
    >>> text = Activations({(15, "resid_post"): tokens - 5}, table, {})
    >>> linear_probe(image, text)[["layer", "value", "n"]].to_dict("records")
    [{'layer': 15, 'value': 1.0, 'n': 20}]
    """
    captured = shared_layers(a, b, site)
    layers = captured if layers is None else list(layers)
    for layer in layers:
        if layer not in captured:
            raise LayerError(layer, captured[0], captured[-1])
    whole("folds", folds, least=2)
    require(layers, "no layers", "give at least one layer, or None for all")
    samples, kinds = _clusters(a, b)
    members = np.unique([samples, kinds], axis=1)  # a sample counts once, not once for each token
    fewest = np.bincount(members[1], minlength=2).min()
    require(
        fewest >= folds,
        f"{fewest} samples on one side for {folds} folds",
        "give at least as many samples as folds",
    )
    row_folds = deal_folds(*members, folds, seed)[samples]
    shares = resampled_shares(int(samples.max()) + 1, n_resamples, seed)
    rows = []
    for layer in layers:
        tokens = torch.cat([a.tensors[layer, site], b.tensors[layer, site]])
        predicted = held_out_labels(_finite(tokens, layer), kinds, row_folds)
        accuracy = _balanced(predicted == kinds, samples, kinds, shares)
        rows.append({"layer": layer, **accuracy.asdict()})
    return pd.DataFrame(rows)


def _two_or_more(tokens: list[Tensor]) -> list[Tensor]:
    require(
        len(tokens) >= 2,
        "states of one sample",
        "give two samples or more: the interval resamples them",
    )
    return tokens


def _steps(
    states: Activations, step: int, site: str, others: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Mean cosines of each sample's tokens, for each pair of layers that are ``step`` apart.

    Yields the first layer, the cosines of tokens with themselves, and those with other tokens.
    """
    require_one_of(others, ("all", "neighbour"), "others")
    layers = layers_at(states, site)
    starts = [layer for layer in layers if step > 0 and layer + step in layers]
    require(
        starts,
        f"no two layers are {step!r} apart",
        f"captured at site {site!r}: {', '.join(map(str, layers))}",
    )
    after = None
    after_layer = None
    for layer in starts:
        before = after if after_layer == layer else _unit_tokens(states, layer, site)
        after_layer = layer + step
        after = _unit_tokens(states, after_layer, site)
        same = (before.rows * after.rows).sum(dim=1)
        if others == "neighbour":
            different = (before.rows * after.rows[_one_before(after.counts)]).sum(dim=1)
        else:
            # the sum of a token's cosines with all tokens is its product with the sum of their
            # unit vectors: no pair is visited
            all_tokens = after.rows.sum(dim=0, dtype=torch.float64).to(same.dtype)
            total = before.rows @ all_tokens
            different = (total - same) / (len(same) - 1)
        yield layer, _sample_means(same, before), _sample_means(different, before)


def _one_before(counts: Int[Tensor, " n"]) -> Int[Tensor, " tokens"]:
    """For each token the row of the one before it in its sample, for the first that of the last."""
    require(
        counts.min() >= 2,
        'a sample of one token with others="neighbour"',
        'give two tokens or more in each sample, or others="all"',
    )
    rows = []
    for sample in torch.arange(int(counts.sum())).split(counts.tolist()):
        rows.append(sample.roll(1))
    return torch.cat(rows)


def _unit_tokens(states: Activations, layer: int, site: str) -> Tokens:
    return Tokens.of(_two_or_more(examples(states, layer, site))).unit()


def _sample_means(values: Float[Tensor, " tokens"], tokens: Tokens) -> Float[np.ndarray, " n"]:
    """The mean of one value for each token over the tokens of each sample."""
    return Tokens(values[:, None], tokens.counts).reduced("mean")[:, 0].double().numpy()


def _clusters(
    a: Activations, b: Activations
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """For each row of a, then of b, the number of its sample, and 1 for a and 0 for b.

    A sample has the same number in both.
    """
    columns = ["sample", "id"]
    tables = pd.concat([a.table[columns], b.table[columns]], ignore_index=True)
    samples = tables.groupby(columns, sort=True).ngroup().to_numpy()
    kinds = np.repeat([1, 0], [len(a), len(b)])
    return samples, kinds


def _finite(rows: Tensor, layer: int) -> Float[Tensor, "rows d"]:
    rows = rows.double()
    require(
        torch.isfinite(rows).all() and (rows != rows[0]).any(),
        f"states at layer {layer} are NaN, infinite or all equal",
        "give states in which something can be told apart",
    )
    return rows


def _balanced(
    correct: np.ndarray, samples: np.ndarray, kinds: np.ndarray, shares: np.ndarray
) -> Estimate:
    """The mean of the accuracies of the two classes, resampled by sample."""
    n_samples = shares.shape[1]
    counts = []
    for kind in (0, 1):
        hits = np.bincount(samples, (kinds == kind) & correct, minlength=n_samples)
        rows = np.bincount(samples, kinds == kind, minlength=n_samples)
        counts.append((hits, rows))
    accuracies = [hits.sum() / rows.sum() for hits, rows in counts]
    value = float(np.mean(accuracies))
    if value in (0.0, 1.0):
        # the bootstrap would claim certainty
        wilson = proportion(np.full(n_samples, value))
        return Estimate(value, wilson.low, wilson.high, len(correct))
    with np.errstate(invalid="ignore"):  # a resample may have no row of a class
        resampled_accuracies = [(shares @ hits) / (shares @ rows) for hits, rows in counts]
        resampled = np.mean(resampled_accuracies, axis=0)
    return percentile_interval(value, resampled, len(correct))
