"""Read pictures by the vision tower: EfficientNet-Lite trained on ImageNet, frozen.

Read at two depths and cut into 4 x 4 visual tokens. The last stage knows what things are; an early
one still knows their colour. Both are pooled to 8 x 8 cells, joined, and each 2 x 2 cells become
one token, so nothing of the 8 x 8 map is averaged away. Importing this module registers the tower
with AutoConfig and AutoModel.
"""

from collections.abc import Sequence

import torch
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from xlvlms_tutorial.memory import Memory, fingerprint

# tokens of the latest pictures, 90 kB each; a page shows the same ones again and again
_SEEN = Memory(600)
PATCHES = "patches"  # in place of a backbone: the pixels themselves


class TowerConfig(PretrainedConfig):
    """Shape of the tower: the backbone, which blocks are joined, and the grid of tokens.

    The blocks' outputs are joined; the grid is the visual tokens a side.
    """

    model_type = "pocket_tower"

    def __init__(
        self,
        backbone: str = "efficientnet-lite0",
        blocks: Sequence[int] = (4, 15),
        image_size: int = 256,
        grid: int = 4,
        hidden_size: int = 1440,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone = backbone
        self.blocks = list(blocks)
        self.image_size = image_size
        self.grid = grid
        self.hidden_size = hidden_size
        self.patch_size = image_size // grid


class Tower(PreTrainedModel):
    """EfficientNet-Lite as a LLaVA vision tower.

    ``mean`` and ``std`` standardise each channel of its tokens.
    """

    config_class = TowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        raw = config.backbone == PATCHES
        self.net = (
            nn.Identity()
            if raw
            else EfficientNet.from_name(config.backbone, image_size=config.image_size)
        )
        for module in self.net.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True  # a third faster: nobody reads the value before
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("std", torch.ones(config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the backbone's own initialisation."""

    def forward(
        self, pixel_values: Float[Tensor, "b *frames 3 h w"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """Compute visual tokens of pictures.

        Parameters
        ----------
        pixel_values : Tensor of shape (b, 3, h, w) or (b, frames, 3, h, w)
            (value - 127) / 128 for values of 0 to 255. The tokens of a clip are those of its frames
            one after the other.
        **kwargs
            Not used.

        Returns
        -------
        BaseModelOutputWithPooling
            ``last_hidden_state`` is (b, grid * grid, hidden_size), row by row from the top left, or
            (b, frames * grid * grid, hidden_size) for clips.
        """
        pictures = pixel_values.flatten(0, -4)
        tokens = self._remembered(pictures) if self._may_remember(pictures) else self._all(pictures)
        tokens = tokens.reshape(len(pixel_values), -1, tokens.shape[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=(tokens,)
        )

    def _all(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        # two pictures' maps fit into a CPU's cache, more do not: in
        # pairs a batch takes half the time
        parts = pictures.split(2) if pictures.device.type == "cpu" else (pictures,)
        return torch.cat([self._tokens(part) for part in parts])

    def _may_remember(self, pictures: Float[Tensor, "b 3 h w"]) -> bool:
        """Whether nothing but the pictures decides what their tokens are, and nobody watches."""
        if pictures.device.type != "cpu" or self.training or not len(pictures):
            return False
        if torch.is_grad_enabled():
            tensors = (pictures, *self.parameters())
            if any(tensor.requires_grad for tensor in tensors):
                return False
        for module in self.net.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        return True

    def _remembered(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The tokens of pictures, of which those that were seen before are not computed again."""
        weights = self._weights_key()
        keys = [(weights, fingerprint(picture)) for picture in pictures]
        tokens: dict[tuple, Tensor] = {}
        new: dict[tuple, int] = {}
        for row, key in enumerate(keys):
            known = _SEEN.recall(key)
            if known is None:
                new.setdefault(key, row)
            else:
                tokens[key] = known
        if new:
            for key, result in zip(new, self._all(pictures[list(new.values())]), strict=True):
                tokens[key] = result
                _SEEN.keep(key, result.detach().clone())
        return torch.stack([tokens[key] for key in keys])

    def _weights_key(self) -> tuple[str | float, ...]:
        """What tells towers apart, so that models of one tower share what they have seen."""
        numbers = []
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                values = tensor.detach().float()
                numbers += [values.norm(), values.sum()]
        return (self.config.backbone, *self.config.blocks, *torch.stack(numbers).tolist())

    def _tokens(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        # every fourth pixel's neighbourhood, 16 x 16 of them a token
        if self.config.backbone == PATCHES:
            small = nn.functional.avg_pool2d(pixels, 4)
            tokens = (
                nn.functional.pixel_unshuffle(small, small.shape[-1] // self.config.grid)
                .flatten(2)
                .transpose(1, 2)
            )
            return (tokens - self.mean) / self.std
        cells = 2 * self.config.grid
        maps = [nn.functional.adaptive_avg_pool2d(m, cells) for m in self._stages(pixels)]
        tokens = nn.functional.pixel_unshuffle(torch.cat(maps, dim=1), 2).flatten(2).transpose(1, 2)
        return (tokens - self.mean) / self.std

    def _stages(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        # channels last is the layout in which depthwise convolutions are fast on CPUs
        x = self.net._swish(
            self.net._bn0(self.net._conv_stem(pixels.contiguous(memory_format=torch.channels_last)))
        )
        outputs = []
        for index, block in enumerate(self.net._blocks[: max(self.config.blocks) + 1]):
            x = block(x)
            if index in self.config.blocks:
                outputs.append(x)
        return outputs

    def fuse(self) -> "Tower":
        """Fold each batch norm into its convolution, for encoding many pictures.

        The same tokens to 1e-3, a third faster.
        """
        if self.config.backbone == PATCHES:
            return self
        _fuse(self.net, "_conv_stem", "_bn0")
        for block in self.net._blocks:
            for convolution, norm in (
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ):
                if hasattr(block, convolution):
                    _fuse(block, convolution, norm)
        return self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def calibrate(self, pixels: Float[Tensor, "b 3 h w"]) -> None:
        """Set ``mean`` and ``std`` so that each channel has mean 0 and deviation 1.

        Over the tokens of these pictures.
        """
        self.mean.zero_()
        self.std.fill_(1.0)
        tokens = torch.cat([self(part).last_hidden_state for part in pixels.split(64)]).flatten(
            0, 1
        )
        self.mean.copy_(tokens.mean(0))
        self.std.copy_(tokens.std(0) + 1e-3)


def _fuse(parent: nn.Module, convolution: str, norm: str) -> None:
    setattr(
        parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm))
    )
    setattr(parent, norm, nn.Identity())


AutoConfig.register(TowerConfig.model_type, TowerConfig)
AutoModel.register(TowerConfig, Tower)
