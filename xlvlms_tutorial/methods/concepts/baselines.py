"""The baselines of Semi-NMF in CoX-LMM (Parekh et al., 2024, arXiv 2406.08074).

Principal components, k-means, and a few of the samples themselves.
"""

import warnings
from functools import partial

import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole

_NUMBERS = 1 << 24  # of distances, or of activations in float64, that exist at a time


class PCA(Dictionary):
    r"""Learn concepts as principal components.

    The best linear reconstruction with k directions, and a baseline for sparse or non-negative
    codes: its codes are dense and signed, so a direction has two opposite meanings.
    :math:`A - \bar a \approx Z D` with orthonormal D and :math:`Z = (A - \bar a) D^T`. Signs are
    such that the entry of largest size in each component is positive.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts k, at most d and at most the number of samples.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where the fit and the codes are computed; "auto" is a GPU if there is one.

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
        n, d = A.shape
        if self.n_components > d:
            raise SelectionError(
                f"n_components is {self.n_components}",
                f"activations of width {d} have at most {d} components",
            )
        mean = A.mean(dim=0)
        centred = A - mean
        D, variances = _principal(centred, self.n_components)
        signs = D.gather(1, D.abs().argmax(dim=1, keepdim=True)).sign()
        ratio = variances / centred.square().sum(dtype=torch.float64)
        self.components_ = (D * signs).cpu().numpy()
        self.mean_ = mean.cpu().numpy()
        self.explained_variance_ratio_ = ratio.to(A.dtype).cpu().numpy()

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
        distances = partial(
            torch.cdist,
            x2=self._fitted("components_", A).double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        blocks = A.split(max(1, _NUMBERS // max(self.n_components, A.shape[1])))
        return torch.cat([1 / (1 + distances(rows.double())) for rows in blocks]).to(A.dtype)

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return self._fitted("components_", Z)[Z.argmax(dim=1)]


class KMeans(_Prototypes):
    r"""Learn concepts as the means of clusters.

    Use it where each sample should belong to one concept. Lloyd's algorithm from k-means++ starts
    looks for :math:`\min_{D, c} \sum_i \lVert a_i - d_{c(i)} \rVert^2`. Codes are
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
        Where the fit and the codes are computed; "auto" is a GPU if there is one.

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
        Whether no sample changed its cluster in the last of them.
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
        random = torch.Generator().manual_seed(int(self.seed))
        mean = A.mean(dim=0)  # a common offset would cost the distances most of their digits
        A = A - mean
        squares = A.square().sum(dim=1)
        runs = []
        for _ in range(self.n_init):
            start = _plus_plus(A, squares, self.n_components, random)
            runs.append(_lloyd(A, squares, start, self.max_iter))
        inertia, centres, labels, self.n_iter_, self.converged_ = min(runs, key=lambda run: run[0])
        if not self.converged_:
            warnings.warn(
                f"no convergence in {self.max_iter} steps; raise max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.components_ = (centres + mean).cpu().numpy()
        self.labels_ = labels.cpu().numpy()
        self.inertia_ = inertia


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


def _principal(A: Float[Tensor, "n d"], k: int) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """Right singular vectors with their squared singular values, in float64.

    From the smaller of the two Gram matrices.
    """
    n, d = A.shape
    products = (A @ A.T if n < d else A.T @ A).double()
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    if n >= d:
        return vectors.T.to(A.dtype), values.clamp(min=0)
    # QR makes them orthonormal also where the variance is only rounding
    D = torch.linalg.qr((vectors.T.to(A.dtype) @ A).T)[0].T
    return D, values.clamp(min=0)


def _plus_plus(
    A: Float[Tensor, "n d"], squares: Float[Tensor, "n"], k: int, random: torch.Generator
) -> Float[Tensor, "k d"]:
    """Centres drawn with a probability that is the squared distance to the nearest one so far.

    Of a few candidates the one that lowers the inertia most is taken.
    """
    n_candidates = 2 + int(torch.tensor(float(k)).log())
    centres = [int(torch.randint(len(A), (1,), generator=random))]
    nearest = (A - A[centres[0]]).square().sum(dim=1)
    for _ in range(1, k):
        weights = nearest.double().cpu() + 1e-30  # equal samples still give k centres
        candidates = torch.multinomial(weights, n_candidates, replacement=True, generator=random)
        candidates = candidates.to(A.device)
        distances = squares + squares[candidates, None] - 2 * A[candidates] @ A.T
        distances = torch.minimum(nearest, distances).clamp_(min=0)
        best = int(distances.sum(dim=1).argmin())
        nearest = distances[best]
        centres.append(int(candidates[best]))
    return A[centres]


def _lloyd(
    A: Float[Tensor, "n d"],
    squares: Float[Tensor, "n"],
    centres: Float[Tensor, "k d"],
    max_iter: int,
) -> tuple[float, Float[Tensor, "k d"], Int[Tensor, "n"], int, bool]:
    """Inertia, centres, labels, number of steps, and whether the labels have settled."""
    labels = None
    for step in range(1, max_iter + 1):
        previous = labels
        labels, nearest = _assigned(A, squares, centres)
        if previous is not None and torch.equal(previous, labels):
            return float(nearest.sum(dtype=torch.float64)), centres, labels, step, True
        centres = _means(A, labels, nearest, centres)
    labels, nearest = _assigned(A, squares, centres)
    return float(nearest.sum(dtype=torch.float64)), centres, labels, max_iter, False


def _assigned(
    A: Float[Tensor, "n d"], squares: Float[Tensor, "n"], centres: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The nearest centre of each sample, and its squared distance."""
    # without the sample's own square, which is the same for all centres
    smallest = torch.addmm(centres.square().sum(dim=1), A, centres.T, alpha=-2).min(dim=1)
    return smallest.indices, (smallest.values + squares).clamp_(min=0)


def _means(A: Tensor, labels: Tensor, nearest: Tensor, centres: Tensor) -> Float[Tensor, "k d"]:
    """Means of the clusters; an empty cluster moves to a sample that is far from its centre."""
    member = torch.nn.functional.one_hot(labels, len(centres)).to(A.dtype)
    sizes = member.sum(dim=0)
    means = member.T @ A / sizes.clamp(min=1)[:, None]
    empty = (sizes == 0).nonzero().flatten()
    means[empty] = A[nearest.topk(len(empty)).indices]
    return means
