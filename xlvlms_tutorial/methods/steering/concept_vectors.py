r"""Fine-grained steering.

Vectors between the concepts of one set of samples, for samples or tokens that show a concept.
After "Analyzing Finetuning Representation Shift for Multimodal LLMs Steering"
(arXiv 2501.03012), where the vector from concept i to concept j is :math:`s_{ij} = u_j - u_i`
and is applied only where concept i is active.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sklearn.base import clone
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, States
from xlvlms_tutorial.errors import ActivationsError, ComparisonError, SelectionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.edits import edit
from xlvlms_tutorial.interventions.overrides import Positions
from xlvlms_tutorial.methods.concepts.base import Dictionary
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.steering.vectors import SteeringVectors, about, made_from
from xlvlms_tutorial.models.vlm import VLM


class ConceptVectors:
    """The concepts of one set of states at one layer, and the vectors between them.

    Vectors of all ordered pairs, made when asked for.

    Parameters
    ----------
    dictionary
        A fitted dictionary of k concepts.
    layer
        The layer at which its states were read.
    provenance
        How the states were read.
    """

    def __init__(self, dictionary: Dictionary, layer: int, provenance: dict) -> None:
        self.dictionary, self.layer, self.provenance = dictionary, layer, provenance
        self.concepts: Float[Tensor, "k d"] = torch.tensor(
            np.asarray(dictionary.components_), dtype=torch.float32
        )

    def __len__(self) -> int:
        return len(self.concepts)

    def __repr__(self) -> str:
        return (
            f"ConceptVectors({len(self)} concepts, layer {self.layer}, "
            f"{type(self.dictionary).__name__})"
        )

    @property
    def pairs(self) -> pd.DataFrame:
        """All ordered pairs of different concepts, by length of their vector.

        Columns source, target, norm, cosine (of the concepts).
        """
        wide = self.concepts.double()
        unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        source, target = (~torch.eye(len(self), dtype=torch.bool)).nonzero(as_tuple=True)
        columns = {
            "source": source,
            "target": target,
            "norm": torch.cdist(wide, wide)[source, target],
        }
        table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        return table.assign(cosine=(unit @ unit.T)[source, target].numpy()).sort_values(
            "norm", kind="stable", ignore_index=True
        )

    def between(self, i: int, j: int) -> SteeringVectors:
        """The vector from concept i to concept j, :math:`u_j - u_i`.

        Raises
        ------
        SelectionError
            If there is no such concept, or both are the same.
        """
        source, target = self._number(i), self._number(j)
        if source == target:
            raise SelectionError(
                f"source and target are both concept {i}", "give two different concepts"
            )
        how = f"concept {source} to concept {target} of {len(self)}"
        return SteeringVectors(
            {self.layer: self.concepts[target] - self.concepts[source]},
            self.provenance | {"how": how},
        )

    def gate(self, i: int) -> Callable[[Float[Tensor, "b t d"]], Bool[Tensor, "b"]]:
        r"""A gate for interventions at this layer, by the concept of largest \|code\|.

        It lets in the samples whose largest \|code\| is that of concept i. It is
        decided on the last position of the prompt (of k-means and samples taken as
        they are: by the nearest concept).

        Raises
        ------
        SelectionError
            If there is no such concept.
        """
        wanted = self._number(i)

        def active(states: Float[Tensor, "b t d"]) -> Bool[Tensor, "b"]:
            codes = np.abs(self.dictionary.transform(states[:, -1]))
            return torch.from_numpy((codes.argmax(axis=1) == wanted) & codes.any(axis=1))

        return active

    def _number(self, i: int) -> int:
        if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= i < len(self):
            raise SelectionError(f"concept {i!r}", f"give one of 0 to {len(self) - 1}")
        return int(i)


def fine(
    states: States, layer: int, concepts: int | Dictionary = 20, seed: int = 0
) -> ConceptVectors:
    r"""Concepts of one set of states, between which to steer.

    K-means with so many centres (the paper's 20), or any dictionary. A dictionary that is not
    fitted is fitted on a copy; one that is fitted is taken as it is, and ``seed`` is then not used.

    Raises
    ------
    LayerError, SelectionError
        If the layer was not captured, or the number of concepts is no whole number of 2 or more.
    ActivationsError
        If the states are fewer than the concepts, not finite, or do not vary.
    ComparisonError
        If a fitted dictionary is not as wide as the states.
    """
    rows = states[layer, WHOLE_BLOCK]
    if not isinstance(concepts, Dictionary):
        if isinstance(concepts, bool) or not isinstance(concepts, Integral) or concepts < 2:
            raise SelectionError(
                f"{concepts!r} concepts", "give a whole number of 2 or more, or a dictionary"
            )
        concepts = KMeans(int(concepts), seed=seed)
    if not hasattr(concepts, "components_"):
        concepts = clone(concepts).fit(rows)
    if (width := concepts.components_.shape[1]) != rows.shape[-1]:
        raise ComparisonError(
            "widths of dictionary and states",
            width,
            rows.shape[-1],
            "give a dictionary of these states",
        )
    made = {
        "dictionary": {
            name: str(value)
            for name, value in {"class": type(concepts).__name__, **concepts.get_params()}.items()
        }
    }
    return ConceptVectors(concepts, layer, made_from(states) | made | {"source": about(states)})


@recorded
@contextmanager
def by_concept(
    vlm: VLM,
    centres: Float[Tensor, "k d"],
    shifts: Float[Tensor, "m _"],
    layer: int,
    strength: float = 1.0,
    positions: Positions = "all",
    least: float | None = None,
) -> Iterator[None]:
    r"""Steer every token by the concept that it shows.

    :math:`h \leftarrow h + \alpha s_c`, c the centre of largest cosine with h. Tokens whose largest
    cosine is below ``least`` stay as they are, and so do those of concepts whose row of ``shifts``
    is zero. It holds in the prompt and in every step, as ``positions`` say.

    Raises
    ------
    ComparisonError
        If centres and shifts are not of one shape, or not as wide as the model.
    ActivationsError
        If a number is not finite, a centre is zero, or all shifts are
        zero, so that nothing would change.
    SelectionError
        If the strength is not finite, or ``least`` is no number from -1 to 1.
    LayerError, InterventionError
        If layer or positions do not fit the model.
    """
    _check(vlm, centres, shifts, strength, least)
    unit = torch.nn.functional.normalize(centres.detach().to(vlm.device, torch.float32), dim=1)
    moves = strength * shifts.detach().to(vlm.device, torch.float32)

    def change(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        wide = states.float()
        best, nearest = (wide @ unit.to(states.device).T).max(dim=-1)
        shift = moves.to(states.device)[nearest]
        if least is not None:  # best is the cosine times the state's norm
            shift = shift * (best >= least * wide.norm(dim=-1))[..., None]
        return (wide + shift).to(states.dtype)

    with edit(vlm, change, layer, positions):
        yield


def _check(vlm: VLM, centres: Tensor, shifts: Tensor, strength: float, least: float | None) -> None:
    if centres.shape != shifts.shape:
        raise ComparisonError(
            "shapes of centres and shifts",
            tuple(centres.shape),
            tuple(shifts.shape),
            "give one shift for each centre",
        )
    if centres.ndim != 2 or centres.shape[1] != vlm.width:
        raise ComparisonError(
            "widths of centres and model",
            centres.shape[-1],
            vlm.width,
            "give centres of the model's own states",
        )
    if not (
        torch.isfinite(centres).all()
        and torch.isfinite(shifts).all()
        and centres.any(dim=1).all()
        and shifts.any()
    ):
        advice = (
            "give finite numbers, centres with a direction, and at least one shift that is not zero"
        )
        raise ActivationsError("centres or shifts from which nothing can be steered", advice)
    if not isfinite(strength) or not (least is None or -1 <= least <= 1):
        raise SelectionError(
            f"strength {strength}, least {least}",
            "give a finite strength, and a cosine of -1 to 1 (or None)",
        )
