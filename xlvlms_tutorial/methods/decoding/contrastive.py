"""Logits processors of contrastive decoding, each with a cache for its second branch."""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor

from xlvlms_tutorial.models import support
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require

_PIXELS = "pixel_values"  # how the names of what a processor makes of pictures and clips begin
_INSTRUCTION = "You are a confused object detector."


def contrast(
    logits: Float[Tensor, "*n v"],
    disturbed: Float[Tensor, "*n v"],
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Float[Tensor, "*n v"]:
    r"""Contrast the logits of two branches.

    .. math:: l_{cd} = (1 + \alpha)\, l - \alpha\, l' \quad
              \text{where } p(w) \ge \beta \max_{w'} p(w'), \text{ else } -\infty

    Use it on logits that were read once, to see what any strength would answer.

    Parameters
    ----------
    logits : Tensor
        Logits (..., v) of the model as it is, whose softmax is p.
    disturbed : Tensor
        Logits (..., v) of the second branch.
    alpha : float
        Strength of the contrast, 0 or more; 0 leaves the logits as they are. 1 by default.
    beta : float
        Which tokens are plausible: those whose probability is at least this share of the largest,
        from 0 (all) to 1 (the most probable). 0.1 by default.

    Returns
    -------
    Tensor
        Logits (..., v); those of implausible tokens are minus infinity.

    Raises
    ------
    InputError
        If ``alpha`` is negative or not finite, or ``beta`` is not within 0 to 1.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.decoding import contrast
    >>> logits, disturbed = torch.tensor([2.0, 1.5, -4.0]), torch.tensor([3.0, 1.0, -9.0])
    >>> contrast(logits, disturbed, alpha=1.0, beta=0.1).tolist()
    [1.0, 2.0, -inf]
    """
    require_strength(alpha, beta)
    floor = logits.amax(dim=-1, keepdim=True)
    floor = floor + (math.log(beta) if beta else -math.inf)
    # a token that is suppressed stays so, whatever the second branch says of it
    excluded = (logits < floor) | logits.isneginf()
    return ((1 + alpha) * logits - alpha * disturbed).masked_fill(excluded, -math.inf)


def require_strength(alpha: float, beta: float) -> None:
    """Refuse strengths and cuts of contrastive decoding that mean nothing.

    Raises
    ------
    InputError
        If ``alpha`` is negative or not finite, or ``beta`` is not within 0 to 1.
    """
    require(
        math.isfinite(alpha) and alpha >= 0,
        f"alpha is {alpha}",
        "give a finite strength of 0 (greedy) or more",
    )
    require(0 <= beta <= 1, f"beta is {beta}", "give a share from 0 (no cut) to 1 (greedy)")


class ContrastiveDecoding(LogitsProcessor):
    """Contrast each step of a generation with a second branch that reads another prompt.

    It is a processor for ``generate`` of transformers. The second branch has its cache: a step
    costs one more decode step. :class:`VCD` and :class:`ICD` make it for ``vlm.generate``; use it
    directly for a second prompt that you make yourself.

    Parameters
    ----------
    vlm : VLM
        The model that generates.
    batch : Batch
        What the second branch reads, a row for each row that is generated. Its prompts may have
        another length.
    alpha, beta : float
        As for :func:`contrast`.

    Raises
    ------
    InputError
        If ``alpha`` is negative or not finite, or ``beta`` is not within 0 to 1. If the model has a
        ``generate`` of its own, as BLIP-2 has.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.decoding import ContrastiveDecoding
    >>> second = vlm.batch([sample.image for sample in samples], ["Say yes."] * len(samples))
    >>> processor = ContrastiveDecoding(vlm, second, alpha=0.5)
    >>> tuple(vlm.generate_ids(batch, max_new_tokens=2, logits_processor=[processor]).shape)
    (4, 2)
    """

    def __init__(self, vlm: VLM, batch: Batch, alpha: float = 1.0, beta: float = 0.1) -> None:
        require_strength(alpha, beta)
        kind = type(support.base_of(vlm.model))
        require(
            kind.generate is GenerationMixin.generate,
            f"contrastive decoding of {kind.__name__}, which generates by rules of its own",
            "choose a model that generates by those of transformers, such as LLaVA or Qwen2-VL",
        )
        self.vlm = vlm
        self.batch = batch
        self.alpha = alpha
        self.beta = beta
        self._seen: Tensor | None = None  # the ids of the last step
        self._ids: Tensor = batch["input_ids"]  # the same, as the second branch reads them
        self._options: dict[str, object] = {}  # of the second branch's next step, cache included
        self._positions: dict[nn.Module, object] = {}  # see _own_positions

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        """Return the contrasted logits of the next token.

        Parameters
        ----------
        input_ids : Tensor
            Integers (b, t): the prompts with what has been generated.
        scores : Tensor
            Logits (b, v) of the next token.

        Returns
        -------
        Tensor
            Logits (b, v), as :func:`contrast` gives them.

        Raises
        ------
        InputError
            If there are more or fewer rows than in the second branch, as in a beam search.
        """
        rows = len(self.batch["input_ids"])
        require(
            len(input_ids) == rows,
            f"{len(input_ids)} continuations for {rows} prompts of the second branch",
            "generate one for each prompt (num_beams=1, num_return_sequences=1), with a batch "
            "of as many rows",
        )
        disturbed = self._next_logits(input_ids)
        return contrast(scores, disturbed.to(scores), self.alpha, self.beta)

    def _next_logits(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b v"]:
        """Return the logits (b, v) of the second branch, which has seen what was generated."""
        model = self.vlm.model
        first = not self._continues(input_ids)
        self._seen = input_ids
        # the model's own rules for positions, masks, and what goes in only once
        with self.vlm.run(self.batch), self._own_positions():
            if first:
                self._begin()
            else:
                new = input_ids[:, -1:].to(self._ids.device)
                self._ids = torch.cat([self._ids, new], dim=1)
            inputs = model.prepare_inputs_for_generation(
                self._ids,
                next_sequence_length=None if first else 1,
                is_first_iteration=first,
                **self._options,
            )
            output = model(**inputs, return_dict=True)
        self._options = model._update_model_kwargs_for_generation(
            output, self._options, is_encoder_decoder=False
        )
        return output.logits[:, -1]

    def _begin(self) -> None:
        """Go back to the prompts, with an empty cache."""
        self._ids = self.batch["input_ids"]
        options = {name: self.batch[name] for name in self.batch if name != "input_ids"}
        options["use_cache"] = True
        if "position_ids" in self.vlm.accepts and "position_ids" not in options:
            prepare = self.vlm.model._prepare_position_ids_for_generation
            options["position_ids"] = prepare(self._ids, options)
        if "logits_to_keep" in self.vlm.accepts:
            options["logits_to_keep"] = torch.tensor([-1])
        self._options = options

    def _continues(self, input_ids: Int[Tensor, "b t"]) -> bool:
        """Tell whether these ids are those of the last step and one more."""
        if self._seen is None or input_ids.shape[1] != self._seen.shape[1] + 1:
            return False
        return torch.equal(input_ids[:, :-1], self._seen)

    @contextmanager
    def _own_positions(self) -> Iterator[None]:
        """Let both branches keep their positions where the model itself remembers them.

        Qwen2-VL and its kin keep from the prompt how far positions lag behind the tokens.
        """
        keepers = [part for part in self.vlm.model.modules() if hasattr(part, "rope_deltas")]
        first = {part: part.rope_deltas for part in keepers}
        for part in keepers:
            part.rope_deltas = self._positions.get(part)  # none before the prompt
        try:
            yield
            self._positions = {part: part.rope_deltas for part in keepers}
        finally:
            for part in keepers:
                part.rope_deltas = first[part]


def distorted(batch: Batch, noise: float = 0.5, seed: int = 0) -> Batch:
    r"""Return a batch with noise on the pixels of its pictures, as a diffusion adds it.

    .. math:: v' = \sqrt{1 - n}\; v + \sqrt{n}\; \epsilon, \qquad \epsilon \sim N(0, I)

    This is where T steps of a diffusion lead that add noise of variance :math:`\gamma` each, with
    :math:`n = 1 - (1 - \gamma)^T` (arXiv 2311.16922). The pixels are those that the model reads,
    standardised. The same picture gets the same noise in any batch.

    Parameters
    ----------
    batch : Batch
        Model inputs with pictures, or clips.
    noise : float
        The share n of the variance that is noise, from 0 (the picture) to 1 (noise alone). 0.5 by
        default.
    seed : int
        Of the noise.

    Returns
    -------
    Batch
        The same inputs and spans with other pixels.

    Raises
    ------
    InputError
        If ``noise`` is not within 0 to 1, or the batch has no picture.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.decoding import distorted
    >>> noisy = distorted(batch, noise=0.5)
    >>> bool((noisy["pixel_values"] != batch["pixel_values"]).all())
    True
    >>> bool((noisy["input_ids"] == batch["input_ids"]).all())
    True
    """
    require(0 <= noise <= 1, f"noise is {noise}", "give a share from 0 (none) to 1 (noise alone)")
    names = [name for name in batch if name.startswith(_PIXELS) and _numbers(batch[name])]
    require(
        names,
        "there is no picture to distort",
        "give a picture with each text, or contrast with another instruction (ICD)",
    )
    result = Batch(dict(batch))
    result.spans, result.numbers, result.single = batch.spans, batch.numbers, batch.single
    n_texts = len(batch["input_ids"])
    for name in names:
        pixels = batch[name]
        # some processors put the patches of all pictures in one row
        pictures = pixels if len(pixels) == n_texts else pixels[None]
        noisy = [_noisy(picture, noise, seed) for picture in pictures]
        result[name] = torch.stack(noisy).reshape(pixels.shape).to(pixels)
    return result


def _numbers(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _noisy(picture: Tensor, noise: float, seed: int) -> Tensor:
    """Mix a picture with noise that it alone decides, so that batches may be cut in any way."""
    pixels = picture.detach().float().cpu().contiguous()
    number = zlib.crc32(pixels.numpy().tobytes(), seed)
    random = torch.Generator().manual_seed(number)
    gaussian = torch.randn(pixels.shape, generator=random)
    return math.sqrt(1 - noise) * pixels + math.sqrt(noise) * gaussian


@dataclass(frozen=True)
class VCD:
    """Visual contrastive decoding: tokens that a distorted picture makes likely count less.

    Give it to ``vlm.generate`` as ``decoding``. From "Mitigating Object Hallucinations in Large
    Vision-Language Models through Visual Contrastive Decoding" (arXiv 2311.16922). "The Mirage of
    Performance Gains" (arXiv 2504.10020) says that it moves the rate of yes: compare it with a
    threshold that has the same rate.

    Parameters
    ----------
    alpha : float
        Strength of the contrast, 0 (greedy) or more; 1 by default.
    beta : float
        The plausibility cut, from 0 (none) to 1 (greedy); 0.1 by default.
    noise : float
        The share of the pixels' variance that is noise, as for :func:`distorted`; 0.5 by default.
    seed : int
        Of the noise.

    Raises
    ------
    InputError
        If a number is outside its range.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.decoding import VCD
    >>> decoding = VCD(alpha=1.0, noise=0.9)
    >>> answers = vlm.generate([samples[0].image], ["Is there a key?"], 2, decoding=decoding)
    >>> len(answers)
    1
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_strength(self.alpha, self.beta)
        require(0 <= self.noise <= 1, f"noise is {self.noise}", "give a share from 0 to 1")

    def __call__(
        self, vlm: VLM, batch: Batch, texts: Sequence[str], **media: Sequence[object] | None
    ) -> ContrastiveDecoding:
        """Make the processor for one batch, whose ``texts`` and ``media`` stay as they are.

        Raises
        ------
        InputError
            If the batch has no picture.
        """
        second = distorted(batch, self.noise, self.seed)
        return ContrastiveDecoding(vlm, second, self.alpha, self.beta)


@dataclass(frozen=True)
class ICD:
    """Instruction contrastive decoding: what a disturbing instruction makes likely counts less.

    Give it to ``vlm.generate`` as ``decoding``. From "Mitigating Hallucinations in Large
    Vision-Language Models with Instruction Contrastive Decoding" (arXiv 2403.18715).

    Parameters
    ----------
    alpha : float
        Strength of the contrast, 0 (greedy) or more; 1 by default.
    beta : float
        The plausibility cut, from 0 (none) to 1 (greedy); 0.1 by default.
    instruction : str
        What stands before the text in the second branch.

    Raises
    ------
    InputError
        If a number is outside its range, or the instruction is empty.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.decoding import ICD
    >>> decoding = ICD(alpha=0.5, instruction="You are a confused object detector.")
    >>> answers = vlm.generate([samples[0].image], ["Is there a key?"], 2, decoding=decoding)
    >>> len(answers)
    1
    """

    alpha: float = 1.0
    beta: float = 0.1
    instruction: str = _INSTRUCTION

    def __post_init__(self) -> None:
        require_strength(self.alpha, self.beta)
        require(
            isinstance(self.instruction, str) and self.instruction.strip(),
            f"the instruction is {self.instruction!r}",
            "give a sentence that disturbs",
        )

    def __call__(
        self, vlm: VLM, batch: Batch, texts: Sequence[str], **media: Sequence[object] | None
    ) -> ContrastiveDecoding:
        """Make the processor for one batch: its ``media`` with the texts after the instruction."""
        disturbing = [f"{self.instruction} {text}" for text in texts]
        second = vlm.batch(texts=disturbing, **media)
        return ContrastiveDecoding(vlm, second, self.alpha, self.beta)
