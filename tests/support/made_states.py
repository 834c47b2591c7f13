"""States whose every value is known, for the tests of what keeps them."""

import pandas as pd
import torch

from xlvlms_tutorial.activations.activations import Activations

PROVENANCE = {
    "model": "fake",
    "revision": "1",
    "dtype": "float32",
    "prompt": "What colour ?",
    "layers": [0, 3],
    "sites": ["resid_post", "mlp_out"],
    "selection": {"span": "image"},
    "seed": 0,
    "versions": {"torch": "2.4"},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def states_of(
    samples, dtype=torch.float32, rows=1, provenance=PROVENANCE, shift=0.0
) -> Activations:
    """``rows`` rows of each sample: the value of a row tells sample, row, layer and column."""
    pairs = [(sample, row) for sample in samples for row in range(rows)]
    value = torch.tensor([sample + row / 8 + shift for sample, row in pairs], dtype=torch.float64)
    tensors = {
        (0, "resid_post"): (value[:, None] + torch.arange(4)).to(dtype),
        (3, "resid_post"): (value[:, None] * 2 + torch.arange(4)).to(dtype),
        (3, "mlp_out"): (value[:, None, None] - torch.arange(6).reshape(2, 3)).to(dtype),
    }
    columns = {
        "sample": [sample for sample, _ in pairs],
        "id": [f"s{sample}" for sample, _ in pairs],
        "position": [row for _, row in pairs],
        "word": ["key" if sample % 3 == 0 else None for sample, _ in pairs],
    }
    return Activations(tensors, pd.DataFrame(columns), provenance)


def assert_same(first: Activations, second: Activations) -> None:
    """Same tensors bit by bit, same table, same provenance."""
    assert list(first.tensors) == list(second.tensors)
    for key, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[key].dtype
        assert torch.equal(tensor, second.tensors[key])
    first_table, second_table = (
        states.table.astype(object).where(states.table.notna(), None) for states in (first, second)
    )
    pd.testing.assert_frame_equal(first_table, second_table)
    assert first.provenance == second.provenance
