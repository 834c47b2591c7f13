"""Load a model's processor, also where torchvision is missing.

Pictures then go through PIL, and only videos are refused.
"""

from collections.abc import Collection, Mapping
from inspect import signature
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import PushToHubMixin, is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from xlvlms_tutorial.errors import LoadError

# Packages that some processors want and this one does not require, as
# their error messages name them.
OPTIONAL = ("num2words", "torchvision", "sentencepiece", "tiktoken", "protobuf", "librosa")
PARTS = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
}

ALONG_THE_SEQUENCE = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
)
ALONG_THE_SEQUENCE += ("cross_attention_mask", "image_attention_mask")


class NoVideoProcessor(PushToHubMixin):
    """Stand-in for a video processor where torchvision is missing.

    It keeps the settings, so that saving loses nothing, and refuses every video.

    Parameters
    ----------
    settings : dict
        What the video processor's file holds.

    Examples
    --------
    >>> NoVideoProcessor({"fps": 2}).to_dict()
    {'fps': 2}
    """

    model_input_names: tuple[str, ...] = ()  # it makes no inputs
    _auto_class = None  # ProcessorMixin.save_pretrained asks every part for it

    def __init__(self, settings: dict[str, object]) -> None:
        self.settings = settings
        # processors read these before they know whether there is a video
        self.num_frames = settings.get("num_frames") or 0
        self.fps = settings.get("fps") or 0
        self.merge_size = settings.get("merge_size") or 1
        self.temporal_patch_size = settings.get("temporal_patch_size") or 1

    def to_dict(self) -> dict[str, object]:
        """Return the settings as they were loaded."""
        return dict(self.settings)

    def fetch_videos(self, *_: object, **__: object) -> NoReturn:
        """Refuse a video.

        Raises
        ------
        LoadError
            Always.
        """
        raise LoadError(
            "a video was given, and torchvision is not installed",
            "give pictures, or pip install torchvision and load again",
        )

    __call__ = fetch_videos


class _WithoutVideo:
    """Mixed into a processor class.

    Lets the stand-in pass the check of the parts' classes, which wants a genuine video processor.
    """

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        if isinstance(argument, NoVideoProcessor):
            return NoVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)


def _class_of(
    name: str | Path, files: dict[str, object], options: dict[str, object]
) -> type | None:
    """The processor class that the files name, else the one that belongs to the model's config.

    None if it is not transformers' own.
    """
    processor_class = getattr(transformers, str(files.get("processor_class")), None)
    if processor_class:
        return processor_class
    config = AutoConfig.from_pretrained(name, **options)
    return transformers.PROCESSOR_MAPPING.get(type(config), None)


def _video_settings(name: str | Path, options: dict[str, object]) -> dict[str, object]:
    settings, _ = BaseVideoProcessor.get_video_processor_dict(name, **options)
    # older models have no file for videos, and transformers reads the pictures' instead:
    # those settings are not ours to save
    return {} if "image_processor_type" in settings else settings


def _load(name: str | Path, options: dict[str, object]) -> object:
    """Load a processor; where torchvision is missing, one without its part for videos."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(name, **options)
    files, _ = ProcessorMixin.get_processor_dict(name, **options)
    genuine = _class_of(name, files, options)
    if genuine is None or "video_processor" not in genuine.get_attributes():
        return AutoProcessor.from_pretrained(name, **options)
    attributes = {"__module__": genuine.__module__, "__doc__": genuine.__doc__}
    reduced = type(genuine.__name__, (_WithoutVideo, genuine), attributes)
    parts = []
    for part in genuine.get_attributes():  # in the order of the constructor
        if part == "video_processor":
            parts.append(NoVideoProcessor(_video_settings(name, options)))
        else:
            parts.append(PARTS[part].from_pretrained(name, **options))
    return reduced.from_args_and_dict(parts, files)


def load_processor(
    name: str | Path,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> ProcessorMixin:
    """Load the processor of a hub model or of a folder, from ``AutoProcessor``.

    Video processors of transformers need torchvision. Where it is not installed, the same processor
    class is put together from the tokenizer and the image processor that computes with PIL; a
    :class:`NoVideoProcessor` takes the third place. The token ids are the same; pixel values differ
    from torchvision's by at most one grey level.

    Parameters
    ----------
    name : str or Path
        A folder, or a hub id.
    revision : str, optional
        The hub's revision; by default the newest.
    local_files_only : bool
        Whether only files on this machine are used. False by default.
    trust_remote_code : bool
        Whether code beside the processor's files is run. False by default.

    Returns
    -------
    ProcessorMixin
        The processor.

    Raises
    ------
    LoadError
        If a package is missing that this processor needs also for pictures, or there is no
        processor.
    """
    options = {"local_files_only": local_files_only, "trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        processor = _load(name, options)
    except (ImportError, ValueError) as error:
        # transformers raises either where a package is missing
        reason = str(error).strip().split("\n")[0]
        package = next((word for word in OPTIONAL if word in reason.lower()), None)
        if package is None and isinstance(error, ValueError):
            raise
        advice = (
            f"pip install {package} and load again"
            if package
            else "install what it names and load again"
        )
        raise LoadError(
            f"the processor of {str(name)!r} needs a package that is not installed ({reason})",
            advice,
        ) from error
    if not isinstance(processor, ProcessorMixin):
        message = (
            f"{str(name)!r} holds no processor (transformers found only {type(processor).__name__})"
        )
        raise LoadError(
            message, "give a model that takes pictures, or save its processor beside it"
        )
    return aligned(processor)


def aligned(processor: ProcessorMixin) -> ProcessorMixin:
    """Return the same processor, with the tokenizer of a Q-Former padding on the right.

    InstructBLIP hands the side its files name on to the Q-Former, a BERT that counts positions from
    the left: padded on the left, the shorter rows of a batch get other visual tokens than alone.
    """
    if hasattr(processor, "qformer_tokenizer"):
        processor.tokenizer.init_kwargs.pop("padding_side", None)
        processor.qformer_tokenizer.padding_side = "right"
    return processor


def padding_first(inputs: Mapping[str, Tensor]) -> BatchFeature:
    """Return the same inputs with every row's padding before its first token.

    BLIP-2's and InstructBLIP's processors pad the text alone and put the visual tokens before it,
    so that the padding lies between picture and words. A decoder with rotary positions then counts
    the gap, and a row's logits depend on its neighbours.
    """
    order = (inputs["attention_mask"] != 0).int().argsort(dim=1, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    sorted_inputs = {}
    for name, value in inputs.items():
        sorted_inputs[name] = value[rows, order] if name in ALONG_THE_SEQUENCE else value
    return BatchFeature(sorted_inputs)


def reads(processor: object) -> tuple[str, ...]:
    """Return the modalities that a processor takes beside text.

    They are what the processor says itself, or those for which it has a part.
    """
    if (modalities := getattr(processor, "reads", None)) is not None:
        return tuple(modalities)
    parts = {
        "image": ("image_processor",),
        "video": ("video_processor",),
        "audio": ("feature_extractor", "audio_processor"),
    }
    if not {"audio", "audios"} & signature(type(processor).__call__).parameters.keys():
        del parts["audio"]  # Voxtral's takes texts, and sounds only in its own apply_chat_template
    return tuple(
        kind
        for kind, names in parts.items()
        if any(getattr(processor, name, None) is not None for name in names)
    )


def require_own(tokenizer: PreTrainedTokenizerBase, placeholders: Mapping[str, int]) -> None:
    """Refuse a tokenizer to which a model's placeholders are ordinary words, or nothing.

    Such a tokenizer is that of another model.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The processor's tokenizer.
    placeholders : Mapping of str to int
        The model's placeholder ids.

    Raises
    ------
    LoadError
        If it is so, with the placeholder.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    # the first alone: a configuration may name others by its class's defaults, and never use them
    for kind, token in list(placeholders.items())[:1]:
        if added and token not in added:
            word = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
            message = (
                f"token {token}, which stands for {kind} in the model, is {word!r} to the "
                "tokenizer of its processor"
            )
            raise LoadError(message, "give the processor that was saved with the model")


def advice(processor: object) -> str:
    """Return what to do with a modality that a processor does not take."""
    if hasattr(processor, "feature_extractor") and "audio" not in reads(processor):
        return (
            "make the inputs by the processor's own apply_chat_template, which alone takes sounds, "
            "and give them to vlm.prepare"
        )
    return getattr(processor, "advice", "load a model that does")


def require_padding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Let a tokenizer without a padding token pad with its EOS token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The tokenizer, changed in place.
    rows : int or None
        How many tokens the model embeds, None where this is not known.

    Raises
    ------
    LoadError
        If it has neither, or the model does not embed its padding token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise LoadError(
            "the tokenizer has neither a padding token nor an end mark",
            "set pad_token in its files, or vlm.tokenizer.pad_token",
        )
    if rows is not None and tokenizer.pad_token_id >= rows:
        message = (
            f"the tokenizer pads with {tokenizer.pad_token!r}, token {tokenizer.pad_token_id}, and "
            f"the model embeds {rows} tokens"
        )
        raise LoadError(
            message,
            (
                "name another token as pad_token in its files, or resize the model's "
                "embeddings and save it again"
            ),
        )


def require_embedded(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, rows: int | None, placeholders: Collection[int]
) -> None:
    """Refuse ids that the model cannot embed.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Made the ids; errors name its token.
    ids : Tensor
        Input ids (b, t).
    rows : int or None
        How many tokens the model embeds; None, where this is not known, refuses nothing.
    placeholders : collection of int
        Ids that stand for pictures and need no embedding.

    Raises
    ------
    LoadError
        If there are some, with the first.
    """
    if rows is None or int(ids.max()) < rows:
        return
    if unknown := sorted(set(ids[ids >= rows].tolist()) - set(placeholders)):
        message = (
            f"the tokenizer makes {tokenizer.convert_ids_to_tokens(unknown[0])!r} token "
            f"{unknown[0]}, and the model embeds {rows} tokens"
        )
        raise LoadError(
            message,
            (
                "resize the model's embeddings and save it again, or give it the "
                "tokenizer that it was trained with"
            ),
        )
