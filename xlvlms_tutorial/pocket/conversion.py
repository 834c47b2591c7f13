"""Convert SmolLM2 from its GGUF to a folder that ``from_pretrained`` reads in a moment.

Parsing the GGUF takes half a minute each time.
"""

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from xlvlms_tutorial.errors import not_converted
from xlvlms_tutorial.io import as_json, read_json
from xlvlms_tutorial.pocket.cache import building, cache_dir, digest, hushed, put, quiet, say

CONTEXT = 8192  # tokens SmolLM2 was trained for; its GGUF gives the tokenizer no limit
_LIST = "files.json"
_BYTES = 545_000_000
_QUANTISED = ("is_quantized", "quantization_method")


def converted_folder(sha256: str, source: Callable[[], Path]) -> Path:
    """Return the converted model's folder in the cache.

    Made from ``source()`` where it is missing or damaged. The folder's name holds the GGUF's
    ``sha256`` and transformers' version, as both decide what is written. Processes that ask at the
    same time wait for one conversion.

    Raises
    ------
    LoadError
        If the written weights are not dense float32 of the model's shapes.
    AssetError
        If there is no space, or the cache folder cannot be written.
    """
    folder = _place(sha256)
    if _damage(folder) is None:
        return folder
    file = source()
    with building(folder, _BYTES) as build:
        fault = _damage(folder)  # another process may have built it while this one waited
        if fault is not None:
            say(
                f"{fault}: converting SmolLM2-135M-Instruct to safetensors "
                f"in {folder.parent}, once."
            )
            convert(file, build)
            files = {path.name: [path.stat().st_size, digest(path)] for path in build.iterdir()}
            (build / _LIST).write_text(as_json(files), encoding="utf-8")
            put(build, folder)
    return folder


def is_converted(sha256: str) -> bool:
    """Whether the converted model is there, whole."""
    return _damage(_place(sha256)) is None


def _place(sha256: str) -> Path:
    return cache_dir() / (
        f"smollm2-135m-instruct-{sha256[:12]}"
        f"-transformers-{importlib.metadata.version('transformers')}"
    )


def convert(source: Path, target: Path) -> None:
    """Write model and tokenizer of a Llama-like GGUF into ``target`` as dense float32 safetensors.

    float32, because nothing shorter holds the dequantised values: bfloat16 changes 82 %
    of SmolLM2's weights and float16 48 %. Rounded weights would make "float32" results
    depend on the way they were stored.

    Raises
    ------
    LoadError
        If the written weights are not dense float32 of the model's shapes.
    """
    import torch  # these imports are slow, and needed once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = source.parent
    with (
        _silent_pages(),
        tqdm(total=3, desc="reading the tokenizer", unit="step", disable=quiet()) as bar,
    ):
        AutoTokenizer.from_pretrained(
            folder, gguf_file=source.name, model_max_length=CONTEXT
        ).save_pretrained(target)
        _next_step(bar, "reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=source.name, dtype=torch.float32
        )
        _next_step(bar, "writing the weights")
        _forget_quantisation(model).save_pretrained(target, max_shard_size="2GB")
        _check(
            target / "model.safetensors",
            {name: tuple(weight.shape) for name, weight in model.named_parameters()},
            source,
        )
        _next_step(bar, "done")
    # written for its owner only, but a cache may be shared
    (target / "model.safetensors").chmod(0o644)


@contextmanager
def _silent_pages() -> Iterator[None]:
    """Nothing of what transformers says while it reads and writes a model.

    Where bars are unwanted; also nothing of what it shows.
    """
    from transformers import logging

    level = logging.get_verbosity()
    with hushed(), warnings.catch_warnings():
        if quiet():
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _next_step(bar: tqdm, description: str) -> None:
    bar.update()
    bar.set_description(description)


def _forget_quantisation(model: object) -> object:
    # The weights are dense after loading, but transformers refuses to save a model
    # that still says it is quantised.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    for name in _QUANTISED:
        model.__dict__.pop(name, None)
    return model


def _check(file: Path, shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        written = {}
        for name in stored.keys():  # noqa: SIM118
            part = stored.get_slice(name)
            written[name] = (tuple(part.get_shape()), part.get_dtype())
    # tied weights are one parameter, stored once
    expected = {name: (shape, "F32") for name, shape in shapes.items()}
    for name in sorted(expected.keys() | written.keys()):
        if expected.get(name) != written.get(name):
            raise not_converted(
                source, f"{name} was written as {written.get(name)} instead of {expected.get(name)}"
            )


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted folder, None if it is as it was written."""
    try:
        files = read_json(folder / _LIST)
        files = {name: (int(size), str(sha256)) for name, (size, sha256) in files.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{folder.name} has no list of its files" if os.path.isdir(folder) else "first use"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not os.path.isfile(path):
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged ({path.stat().st_size} bytes instead of {size})"
        if digest(path) != sha256:
            return f"{path} is damaged (sha256 {digest(path)} instead of {sha256})"
    return None
