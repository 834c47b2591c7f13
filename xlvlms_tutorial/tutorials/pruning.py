"""Judge masked and cut models: questions, scores, copies, costs, and which facts are lost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pandas as pd
import torch
from matplotlib.axes import Axes

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.evaluation import Report, evaluate
from xlvlms_tutorial.interventions import mask_weights
from xlvlms_tutorial.methods.pruning import Calibration, Masks, alpha_subnet, match_sparsity, wanda
from xlvlms_tutorial.metrics import bootstrap, count_flops, difference, memory_of, names
from xlvlms_tutorial.models import VLM, Batch, anatomy
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.view import plots

SHARED = "alpha-SubNet"
BASELINES = ("magnitude", "random")
_FACTORS = ["subject", "action", "item", "colour", "place"]
# what single baselines are called in the ledger
_AGAINST = {"Wanda, pictures": "Wanda mask of pictures"}
# A broken model does not stop by itself.
_CAPS = {"batch_size": 32, "caption_tokens": 18, "answer_tokens": 4}
_TOKENS = {"max_new_tokens": 4, "min_new_tokens": 4}


def two_questions(samples: Iterable[Sample]) -> list[Sample]:
    """Leave each sample one question whether something is there, and one of another kind.

    Use it where many models are judged on the same samples and all questions would take too long.
    Which question is left turns with the place of the sample, so that all kinds come up.

    Parameters
    ----------
    samples : iterable of Sample
        Samples with questions.

    Returns
    -------
    list of Sample
        Copies with two questions each; fewer where a kind is missing.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> samples = pruning.two_questions(load_samples("scenes", n=2))
    >>> [len(sample.questions) for sample in samples], samples[0].questions[0].type
    ([2, 2], 'presence')
    """
    copies = []
    for place, sample in enumerate(samples):
        presence, open_questions = [], []
        for question in sample.questions:
            of_type = presence if question.type == "presence" else open_questions
            of_type.append(question)
        pair = []
        for questions in (presence, open_questions):
            if questions:
                pair.append(questions[place % len(questions)])
        copies.append(replace(sample, questions=tuple(pair)))
    return copies


def judge(vlm: VLM, samples: Sequence[Sample], masks: Masks | None = None, seed: int = 0) -> Report:
    """Score the captions and answers of a model, while some of its weights are masked.

    Use it for models that may be broken: their texts are capped, at 18 tokens a caption and 4 an
    answer.

    Parameters
    ----------
    vlm : VLM
        The model. Afterwards its weights are what they were.
    samples : sequence of Sample
        What is captioned and asked.
    masks : Masks, optional
        What is masked; by default nothing.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    Report
        Its ``scores()`` has a row for each sample.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> report = pruning.judge(vlm, load_samples("scenes", n=2))
    >>> report.scores().shape
    (2, 2)
    """
    masked = nullcontext() if masks is None else mask_weights(vlm, masks.tensors(vlm))
    with masked:
        return evaluate(vlm, samples, seed=seed, progress=False, **_CAPS)


def judge_all(
    vlm: VLM, samples: Sequence[Sample], masks: Mapping[str, Masks], seed: int = 0
) -> dict[str, Report]:
    """Score a model under one mask after another, on the same samples.

    Parameters
    ----------
    vlm : VLM
        The model. Afterwards its weights are what they were.
    samples : sequence of Sample
        What is captioned and asked.
    masks : mapping of str to Masks
        Masks by name.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    dict of str to Report
        What :func:`judge` gives, by the names of the masks.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.methods.pruning import magnitude_masks
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> masks = {"by size": magnitude_masks(vlm, 0.3)}
    >>> list(pruning.judge_all(vlm, load_samples("scenes", n=1), masks))
    ['by size']
    """
    return {name: judge(vlm, samples, mask, seed) for name, mask in masks.items()}


def mean_scores(reports: Mapping[str, Report]) -> pd.DataFrame:
    """Average the scores of several reports over their samples.

    Parameters
    ----------
    reports : mapping of str to Report
        Reports by the name of what was judged.

    Returns
    -------
    pandas.DataFrame
        One row a report; the columns ``captions`` and ``answers``, of which one is missing where
        no sample has such a score.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> report = pruning.judge(vlm, load_samples("scenes", n=2))
    >>> pruning.mean_scores({"dense": report}).columns.tolist()
    ['captions', 'answers']
    """
    rows = {name: report.scores().mean() for name, report in reports.items()}
    means = pd.DataFrame(rows).T.astype(float).dropna(axis=1, how="all")
    return means.rename(columns={"caption": "captions", "answer": "answers"})


def score_bands(reports: Mapping[tuple[str, float], Report], seed: int = 0) -> pd.DataFrame:
    """Estimate the scores of reports with intervals over samples, for figures.

    Parameters
    ----------
    reports : mapping of (str, float) to Report
        Reports by the name of what was judged and its place on an axis, such as the sparsity.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        One row a report and task: name, x, task ("captions" or "answers"), then value, low, high
        and n.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> report = pruning.judge(vlm, load_samples("scenes", n=2))
    >>> pruning.score_bands({("dense", 0.0): report})["task"].tolist()
    ['captions', 'answers']
    """
    rows = []
    for (name, x), report in reports.items():
        for task, scores in report.scores().items():
            if scores.notna().any():
                estimate = bootstrap(scores.dropna(), seed=seed)
                rows.append({"name": name, "x": x, "task": f"{task}s"} | estimate.asdict())
    return pd.DataFrame(rows)


def record_shared(
    experiment: Experiment,
    reports: Mapping[str, Report],
    about: str,
    sparsity: float,
    baselines: Sequence[str] = BASELINES,
    seed: int = 0,
) -> dict[str, str]:
    """Record how far the shared mask is ahead of the best of some baselines, task by task.

    Use it for claim IMA-11. The baseline is the one with the higher mean on the same samples, so
    that the choice favours the baseline.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    reports : mapping of str to Report
        Reports by mask, that of ``SHARED`` among them.
    about : str
        What is captioned and asked about, such as "pictures".
    sparsity : float
        The sparsity of the masks, for the name of the measurement.
    baselines : sequence of str
        The masks it is compared with; by default ``BASELINES``.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    dict of str to str
        Verdicts by variant.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import Experiment, pruning
    >>> report = pruning.judge(vlm, load_samples("scenes", n=2))
    >>> same = dict.fromkeys(("alpha-SubNet", "magnitude", "random"), report)
    >>> experiment = Experiment("inside", "pocket-llava", "scenes")
    >>> list(pruning.record_shared(experiment, same, "pictures", 0.3))[0]
    'captions, pictures, 30% sparsity, against magnitude or random'
    """
    verdicts = {}
    against = f"better of {', '.join(baselines)}"
    if len(baselines) == 1:
        against = _AGAINST.get(baselines[0], baselines[0])
    scores = {name: reports[name].scores() for name in (SHARED, *baselines)}
    for task in scores[SHARED].dropna(axis=1, how="all"):
        values = {name: table[task].dropna() for name, table in scores.items()}
        best = max(baselines, key=lambda name: values[name].mean())
        ahead = difference(values[SHARED], values[best], paired=True, seed=seed)
        variant = f"{task}s, {about}, {sparsity:.0%} sparsity, against {' or '.join(baselines)}"
        verdicts[variant] = experiment.record("IMA-11", ahead, against=against, variant=variant)
    return verdicts


def baseline_masks(
    vlm: VLM, calibrations: Mapping[str, Calibration], sparsity: float, seed: int = 0
) -> dict[str, Masks]:
    """Make the shared mask of some tasks, and masks by size and by chance that are as sparse.

    Use it for a model other than the page's own.

    Parameters
    ----------
    vlm : VLM
        The model.
    calibrations : mapping of str to Calibration
        A calibration for each task.
    sparsity : float
        Share of the weights that the mask of one task leaves out.
    seed : int, default 0
        Of the random mask.

    Returns
    -------
    dict of str to Masks
        The masks of ``SHARED`` and ``BASELINES``, with as many weights in every row.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import calibrate
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> calibration = calibrate(vlm, samples)
    >>> masks = pruning.baseline_masks(vlm, {"captions": calibration}, sparsity=0.5)
    >>> {name: round(mask.sparsity, 1) for name, mask in masks.items()}
    {'alpha-SubNet': 0.5, 'magnitude': 0.5, 'random': 0.5}
    """
    shared = alpha_subnet(wanda(vlm, task, sparsity) for task in calibrations.values())
    masks = {SHARED: shared}
    for name in BASELINES:
        masks[name] = match_sparsity(vlm, shared, name, seed)
    return masks


def masks_to_compare(
    vlm: VLM,
    shared: Mapping[float, Masks],
    pictures: Calibration,
    sparsities: Sequence[float],
    seed: int = 0,
) -> dict[float, dict[str, Masks]]:
    """Make the masks that the shared mask is compared with, as sparse as it is in every row.

    The mask of pictures is made where something is left to tell them apart, at all sparsities but
    the highest; those by size and by chance at the lowest and at the highest.

    Parameters
    ----------
    vlm : VLM
        The model.
    shared : mapping of float to Masks
        The shared mask at each sparsity of one task.
    pictures : Calibration
        Activation statistics of the tasks about pictures.
    sparsities : sequence of float
        The sparsities, rising.
    seed : int, default 0
        Of the random masks.

    Returns
    -------
    dict of float to dict of str to Masks
        The masks by sparsity and name, that of ``SHARED`` first.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import calibrate, wanda
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> calibration = calibrate(vlm, samples[:1])
    >>> shared = {s: wanda(vlm, calibration, s) for s in (0.25, 0.5)}
    >>> masks = pruning.masks_to_compare(vlm, shared, calibration, (0.25, 0.5))
    >>> list(masks[0.25])
    ['alpha-SubNet', 'Wanda, pictures', 'magnitude', 'random']
    >>> list(masks[0.5])
    ['alpha-SubNet', 'magnitude', 'random']
    """
    masks = {}
    for sparsity in sparsities:
        mask = shared[sparsity]
        masks[sparsity] = {SHARED: mask}
        if sparsity != sparsities[-1]:
            masks[sparsity]["Wanda, pictures"] = match_sparsity(vlm, mask, pictures)
        if sparsity in (sparsities[0], sparsities[-1]):
            for way in BASELINES:
                masks[sparsity][way] = match_sparsity(vlm, mask, way, seed)
    return masks


def changed(vlm: VLM, change: Callable[..., object], *arguments: object) -> VLM:
    """Return a copy of a model that was changed for good.

    Use it to hold several cut models beside the dense one.

    Parameters
    ----------
    vlm : VLM
        The model, which stays as it is.
    change : function
        Changes a model in place, such as :func:`~xlvlms_tutorial.methods.pruning.prune_blocks`.
    *arguments : object
        What ``change`` takes after the model.

    Returns
    -------
    VLM
        The copy.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import prune_blocks
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> vlm.n_layers - pruning.changed(vlm, prune_blocks, [2]).n_layers
    1
    """
    copy = VLM(deepcopy(vlm.model), vlm.processor, vlm.name)
    change(copy, *arguments)
    return copy


def zero_weights(vlm: VLM, masks: Masks) -> None:
    """Set the weights that masks drop to zero in place, also in another number format.

    Use it on a copy in half precision with masks that were made in full precision, which
    :func:`~xlvlms_tutorial.methods.pruning.apply_masks` takes for those of another model.

    Parameters
    ----------
    vlm : VLM
        The model, which is changed.
    masks : Masks
        Masks of its weights.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import magnitude_masks
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> masks = magnitude_masks(vlm, 0.5)
    >>> copy = pruning.changed(vlm, pruning.zero_weights, masks)
    >>> bool((copy.blocks[0].mlp.up_proj.weight == 0).any())
    True
    """
    modules = dict(vlm.model.named_modules())
    with torch.no_grad():
        for name, mask in masks.tensors(vlm).items():
            weight = modules[name].weight
            weight.masked_fill_(~mask.to(weight.device), 0)


def counted(vlm: VLM, batch: Batch) -> dict[str, int]:
    """Count what a model costs: operations of reading and of writing, and bytes.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        What it reads; it writes four tokens to each sequence.

    Returns
    -------
    dict of str to int
        Floating-point operations as ``prefill`` and ``decode``, and the ``bytes`` of its weights.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> batch = vlm.batch_of(samples[:1], ["Describe the picture."])
    >>> list(pruning.counted(vlm, batch))
    ['prefill', 'decode', 'bytes']
    """
    decoder = anatomy.decoder(vlm.model)
    table = count_flops(lambda: vlm.generate_ids(batch, **_TOKENS), decoder=decoder)
    total = table.query("part == 'total'").set_index("phase")["flops"]
    return {
        "prefill": int(total["prefill"]),
        "decode": int(total["decode"]),
        "bytes": memory_of(vlm.model),
    }


def ways_to_read(models: Mapping[str, VLM], batch: Batch) -> dict[str, Callable[[], object]]:
    """Give what has to be timed: each model reads a batch, and the tower alone does its part.

    Use it with :func:`~xlvlms_tutorial.metrics.compare_times`.

    Parameters
    ----------
    models : mapping of str to VLM
        Models by name, that of ``dense`` among them, whose tower is timed.
    batch : Batch
        What they read.

    Returns
    -------
    dict of str to function
        The models' names and ``tower alone``, with a function without arguments each.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> batch = vlm.batch_of(samples[:1], ["Describe the picture."])
    >>> list(pruning.ways_to_read({"dense": vlm}, batch))
    ['dense', 'tower alone']
    """
    ways = {}
    for name, vlm in models.items():
        ways[name] = lambda vlm=vlm: vlm.forward(batch, logits=False)
    tower = anatomy.tower(models["dense"].model, "image")
    inputs = {}

    def listen(_: object, args: tuple, keywords: dict) -> None:
        """Note ``args`` and ``keywords`` of the tower's call; the module ``_`` is not needed."""
        inputs.update(args=args, keywords=keywords)

    hook = tower.register_forward_pre_hook(listen, with_kwargs=True)
    ways["dense"]()
    hook.remove()

    def see() -> object:
        """Let the tower alone see the same pictures again."""
        with torch.no_grad():
            return tower(*inputs["args"], **inputs["keywords"])

    return ways | {"tower alone": see}


def savings(times: pd.DataFrame, operations: pd.Series) -> pd.DataFrame:
    """Lay measured times beside counted operations, and say where a saving is seen.

    Use it so that noise is not taken for a saving. A saving is seen where the whole interval lies
    below the interval of the dense model's second time, which is a difference of nothing.

    Parameters
    ----------
    times : pandas.DataFrame
        What :func:`~xlvlms_tutorial.metrics.compare_times` gives, with "dense" as the reference.
    operations : pandas.Series
        Counted operations as a share of the dense model's, by the same names.

    Returns
    -------
    pandas.DataFrame
        A row for each way but "dense": columns counted, measured, low, high, rounds, resolved and
        saving ("seen" or "not seen").

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> columns = {"value": [1, 0.7, 1.0], "low": [1, 0.6, 0.9], "high": [1, 0.8, 1.1], "n": 8}
    >>> times = pd.DataFrame(columns, index=["dense", "cut", "dense, again"])
    >>> pruning.savings(times, pd.Series({"dense": 1.0, "cut": 0.75}))["saving"].tolist()
    ['seen', 'not seen']
    """
    nothing = times.loc["dense, again", "low"]
    table = times.rename(columns={"value": "measured", "n": "rounds"})
    table.insert(0, "counted", operations)
    table["saving"] = ["seen" if high < nothing else "not seen" for high in times["high"]]
    return table.drop(index="dense")


def draw_saved(axes: Sequence[Axes], bands: pd.DataFrame) -> None:
    """Draw scores against operations: squares for masks, round points for what is cut.

    Parameters
    ----------
    axes : sequence of matplotlib.axes.Axes
        A panel a task.
    bands : pandas.DataFrame
        As :func:`score_bands` gives them; x are operations as a share of the dense model's.
    """
    for ax, (task, part) in zip(axes, bands.groupby("task", sort=False), strict=False):
        for point in part.itertuples():
            full, neurons = point.x == 1, point.name.endswith("neurons cut")
            reach = [[point.value - point.low], [point.high - point.value]]
            style = {"fmt": "s", "color": "#9a5d10"} if full else {"fmt": "o"}
            ax.errorbar(point.x, point.value, reach, **{"color": plots.ACCENT, **style})
            text = point.name.removesuffix(" of neurons cut").removesuffix(" removed")
            shift, side = ((-6, 3), "right") if neurons else ((7, -4), "left")
            ax.annotate(
                text,
                (point.x, point.value),
                shift,
                textcoords="offset points",
                fontsize="small",
                ha=side,
            )
        ax.set(title=task, xlabel="operations, dense = 1", ylabel="score")
        ax.set(ylim=(-0.05, 1.1), xlim=(0.55, 1.25), xticks=[0.6, 0.8, 1])


def facts_named(
    reports: Mapping[str, Report], samples: Sequence[Sample], places: Iterable[str]
) -> pd.DataFrame:
    """Compute which facts of the pictures captions name, and how often a model says yes.

    Use it to see what a model loses first.

    Parameters
    ----------
    reports : mapping of str to Report
        Reports by name.
    samples : sequence of Sample
        The pictures, with their truth; a report may be on some of them.
    places : iterable of str
        All places there are.

    Returns
    -------
    pandas.DataFrame
        A row a report. Columns ``subject``, ``action``, ``item``, ``colour`` and ``place`` are the
        shares of captions that name it, where it is known; ``another place`` the share that names
        another than the true one; ``says yes`` the share of presence questions answered by yes.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials import pruning
    >>> samples = load_samples("scenes", n=2)
    >>> dense = pruning.judge(vlm, samples)
    >>> pruning.facts_named({"dense": dense}, samples, ["sand", "snow"]).columns.tolist()[-2:]
    ['another place', 'says yes']
    """
    rows = {}
    for name, report in reports.items():
        named = report.captions.reindex(columns=_FACTORS).astype("Float64").mean()
        rows[name] = {
            **named.astype(float),
            "another place": _astray(report, samples, set(places)),
            "says yes": _yes(report),
        }
    return pd.DataFrame(rows).T


def _astray(report: Report, samples: Sequence[Sample], places: set[str]) -> float:
    """The share of captions that name a place, and not the true one."""
    true_place = {sample.id: sample.truth.get("place") for sample in samples}
    astray = 0
    for sample, caption in zip(report.captions["sample"], report.captions["caption"], strict=True):
        wrong_places = places - {true_place[sample]}
        astray += any(names(caption, place) for place in wrong_places)
    return astray / len(report.captions)


def _yes(report: Report) -> float:
    """The share of presence questions that are answered by yes; NaN if there are none."""
    replies = report.answers.query("type == 'presence'")["prediction"]
    yes = [reply.lower().startswith("yes") for reply in replies]
    return float(pd.Series(yes, dtype=float).mean())
