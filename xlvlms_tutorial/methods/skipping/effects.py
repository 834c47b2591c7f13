"""Choose the blocks to skip by the loss of the model without them.

Each layer is left out alone, or layers are left out one after the other, greedily.
"""

import hashlib
from collections.abc import MutableMapping, Sequence
from math import isfinite
from weakref import WeakSet

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions.overrides import checked_layers
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.interventions.skipping import PARTS, skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import (
    Answers,
    Prompts,
    Samples,
    batches,
    first_captions,
    with_eos,
)
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require

# whose logits over the whole vocabulary are in memory together
_ROWS_AT_ONCE = 512
# models whose resumed passes were found to agree with whole forwards
_AGREE: WeakSet[VLM] = WeakSet()

# A loss by what was measured: a digest of the batch and of what is in force, the part, and the
# layers that are left out
Memo = MutableMapping[tuple[str, str, frozenset[int]], float]


def layer_importance(
    vlm: VLM,
    samples: Samples,
    answers: Answers = None,
    layers: Sequence[int] | None = None,
    part: str = "block",
    prompt: Prompts = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
    memo: Memo | None = None,
) -> pd.DataFrame:
    """Measure how much the loss increases when each layer alone is left out.

    Use it to see which blocks, MLPs or attentions the model can do without. The effect of one layer
    does not say what several cost together: that is what :func:`greedy_layer_order` is for. Each
    batch goes through the blocks below a layer once: the pass without the layer starts there.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample, or of str
        Samples with what they show, or plain texts. Plain texts are read without a picture, and
        all of their tokens but the first count in the loss.
    answers : sequence of str, or function of a sample, optional
        The text whose loss is measured for each sample, given what the sample shows and the
        prompt. By default the sample's first caption. Not for plain texts.
    layers : sequence of int, optional
        The layers that are left out, one at a time, from 1 to L. By default all.
    part : {"block", "mlp", "attention"}
        What of a layer is left out. By default the whole block.
    prompt : str, or function of a sample, optional
        What the model is asked. By default a description of what the sample shows.
    batch_size : int
        How many samples go through the model together.
    progress : bool
        Whether to show a progress bar.
    memo : dict, optional
        Keeps the losses that are measured; what it holds is not measured again. Give the same dict
        to several calls on one model that have batches in common.

    Returns
    -------
    DataFrame
        One row for each layer, in order. Columns ``layer``; ``loss``, the cross-entropy without
        the layer, in nats a token, of the answers and the EOS token after each; ``increase``, how
        much that is above the loss of the dense model, which is in ``.attrs["dense"]``.

    Raises
    ------
    InputError
        If there are no samples or layers, the batch size is below 1, or a sample has neither
        caption nor answer. If the numbers of answers and samples differ. If a loss is NaN or
        infinite.
    LayerError
        If the model has no such layer.
    InterventionError
        If the part is unknown.

    Examples
    --------
    The model can do without a late block far better than without the first one:

    >>> from xlvlms_tutorial.methods.skipping import layer_importance
    >>> table = layer_importance(vlm, ["A red ball lies on the grass."], layers=[1, 25])
    >>> table.columns.tolist()
    ['layer', 'loss', 'increase']
    >>> table["layer"].tolist()
    [1, 25]
    >>> bool(table["increase"][0] > table["increase"][1])
    True
    """
    selected = _sorted_layers(vlm, layers)
    require(selected, "no layers", "give one or more, or None for all")
    losses = _Losses(vlm, samples, answers, prompt, batch_size, part, memo)
    total = len(selected) * len(losses.passes)
    with tqdm(total=total, desc="effects", unit="pass", leave=False, disable=not progress) as bar:
        values = losses.without((), selected, bar)
    table = pd.DataFrame({"layer": selected, "loss": values})
    table["increase"] = table["loss"] - losses.dense
    table.attrs["dense"] = losses.dense
    return table


def greedy_layer_order(
    vlm: VLM,
    samples: Samples,
    k: int,
    answers: Answers = None,
    candidates: Sequence[int] | None = None,
    part: str = "block",
    prompt: Prompts = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
    memo: Memo | None = None,
) -> list[int]:
    """Order layers by leaving out, one after the other, the one that costs the least.

    Use it to choose several layers that are left out together. Each step takes the layer without
    which the loss is then smallest. The first m layers are the greedy choice of m, so that one run
    serves every number of layers up to k. Losses are those of :func:`layer_importance`.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample, or of str
        Samples with what they show, or plain texts. Plain texts are read without a picture, and
        all of their tokens but the first count in the loss.
    k : int
        How many layers are chosen.
    answers : sequence of str, or function of a sample, optional
        The text whose loss is measured for each sample. By default the sample's first caption.
        Not for plain texts.
    candidates : sequence of int, optional
        The layers that may be left out, from 1 to L. By default all. Fewer candidates take
        less time: each step tries all that are left.
    part : {"block", "mlp", "attention"}
        What of a layer is left out. By default the whole block.
    prompt : str, or function of a sample, optional
        What the model is asked. By default a description of what the sample shows.
    batch_size : int
        How many samples go through the model together.
    progress : bool
        Whether to show a progress bar.
    memo : dict, optional
        Keeps the losses that are measured; what it holds is not measured again. That of
        :func:`layer_importance` on the same samples saves the first step.

    Returns
    -------
    list of int
        The k layers in the order in which they are left out. Of equal losses the layer with the
        smaller number comes first.

    Raises
    ------
    InputError
        If k is not between 1 and the number of candidates, or would leave no block, there are no
        samples, the batch size is below 1, or a sample has neither caption nor answer. If the
        numbers of answers and samples differ. If a loss is NaN or infinite.
    LayerError
        If the model has no such layer.
    InterventionError
        If the part is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import greedy_layer_order
    >>> greedy_layer_order(vlm, ["A red ball lies on the grass."], k=1, candidates=[1, 25])
    [25]
    """
    remaining = _sorted_layers(vlm, candidates)
    maximum = min(len(remaining), vlm.n_layers - (part == "block"))
    require(1 <= k <= maximum, f"{k} of {len(remaining)} candidates", f"give 1 to {maximum}")
    losses = _Losses(vlm, samples, answers, prompt, batch_size, part, memo)
    order: list[int] = []
    n_trials = sum(len(remaining) - step for step in range(k))
    total = n_trials * len(losses.passes)
    with tqdm(total=total, desc="greedy", unit="pass", leave=False, disable=not progress) as bar:
        for _ in range(k):
            values = losses.without(order, remaining, bar)
            cheapest = int(np.argmin(values))
            order.append(remaining.pop(cheapest))
    return order


def _sorted_layers(vlm: VLM, layers: Sequence[int] | None) -> list[int]:
    """Each layer once, in order; all layers of the model for None."""
    if layers is None:
        layers = range(1, vlm.n_layers + 1)
    return sorted(set(checked_layers(vlm, layers)))


class _Losses:
    """The mean loss of the target tokens of some batches, while layers are left out.

    The batches are made once.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Samples,
        answers: Answers,
        prompt: Prompts,
        batch_size: int,
        part: str,
        memo: Memo | None = None,
    ) -> None:
        if part not in PARTS:
            raise InterventionError(f"unknown part {part!r}", f"allowed: {', '.join(PARTS)}")
        samples = list(samples)
        texts = _answers_with_eos(vlm, samples, answers)
        self.vlm = vlm
        self.part = part
        self.memo = {} if memo is None else memo
        inputs = list(batches(vlm, samples, prompt, texts, batch_size=batch_size))
        first_texts = None if texts is None else texts[:2]
        trial = next(batches(vlm, samples[:2], prompt, first_texts))
        resumes = resumable(vlm, trial)
        self.passes = [_Pass(vlm, batch, resumes) for batch in inputs]
        self.n = sum(len(run.targets) for run in self.passes)
        self.dense = sum(self._loss(run, frozenset()) for run in self.passes) / self.n

    def without(self, skipped: Sequence[int], layers: Sequence[int], bar: tqdm) -> list[float]:
        """The losses without the skipped layers and each of ``layers``, which are in order.

        Each pass moves the ``bar`` on.
        """
        totals = np.zeros(len(layers))
        for run in self.passes:
            run.restart()
            with skip(self.vlm, list(skipped), self.part):
                for k, layer in enumerate(layers):
                    totals[k] += self._loss(run, frozenset((*skipped, layer)), layer)
                    bar.update()
        return (totals / self.n).tolist()

    def _loss(self, run: "_Pass", skipped: frozenset[int], layer: int | None = None) -> float:
        """The summed loss of a batch without the skipped layers, of which ``layer`` runs still."""
        key = (run.digest, self.part, skipped)
        if key not in self.memo:
            run.advance(0 if layer is None else layer - 1)
            with skip(self.vlm, [] if layer is None else [layer], self.part):
                self.memo[key] = run.loss()
        return self.memo[key]


class _Pass(Resumable):
    """One batch on its way through the blocks.

    Passes start where it stands, without the tower and the blocks below.
    """

    def __init__(self, vlm: VLM, batch: Batch, resumes: bool = True) -> None:
        super().__init__(vlm, batch, resumes=resumes)
        mask = _target_mask(batch)
        # each token is predicted one position before it; no row's first token is a target, so
        # that nothing is rolled round to the end of a row
        self.predicting: Bool[Tensor, "b t"] = torch.roll(mask, -1, dims=1)
        self.targets = batch["input_ids"][mask]
        self.digest = _digest(vlm, batch)
        self.restart()

    def restart(self) -> None:
        """Go back to what enters the first block."""
        self.layer = 0
        self.states = None

    def advance(self, layer: int) -> None:
        """Go on to what leaves this layer."""
        if self.resumes and layer > self.layer:
            self.states = self.read(layer, start=self.layer, states=self.states)
            self.layer = layer

    def end(self) -> Float[Tensor, "n d"]:
        """What leaves the last block where the target tokens are predicted."""
        return self.read(self.vlm.n_layers, self.predicting, start=self.layer, states=self.states)

    def loss(self) -> float:
        """Summed cross-entropy of the target tokens, in nats."""
        total = 0.0
        parts = zip(self.end().split(_ROWS_AT_ONCE), self.targets.split(_ROWS_AT_ONCE), strict=True)
        for states, ids in parts:
            logits = self.vlm.unembed(states)
            loss = nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="sum")
            total += float(loss)
        require(
            isfinite(total),
            "the loss is NaN or infinite",
            "load the model in float32 or bfloat16, and look for damaged weights",
        )
        return total


def resumable(vlm: VLM, batch: Batch) -> bool:
    """Tell whether passes that start at each layer end as those from the beginning.

    Not where blocks share more than the residual stream. It is tried on ``batch`` once a model.
    """
    if vlm.active or any(vlm.folded.values()) or anatomy.crossing(vlm.model):
        return False
    if vlm not in _AGREE and _agree(vlm, batch):
        _AGREE.add(vlm)
    return vlm in _AGREE


def _agree(vlm: VLM, batch: Batch) -> bool:
    """Try each block alone, on what enters it, against the states of a whole forward.

    A pass that starts below runs more blocks, and so has all that this one has.
    """
    layers = range(1, vlm.n_layers + 1)
    whole = read(vlm, batch, layers)
    run = _Pass(vlm, batch)
    for layer in layers:
        expected = whole[layer, WHOLE_BLOCK]
        if not torch.isfinite(expected).all():  # the error comes where the loss is computed
            return False
        run.advance(layer)
        if not same_up_to_rounding(run.states, expected, vlm.dtype):
            return False
    return True


def _digest(vlm: VLM, batch: Batch) -> str:
    """What tells a batch, in a model with what is in force, from any other."""
    digest = hashlib.blake2b(repr((vlm.name, vlm.active)).encode(), digest_size=16)
    for name in sorted(batch):
        digest.update(name.encode())
        value = batch[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        else:
            value = repr(value).encode()
        digest.update(value)
    digest.update(batch.spans.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _target_mask(batch: Batch) -> Bool[Tensor, "b t"]:
    """The tokens whose loss counts: the answers', or of plain texts all but the first."""
    answer = batch.spans == SPANS.index("answer")
    if answer.any():
        return answer
    words = batch.spans != SPANS.index("padding")
    words[torch.arange(len(words)), words.int().argmax(dim=1)] = False
    return words


def _answers_with_eos(vlm: VLM, samples: Samples, answers: Answers) -> list[str] | None:
    """The answers to the samples, each with the EOS token; None for plain texts."""
    if answers is None and any(isinstance(sample, str) for sample in samples):
        return None
    if answers is None:
        texts = first_captions(samples, "give answers")
    elif callable(answers):
        texts = [answers(sample) for sample in samples]
    else:
        texts = list(answers)
    require(
        all(isinstance(text, str) and text.strip() for text in texts),
        "answers that are no text or empty",
        "give one text for each sample",
    )
    return with_eos(vlm, texts)
