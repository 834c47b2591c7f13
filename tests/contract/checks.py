"""The checks of the contract, by name, in the order of the table's columns."""

from collections.abc import Callable

from tests.contract import dropping, intervening, reading, showing, tracing
from tests.contract.reference import Case

# A check returns nothing when all holds, or what holds instead in this architecture; what does not
# hold it raises as AssertionError
CHECKS: dict[str, Callable[[Case], str | None]] = {
    "parts": reading.parts,
    "spans": reading.spans,
    "type_ids": reading.type_ids,
    "states_forward": reading.states_forward,
    "states_generate": reading.states_generate,
    "unembedding": reading.unembedding,
    "batch_sizes": reading.batch_sizes,
    "recorder_order": reading.recorder_order,
    "skip_block": intervening.skipping("block"),
    "skip_mlp": intervening.skipping("mlp"),
    "skip_attention": intervening.skipping("attention"),
    "skip_previous": intervening.skip_previous,
    "parallel": intervening.parallel,
    "parallel_pairs": intervening.parallel_pairs,
    "add": intervening.adding,
    "replace": intervening.replacing,
    "project_out": intervening.projecting_out,
    "fold": intervening.folding,
    "mask_weights": intervening.masking,
    "knock_out": tracing.knocking_out,
    "patching": tracing.patching,
    "beams": intervening.beams,
    "several_pictures": showing.several_pictures,
    "drop_tokens": dropping.dropping,
}
