r"""Fine-grained steering.

Vectors between the concepts of one set of samples, for samples or tokens that show a concept.
After "Analyzing Finetuning Representation Shift for Multimodal LLMs Steering"
(arXiv 2501.03012), where the vector from concept i to concept j is :math:`s_{ij} = u_j - u_i`
and is applied only where concept i is active.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sklearn.base import clone
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations
from xlvlms_tutorial.errors import incomparable
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.edits import edit
from xlvlms_tutorial.interventions.overrides import Positions
from xlvlms_tutorial.methods.concepts.base import Dictionary
from xlvlms_tutorial.methods.concepts.baselines import KMeans
from xlvlms_tutorial.methods.steering.vectors import SteeringVectors, about, made_from
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_equal


class ConceptVectors:
    """Hold the concepts of one set of activations at one layer, and the vectors between them.

    :func:`concept_vectors` makes it. Use it to steer from one concept to another, only where the
    first is active. Vectors are made when asked for, between all ordered pairs; ``len(vectors)`` is
    the number of concepts.

    Parameters
    ----------
    dictionary : Dictionary
        A fitted dictionary of k concepts.
    layer : int
        The layer at which its activations were read.
    provenance : dict
        How the activations were read; vectors take it over.

    Attributes
    ----------
    concepts : tensor (k, d)
        The concepts in float32, a row each.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import concept_vectors
    >>> rows = torch.tensor([[0.0, 1.0], [0.0, 3.0], [10.0, 1.0], [10.0, 3.0]])
    >>> table = pd.DataFrame({"sample": range(4), "id": list("abcd")})
    >>> vectors = concept_vectors(
    ...     Activations({(24, "resid_post"): rows}, table, {}), layer=24, concepts=2
    ... )
    >>> vectors
    ConceptVectors(2 concepts, layer 24, KMeans)
    >>> vectors.pairs["norm"].round(2).tolist()
    [10.0, 10.0]
    >>> vectors.between(0, 1)
    SteeringVectors(concept 0 to concept 1 of 2, layers 24, 4 source)
    >>> concept = int(vectors.dictionary.labels_[0])
    >>> gate = vectors.gate(concept)
    >>> gate(rows[:, None]).tolist()
    [True, True, False, False]
    """

    def __init__(self, dictionary: Dictionary, layer: int, provenance: dict) -> None:
        self.dictionary = dictionary
        self.layer = layer
        self.provenance = provenance
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
        tiny = torch.finfo(torch.float64).tiny
        unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=tiny)
        distances = torch.cdist(wide, wide)
        cosines = unit @ unit.T
        same = torch.eye(len(self), dtype=torch.bool)
        source, target = (~same).nonzero(as_tuple=True)
        table = pd.DataFrame({"source": source.numpy(), "target": target.numpy()})
        table["norm"] = distances[source, target].numpy()
        table["cosine"] = cosines[source, target].numpy()
        return table.sort_values("norm", kind="stable", ignore_index=True)

    def between(self, i: int, j: int) -> SteeringVectors:
        """Make the vector from concept i to concept j, :math:`u_j - u_i`.

        Use it for the fine-grained steering of arXiv 2501.03012: add it where :meth:`gate` finds
        concept i. To steer every token by its own concept there is :func:`steer_by_concept`.

        Parameters
        ----------
        i : int
            The concept to steer away from, 0 to k - 1.
        j : int
            The concept to steer to, another one.

        Returns
        -------
        SteeringVectors
            The vector, for the layer of the concepts.

        Raises
        ------
        InputError
            If there is no such concept, or both are the same.
        """
        source = self._concept_number(i)
        target = self._concept_number(j)
        require(
            source != target,
            f"source and target are both concept {i}",
            "give two different concepts",
        )
        method = f"concept {source} to concept {target} of {len(self)}"
        return SteeringVectors(
            {self.layer: self.concepts[target] - self.concepts[source]},
            self.provenance | {"how": method},
        )

    def gate(self, i: int) -> Callable[[Float[Tensor, "b t d"]], Bool[Tensor, "b"]]:
        r"""Make a gate that lets in the samples in which concept i is the most active.

        Use it as ``gate`` of :meth:`SteeringVectors.apply`, at the layer of the concepts. The most
        active concept is that of the largest \|code\| at the last position of the prompt (of
        k-means and samples taken as they are: the nearest).

        Parameters
        ----------
        i : int
            The concept, 0 to k - 1.

        Returns
        -------
        callable
            A function of the residual stream (b, t, d) that returns a mask (b,) over samples.

        Raises
        ------
        InputError
            If there is no such concept.
        """
        concept = self._concept_number(i)

        def active(states: Float[Tensor, "b t d"]) -> Bool[Tensor, "b"]:
            codes = np.abs(self.dictionary.transform(states[:, -1]))
            most_active = codes.argmax(axis=1) == concept
            return torch.from_numpy(most_active & codes.any(axis=1))

        return active

    def _concept_number(self, i: int) -> int:
        require(
            not isinstance(i, bool) and isinstance(i, Integral) and 0 <= i < len(self),
            f"concept {i!r}",
            f"give one of 0 to {len(self) - 1}",
        )
        return int(i)


def concept_vectors(
    states: Activations, layer: int, concepts: int | Dictionary = 20, seed: int = 0
) -> ConceptVectors:
    r"""Find concepts in one set of activations, between which to steer.

    Use it to steer within one set, where :func:`mean_difference` steers between two. The vector
    from concept i to concept j is :math:`s_{ij} = u_j - u_i`, applied only where concept i is
    active (arXiv 2501.03012).

    Parameters
    ----------
    states : Activations
        Activations (n, d) at the end of blocks, of samples that show several concepts.
    layer : int
        The layer whose activations are used, and where the vectors are added.
    concepts : int or Dictionary
        The number of k-means centres (by default the paper's 20), or any dictionary. A dictionary
        that is not fitted is fitted on a copy; one that is fitted is taken as it is.
    seed : int
        Of k-means; not used with a dictionary.

    Returns
    -------
    ConceptVectors
        The concepts, with the vectors between all pairs.

    Raises
    ------
    LayerError
        If the layer was not captured, or the number of concepts is no whole number of 2 or more.
    InputError
        If the layer was not captured, or the number of concepts is no whole number of 2 or more. If
        the activations are fewer than the concepts, not finite, or do not vary. If a fitted
        dictionary is not as wide as the activations.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import PCA, Activations
    >>> from xlvlms_tutorial.methods.steering import concept_vectors
    >>> rows = torch.tensor([[0.0, 1.0], [0.0, 3.0], [10.0, 1.0], [10.0, 3.0]])
    >>> table = pd.DataFrame({"sample": range(4), "id": list("abcd")})
    >>> states = Activations({(24, "resid_post"): rows}, table, {"model": "pocket-llava"})
    >>> concept_vectors(states, layer=24, concepts=PCA(2))
    ConceptVectors(2 concepts, layer 24, PCA)
    """
    rows = states[layer, WHOLE_BLOCK]
    if not isinstance(concepts, Dictionary):
        require(
            not isinstance(concepts, bool) and isinstance(concepts, Integral) and concepts >= 2,
            f"{concepts!r} concepts",
            "give a whole number of 2 or more, or a dictionary",
        )
        concepts = KMeans(int(concepts), seed=seed)
    if not hasattr(concepts, "components_"):
        concepts = clone(concepts).fit(rows)
    width = concepts.components_.shape[1]
    require_equal(
        "widths of dictionary and states",
        width,
        rows.shape[-1],
        "give a dictionary of these states",
    )
    settings = {"class": type(concepts).__name__, **concepts.get_params()}
    dictionary = {name: str(value) for name, value in settings.items()}
    record = {"dictionary": dictionary, "source": about(states)}
    return ConceptVectors(concepts, layer, made_from(states) | record)


@recorded
@contextmanager
def steer_by_concept(
    vlm: VLM,
    centres: Float[Tensor, "k d"],
    shifts: Float[Tensor, "m _"],
    layer: int,
    strength: float | Float[Tensor, "b"] = 1.0,
    positions: Positions = "all",
    min_cosine: float | None = None,
) -> Iterator[None]:
    r"""Steer every token by the concept that it shows, inside a ``with`` block.

    Use it to change some words and leave the rest of a caption alone. Each token moves by
    :math:`h \leftarrow h + \alpha s_c`, with c the centre of largest cosine with h, in the prompt
    and in every step of a generation.

    Parameters
    ----------
    vlm : VLM
        The model that is steered.
    centres : tensor (k, d)
        The concepts that tokens are compared with, none of them zero.
    shifts : tensor (k, d)
        What is added to the tokens of each concept; a row of zeros leaves them as they are.
    layer : int
        The layer of the residual stream that is changed, 0 to L.
    strength : float or tensor (b,)
        The factor :math:`\alpha` of the shifts, one for all samples of a batch or one for each; by
        default 1.
    positions : str, tuple of str, or mask (b, t)
        Which tokens may be steered, as for :meth:`SteeringVectors.apply`: by default "all".
    min_cosine : float, optional
        The smallest cosine, -1 to 1: tokens whose largest cosine is below it stay as they are.
        None (the default) steers all.

    Raises
    ------
    InputError
        If centres and shifts are not of one shape, or not as wide as the model. If a number is not
        finite, a centre is zero, or all shifts are zero, so that nothing would change. If the
        strength is not finite, or ``min_cosine`` is no number from -1 to 1.
    LayerError, InterventionError
        If layer or positions do not fit the model.

    Examples
    --------
    Two concepts, whose tokens are moved along their own centre:

    >>> import torch
    >>> from xlvlms_tutorial.activations import read
    >>> from xlvlms_tutorial.methods.steering import steer_by_concept
    >>> centres = torch.eye(2, vlm.width)
    >>> before = read(vlm, batch, 24, positions="last")[24, "resid_post"]
    >>> with steer_by_concept(vlm, centres, 10 * centres, layer=24, positions="last"):
    ...     after = read(vlm, batch, 24, positions="last")[24, "resid_post"]
    >>> (after - before).norm(dim=-1).flatten().round().tolist()
    [10.0, 10.0, 10.0, 10.0]
    """
    _require_usable(vlm, centres, shifts, strength, min_cosine)
    centres = centres.detach().to(vlm.device, torch.float32)
    unit = torch.nn.functional.normalize(centres, dim=1)
    moves = shifts.detach().to(vlm.device, torch.float32)
    factors = torch.as_tensor(strength, dtype=torch.float32).reshape(-1, 1, 1)

    def change(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        wide = states.float()
        products = wide @ unit.to(states.device).T
        best, nearest = products.max(dim=-1)
        require(
            len(factors) in (1, len(states)),
            f"{len(factors)} strengths for a batch of {len(states)}",
            "give one, or one for each sample",
        )
        shift = factors.to(states.device) * moves.to(states.device)[nearest]
        if min_cosine is not None:  # best is the cosine times the state's norm
            near = best >= min_cosine * wide.norm(dim=-1)
            shift = shift * near[..., None]
        return (wide + shift).to(states.dtype)

    with edit(vlm, change, layer, positions):
        yield


def _require_usable(
    vlm: VLM, centres: Tensor, shifts: Tensor, strength: float | Tensor, min_cosine: float | None
) -> None:
    """Refuse centres and shifts that do not fit each other or the model, or change nothing."""
    require_equal(
        "shapes of centres and shifts",
        tuple(centres.shape),
        tuple(shifts.shape),
        "give one shift for each centre",
    )
    if centres.ndim != 2 or centres.shape[1] != vlm.width:
        raise incomparable(
            "widths of centres and model",
            centres.shape[-1],
            vlm.width,
            "give centres of the model's own states",
        )
    finite = torch.isfinite(centres).all() and torch.isfinite(shifts).all()
    usable = finite and centres.any(dim=1).all() and shifts.any()
    require(
        usable,
        "centres or shifts from which nothing can be steered",
        "give finite numbers, centres with a direction, and at least one shift that is not zero",
    )
    finite = bool(torch.as_tensor(strength).isfinite().all())
    require(
        finite and (min_cosine is None or -1 <= min_cosine <= 1),
        f"strength {strength}, min_cosine {min_cosine}",
        "give a finite strength, and a cosine of -1 to 1 (or None)",
    )
