"""Hold four frozen encoders of different quality behind the same connector.

Two trained on ImageNet, one never trained, raw pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xlvlms_tutorial.io import load_tensors
from xlvlms_tutorial.pocket.assets import tower_state_dict
from xlvlms_tutorial.pocket.tower import PATCHES, Tower, TowerConfig

WEIGHTS = Path(__file__).parent / "weights"
CALIBRATION = 500  # training scenes from which each channel's mean and deviation are taken


@dataclass(frozen=True)
class Encoder:
    """A tower's shape and where its weights come from; ``width`` is that of its visual tokens."""

    backbone: str
    blocks: tuple[int, ...]
    width: int
    weights: Callable[[], dict[str, Tensor]]

    @property
    def config(self) -> TowerConfig:
        """The configuration of the tower."""
        return TowerConfig(backbone=self.backbone, blocks=self.blocks, hidden_size=self.width)


def untrained(seed: int = 0) -> dict[str, Tensor]:
    """Return EfficientNet-Lite0 as it is before any training.

    Initialised after He et al. (2015) so that signals reach the last stage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Tower(TowerConfig()).net
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net.state_dict()


ENCODERS = {
    "lite0": Encoder(
        "efficientnet-lite0", (4, 15), 1440, lambda: tower_state_dict("efficientnet-lite0")
    ),
    "lite2": Encoder(
        "efficientnet-lite2", (6, 20), 1600, lambda: tower_state_dict("efficientnet-lite2")
    ),
    "random": Encoder("efficientnet-lite0", (4, 15), 1440, untrained),
    "patches": Encoder(PATCHES, (), 768, dict),
}


def statistics_file(encoder: str) -> Path:
    """Find where the mean and deviation of an encoder's channels are shipped."""
    return WEIGHTS / "towers" / f"{encoder}.safetensors"


def tower_state(encoder: str = "lite0") -> dict[str, Tensor]:
    """Read all weights of an encoder's tower, by name.

    The backbone's and the statistics of its channels.
    """
    backbone = {f"net.{name}": weight for name, weight in ENCODERS[encoder].weights().items()}
    statistics, _ = load_tensors(statistics_file(encoder))
    return backbone | statistics
