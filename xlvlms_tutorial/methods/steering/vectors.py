r"""Vectors that steer without training.

One a layer, from the mean states of two sets of samples, with how they were made. After "Analyzing
Finetuning Representation Shift for Multimodal LLMs Steering" (arXiv 2501.03012).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from numbers import Integral, Real
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import xlvlms_tutorial
from xlvlms_tutorial.activations.activations import WHOLE_BLOCK, Activations, as_json_knows
from xlvlms_tutorial.errors import InputError, LayerError, LoadError, incomparable
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.overrides import Gate, Positions
from xlvlms_tutorial.io import digest, load_tensors, save_tensors
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_equal

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
_ROWS = 4096  # activations that are widened to float64 at a time, to bound memory
_NEGLIGIBLE = 1e-9  # of the activations' norm: what is shorter is rounding of the means


class SteeringVectors:
    r"""Hold one steering vector for each layer, and the record of how they were made.

    :func:`mean_difference` makes them from two sets of activations; make them by hand to steer by a
    direction of your own. ``vectors[layer]`` is the vector (d,) in float32 on the CPU, and
    ``len(vectors)`` the number of layers.

    Parameters
    ----------
    tensors : mapping of int to tensor (d,)
        For each layer (0 to L; 0 is what enters the first block) a vector of the residual stream,
        all of one width.
    provenance : mapping
        How they were made, in what JSON can hold. ``model`` is the name of the model that they are
        for, the only one that :meth:`apply` accepts; ``how`` says the method in words.

    Attributes
    ----------
    provenance : dict
        As given, with the list of ``layers``.

    Raises
    ------
    InputError
        If there are no vectors, or one is no vector, not of floating-point numbers, NaN or
        infinite. If a layer is not numbered from 0 on. If they differ in width.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial import SteeringVectors
    >>> from xlvlms_tutorial.activations import read
    >>> direction = torch.zeros(vlm.width)
    >>> direction[7] = 5.0
    >>> vectors = SteeringVectors({24: direction}, {"model": vlm.name, "how": "by hand"})
    >>> vectors
    SteeringVectors(by hand, layers 24)
    >>> vectors.norms.tolist()
    [5.0]
    >>> torch.equal(vectors.checked(vlm, 24), direction)
    True
    >>> before = read(vlm, batch, 24, positions="last")[24, "resid_post"]
    >>> with vectors.apply(vlm, 24, strength=2.0):
    ...     after = read(vlm, batch, 24, positions="last")[24, "resid_post"]
    >>> (after - before)[..., 7].flatten().round().tolist()
    [10.0, 10.0, 10.0, 10.0]
    """

    __iter__ = None  # without this, iterating would ask for layers 0, 1, 2 ... until one is missing

    def __init__(
        self, tensors: Mapping[int, Float[Tensor, "_"]], provenance: Mapping[str, object]
    ) -> None:
        finite = all(map(_is_finite_vector, tensors.values()))
        require(
            tensors and finite,
            f"{len(tensors)} vectors, or one that is not finite or not of floating-point numbers",
            "give one finite vector (d,) for each layer",
        )
        for layer in tensors:
            require(
                not isinstance(layer, bool) and isinstance(layer, Integral) and layer >= 0,
                f"a vector for layer {layer!r}",
                "number layers as the model does: 0 is what enters the first block",
            )
        widths = sorted(set(map(len, tensors.values())))
        if len(widths) > 1:
            raise incomparable(
                "widths of the vectors", widths[0], widths[-1], "give the vectors of one model"
            )
        self._tensors = {}
        for layer in sorted(tensors):
            self._tensors[layer] = tensors[layer].detach().float().cpu()
        self.provenance = as_json_knows({**provenance, "layers": self.layers})

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, layer: int) -> Float[Tensor, "d"]:
        if layer in self._tensors:
            return self._tensors[layer]
        first, last = self.layers[0], self.layers[-1]
        if not isinstance(layer, Real) or not first <= layer <= last:
            raise LayerError(layer, first, last)
        layers = ", ".join(map(str, self.layers))
        raise InputError(f"no vector for layer {layer}", f"there are: {layers}")

    def __repr__(self) -> str:
        parts = [str(self.provenance.get("how")), f"layers {' '.join(map(str, self.layers))}"]
        for side in ("source", "target"):
            if side in self.provenance:
                parts.append(f"{self.provenance[side]['n']:,} {side}")
        return f"SteeringVectors({', '.join(parts)})"

    @property
    def layers(self) -> list[int]:
        """The layers that have a vector, in order."""
        return list(self._tensors)

    @property
    def norms(self) -> pd.Series:
        """The length of each layer's vector, with the layers as index."""
        lengths = [float(vector.norm()) for vector in self._tensors.values()]
        return pd.Series(lengths, index=pd.Index(self.layers, name="layer"), name="norm")

    @contextmanager
    def apply(
        self,
        vlm: VLM,
        layer: int,
        strength: float = 1.0,
        positions: Positions = "all",
        gate: Gate = None,
    ) -> Iterator[None]:
        r"""Add the vector of a layer inside a ``with`` block, :math:`h \leftarrow h + \alpha s`.

        Use it around ``vlm.generate``, ``vlm.forward`` or a capture. The vector is added in the
        prompt and in every step of a generation, by ``interventions.add``, and no longer when the
        block ends.

        Parameters
        ----------
        vlm : VLM
            The model that is steered, the one that the vectors were made for.
        layer : int
            The layer whose vector is added there.
        strength : float
            The factor :math:`\alpha`: 1 (the default) adds the vector as it is, 0 changes nothing,
            a negative number steers the other way.
        positions : str, tuple of str, or mask (b, t)
            Where it is added: "all" positions (the default); "last", the positions that predict
            (the prompt's last and all that follow); "generated", the answer's tokens; a span such
            as "image" or "question"; several of these; or a mask over the prompt.
        gate : mask (b,) or callable, optional
            Which samples of a batch are steered: a mask, or a function of the residual stream
            (b, t, d) that gives one, decided at the prompt, as :meth:`ConceptVectors.gate` makes
            it. None (the default) steers all.

        Raises
        ------
        LayerError
            If there is no vector for the layer, or the strength is not finite.
        InputError
            If there is no vector for the layer, or the strength is not finite. If the vectors are
            of another model. If the vector is zero, so that nothing would change.
        InterventionError
            If positions or gate do not fit the model or the batch.
        """
        vector = self.checked(vlm, layer, strength)
        with add(vlm, vector, layer, float(strength), positions, gate):
            yield

    def checked(self, vlm: VLM, layer: int, strength: float = 1.0) -> Float[Tensor, "d"]:
        """Return the vector of a layer if this model can be steered by it at this strength.

        Use it to find out before a long run what :meth:`apply` would refuse.

        Parameters
        ----------
        vlm : VLM
            The model that is to be steered.
        layer : int
            The layer whose vector is wanted.
        strength : float
            The factor to steer with; any finite number.

        Returns
        -------
        tensor (d,)
            The vector in float32, on the CPU.

        Raises
        ------
        LayerError
            If there is no vector for the layer, or the strength is not finite.
        InputError
            If there is no vector for the layer, or the strength is not finite. If the vectors are
            of another model. If the vector is zero, so that nothing would change.
        """
        vector = self[layer]
        model = self.provenance.get("model")
        require_equal(
            "models of the vectors and of what is steered",
            model,
            vlm.name,
            "make vectors of the model's own states",
        )
        require_equal(
            "widths of vectors and model",
            len(vector),
            vlm.width,
            "make vectors of the model's own states",
        )
        require(
            not isinstance(strength, bool) and isinstance(strength, Real) and isfinite(strength),
            f"strength is {strength!r}",
            "give a finite number",
        )
        if not vector.any():
            advice = (
                "choose a layer where the two sets differ (at layer 0 the "
                "same token has the same state)"
            )
            raise InputError(f"the vector of layer {layer} is zero", advice)
        return vector

    def save(self, path: str | Path) -> Path:
        """Write vectors and provenance to one safetensors file, which is whole or absent.

        :func:`load_vectors` reads it.

        Parameters
        ----------
        path : str or Path
            The file to write or to replace; its folder is made where it is missing.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        FileError
            If the file cannot be written.
        """
        metadata = {"format": _FORMAT, "provenance": json.dumps(self.provenance)}
        tensors = {str(layer): vector for layer, vector in self._tensors.items()}
        return save_tensors(path, tensors, metadata)


def load_vectors(path: str | Path) -> SteeringVectors:
    """Read the vectors that :meth:`SteeringVectors.save` wrote.

    Use it to steer in a later session, by vectors that know how they were made.

    Parameters
    ----------
    path : str or Path
        The safetensors file.

    Returns
    -------
    SteeringVectors
        The vectors, with their provenance.

    Raises
    ------
    LoadError
        If there is no such file, or it is damaged or no file of steering vectors.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors, load_vectors
    >>> vectors = SteeringVectors({24: torch.tensor([3.0, 4.0])}, {"how": "by hand"})
    >>> path = vectors.save(Path(mkdtemp()) / "vectors.safetensors")
    >>> load_vectors(path)[24].tolist()
    [3.0, 4.0]
    """
    try:
        tensors, metadata = load_tensors(path)
    except OSError as cause:
        raise LoadError(
            f"{path!s} cannot be read as steering vectors ({cause!s})",
            "give a file written by save",
        ) from cause
    if metadata.get("format") != _FORMAT:
        raise LoadError(f"{path!s} is no file of format {_FORMAT!r}", "give a file written by save")
    try:
        by_layer = {int(name): vector for name, vector in tensors.items()}
        return SteeringVectors(by_layer, json.loads(metadata["provenance"]))
    except (KeyError, TypeError, ValueError, RecursionError) as cause:
        raise LoadError(
            f"{path!s} is damaged: its content cannot be used ({cause!r})", "make the vectors again"
        ) from cause


def mean_difference(
    source: Activations, target: Activations, same_positions: bool = True
) -> SteeringVectors:
    r"""Make mean-difference vectors that steer from one set of samples to another.

    Use it to steer answers or style without training. For every layer captured the vector is
    :math:`s_l = \bar b_l - \bar a_l`, the mean activation of the target b minus that of the source
    a, with sums in float64 (arXiv 2501.03012).

    Parameters
    ----------
    source : Activations
        Activations (n, d) at the end of blocks, of samples that show what to steer away from.
    target : Activations
        Activations (m, d) of samples that show what to steer to, captured with the same model and
        prompt at the same layers.
    same_positions : bool
        True (the default) refuses sets that were read at different kinds of positions. False allows
        them, as the paper's captions (the mean over an answer, and the state at one word), where
        the vector also holds what tells these positions apart.

    Returns
    -------
    SteeringVectors
        A vector for each layer; a difference that is only rounding is zero.

    Raises
    ------
    InputError
        If model, prompt, layers, sites, widths or kinds of positions differ. If a set is empty, not
        finite or not (n, d), or source and target are the same. If no layer was captured at the end
        of its block.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations, mean_difference
    >>> def activations(rows):
    ...     table = pd.DataFrame({"sample": range(len(rows)), "id": list("abcdef")[: len(rows)]})
    ...     return Activations(
    ...         {(24, "resid_post"): torch.tensor(rows)}, table, {"model": "pocket-llava"}
    ...     )
    >>> day = activations([[0.0, 1.0], [2.0, 1.0]])
    >>> night = activations([[4.0, 1.0], [6.0, 3.0]])
    >>> vectors = mean_difference(day, night)
    >>> vectors
    SteeringVectors(mean difference, layers 24, 2 source, 2 target)
    >>> vectors[24].tolist()
    [4.0, 1.0]
    """
    member = torch.arange(len(source) + len(target)) >= len(source)
    return _mean_difference(source, target, member, {"how": "mean difference"}, same_positions)


def shuffled_control(
    source: Activations, target: Activations, seed: int = 0, same_positions: bool = True
) -> SteeringVectors:
    """Make the mean difference of two sets after their rows are dealt out anew at random.

    Use it as a control for :func:`mean_difference`: it is what a mean difference is when membership
    means nothing. The sets keep their sizes.

    Parameters
    ----------
    source : Activations
        Activations (n, d), as for :func:`mean_difference`.
    target : Activations
        Activations (m, d), as for :func:`mean_difference`.
    seed : int
        Of the random order of rows.
    same_positions : bool
        Whether the two sets must have been read at the same kind of positions (the default).

    Returns
    -------
    SteeringVectors
        A vector for each layer captured, with the seed in its provenance.

    Raises
    ------
    InputError
        If model, prompt, layers, sites, widths or kinds of positions differ. If a set is empty, not
        finite or not (n, d), or the means of the new sets are the same. If no layer was captured at
        the end of its block.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import shuffled_control
    >>> def activations(rows):
    ...     table = pd.DataFrame({"sample": range(len(rows)), "id": list("abcdef")[: len(rows)]})
    ...     return Activations(
    ...         {(24, "resid_post"): torch.tensor(rows)}, table, {"model": "pocket-llava"}
    ...     )
    >>> vectors = shuffled_control(
    ...     activations([[0.0], [1.0]]), activations([[10.0], [100.0]]), seed=3
    ... )
    >>> vectors
    SteeringVectors(shuffled mean difference, layers 24, 2 source, 2 target)
    >>> abs(vectors[24].item()) in (54.5, 45.5, 44.5)
    True
    """
    member = torch.arange(len(source) + len(target)) >= len(source)
    member = member[torch.randperm(len(member), generator=torch.Generator().manual_seed(seed))]
    record = {"how": "shuffled mean difference", "seed": seed}
    return _mean_difference(source, target, member, record, same_positions)


def random_control(vectors: SteeringVectors, seed: int = 0) -> SteeringVectors:
    """Draw random vectors, uniform in direction, as long as the given ones at each layer.

    Use it as a control: what vectors of this length do, whatever their direction.

    Parameters
    ----------
    vectors : SteeringVectors
        The vectors whose layers and lengths are taken over.
    seed : int
        Of the directions.

    Returns
    -------
    SteeringVectors
        Random vectors for the same model, with the seed in their provenance.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors, random_control
    >>> vectors = SteeringVectors({24: torch.tensor([3.0, 4.0])}, {"how": "by hand"})
    >>> control = random_control(vectors, seed=1)
    >>> control
    SteeringVectors(random, as long as: by hand, layers 24)
    >>> control.norms.round(2).tolist()
    [5.0]
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in vectors.layers:
        noise = torch.randn(len(vectors[layer]), generator=generator)
        tensors[layer] = noise * (vectors[layer].norm() / noise.norm())
    record = {"how": f"random, as long as: {vectors.provenance.get('how')}", "seed": seed}
    return SteeringVectors(tensors, vectors.provenance | record)


def require_like(
    source: Activations, target: Activations, same_positions: bool = True
) -> list[int]:
    """Check that two sets were captured alike, so that their means can be compared.

    Parameters
    ----------
    source, target : Activations
        The two sets of activations.
    same_positions : bool
        Whether the kinds of positions must be the same (the default).

    Returns
    -------
    list of int
        The layers captured at the end of their block, in order.

    Raises
    ------
    InputError
        If model, prompt, layers, sites, widths or kinds of positions differ. If a set is empty, not
        finite or not (n, d). If no layer was captured at the end of its block.
    """
    require_equal(
        "layers and sites",
        f"{source.layers} {source.sites}",
        f"{target.layers} {target.sites}",
        "capture both sets at the same",
    )
    of_source = source.provenance
    of_target = target.provenance
    for name in (*_COMMON, "prompt"):
        require_equal(
            name,
            of_source.get(name),
            of_target.get(name),
            "capture both sets with one model and one prompt",
        )
    source_kind = _position_kind(of_source)
    target_kind = _position_kind(of_target)
    if same_positions:
        require_equal(
            "kinds of positions",
            source_kind,
            target_kind,
            "capture both alike, or give same_positions=False",
        )
    layers = [layer for layer, site in source.tensors if site == WHOLE_BLOCK]
    require(
        layers,
        "no residual stream was captured",
        f"capture the site {WHOLE_BLOCK!r}; there are: {source.sites}",
    )
    for layer in layers:
        _require_rows(source[layer, WHOLE_BLOCK], target[layer, WHOLE_BLOCK], layer)
    return sorted(layers)


def about(states: Activations) -> dict[str, object]:
    """Describe which samples a capture is of and how they were read, by name or digest."""
    ids = digest(states.table["id"].tolist(), ensure_ascii=False)
    return {"n": len(states), "ids_sha256": ids} | _provenance(states, _BY_SIDE)


def made_from(states: Activations) -> dict[str, object]:
    """Return the part of a provenance that vectors share with the states they are made of."""
    versions = {"torch": torch.__version__, "xlvlms_tutorial": xlvlms_tutorial.__version__}
    return _provenance(states, _COMMON) | {"versions": versions}


def _provenance(states: Activations, names: Iterable[str]) -> dict[str, object]:
    """Return some entries of a provenance, None where there is none."""
    return {name: states.provenance.get(name) for name in names}


def _is_finite_vector(vector: Tensor) -> bool:
    if vector.ndim != 1 or not vector.is_floating_point() or not vector.numel():
        return False
    return bool(torch.isfinite(vector).all())


def _position_kind(provenance: Mapping[str, object]) -> str:
    """Where activations were read, whatever the words of interest are."""
    selection = dict(provenance.get("selection") or {})
    if "words" in selection:
        selection["words"] = "any"
    return str(selection | {"reduce": provenance.get("reduce")})


def _require_rows(source: Tensor, target: Tensor, layer: int) -> None:
    """Refuse activations of which a layer's means cannot be compared."""
    for rows in (source, target):
        require(
            rows.ndim == 2 and rows.numel(),
            f"states of shape {tuple(rows.shape)} at layer {layer}",
            "give sets (n, d) of one row or more",
        )
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        require(
            not bad,
            f"{bad} of {len(rows)} states are NaN or infinite at layer {layer}",
            "leave these samples out",
        )
    require_equal(
        f"widths at layer {layer}", source.shape[1], target.shape[1], "give states of one model"
    )


def _mean_difference(
    source: Activations,
    target: Activations,
    member: Bool[Tensor, "n"],
    record: dict,
    same_positions: bool,
) -> SteeringVectors:
    """The mean of the member rows of both sets minus that of the others, at every layer.

    What is only rounding is zero.
    """
    layers = require_like(source, target, same_positions)
    n_members = member.sum().double()
    n_others = (~member).sum().double()
    weights = torch.where(member, 1 / n_members, -1 / n_others)
    source_weights, target_weights = weights.split([len(source), len(target)])
    tensors = {}
    for layer in layers:
        source_sum = _weighted_sum(source[layer, WHOLE_BLOCK], source_weights)
        target_sum = _weighted_sum(target[layer, WHOLE_BLOCK], target_weights)
        vector = source_sum + target_sum
        size = source_sum.norm() + target_sum.norm()
        is_more = vector.norm() > _NEGLIGIBLE * size
        tensors[layer] = vector if is_more else torch.zeros_like(vector)
    differ = any(vector.any() for vector in tensors.values())
    require(
        differ,
        "source and target are the same",
        "give two sets of samples or of answers that differ",
    )
    samples = {"source": about(source), "target": about(target)}
    return SteeringVectors(tensors, made_from(source) | record | samples)


def _weighted_sum(rows: Float[Tensor, "n d"], weights: Float[Tensor, "n"]) -> Float[Tensor, "d"]:
    """Return the weighted sum of rows, in float64."""
    blocks = zip(rows.split(_ROWS), weights.split(_ROWS), strict=True)
    return sum(part @ block.double() for block, part in blocks)
