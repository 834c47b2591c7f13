r"""Sparse autoencoders with TopK activations.

An encoder keeps the k largest codes of a sample, and a dictionary decodes them. After "Scaling and
evaluating sparse autoencoders" (Gao et al., 2024, arXiv 2406.04093), for the few thousand
activations of a chapter.
"""

from collections.abc import Iterator
from math import inf
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole

_REVIVE_EVERY = 25  # steps between two searches for concepts that hardly any sample uses
# share of the mean number of uses: a concept that is used less often mostly stands for a shift that
# belongs into the bias
_RARE = 0.3
_REVIVE_UNTIL = 0.6  # share of the steps after which no concept is restarted, so that all settle
# number of starts, and of steps before they are compared: different minima are then far apart
_STARTS, _TRIAL = 4, 60
_DECAY_FROM = 0.5  # share of the steps after which the learning rate falls to 0


class TopKSAE(Dictionary):
    r"""Learn concepts by a sparse autoencoder with at most ``k`` of them active in a sample.

    Use it where the number of active concepts should be set directly, instead of by a penalty (Gao
    et al., 2024, arXiv 2406.04093). With a bias b (d,), an encoder W (d, K) and its bias c (K,),
    codes are :math:`Z = \mathrm{TopK}(\mathrm{ReLU}((A - b) W + c))` and reconstructions
    :math:`\hat A = Z D + b`, with rows of D of norm 1. Adam minimises
    :math:`\|A - \hat A\|^2 / \|A - \bar A\|^2` on activations whose mean squared distance to their
    mean is scaled to 1. D is initialised with samples, W with the transpose of D, b with the mean;
    several starts are compared by their loss after a short trial, and the best one is continued. In
    the first part of the steps, a concept that hardly any sample has used for a while is restarted
    at the residual of a badly reconstructed sample (instead of the paper's auxiliary loss for dead
    concepts, which is made for far more steps). The problem has many minima: fit several seeds, and
    keep the lowest objective.

    Parameters
    ----------
    n_components : int, default 20
        Number of concepts K.
    k : int, default 3
        Largest number of concepts active in a sample, from 1 to ``n_components``.
    max_iter : int, default 500
        Number of steps of Adam.
    learning_rate : float, default 0.2
        Learning rate of Adam, as a share of the typical size of an entry of D,
        :math:`1 / \sqrt d`. It falls to 0 over the second half of the steps.
    batch_size : int, default 512
        Samples in a step; all of them where there are fewer.
    seed : int, default 0
        Seed of the starts, the batches and the restarted concepts.
    device : {"cpu", "cuda", "auto"}, default "cpu"
        Where the fit and the codes are computed; "auto" is a GPU if there is one.

    Attributes
    ----------
    components_ : ndarray (K, d)
        The dictionary D.
    encoder_ : ndarray (d, K)
        W.
    encoder_bias_ : ndarray (K,)
        c, in the units of the activations.
    bias_ : ndarray (d,)
        b.
    objective_ : list of float
        The loss of each step on its batch, then that on all samples at the end: 0 is perfect, 1
        as good as returning the mean.
    n_iter_ : int
        Number of steps.
    n_features_in_ : int
        Width d of the activations.
    feature_names_in_ : ndarray (d,)
        Names of the columns, where the activations came as a table whose columns have names.

    Raises
    ------
    InputError
        When it is fitted, if ``k`` is not between 1 and ``n_components``, or another parameter has
        a value that is not allowed.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.concepts import TopKSAE
    >>> A = np.random.default_rng(0).standard_normal((40, 8))
    >>> sae = TopKSAE(n_components=6, k=2, max_iter=20).fit(A)
    >>> codes = sae.transform(A)
    >>> codes.shape, bool(((codes > 0).sum(axis=1) <= 2).all())
    ((40, 6), True)
    >>> sae.components_.shape, sae.encoder_.shape, sae.n_iter_
    ((6, 8), (8, 6), 20)
    """

    def __init__(
        self,
        n_components: int = 20,
        k: int = 3,
        max_iter: int = 500,
        learning_rate: float = 0.2,
        batch_size: int = 512,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.k = k
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.seed = seed
        self.device = device

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for name in ("k", "max_iter", "batch_size"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, least=0)
        if self.k > self.n_components:
            raise InputError(
                f"k={self.k} active concepts of {self.n_components}",
                "give k of n_components or less",
            )
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate < inf:
            raise InputError(
                f"learning_rate={self.learning_rate!r}", "give a number above 0, such as 0.2"
            )

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
        """Train from several starts for a while, and the best of them to the end."""
        mean = A.mean(dim=0)
        centred = A - mean
        scale = centred.square().sum(dim=1).mean().sqrt()
        # numbers near 1 lose nothing in float32, and it is twice as fast
        scaled = (centred / scale).float()
        starts = [_Training(self, scaled, start) for start in range(_STARTS)]
        for training in starts:
            training.run(min(_TRIAL, self.max_iter))
        training = min(starts, key=_Training.loss)
        training.run(self.max_iter)
        parameters = [parameter.detach().to(A) for parameter in training.parameters]
        decoder, encoder, encoder_bias, bias = parameters
        self.components_ = decoder.cpu().numpy()
        self.encoder_ = encoder.cpu().numpy()
        self.encoder_bias_ = (encoder_bias * scale).cpu().numpy()
        self.bias_ = (bias * scale + mean).cpu().numpy()
        self.objective_ = [*torch.stack(training.losses).tolist(), training.loss()]
        self.n_iter_ = self.max_iter

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        encoder = self._fitted("encoder_", A)
        encoder_bias = self._fitted("encoder_bias_", A)
        bias = self._fitted("bias_", A)
        return _top((A - bias) @ encoder + encoder_bias, self.k)

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return super()._decode(Z) + self._fitted("bias_", Z)


class _Training:
    """Training of one autoencoder by Adam."""

    def __init__(self, settings: TopKSAE, A: Float[Tensor, "n d"], start: int = 0) -> None:
        """Start from activations of random samples as directions."""
        self.settings = settings
        self.A = A
        self.losses = []
        self.random = torch.Generator().manual_seed(int(settings.seed) * _STARTS + start)
        self.batches = self._batches()
        k = settings.n_components
        width = A.shape[1]
        order = torch.randperm(len(A), generator=self.random)
        first = order[:k].to(A.device)
        decoder = _unit(A[first])
        # a copy: the transpose of a single row or column would share the memory of the decoder
        encoder = decoder.T.clone(memory_format=torch.contiguous_format)
        encoder_bias = A.new_zeros(k)
        bias = A.new_zeros(width)
        self.parameters = [decoder, encoder, encoder_bias, bias]
        for parameter in self.parameters:
            parameter.requires_grad_()
        rate = settings.learning_rate / width**0.5
        self.adam = torch.optim.Adam(self.parameters, rate, eps=1e-12)

        def share_of_rate(step: int) -> float:
            return min(1.0, (1 - step / settings.max_iter) / (1 - _DECAY_FROM))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, share_of_rate)
        self.used = torch.zeros(k, dtype=torch.long, device=A.device)

    def run(self, until: int) -> None:
        """Train up to the step with this number."""
        for step in range(len(self.losses) + 1, until + 1):
            batch = next(self.batches)
            self._step(batch)
            if step % _REVIVE_EVERY == 0 and step <= _REVIVE_UNTIL * self.settings.max_iter:
                self._revive(batch)

    @torch.no_grad()
    def loss(self) -> float:
        total = 0.0
        for part in self.A.split(2**13):
            _, residuals = self._pass(part)
            total = total + residuals.double().square().sum()
        return float(total / self.A.double().square().sum())

    def _batches(self) -> Iterator[Float[Tensor, "b d"]]:
        """Batches of equal size, drawn without replacement.

        Rows that remain of an epoch begin the next one.
        """
        size = min(self.settings.batch_size, len(self.A))
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.settings.max_iter):
            if size == len(self.A):
                yield self.A
                continue
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.A), generator=self.random)])
            yield self.A[order[:size].to(self.A.device)]
            order = order[size:]

    def _pass(self, A: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b d"]]:
        """Codes of activations, and what the reconstruction lacks."""
        decoder, encoder, encoder_bias, bias = self.parameters
        centred = A - bias
        codes = _top(centred @ encoder + encoder_bias, self.settings.k)
        return codes, centred - codes @ _unit(decoder)

    def _step(self, batch: Float[Tensor, "b d"]) -> None:
        codes, residuals = self._pass(batch)
        self.used += (codes > 0).sum(dim=0)
        loss = residuals.square().sum() / len(batch)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.schedule.step()
        self.losses.append(loss.detach())
        decoder = self.parameters[0]
        decoder.data = _unit(decoder.data)

    @torch.no_grad()
    def _revive(self, A: Float[Tensor, "b d"]) -> None:
        """Restart concepts that were hardly used since the last search at residuals of samples.

        The samples are drawn with a probability that is their squared error.
        """
        decoder, encoder, encoder_bias, _ = self.parameters
        rare = self.used <= _RARE * self.used.double().mean()
        dead = rare.nonzero()[:, 0]
        self.used = torch.zeros_like(self.used)
        _, residuals = self._pass(A)
        errors = residuals.square().sum(dim=1)
        dead = dead[: int((errors > 0).sum())]
        if not len(dead):
            return
        rows = torch.multinomial(errors.cpu(), len(dead), generator=self.random).to(A.device)
        decoder[dead] = _unit(residuals[rows])
        encoder[:, dead] = decoder[dead].T
        encoder_bias[dead] = 0.0
        state = self.adam.state
        for name in ("exp_avg", "exp_avg_sq"):
            state[decoder][name][dead] = 0.0
            state[encoder][name][:, dead] = 0.0
            state[encoder_bias][name][dead] = 0.0


def _top(codes: Float[Tensor, "n k"], k: int) -> Float[Tensor, "n k"]:
    """The k largest positive codes of each sample, 0 elsewhere."""
    values, places = codes.topk(k, dim=1)
    return torch.zeros_like(codes).scatter(1, places, values.relu())


def _unit(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
