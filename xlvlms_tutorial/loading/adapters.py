"""LoRA adapters on a loaded model, by peft.

The shipped ones by name, others from a folder or the hub.
"""

import os
import warnings

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file, is_peft_available, logging

from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.models.failures import FAILURES, require_installed, unreadable
from xlvlms_tutorial.models.finetune import import_peft
from xlvlms_tutorial.text import STYLES

SHIPPED = tuple(f"pocket-{style}" for style in STYLES)
NAMING = "pocket-names"  # trained on episodes with made-up names
BASE = "pocket-llava"
_MAGNITUDE = "lora_magnitude_vector"


def add_adapter(
    model: PreTrainedModel,
    adapter: str | os.PathLike,
    name: str = "",
    offline: bool = False,
    label: str = "default",
) -> None:
    """Add a LoRA or DoRA adapter to a model, in place.

    The adapter is a shipped one, or comes from a folder or the hub (Hu et al., 2021, arXiv
    2106.09685; Liu et al., 2024, arXiv 2402.09353).

    Parameters
    ----------
    model : PreTrainedModel
        The model, changed in place.
    adapter : str or path
        One of ``SHIPPED`` or ``NAMING``, also at a step ("pocket-place@step-0040"), a folder or
        a hub id.
    name : str
        What the model was loaded as: shipped adapters fit one model only.
    offline : bool
        Whether only files on this machine are used. False by default.
    label : str, default "default"
        What the model calls the adapter; each of several has its own.

    Raises
    ------
    LoadError
        If peft is not installed, the adapter's files are not to be had, or it was trained on
        another model. If a shipped adapter has no such step.
    """
    adapter = os.path.expanduser(adapter)
    require_installed("peft", is_peft_available(), f"adapter {adapter!r}", "load again")
    if adapter.partition("@")[0] in (*SHIPPED, NAMING):
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
    earlier_labels = list(getattr(model, "peft_config", None) or ())
    bar_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of what takes a tenth of a second
    try:
        import_peft()
        with warnings.catch_warnings():
            # several adapters are what is wanted
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            info = model.load_adapter(
                adapter,
                adapter_name=label,
                local_files_only=offline,
                use_safetensors=True,
                adapter_state_dict=_with_magnitudes(weights),
            )
    except (OSError, *FAILURES) as cause:
        raise unreadable(f"adapter {adapter!r}", cause) from cause
    finally:
        if bar_enabled:
            logging.enable_progress_bar()
    unmatched = sorted(info.unexpected_keys)
    for key in sorted(info.missing_keys):
        # those of earlier adapters are not in this file, and need not be
        if not any(f".{earlier}." in key for earlier in earlier_labels):
            unmatched.append(key)
    if unmatched:
        # transformers only logs it, and answers as if there were no adapter
        message = (
            f"adapter {adapter!r} does not fit {type(model).__name__}: {len(unmatched)} weights "
            f"have no counterpart, such as {unmatched[0]}"
        )
        advice = (
            "give an adapter that was trained on this model, or merge it into the "
            "weights by peft and load those"
        )
        raise LoadError(message, advice)


def _with_magnitudes(file: str) -> dict[str, Tensor] | None:
    """Return the weights of a DoRA adapter, whose magnitude vectors have another name in a model.

    None for other adapters, which peft reads itself.
    """
    with safe_open(file, "pt") as weights:
        if not any(name.endswith(_MAGNITUDE) for name in weights.keys()):  # noqa: SIM118
            return None
        state = {}
        for name in weights.keys():  # noqa: SIM118
            suffix = ".weight" if name.endswith(_MAGNITUDE) else ""
            state[name + suffix] = weights.get_tensor(name)
        return state
