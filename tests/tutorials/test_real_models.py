"""Shapes of real models against the totals on their hub pages, their genuine image
processors, and a model that really runs.
"""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.tiny import tiny_llava
from tests.support.tiny_disk import small_samples
from tests.zoo import MODELS, build
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import count_flops
from xlvlms_tutorial.metrics.timing import memory_of
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.anatomy import decoder_blocks
from xlvlms_tutorial.tutorials import real_models

# what the files of the hub hold
TOTALS = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
}
SMOL = "HuggingFaceTB/SmolVLM-Instruct"
PICTURES = ((640, 480), (480, 640), (336, 336), (100, 30), (1000, 999), (1365, 1024), (3000, 200))


@pytest.fixture(scope="module")
def smol():
    return real_models.empty(SMOL)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals_are_the_known_ones(name, total):
    counts = real_models.parameters(real_models.empty(name))
    assert counts["total"] == total
    assert sum(count for part, count in counts.items() if part != "total") == total


def test_the_others_have_the_billions_that_their_names_say():
    billions = {
        name: round(real_models.parameters(real_models.empty(name))["total"] / 1e9, 2)
        for name in set(real_models.SHAPES) - set(TOTALS)
    }
    assert billions == {"llava-hf/llava-1.5-13b-hf": 13.35, "HuggingFaceM4/idefics2-8b": 8.4}


def test_parts_of_llava():
    model = real_models.empty("llava-hf/llava-1.5-7b-hf")
    counts = real_models.parameters(model)
    assert counts["unembedding"] == counts["embeddings"] == 32064 * 4096
    assert counts["connector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert counts["blocks"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert counts["rest"] == 4096  # the final norm
    assert len(decoder_blocks(model)) == 32
    assert all(weight.is_meta for weight in model.parameters())


def test_tied_weights_count_once():
    counts = real_models.parameters(real_models.empty("Qwen/Qwen2-VL-2B-Instruct"))
    assert (counts["embeddings"], counts["unembedding"]) == (151936 * 1536, 0)


def test_parts_of_a_model_with_weights():
    model = tiny_llava().model
    counts = real_models.parameters(model)
    assert counts["total"] == sum(weight.numel() for weight in model.parameters())
    assert min(counts[part] for part in ("tower", "connector", "embeddings", "blocks")) > 0


def test_bytes_are_those_that_weights_take():
    model = tiny_llava().model
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert real_models.weight_bytes(model, "float32") == memory_of(model) - buffers
    assert (
        real_models.weight_bytes(model, "bfloat16")
        == real_models.weight_bytes(model, "float16")
        == real_models.weight_bytes(model, "float32") / 2
    )


def test_quantised_maps_and_the_rest(smol):
    maps = [
        m.weight
        for name, m in smol.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    inside = sum(weight.numel() for weight in maps)
    rest = 2 * (TOTALS[SMOL] - inside)
    rows = sum(weight.shape[0] for weight in maps)
    assert real_models.weight_bytes(smol, "8bit") == rest + inside + 4 * rows
    assert real_models.weight_bytes(smol, "4bit") == pytest.approx(
        rest + inside * (4 + 8 / 64 + 32 / (64 * 256)) / 8, rel=1e-6
    )


def test_the_cache_is_what_a_run_keeps():
    vlm = tiny_llava()
    batch = vlm.batch([Image.new("RGB", (32, 32))], ["What is this?"])
    with torch.no_grad():
        cache = vlm.model(**batch, use_cache=True).past_key_values
    values_stored = sum(
        part.numel() * part.element_size()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    assert (
        real_models.cache_bytes(vlm.model, "float32") * batch["input_ids"].shape[1] == values_stored
    )


# one of its blocks keeps its picture's keys instead
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mllama"])
def test_what_every_architecture_keeps_of_each_token(name):
    model, inputs = build(name)
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    layers = getattr(output, "language_model_outputs", output).past_key_values.layers
    # a window holds fewer tokens, of the same size
    sizes = [
        part.shape[1] * part.shape[3]
        for layer in layers
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if part is not None
    ]
    assert real_models.cache_bytes(model, "float32") == 4 * sum(sizes) > 0


@pytest.mark.parametrize(("width", "height"), PICTURES)
def test_tokens_are_those_of_the_genuine_processors(width, height):
    picture = Image.new("RGB", (width, height))
    for name, side, per_tile in ((SMOL, 384, 81), ("HuggingFaceTB/SmolVLM-256M-Instruct", 512, 64)):
        tiles = Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
        )
        pixels = tiles(picture, return_tensors="pt")["pixel_values"]
        assert real_models.image_tokens(name, width, height) == per_tile * pixels.shape[1]
    if max(width, height) < 1000:  # a large picture becomes as large an array
        qwen = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 12845056})
        grid = qwen(picture, return_tensors="pt")["image_grid_thw"][0]
        assert (
            real_models.image_tokens("Qwen/Qwen2-VL-7B-Instruct", width, height)
            == int(grid.prod()) // 4
        )
    assert real_models.image_tokens("llava-hf/llava-1.5-7b-hf", width, height) == (336 // 14) ** 2


def test_patches_of_idefics2_are_those_of_its_genuine_processor():
    shape = real_models.SHAPES["HuggingFaceM4/idefics2-8b"]
    processor = Idefics2ImageProcessorPil(do_image_splitting=True)
    pixels = processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    _, n_parts, _, height, width = pixels.shape
    side = shape.config["vision_config"]["patch_size"]
    patches = n_parts * (height // side) * (width // side)
    assert n_parts * 64 == shape.tokens(640, 480)
    assert shape.patches == round(patches / shape.tokens(640, 480))


def test_what_is_unknown_is_refused():
    with pytest.raises(InputError, match="no shape of 'llava'; allowed: llava-hf/llava-1.5-7b-hf"):
        real_models.empty("llava")
    with pytest.raises(InputError, match="'2bit'; allowed: float32"):
        real_models.weight_bytes(tiny_llava().model, "2bit")
    with pytest.raises(InputError, match="'4bit' of a cache"):
        real_models.cache_bytes(tiny_llava().model, "4bit")
    with pytest.raises(InputError, match="0 x 4 pixels"):
        real_models.image_tokens(SMOL, 0, 4)


def test_memory_is_weights_and_cache_and_the_rest(smol):
    alone = real_models.memory(smol, 0, "4bit", rest=0)
    assert alone == pytest.approx(real_models.weight_bytes(smol, "4bit") / 1e9)
    more = real_models.memory(smol, 1000, "4bit", rest=2) - alone
    assert more == pytest.approx(2 + 1000 * real_models.cache_bytes(smol) / 1e9)


def test_the_best_format_is_the_first_that_fits(smol):
    for number, smaller in zip(real_models.FORMATS, (*real_models.FORMATS[1:], "no"), strict=True):
        room = real_models.memory(smol, 500, number)
        assert real_models.best_format(smol, 500, room) == number
        assert real_models.best_format(smol, 500, room - 1e-6) == smaller


def test_operations_of_a_prompt_are_those_that_run():
    vlm = tiny_llava()
    batch = vlm.batch_of(small_samples(1), ["describe the picture"])
    parts = {
        "decoder": anatomy.decoder(vlm.model),
        "unembedding": [anatomy.unembedding(vlm.model)],
    }
    table = count_flops(lambda: vlm.forward(batch), parts)
    executed = table[table["part"].isin(parts)]["flops"].sum()
    # a forward gives logits at every position, a prompt needs the last alone
    width, words = vlm.width, vlm.model.get_output_embeddings().out_features
    executed -= 2 * (batch["input_ids"].shape[1] - 1) * width * words
    length = batch["input_ids"].shape[1]
    assert executed == pytest.approx(real_models.prompt_flops(vlm.model, length), rel=0.02)


def test_sizes_of_a_run_by_hand():
    vlm = tiny_llava()
    sizes = real_models.run_sizes(vlm, image=4, text=6, sequences=3, written=5)
    assert sizes["cache of 3 sequences, MB"] * 1e6 == pytest.approx(
        real_models.cache_bytes(vlm.model) * 3 * 15
    )
    states = sizes["states of 1000 pictures, all of them, GB"] * 1e9
    assert states == pytest.approx(1000 * 4 * 10 * (vlm.n_layers + 1) * vlm.width)


def test_minutes_follow_the_sheet(smol):
    def minutes(card, **options):
        return float(real_models.caption_minutes(SMOL, smol, card, **options).split()[0])

    assert minutes("80 GB") < minutes("40 GB") < minutes("T4, 16 GB")
    assert minutes("40 GB", captions=2000) == pytest.approx(2 * minutes("40 GB"), rel=0.1)
    assert minutes("40 GB", reached=(0.2, 0.3)) == pytest.approx(2 * minutes("40 GB"), rel=0.1)
    largest = real_models.empty("llava-hf/llava-1.5-13b-hf")
    name = "llava-hf/llava-1.5-13b-hf"
    assert real_models.caption_minutes(name, largest, "T4, 16 GB").endswith("(4bit)")
    shown = real_models.caption_minutes(name, largest, "T4, 16 GB", batch_size=10_000)
    assert shown == "does not fit"
    assert real_models.loading(largest, 10**6, "80 GB") == "does not fit"
    with pytest.raises(InputError, match="card"):
        real_models.caption_minutes(SMOL, smol, "8 GB")


def test_loading_asks_for_what_the_card_has(smol):
    assert real_models.loading(smol, 100, "T4, 16 GB") == "dtype=float16"
    assert real_models.loading(smol, 100, "80 GB") == "dtype=bfloat16"


def test_prompts_hold_one_picture_and_the_question():
    for shape in real_models.SHAPES.values():
        prompt = real_models.prompt_of(shape.kind, "what is it?")
        assert prompt.count("what is it?") == 1
        assert prompt.count("<image>") + prompt.count("<|image_pad|>") == 1
    with pytest.raises(InputError, match="kind of model"):
        real_models.prompt_of("gpt", "what?")


def test_cards_escape_what_they_show():
    assert "<td>&lt;image&gt;</td>" in real_models.fact_card({"prompt": "<image>"})
