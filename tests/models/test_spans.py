"""What stands where: words in generated ids, whatever pieces a tokenizer cuts them into, and the
kinds of positions of a prompt.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer
from tests.support.tokenizers import fallback_tokenizer, ids_of, pieces_tokenizer, tokens_of
from xlvlms_tutorial.errors import SpanError
from xlvlms_tutorial.models.spans import SPANS, Batch, decode, find_words, label, token_slice


@pytest.fixture(scope="module")
def pieces():
    return pieces_tokenizer()


def test_the_tokenizer_of_these_tests_cuts_as_llama_does(pieces):
    assert tokens_of(pieces, "a 1 dog") == ["▁a", "▁", "1", "▁dog"]
    assert tokens_of(pieces, "cattle") == ["▁cat", "tle"]
    assert decode(pieces, ids_of(pieces, "a 1 dog in a hotdog")) == "a 1 dog in a hotdog"


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a 1 dog", ["dog"], (3, "dog")),
        ("dog", ["dog"], (0, "dog")),
        ("a zebra", ["zoo"], None),  # both begin with a bare space, as all words that are no piece
        ("a 3", ["1"], None),  # the first piece of "1" is the bare space, which stands before 3 too
        ("a 3 or 1", ["1"], (7, "1")),
        ("a 13", ["1"], None),
        ("a 13", ["3"], None),
        ("cattle", ["cat"], None),  # the first piece of cattle is that of cat
        ("cattle and a cat", ["cat"], (6, "cat")),
        ("cattle", ["cattle"], (0, "cattle")),
        ("a zebra", ["zebra"], (2, "zebra")),  # the first piece that holds a letter of it
        ("a Dog", ["dog"], (1, "dog")),
        ("a dog", ["DOG"], (1, "DOG")),
        ("a dog.", ["dog"], (1, "dog")),
        ("a hot dog", ["hot dog"], (1, "hot dog")),
        ("a hotdog", ["hot dog"], None),
        ("a hot  dog", ["hot dog"], (1, "hot dog")),
        ("a hot dog", ["dog", "hot"], (1, "hot")),
        ("a hot dog", ["hot", "hot dog"], (1, "hot dog")),  # of two at one place the longer
        ("a dog", ["cat", "dog"], (1, "dog")),
        ("dogs", ["dog"], None),
        ("a dog's", ["dog"], (1, "dog")),
        ("a c.t", ["c?t"], None),  # a word is no pattern
        ("what ?", ["?"], (6, "?")),
    ],
)
def test_words_are_found_whole_at_their_first_piece(pieces, text, words, expected):
    match = find_words(pieces, ids_of(pieces, text), words)
    assert (match and (match[0].start, match[1])) == expected


def test_the_index_is_that_of_the_first_piece(pieces):
    ids = ids_of(pieces, "a 3 or 1 zebra")
    for word in ("3", "or", "1", "zebra"):
        part, _ = find_words(pieces, ids, [word])
        assert decode(pieces, ids[part]).strip() == word
        start = part.start
        rest = decode(pieces, ids[start:]).strip()
        assert rest.startswith(word)
        assert not decode(pieces, ids[start + 1 :]).strip().startswith(word)


def test_nothing_is_found_in_no_ids(pieces):
    assert find_words(pieces, [], ["dog"]) is None


@given(
    st.lists(
        st.sampled_from(["a", "dog", "cattle", "1", "31", "hot", "zebra", "reding"]),
        min_size=1,
        max_size=8,
    )
)
def test_any_word_is_found_at_its_own_tokens(words):
    tokenizer = pieces_tokenizer()
    ids = ids_of(tokenizer, " ".join(words))
    for word in set(words):
        # the oracle: the tokens of all that stands before the first occurrence
        before = words[: words.index(word)]
        expected = len(ids_of(tokenizer, " ".join(before))) if before else 0
        part, matched_word = find_words(tokenizer, ids, [word])
        assert (matched_word, decode(tokenizer, ids[part]).strip()) == (word, word)
        start = part.start
        # a bare space may count to the word before or to the word
        assert start == expected or tokenizer.convert_ids_to_tokens(ids)[expected:start] == ["▁"]


@given(st.data())
def test_a_slice_of_characters_is_the_tokens_that_hold_them(data):
    tokenizer = pieces_tokenizer()
    text = " ".join(
        data.draw(
            st.lists(st.sampled_from(["dog", "cattle", "1", "red", "xyz"]), min_size=1, max_size=6)
        )
    )
    ids = ids_of(tokenizer, text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    ends = [len(decode(tokenizer, ids[: k + 1])) for k in range(len(ids))]
    holding = [k for k in range(len(ids)) if ends[k] > start and (ends[k - 1] if k else 0) < end]
    part = token_slice(tokenizer, ids, start, end)
    assert list(range(part.start, part.stop)) == holding


# Characters of several tokens


def bytes_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Bytes as in GPT-2 and Qwen.

    A character outside of ASCII is several tokens, but for those that a merge joins.
    """
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: k for k, sign in enumerate([*signs, *("".join(pair) for pair in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, list(merges)))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


# of the first two bytes of emoji and of 雪; of a blank and a letter
MERGES = (("ð", "Ł"), ("Ġ", "a"), ("é", "Ľ"), ("Ł", "Ĳ"))
BYTEWISE = {
    "bytes": bytes_tokenizer(),
    "merged bytes": bytes_tokenizer(MERGES),
    "fallback": fallback_tokenizer(),
}


def holding(tokenizer, ids, start, end):
    """The tokens that have some byte of the characters from start to end, by counting bytes."""
    text = decode(tokenizer, ids)
    first, last = len(text[:start].encode()), len(text[:end].encode())
    sizes = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        one_byte = token.startswith("<0x") and len(token) == 6
        if one_byte:
            sizes.append(1)
        elif "▁" in tokenizer.get_vocab():
            sizes.append(len(token.replace("▁", " ").encode()))
        else:
            sizes.append(len(token))
    if "▁" in tokenizer.get_vocab():
        sizes[0] = 0  # the blank that is put before every text is taken away again
    ends = list(itertools.accumulate(sizes))
    return [
        k
        for k, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size and end > first and end - size < last
    ]


@pytest.mark.parametrize("kind", BYTEWISE)
@given(st.data())
def test_a_token_holds_a_character_if_it_has_one_of_its_bytes(kind, data):
    tokenizer = BYTEWISE[kind]
    text = data.draw(
        st.text(st.sampled_from("ab é雪🐈👩\u200d ñ"), min_size=1, max_size=8).filter(
            lambda text: text == text.strip()
        )
    )
    ids = ids_of(tokenizer, text)
    assert decode(tokenizer, ids) == text
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    part = token_slice(tokenizer, ids, start, end)
    assert list(range(part.start, part.stop)) == holding(tokenizer, ids, start, end)


@pytest.mark.parametrize("kind", BYTEWISE)
@pytest.mark.parametrize(
    "answer", ["a cat 🐈", "雪", "a café", "🐈 and 雪", "👩\u200d👩\u200d👧 x", "naïve", "🐈🐈"]
)
def test_all_tokens_of_an_answer_are_labelled(kind, answer):
    tokenizer = BYTEWISE[kind]
    for after in ("", " end"):
        ids = tokenizer(f"What is it? bot: {answer}{after}", return_tensors="pt").input_ids
        spans = label(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {},
            tokenizer,
            ["What is it?"],
            [answer],
        )
        mask = spans[0] == SPANS.index("answer")
        assert decode(tokenizer, ids[0][mask].tolist()).strip() == answer
        whole = decode(tokenizer, ids[0].tolist())
        start = whole.rindex(answer)
        assert mask.nonzero().flatten().tolist() == holding(
            tokenizer, ids[0].tolist(), start, start + len(answer)
        )
        assert (
            decode(tokenizer, ids[0][spans[0] == SPANS.index("question")].tolist()).strip()
            == "What is it?"
        )


@pytest.mark.parametrize("kind", BYTEWISE)
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a dog 🐕", "🐕"),
        ("🐕", "🐕"),
        ("the café is", "café"),
        ("雪 und 雨", "雨"),
        ("un niño", "niño"),
    ],
)
def test_words_of_such_characters_are_found_with_all_their_tokens(kind, text, word):
    tokenizer = BYTEWISE[kind]
    ids = ids_of(tokenizer, text)
    part, matched_word = find_words(tokenizer, ids, [word])
    assert matched_word == word and decode(tokenizer, ids[part]).strip() == word
    assert decode(tokenizer, ids[: part.stop]).endswith(word)  # no mark of replacement at its end


def test_an_answer_that_was_cut_off_in_a_character_is_labelled_whole():
    tokenizer = BYTEWISE["bytes"]
    ids = ids_of(tokenizer, "bot: a 🐈")[:-2]
    text = decode(tokenizer, ids)[len("bot: ") :]
    assert text == "a \ufffd"
    input_ids = torch.tensor([ids])
    spans = label(
        {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        {},
        tokenizer,
        [""],
        [text],
    )
    assert (spans[0] == SPANS.index("answer")).tolist() == [False] * 5 + [True] * 4


def test_a_long_text_is_decoded_a_few_times_only(monkeypatch):
    tokenizer, calls = BYTEWISE["bytes"], []
    ids = ids_of(tokenizer, "ab 雪 " * 200)
    plain = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda *args, **named: calls.append(1) or plain(*args, **named)
    )
    token_slice(tokenizer, ids, 500, 510)
    assert len(calls) < 100


def test_an_accent_that_the_tokenizer_takes_away_is_found_as_the_text_has_it(pieces):
    plain = pieces_tokenizer()
    plain.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    assert find_words(plain, ids_of(plain, "a café"), ["cafe"])[1] == "cafe"


def prompt(*rows):
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(list(rows), padding=True, return_tensors="pt")
    return tokenizer, dict(encoded)


def named(spans):
    return [SPANS[k] for k in spans.tolist()]


def test_labels_of_a_prompt_with_an_answer():
    tokenizer, inputs = prompt(
        "user <image> <image> Is there a key ? assistant yes",
        "user <image> What colour ? assistant red",
    )
    placeholders = {"image": tokenizer.convert_tokens_to_ids("<image>")}
    spans = label(
        inputs, placeholders, tokenizer, ["Is there a key ?", "What colour ?"], ["yes", "red"]
    )
    assert named(spans[0]) == [
        "template",
        "image",
        "image",
        *["question"] * 5,
        "template",
        "answer",
    ]
    assert named(spans[1]) == [
        *["padding"] * 3,
        "template",
        "image",
        *["question"] * 3,
        "template",
        "answer",
    ]


def test_without_questions_every_word_counts_as_question():
    tokenizer, inputs = prompt("user <image> What colour ?")
    spans = label(inputs, {"image": tokenizer.convert_tokens_to_ids("<image>")})
    assert named(spans[0]) == ["question", "image", "question", "question", "question"]


def test_the_last_occurrence_is_the_question():
    tokenizer, inputs = prompt("Is there a key ? user Is there a key ? assistant no")
    spans = label(inputs, {}, tokenizer, ["Is there a key ?"], ["no"])
    assert named(spans[0]) == ["template"] * 6 + ["question"] * 5 + ["template", "answer"]


def batch_of(*rows):
    batch = Batch({})
    batch.spans = torch.tensor([[SPANS.index(name) for name in row] for row in rows])
    return batch


def test_a_mask_is_where_any_of_the_kinds_is():
    batch = batch_of(["padding", "image", "question"], ["image", "image", "template"])
    assert batch.mask("image").tolist() == [[False, True, False], [True, True, False]]
    assert batch.mask("image", "question").tolist() == [[False, True, True], [True, True, False]]


def test_a_kind_that_a_sample_lacks_is_refused_with_what_there_is():
    batch = batch_of(["image", "question"], ["question", "question"])
    with pytest.raises(
        SpanError,
        match=r"1 of 2 samples have none \(in this batch: 1\); there are: image, question",
    ):
        batch.mask("image")
    with pytest.raises(SpanError, match="unknown kind"):
        batch.mask("picture")


def test_predicting_positions_start_at_the_last_of_the_prompt():
    batch = batch_of(
        ["template", "question", "answer", "answer"], ["padding", "question", "template", "answer"]
    )
    assert batch.predicting.tolist() == [[False, True, True, True], [False, False, True, True]]
