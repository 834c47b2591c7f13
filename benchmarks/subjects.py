"""What is measured: pocket LLaVA with its scenes, and two 7B models' shapes.

The shapes have random weights, and are measured where there is a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import typer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from benchmarks.harness import CPU, Report
from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import record_calls
from xlvlms_tutorial.tutorials.real_models import SHAPES

N_SAMPLES = 64
# words around the picture in inputs made by hand, about as many as in a question with its template
N_WORDS = 32

LLAVA, QWEN = SHAPES["llava-hf/llava-1.5-7b-hf"].config, SHAPES["Qwen/Qwen2-VL-7B-Instruct"].config
# frames, rows and columns of patches: a picture of 448 x 448, which becomes 256 tokens
QWEN_GRID = (1, 32, 32)


@dataclass(frozen=True)
class Subject:
    """A model with inputs for it.

    Samples that its processor prepares, or (``samples`` is None) batches made by hand.
    """

    name: str
    vlm: VLM
    make: Callable[[int], Mapping[str, Tensor]]
    samples: list[Sample] | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.vlm.device

    def batch(self, size: int) -> Batch:
        """Inputs of so many rows, the same each time."""
        if self.samples is None:
            return self.vlm.prepare(self.make(size))
        return batch_of(self.vlm, self.samples[:size])

    def layer(self, share: float) -> int:
        """The layer at this share of the depth, from 1 to L."""
        return max(1, round(share * self.vlm.n_layers))


def batch_of(vlm: VLM, samples: Sequence[Sample]) -> Batch:
    """Inputs as ``capture`` prepares them."""
    return vlm.batch([sample.image for sample in samples], [PROMPTS["image"]] * len(samples))


def subjects(report: Report) -> Iterator[Subject]:
    """The models to measure, one after the other, so that one at a time is in memory.

    Raises
    ------
    typer.BadParameter
        If CUDA is asked for and absent.
    """
    device = report.options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "PyTorch finds no GPU here; use cpu or auto.", param_hint="--device"
        )
    makers = [pocket] if device in ("auto", "cpu") else []
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        makers += [lambda: llava_shape(gpu), lambda: qwen2_vl_shape(gpu)]
    for make in makers:
        subject = make()
        report.about(subject.name)
        yield subject
        del subject
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def pocket() -> Subject:
    """Pocket LLaVA on the CPU in float32, the package's default, with unseen scenes.

    Rows beyond the last scene start again.
    """
    return Subject(
        "pocket-llava",
        load("pocket-llava", device=CPU, dtype="float32"),
        dict,
        load_samples("scenes", n=N_SAMPLES),
    )


def llava_shape(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    text: Mapping = LLAVA["text_config"],
    vision: Mapping = LLAVA["vision_config"],
    name: str = "llava-1.5-7b shape",
) -> Subject:
    """LLaVA of the given sizes with random weights."""
    image, patches = text["vocab_size"] - 64, (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**vision)}
    config = LlavaConfig(**shapes, image_token_index=image, image_seq_length=patches)
    vlm = VLM(_random(LlavaForConditionalGeneration, config, device, dtype), None, name)

    def make(size: int) -> dict[str, Tensor]:
        side = vision["image_size"]
        return _worded([image] * patches, size) | {
            "pixel_values": torch.randn(size, 3, side, side, generator=_seeded())
        }

    return Subject(name, vlm, make)


def qwen2_vl_shape(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    text: Mapping = QWEN["text_config"],
    vision: Mapping = QWEN["vision_config"],
    grid: tuple[int, int, int] = QWEN_GRID,
    name: str = "qwen2-vl-7b shape",
) -> Subject:
    """Qwen2-VL of the given sizes with random weights."""
    image, video, start, end = range(text["vocab_size"] - 10, text["vocab_size"] - 6)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    # time, row, column: 16, 24, 24 of 64
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    inside = {
        **vision,
        "hidden_size": text["hidden_size"],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    ids = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=inside, **ids
    )
    vlm = VLM(_random(Qwen2VLForConditionalGeneration, config, device, dtype), None, name)
    patches = grid[0] * grid[1] * grid[2]

    def make(size: int) -> dict[str, Tensor]:
        words = _worded([start, *[image] * (patches // 4), end], size)
        pixels = torch.randn(size * patches, 3 * 2 * vision["patch_size"] ** 2, generator=_seeded())
        # without the types the model would number all positions in one dimension
        types = (words["input_ids"] == image).int()
        return words | {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([grid] * size),
            "mm_token_type_ids": types,
        }

    return Subject(name, vlm, make)


def _random(
    kind: type[PreTrainedModel], config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    torch.manual_seed(0)
    config.get_text_config(decoder=True).eos_token_id = None  # a random model would stop at random
    # weights are made where they stay: 7B parameters drawn on a CPU would take minutes
    with device:
        model = kind._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _worded(picture: list[int], size: int) -> dict[str, Tensor]:
    words = torch.randint(3, 100, (2, N_WORDS // 2), generator=_seeded()).tolist()
    row = torch.tensor([words[0] + picture + words[1]])
    return {
        "input_ids": row.repeat(size, 1),
        "attention_mask": torch.ones(size, row.shape[1], dtype=torch.long),
    }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def decoder_inputs(vlm: VLM, batch: Batch) -> dict[str, object]:
    """What the decoder gets in a forward.

    Embeddings with the picture merged in, mask and positions. Tower and connector are then done.
    """
    with record_calls(anatomy.decoder(vlm.model)) as calls:
        vlm.forward(batch, logits=False, use_cache=False)
    return calls[0][1]
