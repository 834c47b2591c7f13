r"""What a state would say.

Distributions over the vocabulary, read through the unembedding at any layer (the logit lens). A
state :math:`h` of layer l has the distribution
:math:`p = \mathrm{softmax}(W_U \, \mathrm{norm}(h))`, as in "Implicit Multimodal Alignment"
(arXiv 2405.16700). All functions go through the tokens in chunks: of the (n, V) probabilities a
bounded part exists at a time, whatever n is. Divergences and entropies are in nats. States are
those of layers 0 to L, before the final norm; ``norm=False`` leaves that norm out.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from xlvlms_tutorial.activations.activations import States
from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    EstimateError,
    LengthError,
    SelectionError,
)
from xlvlms_tutorial.methods.logit_lens import distributions
from xlvlms_tutorial.metrics.intervals import Estimate, bootstrap, interval, resampled_shares
from xlvlms_tutorial.models.spans import decode
from xlvlms_tutorial.models.vlm import VLM

KINDS = ("P against T", "T against other T", "difference")


def entropy(vlm: VLM, states: Float[Tensor, "n d"], norm: bool = True) -> Float[Tensor, "n"]:
    r"""Entropy of the distribution of each state, in nats.

    0 for a sure word, log V where all words are equally likely.
    :math:`H = \log \sum_v e^{z_v} - \sum_v p_v z_v` from the logits z, which needs no logarithm
    of a probability that may be 0.

    Raises
    ------
    ActivationsError
        If there are no states, or a state or a logit is NaN or infinite.
    ComparisonError
        If the states are not as wide as the model.
    """
    distributions.check(vlm, states)
    return distributions.by_rows(vlm, distributions.entropies, norm, states)


def divergence(
    vlm: VLM,
    p: Float[Tensor, "n d"],
    q: Float[Tensor, "m _"],
    norm: bool = True,
    pairs: str = "matched",
) -> Float[Tensor, "n *m"]:
    r"""Kullback-Leibler divergence of the distributions of states, in nats.

    :math:`\sum_v p_v \log (p_v / q_v)`. ``pairs`` "matched" gives (n,), row i of p against row i of
    q; "all" gives (n, m), each row of p against each row of q. What rounding makes negative is set
    to 0, below which no divergence lies.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`, for either side.
    LengthError
        If matched sides differ in length.
    SelectionError
        If the pairs are neither "matched" nor "all".
    """
    distributions.check(vlm, p)
    distributions.check(vlm, q)
    if pairs == "all":
        return distributions.all_divergences(vlm, p, q, norm)
    if pairs != "matched":
        raise SelectionError(f"unknown pairs {pairs!r}", "allowed: 'matched', 'all'")
    if len(p) != len(q):
        raise LengthError(p=len(p), q=len(q))
    return distributions.by_rows(vlm, distributions.divergences, norm, p, q)


def mean_distribution(
    vlm: VLM, states: Float[Tensor, "n d"], norm: bool = True, groups: ArrayLike | None = None
) -> Float[Tensor, "*g vocabulary"]:
    """The mean of the distributions of all states (V,), or of each group's (g, V).

    ``groups`` (n,) has the group of each state; the means are in the order of sorted labels.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`.
    LengthError
        If ``groups`` has another length.
    """
    distributions.check(vlm, states)
    labels = np.zeros(len(states), dtype=int) if groups is None else np.asarray(groups)
    if len(labels) != len(states):
        raise LengthError(states=len(states), groups=len(labels))
    found = distributions.means(vlm, states, _numbered(labels), norm)[0].cpu()
    return found[0] if groups is None else found


def relative_entropy(p: Float[Tensor, "*n v"], q: Float[Tensor, "*m w"]) -> Float[Tensor, "*k"]:
    r"""Kullback-Leibler divergence of probability vectors, in nats.

    :math:`\sum_v p_v \log (p_v / q_v)`; leading dimensions broadcast. Nothing is smoothed: a word
    with p = 0 adds nothing, and one with q = 0 that p can say makes the divergence infinite.

    Raises
    ------
    ComparisonError
        If the vectors are over vocabularies of different sizes.
    ActivationsError
        If a vector is not a distribution.
    """
    if p.shape[-1] != q.shape[-1]:
        raise ComparisonError(
            "vocabularies",
            p.shape[-1],
            q.shape[-1],
            "compare distributions over the words of one model",
        )
    one, other = (side.double() for side in (p, q))
    for name, side in (("p", one), ("q", other)):
        if not (
            side.numel()
            and (side >= 0).all()
            and torch.isclose(side.sum(dim=-1), side.new_ones(()), rtol=0, atol=1e-3).all()
        ):
            raise ActivationsError(
                f"{name} holds vectors that are not distributions",
                "give numbers of 0 or more that sum to 1",
            )
    terms = torch.where(one > 0, one * (one.log() - other.log()), 0.0)
    return terms.sum(dim=-1).clamp(min=0).to(p.dtype)


def top_words(
    vlm: VLM, states: Float[Tensor, "n d"], k: int = 5, norm: bool = True
) -> pd.DataFrame:
    """The k most probable words of each state.

    Columns row, rank (from 1), token_id, word, probability.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`.
    SelectionError
        If k is not between 1 and V, or the model came without a tokenizer.
    """
    _check_k(vlm, states, k)
    ids, probabilities = distributions.most_probable(vlm, states, k, norm)
    row, rank = np.divmod(np.arange(ids.numel()), k)
    found = pd.DataFrame({"row": row, "rank": rank + 1, "token_id": ids.flatten().numpy()})
    return found.assign(
        word=_words(vlm, found["token_id"]), probability=probabilities.flatten().numpy()
    )


def histogram(
    vlm: VLM, states: Float[Tensor, "n d"], k: int = 1, norm: bool = True
) -> pd.DataFrame:
    """How many states have a word among their k most probable ones.

    Columns token_id, word, count, share, most frequent first. All k words of a state count, so
    counts sum to n k; ``share`` is of the n states. Words that never occur are left out.

    Raises
    ------
    ActivationsError, ComparisonError, SelectionError
        As :func:`top_words`.
    """
    _check_k(vlm, states, k)
    ids, _ = distributions.most_probable(vlm, states, k, norm)
    token, count = np.unique(ids.numpy(), return_counts=True)
    found = pd.DataFrame({"token_id": token, "count": count, "share": count / len(states)})
    found.insert(1, "word", _words(vlm, found["token_id"]))
    return found.sort_values(["count", "token_id"], ascending=[False, True], ignore_index=True)


def entropy_profile(
    vlm: VLM, states: States, layers: Iterable[int] | None = None, norm: bool = True, seed: int = 0
) -> pd.DataFrame:
    """Mean entropy by layer.

    Columns layer, value, low, high (95 %, whole samples resampled), n (tokens);
    all captured layers by default.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`.
    LayerError, SelectionError
        If a layer was not captured.
    EstimateError
        If the states are of fewer than two samples.
    """
    found = {
        layer: entropy(vlm, states[layer], norm)
        for layer in (states.layers if layers is None else layers)
    }
    return _by_layer(found, states, seed)


def consecutive_divergence(
    vlm: VLM,
    states: States,
    step: int = 1,
    norm: bool = True,
    measure: str = "divergence",
    seed: int = 0,
) -> pd.DataFrame:
    r"""How far the distribution of a token moves from layer l to l + ``step``.

    Columns layer, to, value, low, high, n. ``measure`` "divergence" is the mean over
    tokens of :math:`\mathrm{KL}(p_l \| p_{l + step})`, "cosine" that of the cosine of the
    two vectors of probabilities. Intervals are at 95 %, whole samples resampled. The
    logits of each layer are computed once.

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`.
    SelectionError
        If the step is below 1, no two captured layers are that far
        apart, or the measure is unknown.
    EstimateError
        If the states are of fewer than two samples.
    """
    measures = {"divergence": distributions.divergences, "cosine": distributions.cosines}
    if measure not in measures:
        raise SelectionError(
            f"unknown measure {measure!r}", f"allowed: {', '.join(map(repr, measures))}"
        )
    layers = [layer for layer in states.layers if {layer - step, layer + step} & set(states.layers)]
    if step < 1 or not layers:
        raise SelectionError(
            f"no two layers are a step of {step} apart",
            f"captured: {', '.join(map(str, states.layers))}",
        )
    for layer in layers:
        distributions.check(vlm, states[layer])
    found = _by_layer(
        distributions.moves(vlm, {at: states[at] for at in layers}, step, norm, measures[measure]),
        states,
        seed,
    )
    found.insert(1, "to", found["layer"] + step)
    return found


def contrast(
    vlm: VLM,
    perceptual: States,
    textual: States,
    layer: int,
    norm: bool = True,
    n_tokens: int | None = 16,
    seed: int = 0,
) -> dict[str, Estimate]:
    r"""Mean divergence of perceptual from textual tokens at a layer, against that among texts.

    Of textual ones from other textual ones, and the difference. The mean is over all pairs of
    tokens of two different samples, so it depends on no pairing, and it is exact without the
    divergence of any one pair: :math:`\sum_{ij} \mathrm{KL}(p_i \| q_j) / nm = -\overline{H(p)} -
    \sum_v \bar p_v \, \overline{\log q_v}`. ``n_tokens`` of each sample, drawn by ``seed``, take
    part (None: all). The interval (95 %) is the bootstrap over samples, the same for all three; n
    counts the tokens on the left, for the difference both. Memory holds two means (samples, V).

    Raises
    ------
    ActivationsError, ComparisonError
        As :func:`entropy`; also if the two are not of the same model and samples.
    LayerError, SelectionError
        If the layer was not captured.
    EstimateError
        If there are fewer than three samples.
    """
    _check_sides(perceptual, textual)
    (p, of_p), (t, of_t) = (
        _drawn(states, layer, n_tokens, seed) for states in (perceptual, textual)
    )
    distributions.check(vlm, p)
    distributions.check(vlm, t)
    mean, logs, entropies = distributions.means(vlm, t, of_t, norm, logs=True)
    from_t = -entropies[:, None] - mean @ logs.T
    del mean  # the most that is held; P needs as much
    mean, _, entropies = distributions.means(vlm, p, of_p, norm)
    from_p = -entropies[:, None] - mean @ logs.T
    found = (part.clamp_(min=0).double().cpu().numpy() for part in (from_p, from_t))
    return _estimates(*found, np.bincount(of_p), np.bincount(of_t), seed)


def divergence_profile(
    vlm: VLM,
    perceptual: States,
    textual: States,
    layers: Iterable[int] | None = None,
    norm: bool = True,
    n_tokens: int | None = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """:func:`contrast` by layer: columns layer, kind (one of ``KINDS``), value, low, high, n.

    All layers of ``perceptual`` by default.

    Raises
    ------
    ActivationsError, ComparisonError, LayerError, SelectionError, EstimateError
        As :func:`contrast`.
    """
    rows = []
    for layer in perceptual.layers if layers is None else layers:
        found = contrast(vlm, perceptual, textual, layer, norm, n_tokens, seed)
        rows += [
            {"layer": layer, "kind": kind, **estimate.asdict()} for kind, estimate in found.items()
        ]
    return pd.DataFrame(rows)


def _by_layer(found: dict[int, Tensor], states: States, seed: int) -> pd.DataFrame:
    samples = states.table["sample"]
    return pd.DataFrame(
        [
            {"layer": layer, **bootstrap(values, samples, seed=seed).asdict()}
            for layer, values in found.items()
        ]
    )


def _check_sides(perceptual: States, textual: States) -> None:
    for name in ("model", "revision"):
        one, other = (states.provenance.get(name) for states in (perceptual, textual))
        if one != other:
            raise ComparisonError(
                f"{name}s", one, other, "capture both kinds of tokens from one model"
            )
    one, other = (
        dict(states.table[["sample", "id"]].to_numpy()) for states in (perceptual, textual)
    )
    if one != other:
        told = (f"{len(one)} with perceptual tokens", f"{len(other)} with textual ones")
        raise ComparisonError("samples", *told, "capture both kinds of tokens of the same samples")
    if 0 < len(one) < 3:
        raise EstimateError(
            "the bootstrap over pairs of samples", f"{len(one)} samples", "3 or more"
        )


def _check_k(vlm: VLM, states: Tensor, k: int) -> None:
    distributions.check(vlm, states)
    if not 1 <= k <= distributions.size(vlm):
        raise SelectionError(
            f"k is {k}", f"allowed: 1 to {distributions.size(vlm)}, the size of the vocabulary"
        )
    if vlm.tokenizer is None:
        raise SelectionError(
            "this model came without a tokenizer, so its words have no names",
            "load it with its processor",
        )


def _words(vlm: VLM, ids: pd.Series) -> pd.Series:
    return ids.map({token: decode(vlm.tokenizer, [token]) for token in ids.unique().tolist()})


def _numbered(labels: np.ndarray) -> Int[Tensor, "n"]:
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1])


def _drawn(
    states: States, layer: int, n_tokens: int | None, seed: int
) -> tuple[Tensor, Int[Tensor, "n"]]:
    """The states that take part, of each sample so many or all.

    And the sample of each, numbered from 0.
    """
    if n_tokens is not None and n_tokens < 1:
        raise SelectionError(f"n_tokens is {n_tokens}", "allowed: 1 or more, or None for all")
    samples = states.table["sample"]
    shuffled = samples.sample(frac=1, random_state=seed)
    rows = np.sort(shuffled.groupby(shuffled).head(n_tokens or len(samples)).index.to_numpy())
    return states[layer][rows], _numbered(samples.to_numpy()[rows])


def _estimates(
    p: np.ndarray, t: np.ndarray, of_p: np.ndarray, of_t: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """From mean divergences (N, N) of P and of T of each sample from T of each sample.

    And how many tokens of each there are.
    """
    others, shares = (
        1.0 - np.eye(len(of_t)),
        np.vstack([np.full(len(of_t), 1 / len(of_t)), resampled_shares(len(of_t), seed=seed)]),
    )

    def means(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        # how many pairs of tokens stand behind a pair of samples
        weights = np.outer(sizes, of_t) * others
        total, pairs = (
            ((shares @ part) * shares).sum(axis=1) for part in (weights * values, weights)
        )
        # one sample drawn n times has no pairs
        return np.divide(total, pairs, out=np.full_like(total, np.nan), where=pairs > 0)

    found = (means(p, of_p), of_p.sum()), (means(t, of_t), of_t.sum())
    found += ((found[0][0] - found[1][0], of_p.sum() + of_t.sum()),)
    return {
        kind: interval(float(drawn[0]), drawn[1:], int(n))
        for kind, (drawn, n) in zip(KINDS, found, strict=True)
    }
