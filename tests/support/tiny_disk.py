"""Tiny models of genuine classes on disk, fitted for some seconds to the world's scenes, and a
folder of pictures in COCO's format.

They stand in for hub models and photographs: what they say is poor, but made of the world's words,
so that chapters have something to count.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.data.export import write_coco
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.processors import load_processor
from xlvlms_tutorial.pocket import language, world

SIDE, GRID = 64, 4  # pixels of a picture and image tokens, a side
WIDTH, LAYERS, BATCH = 64, 6, 16
LOOKING, STEPS, LESSONS = 160, 240, 1000  # steps of naming, steps of captions and answers, scenes
NAMED = {
    "subject": world.SUBJECTS,
    "item": world.ITEMS,
    "colour": world.COLOURS,
    "place": world.PLACES,
    "time": world.TIMES,
}
KINDS = ("llava", "qwen2-vl")
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "position_embedding.weight")
BEFORE_ANSWER = {"llava": " ", "qwen2-vl": ""}  # what stands between the opened turn and the answer
SPECIAL = {
    "llava": ("<unk>", "<s>", "</s>", "<pad>", "<image>"),
    "qwen2-vl": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|object_ref_end|>",  # as on the hub: nothing here uses it
    ),
}
ROLES = {
    "llava": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "qwen2-vl": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
PICTURE = {"llava": "<image>", "qwen2-vl": "<|image_pad|>"}
# As the hub's models have them: LLaVA 1.5 opens the answer without a space behind the colon
TEMPLATES = {
    "llava": (
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}{% "
        "if p['type'] == 'image' %}{{ '<image>\n"
        "' }}{% endif %}{% endfor %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ "
        "p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt "
        "%}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "qwen2-vl": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for p in m['content'] %}{% if p['type'] == 'image' "
        "%}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% "
        "endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    ),
}


def small_coco(folder: str | Path, n: int = 240, seed: int = 0) -> Path:
    """Write ``n`` scenes as a COCO-format folder with pictures of 64 x 64 pixels.

    A folder that is there already is left as it is.
    """
    return _once(Path(folder), lambda place: write_coco(small_samples(n, "test", seed), place))


def small_samples(n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Scenes with pictures of 64 x 64 pixels.

    Their plain captions, and behind them one in each style.
    """
    plain, *styled = (
        load_samples(name, n, split, seed)
        for name in ("scenes", "scenes-place", "scenes-colour", "scenes-mood")
    )
    captions = [
        sum((sample.captions for sample in same), ()) for same in zip(plain, *styled, strict=True)
    ]
    return [
        replace(sample, source=_smaller(sample), captions=sample_captions)
        for sample, sample_captions in zip(plain, captions, strict=True)
    ]


def tiny_on_disk(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Build, fit and save the tiny model of a kind, "llava" or "qwen2-vl", with its processor.

    What is there already is left as it is.
    """

    def write(place: Path) -> None:
        place.mkdir()
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(seed)
            save_processor(kind, place)
            processor = load_processor(place)
            model = MAKERS[kind](processor.tokenizer)
            fit(model, processor, kind, seed)
            model.save_pretrained(place)

    return _once(Path(folder), write)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine; and of matrices this small
    several threads make nothing faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def at_hand(kind: str) -> Path:
    """The tiny model of a kind, or the folder of pictures "coco", made once on a machine for
    code and versions as they are.
    """
    sources = [Path(__file__), *map(Path, (world.__file__, language.__file__))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(f"{torch.__version__} {hf.__version__}".encode())
    folder = Path(tempfile.gettempdir()) / f"xlvlms-tiny-{digest.hexdigest()[:12]}" / kind
    return small_coco(folder) if kind == "coco" else tiny_on_disk(kind, folder)


def _smaller(sample: Sample) -> Callable[[], object]:
    return lambda: sample.image.resize((SIDE, SIDE))


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder, whole: written beside its place and moved there at the end, by the first
    that asks; others wait for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
                write(Path(place) / "made")
                (Path(place) / "made").rename(folder)
    return folder


def texts() -> list[str]:
    """Everything that is said of the world.

    Captions, captions in a style, questions and answers.
    """
    message = list(PROMPTS.values())
    for scene in world.scenes(400) + world.scenes(400, "composition"):
        message += language.captions(scene) + [
            language.styled_caption(scene, style) for style in language.STYLES
        ]
        message += [
            part
            for question in language.questions(scene)
            for part in (question.text, question.answer)
        ]
    return message


def words() -> list[str]:
    """Every word of the world, at the start of a text and after a space, in lower
    case and with a capital; numerals.
    """
    splitting = pre_tokenizers.Whitespace()
    nouns = sorted(
        {word for text in texts() for word, _ in splitting.pre_tokenize_str(text.lower())}
        | {*map(str, range(10))}
    )
    nouns += [noun for noun in map(language.plural, language.OBJECTS) if noun not in nouns]
    forms = [form for word in nouns for form in (word, word.capitalize())]
    return (
        forms
        + [f" {form}" for form in forms]
        + ["USER", "ASSISTANT", " ASSISTANT", "user", "assistant"]
    )


def tokenizer(kind: str) -> hf.PreTrainedTokenizerFast:
    """Byte-level pairs merged until each of the world's words is one token.

    Other words fall into pieces.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20000,
        special_tokens=list(SPECIAL[kind]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(words(), trainer)
    extra = [token for token in SPECIAL[kind] if token not in ROLES[kind].values()]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, padding_side="left", additional_special_tokens=extra, **ROLES[kind]
    )


def save_processor(kind: str, folder: Path) -> None:
    """Write the processor's files as hub models have them."""
    tokenizer(kind).save_pretrained(folder)
    if kind == "llava":
        pictures = hf.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        config = {
            "processor_class": "LlavaProcessor",
            "patch_size": SIDE // GRID,
            "num_additional_image_tokens": 1,
        }
        config |= {"vision_feature_select_strategy": "default", "image_token": "<image>"}
    else:
        limits = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
        pictures = hf.Qwen2VLImageProcessorPil(
            size=limits, patch_size=SIDE // GRID // 2, merge_size=2, temporal_patch_size=2
        )
        config = {"processor_class": "Qwen2VLProcessor"}
    senses = pictures.to_dict()
    # the hub names no library
    senses["image_processor_type"] = senses["image_processor_type"].removesuffix("Pil")
    (folder / "preprocessor_config.json").write_text(json.dumps(senses))
    (folder / "processor_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATES[kind])


def _text(words: hf.PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _llava(words: hf.PreTrainedTokenizerFast) -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=SIDE // GRID,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**_text(words)),
        image_seq_length=GRID**2,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return _silent(hf.LlavaForConditionalGeneration(config), words, "llava")


def _qwen2_vl(words: hf.PreTrainedTokenizerFast) -> hf.PreTrainedModel:
    names = {
        "image_token_id": "image_pad",
        "video_token_id": "video_pad",
        "vision_start_token_id": "vision_start",
    }
    names |= {"vision_end_token_id": "vision_end"}
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {
        "depth": 1,
        "num_heads": 4,
        "embed_dim": WIDTH,
        "hidden_size": WIDTH,
        "mlp_ratio": 2,
        "patch_size": SIDE // GRID // 2,
    }
    config = hf.Qwen2VLConfig(
        text_config=_text(words) | {"rope_parameters": rope},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        **{name: words.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()},
    )
    return _silent(hf.Qwen2VLForConditionalGeneration(config), words, "qwen2-vl")


def _silent(
    model: hf.PreTrainedModel, words: hf.PreTrainedTokenizerFast, kind: str
) -> hf.PreTrainedModel:
    """The model, whose generation ends at the tokenizer's mark and leaves out all others, above
    all placeholders; matrices drawn anew.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        words.eos_token_id,
        words.pad_token_id,
    )
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:  # from the usual 0.02 a width of 64 takes long to use the picture
            nn.init.normal_(
                weight, std=0.1 if name.endswith(EMBEDDINGS) else weight[0].numel() ** -0.5
            )
    model.generation_config.suppress_tokens = [
        words.convert_tokens_to_ids(t) for t in SPECIAL[kind] if t != words.eos_token
    ]
    return model


MAKERS = {"llava": _llava, "qwen2-vl": _qwen2_vl}


def fit(
    model: hf.PreTrainedModel, processor: hf.ProcessorMixin, kind: str, seed: int
) -> list[float]:
    """Train everything on unseen scenes.

    First to name what is in a picture, then to caption and answer; losses in nats a
    token. Without the first part, seconds are too short to learn to look: captions
    would be the same for all pictures.
    """
    samples, rng, losses = small_samples(LESSONS, "train", seed), np.random.default_rng(seed), []
    pixels, outputs, naming = (
        _pixels(processor, samples),
        [],
        _Naming(model, processor.tokenizer, samples),
    )
    with anatomy.connector(model).register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    ):
        for rows in _steps(model, LOOKING, 4 * BATCH, len(samples), rng, 3e-3):
            model.get_image_features(**_rows_of(pixels, rows))
            naming(outputs.pop(), rows).backward()
        for rows in _steps(model, STEPS, BATCH, len(samples), rng, 4e-3):
            inputs, labels = _inputs(processor, kind, [_lesson(samples[row], rng) for row in rows])
            logits = model(**inputs, **_rows_of(pixels, rows)).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
            (loss + naming(outputs.pop(), rows)).backward()
            losses.append(loss.item())
    return losses


def _steps(
    model: hf.PreTrainedModel, steps: int, size: int, n: int, rng: np.random.Generator, rate: float
) -> Iterator[np.ndarray]:
    """Rows for each step, after which the gradients that they gave are followed."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        yield rng.choice(n, size, replace=False)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


class _Naming:
    """How badly the embeddings of a picture's tokens name what is in it, by the one token that
    says each word best; in nats a word.
    """

    def __init__(
        self,
        model: hf.PreTrainedModel,
        words: hf.PreTrainedTokenizerFast,
        samples: Sequence[Sample],
    ) -> None:
        self.embedding, self.lists = model.get_input_embeddings(), []
        for factor, values in NAMED.items():
            ids = torch.tensor([words(f" {value}").input_ids[-1] for value in values])
            labels = [
                values.index(sample.truth[factor]) if sample.truth[factor] else -100
                for sample in samples
            ]
            self.lists.append((ids, torch.tensor(labels)))

    def __call__(self, outputs: Tensor, rows: np.ndarray) -> Tensor:
        tokens = outputs.reshape(len(rows), -1, WIDTH)
        losses = []
        for ids, labels in self.lists:
            logits = (tokens @ self.embedding.weight[ids].T).amax(dim=1)
            losses.append(
                nn.functional.cross_entropy(
                    logits, labels[torch.from_numpy(rows)], ignore_index=-100
                )
            )
        return torch.stack(losses).mean()


def _pixels(processor: hf.ProcessorMixin, samples: Sequence[Sample]) -> dict[str, Tensor]:
    prepared = processor.image_processor([sample.image for sample in samples], return_tensors="pt")
    # Qwen2-VL puts the patches of all pictures one after another
    return {
        name: value.reshape(len(samples), -1, *value.shape[1:]) for name, value in prepared.items()
    }


def _rows_of(pixels: dict[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
    return {name: value[torch.from_numpy(rows)].flatten(0, 1) for name, value in pixels.items()}


def _lesson(sample: Sample, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.6:
        return PROMPTS["image"], sample.captions[0]
    question = sample.questions[rng.integers(len(sample.questions))]
    return question.text, question.answer


def _inputs(
    processor: hf.ProcessorMixin, kind: str, lessons: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of prompts and answers, padded on the right, and the ids to be said.

    -100 elsewhere.
    """
    words, placeholder = processor.tokenizer, PICTURE[kind]
    rows, labels = [], []
    for question, answer in lessons:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        prompt_ids = words(
            prompt.replace(placeholder, placeholder * GRID**2), add_special_tokens=False
        ).input_ids
        answer_ids = words(BEFORE_ANSWER[kind] + answer, add_special_tokens=False).input_ids + [
            words.eos_token_id
        ]
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=words.pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    if kind == "qwen2-vl":
        inputs["mm_token_type_ids"] = (ids == words.convert_tokens_to_ids(placeholder)).int()
    return inputs, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
