"""A vision-language model with its processor: prompts, batches, spans, forward, generation, unembedding."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import ModelOutput

from xlvlms_tutorial.data.samples import Sample, media
from xlvlms_tutorial.errors import DeviceMemoryError, InputsError, ModalityError, SelectionError
from xlvlms_tutorial.models import anatomy, prompts
from xlvlms_tutorial.models.processors import advice, padding_first, reads, require_embedded, require_padding
from xlvlms_tutorial.models.sharing import Finite, by_picture, generate_shared, greedy, padding, shareable
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, label

# Left out, these change positions or masks without an error: Qwen2.5-VL then answers with one-dimensional positions
_TYPE_IDS = ("mm_token_type_ids", "token_type_ids")


class VLM:
    """A vision-language model with its processor: prompts, batches, spans, forward, generation, unembedding.

    ``model`` is the transformers model itself, of whatever class; ``blocks`` are its decoder blocks. A processor is needed
    only by what takes pictures and texts; inputs made elsewhere go through :meth:`prepare`.
    """

    def __init__(self, model: torch.nn.Module, processor: object | None, name: str, revision: str | None = None) -> None:
        self.model, self.processor, self.name, self.revision = model, processor, name, revision
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"  # generation continues each row at its right end
            require_padding(self.tokenizer, anatomy.embedded(self.model))
        self.blocks = anatomy.decoder_blocks(model)
        self.checks: pd.DataFrame | None = None  # of an architecture outside the table: the self-checks that it passed
        self.running: Batch | None = None  # what goes through the model now: interventions and captures ask where its spans are
        self.edits: dict[int, list] = {}  # interventions on each layer, in the order in which they were entered
        self.active: list[str] = []  # the interventions that hold now, with their arguments
        self.folded: Counter[int] = Counter()  # how many vectors are folded into the biases of each layer
        self.bypassed: Counter[int] = Counter()  # how many interventions replace the work of each block

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, or are brought to when they are offloaded."""
        home = self.model.device
        return home if home.type != "meta" else torch.device(self.model.get_input_embeddings()._hf_hook.execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.model.dtype

    @property
    def n_layers(self) -> int:
        """Number L of decoder blocks; layers of the residual stream run from 0 (embeddings) to L."""
        return len(self.blocks)

    def layer_at(self, share: float) -> int:
        """The layer at a share of the depth, so that a choice carries over to other models: 0.8 is layer 24 of 30 and 26 of 32.

        Raises
        ------
        SelectionError
            If the share does not lie in 0 to 1.
        """
        if not 0 <= share <= 1:
            raise SelectionError(f"depth {share!r}", "a share from 0 (embeddings) to 1 (last layer)")
        return math.floor(share * self.n_layers + 0.5)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """The id that stands in ``input_ids`` for one visual, video or audio token; empty where pictures enter by cross-attention."""
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
        return frozenset(signature(self.model.forward).parameters)

    def prompt(self, text: str, answer: str | None = None, media: Sequence[str] = ("image",)) -> str:
        """The chat-formatted prompt for a text about a picture (or ``video``, ``audio``), with its answer when one is given.

        Models without a chat template get the text as it is, which then says itself where the picture goes.

        Raises
        ------
        PromptError
            If the text is empty, or text or answer hold what marks a picture for this model.
        LoadError
            If the chat template fails.
        """
        prompts.require_texts(self.processor, [text], [answer])
        if getattr(self.processor, "chat_template", None) is None:
            return text + (f" {answer}" if answer else "")
        parts = [{"type": kind} for kind in media] + [{"type": "text", "text": text}]
        chat = prompts.chat_of(self.processor, self.name, parts)
        # LLaVA 1.5 opens an answer by "ASSISTANT:": the first word that it generates has its space before it, another token than without
        glue = " " if answer and not (chat[-1:].isspace() or answer[0].isspace()) else ""
        return chat + glue + (answer or "")

    def batch(
        self, images: Sequence[object] | None, texts: Sequence[str], answers: Sequence[str] | None = None,
        videos: Sequence[object] | None = None, audio: Sequence[object] | None = None, names: Sequence[object] | None = None,
    ) -> Batch:  # fmt: skip
        """Model inputs for pictures (videos, sounds) and texts, left-padded: ``input_ids``, ``attention_mask`` (b, t) and their ``spans``.

        ``names`` says what errors call the samples; their numbers by default.

        Raises
        ------
        PromptError
            If a text is empty or holds what marks a picture for this model, a sound is none, or pictures, texts and answers are not
            equally many.
        ModalityError
            If the model does not read pictures, videos or sounds, whichever is given.
        ImageError
            If something given as a picture is none, or is not taken by the model's processor.
        LoadError
            If chat template or tokenizer do not go with the model.
        """
        shown = prompts.counted(texts, answers, image=images, video=videos, audio=audio)
        names = range(len(texts)) if names is None else names
        after = answers is not None and "suffix" in prompts.text_options(self.processor)  # PaliGemma ends the prompt itself
        told = [None] * len(texts) if answers is None or after else answers
        known = reads(self.processor)
        if unread := [kind for kind in shown if kind not in known]:
            raise ModalityError(unread[0], self.name, known, advice(self.processor))
        prompts.require_texts(self.processor, texts, answers, names)
        require_padding(self.tokenizer, anatomy.embedded(self.model))
        asked = [self.prompt(text, answer, tuple(shown)) for text, answer in zip(texts, told, strict=True)]
        given = prompts.media_of(images, videos, audio) | ({"suffix": list(answers)} if after else {})
        inputs = prompts.inputs_of(self.processor, asked, given, names)
        inputs.pop("labels", None)
        batch = Batch(dict(padding_first(inputs))).to(self.device, self.dtype)
        placeholders = self._named(tuple(shown))
        places = [placeholders[kind] for kind in shown if kind in placeholders]
        prompts.require_places(self.processor, batch["input_ids"], places, texts, names)
        require_embedded(self.tokenizer, batch["input_ids"], anatomy.embedded(self.model), placeholders.values())
        batch.spans = label(batch, placeholders, self.tokenizer, texts, answers)
        return batch

    def batch_of(self, samples: Sequence[Sample], texts: Sequence[str], answers: Sequence[str] | None = None) -> Batch:
        """Model inputs for what samples show, pictures, clips or sounds, and texts about them; raises as :meth:`batch` does.

        Raises
        ------
        SelectionError
            If the samples are of different modalities.
        """
        return self.batch(**({"images": None} | media(samples)), texts=texts, answers=answers, names=[sample.id for sample in samples])

    def _named(self, shown: tuple[str, ...]) -> dict[str, int]:
        # a model that takes clips or sounds in the place of a picture marks them with the picture's id: they are named after what was given
        known = self.placeholders
        return {shown[0]: known["image"]} if len(shown) == 1 and "image" in known and shown[0] not in known else known

    def prepare(self, inputs: Mapping[str, object], spans: Int[Tensor, "b t"] | None = None) -> Batch:
        """A batch of inputs made elsewhere, left-padded. ``spans`` indexes ``SPANS``; by default every word counts as question."""
        batch = Batch(dict(inputs)).to(self.device, self.dtype)
        batch.spans = label(batch, self.placeholders) if spans is None else spans.to(self.device)
        return batch

    @contextmanager
    def run(self, batch: Batch) -> Iterator[None]:
        """Let hooks know, while the model runs, which batch it is and where its spans are.

        Raises
        ------
        InputsError
            If the batch lacks token type ids without which the model would silently use wrong positions or masks.
        DeviceMemoryError
            If the device runs out of memory, with what to lower.
        """
        lacking = [name for name in _TYPE_IDS if name in self.accepts and name not in batch]
        if lacking and any((batch["input_ids"] == token).any() for token in self.placeholders.values()):
            raise InputsError(lacking)
        before, self.running = self.running, batch
        try:
            yield
        except torch.OutOfMemoryError as cause:
            raise DeviceMemoryError(len(batch["input_ids"]), self.dtype) from cause
        finally:
            self.running = before

    @torch.no_grad()  # not inference_mode: its tensors could never be trained on
    def forward(self, batch: Batch, logits: bool = True, **options: object) -> ModelOutput:
        """One pass over a batch; ``logits=False`` computes those of the last position only, where the model can."""
        with self.run(batch):
            options = options if logits else {**self._last_logits, **options}
            return self.model(**batch, **options)

    @torch.no_grad()
    def generate_ids(self, batch: Batch, max_new_tokens: int = 32, **options: object) -> Int[Tensor, "b new"]:
        """The ids generated after a batch's prompts, greedily unless ``options`` of transformers' ``generate`` say otherwise.

        The ``generation_config.json`` of the model's folder says only which tokens end, fill and are suppressed.

        Raises
        ------
        ActivationsError
            If the logits are NaN or infinite, as those of damaged weights.
        """
        # compiled generation ignores hooks that are registered later
        options = {"do_sample": False, "disable_compile": True, "pad_token_id": padding(self), **self._last_logits, **options}
        finite = Finite()
        options["logits_processor"] = [*(options.get("logits_processor") or ()), finite]
        with self.run(batch), greedy(self.model):
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **options)
        finite.require()
        ids = getattr(ids, "sequences", ids)
        given = batch["input_ids"].repeat_interleave(len(ids) // len(batch["input_ids"]), dim=0)
        length = given.shape[1]
        echoed = ids.shape[1] >= length and torch.equal(ids[:, :length], given)
        return ids[:, length:] if echoed else ids

    def generate(
        self, images: Sequence[object] | None, texts: Sequence[str], max_new_tokens: int = 32, batch_size: int = 16,
        progress: bool = False, videos: Sequence[object] | None = None, audio: Sequence[object] | None = None,
    ) -> list[str]:  # fmt: skip
        """Greedy answers to texts about pictures (videos, sounds), one a pair, stripped of special tokens; raises as :meth:`batch` does.

        A picture that several texts are about (the same object in ``images``) runs through a LLaVA once, which takes about half the time.
        Where something is in force that depends on positions, and in other models, each prompt runs whole.
        """
        prompts.counted(texts, least=0, image=images, video=videos, audio=audio)
        prompts.require_texts(self.processor, texts, None, range(len(texts)))  # before a long run rather than in it
        prompts.require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        shown = {"images": images, "videos": videos, "audio": audio}
        pictures = images if images is not None and shareable(self) else [None] * len(texts)
        parts = list(by_picture(pictures, batch_size))
        answers: dict[int, str] = {}
        for rows in tqdm(parts, desc="generate", unit="batch", leave=False) if progress else parts:
            some = {kind: None if many is None else [many[row] for row in rows] for kind, many in shown.items()}
            batch = self.batch(**some, texts=[texts[row] for row in rows], names=rows)
            ids = generate_shared(self, batch, [pictures[row] for row in rows], max_new_tokens)
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            answers |= {row: text.strip() for row, text in zip(rows, decoded, strict=True)}
        return [answers[row] for row in range(len(texts))]

    def spans(self, images: Sequence[object] | None, texts: Sequence[str], answers: Sequence[str] | None = None) -> pd.DataFrame:
        """What stands at each position: columns sample, position, token_id, token, span (one of ``SPANS``).

        ``question`` is the text asked, ``answer`` the text after the assistant's mark, ``template`` the chat's own marks.
        """
        batch = self.batch(images, texts, answers)
        kinds = [SPANS[k] for k in batch.spans.flatten().tolist()]
        table = pd.DataFrame({"token_id": batch["input_ids"].flatten().tolist(), "span": kinds})
        length = batch.spans.shape[1]
        names = {token: decode(self.tokenizer, [token]) for token in table["token_id"].unique().tolist()}
        table.insert(0, "sample", table.index // length)
        table.insert(1, "position", table.index % length)
        table.insert(3, "token", table["token_id"].map(names))
        return table

    @torch.no_grad()
    def unembed(self, states: Float[Tensor, "*n d"], norm: bool = True) -> Float[Tensor, "*n vocabulary"]:
        r"""Logits of the next token read off a state of the residual stream, :math:`W_U \, \mathrm{norm}(h)` (the logit lens)."""
        decoder, head = anatomy.decoder(self.model), anatomy.unembedding(self.model)
        home = next(head.parameters()).device
        # modules are called and their weights never read: those of an offloaded model are nowhere until then
        states = states.to("cpu" if home.type == "meta" else home, self.dtype)
        final = anatomy.final_norm(self.model)
        states = final(states) if norm and final is not None else states
        project = getattr(decoder, "project_out", None)
        logits = head(project(states) if project is not None else states).float()
        rules = self._logit_rules
        if (cap := rules.get("final_logit_softcapping")) is not None:
            logits = torch.tanh(logits / cap) * cap
        scale = rules.get("logit_scale", 1) / rules.get("logits_scaling", 1)
        return logits if scale == 1 else logits * scale  # a product with 1 would copy all of them

    @property
    def _last_logits(self) -> dict[str, Tensor]:
        # transformers' own logits_to_keep=1 cuts a view, for which a CPU copies the unembedding once a row (four times slower in bfloat16)
        return {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in self.accepts else {}

    def token_ids(self, word: str) -> Int[Tensor, "k"]:
        """The ids of a word as it stands inside a sentence (with its leading space)."""
        return torch.tensor(self.tokenizer(f" {word}", add_special_tokens=False).input_ids)
