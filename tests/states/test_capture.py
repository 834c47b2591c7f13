"""The residual stream against transformers' own hidden states, and its edge: the last layer before the final norm."""

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_llava
from xlvlms_tutorial.errors import StateError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.states.capture import residual_stream

PICTURE = Image.new("RGB", (32, 32), (10, 90, 200))


@pytest.fixture
def vlm():
    return tiny_llava()


def test_layers_are_transformers_hidden_states_but_for_the_last(vlm):
    inputs = vlm.batch([PICTURE] * 2, ["What colour ?", "Describe the picture ."])
    stream = residual_stream(vlm, inputs)
    theirs = vlm.model(**inputs, output_hidden_states=True).hidden_states
    assert len(stream) == vlm.n_layers + 1
    for layer in range(vlm.n_layers):
        assert torch.equal(stream[layer], theirs[layer])
    assert not torch.allclose(stream[-1], theirs[-1])
    assert torch.equal(anatomy.final_norm(vlm.model)(stream[-1]), theirs[-1])


def test_hooks_are_gone_afterwards_even_after_an_error(vlm):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    vlm.blocks[2].mlp.forward = broken
    with pytest.raises(RuntimeError, match="planted"):
        residual_stream(vlm, vlm.batch([PICTURE], ["What colour ?"]))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in vlm.blocks)


def test_nan_is_named_by_its_first_layer(vlm):
    vlm.blocks[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(StateError, match="first at layer 2"):
        residual_stream(vlm, vlm.batch([PICTURE], ["What colour ?"]))
