r"""Alternating minimisation of Semi-NMF.

A few starts, steps that go further than found, and a subspace that grows where it has to. Codes and
dictionary are improved in turn by coordinate descent, all samples at once, with steps that go a
little further than found and are taken back where that did not help (as Ang and Gillis, 2019, do
for NMF). The best dictionary is made of sums of activations and lies in the span of few directions.
So the search goes on in a subspace of r of them, where a step costs r / d of what it costs on the
activations and the objective is the same; where it ends, the directions in which a step on the
activations would leave the subspace are added, until none helps.
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

from xlvlms_tutorial.errors import ActivationsError

# of codes and of what is in the subspace: small, and the objective is a difference of large numbers
PRECISE = torch.float64
# samples whose codes are improved together: k of their rows stay in a processor's cache
_BLOCK = 8192
_SHARED = 20_000  # samples from which on threads share the work
# of exact codes, and sweeps before each leap, before it is said that they are not
_LEAPS, _SWEEPS = 100, 100
_NUMBERS = 1 << 22  # of the systems that are solved at a time
_SAMPLE = 4096  # starts are compared on so many samples:
_ROUNDS = ((8, 20), (2, 40))  # all of them after so many steps, and the best few after so many more
_WIDER, _SPARE = 2, 10  # directions of the first subspace: so many for each concept, and a few


@dataclass
class _Point:
    """Codes, dictionary and objective, all in the subspace.

    Codes are (k, n), so that one concept's are in a row.
    """

    Z: Float[Tensor, "k n"]
    D: Float[Tensor, "k r"]
    value: float = inf


@dataclass
class _Subspace:
    """Activations seen in r orthonormal directions, and the square of their whole norm."""

    B: Float[Tensor, "r n"]
    total: float
    penalty: float

    def step(self, Z: Tensor, D: Tensor, before: Tensor, further: float) -> tuple[Tensor, _Point]:
        """One sweep over the codes, then one over the dictionary.

        The codes start from (Z, D), taken ``further`` along the way from ``before``.
        """
        found = Z.clone()
        sweep(found, D @ self.B, D @ D.T, self.penalty / 2)
        Z = (found + further * (found - before)).clamp_(min=0) if further else found
        W, S = Z @ self.B.T, Z @ Z.T
        D = _dictionary_sweep(D.clone(), W, S)
        value = self.total - 2 * (W * D).sum() + (S * (D @ D.T)).sum() + self.penalty * Z.sum()
        return found, _Point(Z, D, float(value))

    def revive(self, at: _Point) -> bool:
        """Atoms that no sample uses become the directions of the worst reconstructed samples.

        This leaves the objective as it is.
        """
        unused = (at.Z.amax(dim=1) == 0).nonzero().flatten()
        if not len(unused):
            return False
        rest = self.B - at.D.T @ at.Z
        size, worst = rest.norm(dim=0).topk(len(unused))
        helps = size > self.penalty / 2  # others would not be used either
        at.D[unused[helps]] = (rest[:, worst[helps]] / size[helps]).T
        return bool(helps.any())


@dataclass
class _Descent:
    """Steps in one subspace, extrapolated.

    A step that does not lower the objective is taken back, and done plainly.
    """

    space: _Subspace
    at: _Point
    values: list[float] = field(default_factory=list)
    further: float = 0.5
    most: float = 1.0

    def run(self, steps: int, tol: float) -> bool:
        """Whether it converged within so many steps."""
        before, D, small, plain = self.at.Z, self.at.D, 0, True
        for _ in range(steps):
            found, new = self.space.step(self.at.Z, D, before, 0.0 if plain else self.further)
            if new.value > self.at.value:
                if plain:
                    return True  # only rounding is left
                self.most, self.further = max(self.further, 0.1), self.further / 2
                before, D, plain = self.at.Z, self.at.D, True
                continue
            small = small + 1 if self.at.value - new.value <= tol * new.value else 0
            before, D = found, new.D + self.further * (new.D - self.at.D)
            D = D / D.norm(dim=1, keepdim=True).clamp_(min=1)
            self.further, self.most = (
                min(1.1 * self.further, self.most, 0.98),
                min(1.05 * self.most, 1.0),
            )
            self.at, plain = new, False
            self.values.append(new.value)
            if self.space.revive(new):
                D, small = new.D, 0
            if small == 2:
                return True
        return False


class Search:
    """The best start, followed in a subspace that grows."""

    def __init__(
        self, A: Float[Tensor, "n d"], k: int, penalty: float, random: torch.Generator
    ) -> None:
        self.A, self.k, self.penalty = A, k, penalty
        self.V = _span(A, min(_WIDER * k + _SPARE, *A.shape), random)
        total = float(torch.linalg.vector_norm(A, dtype=PRECISE).square())
        self.space = _Subspace((self.V @ A.T).to(PRECISE), total, penalty)
        self.D = self._start(random)
        self.objective: list[float] = []

    def run(self, steps: int, tol: float) -> bool:
        """Whether it converged within so many steps."""
        codes = self.space.B.new_zeros(self.k, len(self.A))
        sweep(codes, self.D @ self.space.B, self.D @ self.D.T, self.penalty / 2)
        descent = _Descent(self.space, _Point(codes, self.D), self.objective)
        while True:
            known = descent.at.value
            with _few_threads(self.space.B):
                converged = descent.run(steps - len(self.objective), tol)
            self.D = descent.at.D
            if (
                not converged
                or known - descent.at.value <= 2 * tol * descent.at.value
                or not self._grow(descent.at.Z)
            ):
                return converged
            descent = _Descent(
                self.space, _Point(descent.at.Z, self.D, descent.at.value), self.objective
            )

    def dictionary(self) -> Float[Tensor, "k d"]:
        """The dictionary in the space of the activations."""
        D = self.D.to(self.A.dtype) @ self.V
        return D / D.norm(dim=1, keepdim=True).clamp_(min=1)

    def _start(self, random: torch.Generator) -> Float[Tensor, "k r"]:
        rows = torch.randperm(len(self.A), generator=random)[:_SAMPLE].to(self.A.device)
        B = self.space.B[:, rows]
        part = _Subspace(B, float(self.A[rows].to(PRECISE).square().sum()), self.penalty)
        starts = _starts(B, self.k, _ROUNDS[0][0], random)
        trials = [_Descent(part, _Point(B.new_zeros(self.k, len(rows)), D)) for D in starts]
        for best, steps in _ROUNDS:
            trials = sorted(trials, key=lambda trial: trial.at.value)[:best]
            with _few_threads(B):
                for trial in trials:
                    trial.run(steps, 0.0)
        return min(trials, key=lambda trial: trial.at.value).at.D

    def _grow(self, Z: Float[Tensor, "k n"]) -> bool:
        """Add the directions in which a step of the dictionary would leave the subspace.

        A step on the activations; whether there are any.
        """
        step = Z.to(self.A.dtype) @ self.A
        outside = step - (step @ self.V.T) @ self.V
        _, size, new = torch.linalg.svd(
            outside - (outside @ self.V.T) @ self.V, full_matrices=False
        )
        new = new[size > 1e2 * torch.finfo(step.dtype).eps * step.norm()]
        new = new[: min(self.A.shape) - len(self.V)]
        if not len(new):
            return False
        self.V = torch.cat([self.V, new])
        self.space.B = torch.cat([self.space.B, (new @ self.A.T).to(PRECISE)])
        self.D = torch.cat([self.D, self.D.new_zeros(self.k, len(new))], dim=1)
        return True


def sweep(
    Z: Float[Tensor, "k n"], P: Float[Tensor, "k n"], G: Float[Tensor, "k k"], threshold: float
) -> None:
    r"""One sweep of coordinate descent over codes in place.

    :math:`Z_j \leftarrow \max(0, (P_j - t - \sum_{l \ne j} G_{jl} Z_l) / G_{jj})`. P
    is :math:`D A^T`, G is :math:`D D^T`, and the threshold t is half of the penalty.
    An atom of norm 0 gets no code.
    """
    norms = G.diagonal()[:, None]
    used = norms > 0
    weights = torch.where(used, -G / norms, 0.0)
    weights.fill_diagonal_(0)
    for start in range(0, Z.shape[1], _BLOCK):
        codes = Z[:, start : start + _BLOCK]
        alone = torch.where(used, (P[:, start : start + _BLOCK] - threshold) / norms, 0.0)
        for code, target, others in zip(codes, alone, weights, strict=True):
            torch.clamp(torch.addmv(target, codes.T, others), min=0, out=code)


def _dictionary_sweep(D: Tensor, W: Tensor, S: Tensor) -> Tensor:
    """Each atom in turn to its best place in the unit ball, given the others: W is Z A, S is Z Z^T.

    An unused atom stays.
    """
    amounts = S.diagonal()[:, None]
    used = amounts > 0
    weights = torch.where(used, -S / amounts, 0.0)
    weights.fill_diagonal_(0)
    for atom, target, others in zip(D, torch.where(used, W / amounts, D), weights, strict=True):
        best = torch.addmv(target, D.T, others)
        torch.div(best, torch.linalg.vector_norm(best).clamp_(min=1), out=atom)
    return D


def exact_codes(
    D: Float[Tensor, "k d"], A: Float[Tensor, "n d"], penalty: float
) -> Float[Tensor, "n k"]:
    r"""Codes :math:`Z \ge 0` of least penalised squared error, by sweeps to the end.

    They minimise :math:`\lVert A - Z D \rVert_F^2 + \lambda \lVert Z \rVert_1`.
    Warns (``ConvergenceWarning``) if sweeps still change them after many, as where
    two atoms are almost the same.

    Raises
    ------
    ActivationsError
        If dictionary or activations are NaN or infinite, or so large that their
        products are: sweeps would never end.
    """
    P, G = (D @ A.T).to(PRECISE), D.to(PRECISE) @ D.to(PRECISE).T
    if not (P.isfinite().all() and G.isfinite().all()):
        raise ActivationsError(
            "dictionary or activations are NaN or infinite, or their products are",
            "give finite numbers, up to 1e18",
        )
    Z = torch.zeros_like(P)
    close = 1e-8 if A.dtype == torch.float32 else 1e-12
    for start in range(0, P.shape[1], _BLOCK):
        with _few_threads(P):
            converged = _settled(
                Z[:, start : start + _BLOCK], P[:, start : start + _BLOCK], G, penalty / 2, close
            )
        if not converged:
            warnings.warn(
                "codes are not exact: some atoms are almost the same",
                ConvergenceWarning,
                stacklevel=4,
            )
    return Z.T.to(A.dtype).contiguous()


def _settled(codes: Tensor, P: Tensor, G: Tensor, threshold: float, close: float) -> bool:
    """Whether a sweep changed the codes by less than this share of the largest, in the end."""
    for _ in range(_LEAPS):
        for _ in range(_SWEEPS):
            before = codes.clone()
            sweep(codes, P, G, threshold)
            moved = (codes - before).abs().amax(dim=0)
            if moved.amax() <= close * codes.amax():
                return True
        for rows in (
            (moved > close * codes.amax())
            .nonzero()
            .flatten()
            .split(max(1, _NUMBERS // len(G) ** 2))
        ):
            codes[:, rows] = _leap(codes[:, rows].T, P[:, rows].T - threshold, G).T
    return False


def _leap(
    Z: Float[Tensor, "n k"], P: Float[Tensor, "n k"], G: Float[Tensor, "k k"]
) -> Float[Tensor, "n k"]:
    """Towards the best codes with the same concepts in use, as far as none gets negative.

    Where atoms are alike, sweeps are slow. A small weight on staying (a proximal step) keeps the
    system regular where atoms depend on each other; the objective still falls.
    """
    used, stay = Z > 0, 1e-9 * G.diagonal().amax()
    system = torch.where(used[:, :, None] & used[:, None, :], G, 0.0) + torch.diag_embed(
        torch.where(used, stay, 1.0)
    )
    best = torch.linalg.solve(system, torch.where(used, P + stay * Z, 0.0))
    share = torch.where(best < 0, Z / (Z - best), 1.0).amin(dim=1, keepdim=True)
    return (Z + share * (best - Z)).clamp_(min=0)


def _span(A: Float[Tensor, "n d"], size: int, random: torch.Generator) -> Float[Tensor, "r d"]:
    """Orthonormal directions, so many.

    All of them, or those of most variance (Halko, Martinsson and Tropp, 2011).
    """
    n, d = A.shape
    if size == d:
        return torch.eye(d, dtype=A.dtype, device=A.device)
    if size == n:
        return torch.linalg.qr(A.T)[0].T
    sketch = A @ torch.randn(d, size, generator=random, dtype=A.dtype).to(A.device)
    sketch = A @ torch.linalg.qr(A.T @ torch.linalg.qr(sketch)[0])[0]
    return torch.linalg.qr(A.T @ torch.linalg.qr(sketch)[0])[0].T


def _starts(
    B: Float[Tensor, "r n"], k: int, count: int, random: torch.Generator
) -> list[Float[Tensor, "k r"]]:
    """The first k singular vectors, and random rotations of them.

    Each atom with the sign that gives its positive codes more energy.
    """
    rank = min(k, *B.shape)
    singular = torch.linalg.eigh(B @ B.T)[1].flip(1).T[:rank]
    mixes = [
        torch.linalg.qr(torch.randn(k, k, generator=random, dtype=PRECISE))[0][:, :rank]
        for _ in range(count)
    ]
    if rank == k:
        mixes[0] = torch.eye(k, dtype=PRECISE)
    starts = [torch.nn.functional.normalize(mix.to(B.device) @ singular) for mix in mixes]
    return [D * _sign(D @ B) for D in starts]


def _sign(codes: Float[Tensor, "k n"]) -> Float[Tensor, "k 1"]:
    positive, negative = (
        codes.clamp(min=0).square().sum(dim=1),
        codes.clamp(max=0).square().sum(dim=1),
    )
    return torch.where(positive < negative, -1.0, 1.0).to(codes.dtype)[:, None]


@contextmanager
def _few_threads(B: Tensor) -> Iterator[None]:
    """One thread for small matrices.

    Sharing them costs more than they do, and far more where other programs keep the cores busy.
    """
    threads = torch.get_num_threads()
    if B.device.type == "cpu" and B.shape[1] < _SHARED:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
