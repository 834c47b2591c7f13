r"""What all dictionaries of concepts share.

Activations A (n, d) are written as codes Z (n, k) times a dictionary D (k, d).
:math:`A \approx Z D`: row j of D is concept j, and :math:`Z_{ij}` how much of it is in sample i.
(CoX-LMM, arXiv 2406.08074, writes :math:`Z \approx U V` with samples as columns.)
"""

import json
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from xlvlms_tutorial.errors import ActivationsError, ComparisonError, LoadError, SelectionError
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.models.devices import place

_FORMAT = "xlvlms dictionary 1"
_MATRIX = "give one row for each sample and one column for each dimension, all finite"


class Dictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Base of all dictionaries.

    scikit-learn's conventions, NumPy arrays or torch tensors in, NumPy arrays out. A subclass
    fits ``components_`` in ``_fit`` and gives codes in ``_encode``; both get a checked tensor
    on the device. What it keeps in attributes that end in "_" (arrays of numbers, or what
    JSON knows) is saved and loaded.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The dictionary D, one concept a row.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.
    provenance_ : dict
        What was said about the dictionary when it was saved; only after :func:`load_dictionary`.
    """

    n_components: int
    device: str

    def fit(self, A: ArrayLike | Tensor, y: object = None) -> "Dictionary":
        """Learn the dictionary from activations (n, d); ``y`` is ignored.

        Raises
        ------
        SelectionError
            If a parameter has a value that makes no sense.
        ActivationsError
            If the activations are no matrix of finite numbers, are fewer than the concepts, or all
            the same. (A dimension that has the same value in all samples, such as a dead neuron or
            a massive one in bfloat16, is no harm.)
        LoadError
            If this machine does not have the device.
        """
        self._check_parameters()
        tensor = self._tensor(self._checked(A, fitting=True))
        if len(tensor) < self.n_components:
            advice = "give at least as many samples as concepts, or lower n_components"
            raise ActivationsError(
                f"{len(tensor)} samples for {self.n_components} concepts", advice
            )
        if (tensor == tensor[0]).all():
            raise ActivationsError(
                f"all {len(tensor)} samples are the same", "give samples that differ"
            )
        self._fit(tensor)
        return self

    def transform(self, A: ArrayLike | Tensor) -> np.ndarray:
        """The codes Z (n, k) of activations (n, d), in the number format of the activations.

        Raises
        ------
        ActivationsError
            If the activations are no matrix of finite numbers.
        ComparisonError
            If they are not as wide as those that the dictionary was fitted on.
        NotFittedError
            If nothing was fitted (scikit-learn's error, a ValueError).
        """
        check_is_fitted(self)
        return self._encode(self._tensor(self._checked(A))).cpu().numpy()

    def inverse_transform(self, Z: ArrayLike | Tensor) -> np.ndarray:
        """The activations (n, d) that codes (n, k) stand for.

        Raises
        ------
        ActivationsError
            If the codes are no matrix of finite numbers.
        ComparisonError
            If there is not one column for each concept.
        NotFittedError
            If nothing was fitted.
        """
        check_is_fitted(self)
        codes = _finite(_array(Z))
        if codes.ndim != 2 or codes.shape[1] != len(self.components_):
            advice = "give codes (n, k) of this dictionary"
            raise ComparisonError(
                "shapes of the codes", ("n", len(self.components_)), codes.shape, advice
            )
        return self._decode(self._tensor(codes)).cpu().numpy()

    def reconstruct(self, A: ArrayLike | Tensor) -> np.ndarray:
        """What the dictionary keeps of activations (n, d): ``inverse_transform(transform(A))``.

        Raises as these do.
        """
        return self.inverse_transform(_array(self.transform(A)))

    def save(self, path: str | Path, provenance: Mapping[str, object]) -> Path:
        """Write the dictionary, its parameters and what it was made from to a safetensors file.

        What it was made from is anything JSON knows.

        Raises
        ------
        NotFittedError
            If nothing was fitted.
        OutputError
            If the file cannot be written.
        """
        check_is_fitted(self)
        known = {
            name: value
            for name, value in vars(self).items()
            if name.endswith("_") and name != "provenance_"
        }
        arrays = {
            name: value
            for name, value in known.items()
            if isinstance(value, np.ndarray) and value.dtype != object
        }
        others = {name: value for name, value in known.items() if name not in arrays}
        told = {
            "class": type(self).__name__,
            "parameters": self.get_params(),
            "fitted": others,
            "provenance": dict(provenance),
        }
        return save_tensors(
            path, arrays, {"format": _FORMAT} | {name: _json(value) for name, value in told.items()}
        )

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        """Set ``components_`` and what else is learnt."""
        raise NotImplementedError

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        raise NotImplementedError

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return Z @ self._fitted("components_", Z)

    def _check_parameters(self) -> None:
        """Refuse parameters before anything is computed; a subclass adds its own."""
        whole("n_components", self.n_components)

    def _check_fitted(self) -> None:
        """Whether what a file holds goes together.

        Every number finite, and codes and activations of the right shapes.
        """
        k, d, kept = self.n_components, self.n_features_in_, self.components_
        if kept.shape != (k, d):
            raise ValueError(f"components of shape {kept.shape}, for {k} concepts of width {d}")
        for name, value in vars(self).items():
            if (
                isinstance(value, np.ndarray)
                and value.dtype.kind == "f"
                and not np.isfinite(value).all()
            ):
                raise ValueError(f"{name} holds NaN or infinite values")
        # not on the device, which this machine may lack
        self._decode(self._encode(torch.zeros(1, d, dtype=torch.float64)))

    def _fitted(self, name: str, like: Tensor) -> Tensor:
        """A fitted array on the device and in the number format of a tensor."""
        return torch.as_tensor(getattr(self, name)).to(like)

    def _checked(self, A: ArrayLike | Tensor, fitting: bool = False) -> np.ndarray:
        known = None if fitting else self.n_features_in_
        try:
            found = validate_data(
                self,
                _array(A),
                reset=fitting,
                dtype=[np.float64, np.float32],
                ensure_all_finite=False,
            )
        except ValueError as cause:
            shape = np.shape(A)
            if known is not None and len(shape) == 2 and shape[1] != known:
                raise ComparisonError(
                    "widths of the activations", known, shape[1], str(cause).rstrip(".")
                ) from cause
            raise ActivationsError(
                f"these activations cannot be used: {str(cause).strip().rstrip('.')}", _MATRIX
            ) from cause
        return _finite(found)

    def _tensor(self, array: np.ndarray) -> Tensor:
        if self.device == "balanced":
            raise SelectionError("device 'balanced' is for models", "give cpu, cuda or auto")
        with_strides = np.ascontiguousarray(array)
        return torch.from_numpy(
            with_strides if with_strides.flags.writeable else with_strides.copy()
        ).to(place(self.device))

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def load_dictionary(path: str | Path) -> Dictionary:
    """A dictionary that :meth:`Dictionary.save` wrote.

    What was said about it is in ``provenance_``.

    Raises
    ------
    LoadError
        If there is no such file, or it is damaged, not a dictionary, or of a class
        that this package does not have.
    """
    try:
        arrays, told = load_tensors(path, "np")
    except OSError as cause:
        raise LoadError(
            f"{path!s} cannot be read as a dictionary ({cause!s})",
            "give a file written by save, or fit it again",
        ) from cause
    if told.get("format") != _FORMAT:
        raise LoadError(
            f"{path!s} is no dictionary of format {_FORMAT!r}", "give a file written by save"
        )
    try:
        return _restored(
            path,
            arrays,
            {
                part: json.loads(told[part])
                for part in ("class", "parameters", "fitted", "provenance")
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as cause:
        if isinstance(cause, LoadError):
            raise
        raise LoadError(
            f"{path!s} is damaged: its description cannot be used ({cause!r})",
            "fit the dictionary again",
        ) from cause


def _restored(
    path: str | Path, arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]
) -> Dictionary:
    # all of them: whoever imports this module has imported the package, which imports every class
    kinds = _kinds(Dictionary)
    if told["class"] not in kinds:
        raise LoadError(
            f"{path!s} holds a dictionary of class {told['class']!r}",
            f"known: {', '.join(sorted(kinds))}",
        )
    found = kinds[told["class"]](**told["parameters"])
    found._check_parameters()
    for key, value in (arrays | told["fitted"]).items():
        if not key.endswith("_") or key.startswith("_") or hasattr(type(found), key):
            raise ValueError(f"{key!r} is nothing that is fitted")
        setattr(found, key, np.array(value, dtype=object) if key == "feature_names_in_" else value)
    found.provenance_ = dict(told["provenance"])
    found._check_fitted()
    return found


def _kinds(base: type) -> dict[str, type]:
    """All dictionaries by name; those that only others are made from begin with an underscore."""
    found = {
        name: kind
        for child in base.__subclasses__()
        for name, kind in ({child.__name__: child} | _kinds(child)).items()
    }
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def _array(A: Any) -> Any:
    """Tensors as arrays and halves as float32; anything else as it is."""
    if isinstance(A, (Tensor, np.ma.MaskedArray)) or (
        isinstance(A, np.ndarray) and A.dtype.kind in "US"
    ):
        return plain(A)
    return A.astype(np.float32) if isinstance(A, np.ndarray) and A.dtype == np.float16 else A


def _finite(numbers: ArrayLike) -> np.ndarray:
    found = plain(numbers)
    found = found if found.dtype in (np.float32, np.float64) else found.astype(np.float64)
    if bad := found.size - int(np.isfinite(found).sum()):
        told = f"{bad} of {found.size} numbers are NaN or infinite"
        raise ActivationsError(
            told, "leave the samples that hold them out, and check how they were captured"
        )
    return found


def whole(name: str, value: object, least: int = 1) -> None:
    """Refuse a parameter that is no whole number of so much at least.

    ``SelectionError`` says what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SelectionError(f"{name} is {value!r}", f"give a whole number of {least} or more")


def _json(value: object) -> str:
    # NumPy's numbers and arrays of names
    return json.dumps(value, default=lambda other: other.tolist())
