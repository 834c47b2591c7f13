"""One door to vision-language models.

``load(name)`` gives a :class:`VLM`, whatever stands behind the name.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import cached_file, is_bitsandbytes_available

from xlvlms_tutorial.errors import (
    LoadError,
    XlvlmsError,
    not_on_hub,
    unknown_model,
    untested_architecture,
)
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.loading.adapters import add_adapter
from xlvlms_tutorial.loading.wrapping import check, require_architecture, require_finite, tested
from xlvlms_tutorial.models.architectures import ARCHITECTURES
from xlvlms_tutorial.models.devices import resolve_device, resolve_dtype, set_attention
from xlvlms_tutorial.models.failures import FAILURES, require, require_installed, unreadable
from xlvlms_tutorial.models.processors import load_processor, require_own
from xlvlms_tutorial.models.vlm import VLM

# The models that come with the package, by name
EMBEDDED = (
    "pocket-llava",
    "pocket-llava-video",
    "pocket-llava-audio",
    "pocket-llava-joint",
    "pocket-llava-lite0",
    "pocket-llava-lite2",
    "pocket-llava-random",
    "pocket-llava-patches",
    "pocket-llava-seed1",
    "pocket-llava-seed2",
    "pocket-llava-skipped",
    "pocket-llava-pruned",
    "pocket-llava-short",
    "pocket-gemma",  # fetched only when it is loaded by name
)
QUANTISED = ("8bit", "4bit")
# blocks; transformers would build as many as a config says before it looks at the weights
_DEEPEST = 10_000
_SMALLER = (
    "load in bfloat16, with quantise='8bit' or '4bit', or with "
    "device='balanced' where there are several GPUs"
)


def load(
    name: str | os.PathLike = "pocket-llava",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    *,
    quantise: str | None = None,
    adapter: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
    offline: bool = False,
    attn_implementation: str | None = None,
    allow_untested: bool = False,
    trust_remote_code: bool = False,
) -> VLM:
    """Load a vision-language model by name.

    Use it for an embedded model, a folder, or an id of the Hugging Face hub ("owner/name"); for a
    model that is in memory already there is :func:`~xlvlms_tutorial.loading.wrapping.from_model`.

    Parameters
    ----------
    name : str or path
        One of ``EMBEDDED`` ("pocket-llava" by default), a folder, or a hub id.
    device : str or torch.device
        "auto" (the default) takes CUDA where there is one; any device of torch; or "balanced",
        which spreads the blocks over all GPUs.
    dtype : str or torch.dtype
        "auto" (the default) is float32 on CPU, bfloat16 on a GPU, and float16 on a GPU without
        bfloat16.
    revision : str, optional
        The hub's revision, or for pocket LLaVA a step of its training such as "step-0450". By
        default the newest, or the last step.
    quantise : str, optional
        "8bit" or "4bit" (nf4): the linear layers' weights, by bitsandbytes (Dettmers et al., 2022,
        arXiv 2208.07339, and 2023, arXiv 2305.14314). Not quantised by default.
    adapter : str or path, or mapping of str to them, optional
        Folder or hub id of a LoRA or DoRA adapter (peft), or for pocket LLaVA "pocket-place",
        "pocket-colour", "pocket-mood" or "pocket-names", also at a step of its training
        ("pocket-place@step-0040").
        The model keeps its class: ``vlm.model.disable_adapters()`` turns it off. Several LoRAs are
        a mapping from the name that each shall have; they are off until
        :func:`~xlvlms_tutorial.methods.merging.adapters.mixed` mixes them. None by default.
    offline : bool
        Whether only what is on this machine is used: folders, and the hub's cache. False by
        default.
    attn_implementation : str, optional
        How attention is computed: "eager", "sdpa" (transformers' own choice where a model has
        it), "flash_attention_2", "flex_attention" and others that transformers knows. The
        answers are the same up to rounding. Transformers' choice by default.
    allow_untested : bool
        Whether an architecture outside :func:`~xlvlms_tutorial.models.architectures.architectures`
        is loaded too, if it passes the self-checks; they are then in ``vlm.checks``. Where only a
        site in its blocks fails, that site is refused, and ``vlm.supports`` says so. False by
        default.
    trust_remote_code : bool
        Whether code is run that the model's authors put beside its weights. False by default.

    Returns
    -------
    VLM
        The model with its processor, in evaluation mode and with frozen weights.

    Raises
    ------
    LoadError
        If the name is none of the three. If the architecture has not passed the contract tests, and
        ``allow_untested`` is not given. If an architecture outside the table fails its self-checks.
        If the hub cannot be reached and the model is not in its cache. If pocket LLaVA, or an
        adapter of it, has no such training step. If device, dtype, quantisation, attention, adapter
        or weights are not to be had in this way, weights are NaN, or the processor is another
        model's.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load
    >>> pocket = load("pocket-llava", device="cpu")
    >>> pocket.name, pocket.n_layers, str(pocket.dtype)
    ('pocket-llava', 30, 'torch.float32')
    """
    name = os.path.expanduser(name)
    placed = resolve_device(device)
    number = resolve_dtype(dtype, placed)
    require(
        quantise is None or quantise in QUANTISED,
        f"quantise={quantise!r}",
        f"allowed: None, {', '.join(map(repr, QUANTISED))}",
    )
    reliable = name in EMBEDDED
    with no_network(offline):
        if reliable:
            vlm = _embedded(name, placed, number, revision, quantise)
        elif os.path.isdir(name) or name.count("/") == 1:
            source = Source(name, revision, offline, trust_remote_code).pinned()
            config = source.config(allow_untested)
            reliable = tested(config)
            model = source.model(config, _options(config, placed, number, quantise))
            vlm = VLM(model, source.processor(), name, source.revision)
        else:
            raise unknown_model(name, EMBEDDED)
        if isinstance(adapter, Mapping):
            for label, expert in adapter.items():
                add_adapter(vlm.model, expert, name, offline, label)
            vlm.model.disable_adapters()
        elif adapter is not None:
            add_adapter(vlm.model, adapter, name, offline)
    # the name goes into what is captured: states of other weights must not
    # be taken for the plain model's
    names = [name]
    adapters = adapter.values() if isinstance(adapter, Mapping) else [adapter]
    for extra in (*adapters, quantise):
        if extra is not None:
            names.append(os.fspath(extra))
    vlm.name = " + ".join(names)
    vlm.model.eval().requires_grad_(False)
    if attn_implementation is not None:
        set_attention(vlm.model, attn_implementation)
    if name not in EMBEDDED or adapter is not None:
        require_finite(vlm.name, vlm.model)
    if not reliable:
        check(vlm)
    elif name not in EMBEDDED:
        require_own(vlm.tokenizer, vlm.placeholders)
    return vlm


@contextmanager
def no_network(offline: bool) -> Iterator[None]:
    """Ask nothing of the hub inside this block, if it is to stay offline.

    Parameters
    ----------
    offline : bool
        False leaves everything as it is.
    """
    # local_files_only is not enough: transformers asks the hub for adapters, and the
    # hub's library for a list of its own
    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = previous or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous


@dataclass(frozen=True)
class Source:
    """Where a model's files come from.

    Parameters
    ----------
    name : str
        A folder, or a hub id.
    revision : str or None
        The hub's revision; None is the newest.
    offline : bool
        Whether only files on this machine are used.
    trust_remote_code : bool
        Whether code beside the files is run.
    """

    name: str
    revision: str | None
    offline: bool
    trust_remote_code: bool

    @property
    def folder(self) -> bool:
        """Whether the files lie in a folder, and not in the hub's cache."""
        return os.path.isdir(self.name)

    @property
    def options(self) -> dict[str, object]:
        """The options of every ``from_pretrained``.

        False for remote code is given too: left out, transformers asks at the terminal.
        """
        revision = {} if self.revision is None else {"revision": self.revision}
        return revision | {
            "local_files_only": self.offline,
            "trust_remote_code": self.trust_remote_code,
        }

    def pinned(self) -> "Source":
        """Return the same source at the commit that the revision stands for now.

        All files are then of one state, and records name it.
        """
        if self.revision is not None and self.folder:
            raise LoadError(
                f"revision {self.revision!r} of the folder {self.name!r}",
                "folders have no revisions: leave it out",
            )
        with self.reading("configuration"):
            file = Path(
                cached_file(
                    self.name, "config.json", revision=self.revision, local_files_only=self.offline
                )
            )
        return self if self.folder else replace(self, revision=file.parent.name)

    def config(self, allow_untested: bool) -> PreTrainedConfig:
        """Return the model's configuration, if its architecture is one that may be loaded.

        ``allow_untested`` is that of :func:`load`.
        """
        with self.reading("configuration"):
            # the type first: transformers cannot make a configuration of
            # a type that it does not know
            settings = PreTrainedConfig.get_config_dict(self.name, **self.options)[0]
            # of a whole Qwen2.5-Omni, the part that reads and answers; the other speaks
            settings = settings.get("thinker_config") or settings
            kind = str(settings.get("model_type"))
            if (settings.get("vision_config") or {}).get("model_type") == "pocket_tower":
                # a saved pocket model: registers its parts
                importlib.import_module("xlvlms_tutorial.pocket.processor")
            if kind not in ARCHITECTURES and not allow_untested:
                raise untested_architecture(kind, tuple(ARCHITECTURES))
            if kind not in CONFIG_MAPPING and not self.trust_remote_code:
                advice = (
                    "upgrade transformers, or read the code that the model may bring and "
                    "load with trust_remote_code=True"
                )
                raise LoadError(
                    f"{self.name!r} is of a type that transformers does not know ({kind!r})", advice
                )
            config = AutoConfig.from_pretrained(self.name, **self.options)
            config = getattr(config, "thinker_config", config)
        _require_depth(self.name, config)
        require_architecture(self.name, config, allow_untested)
        return config

    def model(self, config: PreTrainedConfig, options: dict[str, object]) -> PreTrainedModel:
        """Return the model with its weights.

        ``config`` is its configuration; ``options`` go to ``from_pretrained`` with :attr:`options`.
        """
        options = (
            {"config": config, "use_safetensors": True, "output_loading_info": True}
            | self.options
            | options
        )
        self.require_safetensors(config)
        with self.reading("weights"):
            model, info = _auto_class(self.name, config).from_pretrained(self.name, **options)
        if missing := sorted(info["missing_keys"]):
            # transformers fills them with random numbers and goes on
            message = f"{self.name!r} lacks {len(missing)} of its weights, such as {missing[0]}"
            raise LoadError(message, "download it again, or save the whole model")
        return model

    def require_safetensors(self, config: PreTrainedConfig) -> None:
        """Refuse other files of weights than safetensors in the folder.

        They are pickles, which can run code when they are read. transformers'
        ``use_safetensors=True`` does not see what an index of shards, the config or an
        adapter beside the weights name.
        """
        weights = getattr(config, "transformers_weights", None)
        files = {weights} if weights else set()
        with self.reading("weights"):
            index_name = "model.safetensors.index.json"
            if str(weights).endswith(".index.json"):
                index_name = weights
            index = self._file(index_name)
            if index:
                files |= set(read_json(index)["weight_map"].values())
            adapter = self._file("adapter_config.json")
            if adapter and not self._file("adapter_model.safetensors"):
                files.add("adapter_model.bin")
        for file in sorted(files, key=str):
            beside = isinstance(file, str) and not {"/", "\\", ":"} & set(file)
            if not beside or not file.endswith((".safetensors", ".safetensors.index.json")):
                raise LoadError(
                    f"{self.name!r} names {file!r} as weights, which is no safetensors file beside "
                    "its config",
                    "save the model again where you trust its files; save_pretrained writes "
                    "safetensors",
                )

    def _file(self, name: str) -> Path | None:
        """The path of one of the model's files, if it has it."""
        options = {
            "revision": self.revision,
            "local_files_only": self.offline,
            "_raise_exceptions_for_missing_entries": False,
        }
        path = cached_file(self.name, name, **options)
        return None if path is None else Path(path)

    def processor(self) -> ProcessorMixin:
        """Return the model's processor."""
        with self.reading("processor"):
            return load_processor(self.name, self.revision, self.offline, self.trust_remote_code)

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turn what transformers raises while it reads a ``part`` into this package's errors."""
        try:
            yield
        except XlvlmsError:
            raise
        except torch.OutOfMemoryError as cause:
            raise LoadError(
                f"{self.name!r} does not fit into the memory of the device", _SMALLER
            ) from cause
        except OSError as cause:
            if part == "weights" and self.pickled(cause):
                message = f"{self.name!r} has no weights in safetensors"
                raise LoadError(
                    message, "load it where you trust its files; save_pretrained writes safetensors"
                ) from cause
            raise (
                unreadable(f"the {part} of {self.name!r}", cause)
                if self.folder
                else not_on_hub(self.name)
            ) from cause
        except FAILURES as cause:
            raise unreadable(f"the {part} of {self.name!r}", cause) from cause

    def pickled(self, cause: OSError) -> bool:
        """Tell whether there are no weights in safetensors, rather than none to be had now.

        ``cause`` is what transformers raised.
        """
        if self.folder:
            return not any(Path(self.name).glob("*.safetensors"))
        return "with `safetensors`" in str(cause) and not constants.HF_HUB_OFFLINE


def _require_depth(name: str, config: PreTrainedConfig) -> None:
    for part in (
        config.get_text_config(decoder=True),
        getattr(config, "vision_config", None),
        getattr(config, "audio_config", None),
    ):
        for count in ("num_hidden_layers", "depth"):
            if not 1 <= getattr(part, count, 1) <= _DEEPEST:
                raise LoadError(
                    f"{name!r} asks for {getattr(part, count)} blocks",
                    f"give 1 to {_DEEPEST:,} as {count} in its config.json",
                )


def _auto_class(name: str, config: PreTrainedConfig) -> type:
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    if AutoModelForCausalLM.__name__ in remote:  # what older remote code calls itself
        return AutoModelForCausalLM
    raise LoadError(
        f"{name!r} is a {config.model_type!r}, which answers no questions about pictures",
        "give a vision-language model",
    )


def _options(
    config: PreTrainedConfig, placed: torch.device | str, number: torch.dtype, quantise: str | None
) -> dict[str, object]:
    options = {"dtype": number, "device_map": placed if placed == "balanced" else {"": placed}}
    if quantise is None:
        return options
    require(
        getattr(config, "quantization_config", None) is None,
        f"quantise={quantise!r} of weights that are quantised already",
        "leave quantise out",
    )
    require_installed(
        "bitsandbytes", is_bitsandbytes_available(), f"quantise={quantise!r}", "load again"
    )
    if quantise == "8bit":
        return options | {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": number,
    }
    return options | {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}


def _embedded(
    name: str,
    placed: torch.device | str,
    number: torch.dtype,
    revision: str | None,
    quantise: str | None,
) -> VLM:
    plain = quantise is None and placed != "balanced"
    require(plain, f"{name} is small already", "load it without quantise, on one device")
    from xlvlms_tutorial.pocket.build import build  # the wheels behind it are asked for only here

    model, processor = build(name, revision, number)
    return VLM(model.to(placed), processor, name, revision)
