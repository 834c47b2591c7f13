"""One door to vision-language models: ``load(name)`` gives a :class:`VLM`, whatever stands behind the name."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature

from xlvlms_tutorial.data.samples import as_image
from xlvlms_tutorial.errors import ArchitectureError, HubError, PromptError, UnknownModelError
from xlvlms_tutorial.models import anatomy

EMBEDDED = ("pocket-llava",)
ARCHITECTURES = ("llava",)  # model types that pass the contract tests
SPANS = ("image", "question", "answer", "template", "padding")


class VLM:
    """A vision-language model with its processor: prompts, batches, generation, spans, unembedding."""

    def __init__(self, model: torch.nn.Module, processor: object, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"  # generation continues each row at its right end
        self.blocks = anatomy.decoder_blocks(model)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.model.dtype

    @property
    def n_layers(self) -> int:
        """Number L of decoder blocks; layers of the residual stream run from 0 (embeddings) to L."""
        return len(self.blocks)

    @property
    def image_token_id(self) -> int:
        """The id that stands in ``input_ids`` for one visual token."""
        return self.model.config.image_token_id

    def prompt(self, text: str, answer: str | None = None, image: bool = True) -> str:
        """The chat-formatted prompt for a text about a picture, with its answer when one is given.

        Raises
        ------
        PromptError
            If the text is empty.
        """
        if not isinstance(text, str) or not text.strip():
            raise PromptError(text)
        parts = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        chat = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        return chat + (answer or "")

    def batch(self, images: Sequence[object] | None, texts: Sequence[str], answers: Sequence[str] | None = None) -> BatchFeature:
        """Model inputs for pictures and texts, left-padded: ``input_ids`` and ``attention_mask`` (b, t), ``pixel_values``.

        Raises
        ------
        PromptError
            If a text is empty, or pictures, texts and answers are not equally many.
        ImageError
            If something given as a picture is none.
        """
        answers = list(answers) if answers is not None else [None] * len(texts)
        counts = {len(texts), len(answers)} | ({len(images)} if images is not None else set())
        if len(counts) != 1 or not texts:
            raise PromptError(f"{len(texts)} texts, {len(answers)} answers, {len(images or ())} pictures")
        prompts = [self.prompt(text, answer, image=images is not None) for text, answer in zip(texts, answers, strict=True)]
        pictures = [as_image(picture) for picture in images] if images is not None else None
        inputs = self.processor(images=pictures, text=prompts, return_tensors="pt", padding=True)
        return inputs.to(self.device, self.dtype)

    @torch.no_grad()
    def generate(self, images: Sequence[object] | None, texts: Sequence[str], max_new_tokens: int = 32,
                 batch_size: int = 16, progress: bool = False) -> list[str]:  # fmt: skip
        """Greedy answers to texts about pictures, one a pair, stripped of special tokens."""
        found: list[str] = []
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc="generate", unit="batch", leave=False) if progress else starts:
            part = slice(start, start + batch_size)
            inputs = self.batch(images[part] if images is not None else None, texts[part])
            # compiled generation ignores hooks that are registered later
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, disable_compile=True)
            found += self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in found]

    def spans(self, images: Sequence[object] | None, texts: Sequence[str], answers: Sequence[str] | None = None) -> pd.DataFrame:
        """What stands at each position: columns sample, position, token_id, token, span (one of ``SPANS``).

        ``question`` is the text asked, ``answer`` the text after the assistant's mark, ``template`` the chat's own marks.
        """
        inputs = self.batch(images, texts, answers)
        rows = []
        for sample, (ids, mask) in enumerate(zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)):
            n_answer = len(self.tokenizer(answers[sample], add_special_tokens=False).input_ids) if answers else 0
            question = self.tokenizer(texts[sample], add_special_tokens=False).input_ids
            kinds = _kinds(ids, mask, question, n_answer, self.image_token_id)
            tokens = [self.tokenizer.decode([i]) for i in ids]
            rows += [(sample, p, i, t, k) for p, (i, t, k) in enumerate(zip(ids, tokens, kinds, strict=True))]
        return pd.DataFrame(rows, columns=["sample", "position", "token_id", "token", "span"])

    @torch.no_grad()
    def unembed(self, states: Float[Tensor, "*n d"], norm: bool = True) -> Float[Tensor, "*n vocabulary"]:
        r"""Logits of the next token read off a state of the residual stream, :math:`W_U \, \mathrm{norm}(h)` (the logit lens)."""
        states = states.to(self.device, self.dtype)
        states = anatomy.final_norm(self.model)(states) if norm else states
        return anatomy.unembedding(self.model)(states).float()

    def token_ids(self, word: str) -> Int[Tensor, "k"]:
        """The ids of a word as it stands inside a sentence (with its leading space)."""
        return torch.tensor(self.tokenizer(f" {word}", add_special_tokens=False).input_ids)


def _kinds(ids: list[int], mask: list[int], question: list[int], n_answer: int, image_id: int) -> list[str]:
    end = len(ids) - n_answer
    kinds = ["padding" if not m else "image" if i == image_id else "template" for i, m in zip(ids, mask, strict=True)]
    kinds[end:] = ["answer"] * n_answer
    for start in range(end - len(question), -1, -1):  # the last occurrence: chat templates stand before the question
        if ids[start : start + len(question)] == question:
            kinds[start : start + len(question)] = ["question"] * len(question)
            break
    return kinds


def load(name: str = "pocket-llava", device: str = "auto", dtype: str | torch.dtype = "auto", revision: str | None = None) -> VLM:
    """Load a vision-language model: an embedded one, a folder, or an id of the Hugging Face hub ("owner/name").

    ``device`` "auto" takes CUDA where there is one; ``dtype`` "auto" is float32 on CPU, bfloat16 or float16 on CUDA.
    ``revision`` is the hub's revision, or for pocket LLaVA a step of its training such as "step-0400".

    Raises
    ------
    UnknownModelError
        If the name is none of the three.
    ArchitectureError
        If the architecture has not passed the contract tests.
    HubError
        If the hub cannot be reached and the model is not in its cache.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = torch.float32 if device == "cpu" else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if name in EMBEDDED:
        from xlvlms_tutorial.pocket.build import build

        model, processor = build(revision=revision, dtype=dtype)
    elif Path(name).is_dir() or name.count("/") == 1:
        model, processor = _from_hub(name, dtype, revision)
    else:
        raise UnknownModelError(name, EMBEDDED)
    return VLM(model.to(device).eval().requires_grad_(False), processor, name)


def _from_hub(name: str, dtype: torch.dtype, revision: str | None) -> tuple[torch.nn.Module, object]:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type not in ARCHITECTURES:
            raise ArchitectureError(config.model_type, ARCHITECTURES)
        model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype)
        return model, AutoProcessor.from_pretrained(name, revision=revision)
    except OSError as cause:
        raise HubError(name) from cause
