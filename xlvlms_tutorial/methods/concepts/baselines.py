"""The baselines of Semi-NMF in CoX-LMM (Parekh et al., 2024, arXiv 2406.08074).

Principal components, k-means, and a few of the samples themselves.
"""

import warnings

import numpy as np
import sklearn.cluster
import sklearn.decomposition
import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole

_NUMBERS = 1 << 24  # of distances, or of activations in float64, that exist at a time


class PCA(Dictionary):
    r"""Learn concepts as principal components.

    The best linear reconstruction with k directions, and a baseline for sparse or non-negative
    codes: its codes are dense and signed, so a direction has two opposite meanings.
    :math:`A - \bar a \approx Z D` with orthonormal D and :math:`Z = (A - \bar a) D^T`. Signs are
    such that the entry of largest size in each component is positive. The fit is that of
    scikit-learn's ``PCA``, by a full singular value decomposition on the CPU.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts k, at most d and at most the number of samples.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where codes are computed; "auto" is a GPU if there is one.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The dictionary D, most variance first.
    mean_ : ndarray (d,)
        The mean activation, which codes leave out and reconstructions add.
    explained_variance_ratio_ : ndarray (k,)
        Share of the variance along each component.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import PCA
    >>> A = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [9.0, 12.0]])
    >>> pca = PCA(n_components=1).fit(A)
    >>> pca.components_.round(2).tolist()
    [[0.6, 0.8]]
    >>> pca.transform(A).round(2).tolist()
    [[-7.5], [-2.5], [2.5], [7.5]]
    >>> pca.explained_variance_ratio_.round(2).tolist()
    [1.0]
    """

    def __init__(self, n_components: int = 20, device: str = "cpu") -> None:
        self.n_components = n_components
        self.device = device

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        width = A.shape[1]
        if self.n_components > width:
            raise InputError(
                f"n_components is {self.n_components}",
                f"activations of width {width} have at most {width} components",
            )
        pca = sklearn.decomposition.PCA(self.n_components, svd_solver="full").fit(A.cpu().numpy())
        # in memory as a file gives it back: the last digits of products depend on it
        self.components_ = np.ascontiguousarray(pca.components_)
        self.mean_ = pca.mean_
        self.explained_variance_ratio_ = pca.explained_variance_ratio_

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return (A - self._fitted("mean_", A)) @ self._fitted("components_", A).T

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return super()._decode(Z) + self._fitted("mean_", Z)


class _Prototypes(Dictionary):
    r"""Base of dictionaries whose concepts are points in the space of activations.

    Codes fall with the distance, :math:`Z_{ik} = 1 / (1 + \lVert a_i - d_k \rVert)`; the
    reconstruction of a sample is the nearest point.
    """

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        # From differences: where activations share a large part, products lose all digits, and
        # they depend on the number of rows
        centres = self._fitted("components_", A).double()
        n_rows = max(1, _NUMBERS // max(self.n_components, A.shape[1]))
        codes = []
        for rows in A.split(n_rows):
            distances = torch.cdist(
                rows.double(), centres, compute_mode="donot_use_mm_for_euclid_dist"
            )
            codes.append(1 / (1 + distances))
        return torch.cat(codes).to(A.dtype)

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return self._fitted("components_", Z)[Z.argmax(dim=1)]


class KMeans(_Prototypes):
    r"""Learn concepts as the means of clusters.

    Use it where each sample should belong to one concept. The fit is that of scikit-learn's
    ``KMeans``: Lloyd's algorithm from k-means++ starts looks for
    :math:`\min_{D, c} \sum_i \lVert a_i - d_{c(i)} \rVert^2`, on the CPU. Codes are
    :math:`1 / (1 + \lVert a_i - d_k \rVert)`, in (0, 1], as in the code released with CoX-LMM
    (Parekh et al., 2024, arXiv 2406.08074); ``inverse_transform`` returns the centre of the largest
    code, so ``reconstruct`` returns the nearest centre.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts k.
    n_init : int, default 4
        Number of starts; the result with the lowest inertia is kept.
    max_iter : int, default 300
        Largest number of steps from each start. A warning says where they were not enough.
    seed : int, default 0
        Seed of the starts.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where codes are computed; "auto" is a GPU if there is one.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The centres.
    labels_ : ndarray (n,)
        The cluster of each fitted sample.
    inertia_ : float
        Sum of squared distances to the nearest centre.
    n_iter_ : int
        Steps from the start that gave the result.
    converged_ : bool
        Whether these were fewer than ``max_iter``.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import KMeans
    >>> A = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    >>> kmeans = KMeans(n_components=2, seed=0).fit(A)
    >>> sorted(np.round(kmeans.components_, 2).tolist())
    [[0.0, 1.0], [10.0, 1.0]]
    >>> round(kmeans.inertia_, 2), kmeans.converged_
    (4.0, True)
    >>> np.round(kmeans.reconstruct([[9.0, 5.0]]), 2).tolist()
    [[10.0, 1.0]]
    """

    def __init__(
        self,
        n_components: int = 20,
        n_init: int = 4,
        max_iter: int = 300,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.n_init = n_init
        self.max_iter = max_iter
        self.seed = seed
        self.device = device

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for name in ("n_init", "max_iter"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, least=0)

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        kmeans = sklearn.cluster.KMeans(
            self.n_components,
            n_init=self.n_init,
            max_iter=self.max_iter,
            tol=0.0,
            random_state=self.seed,
            algorithm="lloyd",
        )
        # several threads would add up the samples of a cluster in an order that varies
        with threadpool_limits(1, user_api="openmp"):
            kmeans.fit(A.cpu().numpy())
        self.n_iter_ = kmeans.n_iter_
        self.converged_ = self.n_iter_ < self.max_iter
        if not self.converged_:
            warnings.warn(
                f"no convergence in {self.max_iter} steps; raise max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.components_ = kmeans.cluster_centers_
        self.labels_ = kmeans.labels_
        self.inertia_ = float(kmeans.inertia_)


class Simple(_Prototypes):
    r"""Take the k samples of largest norm as concepts, largest first.

    The simplest baseline: a dictionary of real samples, without any learning. As for
    :class:`KMeans`, codes are :math:`1 / (1 + \lVert a_i - d_k \rVert)`, and the reconstruction of
    a sample is the nearest concept.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts k.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where the fit and the codes are computed; "auto" is a GPU if there is one.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The samples.
    rows_ : ndarray (k,)
        The rows of these samples in the fitted activations.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.concepts import Simple
    >>> simple = Simple(n_components=2).fit([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    >>> simple.rows_.tolist(), simple.components_.tolist()
    ([1, 2], [[0.0, 3.0], [2.0, 0.0]])
    >>> simple.transform([[2.0, 0.0]]).round(2).tolist()
    [[0.22, 1.0]]
    """

    def __init__(self, n_components: int = 20, device: str = "cpu") -> None:
        self.n_components = n_components
        self.device = device

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        rows = torch.sort(A.norm(dim=1), descending=True, stable=True).indices[: self.n_components]
        self.components_ = A[rows].cpu().numpy()
        self.rows_ = rows.cpu().numpy()
