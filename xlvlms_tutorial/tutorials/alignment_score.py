"""Measure several models by their alignment score and by what it may predict, and correlate both.

The chapter on alignment scores uses it for its checkpoints and encoders. Every model is measured on
the same samples.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, permutations, product

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from scipy.stats import rankdata

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.evaluation import Report, evaluate
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.alignment import READINGS, Alignment, alignment
from xlvlms_tutorial.metrics import (
    Estimate,
    bootstrap,
    caption_attributes,
    chair,
    correlation,
    percentile_interval,
    permutation_p,
    yes_or_no,
)
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view import plots, widgets
from xlvlms_tutorial.view.cards import Html

_ASKED = ("colour", "place", "action")  # types of question that all models were trained for
_FEWEST = 4  # points that have a correlation
_MOST = 8  # points whose orders can all be tried


@dataclass(frozen=True, eq=False)
class Measured:
    """Hold what one model gave: the tokens of its pictures and captions, and its answers.

    :func:`measure` returns it.

    Parameters
    ----------
    perceptual, textual : Activations
        The tokens of pictures and of their reference captions, at every layer.
    readings : dict of str to Alignment
        Their alignment in each reading.
    report : Report
        The captions and answers of the model.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> measured = alignment_score.measure(vlm, samples)
    >>> list(measured.scores())
    ['layer', 'input']
    """

    perceptual: Activations
    textual: Activations
    readings: dict[str, Alignment]
    report: Report

    def scores(self) -> dict[str, float]:
        """Return the alignment score in each reading."""
        scores = {}
        for reading, aligned in self.readings.items():
            scores[reading] = float(aligned.score.value)
        return scores


def tokens(vlm: VLM, samples: Sequence[Sample], seed: int = 0) -> tuple[Activations, Activations]:
    """Capture the tokens of each picture and those of its reference caption, at every layer.

    The caption is given to the model as its answer, so that all models read the same words.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples of one modality with captions; the first caption of each is read.
    seed : int, default 0
        Of the capture.

    Returns
    -------
    tuple of Activations
        The perceptual and the textual tokens.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> perceptual, textual = alignment_score.tokens(vlm, samples)
    >>> len(perceptual.table), perceptual.layers[-1]
    (64, 30)
    """
    kind = samples[0].modality
    states = capture(
        vlm,
        samples,
        "all",
        span=(kind, "answer"),
        reduce=None,
        answers=_first_caption,
        batch_size=16,
        seed=seed,
    )
    perceptual = states.select(f"span == {kind!r}")
    return perceptual, states.select("span == 'answer'")


def align(
    perceptual: Activations, textual: Activations, pairs: str = "all", seed: int = 0
) -> dict[str, Alignment]:
    """Compute the alignment in each reading.

    Parameters
    ----------
    perceptual, textual : Activations
        The tokens, as :func:`tokens` returns them.
    pairs : {"all", "matched"}, default "all"
        Whether a picture meets all captions, or its own one alone.
    seed : int, default 0
        Of the bootstrap over samples.

    Returns
    -------
    dict of str to Alignment
        By reading.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> aligned = alignment_score.align(*alignment_score.tokens(vlm, samples))
    >>> bool(aligned["layer"].values[0] == aligned["input"].values[0])
    True
    """
    aligned = {}
    for reading in READINGS:
        aligned[reading] = alignment(perceptual, textual, reading=reading, pairs=pairs, seed=seed)
    return aligned


def measure(vlm: VLM, samples: Sequence[Sample], seed: int = 0) -> Measured:
    """Measure a model: its alignment, its captions, and its answers to a few questions.

    The questions are those on colour, place and action, and one a sample that asks for an object
    which is not there.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with captions and questions.
    seed : int, default 0
        Of capture and bootstrap.

    Returns
    -------
    Measured
        Tokens, alignments and answers.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> report = alignment_score.measure(vlm, samples).report
    >>> len(report.captions)
    4
    """
    examined = [_with_few_questions(sample) for sample in samples]
    report = evaluate(
        vlm, examined, progress=False, batch_size=32, caption_tokens=20, answer_tokens=3
    )
    perceptual, textual = tokens(vlm, samples, seed)
    return Measured(perceptual, textual, align(perceptual, textual, seed=seed), report)


def nameable_objects(world: str, samples: Sequence[Sample], seed: int = 0) -> list[str]:
    """List the objects that CHAIR counts: all that a world asks for or that samples show.

    Parameters
    ----------
    world : str
        A dataset with presence questions.
    samples : sequence of Sample
        The samples whose subjects and items have to be among the objects.
    seed : int, default 0
        Of the samples; the questions are those of samples from the next seed.

    Returns
    -------
    list of str
        The objects in order of the alphabet.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> objects = alignment_score.nameable_objects("scenes", samples)
    >>> "woman" in objects and samples[0].truth["item"] in objects
    True
    """
    objects = set().union(*(_present(sample) for sample in samples))
    for sample in load_samples(world, n=300, seed=seed + 1):
        objects.update(q.target for q in sample.questions if q.type == "presence")
    return sorted(objects)


def outcomes(report: Report, samples: Sequence[Sample], objects: Sequence[str]) -> dict[str, float]:
    """Say how well a model captions and answers, and how much of what it says is not there.

    Parameters
    ----------
    report : Report
        What :func:`measure` evaluated.
    samples : sequence of Sample
        The same samples.
    objects : sequence of str
        The objects that CHAIR counts.

    Returns
    -------
    dict of str to float
        "caption", the share of known factors that captions name; "qa", the share of questions
        answered correctly; "chair_i" and "chair_s", the shares of named objects that are absent
        and of captions that name one; "yes", the share of absent objects that are said to be there.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> report = alignment_score.measure(vlm, samples).report
    >>> objects = alignment_score.nameable_objects("scenes", samples)
    >>> alignment_score.outcomes(report, samples, objects)["caption"] > 0.5
    True
    """
    factors = report.captions.drop(columns=["sample", "caption"])
    present = [_present(sample) for sample in samples]
    invented = chair(report.captions["caption"].tolist(), present, objects)["value"]
    absent = report.answers["type"] == "presence"
    replies = report.answers.loc[absent, "prediction"].map(yes_or_no)
    return {
        "caption": float(factors.stack().mean()),
        "qa": float(report.answers.loc[~absent, "correct"].mean()),
        "chair_i": float(invented["CHAIR_i"]),
        "chair_s": float(invented["CHAIR_s"]),
        "yes": float((replies == "yes").mean()),
    }


def describe(vlm: VLM, samples: Sequence[Sample], seed: int = 0) -> dict[str, float]:
    """Measure how long picture tokens are, both scores, and what the captions get right.

    Use it inside an edit, or with other pictures, to see what the score notices.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The pictures, with the truth that captions are compared with.
    seed : int, default 0
        Of capture and bootstrap.

    Returns
    -------
    dict of str to float
        "length" of picture tokens in lengths of a word, the score in each reading, and "named",
        the share of known factors that the model's captions name.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> list(alignment_score.describe(vlm, samples[:3]))
    ['length', 'layer', 'input', 'named']
    """
    perceptual, textual = tokens(vlm, samples, seed)
    numbers = {"length": length(perceptual) / length(textual)}
    for reading, aligned in align(perceptual, textual, seed=seed).items():
        numbers[reading] = float(aligned.score.value)
    prompts = [PROMPTS["image"]] * len(samples)
    captions = vlm.generate([sample.image for sample in samples], prompts, max_new_tokens=20)
    named = caption_attributes(captions, [sample.truth for sample in samples])
    return numbers | {"named": float(named.stack().mean())}


def profiles(by_name: Mapping[str, Alignment], column: str) -> pd.DataFrame:
    """Stack the profiles of several alignments for one figure.

    Parameters
    ----------
    by_name : mapping of str to Alignment
        The alignments by what tells them apart.
    column : str
        The column that holds these names.

    Returns
    -------
    pandas.DataFrame
        The profiles below one another.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.alignment import Alignment
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> values = np.array([0.1, 0.5])
    >>> aligned = Alignment((0, 1), values, np.tile(values, (100, 1)), n=4)
    >>> alignment_score.profiles({"input": aligned}, "reading")["reading"].tolist()
    ['input', 'input']
    """
    parts = []
    for name, aligned in by_name.items():
        parts.append(aligned.profile.assign(**{column: name}))
    return pd.concat(parts, ignore_index=True)


def rise(aligned: Alignment, start: int, end: int) -> Estimate:
    """Estimate by how much a profile rises from one layer to another.

    Parameters
    ----------
    aligned : Alignment
        The profile with its resamples.
    start, end : int
        Numbers of layers.

    Returns
    -------
    Estimate
        The change, with the interval over samples.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.alignment import Alignment
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> values = np.array([0.1, 0.5, 0.4])
    >>> aligned = Alignment((0, 1, 2), values, np.tile(values, (100, 1)), n=4)
    >>> print(alignment_score.rise(aligned, 0, 1))
    0.40 [0.40, 0.40]
    """
    change = aligned.resampled[:, end] - aligned.resampled[:, start]
    value = float(aligned.values[end] - aligned.values[start])
    return percentile_interval(value, change, aligned.n)


def rises(aligned: Alignment) -> dict[str, Estimate]:
    """Estimate how a profile rises over the first three blocks, and from there to the last but one.

    Use it where a curve has a shape that one slope would hide.

    Parameters
    ----------
    aligned : Alignment
        The profile over all layers from 0 on.

    Returns
    -------
    dict of str to Estimate
        Both changes, by what they are over.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.alignment import Alignment
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> values = np.array([0.0, 0.2, 0.4, 0.6, 0.65, 0.7, 0.3])
    >>> aligned = Alignment(tuple(range(7)), values, np.tile(values, (100, 1)), n=4)
    >>> for name, rise in alignment_score.rises(aligned).items():
    ...     print(name, rise)
    first three blocks 0.60 [0.60, 0.60]
    from there to the last but one 0.10 [0.10, 0.10]
    """
    n_blocks = len(aligned.layers) - 1
    early, late = min(3, n_blocks // 2), n_blocks - 1
    return {
        "first three blocks": rise(aligned, 0, early),
        "from there to the last but one": rise(aligned, early, late),
    }


def compare_seeds(
    connectors: Mapping[str, str | None],
    untrained: Measured,
    samples: Sequence[Sample],
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the rises over depth and the gain over training for connectors of one recipe.

    Parameters
    ----------
    connectors : mapping of str to str or None
        Names of models and their revisions; they differ in the seed of their training alone.
    untrained : Measured
        The connector before training, measured on the same samples.
    samples : sequence of Sample
        What all of them read.
    seed : int, default 0
        Of capture and bootstrap.

    Returns
    -------
    pandas.DataFrame
        A row an effect, indexed by claim and variant; a column a connector.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> untrained = alignment_score.measure(vlm, samples)
    >>> rows = alignment_score.compare_seeds({"pocket-llava": None}, untrained, samples)
    >>> rows.loc[("IMA-6", "input"), "pocket-llava"].round(3).item()
    0.0
    """
    columns = {}
    for name, revision in connectors.items():
        readings = align(*tokens(load(name, revision=revision), samples, seed), seed=seed)
        column = {}
        for part, effect in rises(readings["layer"]).items():
            column["IMA-5", part] = effect.value
        for reading, aligned in readings.items():
            column["IMA-6", reading] = gain(aligned, untrained.readings[reading]).value
        columns[name] = column
    return pd.DataFrame(columns).rename_axis(["claim", "variant"])


def gain(after: Alignment, before: Alignment) -> Estimate:
    """Estimate by how much the score of one model exceeds that of another on the same samples.

    Both were resampled alike, so the difference is taken within each resample.

    Parameters
    ----------
    after, before : Alignment
        The two models.

    Returns
    -------
    Estimate
        The difference of the scores, with the interval over samples.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.alignment import Alignment
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> low, high = np.array([0.0, 0.2]), np.array([0.4, 0.6])
    >>> before = Alignment((0, 1), low, np.tile(low, (100, 1)), n=4)
    >>> after = Alignment((0, 1), high, np.tile(high, (100, 1)), n=4)
    >>> print(alignment_score.gain(after, before))
    0.40 [0.40, 0.40]
    """
    change = after.resampled.mean(axis=1) - before.resampled.mean(axis=1)
    return percentile_interval(float(after.score.value - before.score.value), change, after.n)


def rounded(models: pd.DataFrame) -> pd.DataFrame:
    """Round scores and outcomes to what a few samples can tell apart, before they are ranked.

    Parameters
    ----------
    models : pandas.DataFrame
        A row a model. The columns of alignment scores keep two digits, all others one.

    Returns
    -------
    pandas.DataFrame
        The rounded numbers.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> models = pd.DataFrame({"input": [0.118, 0.122], "caption": [0.84, 0.76]})
    >>> alignment_score.rounded(models).to_dict("list")
    {'input': [0.12, 0.12], 'caption': [0.8, 0.8]}
    """
    digits = dict.fromkeys(models, 1) | dict.fromkeys(READINGS, 2)
    return models.round(digits)


def correlate(
    experiment: Experiment,
    claim_id: str,
    models: pd.DataFrame,
    names: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate the score in each reading with outcomes over models, and record every verdict.

    Pearson's correlation is that of the numbers, Spearman's that of the ranks of rounded numbers.
    Pairs with fewer than four models, or in which one side does not vary, are left out.

    Parameters
    ----------
    experiment : Experiment
        Where verdicts are recorded.
    claim_id : str
        Such as "IMA-8".
    models : pandas.DataFrame
        A row a model, with a column for each reading and each outcome; NaN where there is none.
    names : sequence of str
        The columns of the outcomes.
    seed : int, default 0
        Of bootstrap and permutations.

    Returns
    -------
    pandas.DataFrame
        A row a correlation, with columns value, low, high, n, p and verdict.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, alignment_score
    >>> scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    >>> models = pd.DataFrame({"layer": scores[::-1], "input": scores, "qa": scores})
    >>> experiment = Experiment("alignment-score", "pocket-llava", "scenes")
    >>> rows = alignment_score.correlate(experiment, "IMA-8", models, ["qa"])
    >>> rows["verdict"].filter(like="pearson").tolist()
    ['refuted', 'confirmed']
    """
    rows = {}
    for reading, name, kind in product(READINGS, names, ("pearson", "spearman")):
        numbers = models if kind == "pearson" else rounded(models)
        pairs = numbers[[reading, name]].dropna()
        if len(pairs) < _FEWEST or pairs.nunique().min() < 2:
            continue
        x, y = pairs.to_numpy().T
        effect = correlation(x, y, kind, seed=seed)
        variant = f"{name}, {reading}, {kind}"
        verdict = experiment.record(
            claim_id, effect, "no correlation", variant, interval_over="checkpoints"
        )
        p = permutation_p(x, y, kind, seed=seed)
        rows[variant] = effect.asdict() | {"p": p, "verdict": verdict}
    return pd.DataFrame(rows).T.infer_objects()


def random_order(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Compute a rank correlation of few points, and the range that random orders leave around it.

    Use it where points are too few to be resampled. The range is no interval of the correlation: it
    reaches as far from it as 95 % of all orders of the points reach from 0. So it leaves 0 out
    where hardly a random order is as strong.

    Parameters
    ----------
    x, y : array-like (n,)
        The two sides, 2 to 8 points; neither is constant.

    Returns
    -------
    Estimate
        Spearman's correlation with that range.

    Raises
    ------
    InputError
        If there are more than 8 points: there are too many orders of them.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> print(alignment_score.random_order([1, 2, 3, 4], [1, 2, 3, 4]))
    1.00 [-0.00, 1.00]
    """
    first, second = rankdata(x), rankdata(y)
    require(len(first) <= _MOST, f"{len(first)} points", f"give {_MOST} or fewer: all orders count")
    value = _rho(first, second)
    chance = [_rho(first, np.array(order)) for order in permutations(second)]
    low = float(np.quantile(chance, 0.025, method="lower"))
    high = float(np.quantile(chance, 0.975, method="higher"))
    tie = 0.001  # what chance just reaches too is not beyond chance
    ends = max(-1.0, value - high - tie), min(1.0, value - low + tie)
    return Estimate(value, *ends, len(first))


def correlate_few(
    experiment: Experiment,
    claim_id: str,
    models: pd.DataFrame,
    names: Sequence[str],
    against: str,
    suffix: str = "",
) -> pd.DataFrame:
    """Rank few models by score and outcome, compare with random orders, and record each verdict.

    Parameters
    ----------
    experiment : Experiment
        Where verdicts are recorded.
    claim_id : str
        Such as "IMA-10".
    models : pandas.DataFrame
        A row a model, 8 or fewer, as :func:`correlate` takes them; numbers are rounded here.
    names : sequence of str
        The columns of the outcomes.
    against : str
        What the ranks are measured against.
    suffix : str, default ""
        What ends the name of each measurement.

    Returns
    -------
    pandas.DataFrame
        A row a correlation, with columns value, low, high, n and verdict.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, alignment_score
    >>> scores = [0.1, 0.2, 0.3, 0.4]
    >>> models = pd.DataFrame({"layer": scores, "input": scores, "qa": scores})
    >>> experiment = Experiment("alignment-score", "pocket-llava", "scenes")
    >>> rows = alignment_score.correlate_few(
    ...     experiment, "IMA-10", models, ["qa"], "random order"
    ... )
    >>> rows["verdict"].tolist()
    ['undecided', 'undecided']
    """
    rows = {}
    for reading, name in product(READINGS, names):
        pairs = rounded(models)[[reading, name]]
        if pairs.nunique().min() < 2:
            continue  # models that share one rank have no order
        effect = random_order(*pairs.to_numpy().T)
        variant = f"{name}, {reading}{suffix}"
        verdict = experiment.record(
            claim_id, effect, against, variant, interval_over="random orders"
        )
        rows[variant] = effect.asdict() | {"verdict": verdict}
    return pd.DataFrame(rows).T.infer_objects()


def compare_predictors(
    experiment: Experiment,
    models: pd.DataFrame,
    names: Sequence[str],
    baseline: str = "likelihood",
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate by how much the score ranks models better than a baseline does; record verdicts.

    Parameters
    ----------
    experiment : Experiment
        Where verdicts are recorded, as those of IMA-8.
    models : pandas.DataFrame
        A row a model, with columns for the readings, the baseline and the outcomes.
    names : sequence of str
        The columns of the outcomes.
    baseline : str, default "likelihood"
        The column of the baseline.
    seed : int, default 0
        Of the bootstrap over models.

    Returns
    -------
    pandas.DataFrame
        A row a comparison, with columns value, low, high, n and verdict: the rank correlation of
        the score with the outcome less that of the baseline.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, alignment_score
    >>> scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    >>> models = pd.DataFrame(dict.fromkeys(["input", "likelihood", "qa"], scores))
    >>> models["layer"] = scores[::-1]
    >>> experiment = Experiment("alignment-score", "pocket-llava", "scenes")
    >>> rows = alignment_score.compare_predictors(experiment, models, ["qa"])
    >>> rows["value"].round(2).tolist()
    [-2.0, 0.0]
    """
    rows = {}
    for reading, name in product(READINGS, names):
        columns = rounded(models)[[reading, baseline, name]]
        if columns.nunique().min() < 2:
            continue
        effect = bootstrap(columns.to_numpy(), statistic=_lead, seed=seed)
        variant = f"{name}, {reading}, less {baseline}"
        verdict = experiment.record(
            "IMA-8", effect, "likelihood of captions", variant, interval_over="checkpoints"
        )
        rows[variant] = effect.asdict() | {"verdict": verdict}
    return pd.DataFrame(rows).T.infer_objects()


def length(tokens_of_one_kind: Activations) -> float:
    """Return the median length of the tokens that enter the model.

    Parameters
    ----------
    tokens_of_one_kind : Activations
        Tokens with layer 0 among their layers.

    Returns
    -------
    float
        The length of the vectors.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> perceptual, textual = alignment_score.tokens(vlm, samples)
    >>> alignment_score.length(perceptual) > 20 * alignment_score.length(textual)
    True
    """
    return float(tokens_of_one_kind[0].norm(dim=-1).median())


def baselines(measured: Measured, vlm: VLM, samples: Sequence[Sample]) -> dict[str, float]:
    """Compute what predicts as cheaply as the score, from the same forward pass.

    Parameters
    ----------
    measured : Measured
        A model's tokens and alignments.
    vlm : VLM
        A model with the same frozen language model, whose unembedding reads the states.
    samples : sequence of Sample
        The samples that were measured.

    Returns
    -------
    dict of str to float
        "own", how much nearer a picture is to its own caption than to others, over all layers;
        "likelihood", the mean log-probability of the tokens of reference captions after the first;
        "length", that of picture tokens in lengths of a word.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> measured = alignment_score.measure(vlm, samples)
    >>> numbers = alignment_score.baselines(measured, vlm, samples)
    >>> numbers["likelihood"] < 0 < numbers["own"]
    True
    """
    matched = alignment(measured.perceptual, measured.textual, pairs="matched").score.value
    everything = measured.readings["layer"].score.value
    n = len(samples)
    ids: list[int] = []
    for sample in samples:
        ids += vlm.tokenizer(sample.captions[0]).input_ids
    last = measured.textual[vlm.n_layers]
    log_p = vlm.unembed(last[:-1]).log_softmax(dim=-1)
    of_next = log_p.gather(1, torch.tensor(ids)[1:, None]).flatten()
    within = np.diff(measured.textual.table["sample"]) == 0
    return {
        "own": float(matched - everything) * n / (n - 1),
        "likelihood": float(of_next[torch.from_numpy(within)].mean()),
        "length": length(measured.perceptual) / length(measured.textual),
    }


def scatter(
    models: pd.DataFrame,
    axes_of: Mapping[str, str],
    run: Sequence[str],
    others: Sequence[str],
    correlations: pd.DataFrame,
) -> Figure:
    """Draw outcomes against the score in each reading, with a line through the stages of one run.

    Parameters
    ----------
    models : pandas.DataFrame
        A row a model, with columns for the readings and the outcomes.
    axes_of : mapping of str to str
        The outcomes, a row of panels each, with what their axis says.
    run : sequence of str
        The models that are stages of one run, in order; a line joins them.
    others : sequence of str
        The other models, drawn as squares.
    correlations : pandas.DataFrame
        What :func:`correlate` returned; the title of a panel is its Pearson correlation.

    Returns
    -------
    matplotlib.figure.Figure
        One row of panels an outcome, one column a reading.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> from xlvlms_tutorial.view import plots
    >>> models = pd.DataFrame({"layer": [0.1, 0.2], "input": [0.2, 0.4], "qa": [0.5, 0.6]})
    >>> models.index = ["step 0", "lite0"]
    >>> figure = alignment_score.scatter(
    ...     models, {"qa": "answered"}, ["step 0"], ["lite0"], pd.DataFrame()
    ... )
    >>> len(figure.axes)
    2
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    columns = READINGS[::-1]
    figure, panels = plots.panels(len(axes_of) * len(columns), height=2.7, same=False)
    for ax, (name, reading) in zip(panels, product(axes_of, columns), strict=True):
        stages, rest = models.loc[list(run)], models.loc[list(others)].dropna(subset=[name])
        ax.plot(stages[reading], stages[name], "o-", color=plots.MUTED, label="stages of one run")
        ax.plot(rest[reading], rest[name], "s", color=plots.ACCENT, label="encoders")
        _label(ax, models.loc[[run[0], run[-1]], [reading, name]], "left left")
        _label(ax, rest[[reading, name]].sort_values(reading), "left right")
        ax.margins(x=0.3, y=0.15)
        ax.set(xlabel=f"score, reading {reading}")
        if reading == columns[0]:
            ax.set_ylabel(axes_of[name])
        variant = f"{name}, {reading}, pearson"
        if variant in correlations.index:
            row = correlations.loc[variant]
            ax.set_title(f"r = {row['value']:.2f}, {row['verdict']}")
    return figure


def training_frames(
    stages: Mapping[str, Measured], picture: Image.Image, reading: str = "input"
) -> list[Html]:
    """Draw the profile of each stage of training, with what that stage says about one picture.

    Parameters
    ----------
    stages : mapping of str to Measured
        The stages in order.
    picture : PIL.Image.Image
        The picture of the first sample.
    reading : {"input", "layer"}, default "input"
        Which profile is drawn.

    Returns
    -------
    list of :class:`~xlvlms_tutorial.view.cards.Html`
        A frame a stage, for :func:`~xlvlms_tutorial.view.widgets.stack`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import alignment_score
    >>> stages = {"trained": alignment_score.measure(vlm, samples)}
    >>> frames = alignment_score.training_frames(stages, samples[0].image)
    >>> "Profile at trained" in frames[0]
    True
    """
    profiles = {name: stage.readings[reading].profile for name, stage in stages.items()}
    everything = pd.concat(profiles.values())
    ends = everything["low"].min() - 0.03, everything["high"].max() + 0.03
    frames = []
    for name, stage in stages.items():
        score = stage.readings[reading].score.value
        ax = plots.profile(profiles[name], reference=0, ylabel="IMA(l)")
        ax.set(ylim=ends, title=f"{name}: score {score:.2f}")
        curve = Image.open(io.BytesIO(plots.png(ax.figure)))
        card = widgets.picture_card(picture, stage.report.captions["caption"][0], [])
        frames.append(widgets.Html(card + widgets.picture_html(curve, f"Profile at {name}", 560)))
    return frames


def _first_caption(sample: Sample) -> str:
    return sample.captions[0]


def _with_few_questions(sample: Sample) -> Sample:
    of_types = [q for q in sample.questions if q.type in _ASKED]
    absent = [q for q in sample.questions if (q.type, q.answer) == ("presence", "no")]
    return replace(sample, questions=(*of_types, *absent[:1]))


def _present(sample: Sample) -> set[str]:
    return {sample.truth["subject"], sample.truth["item"]}


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    return round(float(np.corrcoef(x, y)[0, 1]), 6)


def _lead(rows: np.ndarray) -> float:
    # rank correlation of the first column with the last, less that of the second
    if min(np.ptp(column) for column in rows.T) == 0:
        return float("nan")  # such a resample has no order
    ranks = [rankdata(column) for column in rows.T]
    rho = np.corrcoef(ranks)[-1]
    return float(rho[0] - rho[1])


def _label(ax: Axes, places: pd.DataFrame, sides: str) -> None:
    # names stand on the sides in turn, so that neighbours do not write over one another
    for (name, place), side in zip(places.iterrows(), cycle(sides.split())):
        ax.annotate(
            str(name).removeprefix("step "),
            place.to_numpy(),
            (-6, 3) if side == "left" else (6, -3),
            ha="right" if side == "left" else "left",
            textcoords="offset points",
            fontsize=8,
        )
