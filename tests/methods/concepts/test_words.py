"""Words of directions against a full sort in float64, what counts as a word in tokenizers of
four kinds, and random references.
"""

import gc
import math
import weakref

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import wordfreq
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_llava, tiny_tokenizer
from tests.support.tokenizers import bert_tokenizer, bytes_tokenizer, pieces_tokenizer
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts.words import as_lists, concept_words, random_words
from xlvlms_tutorial.methods.logit_lens import wordlists
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, WordFilter, admissible
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.text import PREFIX, sentence

ANY = WordFilter(stop=frozenset(), min_length=1, min_frequency=0)
COLUMNS = ["concept", "rank", "word", "token_id", "score"]


def found_in(
    tokenizer: PreTrainedTokenizerFast, word_filter: WordFilter = ENGLISH, size: int | None = None
) -> dict[str, list[str]]:
    admitted = admissible(tokenizer, len(tokenizer) if size is None else size, word_filter)
    return {
        word: sorted(set(tokenizer.convert_ids_to_tokens(row)))
        for word, row in zip(admitted.words, admitted.forms.tolist(), strict=True)
    }


@pytest.fixture
def vlm():
    return tiny_llava()


def weights(vlm) -> torch.Tensor:
    return anatomy.unembedding(vlm.model).weight


def test_whole_words_that_begin_a_word_count_in_byte_level_vocabularies():
    tokens = [
        "dog",
        "Ġdog",
        "ĠDog",
        "ĠDOG",
        "Ġbicy",
        "cle",
        "Ġbicycle",
        "Ġthe",
        "Ġof",
        "Ġox",
        "Ġ",
        "Ġ12",
        "Ġdog's",
        "Ġ(",
        "ĠÃ",
        "ing",
        "Ġa_b",
    ]
    assert found_in(bytes_tokenizer(tokens)) == {
        "bicycle": ["Ġbicycle"],
        "dog": ["ĠDOG", "ĠDog", "Ġdog"],
        "dog's": ["Ġdog's"],
    }


def test_and_in_sentencepiece_vocabularies():
    assert found_in(pieces_tokenizer()) == {
        "cat": ["▁cat"],
        "dog": ["▁Dog", "▁dog"],
        "hot": ["▁hot"],
        "red": ["▁red"],
    }


def test_and_in_wordpiece_vocabularies():
    assert found_in(bert_tokenizer(["##ing", "walk", "##dog", "dog", "the", "Walk", "bicy"])) == {
        "dog": ["dog"],
        "walk": ["Walk", "walk"],
    }


def test_and_where_every_token_is_a_word():
    admitted = found_in(tiny_tokenizer())
    assert {"woman", "grass", "key", "blue", "red"} < set(admitted)
    assert not {"a", "the", "is", "on", ".", "?", "<image>", "user\n"} & set(admitted)
    assert not {token for row in admitted.values() for token in row} & set(
        tiny_tokenizer().all_special_tokens
    )


def test_a_vocabulary_and_an_unembedding_of_other_sizes():
    tokenizer = bytes_tokenizer(["Ġdog", "Ġcat"])
    assert set(found_in(tokenizer, size=3)) == {"dog"}
    assert set(found_in(tokenizer, size=99)) == {"dog", "cat"}


@pytest.mark.parametrize(
    ("word_filter", "expected"),
    [
        (WordFilter(words={"Cat", "the"}), {"cat"}),  # a stop word stays one
        # a list needs no frequency
        (WordFilter(words={"the", "skateboarder"}, stop=()), {"the", "skateboarder"}),
        (WordFilter(stop={"DOG"}, min_length=2), {"the", "of", "cat", "skate", "ox"}),
        (WordFilter(min_frequency=4.5), {"dog", "cat"}),
        (WordFilter(min_frequency=0), {"dog", "cat", "skate", "skateboarder", "bicy"}),
        (WordFilter(min_length=5), {"skate"}),
        (WordFilter(numbers=True), {"dog", "cat", "skate", "7", "12", "3.5"}),
        (WordFilter(language="de", stop=(), min_frequency=5, min_length=2), {"the", "of"}),
    ],
)
def test_filters_are_data(word_filter, expected):
    tokens = [
        "Ġdog",
        "Ġcat",
        "Ġthe",
        "Ġof",
        "Ġox",
        "Ġskate",
        "Ġskateboarder",
        "Ġbicy",
        "7",
        "Ġ12",
        "Ġ3.5",
        "Ġb2",
        "1a",
    ]
    assert set(found_in(bytes_tokenizer(tokens), word_filter)) == expected
    assert all(word_filter.admits(word) for word in expected)


def test_the_least_frequency_is_that_of_the_package():
    assert wordfreq.zipf_frequency("grass", "en") == (
        frequency := wordfreq.zipf_frequency(" GRASS".strip(), "en")
    )
    assert WordFilter(min_frequency=frequency).admits(" Grass")
    assert not WordFilter(min_frequency=frequency + 0.01).admits("grass")


def test_a_text_is_no_list_of_words():
    with pytest.raises(InputError, match="'dog'"):
        WordFilter(words="dog")


def test_a_vocabulary_without_words_says_what_to_change(vlm):
    rare = WordFilter(words={"zebra"})
    for call in (
        lambda: concept_words(vlm, torch.ones(1, 32), words=rare),
        lambda: random_words(vlm, 2, words=rare, method="vocabulary"),
    ):
        with pytest.raises(InputError, match="min_frequency"):
            call()
    with pytest.raises(InputError, match="no word"):
        admissible(bytes_tokenizer(["Ġ1", "..."]), 4)
    with pytest.raises(InputError, match="no word frequencies of language 'tlh'"):
        concept_words(vlm, torch.ones(1, 32), words=WordFilter(language="tlh"))


def test_a_vocabulary_is_read_once_for_each_filter_and_forgotten_with_its_tokenizer(monkeypatch):
    tokenizer, read = bytes_tokenizer(["Ġdog", "Ġcat"]), []
    plain = wordlists._texts
    monkeypatch.setattr(
        wordlists, "_texts", lambda *arguments: read.append(arguments[1]) or plain(*arguments)
    )
    for word_filter in (ENGLISH, WordFilter(), WordFilter(min_length=2), ENGLISH):
        admissible(tokenizer, 4, word_filter)
    assert len(read) == 2  # equal filters are one
    for tenths in range(wordlists.KEPT):
        admissible(tokenizer, 4, WordFilter(min_frequency=tenths / 10))
    assert len(wordlists._known[tokenizer]) == wordlists.KEPT
    tokenizer.add_tokens(["Ġbird"])
    assert "bird" not in admissible(tokenizer, 4).words  # read anew, but beyond the size
    alive = weakref.ref(tokenizer)
    del tokenizer, read[:]
    gc.collect()
    assert alive() is None


def sorted_words(vlm, directions, n, norm, word_filter):
    """The slow way in float64.

    The logits of all tokens in full order, and the words that pass, each once.
    """
    rows = []
    head = weights(vlm).double().numpy()
    for k, direction in enumerate(directions.double().numpy()):
        # the tiny model's norm has weights of 1
        state = direction / np.sqrt((direction**2).mean()) if norm else direction
        logits, listed = head @ state, []
        for token in np.argsort(-logits, kind="stable"):
            word = vlm.tokenizer.convert_ids_to_tokens(int(token)).lower()
            plain = word not in map(str.lower, vlm.tokenizer.all_special_tokens)
            if plain and word.isalpha() and word not in listed and word_filter.admits(word):
                listed.append(word)
                rows.append((k, len(listed), word, int(token), logits[token]))
            if len(listed) == n:
                break
    return pd.DataFrame(rows, columns=COLUMNS)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(1, 4),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([ENGLISH, ANY]),
)
def test_words_are_those_of_a_full_sort(seed, k, n, norm, word_filter):
    vlm = tiny_llava(seed % 3)
    directions = torch.randn(k, 32, generator=torch.Generator().manual_seed(seed))
    table = concept_words(vlm, directions, n, norm=norm, words=word_filter)
    expected = sorted_words(vlm, directions, n, norm, word_filter)
    pd.testing.assert_frame_equal(table, expected, check_dtype=False, atol=1e-5)
    assert list(table.columns) == COLUMNS


def test_tokens_of_one_word_are_one_with_the_best_of_their_logits(vlm):
    vlm.tokenizer = bytes_tokenizer(["Ġdog", "ĠDog", "Ġcat", "dog", "ĠDOG", "Ġbird"])
    weights(vlm).zero_()
    weights(vlm)[2:8, 0] = torch.tensor([1.0, 3.0, 2.0, 9.0, -1.0, 0.5])
    direction = torch.eye(1, 32)
    table = concept_words(vlm, direction, 5, norm=False)
    assert table.to_dict("list") == {
        "concept": [0] * 3,
        "rank": [1, 2, 3],
        "word": ["dog", "cat", "bird"],
        "token_id": [3, 4, 7],
        "score": [3.0, 2.0, 0.5],
    }
    opposite = concept_words(
        vlm, -direction, 5, norm=False
    )  # of a negated direction another form is the best
    assert opposite[["word", "token_id", "score"]].values.tolist() == [
        ["dog", 6, 1.0],
        ["bird", 7, -0.5],
        ["cat", 4, -2.0],
    ]


@pytest.mark.parametrize("length", [1e-25, 1e-3, 1e25])
def test_through_the_norm_a_direction_has_no_length(vlm, length):
    directions = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, scaled = concept_words(vlm, directions), concept_words(vlm, directions * length)
    pd.testing.assert_frame_equal(table, scaled, atol=1e-5)
    unit = directions / directions.square().mean(dim=1, keepdim=True).sqrt()
    best = vlm.unembed(unit.float())[range(3), table.query("rank == 1")["token_id"].tolist()]
    np.testing.assert_allclose(table.query("rank == 1")["score"], best, atol=1e-5)


def test_the_mean_is_taken_off_first(vlm):
    directions, mean = torch.randn(3, 32), torch.randn(32)
    for norm in (True, False):
        pd.testing.assert_frame_equal(
            concept_words(vlm, directions, norm=norm, mean=mean),
            concept_words(vlm, directions - mean, norm=norm),
        )
    assert not concept_words(vlm, directions, mean=5 * mean).equals(concept_words(vlm, directions))


def test_arrays_and_halves_are_directions_too(vlm):
    directions = torch.randn(2, 32)
    expected = concept_words(vlm, directions)
    pd.testing.assert_frame_equal(concept_words(vlm, directions.numpy()), expected)
    pd.testing.assert_frame_equal(
        concept_words(vlm, directions.double().numpy(), mean=np.zeros(32)), expected
    )
    assert as_lists(concept_words(vlm, directions.bfloat16(), 1)) == as_lists(
        concept_words(vlm, directions.bfloat16().float(), 1)
    )


def test_many_directions_go_through_in_chunks(vlm, monkeypatch):
    directions = torch.randn(50, 32)
    expected = concept_words(vlm, directions)
    monkeypatch.setattr("xlvlms_tutorial.methods.logit_lens.distributions.CHUNK", 4 * 28 * 7)
    pd.testing.assert_frame_equal(concept_words(vlm, directions), expected, atol=1e-5)


def test_bad_directions_give_no_words(vlm):
    good = torch.ones(2, 32)
    broken, empty = good.clone(), good.clone()
    broken[1, 3], empty[1] = math.nan, 0
    for directions, error, message in (
        (torch.ones(2, 31), InputError, "widths"),
        (broken, InputError, "NaN"),
        (good * math.inf, InputError, "NaN or infinite"),
        (empty, InputError, "directions 1 are zero"),
        (good[:0], InputError, "at least one"),
    ):
        with pytest.raises(error, match=message):
            concept_words(vlm, directions)
    for mean, error in ((torch.ones(31), InputError), (broken[1], InputError)):
        with pytest.raises(error, match="mean"):
            concept_words(vlm, 2 * good, mean=mean)
    with pytest.raises(InputError, match="zero"):
        concept_words(vlm, good, mean=good[0])
    weights(vlm)[:] = math.inf
    with pytest.raises(InputError, match="logits"):
        concept_words(vlm, good)


def test_bad_numbers_and_models_without_words(vlm):
    for n in (0, -1):
        for call in (
            lambda n=n: concept_words(vlm, torch.ones(1, 32), n),
            lambda n=n: random_words(vlm, 2, n),
            lambda n=n: random_words(vlm, n),
        ):
            with pytest.raises(InputError, match="give a whole number of 1 or more"):
                call()
    with pytest.raises(InputError, match="'directions', 'vocabulary'"):
        random_words(vlm, 2, method="noise")
    vlm.tokenizer = None
    with pytest.raises(InputError, match="tokenizer"):
        concept_words(vlm, torch.ones(1, 32))


def test_random_directions_are_those_of_the_unit_cube(vlm):
    directions = torch.rand(3, 32, generator=torch.Generator().manual_seed(7))
    pd.testing.assert_frame_equal(
        random_words(vlm, 3, 4, seed=7), concept_words(vlm, directions, 4)
    )
    pd.testing.assert_frame_equal(
        random_words(vlm, 3, 4, seed=7, norm=False, words=ANY),
        concept_words(vlm, directions, 4, norm=False, words=ANY),
    )
    assert not random_words(vlm, 3, 4, seed=8).equals(random_words(vlm, 3, 4, seed=7))


def test_random_words_of_the_vocabulary_are_all_as_likely(vlm):
    vocabulary = admissible(vlm.tokenizer, 28).words
    table = random_words(vlm, 2000, 3, seed=1, method="vocabulary")
    assert list(table.columns) == COLUMNS
    assert table["score"].isna().all()
    assert not table.duplicated(["concept", "word"]).any()
    assert (table["rank"] == np.tile([1, 2, 3], 2000)).all()
    shares = table["word"].value_counts(normalize=True)
    assert set(shares.index) == set(vocabulary)
    assert shares.max() - shares.min() < 0.05
    assert (
        table["token_id"].map(vlm.tokenizer.convert_ids_to_tokens).str.lower().equals(table["word"])
    )
    pd.testing.assert_frame_equal(table, random_words(vlm, 2000, 3, seed=1, method="vocabulary"))
    assert len(random_words(vlm, 2, 99, method="vocabulary")) == 2 * len(vocabulary)


def test_lists_and_sentences():
    table = pd.DataFrame(
        {"concept": [4, 1, 4, 1], "rank": [2, 1, 1, 2], "word": ["b", "c", "a", "d"]}
    )
    assert as_lists(table) == {1: ["c", "d"], 4: ["a", "b"]}
    assert (
        sentence(["woman", "lady"])
        == f"{PREFIX}woman, lady."
        == "A photo is described by the words woman, lady."
    )
    for lacking in ("concept", "rank", "word"):
        with pytest.raises(InputError, match=f"no column '{lacking}' among"):
            as_lists(table.drop(columns=lacking))


@pytest.mark.parametrize("bad", [0, -1, float("inf"), float("nan"), 2.5, True, "3", None])
def test_counts_that_are_no_whole_numbers_are_refused(bad, vlm, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="n is"):
        concept_words(vlm, torch.eye(2, vlm.width), bad)
    for method in ("directions", "vocabulary"):
        with pytest.raises(InputError, match="n is"):
            random_words(vlm, 2, bad, method=method)
        with pytest.raises(InputError, match="k is"):
            random_words(vlm, bad, method=method)
