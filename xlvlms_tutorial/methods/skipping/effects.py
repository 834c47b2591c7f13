"""Which blocks to leave out by what their absence costs.

Each alone, or one after the other, greedily.
"""

from collections.abc import Sequence
from math import isfinite
from weakref import WeakSet

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import ActivationsError, InterventionError, SelectionError
from xlvlms_tutorial.interventions.overrides import checked_layers
from xlvlms_tutorial.interventions.replay import Resumable, same_up_to_rounding
from xlvlms_tutorial.interventions.skipping import PARTS, skip
from xlvlms_tutorial.methods.skipping.importance import Answers, Prompt, Samples, batches_of
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

_ROWS_AT_ONCE = 512  # whose logits over the whole vocabulary are in memory together
# models whose passes were found to agree: to try it costs as much as fifteen forwards
_AGREE: WeakSet[VLM] = WeakSet()


def effects(
    vlm: VLM,
    samples: Samples,
    answers: Answers = None,
    layers: Sequence[int] | None = None,
    part: str = "block",
    prompt: Prompt = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """What the absence of each layer alone costs.

    Columns layer, loss, and increase over the dense model's, which is ``.attrs["dense"]``.
    The loss is in nats a token, of the answers (by default each sample's first caption) and
    their end, given what the samples show and the prompt, all in one forward. ``samples`` may
    be plain texts instead: then without a picture, and of every token but the first. ``part``
    is "block", "mlp" or "attention". Each batch goes through the blocks below a layer once:
    the pass without it starts there.

    Raises
    ------
    SelectionError
        If there are no samples or layers, the batch size is below 1, or a sample
        has neither caption nor answer.
    LayerError
        If the model has no such layer.
    LengthError
        If answers and samples are not equally many.
    InterventionError
        If the part is unknown.
    ActivationsError
        If a loss is NaN or infinite.
    """
    chosen = sorted(
        set(checked_layers(vlm, range(1, vlm.n_layers + 1) if layers is None else layers))
    )
    if not chosen:
        raise SelectionError("no layers", "give one or more, or None for all")
    losses = _Losses(vlm, samples, answers, prompt, batch_size, part)
    with tqdm(
        total=len(chosen) * len(losses.runs),
        desc="effects",
        unit="pass",
        leave=False,
        disable=not progress,
    ) as bar:
        found = losses.without((), chosen, bar)
    table = pd.DataFrame(
        {"layer": chosen, "loss": found, "increase": [loss - losses.dense for loss in found]}
    )
    table.attrs["dense"] = losses.dense
    return table


def greedy(
    vlm: VLM,
    samples: Samples,
    k: int,
    answers: Answers = None,
    candidates: Sequence[int] | None = None,
    part: str = "block",
    prompt: Prompt = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[int]:
    """Layers in the order in which they are taken out.

    Each time the one without which the loss is then least (ties by number). Losses,
    samples (plain texts too) and errors are those of :func:`effects`; ``candidates`` are
    by default all layers. The first m are what greedy choice gives for m, so that one run
    serves every number of layers up to k.

    Raises
    ------
    SelectionError, LayerError, LengthError, InterventionError, ActivationsError
        As :func:`effects`, or if k is not between 1 and the number of
        candidates, or would leave no block.
    """
    left = sorted(
        set(checked_layers(vlm, range(1, vlm.n_layers + 1) if candidates is None else candidates))
    )
    most = min(len(left), vlm.n_layers - (part == "block"))
    if not 1 <= k <= most:
        raise SelectionError(f"{k} of {len(left)} candidates", f"give 1 to {most}")
    losses = _Losses(vlm, samples, answers, prompt, batch_size, part)
    gone: list[int] = []
    total = sum(len(left) - done for done in range(k)) * len(losses.runs)
    with tqdm(total=total, desc="greedy", unit="pass", leave=False, disable=not progress) as bar:
        for _ in range(k):
            found = losses.without(gone, left, bar)
            gone.append(left.pop(int(np.argmin(found))))
    return gone


class _Losses:
    """The loss of the wanted tokens of batches, with ever other blocks left out.

    The batches are made once.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Samples,
        answers: Answers,
        prompt: Prompt,
        batch_size: int,
        part: str,
    ) -> None:
        if part not in PARTS:
            raise InterventionError(f"unknown part {part!r}", f"allowed: {', '.join(PARTS)}")
        samples = list(samples)
        told = _told(vlm, samples, answers)
        self.vlm, self.part = vlm, part
        batches = batches_of(vlm, samples, told, prompt, batch_size)
        fast = _resumable(
            vlm, batches_of(vlm, samples[:2], None if told is None else told[:2], prompt, 2)[0]
        )
        self.runs = [_Pass(vlm, batch, fast) for batch in batches]
        self.n = sum(len(run.wanted) for run in self.runs)
        self.dense = sum(run.loss() for run in self.runs) / self.n

    def without(self, gone: Sequence[int], layers: Sequence[int], bar: tqdm) -> list[float]:
        """The losses without those that are gone and each of these layers, which are in order."""
        totals = np.zeros(len(layers))
        for run in self.runs:
            run.restart()
            with skip(self.vlm, list(gone), self.part):
                for k, layer in enumerate(layers):
                    run.advance(layer - 1)
                    with skip(self.vlm, layer, self.part):
                        totals[k] += run.loss()
                    bar.update()
        return (totals / self.n).tolist()


class _Pass(Resumable):
    """One batch on its way through the blocks.

    Passes start where it stands, without the tower and the blocks below.
    """

    def __init__(self, vlm: VLM, batch: Batch, fast: bool = True) -> None:
        super().__init__(vlm, batch, resumes=fast)
        wanted = _wanted(batch)
        # no row's first token is wanted, so nothing comes round
        self.before: Bool[Tensor, "b t"] = torch.roll(wanted, -1, dims=1)
        self.wanted = batch["input_ids"][wanted]
        self.restart()

    def restart(self) -> None:
        """Go back to what enters the first block."""
        self.layer, self.states = 0, None

    def advance(self, layer: int) -> None:
        """Go on to what leaves this layer."""
        if self.resumes and layer > self.layer:
            self.states, self.layer = self.read(layer, start=self.layer, states=self.states), layer

    def end(self) -> Float[Tensor, "n d"]:
        """What leaves the last block where the wanted tokens are predicted."""
        return self.read(self.vlm.n_layers, self.before, start=self.layer, states=self.states)

    def loss(self) -> float:
        """Summed cross-entropy of the wanted tokens, in nats."""
        total = 0.0
        for rows, ids in zip(
            self.end().split(_ROWS_AT_ONCE), self.wanted.split(_ROWS_AT_ONCE), strict=True
        ):
            logits = self.vlm.unembed(rows)
            total += float(
                nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="sum")
            )
        if not isfinite(total):
            raise ActivationsError(
                "the loss is NaN or infinite",
                "load the model in float32 or bfloat16, and look for damaged weights",
            )
        return total


def _resumable(vlm: VLM, batch: Batch) -> bool:
    """Whether passes that start at each layer end as those from the beginning.

    Not where blocks share more than the residual stream.
    """
    if vlm.active or any(vlm.folded.values()) or anatomy.crossing(vlm.model):
        return False
    if vlm not in _AGREE and _agree(vlm, batch):
        _AGREE.add(vlm)
    return vlm in _AGREE


def _agree(vlm: VLM, batch: Batch) -> bool:
    run = _Pass(vlm, batch)
    whole = run.end()
    if not torch.isfinite(whole).all():  # told where the loss is computed
        return False
    for layer in range(1, vlm.n_layers):
        run.advance(layer)
        if not same_up_to_rounding(run.end(), whole, vlm.dtype):
            return False
    return True


def _wanted(batch: Batch) -> Bool[Tensor, "b t"]:
    """The tokens whose loss counts: the answers', or of plain texts all but the first."""
    answer = batch.spans == SPANS.index("answer")
    if answer.any():
        return answer
    words = batch.spans != SPANS.index("padding")
    words[torch.arange(len(words)), words.int().argmax(dim=1)] = False
    return words


def _told(vlm: VLM, samples: Samples, answers: Answers) -> list[str] | None:
    """What the samples shall be answered by, with the end mark; None for plain texts."""
    if answers is None and any(isinstance(sample, str) for sample in samples):
        return None
    if answers is None and (bare := [sample.id for sample in samples if not sample.captions]):
        raise SelectionError(
            f"{len(bare)} samples without a caption, such as {bare[0]!r}", "give answers"
        )
    answers = (lambda sample: sample.captions[0]) if answers is None else answers
    told = [answers(sample) for sample in samples] if callable(answers) else list(answers)
    if not all(isinstance(text, str) and text.strip() for text in told):
        raise SelectionError("answers that are no text or empty", "give one text for each sample")
    end = vlm.model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    return [
        text + ("" if end is None else vlm.tokenizer.convert_ids_to_tokens(end)) for text in told
    ]
