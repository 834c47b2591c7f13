"""Chapter "cam": explanations of a segmentation and of a word, judged by what is really there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from xlvlms_tutorial.data import Sample, load_samples, truth_masks
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.attribution import (
    CONTROLS,
    WordScores,
    binary_entropy,
    confidence,
    control_maps,
    mass_share,
    overlap,
    perturbation_curves,
    pointing_game,
    published_entropy,
    scaled,
    token_maps,
)
from xlvlms_tutorial.metrics import difference
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import plots
from xlvlms_tutorial.view.cards import Html, picture_html

Planes = Float[Tensor, "n h w"]
Masks = Bool[Tensor, "n h w"]

# what ranks maps, and whether more of it is meant to be better
RULERS = {"entropy": -1, "binary entropy": -1, "confidence": 1, "area": -1}
# what the methods are called in papers
NAMES = {
    "grad": "Seg-Grad-CAM",
    "grad++": "Grad-CAM++",
    "xgrad": "XGrad-CAM",
    "layer": "LayerCAM",
    "eigen": "Eigen-CAM",
    "score": "Score-CAM",
    "ablation": "Ablation-CAM",
}
_FEW = 1e-9
_ORANGE = "#9a5d10"


def shrink(masks: Bool[Tensor, "n h w"], side: int) -> Float[Tensor, "n side side"]:
    """Return which share of each cell of a coarser grid a mask takes.

    Parameters
    ----------
    masks : Tensor of bool (n, h, w)
        The masks.
    side : int
        Rows and columns of the grid.

    Returns
    -------
    Tensor (n, side, side)
        Shares of 0 to 1.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import shrink
    >>> shrink(torch.tensor([[[True, False], [False, False]]]), 1).tolist()
    [[[0.25]]]
    """
    return adaptive_avg_pool2d(masks.float()[:, None], side)[:, 0]


def above(maps: Mapping[str, Planes], threshold: float = 0.4) -> dict[str, Masks]:
    """Cut maps at a threshold after they are stretched from 0 to 1.

    Constant maps, such as "empty" and "full", are cut as they are.

    Parameters
    ----------
    maps : mapping of str to Tensor (n, h, w)
        The maps by name.
    threshold : float, default 0.4
        That of the publication.

    Returns
    -------
    dict of str to Tensor of bool (n, h, w)
        The regions.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import above
    >>> above({"a": torch.tensor([[[1.0, 2.0, 5.0]]])})["a"].tolist()
    [[[False, False, True]]]
    """
    regions = {}
    for name, stack in maps.items():
        regions[name] = torch.zeros_like(stack, dtype=torch.bool)
        for row, single in enumerate(stack):
            constant = bool((single == single.flatten()[0]).all())
            values = single if constant else scaled(single[None])[0]
            regions[name][row] = values > threshold
    return regions


def judge(
    predict: Callable[[Tensor], Planes],
    pictures: Float[Tensor, "n c h w"],
    truth: Masks,
    regions: Mapping[str, Masks],
    pixels: Mapping[str, Masks] | None = None,
    fill: float | Tensor = 0.0,
) -> pd.DataFrame:
    """Show a network only some pixels, and measure what it still says of a class.

    Parameters
    ----------
    predict : function
        Takes pictures and returns the probability of the class at each pixel (n, h, w).
    pictures : Tensor (n, c, h, w)
        The pictures.
    truth : Tensor of bool (n, h, w)
        Where the class is.
    regions : mapping of str to Tensor of bool (n, h, w)
        What each explanation points at, by its name.
    pixels : mapping of str to Tensor of bool (n, h, w), optional
        Which pixels the network is shown, by the same names; by default the regions.
    fill : float or Tensor, default 0.0
        What stands in the other pixels; 0 is black.

    Returns
    -------
    pandas.DataFrame
        A row a map and picture: map, picture, area (share of the picture pointed at), entropy (the
        published one, times 1000), binary entropy, confidence, and overlap of the region with the
        truth.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import judge
    >>> pictures = torch.ones(1, 1, 1, 2)
    >>> truth = torch.tensor([[[True, False]]])
    >>> rows = judge(lambda x: x[:, 0] * 0.5, pictures, truth, {"the thing": truth})
    >>> rows[["map", "area", "confidence", "overlap"]].round(2).values.tolist()
    [['the thing', 0.5, 0.5, 1.0]]
    """
    tables = []
    for name, region in regions.items():
        visible = region if pixels is None else pixels[name]
        with torch.no_grad():
            probabilities = predict(torch.where(visible[:, None], pictures, fill))
        columns = {
            "area": region.float().mean(dim=(1, 2)),
            "entropy": 1000 * published_entropy(probabilities, truth),
            "binary entropy": binary_entropy(probabilities, truth),
            "confidence": confidence(probabilities, truth),
            "overlap": overlap(region, truth),
        }
        rows = pd.DataFrame({key: values.numpy() for key, values in columns.items()})
        rows.insert(0, "picture", range(len(rows)))
        rows.insert(0, "map", name)
        tables.append(rows)
    return pd.concat(tables, ignore_index=True)


def agreement(rows: pd.DataFrame, ruler: str, maps: Sequence[str] | None = None) -> np.ndarray:
    """Compute how a ruler's order of the maps agrees with their overlap with the truth.

    Parameters
    ----------
    rows : pandas.DataFrame
        From :func:`judge`.
    ruler : {"entropy", "binary entropy", "confidence", "area"}
        What ranks the maps; of all but confidence less is better.
    maps : sequence of str, optional
        Which maps are ranked; by default all.

    Returns
    -------
    array (n,)
        Spearman's rank correlation in each picture, 0 where either ranks nothing.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.cam import agreement
    >>> rows = pd.DataFrame({"map": list("abc"), "picture": 0, "confidence": [0.1, 0.2, 0.9],
    ...                      "area": [0.1, 0.1, 0.1], "overlap": [0.3, 0.5, 0.8]})
    >>> float(agreement(rows, "confidence")[0]), float(agreement(rows, "area")[0])
    (1.0, 0.0)
    """
    if maps is not None:
        rows = rows[rows["map"].isin(maps)]
    results = []
    for _, part in rows.groupby("picture", sort=True):
        first = (RULERS[ruler] * part[ruler]).round(9).rank().to_numpy()
        second = part["overlap"].round(9).rank().to_numpy()
        first, second = first - first.mean(), second - second.mean()
        length = np.sqrt((first**2).sum() * (second**2).sum())
        results.append((first * second).sum() / length if length else 0.0)
    return np.array(results)


def record_ranks(
    experiment: Experiment, judged: Mapping[str, tuple[pd.DataFrame, Sequence[str]]], seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Record CAM-1: whether entropy ranks maps better than confidence does, and than area.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    judged : mapping of str to (DataFrame, sequence of str)
        What :func:`judge` measured and which maps are ranked, by the name of the protocol.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    dict of str to dict of str to array (n,)
        The agreement of each ruler with the truth in each picture, by protocol.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, cam
    >>> rows = pd.DataFrame({"map": list("ab") * 2, "picture": [0, 0, 1, 1], "area": 0.1})
    >>> for ruler in ("entropy", "binary entropy", "confidence", "overlap"):
    ...     rows[ruler] = [0.1, 0.2, 0.1, 0.3]
    >>> experiment = Experiment("cam", "tiny", "scenes")
    >>> agreed = cam.record_ranks(experiment, {"by hand": (rows, ["a", "b"])})
    >>> agreed["by hand"]["confidence"].tolist(), experiment.verdict("CAM-1", "by hand")
    ([1.0, 1.0], 'refuted')
    """
    agreed = {}
    for protocol, (rows, maps) in judged.items():
        agreed[protocol] = {ruler: agreement(rows, ruler, maps) for ruler in RULERS}
        gain = difference(
            agreed[protocol]["entropy"], agreed[protocol]["confidence"], paired=True, seed=seed
        )
        experiment.record("CAM-1", gain, "confidence", protocol)
    first = next(iter(agreed))
    gain = difference(agreed[first]["entropy"], agreed[first]["area"], paired=True, seed=seed)
    experiment.record("CAM-1", gain, "counting pixels", f"{first}, against counting pixels")
    return agreed


@dataclass(frozen=True)
class Named:
    """Pictures, the thing that a caption names in each, and where it is.

    Parameters
    ----------
    samples : list of Sample
        The pictures.
    words : list of str
        The words that are named; several pictures may have the same.
    answers : list of str
        The captions up to the word.
    masks : Tensor of bool (n, h, w) or None
        Where the thing is; None where this is not known.
    dataset : str, default "scenes"
        Where the pictures are from.
    """

    samples: list[Sample]
    words: list[str]
    answers: list[str]
    masks: Bool[Tensor, "n h w"] | None
    dataset: str = "scenes"


def named_things(n: int, part: str = "subject", dataset: str = "scenes", seed: int = 0) -> Named:
    """Take pictures whose first caption names a thing that is seen, and cut the caption after it.

    Parameters
    ----------
    n : int
        How many pictures.
    part : {"subject", "item"}, default "subject"
        Which thing.
    dataset : str, default "scenes"
        Pictures with captions and truth. Where captions name fewer than two of the things that the
        truth holds, scenes of the embedded world take their place.
    seed : int, default 0
        Which pictures are drawn.

    Returns
    -------
    Named
        The pictures, words, answers and masks.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.cam import named_things
    >>> named = named_things(2)
    >>> named.answers, tuple(named.masks.shape)
    (['A man', 'A man'], (2, 256, 256))
    """
    selected, words, answers = [], [], []
    for sample in load_samples(dataset, 3 * n + 10, "test", seed):
        thing = sample.truth.get(part)
        if thing is None or not sample.captions or len(selected) == n:
            continue
        match = whole_words([str(thing), f"{thing}s", f"{thing}es"]).search(sample.captions[0])
        if match:
            selected.append(sample)
            words.append(match.group())
            answers.append(sample.captions[0][: match.end()])
    if len(selected) < 2:
        require(dataset != "scenes", f"{n} pictures", "give two or more")
        return named_things(n, part, "scenes", seed)
    try:
        masks = truth_masks(selected)[part]
    except InputError:  # pictures whose pixels nobody has marked
        masks = None
    return Named(selected, words, answers, masks, dataset)


def score_words(vlm: VLM, named: Named, batch_size: int = 8) -> WordScores:
    """Make the score of the named words.

    Parameters
    ----------
    vlm : VLM
        The model.
    named : Named
        From :func:`named_things`.
    batch_size : int, default 8
        Pictures in a forward.

    Returns
    -------
    WordScores
        The log-probability of each word where the caption comes to it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.cam import named_things, score_words
    >>> len(score_words(vlm, named_things(2)))
    2
    """
    words = sorted(set(named.words), key=len, reverse=True)
    return WordScores(vlm, named.samples, words, named.answers, batch_size=batch_size)


def judge_tokens(
    scores: WordScores,
    maps: Mapping[str, Planes],
    truth: Float[Tensor, "n h w"] | None,
    shares: Sequence[float] = (0.125, 0.375),
) -> pd.DataFrame:
    """Judge maps over image tokens by the truth, and by the model itself.

    Parameters
    ----------
    scores : WordScores
        The model's scores of the words.
    maps : mapping of str to Tensor (n, side, side)
        The maps by name; where one is constant it ranks nothing, and the name is left out.
    truth : Tensor (n, side, side) or None
        The share of each token's cell that shows the thing; None where it is not known.
    shares : sequence of float
        The shares of the tokens that are kept, or removed.

    Returns
    -------
    pandas.DataFrame
        A row a map and picture: map, picture, on it (share of the mass on the thing's pixels), hit
        (whether the highest token is the thing's), insertion and deletion (mean probability of the
        word with only the highest tokens, and without them).

    Examples
    --------
    >>> from xlvlms_tutorial.methods.attribution import control_maps
    >>> from xlvlms_tutorial.tutorials import cam
    >>> named = cam.named_things(2)
    >>> scores = cam.score_words(vlm, named)
    >>> maps = {"centre": control_maps(2, 4, 4, "centre")}
    >>> rows = cam.judge_tokens(scores, maps, cam.shrink(named.masks, 4), [0.5])
    >>> list(rows)
    ['map', 'picture', 'on it', 'hit', 'insertion', 'deletion']
    """
    tables = []
    for name, signed in maps.items():
        if (signed.amax(dim=(1, 2)) == signed.amin(dim=(1, 2))).any():
            continue
        inserted, deleted = perturbation_curves(lambda kept: scores(kept).exp(), signed, shares)
        columns = {"insertion": inserted.mean(dim=1), "deletion": deleted.mean(dim=1)}
        if truth is not None:
            # a map without positive values has its mass everywhere
            columns = {
                "on it": mass_share(signed.clamp(min=_FEW), truth),
                "hit": pointing_game(signed, (truth > 0.1).float()),
            } | columns
        rows = pd.DataFrame({key: values.numpy() for key, values in columns.items()})
        rows.insert(0, "picture", range(len(rows)))
        rows.insert(0, "map", name)
        tables.append(rows)
    return pd.concat(tables, ignore_index=True)


def record_tokens(
    experiment: Experiment, rows: pd.DataFrame, baselines: Mapping[str, str], seed: int = 0
) -> None:
    """Record CAM-2: whether gradients on image tokens show where the named thing stands.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    rows : pandas.DataFrame
        From :func:`judge_tokens`, with a map "gradient".
    baselines : mapping of str to str
        What each map that it is compared with is called in the record.
    seed : int, default 0
        Of the intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, cam
    >>> rows = pd.DataFrame({"map": ["gradient"] * 2 + ["random"] * 2, "picture": [0, 1] * 2})
    >>> rows["on it"] = rows["insertion"] = [0.5, 0.6, 0.1, 0.1]
    >>> rows["deletion"] = 0.1
    >>> experiment = Experiment("cam", "tiny", "scenes")
    >>> cam.record_tokens(experiment, rows, {"random": "random map"})
    >>> experiment.verdict("CAM-2", "mass on the thing, against random map")
    'confirmed'
    """
    wide = rows.assign(area=rows["insertion"] - rows["deletion"]).set_index("picture")
    measures = {"on it": "mass on the thing", "area": "insertion minus deletion"}
    for column, name in measures.items():
        if column not in wide:
            continue
        values = {key: part[column].to_numpy() for key, part in wide.groupby("map")}
        for baseline, against in baselines.items():
            if baseline not in values:
                continue
            gain = difference(values["gradient"], values[baseline], paired=True, seed=seed)
            experiment.record("CAM-2", gain, against, f"{name}, against {against}")


def mass_by_word(
    vlm: VLM, n: int, dataset: str = "scenes", seed: int = 0, method: str = "gradient"
) -> pd.DataFrame:
    """Compare where maps of two words of the same pictures lie.

    Use it to see whether a map follows the word: it should be on the thing that is named.

    Parameters
    ----------
    vlm : VLM
        The model.
    n : int
        How many pictures.
    dataset : str, default "scenes"
        Pictures with captions and truth.
    seed : int, default 0
        Which pictures are drawn.
    method : str, default "gradient"
        As for :func:`~xlvlms_tutorial.methods.attribution.token_maps`.

    Returns
    -------
    pandas.DataFrame
        A row a picture: columns (word, thing) with the share of the mass of the word's map that
        lies on the thing; one row of NaN where both are not known in the same pictures.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.cam import mass_by_word
    >>> list(mass_by_word(vlm, 2))
    [('subject', 'subject'), ('subject', 'item'), ('item', 'subject'), ('item', 'item')]
    """
    named = {part: named_things(n, part, dataset, seed) for part in ("subject", "item")}
    ids = [[sample.id for sample in naming.samples] for naming in named.values()]
    if ids[0] != ids[1] or any(naming.masks is None for naming in named.values()):
        pairs = pd.MultiIndex.from_product([named, named])
        return pd.DataFrame([[np.nan] * len(pairs)], columns=pairs)
    shares = {}
    for word, naming in named.items():
        scores = score_words(vlm, naming)
        maps = token_maps(scores, method).clamp(min=_FEW)
        for thing, target in named.items():
            shares[word, thing] = mass_share(maps, shrink(target.masks, scores.side)).numpy()
    return pd.DataFrame(shares)


def check_protocols(experiment: Experiment, published: pd.DataFrame, alone: pd.DataFrame) -> None:
    """Write down which sentences hold about the published protocol and about what it ranks.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    published : pandas.DataFrame
        Means of :func:`judge` by map, where the network sees the thing too: columns "overlap",
        "confidence" and "entropy".
    alone : pandas.DataFrame
        The same where it sees only what a map points at, with a map "empty".
    """
    check, methods = experiment.check, list(NAMES.values())
    of_methods = published.loc[methods]
    check(
        "in the published protocol the thing is hardly recognised after most methods",
        (of_methods["confidence"] < 0.15).sum() >= 5,
    )
    check(
        "the method that keeps the thing recognised has the highest entropy",
        of_methods["confidence"].idxmax() == of_methods["entropy"].idxmax() == NAMES["score"],
    )
    check("Score-CAM points elsewhere", published.loc[NAMES["score"], "overlap"] < 0.1)
    check("alone, the empty map has the lowest entropy", alone["entropy"].idxmin() == "empty")
    check(
        "alone, the empty map leaves nothing of the thing",
        alone["confidence"].idxmin() == "empty" and alone.loc["empty", "confidence"] < 0.05,
    )


def check_tokens(experiment: Experiment, summary: pd.DataFrame, by_word: pd.DataFrame) -> None:
    """Write down which sentences hold about maps of image tokens.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    summary : pandas.DataFrame
        Means of :func:`judge_tokens` by map. Without columns "on it" and "hit", which need the
        truth, no sentence about them holds.
    by_word : pandas.DataFrame
        From :func:`mass_by_word`.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, cam
    >>> summary = pd.DataFrame({"insertion": [0.5]}, index=["gradient"])
    >>> by_word = pd.DataFrame({("item", "subject"): [0.4], ("item", "item"): [0.2]})
    >>> cam.check_tokens(Experiment("cam", "tiny", "scenes"), summary, by_word)
    """
    mean = by_word.mean()
    experiment.check(
        "when the object is named, gradients still lie more on the subject",
        len(by_word) and mean["item", "subject"] > mean["item", "item"],
    )
    with_truth = {"on it", "hit"} <= set(summary)
    mass = summary["on it"] if with_truth else {}
    hits = summary["hit"] if with_truth else {}
    experiment.check(
        "occlusion puts more of its mass on the thing than gradients do",
        with_truth and mass["occlusion"] > mass["gradient"] + 0.05,
    )
    experiment.check(
        "rollout puts no more of its mass on the thing than a random map",
        with_truth and mass["rollout"] < mass["random"],
    )
    experiment.check(
        "the highest token of occlusion nearly always shows the subject",
        with_truth and hits["occlusion"] > 0.9,
    )
    experiment.check(
        "attention points at the subject more often than gradients do",
        with_truth and hits["attention"] > hits["gradient"] + 0.1,
    )


def maps_figure(
    pictures: Float[Tensor, "n 3 h w"],
    maps: Mapping[str, Planes],
    truth: Masks,
    rows: Sequence[int],
) -> Figure:
    """Draw maps beside pictures, with the outline of what is there.

    Parameters
    ----------
    pictures : Tensor (n, 3, h, w)
        Values of 0 to 1.
    maps : mapping of str to Tensor (n, h, w)
        The maps by name, a column each.
    truth : Tensor of bool (n, h, w)
        What is outlined.
    rows : sequence of int
        Which pictures, a row each.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import maps_figure
    >>> thing = torch.zeros(1, 8, 8, dtype=torch.bool)
    >>> thing[:, 2:4] = True
    >>> figure = maps_figure(torch.rand(1, 3, 8, 8), {"a": torch.rand(1, 8, 8)}, thing, [0])
    >>> len(figure.axes)
    2
    """
    columns = 1 + len(maps)
    figure, axes = plots.panels(
        len(rows) * columns, columns, width=7.4, height=7.4 / columns * 1.1, same=False
    )
    for number, ax in enumerate(axes):
        row, column = rows[number // columns], number % columns
        ax.set_axis_off()
        if column == 0:
            ax.imshow(pictures[row].permute(1, 2, 0).numpy())
        else:
            ax.imshow(list(maps.values())[column - 1][row].numpy(), cmap="magma")
        ax.contour(truth[row].numpy(), levels=[0.5], colors="white", linewidths=0.7)
        if number < columns:
            ax.set_title(["picture", *maps][column], fontsize=7)
    return figure


def hill_figure(rows: pd.DataFrame, truth: Masks, labels: Sequence[str]) -> Figure:
    """Draw the published entropy against confidence, with the curve that both lie under.

    Parameters
    ----------
    rows : pandas.DataFrame
        From :func:`judge`.
    truth : Tensor of bool (n, h, w)
        Where the class is, as it was judged.
    labels : sequence of str
        The maps whose dots are named.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.

    Examples
    --------
    >>> import pandas as pd, torch
    >>> from xlvlms_tutorial.tutorials.cam import hill_figure
    >>> rows = pd.DataFrame({"map": ["a"], "picture": 0, "entropy": 1.0, "confidence": 0.5})
    >>> len(hill_figure(rows, torch.ones(1, 2, 2, dtype=torch.bool), ["a"]).axes)
    1
    """
    figure, (ax,) = plots.panels(1, width=6.4, height=3.4)
    grid = torch.linspace(0, 1, 201)
    hill = -torch.xlogy(grid, grid) / math.log(3)
    ax.plot(grid, hill, color=plots.MUTED, lw=1.5, label="a pixel of probability p")
    share = truth.float().mean(dim=(1, 2)).numpy()
    per_pixel = rows["entropy"] / 1000 / share[rows["picture"]]
    means = rows.assign(height=per_pixel).groupby("map", sort=False)[["confidence", "height"]]
    for name, (x, y) in means.mean().iterrows():
        control = name in CONTROLS
        ax.plot(x, y, "s" if control else "o", color=_ORANGE if control else plots.ACCENT, ms=6)
        if name in labels:
            ax.annotate(name, (x, y), (6, 5), textcoords="offset points", fontsize=8)
    ax.set(xlabel="confidence: probability on the thing's pixels", ylim=(0, 0.4))
    ax.set_ylabel("entropy a pixel of the thing")
    plots.legend_below(figure)
    return figure


def with_controls(maps: Mapping[str, Planes], names: Sequence[str], seed: int = 0) -> dict:
    """Put control maps of the same size behind maps.

    Parameters
    ----------
    maps : mapping of str to Tensor (n, h, w)
        The maps by name.
    names : sequence of str
        Controls, such as "random".
    seed : int, default 0
        Of the random maps.

    Returns
    -------
    dict of str to Tensor (n, h, w)
        Maps, then controls.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import with_controls
    >>> list(with_controls({"a": torch.rand(1, 2, 2)}, ["empty", "full"]))
    ['a', 'empty', 'full']
    """
    size = next(iter(maps.values())).shape
    return dict(maps) | {name: control_maps(*size, name, seed) for name in names}


def frames(
    predict: Callable[[Tensor], Planes],
    pictures: Float[Tensor, "n 3 h w"],
    truth: Masks,
    maps: Mapping[str, Planes],
    rows: Sequence[int],
    thresholds: Sequence[float],
) -> dict[tuple[str, float], Html]:
    """Show what is left of pictures under each map and threshold, and what is measured.

    Use it as the frames of :func:`~xlvlms_tutorial.view.widgets.explorer`, whose levels are map and
    threshold.

    Parameters
    ----------
    predict : function
        Takes pictures and returns the probability of the class at each pixel (n, h, w).
    pictures : Tensor (n, 3, h, w)
        The pictures.
    truth : Tensor of bool (n, h, w)
        Where the class is.
    maps : mapping of str to Tensor (n, h, w)
        The maps by name.
    rows : sequence of int
        Which pictures are shown.
    thresholds : sequence of float
        Where maps are cut.

    Returns
    -------
    dict of (str, float) to Html
        By map and threshold.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import frames
    >>> thing = torch.zeros(1, 8, 8, dtype=torch.bool)
    >>> thing[:, 2:4] = True
    >>> list(frames(lambda x: x[:, 0], torch.rand(1, 3, 8, 8), thing,
    ...             {"a": torch.rand(1, 8, 8)}, [0], [0.2, 0.4]))
    [('a', 0.2), ('a', 0.4)]
    """
    drawings = {}
    for threshold in thresholds:
        for name, region in above(maps, threshold).items():
            part = region[rows]
            measured = judge(predict, pictures[rows], truth[rows], {name: part}).mean(
                numeric_only=True
            )
            picture = strip(pictures[rows], part)
            text = (
                f"<p>confidence {measured['confidence']:.2f}, "
                f"published entropy {measured['entropy']:.1f}, "
                f"area {measured['area']:.2f}, overlap {measured['overlap']:.2f}</p>"
            )
            alt = f"what {name} keeps of {len(rows)} pictures at {threshold}"
            drawings[name, threshold] = Html(picture_html(picture, alt, picture.width) + text)
    return {
        (name, threshold): drawings[name, threshold] for name in maps for threshold in thresholds
    }


def strip(
    pictures: Float[Tensor, "n 3 h w"],
    mask: Masks | None = None,
    pixels: int = 128,
) -> Image.Image:
    """Draw pictures side by side, with what is kept alone.

    Parameters
    ----------
    pictures : Tensor (n, 3, h, w)
        Values of 0 to 1.
    mask : Tensor of bool (n, h, w), optional
        The pixels that are drawn; the others are black.
    pixels : int, default 128
        The side of each picture.

    Returns
    -------
    PIL.Image.Image
        The strip.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.cam import strip
    >>> strip(torch.rand(3, 3, 8, 8), pixels=16).size
    (56, 16)
    """
    masked = pictures.clone()
    if mask is not None:
        masked = masked * mask[:, None]
    large = interpolate(masked, (pixels, pixels), mode="nearest")
    gap = torch.ones(3, pixels, 4)
    parts = []
    for picture in large:
        parts += [picture, gap]
    row = torch.cat(parts[:-1], dim=2).clamp(0, 1)
    return Image.fromarray((255 * row).round().byte().permute(1, 2, 0).numpy())
