"""Defects of the released code of arXiv 2501.03012 (xl-vlms) that steering here must not have.

What other tests do not cover. Where each defect is tested (files
under tests; without a file: here).

1. A vector read behind the final norm is added before it, and does nothing:
   test_the_last_layer_is_read_where_it_is_steered.
2. Answers are chosen by substrings, "1" by "11": test_eleven_is_not_one.
3. The bare space before "1" and "3" is taken for both, so their vector is split by nothing:
   test_digits_are_told_apart, methods/steering/test_vectors.py::
   test_words_are_known_by_all_their_first_pieces.
4. Removing its hooks removes everybody's: test_hooks_of_others_stay.
5. Each layer takes a pass of its own: test_one_pass_gives_the_vectors_of_all_layers.
6. The model is loaded to subtract two means: the same test, and test_vectors_need_no_model.
7. A key and a vector are stored for each pair of concepts: test_pairs_of_concepts_are_not_stored.
8. Fine-grained vectors have no gate: methods/steering/test_vectors.py::
   test_a_gated_vector_steers_only_where_its_concept_is.
9. Files are pickles without a word of how they were made: test_files_run_no_code,
    methods/steering/test_vectors.py::test_a_vector_knows_how_it_was_made.
10. Clusters are unseeded: test_concepts_are_the_same_each_time.
11. Layers are found by a pattern, "layers.1" in 10 to 19: test_layer_one_is_not_ten_to_nineteen.
12. Sets of samples that do not fit give a vector all the same:
    methods/steering/test_vectors.py::test_sets_that_do_not_belong_together_are_refused.
"""

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.steering import PICTURES, TEXTS, by_hand, noise, one_vector
from tests.support.tiny import PROMPTS, lively, tiny_llava
from tests.support.tokenizers import ids_of, pieces_tokenizer
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import LoadError
from xlvlms_tutorial.methods.steering import (
    concept_vectors,
    load_vectors,
    logit_bias,
    mean_difference,
)
from xlvlms_tutorial.methods.steering.logit_bias import first_pieces
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import find_words

L = 3


@pytest.fixture
def vlm():
    return lively(tiny_llava())


def sides(vlm, samples, layers="all"):
    states = capture(vlm, samples(6), layers, positions=-1, prompt=PROMPTS[0])
    first = states.table["sample"] < 3
    return states.select(first), states.select(~first)


def test_the_table_above_names_tests_that_exist():
    named = re.findall(r"(?:((?:\w+/)+\w+\.py)::\s*)?(test_\w+)\b(?!\.py)", __doc__)
    assert len(named) > 12
    for file, name in named:
        path = Path(__file__).parents[2] / file if file else Path(__file__)
        assert f"def {name}(" in path.read_text(), f"{file or 'here'}: no {name}"


def test_the_last_layer_is_read_where_it_is_steered(vlm, samples):
    """In transformers the last of the hidden states is behind the final norm,
    all others are what blocks give.
    """
    # states grow with depth, as those of trained models do
    vlm.blocks[-1].mlp.down_proj.weight.mul_(50)
    a, b = sides(vlm, samples)
    batch = vlm.batch([sample.image for sample in samples(6)], [PROMPTS[0]] * 6)
    theirs = vlm.model(**batch, output_hidden_states=True).hidden_states
    behind = theirs[-1][3:, -1].mean(dim=0) - theirs[-1][:3, -1].mean(dim=0)
    vectors, before = mean_difference(a, b), vlm.forward(batch).logits[:, -1]
    assert vectors[L].norm() > 5 * behind.norm()
    middle = theirs[2][3:, -1].mean(dim=0) - theirs[2][:3, -1].mean(dim=0)
    torch.testing.assert_close(vectors[2], middle, rtol=1e-4, atol=1e-5)
    effects = []
    for vector in (vectors[L], behind):
        with one_vector(vector, L).apply(vlm, L):
            effects.append((vlm.forward(batch).logits[:, -1] - before).norm())
    assert effects[0] > 3 * effects[1]
    with vectors.apply(vlm, L):
        moved = read(vlm, batch, L, positions="last")[L, "resid_post"][:3, 0].mean(dim=0)
    # the source's mean becomes the target's
    torch.testing.assert_close(moved, b[L].mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("word", "answer"), [("1", "11"), ("3", "13"), ("no", "none"), ("red", "tired")]
)
def test_eleven_is_not_one(word, answer):
    assert word in answer  # the filter of the released code
    assert not exact_match(answer, word)
    tokenizer = pieces_tokenizer()
    assert find_words(tokenizer, ids_of(tokenizer, answer), [word]) is None


def test_digits_are_told_apart():
    speller = tiny_llava()
    speller.tokenizer = pieces_tokenizer()
    # the fault's cause is there
    assert ids_of(speller.tokenizer, " 1")[0] == ids_of(speller.tokenizer, " 3")[0]
    assert not set(first_pieces(speller, "1")) & set(first_pieces(speller, "3"))


def test_hooks_of_others_stay(vlm, samples):
    calls = []
    hook = vlm.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    head = anatomy.unembedding(vlm.model).register_forward_hook(lambda *_: calls.append(2))
    batch = vlm.batch(PICTURES, TEXTS)
    with one_vector(noise(32), 2).apply(vlm, 2), logit_bias(vlm, {"yes": 1.0}):
        vlm.forward(batch)
    assert calls == [1, 2]
    vlm.forward(batch)
    assert calls == [1, 2, 1, 2]
    hook.remove()
    head.remove()


def test_one_pass_gives_the_vectors_of_all_layers(vlm, samples):
    passes = Counter()
    hook = anatomy.decoder(vlm.model).register_forward_pre_hook(
        lambda *_: passes.update(["decoder"])
    )
    vectors = mean_difference(*sides(vlm, samples))
    hook.remove()
    assert vectors.layers == [0, 1, 2, 3] and passes["decoder"] == 1  # six samples are one batch
    single = mean_difference(*sides(vlm, samples, 2))
    torch.testing.assert_close(vectors[2], single[2])


def test_vectors_need_no_model():
    vectors = mean_difference(by_hand(4), by_hand(3, seed=1))
    assert vectors.layers == [1, 3] and vectors[3].norm() > 0


def test_pairs_of_concepts_are_not_stored():
    result = concept_vectors(by_hand(80, d=6), 3, 20)
    tensors = [value for value in vars(result).values() if hasattr(value, "numel")]
    assert sum(value.numel() for value in tensors) == 20 * 6
    assert len(result.pairs) == 20 * 19


def test_files_run_no_code(tmp_path):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "v").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(LoadError):
        load_vectors(tmp_path / "v")
    torch.save({"steering_vector": torch.ones(3)}, tmp_path / "w")
    with pytest.raises(LoadError):
        load_vectors(tmp_path / "w")
    assert not (tmp_path / "ran").exists()


def test_concepts_are_the_same_each_time():
    states = by_hand(80, d=6)
    first, again, third = (concept_vectors(states, 3, 8, seed).concepts for seed in (0, 0, 5))
    assert torch.equal(first, again)
    assert not np.allclose(first, third)


def test_layer_one_is_not_ten_to_nineteen():
    deep = lively(tiny_llava(layers=12))
    batch, vector = deep.batch(PICTURES, TEXTS), noise(32)
    before = [read(deep, batch, layer)[layer, "resid_post"] for layer in (1, 10)]
    with one_vector(vector, 1).apply(deep, 1):
        first = read(deep, batch, 1)[1, "resid_post"]
    torch.testing.assert_close(first, before[0] + vector, rtol=1e-4, atol=1e-4)
    with one_vector(vector, 10).apply(deep, 10):
        torch.testing.assert_close(read(deep, batch, 1)[1, "resid_post"], before[0])
        torch.testing.assert_close(
            read(deep, batch, 10)[10, "resid_post"], before[1] + vector, rtol=1e-4, atol=1e-4
        )
