"""AIMv2's objective in miniature: masks, patches, losses and probes against closed forms."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.training import aim
from xlvlms_tutorial.training.aim import AimRecipe, TinyAim, prefix_mask, to_patches, train_encoder

SMALL = AimRecipe(size=16, patch=8, width=16, depth=2, decoder_depth=1, heads=2, steps=3)


def picture(seed):
    colours = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def samples(n=4):
    truth = dict.fromkeys(aim.FACTORS, "a")
    made = []
    for k in range(n):
        captions = (f"a red frog{k % 2}.",)
        made.append(Sample(str(k), picture(k), captions, truth=truth | {"time": f"t{k % 2}"}))
    return made


def model():
    torch.manual_seed(0)
    return TinyAim(SMALL, ["a", "red", "frog0", "frog1"]).eval()


@pytest.mark.parametrize(("prefix", "n"), [(0, 4), (1, 4), (3, 5), (5, 5)])
def test_the_prefix_sees_itself_and_the_rest_what_is_before(prefix, n):
    mask = prefix_mask(torch.tensor([prefix, 1]), n)
    for i in range(n):
        for j in range(n):
            assert mask[0, i, j] == (j <= i or (i < prefix and j < prefix))
    assert torch.equal(mask[1], torch.ones(n, n).tril().bool())


def test_patches_run_row_by_row_and_are_normalised_alone():
    ramp = np.arange(16 * 16 * 3, dtype=np.float64).reshape(1, 16, 16, 3) / 768
    patches = to_patches(ramp, 16, 8)
    for number, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        patch = ramp[0, top : top + 8, left : left + 8].reshape(-1)
        expected = (patch - patch.mean()) / (patch.std() + 1e-2)
        np.testing.assert_allclose(patches[0, number], expected, atol=1e-4)
    flat = to_patches(np.full((1, 16, 16, 3), 0.3), 16, 8)
    assert flat.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": 60, "patch": 8}, "patches of 8 pixels do not cover a side of 60"),
        ({"width": 20, "heads": 3}, "3 heads do not share a width of 20"),
        ({"depth": 0}, "depth"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        AimRecipe(**sizes)
    if "size" in sizes:
        with pytest.raises(InputError, match=message):
            to_patches([picture(0)], **sizes)


def test_a_patch_behind_the_prefix_is_predicted_without_being_seen():
    net, ids = model(), torch.tensor([[2, 3, 1]])
    patches = to_patches([picture(0)], 16, 8)
    changed = patches.clone()
    changed[0, 3] += 1.0
    prefix = torch.tensor([2])
    before, words = net(patches, ids, prefix)
    after, other = net(changed, ids, prefix)
    torch.testing.assert_close(before[0, :3], after[0, :3])  # what predicts patches 1 to 3
    assert (words - other).abs().max() > 1e-4  # words see all patches
    whole, _ = net(changed, ids, torch.tensor([4]))
    full, _ = net(patches, ids, torch.tensor([4]))
    assert (whole[0, :3] - full[0, :3]).abs().max() > 1e-4  # in the prefix everything is seen


def test_a_word_is_predicted_from_those_before_it():
    net, patches = model(), to_patches([picture(0)], 16, 8)
    prefix = torch.tensor([4])
    _, words = net(patches, torch.tensor([[2, 3, 4, 1]]), prefix)
    _, other = net(patches, torch.tensor([[2, 3, 5, 1]]), prefix)
    torch.testing.assert_close(words[0, :3], other[0, :3])
    assert (words[0, 3] - other[0, 3]).abs().max() > 1e-4


@pytest.mark.parametrize("prefix", [[1, 2], [3, 3]])
def test_losses_are_those_of_a_loop(prefix):
    net = model()
    patches = to_patches([picture(0), picture(1)], 16, 8)
    ids = net.ids(["a red frog0", "a frog1"])
    assert ids.tolist() == [[2, 3, 4, 1], [2, 5, 1, 0]]
    text, image = net.losses(patches, ids, torch.tensor(prefix))
    predicted, words = net(patches, ids, torch.tensor(prefix))
    errors, surprises = [], []
    for row, start in enumerate(prefix):
        for place in range(start, 4):
            difference = predicted[row, place - 1] - patches[row, place]
            errors.append(difference.square().mean().item())
        for place, word in enumerate(ids[row].tolist()):
            if word:
                surprises.append(-functional.log_softmax(words[row, place], 0)[word].item())
    assert math.isclose(image.item(), np.mean(errors), rel_tol=1e-4)
    assert math.isclose(text.item(), np.mean(surprises), rel_tol=1e-4)


def test_without_pixels_the_loss_is_that_of_words_and_seeds_reproduce():
    plain, rows = train_encoder(SMALL, samples(), 0.0, seed=3)
    again, _ = train_encoder(SMALL, samples(), 0.0, seed=3)
    both, mixed = train_encoder(SMALL, samples(), 0.4, seed=3)
    assert all(math.isclose(row["loss"], row["text"], rel_tol=1e-6) for row in rows)
    assert math.isclose(mixed[0]["loss"], mixed[0]["text"] + 0.4 * mixed[0]["pixels"], rel_tol=1e-5)
    assert mixed[0]["text"] == rows[0]["text"]  # the same start and the same batch
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(plain.pixel_head.weight, both.pixel_head.weight)


def test_training_needs_captions_and_a_weight():
    with pytest.raises(InputError, match="without a caption"):
        train_encoder(SMALL, [Sample("a", picture(0))], 0.4)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="alpha"):
            train_encoder(SMALL, samples(), alpha)


def test_probes_read_what_is_linear_and_no_noise():
    generator = np.random.default_rng(0)
    values = ["day", "night", "dusk"] * 40
    noise = generator.normal(size=(120, 4))
    signal = noise + 6 * np.array(
        [[value == name for name in ["day", "night", "dusk", "x"]] for value in values]
    )
    truth = {"time": (values[:60], values[60:])}
    assert aim.probe_scores(signal[:60], signal[60:], truth)["time"] > 0.95
    assert aim.probe_scores(noise[:60], noise[60:], truth)["time"] < 0.6


def test_runs_go_on_and_have_both_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(aim, "SEEDS", (0, 1))
    monkeypatch.setattr(aim, "load_samples", lambda name, n, split, seed: samples(12))
    calls = []

    def counted(*arguments):
        calls.append(arguments[2:4])
        return train_encoder(*arguments)

    monkeypatch.setattr(aim, "train_encoder", counted)
    small = AimRecipe(size=16, patch=8, width=16, depth=1, decoder_depth=1, heads=2, steps=21)
    monkeypatch.setattr(
        aim, "probe_scores", lambda a, b, truth: dict.fromkeys(truth, float(a.mean()))
    )
    file = tmp_path / "records.json"
    lines = []
    records = aim.run_all(file, lines.append, small)
    assert calls == [(0.0, 0), (0.4, 0), (0.0, 1), (0.4, 1)] and len(lines) == 4
    for run in records["runs"]:
        assert list(run["scores"]) == ["0", "7", "14", "21"]
    for words, both in zip(records["runs"][::2], records["runs"][1::2], strict=True):
        assert words["scores"]["0"] == both["scores"]["0"]
        assert words["scores"]["21"] != both["scores"]["21"]
    assert set(records["controls"]) == {"raw pixels", "most frequent value"}
    assert records["controls"]["most frequent value"]["time"] == 0.5
    assert aim.run_all(file, lines.append, small)["runs"] == records["runs"] and len(calls) == 4
    with pytest.raises(InputError, match="other settings"):
        aim.run_all(file, lines.append, SMALL)
