"""Alignment of perceptual and textual tokens.

Similarity of examples, narrow cones, and the implicit alignment score over layers. After
Shukor and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (2024, arXiv 2405.16700).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, combinations_with_replacement

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations, chosen
from xlvlms_tutorial.errors import incomparable
from xlvlms_tutorial.methods.alignment.similarity import (
    Examples,
    compared,
    directions,
    examples,
    require_mode,
)
from xlvlms_tutorial.metrics.intervals import Estimate, percentile_interval, resampled_shares
from xlvlms_tutorial.validation import (
    require,
    require_equal,
    require_same_length,
)

READINGS = ("layer", "input")  # the argument ``reading`` of alignment


@dataclass(frozen=True, eq=False)
class Alignment:
    """Similarity of perceptual and textual tokens at each layer, with its resamples.

    :func:`alignment` returns it. Its properties are the profile over layers, the mean (the
    alignment score of Shukor and Cord, 2024, arXiv 2405.16700) and the slope.

    Parameters
    ----------
    layers : tuple of int
        The layers that were compared.
    values : array (layers,)
        The mean similarity at each layer.
    resampled : array (r, layers)
        The same in each of r resamples of the examples.
    n : int
        Number of examples.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.alignment import Alignment
    >>> values = np.array([0.0, 0.5, 1.0])
    >>> result = Alignment((0, 1, 2), values, np.tile(values, (100, 1)), n=4)
    >>> result.profile["value"].tolist()
    [0.0, 0.5, 1.0]
    >>> result.score.value, result.slope.value
    (0.5, 1.0)
    """

    layers: tuple[int, ...]
    values: Float[np.ndarray, " layers"]
    resampled: Float[np.ndarray, "r layers"]
    n: int

    @property
    def profile(self) -> pd.DataFrame:
        """One row for each layer, with columns ``layer``, ``value``, ``low``, ``high`` and ``n``.

        The interval is at 95 %, over examples.
        """
        rows = []
        for k, layer in enumerate(self.layers):
            estimate = percentile_interval(float(self.values[k]), self.resampled[:, k], self.n)
            rows.append({"layer": layer, **estimate.asdict()})
        return pd.DataFrame(rows)

    @property
    def score(self) -> Estimate:
        """The alignment score: the mean over layers, with its interval."""
        return percentile_interval(float(self.values.mean()), self.resampled.mean(axis=1), self.n)

    @property
    def slope(self) -> Estimate:
        r"""The least-squares slope over :math:`l/L`: the change from the input to the last layer.

        Raises
        ------
        InputError
            If there is a single layer.
        """
        require(
            len(self.layers) >= 2,
            f"a slope over layer {self.layers[0]} alone",
            "capture two layers or more",
        )
        depth = np.array(self.layers) / max(self.layers)
        centred = depth - depth.mean()
        weights = centred / (centred**2).sum()
        slope = float(self.values @ weights)
        return percentile_interval(slope, self.resampled @ weights, self.n)


def alignment(
    perceptual: Activations,
    textual: Activations,
    mode: str = "avg",
    reading: str = "layer",
    pairs: str = "all",
    site: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Alignment:
    r"""Compute the similarity of perceptual with textual tokens at every layer.

    Use it to see how close image (or video, audio) tokens are to text inside the model, after
    Shukor and Cord (2024, arXiv 2405.16700). All layers use the same resamples of the examples, so
    profile, score and slope have consistent intervals.

    .. math::

        \mathrm{IMA}(l) = \frac{1}{N^2} \sum_{i,j} s(P_i^{l'}, T_j^l),
        \quad l' = l \text{ ("layer") or } 0 \text{ ("input")}

    Where P and T are of the same samples, these are resampled together and the share of matched
    pairs stays 1/N; otherwise each side is resampled on its own.

    Parameters
    ----------
    perceptual : Activations
        Captured activations P of image, video or audio tokens, of three samples or more.
    textual : Activations
        Captured activations T of text tokens, of three samples or more.
    mode : str, default "avg"
        The similarity s of two examples; the modes of :func:`similarity`.
    reading : {"layer", "input"}, default "layer"
        "layer" compares both at the same layer. "input" compares the perceptual tokens that enter
        the model (layer 0) with the text at each layer, as the authors' score does.
    pairs : {"all", "matched"}, default "all"
        "all" is the sum above, "matched" takes i = j alone.
    site : str, default "resid_post"
        Where in the layers they were captured; "resid_post" is the residual stream after the block.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    Alignment
        The similarity at each layer, with properties ``profile``, ``score`` and ``slope``.

    Raises
    ------
    InputError
        If a mode, reading or kind of pairs is unknown, or a site, or layer 0 for "input", was not
        captured. If the two have other layers (for "layer") or widths, or matched pairs are of
        other samples. If there are too few examples to resample, or tokens are NaN, infinite or
        zero.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import alignment
    >>> table = pd.DataFrame({"sample": [0, 1, 2, 3], "id": list("abcd")})
    >>> tokens = torch.eye(4)
    >>> text = Activations({(0, "resid_post"): tokens, (1, "resid_post"): tokens}, table, {})
    >>> image = Activations(
    ...     {(0, "resid_post"): tokens.roll(1, 0), (1, "resid_post"): tokens}, table, {}
    ... )
    >>> alignment(image, text, pairs="matched").profile["value"].tolist()
    [0.0, 1.0]
    >>> alignment(image, text).profile["value"].tolist()
    [0.25, 0.25]
    """
    require(reading in READINGS, f"unknown reading {reading!r}", f"allowed: {', '.join(READINGS)}")
    require_mode(mode, pairs)
    if reading == "layer":
        layers = shared_layers(perceptual, textual, site)
    else:
        layers = layers_at(textual, site)
    p_samples = _samples(perceptual)
    t_samples = _samples(textual)
    same = p_samples == t_samples
    if pairs == "matched" and not same and len(p_samples) == len(t_samples):
        raise incomparable(
            "samples",
            _described(p_samples),
            _described(t_samples),
            'match tokens of the same samples, or take pairs="all"',
        )
    if reading == "input":
        p = directions(examples(perceptual, 0), mode)
    shares: list[np.ndarray] = []
    values = []
    resamples = []
    for layer in layers:
        if reading == "layer":
            p = directions(examples(perceptual, layer, site), mode)
        t = directions(examples(textual, layer, site), mode)
        s = compared(p, t, mode, pairs).double().numpy()
        if not shares:  # the same for all layers
            for k, n in enumerate(s.shape):
                shares.append(resampled_shares(_enough(n), n_resamples, seed + k))
        if s.ndim == 1:
            value, resampled = _over_matched(s, shares[0])
        else:
            t_shares = shares[0 if same else 1]
            value, resampled = _over_pairs(s, shares[0], t_shares, same)
        values.append(value)
        resamples.append(resampled)
    n = s.shape[0] if same else sum(s.shape)
    return Alignment(tuple(layers), np.array(values), np.stack(resamples, axis=1), n)


def alignment_profile(
    perceptual: Activations, textual: Activations, **options: str | int
) -> pd.DataFrame:
    """Tabulate the similarity of perceptual with textual tokens at each layer.

    Use it to plot alignment over depth; it is ``alignment(...).profile``.

    Parameters
    ----------
    perceptual : Activations
        Captured activations of image, video or audio tokens.
    textual : Activations
        Captured activations of text tokens.
    **options
        The options of :func:`alignment`: ``mode``, ``reading``, ``pairs``, ``site``,
        ``n_resamples`` and ``seed``, with the same defaults.

    Returns
    -------
    DataFrame
        One row for each layer, with columns ``layer``, ``value``, ``low``, ``high`` (95 % interval
        over examples) and ``n`` (examples).

    Raises
    ------
    InputError
        If a mode, reading or kind of pairs is unknown, or a site or layer was not captured. If the
        two have other layers or widths, or matched pairs are of other samples. If there are too few
        examples to resample, or tokens are NaN, infinite or zero.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> from xlvlms_tutorial.methods.alignment import alignment_profile
    >>> table = pd.DataFrame({"sample": [0, 1, 2, 3], "id": list("abcd")})
    >>> tokens = torch.eye(4)
    >>> text = Activations({(0, "resid_post"): tokens, (1, "resid_post"): tokens}, table, {})
    >>> image = Activations(
    ...     {(0, "resid_post"): tokens.roll(1, 0), (1, "resid_post"): tokens}, table, {}
    ... )
    >>> profile = alignment_profile(image, text, pairs="matched")
    >>> profile[["layer", "value", "n"]].to_dict("records")
    [{'layer': 0, 'value': 0.0, 'n': 4}, {'layer': 1, 'value': 1.0, 'n': 4}]
    """
    return alignment(perceptual, textual, **options).profile


def cones(
    groups: Mapping[str, Examples],
    mode: str = "avg",
    paired: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the similarity within each group of examples and between each two groups.

    Use it to see narrow cones: groups (modalities, data sets) whose examples are more similar to
    each other than to those of other groups. Within a group the mean is over all pairs of different
    examples, between two groups over all pairs. Intervals resample examples, not pairs.

    Parameters
    ----------
    groups : mapping of str to examples
        Tokens of the examples of each group, as for :func:`similarity`; three examples or more.
    mode : str, default "avg"
        How two examples are compared; one of the modes of :func:`similarity` for all pairs.
    paired : bool, default False
        Whether example i of every group is the same sample, so that they are resampled together.
        The groups then have the same number of examples.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each group and each two groups, with columns ``a``, ``b``, ``kind`` ("intra" or
        "inter"), ``value``, ``low``, ``high`` (95 % interval) and ``n`` (examples).

    Raises
    ------
    InputError
        If the mode is unknown, or there is no group. If widths differ. If a group has too few
        examples to resample, or tokens are missing, NaN, infinite or zero. If the numbers of
        examples of paired groups differ.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.alignment import cones
    >>> groups = {
    ...     "image": torch.tensor([[[1.0, 0.0]]] * 3),
    ...     "text": torch.tensor([[[0.0, 1.0]]] * 3),
    ... }
    >>> table = cones(groups)
    >>> table["kind"].tolist(), table["value"].tolist()
    (['intra', 'inter', 'intra'], [1.0, 0.0, 1.0])
    """
    results = _cones(groups, mode, paired, n_resamples, seed)
    rows = []
    for (a, b), (value, resampled, n) in results.items():
        row = {"a": a, "b": b, "kind": "intra" if a == b else "inter"}
        estimate = percentile_interval(value, resampled, n)
        rows.append(row | estimate.asdict())
    return pd.DataFrame(rows)


def narrowness(
    groups: Mapping[str, Examples],
    mode: str = "avg",
    paired: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean similarity within groups minus that between groups.

    Use it as a single number for :func:`cones`: it is 0 without cones. All groups have equal
    weight, and so have all pairs of groups.

    Parameters
    ----------
    groups : mapping of str to examples
        Tokens of the examples of each group, as for :func:`similarity`; three examples or more.
    mode : str, default "avg"
        How two examples are compared; one of the modes of :func:`similarity` for all pairs.
    paired : bool, default False
        Whether example i of every group is the same sample, so that they are resampled together.
        The groups then have the same number of examples.
    n_resamples : int, default 2000
        Number of resamples of the bootstrap.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        The difference with its interval; n counts examples.

    Raises
    ------
    InputError
        If the mode is unknown, or there are fewer than two groups. If widths differ. If a group has
        too few examples to resample, or tokens are missing, NaN, infinite or zero. If the numbers
        of examples of paired groups differ.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.alignment import narrowness
    >>> groups = {
    ...     "image": torch.tensor([[[1.0, 0.0]]] * 3),
    ...     "text": torch.tensor([[[0.0, 1.0]]] * 3),
    ... }
    >>> narrowness(groups).value
    1.0
    """
    require(
        len(groups) >= 2,
        f"{len(groups)} group",
        "give two or more: between them lies what cones are narrow against",
    )
    intra = []
    inter = []
    for (a, b), result in _cones(groups, mode, paired, n_resamples, seed).items():
        if a == b:
            intra.append(result)
        else:
            inter.append(result)
    intra_value, intra_resampled = _averaged(intra)
    inter_value, inter_resampled = _averaged(inter)
    sizes = [n for _, _, n in intra]
    return percentile_interval(
        intra_value - inter_value,
        intra_resampled - inter_resampled,
        sizes[0] if paired else sum(sizes),
    )


def shuffle_labels(groups: Mapping[str, Examples], seed: int = 0) -> dict[str, list[Tensor]]:
    """Assign the examples to the groups at random, with the same number in each group as before.

    Use it as a control: it shows the value of :func:`narrowness` without cones.

    Parameters
    ----------
    groups : mapping of str to examples
        Tokens of the examples of each group, as for :func:`similarity`.
    seed : int, default 0
        Seed of the assignment.

    Returns
    -------
    dict of str to list of Tensor (t, d)
        Tokens of the examples of each group.

    Raises
    ------
    InputError
        If there is no group.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.alignment import shuffle_labels
    >>> groups = {"image": torch.zeros(3, 2, 4), "text": torch.ones(2, 5, 4)}
    >>> {name: len(group) for name, group in shuffle_labels(groups).items()}
    {'image': 3, 'text': 2}
    """
    require(groups, "no groups", "give a name and examples for each")
    pool = list(chain.from_iterable(groups.values()))
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()
    result = {}
    start = 0
    for name, group in groups.items():
        end = start + len(group)
        result[name] = [pool[k] for k in order[start:end]]
        start = end
    return result


def layers_at(states: Activations, site: str = WHOLE_BLOCK) -> list[int]:
    """List the layers that were captured at a site, in order.

    Raises
    ------
    InputError
        If there are none.
    """
    return sorted(layer for layer, _ in chosen(states.tensors, None, site))


def shared_layers(a: Activations, b: Activations, site: str = WHOLE_BLOCK) -> list[int]:
    """List the layers that were captured in both of two states.

    Parameters
    ----------
    a, b
        Captured activations.
    site
        Where in the layers they were captured.

    Raises
    ------
    InputError
        If one was not captured there. If layers or widths differ.
    """
    a_layers, b_layers = layers_at(a, site), layers_at(b, site)
    require_equal(f"layers at site {site!r}", a_layers, b_layers, "capture the same layers of both")
    a_width = a.tensors[a_layers[0], site].shape[-1]
    b_width = b.tensors[a_layers[0], site].shape[-1]
    require_equal(
        f"widths at site {site!r}", a_width, b_width, "compare tokens of the same language model"
    )
    return a_layers


def _samples(states: Activations) -> list[tuple[int, str]]:
    return sorted(set(zip(states.table["sample"].tolist(), states.table["id"], strict=True)))


def _described(samples: list[tuple[int, str]]) -> str:
    return f"{len(samples)} from {samples[0][1]} to {samples[-1][1]}"


def _enough(n: int) -> int:
    require(
        n >= 3,
        f"{n} example{'s' * (n > 1)}",
        "give 3 or more: pairs of examples are averaged, and examples resampled",
    )
    return n


def _over_matched(
    s: Float[np.ndarray, " n"], share: Float[np.ndarray, "r n"]
) -> tuple[float, np.ndarray]:
    """Return the mean over matched pairs, and that of each resample."""
    return float(s.mean()), share @ s


def _over_pairs(
    s: Float[np.ndarray, "n m"],
    p_share: Float[np.ndarray, "r n"],
    t_share: Float[np.ndarray, "r m"],
    same: bool,
) -> tuple[float, np.ndarray]:
    """The mean over all pairs, and that of each resample.

    Where both sides are the same samples, matched pairs stay 1/n of the pairs.
    """
    n = len(s)
    mean = float(s.mean())
    if not same:
        return mean, ((p_share @ s) * t_share).sum(axis=1)
    matched = p_share @ s.diagonal()
    _, different = _over_different(s, p_share)
    return mean, matched / n + (1 - 1 / n) * different


def _over_different(
    s: Float[np.ndarray, "n n"], share: Float[np.ndarray, "r n"]
) -> tuple[float, np.ndarray]:
    r"""The mean over pairs :math:`i \neq j`, and that of each resample.

    An example that is drawn twice is no pair; a resample of a single example gives NaN.
    """
    n = len(s)
    diagonal = s.diagonal()
    squared = share**2
    total = ((share @ s) * share).sum(axis=1) - squared @ diagonal
    pairs = 1 - squared.sum(axis=1)
    undefined = np.full(len(share), np.nan)
    resampled = np.divide(total, pairs, out=undefined, where=pairs > 0.5 / n)
    mean = (s.sum() - diagonal.sum()) / (n * (n - 1))
    return float(mean), resampled


def _cones(
    groups: Mapping[str, Examples], mode: str, paired: bool, n_resamples: int, seed: int
) -> dict[tuple[str, str], tuple[float, np.ndarray, int]]:
    """Mean similarity, its resamples and number of examples for each group and each two groups."""
    require(groups, "no groups", "give a name and examples for each")
    require_mode(mode, "all")
    sizes = {name: len(group) for name, group in groups.items()}
    if paired:
        require_same_length(**sizes)
    tokens = {name: directions(group, mode) for name, group in groups.items()}
    shares = {}
    for k, (name, n) in enumerate(sizes.items()):
        # paired groups are resampled together: by the same seed
        group_seed = seed if paired else seed + k
        shares[name] = resampled_shares(_enough(n), n_resamples, group_seed)
    results = {}
    for a, b in combinations_with_replacement(groups, 2):
        s = compared(tokens[a], tokens[b], mode, "all").double().numpy()
        if a == b:
            value, resampled = _over_different(s, shares[a])
        else:
            value, resampled = _over_pairs(s, shares[a], shares[b], paired)
        n = sizes[a] if paired or a == b else sizes[a] + sizes[b]
        results[a, b] = (value, resampled, n)
    return results


def _averaged(results: list[tuple[float, np.ndarray, int]]) -> tuple[float, np.ndarray]:
    """The mean of values, and that of each resample."""
    values, resampled, _ = zip(*results, strict=True)
    return float(np.mean(values)), np.mean(resampled, axis=0)
