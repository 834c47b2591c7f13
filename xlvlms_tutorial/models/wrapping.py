"""What a model has to be before it is taken in, whether it was loaded here or is handed over.

Architecture, weights, processor.
"""

from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedConfig

from xlvlms_tutorial.errors import (
    ArchitectureError,
    LoadError,
    PromptError,
    SelfCheckError,
    XlvlmsError,
)
from xlvlms_tutorial.models import anatomy, support
from xlvlms_tutorial.models.architectures import ARCHITECTURES
from xlvlms_tutorial.models.failures import FAILURES, reason
from xlvlms_tutorial.models.place_checks import HANGS_ON
from xlvlms_tutorial.models.processors import aligned, require_own
from xlvlms_tutorial.models.self_check import REQUIRED, self_check
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

# of different length, so that one row is padded
_ASKED = ("What is this?", "What does it show, and where?")


def tested(config: PreTrainedConfig) -> bool:
    """Whether an architecture is one of those that pass the contract tests."""
    return config.model_type in ARCHITECTURES and not _encoding(config)


def require_architecture(name: str, config: PreTrainedConfig, allow_untested: bool) -> None:
    """Refuse an architecture that may not be loaded; nothing but its configuration is read.

    Raises
    ------
    ArchitectureError
        If it has not passed the contract tests, and ``allow_untested`` is not given.
    LoadError
        If its language model has an encoder, where no test or check can reach its pictures.
    """
    kind = config.model_type
    if not tested(config) and not allow_untested:
        inside = config.get_text_config(decoder=True).model_type
        raise ArchitectureError(
            f"{kind} with {inside}" if kind in ARCHITECTURES else kind, tuple(ARCHITECTURES)
        )
    if _encoding(config):
        advice = "give a model whose pictures and words run through one stack of decoder blocks"
        raise LoadError(
            f"{name!r} ({kind}) has an encoder and a decoder, and pictures in the encoder", advice
        )


def _encoding(config: PreTrainedConfig) -> bool:
    # BLIP-2 around T5 has its pictures in an encoder of the language
    # model, and Florence-2 in its own
    return any(
        getattr(part, "is_encoder_decoder", False)
        for part in (config, config.get_text_config(decoder=True))
    )


def require_finite(name: str, model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite.

    Of those that are offloaded or packed into whole numbers nothing is known.

    Raises
    ------
    LoadError
        If there are some, with the first.
    """
    for where, weight in model.named_parameters():
        if (
            weight.is_meta
            or not weight.is_floating_point()
            or weight.element_size() < 2
            or not weight.numel()
        ):
            continue
        ends = torch.stack(torch.aminmax(weight.detach()))  # no copy of the weights
        if not ends.isfinite().all():
            raise LoadError(
                f"{name!r} has weights that are NaN or infinite, first in {where}",
                "download or train it again",
            )


def check(vlm: VLM) -> None:
    """Run the self-checks on a model with its processor.

    What single places fail is kept in ``vlm.refused``, all of it in ``vlm.checks``.

    Raises
    ------
    SelfCheckError
        If one fails without which nothing can be done.
    """
    kind = vlm.model.config.model_type
    try:
        batch = _trial(vlm, _ASKED)
    except (OSError, LookupError, *FAILURES) as cause:
        raise SelfCheckError(kind, [("inputs from its processor", cause)]) from cause
    vlm.checks = self_check(vlm, batch)
    failed = dict(
        vlm.checks.loc[~vlm.checks["passed"], ["check", "detail"]].itertuples(
            index=False, name=None
        )
    )
    if lost := [(name, detail) for name, detail in failed.items() if name in REQUIRED]:
        raise SelfCheckError(kind, lost)
    vlm.refused |= {place: detail for name, detail in failed.items() for place in HANGS_ON[name]}


def wrapped(
    model: object,
    processor: object | None,
    name: object,
    revision: str | None = None,
    allow_untested: bool = False,
) -> VLM:
    """A model that is loaded already, checked as one that is loaded here.

    See :meth:`VLM.from_model`.
    """
    if not isinstance(name, str) or not name.strip():
        raise LoadError(
            f"name {name!r}", "give a text by which records tell these weights from others"
        )
    if not isinstance(model, nn.Module) or not hasattr(
        getattr(model, "config", None), "get_text_config"
    ):
        raise LoadError(
            f"{name!r} is a {type(model).__name__}, which is no model of transformers",
            "give what from_pretrained returns",
        )
    support.require_hookable(model)
    if any(
        getattr(told, "is_prompt_learning", False)
        for told in (getattr(model, "peft_config", None) or {}).values()
    ):
        raise LoadError(
            f"{name!r} has a learned prompt of peft around it",
            "give a model without adapter, or with a LoRA",
        )
    model = support.base_of(model)
    require_architecture(name, model.config, allow_untested)
    own = [
        type(model.config) in auto._model_mapping
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    ]
    if not any(own) and not getattr(model.config, "auto_map", None):  # remote code names its own
        what = (
            f"{name!r} is a {model.config.model_type!r}, which answers no questions about pictures"
        )
        raise LoadError(what, "give a vision-language model")
    anatomy.unembedding(model)
    if any(weight.is_meta for weight in model.parameters()) and not any(
        hasattr(part, "_hf_hook") for part in model.modules()
    ):
        raise LoadError(
            f"{name!r} holds no weights (they are on the device 'meta')",
            "load them, or dispatch the model with accelerate",
        )
    require_finite(name, model)
    if processor is not None:
        if not hasattr(processor, "tokenizer"):
            raise LoadError(
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


VLM._taken_in = staticmethod(wrapped)


def _try(vlm: VLM) -> None:
    """Ask about a grey picture once.

    A processor of another model makes inputs that fit in their names and not in their shapes.
    """
    if vlm.processor is None:
        return
    try:
        batch = _trial(vlm, _ASKED[:1])
    except PromptError:
        return  # without a chat template it is the caller's texts that say where the picture goes
    except XlvlmsError:
        raise
    except (OSError, LookupError, *FAILURES) as cause:
        raise _unfit(vlm.name, cause) from cause
    try:
        logits = vlm.forward(batch, logits=False).logits
    except (OSError, LookupError, *FAILURES) as cause:
        raise _unfit(vlm.name, cause) from cause
    if not torch.isfinite(logits).all():
        raise LoadError(
            f"{vlm.name!r} gives logits that are NaN or infinite",
            "load it in float32 or bfloat16, and check its weights",
        )


def _trial(vlm: VLM, texts: tuple[str, ...]) -> Batch:
    shown = {"images": [Image.new("RGB", (224, 224), (128, 128, 128))] * len(texts)}
    if not hasattr(vlm.processor, "image_processor"):
        shown = {"images": None, "audio": [np.zeros(16000)] * len(texts)}
    return vlm.batch(texts=texts, **shown)


def _unfit(name: str, cause: Exception) -> LoadError:
    advice = "give the processor that was saved with the model"
    return LoadError(f"{name!r} does not take what its processor makes ({reason(cause)})", advice)
