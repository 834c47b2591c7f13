"""States: what is kept together stays together, and what is asked for
wrongly is answered by what is there.
"""

import pandas as pd
import pytest
import torch

from tests.support.made_states import DTYPES, PROVENANCE, assert_same, states_of
from xlvlms_tutorial.activations.activations import Activations, differences
from xlvlms_tutorial.activations.store import ActivationStore, load_activations, save_activations
from xlvlms_tutorial.errors import InputError, LayerError, StoreError


def test_a_layer_gives_its_block_and_a_site_gives_itself():
    states = states_of(range(3))
    assert states[3] is states.tensors[3, "resid_post"]
    assert states[3, "mlp_out"] is states.tensors[3, "mlp_out"]
    assert (states.layers, states.sites, len(states)) == ([0, 3], ["resid_post", "mlp_out"], 3)


def test_a_layer_with_one_other_site_gives_it():
    states = Activations(
        {(2, "attn_out"): torch.ones(1, 4)}, pd.DataFrame({"sample": [0], "id": ["a"]}), {}
    )
    assert torch.equal(states[2], torch.ones(1, 4))


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (7, LayerError, "layer 7 is not one of 0 to 3"),
        (-1, LayerError, "layer -1"),
        (2, InputError, "layer 2 was not captured; there are: 0, 3"),
        ((3, "attn_out"), InputError, "'attn_out' at layer 3; there are: resid_post, mlp_out"),
        ((0, "mlp_out"), InputError, "'mlp_out' at layer 0; there are: resid_post"),
    ],
)
def test_an_unknown_key_is_answered_by_what_is_there(key, error, message):
    with pytest.raises(error, match=message):
        states_of(range(2))[key]


def test_a_layer_with_several_sites_and_no_block_asks_which():
    tensors = {(1, "mlp_out"): torch.ones(1, 2), (1, "attn_out"): torch.ones(1, 2)}
    with pytest.raises(
        InputError, match=r"captured at 2 sites; say which, as in states\[1, 'mlp_out'\]"
    ):
        Activations(tensors, pd.DataFrame({"sample": [0], "id": ["a"]}), {})[1]


def test_states_are_not_iterated_by_accident():
    with pytest.raises(TypeError, match="not iterable"):
        iter(states_of(range(2)))


def test_tensors_and_table_must_have_the_same_rows():
    table = pd.DataFrame({"sample": [0, 1], "id": ["a", "b"]})
    with pytest.raises(InputError, match="table: 2, layer 0 resid_post: 2, layer 1 resid_post: 3"):
        Activations(
            {(0, "resid_post"): torch.ones(2, 4), (1, "resid_post"): torch.ones(3, 4)}, table, {}
        )


@pytest.mark.parametrize(
    ("tensors", "columns", "provenance", "message"),
    [
        ({}, {"sample": [0], "id": ["a"]}, {}, "no tensors"),
        ({(0, "resid_post"): torch.tensor(1.0)}, {"sample": [0], "id": ["a"]}, {}, "no rows"),
        ({(0, "resid_post"): torch.ones(1, 2)}, {"word": ["a"]}, {}, "lacks sample and id"),
        (
            {(0, "resid_post"): torch.ones(1, 2)},
            {"sample": [0.5], "id": ["a"]},
            {},
            "column sample holds float64",
        ),
        (
            {(0, "resid_post"): torch.ones(1, 2)},
            {"sample": [0], "id": ["a"], 3: [1]},
            {},
            "a name of its own, as text",
        ),
        (
            {(0, "resid_post"): torch.ones(1, 2)},
            {"sample": [0], "id": ["a"]},
            {"model": object()},
            "cannot be written as JSON",
        ),
        (
            {(0, "resid_post"): torch.ones(1, 2)},
            {"sample": [0], "id": ["a"]},
            {"strength": float("nan")},
            "cannot be written as JSON",
        ),
    ],
)
def test_what_cannot_be_states_is_refused(tensors, columns, provenance, message):
    with pytest.raises(InputError, match=message):
        Activations(tensors, pd.DataFrame(columns), provenance)


def test_gradients_are_left_behind_and_tuples_of_the_provenance_become_lists():
    states = Activations(
        {(0, "resid_post"): torch.ones(1, 2, requires_grad=True)},
        pd.DataFrame({"sample": [4], "id": [7]}),
        {"layers": (0, 1)},
    )
    assert not states[0].requires_grad
    assert states.provenance == {"layers": [0, 1]}
    assert states.table["id"].tolist() == ["7"]


def test_select_by_mask_and_by_condition_gives_the_same_rows():
    states = states_of(range(7), rows=2)
    expected = [row for row, word in enumerate(states.table["word"]) if word == "key"]
    by_condition, by_mask = (
        states.select("word == 'key'"),
        states.select([word == "key" for word in states.table["word"]]),
    )
    assert_same(by_condition, by_mask)
    assert torch.equal(by_mask[3], states[3][expected])
    assert by_mask.table["sample"].tolist() == [0, 0, 3, 3, 6, 6]
    assert_same(states.select(torch.ones(14, dtype=torch.bool)), states)
    assert_same(states.select(states.table["position"] == 1), states.select("position == 1"))


def test_selecting_nothing_gives_no_rows_and_keeps_shapes():
    nothing = states_of(range(3)).select("sample > 99")
    assert len(nothing) == 0
    assert nothing[3, "mlp_out"].shape == (0, 2, 3)


@pytest.mark.parametrize("condition", ["colour == 'red'", "sample ==", "sample + 1", "@absent > 2"])
def test_a_condition_that_has_no_meaning_is_refused(condition):
    with pytest.raises(InputError, match="column"):
        states_of(range(3)).select(condition)


@pytest.mark.parametrize(
    "condition",
    [
        "@pd.io.common.os.system('touch SIGN') == 0",
        "@touch() == 0",
        "touch() == 0",
        "word.str.len() > 3",
        "sample.__class__ == 0",
        "word == 'x' or @touch()",
        "'''a'`''' | @touch() | '''`'''",
        "'''a'`''' | (@touch() == 0) | word == '''`'''",
        "`@touch()`",
        "word == '`' | @touch() | word == '`'",
        "sample == 1 # `\n| @touch() # `",
        "x = sample",
        "sample == 1\n@touch()",
        "f'{touch()}' == word",
        "[touch() for _ in (1,)] == word",
        "(lambda: touch())() == 0",
        "sample[0] == 0",
        "sample if touch() else 1",
        "(y := touch()) == 0",
        "__import__('os').system('touch SIGN') == 0",
        "datetime.sys.exit() == 0",
        "sample == 9**9**9",
        "sample == (9**9)**9",
        "sample == 2 ** sample",
        "sample ** 1e6 > 0",
        "sample == 10 ** 100000000",
        "'a' * 10**9 == word",
        "word == ('a' + 'b') * 999999999",
        "[1] * 999999999 == sample",
        "'%999999999d' % 5 == word",
        "1 << 99999999999 == sample",
        "(" * 500 + "sample" + ")" * 500 + " > 0",
        "~" * 50_000 + "sample",
        "sample == " + "9" * 5000,
        "1 / 0 == sample",
        "\0",
        "",
    ],
)
def test_a_condition_that_does_more_than_compare_is_refused(condition, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def touch():  # what a condition would call
        (tmp_path / "SIGN").touch()

    with pytest.raises(InputError, match="has no meaning here|rows were chosen by"):
        states_of(range(3)).select(condition)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (
            "word in ['key', 'a`b'] and not sample == 0",
            lambda row: row["word"] == "key" and row["sample"] != 0,
        ),
        (
            '(sample % 2 == 0) & (sample >= 1) | word == "key"',
            lambda row: row["sample"] in (2, 4, 6) or row["word"] == "key",
        ),
        ("0 < sample * 2 + 1 <= 7", lambda row: 0 < row["sample"] * 2 + 1 <= 7),
        ("~(sample == 1)", lambda row: row["sample"] != 1),
        (
            "`sample` ** 2 > 4 and id != 's5'",
            lambda row: row["sample"] ** 2 > 4 and row["id"] != "s5",
        ),
        (" sample // 2 == -position + 1 ", lambda row: row["sample"] // 2 == 1 - row["position"]),
        ("word == '@key' or sample == 3", lambda row: row["sample"] == 3),
        ("sample / 2 > 1.0e0", lambda row: row["sample"] > 2),
    ],
)
def test_a_condition_is_what_python_says_of_each_row(condition, expected):
    states = states_of(range(7))
    rows = [expected(row) for row in states.table.to_dict("records")]
    assert 0 < sum(rows) < len(rows)
    assert_same(states.select(condition), states.select(rows))


def test_a_mask_of_another_length_or_kind_is_refused():
    with pytest.raises(InputError, match="mask: 2, table: 3"):
        states_of(range(3)).select([True, False])
    with pytest.raises(InputError, match="int64"):
        states_of(range(3)).select(torch.tensor([0, 1, 2]))


def test_conversion_keeps_values_and_refuses_what_overflows():
    states = states_of(range(3))
    assert torch.equal(states.to(torch.bfloat16)[3], states[3].bfloat16())
    states.tensors[3, "resid_post"][1, 0] = 70_000.0
    assert states.to(torch.bfloat16)[3].isfinite().all()
    with pytest.raises(InputError, match="layer 3, sample 1"):
        states.to(torch.float16)
    with pytest.raises(InputError, match=r"int8.*float32"):
        states.to(torch.int8)


def test_concat_is_one_after_the_other():
    whole = states_of(range(5), rows=2)
    assert_same(
        Activations.concat(
            [states_of(range(2), rows=2), states_of([]), states_of(range(2, 5), rows=2)]
        ),
        whole,
    )


def test_concat_refuses_nothing_and_what_does_not_go_together():
    with pytest.raises(InputError, match="at least one"):
        Activations.concat([])
    with pytest.raises(StoreError, match=r"model is 'fake' in the store and 'other' here"):
        Activations.concat(
            [states_of([0]), states_of([1], provenance=PROVENANCE | {"model": "other"})]
        )
    with pytest.raises(
        StoreError,
        match=(
            r"0/resid_post is \['torch.float32', 4\] in the store and "
            r"\['torch.float16', 4\] here"
        ),
    ):
        Activations.concat([states_of([0]), states_of([1], dtype=torch.float16)])


def test_differences_are_found_in_depth_and_versions_do_not_count():
    first = {
        "a": 1,
        "selection": {"span": "image", "n": 2},
        "versions": {"torch": "2.4"},
        "seconds": 3,
    }
    second = {"b": 1, "selection": {"span": "text", "n": 2}, "versions": {"torch": "2.5"}}
    assert differences(first, second) == [
        ("a", 1, "absent"),
        ("selection.span", "image", "text"),
        ("b", "absent", 1),
    ]


def test_representation_says_how_much_of_what():
    assert (
        repr(states_of(range(1000)))
        == "Activations(1,000 rows, layers 0 3, resid_post mlp_out, float32, 0.1 MB)"
    )
    many = Activations(
        {(layer, "resid_post"): torch.zeros(1, 2) for layer in range(3, 7)},
        states_of(range(1)).table,
        {},
    )
    assert repr(many) == "Activations(1 rows, layers 3 to 6, resid_post, float32, 0.0 MB)"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [range(5), []])
def test_saved_and_loaded_are_the_same(tmp_path, dtype, samples):
    states = states_of(samples, dtype=dtype, rows=2)
    assert save_activations(states, tmp_path / "kept") == tmp_path / "kept"
    assert_same(load_activations(tmp_path / "kept"), states)
    assert not [
        path for path in (tmp_path / "kept").rglob("*") if path.suffix in (".pt", ".pkl", ".bin")
    ]


def test_load_reads_stores_of_many_shards(tmp_path):
    store = ActivationStore(tmp_path / "s", PROVENANCE)
    for number in (1, 0):
        store.write(number, states_of(range(3 * number, 3 * number + 3)))
    assert_same(load_activations(tmp_path / "s"), states_of(range(6)))


def test_special_values_survive(tmp_path):
    states = states_of(range(2))
    states.tensors[0, "resid_post"][0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    save_activations(states, tmp_path / "s")
    assert torch.equal(
        load_activations(tmp_path / "s")[0].view(torch.int32), states[0].view(torch.int32)
    )


def test_tensors_that_share_memory_or_lie_apart_are_saved(tmp_path):
    stack = torch.randn(4, 3, 2)
    tensors = {
        (0, "resid_post"): stack[0],
        (1, "resid_post"): stack[0],
        (2, "resid_post"): stack[:2].flatten(0, 1)[1:4],
        (3, "resid_post"): stack[:3, :, 0],
    }
    states = Activations(tensors, pd.DataFrame({"sample": range(3), "id": list("abc")}), {})
    save_activations(states, tmp_path / "s")
    assert_same(load_activations(tmp_path / "s"), states)


def test_saving_again_is_nothing_and_saving_others_is_refused(tmp_path):
    folder = tmp_path / "s"
    save_activations(states_of(range(3)), folder)
    save_activations(states_of(range(3)), folder)
    with pytest.raises(StoreError, match="already holds other states"):
        save_activations(states_of(range(3), shift=1), folder)
    with pytest.raises(StoreError, match="already holds other states"):
        save_activations(states_of(range(4)), folder)
    with pytest.raises(StoreError, match="seed is 0 in the store and 1 here"):
        save_activations(states_of(range(3), provenance=PROVENANCE | {"seed": 1}), folder)
    ActivationStore(folder).write(1, states_of([9]))
    with pytest.raises(StoreError, match="already holds 1 shards"):
        save_activations(states_of(range(3)), folder)
    assert_same(load_activations(folder), states_of([0, 1, 2, 9]))


def test_saving_again_repairs(tmp_path):
    save_activations(states_of(range(3)), tmp_path)
    (tmp_path / "shards" / "00000.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"shards/00000\.safetensors"):
        load_activations(tmp_path)
    save_activations(states_of(range(3)), tmp_path)
    assert_same(load_activations(tmp_path), states_of(range(3)))


def test_folders_that_are_no_stores_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(StoreError, match=r"other files \('thesis.tex'\)"):
        save_activations(states_of(range(3)), tmp_path)
    with pytest.raises(StoreError, match="no store here"):
        load_activations(tmp_path)
    with pytest.raises(StoreError, match="no store here"):
        load_activations(tmp_path / "absent")
    with pytest.raises(StoreError, match="cannot be written"):
        save_activations(states_of(range(3)), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
