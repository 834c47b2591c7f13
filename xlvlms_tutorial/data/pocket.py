"""The embedded world as samples: "scenes" (unseen scenes of the training distribution) and "composition" (held-out combinations)."""

from collections.abc import Callable
from dataclasses import asdict

from PIL import Image

from xlvlms_tutorial.data.samples import Sample
from xlvlms_tutorial.pocket import language, world


def scene_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """``n`` scenes of a split with five captions, every question and the factors as truth; pictures are drawn when asked for."""
    return [_sample(scene, f"{split}-{seed}-{k:05d}") for k, scene in enumerate(world.scenes(n, split, seed))]


def _sample(scene: world.Scene, name: str) -> Sample:
    factors = {factor: value for factor, value in asdict(scene).items() if factor in world.FACTORS}
    return Sample(name, _drawing(scene), tuple(language.captions(scene)), tuple(language.questions(scene)), factors)


def _drawing(scene: world.Scene) -> Callable[[], Image.Image]:
    return lambda: world.render(scene)
