"""Datasets by name, each as a list of :class:`~xlvlms_tutorial.data.samples.Sample`."""

from xlvlms_tutorial.data.samples import Question, Sample
from xlvlms_tutorial.errors import DatasetError

DATASETS = ("scenes", "composition")

__all__ = ["DATASETS", "Question", "Sample", "load_samples"]


def load_samples(dataset: str = "scenes", n: int = 100, split: str = "test", seed: int = 0) -> list[Sample]:
    """The first ``n`` samples of a dataset's split; the same seed gives the same samples.

    Raises
    ------
    DatasetError
        If no dataset has this name.
    SceneError
        If the split is unknown or ``n`` is below 1.
    """
    from xlvlms_tutorial.data.pocket import scene_samples

    if dataset not in DATASETS:
        raise DatasetError(dataset, DATASETS)
    return scene_samples(n, "composition" if dataset == "composition" else split, seed)
