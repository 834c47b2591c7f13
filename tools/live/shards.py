"""Write tensors into shards that a page loads over http and from disk alike, and read them back.

A page opened from disk may fetch nothing, but it may load scripts that lie beside it. So a shard is
a script, ``liveShard("name", "bytes")``, whose text is read byte by byte (charset x-user-defined).
Four values are escaped, which costs 2 %; base64 would cost 33 %.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.pocket.cache import building, cache_dir, digest, put

SIZE = 12 * 2**20  # bytes of a shard before it is escaped
ALIGNMENT = 16
MANIFEST = "manifest.json"
ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
ESCAPES = {b"\\": b"\\\\", b'"': b'\\"', b"\n": b"\\n", b"\r": b"\\r"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the pack: its name, how its bytes are meant, and the bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


def escaped(raw: bytes) -> bytes:
    """Write bytes as the inside of a script's string."""
    for plain, instead in ESCAPES.items():  # the backslash comes first
        raw = raw.replace(plain, instead)
    return raw


def read_shard(path: Path) -> bytes:
    """Read the bytes of a shard back from its script."""
    script = path.read_bytes()
    text = script[script.index(b'"') + 1 : script.rindex(b'"')]
    letters = {b"n": b"\n", b"r": b"\r"}
    return ESCAPED.sub(lambda match: letters.get(match[1], match[1]), text)


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """Read one float32 tensor of a pack."""
    manifest = read_json(folder / MANIFEST)
    tensor = manifest["tensors"][name]
    first, last = tensor["at"] // SIZE, (tensor["at"] + tensor["bytes"] - 1) // SIZE
    files = [shard["file"] for shard in manifest["shards"][first : last + 1]]
    raw = b"".join(read_shard(folder / file) for file in files)
    start = tensor["at"] - first * SIZE
    values = np.frombuffer(raw[start : start + tensor["bytes"]], np.float32)
    return values.reshape(tensor["shape"])


def write_shards(
    folder: Path, tensors: Iterable[Tensor], settings: Mapping[str, object]
) -> dict[str, object]:
    """Write tensors as shards and a manifest that says what lies where; return the manifest."""
    where, parts, at = {}, [], 0
    for tensor in tensors:
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).tobytes()
        where[tensor.name] = {
            "kind": tensor.kind,
            "at": at,
            "bytes": len(raw),
            "shape": list(tensor.shape),
        }
        parts.append(raw + bytes(-len(raw) % ALIGNMENT))
        at += len(parts[-1])
    whole = b"".join(parts)
    shards = []
    for start in range(0, len(whole), SIZE):
        raw = whole[start : start + SIZE]
        sha256 = hashlib.sha256(raw).hexdigest()
        name = sha256[:16]
        script = b"liveShard('" + name.encode() + b"', \"" + escaped(raw) + b'")\n'
        (folder / f"{name}.js").write_bytes(script)
        shards.append(
            {
                "file": f"{name}.js",
                "bytes": len(raw),
                "sha256": sha256,
                "script": hashlib.sha256(script).hexdigest(),
            }
        )
    manifest = {"bytes": len(whole), "tensors": where, "shards": shards, **settings}
    write_json(folder / MANIFEST, manifest, indent=0)
    return manifest


def cached_shards(
    name: str,
    tensors: Callable[[], Iterable[Tensor]],
    settings: Mapping[str, object],
    needed: int,
) -> Path:
    """Return the folder of a pack in the cache, made once; a damaged one is made anew.

    Parameters
    ----------
    name : str
        The folder's name, with the digests of what the pack is made of.
    tensors : function
        Gives the tensors; called where the pack is missing or damaged.
    settings : mapping
        What the manifest says besides.
    needed : int
        Bytes that must be free.

    Raises
    ------
    AssetError
        If there is no space, or the cache folder cannot be written.
    """
    folder = cache_dir() / name
    if is_whole(folder):
        return folder
    with building(folder, needed) as build:
        if not is_whole(folder):  # another process may have made it meanwhile
            write_shards(build, tensors(), settings)
            put(build, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder has a manifest and every shard as it was written."""
    try:
        shards = read_json(folder / MANIFEST)["shards"]
        return all(digest(folder / shard["file"]) == shard["script"] for shard in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def joined(manifests: Iterable[Mapping]) -> dict[str, object]:
    """One manifest for several packs, whose shards are loaded one after the other."""
    result = {"bytes": 0, "tensors": {}, "shards": []}
    for manifest in manifests:
        for name, tensor in manifest["tensors"].items():
            result["tensors"][name] = {**tensor, "at": tensor["at"] + result["bytes"]}
        result["shards"] += manifest["shards"]
        result["bytes"] += manifest["bytes"]
        others = manifest.keys() - result.keys()
        result |= {key: manifest[key] for key in sorted(others)}
    return result
