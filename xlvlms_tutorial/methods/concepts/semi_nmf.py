r"""Semi-NMF with sparse codes: concepts have entries of any sign, codes are never negative.

.. math::

    \min_{Z \ge 0,\ \lVert d_k \rVert_2 \le 1} \lVert A - Z D \rVert_F^2 + \lambda \lVert Z \rVert_1

as in CoX-LMM (Parekh et al., 2024, arXiv 2406.08074). The search for the minimum is in
:mod:`xlvlms_tutorial.methods.concepts.descent`.
"""

import warnings
from math import isfinite
from numbers import Real

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole
from xlvlms_tutorial.methods.concepts.descent import PRECISE, Search, exact_codes


class SemiNMF(Dictionary):
    r"""Learn concepts with sparse codes :math:`Z \ge 0` and atoms of norm 1 at most.

    The method of CoX-LMM (Parekh et al., 2024, arXiv 2406.08074). Use it where a sample should
    have a few concepts, each in an amount that is never negative. The fit minimises
    :math:`\lVert A - Z D \rVert_F^2 + \lambda \lVert Z \rVert_1`. scikit-learn's
    ``DictionaryLearning`` and ``Lasso`` halve the square, so their ``alpha`` is ``penalty / 2``.
    The problem is not convex: several starts are tried (the singular vectors, and random rotations
    of them), and the one with the lowest objective is continued.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts k.
    penalty : float, default 2.0
        :math:`\lambda \ge 0`, in units of the activations. A larger one gives sparser codes; from
        twice the largest norm of an activation on, all codes would be 0, which is refused.
    max_iter : int, default 5000
        Largest number of steps, each one sweep over the codes and one over the dictionary.
    tol : float, default 1e-6
        The search ends where two consecutive steps, and a larger subspace, lower the objective by
        less than this share of it.
    seed : int, default 0
        Seed of the starts.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where the fit and the codes are computed; "auto" is a GPU if there is one.

    Attributes
    ----------
    components_ : ndarray (k, d)
        The dictionary D. An atom that no sample uses is the residual direction of a sample that is
        reconstructed badly.
    objective_ : list of float
        The objective after each step; it never rises. The last one is that of the exact
        codes, as ``transform`` gives them.
    n_iter_ : int
        Number of steps.
    converged_ : bool
        Whether the search ended before ``max_iter``.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import SemiNMF
    >>> A = np.random.default_rng(0).standard_normal((30, 8))
    >>> semi_nmf = SemiNMF(n_components=3, penalty=0.5).fit(A)
    >>> codes = semi_nmf.transform(A)
    >>> codes.shape, bool((codes >= 0).all())
    ((30, 3), True)
    >>> bool((np.linalg.norm(semi_nmf.components_, axis=1) <= 1 + 1e-6).all())
    True
    """

    def __init__(
        self,
        n_components: int = 20,
        penalty: float = 2.0,
        max_iter: int = 5000,
        tol: float = 1e-6,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.penalty = penalty
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self.device = device

    def _check_parameters(self) -> None:
        super()._check_parameters()
        whole("max_iter", self.max_iter)
        whole("seed", self.seed, least=0)
        for name in ("penalty", "tol"):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or not isfinite(value) or value < 0:
                raise InputError(f"{name} is {value!r}", "give a finite number of 0 or more")

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        """Find codes and dictionary by descent, then exact codes."""
        penalty = float(self.penalty)
        largest = float(A.norm(dim=1).max())
        if penalty >= 2 * largest:
            raise InputError(
                f"with penalty {self.penalty} every code is 0, as the largest "
                f"activation has norm {largest:.4g}",
                f"give a penalty well below {2 * largest:.4g}",
            )
        random = torch.Generator().manual_seed(int(self.seed))
        search = Search(A, self.n_components, penalty, random)
        self.converged_ = search.run(int(self.max_iter), float(self.tol))
        self.n_iter_ = len(search.objective)
        if not self.converged_:
            message = f"no convergence in {self.max_iter} steps; raise max_iter or tol"
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        D = search.dictionary()
        codes = exact_codes(D, A, self.penalty)
        error = (A - codes @ D).square().sum(dtype=PRECISE)
        objective = error + self.penalty * codes.sum(dtype=PRECISE)
        self.objective_ = [*search.objective, float(objective)]
        self.components_ = D.cpu().numpy()

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return exact_codes(self._fitted("components_", A), A, self.penalty)
