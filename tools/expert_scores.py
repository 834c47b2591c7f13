"""Measure the experts for merging again: ``python -m tools.expert_scores``.

It takes what is shipped, and what is not: the presence expert of the second order, and the captions
expert at step 50. ``python -m xlvlms_tutorial.training.main expert-captions-0 expert-presence-1``
trains these. The joint baseline is pocket LLaVA's own connector, which went on from the same start
with all tasks. What is measured goes to ``xlvlms_tutorial/tutorials/merging.json``.
"""

import sys

from xlvlms_tutorial import load, load_samples
from xlvlms_tutorial.io import write_json
from xlvlms_tutorial.training import expert
from xlvlms_tutorial.tutorials import merging

JOINT = "step-0800"  # 350 steps after the start


def main() -> int:
    """Measure all, and write the records."""
    # as they were trained; short rows are faster with attention in Python
    vlm = load(merging.HOME, dtype="bfloat16")
    vlm.model.set_attn_implementation("eager")
    experts = {
        "start": expert("start"),
        "captions": expert("captions"),
        "presence": expert("presence"),
        "presence, again": expert("presence", 1),
        "other": expert("captions", "other"),
        "early": expert("captions", step="step-0050"),
        "joint": merging.connector_of(load(merging.HOME, revision=JOINT, dtype="float32")),
    }
    benches = {}
    for part, n in merging.PARTS.items():
        benches[part] = merging.Bench(load_samples("scenes", n, part), n_presence=3)
    table = merging.measure(vlm, experts, benches).round(4).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    settings = {"model": merging.HOME, "pictures": merging.PARTS, "joint": JOINT}
    settings["dtype"] = "bfloat16"
    write_json(merging.FILE, {"settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
