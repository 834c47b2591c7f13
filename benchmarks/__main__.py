"""Run the benchmarks: ``python -m benchmarks NAME``, one of ``SCRIPTS``.

Without a name all of them.
"""

from benchmarks import (
    alignment,
    capture,
    concepts,
    dropping,
    grounding,
    pruning,
    reliability,
    skipping,
    steering,
    storing,
    subnetworks,
    vocabulary,
)
from benchmarks.command import start

SCRIPTS = {
    "capture": capture.measure,
    "steering": steering.measure,
    "skipping": skipping.measure,
    "dropping": dropping.measure,
    "storing": storing.measure,
    "alignment": alignment.measure,
    "vocabulary": vocabulary.measure,
    "subnetworks": subnetworks.measure,
    "concepts": concepts.measure,
    "grounding": grounding.measure,
    "pruning": pruning.measure,
    "reliability": reliability.measure,
}

if __name__ == "__main__":
    start(SCRIPTS)
