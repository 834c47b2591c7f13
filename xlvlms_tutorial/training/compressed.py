"""Leave out parts of pocket LLaVA's language model, for connectors of its own.

They are trained through what is left, and measured with it.
"""

from contextlib import AbstractContextManager, nullcontext

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.edits import mask_weights
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.pruning.calibration import Calibration, calibrate
from xlvlms_tutorial.methods.pruning.masks import Masks
from xlvlms_tutorial.methods.pruning.scores import wanda
from xlvlms_tutorial.methods.pruning.sparsify import alpha_subnet
from xlvlms_tutorial.models.vlm import VLM

# Half of the 30 blocks: those whose absence, one at a time, costs the language model least on
# plain text, few of them neighbours.
SKIPPED = (4, 5, 6, 7, 8, 10, 13, 15, 17, 19, 21, 23, 26, 27, 28)
# The blocks that a shallow language model is without: it keeps the first 13 and the last 2.
REMOVED = tuple(range(14, 29))
# The runs whose connectors are trained through a compressed language model.
COMPRESSED = ("skipped", "skipped-1", "skipped-2", "pruned", "pruned-1", "pruned-2", "short")
TASKS = {"scenes": "pocket-llava", "clips": "pocket-llava-video", "sounds": "pocket-llava-audio"}
TASK_SPARSITY = 0.605  # at which the masks of the six tasks below share 30 % of the weights


def task_calibrations(
    n: int = 16, vlm: VLM | None = None, dataset: str = "scenes"
) -> dict[str, Calibration]:
    """Calibrate one language model on each of its tasks.

    Use it for masks that serve several tasks, as :func:`shared_mask` does. Pocket LLaVA has
    connectors for clips and sounds too, and so six tasks; a model of another name has the two of
    the dataset, named "DATASET, captions" and "DATASET, answers". A dataset without captions, or
    without questions, has one.

    Parameters
    ----------
    n : int, default 16
        Training samples of a dataset, at most.
    vlm : VLM, optional
        The model; by default pocket LLaVA in float32.
    dataset : str, default "scenes"
        The dataset.

    Returns
    -------
    dict of str to Calibration
        The calibrations by task.

    Raises
    ------
    InputError
        If no sample has a caption or a question.

    Examples
    --------
    >>> from xlvlms_tutorial.training import task_calibrations
    >>> list(task_calibrations(n=4))[:2]  # doctest: +SKIP
    ['scenes, captions', 'scenes, answers']
    """
    home, *others = TASKS
    vlm = load(TASKS[home], dtype="float32") if vlm is None else vlm
    calibrations = _calibrations_of(vlm, dataset, n)
    if vlm.name == TASKS[home]:
        for name in others:
            calibrations |= _calibrations_of(load(TASKS[name], dtype="float32"), name, n)
    return calibrations


def shared_mask(
    vlm: VLM, n: int = 16, sparsity: float = TASK_SPARSITY, dataset: str = "scenes"
) -> Masks:
    """Compute the alpha-SubNet of a model's tasks: the weights that the masks of all of them keep.

    Use it for one sparse language model that serves every task (Shukor and Cord, 2024,
    arXiv 2405.16700). The mask of a task is that of Wanda on its calibration.

    Parameters
    ----------
    vlm : VLM
        The model.
    n : int, default 16
        Training samples of a dataset that a task is calibrated on, at most.
    sparsity : float, default 0.605
        Share of the weights that the mask of one task leaves out. At the default the masks of
        pocket LLaVA's six tasks share 30 % of the weights.
    dataset : str, default "scenes"
        The dataset.

    Returns
    -------
    Masks
        The shared mask.

    Raises
    ------
    InputError
        If no sample of the dataset has a caption or a question.

    Examples
    --------
    >>> from xlvlms_tutorial.training import shared_mask
    >>> mask = shared_mask(vlm, n=4)  # doctest: +SKIP
    """
    return alpha_subnet(
        wanda(vlm, calibration, sparsity)
        for calibration in task_calibrations(n, vlm, dataset).values()
    )


def through(run: str, vlm: VLM) -> AbstractContextManager:
    """Apply the compression of a run to the language model, within a ``with`` block.

    Use it to run a connector as it was trained: with blocks skipped or weights masked.

    Parameters
    ----------
    run : str
        A run of ``COMPRESSED``: "skipped" and "short" skip blocks, "pruned" masks weights, also
        with the number of a seed behind ("pruned-1"). Any other run changes nothing.
    vlm : VLM
        The model.

    Returns
    -------
    context manager
        The model is compressed within it.

    Examples
    --------
    >>> from xlvlms_tutorial.training import through
    >>> with through("short", vlm):
    ...     captions = vlm.generate([samples[0].image], ["Describe the picture."], max_new_tokens=2)
    >>> len(captions)
    1
    """
    kind = run.partition("-")[0]
    layers = {"skipped": SKIPPED, "short": REMOVED}
    if kind in layers:
        return skip(vlm, layers[kind])
    if kind == "pruned":
        # the masks are of float32 weights, and hold for the same weights in any format
        return mask_weights(vlm, shared_mask(load("pocket-llava", dtype="float32")).tensors(vlm))
    return nullcontext()


def _calibrations_of(vlm: VLM, dataset: str, n: int) -> dict[str, Calibration]:
    samples = load_samples(dataset, n=n, split="train")
    captioned = [sample for sample in samples if sample.captions]
    questioned = [sample for sample in samples if sample.questions]
    if not captioned and not questioned:
        raise InputError(
            f"{len(samples)} samples of {dataset!r} without captions and questions",
            "give a dataset that has either",
        )
    calibrations = {}
    if captioned:
        calibrations[f"{dataset}, captions"] = calibrate(
            vlm, captioned, answers=lambda sample: sample.captions[0]
        )
    if questioned:
        first = {
            "prompt": lambda sample: sample.questions[0].text,
            "answers": lambda sample: sample.questions[0].answer,
        }
        calibrations[f"{dataset}, answers"] = calibrate(vlm, questioned, **first)
    return calibrations
