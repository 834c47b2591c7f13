"""Datasets by name, each as a list of :class:`~xlvlms_tutorial.data.samples.Sample`."""

from xlvlms_tutorial.data.samples import PROMPTS, Question, Sample, media, mentioning
from xlvlms_tutorial.errors import DatasetError

DATASETS = ("scenes", "composition", "clips", "sounds", "scenes-place", "scenes-colour", "scenes-mood")

__all__ = ["DATASETS", "PROMPTS", "Question", "Sample", "load_samples", "media", "mentioning"]


def load_samples(dataset: str = "scenes", n: int = 100, split: str = "test", seed: int = 0) -> list[Sample]:
    """The first ``n`` samples of a dataset's split; the same seed gives the same samples.

    "scenes-place", "scenes-colour" and "scenes-mood" are the pictures of "scenes", each with one caption in that style.

    Raises
    ------
    DatasetError
        If no dataset has this name.
    SceneError
        If the split is unknown or ``n`` is below 1.
    """
    from xlvlms_tutorial.data.pocket import clip_samples, scene_samples, sound_samples

    if dataset not in DATASETS:
        raise DatasetError(dataset, DATASETS)
    drawn = {"clips": clip_samples, "sounds": sound_samples}.get(dataset, scene_samples)
    style = {"style": dataset.partition("-")[2]} if dataset.startswith("scenes-") else {}
    return drawn(n, "composition" if dataset == "composition" else split, seed, **style)
