"""Packed masks against booleans that are not packed.

Algebra, overlap by popcount, files, and what is refused.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.errors import FileError, InputError
from xlvlms_tutorial.interventions.edits import mask_weights
from xlvlms_tutorial.methods.pruning.masks import Masks, independent_iou, mask_overlap

# 15, 77, 192 and 1 weights
SHAPES = {
    (1, "mlp.up"): (3, 5),
    (1, "mlp.down"): (7, 11),
    (2, "mlp.up"): (8, 24),
    (2, "mlp.down"): (1, 1),
}


def booleans(seed, share=0.5, shapes=SHAPES):
    """Masks of which about this share is true."""
    random = torch.Generator().manual_seed(seed)
    masks = {key: torch.rand(shape, generator=random) < share for key, shape in shapes.items()}
    for mask in masks.values():
        mask[0, 0] = True  # no union is empty
    return masks


def random_masks(seed, share=0.5, model="m", fingerprint="f"):
    return Masks.pack(booleans(seed, share), model, fingerprint)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 19), st.integers(0, 2**20), st.sampled_from((0.1, 0.5, 1.0))
)
def test_bits_unpack_to_what_was_packed_and_overlap_is_that_of_the_booleans(
    rows, columns, seed, share
):
    shapes = {(1, "w"): (rows, columns)}
    first, second = booleans(seed, share, shapes)[1, "w"], booleans(seed + 1, share, shapes)[1, "w"]
    a, b = (Masks.pack({(1, "w"): mask}, "m", "f") for mask in (first, second))
    assert torch.equal(a.unpack(1, "w"), first)
    assert a.unpack(1, "w").dtype == torch.bool
    assert (a.n_kept, a.n_weights, a.nbytes) == (
        int(first.sum()),
        rows * columns,
        -(-rows * columns // 8),
    )
    row = a.iou(b).iloc[0]
    assert (row["n_both"], row["n_either"]) == (
        int((first & second).sum()),
        int((first | second).sum()),
    )
    assert row["iou"] == int((first & second).sum()) / int((first | second).sum())
    for masks, expected in (
        (a & b, first & second),
        (a | b, first | second),
        (a - b, first & ~second),
    ):
        assert torch.equal(masks.unpack(1, "w"), expected)
        assert masks.n_kept == int(expected.sum())


@pytest.mark.parametrize("numpy_1", [False, True])
def test_bits_are_counted_with_any_numpy(numpy_1, monkeypatch):
    if numpy_1:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    given_masks = booleans(0)
    assert Masks.pack(given_masks, "m", "f").n_kept == sum(
        int(mask.sum()) for mask in given_masks.values()
    )


def test_a_mask_overlaps_itself_wholly():
    table = random_masks(0).iou(random_masks(0))
    assert table["iou"].tolist() == [1.0] * 4
    assert list(table.columns) == ["layer", "linear", "iou", "n_both", "n_either"]
    assert list(zip(table["layer"], table["linear"], strict=True)) == list(SHAPES)


def test_what_all_tasks_keep_is_at_least_as_sparse_as_each():
    tasks = [random_masks(seed, share) for seed, share in ((0, 0.5), (1, 0.7), (2, 0.9))]
    shared = tasks[0] & tasks[1] & tasks[2]
    assert shared.sparsity >= max(task.sparsity for task in tasks)
    assert shared.density == shared.n_kept / sum(
        rows * columns for rows, columns in SHAPES.values()
    )
    assert (shared - tasks[0]).n_kept == 0
    assert (tasks[0] | shared) == tasks[0]
    # as upstream: True where pruned, and united
    pruned = [{key: ~tasks[k].unpack(*key) for key in SHAPES} for k in range(3)]
    assert all(
        torch.equal(shared.unpack(*key), ~(pruned[0][key] | pruned[1][key] | pruned[2][key]))
        for key in SHAPES
    )


def test_masks_are_equal_by_weights_shapes_and_bits_and_not_by_name():
    assert random_masks(0) == random_masks(0)
    assert random_masks(0) != random_masks(1)
    assert random_masks(0) == random_masks(0, model="other")
    assert random_masks(0) != random_masks(0, fingerprint="other")
    assert random_masks(0) != "masks"
    turned = {key: mask.T.contiguous() for key, mask in booleans(0).items()}
    assert random_masks(0) != Masks.pack(turned, "m", "f")
    with pytest.raises(TypeError):
        hash(random_masks(0))


def test_overlap_is_the_mean_over_maps_and_then_over_layers():
    shapes = {(1, "a"): (4, 4), (1, "b"): (8, 8), (2, "a"): (4, 4)}
    masks = {
        name: Masks.pack(booleans(seed, 0.5, shapes), "m", "f")
        for seed, name in enumerate(("image", "text", "all"))
    }
    table = mask_overlap(masks)
    assert list(table.index) == list(table.columns) == ["image", "text", "all"]
    for first in masks:
        assert table.loc[first, first] == 1.0
        for second in masks:
            assert table.loc[first, second] == table.loc[second, first]
    ious = masks["image"].iou(masks["text"])["iou"].tolist()
    assert table.loc["image", "text"] == pytest.approx(((ious[0] + ious[1]) / 2 + ious[2]) / 2)


@pytest.mark.parametrize("density", [0.7, 0.5, 0.3])
def test_masks_by_chance_overlap_as_told(density):
    shapes = {(1, "a"): (400, 500)}
    a, b = (Masks.pack(booleans(seed, density, shapes), "m", "f") for seed in (0, 1))
    assert mask_overlap({"a": a, "b": b}).loc["a", "b"] == pytest.approx(
        independent_iou(density), abs=0.01
    )


def test_expected_overlaps_of_the_specification():
    assert [round(independent_iou(1 - sparsity), 3) for sparsity in (0.3, 0.5, 0.7)] == [
        0.538,
        0.333,
        0.176,
    ]
    assert independent_iou(1) == 1
    for share in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share kept"):
            independent_iou(share)


def test_a_file_gives_back_the_same_masks(tmp_path):
    masks = random_masks(3, 0.3, "pocket", "0123abcd")
    path = masks.save(tmp_path / "new" / "a.masks")
    result = Masks.load(path)
    assert result == masks
    assert (result.model, result.fingerprint, result.shapes, result.sparsity) == (
        "pocket",
        "0123abcd",
        SHAPES,
        masks.sparsity,
    )
    assert list(path.parent.iterdir()) == [path]
    random_masks(4).save(path)
    assert Masks.load(path) == random_masks(4)


def test_files_that_are_no_masks_are_refused(tmp_path):
    path = random_masks(0).save(tmp_path / "masks")
    content, bits = path.read_bytes(), load_file(path)
    damaged = {"cut": content[:-3], "text": b"no masks", "empty": b""}
    for name, written in damaged.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(FileError, match="damaged"):
            Masks.load(tmp_path / name)
    save_file(bits, tmp_path / "plain")
    with pytest.raises(FileError, match="no file of masks"):
        Masks.load(tmp_path / "plain")
    for nothing in (tmp_path / "absent", tmp_path, tmp_path / "plain" / "below"):
        with pytest.raises(FileError, match="no file of masks"):
            Masks.load(nothing)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="cannot be written"):
        random_masks(0).save(tmp_path / "file" / "masks")


@pytest.mark.parametrize(
    "shapes",
    [
        "5",
        "null",
        '"5"',
        "{}",
        "[]",
        "[5]",
        "[[1, 2]]",
        '[["1", "a", "b", 3]]',
        '[[1, "q_proj", null, 3]]',
        '[[1, "q_proj", -2, -20]]',
        '[[0, "q_proj", 2, 20]]',
        '[[1, "q_proj", 2, 21]]',
        '[[7, "other", 2, 20]]',
        "[" * 100_000,
        "{",
    ],
)
def test_files_whose_shapes_are_none_are_refused(shapes, tmp_path):
    path = Masks(
        {(1, "q_proj"): np.full(5, 255, dtype=np.uint8)}, {(1, "q_proj"): (2, 20)}, "pocket", "0123"
    ).save(tmp_path / "masks")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"shapes": shapes})
    with pytest.raises(FileError, match="no file of masks, or damaged"):
        Masks.load(path)


@pytest.mark.parametrize("lacking", ["model", "fingerprint", "shapes"])
def test_files_without_a_part_of_their_description_are_refused(lacking, tmp_path):
    path = random_masks(0).save(tmp_path / "masks")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(
        load_file(path), path, {name: text for name, text in metadata.items() if name != lacking}
    )
    with pytest.raises(FileError, match=lacking):
        Masks.load(path)


def test_bits_and_shapes_that_do_not_fit_are_refused():
    for bits, message in (
        (np.zeros(3, np.uint8), "give 2 bytes"),
        (np.array([255, 255], np.uint8), "last 1 bits 0"),
        (np.zeros(2), "float64"),
    ):
        with pytest.raises(InputError, match=message):
            Masks({(1, "w"): bits}, {(1, "w"): (3, 5)}, "m", "f")
    assert (
        Masks({(1, "w"): np.array([255, 254], np.uint8)}, {(1, "w"): (3, 5)}, "m", "f").n_kept == 15
    )
    for packed, shapes in (({}, {}), ({(1, "w"): np.zeros(2, np.uint8)}, {})):
        with pytest.raises(InputError, match="one shape for each mask"):
            Masks(packed, shapes, "m", "f")
    with pytest.raises(
        InputError,
        match="no mask of layer 3 'mlp.up'; there are layers 1 to 2, with mlp.up, mlp.down",
    ):
        random_masks(0).unpack(3, "mlp.up")


@pytest.mark.parametrize(
    "combine", [lambda a, b: a & b, lambda a, b: a | b, lambda a, b: a - b, lambda a, b: a.iou(b)]
)
def test_masks_of_other_weights_maps_or_shapes_are_not_compared(combine):
    masks = random_masks(0)
    fewer = Masks.pack({key: mask for key, mask in booleans(0).items() if key[0] == 1}, "m", "f")
    turned = Masks.pack({key: mask.T.contiguous() for key, mask in booleans(0).items()}, "m", "f")
    for second_masks, message in (
        (random_masks(0, fingerprint="g"), "weights behind two masks differ"),
        (fewer, "layer 2 mlp.up differ"),
        (turned, "layer 1 mlp.up differ"),
    ):
        with pytest.raises(InputError, match=message):
            combine(masks, second_masks)
        with pytest.raises(InputError):
            combine(second_masks, masks)


def test_models_that_share_their_weights_may_differ_in_name():
    image, video = random_masks(0, model="image"), random_masks(1, model="video")
    assert image.iou(video).equals(random_masks(0).iou(random_masks(1)))
    both = image & video
    assert (both.model, (both | image).model, both.fingerprint) == (
        "image + video",
        "image + video",
        "f",
    )


def test_no_overlap_of_masks_that_keep_nothing_or_of_one():
    nothing = random_masks(0) - random_masks(0)
    with pytest.raises(InputError, match="neither mask keeps a weight of layer 1 mlp.up"):
        mask_overlap({"a": nothing, "b": nothing})
    assert random_masks(0).iou(nothing)["iou"].tolist() == [0.0] * 4
    with pytest.raises(InputError, match="give two or more"):
        mask_overlap({"a": random_masks(0)})


def test_masks_go_into_mask_weights_by_module_name():
    vlm = tiny_llava()
    shapes = {
        (k, n): tuple(vlm.blocks[k - 1].get_submodule(n).weight.shape)
        for k in (1, 3)
        for n in ("mlp.up_proj", "self_attn.k_proj")
    }
    masks = Masks.pack(booleans(0, 0.5, shapes), vlm.name, "f")
    before = {key: vlm.blocks[key[0] - 1].get_submodule(key[1]).weight.clone() for key in shapes}
    with mask_weights(vlm, masks.tensors(vlm)):
        for (layer, name), weight in before.items():
            assert torch.equal(
                vlm.blocks[layer - 1].get_submodule(name).weight, weight * masks.unpack(layer, name)
            )
    for wrong in (
        {(4, "mlp.up_proj"): (64, 32)},
        {(1, "mlp.up"): (64, 32)},
        {(1, "mlp.up_proj"): (32, 64)},
    ):
        with pytest.raises(InputError, match="shapes of layer"):
            Masks.pack(booleans(0, 0.5, wrong), vlm.name, "f").tensors(vlm)
