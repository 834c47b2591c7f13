"""Assemble pocket LLaVA.

The genuine LLaVA class around a small frozen tower, a small frozen language model, our projector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from xlvlms_tutorial.errors import LoadError, unknown_revision
from xlvlms_tutorial.io import load_tensors, read_json, save_tensors
from xlvlms_tutorial.pocket.encoders import ENCODERS, WEIGHTS, tower_state
from xlvlms_tutorial.pocket.languages import LANGUAGES, LanguageModel
from xlvlms_tutorial.pocket.linear import use_onednn
from xlvlms_tutorial.pocket.processor import PocketProcessor
from xlvlms_tutorial.pocket.tower import TowerConfig
from xlvlms_tutorial.pocket.variants import VARIANTS, Variant

SMOLLM2 = LANGUAGES["smollm2"]
_LARGE = 10_000_000  # bytes of a tokenizer's file
PLACEHOLDER = SMOLLM2.placeholder


def revisions(run: str = "image") -> list[str]:
    """List the shipped states of a training run, in order of training.

    The last is the trained connector.
    """
    return sorted(file.stem for file in (WEIGHTS / run).glob("step-*.safetensors"))


def adapter_folder(name: str) -> Path:
    """Find the folder of a shipped LoRA adapter.

    "pocket-place" (the last step) or "pocket-place@step-0040".

    Raises
    ------
    LoadError
        If the adapter has no such step, with those it has.
    """
    run, _, step = name.partition("@")
    steps = sorted(folder.name for folder in (WEIGHTS / run).glob("step-*"))
    step = step or (steps[-1] if steps else None)
    if step not in steps:
        raise unknown_revision(name, [f"{run}@{step}" for step in steps])
    return WEIGHTS / run / step


def training_record(run: str = "image") -> dict:
    """Read how a shipped connector was trained: seed, data, steps, loss, metrics.

    Parameters
    ----------
    run : str, default "image"
        The training run, such as ``VARIANTS["pocket-llava-video"].run``.

    Returns
    -------
    dict
        The record that training and measuring wrote beside the weights.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import training_record
    >>> record = training_record("image")
    >>> record["run"], record["data"]["n_scenes"]
    ('image', 10000)
    """
    return read_json(WEIGHTS / run / "training.json")


def connector_state(run: str = "image", revision: str | None = None) -> dict[str, torch.Tensor]:
    """Read the projector's weights at a training step (the last by default), float32.

    Raises
    ------
    LoadError
        If the run has no such revision, with those it has.
    """
    steps = revisions(run)
    revision = revision or (steps[-1] if steps else None)
    if revision not in steps:
        raise unknown_revision(revision, steps)
    tensors, metadata = load_tensors(WEIGHTS / run / f"{revision}.safetensors")
    stored = {name: weight.float() for name, weight in tensors.items()}
    if (start := metadata.get("start")) is None:
        return stored
    weights = {}
    for name, weight in connector_state(start, metadata.get("revision")).items():
        # matrices are stored in eight bits, with a scale for each row
        weights[name] = weight + stored[name] * stored.get(f"{name}.scale", 1)
    return weights


def save_change(state: dict[str, torch.Tensor], start: tuple[str, str | None], file: Path) -> None:
    """Write what training changed in the connector of another run.

    Matrices in eight bits with a scale for each row, half of float16.

    Parameters
    ----------
    state : dict of str to Tensor
        The trained weights by name.
    start : (str, str or None)
        The run and the step that training began with; None for the last step.
    file : pathlib.Path
        The file.
    """
    stored = {}
    for name, start_weight in connector_state(*start).items():
        change = state[name].detach().float().cpu() - start_weight
        if change.ndim == 1:
            stored[name] = change.half()
            continue
        scale = change.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        stored[name] = (change / scale).round().to(torch.int8)
        stored[f"{name}.scale"] = scale
    run, revision = start
    metadata = {"start": run}
    if revision is not None:
        metadata["revision"] = revision
    save_tensors(file, stored, metadata)


def pocket_config(folder: Path, tower: TowerConfig, placeholder: int) -> LlavaConfig:
    """Return LLaVA's configuration around the language model in ``folder`` and the tower.

    Parameters
    ----------
    folder : pathlib.Path
        The folder of the language model.
    tower : TowerConfig
        The shape of the tower.
    placeholder : int
        The token in whose places the image's states stand.

    Returns
    -------
    LlavaConfig
        The configuration.
    """
    return LlavaConfig(
        vision_config=tower,
        text_config=AutoConfig.from_pretrained(folder),
        image_token_index=placeholder,
        image_seq_length=tower.grid**2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def pocket_processor(
    folder: Path,
    tower: TowerConfig | None = None,
    reads: tuple[str, ...] = ("image",),
    language: LanguageModel = SMOLLM2,
) -> PocketProcessor:
    """Return LLaVA's processor for the tower's pictures and the language model's words.

    It works without torchvision.

    Parameters
    ----------
    folder : pathlib.Path
        The folder of the language model.
    tower : TowerConfig, optional
        The shape of the tower; by default that of pocket LLaVA.
    reads : tuple of str, default ("image",)
        What the connector reads: "image", "video", "audio".
    language : LanguageModel, optional
        The form of its prompts; by default that of SmolLM2.

    Returns
    -------
    PocketProcessor
        The processor.
    """
    tower = tower or TowerConfig()
    tokenizer = _tokenizer(folder)
    side = {"height": tower.image_size, "width": tower.image_size}
    pictures = CLIPImageProcessorPil(
        size=side, do_center_crop=False, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    processor = PocketProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="full",
        image_token=language.placeholder,
        chat_template=language.chat_template,
        reads=reads,
    )
    return processor


def build(
    name: str = "pocket-llava",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    variant: Variant | None = None,
) -> tuple[LlavaForConditionalGeneration, PocketProcessor]:
    """Build a pocket LLaVA and its processor.

    Parameters
    ----------
    name : str, default "pocket-llava"
        The model, a key of ``VARIANTS``.
    revision : str, optional
        The training step of its connector; by default the last.
    dtype : torch.dtype, default torch.float32
        The dtype of the weights.
    variant : Variant, optional
        A variant whose connector is left as it was initialised, for training; then ``name`` and
        ``revision`` are not used.

    Returns
    -------
    model : LlavaForConditionalGeneration
        The model, frozen.
    processor : PocketProcessor
        Its processor.

    Raises
    ------
    LoadError
        If too little memory is free for a large language model.
    """
    settings = variant or VARIANTS[name]
    language = LANGUAGES[settings.language]
    _require_memory(name, language, dtype)
    folder = language.folder()
    tower = ENCODERS[settings.encoder].config
    processor = pocket_processor(folder, tower, settings.reads, language)
    tokenizer = processor.tokenizer
    config = pocket_config(folder, tower, tokenizer.convert_tokens_to_ids(language.placeholder))
    weights, _ = load_tensors(folder / "model.safetensors")
    state = {_weight_name(key): weight for key, weight in weights.items()}
    for key, weight in tower_state(settings.encoder).items():
        state[f"model.vision_tower.{key}"] = weight
    if variant is None:
        for key, weight in connector_state(settings.run, revision).items():
            state[f"model.multi_modal_projector.{key}"] = weight
    with silence():
        model = LlavaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype
        )
    stops = tokenizer.convert_tokens_to_ids(list(language.stops))
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model = use_onednn(model).eval().requires_grad_(False)
    return model, processor


def _require_memory(name: str, language: LanguageModel, dtype: torch.dtype) -> None:
    """Refuse a language model that would not fit, before it is fetched or read."""
    # the stored weights, in two bytes each, stand beside those of the model for a moment
    needed = language.numbers * (2 + dtype.itemsize)
    free = psutil.virtual_memory().available
    if needed > free:
        raise LoadError(
            f"{name} in {str(dtype).removeprefix('torch.')} takes {needed / 1e6:,.0f} MB of "
            f"memory, and {free / 1e6:,.0f} MB are free",
            "close other programs, or load it in bfloat16 (smaller), or 'pocket-llava'",
        )


@contextmanager
def silence() -> Iterator[None]:
    """No bar for what takes half a second, and no report that the connector is new.

    A connector that is about to be trained is new.
    """
    bars_enabled = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars_enabled:
            logging.enable_progress_bar()


def _weight_name(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, padded on the left.

    A vocabulary as large as Gemma's takes most of the time in which the model is loaded, as
    ``from_pretrained`` reads its file several times, in Python. So it is read once, in Rust.
    """
    settings = {"padding_side": "left", "model_max_length": 8192}
    file = folder / "tokenizer.json"
    if file.stat().st_size < _LARGE:
        return AutoTokenizer.from_pretrained(folder, **settings)
    special = {}
    for name, value in read_json(folder / "tokenizer_config.json").items():
        if name in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            special[name] = value if isinstance(value, str) else value["content"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)), **settings, **special
    )
