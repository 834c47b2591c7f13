"""Activations: what a capture returns.

They hold one tensor for each layer and site, and one row of a table for each row of the tensors.
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

from xlvlms_tutorial.errors import InputError, LayerError, infinite_state, other_store
from xlvlms_tutorial.validation import require_same_length

Key = tuple[int, str]  # a layer, and a site at that layer: "resid_post", "attn_out", "mlp_out" ...
WHOLE_BLOCK = "resid_post"
FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# entries of a provenance that describe a run and do not decide its content
NOT_COMPARED = ("versions", "created", "seconds")
_REQUIRED = ("sample", "id")


class Activations:
    """Hold activations of the residual stream, with what each row is and how they were made.

    ``capture`` and ``load_activations`` return it, and most methods take it. Make one yourself when
    the activations come from elsewhere. ``states[layer]`` is the tensor of a layer, and
    ``states[layer, site]`` that of one site where several were captured; ``len(states)`` is n.

    Parameters
    ----------
    tensors : dict of (layer, site) to tensor (n, ...)
        The activations, usually (n, d). A site is "resid_post" (the residual stream that leaves the
        layer), "attn_out", "mlp_out" and so on. All tensors have the same n; they are moved to the
        CPU.
    table : DataFrame
        One row for each of the n rows of the tensors. It needs the columns ``sample`` (integer, the
        number of the sample in the capture) and ``id`` (text); other columns say more about a row,
        such as ``position``, ``token`` or ``word``.
    provenance : dict
        How they were made (model, revision, prompt, layers, seed, versions ...), as values that
        JSON can hold.

    Attributes
    ----------
    tensors : dict of (layer, site) to tensor (n, ...)
        The activations, on the CPU.
    table : DataFrame
        The table, with rows numbered from 0.
    provenance : dict
        The provenance, as it would be read back from JSON: tuples have become lists.

    Raises
    ------
    InputError
        If a tensor has another number of rows than the table. If there are no tensors, the table
        lacks ``sample`` or ``id``, or the provenance cannot be written as JSON.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial.activations import Activations
    >>> words = ["key", "dog", "key"]
    >>> table = pd.DataFrame({"sample": [0, 0, 1], "id": ["a", "a", "b"], "word": words})
    >>> states = Activations(
    ...     {(12, "resid_post"): torch.arange(6.0).reshape(3, 2)}, table, {"model": "toy"}
    ... )
    >>> states
    Activations(3 rows, layers 12, resid_post, float32, 0.0 MB)
    >>> states[12].tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    >>> states.select("word == 'key'")[12].tolist()
    [[0.0, 1.0], [4.0, 5.0]]
    """

    __iter__ = None  # without this, iterating would ask for layers 0, 1, 2 ... until one is missing

    def __init__(self, tensors: dict[Key, Tensor], table: pd.DataFrame, provenance: dict) -> None:
        if not tensors:
            raise InputError("there are no tensors", "give one for each (layer, site)")
        lengths = {}
        for (layer, site), tensor in tensors.items():
            lengths[f"layer {layer} {site}"] = _row_count(tensor)
        require_same_length(table=table, **lengths)
        self.tensors: dict[Key, Tensor] = {
            key: tensor.detach().cpu() for key, tensor in tensors.items()
        }
        self.table = _checked_table(table)
        self.provenance = as_json_knows(provenance)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | Key) -> Shaped[Tensor, "n *shape"]:
        """Return the states of a layer, or of a layer and a site."""
        if isinstance(key, tuple):
            return self.tensors[chosen(self.tensors, *key)[0]]
        keys = chosen(self.tensors, operator.index(key), None)
        if len(keys) == 1:
            return self.tensors[keys[0]]
        if (key, WHOLE_BLOCK) in keys:
            return self.tensors[key, WHOLE_BLOCK]
        sites = [site for _, site in keys]
        raise InputError(
            f"layer {key} was captured at {len(keys)} sites",
            f"say which, as in states[{key}, {sites[0]!r}]: {sites}",
        )

    def __repr__(self) -> str:
        layers = " ".join(map(str, self.layers))
        first, last = self.layers[0], self.layers[-1]
        if len(self.layers) > 2 and self.layers == list(range(first, last + 1)):
            layers = f"{first} to {last}"
        dtypes = set()
        n_bytes = 0
        for tensor in self.tensors.values():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            n_bytes += tensor.nbytes
        sites = " ".join(self.sites)
        dtype = " ".join(sorted(dtypes))
        size = f"{n_bytes / 1e6:,.1f} MB"
        return f"Activations({len(self):,} rows, layers {layers}, {sites}, {dtype}, {size})"

    @property
    def layers(self) -> list[int]:
        """The layers that were captured, in ascending order.

        Examples
        --------
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations
        >>> table = pd.DataFrame({"sample": [0], "id": ["a"]})
        >>> tensors = {(3, "resid_post"): torch.zeros(1, 2), (1, "resid_post"): torch.zeros(1, 2)}
        >>> Activations(tensors, table, {}).layers
        [1, 3]
        """
        return sorted({layer for layer, _ in self.tensors})

    @property
    def sites(self) -> list[str]:
        """The sites that were captured, in the order of capture.

        Examples
        --------
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations
        >>> table = pd.DataFrame({"sample": [0], "id": ["a"]})
        >>> tensors = {(1, "mlp_out"): torch.zeros(1, 2), (1, "resid_post"): torch.zeros(1, 2)}
        >>> Activations(tensors, table, {}).sites
        ['mlp_out', 'resid_post']
        """
        return list(dict.fromkeys(site for _, site in self.tensors))

    def select(self, rows: str | Sequence[bool] | np.ndarray | pd.Series | Tensor) -> "Activations":
        """Keep the rows where a mask is true, or where a condition on the table's columns holds.

        Use it to take the states of one word, one kind of position or some samples. A condition
        compares columns, numbers and texts, with arithmetic, ``in``, ``and``, ``or`` and ``not``.
        It calls nothing, has no attributes and sees no variables (``@``), so a condition from an
        untrusted source is safe; for anything more, give a mask.

        Parameters
        ----------
        rows : str or mask (n,)
            A condition such as ``"word == 'key'"``, or one boolean for each row: a list, an array,
            a Series or a tensor.

        Returns
        -------
        Activations
            The selected rows, in their order, with the same provenance.

        Raises
        ------
        InputError
            If the mask does not have one value for each row. If the mask is not boolean, or the
            condition cannot be evaluated on the table.

        Examples
        --------
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations
        >>> table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"], "position": [3, 8]})
        >>> states = Activations({(1, "resid_post"): torch.tensor([[1.0], [2.0]])}, table, {})
        >>> states.select("position > 5")[1].tolist()
        [[2.0]]
        >>> states.select([True, False])[1].tolist()
        [[1.0]]
        """
        if isinstance(rows, str):
            rows = self._where(rows)
        mask = _mask(rows)
        require_same_length(mask=mask, table=self.table)
        torch_mask = torch.from_numpy(mask)
        tensors = {key: tensor[torch_mask] for key, tensor in self.tensors.items()}
        return Activations(tensors, self.table[mask], self.provenance)

    def _where(self, condition: str) -> np.ndarray | pd.Series:
        """Return where a condition on the table's columns holds."""
        try:
            _require_comparison(condition)
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
            columns = ", ".join(map(str, self.table.columns))
            raise InputError(
                f"the condition {condition!r} has no meaning here ({cause})",
                f"write one on these columns: {columns}",
            ) from cause

    def to(self, dtype: torch.dtype) -> "Activations":
        """Convert the states to another floating-point dtype.

        Use it before saving, to halve the size of a file, or before arithmetic that needs float64.

        Parameters
        ----------
        dtype : torch.dtype
            ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or ``torch.float64``.

        Returns
        -------
        Activations
            The same rows in this dtype.

        Raises
        ------
        InputError
            If the dtype is not one that states are stored in. If a value is too large for it, as
            those of residual streams often are for float16.

        Examples
        --------
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations
        >>> table = pd.DataFrame({"sample": [0], "id": ["a"]})
        >>> states = Activations({(1, "resid_post"): torch.ones(1, 2)}, table, {})
        >>> states.to(torch.float16)[1].dtype
        torch.float16
        """
        require_format(dtype)
        converted = {key: tensor.to(dtype) for key, tensor in self.tensors.items()}
        for (layer, _), tensor in sorted(converted.items()):
            if not tensor.numel():
                continue  # without rows it cannot be reshaped
            overflowed = (~torch.isfinite(tensor)).reshape(len(self), -1).any(dim=1)
            if overflowed.any():
                row = int(overflowed.nonzero()[0])
                raise infinite_state(layer, sample=int(self.table["sample"].iloc[row]))
        return Activations(converted, self.table, self.provenance)

    @staticmethod
    def concat(parts: Sequence["Activations"]) -> "Activations":
        """Join the rows of several Activations, one after the other.

        Use it for states that were captured in parts with the same settings.

        Parameters
        ----------
        parts : sequence of Activations
            At least one; all with the same layers, sites, row shapes, dtypes and provenance
            (versions and times are not compared).

        Returns
        -------
        Activations
            The rows of all parts, in order, with the provenance of the first part.

        Raises
        ------
        InputError
            If there are no parts.
        StoreError
            If the parts were made with different settings.

        Examples
        --------
        >>> import pandas as pd
        >>> import torch
        >>> from xlvlms_tutorial.activations import Activations
        >>> table = pd.DataFrame({"sample": [0], "id": ["a"]})
        >>> states = Activations({(1, "resid_post"): torch.ones(1, 2)}, table, {})
        >>> Activations.concat([states, states])
        Activations(2 rows, layers 1, resid_post, float32, 0.0 MB)
        """
        if not parts:
            raise InputError("there is nothing to put together", "give at least one Activations")
        first = parts[0]
        for part in parts[1:]:
            mismatch = differences(described(first), described(part))
            mismatch = mismatch or differences(first.provenance, part.provenance)
            if mismatch:
                raise other_store(mismatch)
        tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in first.tensors}
        table = pd.concat([part.table for part in parts], ignore_index=True)
        return Activations(tensors, table, first.provenance)


def require_format(dtype: torch.dtype) -> None:
    """Refuse a dtype that states are not stored in, by ``InputError``."""
    if dtype not in FORMATS:
        raise InputError(
            f"states cannot be kept as {dtype}", f"allowed: {', '.join(map(str, FORMATS))}"
        )


def chosen(keys: Collection[Key], layer: int | None, site: str | None) -> list[Key]:
    """Select the keys with this layer and this site, where None means any.

    Raises
    ------
    LayerError
        If the layer lies outside the captured ones.
    InputError
        If it lies between them, or the site was not captured there.
    """
    layers = sorted({captured for captured, _ in keys})
    if layer is not None and not layers[0] <= layer <= layers[-1]:
        raise LayerError(layer, layers[0], layers[-1])
    if layer is not None and layer not in layers:
        captured = ", ".join(map(str, layers))
        raise InputError(f"layer {layer} was not captured", f"there are: {captured}")
    at_layer = [key for key in keys if layer in (None, key[0])]
    matching = [key for key in at_layer if site in (None, key[1])]
    if not matching:
        ending = "" if layer is None else f" at layer {layer}"
        sites = ", ".join(dict.fromkeys(key[1] for key in at_layer))
        raise InputError(f"nothing was captured at site {site!r}{ending}", f"there are: {sites}")
    return matching


def described(states: Activations) -> dict[str, list]:
    """Describe each tensor by dtype and shape of a row, under names such as "12/resid_post".

    They stand in the order in which they were captured, which a store so gives back.
    """
    formats = {}
    for (layer, site), tensor in states.tensors.items():
        formats[f"{layer}/{site}"] = [str(tensor.dtype), *tensor.shape[1:]]
    return formats


def differences(
    stored: dict, requested: dict, within: str = ""
) -> list[tuple[str, object, object]]:
    """List what differs between two provenances: name, stored value, requested value.

    Entries that only describe a run (versions, times) are not compared. ``within`` is the name of
    the dictionary that holds both, with a dot, and empty at the top.
    """
    changes: list[tuple[str, object, object]] = []
    for name in dict.fromkeys([*stored, *requested]):
        if name in NOT_COMPARED and not within:
            continue
        before = stored.get(name, "absent")
        after = requested.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{within}{name}.")
        elif before != after:
            changes.append((f"{within}{name}", before, after))
    return changes


def as_json_knows(provenance: dict) -> dict:
    """Convert a provenance to what would be read back from its JSON: tuples become lists.

    Raises
    ------
    InputError
        If JSON has no form for something in it.
    """
    try:
        return json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError) as cause:
        allowed = "allowed: text, finite numbers, lists and dictionaries"
        raise InputError(f"the provenance cannot be written as JSON ({cause})", allowed) from cause


_ALLOWED_NODES = (
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
_GROWING_OPERATORS = (
    ast.Mult,
    ast.Mod,
    ast.Pow,
)  # of texts and lists these make results of any length
# a text, or a column's name
_QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`[^`'"#\\\n]*`""")
_MAX_POWER = 10  # the largest exponent


def _require_comparison(condition: str) -> None:
    """Refuse a condition that does more than compare.

    pandas would call and look up whatever it contains.
    """
    # a column's name in backticks is no Python: any name stands for it here
    expression = _QUOTED.sub(lambda part: part[1] or "name", condition.strip())
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if not isinstance(node, _ALLOWED_NODES):
            raise SyntaxError(f"{type(node).__name__} is not among comparisons")
        if not isinstance(node, ast.BinOp):
            continue
        if isinstance(node.op, _GROWING_OPERATORS):
            parts = [*ast.walk(node.left), *ast.walk(node.right)]
            if any(map(_text_or_list, parts)):
                raise SyntaxError("texts and lists are compared, not multiplied")
        if isinstance(node.op, ast.Pow):
            small = isinstance(node.right, ast.Constant) and abs(node.right.value) <= _MAX_POWER
            nested = any(isinstance(part, ast.Pow) for part in ast.walk(node.left))
            if nested or not small:
                raise SyntaxError(
                    f"an exponent is a number of at most {_MAX_POWER}, and no power is raised again"
                )


def _text_or_list(node: ast.AST) -> bool:
    value = getattr(node, "value", None)  # of a constant
    return isinstance(node, (ast.List, ast.Tuple)) or isinstance(value, (str, bytes))


def _row_count(tensor: Tensor) -> int:
    if tensor.dim() == 0:
        raise InputError("a tensor has no rows, only one number", "give (n, *shape)")
    return len(tensor)


def _checked_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a number and an id of each row's sample, or refuse it."""
    columns = list(table.columns)
    absent = [name for name in _REQUIRED if name not in columns]
    if absent:
        present = ", ".join(map(str, columns)) or "none"
        raise InputError(f"the table lacks {' and '.join(absent)}", f"there are: {present}")
    unique = len(set(columns)) == len(columns)
    if not unique or not all(isinstance(name, str) for name in columns):
        raise InputError(
            f"the table's columns are {columns}", "give each a name of its own, as text"
        )
    samples = table["sample"]
    numbered = pd.api.types.is_integer_dtype(samples) and not samples.isna().any()
    if len(table) and not numbered:
        raise InputError(
            f"the column sample holds {samples.dtype}",
            "give the number of each sample, an integer",
        )
    return table.reset_index(drop=True).astype({"sample": "int64", "id": str})


def _mask(rows: Sequence[bool] | np.ndarray | pd.Series | Tensor) -> np.ndarray:
    mask = np.asarray(rows)
    if mask.dtype != bool and len(mask):
        raise InputError(
            f"rows were chosen by {mask.dtype}",
            "give one True or False for each row, or a condition on the columns",
        )
    return np.array(mask, dtype=bool)  # a copy that torch may own
