"""Released connectors are read under our names, and compute what the authors' formulas compute.

The files are made on the spot, in the form in which the authors' code writes them.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xlvlms_tutorial.errors import FileError, InputError, LoadError
from xlvlms_tutorial.methods.connectors import (
    QueryConnector,
    load_released,
    released_checkpoints,
)

WIDTH, OUT, QUERIES, HIDDEN, HEADS, BLOCKS = 24, 20, 3, 16, 4, 2


class Theirs(nn.Module):
    """Weights under the names of the public code: features first, then the queries."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(HIDDEN, WIDTH)
        block = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 2 * HIDDEN, 0.0, F.relu, batch_first=True, norm_first=True
        )
        self.trans = nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)
        self.const = nn.Parameter(torch.randn(QUERIES, HIDDEN))
        self.proj = nn.Linear(WIDTH, OUT)


def by_hand(weights, features):
    """The tokens (n, q, d) by the formulas, block by block."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    queries = weights["const"].expand(len(features), -1, -1)
    x = torch.cat([linear(features, "down"), queries], 1)
    n, t, d = x.shape
    for block in range(BLOCKS):
        at = f"trans.layers.{block}"
        qkv = norm(x, f"{at}.norm1") @ weights[f"{at}.self_attn.in_proj_weight"].T
        qkv = qkv + weights[f"{at}.self_attn.in_proj_bias"]
        q, k, v = (part.view(n, t, HEADS, d // HEADS).transpose(1, 2) for part in qkv.split(d, -1))
        shares = (q @ k.transpose(-1, -2) / (d // HEADS) ** 0.5).softmax(-1)
        x = x + linear((shares @ v).transpose(1, 2).reshape(n, t, d), f"{at}.self_attn.out_proj")
        x = x + linear(linear(norm(x, f"{at}.norm2"), f"{at}.linear1").relu(), f"{at}.linear2")
    return linear(linear(x[:, -QUERIES:], "up"), "proj")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    state = {name: tensor.double() for name, tensor in Theirs().state_dict().items()}
    return {name: torch.randn_like(tensor) * 0.3 for name, tensor in state.items()}


@pytest.fixture
def save(tmp_path):
    def save(weights, start="connector.0.", **more):
        file = tmp_path / "checkpoint_best.pth"
        model = {f"{start}{name}": tensor.float() for name, tensor in weights.items()}
        config = {"connector_config": {"num_heads": HEADS}, "vis_tokens": "all"}
        torch.save({"model": model, "config": config, "epoch": 7} | more, file)
        return file

    return save


@pytest.mark.parametrize("start", ["connector.0.", "module.connector.0."])
def test_it_computes_what_the_formulas_compute(weights, save, start):
    released = load_released(save(weights, start))
    features = torch.randn(5, 11, WIDTH)
    expected = by_hand(weights, features.double())
    torch.testing.assert_close(
        released.connector(features).double(), expected, rtol=1e-4, atol=1e-5
    )
    assert released.epoch == 7
    assert released.config["vis_tokens"] == "all"
    assert not any(weight.requires_grad for weight in released.connector.parameters())


def test_half_precision_and_other_parts_of_the_model_are_no_hindrance(weights, save):
    half = {name: tensor.half() for name, tensor in weights.items()}
    file = save(half)
    content = torch.load(file, weights_only=True)
    content["model"]["cross_modal_module.gate"] = torch.zeros(1)
    torch.save(content, file)
    connector = load_released(file).connector
    assert {weight.dtype for weight in connector.parameters()} == {torch.float32}
    assert torch.equal(connector.queries, half["const"].float())


def test_a_best_score_of_numpy_is_read(weights, save):
    file = save(weights, best_valid=np.float64(1.25), best_epoch=3)
    assert load_released(file).epoch == 7


def test_each_sample_is_read_alone(weights, save):
    connector = load_released(save(weights)).connector
    features = torch.randn(3, 7, WIDTH)
    alone = torch.cat([connector(row[None]) for row in features])
    torch.testing.assert_close(connector(features), alone, rtol=1e-4, atol=1e-5)


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("!",))

    file = tmp_path / "checkpoint_best.pth"
    torch.save({"model": {}, "config": Trap()}, file)
    with pytest.raises(FileError, match="cannot be read as tensors and plain values"):
        load_released(file)
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_such_file_is_named(tmp_path, weights, save):
    with pytest.raises(FileError, match="there is no file"):
        load_released(tmp_path / "none.pth")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK no zip")
    with pytest.raises(FileError, match="download it again"):
        load_released(broken)
    with pytest.raises(LoadError, match=r"down\.weight is missing"):
        load_released(save({}))
    without = {name: tensor for name, tensor in weights.items() if name != "const"}
    with pytest.raises(LoadError, match="queries is missing"):
        load_released(save(without))
    numbers = tmp_path / "numbers.pth"
    torch.save([1, 2], numbers)
    with pytest.raises(LoadError, match="holds no weights by name"):
        load_released(numbers)


@pytest.mark.parametrize("other", ["down1.weight", "gammas_func.weight", "film.gate"])
def test_a_connector_of_another_kind_is_refused(weights, save, other):
    with pytest.raises(LoadError, match="which one with learned queries has not"):
        load_released(save(weights | {other: torch.zeros(2)}))


def test_connectors_for_several_layers_are_refused(weights, save):
    file = save(weights)
    content = torch.load(file, weights_only=True)
    content["model"]["connector.1.up.weight"] = torch.zeros(2)
    torch.save(content, file)
    with pytest.raises(LoadError, match="2 connectors, for several layers"):
        load_released(file)


def test_a_weight_of_another_shape_is_refused(weights, save):
    other = weights | {"trans.layers.1.linear1.bias": torch.zeros(5)}
    with pytest.raises(LoadError, match="other shapes"):
        load_released(save(other))


def test_the_list_has_every_checkpoint_once():
    table = released_checkpoints()
    assert len(table) == 25
    assert table["file"].is_unique
    assert table.groupby("language_model").size().to_dict() == {"OPT-6.7B": 17, "Vicuna-7B-v1.5": 8}
    assert table.query("modality == 'image'")["task"].value_counts().to_dict() == {
        "questions": 9,
        "captions": 3,
    }
    concepts = table[table["pages"].str.contains("concepts")]
    assert set(concepts["dataset"]) == {"COCO"}


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="cannot be divided among 7 heads"):
        QueryConnector(8, 8, hidden=16, heads=7)
