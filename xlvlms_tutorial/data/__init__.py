"""Datasets by name or folder, each as a list of :class:`~xlvlms_tutorial.samples.Sample`."""

import os
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes
from xlvlms_tutorial.data.export import write_coco
from xlvlms_tutorial.errors import unknown_dataset
from xlvlms_tutorial.samples import PROMPTS, Question, Sample, mentioning
from xlvlms_tutorial.text import STYLES
from xlvlms_tutorial.validation import require

if TYPE_CHECKING:
    from xlvlms_tutorial.data.folder import folder_report
    from xlvlms_tutorial.data.hub import HUB
    from xlvlms_tutorial.data.pocket import truth_masks

# Embedded: they need neither network nor files
DATASETS = (
    "scenes",
    "composition",
    "clips",
    "sounds",
    "postcards",
    *(f"scenes-{style}" for style in STYLES),
)

__all__ = [
    "DATASETS",
    "HUB",
    "PROMPTS",
    "Question",
    "Sample",
    "folder_report",
    "load_samples",
    "mentioning",
    "truth_masks",
    "write_coco",
]

__getattr__, __dir__ = lazy_attributes(__name__)


def load_samples(
    dataset: str | Path = "scenes", n: int = 100, split: str = "test", seed: int = 0
) -> list[Sample]:
    """Load the first ``n`` samples of a dataset's split; the same seed gives the same samples.

    Everything starts here: an embedded dataset needs neither network nor files, a folder holds
    pictures and annotations of your own, and a hub dataset is streamed.

    Parameters
    ----------
    dataset : str or Path, default "scenes"
        An embedded name (``DATASETS``), a name of the hub (:data:`~xlvlms_tutorial.data.hub.HUB`)
        or a folder (see :func:`~xlvlms_tutorial.data.folder.folder_samples`). With "-place",
        "-colour" or "-mood" behind it, it gives the same pictures, each with one caption in that
        style.
    n : int, default 100
        How many samples; a folder or a hub dataset with fewer gives all there are.
    split : str, default "test"
        "train", "validation" or "test", as the dataset has them.
    seed : int, default 0
        Which samples are drawn, 0 or more.

    Returns
    -------
    list of Sample
        Pictures, clips or sounds with captions, questions and truth. What of a folder is left alone
        is said in a warning, and in full by :func:`~xlvlms_tutorial.data.folder.folder_report`.

    Raises
    ------
    AnnotationError
        If the files of a folder are wrong, or it has no caption in the style.
    InputError
        If no dataset has this name and no folder this path. If the split is unknown, ``n`` is below
        1, or the seed is no whole number of 0 or more.
    LoadError
        If a dataset of the hub cannot be reached, or read.

    Examples
    --------
    >>> from xlvlms_tutorial.data import load_samples
    >>> scenes = load_samples("scenes", n=2)
    >>> [scene.id for scene in scenes]
    ['test-0-00000', 'test-0-00001']
    >>> [scene.modality for scene in load_samples("sounds", n=1)]
    ['audio']
    """
    from xlvlms_tutorial.data import folder, hub, pocket

    require(
        isinstance(seed, Integral) and seed >= 0,
        f"seed={seed!r}",
        "give a whole number of 0 or more",
    )
    name = str(dataset)
    base, _, style = name.rpartition("-")
    if name == "clips":
        return pocket.clip_samples(n, split, seed)
    if name == "sounds":
        return pocket.sound_samples(n, split, seed)
    if name == "postcards":
        return pocket.postcard_samples(n, split, seed)
    if name == "composition":
        return pocket.scene_samples(n, "composition", seed)
    if name in DATASETS:
        return pocket.scene_samples(n, split, seed, style if base == "scenes" else None)
    # a folder goes before a dataset of the hub with the same name
    for exists, load in (
        (os.path.isdir, folder.folder_samples),
        (hub.HUB.__contains__, hub.hub_samples),
    ):
        if exists(name):
            return load(name, n, split, seed)
        if style in STYLES and exists(base):
            return folder.in_style(load(base, n, split, seed), style, base)
    raise unknown_dataset(name, (*DATASETS, *hub.HUB, "or a folder"))
