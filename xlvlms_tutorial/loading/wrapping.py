"""What a model has to be before it is used, whether it was loaded here or is handed over.

Architecture, weights, processor.
"""

from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedConfig

from xlvlms_tutorial.errors import LoadError, XlvlmsError, failed_self_check, untested_architecture
from xlvlms_tutorial.loading.self_check import REQUIRED, self_check
from xlvlms_tutorial.loading.site_checks import HANGS_ON
from xlvlms_tutorial.models import anatomy, support
from xlvlms_tutorial.models.architectures import ARCHITECTURES
from xlvlms_tutorial.models.failures import FAILURES, reason, require
from xlvlms_tutorial.models.processors import aligned, require_own
from xlvlms_tutorial.models.prompts import Unpromptable
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

# of different length, so that one row is padded
_TEXTS = ("What is this?", "What does it show, and where?")


def tested(config: PreTrainedConfig) -> bool:
    """Tell whether an architecture is one of those that pass the contract tests."""
    return config.model_type in ARCHITECTURES and not _encoding(config)


def require_architecture(name: str, config: PreTrainedConfig, allow_untested: bool) -> None:
    """Refuse an architecture that may not be loaded; nothing but its configuration is read.

    Parameters
    ----------
    name : str
        The model's name, for errors.
    config : PreTrainedConfig
        Its configuration.
    allow_untested : bool
        Whether an architecture outside the table of tested ones is allowed.

    Raises
    ------
    LoadError
        If it has not passed the contract tests, and ``allow_untested`` is not given. If its
        language model has an encoder, where no test or check can reach its pictures.
    """
    kind = config.model_type
    if not tested(config) and not allow_untested:
        text_kind = config.get_text_config(decoder=True).model_type
        raise untested_architecture(
            f"{kind} with {text_kind}" if kind in ARCHITECTURES else kind, tuple(ARCHITECTURES)
        )
    if _encoding(config):
        advice = "give a model whose pictures and words run through one stack of decoder blocks"
        raise LoadError(
            f"{name!r} ({kind}) has an encoder and a decoder, and pictures in the encoder", advice
        )


def _encoding(config: PreTrainedConfig) -> bool:
    # BLIP-2 around T5 has its pictures in an encoder of the language
    # model, and Florence-2 in its own
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, "is_encoder_decoder", False) for part in parts)


def require_finite(name: str, model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite.

    Nothing is known of weights that are offloaded or packed into integers.

    Raises
    ------
    LoadError
        If there are some, with the first.
    """
    for parameter, weight in model.named_parameters():
        if (
            weight.is_meta
            or not weight.is_floating_point()
            or weight.element_size() < 2
            or not weight.numel()
        ):
            continue
        ends = torch.stack(torch.aminmax(weight.detach()))  # no copy of the weights
        require(
            bool(ends.isfinite().all()),
            f"{name!r} has weights that are NaN or infinite, first in {parameter}",
            "download or train it again",
        )


def check(vlm: VLM) -> None:
    """Run the self-checks on a model with its processor.

    Sites and parts that fail theirs are recorded in ``vlm.refused``, the table of all checks in
    ``vlm.checks``.

    Raises
    ------
    LoadError
        If one fails without which nothing can be done.
    """
    kind = vlm.model.config.model_type
    try:
        batch = _trial(vlm, _TEXTS)
    except (OSError, LookupError, *FAILURES) as cause:
        raise failed_self_check(kind, [("inputs from its processor", cause)]) from cause
    vlm.checks = self_check(vlm, batch)
    failing = vlm.checks[~vlm.checks["passed"]]
    failed = dict(zip(failing["check"], failing["detail"], strict=True))
    fatal = [(name, detail) for name, detail in failed.items() if name in REQUIRED]
    if fatal:
        raise failed_self_check(kind, fatal)
    for name, detail in failed.items():
        for pair in HANGS_ON[name]:
            vlm.refused[pair] = detail


def from_model(
    model: nn.Module,
    processor: object | None = None,
    *,
    name: str,
    revision: str | None = None,
    allow_untested: bool = False,
) -> VLM:
    """Wrap a model that is loaded already.

    Use it for a model that is quantised, on several devices, with a LoRA of peft, or fine-tuned
    a moment ago. It has to pass what ``load`` asks for, and answers once about a grey picture,
    by which a processor of another model is found. Model and processor stay as they are: the
    model runs in evaluation mode and goes back to its own, and ``vlm.processor`` is a copy,
    which pads on the left.

    Parameters
    ----------
    model : torch.nn.Module
        What ``from_pretrained`` of transformers returns, or peft's wrapper around it.
    processor : object, optional
        What ``AutoProcessor.from_pretrained`` returns. None for inputs that are made elsewhere.
    name : str
        What records call these weights: give other weights another name.
    revision : str, optional
        Their revision, for records.
    allow_untested : bool
        As for ``load``: take an architecture outside the table of tested ones too, if it passes
        the self-checks. False by default.

    Returns
    -------
    VLM
        The model, checked.

    Raises
    ------
    LoadError
        If the architecture has not passed the contract tests, or fails its
        self-checks. If the model is compiled, has no weights or some that are NaN,
        reads no pictures, or the processor is another model's.
    AnatomyError
        If it has no decoder or unembedding under any name that is known.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import from_model
    >>> wrapped = from_model(vlm.model, vlm.processor, name="my-llava, step 500")
    >>> wrapped.name, wrapped.n_layers
    ('my-llava, step 500', 30)
    """
    require(
        isinstance(name, str) and name.strip() != "",
        f"name {name!r}",
        "give a text by which records tell these weights from others",
    )
    of_transformers = hasattr(getattr(model, "config", None), "get_text_config")
    require(
        isinstance(model, nn.Module) and of_transformers,
        f"{name!r} is a {type(model).__name__}, which is no model of transformers",
        "give what from_pretrained returns",
    )
    support.require_hookable(model)
    adapters = (getattr(model, "peft_config", None) or {}).values()
    learned_prompt = any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)
    require(
        not learned_prompt,
        f"{name!r} has a learned prompt of peft around it",
        "give a model without adapter, or with a LoRA",
    )
    model = support.base_of(model)
    require_architecture(name, model.config, allow_untested)
    kind = type(model.config)
    mapped = (
        kind in AutoModelForImageTextToText._model_mapping
        or kind in AutoModelForMultimodalLM._model_mapping
    )
    if not mapped and not getattr(model.config, "auto_map", None):  # remote code names its own
        message = (
            f"{name!r} is a {model.config.model_type!r}, which answers no questions about pictures"
        )
        raise LoadError(message, "give a vision-language model")
    anatomy.unembedding(model)
    empty = any(weight.is_meta for weight in model.parameters())
    offloaded = any(hasattr(part, "_hf_hook") for part in model.modules())
    require(
        offloaded or not empty,
        f"{name!r} holds no weights (they are on the device 'meta')",
        "load them, or dispatch the model with accelerate",
    )
    require_finite(name, model)
    if processor is not None:
        require(
            hasattr(processor, "tokenizer"),
            f"the processor of {name!r} is a {type(processor).__name__}",
            "give what AutoProcessor.from_pretrained returns",
        )
        processor = aligned(deepcopy(processor))  # the caller's own may pad on the other side
    vlm = VLM(model, processor, name, revision)
    if processor is not None:
        require_own(vlm.tokenizer, vlm.placeholders)
    if tested(model.config):
        _try(vlm)
    elif processor is None:
        raise LoadError(
            f"{name!r} of an untested architecture without a processor cannot be checked",
            "give its processor",
        )
    else:
        check(vlm)
    return vlm


def _try(vlm: VLM) -> None:
    """Ask about a grey picture once.

    A processor of another model makes inputs that fit in their names and not in their shapes.
    """
    if vlm.processor is None:
        return
    try:
        batch = _trial(vlm, _TEXTS[:1])
    except Unpromptable:
        return  # without a chat template it is the caller's texts that say where the picture goes
    except XlvlmsError:
        raise
    except (OSError, LookupError, *FAILURES) as cause:
        raise _unfit(vlm.name, cause) from cause
    try:
        logits = vlm.forward(batch, logits=False).logits
    except (OSError, LookupError, *FAILURES) as cause:
        raise _unfit(vlm.name, cause) from cause
    require(
        bool(torch.isfinite(logits).all()),
        f"{vlm.name!r} gives logits that are NaN or infinite",
        "load it in float32 or bfloat16, and check its weights",
    )


def _trial(vlm: VLM, texts: tuple[str, ...]) -> Batch:
    media = {"images": [Image.new("RGB", (224, 224), (128, 128, 128))] * len(texts)}
    if not hasattr(vlm.processor, "image_processor"):
        media = {"images": None, "audio": [np.zeros(16000)] * len(texts)}
    return vlm.batch(texts=texts, **media)


def _unfit(name: str, cause: Exception) -> LoadError:
    advice = "give the processor that was saved with the model"
    return LoadError(f"{name!r} does not take what its processor makes ({reason(cause)})", advice)
