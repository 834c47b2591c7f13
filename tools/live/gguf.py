"""Read the tensors of a GGUF file as the raw bytes that the kernels compute with.

gguf's own reader spends ten seconds on the vocabulary and gives the blocks anyway; this one
skips what is not a tensor.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TEXT, ARRAY = 8, 9
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of plain values
BLOCKS = {0: ("F32", 1, 4), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}  # name, values, bytes
ALIGNMENT = 32


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in the file: rows first, in blocks of a kind."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


class _Cursor:
    """A place in the file, moved on by what is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def skip(self, kind: int) -> None:
        """Pass over a value of the file's description."""
        if kind == TEXT:
            self.text()
        elif kind == ARRAY:
            inner, count = self.take("IQ")
            if inner in BYTES:
                self.at += count * BYTES[inner]
                return
            for _ in range(count):
                self.skip(inner)
        else:
            self.at += BYTES[kind]


def raw_tensors(path: Path) -> dict[str, RawTensor]:
    """Kind, shape and bytes of each tensor, by its name without ``.weight``.

    Raises
    ------
    ValueError
        If the file is no GGUF of version 3, or holds a kind of block that no kernel knows.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    magic, version, n_tensors, n_values = cursor.take("4sIQQ")
    if magic != b"GGUF" or version != 3:
        raise ValueError(f"{path} is no GGUF of version 3")
    for _ in range(n_values):
        cursor.text()
        cursor.skip(*cursor.take("I"))
    entries = []
    for _ in range(n_tensors):
        name, (dimensions,) = cursor.text(), cursor.take("I")
        entries.append((name, cursor.take(f"{dimensions}Q"), *cursor.take("IQ")))
    start = cursor.at + -cursor.at % ALIGNMENT
    tensors = {}
    for name, shape, kind, offset in entries:
        if kind not in BLOCKS:
            raise ValueError(f"{name} is in blocks of kind {kind}; kernels know {sorted(BLOCKS)}")
        block, values, size = BLOCKS[kind]
        count = int(np.prod(shape)) // values * size
        raw = np.frombuffer(data, np.uint8, count, start + offset)
        tensors[name.removesuffix(".weight")] = RawTensor(block, shape[::-1], raw)
    return tensors
