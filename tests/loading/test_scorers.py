"""Scorers and text encoders.

Tiny CLIP, SigLIP and BERT in folders against transformers' own
outputs, refusals, the embedded ones.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from xlvlms_tutorial.errors import InputError, LayerError, LoadError
from xlvlms_tutorial.loading import scorers
from xlvlms_tutorial.loading.scorers import load_scorer, load_text_encoder

WORDS = ["a", "photo", "is", "described", "by", "the", "words", "red", "key", "woman", ",", "."]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
TEXTS = ["a red key", "the woman", "a photo of the words red , key .", "a red key"]
PICTURES = [
    Image.new("RGB", (40, 30), (200, 30, 30)),
    Image.new("RGB", (32, 50), (20, 30, 230)),
    Image.new("L", (9, 9), 128),
]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 16,
}
TEXT |= {"max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def tokenizer(limit: int = 12) -> hf.PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=limit, **roles)


def clip() -> tuple:
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
    pictures = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return model, hf.CLIPProcessor(image_processor=pictures, tokenizer=tokenizer())


def siglip() -> tuple:
    model = hf.SiglipModel(
        hf.SiglipConfig(
            text_config=TEXT | {"hidden_size": 16, "projection_size": 16}, vision_config=VISION
        )
    )
    pictures = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return model, hf.SiglipProcessor(image_processor=pictures, tokenizer=tokenizer())


def bert(folder, **options: object):
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**TEXT), **options).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=[clip, siglip], ids=["clip", "siglip"])
def towers(request, tmp_path_factory):
    """A model, its processor and the folder that holds both; tests do not write into it."""
    torch.manual_seed(0)
    model, processor = request.param()
    folder = tmp_path_factory.mktemp("towers")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor, folder


@pytest.fixture
def spoilt(towers, tmp_path):
    """A copy to be changed."""
    for file in towers[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_embeddings_and_their_cosines_are_those_of_the_model(towers):
    model, processor, folder = towers
    scorer = load_scorer(folder, device="cpu")
    padding = "max_length" if model.config.model_type == "siglip" else True
    rgb = [picture.convert("RGB") for picture in PICTURES]
    with torch.no_grad():
        whole = model(
            **processor(
                text=TEXTS,
                images=rgb,
                padding=padding,
                truncation=True,
                max_length=12,
                return_tensors="pt",
            )
        )
    images, texts = scorer.images(PICTURES), scorer.texts(TEXTS)
    torch.testing.assert_close(images, whole.image_embeds)
    torch.testing.assert_close(texts, whole.text_embeds)
    offset = getattr(model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(
        images @ texts.T,
        (whole.logits_per_image - offset).detach() / model.logit_scale.exp().detach(),
    )
    assert scorer.name == str(folder)
    assert (images.dtype, texts.dtype) == (torch.float32, torch.float32)


def test_embeddings_have_length_1_and_do_not_depend_on_the_batch(towers):
    scorer = load_scorer(towers[2], device="cpu")
    images, texts = scorer.images(PICTURES), scorer.texts(TEXTS)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(scorer.images(PICTURES, batch_size=1), images)
    torch.testing.assert_close(scorer.texts(TEXTS, batch_size=1), texts)
    assert torch.equal(scorer.texts(TEXTS), texts) and torch.equal(texts[0], texts[3])
    assert not any(weight.requires_grad for weight in scorer.towers.model.parameters())


def test_a_text_that_is_given_twice_is_read_once(towers, monkeypatch):
    scorer, read = load_scorer(towers[2], device="cpu"), []
    plain = scorer.towers.text_features
    monkeypatch.setattr(
        scorer.towers, "text_features", lambda texts: read.extend(texts) or plain(texts)
    )
    assert scorer.texts(TEXTS * 3).shape[0] == 12 and sorted(read) == sorted(set(TEXTS))


def test_texts_that_are_too_long_are_cut_off(towers):
    scorer = load_scorer(towers[2], device="cpu")
    long = scorer.texts([" ".join(["red"] * n) for n in (9, 10, 11, 40)])
    assert torch.allclose(long[1], long[3])
    assert torch.allclose(long[1], long[2])
    assert not torch.allclose(long[0], long[1])


def test_pictures_may_be_files(towers, tmp_path):
    scorer = load_scorer(towers[2], device="cpu")
    PICTURES[0].save(tmp_path / "red.png")
    assert torch.equal(scorer.images([tmp_path / "red.png"]), scorer.images(PICTURES[:1]))


def test_what_cannot_be_scored_is_refused(towers):
    scorer = load_scorer(towers[2], device="cpu")
    for texts, message in (
        ([], "no list of texts"),
        ("a red key", "no list"),
        (["a", " "], "text 1 is ' '"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.texts(texts)
    for pictures in ([], "picture.png"):
        with pytest.raises(InputError, match="no list of pictures"):
            scorer.images(pictures)
    for nothing in ("no-such-file.png", 3, None):
        with pytest.raises(InputError):
            scorer.images([PICTURES[0], nothing])
    for score in (
        lambda: scorer.images(PICTURES, batch_size=0),
        lambda: scorer.texts(TEXTS, batch_size=-1),
    ):
        with pytest.raises(InputError, match="batch_size"):
            score()


def test_number_formats_change_the_weights_and_not_what_comes_out(towers):
    exact, rough = (
        load_scorer(towers[2], device="cpu"),
        load_scorer(towers[2], device="cpu", dtype="bfloat16"),
    )
    assert rough.towers.model.dtype == torch.bfloat16
    for first, second in (
        (exact.images(PICTURES), rough.images(PICTURES)),
        (exact.texts(TEXTS), rough.texts(TEXTS)),
    ):
        assert second.dtype == torch.float32 and 0 < (first - second).abs().max() < 0.05
        torch.testing.assert_close(second.norm(dim=1), torch.ones(len(second)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU")
def test_on_a_gpu_the_embeddings_are_those_of_the_cpu(towers):
    first, second = (
        load_scorer(towers[2], device=device, dtype="float32") for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(
        second.images(PICTURES), first.images(PICTURES), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(second.texts(TEXTS), first.texts(TEXTS), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("load", "names"), [(load_scorer, "pocket-scorer"), (load_text_encoder, "minilm")]
)
def test_unknown_names_list_the_known(load, names):
    for name in ("clip", "", "a/b/c"):
        with pytest.raises(LoadError, match=names):
            load(name)


@pytest.mark.parametrize("load", [load_scorer, load_text_encoder])
def test_what_is_not_there_is_refused(load, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="'nobody/has-this-model'"):
        load("nobody/has-this-model")
    with pytest.raises(LoadError, match="the configuration of"):
        load(tmp_path)
    with pytest.raises(LoadError, match="meta"):
        load(device="meta")
    with pytest.raises(LoadError, match="allowed: auto, float32"):
        load(dtype="int8")
    with pytest.raises(LoadError, match="leave it out"):
        load(revision="main")
    monkeypatch.setattr(scorers, "resolve_device", lambda device: device)
    with pytest.raises(LoadError, match="one GPU"):
        load(device="balanced")


@pytest.mark.parametrize(
    "config", [hf.BertConfig, hf.LlavaConfig, hf.CLIPVisionConfig, hf.Blip2Config]
)
def test_a_model_without_two_towers_is_refused(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(
        LoadError, match=f"'{config.model_type}', which has no two towers.*CLIP or SigLIP"
    ):
        load_scorer(tmp_path)


@pytest.mark.parametrize("config", [hf.CLIPConfig, hf.LlavaConfig, hf.ViTConfig, hf.T5Config])
def test_a_model_that_does_not_read_text_alone_is_refused(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(
        LoadError, match=f"'{config.model_type}', which is no encoder of text alone.*BERT"
    ):
        load_text_encoder(tmp_path)


def test_weights_that_lack_or_are_pickles_are_refused(spoilt):
    weights = load_file(spoilt / "model.safetensors")
    lacking = next(name for name in weights if name.startswith("text_model"))
    save_file(
        {name: weight for name, weight in weights.items() if name != lacking},
        spoilt / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(LoadError, match=f"lacks 1 of its weights, such as {lacking}"):
        load_scorer(spoilt)
    (spoilt / "model.safetensors").unlink()
    torch.save(weights, spoilt / "pytorch_model.bin")
    torch.save(weights, spoilt / "w.bin")  # an index may name it
    index = spoilt / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "w.bin")}))
    with pytest.raises(LoadError, match="names 'w.bin' as weights, which is no safetensors file"):
        load_scorer(spoilt)
    index.unlink()
    with pytest.raises(LoadError, match="no weights in safetensors"):
        load_scorer(spoilt)


def test_remote_code_is_not_run(spoilt):
    (spoilt / "code.py").write_text("raise SystemExit('the code ran')")
    config = json.loads((spoilt / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "code.Theirs", "AutoModel": "code.Theirs"},
    }
    (spoilt / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="the configuration of"):
        load_scorer(spoilt)


# Text encoders


def test_states_are_those_of_each_text_alone_without_special_tokens(tmp_path):
    model, words = bert(tmp_path), tokenizer()
    for layer in (None, 0, 1, 2):
        tokens = load_text_encoder(tmp_path, device="cpu", layer=layer).tokens(TEXTS, batch_size=2)
        assert len(tokens) == 4 and torch.equal(tokens[0], tokens[3])
        for text, states in zip(TEXTS, tokens, strict=True):
            with torch.no_grad():
                alone = model(**words(text, return_tensors="pt"), output_hidden_states=True)
            expected = alone.hidden_states[-1 if layer is None else layer][0, 1:-1]
            torch.testing.assert_close(
                states, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4
            )
    assert [len(states) for states in tokens] == [3, 2, 9, 3]


def test_a_text_encoder_refuses_bad_layers_and_texts(tmp_path):
    bert(tmp_path)
    for layer in (3, -1):
        with pytest.raises(LayerError, match="0 to 2"):
            load_text_encoder(tmp_path, layer=layer)
    encoder = load_text_encoder(tmp_path, device="cpu")
    for texts in ([], "a red key", ["a", ""]):
        with pytest.raises(InputError):
            encoder.tokens(texts)
    with pytest.raises(InputError, match="batch_size=0"):
        encoder.tokens(TEXTS, batch_size=0)
    assert len(encoder.tokens([" ".join(["red"] * 40)])[0]) == 10


def test_a_checkpoint_without_a_pooler_gives_the_same_states(tmp_path):
    bert(tmp_path / "whole")
    bert(tmp_path / "bare")
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {name: weight for name, weight in weights.items() if not name.startswith("pooler")}
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    first, second = (
        load_text_encoder(tmp_path / name, device="cpu").tokens(TEXTS) for name in ("whole", "bare")
    )
    assert len(bare) < len(weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The embedded ones


def test_minilm_knows_which_words_are_alike():
    encoder = load_text_encoder(device="cpu")
    woman, lady, key = (
        states.mean(dim=0) for states in encoder.tokens(["a woman", "a lady", "a key"])
    )
    assert encoder.name == "minilm" and encoder.tokens(["a woman"])[0].shape == (2, 384)
    assert (
        torch.cosine_similarity(woman, lady, dim=0)
        > torch.cosine_similarity(woman, key, dim=0) + 0.1
    )


def test_the_pocket_scorer_is_the_default_and_gives_the_same_each_time():
    scorer = load_scorer(device="cpu")
    texts = ["A photo is described by the words night.", "A photo is described by the words day."]
    assert scorer.name == "pocket-scorer"
    assert torch.equal(scorer.texts(texts), scorer.texts(texts))
    assert torch.equal(scorer.images(PICTURES), scorer.images(PICTURES))
    torch.testing.assert_close(scorer.texts(texts).norm(dim=1), torch.ones(2))
    assert scorer.texts(texts).shape[1] == scorer.images(PICTURES).shape[1]


def test_the_pocket_scorer_is_built_where_it_is_sent(monkeypatch):
    sent = []
    towers = SimpleNamespace(
        image_features=len,
        text_features=len,
        to=lambda *arguments: sent.append(arguments) or towers,
    )
    monkeypatch.setattr("xlvlms_tutorial.pocket.scorer.build_scorer", lambda: towers)
    assert load_scorer(device="cpu", dtype="bfloat16").towers is towers
    assert sent == [(torch.device("cpu"), torch.bfloat16)]
