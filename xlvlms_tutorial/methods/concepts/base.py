r"""The base class of all dictionaries of concepts, and how one is loaded.

Activations A (n, d) are decomposed into codes Z (n, k) times a dictionary D (k, d).
:math:`A \approx Z D`: row j of D is concept j, and :math:`Z_{ij}` is the amount of it in sample i.
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

from xlvlms_tutorial.errors import InputError, LoadError, incomparable
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.models.devices import resolve_device

_FORMAT = "xlvlms dictionary 1"
_MATRIX = "give one row for each sample and one column for each dimension, all finite"


class Dictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Base class of all dictionaries of concepts.

    Use one of its subclasses, or derive your own. All follow scikit-learn's conventions: NumPy
    arrays or torch tensors in, NumPy arrays out. A subclass fits ``components_`` in ``_fit`` and
    computes codes in ``_encode``; both receive a checked tensor on the device. Attributes that end
    in "_" (arrays of numbers, or values that JSON can represent) are saved and loaded.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The dictionary D, one concept a row.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.
    provenance_ : dict
        The provenance given to :meth:`save`; only after :func:`load_dictionary`.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import Simple
    >>> A = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    >>> dictionary = Simple(n_components=2).fit(A)
    >>> dictionary.transform(A).shape
    (3, 2)
    >>> dictionary.inverse_transform([[0.2, 1.0]]).tolist()
    [[0.0, 2.0]]
    >>> dictionary.reconstruct(A).tolist()
    [[3.0, 0.0], [0.0, 2.0], [3.0, 0.0]]
    """

    n_components: int
    device: str

    def fit(self, A: ArrayLike | Tensor, y: object = None) -> "Dictionary":
        """Learn the dictionary from activations.

        Parameters
        ----------
        A : array, DataFrame or tensor (n, d)
            Activations of n samples, with n at least ``n_components``. Half precision is computed
            in float32.
        y : object, optional
            Ignored; scikit-learn's pipelines pass it.

        Returns
        -------
        Dictionary
            The fitted dictionary itself.

        Raises
        ------
        InputError
            If a parameter has a value that is not allowed. If the activations are no matrix of
            finite numbers, are fewer than the concepts, or all the same. (A dimension that has the
            same value in all samples, such as a dead neuron or a massive one in bfloat16, does no
            harm.)
        LoadError
            If this machine does not have the device.
        """
        self._check_parameters()
        tensor = self._tensor(self._checked(A, fitting=True))
        if len(tensor) < self.n_components:
            advice = "give at least as many samples as concepts, or lower n_components"
            raise InputError(f"{len(tensor)} samples for {self.n_components} concepts", advice)
        if (tensor == tensor[0]).all():
            raise InputError(f"all {len(tensor)} samples are the same", "give samples that differ")
        self._fit(tensor)
        return self

    def transform(self, A: ArrayLike | Tensor) -> np.ndarray:
        """Compute the codes of activations.

        Parameters
        ----------
        A : array, DataFrame or tensor (n, d)
            Activations, as wide as those that the dictionary was fitted on.

        Returns
        -------
        ndarray (n, k)
            The codes Z, in the dtype of the activations.

        Raises
        ------
        InputError
            If the activations are no matrix of finite numbers. If they are not as wide as those
            that the dictionary was fitted on.
        NotFittedError
            If the dictionary was not fitted (scikit-learn's error, a ValueError).
        """
        check_is_fitted(self)
        return self._encode(self._tensor(self._checked(A))).cpu().numpy()

    def inverse_transform(self, Z: ArrayLike | Tensor) -> np.ndarray:
        """Compute the activations that codes stand for.

        Parameters
        ----------
        Z : array or tensor (n, k)
            Codes, one column for each concept.

        Returns
        -------
        ndarray (n, d)
            The reconstructed activations.

        Raises
        ------
        InputError
            If the codes are no matrix of finite numbers. If there is not one column for each
            concept.
        NotFittedError
            If the dictionary was not fitted.
        """
        check_is_fitted(self)
        codes = _finite(_array(Z))
        if codes.ndim != 2 or codes.shape[1] != len(self.components_):
            advice = "give codes (n, k) of this dictionary"
            raise incomparable(
                "shapes of the codes", ("n", len(self.components_)), codes.shape, advice
            )
        return self._decode(self._tensor(codes)).cpu().numpy()

    def reconstruct(self, A: ArrayLike | Tensor) -> np.ndarray:
        """Reconstruct activations from their codes: ``inverse_transform(transform(A))``.

        Parameters
        ----------
        A : array, DataFrame or tensor (n, d)
            Activations, as wide as those that the dictionary was fitted on.

        Returns
        -------
        ndarray (n, d)
            The part of the activations that the dictionary captures.

        Raises
        ------
        InputError
            If the activations are no matrix of finite numbers. If they are not as wide as those
            that the dictionary was fitted on.
        NotFittedError
            If the dictionary was not fitted.
        """
        return self.inverse_transform(_array(self.transform(A)))

    def save(self, path: str | Path, provenance: Mapping[str, object]) -> Path:
        """Write the dictionary, its parameters and its provenance to a safetensors file.

        Parameters
        ----------
        path : str or Path
            The file to write.
        provenance : mapping
            How the activations were made (model, layer, prompt ...), as far as JSON can represent
            it.

        Returns
        -------
        Path
            The file, which :func:`load_dictionary` reads.

        Raises
        ------
        NotFittedError
            If the dictionary was not fitted.
        FileError
            If the file cannot be written.
        """
        check_is_fitted(self)
        arrays = {}
        values = {}
        for name, value in vars(self).items():
            if not name.endswith("_") or name == "provenance_":
                continue
            if isinstance(value, np.ndarray) and value.dtype != object:
                arrays[name] = value
            else:
                values[name] = value
        metadata = {
            "format": _FORMAT,
            "class": _json(type(self).__name__),
            "parameters": _json(self.get_params()),
            "fitted": _json(values),
            "provenance": _json(dict(provenance)),
        }
        return save_tensors(path, arrays, metadata)

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        """Set ``components_`` and all other learnt attributes."""
        raise NotImplementedError

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        raise NotImplementedError

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return Z @ self._fitted("components_", Z)

    def _check_parameters(self) -> None:
        """Refuse parameters before anything is computed; a subclass adds its own."""
        whole("n_components", self.n_components)

    def _check_fitted(self) -> None:
        """Check that the attributes read from a file are consistent.

        Every number is finite, and codes and activations have the right shapes.
        """
        k, d = self.n_components, self.n_features_in_
        shape = self.components_.shape
        if shape != (k, d):
            raise ValueError(f"components of shape {shape}, for {k} concepts of width {d}")
        for name, value in vars(self).items():
            is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
            if is_float and not np.isfinite(value).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        # on the CPU: this machine may not have the device
        self._decode(self._encode(torch.zeros(1, d, dtype=torch.float64)))

    def _fitted(self, name: str, like: Tensor) -> Tensor:
        """A fitted array on the device and in the dtype of a tensor."""
        return torch.as_tensor(getattr(self, name)).to(like)

    def _checked(self, A: ArrayLike | Tensor, fitting: bool = False) -> np.ndarray:
        """Return activations as a finite matrix of floating-point numbers, or refuse them."""
        width = None if fitting else self.n_features_in_
        try:
            array = validate_data(
                self,
                _array(A),
                reset=fitting,
                dtype=[np.float64, np.float32],
                ensure_all_finite=False,
            )
        except ValueError as cause:
            shape = np.shape(A)
            if width is not None and len(shape) == 2 and shape[1] != width:
                raise incomparable(
                    "widths of the activations", width, shape[1], str(cause).rstrip(".")
                ) from cause
            reason = str(cause).strip().rstrip(".")
            raise InputError(f"these activations cannot be used: {reason}", _MATRIX) from cause
        return _finite(array)

    def _tensor(self, array: np.ndarray) -> Tensor:
        if self.device == "balanced":
            raise InputError("device 'balanced' is for models", "give cpu, cuda or auto")
        contiguous = np.ascontiguousarray(array)
        if not contiguous.flags.writeable:  # torch would warn of a tensor that may be written to
            contiguous = contiguous.copy()
        return torch.from_numpy(contiguous).to(resolve_device(self.device))

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def load_dictionary(path: str | Path) -> Dictionary:
    """Load a dictionary that :meth:`Dictionary.save` wrote.

    Use it to interpret activations with concepts that were learnt earlier, or by someone else.

    Parameters
    ----------
    path : str or Path
        The safetensors file.

    Returns
    -------
    Dictionary
        The fitted dictionary, of the class that was saved; its ``provenance_`` says how the
        activations were made.

    Raises
    ------
    LoadError
        If there is no such file, or it is damaged, not a dictionary, or of a class that this
        package does not have.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from xlvlms_tutorial.methods.concepts import Simple, load_dictionary
    >>> dictionary = Simple(n_components=1).fit([[3.0, 0.0], [0.0, 2.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = dictionary.save(Path(folder) / "simple.safetensors", {"layer": 15})
    ...     loaded = load_dictionary(path)
    >>> loaded.components_.tolist(), loaded.provenance_
    ([[3.0, 0.0]], {'layer': 15})
    """
    try:
        arrays, metadata = load_tensors(path, "np")
    except OSError as cause:
        raise LoadError(
            f"{path!s} cannot be read as a dictionary ({cause!s})",
            "give a file written by save, or fit it again",
        ) from cause
    if metadata.get("format") != _FORMAT:
        raise LoadError(
            f"{path!s} is no dictionary of format {_FORMAT!r}", "give a file written by save"
        )
    try:
        parts = ("class", "parameters", "fitted", "provenance")
        description = {part: json.loads(metadata[part]) for part in parts}
        return _restored(path, arrays, description)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as cause:
        if isinstance(cause, LoadError):
            raise
        raise LoadError(
            f"{path!s} is damaged: its description cannot be used ({cause!r})",
            "fit the dictionary again",
        ) from cause


def _restored(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> Dictionary:
    """Make the dictionary that a file holds, and check that it is fitted."""
    # every class is there: importing this module imports the package, which imports all of them
    classes = _subclasses(Dictionary)
    name = metadata["class"]
    if name not in classes:
        raise LoadError(
            f"{path!s} holds a dictionary of class {name!r}",
            f"known: {', '.join(sorted(classes))}",
        )
    dictionary = classes[name](**metadata["parameters"])
    dictionary._check_parameters()
    for key, value in (arrays | metadata["fitted"]).items():
        if not key.endswith("_") or key.startswith("_") or hasattr(type(dictionary), key):
            raise ValueError(f"{key!r} is nothing that is fitted")
        is_names = key == "feature_names_in_"
        setattr(dictionary, key, np.array(value, dtype=object) if is_names else value)
    dictionary.provenance_ = dict(metadata["provenance"])
    dictionary._check_fitted()
    return dictionary


def _subclasses(base: type) -> dict[str, type]:
    """All classes derived from a class, by name.

    Names with an underscore are left out: they only serve as bases of others.
    """
    classes = {}
    for child in base.__subclasses__():
        if not child.__name__.startswith("_"):
            classes[child.__name__] = child
        classes |= _subclasses(child)
    return classes


def _array(A: Any) -> Any:
    """Tensors as arrays and half precision as float32; anything else unchanged."""
    is_array = isinstance(A, np.ndarray)
    if isinstance(A, (Tensor, np.ma.MaskedArray)) or (is_array and A.dtype.kind in "US"):
        return plain(A)
    if is_array and A.dtype == np.float16:
        return A.astype(np.float32)
    return A


def _finite(numbers: ArrayLike) -> np.ndarray:
    array = plain(numbers)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InputError(
            f"{bad} of {array.size} numbers are NaN or infinite",
            "leave the samples that hold them out, and check how they were captured",
        )
    return array


def whole(name: str, value: object, least: int = 1) -> None:
    """Refuse a parameter that is not an integer, or is too small.

    Parameters
    ----------
    name : str
        Name of the parameter, for the message.
    value : object
        Its value.
    least : int, default 1
        The smallest value that is allowed.

    Raises
    ------
    InputError
        With the values that are allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value!r}", f"give a whole number of {least} or more")


def _json(value: object) -> str:
    # NumPy's numbers and arrays of names
    return json.dumps(value, default=lambda array: array.tolist())
