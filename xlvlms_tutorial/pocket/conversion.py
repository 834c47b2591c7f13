"""Convert a language model from its GGUF to a folder that ``from_pretrained`` reads in a moment.

Parsing the GGUF takes half a minute each time.
"""

import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from xlvlms_tutorial.errors import damaged_file, not_converted
from xlvlms_tutorial.io import as_json, read_json
from xlvlms_tutorial.pocket.cache import building, cache_dir, digest, hushed, put, quiet, say

_LIST = "files.json"
_QUANTISED = ("is_quantized", "quantization_method")
_STORED = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Form:
    """How a language model is converted.

    Parameters
    ----------
    name : str
        What the folder's name begins with.
    title : str
        What messages call the model.
    size : int
        Bytes of the folder, and of what is needed beside it while it is made.
    context : int
        The longest text, in tokens; a GGUF gives the tokenizer no limit.
    dtype : str
        In which numbers the weights are stored. float32 holds the dequantised values as they are;
        bfloat16 rounds them, and the model is then defined by the rounded ones.
    """

    name: str
    title: str
    size: int
    context: int
    dtype: str = "float32"


SMOLLM2 = Form("smollm2-135m-instruct", "SmolLM2-135M-Instruct", 545_000_000, 8192)


def converted_folder(
    sha256: str, source: Callable[[], Path | Sequence[Path]], form: Form = SMOLLM2
) -> Path:
    """Return the converted model's folder in the cache.

    Made from ``source()`` where it is missing or damaged: a file, or the parts of one in order. The
    folder's name holds the GGUF's ``sha256`` and transformers' version, as both decide what is
    written. Processes that ask at the same time wait for one conversion.

    Parameters
    ----------
    sha256 : str
        Of the whole GGUF.
    source : callable
        Returns the GGUF, or its parts in order; called only where the folder has to be made.
    form : Form, optional
        What the folder is called, how large it becomes and in which numbers weights are stored.

    Returns
    -------
    Path
        The folder, which ``from_pretrained`` takes.

    Raises
    ------
    LoadError
        If the written weights are not dense float32 of the model's shapes.
    AssetError
        If there is no space, or the cache folder cannot be written.
    """
    folder = _place(sha256, form)
    if _damage(folder) is None:
        return folder
    parts = source()
    with building(folder, form.size) as build:
        fault = _damage(folder)  # another process may have built it while this one waited
        if fault is not None:
            say(f"{fault}: converting {form.title} to safetensors in {folder.parent}, once.")
            with _whole(parts, sha256, build) as file:
                convert(file, build, form)
            files = {path.name: [path.stat().st_size, digest(path)] for path in build.iterdir()}
            (build / _LIST).write_text(as_json(files), encoding="utf-8")
            put(build, folder)
    return folder


def is_converted(sha256: str, form: Form = SMOLLM2) -> bool:
    """Whether the converted model is there, whole."""
    return _damage(_place(sha256, form)) is None


def _place(sha256: str, form: Form = SMOLLM2) -> Path:
    release = importlib.metadata.version("transformers")
    return cache_dir() / f"{form.name}-{sha256[:12]}-transformers-{release}"


@contextmanager
def _whole(parts: Path | Sequence[Path], sha256: str, build: Path) -> Iterator[Path]:
    """One file from its parts, below the folder that is being built, and gone afterwards."""
    if isinstance(parts, Path):
        yield parts
        return
    file = build / "joined.gguf"
    with file.open("wb") as joined:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined, 1 << 20)
    actual = digest(file)
    if actual != sha256:
        raise damaged_file(
            f"what {parts[0].name} and its parts make", sha256, actual, "xlvlms fetch"
        )
    try:
        yield file
    finally:
        file.unlink()


def convert(source: Path, target: Path, form: Form = SMOLLM2) -> None:
    """Write model and tokenizer of a GGUF into ``target`` as dense safetensors.

    SmolLM2 in float32, because nothing shorter holds the dequantised values: bfloat16 changes 82 %
    of its weights and float16 48 %. Rounded weights would make "float32" results depend on the way
    they were stored.

    Parameters
    ----------
    source : Path
        The GGUF.
    target : Path
        An empty folder.
    form : Form, optional
        As for :func:`converted_folder`.

    Raises
    ------
    LoadError
        If the written weights are not dense and of the model's shapes.
    """
    import torch  # these imports are slow, and needed once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = source.parent
    with (
        _silent_pages(),
        tqdm(total=3, desc="reading the tokenizer", unit="step", disable=quiet()) as bar,
    ):
        AutoTokenizer.from_pretrained(
            folder, gguf_file=source.name, model_max_length=form.context
        ).save_pretrained(target)
        _next_step(bar, "reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=source.name, dtype=getattr(torch, form.dtype)
        )
        _next_step(bar, "writing the weights")
        _forget_quantisation(model).save_pretrained(target, max_shard_size="2GB")
        _check(
            target / "model.safetensors",
            {name: tuple(weight.shape) for name, weight in model.named_parameters()},
            source,
            _STORED[form.dtype],
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


def _check(file: Path, shapes: dict[str, tuple[int, ...]], source: Path, kind: str) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        written = {}
        for name in stored.keys():  # noqa: SIM118
            part = stored.get_slice(name)
            written[name] = (tuple(part.get_shape()), part.get_dtype())
    # tied weights are one parameter, stored once
    expected = {name: (shape, kind) for name, shape in shapes.items()}
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
