r"""Vectors that steer without training.

One a layer, from the mean states of two sets of samples, with how they were made. After "Analyzing
Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from numbers import Integral, Real
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import xlvlms_tutorial
from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States, as_json_knows
from xlvlms_tutorial.errors import (
    ActivationsError,
    ComparisonError,
    LayerError,
    LoadError,
    SelectionError,
)
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.overrides import Gate, Positions
from xlvlms_tutorial.io import digest, load_tensors, save_tensors
from xlvlms_tutorial.models.vlm import VLM

_FORMAT = "xlvlms steering vectors 1"
_COMMON = ("model", "revision", "dtype", "interventions")
_BY_SIDE = (
    "prompt",
    "selection",
    "reduce",
    "answers",
    "max_new_tokens",
    "prompts_sha256",
    "answers_sha256",
)
_ROWS = 4096  # states that are widened to float64 at a time
_NOTHING = 1e-9  # of the states' norm: what is shorter is rounding of the means


class SteeringVectors:
    """One vector (d,) in float32 for each layer, and how they were made: ``vectors[layer]``.

    Parameters
    ----------
    tensors
        For each layer (0 to L) a vector of the residual stream, all of one width.
    provenance
        How they were made, as JSON knows it; ``model`` is the name of the model that they are for.

    Raises
    ------
    ActivationsError
        If there are no vectors, or one is no vector, not of
        floating-point numbers, NaN or infinite.
    SelectionError
        If a layer is not numbered from 0 on.
    ComparisonError
        If they differ in width.
    """

    __iter__ = None  # without this, iterating would ask for layers 0, 1, 2 ... until one is missing

    def __init__(
        self, tensors: Mapping[int, Float[Tensor, "_"]], provenance: Mapping[str, object]
    ) -> None:
        finite = lambda vector: (
            vector.ndim == 1
            and vector.is_floating_point()
            and vector.numel()
            and torch.isfinite(vector).all()
        )
        if not tensors or not all(map(finite, tensors.values())):
            told = (
                f"{len(tensors)} vectors, or one that is not finite or "
                "not of floating-point numbers"
            )
            raise ActivationsError(told, "give one finite vector (d,) for each layer")
        if wrong := [
            layer
            for layer in tensors
            if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0
        ]:
            raise SelectionError(
                f"a vector for layer {wrong[0]!r}",
                "number layers as the model does: 0 is what enters the first block",
            )
        widths = sorted({len(vector) for vector in tensors.values()})
        if len(widths) > 1:
            raise ComparisonError(
                "widths of the vectors", widths[0], widths[-1], "give the vectors of one model"
            )
        self._tensors = {layer: tensors[layer].detach().float().cpu() for layer in sorted(tensors)}
        self.provenance = as_json_knows({**provenance, "layers": self.layers})

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, layer: int) -> Float[Tensor, "d"]:
        if layer not in self._tensors:
            first, last = self.layers[0], self.layers[-1]
            if not isinstance(layer, Real) or not first <= layer <= last:
                raise LayerError(layer, first, last)
            raise SelectionError(
                f"no vector for layer {layer}", f"there are: {', '.join(map(str, self.layers))}"
            )
        return self._tensors[layer]

    def __repr__(self) -> str:
        sides = [
            f"{self.provenance[side]['n']:,} {side}"
            for side in ("source", "target")
            if side in self.provenance
        ]
        told = [
            str(self.provenance.get("how")),
            f"layers {' '.join(map(str, self.layers))}",
            *sides,
        ]
        return f"SteeringVectors({', '.join(told)})"

    @property
    def layers(self) -> list[int]:
        """The layers that have a vector, in order."""
        return list(self._tensors)

    @property
    def norms(self) -> pd.Series:
        """The length of each layer's vector."""
        lengths = [float(vector.norm()) for vector in self._tensors.values()]
        return pd.Series(lengths, index=pd.Index(self.layers, name="layer"), name="norm")

    @contextmanager
    def steer(
        self,
        vlm: VLM,
        layer: int,
        strength: float = 1.0,
        positions: Positions = "all",
        gate: Gate = None,
    ) -> Iterator[None]:
        r"""Add the vector at a layer inside this block: :math:`h \leftarrow h + \alpha s`.

        It is added in the prompt and in every step, by ``interventions.add``.

        Raises
        ------
        LayerError, SelectionError
            If there is no vector for the layer, or the strength is not finite.
        ComparisonError
            If the vectors are of another model.
        ActivationsError
            If the vector is zero, so that nothing would change.
        InterventionError
            If positions or gate do not fit the model or the batch.
        """
        vector = self.checked(vlm, layer, strength)
        with add(vlm, vector, layer, float(strength), positions, gate):
            yield

    def checked(self, vlm: VLM, layer: int, strength: float = 1.0) -> Float[Tensor, "d"]:
        """The vector of a layer, if this model can be steered by it at this strength.

        Raises as :meth:`steer`.
        """
        vector, model = self[layer], self.provenance.get("model")
        if model != vlm.name:
            raise ComparisonError(
                "models of the vectors and of what is steered",
                model,
                vlm.name,
                "make vectors of the model's own states",
            )
        if len(vector) != vlm.width:
            raise ComparisonError(
                "widths of vectors and model",
                len(vector),
                vlm.width,
                "make vectors of the model's own states",
            )
        if isinstance(strength, bool) or not isinstance(strength, Real) or not isfinite(strength):
            raise SelectionError(f"strength is {strength!r}", "give a finite number")
        if not vector.any():
            advice = (
                "choose a layer where the two sets differ (at layer 0 the "
                "same token has the same state)"
            )
            raise ActivationsError(f"the vector of layer {layer} is zero", advice)
        return vector

    def save(self, path: str | Path) -> Path:
        """Write vectors and provenance to one file of safetensors, which is whole or absent.

        :func:`load_vectors` reads it.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        told = {"format": _FORMAT, "provenance": json.dumps(self.provenance)}
        return save_tensors(
            path, {str(layer): vector for layer, vector in self._tensors.items()}, told
        )


def load_vectors(path: str | Path) -> SteeringVectors:
    """Vectors that :meth:`SteeringVectors.save` wrote.

    Raises
    ------
    LoadError
        If there is no such file, or it is damaged or no file of steering vectors.
    """
    try:
        tensors, told = load_tensors(path)
    except OSError as cause:
        raise LoadError(
            f"{path!s} cannot be read as steering vectors ({cause!s})",
            "give a file written by save",
        ) from cause
    if told.get("format") != _FORMAT:
        raise LoadError(f"{path!s} is no file of format {_FORMAT!r}", "give a file written by save")
    try:
        return SteeringVectors(
            {int(name): vector for name, vector in tensors.items()}, json.loads(told["provenance"])
        )
    except (KeyError, TypeError, ValueError, RecursionError) as cause:
        raise LoadError(
            f"{path!s} is damaged: its content cannot be used ({cause!r})", "make the vectors again"
        ) from cause


def coarse(source: States, target: States, same_positions: bool = True) -> SteeringVectors:
    r"""The difference of mean states of target b and source a, for every layer captured.

    :math:`s_l = \bar b_l - \bar a_l`. Sums are in float64. ``same_positions=False`` allows
    sets that were read at other kinds of positions, as the paper's captions (the mean over
    an answer, and the state at one word), where the vector also holds what tells these
    positions apart (arXiv 2501.03012).

    Raises
    ------
    ComparisonError
        If model, prompt, layers, places, widths or kinds of positions differ.
    ActivationsError
        If a set is empty, not finite or not (n, d), or source and target are the same.
    SelectionError
        If no layer was captured at the end of its block.
    """
    member = torch.arange(len(source) + len(target)) >= len(source)
    return _difference(source, target, member, {"how": "mean difference"}, same_positions)


def shuffled(
    source: States, target: States, seed: int = 0, same_positions: bool = True
) -> SteeringVectors:
    """As :func:`coarse`, after the rows of both sets are dealt out anew.

    What a mean difference is when membership means nothing.

    Raises
    ------
    ComparisonError, ActivationsError, SelectionError
        As :func:`coarse`.
    """
    member = torch.arange(len(source) + len(target)) >= len(source)
    member = member[torch.randperm(len(member), generator=torch.Generator().manual_seed(seed))]
    return _difference(
        source, target, member, {"how": "shuffled mean difference", "seed": seed}, same_positions
    )


def random_like(vectors: SteeringVectors, seed: int = 0) -> SteeringVectors:
    """Random directions, uniform on the sphere, as long as the given vectors at each layer."""
    drawn = torch.Generator().manual_seed(seed)
    found = {}
    for layer in vectors.layers:
        noise = torch.randn(len(vectors[layer]), generator=drawn)
        found[layer] = noise * (vectors[layer].norm() / noise.norm())
    return SteeringVectors(
        found,
        vectors.provenance
        | {"how": f"random, as long as: {vectors.provenance.get('how')}", "seed": seed},
    )


def require_like(source: States, target: States, same_positions: bool = True) -> list[int]:
    """The layers at which two sets of states were read alike, so that their means can be compared.

    Raises as :func:`coarse`.
    """
    if source.layers != target.layers or source.places != target.places:
        told = [f"{states.layers} {states.places}" for states in (source, target)]
        raise ComparisonError("layers and places", *told, "capture both sets at the same")
    one, other = source.provenance, target.provenance
    for name in (*_COMMON, "prompt"):
        if one.get(name) != other.get(name):
            raise ComparisonError(
                name,
                one.get(name),
                other.get(name),
                "capture both sets with one model and one prompt",
            )
    if same_positions and _kind(one) != _kind(other):
        raise ComparisonError(
            "kinds of positions",
            _kind(one),
            _kind(other),
            "capture both alike, or give same_positions=False",
        )
    layers = [layer for layer, place in source.tensors if place == WHOLE_BLOCK]
    if not layers:
        raise SelectionError(
            "no residual stream was captured",
            f"capture the place {WHOLE_BLOCK!r}; there are: {source.places}",
        )
    for layer in layers:
        _require_rows(source[layer, WHOLE_BLOCK], target[layer, WHOLE_BLOCK], layer)
    return sorted(layers)


def about(states: States) -> dict[str, object]:
    """Which samples a set of states is of and how they were read, by name or digest."""
    ids = digest(states.table["id"].tolist(), ensure_ascii=False)
    return {"n": len(states), "ids_sha256": ids} | {
        name: states.provenance.get(name) for name in _BY_SIDE
    }


def made_from(states: States) -> dict[str, object]:
    """The part of a provenance that vectors share with the states they are made of."""
    versions = {module.__name__: module.__version__ for module in (torch, xlvlms_tutorial)}
    return {name: states.provenance.get(name) for name in _COMMON} | {"versions": versions}


def _kind(provenance: Mapping[str, object]) -> str:
    """Where states were read, whatever the words of interest are."""
    selection = provenance.get("selection") or {}
    return str(
        {name: "any" if name == "words" else value for name, value in selection.items()}
        | {"reduce": provenance.get("reduce")}
    )


def _require_rows(one: Tensor, other: Tensor, layer: int) -> None:
    for rows in (one, other):
        if rows.ndim != 2 or not rows.numel():
            raise ActivationsError(
                f"states of shape {tuple(rows.shape)} at layer {layer}",
                "give sets (n, d) of one row or more",
            )
        if bad := int((~torch.isfinite(rows)).any(dim=1).sum()):
            raise ActivationsError(
                f"{bad} of {len(rows)} states are NaN or infinite at layer {layer}",
                "leave these samples out",
            )
    if one.shape[1] != other.shape[1]:
        raise ComparisonError(
            f"widths at layer {layer}", one.shape[1], other.shape[1], "give states of one model"
        )


def _difference(
    source: States, target: States, member: Bool[Tensor, "n"], made: dict, same_positions: bool
) -> SteeringVectors:
    """The mean of the member rows of both sets minus that of the others, at every layer.

    What is only rounding is zero.
    """
    layers = require_like(source, target, same_positions)
    shares = torch.where(member, 1 / member.sum().double(), -1 / (~member).sum().double()).split(
        [len(source), len(target)]
    )
    found = {}
    for layer in layers:
        one, other = (
            _summed(states[layer, WHOLE_BLOCK], part)
            for states, part in zip((source, target), shares, strict=True)
        )
        vector = one + other
        found[layer] = (
            vector
            if vector.norm() > _NOTHING * (one.norm() + other.norm())
            else torch.zeros_like(vector)
        )
    if not any(vector.any() for vector in found.values()):
        raise ActivationsError(
            "source and target are the same", "give two sets of samples or of answers that differ"
        )
    return SteeringVectors(
        found, made_from(source) | made | {"source": about(source), "target": about(target)}
    )


def _summed(rows: Float[Tensor, "n d"], weights: Float[Tensor, "n"]) -> Float[Tensor, "d"]:
    blocks = zip(rows.split(_ROWS), weights.split(_ROWS), strict=True)
    return sum(part @ block.double() for block, part in blocks)
