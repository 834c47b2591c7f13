"""The door, on tiny models saved into folders.

Pocket LLaVA itself is in tests/pocket/test_build.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from tests.support.tiny import tiny_llava
from tests.zoo import build
from tests.zoo.processors import save, save_processor
from xlvlms_tutorial.errors import InterventionError, LoadError
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.loading import adapters, loading
from xlvlms_tutorial.loading.loading import load
from xlvlms_tutorial.loading.self_check import CHECKS
from xlvlms_tutorial.methods.merging import mixed
from xlvlms_tutorial.models.architectures import ARCHITECTURES

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
QUESTION = "What colour is the key ?"
TEXTS = [QUESTION, "Describe the picture ."]


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def saved(vlm, tmp_path_factory):
    """A folder with the tiny LLaVA, as a hub model looks; tests do not write into it."""
    folder = tmp_path_factory.mktemp("llava")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be spoilt."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits(vlm, texts=TEXTS):
    return vlm.forward(vlm.batch([PICTURE] * len(texts), texts)).logits


def test_a_saved_folder_loads_and_answers_the_same(vlm, saved):
    for name in (str(saved), saved):
        again = load(name, device="cpu")
        assert again.generate([PICTURE] * 2, TEXTS, 6) == vlm.generate([PICTURE] * 2, TEXTS, 6)
        assert torch.equal(logits(again), logits(vlm))
        assert (again.dtype, again.device.type, again.n_layers) == (torch.float32, "cpu", 3)
        assert (again.name, again.revision, again.checks) == (str(saved), None, None)
        assert not again.model.training
        assert not any(weight.requires_grad for weight in again.model.parameters())


def test_weights_in_several_files_are_read(vlm, folder):
    (folder / "model.safetensors").unlink()
    vlm.model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(folder, device="cpu")), logits(vlm))
    next(folder.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(LoadError, match="the weights of .* cannot be loaded"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "idefics2", "mllama", "qwen2_audio", "blip2", "janus", "idefics", "qwen2_5_omni"],
)
def test_other_architectures_load_from_folders_as_their_genuine_class(name, tmp_path):
    model, inputs = build(name)
    vlm = load(save(name, tmp_path), device="cpu")
    assert type(vlm.model) is type(model)
    assert torch.equal(vlm.forward(vlm.prepare(inputs)).logits, model(**inputs).logits)


def test_of_a_model_that_also_speaks_the_part_that_reads_is_loaded(tmp_path):
    """Qwen2.5-Omni as the hub has it: a thinker, and what turns its states into speech."""
    thinker, inputs = build("qwen2_5_omni")
    whole = hf.Qwen2_5OmniForConditionalGeneration(
        hf.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    )
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.save_pretrained(tmp_path)
    save_processor("qwen2_5_omni", tmp_path)
    vlm = load(tmp_path, device="cpu")
    assert type(vlm.model) is type(thinker)
    assert torch.equal(vlm.forward(vlm.prepare(inputs)).logits, thinker(**inputs).logits)
    assert vlm.batch([PICTURE], TEXTS[:1]).mask("image").any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_number_formats_by_name_or_as_torch_says_them(saved, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    vlm = load(saved, "cpu", dtype)
    assert vlm.dtype == expected and {weight.dtype for weight in vlm.model.parameters()} == {
        expected
    }


@pytest.mark.parametrize("dtype", ["int8", "half", "float8_e4m3fn", "nn", torch.int32])
def test_other_number_formats_are_refused(saved, dtype):
    with pytest.raises(LoadError, match="allowed: auto, float32, bfloat16, float16"):
        load(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", "balancd"])
def test_devices_that_are_not_there_are_refused_with_those_that_are(saved, device):
    with pytest.raises(LoadError, match="cpu"):
        load(saved, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a machine without a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "balanced"])
def test_a_gpu_where_there_is_none_is_refused(saved, device):
    with pytest.raises(
        LoadError, match=f"device '{device}' cannot be used .* this machine has: auto, cpu"
    ):
        load(saved, device=device)
    assert load(saved).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU")
@pytest.mark.parametrize("device", ["auto", "cuda", "balanced"])
def test_on_a_gpu_the_answers_are_those_of_the_cpu(saved, device, vlm):
    placed = load(saved, device=device, dtype="float32")
    assert placed.device.type == "cuda"
    torch.testing.assert_close(logits(placed).cpu(), logits(vlm), atol=1e-3, rtol=1e-3)
    assert load(saved, device=device).dtype in (torch.bfloat16, torch.float16)


def test_balanced_leaves_the_placing_to_accelerate():
    options = loading._options(hf.LlavaConfig(), "balanced", torch.bfloat16, None)
    assert options == {"dtype": torch.bfloat16, "device_map": "balanced"}


def test_unknown_names_list_the_known():
    for name in ("pocket-lava", "", "a/b/c"):
        with pytest.raises(LoadError, match="pocket-llava"):
            load(name)


def test_an_untested_architecture_is_refused_with_how_to_add_it(tmp_path):
    for kind in ("florence2", "no_such_thing"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            LoadError, match=f"{kind}.*tested: llava,.*Add your model.*allow_untested"
        ):
            load(tmp_path)


def test_an_encoder_in_the_language_model_is_another_architecture(tmp_path):
    hf.Blip2Config(text_config=hf.T5Config()).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="blip-2 with t5"):
        load(tmp_path)


def test_a_language_model_alone_is_refused(tmp_path):
    hf.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="'llama', which answers no questions about pictures"):
        load(tmp_path, allow_untested=True)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(LoadError, match="'no_such_thing'.*upgrade transformers"):
        load(tmp_path, allow_untested=True)


def test_an_untested_architecture_comes_with_its_checks(monkeypatch, saved, vlm):
    monkeypatch.delitem(ARCHITECTURES, "llava")
    with pytest.raises(LoadError, match="'llava'"):
        load(saved)
    again = load(saved, device="cpu", allow_untested=True)
    assert again.checks["passed"].all()
    assert list(again.checks["check"]) == list(CHECKS)
    assert again.refused == {}
    assert torch.equal(logits(again), logits(vlm))


def test_an_untested_architecture_without_pictures_is_checked_by_a_sound(monkeypatch, tmp_path):
    monkeypatch.delitem(ARCHITECTURES, "qwen2_audio")
    vlm = load(save("qwen2_audio", tmp_path), device="cpu", allow_untested=True)
    assert vlm.checks["passed"].all()
    assert "0 positions" not in vlm.checks.set_index("check").loc["spans", "detail"]


def test_an_untested_architecture_that_fails_is_refused_with_what_failed(monkeypatch, folder):
    monkeypatch.delitem(ARCHITECTURES, "llava")
    monkeypatch.setattr("xlvlms_tutorial.models.anatomy.final_norm", lambda model: None)
    with pytest.raises(LoadError, match="'llava' failed .*states: layer 3 differs"):
        load(folder, device="cpu", allow_untested=True)


def test_an_untested_architecture_whose_processor_makes_no_inputs_is_refused(monkeypatch, saved):
    def confused(self, *_, **__):
        raise IndexError("list index out of range")

    monkeypatch.delitem(ARCHITECTURES, "llava")
    monkeypatch.setattr(hf.LlavaProcessor, "__call__", confused)
    with pytest.raises(
        LoadError,
        match="'llava' failed inputs from its processor: .*IndexError: list index out of range",
    ):
        load(saved, device="cpu", allow_untested=True)


def test_a_tested_architecture_is_not_checked_again(monkeypatch, saved):
    monkeypatch.setattr(loading, "check", lambda vlm: pytest.fail("checked"))
    assert load(saved, device="cpu", allow_untested=True).checks is None


def test_an_untested_architecture_loads_with_less_where_a_site_fails(monkeypatch, saved):
    from xlvlms_tutorial.loading import site_checks

    def differs(vlm, batch):
        raise RuntimeError("The size of tensor a (5) must match")

    monkeypatch.delitem(ARCHITECTURES, "llava")
    monkeypatch.setitem(CHECKS, "MLP skipped", differs)
    again = load(saved, device="cpu", allow_untested=True)
    assert again.checks.set_index("check")["passed"].to_dict() == {
        name: name != "MLP skipped" for name in CHECKS
    }
    assert not again.supports("skip", "mlp")
    assert again.supports("skip", "block")
    assert set(site_checks.SITE_CHECKS) == set(site_checks.HANGS_ON)
    with pytest.raises(
        InterventionError,
        match=r"skip mlp, which fails this model's self-check \(RuntimeError: The size of tensor a",
    ):
        skip(again, 1, "mlp").__enter__()
    with skip(again, 1):
        assert logits(again).isfinite().all()


# Attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(saved, vlm, attention):
    again = load(saved, device="cpu", attn_implementation=attention)
    assert {
        again.model.config._attn_implementation,
        again.model.config.text_config._attn_implementation,
    } == {attention}
    torch.testing.assert_close(
        logits(again, TEXTS[:1]), logits(vlm, TEXTS[:1]), atol=1e-4, rtol=1e-4
    )
    weights = again.forward(again.batch([PICTURE], TEXTS[:1]), output_attentions=True).attentions
    assert bool(weights) == (attention == "eager")  # which alone has any to give


@pytest.mark.parametrize("attention", ["flash", "", "kernels-community/flash-attn", "paged|eager"])
def test_attention_that_is_not_known_is_refused(saved, attention):
    with pytest.raises(LoadError, match=r"attn_implementation='.*'; allowed: eager, .*sdpa"):
        load(saved, device="cpu", attn_implementation=attention)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="runs without flash-attn")
def test_attention_that_needs_a_package_is_refused_with_its_name(saved):
    with pytest.raises(
        LoadError,
        match=(
            "attn_implementation='flash_attention_2' cannot be had here .*; give 'sdpa' or 'eager'"
        ),
    ):
        load(saved, device="cpu", attn_implementation="flash_attention_2")


def test_an_unreachable_hub_names_the_offline_choice(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="'nobody/has-this-model'.*pocket-llava"):
        load("nobody/has-this-model")


# Run apart, since the hub's cache is where the environment said when huggingface_hub was imported
CACHED = """
import socket
from huggingface_hub import constants
from xlvlms_tutorial import load
from xlvlms_tutorial.errors import LoadError

def refuse(*_, **__):
    print("asked the network")
    raise OSError("no network")

socket.getaddrinfo = refuse
print(load("owner/llava", device="cpu", offline=True).revision)
print(load("owner/llava", device="cpu", offline=True, revision="main").n_layers)
for name, revision in (("owner/llava", "v9"), ("owner/other", None), ("owner/half", None)):
    try:
        load(name, device="cpu", revision=revision, offline=True)
    except LoadError as error:
        print(error)
print(constants.HF_HUB_OFFLINE)
"""


def test_offline_takes_what_the_cache_has_and_names_the_commit(saved, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, files in (("llava", list(saved.iterdir())), ("half", [saved / "config.json"])):
        model = tmp_path / "hub" / f"models--owner--{name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        for file in files:
            (model / "snapshots" / commit / file.name).write_bytes(file.read_bytes())
    environment = {"HF_HOME": str(tmp_path), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [commit, "3"] and lines[-1] == "False"
    assert [line.split()[0] for line in lines[2:-1]] == [
        "'owner/llava'",
        "'owner/other'",
        "'owner/half'",
    ]


def test_a_folder_has_no_revision(saved):
    with pytest.raises(LoadError, match="folders have no revisions"):
        load(saved, revision="main")


def test_weights_that_are_pickles_are_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        LoadError, match="no weights in safetensors; .*save_pretrained writes safetensors"
    ):
        load(folder)


@pytest.fixture
def no_pickle(monkeypatch):
    """Whoever unpickles fails the test."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))


def indexed(folder: Path, file: object, name: str = "model.safetensors.index.json") -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    torch.save(weights, folder / "w.bin")
    (folder / name).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, file)})
    )


OUTSIDE = [
    "w.bin",
    "../outside.bin",
    "../outside.safetensors",
    "sub/w.safetensors",
    "/w.safetensors",
    "..\\w.safetensors",
    "w.pt",
    5,
]


@pytest.mark.parametrize("file", [*OUTSIDE, "w.safetensors.bin"])
def test_an_index_that_names_other_files_is_refused(folder, file, no_pickle):
    indexed(folder, file)
    with pytest.raises(
        LoadError,
        match=(
            "names .* as weights, which is no safetensors file beside its "
            "config; save the model again"
        ),
    ):
        load(folder, offline=True)


def test_an_index_of_safetensors_loads(folder, vlm, no_pickle):
    indexed(folder, "w.safetensors")
    assert torch.equal(logits(load(folder, device="cpu")), logits(vlm))


@pytest.mark.parametrize("file", [*OUTSIDE, "adapter_model.bin"])
def test_a_config_that_names_other_files_is_refused(folder, file, no_pickle):
    change_config(folder, transformers_weights=file)
    with pytest.raises(LoadError, match="no safetensors file beside its config"):
        load(folder, offline=True)
    indexed(folder, file, "other.safetensors.index.json")
    change_config(folder, transformers_weights="other.safetensors.index.json")
    with pytest.raises(LoadError, match="no safetensors file beside its config"):
        load(folder, offline=True)


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_spoilt_index_is_refused(folder, written):
    (folder / "model.safetensors.index.json").write_text(written)
    with pytest.raises(LoadError, match="the weights of .* cannot be loaded"):
        load(folder)


def test_a_pickled_adapter_beside_the_weights_is_not_read(folder, no_pickle):
    trained(tiny_llava().model, folder)
    assert load(folder, device="cpu").n_layers == 3
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(LoadError, match="adapter_model.bin.*no safetensors file"):
        load(folder, device="cpu")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("layers", [0, -1, 10**9])
def test_an_impossible_depth_is_refused_before_the_model_is_built(
    folder, part, layers, monkeypatch
):
    monkeypatch.setattr(
        hf.LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("built")
    )
    parts = json.loads((folder / "config.json").read_text())[part]
    change_config(folder, **{part: parts | {"num_hidden_layers": layers}})
    with pytest.raises(
        LoadError, match=f"asks for {layers} blocks; give 1 to 10,000 as num_hidden_layers"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "hidden_size"])
def test_impossible_sizes_are_refused(folder, name):
    parts = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=parts | {name: 0})
    with pytest.raises(LoadError, match="cannot be loaded"):
        load(folder, device="cpu")


def test_a_home_folder_may_be_written_short(saved, monkeypatch, adapter, vlm):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load(f"~/{saved.name}", device="cpu").name == str(saved)
    adapted = load(
        f"~/{saved.name}", device="cpu", adapter=f"~/../{adapter[0].parent.name}/{adapter[0].name}"
    )
    torch.testing.assert_close(logits(adapted), adapter[1])
    with pytest.raises(LoadError, match=str(saved.parent / "absent")):
        load("~/absent")


@pytest.mark.parametrize(
    "setting", [{"num_beams": 4}, {"repetition_penalty": 1.9}, {"min_length": 30}]
)
def test_settings_of_a_search_in_the_folder_leave_answers_greedy(folder, vlm, setting):
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    answers = vlm.generate([PICTURE] * 2, TEXTS, 6)
    assert load(folder, device="cpu").generate([PICTURE] * 2, TEXTS, 6) == answers
    change_config(folder, **setting)  # where older models have them
    assert load(folder, device="cpu").generate([PICTURE] * 2, TEXTS, 6) == answers


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if "multi_modal_projector" in name)
    save_file(
        {name: weight for name, weight in weights.items() if name != lacking},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(LoadError, match="lacks 1 of its weights, such as .*multi_modal_projector"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=text | {"intermediate_size": 65})
    with pytest.raises(LoadError, match="the weights of .* cannot be loaded"):
        load(folder)


def test_a_cut_off_file_of_weights_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="the weights of .* cannot be loaded"):
        load(folder)


WRONG_WIDTH = (
    '{"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": "wide"}}'
)


@pytest.mark.parametrize("written", ["", "{", "[]", WRONG_WIDTH])
def test_a_spoilt_configuration_is_refused(folder, written):
    (folder / "config.json").write_text(written)
    with pytest.raises(LoadError, match="the configuration of .* cannot be loaded"):
        load(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(LoadError, match="the configuration of"):
        load(tmp_path)


def test_a_folder_without_a_processor_is_refused(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="processor"):
        load(tmp_path)


def test_remote_code_is_not_run_unasked(folder):
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    change_config(
        folder,
        model_type="theirs",
        auto_map={"AutoConfig": "code.Theirs", "AutoModelForImageTextToText": "code.Theirs"},
    )
    with pytest.raises(LoadError, match="trust_remote_code"):
        load(folder, allow_untested=True)
    with pytest.raises(SystemExit, match="the code ran"):
        load(folder, allow_untested=True, trust_remote_code=True)


def test_a_model_too_large_for_the_device_says_what_to_lower(monkeypatch, saved):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hf.LlavaForConditionalGeneration, "from_pretrained", full)
    with pytest.raises(LoadError, match="does not fit.*bfloat16, with quantise='8bit'"):
        load(saved)


NO_SAFETENSORS = (
    "owner/model does not appear to have a file named model.safetensors and thus "
    "cannot be loaded with `safetensors`."
)


@pytest.mark.parametrize(
    ("message", "offline", "problem"),
    [
        (NO_SAFETENSORS, False, "has no weights in safetensors"),
        (NO_SAFETENSORS, True, "is neither in the cache nor to be had"),
        ("no connection", False, "is neither in the cache nor to be had"),
    ],
)
def test_a_hub_model_of_pickles_is_told_from_one_that_is_not_to_be_had(
    monkeypatch, message, offline, problem
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    source = loading.Source("owner/model", None, offline, False)
    with (
        pytest.raises(LoadError, match=f"'owner/model' {problem}"),
        source.reading("weights"),
    ):
        raise OSError(message)


# Quantised weights


def wide_llava():
    """A tiny LLaVA whose linear maps are all wide enough for blocks of 64 weights."""
    torch.manual_seed(0)
    small = tiny_llava()
    config = small.model.config
    text = hf.LlamaConfig(
        **config.text_config.to_dict()
        | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    )
    vision = hf.CLIPVisionConfig(
        **config.vision_config.to_dict() | {"hidden_size": 64, "intermediate_size": 128}
    )
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=config.image_token_id,
            image_seq_length=4,
        )
    )
    model.generation_config = small.model.generation_config
    return model, small.processor


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    for part in wide_llava():
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("quantise", "kind", "atol"), [("8bit", "Linear8bitLt", 0.05), ("4bit", "Linear4bit", 0.3)]
)
def test_quantised_models_answer_nearly_the_same(wide, quantise, kind, atol):
    plain, vlm = load(wide, device="cpu"), load(wide, device="cpu", quantise=quantise)
    block = vlm.blocks[1]
    assert {type(part).__name__ for part in (block.self_attn.q_proj, block.mlp.down_proj)} == {kind}
    assert type(vlm.model.lm_head).__name__ == "Linear" and vlm.dtype == torch.float32
    exact = logits(plain)
    torch.testing.assert_close(logits(vlm), exact, atol=atol * exact.abs().max().item(), rtol=0)
    assert not torch.equal(logits(vlm), exact)
    assert vlm.model.get_memory_footprint() < plain.model.get_memory_footprint()


def test_four_bits_are_nf4_computed_in_the_models_format(wide):
    weight = load(wide, device="cpu", dtype="bfloat16", quantise="4bit").blocks[0].self_attn.q_proj
    assert weight.weight.quant_state.quant_type == "nf4" and weight.weight.quant_state.nested
    assert weight.compute_dtype == torch.bfloat16


def test_bad_quantisations_are_refused(monkeypatch, wide):
    with pytest.raises(LoadError, match="quantise='2bit'; allowed: None, '8bit', '4bit'"):
        load(wide, quantise="2bit")
    with pytest.raises(LoadError, match="small already"):
        load("pocket-llava", quantise="8bit")
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(LoadError, match="pip install bitsandbytes"):
        load(wide, quantise="4bit")


def test_a_quantised_folder_is_not_quantised_again(wide, tmp_path):
    vlm = load(wide, device="cpu", quantise="8bit")
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, device="cpu")), logits(vlm))
    with pytest.raises(LoadError, match="quantised already"):
        load(tmp_path, device="cpu", quantise="4bit")


# Adapters


def trained(model, folder: Path, **settings: object):
    """A LoRA with random weights, saved as peft saves it."""
    torch.manual_seed(1)
    settings = {
        "target_modules": r".*language_model.*\.(q_proj|v_proj)",
        "r": 4,
        "init_lora_weights": False,
    } | settings
    with_lora = get_peft_model(model, LoraConfig(**settings)).eval()
    with_lora.save_pretrained(folder)
    return with_lora


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a LoRA for the tiny LLaVA, and the logits that peft gives with it."""
    folder, vlm = tmp_path_factory.mktemp("lora"), tiny_llava()
    batch = vlm.batch([PICTURE] * 2, TEXTS)
    with_lora = trained(vlm.model, folder)
    with torch.no_grad():
        return folder, with_lora(**batch).logits


def test_an_adapter_gives_what_peft_gives_and_can_be_turned_off(saved, adapter, vlm):
    folder, expected = adapter
    adapted = load(saved, device="cpu", adapter=folder)
    assert adapted.name == f"{saved} + {folder}"  # what is captured tells the two apart
    assert type(adapted.model) is hf.LlavaForConditionalGeneration and adapted.n_layers == 3
    torch.testing.assert_close(logits(adapted), expected)
    assert not torch.allclose(expected, logits(vlm), atol=1e-3)
    adapted.model.disable_adapters()
    assert torch.equal(logits(adapted), logits(vlm))
    assert not any(weight.requires_grad for weight in adapted.model.parameters())


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_dora_gives_what_peft_gives(saved, tmp_path, vlm, rank_stabilised):
    second_vlm = tiny_llava()
    batch = second_vlm.batch([PICTURE] * 2, TEXTS)
    with_dora = trained(second_vlm.model, tmp_path, use_dora=True, use_rslora=rank_stabilised)
    for name, weight in with_dora.named_parameters():
        if "magnitude" in name:
            weight.data.mul_(1 + 0.3 * torch.rand_like(weight))
    with_dora.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = with_dora(**batch).logits
    adapted = load(saved, device="cpu", adapter=tmp_path)
    torch.testing.assert_close(logits(adapted), expected)
    adapted.model.disable_adapters()
    assert torch.equal(logits(adapted), logits(vlm))
    trained(tiny_llava(layers=4).model, tmp_path / "deeper", use_dora=True)
    with pytest.raises(
        LoadError, match="does not fit .*layers.3.*trained on this model, or merge it"
    ):
        load(saved, adapter=tmp_path / "deeper")


def test_an_adapter_on_quantised_weights(wide, tmp_path):
    model, _ = wide_llava()
    trained(model, tmp_path)
    quantised = load(wide, device="cpu", quantise="8bit")
    adapted = load(wide, device="cpu", quantise="8bit", adapter=tmp_path)
    assert adapted.name == f"{wide} + {tmp_path} + 8bit"
    assert not torch.allclose(logits(adapted), logits(quantised), atol=1e-3)
    adapted.model.disable_adapters()
    assert torch.equal(logits(adapted), logits(quantised))


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    trained(tiny_llava(layers=4).model, tmp_path / "deeper")
    with pytest.raises(
        LoadError, match="does not fit LlavaForConditionalGeneration: 4 weights .*layers.3"
    ):
        load(saved, adapter=tmp_path / "deeper")
    trained(wide_llava()[0], tmp_path / "wider")
    with pytest.raises(LoadError, match="cannot be loaded"):
        load(saved, adapter=tmp_path / "wider")
    trained(tiny_llava().model.model.language_model, tmp_path / "part", target_modules=["q_proj"])
    with pytest.raises(LoadError, match="does not fit"):
        load(saved, adapter=tmp_path / "part")


def test_several_adapters_are_off_until_they_are_mixed(saved, adapter, tmp_path, vlm):
    folder, expected = adapter
    trained(tiny_llava().model, tmp_path / "second", r=3)
    experts = load(saved, device="cpu", adapter={"first": folder, "second": tmp_path / "second"})
    assert experts.name == f"{saved} + {folder} + {tmp_path / 'second'}"
    assert torch.equal(logits(experts), logits(vlm))
    with mixed(experts, {"first": 1.0}):
        torch.testing.assert_close(logits(experts), expected)
    assert not any(weight.requires_grad for weight in experts.model.parameters())


def test_an_adapter_for_parts_that_are_not_there_is_refused(saved, adapter, tmp_path):
    for file in adapter[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["no_such_map"]}))
    with pytest.raises(LoadError, match="no_such_map"):
        load(saved, adapter=tmp_path)


@pytest.mark.parametrize("lacking", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_lacking_a_file_is_refused(saved, adapter, lacking, tmp_path):
    for file in adapter[0].iterdir():
        if file.name != lacking:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(LoadError, match=f"has no {lacking}"):
        load(saved, adapter=tmp_path)


def test_an_adapter_that_is_nowhere_is_refused(saved, tmp_path):
    for absent in (tmp_path / "absent", "nobody/has-this-adapter"):
        with pytest.raises(LoadError, match="has no adapter_config.json that can be had"):
            load(saved, adapter=absent, offline=True)


def test_without_peft_an_adapter_is_refused(monkeypatch, saved, adapter):
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    with pytest.raises(LoadError, match="pip install peft"):
        load(saved, adapter=adapter[0])


# Pocket LLaVA, without its weights


@pytest.fixture
def pocket(monkeypatch, vlm):
    """Stands where pocket LLaVA is built; keeps what was asked."""
    requests = []

    def build(name, revision, dtype):
        requests.append((name, revision, dtype))
        vlm = tiny_llava()
        return vlm.model.to(dtype), vlm.processor

    monkeypatch.setattr("xlvlms_tutorial.pocket.build.build", build)
    return requests


def test_pocket_llava_is_built_at_a_step_in_a_format_and_takes_an_adapter(pocket, adapter):
    vlm = load(device="cpu", dtype="bfloat16", revision="step-0450")
    assert pocket == [("pocket-llava", "step-0450", torch.bfloat16)]
    assert (vlm.name, vlm.revision, vlm.dtype) == ("pocket-llava", "step-0450", torch.bfloat16)
    adapted = load(device="cpu", adapter=adapter[0])
    torch.testing.assert_close(logits(adapted), adapter[1])


@pytest.mark.parametrize("name", loading.EMBEDDED)
def test_each_embedded_model_is_built_by_its_name(pocket, name):
    vlm = load(name, device="cpu")
    assert pocket == [(name, None, torch.float32)] and vlm.name == name
    with pytest.raises(LoadError, match=f"{name} is small already"):
        load(name, quantise="8bit")


def test_an_unknown_name_lists_the_embedded_models():
    with pytest.raises(
        LoadError,
        match="pocket-llava or pocket-llava-video or .*pocket-gemma, a folder",
    ):
        load("pocket-llava-smell")


def test_pocket_llava_has_only_the_steps_that_are_shipped():
    with pytest.raises(LoadError, match="step-0450"):
        load(revision="step-9999")
