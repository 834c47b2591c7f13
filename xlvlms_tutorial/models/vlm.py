"""A vision-language model with its processor.

Prompts, batches, spans, forward, generation, unembedding.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

from xlvlms_tutorial.errors import DeviceMemoryError, ModalityError, SelectionError
from xlvlms_tutorial.models import anatomy, prompts, support
from xlvlms_tutorial.models.devices import home
from xlvlms_tutorial.models.processors import (
    advice,
    padding_first,
    reads,
    require_embedded,
    require_padding,
)
from xlvlms_tutorial.models.sharing import Finite, after_prompts, answers_to, greedy, padding
from xlvlms_tutorial.models.spans import Batch, label, positions
from xlvlms_tutorial.models.unembedding import unembedded
from xlvlms_tutorial.samples import Sample, media


class VLM:
    """A vision-language model with its processor.

    Prompts, batches, spans, forward, generation, unembedding. ``model`` is the transformers model
    itself, of whatever class; ``blocks`` are its decoder blocks. A processor is needed only by what
    takes pictures and texts; inputs made elsewhere go through :meth:`prepare`. ``load`` and
    :meth:`from_model` check what they take; ``VLM(...)`` itself takes what it is given.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: object | None,
        name: str,
        revision: str | None = None,
    ) -> None:
        support.require_hookable(model)
        self.model, self.processor, self.name, self.revision = model, processor, name, revision
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"  # generation continues each row at its right end
            require_padding(self.tokenizer, anatomy.embedded(self.model))
        self.blocks = anatomy.decoder_blocks(model)
        # of an architecture outside the table: its self-checks
        self.checks: pd.DataFrame | None = None
        # what the self-checks found wrong, by what is done and at which place
        self.refused: dict[tuple[str, str], str] = {}
        # what goes through the model now: interventions and captures ask where its spans are
        self.running: Batch | None = None
        # interventions on each layer, in the order in which they were entered
        self.edits: dict[int, list] = {}
        self.active: list[str] = []  # the interventions that hold now, with their arguments
        # how many vectors are folded into the biases of each layer
        self.folded: Counter[int] = Counter()
        # how many interventions replace the work of each block
        self.bypassed: Counter[int] = Counter()

    # What a loaded model goes through: set by the module ``wrapping``, whose checks
    # are made of models of this class
    _taken_in: ClassVar[Callable[..., "VLM"]]

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        processor: object | None = None,
        *,
        name: str,
        revision: str | None = None,
        allow_untested: bool = False,
    ) -> "VLM":
        """A model that is loaded already.

        Quantised, on several devices, with a LoRA of peft, or fine-tuned a moment ago. It has
        to pass what ``load`` asks for, and answers once about a grey picture, by which a
        processor of another model is found. Model and processor stay as they are: it runs in
        evaluation mode and goes back to its own, and ``vlm.processor`` is a copy, which pads on
        the left. ``name`` is what records call these weights: give others another name.
        ``allow_untested`` is that of ``load``.

        Raises
        ------
        ArchitectureError, SelfCheckError, AnatomyError
            If the architecture has not passed the contract tests, fails its self-checks, or
            has no decoder or unembedding.
        LoadError
            If the model is compiled, has no weights or some that are NaN, reads no pictures, or the
            processor is another model's.
        """
        return VLM._taken_in(model, processor, name, revision, allow_untested)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, or are brought to when they are offloaded."""
        return home(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.model.dtype

    @property
    def n_layers(self) -> int:
        """Number L of decoder blocks.

        Layers of the residual stream run from 0 (embeddings) to L.
        """
        return len(self.blocks)

    def layer_at(self, share: float) -> int:
        """The layer at a share of the depth, so that a choice carries over to other models.

        0.8 is layer 24 of 30 and 26 of 32.

        Raises
        ------
        SelectionError
            If the share does not lie in 0 to 1.
        """
        if not 0 <= share <= 1:
            raise SelectionError(
                f"depth {share!r}", "a share from 0 (embeddings) to 1 (last layer)"
            )
        return math.floor(share * self.n_layers + 0.5)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """The id that stands in ``input_ids`` for one visual, video or audio token.

        Empty where pictures enter by cross-attention.
        """
        return anatomy.placeholders(self.model)

    @property
    def image_token_id(self) -> int:
        """The id that stands in ``input_ids`` for one visual token."""
        return self.model.config.image_token_id

    @cached_property
    def _logit_rules(self) -> dict[str, float]:
        return anatomy.logit_rules(self.model)

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The arguments that the model's ``forward`` takes by name."""
        return support.accepted(self.model)

    def supports(self, what: str, place: str, layer: int | None = None) -> bool:
        """Whether this model allows something at a place of all its blocks.

        Or of the one that writes a layer. ``what`` is "read" (``place`` is one of
        ``anatomy.PLACES``), "skip" ("block", "mlp" or "attention"), "parallel" (its norm, "first"
        or "second") or "fold" ("mlp"). Changing the residual stream works at all layers of all
        models. What is not allowed is refused where it is asked for, with the reason.

        Raises
        ------
        SelectionError
            If this, or the place for it, is unknown.
        """
        blocks = self.blocks if layer is None else [self.blocks[layer - 1]]
        return support.allowed(blocks, self.refused, what, place)

    def prompt(
        self, text: str, answer: str | None = None, media: Sequence[str] = ("image",)
    ) -> str:
        """The chat-formatted prompt for a text about a picture (or ``video``, ``audio``).

        With its answer when one is given. Models without a chat template get the text as it is,
        which then says itself where the picture goes.

        Raises
        ------
        PromptError
            If the text is empty, or text or answer hold what marks a picture for this model.
        LoadError
            If the chat template fails.
        """
        return prompts.prompt_of(self.processor, self.name, text, answer, media)

    def batch(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
        videos: Sequence[object] | None = None,
        audio: Sequence[object] | None = None,
        names: Sequence[object] | None = None,
    ) -> Batch:
        """Model inputs for pictures (videos, sounds) and texts, left-padded.

        ``input_ids``, ``attention_mask`` (b, t) and their ``spans``. ``names`` says what errors
        call the samples; their numbers by default.

        Raises
        ------
        PromptError
            If a text is empty or holds what marks a picture for this model, a sound is none, or
            pictures, texts and answers are not equally many.
        ModalityError
            If the model does not read pictures, videos or sounds, whichever is given.
        ImageError
            If something given as a picture is none, or is not taken by the model's processor.
        LoadError
            If chat template or tokenizer do not go with the model.
        """
        shown = prompts.counted(texts, answers, image=images, video=videos, audio=audio)
        names = range(len(texts)) if names is None else names
        # PaliGemma ends the prompt itself
        after = answers is not None and "suffix" in prompts.text_options(self.processor)
        told = [None] * len(texts) if answers is None or after else answers
        known = reads(self.processor)
        if unread := [kind for kind in shown if kind not in known]:
            raise ModalityError(unread[0], self.name, known, advice(self.processor))
        prompts.require_texts(self.processor, texts, answers, names)
        require_padding(self.tokenizer, anatomy.embedded(self.model))
        asked = [
            self.prompt(text, answer, tuple(shown))
            for text, answer in zip(texts, told, strict=True)
        ]
        given = prompts.media_of(images, videos, audio) | (
            {"suffix": list(answers)} if after else {}
        )
        inputs = prompts.inputs_of(self.processor, asked, given, names)
        inputs.pop("labels", None)
        batch = Batch(dict(padding_first(inputs))).to(self.device, self.dtype)
        placeholders = prompts.placeholders_of(self.placeholders, tuple(shown))
        places = [placeholders[kind] for kind in shown if kind in placeholders]
        prompts.require_places(self.processor, batch["input_ids"], places, texts, names)
        require_embedded(
            self.tokenizer, batch["input_ids"], anatomy.embedded(self.model), placeholders.values()
        )
        batch.spans = label(batch, placeholders, self.tokenizer, texts, answers)
        return batch

    def batch_of(
        self, samples: Sequence[Sample], texts: Sequence[str], answers: Sequence[str] | None = None
    ) -> Batch:
        """Model inputs for what samples show, pictures, clips or sounds, and texts about them.

        Raises as :meth:`batch` does.

        Raises
        ------
        SelectionError
            If the samples are of different modalities.
        """
        return self.batch(
            **({"images": None} | media(samples)),
            texts=texts,
            answers=answers,
            names=[sample.id for sample in samples],
        )

    def prepare(
        self, inputs: Mapping[str, object], spans: Int[Tensor, "b t"] | None = None
    ) -> Batch:
        """A batch of inputs made elsewhere, left-padded.

        ``spans`` indexes ``SPANS``; by default every word counts as question.

        Raises
        ------
        InputsError
            If a row ends with padding.
        """
        support.require_left_padding(inputs.get("attention_mask"))
        batch = Batch(dict(inputs)).to(self.device, self.dtype)
        batch.spans = label(batch, self.placeholders) if spans is None else spans.to(self.device)
        return batch

    @contextmanager
    def run(self, batch: Batch) -> Iterator[None]:
        """Let hooks know, while the model runs, which batch it is and where its spans are.

        It runs in evaluation mode.

        Raises
        ------
        InputsError
            If the batch lacks a picture that the model cannot do without, or token type ids without
            which it would silently use wrong positions or masks.
        DeviceMemoryError
            If the device runs out of memory, with what to lower.
        """
        support.require_arguments(self.model, batch)
        support.require_types(batch, self.accepts, self.placeholders)
        before, self.running = self.running, batch
        try:
            with support.evaluating(self.model):
                yield
        except torch.OutOfMemoryError as cause:
            raise DeviceMemoryError(len(batch["input_ids"]), self.dtype) from cause
        finally:
            self.running = before

    @torch.no_grad()  # not inference_mode: its tensors could never be trained on
    def forward(self, batch: Batch, logits: bool = True, **options: object) -> ModelOutput:
        """One pass over a batch.

        ``logits=False`` computes those of the last position only, where the model can.
        """
        with self.run(batch):
            options = options if logits else {**self._last_logits, **options}
            return self.model(**batch, **options)

    @torch.no_grad()
    def generate_ids(
        self, batch: Batch, max_new_tokens: int = 32, **options: object
    ) -> Int[Tensor, "b new"]:
        """The ids generated after a batch's prompts.

        Greedily unless ``options`` of transformers' ``generate`` say otherwise.
        The ``generation_config.json`` of the model's folder says only which
        tokens end, fill and are suppressed.

        Raises
        ------
        ActivationsError
            If the logits are NaN or infinite, as those of damaged weights.
        """
        # compiled generation ignores hooks that are registered later
        options = {
            "do_sample": False,
            "disable_compile": True,
            "pad_token_id": padding(self),
            **self._last_logits,
            **options,
        }
        finite = Finite()
        options["logits_processor"] = [*(options.get("logits_processor") or ()), finite]
        with self.run(batch), greedy(self.model):
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **options)
        finite.require()
        return after_prompts(getattr(ids, "sequences", ids), batch["input_ids"])

    def generate(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 16,
        progress: bool = False,
        videos: Sequence[object] | None = None,
        audio: Sequence[object] | None = None,
    ) -> list[str]:
        """Greedy answers to texts about pictures (videos, sounds), one a pair.

        Stripped of special tokens; raises as :meth:`batch` does. A picture that several texts
        are about (the same object in ``images``) runs through a LLaVA once, which takes about
        half the time. Where something is in force that depends on positions, and in other
        models, each prompt runs whole.
        """
        prompts.counted(texts, least=0, image=images, video=videos, audio=audio)
        # before a long run rather than in it
        prompts.require_texts(self.processor, texts, None, range(len(texts)))
        prompts.require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        shown = {"images": images, "videos": videos, "audio": audio}
        return answers_to(self, shown, texts, max_new_tokens, batch_size, progress)

    def spans(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """What stands at each position.

        Columns sample, position, token_id, token, span (one of ``SPANS``). ``question`` is the text
        asked, ``answer`` the text after the assistant's mark, ``template`` the chat's own marks.
        """
        return positions(self.batch(images, texts, answers), self.tokenizer)

    @torch.no_grad()
    def unembed(
        self, states: Float[Tensor, "*n d"], norm: bool = True
    ) -> Float[Tensor, "*n vocabulary"]:
        r"""Logits of the next token read off a state of the residual stream (the logit lens).

        :math:`W_U \, \mathrm{norm}(h)`.
        """
        return unembedded(self.model, states.to(self.dtype), self._logit_rules, norm)

    @property
    def _last_logits(self) -> dict[str, Tensor]:
        # transformers' own logits_to_keep=1 cuts a view, for which a CPU copies the unembedding
        # once a row (four times slower in bfloat16)
        return {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in self.accepts else {}

    def token_ids(self, word: str) -> Int[Tensor, "k"]:
        """The ids of a word as it stands inside a sentence (with its leading space)."""
        return torch.tensor(self.tokenizer(f" {word}", add_special_tokens=False).input_ids)
