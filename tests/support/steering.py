"""States and vectors made by hand, for steering and what is compared with it."""

import pandas as pd
import torch
from PIL import Image

from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.methods.steering import SteeringVectors

PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
TEXTS = ["What colour is the key ?", "Describe the picture ."]
PROVENANCE = {
    "model": "tiny-llava",
    "revision": None,
    "dtype": "torch.float32",
    "interventions": [],
    "prompt": "What ?",
    "reduce": "mean",
}


def by_hand(
    n: int,
    d: int = 32,
    layers=(1, 3),
    seed: int = 0,
    offset: float = 0.0,
    site: str = "resid_post",
    **extra,
) -> Activations:
    """Random states with the provenance of a capture."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {(layer, site): torch.randn(n, d, generator=generator) + offset for layer in layers}
    table = pd.DataFrame({"sample": range(n), "id": [f"{seed}-{k}" for k in range(n)]})
    return Activations(tensors, table, PROVENANCE | extra)


def one_vector(vector: torch.Tensor, layer: int, model: str = "tiny-llava") -> SteeringVectors:
    return SteeringVectors({layer: vector}, {"model": model, "how": "by hand"})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
