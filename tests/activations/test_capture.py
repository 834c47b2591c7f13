"""Captures against each sample alone and transformers' own generation; tokens of interest.

Stores that go on; the residual stream.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from importlib import import_module
from inspect import unwrap

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support import tiny
from tests.support.tiny import PICTURE, PROMPTS, lively, spelling, tiny_llava
from tests.support.tiny_pocket import tiny_reader
from tests.support.tokenizers import fallback_tokenizer
from xlvlms_tutorial.activations.capture import capture, residual_stream
from xlvlms_tutorial.activations.rows import Selection
from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.errors import (
    DeviceMemoryError,
    InputError,
    LayerError,
    SpanError,
    StoreError,
    TokenOfInterestError,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, find_words

# the package offers a function of this name
module = import_module("xlvlms_tutorial.activations.capture")


@pytest.fixture
def vlm():
    return lively(tiny_llava())


@pytest.fixture
def six(samples):
    return samples(6)


def ask(sample):
    return PROMPTS[int(sample.id[1:]) % len(PROMPTS)]


def alone(vlm, sample, answer=None):
    """The batch of one sample and its stream (layers, t, d).

    What every capture is compared with.
    """
    batch = vlm.batch([sample.image], [ask(sample)], None if answer is None else [answer])
    return batch, residual_stream(vlm, batch)[:, 0]


def named(batch):
    return [SPANS[k] for k in batch.spans[0].tolist()]


def generated(vlm, sample, n):
    """Transformers' own generation for one sample.

    Ids, and the state that entered with each step.
    """
    batch = vlm.batch([sample.image], [ask(sample)])
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}
    out = vlm.model.generate(**batch, max_new_tokens=n, **options)
    return out.sequences[0, batch["input_ids"].shape[1] :].tolist(), out.hidden_states


def test_layers_are_transformers_hidden_states_but_for_the_last(vlm):
    inputs = vlm.batch([PICTURE] * 2, ["What colour ?", "Describe the picture ."])
    stream = residual_stream(vlm, inputs)
    theirs = vlm.model(**inputs, output_hidden_states=True).hidden_states
    assert len(stream) == vlm.n_layers + 1
    for layer in range(vlm.n_layers):
        assert torch.equal(stream[layer], theirs[layer])
    assert not torch.allclose(stream[-1], theirs[-1])
    assert torch.equal(anatomy.final_norm(vlm.model)(stream[-1]), theirs[-1])


def test_inputs_of_the_processor_do_too(vlm):
    inputs = vlm.processor(
        images=[PICTURE], text=[vlm.prompt("What colour ?")], return_tensors="pt"
    )
    assert torch.equal(
        residual_stream(vlm, inputs), residual_stream(vlm, vlm.batch([PICTURE], ["What colour ?"]))
    )


def test_hooks_are_gone_afterwards_even_after_an_error(vlm):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    vlm.blocks[2].mlp.forward = broken
    with pytest.raises(RuntimeError, match="planted"):
        residual_stream(vlm, vlm.batch([PICTURE], ["What colour ?"]))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in vlm.blocks)


def test_nan_is_named_by_its_first_layer(vlm):
    vlm.blocks[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="first at layer 2"):
        residual_stream(vlm, vlm.batch([PICTURE], ["What colour ?"]))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_a_span_is_reduced_for_each_sample_as_if_alone(vlm, six, reduce, batch_size):
    states = capture(
        vlm, six, (0, 2), span="question", reduce=reduce, prompt=ask, batch_size=batch_size
    )
    assert list(states.tensors) == [(0, "resid_post"), (2, "resid_post")]
    assert states.table.to_dict("list") == {
        "sample": list(range(6)),
        "id": [f"s{i}" for i in range(6)],
    }
    for i, sample in enumerate(six):
        batch, stream = alone(vlm, sample)
        for layer in (0, 2):
            stream_rows = [
                stream[layer, k].double()
                for k, name in enumerate(named(batch))
                if name == "question"
            ]
            expected = sum(stream_rows) / len(stream_rows) if reduce == "mean" else stream_rows[-1]
            assert torch.allclose(states[layer][i].double(), expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_without_reduction_each_position_is_a_row(vlm, six, batch_size):
    states = capture(
        vlm, six, 2, span=("image", "question"), reduce=None, prompt=ask, batch_size=batch_size
    )
    start = 0
    for i, sample in enumerate(six):
        batch, stream = alone(vlm, sample)
        kinds = named(batch)
        indices = [k for k, name in enumerate(kinds) if name in ("image", "question")]
        rows = states.table.iloc[start : start + len(indices)]
        assert (rows["sample"] == i).all()
        assert rows["position"].tolist() == indices
        assert rows["span"].tolist() == [kinds[k] for k in indices]
        assert rows["token"].tolist() == [
            vlm.tokenizer.decode([batch["input_ids"][0, k]]) for k in indices
        ]
        assert torch.allclose(
            states[2][start : start + len(indices)], stream[2, indices], atol=1e-5
        )
        start += len(indices)
    assert start == len(states)


def test_positions_are_counted_without_the_padding(vlm, six):
    states = capture(vlm, six, 1, positions=(0, 3, -1), reduce=None, prompt=ask, batch_size=6)
    assert len(states) == 18
    for i, sample in enumerate(six):
        stream = alone(vlm, sample)[1]
        assert states.table["position"][3 * i : 3 * i + 3].tolist() == [0, 3, stream.shape[1] - 1]
        assert torch.allclose(states[1][3 * i : 3 * i + 3], stream[1, [0, 3, -1]], atol=1e-5)
    single = capture(vlm, six, 1, positions=-1, prompt=ask)
    for same_one in (np.int64(-1), [np.int32(-1)]):
        again = capture(vlm, six, 1, positions=same_one, prompt=ask)
        assert torch.equal(again[1], single[1])
        assert again.provenance == single.provenance
        assert json.dumps(again.provenance)
    assert torch.allclose(single[1], states[1][2::3], atol=1e-5)


def test_all_positions_are_all_but_the_padding(vlm, six):
    states = capture(vlm, six, 1, positions="all", reduce=None, prompt=ask, batch_size=3)
    streams = [alone(vlm, sample)[1][1] for sample in six]
    assert torch.allclose(states[1], torch.cat(streams), atol=1e-5)
    assert "padding" not in set(states.table["span"])
    means = capture(vlm, six, 1, positions="all", prompt=ask)
    assert torch.allclose(means[1], torch.stack([stream.mean(0) for stream in streams]), atol=1e-5)


@pytest.mark.parametrize("number", [40, -40])
def test_a_position_outside_a_sample_says_which_there_are(vlm, six, number):
    with pytest.raises(InputError, match=f"position {number} in a sample of 15; give -15 to 14"):
        capture(vlm, six, 1, positions=number, prompt=ask)


def test_sites_inside_a_block(vlm, six):
    states = capture(
        vlm, six, (1, 2), sites=("resid_mid", "mlp_out", "resid_post", "mlp_hidden"), span="image"
    )
    assert states[2, "mlp_hidden"].shape == (6, 64)
    assert torch.allclose(
        states[2, "resid_mid"] + states[2, "mlp_out"], states[2, "resid_post"], atol=1e-5
    )


def test_given_answers_are_read_in_one_forward(vlm, six):
    answers = ["a red key", "yes", "no", "blue", "a woman on the grass", "red"]
    states = capture(vlm, six, 3, span="answer", prompt=ask, answers=answers, batch_size=4)
    again = capture(
        vlm, six, 3, span="answer", prompt=ask, answers=lambda sample: answers[int(sample.id[1:])]
    )
    assert torch.allclose(states[3], again[3], atol=1e-5)
    assert states.table["text"].tolist() == answers
    for i, (sample, answer) in enumerate(zip(six, answers, strict=True)):
        batch, stream = alone(vlm, sample, answer)
        indices = [k for k, name in enumerate(named(batch)) if name == "answer"]
        assert len(indices) == len(answer.split())
        assert torch.allclose(states[3][i], stream[3, indices].mean(0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_generated_answers_are_read_where_their_tokens_were_fed_back(vlm, six, batch_size):
    result = capture(
        vlm,
        six,
        (0, 2),
        span="answer",
        reduce=None,
        prompt=ask,
        max_new_tokens=6,
        batch_size=batch_size,
    )
    start = 0
    for i, sample in enumerate(six):
        ids, states = generated(vlm, sample, 6)
        ids = (
            ids[: ids.index(vlm.tokenizer.eos_token_id)]
            if vlm.tokenizer.eos_token_id in ids
            else ids[:-1]
        )
        rows = result.table.iloc[start : start + len(ids)]
        assert (rows["sample"] == i).all()
        assert rows["token"].tolist() == [vlm.tokenizer.decode([token]) for token in ids]
        assert rows["position"].tolist() == [states[0][0].shape[1] + k for k in range(len(ids))]
        for layer in (0, 2):
            expected = torch.cat([states[k + 1][layer][0] for k in range(len(ids))])
            assert torch.allclose(result[layer][start : start + len(ids)], expected, atol=1e-5)
        start += len(ids)
    assert start == len(result) > 12
    means = capture(vlm, six, 2, span="answer", prompt=ask, max_new_tokens=6, batch_size=batch_size)
    assert torch.allclose(means[2][3], result.select("sample == 3")[2].mean(0), atol=1e-5)


def test_prompt_and_generated_positions_together(vlm, six):
    both = capture(
        vlm,
        six,
        2,
        span=("question", "answer"),
        reduce=None,
        prompt=ask,
        max_new_tokens=4,
        batch_size=4,
    )
    question = capture(vlm, six, 2, span="question", reduce=None, prompt=ask)
    answer = capture(vlm, six, 2, span="answer", reduce=None, prompt=ask, max_new_tokens=4)
    assert both.table["position"].diff()[both.table["sample"].diff() == 0].gt(0).all()
    for name, part in (("question", question), ("answer", answer)):
        assert torch.allclose(both.select(f"span == '{name}'")[2], part[2], atol=1e-5)
    for reduce in ("mean", "last"):
        single = capture(
            vlm,
            six,
            2,
            span=("question", "answer"),
            reduce=reduce,
            prompt=ask,
            max_new_tokens=4,
            batch_size=6,
        )
        for i in range(6):
            rows = both.select(f"sample == {i}")[2].double()
            assert torch.allclose(
                single[2][i].double(), rows.mean(0) if reduce == "mean" else rows[-1], atol=1e-5
            )


def test_the_prompt_is_the_same_whether_an_answer_is_generated_or_not(vlm, six):
    read = capture(vlm, six, (1, 3), span="image", prompt=ask)
    captured = capture(vlm, six, (1, 3), span="image", prompt=ask, max_new_tokens=4)
    assert torch.allclose(read[1], captured[1], atol=1e-5)
    assert torch.allclose(read[3], captured[3], atol=1e-5)
    assert captured.table["text"].tolist() == vlm.generate(
        [sample.image for sample in six], [ask(sample) for sample in six], 4
    )
    every = capture(vlm, six, 1, positions=-1, reduce=None, prompt=ask, max_new_tokens=4)
    assert every.table["text"].tolist() == captured.table["text"].tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4},
        {"num_return_sequences": 3, "num_beams": 3},
        {"repetition_penalty": 1.9},
        {"min_length": 40},
        {"do_sample": True},
        {"return_dict_in_generate": True},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_what_is_captured_is_greedy_whatever_the_folder_says(vlm, six, setting):
    options = {"reduce": None, "prompt": ask, "max_new_tokens": 5}
    plain = capture(vlm, six, 2, span="answer", **options)
    word = plain.table["token"].iloc[2].strip()
    vlm.model.generation_config.update(**setting)
    same(capture(vlm, six, 2, span="answer", **options), plain)
    texts = vlm.generate([sample.image for sample in six], [ask(sample) for sample in six], 5)
    assert list(
        dict.fromkeys(zip(plain.table["sample"], plain.table["text"], strict=True))
    ) == list(enumerate(texts))
    assert len(capture(vlm, six, 2, words=word, prompt=ask, max_new_tokens=5)) > 0


@pytest.mark.parametrize("part", ["head", "query"])
def test_weights_that_are_no_numbers_give_no_answers(vlm, six, part):
    weight = vlm.model.lm_head.weight if part == "head" else vlm.blocks[1].self_attn.q_proj.weight
    weight.data[8, 0] = float("nan")
    for options in ({"span": "image"}, {"span": "answer"}, {"words": "red"}):
        with pytest.raises(InputError, match="logits of the next token are NaN"):
            capture(vlm, six, 1, prompt=ask, max_new_tokens=4, **options)


@pytest.fixture
def byte_speller(monkeypatch):
    """A model whose tokenizer cuts what is no letter into bytes."""

    def tokenizer():
        built = fallback_tokenizer()
        built.add_special_tokens(
            {
                "pad_token": "<pad>",
                "eos_token": "<|im_end|>",
                "additional_special_tokens": tiny.SPECIAL[2:],
            }
        )
        built.padding_side = "left"
        return built

    monkeypatch.setattr(tiny, "tiny_tokenizer", tokenizer)
    return lively(tiny_llava(), seed=2)


@pytest.mark.parametrize(
    ("answer", "word", "n"), [("a cat 🐈", "🐈", 4), ("雪", "雪", 3), ("a café", "café", 5)]
)
def test_a_character_of_several_tokens_is_captured_to_its_last(
    byte_speller, samples, answer, word, n
):
    sample, options = samples(1), {"prompt": "What is it ?", "answers": [answer]}
    rows = capture(byte_speller, sample, 2, span="answer", reduce=None, **options)
    batch = byte_speller.batch([sample[0].image], ["What is it ?"], [answer])
    stream = residual_stream(byte_speller, batch)[2, 0]
    # without the blank that is put before a text
    n_tokens = len(byte_speller.tokenizer(answer).input_ids) - 1
    assert len(rows) == n_tokens and torch.allclose(rows[2], stream[-n_tokens:], atol=1e-5)
    assert torch.allclose(
        capture(byte_speller, sample, 2, span="answer", reduce="last", **options)[2][0],
        stream[-1],
        atol=1e-5,
    )
    states = capture(byte_speller, sample, 2, words=[word], **options)
    # the position before the first byte
    assert torch.allclose(states[2][0], stream[-n - 1], atol=1e-5)
    last = capture(byte_speller, sample, 2, words=[word], side="token", **options)
    assert torch.allclose(last[2][0], stream[-1], atol=1e-5)


def test_an_answer_ends_at_the_end_mark_though_its_row_goes_on(vlm, six):
    ids, _ = generated(vlm, six[0], 6)
    vlm.model.generation_config.eos_token_id = [ids[1], 9999]
    before = ids[: ids.index(ids[1])]
    states = capture(vlm, six, 1, span="answer", reduce=None, prompt=ask, max_new_tokens=6)
    assert states.table.query("sample == 0")["token"].tolist() == [
        vlm.tokenizer.decode([token]) for token in before
    ]


def test_samples_whose_answer_is_empty_have_no_row_and_are_told_of(vlm, six):
    firsts = [generated(vlm, sample, 2)[0][0] for sample in six]
    vlm.model.generation_config.eos_token_id = firsts[0]
    ended = firsts.count(firsts[0])
    assert 0 < ended < 6
    with pytest.warns(UserWarning, match=f"{ended} of 6 samples have no such position"):
        states = capture(vlm, six, 1, span="answer", prompt=ask, max_new_tokens=4)
    assert states.table["sample"].tolist() == [i for i in range(6) if firsts[i] != firsts[0]]


def test_one_new_token_is_never_fed_back(vlm, six):
    with pytest.raises(SpanError, match="raise max_new_tokens"):
        capture(vlm, six, 1, span="answer", prompt=ask, max_new_tokens=1)


@pytest.fixture
def speller(monkeypatch):
    """A model whose tokenizer cuts words as LLaMA's does."""
    spelling(monkeypatch)
    return lively(tiny_llava(), seed=2)


def interest(vlm, samples, words, **options):
    return capture(
        vlm, samples, "all", words=words, prompt=lambda sample: f"a 1 dog {sample.id} ?", **options
    )


def test_a_generated_word_is_captured_where_it_is_predicted(speller, six):
    """The state captured at the last layer, unembedded, gives the first token of the word.

    For any word, at any place of an answer.
    """
    texts = speller.generate(
        [sample.image for sample in six], [f"a 1 dog {sample.id} ?" for sample in six], 8
    )
    words = sorted({word for text in texts for word in re.findall(r"\w+", text)})
    starts = Counter()
    for word in words:
        states = interest(speller, six, word, max_new_tokens=8, batch_size=4)
        assert states.provenance["samples_with_word"] == len(states) > 0
        logits = speller.unembed(states[3])
        logits[:, speller.model.generation_config.suppress_tokens] = -torch.inf  # as in generation
        predicted = logits.argmax(dim=-1)
        for row, token, best in zip(
            states.table.itertuples(), states.table["token_index"], predicted.tolist(), strict=True
        ):
            batch = speller.batch([six[row.sample].image], [f"a 1 dog {row.id} ?"])
            ids = speller.generate_ids(batch, 8)[0].tolist()
            part, same = find_words(speller.tokenizer, ids, [word])
            assert (token, word) == (part.start, same)
            assert best == ids[token]
            starts[min(token, 1)] += 1
    assert starts[0] and starts[1]  # first tokens, which the prompt predicts, and later ones


@pytest.mark.parametrize(
    ("answer", "words", "pieces", "word"),
    [
        # "▁" comes first before 3 and before 1
        ("a 3 dog 1", ["1"], ["▁a", "▁", "3", "▁dog", "▁", "1"], "1"),
        ("a 3 or a 1", ["3", "1"], ["▁a", "▁", "3"], "3"),
        ("cattle and a cat", ["cat"], ["▁cat", "tle", "▁a", "n", "d", "▁a", "▁cat"], "cat"),
        ("a hot Dog", ["zebra", "hot dog"], ["▁a", "▁hot"], "hot dog"),
        ("zebra", ["Zebra"], ["z"], "Zebra"),  # the bare space before it is not of the answer
        ("dog", ["dog"], ["▁dog"], "dog"),
    ],
)
def test_a_given_word_is_captured_where_it_is_predicted(
    speller, samples, answer, words, pieces, word
):
    answers = (
        ["a zebra", answer, "cattle"]
        if "zebra" not in words and "Zebra" not in words
        else ["a 3", answer, "cattle"]
    )
    states = interest(speller, samples(3), words, answers=answers)
    assert states.table.to_dict("records") == [
        {"sample": 1, "id": "s1", "text": answer, "word": word, "token_index": len(pieces) - 1}
    ]
    batch = speller.batch([samples(3)[1].image], ["a 1 dog s1 ?"], [answer])
    end = batch.mask("answer")[0].nonzero().flatten()[len(pieces) - 1]
    assert (
        speller.tokenizer.convert_ids_to_tokens(
            batch["input_ids"][0, end - len(pieces) + 1 : end + 1]
        )
        == pieces
    )
    stream = residual_stream(speller, batch)
    for layer in range(4):
        assert torch.allclose(states[layer][0], stream[layer, 0, end - 1], atol=1e-5)
    assert states.provenance["samples_with_word"] == 1


@pytest.mark.parametrize(
    ("answer", "word", "last"),
    [("a 3 dog 1", "1", 5), ("a hot Dog", "hot dog", 2), ("cattle", "cattle", 1)],
)
def test_a_given_word_is_captured_at_its_last_piece(speller, samples, answer, word, last):
    states = interest(speller, samples(3), word, answers=["a zebra", answer, "zebra"], side="token")
    assert states.table[["sample", "word", "token_index"]].to_numpy().tolist() == [[1, word, last]]
    batch = speller.batch([samples(3)[1].image], ["a 1 dog s1 ?"], [answer])
    position = batch.mask("answer")[0].nonzero().flatten()[last]
    stream = residual_stream(speller, batch)
    assert all(
        torch.allclose(states[layer][0], stream[layer, 0, position], atol=1e-5)
        for layer in range(4)
    )
    assert states.provenance["selection"] == {"words": [word], "side": "token"}


def test_a_generated_word_is_captured_at_its_last_piece_unless_it_was_never_fed(speller, six):
    """Layer 0 at a word's last piece is that piece's embedding.

    A word that ends the answer was not fed back and has no row.
    """
    options = {"max_new_tokens": 8, "batch_size": 4}
    texts = speller.generate(
        [sample.image for sample in six], [f"a 1 dog {sample.id} ?" for sample in six], 8
    )
    embedding, left_out = speller.model.get_input_embeddings().weight, 0
    for word in sorted({word for text in texts for word in re.findall(r"\w+", text)}):
        predicting = interest(speller, six, word, **options)
        try:
            states = interest(speller, six, word, side="token", **options)
        except TokenOfInterestError:
            left_out += len(predicting)
            continue
        left_out += len(predicting) - len(states)
        for row, state in zip(states.table.itertuples(), states[0], strict=True):
            batch = speller.batch([six[row.sample].image], [f"a 1 dog {row.id} ?"])
            ids = speller.generate_ids(batch, 8)[0].tolist()
            assert row.token_index == find_words(speller.tokenizer, ids, [word])[0].stop - 1 < 7
            assert torch.allclose(state, embedding[ids[row.token_index]], atol=1e-5)
    assert left_out > 0


def test_words_of_the_question_are_not_looked_for(speller, samples):
    with pytest.raises(
        TokenOfInterestError,
        match=r"'dog': in 0 of 3 samples; said instead: 'a' \(2\), 'cattle' \(1\)",
    ):
        interest(speller, samples(3), "dog", answers=["a", "cattle", "a"])


def test_words_after_the_end_mark_are_not_found(vlm, six):
    ids, _ = generated(vlm, six[0], 6)
    late = next(k for k in range(1, 6) if ids[k] not in ids[:k])
    word = vlm.tokenizer.decode([ids[late]]).strip()
    before = capture(vlm, six[:1], 1, words=word, prompt=ask, max_new_tokens=6)
    assert before.table["token_index"].tolist() == [late]
    vlm.model.generation_config.eos_token_id = ids[late - 1]
    with pytest.raises(TokenOfInterestError):
        capture(vlm, six[:1], 1, words=word, prompt=ask, max_new_tokens=6)


def test_words_never_generated_are_told_with_those_that_were(vlm, six, tmp_path):
    texts = vlm.generate([sample.image for sample in six], [ask(sample) for sample in six], 4)
    common = Counter(
        word for text in texts for word in re.findall(r"\w+", text.lower())
    ).most_common(5)
    pattern = re.escape(", ".join(f"{word!r} ({count})" for word, count in common))
    options = {"words": ["unicorn", "centaur"], "prompt": ask, "max_new_tokens": 4, "batch_size": 4}
    # in the second run all is in the store, and it looks again at the first batch
    for store in (None, tmp_path, tmp_path):
        with pytest.raises(
            TokenOfInterestError, match="'unicorn', 'centaur': in 0 of 6 samples; said instead: '"
        ) as caught:
            capture(vlm, six, 1, store=store, shard_size=2, **options)
        assert store is not None or re.search(pattern, str(caught.value))


def same(first, second):
    """The same rows and states, whatever the shards they were written in."""
    pd.testing.assert_frame_equal(first.table, second.table)
    assert first.tensors.keys() == second.tensors.keys()
    for key, states in first.tensors.items():
        assert torch.allclose(states, second.tensors[key], atol=1e-4)
    ours, theirs = (
        {k: v for k, v in states.provenance.items() if k != "shard_size"}
        for states in (first, second)
    )
    assert ours == theirs


KINDS = pytest.mark.parametrize(
    "options",
    [
        {"span": "image"},
        {"span": ("image", "question"), "reduce": None},
        {"span": "answer", "reduce": None, "max_new_tokens": 4},
        {
            "words": ["red", "key"],
            "answers": ["a red key", "yes", "no", "the key", "blue", "no", "red"],
        },
    ],
    ids="-".join,
)


@KINDS
def test_an_interrupted_capture_goes_on_where_it_was(vlm, samples, tmp_path, monkeypatch, options):
    seven, options = samples(7), {"prompt": ask, "batch_size": 2, **options}
    whole = capture(vlm, seven, (1, 3), **options)
    n_images, plain = [], vlm.batch

    def batch(images, texts, answers, names, **conversation):
        n_images.append(len(images))
        if len(n_images) == 4:
            raise KeyboardInterrupt
        return plain(images, texts, answers, names=names, **conversation)

    monkeypatch.setattr(vlm, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        capture(vlm, seven, (1, 3), store=tmp_path, shard_size=3, **options)
    n_images[:] = [0, 0, 0, 0]
    states = capture(vlm, seven, (1, 3), store=tmp_path, shard_size=3, **options)
    assert sum(n_images) == 4  # the first shard is not made again
    same(states, whole)
    n_images[:] = [0, 0, 0, 0]
    same(capture(vlm, seven, (1, 3), store=tmp_path, shard_size=3, **options), whole)
    assert sum(n_images) == 0


def test_a_damaged_shard_is_named_and_made_anew(vlm, samples, tmp_path):
    options = {"span": "image", "prompt": ask, "store": tmp_path, "shard_size": 2}
    whole = capture(vlm, samples(6), 2, **options)
    shard = tmp_path / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.warns(UserWarning, match=r"damaged .* to be made anew: shards/00001\.safetensors"):
        same(capture(vlm, samples(6), 2, **options), whole)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"layers": 1}, "layers"),
        ({"prompt": "What colour ?"}, "prompt"),
        ({"prompt": lambda sample: "What colour ?"}, "prompts_sha256"),
        ({"span": "question"}, "selection.span"),
        ({"reduce": "last"}, "reduce"),
        ({"dtype": torch.float64}, "kept_dtype"),
        ({"shard_size": 3}, "shard_size"),
        ({"answers": ["no"] * 4}, "answers"),
        ({"seed": 8}, "seed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_store_of_other_settings_is_refused(vlm, samples, tmp_path, changed, field):
    options = {
        "layers": 2,
        "span": "image",
        "prompt": ask,
        "store": tmp_path,
        "shard_size": 2,
        "seed": 7,
    }
    capture(vlm, samples(4), **options)
    with pytest.raises(StoreError, match=re.escape(f"{field} is")):
        capture(vlm, samples(4), **{**options, **changed})


def test_other_samples_or_another_model_are_refused(vlm, samples, tmp_path):
    capture(vlm, samples(4), 2, span="image", store=tmp_path)
    with pytest.raises(StoreError, match="ids_sha256"):
        capture(vlm, list(reversed(samples(4))), 2, span="image", store=tmp_path)
    vlm.name = "another"
    with pytest.raises(StoreError, match="model is 'tiny-llava' in the store and 'another' here"):
        capture(vlm, samples(4), 2, span="image", store=tmp_path)


@pytest.mark.parametrize("words", [None, "red"])
def test_processes_share_the_work_and_who_does_not_wait_gets_what_is_there(
    vlm, samples, tmp_path, monkeypatch, words
):
    answers = ["no", "no", "a red key", "red", "blue", "no", "no"]
    options = {"span": "image"} if words is None else {"words": words, "answers": answers}
    options |= {"prompt": ask, "batch_size": 2}
    whole = capture(vlm, samples(7), 2, **options)
    for rank, own_samples in ((0, [0, 1, 4, 5]), (1, [2, 3, 6])):
        monkeypatch.setattr(module, "dealt", lambda rank=rank: (rank, 2))
        states = capture(vlm, samples(7), 2, store=tmp_path, shard_size=2, wait=0, **options)
        if rank == 0:
            expected = whole.select(whole.table["sample"].isin(own_samples))
            assert states.table["sample"].tolist() == expected.table["sample"].tolist()
            assert torch.allclose(states[2], expected[2], atol=1e-6)
            assert states[2].shape[1] == 32
    same(states, whole)


def test_a_process_without_a_row_of_its_own_returns_none(vlm, samples, tmp_path, monkeypatch):
    for rank, rows in ((1, [1]), (0, []), (2, [1, 2])):
        monkeypatch.setattr(module, "dealt", lambda rank=rank: (rank, 3))
        options = {
            "words": "red",
            "answers": ["no", "red", "a red key"],
            "store": tmp_path,
            "shard_size": 1,
            "wait": 0,
        }
        states = capture(vlm, samples(3), 2, **options)
        assert states.table["sample"].tolist() == rows
        assert states[2].shape == (len(rows), 32)


def spoiled(vlm, monkeypatch, layer, red):
    """NaN leaves a block for the sample whose picture has this red channel."""
    values = vlm.processor(
        images=[Image.new("RGB", (8, 8), (red, 0, 0))], text=["<image>"], return_tensors="pt"
    )["pixel_values"]
    plain = vlm.blocks[layer - 1].forward

    def forward(states, *rest, **named):
        output = plain(states, *rest, **named).clone()
        for row, pixels in enumerate(vlm.running["pixel_values"]):
            if torch.equal(pixels, values[0]):
                output[row, -2] = float("nan")
        return output

    monkeypatch.setattr(vlm.blocks[layer - 1], "forward", forward)


def test_nan_names_the_first_layer_and_the_sample(vlm, six, monkeypatch):
    spoiled(vlm, monkeypatch, 2, red=5)
    with pytest.raises(InputError, match="first at layer 2, sample 5, position 14"):
        capture(vlm, six, "all", positions="all", reduce=None, prompt=ask, batch_size=4)
    with pytest.raises(InputError, match="first at layer 2, sample 5;"):
        capture(vlm, six, "all", positions="all", prompt=ask, batch_size=4)
    with pytest.raises(InputError, match="first at layer 3, sample 5;"):
        capture(vlm, six, (1, 3), positions=-1, prompt=ask)
    clean = capture(vlm, six, (1, 2), positions=-1, prompt=ask)  # what is not kept may be anything
    assert torch.isfinite(clean[2]).all()


def test_a_number_too_large_for_the_format_is_not_kept(vlm, six):
    vlm.blocks[1].mlp.down_proj.weight.data.mul_(1e5)
    assert torch.isfinite(capture(vlm, six, (1, 2), span="image")[2]).all()
    with pytest.raises(InputError, match="first at layer 2, sample 0"):
        capture(vlm, six, (1, 2), span="image", dtype=torch.float16)


def test_shards_before_an_error_are_safe(vlm, six, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        spoiled(vlm, patch, 2, red=5)
        with pytest.raises(InputError):
            capture(vlm, six, 2, positions="all", store=tmp_path, shard_size=2)
    assert len(list((tmp_path / "index").iterdir())) == 2
    same(
        capture(vlm, six, 2, positions="all", store=tmp_path, shard_size=2),
        capture(vlm, six, 2, positions="all"),
    )


def test_a_full_device_says_what_to_lower(vlm, six, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(vlm.blocks[1].mlp, "forward", full)
    with pytest.raises(DeviceMemoryError, match=r"lower batch_size \(now 4\)"):
        capture(vlm, six, 2, span="image", batch_size=4)


@pytest.mark.parametrize("answers", [None, ["red"] * 6])
def test_later_blocks_and_the_unembedding_do_not_run(vlm, six, answers):
    ran = Counter()
    for k, block in enumerate(vlm.blocks, 1):
        block.register_forward_pre_hook(lambda m, a, k=k: ran.update([k]))
    anatomy.unembedding(vlm.model).register_forward_pre_hook(
        lambda m, a: ran.update(["unembedding"])
    )
    capture(vlm, six, (1, 2), span="image", answers=answers, batch_size=2)
    assert ran == {1: 3, 2: 3}


def test_what_is_kept_has_storage_of_its_own_size(vlm, six):
    for options in (
        {"span": "image"},
        {"positions": "all", "reduce": None},
        {"words": "red", "answers": ["red"] * 6},
    ):
        for batch_size in (2, 16):
            for states in capture(
                vlm, six, "all", batch_size=batch_size, **options
            ).tensors.values():
                assert states.untyped_storage().nbytes() == states.nbytes
                assert states.dtype == torch.float32 and not states.requires_grad


def test_states_are_kept_in_the_format_asked_for(vlm, six):
    wide, half = (
        capture(vlm, six, 2, span="image", dtype=dtype)[2]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, wide.to(torch.bfloat16))
    low_precision = capture(vlm, six, 2, span="answer", max_new_tokens=4, dtype=torch.bfloat16)[2]
    assert torch.equal(
        low_precision, capture(vlm, six, 2, span="answer", max_new_tokens=4)[2].to(torch.bfloat16)
    )


def test_provenance_says_how_all_was_made(vlm, six):
    captured = capture(
        vlm,
        iter(six),
        range(1, 3),
        sites="mlp_out",
        span="image",
        prompt=ask,
        max_new_tokens=3,
        seed=11,
    ).provenance
    expected = {
        "model": "tiny-llava",
        "revision": None,
        "dtype": "torch.float32",
        "kept_dtype": "torch.float32",
        "interventions": [],
        "prompt": "ask",
        "layers": [1, 2],
        "sites": ["mlp_out"],
        "selection": {"span": ["image"]},
        "reduce": "mean",
        "max_new_tokens": 3,
        "answers": "generated",
        "seed": 11,
        "n_samples": 6,
    }
    assert {name: captured[name] for name in expected} == expected
    assert set(captured["versions"]) == {"torch", "transformers", "xlvlms_tutorial"}
    assert all(
        re.fullmatch("[0-9a-f]{64}", captured[name]) for name in ("ids_sha256", "prompts_sha256")
    )
    assert json.loads(json.dumps(captured)) == captured


@pytest.mark.parametrize(
    ("dataset", "kind", "prompt"),
    [
        ("scenes", "image", "Describe the picture."),
        ("clips", "video", "Describe the video."),
        ("sounds", "audio", "Describe the sound."),
    ],
)
def test_clips_and_sounds_are_captured_and_asked_for_as_what_they_are(dataset, kind, prompt):
    vlm, samples = lively(tiny_reader()), load_samples(dataset, n=3)
    states = capture(vlm, samples, (0, 2), span=kind, batch_size=2)
    assert states.provenance["prompt"] == prompt
    assert states.provenance["selection"] == {"span": [kind]}
    for i, sample in enumerate(samples):
        batch = vlm.batch_of([sample], [prompt])
        stream = residual_stream(vlm, batch)[:, 0]
        for layer in (0, 2):
            assert torch.allclose(
                states[layer][i], stream[layer][batch.mask(kind)[0]].mean(0), atol=1e-5
            )
    assert not torch.allclose(states[2][0], states[2][1], atol=1e-3)
    rows = capture(vlm, samples, 2, span=kind, reduce=None)
    assert len(rows) == 3 * (16 if kind == "video" else 4) and set(rows.table["span"]) == {kind}
    answered = capture(vlm, samples, 2, span=kind, max_new_tokens=3, prompt="What is this ?")
    assert answered.provenance["prompt"] == "What is this ?"
    assert answered.provenance["prompts_sha256"] != states.provenance["prompts_sha256"]


def test_spans_that_these_samples_do_not_have_are_refused():
    vlm = tiny_reader()
    with pytest.raises(SpanError, match="'image': 2 of 2 samples have none"):
        capture(vlm, load_samples("clips", n=2), 1, span="image")
    with pytest.raises(SpanError, match="'video': this model takes none"):
        capture(vlm, load_samples("sounds", n=2), 1, span="video")


def test_samples_of_several_modalities_are_not_captured_together():
    mixed = [load_samples(dataset, n=1)[0] for dataset in ("clips", "sounds")]
    with pytest.raises(InputError, match="samples of modality video, audio"):
        capture(tiny_reader(), mixed, 1, positions=-1)


def test_progress_is_counted_in_samples(vlm, six, capsys, tmp_path):
    capture(vlm, six, 1, span="image", batch_size=4)
    assert "capture" not in capsys.readouterr().err
    capture(vlm, six, 1, span="image", batch_size=4, progress=True)
    assert "/6" in capsys.readouterr().err
    capture(vlm, six, 1, span="image", store=tmp_path, progress=True)
    assert re.search(r"/6 .*sample", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no positions given; give exactly one of span, positions, words"),
        ({"span": "image", "positions": 0}, "span and positions given"),
        ({"span": "image", "words": "red", "max_new_tokens": 3}, "span and words given"),
        ({"span": ()}, "span is empty"),
        ({"positions": []}, "positions is empty"),
        ({"positions": "some"}, "unknown positions 'some'"),
        ({"words": [], "max_new_tokens": 3}, "words is empty"),
        ({"words": ["red", " "], "max_new_tokens": 3}, "none of them empty"),
        ({"words": "red"}, "words without answers"),
        (
            {"words": "red", "max_new_tokens": 3, "side": "end"},
            "side='end'; allowed: 'predicting', 'token', with words",
        ),
        (
            {"span": "image", "side": "token"},
            "side='token' without words; allowed: 'predicting', 'token', with words",
        ),
        (
            {"span": "image", "answers": ["no"] * 6, "max_new_tokens": 3},
            "answers and max_new_tokens given",
        ),
        ({"span": "image", "reduce": "sum"}, "unknown reduction 'sum'"),
        ({"span": "image", "dtype": torch.int8}, "cannot be kept as torch.int8"),
        ({"span": "image", "batch_size": 0}, "batch_size is 0"),
        ({"span": "answer", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"span": "image", "layers": []}, "no layers"),
        ({"span": "image", "sites": "lunch"}, "unknown site 'lunch'"),
        ({"span": "image", "samples": []}, "no samples"),
        ({"span": "image", "store": "here", "shard_size": 0}, "at least 1 in a shard"),
    ],
)
def test_what_is_not_said_in_one_clear_way_is_refused(vlm, six, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        capture(vlm, **{"samples": six, "layers": 1, **options})


def test_one_sample_is_no_list_of_samples(vlm, six):
    with pytest.raises(InputError, match="one sample; give a list of samples"):
        unwrap(capture)(vlm, six[0], 1, span="image")
    with pytest.raises(InputError, match=r"positions \[1.5\]; give whole numbers"):
        unwrap(Selection.of)(1, ("resid_post",), None, [1.5], None, None, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {
                "prompt": lambda sample: (
                    "What does <image> mean ?" if sample.id == "s4" else "What ?"
                )
            },
            "<image> mean ? (sample 's4')",
        ),
        (
            {"prompt": "What ?", "answers": ["no"] * 3 + ["an <image>"] + ["no"] * 2},
            "an <image> (sample 's3')",
        ),
        (
            {"prompt": lambda sample: "" if sample.id == "s5" else "What ?"},
            "cannot make a prompt from ''",
        ),
        ({"prompt": "What ?", "answers": lambda sample: 2}, "cannot make a prompt from 2"),
    ],
    ids=["mark", "mark in an answer", "empty", "number"],
)
def test_a_text_that_is_no_prompt_is_refused_before_anything_runs(
    vlm, six, options, message, monkeypatch
):
    monkeypatch.setattr(vlm, "batch", lambda *_, **__: pytest.fail("a batch was made"))
    with pytest.raises(InputError, match=re.escape(message)):
        capture(vlm, six, 1, positions=-1, **options)


def test_lists_of_other_lengths_layers_and_spans_that_are_not_there(vlm, six):
    with pytest.raises(InputError, match="samples: 6, answers: 2"):
        capture(vlm, six, 1, span="image", answers=["no", "no"])
    with pytest.raises(LayerError, match="layer 4 is not one of 0 to 3"):
        capture(vlm, six, (1, 4), span="image")
    with pytest.raises(SpanError, match="there are: template, image, question"):
        capture(vlm, six, 1, span="answer", prompt=ask)
    with pytest.raises(SpanError, match="unknown kind"):
        capture(vlm, six, 1, span="picture")
    with pytest.raises(SpanError, match="samples have none"):
        capture(vlm, six, 1, words="red", answers=["red", "", "red", "red", "red", "red"])


def test_a_changed_model_does_not_add_to_the_store_of_the_plain_one(vlm, samples, tmp_path):
    from xlvlms_tutorial import interventions

    capture(vlm, samples(2), 1, span="image", store=tmp_path / "store")
    with (
        interventions.skip(vlm, 1),
        pytest.raises(StoreError, match=r"interventions.*skip\(layers=1, part='block'"),
    ):
        capture(vlm, samples(2), 1, span="image", store=tmp_path / "store")


@pytest.mark.parametrize("layers", ["all", 2])
def test_questions_about_one_picture_share_what_they_begin_with(vlm, six, layers, monkeypatch):
    texts = [PROMPTS[number % len(PROMPTS)] for number in range(9)]
    asked = [replace(six[number % 3], id=f"{number}") for number in range(9)]
    rows = []
    tower = anatomy.tower(vlm.model)
    encode = tower.forward

    def counted(pixel_values, **options):
        rows.append(len(pixel_values))
        return encode(pixel_values, **options)

    monkeypatch.setattr(tower, "forward", counted)
    options = {"positions": -1, "prompt": lambda sample: texts[int(sample.id)], "batch_size": 6}
    shared = capture(vlm, asked, layers, **options)
    assert rows == [3, 3]  # each picture of a batch once
    for number, sample in enumerate(asked):
        alone = residual_stream(vlm, vlm.batch([sample.image], [texts[number]]))[:, 0, -1]
        for (layer, _), states in shared.tensors.items():
            torch.testing.assert_close(states[number], alone[layer], rtol=1e-4, atol=1e-5)
