r"""Measures of the distributions that the logit lens reads off a layer.

A state :math:`h` of layer l has the distribution
:math:`p = \mathrm{softmax}(W_U \, \mathrm{norm}(h))` over the vocabulary, as in "Implicit
Multimodal Alignment" (Shukor and Cord, 2024, arXiv 2405.16700). All functions go through the tokens
in chunks: of the (n, V) probabilities a bounded part exists at a time, whatever n is. Divergences
and entropies are in nats. States are those of layers 0 to L, before the final norm; ``norm=False``
leaves that norm out.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.errors import InputError, incomparable, no_estimate
from xlvlms_tutorial.methods.logit_lens import distributions
from xlvlms_tutorial.metrics.intervals import (
    Estimate,
    bootstrap,
    percentile_interval,
    resampled_shares,
)
from xlvlms_tutorial.models.spans import decode
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require_one_of, require_same_length

KINDS = ("P against T", "T against other T", "difference")


def entropy(vlm: VLM, states: Float[Tensor, "n d"], norm: bool = True) -> Float[Tensor, "n"]:
    r"""Compute the entropy of the distribution of each state, in nats.

    Use it to see how certain the model would be of the next token at a layer: 0 where one token has
    all the probability, log V where all tokens are equally likely. From the logits z it is
    :math:`H = \log \sum_v e^{z_v} - \sum_v p_v z_v`, which needs no logarithm of a probability that
    may be 0.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : tensor (n, d)
        Rows of the residual stream at any layer.
    norm : bool, default True
        Whether states go through the model's final norm first.

    Returns
    -------
    Tensor (n,)
        Entropies in nats, on the CPU.

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import entropy
    >>> states = torch.zeros(1, 576)
    >>> vocabulary = vlm.unembed(states).shape[-1]
    >>> round(float(entropy(vlm, states, norm=False).exp()) / vocabulary, 2)
    1.0
    """
    distributions.check(vlm, states)
    return distributions.by_rows(vlm, distributions.entropies, norm, states)


def kl_divergence(
    vlm: VLM,
    p: Float[Tensor, "n d"],
    q: Float[Tensor, "m _"],
    norm: bool = True,
    pairs: str = "matched",
) -> Float[Tensor, "n *m"]:
    r"""Compute the Kullback-Leibler divergence of the distributions of states, in nats.

    Use it to compare what two sets of states predict, such as image tokens and text tokens, or the
    same tokens with and without an intervention. :math:`\sum_v p_v \log (p_v / q_v)`, with negative
    values that come from rounding set to 0.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    p : tensor (n, d)
        States of the left side.
    q : tensor (m, d)
        States of the right side.
    norm : bool, default True
        Whether states go through the model's final norm first.
    pairs : {"matched", "all"}, default "matched"
        "matched" compares row i of p with row i of q, "all" each row of p with each row of q.

    Returns
    -------
    Tensor (n,) or (n, m)
        Divergences in nats, on the CPU; (n, m) for all pairs.

    Raises
    ------
    InputError
        If a side has no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If matched sides differ in length. If ``pairs`` is neither "matched" nor
        "all".

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import kl_divergence
    >>> states = torch.eye(2, 576)
    >>> kl_divergence(vlm, states, states).round(decimals=2).tolist()
    [0.0, 0.0]
    >>> kl_divergence(vlm, states, torch.eye(3, 576), pairs="all").shape
    torch.Size([2, 3])
    """
    distributions.check(vlm, p)
    distributions.check(vlm, q)
    require_one_of(pairs, ("matched", "all"), "pairs")
    if pairs == "all":
        return distributions.all_divergences(vlm, p, q, norm)
    require_same_length(p=p, q=q)
    return distributions.by_rows(vlm, distributions.divergences, norm, p, q)


def mean_distribution(
    vlm: VLM, states: Float[Tensor, "n d"], norm: bool = True, groups: ArrayLike | None = None
) -> Float[Tensor, "*g vocabulary"]:
    """Average the distributions of states, over all of them or over groups.

    Use it to summarise what a kind of tokens, or the tokens of a sample, predict; compare the means
    with :func:`relative_entropy`.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : tensor (n, d)
        Rows of the residual stream at any layer.
    norm : bool, default True
        Whether states go through the model's final norm first.
    groups : array (n,), optional
        The group of each state, as numbers or names. None averages over all states.

    Returns
    -------
    Tensor (V,) or (g, V)
        Mean probabilities, on the CPU; with ``groups`` one row for each group, in the order of
        sorted labels.

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If ``groups`` has another length than ``states``.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import mean_distribution
    >>> means = mean_distribution(vlm, torch.eye(3, 576), groups=["image", "text", "text"])
    >>> len(means), means.sum(dim=1).round(decimals=2).tolist()
    (2, [1.0, 1.0])
    """
    distributions.check(vlm, states)
    labels = np.zeros(len(states), dtype=int) if groups is None else np.asarray(groups)
    require_same_length(states=states, groups=labels)
    means, _, _ = distributions.mean_distributions(vlm, states, _numbered(labels), norm)
    means = means.cpu()
    return means[0] if groups is None else means


def relative_entropy(p: Float[Tensor, "*n v"], q: Float[Tensor, "*m w"]) -> Float[Tensor, "*k"]:
    r"""Compute the Kullback-Leibler divergence of probability vectors, in nats.

    Use it for means of :func:`mean_distribution`; :func:`kl_divergence` takes states instead.
    :math:`\sum_v p_v \log (p_v / q_v)`. Nothing is smoothed: a token with p = 0 adds nothing, and a
    token with q = 0 and p > 0 makes the divergence infinite.

    Parameters
    ----------
    p : tensor (..., V)
        Probabilities of the left side, which sum to 1.
    q : tensor (..., V)
        Probabilities of the right side. Leading dimensions of p and q broadcast.

    Returns
    -------
    Tensor (...)
        Divergences in nats, in the dtype of p.

    Raises
    ------
    InputError
        If the vectors are over vocabularies of different sizes. If a vector is not a distribution.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import relative_entropy
    >>> fair, biased = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(float(relative_entropy(fair, biased)), 2)
    0.14
    >>> float(relative_entropy(fair, torch.tensor([0.0, 1.0])))
    inf
    """
    if p.shape[-1] != q.shape[-1]:
        raise incomparable(
            "vocabularies",
            p.shape[-1],
            q.shape[-1],
            "compare distributions over the words of one model",
        )
    p64 = p.double()
    q64 = q.double()
    for name, side in (("p", p64), ("q", q64)):
        if not _are_distributions(side):
            raise InputError(
                f"{name} holds vectors that are not distributions",
                "give numbers of 0 or more that sum to 1",
            )
    differences = p64.log() - q64.log()
    terms = torch.where(p64 > 0, p64 * differences, 0.0)
    return terms.sum(dim=-1).clamp(min=0).to(p.dtype)


def _are_distributions(p: Float[Tensor, "*n v"]) -> bool:
    if not p.numel() or not (p >= 0).all():
        return False
    sums = p.sum(dim=-1)
    return bool(torch.isclose(sums, p.new_ones(()), rtol=0, atol=1e-3).all())


def top_tokens(
    vlm: VLM, states: Float[Tensor, "n d"], k: int = 5, norm: bool = True
) -> pd.DataFrame:
    """List the k most probable tokens of each state.

    Use it to read what a state would make the model say if its layer were the last one (the logit
    lens).

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : tensor (n, d)
        Rows of the residual stream at any layer.
    k : int, default 5
        Number of tokens for each state, from 1 to the size V of the vocabulary.
    norm : bool, default True
        Whether states go through the model's final norm first.

    Returns
    -------
    DataFrame
        k rows for each state, the most probable token first, with columns ``row`` (of the state),
        ``rank`` (from 1), ``token_id``, ``word`` (text of the token) and ``probability``.

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If k is not between 1 and V, or the model has no tokenizer.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import top_tokens
    >>> table = top_tokens(vlm, torch.eye(2, 576), k=2)
    >>> table.columns.tolist()
    ['row', 'rank', 'token_id', 'word', 'probability']
    >>> table[["row", "rank"]].to_numpy().tolist()
    [[0, 1], [0, 2], [1, 1], [1, 2]]
    """
    _check_k(vlm, states, k)
    ids, probabilities = distributions.most_probable(vlm, states, k, norm)
    row, rank = np.divmod(np.arange(ids.numel()), k)
    table = pd.DataFrame({"row": row, "rank": rank + 1, "token_id": ids.flatten().numpy()})
    table["word"] = _words(vlm, table["token_id"])
    table["probability"] = probabilities.flatten().numpy()
    return table


def histogram(
    vlm: VLM, states: Float[Tensor, "n d"], k: int = 1, norm: bool = True
) -> pd.DataFrame:
    """Count in how many states each token is among the k most probable ones.

    Use it to see which tokens a kind of states mostly predicts. All k tokens of a state count, so
    counts sum to n k.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : tensor (n, d)
        Rows of the residual stream at any layer.
    k : int, default 1
        Number of tokens of each state that count, from 1 to the size V of the vocabulary.
    norm : bool, default True
        Whether states go through the model's final norm first.

    Returns
    -------
    DataFrame
        One row for each token that occurs, the most frequent first, with columns ``token_id``,
        ``word`` (text of the token), ``count`` and ``share`` (of the n states).

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If k is not between 1 and V, or the model has no tokenizer.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import histogram
    >>> table = histogram(vlm, torch.ones(4, 576), k=2)
    >>> table["count"].tolist(), table["share"].tolist()
    ([4, 4], [1.0, 1.0])
    """
    _check_k(vlm, states, k)
    ids, _ = distributions.most_probable(vlm, states, k, norm)
    token, count = np.unique(ids.numpy(), return_counts=True)
    table = pd.DataFrame({"token_id": token, "count": count, "share": count / len(states)})
    table.insert(1, "word", _words(vlm, table["token_id"]))
    return table.sort_values(["count", "token_id"], ascending=[False, True], ignore_index=True)


def entropy_profile(
    vlm: VLM,
    states: Activations,
    layers: Iterable[int] | None = None,
    norm: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Average the entropy of tokens at each layer, with intervals.

    Use it to see at which depth the distributions become certain.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : Activations
        Captured activations of two samples or more.
    layers : iterable of int, optional
        Layers among the captured ones. None means all of them.
    norm : bool, default True
        Whether states go through the model's final norm first.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each layer, with columns ``layer``, ``value`` (mean entropy in nats), ``low``,
        ``high`` (95 % interval, whole samples resampled) and ``n`` (tokens).

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If a layer was not captured. If the states are of fewer than two samples.
    LayerError
        If a layer was not captured.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import capture
    >>> from xlvlms_tutorial.methods.logit_lens import entropy_profile
    >>> states = capture(vlm, samples, layers=[15, 30], span="image")
    >>> entropy_profile(vlm, states)[["layer", "n"]].to_numpy().tolist()
    [[15, 4], [30, 4]]
    """
    entropies = {}
    for layer in states.layers if layers is None else layers:
        entropies[layer] = entropy(vlm, states[layer], norm)
    return _by_layer(entropies, states, seed)


def consecutive_divergence(
    vlm: VLM,
    states: Activations,
    step: int = 1,
    norm: bool = True,
    measure: str = "divergence",
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure how much the distribution of a token changes from layer l to layer l + ``step``.

    Use it to see which blocks change the prediction. The logits of each layer are computed once.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : Activations
        Captured activations of two samples or more, at layers that are ``step`` apart.
    step : int, default 1
        Distance of the two layers.
    norm : bool, default True
        Whether states go through the model's final norm first.
    measure : {"divergence", "cosine"}, default "divergence"
        "divergence" is the mean over tokens of :math:`\mathrm{KL}(p_l \| p_{l + step})` in nats,
        "cosine" the mean over tokens of the cosine of the two vectors of probabilities.
    seed : int, default 0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each pair of layers, with columns ``layer``, ``to``, ``value``, ``low``,
        ``high`` (95 % interval, whole samples resampled) and ``n`` (tokens).

    Raises
    ------
    InputError
        If there are no states, or a state or a logit is NaN or infinite. If the states are not as
        wide as the model. If the step is below 1, no two captured layers are that far apart, or the
        measure is unknown. If the states are of fewer than two samples.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import capture
    >>> from xlvlms_tutorial.methods.logit_lens import consecutive_divergence
    >>> states = capture(vlm, samples, layers=[13, 14, 15], span="image")
    >>> table = consecutive_divergence(vlm, states)
    >>> table[["layer", "to", "n"]].to_numpy().tolist()
    [[13, 14, 4], [14, 15, 4]]
    >>> bool((table["value"] > 0).all())
    True
    """
    measures = {"divergence": distributions.divergences, "cosine": distributions.cosines}
    require_one_of(measure, measures, "measure")
    captured = set(states.layers)
    layers = []
    for layer in states.layers:
        if layer - step in captured or layer + step in captured:
            layers.append(layer)
    if step < 1 or not layers:
        raise InputError(
            f"no two layers are a step of {step} apart",
            f"captured: {', '.join(map(str, states.layers))}",
        )
    by_layer = {layer: states[layer] for layer in layers}
    for rows in by_layer.values():
        distributions.check(vlm, rows)
    values = distributions.layer_divergence(vlm, by_layer, step, norm, measures[measure])
    table = _by_layer(values, states, seed)
    table.insert(1, "to", table["layer"] + step)
    return table


def modality_divergence(
    vlm: VLM,
    perceptual: Activations,
    textual: Activations,
    layer: int,
    norm: bool = True,
    n_tokens: int | None = 16,
    seed: int = 0,
) -> dict[str, Estimate]:
    r"""Compare the divergence of perceptual from textual tokens at a layer with that among texts.

    Use it to see whether image (or video, audio) tokens predict other tokens than text does. Three
    means are estimated: the divergence of perceptual from textual tokens, that of textual tokens
    from other textual ones, and the difference. Each is over all pairs of tokens of two different
    samples, so it depends on no pairing, and it is exact without the divergence of any single pair:
    :math:`\sum_{ij} \mathrm{KL}(p_i \| q_j) / nm = -\overline{H(p)} - \sum_v \bar p_v \,
    \overline{\log q_v}`. Memory holds two means (samples, V).

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    perceptual : Activations
        Captured activations of image, video or audio tokens.
    textual : Activations
        Captured activations of text tokens of the same samples, three or more.
    layer : int
        The layer to compare, captured in both.
    norm : bool, default True
        Whether states go through the model's final norm first.
    n_tokens : int or None, default 16
        Number of tokens that are drawn from each sample. None takes all.
    seed : int, default 0
        Seed of the drawn tokens and of the bootstrap.

    Returns
    -------
    dict of str to Estimate
        Estimates in nats: "P against T", "T against other T" and their "difference". Intervals
        (95 %) are from one bootstrap over samples, the same for all three; ``n`` counts the tokens
        on the left side, for the difference those of both.

    Raises
    ------
    InputError
        If a state or a logit is NaN or infinite. If the two are not of the same model and samples,
        or not as wide as the model. If the layer was not captured, or ``n_tokens`` is below 1. If
        there are fewer than three samples.
    LayerError
        If the layer was not captured, or ``n_tokens`` is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import capture
    >>> from xlvlms_tutorial.methods.logit_lens import modality_divergence
    >>> perceptual = capture(vlm, samples, layers=15, span="image", reduce=None)
    >>> textual = capture(vlm, samples, layers=15, span="question", reduce=None)
    >>> estimates = modality_divergence(vlm, perceptual, textual, layer=15, n_tokens=2)
    >>> {kind: estimate.n for kind, estimate in estimates.items()}
    {'P against T': 8, 'T against other T': 8, 'difference': 16}
    """
    _check_sides(perceptual, textual)
    p, p_samples = _random_tokens(perceptual, layer, n_tokens, seed)
    t, t_samples = _random_tokens(textual, layer, n_tokens, seed)
    distributions.check(vlm, p)
    distributions.check(vlm, t)
    mean, logs, entropies = distributions.mean_distributions(vlm, t, t_samples, norm, logs=True)
    from_t = -entropies[:, None] - mean @ logs.T
    del mean  # it is the largest array, and P needs another one of this size
    mean, _, entropies = distributions.mean_distributions(vlm, p, p_samples, norm)
    from_p = -entropies[:, None] - mean @ logs.T
    p_divergences = from_p.clamp_(min=0).double().cpu().numpy()
    t_divergences = from_t.clamp_(min=0).double().cpu().numpy()
    p_sizes = np.bincount(p_samples)
    t_sizes = np.bincount(t_samples)
    return _estimates(p_divergences, t_divergences, p_sizes, t_sizes, seed)


def divergence_profile(
    vlm: VLM,
    perceptual: Activations,
    textual: Activations,
    layers: Iterable[int] | None = None,
    norm: bool = True,
    n_tokens: int | None = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the divergence of perceptual from textual tokens with that among texts, by layer.

    Use it to see at which depth image (or video, audio) tokens come to predict what text tokens
    predict. Each layer is an estimate of :func:`modality_divergence`.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    perceptual : Activations
        Captured activations of image, video or audio tokens.
    textual : Activations
        Captured activations of text tokens of the same samples, three or more.
    layers : iterable of int, optional
        Layers captured in both. None means all layers of ``perceptual``.
    norm : bool, default True
        Whether states go through the model's final norm first.
    n_tokens : int or None, default 16
        Number of tokens that are drawn from each sample. None takes all.
    seed : int, default 0
        Seed of the drawn tokens and of the bootstrap.

    Returns
    -------
    DataFrame
        One row for each layer and kind, with columns ``layer``, ``kind`` (those of
        :func:`modality_divergence`), ``value`` (nats), ``low``, ``high`` (95 % interval over
        samples) and ``n`` (tokens).

    Raises
    ------
    InputError
        If a state or a logit is NaN or infinite. If the two are not of the same model and samples,
        or not as wide as the model. If a layer was not captured, or ``n_tokens`` is below 1. If
        there are fewer than three samples.
    LayerError
        If a layer was not captured, or ``n_tokens`` is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.activations import capture
    >>> from xlvlms_tutorial.methods.logit_lens import divergence_profile
    >>> perceptual = capture(vlm, samples, layers=[10, 15], span="image", reduce=None)
    >>> textual = capture(vlm, samples, layers=[10, 15], span="question", reduce=None)
    >>> table = divergence_profile(vlm, perceptual, textual, n_tokens=2)
    >>> table[["layer", "kind"]].to_numpy().tolist()[:3]
    [[10, 'P against T'], [10, 'T against other T'], [10, 'difference']]
    """
    rows = []
    for layer in perceptual.layers if layers is None else layers:
        estimates = modality_divergence(vlm, perceptual, textual, layer, norm, n_tokens, seed)
        for kind, estimate in estimates.items():
            rows.append({"layer": layer, "kind": kind, **estimate.asdict()})
    return pd.DataFrame(rows)


def _by_layer(values: dict[int, Tensor], states: Activations, seed: int) -> pd.DataFrame:
    """The mean of the values of each layer, with a bootstrap over samples."""
    samples = states.table["sample"]
    rows = []
    for layer, layer_values in values.items():
        estimate = bootstrap(layer_values, samples, seed=seed)
        rows.append({"layer": layer, **estimate.asdict()})
    return pd.DataFrame(rows)


def _check_sides(perceptual: Activations, textual: Activations) -> None:
    for name in ("model", "revision"):
        p_value, t_value = perceptual.provenance.get(name), textual.provenance.get(name)
        if p_value != t_value:
            raise incomparable(
                f"{name}s", p_value, t_value, "capture both kinds of tokens from one model"
            )
    p_ids = dict(perceptual.table[["sample", "id"]].to_numpy())
    t_ids = dict(textual.table[["sample", "id"]].to_numpy())
    if p_ids != t_ids:
        raise incomparable(
            "samples",
            f"{len(p_ids)} with perceptual tokens",
            f"{len(t_ids)} with textual ones",
            "capture both kinds of tokens of the same samples",
        )
    if 0 < len(p_ids) < 3:
        raise no_estimate(
            "the bootstrap over pairs of samples", f"{len(p_ids)} samples", "3 or more"
        )


def _check_k(vlm: VLM, states: Tensor, k: int) -> None:
    distributions.check(vlm, states)
    if not 1 <= k <= distributions.size(vlm):
        raise InputError(
            f"k is {k}", f"allowed: 1 to {distributions.size(vlm)}, the size of the vocabulary"
        )
    distributions.require_tokenizer(vlm)


def _words(vlm: VLM, ids: pd.Series) -> pd.Series:
    words = {token: decode(vlm.tokenizer, [token]) for token in ids.unique().tolist()}
    return ids.map(words)


def _numbered(labels: np.ndarray) -> Int[Tensor, "n"]:
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1])


def _random_tokens(
    states: Activations, layer: int, n_tokens: int | None, seed: int
) -> tuple[Tensor, Int[Tensor, "n"]]:
    """States of ``n_tokens`` random tokens of each sample, or of all of them.

    The sample of each state comes with them, numbered from 0.
    """
    if n_tokens is not None and n_tokens < 1:
        raise InputError(f"n_tokens is {n_tokens}", "allowed: 1 or more, or None for all")
    samples = states.table["sample"]
    shuffled = samples.sample(frac=1, random_state=seed)
    sampled = shuffled.groupby(shuffled).head(n_tokens or len(samples))
    rows = np.sort(sampled.index.to_numpy())
    numbers = _numbered(samples.to_numpy()[rows])
    return states[layer][rows], numbers


def _estimates(
    p: np.ndarray, t: np.ndarray, p_sizes: np.ndarray, t_sizes: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """The three estimates, from mean divergences (N, N) of each sample from T of each sample.

    ``p`` are those of perceptual tokens, ``t`` those of textual ones; sizes are the numbers of
    tokens of each sample.
    """
    n = len(t_sizes)
    different = 1.0 - np.eye(n)
    # the data themselves come first, then the resamples
    data = np.full(n, 1 / n)
    shares = np.vstack([data, resampled_shares(n, seed=seed)])

    def means(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        # number of pairs of tokens in each pair of samples
        weights = np.outer(sizes, t_sizes) * different
        total = ((shares @ (weights * values)) * shares).sum(axis=1)
        pairs = ((shares @ weights) * shares).sum(axis=1)
        # one sample drawn n times has no pairs
        undefined = np.full_like(total, np.nan)
        return np.divide(total, pairs, out=undefined, where=pairs > 0)

    p_means = means(p, p_sizes)
    t_means = means(t, t_sizes)
    p_tokens = int(p_sizes.sum())
    t_tokens = int(t_sizes.sum())
    resampled = (p_means, t_means, p_means - t_means)
    n_tokens = (p_tokens, t_tokens, p_tokens + t_tokens)
    estimates = {}
    for kind, means_of_kind, n in zip(KINDS, resampled, n_tokens, strict=True):
        value = float(means_of_kind[0])
        estimates[kind] = percentile_interval(value, means_of_kind[1:], n)
    return estimates
