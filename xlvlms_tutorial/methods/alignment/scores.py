"""Alignment of perceptual and textual tokens.

Similarity of examples, narrow cones, and the implicit alignment score over layers. After
Shukor and Cord, "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to
Multimodal Inputs" (arXiv 2405.16700).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States, chosen
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, LengthError, SelectionError
from xlvlms_tutorial.methods.alignment.similarity import (
    Examples,
    compared,
    directions,
    examples,
    require_mode,
)
from xlvlms_tutorial.metrics.intervals import Estimate, interval, resampled_shares

READINGS = ("layer", "input")


@dataclass(frozen=True, eq=False)
class Alignment:
    """Similarity of P and T by layer.

    ``values`` (L,), the same in each resample of the examples ``drawn`` (r, L), and n examples.
    """

    layers: tuple[int, ...]
    values: Float[np.ndarray, " layers"]
    drawn: Float[np.ndarray, "r layers"]
    n: int

    @property
    def profile(self) -> pd.DataFrame:
        """One row a layer: layer, value, low, high, n."""
        found = (
            interval(value, drawn, self.n)
            for value, drawn in zip(self.values.tolist(), self.drawn.T, strict=True)
        )
        return pd.DataFrame(
            [{"layer": layer} | one.asdict() for layer, one in zip(self.layers, found, strict=True)]
        )

    @property
    def score(self) -> Estimate:
        """The mean over layers."""
        return interval(float(self.values.mean()), self.drawn.mean(axis=1), self.n)

    @property
    def slope(self) -> Estimate:
        r"""The least-squares slope over :math:`l/L`: the change from the input to the last layer.

        Raises
        ------
        SelectionError
            If there is one layer only.
        """
        if len(self.layers) < 2:
            raise SelectionError(
                f"a slope over layer {self.layers[0]} alone", "capture two layers or more"
            )
        depth = np.array(self.layers) / max(self.layers)
        weights = (depth - depth.mean()) / ((depth - depth.mean()) ** 2).sum()
        return interval(float(self.values @ weights), self.drawn @ weights, self.n)


def alignment(
    perceptual: States,
    textual: States,
    mode: str = "avg",
    reading: str = "layer",
    pairs: str = "all",
    place: str = WHOLE_BLOCK,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Alignment:
    r"""Similarity of perceptual with textual tokens at every layer.

    Each layer in the same resamples of the examples.

    .. math::

        \mathrm{IMA}(l) = \frac{1}{N^2} \sum_{i,j} s(P_i^{l'}, T_j^l),
        \quad l' = l \text{ ("layer") or } 0 \text{ ("input")}

    Reading "input" sets the tokens that enter the model against the text at each layer, as the
    authors' score does (arXiv 2405.16700). ``mode`` is s as in :func:`similarity`; ``pairs`` "all"
    is the sum above, "matched" takes i = j alone. Where P and T are of the same samples these are
    resampled together, and the share of matched pairs stays 1/N; else each side is resampled alone.

    Raises
    ------
    SelectionError
        If a mode, reading or kind of pairs is unknown, or a place, or layer 0
        for "input", was not captured.
    ComparisonError
        If the two have other layers (for "layer") or widths, or matched pairs are of other samples.
    ActivationsError
        If there are too few examples to resample, or tokens are NaN, infinite or zero.
    """
    if reading not in READINGS:
        raise SelectionError(f"unknown reading {reading!r}", f"allowed: {', '.join(READINGS)}")
    require_mode(mode, pairs)
    layers = (
        shared_layers(perceptual, textual, place)
        if reading == "layer"
        else layers_at(textual, place)
    )
    same = _samples(perceptual) == _samples(textual)
    if pairs == "matched" and not same and len(_samples(perceptual)) == len(_samples(textual)):
        raise ComparisonError(
            "samples",
            _told(perceptual),
            _told(textual),
            'match tokens of the same samples, or take pairs="all"',
        )
    entering = directions(examples(perceptual, 0), mode) if reading == "input" else None
    shares: list[np.ndarray] = []
    found = []
    for layer in layers:
        p = directions(examples(perceptual, layer, place), mode) if entering is None else entering
        s = (
            compared(p, directions(examples(textual, layer, place), mode), mode, pairs)
            .double()
            .numpy()
        )
        shares = shares or [
            resampled_shares(_enough(n), n_resamples, seed + k) for k, n in enumerate(s.shape)
        ]
        found.append(
            _over_matched(s, shares[0])
            if s.ndim == 1
            else _over_pairs(s, shares[0], shares[0 if same else 1], same)
        )
    n = s.shape[0] if same else sum(s.shape)
    return Alignment(
        tuple(layers),
        np.array([value for value, _ in found]),
        np.stack([drawn for _, drawn in found], axis=1),
        n,
    )


def alignment_profile(perceptual: States, textual: States, **how: str | int) -> pd.DataFrame:
    """Similarity of perceptual with textual tokens by layer: columns layer, value, low, high, n.

    ``how`` as in :func:`alignment`.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError
        As :func:`alignment`.
    """
    return alignment(perceptual, textual, **how).profile


def alignment_score(perceptual: States, textual: States, **how: str | int) -> Estimate:
    """The alignment score: the mean of the profile over layers.

    One bootstrap over examples for all; ``how`` as in :func:`alignment`.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError
        As :func:`alignment`.
    """
    return alignment(perceptual, textual, **how).score


def alignment_slope(perceptual: States, textual: States, **how: str | int) -> Estimate:
    """The change of the profile from the input to the last layer, by least squares.

    ``how`` as in :func:`alignment`.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError
        As :func:`alignment`, and if there is one layer only.
    """
    return alignment(perceptual, textual, **how).slope


def cones(
    groups: Mapping[str, Examples],
    mode: str = "avg",
    paired: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Similarity within each group of examples, and between every two.

    Columns a, b, kind ("intra", "inter"), value, low, high, n. Within a group it is the mean
    over all pairs of different examples, between two that over all pairs. Intervals resample
    examples, not pairs; ``paired`` says that example i of every group is the same sample, so
    that they are resampled together.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError
        As :func:`similarity`, and if there is no group, or one with too few examples to resample.
    LengthError
        If paired groups are not equally large.
    """
    found = _cones(groups, mode, paired, n_resamples, seed)
    kinds = {pair: "intra" if pair[0] == pair[1] else "inter" for pair in found}
    rows = [(pair, interval(value, drawn, n)) for pair, (value, drawn, n) in found.items()]
    return pd.DataFrame(
        [{"a": pair[0], "b": pair[1], "kind": kinds[pair]} | one.asdict() for pair, one in rows]
    )


def narrowness(
    groups: Mapping[str, Examples],
    mode: str = "avg",
    paired: bool = False,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean similarity within groups minus that between groups; 0 without cones.

    All groups and all pairs of groups count alike.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError, LengthError
        As :func:`cones`, and if there is one group only.
    """
    if len(groups) < 2:
        raise SelectionError(
            f"{len(groups)} group",
            "give two or more: between them lies what cones are narrow against",
        )
    found = _cones(groups, mode, paired, n_resamples, seed)
    inside, between = (
        [one for (a, b), one in found.items() if (a == b) is within] for within in (True, False)
    )
    values = [float(np.mean([value for value, _, _ in side])) for side in (inside, between)]
    drawn = [np.mean([resampled for _, resampled, _ in side], axis=0) for side in (inside, between)]
    n = [n for _, _, n in inside]
    return interval(values[0] - values[1], drawn[0] - drawn[1], n[0] if paired else sum(n))


def shuffled(groups: Mapping[str, Examples], seed: int = 0) -> dict[str, list[Tensor]]:
    """The same examples with their labels dealt anew, as many to each group as before.

    What :func:`narrowness` is without cones.

    Raises
    ------
    SelectionError
        If there is no group.
    """
    if not groups:
        raise SelectionError("no groups", "give a name and examples for each")
    pool = [tokens for group in groups.values() for tokens in group]
    order = iter(np.random.default_rng(seed).permutation(len(pool)).tolist())
    return {name: [pool[next(order)] for _ in range(len(group))] for name, group in groups.items()}


def layers_at(states: States, place: str = WHOLE_BLOCK) -> list[int]:
    """The layers that were captured at a place, in order.

    Raises
    ------
    SelectionError
        If there are none.
    """
    return sorted(layer for layer, _ in chosen(states.tensors, None, place))


def shared_layers(one: States, other: States, place: str = WHOLE_BLOCK) -> list[int]:
    """The layers that both hold at a place.

    Raises
    ------
    SelectionError
        If one was not captured there.
    ComparisonError
        If layers or widths differ.
    """
    first, second = layers_at(one, place), layers_at(other, place)
    if first != second:
        raise ComparisonError(
            f"layers at place {place!r}", first, second, "capture the same layers of both"
        )
    widths = [states.tensors[first[0], place].shape[-1] for states in (one, other)]
    if widths[0] != widths[1]:
        raise ComparisonError(
            f"widths at place {place!r}", *widths, "compare tokens of the same language model"
        )
    return first


def _samples(states: States) -> list[tuple[int, str]]:
    return sorted(set(zip(states.table["sample"].tolist(), states.table["id"], strict=True)))


def _told(states: States) -> str:
    ids = [name for _, name in _samples(states)]
    return f"{len(ids)} from {ids[0]} to {ids[-1]}"


def _enough(n: int) -> int:
    if n < 3:
        raise ActivationsError(
            f"{n} example{'s' * (n > 1)}",
            "give 3 or more: pairs of examples are averaged, and examples resampled",
        )
    return n


def _over_matched(
    s: Float[np.ndarray, " n"], share: Float[np.ndarray, "r n"]
) -> tuple[float, np.ndarray]:
    return float(s.mean()), share @ s


def _over_pairs(
    s: Float[np.ndarray, "n m"],
    left: Float[np.ndarray, "r n"],
    right: Float[np.ndarray, "r m"],
    same: bool,
) -> tuple[float, np.ndarray]:
    """The mean over all pairs, and in each resample.

    Where both sides are the same samples, matched pairs stay 1/n of the pairs.
    """
    if not same:
        return float(s.mean()), ((left @ s) * right).sum(axis=1)
    return (
        float(s.mean()),
        left @ s.diagonal() / len(s) + (1 - 1 / len(s)) * _over_others(s, left)[1],
    )


def _over_others(
    s: Float[np.ndarray, "n n"], share: Float[np.ndarray, "r n"]
) -> tuple[float, np.ndarray]:
    r"""The mean over pairs :math:`i \neq j`; in a resample a case drawn twice is no pair.

    NaN where one case is all that was drawn.
    """
    alone, n = s.diagonal(), len(s)
    total = ((share @ s) * share).sum(axis=1) - share**2 @ alone
    pairs = 1 - (share**2).sum(axis=1)
    drawn = np.divide(total, pairs, out=np.full(len(share), np.nan), where=pairs > 0.5 / n)
    return float((s.sum() - alone.sum()) / (n * (n - 1))), drawn


def _cones(
    groups: Mapping[str, Examples], mode: str, paired: bool, n_resamples: int, seed: int
) -> dict[tuple[str, str], tuple[float, np.ndarray, int]]:
    """The mean similarity of each group and of each two, and the number of examples.

    The same in each resample.
    """
    if not groups:
        raise SelectionError("no groups", "give a name and examples for each")
    require_mode(mode, "all")
    sizes = {name: len(group) for name, group in groups.items()}
    if paired and len(set(sizes.values())) > 1:
        raise LengthError(**sizes)
    made = {name: directions(group, mode) for name, group in groups.items()}
    shares = {
        name: resampled_shares(_enough(n), n_resamples, seed + k * (not paired))
        for k, (name, n) in enumerate(sizes.items())
    }
    found = {}
    for a, b in combinations_with_replacement(groups, 2):
        s = compared(made[a], made[b], mode, "all").double().numpy()
        value, drawn = (
            _over_others(s, shares[a]) if a == b else _over_pairs(s, shares[a], shares[b], paired)
        )
        found[a, b] = (value, drawn, sizes[a] if paired or a == b else sizes[a] + sizes[b])
    return found
