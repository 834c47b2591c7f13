r"""Sparse autoencoders with TopK activations.

An encoder that keeps the k largest codes of a sample, and a dictionary that decodes them. After
"Scaling and evaluating sparse autoencoders" (Gao et al., arXiv 2406.04093), for the few
thousand activations of a chapter.
"""

from collections.abc import Iterator
from math import inf
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.errors import SelectionError
from xlvlms_tutorial.methods.concepts.base import Dictionary, whole

_RATES = (0.9, 0.999)  # of Adam's two running means
_REVIVE_EVERY = 25  # steps between two looks for concepts that hardly any sample uses
# of the mean number of uses: what is used less often mostly stands for a
# shift that the bias should have
_RARE = 0.3
_REVIVE_UNTIL = 0.6  # share of the steps after which concepts are left as they are, to settle
# starts that are compared, after so many steps: minima that differ are then far apart
_STARTS, _TRIAL = 4, 60
_DECAY_FROM = 0.5  # share of the steps after which the learning rate falls to 0


class TopKSAE(Dictionary):
    r"""Sparse autoencoder with at most ``k`` of ``n_components`` concepts active in a sample.

    With a bias b (d,), an encoder W (d, K) and its bias c (K,):
    :math:`Z = \mathrm{TopK}(\mathrm{ReLU}((A - b) W + c))`, :math:`\hat A = Z D + b`, rows of D of
    norm 1, and :math:`\|A - \hat A\|^2 / \|A - \bar A\|^2` minimised by Adam on activations whose
    mean squared distance to their mean is scaled to 1. D begins with samples, W with the transpose
    of D, b with the mean; of several starts the one with the lowest loss after a short trial is
    followed. In the first part of the steps a concept that hardly any sample has used for a while
    begins anew at what is badly reconstructed (instead of the paper's auxiliary loss for dead
    concepts, which is made for far more steps). The gradient of D leaves out the part along its
    rows. The problem has many minima: fit several seeds, and keep the lowest objective.

    Parameters
    ----------
    n_components : int
        Number of concepts K.
    k : int
        Largest number of concepts active in a sample.
    max_iter : int
        Steps of Adam.
    learning_rate : float
        Of Adam, as a share of the typical size of an entry of D, :math:`1 / \sqrt d`; falls to 0
        over the second half of the steps.
    batch_size : int
        Samples a step.
    seed : int
        Of the starts, the batches and the concepts that begin anew.
    device : str
        "cpu", "cuda" or "auto".

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
        as good as giving back the mean.
    n_iter_ : int
        Steps taken.

    Raises
    ------
    SelectionError
        If ``k`` is not between 1 and ``n_components``, or another
        parameter makes no sense (when fitted).
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
        for name, least in (("k", 1), ("max_iter", 1), ("batch_size", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if self.k > self.n_components:
            raise SelectionError(
                f"k={self.k} active concepts of {self.n_components}",
                "give k of n_components or less",
            )
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate < inf:
            raise SelectionError(
                f"learning_rate={self.learning_rate!r}", "give a number above 0, such as 0.2"
            )

    def _fit(self, A: Float[Tensor, "n d"]) -> None:
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
        decoder, encoder, encoder_bias, bias = (
            parameter.to(A) for parameter in training.parameters
        )
        self.components_ = decoder.cpu().numpy()
        self.encoder_ = encoder.cpu().numpy()
        self.encoder_bias_ = (encoder_bias * scale).cpu().numpy()
        self.bias_ = (bias * scale + mean).cpu().numpy()
        self.objective_ = [*torch.stack(training.losses).tolist(), training.loss()]
        self.n_iter_ = self.max_iter

    def _encode(self, A: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        encoder, encoder_bias, bias = (
            self._fitted(name, A) for name in ("encoder_", "encoder_bias_", "bias_")
        )
        return _top((A - bias) @ encoder + encoder_bias, self.k)

    def _decode(self, Z: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return super()._decode(Z) + self._fitted("bias_", Z)


class _Training:
    """Adam on one autoencoder.

    Gradients are written out, which halves the time of a step against automatic ones.
    """

    def __init__(self, settings: TopKSAE, A: Float[Tensor, "n d"], start: int = 0) -> None:
        self.settings, self.A, self.losses = settings, A, []
        self.random = torch.Generator().manual_seed(int(settings.seed) * _STARTS + start)
        self.batches = self._batches()
        first = torch.randperm(len(A), generator=self.random)[: settings.n_components]
        decoder = _unit(A[first.to(A.device)])
        biases = A.new_zeros(settings.n_components), A.new_zeros(A.shape[1])
        self.parameters = [decoder, decoder.T.contiguous(), *biases]
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.used = torch.zeros(settings.n_components, dtype=torch.long, device=A.device)

    def run(self, until: int) -> None:
        """Go on to the step with this number."""
        steps = self.settings.max_iter
        for step in range(len(self.losses) + 1, until + 1):
            batch = next(self.batches)
            loss, *gradients = self._gradients(batch)
            self.losses.append(loss)
            left = min(1.0, (1 - (step - 1) / steps) / (1 - _DECAY_FROM))
            self._update(
                gradients, step, left * self.settings.learning_rate / self.A.shape[1] ** 0.5
            )
            if step % _REVIVE_EVERY == 0 and step <= _REVIVE_UNTIL * steps:
                self._revive(batch)

    def loss(self) -> float:
        decoder, encoder, encoder_bias, bias = self.parameters
        errors = [
            _top((part - bias) @ encoder + encoder_bias, self.settings.k) @ decoder + bias - part
            for part in self.A.split(2**13)
        ]
        return float(
            sum(error.double().square().sum() for error in errors) / self.A.double().square().sum()
        )

    def _batches(self) -> Iterator[Float[Tensor, "b d"]]:
        """Batches of equal size, drawn without replacement.

        The rows left over begin the next round.
        """
        size, waiting = min(self.settings.batch_size, len(self.A)), torch.empty(0, dtype=torch.long)
        for _ in range(self.settings.max_iter):
            if size == len(self.A):
                yield self.A
                continue
            if len(waiting) < size:
                waiting = torch.cat([waiting, torch.randperm(len(self.A), generator=self.random)])
            yield self.A[waiting[:size].to(self.A.device)]
            waiting = waiting[size:]

    def _gradients(self, A: Float[Tensor, "b d"]) -> list[Tensor]:
        """The loss of a batch and its gradient with respect to each parameter."""
        decoder, encoder, encoder_bias, bias = self.parameters
        centred = A - bias
        codes = _top(centred @ encoder + encoder_bias, self.settings.k)
        active = codes > 0
        self.used += active.sum(dim=0)
        error = codes @ decoder - centred
        loss = error.square().sum() / len(A)
        error *= 2 / len(A)
        back = (error @ decoder.T) * active  # through TopK and ReLU only where a code is active
        along = codes.T @ error
        along -= (along * decoder).sum(dim=1, keepdim=True) * decoder
        return [
            loss,
            along,
            centred.T @ back,
            back.sum(dim=0),
            error.sum(dim=0) - encoder @ back.sum(dim=0),
        ]

    def _update(self, gradients: list[Tensor], step: int, rate: float) -> None:
        one, other = _RATES
        torch._foreach_lerp_(self.means, gradients, 1 - one)
        torch._foreach_mul_(self.squares, other)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - other)
        size = rate * (1 - other**step) ** 0.5 / (1 - one**step)
        for parameter, mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            parameter.addcdiv_(mean, square.sqrt().add_(1e-12), value=-size)
        self.parameters[0] = _unit(self.parameters[0])

    def _revive(self, A: Float[Tensor, "b d"]) -> None:
        """Concepts hardly used since the last look begin anew at what samples lack.

        The samples are drawn by their squared error.
        """
        decoder, encoder, encoder_bias, bias = self.parameters
        dead = (self.used <= _RARE * self.used.double().mean()).nonzero()[:, 0]
        self.used = torch.zeros_like(self.used)
        lacking = A - bias - _top((A - bias) @ encoder + encoder_bias, self.settings.k) @ decoder
        errors = lacking.square().sum(dim=1)
        dead = dead[: int((errors > 0).sum())]
        if not len(dead):
            return
        drawn = torch.multinomial(errors.cpu(), len(dead), generator=self.random).to(A.device)
        decoder[dead] = _unit(lacking[drawn])
        encoder[:, dead], encoder_bias[dead] = decoder[dead].T, 0.0
        for memory in (self.means, self.squares):
            memory[0][dead], memory[1][:, dead], memory[2][dead] = 0.0, 0.0, 0.0


def _top(codes: Float[Tensor, "n k"], k: int) -> Float[Tensor, "n k"]:
    """The k largest positive codes of each sample, 0 elsewhere."""
    values, places = codes.topk(k, dim=1)
    return torch.zeros_like(codes).scatter_(1, places, values.relu_())


def _unit(rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
