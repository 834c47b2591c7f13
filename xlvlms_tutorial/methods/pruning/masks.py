"""Masks over the weights of a decoder, with their algebra and their overlap.

One bit a weight: True where a weight is kept.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import combinations
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from xlvlms_tutorial.errors import FileError, InputError, damaged_record, incomparable
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_equal

# a layer (1 to L), and the name of a linear map within its block, such as "self_attn.q_proj"
Key = tuple[int, str]
_FORMAT = "xlvlms masks 1"


class Masks:
    """Masks over the linear maps of the decoder blocks: True where a weight is kept.

    Made by :func:`wanda`, :func:`magnitude` and the like. Use them to compare which weights matter
    for pictures, texts or tasks, or to prune a model with :func:`apply_masks`. A mask takes one bit
    a weight and has the shape of the map's own ``weight``: (out, in) in nn.Linear, (in, out) in the
    Conv1D of GPT-2.

    Masks of the same maps are combined weight by weight: ``a & b`` is kept in both, ``a | b`` in
    either, ``a - b`` in a and not in b. The subnetwork that all of several tasks activate
    (alpha-SubNet; Shukor and Cord, 2024, arXiv 2405.16700) is ``a & b & c``: its sparsity is never
    below theirs. Models may differ in name, as those with other connectors to one language model
    do, but not in the masked maps' weights.

    Parameters
    ----------
    packed : mapping of (layer, map) to ndarray
        The bits of each flattened mask, eight a byte (uint8), the first in the highest bit; the
        bits that fill up the last byte are 0. :meth:`pack` makes them from booleans.
    shapes : mapping of (layer, map) to (int, int)
        The shape of each map's weight.
    model : str
        The name of the model.
    fingerprint : str
        What tells its weights from any others:
        :func:`~xlvlms_tutorial.methods.pruning.calibration.fingerprint`.

    Raises
    ------
    InputError
        If there are no masks, or bytes and shapes do not go together.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.pruning import Masks
    >>> key = (1, "mlp.up_proj")
    >>> kept = torch.tensor([[True, True, False, False], [True, False, False, False]])
    >>> captions = Masks.pack({key: kept}, "small", "f")
    >>> answers = Masks.pack({key: kept.flip(1)}, "small", "f")
    >>> captions
    Masks of small: 1 linear maps, 8 weights, 62.5% dropped
    >>> (captions | answers).unpack(1, "mlp.up_proj").tolist()
    [[True, True, True, True], [True, False, False, True]]
    >>> captions.iou(answers)[["layer", "linear", "n_both", "n_either"]].values.tolist()
    [[1, 'mlp.up_proj', 0, 6]]

    A file of masks gives the same masks again:

    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> path = captions.save(Path(mkdtemp()) / "captions.safetensors")
    >>> Masks.load(path) == captions
    True
    """

    __hash__ = None

    def __init__(
        self,
        packed: Mapping[Key, np.ndarray],
        shapes: Mapping[Key, tuple[int, int]],
        model: str,
        fingerprint: str,
    ) -> None:
        require(
            packed and packed.keys() == shapes.keys(),
            f"{len(packed)} masks with {len(shapes)} shapes",
            "give one shape for each mask, and at least one mask",
        )
        for (layer, name), bits in packed.items():
            _require_packed(bits, layer, name, shapes[layer, name])
        self.packed = dict(packed)
        self.shapes = {key: tuple(shapes[key]) for key in packed}
        self.model = model
        self.fingerprint = fingerprint

    @staticmethod
    def pack(
        masks: Mapping[Key, Bool[Tensor, "rows columns"]], model: str, fingerprint: str
    ) -> "Masks":
        """Make masks from booleans.

        Parameters
        ----------
        masks : mapping of (layer, map) to Tensor
            Each mask in the shape of the map's weight, True where a weight is kept.
        model : str
            The name of the model.
        fingerprint : str
            What tells its weights from any others.

        Returns
        -------
        Masks
            The same masks, one bit a weight.
        """
        bits = {}
        shapes = {}
        for key, mask in masks.items():
            bits[key] = packed(mask)
            shapes[key] = tuple(mask.shape)
        return Masks(bits, shapes, model, fingerprint)

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
        """Give the mask of one linear map as booleans, True where a weight is kept.

        Parameters
        ----------
        layer : int
            The layer, from 1 to L.
        name : str
            The name of the linear map within its block, such as "self_attn.q_proj".

        Returns
        -------
        Tensor
            Of the shape of the map's weight, on the CPU.

        Raises
        ------
        InputError
            If there is no mask of this map.
        """
        if (layer, name) not in self.packed:
            map_names = ", ".join(dict.fromkeys(map_name for _, map_name in self.packed))
            first, _ = min(self.packed)
            last, _ = max(self.packed)
            raise InputError(
                f"no mask of layer {layer} {name!r}",
                f"there are layers {first} to {last}, with {map_names}",
            )
        rows, columns = self.shapes[layer, name]
        bits = np.unpackbits(self.packed[layer, name], count=rows * columns)
        return torch.from_numpy(bits.view(np.bool_)).reshape(rows, columns)

    def tensors(self, vlm: VLM) -> dict[str, Bool[Tensor, "rows columns"]]:
        """Give all masks as booleans, for ``interventions.mask_weights``.

        Use them to mask a model for a while. They take one byte a weight.

        Parameters
        ----------
        vlm : VLM
            The model, by whose module names the masks are called.

        Returns
        -------
        dict of str to Tensor
            The mask of each linear map by the map's name in ``vlm.model``.

        Raises
        ------
        InputError
            If the model has no such linear map, or one of another shape.

        Examples
        --------
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from xlvlms_tutorial import VLM
        >>> from xlvlms_tutorial.methods.pruning import magnitude_masks
        >>> config = LlamaConfig(
        ...     vocab_size=8,
        ...     hidden_size=8,
        ...     intermediate_size=12,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> small = VLM(LlamaForCausalLM(config), None, "small")
        >>> tensors = magnitude_masks(small, sparsity=0.5, layers=1).tensors(small)
        >>> tuple(tensors["model.layers.0.mlp.up_proj"].shape)
        (12, 8)
        """
        names = module_names(vlm)
        tensors = {}
        for layer, name in self:
            module = None
            if layer <= vlm.n_layers:
                module = dict(vlm.blocks[layer - 1].named_modules()).get(name)
            weight = getattr(module, "weight", None)
            shape = tuple(getattr(weight, "shape", ()))
            require_equal(
                f"shapes of layer {layer} {name}",
                self.shapes[layer, name],
                shape or "no such map",
                "use the masks with the model that they were made for",
            )
            tensors[names[module]] = self.unpack(layer, name)
        return tensors

    @cached_property
    def n_weights(self) -> int:
        """The number of weights that the masks are over."""
        return sum(map(prod, self.shapes.values()))

    @cached_property
    def n_kept(self) -> int:
        """The number of weights that are kept."""
        return sum(map(_ones, self.packed.values()))

    @property
    def density(self) -> float:
        """The share of the weights that are kept, from 0 to 1."""
        return self.n_kept / self.n_weights

    @property
    def sparsity(self) -> float:
        """The share of the weights that are dropped, from 0 to 1."""
        return 1 - self.density

    @property
    def nbytes(self) -> int:
        """The memory that the bits take, in bytes."""
        return sum(bits.nbytes for bits in self.packed.values())

    def __and__(self, other: "Masks") -> "Masks":
        return self._with(other, np.bitwise_and)

    def __or__(self, other: "Masks") -> "Masks":
        return self._with(other, np.bitwise_or)

    def __sub__(self, other: "Masks") -> "Masks":
        return self._with(other, lambda first, second: first & ~second)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        if self.fingerprint != other.fingerprint or self.shapes != other.shapes:
            return False
        return all(np.array_equal(bits, other.packed[key]) for key, bits in self.packed.items())

    def iou(self, other: "Masks") -> pd.DataFrame:
        r"""Measure the overlap of the kept weights of each linear map.

        Intersection over union, :math:`|K_1 \cap K_2| / |K_1 \cup K_2|`, counted in the packed
        bits. Use :func:`mask_overlap` for one number a pair of masks.

        Parameters
        ----------
        other : Masks
            Masks of the same weights and maps.

        Returns
        -------
        DataFrame
            One row for each linear map. Columns ``layer``; ``linear``, the map's name; ``iou``,
            from 0 to 1; ``n_both`` and ``n_either``, the numbers of weights kept by both masks and
            by at least one.

        Raises
        ------
        InputError
            If the masks are of other weights, maps or shapes. If neither mask keeps a weight of
            some map: then the ratio has no value.
        """
        self._require_same(other)
        rows = []
        for (layer, name), bits in self.packed.items():
            other_bits = other.packed[layer, name]
            both = _ones(bits & other_bits)
            either = _ones(bits | other_bits)
            require(
                either,
                f"neither mask keeps a weight of layer {layer} {name}",
                "compare masks that keep some of each map",
            )
            rows.append((layer, name, both / either, both, either))
        return pd.DataFrame(rows, columns=["layer", "linear", "iou", "n_both", "n_either"])

    def save(self, path: str | Path) -> Path:
        """Write the masks to one file of safetensors, which is whole or absent.

        With shapes, sparsity, the model's name and fingerprint.

        Parameters
        ----------
        path : str or Path
            The file to write or to replace.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        FileError
            If the file cannot be written.
        """
        shapes = [(*key, *shape) for key, shape in self.shapes.items()]
        metadata = {
            "format": _FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "sparsity": repr(self.sparsity),
            "shapes": json.dumps(shapes),
        }
        arrays = {_stored(key): bits for key, bits in self.packed.items()}
        return save_tensors(path, arrays, metadata)

    @staticmethod
    def load(path: str | Path) -> "Masks":
        """Read the masks that :meth:`save` wrote.

        Parameters
        ----------
        path : str or Path
            The file.

        Returns
        -------
        Masks
            Equal to those that were saved.

        Raises
        ------
        FileError
            If there is no such file, or it is no file of masks, or is damaged.
        """
        try:
            arrays, metadata = load_tensors(path, "np")
            if metadata.get("format") != _FORMAT:
                raise damaged_record(path, "no file of masks")
            shapes = {}
            for layer, name, rows, columns in json.loads(metadata["shapes"]):
                shapes[int(layer), str(name)] = (int(rows), int(columns))
            packed = {key: arrays[_stored(key)] for key in shapes}
            return Masks(packed, shapes, metadata["model"], metadata["fingerprint"])
        except FileError:
            raise
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as cause:
            raise damaged_record(path, f"no file of masks, or damaged ({cause})") from cause

    def _with(
        self, second: "Masks", combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> "Masks":
        self._require_same(second)
        packed = {}
        for key, bits in self.packed.items():
            packed[key] = combine(bits, second.packed[key])
        return Masks(packed, self.shapes, joined(self.model, second.model), self.fingerprint)

    def _require_same(self, second: "Masks") -> None:
        advice = "compare masks of the same weights, those of the same linear maps"
        if self.fingerprint != second.fingerprint:
            raise incomparable("weights behind two masks", self, second, advice)
        for key in {**self.shapes, **second.shapes}:
            shape = self.shapes.get(key, "absent")
            second_shape = second.shapes.get(key, "absent")
            require_equal(f"masks of layer {key[0]} {key[1]}", shape, second_shape, advice)


def mask_overlap(masks: Mapping[str, Masks]) -> pd.DataFrame:
    """Measure the overlap of every pair of masks by the intersection over union (IoU).

    Use it to compare which weights several inputs or tasks activate, as Shukor and Cord, 2024
    (arXiv 2405.16700). The IoU is the mean over the maps of a layer, then over layers. Maps count
    alike, whatever their number of weights. Masks drawn by chance have :func:`independent_iou`, and
    are what to compare with.

    Parameters
    ----------
    masks : mapping of str to Masks
        Two or more masks of the same weights, by name.

    Returns
    -------
    DataFrame
        A symmetric table, names by names, with values from 0 to 1 and 1 on the diagonal.

    Raises
    ------
    InputError
        If there are fewer than two masks. If the masks are of other weights, maps or shapes. If
        neither mask of a pair keeps a weight of some map: then the ratio has no value.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.pruning import Masks, mask_overlap
    >>> key = (1, "mlp.up_proj")
    >>> captions = Masks.pack({key: torch.tensor([[True, True, False]])}, "small", "f")
    >>> answers = Masks.pack({key: torch.tensor([[True, False, True]])}, "small", "f")
    >>> mask_overlap({"captions": captions, "answers": answers}).round(2).values.tolist()
    [[1.0, 0.33], [0.33, 1.0]]
    """
    require(len(masks) >= 2, f"{len(masks)} masks", "give two or more, by name")
    table = pd.DataFrame(1.0, index=list(masks), columns=list(masks))
    for first, second in combinations(masks, 2):
        by_layer = masks[first].iou(masks[second]).groupby("layer")["iou"].mean()
        value = by_layer.mean()
        table.loc[first, second] = value
        table.loc[second, first] = value
    return table


def independent_iou(density: float) -> float:
    r"""Compute the expected overlap of two masks that are drawn by chance.

    Use it as the baseline of :func:`mask_overlap`. Of masks that keep a share k of the weights it
    is :math:`k^2 / (2k - k^2) = k / (2 - k)`.

    Parameters
    ----------
    density : float
        The share of the weights that each mask keeps, above 0 and at most 1.

    Returns
    -------
    float
        The intersection over union, from 0 to 1.

    Raises
    ------
    InputError
        If the share is not in (0, 1].

    Examples
    --------
    >>> from xlvlms_tutorial.methods.pruning import independent_iou
    >>> independent_iou(1.0), round(independent_iou(0.5), 2)
    (1.0, 0.33)
    """
    require(0 < density <= 1, f"a share kept of {density}", "give a share above 0 and at most 1")
    return density / (2 - density)


def module_names(vlm: VLM) -> dict[nn.Module, str]:
    """Map each module of the model to its name in ``vlm.model``."""
    return {module: name for name, module in vlm.model.named_modules()}


def joined(first: str, second: str) -> str:
    """Join the names of the models behind what is made of two, each once."""
    return " + ".join(dict.fromkeys([*first.split(" + "), *second.split(" + ")]))


def packed(mask: Bool[Tensor, "rows columns"]) -> np.ndarray:
    """Pack a flattened mask into bits, as :class:`Masks` keeps them."""
    return np.packbits(mask.contiguous().cpu().numpy())


def _require_packed(bits: np.ndarray, layer: int, name: str, shape: tuple[int, int]) -> None:
    """Refuse bits that are not the packed mask of a linear map of this shape."""
    rows, columns = shape
    size = rows * columns if min(layer, rows, columns) > 0 else 0
    n_bytes = (size + 7) // 8
    spare = -size % 8
    valid = size and bits.dtype == np.uint8 and bits.shape == (n_bytes,)
    if valid and spare:
        valid = bits[-1] & ((1 << spare) - 1) == 0
    require(
        valid,
        f"the packed mask of layer {layer} {name}, {rows} x {columns}, "
        f"is {bits.dtype} {bits.shape}",
        f"give {n_bytes} bytes (uint8), their last {spare} bits 0, and layers from 1 on",
    )


def _ones(bits: np.ndarray) -> int:
    if not hasattr(np, "bitwise_count"):  # NumPy 1
        return int.from_bytes(bits.tobytes(), "little").bit_count()
    # eight bytes at once; the few at the end one by one
    end = len(bits) // 8 * 8
    words = int(np.bitwise_count(bits[:end].view(np.uint64)).sum())
    return words + int(np.bitwise_count(bits[end:]).sum())


def _stored(key: Key) -> str:
    return f"{key[0]}/{key[1]}"
