"""Activation patching between two inputs.

Against whole forwards patched by plain hooks, and what is refused.
"""

import numpy as np
import pytest
import torch

from tests.contract.reference import case, residual, traces
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, InterventionError, LayerError, SpanError
from xlvlms_tutorial.interventions import patching
from xlvlms_tutorial.interventions.patching import PatchingGrid, patch_positions, patch_spans
from xlvlms_tutorial.models.spans import Batch

LAYERS = (0, 1, 2, 3)
DIRECTION = torch.linspace(-1, 1, 200)


def metric(logits):
    return logits @ DIRECTION


def reworded(tiny):
    """The same batch with other words at the last two positions."""
    batch = Batch(dict(tiny.batch) | {"input_ids": tiny.batch["input_ids"].clone()})
    batch["input_ids"][:, -2:] = torch.tensor([41, 42])
    batch.spans = tiny.batch.spans
    return batch


@pytest.fixture(scope="module")
def llava():
    return case("llava")


@pytest.fixture(scope="module")
def corrupt(llava):
    return reworded(llava)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llava):
    yield
    assert traces(llava.vlm) == []


def by_hooks(tiny, source, target, layer, mask):
    """The metric of the target, with the source's states at a mask of one layer."""
    states = read(tiny.vlm, source, layer)[layer, "resid_post"]
    change = lambda h: torch.where(mask[..., None], states, h)
    with residual(tiny._replace(batch=target), layer, change):
        return metric(tiny.vlm.forward(target).logits[:, -1])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_each_cell_is_a_whole_forward_patched_by_a_hook(llava, corrupt, direction):
    picture, half = llava.batch.mask("image"), torch.rand(llava.batch.spans.shape) < 0.5
    spans = {"picture": "image", "half": half, "last": lambda batch: batch.predicting}
    result = patch_spans(llava.vlm, llava.batch, corrupt, spans, LAYERS, metric, direction)
    ends = (llava.batch, corrupt) if direction == "denoise" else (corrupt, llava.batch)
    assert result.values.shape == (4, 3, 2) and result.columns == ("picture", "half", "last")
    for row, layer in enumerate(LAYERS):
        for column, mask in enumerate((picture, half, llava.batch.predicting)):
            expected = by_hooks(llava, *ends, layer, mask).numpy()
            np.testing.assert_allclose(result.values[row, column], expected, rtol=1e-4, atol=1e-5)
    for batch, value in ((llava.batch, result.clean), (corrupt, result.corrupt)):
        expected = metric(llava.vlm.forward(batch).logits[:, -1]).numpy()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_everything_patched_is_the_other_input_and_the_last_position_at_the_end_too(llava, corrupt):
    result = patch_spans(llava.vlm, llava.batch, corrupt, ["all", "last", "image"], LAYERS, metric)
    shares = result.shares()
    np.testing.assert_allclose(shares["all"], 1, atol=1e-4)
    assert shares.loc[3, "last"] == pytest.approx(1, abs=1e-4)
    # the words differ, not the picture, and the words come after it
    np.testing.assert_allclose(shares["image"], 0, atol=1e-4)
    assert shares.index.name == "layer" and list(shares.index) == list(LAYERS)


def test_positions_are_spans_of_one(llava, corrupt):
    result = patch_positions(llava.vlm, llava.batch, corrupt, [1, 2], metric, [-1, 5])
    mask = torch.zeros(llava.batch.spans.shape, dtype=torch.bool)
    mask[:, 5] = True
    spans = {"last": "last", "five": mask}
    expected = patch_spans(llava.vlm, llava.batch, corrupt, spans, [1, 2], metric)
    np.testing.assert_array_equal(result.values, expected.values)
    assert result.columns == (llava.length - 1, 5)
    every = patch_positions(llava.vlm, llava.batch, corrupt, 3, metric)
    # the second row is padded on the left
    padded = int((llava.batch["attention_mask"] == 0).any(dim=0).sum())
    assert every.columns == tuple(range(padded, llava.length)) and padded > 0


def test_passes_are_resumed_and_whole_where_that_gives_something_else(llava, corrupt, monkeypatch):
    counts = []
    tower = llava.vlm.model.model.vision_tower
    arguments = (llava.vlm, llava.batch, corrupt, ["image", "last"], LAYERS, metric)
    with tower.register_forward_hook(lambda *_: counts.append(1)):
        fast = patch_spans(*arguments)
        assert len(counts) == 2  # once an input
        monkeypatch.setattr(patching, "same_up_to_rounding", lambda *_: False)
        whole = patch_spans(*arguments)
    assert len(counts) == 2 + 2 + 2 * len(LAYERS)
    np.testing.assert_allclose(fast.values, whole.values, rtol=1e-4, atol=1e-5)


def test_shares_are_of_the_way_between_the_means():
    values = np.array([[[2.0, 4.0], [0.0, 1.0]]])
    clean, corrupt = np.array([3.0, 5.0]), np.array([-1.0, 1.0])
    result = PatchingGrid(values, clean, corrupt, (7,), ("a", "b"), "denoise")
    assert result.changes().tolist() == [[[0.75, 0.75], [0.25, 0.0]]]
    assert result.shares().loc[7].tolist() == [0.75, 0.125]
    back = PatchingGrid(values, clean, corrupt, (7,), ("a", "b"), "noise")
    assert back.changes().tolist() == [[[0.25, 0.25], [0.75, 1.0]]]
    same = PatchingGrid(values, clean, clean, (7,), ("a", "b"), "noise")
    assert np.isnan(same.shares()).all(axis=None)


def test_inputs_that_do_not_stand_on_top_of_each_other_are_refused(llava, corrupt):
    def run(clean, corrupt):
        return patch_spans(llava.vlm, clean, corrupt, ["image"], [1], metric)

    shorter = Batch({key: value[:, 1:] for key, value in corrupt.items() if value.ndim == 2})
    shorter.spans = corrupt.spans[:, 1:]
    with pytest.raises(InputError, match=r"inputs of \(2, \d+\) and \(2, \d+\)"):
        run(llava.batch, shorter)
    moved = Batch(dict(corrupt))
    moved.spans = corrupt.spans.roll(1, dims=1)
    with pytest.raises(InputError, match="row 0 of the two inputs has other spans"):
        run(llava.batch, moved)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"spans": []}, InputError, "no spans"),
        ({"layers": []}, InputError, "no layers"),
        ({"layers": [4]}, LayerError, "0 to 3"),
        ({"spans": ["picture"]}, InterventionError, "unknown positions"),
        ({"spans": ["video"]}, SpanError, "video"),
        ({"direction": "both"}, InputError, "denoise"),
        ({"metric": lambda logits: logits}, InputError, "a metric of shape"),
        ({"metric": lambda logits: logits[:, 0] / 0}, InputError, "not finite"),
    ],
)
def test_bad_arguments_are_refused(llava, corrupt, changed, error, message):
    arguments = {"spans": ["image"], "layers": [1], "metric": metric} | changed
    with pytest.raises(error, match=message):
        patch_spans(llava.vlm, llava.batch, corrupt, **arguments)


@pytest.mark.parametrize("position", [0, 99, -99])
def test_positions_outside_or_of_padding_are_refused(llava, corrupt, position):
    with pytest.raises(InputError, match=f"position {position} of rows"):
        patch_positions(llava.vlm, llava.batch, corrupt, 1, metric, [position])
