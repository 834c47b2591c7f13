"""Score how well a text fits a picture of the world, by the pocket scorer.

By two small heads on a frozen tower and a frozen text encoder. It plays the part that CLIP plays
for photographs, and it is not CLIP: it was trained on scenes of the world alone, by this package
(:mod:`xlvlms_tutorial.training.scorer`), and its scores mean nothing for other pictures.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding

from xlvlms_tutorial.pocket.assets import text_encoder_folder
from xlvlms_tutorial.pocket.build import connector_state, silence
from xlvlms_tutorial.pocket.encoders import ENCODERS, tower_state
from xlvlms_tutorial.pocket.tower import Tower
from xlvlms_tutorial.pocket.world import SIZE

RUN = "scorer"  # the folder of its weights
ENCODER = "lite0"
# visual tokens of a picture, their width, and that of MiniLM's states
CELLS = 16
SEEN = ENCODERS[ENCODER].width
READ = 384
WIDTH, HEADS = 160, 8


class Pool(nn.Module):
    """Attention pooling: each head takes its own weighted mean of its part of the values."""

    def __init__(self, keys_width: int, width: int, heads: int = HEADS) -> None:
        super().__init__()
        self.look = nn.Linear(keys_width, heads)
        self.heads = heads

    def forward(
        self,
        keys: Float[Tensor, "b t k"],
        values: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b d"]:
        """Pool values over the positions where the mask is True.

        Parameters
        ----------
        keys : Tensor of shape (b, t, k)
            What the weights of the positions follow from.
        values : Tensor of shape (b, t, d)
            What is averaged.
        mask : Tensor of shape (b, t)
            True at the positions that count.

        Returns
        -------
        Tensor of shape (b, d)
            The weighted means.
        """
        weights = self.look(keys).masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)
        return torch.einsum(
            "bth,bthd->bhd", weights, values.unflatten(-1, (self.heads, -1))
        ).flatten(1)


class PictureHead(nn.Module):
    """Turn the tower's tokens of a picture into one vector.

    A linear layer, positions, one transformer block, attention pooling.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Linear(SEEN, width)
        self.position = nn.Parameter(0.02 * torch.randn(CELLS, width))
        self.block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.pool = Pool(width, width)
        self.leave = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b e"]:
        """Embeddings of length 1."""
        states = self.block(self.enter(tokens) + self.position)
        everywhere = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return nn.functional.normalize(self.leave(self.pool(states, states, everywhere)), dim=-1)


class TextHead(nn.Module):
    """Turn MiniLM's states of a text into one vector.

    Their mean beside attention pooling, then two layers.
    """

    def __init__(self, width: int = WIDTH, inner: int = 192) -> None:
        super().__init__()
        self.enter = nn.Linear(READ, inner)
        self.pool = Pool(READ, inner)
        self.leave = nn.Sequential(
            nn.Linear(READ + inner, inner), nn.GELU(), nn.Linear(inner, width)
        )

    def forward(
        self, states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b e"]:
        """Embeddings of length 1; the mask is True at the tokens of words."""
        weights = mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        pooled = self.pool(states, nn.functional.gelu(self.enter(states)), mask)
        return nn.functional.normalize(self.leave(torch.cat([mean, pooled], dim=-1)), dim=-1)


class Heads(nn.Module):
    """Both heads and the scale of the cosines in training, as a logarithm.

    Everything that is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.picture = PictureHead()
        self.text = TextHead()
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))


class Reader(nn.Module):
    """MiniLM with its tokenizer: the last hidden states of texts and where their words are."""

    def __init__(self) -> None:
        super().__init__()
        folder = text_encoder_folder()
        with silence():
            self.model = AutoModel.from_pretrained(
                folder, use_safetensors=True, add_pooling_layer=False
            )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """Token ids, padded on the right, with marks for the special tokens.

        No more than 256 a text.
        """
        options = {
            "padding": True,
            "truncation": True,
            "max_length": 256,
            "return_special_tokens_mask": True,
        }
        return self.tokenizer(list(texts), return_tensors="pt", **options)

    def forward(self, texts: Sequence[str]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """States, and True at the tokens of words (neither special tokens nor padding)."""
        tokens = self.tokenize(texts).to(self.model.device)
        words = tokens.pop("special_tokens_mask") == 0
        return self.model(**tokens).last_hidden_state, words


class PocketScorer(nn.Module):
    """Two towers for pictures and texts of the world.

    Cosines of their features say how well a text fits a picture.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        tower = Tower(ENCODERS[ENCODER].config).eval()
        tower.load_state_dict(tower_state(ENCODER))
        self.tower = tower.fuse()
        self.reader = Reader()
        self.heads = heads
        self.eval().requires_grad_(False)

    def image_features(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "b e"]:
        """Features of RGB pictures, of length 1; other sizes than 256 x 256 are brought to it."""
        # a copy where the size is right
        sized = [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
        values = torch.from_numpy(np.stack([np.asarray(picture) for picture in sized])).to(
            self.tower.device
        )
        pixels = values.permute(0, 3, 1, 2).to(self.tower.dtype).sub(127).div(128)
        return self.heads.picture(self.tower(pixels).last_hidden_state)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Features of texts that have words, of length 1."""
        return self.heads.text(*self.reader(texts))


def build_scorer() -> PocketScorer:
    """Build the scorer with its shipped weights, float32.

    Raises
    ------
    LoadError
        If no weights are shipped.
    """
    heads = Heads()
    heads.load_state_dict(connector_state(RUN))
    return PocketScorer(heads)
