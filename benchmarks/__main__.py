"""Run the benchmarks: ``python -m benchmarks NAME``, one of ``SCRIPTS``.

Without a name all of them.
"""

from benchmarks import (
    alignment,
    capture,
    concepts,
    dropping,
    grounding,
    in_context,
    live,
    pruning,
    reliability,
    skipping,
    steering,
    storing,
    subnetworks,
    tracing,
    vocabulary,
)
from benchmarks.command import start

SCRIPTS = {
    "capture": capture.measure,
    "steering": steering.measure,
    "skipping": skipping.measure,
    "tracing": tracing.measure,
    "dropping": dropping.measure,
    "storing": storing.measure,
    "alignment": alignment.measure,
    "vocabulary": vocabulary.measure,
    "subnetworks": subnetworks.measure,
    "concepts": concepts.measure,
    "grounding": grounding.measure,
    "in_context": in_context.measure,
    "pruning": pruning.measure,
    "reliability": reliability.measure,
    "live": live.measure,
}

if __name__ == "__main__":
    start(SCRIPTS)
