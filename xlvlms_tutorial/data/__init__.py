"""Datasets by name or folder, each as a list of :class:`~xlvlms_tutorial.samples.Sample`."""

import os
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes
from xlvlms_tutorial.data.export import write_coco
from xlvlms_tutorial.errors import DatasetError, SelectionError
from xlvlms_tutorial.samples import PROMPTS, Question, Sample, both_mention, media, mentioning
from xlvlms_tutorial.text import STYLES

if TYPE_CHECKING:
    from xlvlms_tutorial.data.folder import folder_report
    from xlvlms_tutorial.data.hub import HUB

# Embedded: they need neither network nor files
DATASETS = ("scenes", "composition", "clips", "sounds", *(f"scenes-{style}" for style in STYLES))

__all__ = [
    "DATASETS",
    "HUB",
    "PROMPTS",
    "Question",
    "Sample",
    "both_mention",
    "folder_report",
    "load_samples",
    "media",
    "mentioning",
    "write_coco",
]

__getattr__, __dir__ = lazy_attributes(__name__)


def load_samples(
    dataset: str | Path = "scenes", n: int = 100, split: str = "test", seed: int = 0
) -> list[Sample]:
    """The first ``n`` samples of a dataset's split; the same seed gives the same samples.

    ``dataset`` is an embedded name (``DATASETS``), a name of the hub
    (:data:`~xlvlms_tutorial.data.hub.HUB`) or a folder
    (see :func:`~xlvlms_tutorial.data.folder.folder_samples`). With "-place", "-colour" or "-mood"
    behind it, it gives the same pictures, each with one caption in that style. A folder or a hub
    dataset with fewer samples than ``n`` gives all there are. What of a folder is left alone is
    said in a warning, and in full by :func:`~xlvlms_tutorial.data.folder.folder_report`.

    Raises
    ------
    AnnotationError
        If the files of a folder are wrong, or it has no caption in the style.
    DatasetError
        If no dataset has this name and no folder this path.
    HubError, LoadError
        If a dataset of the hub cannot be reached, or read.
    SceneError, SelectionError
        If the split is unknown, ``n`` is below 1, or the seed is no whole number of 0 or more.
    """
    from xlvlms_tutorial.data import folder, hub, pocket

    if not isinstance(seed, Integral) or seed < 0:
        raise SelectionError(f"seed={seed!r}", "give a whole number of 0 or more")
    name = str(dataset)
    base, _, style = name.rpartition("-")
    if name in DATASETS:
        drawn = {"clips": pocket.clip_samples, "sounds": pocket.sound_samples}.get(
            name, pocket.scene_samples
        )
        styled = {"style": style} if base == "scenes" else {}
        return drawn(n, "composition" if name == "composition" else split, seed, **styled)
    for known, draw in (
        (os.path.isdir, folder.folder_samples),
        (hub.HUB.__contains__, hub.hub_samples),
    ):
        if known(name):
            return draw(name, n, split, seed)
        if style in STYLES and known(base):
            return folder.in_style(draw(base, n, split, seed), style, base)
    raise DatasetError(name, (*DATASETS, *hub.HUB, "or a folder"))
