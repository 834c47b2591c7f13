"""Say which pixels of a scene show what, by a small U-Net that was trained on scenes of the world.

It plays the part that a segmenter of buildings or of streets plays elsewhere: a network whose
decisions can be explained, on pictures whose truth is known to the pixel.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from xlvlms_tutorial.pocket.build import connector_state
from xlvlms_tutorial.pocket.world import PARTS, SIZE

RUN = "segmenter"  # the folder of its weights
SIDE = 64  # pixels a side of what it sees and says


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., 2015, arXiv 1505.04597) of three steps down and three up.

    Parameters
    ----------
    down : sequence of int, default (12, 24, 48)
        Channels of the blocks before each halving.
    middle : int, default 72
        Channels at the lowest resolution.
    up : sequence of int, default (32, 24, 12)
        Channels of the blocks after each doubling.
    n_classes : int, default 3
        Channels of the output.
    """

    def __init__(
        self,
        down: Sequence[int] = (12, 24, 48),
        middle: int = 72,
        up: Sequence[int] = (32, 24, 12),
        n_classes: int = len(PARTS),
    ) -> None:
        super().__init__()
        widths = [3, *down]
        self.down = nn.ModuleList(map(_block, widths[:-1], down))
        self.middle = _block(down[-1], middle)
        below = [middle, *up[:-1]]
        self.up = nn.ModuleList()
        for lower, beside, width in zip(below, reversed(down), up, strict=True):
            self.up.append(_block(lower + beside, width))
        self.head = nn.Conv2d(up[-1], n_classes, 1)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Compute the logit of each class at each pixel.

        Parameters
        ----------
        pictures : Tensor of shape (b, 3, h, w)
            Values of 0 (black) to 1; height and width are multiples of 8.

        Returns
        -------
        Tensor of shape (b, c, h, w)
            Logits; the sigmoid of each is the probability that the pixel shows the class.
        """
        states = pictures
        skipped = []
        for block in self.down:
            states = block(states)
            skipped.append(states)
            states = nn.functional.max_pool2d(states, 2)
        states = self.middle(states)
        for block in self.up:
            larger = nn.functional.interpolate(states, scale_factor=2)
            states = block(torch.cat([larger, skipped.pop()], dim=1))
        return self.head(states)


def seen(pictures: Sequence[Image.Image]) -> Float[Tensor, "n 3 64 64"]:
    """Bring pictures to what the segmenter sees: 64 x 64 pixels of 0 to 1."""
    small = [picture.convert("RGB").resize((SIDE, SIDE), Image.BOX) for picture in pictures]
    values = np.stack([np.asarray(picture) for picture in small])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float().div(255)


def shrunk(mask: Bool[np.ndarray, "h w"], side: int = SIDE) -> Bool[Tensor, "side side"]:
    """Bring a mask of a picture to fewer pixels: True where half of the pixels below are."""
    step = SIZE // side
    return torch.from_numpy(mask.reshape(side, step, side, step).mean(axis=(1, 3)) >= 0.5)


def build_segmenter() -> UNet:
    """Build the segmenter with its shipped weights, float32.

    Raises
    ------
    LoadError
        If no weights are shipped.
    """
    network = UNet()
    # a norm's number of batches, which nobody needs, is not shipped
    network.load_state_dict(connector_state(RUN), strict=False)
    # twice as fast on CPUs
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
