"""Calibrate on inputs with and without meaning, and compare the masks that they give.

The chapter on subnetworks uses it for its baselines and for what takes the weights' size out of an
overlap; calibrations and masks are those of :mod:`xlvlms_tutorial.methods.pruning`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.evaluation import Generator
from xlvlms_tutorial.methods.pruning import (
    Calibration,
    Masks,
    calibrate,
    independent_iou,
    wanda,
)
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.experiments import Experiment, answer_of, question_of
from xlvlms_tutorial.validation import require

# Linear maps that read what a block has computed, by the last part of their name; all others read
# the residual stream.
_INNER = {
    "o_proj": "attention output",
    "out_proj": "attention output",
    "down_proj": "MLP output",
    "fc2": "MLP output",
}
STREAM = "maps of the stream"
_WORDS = 12  # of a text without sense


def question_types(samples: Sequence[Sample], types: Sequence[str], n: int = 3) -> list[str]:
    """Choose the wanted types of question that samples have, or else the most frequent ones.

    Parameters
    ----------
    samples : sequence of Sample
        Samples with questions.
    types : sequence of str
        The types that the chapter is written about.
    n : int, default 3
        How many of the most frequent types are taken where samples have none of those wanted.

    Returns
    -------
    list of str
        The types.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> subnetworks.question_types(samples, ["colour", "taste"])
    ['colour']
    """
    counts = Counter(q.type for sample in samples for q in sample.questions)
    present = [kind for kind in types if kind in counts]
    return present or [kind for kind, _ in counts.most_common(n)]


def calibrate_questions(vlm: VLM, samples: Sequence[Sample], kind: str, n: int) -> Calibration:
    """Calibrate on questions of one type, with their answers, about pictures.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with questions; the first of this type is asked of each.
    kind : str
        The type of question.
    n : int
        How many samples at most.

    Returns
    -------
    Calibration
        Of the tokens of questions and answers.

    Raises
    ------
    InputError
        If no sample has such a question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> calibration = subnetworks.calibrate_questions(vlm, samples, "colour", n=2)
    >>> min(calibration.tokens.values()) > 0
    True
    """
    examples = []
    for sample in samples:
        questions = [q for q in sample.questions if q.type == kind]
        if questions and len(examples) < n:
            examples.append(replace(sample, questions=(questions[0],)))
    require(examples, f"no question of type {kind!r}", "choose a type that is asked")
    return calibrate(
        vlm, examples, span=("question", "answer"), prompt=question_of, answers=answer_of
    )


def off_diagonal(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Leave out the overlap of each mask with itself, so that a map shows the differences.

    Parameters
    ----------
    overlaps : pandas.DataFrame
        A square table.

    Returns
    -------
    pandas.DataFrame
        The same with NaN on its diagonal.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> overlaps = pd.DataFrame([[1.0, 0.4], [0.4, 1.0]])
    >>> subnetworks.off_diagonal(overlaps).min(axis=None).item()
    0.4
    """
    return overlaps.mask(np.eye(len(overlaps), dtype=bool))


def overlap_by_layer(first: Masks, second: Masks) -> pd.DataFrame:
    """Average the overlap of two masks over the linear maps of each layer, by what the maps read.

    Parameters
    ----------
    first, second : Masks
        Masks of the same linear maps.

    Returns
    -------
    pandas.DataFrame
        A row a layer. "maps of the stream" read the residual stream; the maps at the end of
        attention and of the MLP read what a block has computed.

    Examples
    --------
    >>> from xlvlms_tutorial import calibrate, wanda
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> masks = wanda(vlm, calibrate(vlm, samples, span="image"), 0.5, [8])
    >>> subnetworks.overlap_by_layer(masks, masks).loc[8].tolist()
    [1.0, 1.0, 1.0]
    """
    overlaps = first.iou(second)
    last = overlaps["linear"].str.split(".").str[-1]
    overlaps["linear"] = last.map(_INNER).fillna(STREAM)
    return overlaps.pivot_table(index="layer", columns="linear", values="iou")


def permuted(calibration: Calibration, rng: np.random.Generator) -> Calibration:
    """Shuffle the features of each linear map: norms stay as uneven, which are large is lost.

    Parameters
    ----------
    calibration : Calibration
        What was measured.
    rng : numpy.random.Generator
        The source of the orders.

    Returns
    -------
    Calibration
        The shuffled one.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial import calibrate
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> calibration = calibrate(vlm, samples, span="image")
    >>> shuffled = subnetworks.permuted(calibration, np.random.default_rng(0))
    >>> abs(subnetworks.norm_correlation(calibration, shuffled)) < 0.05
    True
    """
    squares = {}
    for key, sums in calibration.squares.items():
        squares[key] = sums[rng.permutation(len(sums))]
    return replace(calibration, squares=squares)


def noise_pictures(samples: Sequence[Sample], rng: np.random.Generator) -> list[Sample]:
    """Replace every pixel of each picture by one drawn at random.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures.
    rng : numpy.random.Generator
        The source of the pixels.

    Returns
    -------
    list of Sample
        The samples with pictures of noise, of the same sizes.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> noisy = subnetworks.noise_pictures(samples, np.random.default_rng(0))
    >>> noisy[0].image.size == samples[0].image.size
    True
    """
    noisy = []
    for sample in samples:
        pixels = rng.integers(0, 256, np.array(sample.image).shape, dtype=np.uint8)
        noisy.append(replace(sample, source=Image.fromarray(pixels)))
    return noisy


def random_texts(vlm: VLM, n: int, rng: np.random.Generator) -> list[str]:
    """Write texts of random tokens, without the first hundred and without marks.

    Parameters
    ----------
    vlm : VLM
        The model whose tokenizer has the tokens.
    n : int
        How many texts.
    rng : numpy.random.Generator
        The source of the tokens.

    Returns
    -------
    list of str
        Texts of twelve tokens that mean nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> len(subnetworks.random_texts(vlm, 3, np.random.default_rng(0)))
    3
    """
    size = len(vlm.tokenizer)
    common = np.arange(min(100, size // 4), min(40_000, size))
    marks = list(vlm.tokenizer.get_added_vocab().values())
    common = np.setdiff1d(common, marks)  # such as the mark of a picture
    tokens = common[rng.integers(len(common), size=(n, _WORDS))]
    return list(vlm.tokenizer.batch_decode(tokens.tolist()))


def without_large(masks: Masks, others: Masks, large: Masks) -> dict[str, float]:
    """Compare what two masks keep beyond the weights that are kept for their size alone.

    Parameters
    ----------
    masks, others : Masks
        The masks.
    large : Masks
        The mask by magnitude, at the same sparsity.

    Returns
    -------
    dict of str to float
        "share kept", the share of all weights that ``masks`` keeps beyond the large ones; "IoU",
        the overlap of both without them; "by chance", that of independent choices of the same
        sizes.

    Examples
    --------
    >>> from xlvlms_tutorial import calibrate, wanda
    >>> from xlvlms_tutorial.methods.pruning import magnitude_masks
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> masks = wanda(vlm, calibrate(vlm, samples, span="image"), 0.5, [8])
    >>> large = magnitude_masks(vlm, 0.5, layers=[8])
    >>> subnetworks.without_large(masks, masks, large)["IoU"]
    1.0
    """
    first, second = masks - large, others - large
    chance = []
    for key in first:
        remaining = (~large.unpack(*key)).sum(dim=1)
        p = first.unpack(*key).sum(dim=1) / remaining
        q = second.unpack(*key).sum(dim=1) / remaining
        chance.append(_independent(remaining, p, q))
    return {
        "share kept": float(first.density),
        "IoU": float(first.iou(second)["iou"].mean()),
        "by chance": float(torch.stack(chance).mean()),
    }


def norm_correlation(first: Calibration, second: Calibration) -> float:
    """Correlate the norms of input features by rank, averaged over the linear maps.

    Use it to compare inputs without the influence of the weights.

    Parameters
    ----------
    first, second : Calibration
        Calibrations of the same linear maps.

    Returns
    -------
    float
        The mean rank correlation, from -1 to 1.

    Examples
    --------
    >>> from xlvlms_tutorial import calibrate
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> calibration = calibrate(vlm, samples, span="image")
    >>> round(subnetworks.norm_correlation(calibration, calibration), 6)
    1.0
    """
    values = []
    for key in first.squares:
        values.append(spearmanr(first.norms(*key), second.norms(*key)).statistic)
    return float(np.mean(values))


def overlaps(
    vlm: VLM,
    first: Sequence[Calibration],
    second: Sequence[Calibration],
    sparsity: float,
    layers: Sequence[int] | None = None,
) -> Float[np.ndarray, " parts"]:
    """Compute the overlap of the masks of two kinds of input, in each part of the samples.

    Parameters
    ----------
    vlm : VLM
        The model.
    first, second : sequence of Calibration
        One calibration a part of each kind.
    sparsity : float
        The share of weights that the masks drop.
    layers : sequence of int, optional
        The layers; by default all.

    Returns
    -------
    numpy.ndarray
        The mean overlap over linear maps, one number a part.

    Examples
    --------
    >>> from xlvlms_tutorial import calibrate
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> calibration = calibrate(vlm, samples, span="image")
    >>> subnetworks.overlaps(vlm, [calibration], [calibration], 0.5, [8]).tolist()
    [1.0]
    """
    values = []
    for calibrations in zip(first, second, strict=True):
        masks, others = (wanda(vlm, calibration, sparsity, layers) for calibration in calibrations)
        values.append(masks.iou(others)["iou"].mean())
    return np.array(values)


def disjoint_sets(
    samples: Sequence[Sample], factor: str, values: Sequence[str], size: int = 8, n: int = 3
) -> dict[str, list[Sample]]:
    """Deal the samples of each value of a factor into two sets.

    Parameters
    ----------
    samples : sequence of Sample
        Samples whose factors are known.
    factor : str
        Such as "place".
    values : sequence of str
        The values; the most frequent ones where none of these is there twice.
    size : int, default 8
        Samples in a set at most.
    n : int, default 3
        How many frequent values take the place of those wanted.

    Returns
    -------
    dict of str to list of Sample
        Sets "sand a", "sand b" and so on.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> sets = subnetworks.disjoint_sets(load_samples("scenes", n=40), "place", ["sand"], size=2)
    >>> {name: len(part) for name, part in sets.items()}
    {'sand a': 2, 'sand b': 2}
    """
    by_value: dict[str, list[Sample]] = {}
    for sample in samples:
        value = sample.truth.get(factor)
        if value is not None:
            by_value.setdefault(value, []).append(sample)
    often = sorted((v for v in by_value if len(by_value[v]) > 1), key=lambda v: -len(by_value[v]))
    present = [value for value in values if value in often]
    sets = {}
    for value in present or often[:n]:
        half = min(size, len(by_value[value]) // 2)
        sets[f"{value} a"] = by_value[value][:half]
        sets[f"{value} b"] = by_value[value][half : 2 * half]
    return sets


def factors_named(
    vlm: Generator, samples: Sequence[Sample], factors: Sequence[str]
) -> dict[str, int]:
    """Count the captions that name each factor of their picture.

    Parameters
    ----------
    vlm : Generator
        The model, perhaps with masked weights.
    samples : sequence of Sample
        Pictures whose factors are known.
    factors : sequence of str
        Such as "subject"; those that no picture has are left out.

    Returns
    -------
    dict of str to int
        How many captions name the factor.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> subnetworks.factors_named(vlm, samples, ["place", "taste"])
    {'place': 4}
    """
    prompts = [PROMPTS["image"]] * len(samples)
    captions = vlm.generate([sample.image for sample in samples], prompts, max_new_tokens=24)
    counts = {}
    for factor in factors:
        values = [sample.truth.get(factor) for sample in samples]
        if any(values):
            pairs = zip(values, captions, strict=True)
            counts[factor] = sum(bool(value) and str(value) in text for value, text in pairs)
    return counts


def shares_of(counts: Mapping[str, Mapping[str, int]], whole: str) -> pd.Series:
    """Divide the total of each row by the total of one row.

    Parameters
    ----------
    counts : mapping of str to mapping
        Counts by row.
    whole : str
        The row that is the whole.

    Returns
    -------
    pandas.Series
        A share a row.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import subnetworks
    >>> counts = {"no mask": {"place": 4, "item": 4}, "random": {"place": 1, "item": 1}}
    >>> subnetworks.shares_of(counts, "no mask").to_dict()
    {'no mask': 1.0, 'random': 0.25}
    """
    totals = pd.DataFrame(counts).sum()
    return totals / totals[whole]


def check_pairs(
    experiment: Experiment,
    shared: pd.DataFrame,
    perceptual: Sequence[str],
    textual: Sequence[str],
) -> None:
    """Check what the chapter says of overlaps between kinds of input, at half of the weights.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    shared : pandas.DataFrame
        The overlap of each two kinds, without the diagonal.
    perceptual, textual : sequence of str
        The kinds that are seen or heard, and those that are read.
    """
    perceptual, textual = list(perceptual), list(textual)
    across, among = shared.loc[perceptual, textual], shared.loc[textual, textual]
    closer = {"image", "video"} <= set(perceptual)
    if closer:
        with_words = across.loc[["image", "video"]].max(axis=None)
        closer = shared.loc["image", "video"] > with_words
    statements = {
        "every pair lies far above independent masks": (
            shared.min(axis=None) > independent_iou(0.5) + 0.1
        ),
        "words share more with words than with what is seen or heard": (
            among.min(axis=None) > across.max(axis=None)
        ),
        "pictures and clips share more with each other than with words": closer,
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_scale(experiment: Experiment, mean: pd.Series) -> None:
    """Check what the chapter says of the overlaps of baselines with the mask of captions.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    mean : pandas.Series
        The mean overlap over linear maps, by mask.
    """
    step = mean["image"] - mean["permuted norms"]
    no_pictures = min(mean["magnitude"], mean["nonsense"])
    statements = {
        "every mask lies far above independent ones": mean.min() > independent_iou(0.5) + 0.1,
        "no input and random words agree with captions better than pictures do": (
            no_pictures > mean["image"] + 0.02
        ),
        "pictures agree a little better than their shuffled norms": (
            0 < step < 0.25 * (mean["other captions"] - mean["permuted norms"])
        ),
        "noise agrees least": mean["noise"] == mean.min(),
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_rest(experiment: Experiment, rest: pd.DataFrame) -> None:
    """Check what the chapter says of masks without the largest weights.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    rest : pandas.DataFrame
        A row a mask: the columns of :func:`without_large`, and "correlation of norms".
    """
    both = rest[["IoU", "correlation of norms"]]
    shuffled = rest.loc["permuted norms"]
    statements = {
        "in both measures the order is the same": (both.diff().iloc[1:] < -0.02).all(axis=None),
        "shuffled norms have no correlation and an overlap above chance": (
            abs(shuffled["correlation of norms"]) < 0.05
            and shuffled["IoU"] > shuffled["by chance"] + 0.03
        ),
        "noise has more than half of the correlation of pictures": (
            both.loc["noise"].iloc[1] > 0.5 * both.loc["image"].iloc[1]
        ),
        "noise keeps the most small weights": rest["share kept"].idxmax() == "noise",
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def check_ways(
    experiment: Experiment,
    masks: Mapping[str, Masks],
    able: Mapping[str, Mapping[str, int]],
    overlap: float,
) -> None:
    """Check what the chapter says of captions written under masks of some kinds.

    Parameters
    ----------
    experiment : Experiment
        Where checks are written.
    masks : mapping of str to Masks
        The masks by kind, each without 30 % of the weights.
    able : mapping of str to mapping
        How many captions name a factor, by kind and for "no mask".
    overlap : float
        The overlap of the masks of pictures and words.
    """
    dropped = [1 - mask.density for mask in masks.values()]
    share = shares_of(able, "no mask")
    statements = {
        "each mask drops 30 % of the weights": np.allclose(dropped, 0.3, atol=0.01),
        "random weights keep no caption alive": share["random"] < 0.1,
        "the largest weights keep some": 0.1 < share["magnitude"] < 0.6,
        "the mask of pictures does hardly better than size": (
            abs(share["image"] - share["magnitude"]) < 0.2
        ),
        "the mask of words does much better than that of pictures": (
            share["text"] > share["image"] + 0.2
        ),
        "pictures added to words change little": (
            abs(share["image and text"] - share["text"]) < 0.15
        ),
        "masks of pictures and words share most weights at 30 % sparsity": overlap > 0.7,
    }
    for statement, holds in statements.items():
        experiment.check(statement, holds)


def _independent(
    remaining: Int[Tensor, " rows"], p: Float[Tensor, " rows"], q: Float[Tensor, " rows"]
) -> Tensor:
    # the overlap of independent choices of shares p and q of what is left in each row
    return (remaining * p * q).sum() / (remaining * (p + q - p * q)).sum()
