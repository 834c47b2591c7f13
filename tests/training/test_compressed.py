"""What is left out while connectors of their own are trained.

The blocks, the weights, and that they come back.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.tiny import tiny_llava
from xlvlms_tutorial import load, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.pruning.calibration import fingerprint
from xlvlms_tutorial.methods.pruning.scores import random_masks, wanda
from xlvlms_tutorial.training import compressed
from xlvlms_tutorial.training.compressed import (
    COMPRESSED,
    REMOVED,
    SKIPPED,
    TASK_SPARSITY,
    shared_mask,
    task_calibrations,
    through,
)
from xlvlms_tutorial.training.connector_runs import EXPERTS, RUNS


@pytest.fixture(scope="module")
def vlm():
    return load("pocket-llava", device="cpu", dtype="bfloat16")


def blocks_that_run(vlm):
    """The layers whose MLP is called in a forward."""
    ran = []
    hooks = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(vlm.blocks, 1)
    ]  # a skipped block's MLP is not called
    vlm.forward(vlm.batch(None, ["A man walks."]))
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize(
    ("run", "left_out"), [("skipped", SKIPPED), ("skipped-2", SKIPPED), ("short", REMOVED)]
)
def test_half_of_the_blocks_are_left_out_and_come_back(vlm, run, left_out):
    assert len(set(left_out)) == vlm.n_layers / 2
    with through(run, vlm):
        assert blocks_that_run(vlm) == [
            layer for layer in range(1, vlm.n_layers + 1) if layer not in left_out
        ]
    assert blocks_that_run(vlm) == list(range(1, vlm.n_layers + 1))


def test_the_pruned_run_masks_what_the_tasks_do_not_share(vlm, monkeypatch):
    masks = random_masks(load("pocket-llava", device="cpu", dtype="float32"), 0.7, seed=0)
    monkeypatch.setattr(compressed, "shared_mask", lambda dense: masks)
    weight = vlm.blocks[3].mlp.down_proj.weight
    before = weight.clone()
    with through("pruned-1", vlm):
        assert torch.equal(weight != 0, masks.unpack(4, "mlp.down_proj") & (before != 0))
    assert torch.equal(weight, before)


def test_other_runs_leave_nothing_out(vlm):
    with through("image", vlm):
        assert blocks_that_run(vlm) == list(range(1, vlm.n_layers + 1))


def test_six_tasks_share_fewer_weights_than_each_keeps(monkeypatch):
    calibrations = task_calibrations(1)
    assert sorted(calibrations) == sorted(
        f"{name}, {kind}" for name in compressed.TASKS for kind in ("captions", "answers")
    )
    assert len({calibration.fingerprint for calibration in calibrations.values()}) == 1
    monkeypatch.setattr(compressed, "task_calibrations", lambda n, vlm, dataset: calibrations)
    masks = shared_mask(load("pocket-llava", device="cpu", dtype="float32"))
    assert TASK_SPARSITY < masks.sparsity < 0.8


def test_another_model_has_the_tasks_of_its_dataset():
    vlm = tiny_llava()
    calibrations = task_calibrations(2, vlm, "composition")
    assert list(calibrations) == ["composition, captions", "composition, answers"]
    assert {calibration.fingerprint for calibration in calibrations.values()} == {fingerprint(vlm)}
    both = [wanda(vlm, calibration, 0.5) for calibration in calibrations.values()]
    assert (
        shared_mask(vlm, 2, 0.5, "composition").n_kept
        == (both[0] & both[1]).n_kept
        < both[0].n_kept
    )


def test_samples_without_captions_or_questions_make_one_task_or_none(monkeypatch):
    samples = load_samples("scenes", 2, "train")
    cut = lambda **gone: lambda *_, **__: [replace(sample, **gone) for sample in samples]
    monkeypatch.setattr(compressed, "load_samples", cut(captions=()))
    assert list(task_calibrations(2, tiny_llava(), "scenes")) == ["scenes, answers"]
    monkeypatch.setattr(compressed, "load_samples", cut(questions=()))
    assert list(task_calibrations(2, tiny_llava(), "scenes")) == ["scenes, captions"]
    monkeypatch.setattr(compressed, "load_samples", cut(captions=(), questions=()))
    with pytest.raises(InputError, match="2 samples of 'scenes' without captions and questions"):
        task_calibrations(2, tiny_llava(), "scenes")


def test_every_run_through_a_compressed_language_model_is_in_the_table():
    compact = [name for name, run in RUNS.items() if run.compact]
    assert compact == [*COMPRESSED, *EXPERTS]
