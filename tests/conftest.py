"""What several tests share: samples without the world's sprites, and a model whose answers are known."""

from collections.abc import Callable

import pytest
from PIL import Image

from xlvlms_tutorial.data.samples import Question, Sample


class FakeVLM:
    """Speaks by rule: ``say(picture, text)`` (or clip, or sound) decides every answer. Keeps what it was asked."""

    name = "fake"

    def __init__(self, say: Callable[[object, str], str]) -> None:
        self.say = say
        self.calls: list[tuple[int, int]] = []

    def generate(self, images, texts, max_new_tokens=32, batch_size=16, progress=False, **shown):
        (given,) = [kind for kind in (images, *shown.values()) if kind is not None]  # pictures, clips or sounds
        assert len(given) == len(texts) > 0
        self.calls.append((len(texts), max_new_tokens))
        return [f" {self.say(one, text)}" for one, text in zip(given, texts, strict=True)]


@pytest.fixture
def fake_vlm() -> type[FakeVLM]:
    """The class of the fake model."""
    return FakeVLM


@pytest.fixture
def samples() -> Callable[[int], list[Sample]]:
    """A function that makes n samples; the red channel of each picture is the sample's number."""

    def make(n: int) -> list[Sample]:
        asked = (
            Question("colour", "What colour is the key?", "red", "key"),
            Question("presence", "Is there a robot?", "yes", "robot", "random"),
            Question("presence", "Is there a bush?", "no", "bush", "popular"),
        )
        truth = {"subject": "robot", "action": "walking", "item": "key", "colour": "red", "place": "snow"}
        plain = truth | {"subject": "frog", "action": None, "item": "rock", "colour": None}
        kinds = ((asked[1:], plain), (asked, truth))
        return [Sample(f"s{i}", Image.new("RGB", (8, 8), (i % 256, 0, 0)), (), *kinds[i % 2]) for i in range(n)]

    return make
