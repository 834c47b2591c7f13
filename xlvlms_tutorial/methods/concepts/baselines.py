"""What Semi-NMF is compared with in CoX-LMM (arXiv 2406.08074).

Principal components, k-means, and samples taken as they are.
"""

import warnings
from functools import partial

import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole

_NUMBERS = 1 << 24  # of distances, or of states in float64, that exist at a time


class PCA(Dictionary):
    r"""Principal components.

    :math:`A - \bar a \approx Z D` with orthonormal D and signed codes :math:`Z = (A - \bar a) D^T`.
    The sign of each component is that of its largest entry, which is positive.

    Parameters
    ----------
    n_components
        Number of concepts k, at most d.
    device
        "cpu", "cuda" or "auto".

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
        self.components_ = (D * signs).cpu().numpy()
        self.mean_ = mean.cpu().numpy()
        self.explained_variance_ratio_ = (
            (variances / centred.square().sum(dtype=torch.float64)).to(A.dtype).cpu().numpy()
        )

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return (A - self._fitted("mean_", A)) @ self._fitted("components_", A).T

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return super()._decode(Z) + self._fitted("mean_", Z)


class _Prototypes(Dictionary):
    r"""Concepts that are points, each code of which falls with the distance.

    The code is :math:`Z_{ik} = 1 / (1 + \lVert a_i - d_k \rVert)`, and
    stands for the nearest of them.
    """

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        # By differences: where states share a large part, products lose it all, and they
        # depend on how many rows there are
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
    r"""Means of clusters, by Lloyd's steps from k-means++ starts.

    They minimise :math:`\min_{D, c} \sum_i \lVert a_i - d_{c(i)} \rVert^2`. Codes are
    :math:`1 / (1 + \lVert a_i - d_k \rVert)`, in (0, 1], as in the code released with CoX-LMM;
    ``inverse_transform`` gives the centre of the largest code, so ``reconstruct`` the nearest one.

    Parameters
    ----------
    n_components
        Number of concepts k.
    n_init
        Starts, of which the one with the lowest inertia is kept.
    max_iter
        Most steps from each start.
    seed
        Of the starts.
    device
        "cpu", "cuda" or "auto".

    Attributes
    ----------
    components_ : ndarray (k, d)
        The centres.
    labels_ : ndarray (n,)
        The cluster of each fitted sample.
    inertia_ : float
        Sum of squared distances to the nearest centre.
    n_iter_ : int
        Steps from the start that was kept.
    converged_ : bool
        Whether no sample changed its cluster in the last of them.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.
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
        runs = [
            _lloyd(A, squares, _plus_plus(A, squares, self.n_components, random), self.max_iter)
            for _ in range(self.n_init)
        ]
        inertia, centres, labels, self.n_iter_, self.converged_ = min(runs, key=lambda run: run[0])
        if not self.converged_:
            warnings.warn(
                f"no convergence in {self.max_iter} steps; raise max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.components_, self.labels_, self.inertia_ = (
            (centres + mean).cpu().numpy(),
            labels.cpu().numpy(),
            inertia,
        )


class Simple(_Prototypes):
    r"""The k samples of largest norm are the concepts, largest first.

    The simplest dictionary there is, made of real samples. Codes are
    :math:`1 / (1 + \lVert a_i - d_k \rVert)`, as for :class:`KMeans`.

    Parameters
    ----------
    n_components
        Number of concepts k.
    device
        "cpu", "cuda" or "auto".

    Attributes
    ----------
    components_ : ndarray (k, d)
        The samples.
    rows_ : ndarray (k,)
        Which samples they are.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.
    """

    def __init__(self, n_components: int = 20, device: str = "cpu") -> None:
        self.n_components = n_components
        self.device = device

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        rows = torch.sort(A.norm(dim=1), descending=True, stable=True).indices[: self.n_components]
        self.components_, self.rows_ = A[rows].cpu().numpy(), rows.cpu().numpy()


def _principal(A: Float[Tensor, "n d"], k: int) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """Right singular vectors with their squared singular values, in float64.

    Through the smaller of the two matrices of products.
    """
    n, d = A.shape
    products = (A @ A.T if n < d else A.T @ A).double()
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    if n >= d:
        return vectors.T.to(A.dtype), values.clamp(min=0)
    # orthonormal also where the variance is only rounding
    D = torch.linalg.qr((vectors.T.to(A.dtype) @ A).T)[0].T
    return D, values.clamp(min=0)


def _plus_plus(
    A: Float[Tensor, "n d"], squares: Float[Tensor, "n"], k: int, random: torch.Generator
) -> Float[Tensor, "k d"]:
    """Centres drawn with the squared distance to the nearest so far.

    Of a few candidates the one that lowers the inertia most.
    """
    n_candidates = 2 + int(torch.tensor(float(k)).log())
    chosen = [int(torch.randint(len(A), (1,), generator=random))]
    nearest = (A - A[chosen[0]]).square().sum(dim=1)
    for _ in range(1, k):
        weights = nearest.double().cpu() + 1e-30  # equal samples still give k centres
        tried = torch.multinomial(weights, n_candidates, replacement=True, generator=random).to(
            A.device
        )
        distances = torch.minimum(
            nearest, squares + squares[tried, None] - 2 * A[tried] @ A.T
        ).clamp_(min=0)
        best = int(distances.sum(dim=1).argmin())
        nearest = distances[best]
        chosen.append(int(tried[best]))
    return A[chosen]


def _lloyd(
    A: Float[Tensor, "n d"],
    squares: Float[Tensor, "n"],
    centres: Float[Tensor, "k d"],
    max_iter: int,
) -> tuple[float, Float[Tensor, "k d"], Int[Tensor, "n"], int, bool]:
    """Inertia, centres, labels, number of steps, and whether the labels stayed."""
    labels = None
    for step in range(1, max_iter + 1):
        before, (labels, nearest) = labels, _assigned(A, squares, centres)
        if before is not None and torch.equal(before, labels):
            return float(nearest.sum(dtype=torch.float64)), centres, labels, step, True
        centres = _means(A, labels, nearest, centres)
    labels, nearest = _assigned(A, squares, centres)
    return float(nearest.sum(dtype=torch.float64)), centres, labels, max_iter, False


def _assigned(
    A: Float[Tensor, "n d"], squares: Float[Tensor, "n"], centres: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The nearest centre of each sample, and its squared distance."""
    found = torch.addmm(centres.square().sum(dim=1), A, centres.T, alpha=-2).min(dim=1)
    return found.indices, (found.values + squares).clamp_(min=0)


def _means(A: Tensor, labels: Tensor, nearest: Tensor, centres: Tensor) -> Float[Tensor, "k d"]:
    """Means of the clusters; one without samples moves to a sample that is far from its centre."""
    member = torch.nn.functional.one_hot(labels, len(centres)).to(A.dtype)
    sizes = member.sum(dim=0)
    found = member.T @ A / sizes.clamp(min=1)[:, None]
    empty = (sizes == 0).nonzero().flatten()
    found[empty] = A[nearest.topk(len(empty)).indices]
    return found
