r"""Tuning of representations: a small function of the state, learned through a frozen model.

Where a steering vector adds the same everywhere, these functions add what the state itself decides,
at a few positions of the prompt. After "ReFT: Representation Finetuning for Language Models" (Wu et
al., 2024, arXiv 2404.03592).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from xlvlms_tutorial.errors import InterventionError, LoadError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import Layers, checked_layers, edited, refuse_folded
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.models.batching import (
    Answers,
    Prompts,
    answers_of,
    first_captions,
    prompts_of,
    require_samples,
)
from xlvlms_tutorial.models.finetune import loss_of
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import (
    require,
    require_counts,
    require_equal,
    require_one_of,
    require_same_length,
)

METHODS = ("loreft", "direft", "constant")
_FORMAT = "xlvlms representation tuning 1"
_SETTINGS = ("model", "width", "layers", "method", "rank", "first", "last", "gate", "seed")


class RepresentationTuning:
    r"""Hold a learned function of the state for each chosen layer, and where in the prompt it acts.

    Use it to teach a model another behaviour with thousands of parameters, its weights untouched.
    :meth:`fit` trains it, :meth:`apply` puts it in force, :meth:`save` and :func:`load_tuning` keep
    it. With :math:`R` (r, d) of orthonormal rows, a state :math:`h` (d,) becomes

    .. math::

        h + R^\top (W h + b - R h) \quad \text{(LoReFT)}, \qquad
        h + W_2^\top (W_1 h + b) \quad \text{(DiReFT)}, \qquad
        h + R^\top b \quad \text{(constant)}.

    All three start as the identity: with :math:`W = R`, :math:`W_2 = 0` and :math:`b = 0`.

    Parameters
    ----------
    vlm : VLM
        The model that it is for. It is not changed.
    layers : int or sequence of int
        The layers whose states are changed, 0 to L: 0 is what enters the first block, l what leaves
        block l.
    method : {"loreft", "direft", "constant"}
        The function; "loreft" by default. "constant" is a steering vector learned by the loss.
    rank : int
        Rank r, 1 to the model's width d; 4 by default.
    first : int
        It acts on so many positions from the start of each prompt; 0 by default. The start is the
        first position that is no padding.
    last : int
        And on so many before the answer; 1 by default.
    gate : bool
        Whether the change is scaled, token by token, by a learned
        :math:`\sigma(v \cdot \hat h + c)`, with :math:`\hat h` the state at a root mean square of
        1; not by default. It starts at one half.
    seed : int
        Draws R, W_1 and nothing else; 0 by default.

    Attributes
    ----------
    functions : torch.nn.ModuleDict
        The function of each layer in float32, by the layer's number as text.
    layers : list of int
        The layers, in order.

    Raises
    ------
    LayerError
        If a layer is out of range.
    InputError
        If there are no layers or no positions, the method is unknown, the rank is above the width,
        or a number is negative.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import RepresentationTuning
    >>> tuning = RepresentationTuning(vlm, [12, 18], rank=4, last=5)
    >>> tuning
    RepresentationTuning(loreft, layers 12 18, rank 4, first 0, last 5)
    >>> tuning.n_parameters == 2 * (2 * 4 * 576 + 4)
    True
    >>> history = tuning.fit(vlm, samples, ["A SCENE."] * 4, steps=1, batch_size=1)
    >>> history.columns.tolist()
    ['step', 'loss', 'seconds']
    >>> with tuning.apply(vlm):
    ...     answers = vlm.generate([samples[0].image], ["What is it?"], max_new_tokens=2)
    """

    def __init__(
        self,
        vlm: VLM,
        layers: Layers,
        method: str = "loreft",
        rank: int = 4,
        *,
        first: int = 0,
        last: int = 1,
        gate: bool = False,
        seed: int = 0,
    ) -> None:
        require_one_of(method, METHODS, "method")
        self.layers = sorted(set(checked_layers(vlm, layers, first=0)))
        require(self.layers, "no layers", f"give at least one layer of 0 to {vlm.n_layers}")
        require_counts(rank=rank)
        require(rank <= vlm.width, f"rank is {rank}", f"give at most the width, {vlm.width}")
        for name, number in {"first": first, "last": last, "seed": seed}.items():
            whole = isinstance(number, Integral) and not isinstance(number, bool)
            require(whole and number >= 0, f"{name} is {number!r}", "give 0 or more")
        require(first + last > 0, "no positions: first and last are 0", "give one of them")
        self.model, self.width = vlm.name, vlm.width
        self.method, self.rank, self.gate, self.seed = method, rank, gate, seed
        self.first, self.last = first, last
        self.functions = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            function = _FUNCTIONS[method](rank, vlm.width, generator)
            self.functions[str(layer)] = _Gated(function, vlm.width) if gate else function
        self.functions.to(vlm.device)

    def __repr__(self) -> str:
        layers = " ".join(map(str, self.layers))
        parts = [self.method, f"layers {layers}", f"rank {self.rank}"]
        parts += [f"first {self.first}", f"last {self.last}"]
        return f"RepresentationTuning({', '.join(parts + ['gate'] * self.gate)})"

    @property
    def n_parameters(self) -> int:
        """The number of trained parameters.

        A layer has 2rd + r for LoReFT and DiReFT and rd + r for the constant; a gate adds d + 1. Of
        the rd in R, orthonormality leaves r(r + 1)/2 without effect; they count here as they do in
        the paper.
        """
        return sum(weight.numel() for weight in self.functions.parameters())

    def rotation(self, layer: int) -> Float[Tensor, "r d"]:
        """Return the directions of a layer's subspace, in which alone the states change.

        Parameters
        ----------
        layer : int
            One of ``layers``.

        Returns
        -------
        tensor (r, d)
            Orthonormal rows R; for DiReFT the rows of W_2, which are not.

        Raises
        ------
        InputError
            If the layer is none of those tuned.
        """
        require_one_of(layer, self.layers, "layer")
        function = self.functions[str(layer)]
        function = function.function if self.gate else function
        return function.directions.detach().cpu()

    @contextmanager
    def apply(self, vlm: VLM) -> Iterator[None]:
        """Put the functions in force inside a ``with`` block.

        Use it around ``vlm.generate``, ``vlm.forward`` or a capture. Only positions of the prompt
        change, so that steps of a generation with a cache cost nothing more.

        Parameters
        ----------
        vlm : VLM
            The model that it was made for.

        Raises
        ------
        InputError
            If the model has another name or width.
        InterventionError
            Where the model runs: if a prompt is shorter than ``first + last``, or its positions are
            not known because it was not run by ``vlm``. If a vector is folded into a tuned layer.
        """
        self._require_model(vlm)
        self.functions.to(vlm.device)
        with representation_tuning(vlm, self, self._digest()):
            yield

    def fit(
        self,
        vlm: VLM,
        samples: Iterable[Sample],
        answers: Answers = None,
        *,
        prompts: Prompts = None,
        steps: int = 60,
        batch_size: int = 16,
        learning_rate: float = 1e-2,
        seed: int = 0,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Train the functions so that the model gives these answers; its weights stay as they are.

        The loss is the mean cross-entropy of the answers' tokens and EOS. The optimiser is AdamW
        with a warm-up of ten steps and a cosine to 0. No block below the lowest tuned layer keeps
        anything for the gradient, so late layers train faster.

        Parameters
        ----------
        vlm : VLM
            The model that it was made for, of any dtype; what is trained is float32.
        samples : iterable of Sample
            What the answers are about, all of one modality.
        answers : sequence of str, or function of a sample, optional
            One for each sample; by default its first caption.
        prompts : str, sequence of str, or function of a sample, optional
            What the model is asked; by default a description.
        steps : int
            Training steps, 60 by default.
        batch_size : int
            Samples of a step, 16 by default; at most all of them.
        learning_rate : float
            The largest learning rate, 1e-2 by default.
        seed : int
            Draws the samples of each step.
        progress : bool
            Whether a progress bar is shown; not by default.

        Returns
        -------
        DataFrame
            A row for each step: step (from 1), loss (nats a token) and seconds.

        Raises
        ------
        InputError
            If the model is another one, there are no samples, prompts or answers are not as many, a
            number is below 1, or the loss is not finite.
        InterventionError
            If a prompt is shorter than ``first + last``.
        """
        self._require_model(vlm)
        self.functions.to(vlm.device)
        samples, prompts, answers = examples(samples, prompts, answers)
        require_counts(steps=steps, batch_size=batch_size)
        require(learning_rate > 0, f"learning_rate is {learning_rate}", "give more than 0")
        require(seed >= 0, f"seed is {seed}", "give 0 or more")

        def loss(step: int) -> Float[Tensor, ""]:
            rows = batch_rows(len(samples), batch_size, seed, step)
            value = loss_of(
                vlm,
                [samples[row] for row in rows],
                [prompts[row] for row in rows],
                [answers[row] for row in rows],
            )
            lower = "train with a lower learning_rate"
            require(torch.isfinite(value), f"the loss of step {step + 1} is {value}", lower)
            return value

        with frozen(vlm.model), self.apply(vlm):
            history = optimise(
                dict(self.functions.named_parameters()),
                loss,
                steps,
                lambda step: learning_rate * warmup_cosine(step, steps, warmup=10),
                desc="tune representations",
                leave=False,
                disable=not progress,
            )
        return pd.DataFrame(history).assign(step=lambda rows: rows["step"] + 1)

    def positions(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """Mark where the functions act in a batch.

        Padding does not count, on whichever side it is, and neither does the answer.

        Parameters
        ----------
        batch : Batch
            The inputs, as ``vlm.batch`` makes them.

        Returns
        -------
        mask (b, t)
            True at the first and last positions of each prompt.

        Raises
        ------
        InterventionError
            If a prompt is shorter than ``first + last``.
        """
        real = batch.spans != SPANS.index("padding")
        # the prompt's last position is the first of those that predict
        prompt = real & (batch.predicting.cumsum(dim=1) <= 1)
        numbers, lengths = prompt.cumsum(dim=1), prompt.sum(dim=1, keepdim=True)
        shortest = int(lengths.min())
        if self.first + self.last > shortest:
            raise InterventionError(
                f"the first {self.first} and last {self.last} positions of a prompt of {shortest}",
                f"tune at most {shortest} positions in all",
            )
        return prompt & ((numbers <= self.first) | (numbers > lengths - self.last))

    def save(self, path: str | Path) -> Path:
        """Write parameters and settings to one safetensors file, which is whole or absent.

        :func:`load_tuning` reads it.

        Parameters
        ----------
        path : str or Path
            The file to write or to replace.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        FileError
            If the file cannot be written.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        tensors = {name: value.cpu() for name, value in self.functions.state_dict().items()}
        return save_tensors(path, tensors, {"format": _FORMAT, "settings": json.dumps(settings)})

    def _require_model(self, vlm: VLM) -> None:
        advice = "tune the representations of this model"
        require_equal("models of the tuning and of what is tuned", self.model, vlm.name, advice)
        require_equal("widths of tuning and model", self.width, vlm.width, advice)

    def _digest(self) -> str:
        content = hashlib.sha256()
        for weight in self.functions.parameters():
            content.update(weight.detach().cpu().numpy().tobytes())
        return content.hexdigest()[:12]


def load_tuning(path: str | Path, vlm: VLM) -> RepresentationTuning:
    """Read the functions that :meth:`RepresentationTuning.save` wrote, for the same model.

    Parameters
    ----------
    path : str or Path
        The safetensors file.
    vlm : VLM
        The model that they were trained for.

    Returns
    -------
    RepresentationTuning
        The functions, with their settings and parameters.

    Raises
    ------
    LoadError
        If there is no such file, or it is damaged or no file of representation tuning.
    InputError
        If it was made for a model of another name or width.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from xlvlms_tutorial.methods.steering import RepresentationTuning, load_tuning
    >>> path = RepresentationTuning(vlm, 12, rank=1).save(Path(mkdtemp()) / "tuning.safetensors")
    >>> load_tuning(path, vlm)
    RepresentationTuning(loreft, layers 12, rank 1, first 0, last 1)
    """
    advice = "give a file written by save"
    try:
        tensors, metadata = load_tensors(path)
    except OSError as cause:
        raise LoadError(f"{path!s} cannot be read as a tuning ({cause!s})", advice) from cause
    if metadata.get("format") != _FORMAT:
        raise LoadError(f"{path!s} is no file of format {_FORMAT!r}", advice)
    try:
        settings = json.loads(metadata["settings"])
        model, width = settings.pop("model"), settings.pop("width")
    except (KeyError, TypeError, ValueError) as cause:
        raise LoadError(f"{path!s} is damaged ({cause!r})", "train it again") from cause
    advice = "load it for the model that it was trained for"
    require_equal("models of the file and of what is tuned", model, vlm.name, advice)
    require_equal("widths of file and model", width, vlm.width, advice)
    try:
        tuning = RepresentationTuning(vlm, **settings)
        tuning.functions.load_state_dict(tensors)
    except (TypeError, ValueError, LookupError, RuntimeError) as cause:
        raise LoadError(f"{path!s} is damaged ({cause!r})", "train it again") from cause
    return tuning


@recorded
@contextmanager
def representation_tuning(vlm: VLM, tuning: RepresentationTuning, digest: str) -> Iterator[None]:
    """Change the states of the tuned layers of ``vlm``, as ``tuning`` has learned to.

    ``digest`` tells the parameters apart in records.
    """
    refuse_folded(vlm, tuning.layers, "tuning its states")
    with ExitStack() as stack:
        for layer in tuning.layers:
            change = _change(tuning.functions[str(layer)])
            stack.enter_context(edited(vlm, [layer], change, tuning.positions, gate=None))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight of a model take part in training inside this block."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def examples(
    samples: Iterable[Sample], prompts: Prompts, answers: Answers
) -> tuple[list[Sample], list[str], list[str]]:
    """Return samples with a prompt and an answer each, or refuse them.

    ``prompts`` is one text for all samples or one for each; without ``answers`` the first
    captions of the samples are taken.

    Raises
    ------
    InputError
        If there are no samples, or prompts or answers are not as many, or an answer is empty.
    """
    samples = list(samples)
    require_samples(samples)
    prompts = prompts_of(samples, prompts)
    answers = answers_of(samples, answers)
    if answers is None:
        answers = first_captions(samples, "give the answers to train on")
    require_same_length(samples=samples, prompts=prompts, answers=answers)
    written = all(isinstance(answer, str) and answer.strip() for answer in answers)
    require(written, "an answer that is empty or no text", "give one text for each sample")
    return samples, prompts, answers


def batch_rows(n: int, batch_size: int, seed: int, step: int) -> Sequence[int]:
    """Return which ``batch_size`` of ``n`` samples a step sees, decided by seed and step alone."""
    rng = np.random.default_rng([seed, step])
    return rng.choice(n, min(batch_size, n), replace=False).tolist()


def _change(function: nn.Module) -> Callable[[Tensor], Tensor]:
    def change(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return (wide + function(wide)).to(states.dtype)

    return change


class _Subspace(nn.Module):
    """Directions (r, d) that stay orthonormal while they are trained."""

    def __init__(self, rank: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.T.contiguous()
        self.weight = nn.Parameter(start)
        # no trivialisation: its base would be a matrix (d, d) for each layer
        orthogonal(self, "weight", "householder", use_trivialization=False)


class _Loreft(nn.Module):
    def __init__(self, rank: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.subspace = _Subspace(rank, width, generator)
        self.source = nn.Parameter(self.subspace.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    @property
    def directions(self) -> Float[Tensor, "r d"]:
        return self.subspace.weight

    def forward(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return what is added, R^T (W h + b - R h)."""
        rotation = self.directions
        # the difference first: it is exactly 0 at the start
        low = nn.functional.linear(states, (self.source - rotation).to(states.dtype))
        return (low + self.bias.to(states.dtype)) @ rotation.to(states.dtype)


class _Direft(nn.Module):
    def __init__(self, rank: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(rank))
        self.target = nn.Parameter(torch.zeros(rank, width))

    @property
    def directions(self) -> Float[Tensor, "r d"]:
        return self.target

    def forward(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return what is added, W_2^T (W_1 h + b)."""
        low = nn.functional.linear(states, self.source.to(states.dtype))
        return (low + self.bias.to(states.dtype)) @ self.target.to(states.dtype)


class _Constant(nn.Module):
    def __init__(self, rank: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.subspace = _Subspace(rank, width, generator)
        self.bias = nn.Parameter(torch.zeros(rank))

    @property
    def directions(self) -> Float[Tensor, "r d"]:
        return self.subspace.weight

    def forward(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return what is added, R^T b, whatever the states are."""
        return (self.bias @ self.directions).to(states.dtype).expand_as(states)


class _Gated(nn.Module):
    """Scale what a function adds by a number between 0 and 1 that each token's state decides."""

    def __init__(self, function: nn.Module, width: int) -> None:
        super().__init__()
        self.function = function
        self.direction = nn.Parameter(torch.zeros(width))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return what is added, scaled."""
        scale = states.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        score = (states / scale) @ self.direction.to(states.dtype)[:, None]
        return torch.sigmoid(score + self.offset.to(states.dtype)) * self.function(states)


_FUNCTIONS = {"loreft": _Loreft, "direft": _Direft, "constant": _Constant}
