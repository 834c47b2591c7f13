"""One record for every dataset: a picture, what references say about it, questions with answers, and the truth where it is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from xlvlms_tutorial.errors import ImageError


@dataclass(frozen=True)
class Question:
    """A question about a picture; ``stratum`` says how a presence question chose its object, and is None elsewhere."""

    type: str
    text: str
    answer: str
    target: str = ""
    stratum: str | None = None


@dataclass(frozen=True)
class Sample:
    """A picture with its references. ``source`` is a picture, a file or a function that draws it, opened when asked for."""

    id: str
    source: Image.Image | Path | Callable[[], Image.Image]
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    truth: Mapping[str, object] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The picture in RGB.

        Raises
        ------
        ImageError
            If the source cannot be read as a picture.
        """
        return as_image(self.source() if callable(self.source) else self.source)


def as_image(source: object) -> Image.Image:
    """A picture in RGB from a picture or a file.

    Raises
    ------
    ImageError
        If the source cannot be read as a picture.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, (str, Path)):
        raise ImageError(source)
    try:
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as cause:
        raise ImageError(source) from cause
