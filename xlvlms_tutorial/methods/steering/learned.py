r"""Steering by a learned function of the state.

A steering vector is the same for every input. Here each input gets one, predicted from its own
state: "Learning to Steer: Input-dependent Steering for Multimodal LLMs" (arXiv 2508.12815).
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.edits import edit
from xlvlms_tutorial.interventions.overrides import Positions, checked_layers, fit
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.methods.steering.shifts import Rows, mean_shifts_by_class, rows_of, svd_decoder
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import (
    require,
    require_counts,
    require_equal,
    require_one_of,
    require_same_length,
)

LOSSES = ("mse", "mse+l1-cos")
_FORMAT = "xlvlms learned steering 1"
_SMALL = 1e-6  # of the largest spread: coordinates that vary less are not scaled up

Function = Callable[[Rows], Rows]  # from the states of some samples to a vector for each


class ProbeSteering:
    r"""Add the mean shift of the class that a linear probe reads off the state.

    Use it as the rival of :class:`LearnedSteering`: if it does as well, the learned function is a
    probe and a few constants. For yes and no, whose shifts are opposite, it is the sign of a probe
    times one vector; for several classes it is Mean-S by class with a router.

    Parameters
    ----------
    penalty : float, default 1.0
        The inverse strength of the probe's regularisation, as scikit-learn's C.

    Attributes
    ----------
    classes : list
        The classes, in the order of the probe.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import ProbeSteering
    >>> states = torch.tensor([[-1.0, 0.0], [-2.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    >>> shifts = torch.tensor([[0.0, -3.0], [0.0, -3.0], [0.0, 3.0], [0.0, 3.0]])
    >>> steering = ProbeSteering().fit(states, shifts, ["no", "no", "yes", "yes"])
    >>> steering.predict(torch.tensor([[5.0, 5.0]])).tolist()
    [[0.0, 3.0]]
    """

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty
        self.classes: list[Hashable] = []

    def fit(self, states: Tensor, shifts: Tensor, labels: Sequence[Hashable]) -> "ProbeSteering":
        """Fit the probe to the classes and average the shifts of each.

        Parameters
        ----------
        states : tensor (n, d)
            What the probe reads.
        shifts : tensor (n, d)
            From :func:`contrast_shifts`.
        labels : sequence
            The class of each sample, two or more in all.

        Returns
        -------
        ProbeSteering
            Itself.

        Raises
        ------
        InputError
            If lengths differ, states or shifts are unusable, or there is one class only.
        """
        rows = rows_of(states, "states")
        require_same_length(states=rows, shifts=shifts, labels=labels)
        names = list(dict.fromkeys(labels))
        require(len(names) >= 2, f"{len(names)} class", "give samples of two classes or more")
        means = mean_shifts_by_class(shifts, labels)
        number = np.array([names.index(label) for label in labels])
        self.classes = names
        probe = LogisticRegression(C=self.penalty, max_iter=1000)
        self.probe = make_pipeline(StandardScaler(), probe).fit(rows.numpy(), number)
        self.vectors = torch.stack([means[name] for name in names])
        return self

    @property
    def n_parameters(self) -> int:
        """The numbers that the probe and its vectors have."""
        weights = self.probe[-1].coef_.size + self.probe[-1].intercept_.size
        return weights + self.vectors.numel()

    def labels(self, states: Rows) -> list[Hashable]:
        """Tell classes apart by the probe.

        Parameters
        ----------
        states : tensor (n, d)
            States as those that it was fitted on.

        Returns
        -------
        list
            The class of each.
        """
        numbers = self.probe.predict(rows_of(states, "states").numpy())
        return [self.classes[number] for number in numbers]

    def predict(self, states: Rows) -> Rows:
        """Return the vector that the probe decides on for each state.

        Parameters
        ----------
        states : tensor (n, d)
            States as those that it was fitted on.

        Returns
        -------
        tensor (n, d)
            The vector of its class for each.
        """
        numbers = self.probe.predict(rows_of(states, "states").numpy())
        return self.vectors[torch.as_tensor(numbers)]


class LearnedSteering:
    r"""Learn to predict an input's shift from its state: a linear map, tanh, a linear map (L2S).

    Use it where the right direction depends on the input. With the state :math:`h` of the prompt's
    last token at some layer, the vector is :math:`g(h) = D \tanh(E h + e)`, learned from pairs of
    states and shifts (arXiv 2508.12815); the model itself is not needed for that.

    Parameters
    ----------
    n_hidden : int, default 64
        The rank r of the map, at most the width d. It has 2rd + r parameters.
    loss : {"mse", "mse+l1-cos"}, default "mse"
        The paper's formula, the mean of :math:`(z - g(h))^2`; or what its code minimises, this plus
        the mean of :math:`|z - g(h)|` minus the cosine times ``cosine_weight``. Shifts have a root
        mean square of 1 in the loss.
    cosine_weight : float, default 0.1
        The last weight of the cosine; it grows from 0 with the epochs.
    epochs : int, default 100
        Passes over the samples.
    batch_size : int, default 64
        Samples of a step of Adam.
    learning_rate : float, default 2e-3
        The highest learning rate, which falls to 0 as a cosine does.
    seed : int, default 0
        Of E and of the order of the samples.

    Attributes
    ----------
    encoder, bias, decoder : tensor (r, d), (r,), (d, r)
        E, e and D after the fit. D starts as the first right singular vectors of the centred
        shifts.
    history : list of float
        The mean loss of each epoch.
    model : str
        The name of the model that it is for.

    Raises
    ------
    InputError
        If the loss is unknown or a number is out of range.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import LearnedSteering
    >>> states = torch.tensor([[-1.0, 0.0], [1.0, 0.0]] * 20)
    >>> steering = LearnedSteering(1, learning_rate=0.05).fit(states, 3 * states.flip(1))
    >>> steering.predict(torch.tensor([[1.0, 0.0]])).round().tolist()
    [[0.0, 3.0]]
    >>> steering.n_parameters
    5
    """

    def __init__(
        self,
        n_hidden: int = 64,
        loss: str = "mse",
        *,
        cosine_weight: float = 0.1,
        epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        seed: int = 0,
    ) -> None:
        require_one_of(loss, LOSSES, "loss")
        require_counts(n_hidden=n_hidden, epochs=epochs, batch_size=batch_size)
        for name, value in {"cosine_weight": cosine_weight, "learning_rate": learning_rate}.items():
            require(_finite(value) and value >= 0, f"{name} is {value!r}", "give 0 or more")
        self.n_hidden = n_hidden
        self.loss = loss
        self.cosine_weight = cosine_weight
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed
        self.model = ""
        self.history: list[float] = []
        self._parts: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        fitted = f"{self.n_parameters:,} parameters" if self._parts else "not fitted"
        return f"LearnedSteering(n_hidden={self.n_hidden}, loss={self.loss!r}, {fitted})"

    def fit(self, states: Tensor, shifts: Tensor, model: str = "") -> "LearnedSteering":
        """Learn to predict shifts from states.

        Parameters
        ----------
        states : tensor (n, d)
            The states of the prompts' last tokens, such as from ``capture(..., positions=-1)``.
        shifts : tensor (n, d)
            From :func:`contrast_shifts`, in the same order.
        model : str, default ""
            The name of the model that both are of, the only one that :meth:`apply` accepts.

        Returns
        -------
        LearnedSteering
            Itself.

        Raises
        ------
        InputError
            If states and shifts differ in length or width, hold NaN or infinite numbers, all shifts
            are zero, or ``n_hidden`` is above the width.
        """
        rows, targets = rows_of(states, "states"), rows_of(shifts, "shifts")
        require_same_length(states=rows, shifts=targets)
        require_equal(
            "widths of states and shifts",
            rows.shape[1],
            targets.shape[1],
            "give those of one model",
        )
        width = rows.shape[1]
        require(
            self.n_hidden <= width,
            f"n_hidden is {self.n_hidden} for states of width {width}",
            f"give at most {width}",
        )
        scale = float(targets.square().mean().sqrt())
        require(scale > 0, "all shifts are zero", "give completions that differ")
        mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0)
        spread = spread.clamp_min(_SMALL * float(spread.max()) or 1.0)
        parts = self._start((rows - mean) / spread, targets / scale)
        # the scales go into the maps, which then take states and give shifts as they are
        encoder = parts["encoder"] / spread
        self._parts = {
            "encoder": encoder,
            "bias": parts["bias"] - encoder @ mean,
            "decoder": parts["decoder"] * scale,
        }
        self.model = str(model)
        return self

    def _start(self, states: Rows, shifts: Rows) -> dict[str, Tensor]:
        """Initialise the three parts, and train them on standardised states and scaled shifts."""
        generator = torch.Generator().manual_seed(self.seed)
        width = states.shape[1]
        # so small that tanh starts as a linear map, and no unit has to change its sign
        encoder = 0.1 * torch.randn(self.n_hidden, width, generator=generator) / width**0.5
        parts = {
            "encoder": encoder,
            "bias": torch.zeros(self.n_hidden),
            "decoder": svd_decoder(shifts, self.n_hidden),
        }
        weights = [nn.Parameter(part) for part in parts.values()]
        optimiser = torch.optim.Adam(weights, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        self.history = []
        with torch.enable_grad():
            for epoch in range(self.epochs):
                total = 0.0
                for rows in torch.randperm(len(states), generator=generator).split(self.batch_size):
                    loss = self._loss(
                        _forward(*weights, states[rows]), shifts[rows], epoch / self.epochs
                    )
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    total += loss.item() * len(rows)
                schedule.step()
                self.history.append(total / len(states))
        values = [weight.detach() for weight in weights]
        return dict(zip(parts, values, strict=True))

    def _loss(self, predicted: Rows, shifts: Rows, progress: float) -> Float[Tensor, ""]:
        squared = (predicted - shifts).square().mean()
        if self.loss == "mse":
            return squared
        cosine = nn.functional.cosine_similarity(predicted, shifts, dim=1).mean()
        distance = (predicted - shifts).abs().mean()
        return squared + distance - self.cosine_weight * progress * cosine

    @property
    def encoder(self) -> Float[Tensor, "r d"]:
        """The first map, E."""
        return self._part("encoder")

    @property
    def bias(self) -> Float[Tensor, "r"]:
        """What is added to it, e."""
        return self._part("bias")

    @property
    def decoder(self) -> Float[Tensor, "d r"]:
        """The second map, D."""
        return self._part("decoder")

    @property
    def width(self) -> int:
        """The width of the states that it takes."""
        return self.encoder.shape[1]

    @property
    def n_parameters(self) -> int:
        """How many numbers were learned, 2rd + r."""
        return sum(self._part(name).numel() for name in ("encoder", "bias", "decoder"))

    def _part(self, name: str) -> Tensor:
        require(self._parts, "this LearnedSteering is not fitted", "call fit first")
        return self._parts[name]

    def predict(self, states: Rows) -> Rows:
        """Predict the vector of each input.

        Parameters
        ----------
        states : tensor (n, d)
            States as those that it was fitted on.

        Returns
        -------
        tensor (n, d)
            The vectors, on the device and in the dtype of the states.

        Raises
        ------
        InputError
            If it is not fitted, or the states are unusable or of another width.
        """
        require_equal(
            "widths of the steering function and of the states",
            self.width,
            states.shape[-1],
            "give states of the model that it was fitted on",
        )
        require(states.ndim == 2, f"states of shape {tuple(states.shape)}", "give (n, d)")
        return self._vectors(states)

    def _vectors(self, states: Rows) -> Rows:
        parts = [self._part(name).to(states.device) for name in ("encoder", "bias", "decoder")]
        return _forward(*parts, states.float()).to(states.dtype)

    @contextmanager
    def apply(
        self,
        vlm: VLM,
        layer: int,
        strength: float = 1.0,
        positions: Positions = "all",
        *,
        read_layer: int | None = None,
    ) -> Iterator[None]:
        r"""Steer inside a ``with`` block, :math:`h_l \leftarrow h_l + \alpha\, g(h_{l'})`.

        Use it around ``vlm.generate`` or ``vlm.forward``. The function is evaluated once a sample,
        at the prompt; the steps of a generation add the same vector again. What the parameters do
        is said at :func:`steer_by`.

        Parameters
        ----------
        vlm : VLM
            The model that it was fitted for.
        layer : int
            The layer where vectors are added.
        strength : float
            The factor :math:`\alpha`; 1 by default. Choose it, with its sign, on validation
            samples.
        positions : str, tuple of str, or mask (b, t)
            Where they are added, as for ``interventions.add``; "all" by default, as in the paper's
            code.
        read_layer : int, optional
            The layer whose state at the prompt's last token the function takes, at most ``layer``;
            by default ``layer``.

        Raises
        ------
        InputError
            If it is not fitted, is for another model or width, the strength is not finite, or the
            read layer is above the layer.
        LayerError
            If a layer is out of range.
        """
        require_equal(
            "models of the steering function and of what is steered",
            self.model,
            vlm.name,
            "fit it to the model's own states, with model=vlm.name",
        )
        require_equal(
            "widths of the steering function and of the model",
            self.width,
            vlm.width,
            "fit it to the model's own states",
        )
        with steer_by(
            vlm, self._vectors, layer, strength, positions, read_layer=read_layer, name=self.digest
        ):
            yield

    @property
    def digest(self) -> str:
        """Twelve digits that tell its numbers from others."""
        content = hashlib.sha256()
        for name in ("encoder", "bias", "decoder"):
            content.update(self._part(name).contiguous().numpy().tobytes())
        return content.hexdigest()[:12]

    def save(self, path: str | Path) -> Path:
        """Write it to one safetensors file, which :func:`load_steering` reads.

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
        InputError
            If it is not fitted.
        FileError
            If the file cannot be written.
        """
        tensors = {name: self._part(name).contiguous() for name in ("encoder", "bias", "decoder")}
        settings = {"loss": self.loss, "model": self.model, "seed": self.seed}
        return save_tensors(path, tensors, {"format": _FORMAT, "settings": json.dumps(settings)})


def load_steering(path: str | Path) -> LearnedSteering:
    """Read a function that :meth:`LearnedSteering.save` wrote.

    Use it to steer in a later session.

    Parameters
    ----------
    path : str or Path
        The safetensors file.

    Returns
    -------
    LearnedSteering
        The function, fitted.

    Raises
    ------
    LoadError
        If there is no such file, it is damaged, or its parts do not fit each other.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import LearnedSteering, load_steering
    >>> states = torch.eye(2)
    >>> path = Path(mkdtemp()) / "steering.safetensors"
    >>> path = LearnedSteering(1, epochs=1).fit(states, states, model="mine").save(path)
    >>> load_steering(path).model
    'mine'
    """
    try:
        tensors, metadata = load_tensors(path)
    except OSError as cause:
        raise LoadError(
            f"{path!s} cannot be read as a steering function ({cause!s})",
            "give a file written by save",
        ) from cause
    if metadata.get("format") != _FORMAT:
        raise LoadError(f"{path!s} is no file of format {_FORMAT!r}", "give a file written by save")
    try:
        settings = json.loads(metadata["settings"])
        encoder, bias, decoder = (tensors[name] for name in ("encoder", "bias", "decoder"))
        rank, width = encoder.shape
        fitting = tuple(bias.shape) == (rank,) and tuple(decoder.shape) == (width, rank)
        finite = all(torch.isfinite(tensor).all() for tensor in tensors.values())
        require(fitting and finite, "its parts do not fit each other", "make it again")
        steering = LearnedSteering(rank, settings["loss"], seed=settings["seed"])
        steering.model = str(settings["model"])
    except (InputError, KeyError, TypeError, ValueError, RecursionError) as cause:
        raise LoadError(
            f"{path!s} is damaged: its content cannot be used ({cause!s})", "make it again"
        ) from cause
    steering._parts = {"encoder": encoder, "bias": bias, "decoder": decoder}
    return steering


@contextmanager
def steer_by(
    vlm: VLM,
    function: Function,
    layer: int,
    strength: float = 1.0,
    positions: Positions = "all",
    *,
    read_layer: int | None = None,
    name: str = "",
) -> Iterator[None]:
    r"""Steer each input by a function of its own state, inside a ``with`` block.

    Use it for functions of your own, such as a probe's; :meth:`LearnedSteering.apply` checks the
    model too. The function takes the state of the prompt's last token and is evaluated once a
    sample, at the prompt; all steps of a generation add the same vector.

    Parameters
    ----------
    vlm : VLM
        The model.
    function : function
        From states (b, d) to vectors (b, d), such as ``steering.predict``.
    layer : int
        The layer where vectors are added, 0 to L.
    strength : float
        The factor; 1 by default. Any finite number.
    positions : str, tuple of str, or mask (b, t)
        Where they are added, as for ``interventions.add``: "all" (default), pictures included;
        "last", the positions that predict; "generated"; a span.
    read_layer : int, optional
        The layer whose state the function takes, at most ``layer``; by default ``layer``.
    name : str, default ""
        What tells this function from others in the record of what changes the model.

    Raises
    ------
    InputError
        If the strength is not finite, or the read layer is above the layer.
    LayerError
        If a layer is out of range.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.steering import steer_by
    >>> plain = vlm.forward(batch).logits
    >>> with steer_by(vlm, lambda states: -states, 24, positions="last", read_layer=12):
    ...     steered = vlm.forward(batch).logits
    >>> bool((steered != plain).any())
    True
    """
    require(_finite(strength), f"strength is {strength!r}", "give a finite number")
    source = layer if read_layer is None else read_layer
    checked_layers(vlm, [source, layer], first=0)
    require(
        source <= layer,
        f"read_layer {source} is above layer {layer}",
        "read at or below the layer where vectors are added, or predict before and use add",
    )
    with _steered(vlm, name, function, source, layer, float(strength), positions):
        yield


@recorded
@contextmanager
def _steered(
    vlm: VLM,
    name: str,
    function: Function,
    source: int,
    layer: int,
    strength: float,
    positions: Positions,
) -> Iterator[None]:
    vectors: list[Tensor] = []

    def read(states: Float[Tensor, "b t d"]) -> Tensor:
        """Evaluate the function at the prompt; as a gate of an edit it lets all samples pass."""
        rows = torch.arange(len(states), device=states.device)
        vectors[:] = [function(states[rows, _last_of_prompts(vlm, states)])]
        return torch.ones(len(states), dtype=torch.bool)

    def reads_only(states: Tensor) -> Tensor:
        return torch.zeros_like(read(states))

    def change(states: Float[Tensor, "b t d"]) -> Tensor:
        shift = fit(vectors[0], len(states), "vectors").to(states)
        return states + strength * shift[:, None]

    reader = nullcontext()
    if source != layer:
        reader = edit(vlm, _unchanged, source, "all", reads_only)
    gate = read if source == layer else None
    with reader, edit(vlm, change, layer, positions, gate):
        yield


def _unchanged(states: Tensor) -> Tensor:
    return states


def _last_of_prompts(vlm: VLM, states: Float[Tensor, "b t d"]) -> Tensor:
    """The position of each prompt's last token; an answer that is given follows it."""
    last = torch.full((len(states),), states.shape[1] - 1, device=states.device)
    if vlm.running is None:
        return last
    answers = (vlm.running.spans == SPANS.index("answer")).to(states.device)
    first = fit(answers.int().argmax(dim=1) - 1, len(states), "prompts")
    return torch.where(fit(answers.any(dim=1), len(states), "prompts"), first, last)


def _forward(encoder: Tensor, bias: Tensor, decoder: Tensor, states: Rows) -> Rows:
    return torch.tanh(states @ encoder.T + bias) @ decoder.T


def _finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
