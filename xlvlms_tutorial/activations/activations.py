"""States: what a capture returns.

One tensor for each layer and place, one row of a table for each row of the tensors.
"""

import ast
import json
import operator
import re
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from xlvlms_tutorial.errors import (
    LayerError,
    LengthError,
    SelectionError,
    StateError,
    StoreMismatchError,
)

Key = tuple[int, str]  # a layer, and a place at that layer: "block", "attention", "mlp" ...
WHOLE_BLOCK = "block"
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what provenance tells about a run, and what does not decide its content
NOT_COMPARED = ("versions", "created", "seconds")
_REQUIRED = ("sample", "id")


class States:
    """Captured states with what each row is and how they were made.

    Parameters
    ----------
    tensors
        For each ``(layer, place)`` a tensor ``(n, *shape)``, usually ``(n, d)``; all have the
        same n. They are kept on the CPU.
    table
        One row for each of the n rows of the tensors: ``sample`` (number of the sample in the
        capture), ``id``, and what else was captured.
    provenance
        How they were made (model, revision, prompt, layers, seed, versions ...), as JSON knows it.

    Raises
    ------
    LengthError
        If a tensor has another number of rows than the table.
    SelectionError
        If there are no tensors, the table lacks ``sample`` or ``id``, or the
        provenance cannot be written as JSON.
    """

    __iter__ = None  # without this, iterating would ask for layers 0, 1, 2 ... until one is missing

    def __init__(self, tensors: dict[Key, Tensor], table: pd.DataFrame, provenance: dict) -> None:
        if not tensors:
            raise SelectionError("there are no tensors", "give one for each (layer, place)")
        lengths = {
            f"layer {layer} {place}": _rows(tensor) for (layer, place), tensor in tensors.items()
        }
        if set(lengths.values()) != {len(table)}:
            raise LengthError(table=len(table), **lengths)
        self.tensors: dict[Key, Tensor] = {
            key: tensor.detach().cpu() for key, tensor in tensors.items()
        }
        self.table = _checked(table)
        self.provenance = as_json_knows(provenance)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | Key) -> Shaped[Tensor, "n *shape"]:
        if isinstance(key, tuple):
            return self.tensors[chosen(self.tensors, *key)[0]]
        found = chosen(self.tensors, operator.index(key), None)
        if len(found) == 1:
            return self.tensors[found[0]]
        if (key, WHOLE_BLOCK) in found:
            return self.tensors[key, WHOLE_BLOCK]
        places = [place for _, place in found]
        raise SelectionError(
            f"layer {key} was captured at {len(found)} places",
            f"say which, as in states[{key}, {places[0]!r}]: {places}",
        )

    def __repr__(self) -> str:
        kinds = sorted(
            {str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}
        )
        first, last = self.layers[0], self.layers[-1]
        run = len(self.layers) > 2 and self.layers == list(range(first, last + 1))
        layers = f"{first} to {last}" if run else " ".join(map(str, self.layers))
        size = sum(tensor.nbytes for tensor in self.tensors.values()) / 1e6
        return (
            f"States({len(self):,} rows, layers {layers}, {' '.join(self.places)}, "
            f"{' '.join(kinds)}, {size:,.1f} MB)"
        )

    @property
    def layers(self) -> list[int]:
        """The layers that were captured, in order."""
        return sorted({layer for layer, _ in self.tensors})

    @property
    def places(self) -> list[str]:
        """The places that were captured, in the order of capture."""
        return list(dict.fromkeys(place for _, place in self.tensors))

    def select(self, rows: str | Sequence[bool] | np.ndarray | pd.Series | Tensor) -> "States":
        """The rows where a mask is true, or where a condition on the table's columns holds.

        Such as ``"word == 'key'"``. A condition compares columns, numbers and texts, with
        arithmetic, ``in``, ``and``, ``or`` and ``not``. It calls nothing, has no attributes and
        sees no variables (``@``), so that it may come from anywhere; for more, give a mask.

        Raises
        ------
        LengthError
            If the mask has not one value for each row.
        SelectionError
            If it is not a mask, or the condition cannot be evaluated on the table.
        """
        mask = torch.from_numpy(_mask(self._where(rows) if isinstance(rows, str) else rows))
        if len(mask) != len(self):
            raise LengthError(mask=len(mask), table=len(self))
        return States(
            {key: tensor[mask] for key, tensor in self.tensors.items()},
            self.table[mask.numpy()],
            self.provenance,
        )

    def _where(self, condition: str) -> np.ndarray | pd.Series:
        try:
            _only_compares(condition)
            # no names but those of the columns
            return self.table.eval(condition.strip(), local_dict={}, global_dict={})
        except (
            NameError,
            SyntaxError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            NotImplementedError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as cause:
            allowed = f"write one on these columns: {', '.join(map(str, self.table.columns))}"
            raise SelectionError(
                f"the condition {condition!r} has no meaning here ({cause})", allowed
            ) from cause

    def to(self, dtype: torch.dtype) -> "States":
        """The same states in another floating-point format.

        Raises
        ------
        SelectionError
            If the format is not one that states are kept in.
        StateError
            If a value is too large for it, as residual streams often are for float16.
        """
        if dtype not in FORMATS:
            raise SelectionError(
                f"states cannot be kept as {dtype}", f"allowed: {', '.join(map(str, FORMATS))}"
            )
        converted = {key: tensor.to(dtype) for key, tensor in self.tensors.items()}
        for (layer, _), tensor in sorted(converted.items()):
            bad = (
                (~torch.isfinite(tensor)).reshape(len(self), -1).any(dim=1)
                if tensor.numel()
                else torch.zeros(0)
            )
            if bad.any():
                raise StateError(
                    layer, sample=int(self.table["sample"].iloc[int(bad.nonzero()[0])])
                )
        return States(converted, self.table, self.provenance)

    @staticmethod
    def concat(parts: Sequence["States"]) -> "States":
        """The rows of all parts, one after the other.

        Raises
        ------
        SelectionError
            If there are no parts.
        StoreMismatchError
            If parts were not made in the same way: other layers, places, shapes,
            number formats or provenance.
        """
        if not parts:
            raise SelectionError("there is nothing to put together", "give at least one States")
        first = parts[0]
        for part in parts[1:]:
            if found := differences(described(first), described(part)) or differences(
                first.provenance, part.provenance
            ):
                raise StoreMismatchError(found)
        tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in first.tensors}
        return States(
            tensors, pd.concat([part.table for part in parts], ignore_index=True), first.provenance
        )


def chosen(keys: Collection[Key], layer: int | None, place: str | None) -> list[Key]:
    """The keys with this layer and this place; None means any.

    Raises
    ------
    LayerError
        If the layer lies outside the captured ones.
    SelectionError
        If it lies between them, or the place was not captured there.
    """
    layers = sorted({known for known, _ in keys})
    if layer is not None and not layers[0] <= layer <= layers[-1]:
        raise LayerError(layer, layers[0], layers[-1])
    if layer is not None and layer not in layers:
        raise SelectionError(
            f"layer {layer} was not captured", f"there are: {', '.join(map(str, layers))}"
        )
    found = [key for key in keys if layer in (None, key[0]) and place in (None, key[1])]
    if not found:
        at, places = (
            "" if layer is None else f" at layer {layer}",
            {known[1]: None for known in keys if layer in (None, known[0])},
        )
        raise SelectionError(
            f"nothing was captured at place {place!r}{at}", f"there are: {', '.join(places)}"
        )
    return found


def described(states: States) -> dict[str, list]:
    """Number format and shape of a row for each tensor, by a name such as "12/block"."""
    return {
        f"{layer}/{place}": [str(tensor.dtype), *tensor.shape[1:]]
        for (layer, place), tensor in sorted(states.tensors.items())
    }


def differences(stored: dict, asked: dict, within: str = "") -> list[tuple[str, object, object]]:
    """Name and both values of all that differs between two provenances.

    But for what only tells about a run.
    """
    found: list[tuple[str, object, object]] = []
    for name in dict.fromkeys([*stored, *asked]):
        if name in NOT_COMPARED and not within:
            continue
        one, other = stored.get(name, "absent"), asked.get(name, "absent")
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{within}{name}.")
        elif one != other:
            found.append((f"{within}{name}", one, other))
    return found


def as_json_knows(provenance: dict) -> dict:
    """A provenance as it would be read back from its JSON: tuples become lists.

    Raises
    ------
    SelectionError
        If JSON has no form for something in it.
    """
    try:
        return json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError) as cause:
        allowed = "allowed: text, finite numbers, lists and dictionaries"
        raise SelectionError(
            f"the provenance cannot be written as JSON ({cause})", allowed
        ) from cause


_ALLOWED = (
    ast.Expression,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.Invert,
    ast.USub,
    ast.UAdd,
    ast.Compare,
    ast.cmpop,
    ast.BinOp,
    ast.BitAnd,
    ast.BitOr,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
    ast.Pow,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.List,
    ast.Tuple,
)
_GROWING = (ast.Mult, ast.Mod, ast.Pow)  # of texts and lists these make as many signs as one likes
# a text, or a column's name
_QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`[^`'"#\\\n]*`""")
_MOST = 10  # the largest exponent


def _only_compares(condition: str) -> None:
    """Refuse a condition that does more than to compare.

    pandas would call and look up whatever it says.
    """
    for node in ast.walk(
        ast.parse(_QUOTED.sub(lambda part: part[1] or "name", condition.strip()), mode="eval")
    ):
        if not isinstance(node, _ALLOWED):
            raise SyntaxError(f"{type(node).__name__} is not among comparisons")
        if isinstance(node, ast.BinOp) and isinstance(node.op, _GROWING):
            parts = [*ast.walk(node.left), *ast.walk(node.right)]
            if any(
                isinstance(part, (ast.List, ast.Tuple))
                or isinstance(getattr(part, "value", None), (str, bytes))
                for part in parts
            ):
                raise SyntaxError("texts and lists are compared, not multiplied")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            small = isinstance(node.right, ast.Constant) and abs(node.right.value) <= _MOST
            if not small or any(isinstance(part, ast.Pow) for part in ast.walk(node.left)):
                raise SyntaxError(
                    f"an exponent is a number of at most {_MOST}, and no power is raised again"
                )


def _rows(tensor: Tensor) -> int:
    if tensor.dim() == 0:
        raise SelectionError("a tensor has no rows, only one number", "give (n, *shape)")
    return len(tensor)


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    columns = list(table.columns)
    if absent := [name for name in _REQUIRED if name not in columns]:
        raise SelectionError(
            f"the table lacks {' and '.join(absent)}",
            f"there are: {', '.join(map(str, columns)) or 'none'}",
        )
    if len(set(columns)) < len(columns) or not all(isinstance(name, str) for name in columns):
        raise SelectionError(
            f"the table's columns are {columns}", "give each a name of its own, as text"
        )
    if len(table) and (
        not pd.api.types.is_integer_dtype(table["sample"]) or table["sample"].isna().any()
    ):
        raise SelectionError(
            f"the column sample holds {table['sample'].dtype}",
            "give the number of each sample, an integer",
        )
    return table.reset_index(drop=True).astype({"sample": "int64", "id": str})


def _mask(rows: Sequence[bool] | np.ndarray | pd.Series | Tensor) -> np.ndarray:
    mask = np.asarray(rows)
    if mask.dtype != bool and len(mask):
        raise SelectionError(
            f"rows were chosen by {mask.dtype}",
            "give one True or False for each row, or a condition on the columns",
        )
    return np.array(mask, dtype=bool)  # a copy that torch may own
