"""One record for every dataset: a picture, clip or sound, what references say of it, questions with answers, and the truth where known."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from xlvlms_tutorial.errors import ImageError, LengthError, SelectionError, TokenOfInterestError

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
    samples = list(samples)
    if n is not None and n < 1:
        raise SelectionError(f"n={n!r}", "give 1 or more")
    pattern = _whole(words)
    found = [sample for sample in samples if any(map(pattern.search, sample.captions))]
    if not found:
        raise _unsaid(words, [sample.captions for sample in samples])
    return found[:n]


def both_mention(samples: Sequence[Sample], predictions: Sequence[str], words: str | Sequence[str]) -> list[int]:
    """The papers' filter: which samples have one of these words in the prediction and in some reference, whole words, in any case.

    Raises
    ------
    LengthError
        If there are not as many predictions as samples.
    SelectionError
        If there are no words, or one is empty.
    TokenOfInterestError
        If no sample has a word in both, with the words that predictions have most often.
    """
    if len(samples) != len(predictions):
        raise LengthError(samples=len(samples), predictions=len(predictions))
    pattern = _whole(words)
    pairs = enumerate(zip(samples, predictions, strict=True))
    found = [k for k, (sample, told) in pairs if pattern.search(told) and any(map(pattern.search, sample.captions))]
    if not found:
        raise _unsaid(words, [[told] for told in predictions])
    return found


def _whole(words: str | Sequence[str]) -> re.Pattern[str]:
    """What finds any of some words or phrases, whole, in any case."""
    words = [words] if isinstance(words, str) else list(words)
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise SelectionError(f"words {words!r}", "give words or phrases, none of them empty")
    phrases = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words)
    return re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE)


def _unsaid(words: str | Sequence[str], texts: Sequence[Iterable[str]]) -> TokenOfInterestError:
    heard = Counter(word for told in texts for text in told for word in set(re.findall(r"\w+", text.lower())))
    most = sorted(heard.items(), key=lambda item: (-item[1], item[0]))[:10]
    return TokenOfInterestError([words] if isinstance(words, str) else list(words), len(texts), most)
