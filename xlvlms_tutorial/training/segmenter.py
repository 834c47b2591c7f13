"""Train the pocket segmenter: a small U-Net on scenes of the world, whose masks are known."""

from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.io import save_tensors, write_json
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.pocket import build, world
from xlvlms_tutorial.pocket.segmenter import RUN, UNet, build_segmenter, seen, shrunk
from xlvlms_tutorial.training import connector_runs

MEASURED_ON = ("test", "composition")  # the splits of its record


@dataclass(frozen=True)
class SegmenterRecipe:
    """How the segmenter is trained: everything that its weights depend on.

    The defaults are those of the shipped one.

    Parameters
    ----------
    steps : int, default 700
        Training steps.
    batch_size : int, default 24
        Scenes a step.
    learning_rate : float, default 4e-3
        The highest learning rate.
    weight_decay : float, default 1e-2
        Weight decay of AdamW.
    warmup : int, default 30
        Steps of warm-up.
    seed : int, default 0
        Seed of the initial weights and of the batches.
    n_scenes : int, default 4000
        Training scenes.

    Examples
    --------
    >>> from xlvlms_tutorial.training.segmenter import SegmenterRecipe
    >>> SegmenterRecipe(steps=5).steps, SegmenterRecipe().batch_size
    (5, 24)
    """

    steps: int = 700
    batch_size: int = 24
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    warmup: int = 30
    seed: int = 0
    n_scenes: int = 4000


def material(
    scenes: list[world.Scene],
) -> tuple[Float[Tensor, "n 3 64 64"], Bool[Tensor, "n c 64 64"]]:
    """Draw scenes as the segmenter sees them, with the masks of their parts."""
    pictures = seen([world.render(scene) for scene in scenes])
    truth = []
    for scene in scenes:
        truth.append(torch.stack([shrunk(mask) for mask in world.masks(scene).values()]))
    return pictures, torch.stack(truth)


def train_segmenter(recipe: SegmenterRecipe | None = None) -> dict:
    """Train the segmenter, ship it in float16 and write the record beside it.

    Use it to make the shipped segmenter again.

    Parameters
    ----------
    recipe : SegmenterRecipe, optional
        How it is trained; by default as the shipped one.

    Returns
    -------
    dict
        The record: recipe, data, losses, seconds and versions.

    Examples
    --------
    >>> from xlvlms_tutorial.training.segmenter import SegmenterRecipe, train_segmenter
    >>> record = train_segmenter(SegmenterRecipe(steps=100))  # doctest: +SKIP
    """
    recipe = recipe or SegmenterRecipe()
    start = perf_counter()
    pictures, truth = material(world.scenes(recipe.n_scenes))
    torch.manual_seed(recipe.seed)
    network = UNet().train().to(memory_format=torch.channels_last)
    after_drawing = perf_counter()

    def loss(step: int) -> Float[Tensor, ""]:
        rng = np.random.default_rng([recipe.seed, 3, step])
        rows = torch.from_numpy(rng.choice(len(pictures), recipe.batch_size, replace=False))
        inputs = pictures[rows].contiguous(memory_format=torch.channels_last)
        targets = truth[rows].float()
        return nn.functional.binary_cross_entropy_with_logits(network(inputs), targets)

    def rate(step: int) -> float:
        return recipe.learning_rate * warmup_cosine(step, recipe.steps, recipe.warmup)

    history = optimise(
        dict(network.named_parameters()),
        loss,
        recipe.steps,
        rate,
        weight_decay=recipe.weight_decay,
        desc="train",
    )
    weights = {}
    for name, weight in network.state_dict().items():
        if weight.is_floating_point():  # all but the numbers of batches that norms have seen
            weights[name] = weight.detach().half().contiguous()
    folder = build.WEIGHTS / RUN
    save_tensors(folder / f"step-{recipe.steps:04d}.safetensors", weights)
    seconds = {
        "scenes": round(after_drawing - start),
        "steps": round(perf_counter() - after_drawing),
    }
    return _record(recipe, [round(row["loss"], 4) for row in history], seconds)


def _record(recipe: SegmenterRecipe, losses: list[float], seconds: dict) -> dict:
    """Write the record of a training beside the weights."""
    record = {"run": RUN, "recipe": asdict(recipe)}
    record["data"] = {"split": "train", "seed": 0, "n_scenes": recipe.n_scenes}
    record["parameters"] = sum(weight.numel() for weight in UNet().parameters())
    record["loss"] = connector_runs.thinned(losses)
    record["seconds"] = seconds
    record["seconds_total"] = sum(seconds.values())
    record["versions"] = connector_runs.versions(torch)
    record["metrics"] = {split: measure_segmenter(split=split) for split in MEASURED_ON}
    write_json(build.WEIGHTS / RUN / "training.json", record, indent=1)
    return record


def measure_segmenter(n: int = 300, split: str = "test") -> dict[str, float]:
    """Measure the shipped segmenter on unseen scenes.

    Parameters
    ----------
    n : int, default 300
        How many scenes.
    split : str, default "test"
        "test", or "composition" for combinations that training never showed.

    Returns
    -------
    dict of str to float
        The intersection over union of each part, over all pixels of all scenes.

    Examples
    --------
    >>> from xlvlms_tutorial.training.segmenter import measure_segmenter
    >>> shares = measure_segmenter(n=8)
    >>> list(shares), min(shares.values()) > 0.5
    (['subject', 'item', 'ground'], True)
    """
    pictures, truth = material(world.scenes(n, split))
    network = build_segmenter()
    with torch.no_grad():
        predicted = torch.cat([network(part) > 0 for part in pictures.split(64)])
    shares = {}
    for number, part in enumerate(world.PARTS):
        both = (predicted[:, number] & truth[:, number]).sum()
        either = (predicted[:, number] | truth[:, number]).sum()
        shares[part] = round((both / either).item(), 4)
    return shares
