"""Redundancy of blocks without scores: closed forms, loops in float64, whole forwards."""

import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.contract.reference import traces
from tests.support.tiny import redrawn, tiny_llava
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.methods.skipping import layer_redundancy
from xlvlms_tutorial.samples import Sample

PROMPTS = ("What is it ?", "What colour is the key ?", "Describe the picture .")
L = 4


@pytest.fixture(scope="module")
def vlm():
    """A tiny LLaVA of four layers that matter."""
    return redrawn(tiny_llava(layers=L), seed=1)


@pytest.fixture(scope="module")
def samples():
    pictures = [Image.new("RGB", (32, 32), (k * 60, 90, 200 - k * 50)) for k in range(3)]
    return [Sample(str(k), picture) for k, picture in enumerate(pictures)]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(vlm):
    before = vlm.blocks[0].self_attn.config._attn_implementation
    yield
    assert traces(vlm) == []
    assert vlm.blocks[0].self_attn.config._attn_implementation == before


def behind(batch):
    """Row and position of all that follows the picture."""
    places = []
    for row, kinds in enumerate(batch.mask("image")):
        last = int(kinds.nonzero().max())
        places += [(row, t) for t in range(last + 1, len(kinds))]
    return places


def test_turn_is_one_minus_the_cosines_of_image_tokens(vlm, samples):
    table = layer_redundancy(vlm, samples, PROMPTS, ["turn"], batch_size=2)
    batch = vlm.batch_of(samples, PROMPTS)
    stream = [states[batch.mask("image")].double() for states in read(vlm, batch, "all").values()]
    for layer in range(1, L + 1):
        cosines = functional.cosine_similarity(stream[layer - 1], stream[layer], dim=1)
        assert table.loc[layer, "turn"] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


def test_reading_is_the_attention_of_a_loop(vlm, samples):
    """From queries and keys of what enters each block, one head and position after the other."""
    table = layer_redundancy(vlm, samples, PROMPTS, ["reading"], batch_size=2)
    batch = vlm.batch_of(samples, PROMPTS)
    entering = read(vlm, batch, "all")
    stream = [states.float() for states in entering.values()]
    real = batch["attention_mask"].bool()
    places = (real.long().cumsum(dim=1) - 1).clamp_min(0)
    decoder = vlm.model.model.language_model
    for number, block in enumerate(vlm.blocks):
        attention = block.self_attn
        with torch.no_grad():
            states = block.input_layernorm(stream[number])
            shape = (*states.shape[:2], -1, attention.head_dim)
            queries = attention.q_proj(states).view(shape).transpose(1, 2)
            keys = attention.k_proj(states).view(shape).transpose(1, 2)
            cos, sin = decoder.rotary_emb(states, places)
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        group = queries.shape[1] // keys.shape[1]
        shares = []
        for row, t in behind(batch):
            seen = real[row].clone()
            seen[t + 1 :] = False
            for head in range(queries.shape[1]):
                products = keys[row, head // group].double() @ queries[row, head, t].double()
                weights = (products[seen] / attention.head_dim**0.5).softmax(dim=0)
                shares.append(float(weights[batch.mask("image")[row][seen]].sum()))
        expected = sum(shares) / len(shares)
        assert table.loc[number + 1, "reading"] == pytest.approx(expected, abs=1e-5)


def test_attention_that_is_uniform_reads_the_pictures_share_of_positions(vlm, samples):
    even = redrawn(tiny_llava(layers=L), seed=2)
    for block in even.blocks:
        torch.nn.init.zeros_(block.self_attn.q_proj.weight)
    table = layer_redundancy(even, samples, PROMPTS, ["reading"])
    batch = even.batch_of(samples, PROMPTS)
    padding = (batch["attention_mask"] == 0).sum(dim=1)
    n_image = int(batch.mask("image")[0].sum())
    shares = [n_image / (t + 1 - int(padding[row])) for row, t in behind(batch)]
    expected = sum(shares) / len(shares)
    assert table["reading"].tolist() == pytest.approx([expected] * L, abs=1e-6)


@pytest.mark.parametrize("resumes", [True, False])
def test_divergence_is_that_of_whole_forwards(vlm, samples, resumes, monkeypatch):
    if not resumes:
        name = "xlvlms_tutorial.methods.skipping.redundancy.resumable"
        monkeypatch.setattr(name, lambda vlm, batch: False)
    table = layer_redundancy(vlm, samples, PROMPTS, ["divergence"], batch_size=2)
    batch = vlm.batch_of(samples, PROMPTS)
    rows, columns = zip(*behind(batch), strict=True)
    before = vlm.forward(batch).logits[rows, columns].double().log_softmax(dim=-1)
    for layer in range(1, L + 1):
        with skip(vlm, [layer]):
            after = vlm.forward(batch).logits[rows, columns].double().log_softmax(dim=-1)
        divergence = functional.kl_div(after, before, reduction="batchmean", log_target=True)
        assert table.loc[layer, "divergence"] == pytest.approx(float(divergence), rel=1e-3)
    assert (table["divergence"] > 1e-4).all()


def test_a_block_that_adds_nothing_is_redundant_in_all_that_changes(samples):
    idle = copy.deepcopy(redrawn(tiny_llava(layers=L), seed=3))
    for module in (idle.blocks[1].self_attn.o_proj, idle.blocks[1].mlp.down_proj):
        torch.nn.init.zeros_(module.weight)
    table = layer_redundancy(idle, samples, "What is it ?")
    assert table.columns.tolist() == ["turn", "reading", "divergence"]
    assert table.index.tolist() == [1, 2, 3, 4]
    assert table["turn"].idxmin() == 2 and table.loc[2, "turn"] < 1e-6
    assert table["divergence"].idxmin() == 2 and table.loc[2, "divergence"] < 1e-8
    assert table["reading"].between(0, 1).all()


def test_captions_and_batches_change_nothing(vlm, samples):
    plain = layer_redundancy(vlm, samples, PROMPTS, batch_size=3)
    captioned = [Sample(s.id, s.image, captions=("a key",)) for s in samples]
    alone = layer_redundancy(vlm, captioned, PROMPTS, batch_size=1)
    assert (plain - alone).abs().max().max() < 1e-5


def test_bad_input(vlm, samples):
    with pytest.raises(InputError, match="unknown measures \\['size'\\].*turn, reading, diverg"):
        layer_redundancy(vlm, samples, measures=["turn", "size"])
    with pytest.raises(InputError, match="0 samples"):
        layer_redundancy(vlm, [])


def test_a_model_that_gives_no_attention(vlm, samples, monkeypatch):
    monkeypatch.setattr(vlm, "forward", lambda *_, **__: SimpleNamespace(attentions=None))
    with pytest.raises(InputError, match="attention of 0 of 4 blocks.*leave out 'reading'"):
        layer_redundancy(vlm, samples, measures=["reading"])
