"""Ways to decode presence questions: hand-made answers, closed forms, whole forwards."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from tests.support.tiny import PROMPTS, lively, tiny_llava
from xlvlms_tutorial.activations.capture import capture
from xlvlms_tutorial.methods.decoding import VCD, contrast, distorted
from xlvlms_tutorial.metrics import chair
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials import Experiment, hallucination


def questions(answers):
    return tuple(
        Question("presence", "Is there a bee?", answer, "bee", "random") for answer in answers
    )


def made(answers, scenes=None):
    scenes = scenes or [f"s{k}" for k in range(len(answers))]
    return hallucination.Quiz(
        scenes, [Image.new("RGB", (8, 8))] * len(answers), list(questions(answers))
    )


def test_a_quiz_has_the_presence_questions_of_all_samples(samples):
    asked = hallucination.quiz(samples(4))
    assert len(asked) == 8
    assert asked.scenes == ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]
    assert asked.present.tolist() == [True, False] * 4
    assert asked.images[2] is asked.images[3]
    assert len(hallucination.quiz([Sample("bare", Image.new("RGB", (8, 8)))])) == 0


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_read_first_is_a_whole_forward_whatever_pictures_share(noise):
    vlm = lively(tiny_llava())
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    images = [pictures[k] for k in (0, 0, 1, 1)]
    reading = hallucination.read_first(vlm, images, PROMPTS, noise, batch_size=3)
    batch = vlm.batch(images, PROMPTS)
    expected = vlm.forward(distorted(batch, noise) if noise else batch).logits[:, -1]
    torch.testing.assert_close(reading.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vlm.unembed(reading.states), expected, rtol=1e-4, atol=1e-4)
    if not noise:
        made_samples = [Sample(str(k), image) for k, image in enumerate(images)]
        prompt_of = {sample.id: text for sample, text in zip(made_samples, PROMPTS, strict=True)}
        states = capture(
            vlm,
            made_samples,
            vlm.n_layers,
            positions=-1,
            prompt=lambda sample: prompt_of[sample.id],
        )
        expected_states = states[vlm.n_layers]
        torch.testing.assert_close(reading.states, expected_states, rtol=1e-4, atol=1e-4)


def test_logits_that_were_read_answer_as_generation_does():
    vlm = lively(tiny_llava())
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "red", "green")]
    plain = hallucination.read_first(vlm, images, PROMPTS)
    noisy = hallucination.read_first(vlm, images, PROMPTS, noise=0.9)
    for reading in (plain, noisy):
        reading.logits[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
    for alpha in (0.0, 1.0, 3.0):
        logits = contrast(plain.logits, noisy.logits.nan_to_num(), alpha, 0.05)
        words = hallucination.first_words(vlm, logits)
        decoding = VCD(alpha, 0.05, noise=0.9)
        assert words == vlm.generate(images, PROMPTS, 1, decoding=decoding)


def test_a_matched_threshold_says_yes_as_often():
    gaps = np.random.default_rng(0).normal(size=40)
    for ratio in (0.0, 0.1, 0.5, 0.975, 1.0):
        threshold = hallucination.matched_threshold(gaps, ratio)
        answers = hallucination.by_threshold(gaps, threshold)
        assert answers.count("yes") == round(ratio * 40)


def test_the_published_f1_is_that_of_matches_and_not_of_yes():
    answers = ["yes", "yes", "no", "no", "no", "no"]
    said = ["yes", "no", "no", "no", "yes", "snow"]
    row = hallucination.score(made(answers), said).loc["overall"]
    match = np.array([a == b for a, b in zip(answers, said, strict=True)])
    assert row["published F1"] == pytest.approx(f1_score(np.ones(6, bool), match))
    yes = np.array(said) == "yes"
    assert row["f1"] == pytest.approx(f1_score(np.array(answers) == "yes", yes))
    assert row["published F1"] > row["f1"]


def test_gains_are_differences_of_f1():
    truth = ["yes", "no"] * 10
    first, second = ["yes", "yes"] * 10, ["no", "yes"] * 10
    gain = hallucination.f1_gain(made(truth), first, second)
    assert gain.value == pytest.approx(2 / 3)
    assert gain.low <= gain.value <= gain.high
    assert hallucination.f1_gain(made(truth), first, first).value == 0
    candidates = {0.5: second, 1.0: truth, 2.0: first}
    best, scores = hallucination.best_on_validation(made(truth), candidates)
    assert best == 1.0
    assert scores.tolist() == pytest.approx([0, 1, 2 / 3])


def test_the_curve_has_the_scores_of_every_threshold():
    rng = np.random.default_rng(1)
    truth, gaps = rng.choice(["yes", "no"], 30).tolist(), rng.normal(size=30)
    curve = hallucination.threshold_curve(made(truth), gaps)
    for row, threshold in zip(curve.itertuples(), np.sort(gaps)[::-1], strict=True):
        yes = gaps >= threshold
        present = np.array(truth) == "yes"
        assert row.yes_ratio == pytest.approx(yes.mean())
        assert row.precision == pytest.approx(precision_score(present, yes))
        assert row.recall == pytest.approx(recall_score(present, yes))


def test_the_gain_of_captions_is_a_difference_of_chair():
    picture = Image.new("RGB", (8, 8))
    truth = [{"subject": "frog", "item": "key"}, {"subject": "bee", "item": "box"}] * 3
    scenes = [Sample(str(k), picture, truth=facts) for k, facts in enumerate(truth)]
    before = ["a frog and a bee", "a bee with a key", "a box", "a bee", "a frog", "nothing"]
    after = ["a frog and a key", "a bee with a key", "a frog", "a bee", "a frog", "nothing"]
    gain = hallucination.captions_gain(scenes, after, before)
    present = [{"frog", "key"}, {"bee", "box"}] * 3
    words = ["frog", "key", "bee", "box"]
    values = [chair(texts, present, words).loc["CHAIR_i", "value"] for texts in (before, after)]
    assert gain.value == pytest.approx(values[0] - values[1])
    assert hallucination.captions_gain(scenes, ["nothing"] * 6, before) is None
    assert hallucination.captions_gain([Sample("bare", picture)], ["a frog"], ["a bee"]) is None


def test_answers_are_marked_where_they_are_wrong():
    asked = made(["yes", "no", "yes"])
    lines = hallucination.marked_answers(asked, [0, 1, 2], ["yes", "Yes.", "snow"])
    assert lines == ["yes", "Yes. (wrong: it is not there)", "snow (wrong: it is there)"]


def test_the_gap_is_that_of_the_likeliest_forms():
    vlm = tiny_llava()
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    logits = torch.zeros(2, len(vlm.tokenizer))
    logits[0, yes], logits[0, no], logits[1, no] = 2.5, 1.0, 4.0
    assert hallucination.yes_gap(vlm, logits).tolist() == [1.5, -4.0]


def test_thresholds_try_every_number_of_yes():
    gaps = np.array([0.3, -1.0, 2.0, 0.1])
    answers = hallucination.thresholds(gaps)
    assert [words.count("yes") for words in answers.values()] == [1, 2, 3, 4]
    assert list(answers.values())[1] == ["yes", "no", "yes", "no"]


def test_rates_are_those_of_pope():
    rng = np.random.default_rng(2)
    truth, said = rng.choice(["yes", "no"], (2, 25)).tolist()
    row = hallucination.score(made(truth), said).loc["overall"]
    for name, value in hallucination.rates(made(truth), said).items():
        assert value == pytest.approx(row[name])
    assert np.isnan(hallucination.rates(made(["no"]), ["no"])["recall"])


def test_a_path_begins_with_greedy_answers_and_ends_where_the_contrast_leads():
    vlm = tiny_llava()
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    logits = torch.full((2, len(vlm.tokenizer)), -50.0)
    logits[:, yes], logits[:, no] = 0.0, 1.0
    disturbed = logits.clone()
    disturbed[:, no] = 3.0  # the second branch says no more loudly, so the contrast says yes
    path = hallucination.paths(made(["yes", "no"]), logits, {"VCD": disturbed}, vlm, (0, 1), 0.1)
    assert path["VCD"]["yes_ratio"].tolist() == [0.0, 1.0]
    cut = hallucination.paths(made(["yes", "no"]), logits, {"VCD": disturbed}, vlm, (0, 1), 1.0)
    assert cut["VCD"]["yes_ratio"].tolist() == [0.0, 0.0]


def test_the_table_of_chair_has_a_row_for_each_set_of_captions():
    scene = Sample("s", Image.new("RGB", (8, 8)), truth={"subject": "frog", "item": "key"})
    scenes = [scene, Sample("t", scene.source, truth={"subject": "bee"})]
    table = hallucination.chair_table(scenes, {"a": ["a frog", "a frog"], "b": ["a key", "a bee"]})
    assert table["CHAIR_i"].to_dict() == {"a": 0.5, "b": 0.0}
    assert table["CHAIR_s"].to_dict() == {"a": 0.5, "b": 0.0}
    assert hallucination.chair_table([Sample("u", scene.source)], {"a": ["a frog"]}).empty


def test_shares_are_disjoint_and_a_third_at_most(samples):
    parts = hallucination.split(samples(9), 2, 50)
    scenes = [list(dict.fromkeys(part.scenes)) for part in parts]
    assert scenes == [["s0", "s1"], ["s2", "s3", "s4", "s5"], ["s6", "s7", "s8"]]


def test_items_want_the_truth():
    items = hallucination.items(made(["yes", "no"]))
    assert [(item.target, item.opposite) for item in items] == [("yes", "no"), ("no", "yes")]
    assert items[0].prompt == "Is there a bee?"


def test_a_curve_is_at_no_distance_from_itself():
    truth = ["yes", "no", "yes", "no", "no"]
    curve = hallucination.threshold_curve(made(truth), np.array([3.0, 2.0, 1.0, 0.0, -1.0]))
    assert hallucination.off_curve(curve, curve) == 0
    better = curve.assign(precision=curve["precision"] + 0.2)
    assert hallucination.off_curve(curve, better) == pytest.approx(0.2)


def test_a_dial_shows_wrong_answers_and_the_share_of_yes():
    vlm = tiny_llava()
    yes, no = vlm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    logits = torch.full((2, len(vlm.tokenizer)), -50.0)
    logits[:, yes], logits[:, no] = 0.0, 1.0
    disturbed = logits.clone()
    disturbed[:, no] = 3.0
    asked = made(["yes", "no"])
    shown = hallucination.at_strengths(asked, [1], logits, {"VCD": disturbed}, vlm, (0, 1), 0.1)
    assert shown == {
        ("VCD", "0 (yes to 0%)"): ["no"],
        ("VCD", "1 (yes to 100%)"): ["yes (wrong: it is not there)"],
    }


def test_each_decoding_is_recorded_against_its_own_threshold():
    truth = ["yes", "no"] * 6
    ways = ["VCD", "ICD", "L2S", "greedy", "prompt"]
    answers = dict.fromkeys([*ways, *(f"threshold as {way}" for way in ways[:3])], truth)
    answers["threshold as ICD"] = ["yes", "yes"] * 6
    experiment = Experiment("hallucination", "fake", "made")
    hallucination.record_gains(experiment, made(truth), answers)
    values = {(r["id"], r["variant"]): r["value"] for r in experiment.records}
    assert len(values) == 9
    against = "threshold with the same yes-rate"
    assert values["HALL-1", f"ICD, against {against}"] == pytest.approx(1 / 3)
    assert values["HALL-1", f"VCD, against {against}"] == 0
    assert ("LEARN-2", "L2S, against prompt") in values
    same = {way: ["a frog"] * 3 for way in ("greedy", "VCD", "ICD")}
    scenes = [Sample(str(k), Image.new("RGB", (8, 8)), truth={"subject": "frog"}) for k in range(3)]
    assert hallucination.record_captions(experiment, scenes, same) == []
