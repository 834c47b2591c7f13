"""Conversations: pictures in any number, earlier turns and a system prompt, as one prompt alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import tiny_llava
from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial import interventions
from xlvlms_tutorial.activations import capture
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.errors import InputError, InterventionError, SpanError
from xlvlms_tutorial.methods.decoding import ICD, VCD
from xlvlms_tutorial.models import Turn, batches
from xlvlms_tutorial.models.prompts import require_texts
from xlvlms_tutorial.models.spans import SPANS, run_lengths
from xlvlms_tutorial.models.turns import conversations_of

RED, BLUE, GREEN = (
    Image.new("RGB", size, colour)
    for size, colour in [((40, 30), "red"), ((30, 60), "blue"), ((90, 20), "green")]
)
TEXTS = ["What colour is the key ?", "Is there a woman ?", "Describe the picture ."]
SHOWN = [[RED, BLUE], [GREEN], []]
HISTORY = [[], [Turn(RED, "What colour ?", "red"), Turn((), "Is there a key ?", "no")], []]


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


def tokens(vlm, batch, name: str, row: int = 0) -> str:
    mask = batch.mask(name)[row]
    return vlm.tokenizer.decode(batch["input_ids"][row][mask]).strip()


def test_pictures_of_different_number_in_one_batch_are_those_of_each_prompt_alone(vlm):
    batch = vlm.batch(SHOWN, TEXTS, history=HISTORY)
    logits = vlm.forward(batch).logits[:, -1]
    answers = vlm.generate(SHOWN, TEXTS, 3, history=HISTORY)
    for row, text in enumerate(TEXTS):
        alone = vlm.batch([SHOWN[row]], [text], history=[HISTORY[row]])
        n = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -n:], alone["input_ids"][0])
        assert torch.equal(batch.numbers[row, -n:], alone.numbers[0])
        torch.testing.assert_close(vlm.forward(alone).logits[0, -1], logits[row])
        assert vlm.generate([SHOWN[row]], [text], 3, history=[HISTORY[row]]) == [answers[row]]
    assert (batch.spans == SPANS.index("image")).sum(dim=1).tolist() == [8, 8, 0]


def test_one_picture_in_a_list_is_that_picture(vlm):
    listed, plain = vlm.batch([[RED], (BLUE,)], TEXTS[:2]), vlm.batch([RED, BLUE], TEXTS[:2])
    for name in plain:
        assert torch.equal(listed[name], plain[name])
    assert torch.equal(listed.spans, plain.spans) and listed.single and plain.single
    assert torch.equal(plain.mask("image 1"), plain.mask("image"))
    nothing = vlm.batch([None, []], TEXTS[:2])
    assert torch.equal(nothing["input_ids"], vlm.batch(None, TEXTS[:2])["input_ids"])


def test_every_part_of_a_conversation_has_its_span(vlm):
    history = [[Turn([RED, BLUE], "What colour ?", "a"), Turn(None, "Is there a key ?", "no")]]
    batch = vlm.batch([GREEN], ["What ?"], ["red"], history=history, system="Describe .")
    expected = {
        "system": "Describe .",
        "demonstration 1": "What colour ?",
        "demonstration answer 1": "a",
        "demonstration 2": "Is there a key ?",
        "demonstration answer 2": "no",
        "question": "What ?",
        "answer": "red",
    }
    for name, text in expected.items():
        assert tokens(vlm, batch, name) == text, name
    pictures = [batch.mask(f"image {number}")[0].nonzero().flatten() for number in (1, 2, 3)]
    assert [len(places) for places in pictures] == [4, 4, 4]
    assert torch.cat(pictures).tolist() == batch.mask("image")[0].nonzero().flatten().tolist()
    table = vlm.spans([GREEN], ["What ?"], history=history)
    assert table.columns.tolist()[-1] == "number" and table["number"].max() == 3
    assert "number" not in vlm.spans([GREEN], ["What ?"])


def test_a_system_prompt_stands_before_a_single_picture_too(vlm):
    batch = vlm.batch([RED], TEXTS[:1], system="Describe .")
    assert tokens(vlm, batch, "system") == "Describe ." and batch.single
    same = vlm.generate([RED] * 2, TEXTS[:2], 2, system="Describe .")
    assert same == [vlm.generate([RED], [text], 2, system="Describe .")[0] for text in TEXTS[:2]]


def test_a_turn_without_an_answer_goes_on_with_the_next(vlm):
    joined = vlm.prompt("What ?", media=(), history=[((), "Is there a key ?", "")])
    assert joined.count("<|im_start|>user") == 1 and "Is there a key ?\nWhat ?" in joined
    bare = vlm.batch([RED], ["What ?"], history=[[(BLUE, "", "")]])
    assert bare.mask("image").sum() == 8


def test_without_a_template_turns_are_lines_and_texts_say_where_pictures_go():
    vlm = tiny_llava()
    vlm.processor.chat_template = None
    history = [[Turn(RED, "<image> What colour ?", "red")]]
    assert vlm.prompt("What ?", history=history[0]) == "<image> What colour ? red\nWhat ?"
    batch = vlm.batch([BLUE], ["<image> What ?"], history=history)
    assert tokens(vlm, batch, "demonstration 1") == "What colour ?"
    assert tokens(vlm, batch, "question") == "What ?"
    assert batch.mask("image 2").sum() == 4


@pytest.mark.parametrize(("n", "places"), [(1, 2), (2, 1), (2, 3)])
def test_more_pictures_than_places_and_the_reverse_are_refused(n, places):
    vlm = tiny_llava()
    vlm.processor.chat_template = None
    good = ([RED], "<image> What ?")
    text = "<image> " * places + "What ?"
    with pytest.raises(
        InputError,
        match=rf"{n} pictures and {places} places for them in the prompt of sample 'b'.*'<image>'",
    ):
        vlm.batch([good[0], [RED] * n], [good[1], text], names=["a", "b"])
    # a processor counts over the batch alone: these two would share their pictures
    with pytest.raises(InputError, match="2 pictures and 1 places .* sample 0"):
        vlm.batch([[RED, BLUE], []], ["<image> What ?", "<image> What ?"])


def test_a_template_with_one_place_for_all_pictures_is_refused():
    vlm = tiny_llava()
    vlm.processor.chat_template = (
        "<image>{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    assert len(vlm.batch([RED], ["What ?"])["input_ids"]) == 1
    with pytest.raises(InputError, match="2 pictures and 1 places .* chat template has to write"):
        vlm.batch([[RED, BLUE]], ["What ?"])


def test_a_template_that_leaves_a_turn_out_is_refused():
    vlm = tiny_llava()
    vlm.processor.chat_template = "<image>{{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(InputError, match="leaves out the system of a conversation"):
        vlm.batch([RED], ["What ?"], system="Describe .")
    with pytest.raises(InputError, match="leaves out the demonstration of a conversation"):
        vlm.batch([RED], ["What ?"], history=[[((), "Is there ?", "no")]])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "equally many|1 texts, 0 history|differ"),
        (5, "int as history"),
        ("What ?", "str as history"),
        ([["What ?"]], "'What .' as an earlier turn; give Turn"),
        ([[(RED, "What ?")]], "as an earlier turn; give Turn"),
        ([[(RED, None, "red")]], "as texts"),
        ([[((), " ", "red")]], "an earlier turn that shows and asks nothing"),
        ([[(5, "What ?", "red")]], "int is not a picture"),
        ([[((), "What <image> ?", "red")]], "marks the place of a picture"),
        ([[((), "What ?", "<image>")]], "marks the place of a picture"),
    ],
)
def test_what_is_no_history_is_refused(history, message):
    vlm = tiny_llava()
    with pytest.raises(InputError, match=message):
        conversations = conversations_of(["What ?"], None, history, None)
        require_texts(vlm.processor, ["What ?"], conversations=conversations)


@pytest.mark.parametrize("system", ["", " "])
def test_an_empty_system_prompt_is_refused(vlm, system):
    with pytest.raises(InputError, match="a system prompt"):
        vlm.batch([RED], ["What ?"], system=system)


# reading and changing


def test_states_at_one_picture_are_captured_and_changed(vlm):
    samples = [Sample("a", [RED, BLUE]), Sample("b", [GREEN, RED])]
    states = capture(vlm, samples, [1, 2], span="image 2", reduce=None, prompt="What ?")
    batch = vlm.batch([[RED, BLUE], [GREEN, RED]], ["What ?"] * 2)
    mask = batch.mask("image 2")
    hidden = vlm.forward(batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[2], hidden[2][mask])
    vector = torch.linspace(-1, 1, vlm.width)
    with interventions.add(vlm, vector, 1, positions="image 2"):
        changed = vlm.forward(batch, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(changed[mask], hidden[1][mask] + vector)
    assert torch.equal(changed[~mask], hidden[1][~mask])
    with interventions.skip_tokens(vlm, [2], span="image 2"):
        skipped = vlm.forward(batch, output_hidden_states=True).hidden_states[2]
    assert torch.equal((skipped != hidden[2]).any(-1) & ~mask, torch.zeros_like(mask))
    with pytest.raises(SpanError, match="'image 3': 2 of 2 samples have none"):
        capture(vlm, samples, 1, span="image 3", prompt="What ?")
    for unknown in ("image 0", "image two", "question 1", "images"):
        with pytest.raises((SpanError, InterventionError), match="unknown"):
            batch.mask(unknown)
        with (
            pytest.raises((SpanError, InterventionError), match="unknown"),
            interventions.add(vlm, vector, 1, positions=unknown),
        ):
            vlm.forward(batch)


def test_a_capture_of_conversations_reads_their_parts_and_says_so(vlm):
    samples = [Sample("a", GREEN), Sample("b", [])]
    history = [[Turn(RED, "What colour ?", "red")], [Turn(BLUE, "Is there ?", "no")]]
    states = capture(vlm, samples, 2, span="demonstration answer", prompt="What ?", history=history)
    batch = vlm.batch([[GREEN], []], ["What ?"] * 2, history=history)
    hidden = vlm.forward(batch, output_hidden_states=True).hidden_states[2]
    mask = batch.mask("demonstration answer")
    for row in (0, 1):
        torch.testing.assert_close(states[2][row], hidden[row][mask[row]].mean(0))
    by_function = capture(
        vlm,
        samples,
        2,
        span="demonstration answer",
        prompt="What ?",
        history=lambda sample: history["ab".index(sample.id)],
        system="Describe .",
    )
    assert by_function.provenance["system"] == "Describe ."
    assert by_function.provenance["history_sha256"] == states.provenance["history_sha256"]
    other = [[Turn(GREEN, "What colour ?", "red")], history[1]]
    again = capture(vlm, samples, 2, span="question", prompt="What ?", history=other)
    assert again.provenance["history_sha256"] != states.provenance["history_sha256"]
    assert not {"history_sha256", "system"} & set(
        capture(vlm, samples[:1], 2, span="question", prompt="What ?").provenance
    )


def test_last_positions_of_prompts_with_two_pictures_are_not_shared(vlm):
    """One picture a row would be taken for the first ones."""
    samples = [Sample("a", [RED, BLUE]), Sample("b", [RED, GREEN]), Sample("c", [])]
    states = capture(vlm, samples, 2, positions=-1, prompt="What ?")
    for row, sample in enumerate(samples):
        alone = capture(vlm, [sample], 2, positions=-1, prompt="What ?")
        torch.testing.assert_close(states[2][row], alone[2][0])


def test_batches_of_samples_take_turns(vlm):
    samples = [Sample("a", [RED, BLUE]), Sample("b", GREEN), Sample("c", [])]
    made = list(batches(vlm, samples, "What ?", batch_size=2, history=HISTORY, system="Describe ."))
    assert [len(batch["input_ids"]) for batch in made] == [2, 1]
    assert tokens(vlm, made[0], "question", 1) == "What ?" and not made[0].single
    with pytest.raises(InputError, match="earlier turns"):
        batches(vlm, ["What ?"], history=[[]])
    with pytest.raises(InputError, match="history"):
        batches(vlm, samples, "What ?", history=HISTORY[:2])


@pytest.mark.parametrize("decoding", [VCD(), ICD()])
def test_contrastive_decoding_reads_the_same_conversation(vlm, decoding):
    answers = vlm.generate(SHOWN[:2], TEXTS[:2], 3, history=HISTORY[:2], decoding=decoding)
    alone = vlm.generate(SHOWN[:1], TEXTS[:1], 3, history=HISTORY[:1], decoding=decoding)
    assert len(answers) == 2 and answers[0] == alone[0]


def test_the_pocket_reads_several_pictures_and_still_clips():
    vlm = tiny_reader()
    batch = vlm.batch([[RED, BLUE], GREEN], TEXTS[:2])
    assert batch.mask("image").sum(dim=1).tolist() == [8, 4]
    clip = vlm.batch(None, TEXTS[:1], videos=[[RED, BLUE]], history=[[((), "What ?", "red")]])
    assert clip.mask("video").sum() == 16 and clip.mask("demonstration answer 1").sum() == 1


def test_lengths_of_runs():
    assert run_lengths(torch.tensor([9, 9, 1, 9, 2, 2, 9]), 9) == [2, 1, 1]
    assert run_lengths(torch.tensor([1, 2]), 9) == []


def test_a_sample_of_several_pictures_has_them_as_its_content():
    sample = Sample("a", [RED, np.asarray(BLUE)])
    assert [picture.size for picture in sample.content] == [(40, 30), (30, 60)]
    with pytest.raises(InputError, match="list is not a picture"):
        _ = sample.image
