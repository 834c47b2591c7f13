"""One record for every dataset: a picture, clip or sound, what references say of it, questions with answers, and the truth where known."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from xlvlms_tutorial.errors import ImageError, SelectionError, TokenOfInterestError

# What a sample is asked to be described by, for each modality
PROMPTS = {"image": "Describe the picture.", "video": "Describe the video.", "audio": "Describe the sound."}


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
    """A picture, clip or sound with its references.

    ``source`` is a picture or its file, a clip's list of frames, a sound's samples (1-d array), or a function that makes it when
    asked for; ``modality`` says which: "image", "video" or "audio".
    """

    id: str
    source: Image.Image | Path | Sequence[Image.Image] | np.ndarray | Callable[[], object]
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    truth: Mapping[str, object] = field(default_factory=dict)
    modality: str = "image"

    @property
    def content(self) -> Image.Image | list[Image.Image] | np.ndarray:
        """The picture in RGB, the clip's frames in RGB, or the sound's samples.

        Raises
        ------
        ImageError
            If a picture or a frame cannot be read.
        """
        made = self.source() if callable(self.source) else self.source
        if self.modality == "image":
            return as_image(made)
        return [as_image(frame) for frame in made] if self.modality == "video" else np.asarray(made)

    @property
    def image(self) -> Image.Image:
        """The picture in RGB.

        Raises
        ------
        ImageError
            If the source cannot be read as a picture, as that of a clip or a sound.
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


def media(samples: Sequence[Sample]) -> dict[str, list]:
    """What samples show, under the name by which processors take it: images, videos or audio.

    Raises
    ------
    SelectionError
        If the samples are of different modalities, or of one that is not known.
    """
    kinds = list(dict.fromkeys(sample.modality for sample in samples))
    names = {"image": "images", "video": "videos", "audio": "audio"}
    if len(kinds) != 1 or kinds[0] not in names:
        raise SelectionError(f"samples of modality {', '.join(kinds) or 'none'}", f"give samples of one of {', '.join(names)} at a time")
    return {names[kinds[0]]: [sample.content for sample in samples]}


def mentioning(samples: Iterable[Sample], words: str | Sequence[str], n: int | None = None) -> list[Sample]:
    """The samples, at most ``n``, with one of these words (or phrases) in a reference caption: whole words, in any case.

    Raises
    ------
    SelectionError
        If there are no words, one is empty, or n is below 1.
    TokenOfInterestError
        If no caption has one of the words, with the words that captions have most often.
    """
    samples, words = list(samples), [words] if isinstance(words, str) else list(words)
    if not words or not all(isinstance(word, str) and word.strip() for word in words) or (n is not None and n < 1):
        raise SelectionError(f"words {words!r}, n {n!r}", "give words or phrases, none of them empty, and n of 1 or more")
    phrases = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    pattern = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE)
    found = [sample for sample in samples if any(map(pattern.search, sample.captions))]
    if not found:
        heard = Counter(word for sample in samples for caption in sample.captions for word in set(re.findall(r"\w+", caption.lower())))
        most = sorted(heard.items(), key=lambda item: (-item[1], item[0]))[:10]
        raise TokenOfInterestError(words, len(samples), most)
    return found[:n]
