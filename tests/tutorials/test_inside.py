"""Readings of the chapter "A VLM from inside", on a tiny model and by hand."""

import pytest
import torch

from tests.support.tiny import PICTURE, PROMPTS, lively, tiny_llava
from xlvlms_tutorial import Sample, capture
from xlvlms_tutorial.tutorials import inside

SAYS = "a red key is on the grass"


@pytest.fixture(scope="module")
def vlm():
    return lively(tiny_llava())


def sample(number: int, **truth: str) -> Sample:
    return Sample(f"s{number}", PICTURE, (SAYS,), truth=truth)


def test_tokens_are_written_side_by_side_and_cut():
    assert inside.first_tokens(["a", "\n"]) == r"'a' '\n'"
    assert inside.first_tokens(["picture"] * 20, letters=7) == "'pictur"


def test_chances_are_those_of_the_lens_at_the_predicting_state(vlm):
    samples = [sample(0, colour="red"), sample(1, colour="blue"), sample(2, colour="red")]
    captions = [SAYS, SAYS, "a key"]
    chances = inside.truth_chances(vlm, samples, captions, "colour")
    states = capture(vlm, samples[:1], "all", words="red", answers=[SAYS])
    token = vlm.token_ids("red")[0]
    assert chances.shape == (1, vlm.n_layers + 1)  # one caption says its true colour
    for layer in range(vlm.n_layers + 1):
        expected = vlm.unembed(states[layer]).softmax(dim=-1)[0, token]
        torch.testing.assert_close(chances[0, layer], expected.cpu())


def test_a_factor_that_no_caption_says_has_no_rows(vlm):
    assert len(inside.truth_chances(vlm, [sample(0, colour="blue")], [SAYS], "colour")) == 0
    assert len(inside.truth_chances(vlm, [sample(0)], [SAYS], "place")) == 0


def test_places_that_are_missing_are_replaced_by_frequent_ones():
    places = ["beach", "beach", "beach", "street", "street", "snow"]
    samples = [sample(number, place=place) for number, place in enumerate(places)]
    groups = inside.groups_by_place([*samples, sample(9)], ["sand", "snow"])
    assert {place: [one.id for one in group] for place, group in groups.items()} == {
        "beach": ["s0", "s1", "s2"],
        "snow": ["s5"],
    }


def test_words_and_subjects_are_counted_in_each_row():
    samples = [sample(0, subject="key"), sample(1, subject="woman")]
    captions = {0: ["a key on snow", "a woman on sand"], "random": ["a gem on sand", "sand"]}
    counts = inside.count_words(captions, samples, ["sand", "snow"])
    assert counts.loc[0].to_dict() == {"sand": 1, "snow": 1, "subject kept": 2}
    assert counts.loc["random"].to_dict() == {"sand": 2, "snow": 0, "subject kept": 0}


def test_the_share_predicted_is_that_of_the_most_probable_tokens(vlm):
    prompts = PROMPTS[:2]
    images = [PICTURE] * 2
    batch = vlm.batch(images, prompts, ["a red key", "is there"])
    logits = vlm.forward(batch, use_cache=False).logits
    hits = []
    for row, column in batch.mask("answer").nonzero().tolist():
        token = batch["input_ids"][row, column]
        hits.append(bool(logits[row, column - 1].argmax() == token))
    assert inside.share_predicted(vlm, batch) == pytest.approx(sum(hits) / len(hits))
