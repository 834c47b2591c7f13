"""Masks over the weights of a decoder, one bit a weight: True where a weight is kept.

Their algebra, and how much they share.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from xlvlms_tutorial.errors import ActivationsError, ComparisonError, RecordError, SelectionError
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.models.vlm import VLM

# a layer (1 to L), and the name of a linear map within its block, such as "self_attn.q_proj"
Key = tuple[int, str]
_FORMAT = "xlvlms masks 1"


class Masks:
    """Which weights are kept (True), for every linear map of the decoder blocks.

    In one bit a weight. Each mask has the shape of the map's own ``weight``: (out, in) in
    nn.Linear, (in, out) in the Conv1D of GPT-2. Masks of the same maps are combined weight by
    weight: ``a & b`` is kept in both, ``a | b`` in either, ``a - b`` in a and not in b. The
    subnetwork that all of several tasks activate (alpha-SubNet; Shukor and Cord, 2024, arXiv
    2405.16700) is ``a & b & c``: its sparsity is never below theirs. Models may differ in name, as
    those with other connectors to one language model do, but not in the masked maps' weights.

    Parameters
    ----------
    packed
        For each ``(layer, map)`` the bits of its flattened mask, eight a byte, the
        first in the highest bit; the bits that fill up the last byte are 0.
        :meth:`pack` makes them from booleans.
    shapes
        For each ``(layer, map)`` the shape of its weight.
    model, fingerprint
        The name of the model, and what tells its weights from any others:
        :func:`~xlvlms_tutorial.methods.pruning.calibration.fingerprint`.

    Raises
    ------
    SelectionError
        If there are no masks, or bytes and shapes do not go together.
    """

    __hash__ = None

    def __init__(
        self,
        packed: Mapping[Key, np.ndarray],
        shapes: Mapping[Key, tuple[int, int]],
        model: str,
        fingerprint: str,
    ) -> None:
        if not packed or packed.keys() != shapes.keys():
            raise SelectionError(
                f"{len(packed)} masks with {len(shapes)} shapes",
                "give one shape for each mask, and at least one mask",
            )
        for (layer, name), bits in packed.items():
            rows, columns = shapes[layer, name]
            size = rows * columns if min(layer, rows, columns) > 0 else 0
            spare = -size % 8
            if (
                not size
                or bits.dtype != np.uint8
                or bits.shape != ((size + 7) // 8,)
                or (spare and bits[-1] & ((1 << spare) - 1))
            ):
                allowed = (
                    f"give {(size + 7) // 8} bytes (uint8), their last {spare} "
                    "bits 0, and layers from 1 on"
                )
                raise SelectionError(
                    (
                        f"the packed mask of layer {layer} {name}, {rows} x {columns}, "
                        f"is {bits.dtype} {bits.shape}"
                    ),
                    allowed,
                )
        self.packed, self.shapes = dict(packed), {key: tuple(shapes[key]) for key in packed}
        self.model, self.fingerprint = model, fingerprint

    @staticmethod
    def pack(
        masks: Mapping[Key, Bool[Tensor, "rows columns"]], model: str, fingerprint: str
    ) -> "Masks":
        """Masks from booleans for each ``(layer, map)``, in the shape of its weight."""
        shapes = {key: tuple(mask.shape) for key, mask in masks.items()}
        return Masks({key: packed(mask) for key, mask in masks.items()}, shapes, model, fingerprint)

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.packed)

    def __repr__(self) -> str:
        return (
            f"Masks of {self.model}: {len(self)} linear maps, {self.n_weights:,} "
            f"weights, {self.sparsity:.1%} dropped"
        )

    def unpack(self, layer: int, name: str) -> Bool[Tensor, "rows columns"]:
        """The mask of one linear map in the shape of its weight, on the CPU.

        True where a weight is kept.

        Raises
        ------
        SelectionError
            If there is no mask of this map.
        """
        if (layer, name) not in self.packed:
            names = ", ".join(dict.fromkeys(known for _, known in self.packed))
            layers = f"layers {min(self.packed)[0]} to {max(self.packed)[0]}"
            raise SelectionError(
                f"no mask of layer {layer} {name!r}", f"there are {layers}, with {names}"
            )
        shape = self.shapes[layer, name]
        bits = np.unpackbits(self.packed[layer, name], count=shape[0] * shape[1])
        return torch.from_numpy(bits.view(np.bool_)).reshape(shape)

    def tensors(self, vlm: VLM) -> dict[str, Bool[Tensor, "rows columns"]]:
        """All masks by module name, as ``interventions.mask_weights`` takes them.

        One byte a weight.

        Raises
        ------
        ComparisonError
            If the model has no such linear map, or one of another shape.
        """
        names = {module: name for name, module in vlm.model.named_modules()}
        found = {}
        for layer, name in self:
            block = vlm.blocks[layer - 1] if layer <= vlm.n_layers else None
            module = dict(block.named_modules()).get(name) if block is not None else None
            shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
            if shape != self.shapes[layer, name]:
                advice = "use the masks with the model that they were made for"
                raise ComparisonError(
                    f"shapes of layer {layer} {name}",
                    self.shapes[layer, name],
                    shape or "no such map",
                    advice,
                )
            found[names[module]] = self.unpack(layer, name)
        return found

    @cached_property
    def n_weights(self) -> int:
        """How many weights the masks are over."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @cached_property
    def n_kept(self) -> int:
        """How many weights are kept."""
        return sum(map(_ones, self.packed.values()))

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.n_kept / self.n_weights

    @property
    def sparsity(self) -> float:
        """Share of the weights that are dropped."""
        return 1 - self.density

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the bits take."""
        return sum(bits.nbytes for bits in self.packed.values())

    def __and__(self, other: "Masks") -> "Masks":
        return self._with(other, np.bitwise_and)

    def __or__(self, other: "Masks") -> "Masks":
        return self._with(other, np.bitwise_or)

    def __sub__(self, other: "Masks") -> "Masks":
        return self._with(other, lambda one, two: one & ~two)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        same = self.fingerprint == other.fingerprint and self.shapes == other.shapes
        return same and all(
            np.array_equal(bits, other.packed[key]) for key, bits in self.packed.items()
        )

    def iou(self, other: "Masks") -> pd.DataFrame:
        r"""Overlap of the kept weights of each linear map, counted in the packed bits.

        :math:`|K_1 \cap K_2| / |K_1 \cup K_2|`. Columns layer, linear, iou, n_both and n_either
        (weights kept by both masks, and by at least one).

        Raises
        ------
        ComparisonError
            If the masks are of other weights, maps or shapes.
        ActivationsError
            If neither mask keeps a weight of some map: then the ratio has no value.
        """
        self._require_same(other)
        rows = []
        for (layer, name), one in self.packed.items():
            two = other.packed[layer, name]
            both, either = _ones(one & two), _ones(one | two)
            if not either:
                raise ActivationsError(
                    f"neither mask keeps a weight of layer {layer} {name}",
                    "compare masks that keep some of each map",
                )
            rows.append((layer, name, both / either, both, either))
        return pd.DataFrame(rows, columns=["layer", "linear", "iou", "n_both", "n_either"])

    def save(self, path: str | Path) -> Path:
        """Write the bits to one file of safetensors, which is whole or absent.

        With shapes, sparsity, the model's name and fingerprint.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        told = {
            "format": _FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "sparsity": repr(self.sparsity),
        }
        told["shapes"] = json.dumps([(*key, *shape) for key, shape in self.shapes.items()])
        return save_tensors(path, {_stored(key): bits for key, bits in self.packed.items()}, told)

    @staticmethod
    def load(path: str | Path) -> "Masks":
        """Read what ``save`` wrote.

        Raises
        ------
        RecordError
            If there is no such file, or it is no file of masks, or is damaged.
        """
        try:
            arrays, told = load_tensors(path, "np")
            if told.get("format") != _FORMAT:
                raise RecordError(path, "no file of masks")
            shapes = {
                (int(layer), str(name)): (int(rows), int(columns))
                for layer, name, rows, columns in json.loads(told["shapes"])
            }
            return Masks(
                {key: arrays[_stored(key)] for key in shapes},
                shapes,
                told["model"],
                told["fingerprint"],
            )
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as cause:
            raise (
                cause
                if isinstance(cause, RecordError)
                else RecordError(path, f"no file of masks, or damaged ({cause})")
            ) from cause

    def _with(
        self, other: "Masks", combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> "Masks":
        self._require_same(other)
        found = {key: combine(bits, other.packed[key]) for key, bits in self.packed.items()}
        return Masks(found, self.shapes, joined(self.model, other.model), self.fingerprint)

    def _require_same(self, other: "Masks") -> None:
        advice = "compare masks of the same weights, those of the same linear maps"
        if self.fingerprint != other.fingerprint:
            raise ComparisonError("weights behind two masks", self, other, advice)
        for layer, name in {**self.shapes, **other.shapes}:
            one, two = (masks.shapes.get((layer, name), "absent") for masks in (self, other))
            if one != two:
                raise ComparisonError(f"masks of layer {layer} {name}", one, two, advice)


def overlap_by_map(masks: Mapping[str, Masks]) -> pd.DataFrame:
    """:meth:`Masks.iou` of every pair of masks.

    The pair's names are in the columns ``one`` and ``other``.

    Raises
    ------
    SelectionError
        If there are fewer than two masks.
    ComparisonError, ActivationsError
        As :meth:`Masks.iou`.
    """
    if len(masks) < 2:
        raise SelectionError(f"{len(masks)} masks", "give two or more, by name")
    pairs = [(one, other, masks[one].iou(masks[other])) for one, other in combinations(masks, 2)]
    return pd.concat(
        [table.assign(one=one, other=other) for one, other, table in pairs], ignore_index=True
    )


def overlap(masks: Mapping[str, Masks]) -> pd.DataFrame:
    """IoU of every pair of masks as a symmetric table, names by names.

    The mean over the maps of a layer, then over layers. Maps count alike, whatever their number
    of weights, as in Shukor and Cord (2024). Masks drawn by chance have
    :func:`independent_iou`, and are what to compare with.

    Raises
    ------
    SelectionError, ComparisonError, ActivationsError
        As :func:`overlap_by_map`.
    """
    table = overlap_by_map(masks)
    means = table.groupby(["one", "other", "layer"])["iou"].mean().groupby(["one", "other"]).mean()
    found = pd.DataFrame(1.0, index=list(masks), columns=list(masks))
    for (one, other), value in means.items():
        found.loc[one, other] = found.loc[other, one] = value
    return found


def independent_iou(kept: float) -> float:
    r"""Expected overlap of two masks that keep a share k of the weights by chance.

    :math:`k^2 / (2k - k^2) = k / (2 - k)`.

    Raises
    ------
    SelectionError
        If the share is not in (0, 1].
    """
    if not 0 < kept <= 1:
        raise SelectionError(f"a share kept of {kept}", "give a share above 0 and at most 1")
    return kept / (2 - kept)


def joined(one: str, other: str) -> str:
    """The names of the models behind what is made of two, each once."""
    return " + ".join(dict.fromkeys([*one.split(" + "), *other.split(" + ")]))


def packed(mask: Bool[Tensor, "rows columns"]) -> np.ndarray:
    """The bits of a flattened mask, as :class:`Masks` keeps them."""
    return np.packbits(mask.contiguous().cpu().numpy())


def _ones(bits: np.ndarray) -> int:
    if not hasattr(np, "bitwise_count"):  # NumPy 1
        return int.from_bytes(bits.tobytes(), "little").bit_count()
    whole = len(bits) // 8 * 8  # eight bytes at once; the few at the end one by one
    return int(np.bitwise_count(bits[:whole].view(np.uint64)).sum()) + int(
        np.bitwise_count(bits[whole:]).sum()
    )


def _stored(key: Key) -> str:
    return f"{key[0]}/{key[1]}"
