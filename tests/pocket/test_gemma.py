"""The second language model: its terms, its files, its blocks, and what its connector learnt."""

import hashlib
import json
from collections import namedtuple
from types import SimpleNamespace

import pytest
import transformers as hf

from tests.contract.checks import CHECKS
from tests.contract.reference import case
from tests.zoo import models as zoo
from xlvlms_tutorial import load
from xlvlms_tutorial.data import PROMPTS, load_samples
from xlvlms_tutorial.errors import AssetError, LoadError
from xlvlms_tutorial.metrics.captions import names
from xlvlms_tutorial.pocket import assets, build, conversion
from xlvlms_tutorial.pocket.assets import Wheel
from xlvlms_tutorial.pocket.encoders import WEIGHTS
from xlvlms_tutorial.samples import media

there = assets.is_converted(assets.GEMMA_SHA256, assets.GEMMA)
needs_gemma = pytest.mark.skipif(
    not there, reason="Gemma 3 270M is not in the cache: load('pocket-gemma') fetches it"
)


@pytest.fixture
def chunks(tmp_path, monkeypatch):
    """Two small chunks in the cache in place of four large ones, and nothing converted."""
    monkeypatch.setenv("XLVLMS_CACHE", str(tmp_path))
    monkeypatch.delenv("XLVLMS_GEMMA", raising=False)
    monkeypatch.delenv("XLVLMS_GEMMA_TERMS", raising=False)
    files, pins = [], {}
    for number, content in enumerate((b"first half, ", b"second half")):
        name = f"gemma-fake-part{number}"
        file = f"data/weights.part{number}"
        digest = hashlib.sha256(content).hexdigest()
        pin = Wheel(name, "1.0", "0" * 64, 100, 100, {file: digest})
        root = assets._cached(pin)
        (root / pin.module / "data").mkdir(parents=True)
        files.append(root / pin.module / file)
        files[-1].write_bytes(content)
        record = assets._record(root, pin.module, pin.version)
        record.parent.mkdir()
        record.write_text(f"{pin.module}/other,sha256=AAAA,1\n", encoding="utf-8")
        pins[name] = pin
    monkeypatch.setattr(assets, "GEMMA_WHEELS", pins)
    whole = b"first half, second half"
    monkeypatch.setattr(assets, "GEMMA_SHA256", hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(
        conversion, "convert", lambda file, target, form: (target / "w").write_bytes(b"weights")
    )
    return files


def test_chunks_that_are_there_are_joined_without_a_word_about_terms(chunks, capsys):
    assert (assets.gemma_folder() / "w").read_bytes() == b"weights"
    assert assets.gemma_status() == "there"
    assert "Terms" not in capsys.readouterr().err


def gone(file):
    for path in sorted(file.parents[2].rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def test_terms_are_shown_before_a_fetch_and_must_be_accepted_in_a_batch(chunks, capsys):
    gone(chunks[1])
    with pytest.raises(AssetError, match="not been accepted.*XLVLMS_GEMMA_TERMS=accept"):
        assets.gemma_folder()
    assert assets.GEMMA_TERMS in capsys.readouterr().err


def test_a_missing_chunk_is_named_once_the_terms_are_accepted(chunks, monkeypatch):
    gone(chunks[1])
    monkeypatch.setenv("XLVLMS_GEMMA_TERMS", "accept")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        AssetError, match=r"gemma-fake-part1 1.0 is not installed.*run: load\('pocket-gemma'\)"
    ):
        assets.gemma_folder()


def test_a_chunk_of_another_hash_is_named(chunks):
    chunks[0].write_bytes(b"first half; ")
    with pytest.raises(AssetError, match="weights.part0 is damaged: expected sha256"):
        assets.gemma_folder()


def test_the_original_is_taken_from_a_folder(chunks, tmp_path, monkeypatch):
    folder = tmp_path / "original"
    folder.mkdir()
    monkeypatch.setenv("XLVLMS_GEMMA", str(folder))
    with pytest.raises(AssetError, match="lacks config.json, model.safetensors"):
        assets.gemma_folder()
    (folder / "model.safetensors").touch()
    shape = {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18}
    for key, value in (("num_hidden_layers", 26), ("hidden_size", 1152), ("model_type", "llama")):
        (folder / "config.json").write_text(json.dumps(shape | {key: value}))
        with pytest.raises(AssetError, match=rf"is not Gemma 3 270M: .*'{key}': '?{value}"):
            assets.gemma_folder()
    (folder / "config.json").write_text(json.dumps(shape))
    assert assets.gemma_folder() == folder and str(folder) in assets.gemma_status()


def test_an_original_that_the_hub_does_not_give_is_an_error_with_a_way_out(chunks, monkeypatch):
    def refuse(name, allow_patterns):
        raise OSError("403, gated")

    monkeypatch.setattr(assets, "snapshot_download", refuse)
    monkeypatch.setenv("XLVLMS_GEMMA", "google/gemma-3-270m")
    with pytest.raises(AssetError, match="403, gated.*accept its terms on the hub"):
        assets.gemma_folder()


def test_too_little_memory_is_told_before_anything_is_read(chunks, monkeypatch):
    memory = namedtuple("memory", "available")(10**9)
    monkeypatch.setattr(build, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    monkeypatch.setattr(assets, "gemma_folder", lambda: pytest.fail("it was read"))
    with pytest.raises(LoadError, match="pocket-gemma in float32 takes 1,609 MB.*1,000 MB"):
        load("pocket-gemma", device="cpu", dtype="float32")


def test_nothing_else_fetches_it():
    assert not set(assets.GEMMA_WHEELS) & set(assets.WHEELS)
    assert not any("gemma" in name for name, _, _ in assets.status())


def test_the_terms_lie_beside_the_weights():
    notice = (WEIGHTS / "gemma" / "NOTICE").read_text(encoding="utf-8")
    assert notice.splitlines()[0] == assets.GEMMA_TERMS and "MIT licence" in notice
    terms = (WEIGHTS / "gemma" / "TERMS.txt").read_text(encoding="utf-8")
    assert terms.startswith("Gemma Terms of Use")


def small_gemma() -> hf.PreTrainedModel:
    """LLaVA around a tiny Gemma 3, with a window shorter than the prompt."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Gemma3TextConfig(**zoo.TEXT, head_dim=8, sliding_window=6, layer_types=kinds)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=zoo.clip(),
            text_config=text,
            image_token_index=zoo.IMAGE,
            image_seq_length=4,
        )
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(zoo.MAKERS, "llava", small_gemma)
    return case("llava")


@pytest.mark.parametrize("check", CHECKS)
def test_contract(tiny, check):
    outcome = CHECKS[check](tiny)
    if check == "fold":
        assert outcome == "refused in layers 1, 2, 3"


@pytest.fixture(scope="module")
def gemma():
    return load("pocket-gemma", device="cpu", dtype="bfloat16")


@needs_gemma
def test_it_describes_unseen_scenes(gemma):
    samples = load_samples("scenes", n=8, seed=7)
    captions = gemma.generate(
        **{"images": None} | media(samples),
        texts=[PROMPTS["image"]] * len(samples),
        max_new_tokens=32,
    )
    hits = []
    for sample, caption in zip(samples, captions, strict=True):
        for question in sample.questions:
            if question.type == "place":
                hits.append(names(caption, question.answer))
    assert sum(hits) >= 0.75 * len(samples)


@needs_gemma
def test_a_prompt_begins_once_and_ends_before_the_answer(gemma):
    (sample,) = load_samples("scenes", n=1)
    batch = gemma.batch([sample.image], ["What is it?"])
    text = gemma.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<bos><unused0>") and text.count("<bos>") == 1
    assert text.endswith("<unused0>\nQuestion: What is it?\nAnswer:")
    assert gemma.n_layers == 18 and gemma.model.generation_config.eos_token_id == [1, 107]


def test_a_large_vocabulary_is_read_once_into_the_same_tokenizer(monkeypatch):
    folder = assets.language_model_folder()
    plain = build._tokenizer(folder)
    monkeypatch.setattr(build, "_LARGE", 0)
    monkeypatch.setattr(build.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("slow"))
    assert_same_tokenizers(build._tokenizer(folder), plain)


@needs_gemma
def test_gemma_has_the_tokenizer_that_transformers_makes():
    folder = assets.gemma_folder()
    plain = hf.AutoTokenizer.from_pretrained(folder, padding_side="left", model_max_length=8192)
    assert_same_tokenizers(build._tokenizer(folder), plain)


def assert_same_tokenizers(tokenizer, expected):
    texts = ["", " ", "two  spaces\n\nand\ttabs", "éà 漢字 😀", "a.b , c !"]
    texts += [f"{token}x{token}" for token in expected.all_special_tokens]
    texts += ["<start_of_turn>user\n<image_soft_token>Hi<end_of_turn>", "<|im_start|>user\n<image>"]
    for sample in load_samples("scenes", n=60, seed=5):
        texts += [*sample.captions, *(question.text for question in sample.questions)]
    for special in (True, False):
        ids = expected(texts, add_special_tokens=special).input_ids
        assert tokenizer(texts, add_special_tokens=special).input_ids == ids
        for skipped in (True, False):
            words = expected.batch_decode(ids, skip_special_tokens=skipped)
            assert tokenizer.batch_decode(ids, skip_special_tokens=skipped) == words
    assert len(tokenizer) == len(expected)
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    for name in (
        "padding_side",
        "model_max_length",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
    ):
        assert getattr(tokenizer, name) == getattr(expected, name)
