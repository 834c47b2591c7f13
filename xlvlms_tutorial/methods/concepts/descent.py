r"""Alternating minimisation of Semi-NMF.

The search compares a few starts, extrapolates its steps, and works in a subspace that grows where
it has to. Codes and dictionary are improved in turn by coordinate descent, all samples at once.
Each step is extrapolated a little, and undone where that did not lower the objective (as Ang and
Gillis, 2019, do for NMF). The best dictionary consists of sums of activations and lies in the span
of few directions. So the search runs in a subspace of r of them, where a step costs r / d of what
it costs on the activations and the objective is the same. Where it ends, the directions in which a
step on the activations would leave the subspace are added, until none helps.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from xlvlms_tutorial.errors import InputError

# dtype of codes and of the subspace: they are small, and the objective is a difference of large
# numbers
PRECISE = torch.float64
# samples whose codes are improved together: k of their rows stay in a processor's cache
_BLOCK = 8192
_SHARED = 20_000  # number of samples from which on threads share the work
# leaps, and sweeps before each leap, after which codes that still change are called inexact
_LEAPS, _SWEEPS = 100, 100
_NUMBERS = 1 << 22  # entries of the linear systems that are solved together
_SAMPLE = 4096  # number of samples on which starts are compared
_ROUNDS = ((8, 20), (2, 40))  # of the comparison: number of starts, and steps for each
# size of the first subspace: directions for each concept, and additional ones
_WIDER, _SPARE = 2, 10


@dataclass
class _Point:
    """Codes, dictionary and objective, all in the subspace.

    Codes are (k, n): one row for each concept.
    """

    Z: Float[Tensor, "k n"]
    D: Float[Tensor, "k r"]
    value: float = inf


@dataclass
class _Subspace:
    """Activations projected on r orthonormal directions, and the square of their full norm."""

    B: Float[Tensor, "r n"]
    total: float
    penalty: float

    def step(self, Z: Tensor, D: Tensor, before: Tensor, further: float) -> tuple[Tensor, _Point]:
        """One sweep over the codes, then one over the dictionary, from (Z, D).

        The codes are extrapolated by ``further`` times their change from ``before``. The result is
        the codes without that, and the new point.
        """
        swept = Z.clone()
        sweep(swept, D @ self.B, D @ D.T, self.penalty / 2)
        Z = swept
        if further:
            Z = (swept + further * (swept - before)).clamp_(min=0)
        W = Z @ self.B.T
        S = Z @ Z.T
        D = _dictionary_sweep(D.clone(), W, S)
        explained = (W * D).sum()
        overlap = (S * (D @ D.T)).sum()
        value = self.total - 2 * explained + overlap + self.penalty * Z.sum()
        return swept, _Point(Z, D, float(value))

    def revive(self, point: _Point) -> bool:
        """Replace atoms that no sample uses by the residuals of the worst reconstructed samples.

        The objective stays as it is. Whether any atom was replaced is returned.
        """
        unused = (point.Z.amax(dim=1) == 0).nonzero().flatten()
        if not len(unused):
            return False
        residual = self.B - point.D.T @ point.Z
        norm, worst = residual.norm(dim=0).topk(len(unused))
        useful = norm > self.penalty / 2  # with a smaller residual the code would stay 0
        point.D[unused[useful]] = (residual[:, worst[useful]] / norm[useful]).T
        return bool(useful.any())


@dataclass
class _Descent:
    """Extrapolated steps in one subspace.

    A step that does not lower the objective is undone and repeated without extrapolation.
    """

    space: _Subspace
    point: _Point
    values: list[float] = field(default_factory=list)
    further: float = 0.5
    limit: float = 1.0  # of ``further``

    def run(self, steps: int, tol: float) -> bool:
        """Take at most ``steps`` steps and return whether the objective has converged."""
        before = self.point.Z
        D = self.point.D
        n_small = 0  # consecutive steps that lowered the objective by less than ``tol``
        plain = True  # the next step is not extrapolated
        for _ in range(steps):
            swept, new = self.space.step(self.point.Z, D, before, 0.0 if plain else self.further)
            if new.value > self.point.value:
                if plain:
                    return True  # the rest is rounding
                self.limit = max(self.further, 0.1)
                self.further /= 2
                before = self.point.Z
                D = self.point.D
                plain = True
                continue
            is_small = self.point.value - new.value <= tol * new.value
            n_small = n_small + 1 if is_small else 0
            before = swept
            D = new.D + self.further * (new.D - self.point.D)
            D = D / D.norm(dim=1, keepdim=True).clamp_(min=1)
            self.further = min(1.1 * self.further, self.limit, 0.98)
            self.limit = min(1.05 * self.limit, 1.0)
            self.point = new
            plain = False
            self.values.append(new.value)
            if self.space.revive(new):
                D = new.D
                n_small = 0
            if n_small == 2:
                return True
        return False


class Search:
    """The search for a dictionary: the best of several starts, in a subspace that grows.

    Parameters
    ----------
    A
        Activations (n, d).
    k
        Number of concepts.
    penalty
        Weight of the sum of codes in the objective.
    random
        Draws the starts; it is on the CPU.
    """

    def __init__(
        self, A: Float[Tensor, "n d"], k: int, penalty: float, random: torch.Generator
    ) -> None:
        self.A = A
        self.k = k
        self.penalty = penalty
        size = min(_WIDER * k + _SPARE, *A.shape)
        self.V = _span(A, size, random)
        total = float(torch.linalg.vector_norm(A, dtype=PRECISE).square())
        projected = (self.V @ A.T).to(PRECISE)
        self.space = _Subspace(projected, total, penalty)
        self.D = self._start(random)
        self.objective: list[float] = []

    def run(self, steps: int, tol: float) -> bool:
        """Take at most ``steps`` steps and return whether the search has converged."""
        B = self.space.B
        codes = B.new_zeros(self.k, len(self.A))
        sweep(codes, self.D @ B, self.D @ self.D.T, self.penalty / 2)
        descent = _Descent(self.space, _Point(codes, self.D), self.objective)
        while True:
            previous = descent.point.value
            with _few_threads(self.space.B):
                converged = descent.run(steps - len(self.objective), tol)
            point = descent.point
            self.D = point.D
            if not converged or previous - point.value <= 2 * tol * point.value:
                return converged
            if not self._grow(point.Z):
                return converged
            descent = _Descent(self.space, _Point(point.Z, self.D, point.value), self.objective)

    def dictionary(self) -> Float[Tensor, "k d"]:
        """The dictionary in the space of the activations."""
        D = self.D.to(self.A.dtype) @ self.V
        return D / D.norm(dim=1, keepdim=True).clamp_(min=1)

    def _start(self, random: torch.Generator) -> Float[Tensor, "k r"]:
        """Return the best of several dictionaries after a few steps on some of the samples."""
        order = torch.randperm(len(self.A), generator=random)
        rows = order[:_SAMPLE].to(self.A.device)
        B = self.space.B[:, rows]
        total = float(self.A[rows].to(PRECISE).square().sum())
        space = _Subspace(B, total, self.penalty)
        n_starts, _ = _ROUNDS[0]
        trials = []
        for D in _starts(B, self.k, n_starts, random):
            codes = B.new_zeros(self.k, len(rows))
            trials.append(_Descent(space, _Point(codes, D)))
        for n_best, steps in _ROUNDS:
            trials = sorted(trials, key=lambda trial: trial.point.value)[:n_best]
            with _few_threads(B):
                for trial in trials:
                    trial.run(steps, 0.0)
        best = min(trials, key=lambda trial: trial.point.value)
        return best.point.D

    def _grow(self, Z: Float[Tensor, "k n"]) -> bool:
        """Add the directions in which a step on the activations would leave the subspace.

        Returns whether there are any.
        """
        step = Z.to(self.A.dtype) @ self.A
        outside = step - (step @ self.V.T) @ self.V
        outside -= (outside @ self.V.T) @ self.V  # once more, for what rounding has left
        _, sizes, new = torch.linalg.svd(outside, full_matrices=False)
        rounding = 1e2 * torch.finfo(step.dtype).eps * step.norm()
        new = new[sizes > rounding]
        n_free = min(self.A.shape) - len(self.V)
        new = new[:n_free]
        if not len(new):
            return False
        self.V = torch.cat([self.V, new])
        projected = (new @ self.A.T).to(PRECISE)
        self.space.B = torch.cat([self.space.B, projected])
        unused = self.D.new_zeros(self.k, len(new))
        self.D = torch.cat([self.D, unused], dim=1)
        return True


def sweep(
    Z: Float[Tensor, "k n"], P: Float[Tensor, "k n"], G: Float[Tensor, "k k"], threshold: float
) -> None:
    r"""Improve codes by one sweep of coordinate descent, in place.

    :math:`Z_j \leftarrow \max(0, (P_j - t - \sum_{l \ne j} G_{jl} Z_l) / G_{jj})`. An atom of
    norm 0 gets no code.

    Parameters
    ----------
    Z
        Codes, one row for each concept.
    P
        Products of atoms and activations, :math:`D A^T`.
    G
        Products of atoms, :math:`D D^T`.
    threshold
        t, half of the penalty.
    """
    norms = G.diagonal()[:, None]
    used = norms > 0
    weights = torch.where(used, -G / norms, 0.0)
    weights.fill_diagonal_(0)
    for start in range(0, Z.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        codes = Z[:, block]
        alone = (P[:, block] - threshold) / norms  # the best codes if no other concept were used
        targets = torch.where(used, alone, 0.0)
        for code, target, weight in zip(codes, targets, weights, strict=True):
            best = torch.addmv(target, codes.T, weight)
            torch.clamp(best, min=0, out=code)


def _dictionary_sweep(D: Tensor, W: Tensor, S: Tensor) -> Tensor:
    """Move each atom in turn to its best place in the unit ball, with the others fixed.

    W is Z A, S is Z Z^T. An unused atom stays.
    """
    amounts = S.diagonal()[:, None]
    used = amounts > 0
    weights = torch.where(used, -S / amounts, 0.0)
    weights.fill_diagonal_(0)
    targets = torch.where(used, W / amounts, D)
    for atom, target, weight in zip(D, targets, weights, strict=True):
        best = torch.addmv(target, D.T, weight)
        torch.div(best, torch.linalg.vector_norm(best).clamp_(min=1), out=atom)
    return D


def exact_codes(
    D: Float[Tensor, "k d"], A: Float[Tensor, "n d"], penalty: float
) -> Float[Tensor, "n k"]:
    r"""Compute the codes :math:`Z \ge 0` of least penalised squared error, by sweeps to the end.

    They minimise :math:`\lVert A - Z D \rVert_F^2 + \lambda \lVert Z \rVert_1`. A
    ``ConvergenceWarning`` says where sweeps still change them after many, as where two atoms are
    almost the same.

    Parameters
    ----------
    D
        The dictionary, one atom a row.
    A
        Activations, one sample a row.
    penalty
        :math:`\lambda`.

    Raises
    ------
    InputError
        If dictionary or activations are NaN or infinite, or so large that their
        products are: sweeps would never end.
    """
    P = (D @ A.T).to(PRECISE)
    precise = D.to(PRECISE)
    G = precise @ precise.T
    if not (P.isfinite().all() and G.isfinite().all()):
        raise InputError(
            "dictionary or activations are NaN or infinite, or their products are",
            "give finite numbers, up to 1e18",
        )
    Z = torch.zeros_like(P)
    close = 1e-8 if A.dtype == torch.float32 else 1e-12
    for start in range(0, P.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        with _few_threads(P):
            converged = _settled(Z[:, block], P[:, block], G, penalty / 2, close)
        if not converged:
            warnings.warn(
                "codes are not exact: some atoms are almost the same",
                ConvergenceWarning,
                stacklevel=4,
            )
    return Z.T.to(A.dtype).contiguous()


def _settled(codes: Tensor, P: Tensor, G: Tensor, threshold: float, close: float) -> bool:
    """Sweep until the codes change by less than ``close`` times the largest; whether they do."""
    for _ in range(_LEAPS):
        for _ in range(_SWEEPS):
            before = codes.clone()
            sweep(codes, P, G, threshold)
            change = (codes - before).abs().amax(dim=0)
            if change.amax() <= close * codes.amax():
                return True
        unsettled = (change > close * codes.amax()).nonzero().flatten()
        for rows in unsettled.split(max(1, _NUMBERS // len(G) ** 2)):
            codes[:, rows] = _leap(codes[:, rows].T, P[:, rows].T - threshold, G).T
    return False


def _leap(
    Z: Float[Tensor, "n k"], P: Float[Tensor, "n k"], G: Float[Tensor, "k k"]
) -> Float[Tensor, "n k"]:
    """Move towards the best codes with the same concepts in use, until one would be negative.

    Where atoms are alike, sweeps are slow. A small weight on staying (a proximal step) keeps the
    system regular where atoms depend on each other; the objective still falls.
    """
    used = Z > 0
    stay = 1e-9 * G.diagonal().amax()
    both_used = used[:, :, None] & used[:, None, :]
    diagonal = torch.where(used, stay, 1.0)
    system = torch.where(both_used, G, 0.0) + torch.diag_embed(diagonal)
    target = torch.where(used, P + stay * Z, 0.0)
    best = torch.linalg.solve(system, target)
    shares = torch.where(best < 0, Z / (Z - best), 1.0)
    share = shares.amin(dim=1, keepdim=True)
    return (Z + share * (best - Z)).clamp_(min=0)


def _span(A: Float[Tensor, "n d"], size: int, random: torch.Generator) -> Float[Tensor, "r d"]:
    """``size`` orthonormal directions.

    A basis of the whole space, or the directions of most variance (Halko, Martinsson and Tropp,
    2011).
    """
    n, d = A.shape
    if size == d:
        return torch.eye(d, dtype=A.dtype, device=A.device)
    if size == n:
        return _orthonormal(A.T).T
    directions = torch.randn(d, size, generator=random, dtype=A.dtype).to(A.device)
    for _ in range(2):
        sketch = A @ directions
        directions = _orthonormal(A.T @ _orthonormal(sketch))
    return directions.T


def _orthonormal(columns: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Return orthonormal columns that span the same space."""
    Q, _ = torch.linalg.qr(columns)
    return Q


def _starts(
    B: Float[Tensor, "r n"], k: int, count: int, random: torch.Generator
) -> list[Float[Tensor, "k r"]]:
    """The first k singular vectors, and random rotations of them.

    Each atom has the sign that gives its positive codes more energy.
    """
    rank = min(k, *B.shape)
    _, vectors = torch.linalg.eigh(B @ B.T)
    singular = vectors.flip(1).T[:rank]
    mixes = [_rotation(k, random)[:, :rank] for _ in range(count)]
    if rank == k:
        mixes[0] = torch.eye(k, dtype=PRECISE)
    starts = []
    for mix in mixes:
        D = torch.nn.functional.normalize(mix.to(B.device) @ singular)
        starts.append(D * _sign(D @ B))
    return starts


def _rotation(k: int, random: torch.Generator) -> Float[Tensor, "k k"]:
    """A random rotation of k dimensions."""
    return torch.linalg.qr(torch.randn(k, k, generator=random, dtype=PRECISE))[0]


def _sign(codes: Float[Tensor, "k n"]) -> Float[Tensor, "k 1"]:
    """Return the sign of each row's codes: that of the part with more energy."""
    positive = codes.clamp(min=0).square().sum(dim=1)
    negative = codes.clamp(max=0).square().sum(dim=1)
    sign = torch.where(positive < negative, -1.0, 1.0)
    return sign.to(codes.dtype)[:, None]


@contextmanager
def _few_threads(B: Tensor) -> Iterator[None]:
    """Context manager that uses one thread for small matrices.

    Sharing the work costs more than the work itself, and far more where other programs keep the
    cores busy.
    """
    threads = torch.get_num_threads()
    if B.device.type == "cpu" and B.shape[1] < _SHARED:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
