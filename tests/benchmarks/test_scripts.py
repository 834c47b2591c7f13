"""Each benchmark runs on tiny models, and measures what it says.

The 7B shapes are built by the functions that build tiny ones here.
"""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicCache

from benchmarks import capture, dropping, in_context, skipping, steering, storing, tracing
from benchmarks.harness import CPU, Options, Report
from benchmarks.subjects import Subject, decoder_inputs, llava_shape, qwen2_vl_shape, subjects
from tests.support.tiny import tiny_llava
from xlvlms_tutorial.activations.activations import Activations
from xlvlms_tutorial.activations.store import ActivationStore
from xlvlms_tutorial.data import Question, Sample
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS

TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
PUBLISHED = [(llava_shape, 7_063_427_072, 576), (qwen2_vl_shape, 8_291_375_616, 256)]


def with_samples() -> Subject:
    samples = [Sample(f"s{k}", Image.new("RGB", (32, 32), (10 * k, 90, 200))) for k in range(8)]
    return Subject("tiny-llava", tiny_llava(layers=4), dict, samples)


SUBJECTS = {
    "samples": with_samples,
    "llava shape": lambda: llava_shape(CPU, torch.float32, TEXT, VISION),
    "qwen2-vl shape": lambda: qwen2_vl_shape(
        CPU,
        torch.float32,
        TEXT,
        {"depth": 2, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14},
        (1, 4, 4),
    ),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


def names(report):
    return [finding.label for finding in report.findings if finding.goal is not None]


def test_shapes_have_pictures_where_the_features_go(subject):
    batch = subject.batch(2)
    counts = (batch.spans == SPANS.index("image")).sum(dim=1)
    assert counts.tolist() == [4, 4]
    embedded = decoder_inputs(subject.vlm, batch)["inputs_embeds"]
    words = subject.vlm.model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal((embedded != words).any(dim=-1), batch.mask("image"))
    assert torch.isfinite(subject.vlm.forward(batch).logits).all()


@pytest.mark.parametrize(("make", "weights", "tokens"), PUBLISHED, ids=["llava", "qwen2-vl"])
def test_shapes_have_the_weights_and_visual_tokens_of_the_published_models(make, weights, tokens):
    subject = make(torch.device("meta"))
    assert sum(parameter.numel() for parameter in subject.vlm.model.parameters()) == weights
    assert {parameter.dtype for parameter in subject.vlm.model.parameters()} == {torch.bfloat16}
    assert (subject.make(2)["input_ids"] == subject.vlm.image_token_id).sum(dim=1).tolist() == [
        tokens
    ] * 2


def test_the_decoder_alone_leads_to_the_states_of_the_whole_forward(subject):
    batch = subject.batch(2)
    inputs, decoder = decoder_inputs(subject.vlm, batch), anatomy.decoder(subject.vlm.model)
    alone = capture._decoded(subject, batch, decoder, inputs).last_hidden_state
    whole = subject.vlm.forward(batch, output_hidden_states=True, use_cache=False).hidden_states[-1]
    assert torch.equal(alone, whole)


def test_capture_is_measured(subject, report):
    capture.about(report, subject, 4, 2)
    # a tenth and a third of four blocks are one block
    assert len(names(report)) == 3 + 2 * 2 + 2 + (subject.samples is not None)
    memory = {finding.label: finding for finding in report.findings if "memory" in finding.label}
    assert len(memory) == 2 + (subject.samples is not None)
    assert all(finding.holds for finding in memory.values()), memory


def test_what_is_compared_reads_the_same_states(subject):
    ours, today = torch.cat(capture.ours(subject, 2, 3, 3)), capture.today(subject, 3)
    mask = subject.batch(1).mask("image")[0]
    expected = torch.stack([layers[2][0, mask].mean(0) for layers in today])
    assert {len(layers) for layers in today} == {subject.vlm.n_layers + 1}
    # inputs made by hand: today's way reads their first row again and again
    same = 3 if subject.samples else 1
    torch.testing.assert_close(ours[:same], expected[:same], rtol=1e-4, atol=1e-5)


def test_episodes_are_measured(report):
    subject = with_samples()
    asked = (Question("colour", "What colour ?", "red"),)
    samples = [replace(sample, questions=asked) for sample in subject.samples]
    in_context.about(report, replace(subject, samples=samples), 2)
    assert len(names(report)) == 1 and len(report.findings) == 3
    batch = subject.vlm.batch([[sample.image for sample in samples[:2]]], ["What ?"])
    text = in_context.of_text(subject.vlm, batch)
    same = text["input_ids"] == batch["input_ids"]
    assert torch.equal(same, ~batch.mask("image")) and "pixel_values" not in text


def test_steering_is_measured(subject, report):
    steering.about(report, subject, 2, 3)
    assert len(names(report)) == 3
    assert not any(block._forward_hooks for block in subject.vlm.blocks)


def test_sweeps_are_measured(subject, report):
    steering.sweeps(report, subject, 2)
    assert len(names(report)) == 1 and len(report.findings) == 2
    assert not any(block._forward_hooks for block in subject.vlm.blocks)


def test_a_learned_function_is_measured(subject, report):
    steering.learned(report, subject, 2, 3)
    assert len(names(report)) == 2
    assert not any(block._forward_hooks for block in subject.vlm.blocks)


def test_training_steps_are_measured_and_leave_nothing(subject, report):
    before = {name: weight.clone() for name, weight in subject.vlm.model.state_dict().items()}
    steering.tuning(report, subject, 2)
    assert len(names(report)) == 1
    after = subject.vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_vectors_of_several_layers_are_those_of_one_at_a_time(subject):
    vlm, batch = subject.vlm, subject.batch(4)
    together = steering.mean_differences(vlm, batch, [1, 2, 4])
    for layer in (1, 2, 4):
        torch.testing.assert_close(
            together[layer], steering.mean_differences(vlm, batch, [layer])[layer]
        )


def test_todays_hook_steers_like_ours(subject):
    vlm, batch = subject.vlm, subject.batch(2)
    vector = torch.randn(vlm.width, generator=torch.Generator().manual_seed(0))
    plain = vlm.forward(batch).logits
    with steering.masked_anew(vlm, vector, 2):
        theirs = vlm.forward(batch).logits
    with add(vlm, vector, 2):
        ours = vlm.forward(batch).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(plain, ours)


def test_tracing_is_measured_and_leaves_nothing(subject, report):
    tracing.cut(report, subject, 2)
    tracing.grids(report, subject, 2)
    assert len(names(report)) == 3
    assert subject.vlm.active == []
    assert not any(block._forward_hooks for block in subject.vlm.blocks)


def test_the_other_input_of_a_grid_has_its_words_elsewhere(subject):
    batch = subject.batch(2)
    other = tracing.rolled(batch)
    words = batch.mask("question")
    assert torch.equal(other["input_ids"][~words], batch["input_ids"][~words])
    assert not torch.equal(other["input_ids"][words], batch["input_ids"][words])


def test_skipping_is_measured(subject, report):
    skipping.about(report, subject, 2, 2)
    assert len(names(report)) == 2 * 2  # one and two of four blocks, in prefill and decode
    assert not any("forward" in vars(block) for block in subject.vlm.blocks)


def test_dropping_is_measured(subject, report):
    dropping.about(report, subject, 2, 2)
    assert len(names(report)) == 1  # one promise, of the prefill
    assert not any("forward" in vars(block) for block in subject.vlm.blocks)


def test_todays_way_gives_the_answers_of_a_skip(subject):
    vlm, batch = subject.vlm, subject.batch(2)
    with skipping.computed_in_vain(vlm, [2, 3]):
        theirs = vlm.forward(batch).logits
    with skip(vlm, [2, 3]):
        torch.testing.assert_close(vlm.forward(batch).logits, theirs)


@pytest.mark.parametrize("n_layers", [4, 28, 30, 32])
def test_skipped_blocks_are_spread_and_distinct(n_layers):
    for k in range(1, n_layers + 1):
        layers = skipping.spread(n_layers, k)
        assert len(set(layers)) == k
        assert 1 <= min(layers) <= max(layers) <= n_layers
        gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_timed_decode_steps_follow_a_prefill_and_lengthen_its_cache(subject, monkeypatch):
    caches = []
    monkeypatch.setattr(
        skipping,
        "DynamicCache",
        lambda config: caches.append(DynamicCache(config=config)) or caches[-1],
    )
    inputs = decoder_inputs(subject.vlm, subject.batch(2))
    length = inputs["inputs_embeds"].shape[1]
    with skipping.decoding(subject.vlm, inputs, lambda: skip(subject.vlm, [2]), steps=3)() as call:
        assert caches[0].get_seq_length() == length
        call()
    assert caches[0].get_seq_length() == length + 3


def test_kills_lose_nothing(tmp_path):
    toll = storing.killed(tmp_path / "store", kills=3)
    assert (toll.kills, toll.lost, toll.doubled) == (3, set(), set())
    assert ActivationStore(tmp_path / "store").verify() == []


def test_losses_and_doubles_would_be_counted(tmp_path):
    folder, toll = tmp_path / "store", storing.Toll()
    storing.write_missing(folder, 3)
    assert storing.inspect(folder, set(range(9)), toll) == set(range(9))
    assert (toll.lost, toll.doubled) == (set(), set())
    ActivationStore(folder).discard(1)
    storing.inspect(folder, set(range(9)), toll)
    assert toll.lost == {3, 4, 5}
    store = ActivationStore(folder)
    store.write(1, storing.known_states(range(0, 3)))
    storing.inspect(folder, set(), toll)
    assert toll.doubled == {0, 1, 2}
    states = storing.known_states(range(6, 9))
    store.discard(1)
    store.write(
        2, Activations({(1, "resid_post"): states[1] + 1}, states.table, storing.PROVENANCE)
    )
    storing.inspect(folder, {0, 6}, toll)
    assert toll.lost == {3, 4, 5, 6}


def test_a_damaged_store_counts_as_lost(tmp_path):
    toll = storing.Toll()
    storing.write_missing(tmp_path / "s", 1)
    (tmp_path / "s" / "shards" / "00000.safetensors").write_bytes(b"damaged")
    storing.inspect(tmp_path / "s", {0, 1}, toll)
    storing.inspect(tmp_path / "absent", {2}, toll)
    assert toll.lost == {0, 1, 2}


def test_the_cost_of_storing_is_measured(report):
    storing.overhead(report, with_samples(), 4, 2)
    assert "store" in report.findings[0].label
    assert report.findings[0].goal is None


def test_the_pocket_is_measured_on_the_cpu_and_cuda_must_be_there(monkeypatch):
    monkeypatch.setattr("benchmarks.subjects.pocket", with_samples)
    report = Report("trial", Options(device="cpu"))
    assert [subject.name for subject in subjects(report)] == report.models == ["tiny-llava"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exception, match="finds no GPU"):
        list(subjects(Report("trial", Options(device="cuda"))))
