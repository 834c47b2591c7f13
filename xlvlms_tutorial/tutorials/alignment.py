"""Read pictures, clips, sounds and words through one language model, and compare them by layer.

The chapter on perceptual and textual tokens uses it for its groups of samples, its controls and its
searches; the measures are those of :mod:`xlvlms_tutorial.methods.alignment`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import normalize

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.alignment import (
    alignment_profile,
    cones,
    consecutive_profile,
    examples,
    linear_probe,
    narrowness,
    norms,
    persistence,
    similarity,
)
from xlvlms_tutorial.metrics import Estimate, subtract
from xlvlms_tutorial.models import SITES, VLM
from xlvlms_tutorial.tutorials.alignment_score import tokens
from xlvlms_tutorial.tutorials.experiments import Experiment, band_table
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import plots

_DEPTHS = (0, 0.27, 0.53, 0.8)  # where the controls are compared
_EVERY = 4  # probes of the controls read every fourth token
_GROUP = 3  # pictures of one value of a factor that make a group
_FRAMES = 8  # of a clip in which nothing moves


class Kind(NamedTuple):
    """Hold what one model made of samples of one modality.

    :func:`read_kinds` returns one a modality.

    Parameters
    ----------
    model, dataset : str
        The model that read the samples of this dataset.
    samples : list of Sample
        The samples.
    P, T : Activations
        The tokens of the modality, and those of the reference captions, at every layer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> kinds["image"].dataset, len(kinds["image"].P)
    ('scenes', 48)
    """

    model: str
    dataset: str
    samples: list[Sample]
    P: Activations
    T: Activations


@runtime_checkable
class Method(Protocol):
    """Describe a method that places points in the plane, such as scikit-learn's t-SNE."""

    def fit_transform(self, X: np.ndarray) -> np.ndarray:
        """Place the rows.

        Parameters
        ----------
        X : array of shape (n, d)
            The vectors.

        Returns
        -------
        array of shape (n, 2)
            Their places.
        """
        ...


def read_kinds(vlm: VLM, sources: Mapping[str, str], n: int, seed: int = 0) -> dict[str, Kind]:
    """Capture the tokens of each modality with its own connector, and those of the captions.

    Parameters
    ----------
    vlm : VLM
        The first model.
    sources : mapping of str to str
        Names of models, and the dataset that each reads. The first is ``vlm``; the others are
        loaded here, and have the same language model.
    n : int
        Samples of each.
    seed : int, default 0
        Of the samples.

    Returns
    -------
    dict of str to Kind
        By modality, that of the first model first.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> list(alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3))
    ['image']
    """
    kinds = {}
    for name, data in sources.items():
        samples = load_samples(data, n=n, seed=seed)
        reader = load(name) if kinds else vlm
        kinds[samples[0].modality] = Kind(name, data, samples, *tokens(reader, samples, seed))
    return kinds


def pooled(states: Activations, layer: int) -> Float[Tensor, "n d"]:
    """Average the tokens of each sample at a layer.

    Parameters
    ----------
    states : Activations
        Tokens of n samples.
    layer : int
        The layer.

    Returns
    -------
    Tensor (n, d)
        One vector a sample.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> tuple(alignment.pooled(kinds["image"].P, 8).shape)
    (3, 576)
    """
    means = [tokens_of_one.mean(dim=0) for tokens_of_one in examples(states, layer)]
    return torch.stack(means)


def draw_map(
    kinds: Mapping[str, Kind],
    layer: int,
    method: Method,
    ax: Axes | None = None,
    legend: bool = True,
) -> Axes:
    """Draw a map of the mean P and T of every sample at a layer.

    Parameters
    ----------
    kinds : mapping of str to Kind
        The modalities.
    layer : int
        The layer.
    method : object with fit_transform
        What places the points, such as t-SNE.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    legend : bool, default True
        Whether colours and markers are explained.

    Returns
    -------
    matplotlib.axes.Axes
        The map: a colour a modality, a dot for P and a cross for T.

    Examples
    --------
    >>> from sklearn.decomposition import PCA
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> from xlvlms_tutorial.view import plots
    >>> ax = alignment.draw_map(kinds, 8, PCA(2))
    >>> ax.get_title(loc="left"), len(ax.collections[0].get_offsets())
    ('layer 8', 6)
    >>> plots.png(ax.figure)[1:4]  # also closes the figure
    b'PNG'
    """
    vectors, colours, markers = [], [], []
    for kind, modality in kinds.items():
        for role, states in (("P", modality.P), ("T", modality.T)):
            means = pooled(states, layer)
            vectors.append(means)
            colours += [kind] * len(means)
            markers += [role] * len(means)
    places = method.fit_transform(torch.cat(vectors).numpy())
    ax = plots.points(places, colours, markers, legend=legend, ax=ax)
    ax.set_title(f"layer {layer}")
    return ax


def own_group_shares(kinds: Mapping[str, Kind], layers: Sequence[int]) -> pd.DataFrame:
    """Count the samples whose nearest neighbour is of their own group, at each layer.

    Use it beside a map: this is counted in the space itself.

    Parameters
    ----------
    kinds : mapping of str to Kind
        The modalities; P and T of each are groups.
    layers : sequence of int
        The layers.

    Returns
    -------
    pandas.DataFrame
        A row a layer, a column a group such as "image P".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=4)
    >>> alignment.own_group_shares(kinds, [8]).loc[8].tolist()
    [1.0, 1.0]
    """
    rows = {}
    for layer in layers:
        parts = {}
        for role in "PT":
            for kind, modality in kinds.items():
                parts[f"{kind} {role}"] = pooled(getattr(modality, role), layer)
        labels = np.repeat(list(parts), [len(part) for part in parts.values()])
        units = normalize(torch.cat(list(parts.values())), dim=-1)
        nearest = (units @ units.T).fill_diagonal_(-1).argmax(dim=1).numpy()
        same_group = pd.Series(labels[nearest] == labels)
        rows[layer] = same_group.groupby(labels, sort=False).mean()
    return pd.DataFrame(rows).T.rename_axis("layer")


def groups(kinds: Mapping[str, Kind], layer: int) -> dict[str, list[Tensor]]:
    """Return P and T of each modality at a layer, as groups that can be compared.

    Parameters
    ----------
    kinds : mapping of str to Kind
        The modalities.
    layer : int
        The layer.

    Returns
    -------
    dict of str to list of Tensor
        Groups "image P", "image T" and so on: the tokens (t, d) of each sample.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> {name: len(group) for name, group in alignment.groups(kinds, 8).items()}
    {'image P': 3, 'image T': 3}
    """
    parts = {}
    for role in "PT":
        for kind, modality in kinds.items():
            parts[f"{kind} {role}"] = examples(getattr(modality, role), layer)
    return parts


def modalities(kinds: Mapping[str, Kind], layer: int) -> dict[str, list[Tensor]]:
    """Return P of each modality at a layer, and the captions of all as one more modality.

    Parameters
    ----------
    kinds : mapping of str to Kind
        The modalities.
    layer : int
        The layer.

    Returns
    -------
    dict of str to list of Tensor
        The tokens (t, d) of each sample, by modality, "text" last.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> {name: len(group) for name, group in alignment.modalities(kinds, 8).items()}
    {'image': 3, 'text': 3}
    """
    parts = {}
    text = []
    for kind, modality in kinds.items():
        parts[kind] = examples(modality.P, layer)
        text += examples(modality.T, layer)
    return parts | {"text": text}


def cosines_by_pair(kinds: Mapping[str, Kind], layers: Sequence[int]) -> pd.DataFrame:
    """Average the cosines of all pairs of groups by what the two groups have in common.

    Parameters
    ----------
    kinds : mapping of str to Kind
        The modalities.
    layers : sequence of int
        The layers.

    Returns
    -------
    pandas.DataFrame
        A row a layer, with columns such as "P, one modality", "P, two modalities" and "P with T".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> kinds = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=3)
    >>> alignment.cosines_by_pair(kinds, [0]).columns.tolist()
    ['P, one modality', 'P with T', 'T, one modality']
    """
    parts = []
    for layer in layers:
        compared = cones(groups(kinds, layer), n_resamples=100).assign(layer=layer)
        compared["pairs"] = list(map(_pair, compared["a"], compared["b"]))
        parts.append(compared)
    return pd.concat(parts).pivot_table("value", "layer", "pairs", sort=False)


def controls(
    family: str,
    world: str,
    others: Mapping[str, str],
    rerun: str,
    joint: str,
    n: int,
    seed: int = 0,
) -> dict[str, tuple[Activations, Activations]]:
    """Capture pairs of groups of P in which content, connector or both differ.

    Parameters
    ----------
    family : str
        The model whose connector reads pictures.
    world : str
        The pictures.
    others : mapping of str to str
        The models for clips and for sounds, in this order, and their data.
    rerun : str
        A model whose connector for pictures was trained in another run.
    joint : str
        A model with one connector for all three.
    n : int
        Samples of each.
    seed : int, default 0
        Of the samples.

    Returns
    -------
    dict of str to tuple of Activations
        Two groups by what differs between them, at four layers.
    """
    pictures, clips, sounds = (
        load_samples(data, n=n, seed=seed) for data in (world, *others.values())
    )
    stills = []
    for sample in pictures:
        stills.append(replace(sample, source=[sample.image] * _FRAMES, modality="video"))
    frames = []
    for sample in clips:
        frames.append(replace(sample, source=sample.content[0], modality="image"))
    video_model, audio_model = others
    images, images_of_clips = _read_with(family, pictures, frames)
    video_stills, video_clips = _read_with(video_model, stills, clips)
    [audio_sounds] = _read_with(audio_model, sounds)
    [again] = _read_with(rerun, pictures)
    shared, shared_clips, shared_sounds = _read_with(joint, pictures, clips, sounds)
    return {
        "frames of clips, same connector": (images, images_of_clips),
        "same pictures, clip connector": (images, video_stills),
        "same pictures, another run": (images, again),
        "pictures and clips, own connectors": (images, video_clips),
        "pictures and sounds, own connectors": (images, audio_sounds),
        "pictures and clips, joint connector": (shared, shared_clips),
        "pictures and sounds, joint connector": (shared, shared_sounds),
    }


def apart(
    a: Activations, b: Activations, layer: int, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Measure how far two groups of tokens lie apart: narrowness, 0 where they share one cone.

    Parameters
    ----------
    a, b : Activations
        The tokens of two groups of samples.
    layer : int
        The layer.
    n_resamples : int, default 2000
        Resamples of the bootstrap.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        Intra minus inter.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> one = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=4)["image"]
    >>> alignment.apart(one.P, one.T, 0).value > 0.5
    True
    """
    two = {"a": examples(a, layer), "b": examples(b, layer)}
    return narrowness(two, n_resamples=n_resamples, seed=seed)


def beyond_runs(
    two: tuple[Activations, Activations], runs: tuple[Activations, Activations], seed: int = 0
) -> Estimate:
    """Measure how much farther apart two groups lie than two runs on the same pictures do.

    Parameters
    ----------
    two : tuple of Activations
        The two groups, at the layers of ``runs`` or more.
    runs : tuple of Activations
        The same pictures through two connectors.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The difference at the layer where it is smallest.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> one = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=4)["image"]
    >>> alignment.beyond_runs((one.P, one.T), (one.P, one.T)).value
    0.0
    """
    effects = []
    for layer in runs[0].layers:
        effects.append(subtract(apart(*two, layer, seed=seed), apart(*runs, layer, seed=seed)))
    return min(effects, key=lambda effect: effect.value)


def probe_pairs(
    pairs: Mapping[str, tuple[Activations, Activations]], folds: int, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Fit a linear probe to each pair of groups, on every fourth token.

    Parameters
    ----------
    pairs : mapping of str to tuple of Activations
        The two groups of each pair.
    folds : int
        Folds of the cross-validation.
    seed : int, default 0
        Of the folds and of the bootstrap.

    Returns
    -------
    dict of str to pandas.DataFrame
        What :func:`~xlvlms_tutorial.linear_probe` gives, by pair, with the layer as index.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> one = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=4)["image"]
    >>> probes = alignment.probe_pairs({"P and T": (one.P, one.T)}, folds=2)
    >>> bool(probes["P and T"].loc[0, "value"] > 0.9)
    True
    """
    probes = {}
    for name, two in pairs.items():
        thin = [states.select(f"position % {_EVERY} == 0") for states in two]
        probes[name] = linear_probe(*thin, folds=folds, seed=seed).set_index("layer")
    return probes


def least_beyond(probe: pd.DataFrame, baseline: pd.DataFrame | None = None) -> Estimate:
    """Measure by how much a probe beats a baseline, at the layer where it does so least.

    Parameters
    ----------
    probe : pandas.DataFrame
        Accuracies with their intervals, indexed by layer.
    baseline : pandas.DataFrame, optional
        Those of the probe to compare with, at some of the layers; by default chance, one half.

    Returns
    -------
    Estimate
        The difference of accuracies.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> probe = pd.DataFrame({"value": [0.9, 1.0], "low": 0.8, "high": 1.0, "n": 40})
    >>> print(alignment.least_beyond(probe))
    0.40 [0.30, 0.50]
    """
    if baseline is None:
        baseline = probe.assign(value=0.5, low=0.5, high=0.5)
    layers = [layer for layer in baseline.index if layer in probe.index]
    require(layers, "no layer of the probe in the baseline", "give both at common layers")
    lowest = (probe["value"] - baseline["value"])[layers].idxmin()
    return subtract(_estimate(probe.loc[lowest]), _estimate(baseline.loc[lowest]))


def compare_seeds(
    connectors: Mapping[str, str | None], samples: Sequence[Sample], folds: int, seed: int = 0
) -> pd.DataFrame:
    """Measure the claims on cones, probes and slow change for connectors of one recipe.

    Parameters
    ----------
    connectors : mapping of str to str or None
        Names of models and their revisions; they differ in the seed of their training alone.
    samples : sequence of Sample
        What all of them read.
    folds : int
        Folds of the probes.
    seed : int, default 0
        Of the folds.

    Returns
    -------
    pandas.DataFrame
        A row an effect, indexed by claim and by what it is measured against; a column a connector.
        For IMA-1 and IMA-2 it is the effect at the layer where it is smallest.
    """
    by_name = {}
    for name, revision in connectors.items():
        by_name[name] = tokens(load(name, revision=revision), samples, seed)
    columns = {}
    for name, (p, t) in by_name.items():
        distance = _distances(p, t, seed)
        runs = []
        for another, (p_another, _) in by_name.items():
            if another != name:
                runs.append(_distances(p, p_another, seed))
        between_runs = pd.concat(runs, axis=1).mean(axis=1)
        probe = probe_pairs({"": (p, t)}, folds, seed)[""]
        columns[name] = {
            ("IMA-1", "shuffled modality labels"): distance.min(),
            ("IMA-1", "another run, same pictures"): (distance - between_runs).min(),
            ("IMA-2", "chance"): probe["value"].min() - 0.5,
            ("IMA-3", "neighbouring token"): persistence(p, others="neighbour").value,
        }
    return pd.DataFrame(columns).rename_axis(["claim", "against"])


def measures_by_site(p: Activations, t: Activations) -> dict[str, pd.DataFrame]:
    """Measure tokens at each of the sites inside the blocks.

    Parameters
    ----------
    p, t : Activations
        Perceptual and textual tokens, captured at all ``SITES``.

    Returns
    -------
    dict of str to pandas.DataFrame
        By measure; a row a layer, a column a site.

    Examples
    --------
    >>> from xlvlms_tutorial import capture
    >>> from xlvlms_tutorial.models import SITES
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> states = capture(
    ...     vlm, samples, [8, 9], sites=SITES, span=("image", "answer"), reduce=None,
    ...     answers=[sample.captions[0] for sample in samples],
    ... )
    >>> p, t = (states.select(f"span == {span!r}") for span in ("image", "answer"))
    >>> alignment.measures_by_site(p, t)["median norm of P"].shape
    (2, 7)
    """
    measures: dict[str, dict[str, pd.DataFrame]] = {
        "cosine of P with T": {},
        "cosine of P, one block on": {},
        "median norm of P": {},
        "median norm of T": {},
    }
    for site in SITES:
        measures["cosine of P with T"][site] = alignment_profile(p, t, site=site)
        measures["cosine of P, one block on"][site] = consecutive_profile(p, site=site)
        measures["median norm of P"][site] = norms(p, site=site)
        measures["median norm of T"][site] = norms(t, site=site)
    tables = {}
    for name, by_site in measures.items():
        curves = {}
        for site, profile in by_site.items():
            curves[site] = profile.set_index("layer")["value"]
        tables[name] = pd.DataFrame(curves)
    return tables


def behind_another(vlm: VLM, samples: Sequence[Sample], seed: int = 0) -> Activations:
    """Capture each caption as it is read after the picture of the next sample.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with captions.
    seed : int, default 0
        Of the capture.

    Returns
    -------
    Activations
        The tokens of the captions; caption k stands after picture k + 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> len(alignment.behind_another(vlm, samples).table["sample"].unique())
    4
    """
    turned = [*samples[1:], *samples[:1]]
    moved = []
    for sample, neighbour in zip(samples, turned, strict=True):
        moved.append(replace(sample, source=neighbour.image))
    return tokens(vlm, moved, seed)[1]


def search_captions(
    P: Activations, T: Activations, behind: Activations, layers: Sequence[int]
) -> pd.DataFrame:
    """Search the caption of each picture by its cosine, with and without the cones.

    Parameters
    ----------
    P, T : Activations
        The tokens of pictures, and of the captions after them.
    behind : Activations
        The same captions, each after the picture of the next sample.
    layers : sequence of int
        The layers.

    Returns
    -------
    pandas.DataFrame
        A row a layer. Columns: the share of pictures whose nearest caption is their own, as vectors
        are, and after subtracting the mean of P and of T; then, centred, the shares of pictures
        whose nearest caption describes them but stands behind another one, and stands behind them
        but describes another one.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> one = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=4)["image"]
    >>> behind = alignment.behind_another(vlm, one.samples)
    >>> alignment.search_captions(one.P, one.T, behind, [8])["own caption, centred"].item()
    1.0
    """
    rows = {}
    for layer in layers:
        p, t, b = (pooled(states, layer) for states in (P, T, behind))
        numbers = torch.arange(len(p))
        raw = _share(p, t, numbers)
        p, t, b = centred(p), centred(t), centred(b)
        rows[layer] = {
            "own caption": raw,
            "own caption, centred": _share(p, t, numbers),
            "describes it, stands elsewhere": _share(p, b, numbers),
            "stands behind it, describes another": _share(p, b, (numbers - 1) % len(numbers)),
        }
    return pd.DataFrame(rows).T.rename_axis("layer")


def centred(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Subtract the mean of the vectors, and with it their common cone.

    Parameters
    ----------
    vectors : Tensor (n, d)
        One vector a sample.

    Returns
    -------
    Tensor (n, d)
        What differs between samples.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> alignment.centred(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    return vectors - vectors.mean(dim=0)


def factor_cones(
    P: Activations,
    samples: Sequence[Sample],
    factors: Sequence[str],
    layers: Sequence[int],
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the narrowness of pictures that share a value of a factor, after centring.

    A value makes a group where three pictures or more show it, and a factor takes part where it
    makes two groups. The baseline is two halves of the pictures, taken in turn.

    Parameters
    ----------
    P : Activations
        The tokens of the pictures.
    samples : sequence of Sample
        The pictures with their factors.
    factors : sequence of str
        Such as "place".
    layers : sequence of int
        The layers.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns factor ("halves" for the baseline), layer, value, low, high and n.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment
    >>> one = alignment.read_kinds(vlm, {"pocket-llava": "scenes"}, n=8)["image"]
    >>> alignment.factor_cones(one.P, one.samples, [], [8])["factor"].tolist()
    ['halves']
    """
    numbers = np.arange(len(samples))
    dealt = {}
    for factor in factors:
        values = pd.Series([sample.truth.get(factor) for sample in samples], dtype=object)
        large = {}
        for value, members in values.groupby(values).groups.items():
            if len(members) >= _GROUP:
                large[value] = list(members)
        if len(large) > 1:
            dealt[factor] = large
    dealt["halves"] = {part: numbers[part::2].tolist() for part in (0, 1)}
    estimates = {}
    for factor, members_of in dealt.items():
        for layer in layers:
            rows = centred(pooled(P, layer))[:, None]
            parts = {str(value): rows[members] for value, members in members_of.items()}
            estimates[factor, layer] = narrowness(parts, seed=seed)
    return band_table(estimates, "factor", "layer")


def check_neighbours(experiment: Experiment, shares: pd.DataFrame) -> None:
    """Write down which sentences hold about the nearest neighbours of P and of T.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    shares : pandas.DataFrame
        From :func:`own_group_shares`: a row a layer, a column a group, such as "image P".
    """
    experiment.check(
        "P has P of its own kind for a neighbour at every layer",
        shares.filter(like=" P").min().min() > 0.9,
    )
    # words of a sound are not words about a scene, and stay apart from the start
    captions = [name for name in shares if name.endswith(" T") and name != "audio T"]
    worst = shares[captions].min(axis=1)
    experiment.check(
        "captions of pictures and clips are mixed at first, not at the end",
        worst.iloc[0] < 0.6 and worst.iloc[-1] > 0.7,
    )


def check_order(experiment: Experiment, cosines: pd.DataFrame) -> None:
    """Write down whether cosines are ordered as the paper says, for P and for T.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    cosines : pandas.DataFrame
        From :func:`cosines_by_pair`: a row a layer, a column a kind of pair.
    """
    means = cosines.mean()
    across = means["P with T"] + 0.05
    ordered = True
    for role in "PT":
        between = means.get(f"{role}, two modalities", 0)
        ordered = ordered and across < between < means[f"{role}, one modality"] - 0.05
    experiment.check("within a modality, then between two, then P with T", ordered)


def check_relatives(experiment: Experiment, apart: pd.DataFrame) -> None:
    """Write down which sentences hold about how far runs and modalities lie apart.

    Parameters
    ----------
    experiment : Experiment
        That of the family of connectors.
    apart : pandas.DataFrame
        Narrowness of each pair of :func:`controls` (rows) at each layer (columns).
    """
    check = experiment.check
    runs = apart.loc["same pictures, another run"]
    clips = apart.loc["pictures and clips, own connectors"]
    sounds = apart.loc["pictures and sounds, own connectors"]
    remaining = apart.loc["pictures and sounds, joint connector"] / sounds
    check("clips lie near pictures at every layer", clips.max() < 0.1)
    check("clips lie nearer to pictures than another run does", (clips < runs - 0.1).all())
    check(
        "sounds lie nearer than another run at first, farther in the deeper half",
        runs.iloc[0] - sounds.iloc[0] > 0.1 and (sounds - runs).iloc[2:].min() > 0.05,
    )
    check(
        "frames of clips share the cone of pictures",
        apart.loc["frames of clips, same connector"].abs().max() < 0.02,
    )
    check(
        "the joint connector leaves a third of the distance of sounds, later most of it",
        0.25 < remaining.iloc[0] < 0.4 and remaining.iloc[-1] > 0.6,
    )
    check(
        "the joint connector joins clips with pictures",
        apart.loc["pictures and clips, joint connector"].max() < 0.06,
    )


def check_turns(
    experiment: Experiment,
    steps: Mapping[str, pd.DataFrame],
    effects: Mapping[str, Estimate],
    against_all: Estimate,
    n_layers: int,
) -> None:
    """Write down which sentences hold about how slowly tokens turn.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    steps : mapping of str to pandas.DataFrame
        Profiles of :func:`~xlvlms_tutorial.methods.alignment.consecutive_profile` by layer, of P of
        each kind ("image P") and of T of the first.
    effects : mapping of str to Estimate
        Persistence against the neighbouring token by kind, that of the first model first.
    against_all : Estimate
        Persistence of the first kind against all other tokens.
    n_layers : int
        How many blocks the model has.
    """
    first = next(iter(effects))
    turning = {name: set(profile.nsmallest(3, "value")["to"]) for name, profile in steps.items()}
    level = {name: profile["rival"].mean() for name, profile in steps.items()}
    experiment.check(
        "the neighbour is a harder baseline than all other tokens",
        effects[first].value < against_all.value - 0.05,
    )
    values = {kind: effect.value for kind, effect in effects.items()}
    experiment.check(
        "sounds have the smallest number and the highest baseline",
        min(values, key=values.get) == "audio" and max(level, key=level.get) == "audio P",
    )
    late = all(min(turning[name]) > 0.7 * n_layers for name in steps if name.endswith(" P"))
    experiment.check(
        "text turns most in the first block, P in the last blocks",
        min(turning[f"{first} T"]) == 1 and late,
    )


def check_search(experiment: Experiment, hits: pd.DataFrame, late: int) -> None:
    """Write down which sentences hold about the search of captions.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    hits : pandas.DataFrame
        From :func:`search_captions`: a row a layer.
    late : int
        The first of the late layers.
    """
    raw, clean, describes, stands_behind = (hits[column] for column in hits)
    middle = len(hits) // 2
    experiment.check(
        "few pictures find their caption as it is, most without the cones",
        raw.max() < 0.5 and clean.loc[1:late].min() > 0.8,
    )
    experiment.check(
        "before the first block hardly a caption is found either way",
        max(raw.iloc[0], clean.iloc[0]) < 0.3,
    )
    experiment.check(
        "early and middle layers hold the words, late ones the picture before them",
        (describes - stands_behind).loc[1:middle].min() > 0.5
        and (stands_behind - describes).loc[late:].min() > 0.3,
    )


def check_factors(experiment: Experiment, curves: pd.DataFrame) -> None:
    """Write down whether pictures of one place share a cone, and halves of them do not.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    curves : pandas.DataFrame
        From :func:`factor_cones`: columns "factor" and "value".
    """
    of_factor = dict(list(curves.groupby("factor")["value"]))
    experiment.check(
        "pictures of one place share a cone inside that of pictures, halves do not",
        of_factor["halves"].abs().max() < 0.06
        and "place" in of_factor
        and of_factor["place"].min() > 0.1,
    )


def _read_with(name: str, *sets: Sequence[Sample]) -> list[Activations]:
    vlm = load(name)
    layers = [vlm.layer_at(depth) for depth in _DEPTHS]
    states = []
    for samples in sets:
        states.append(capture(vlm, samples, layers, span=samples[0].modality, reduce=None))
    return states


def _distances(a: Activations, b: Activations, seed: int) -> pd.Series:
    values = {layer: apart(a, b, layer, 100, seed).value for layer in a.layers}
    return pd.Series(values)


def _pair(a: str, b: str) -> str:
    if a[-1] != b[-1]:
        return "P with T"
    return f"{a[-1]}, " + ("one modality" if a == b else "two modalities")


def _share(p: Tensor, t: Tensor, target: Int[Tensor, " n"]) -> float:
    nearest = similarity(p[:, None], t[:, None]).argmax(dim=1)
    return float((nearest == target).double().mean())


def _estimate(row: pd.Series) -> Estimate:
    return Estimate(row["value"], row["low"], row["high"], int(row["n"]))
