"""Every chapter runs unchanged on another model and on pictures of a folder.

A tiny LLaVA and a tiny Qwen2-VL, and COCO's format. What such models say means nothing. What is
tested is that no cell needs the embedded model or its world, and that what is recorded carries
the name of what was measured.
"""

import pytest

from tests.support.tiny_disk import KINDS, at_hand
from tools.chapters import chapters
from xlvlms_tutorial.batch.run import read_results, run_chapter
from xlvlms_tutorial.loading.loading import EMBEDDED

# What makes a chapter short here; all else is as it stands in the book
SHORT = {
    "alignment": {"n_samples": 8, "n_family": 4},
    "alignment-score": {
        "n_samples": 8,
        "n_family": 4,
        "steps": [0, 250, 450, 1350],
        "encoders": ["lite0", "random"],
    },
    "vocabulary": {"n_samples": 8, "n_others": 4, "connectors": {}},
    "reading": {"n_samples": 8, "n_validation": 4, "n_sentences": 12, "depths": [0, 0.5, 1]},
    "concepts": {"n_samples": 16, "n_pool": 240, "n_components": 5, "n_others": 12},
    "concept-dictionaries": {
        "n_samples": 16,
        "n_pool": 240,
        "n_components": 5,
        "n_others": 12,
    },
    "grounding": {
        "n_samples": 16,
        "n_pool": 240,
        "K": 6,
        "n_noise": 8,
        "n_unseen": 6,
    },
    "grounding-depth": {
        "n_samples": 16,
        "n_pool": 240,
        "K": 6,
        "depths": [0.33, 0.67, 1.0],
    },
    "cam": {"n_samples": 6, "n_named": 3},
    "shift": {"n_samples": 20, "n_pool": 240, "n_steps": 10, "n_concepts": 5, "styles": ["colour"]},
    "steering-limits": {"n_samples": 8, "n_many": 20},
    "steering-style": {"n_samples": 12, "n_valid": 4, "n_test": 8, "adapters": [], "distil": []},
    "encoders": {"n_samples": 4, "steps": 2, "n_shown": 2},
    "learned-steering": {"n_samples": 8, "n_validation": 4, "n_test": 6, "depths": [0.4, 0.7]},
    "hallucination": {"n_samples": 8, "n_validation": 4, "n_captions": 4},
    "in-context": {"n_samples": 4, "n_pool": 40, "n_support": 8, "shots": 2},
    "tracing": {
        "n_samples": 6,
        "n_validation": 4,
        "n_patched": 3,
        "depths": [0.4, 0.7],
        "width": 1,
    },
    "merging": {"n_samples": 3, "weights": [0.0, 1.0], "n_questions": 4},
    "peft": {"n_samples": 2, "n_shown": 2, "steps": [0, 1]},
    "skip-training": {"n_samples": 8, "n_few": 2, "steps": 3},
    "pruning": {"n_samples": 6, "n_calibration": 2},
    "dropping": {"n_samples": 4, "n_validation": 3, "n_captions": 2, "rounds": 4},
    "skipping": {"n_samples": 8, "n_learn": 3, "counts": [1, 2]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chapter", [page.stem for page in chapters()])
def test_a_chapter_runs_on_another_model_and_a_folder(chapter, kind, tmp_path):
    parameters = {"model": str(at_hand(kind)), "dataset": str(at_hand("coco"))}
    results = read_results(
        run_chapter(chapter, tmp_path, parameters | SHORT.get(chapter, {"n_samples": 8}))
    )
    assert results["parameters"]["model"] == parameters["model"]
    assert {record["model"] for record in results["claims"]} <= {
        parameters["model"],
        *EMBEDDED,
        "pocket-segmenter",
    }
