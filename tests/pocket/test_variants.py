"""The embedded models: what each is called and made of, that its connector is shipped, and
that it has learnt what it is for.
"""

import numpy as np
import pytest

from xlvlms_tutorial import load
from xlvlms_tutorial.data import PROMPTS, load_samples
from xlvlms_tutorial.loading.loading import EMBEDDED
from xlvlms_tutorial.metrics.captions import names
from xlvlms_tutorial.pocket import build
from xlvlms_tutorial.pocket.encoders import ENCODERS
from xlvlms_tutorial.pocket.variants import VARIANTS
from xlvlms_tutorial.samples import media
from xlvlms_tutorial.training.compressed import COMPRESSED
from xlvlms_tutorial.training.connector_runs import EXPERTS, RUNS
from xlvlms_tutorial.training.main import MEASURED_ON

EVERY_VARIANT = pytest.mark.parametrize("name", VARIANTS)
TARGETS = {"clips": ("action", 0.85), "sounds": ("sound", 0.80)}


def test_every_name_that_load_knows_is_a_variant_with_a_run_of_its_own():
    assert tuple(VARIANTS) == EMBEDDED
    assert all(RUNS[variant.run].variant == variant for variant in VARIANTS.values())
    # of further seeds and comparisons only the records are kept
    others = set(COMPRESSED) - {"skipped", "pruned", "short"} | set(EXPERTS)
    assert set(RUNS) - {variant.run for variant in VARIANTS.values()} == others
    assert len({variant.run for variant in VARIANTS.values()}) == len(VARIANTS)


def test_every_encoder_has_a_model_and_every_modality_is_read():
    assert {VARIANTS[f"pocket-llava-{encoder}"].encoder for encoder in ENCODERS} == set(ENCODERS)
    assert {kind for variant in VARIANTS.values() for kind in variant.reads} == set(PROMPTS)


@EVERY_VARIANT
def test_the_shipped_connector_is_that_of_its_whole_run(name):
    run = VARIANTS[name].run
    assert build.revisions(run)[-1] == f"step-{RUNS[run].recipe.steps:04d}"
    state = build.connector_state(run)
    width = ENCODERS[VARIANTS[name].encoder].width
    words = {"smollm2": 576, "gemma": 640}[VARIANTS[name].language]
    assert state["linear_1.weight"].shape == (words, width)
    assert state["linear_2.weight"].shape == (words, words)
    assert all(weight.isfinite().all() for weight in state.values())


@EVERY_VARIANT
def test_the_record_says_what_the_connector_was_trained_on_and_how_well_it_does(name):
    variant = VARIANTS[name]
    record = build.training_record(variant.run)
    assert record["run"] == variant.run
    assert record["recipe"]["steps"] == RUNS[variant.run].recipe.steps
    assert record["recipe"]["n_scenes"] == RUNS[variant.run].recipe.n_scenes
    assert record["loss"][0] > record["loss"][-1] > 0
    if variant.run != "image":  # whose record is older than these fields
        assert record["encoder"] == variant.encoder
        assert tuple(record["start"] or ()) == tuple(RUNS[variant.run].start or ())
        assert tuple(record["data"]["reads"]) == variant.reads
    captioned = {
        d: max(row["n"] for row in rows if row["metric"].startswith("caption/"))
        for d, rows in record["metrics"].items()
    }
    assert captioned == MEASURED_ON[variant.run]


@pytest.mark.parametrize("run", COMPRESSED)
def test_runs_through_a_compressed_language_model_leave_their_records(run):
    record = build.training_record(run)
    assert (record["run"], record["start"]) == (run, ["image", None])
    assert record["recipe"]["seed"] == int(run.partition("-")[2] or 0)
    assert {
        row["n"] for row in record["metrics"]["scenes"] if row["metric"] == "caption/subject"
    } == {MEASURED_ON[run]["scenes"]}


@pytest.mark.parametrize(
    ("name", "dataset"), [("pocket-llava-video", "clips"), ("pocket-llava-audio", "sounds")]
)
def test_the_recorded_metrics_meet_their_targets(name, dataset):
    question_type, target = TARGETS[dataset]
    recorded = {
        row["metric"]: row["value"]
        for row in build.training_record(VARIANTS[name].run)["metrics"][dataset]
    }
    assert max(recorded[f"caption/{question_type}"], recorded[f"qa/{question_type}"]) >= target


@pytest.mark.parametrize(
    ("name", "dataset", "n"),
    [("pocket-llava-video", "clips", 16), ("pocket-llava-audio", "sounds", 24)],
)
def test_clips_and_sounds_are_described(name, dataset, n):
    vlm, question_type = load(name, device="cpu", dtype="bfloat16"), TARGETS[dataset][0]
    samples = load_samples(dataset, n=n, seed=7)
    media_inputs = {"images": None} | media(samples)
    captions = vlm.generate(
        **media_inputs, texts=[PROMPTS[samples[0].modality]] * n, max_new_tokens=32, batch_size=8
    )
    questions = [next(q for q in sample.questions if q.type == question_type) for sample in samples]
    answers = vlm.generate(
        **media_inputs, texts=[q.text for q in questions], max_new_tokens=5, batch_size=8
    )
    caption_hits = [
        names(caption, q.answer) for caption, q in zip(captions, questions, strict=True)
    ]
    answer_hits = [answer == q.answer for answer, q in zip(answers, questions, strict=True)]
    assert max(np.mean(caption_hits), np.mean(answer_hits)) >= 0.75
