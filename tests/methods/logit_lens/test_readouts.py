"""Read-outs against loops, least squares and brute force; what they refuse."""

import math

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from tests.support.tiny import redrawn, tiny_llava
from tests.support.tokenizers import pieces_tokenizer
from tests.zoo import MODELS, build
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import FileError, InputError, LayerError, SpanError
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.methods.logit_lens import (
    ContextualNeighbours,
    EmbeddingLens,
    LogitLens,
    TunedLens,
    as_forms,
    decoder_fingerprint,
    readers,
    text_states,
)
from xlvlms_tutorial.methods.logit_lens import readouts as module
from xlvlms_tutorial.methods.logit_lens.text_states import _word_ends
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.unembedding import unembedded
from xlvlms_tutorial.models.vlm import VLM

SENTENCES = [
    "a red key is on the grass .",
    "Is there a blue key in the picture ?",
    "What colour is the key ?",
    "the woman is on the grass .",
    "a woman in the picture",
]
WORDS = ["key", "woman", "grass"]


@pytest.fixture(scope="module")
def vlm():
    return redrawn(tiny_llava(), seed=4)


@pytest.fixture(scope="module")
def text(vlm):
    return text_states(vlm, SENTENCES, "all", batch_size=2)


def noise(n, seed=0, width=32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def id_of(vlm, word):
    (token,) = vlm.tokenizer(word, add_special_tokens=False).input_ids
    return token


def cosine(x, y):
    return float((x @ y) / (x.norm() * y.norm()))


def test_states_are_those_of_each_sentence_alone_in_the_order_of_its_words(vlm, text):
    row = 0
    for number, sentence in enumerate(SENTENCES):
        batch = vlm.prepare(vlm.tokenizer([sentence], return_tensors="pt"))
        alone = read(vlm, batch, [2])[2, "resid_post"][0]
        words = sentence.lower().split()
        for position in range(1, len(words)):  # the first position is left out
            if words[position].isalpha():
                assert text.words[row] == words[position] and text.places[row] == number
                torch.testing.assert_close(text.states[2][row], alone[position], atol=1e-4, rtol=0)
                row += 1
    assert row == len(text.words) == len(text.states[0])
    assert text.layers == [0, 1, 2, 3] and text.sentences == tuple(SENTENCES)


def test_the_state_of_a_word_of_several_pieces_is_that_at_its_last():
    tokenizer = pieces_tokenizer("always")  # counts a mark as a piece of the word before it
    inputs, ends, texts = _word_ends(tokenizer, ["a cattle, red"])
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    ended = [token for token, end in zip(tokens, ends[0].tolist(), strict=True) if end]
    assert texts == [["cattle", "red"]]
    assert ended == ["tle", "▁red"]


def test_words_are_told_apart_where_the_tokenizer_takes_a_sentence_for_one_word():
    split, whole = pieces_tokenizer(), pieces_tokenizer()
    whole.backend_tokenizer.pre_tokenizer = (
        None  # as Gemma's: spaces are replaced, nothing is split
    )
    whole.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    sentence = "a red cattle, red"
    assert set(whole(sentence).word_ids()) == {0}
    inputs, ends, texts = _word_ends(whole, [sentence])
    assert texts == _word_ends(split, [sentence])[2] == [["red", "cattle", "red"]]
    tokens = np.array(whole.convert_ids_to_tokens(inputs["input_ids"][0]))
    assert tokens[ends[0].numpy()].tolist() == ["▁red", "tle", "▁red"]


def test_the_logit_lens_scores_the_logit_of_a_words_first_piece(vlm):
    states = noise(5, 1)
    scores = LogitLens(vlm).read(states, 2, {"key": ["key", "red"], "grass": ["grass"]})
    logits = vlm.unembed(states)
    expected = torch.maximum(logits[:, id_of(vlm, "key")], logits[:, id_of(vlm, "red")])
    torch.testing.assert_close(scores[:, 0], expected)
    torch.testing.assert_close(scores[:, 1], logits[:, id_of(vlm, "grass")])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_some_tokens_are_columns_of_all_in_every_architecture(name):
    vlm = VLM(build(name)[0], None, name)
    states, ids = noise(3, 1, vlm.width), [5, 2, 5, 0]
    logits = unembedded(vlm.model, states, anatomy.logit_rules(vlm.model), True, ids)
    torch.testing.assert_close(logits, vlm.unembed(states)[:, ids], atol=1e-5, rtol=1e-5)


def test_the_embedding_lens_scores_cosines_with_input_embeddings(vlm):
    states = noise(4, 2)
    scores = EmbeddingLens(vlm).read(states, 1, WORDS)
    table = vlm.model.get_input_embeddings().weight
    for row, state in enumerate(states):
        for column, word in enumerate(WORDS):
            expected = cosine(state, table[id_of(vlm, word)])
            assert math.isclose(scores[row, column], expected, abs_tol=1e-5)


def test_contextual_neighbours_are_the_nearest_of_all_states_of_a_word(vlm, text):
    states = noise(6, 3)
    for at, layers in (("all", [0, 1, 2, 3]), ("same", [2]), (1, [1])):
        reader = ContextualNeighbours(vlm, at).fit(text)
        scores = reader.read(states, 2, WORDS)
        assert torch.equal(
            ContextualNeighbours(vlm).fit(text).comparing(at).read(states, 2, WORDS), scores
        )
        for row, state in enumerate(states):
            for column, word in enumerate(WORDS):
                cosines = []
                for layer in layers:
                    for other, name in zip(text.states[layer], text.words, strict=True):
                        if name == word:
                            cosines.append(cosine(state, other))
                assert math.isclose(scores[row, column], max(cosines), abs_tol=1e-5)


def test_blocks_do_not_change_what_is_read(vlm, text, monkeypatch):
    states, reader = noise(7, 4), ContextualNeighbours(vlm).fit(text)
    whole, near = reader.read(states, 1, WORDS), reader.neighbours(states, 1, 3)
    monkeypatch.setattr(module, "BLOCK", 4 * 2 * len(text.words))
    torch.testing.assert_close(reader.read(states, 1, WORDS), whole)
    assert reader.neighbours(states, 1, 3)["word"].tolist() == near["word"].tolist()


def test_the_nearest_neighbour_of_a_state_of_the_index_is_itself(vlm, text):
    reader = ContextualNeighbours(vlm).fit(text)
    near = reader.neighbours(text.states[2], 2, 4)
    first = near[near["rank"] == 1]
    assert first["word"].tolist() == list(text.words)
    assert first["sentence"].tolist() == [SENTENCES[place] for place in text.places]
    assert (first["layer"] == 2).all() and np.allclose(first["cosine"], 1, atol=1e-5)
    by_rank = near["cosine"].to_numpy().reshape(-1, 4)
    assert (np.diff(by_rank, axis=1) <= 1e-6).all()
    # brute force over all layers for one state
    cosines = []
    for layer in text.layers:
        cosines += [cosine(text.states[2][5], other) for other in text.states[layer]]
    assert np.allclose(by_rank[5], sorted(cosines, reverse=True)[:4], atol=1e-5)


def test_the_tuned_lens_solves_its_ridge_regression(vlm, text):
    lens = TunedLens(vlm, ridge=0.1).fit(text)
    x, target = text.states[1].double(), text.states[3].double()
    centred = x - x.mean(0)
    alpha = 0.1 * len(x) * centred.var(0, correction=0).mean()
    gram = centred.T @ centred + alpha * torch.eye(32, dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ ((target - x) - (target - x).mean(0)))
    expected = x + (target - x).mean(0) + centred @ weights
    torch.testing.assert_close(
        lens.translate(text.states[1], 1).double(), expected, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        lens.read(text.states[1], 1, WORDS),
        LogitLens(vlm).read(expected.float(), 3, WORDS),
        atol=1e-2,
        rtol=0,
    )


def test_the_tuned_lens_leaves_the_last_layer_and_with_a_large_penalty_all_but_the_mean(vlm, text):
    lens = TunedLens(vlm, ridge=1e9).fit(text)
    torch.testing.assert_close(lens.translate(text.states[3], 3), text.states[3], atol=1e-4, rtol=0)
    shift = lens.translate(text.states[1], 1) - text.states[1]
    expected = (text.states[3] - text.states[1]).mean(0).expand_as(shift)
    torch.testing.assert_close(shift, expected, atol=1e-3, rtol=0)


def test_all_readers_have_one_interface_and_the_same_candidates(vlm):
    made = readers(vlm, SENTENCES, [1, 2])
    states = noise(3)
    assert len(made) == 4
    for reader in made.values():
        assert reader.read(states, 2, WORDS).shape == (3, 3)
        assert reader.read(states, 2, WORDS).dtype == torch.float32
    assert made["contextual neighbours"].layers == [1, 2]


def test_a_saved_index_reads_the_same(vlm, text, tmp_path):
    reader = ContextualNeighbours(vlm, 1).fit(text)
    path = reader.save(tmp_path / "index.safetensors")
    again = ContextualNeighbours.load(path, vlm)
    assert again.at == 1 and again.layers == reader.layers
    states = noise(4)
    torch.testing.assert_close(
        again.read(states, 1, WORDS), reader.read(states, 1, WORDS), atol=2e-3, rtol=0
    )
    near = again.neighbours(text.states[1], 1, 1)
    assert near["word"].tolist() == list(text.words)
    assert near["sentence"].tolist() == [SENTENCES[place] for place in text.places]


def test_an_index_of_another_model_is_refused_whatever_it_is_called(vlm, text, tmp_path):
    path = ContextualNeighbours(vlm).fit(text).save(tmp_path / "index.safetensors")
    changed = redrawn(tiny_llava(), seed=4)
    assert decoder_fingerprint(changed) == decoder_fingerprint(vlm)
    with torch.no_grad():
        changed.blocks[1].mlp.up_proj.weight[0, 0] += 1
    assert changed.name == vlm.name
    for refused in (
        lambda: ContextualNeighbours.load(path, changed),
        lambda: ContextualNeighbours(changed).fit(text),
        lambda: TunedLens(changed).fit(text),
    ):
        with pytest.raises(InputError, match="make the index again with this model"):
            refused()


def test_files_that_are_no_index_are_refused(vlm, text, tmp_path):
    with pytest.raises(FileError, match="no index"):
        ContextualNeighbours.load(tmp_path / "none", vlm)
    path = ContextualNeighbours(vlm).fit(text).save(tmp_path / "index")
    tensors, metadata = load_tensors(path)
    damaged = [
        ({**metadata, "format": "masks"}, tensors),
        ({**metadata, "words": "[]"}, tensors),
        ({**metadata, "words": "["}, tensors),
        (metadata, {"places": tensors["places"]}),
        ({**metadata, "sentences": '["one"]'}, tensors),
    ]
    for number, (changed, parts) in enumerate(damaged):
        file = save_tensors(tmp_path / f"{number}", parts, changed)
        with pytest.raises(FileError, match="no index"):
            ContextualNeighbours.load(file, vlm)


def test_layers_out_of_range_are_refused(vlm, text):
    for layer in (-1, 4):
        with pytest.raises(LayerError):
            LogitLens(vlm).read(noise(1), layer, WORDS)
        with pytest.raises(LayerError):
            text_states(vlm, SENTENCES, [layer])
        with pytest.raises(LayerError):
            ContextualNeighbours(vlm, layer)
    index = text_states(vlm, SENTENCES, [1, 3])
    with pytest.raises(InputError, match="unknown layer of the index 2; allowed: 1, 3"):
        ContextualNeighbours(vlm, "same").fit(index).read(noise(1), 2, WORDS)
    with pytest.raises(InputError, match="unknown fitted layer 2; allowed: 1, 3"):
        TunedLens(vlm).fit(index).read(noise(1), 2, WORDS)
    with pytest.raises(InputError, match="without the last; read layer 3 too"):
        TunedLens(vlm).fit(text_states(vlm, SENTENCES, [1]))


@pytest.mark.parametrize("candidates", [[], {}, [""], {"key": []}, {"key": [" "]}, "key"])
def test_candidates_that_are_none_are_refused(candidates):
    with pytest.raises(InputError):
        as_forms(candidates)


def test_words_that_cannot_be_read_are_named(vlm, text):
    for reader in (LogitLens(vlm), EmbeddingLens(vlm)):
        with pytest.raises(InputError, match="'frog' gives no token"):
            reader.read(noise(1), 1, ["key", "frog"])
    with pytest.raises(InputError, match="no sentence of the index has frog"):
        ContextualNeighbours(vlm).fit(text).read(noise(1), 1, ["key", "frog"])
    with pytest.raises(InputError, match="no index; fit it"):
        ContextualNeighbours(vlm).read(noise(1), 1, ["key"])


@pytest.mark.parametrize("states", [noise(0), noise(2, width=8), noise(1) * math.nan])
def test_states_that_are_none_are_refused(vlm, states):
    with pytest.raises(InputError):
        EmbeddingLens(vlm).read(states, 1, WORDS)


@pytest.mark.parametrize("sentences", [[], [" "], "a red key", ["key"], ["key ?"]])
def test_sentences_without_words_are_refused(vlm, sentences):
    with pytest.raises(InputError):
        text_states(vlm, sentences, [1])


def test_absent_spans_are_refused_where_states_are_captured(vlm):
    batch = vlm.prepare(vlm.tokenizer(SENTENCES[:1], return_tensors="pt"))
    with pytest.raises(SpanError):
        read(vlm, batch, [1], positions="image")


def test_other_settings_are_refused(vlm, text):
    with pytest.raises(InputError, match="ridge"):
        TunedLens(vlm, ridge=0)
    with pytest.raises(InputError, match="at="):
        ContextualNeighbours(vlm, "some")
    for k in (0, 4 * len(text.words) + 1):
        with pytest.raises(InputError):
            ContextualNeighbours(vlm).fit(text).neighbours(noise(1), 1, k)
