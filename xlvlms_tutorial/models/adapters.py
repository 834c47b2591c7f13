"""LoRA adapters on a loaded model, by peft.

The shipped ones by name, others from a folder or the hub.
"""

import importlib
import logging as messages
import os

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file, is_peft_available, logging

from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.models.failures import FAILURES, unreadable
from xlvlms_tutorial.text import STYLES

SHIPPED = tuple(f"pocket-{style}" for style in STYLES)
BASE = "pocket-llava"
_MAGNITUDE = "lora_magnitude_vector"


def add_adapter(
    model: PreTrainedModel, adapter: str | os.PathLike, name: str = "", offline: bool = False
) -> None:
    """Add a LoRA (Hu et al., 2021) or DoRA (Liu et al., 2024) to the model ``name``, in place.

    A shipped one, or from a folder or the hub.

    Raises
    ------
    LoadError
        If peft is not installed, the adapter's files are not to be had, or
        it was trained on another model.
    RevisionError
        If a shipped adapter has no such step.
    """
    adapter = os.path.expanduser(adapter)
    if not is_peft_available():
        raise LoadError(
            f"adapter {adapter!r} needs peft, which is not installed",
            "pip install peft and load again",
        )
    if adapter.partition("@")[0] in SHIPPED:
        if name != BASE:
            raise LoadError(
                f"adapter {adapter!r} on {name!r}",
                f"it was trained on {BASE}: load that, or train one with fine_tune",
            )
        # the wheels behind it are asked for only here
        from xlvlms_tutorial.pocket.build import adapter_folder

        adapter = str(adapter_folder(adapter))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            weights = cached_file(adapter, file, local_files_only=offline)
        except OSError as cause:
            advice = "give a folder, or a hub id, with what peft's save_pretrained writes"
            raise LoadError(f"adapter {adapter!r} has no {file} that can be had", advice) from cause
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of what takes a tenth of a second
    try:
        import_peft()
        info = model.load_adapter(
            adapter,
            local_files_only=offline,
            use_safetensors=True,
            adapter_state_dict=_with_magnitudes(weights),
        )
    except (OSError, *FAILURES) as cause:
        raise unreadable(f"adapter {adapter!r}", cause) from cause
    finally:
        if shown:
            logging.enable_progress_bar()
    if wrong := sorted({*info.missing_keys, *info.unexpected_keys}):
        # transformers only logs it, and answers as if there were no adapter
        told = (
            f"adapter {adapter!r} does not fit {type(model).__name__}: {len(wrong)} weights have "
            f"no counterpart, such as {wrong[0]}"
        )
        advice = (
            "give an adapter that was trained on this model, or merge it into the "
            "weights by peft and load those"
        )
        raise LoadError(told, advice)


def _with_magnitudes(file: str) -> dict[str, Tensor] | None:
    """The weights of a DoRA (Liu et al., 2024), whose vectors peft names otherwise in a model.

    None for others, to be read as ever.
    """
    with safe_open(file, "pt") as weights:
        if not any(name.endswith(_MAGNITUDE) for name in weights.keys()):  # noqa: SIM118
            return None
        return {
            name + ".weight" * name.endswith(_MAGNITUDE): weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118
        }


def import_peft() -> None:
    """Import peft.

    Where bitsandbytes is installed it comes along, and its warning of a kernel
    for 4-bit weights is held back.
    """
    noisy = messages.getLogger("bitsandbytes.backends.cpu.ops")
    before = noisy.level
    noisy.setLevel(messages.ERROR)
    try:
        importlib.import_module("peft")
    finally:
        noisy.setLevel(before)
