"""What several tests share.

Samples without the world's sprites, and a model whose answers are known.
"""

import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from PIL import Image

from xlvlms_tutorial.samples import Question, Sample

# The same examples in every run, so that a test that turns red does so by a change;
# HYPOTHESIS_PROFILE=explore draws new ones. Nor by a busy machine: no example has a deadline.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Files and tests of more than some four seconds; `make check` leaves
# them out, `make test` does not.
SLOW = (
    "tests/benchmarks/test_concepts.py",
    "tests/benchmarks/test_scripts.py",
    "tests/methods/concepts/test_semi_nmf.py::test_the_minimum_is_no_higher_than_scikit_learns",
    (
        "tests/methods/steering/test_selection.py::"
        "test_a_pass_from_a_layer_on_gives_the_logits_of_a_whole_one"
    ),
    "tests/loading/test_loading.py::test_offline_takes_what_the_cache_has_and_names_the_commit",
    (
        "tests/pocket/test_build.py::"
        "test_a_saved_pocket_model_loads_again_in_a_process_that_knows_nothing_of_it"
    ),
    "tests/pocket/test_build.py::test_channels_are_standardised_over_training_scenes",
    "tests/pocket/test_build.py::test_it_describes_and_answers",
    (
        "tests/pocket/test_conversion.py::"
        "test_converted_weights_are_the_dequantised_values_and_load_plainly"
    ),
    (
        "tests/pocket/test_encoders.py::"
        "test_shipped_statistics_standardise_each_channel_over_training_scenes"
    ),
    "tests/pocket/test_language.py::test_popular_objects_are_the_frequent_ones_in_training_too",
    "tests/pocket/test_variants.py::test_clips_and_sounds_are_described",
    "tests/live/test_engine.py",
    "tests/training/test_compressed.py",
    "tests/batch/test_snakefile.py",
    "tests/activations/test_processes.py",
    "tests/activations/test_shards.py::test_a_kill_before_any_step_leaves_a_store_that_continues",
    "tests/activations/test_shards.py::test_kills_at_random_moments_lose_nothing",
    "tests/activations/test_store.py::test_accelerate_launch_deals_the_shards_to_its_processes",
    "tests/test_cli.py::test_a_working_directory_that_is_gone_is_said",
    "tests/test_readme.py::test_the_code_of_the_readme_prints_what_the_readme_says",
    "tests/tools/test_execute.py",
    "tests/tools/test_nbval_cache.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")


class FakeVLM:
    """Speaks by rule: ``say(picture, text)`` (or clip, or sound) decides every answer.

    Keeps what it was asked.
    """

    name = "fake"

    def __init__(self, say: Callable[[object, str], str]) -> None:
        self.say = say
        self.calls: list[tuple[int, int]] = []

    def generate(self, images, texts, max_new_tokens=32, batch_size=16, progress=False, **media):
        # pictures, clips or sounds
        (inputs,) = [kind for kind in (images, *media.values()) if kind is not None]
        assert len(inputs) == len(texts) > 0
        self.calls.append((len(texts), max_new_tokens))
        return [f" {self.say(item, text)}" for item, text in zip(inputs, texts, strict=True)]


@pytest.fixture
def fake_vlm() -> type[FakeVLM]:
    """The class of the fake model."""
    return FakeVLM


@pytest.fixture
def samples() -> Callable[[int], list[Sample]]:
    """A function that makes n samples; the red channel of each picture is the sample's number."""

    def make(n: int) -> list[Sample]:
        questions = (
            Question("colour", "What colour is the key?", "red", "key"),
            Question("presence", "Is there a robot?", "yes", "robot", "random"),
            Question("presence", "Is there a bush?", "no", "bush", "popular"),
        )
        truth = {
            "subject": "robot",
            "action": "walking",
            "item": "key",
            "colour": "red",
            "place": "snow",
        }
        plain = truth | {"subject": "frog", "action": None, "item": "rock", "colour": None}
        kinds = ((questions[1:], plain), (questions, truth))
        return [
            Sample(f"s{i}", Image.new("RGB", (8, 8), (i % 256, 0, 0)), (), *kinds[i % 2])
            for i in range(n)
        ]

    return make
