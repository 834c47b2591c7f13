"""One record for every dataset.

A picture, clip or sound, what references say of it, questions with
answers, and the truth where known.
"""

import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from operator import index
from os import PathLike
from typing import SupportsIndex
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

from xlvlms_tutorial.errors import (
    InputError,
    TokenOfInterestError,
    XlvlmsError,
    not_a_picture,
    unusable_prompt,
)
from xlvlms_tutorial.text import whole_words

# What a sample is asked to be described by, for each modality
PROMPTS = {
    "image": "Describe the picture.",
    "video": "Describe the video.",
    "audio": "Describe the sound.",
}
# of picture files; Pillow's other readers are many, and few of them are used enough to be trusted
FORMATS = ("PNG", "JPEG", "WEBP")
# What Pillow raises at files that are cut off, damaged or made to do harm
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
# white in grey pictures of floats, bytes, 16 and 32 bits
_FULL_SCALES = (1.0, 255.0, 65535.0, 2.0**31 - 1)
# a sound of floats goes from -1 to 1; resampling may add a little, whole numbers
# taken for floats add much more
_LOUDEST = 10.0


@dataclass(frozen=True)
class Question:
    """Hold a question about a picture, clip or sound, with its correct answer.

    Parameters
    ----------
    type : str
        The kind of question, such as "count", "colour" or "presence"; accuracy is given by type.
    text : str
        The question, as a prompt for the model.
    answer : str
        The correct answer.
    target : str, default ""
        The object that the question is about.
    stratum : str, optional
        How a presence question chose its object: "random", "popular" or "adversarial". None
        elsewhere.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Question
    >>> question = Question("count", "How many keys are there?", "two", target="key")
    >>> question.answer, question.stratum
    ('two', None)
    """

    type: str
    text: str
    answer: str
    target: str = ""
    stratum: str | None = None


@dataclass(frozen=True)
class Sample:
    """Hold a picture, clip or sound with its captions, questions and known facts.

    Every dataset is a list of these (:func:`~xlvlms_tutorial.data.load_samples`).

    Parameters
    ----------
    id : str
        A name that no other sample of the dataset has.
    source : object
        A picture as :func:`as_image` takes it, or a list of pictures (of none, of several); a
        clip's list of frames, a sound's samples (1-d array), or a function without arguments that
        makes it when it is used.
    captions : tuple of str, default ()
        The reference captions.
    questions : tuple of Question, default ()
        The questions with their answers.
    truth : mapping of str to object, default {}
        What is known of the content, by factor ("subject", "colour", ...); None where unknown.
    modality : {"image", "video", "audio"}, default "image"
        What the source is.
    regions : function without arguments, optional
        It returns where things are: a mask of the picture's pixels, bool (height, width), by the
        word for what stands there. By default that is not known.

    Examples
    --------
    >>> from PIL import Image
    >>> from xlvlms_tutorial.data import Sample
    >>> sample = Sample("wall", Image.new("L", (6, 4)), ("A grey wall.",), truth={"item": "wall"})
    >>> sample.image.mode, sample.image.size
    ('RGB', (6, 4))
    >>> sample.content.size == sample.image.size
    True
    """

    id: str
    source: object
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    truth: Mapping[str, object] = field(default_factory=dict)
    modality: str = "image"
    # how regions are made is no part of what a sample is: two functions are never equal
    regions: Callable[[], Mapping[str, Bool[np.ndarray, "height width"]]] | None = field(
        default=None, compare=False
    )

    @property
    def content(self) -> Image.Image | list[Image.Image] | np.ndarray:
        """Return the picture (or pictures) or the clip's frames in RGB, or the sound's samples.

        Raises
        ------
        InputError
            If a picture or a frame cannot be read.
        """
        content = self._opened()
        if self.modality == "image" and not isinstance(content, (list, tuple)):
            return as_image(content)
        if self.modality in ("image", "video"):
            return [as_image(frame) for frame in content]
        return as_sound(content)

    @property
    def image(self) -> Image.Image:
        """Return the picture in RGB.

        Raises
        ------
        InputError
            If the source cannot be read as a picture, as that of a clip or a sound.
        """
        return as_image(self._opened())

    def _opened(self) -> object:
        if not callable(self.source):
            return self.source
        try:
            return self.source()
        except XlvlmsError:
            raise
        except (*_BROKEN, Image.DecompressionBombError) as cause:
            reason = (
                f"what the source of sample {self.id!r} makes ({type(cause).__name__}: {cause})"
            )
            raise not_a_picture(reason) from cause


def as_image(source: object) -> Image.Image:
    """Convert a picture, an array, bytes, an open file or an address to a picture in RGB, upright.

    Bytes are those of a file; an address is a file's path or ``file://``. The picture is turned as
    its EXIF orientation says. What is transparent is laid on white.

    Parameters
    ----------
    source : Image, array, bytes, file, str or path
        Arrays (of torch too) are (height, width), (height, width, channels) or
        (channels, height, width), with 1, 3 or 4 channels in the order red, green, blue, opacity.
        Levels of 16 or 32 bits or of floats are scaled to 0 to 255, by the smallest full scale that
        holds them: 1 for floats, 255, 65535 or 2**31 - 1.

    Returns
    -------
    PIL.Image.Image
        In RGB.

    Raises
    ------
    InputError
        If the source cannot be read as a picture, has no pixel or too many, has levels that are
        negative or not finite, or is an address on the network.

    Examples
    --------
    >>> import numpy as np
    >>> picture = as_image(np.ones((4, 6)))
    >>> picture.size, picture.getpixel((0, 0))
    ((6, 4), (255, 255, 255))
    """
    try:
        if isinstance(source, Image.Image):
            return _upright(source, source)
        if hasattr(source, "__array__"):
            return _upright(_from_array(source), source)
        with Image.open(_file(source), formats=FORMATS) as picture:
            return _upright(picture, source)
    except InputError:
        raise
    except Image.DecompressionBombError as cause:
        problem = (
            f"has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels at which a picture "
            "may be made to fill the memory"
        )
        raise not_a_picture(
            source, problem, "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from cause
    except _BROKEN as cause:
        raise not_a_picture(source) from cause


def _file(source: object) -> object:
    """Return what Pillow opens: a path, or an open file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source)
    if isinstance(source, str) and (address := re.match(r"(\w[\w+.-]+)://", source)):
        place = urlsplit(source)
        if address[1].lower() != "file" or place.netloc not in ("", "localhost"):
            raise not_a_picture(
                source,
                "is an address on the network, from which nothing is fetched here",
                "download it, and give its path",
            )
        return url2pathname(place.path)
    if isinstance(source, (str, PathLike)) or hasattr(source, "read"):
        return source
    raise not_a_picture(source)


def _from_array(source: object) -> Image.Image:
    """Return the picture in an array."""
    # one of torch may be on a GPU, or be trained
    values = source.detach().cpu() if hasattr(source, "detach") else source
    levels = np.asarray(values)
    if levels.ndim == 3 and levels.shape[2] not in (1, 3, 4) and levels.shape[0] in (1, 3, 4):
        levels = np.moveaxis(levels, 0, 2)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[..., 0]
    shape, dtype = levels.shape, levels.dtype
    drawable = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
    if dtype.kind not in "buif" or not drawable:
        raise not_a_picture(
            source,
            f"of {dtype} and shape {shape} is not a picture",
            "give numbers of shape (height, width) or (height, width, 3 or 4), "
            "one picture at a time",
        )
    _require_pixels(shape[1], shape[0], source)
    if dtype == np.uint8:
        return Image.fromarray(levels)
    if dtype.kind in "fb":
        scales = _FULL_SCALES
    elif dtype.kind == "u" and dtype.itemsize == 2:
        scales = _FULL_SCALES[2:3]
    else:
        scales = _FULL_SCALES[1:]
    return Image.fromarray(_scaled(levels, scales, source))


def _require_pixels(width: int, height: int, source: object) -> None:
    if min(width, height) < 1:
        raise not_a_picture(
            source, f"has {width} x {height} pixels", "give a picture of at least one pixel"
        )


def _upright(picture: Image.Image, source: object) -> Image.Image:
    _require_pixels(picture.width, picture.height, source)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _grey(picture, source)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    # Pillow's only way from La
    picture = picture.convert("LA") if picture.mode == "La" else picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _grey(picture: Image.Image, source: object) -> Image.Image:
    """Return a picture of deep grey levels in eight bits a colour."""
    # 16 bits say what white is; in whole numbers of 32 bits and floats, files keep every scale
    scales = _FULL_SCALES[picture.mode == "I" :]
    if picture.mode.startswith("I;16"):
        scales = _FULL_SCALES[2:3]
    levels = _scaled(np.asarray(picture), scales, source)
    return Image.fromarray(levels).convert("RGB")


def _scaled(values: np.ndarray, scales: Sequence[float], source: object) -> np.ndarray:
    """Scale levels to 0 to 255, by the smallest of these full scales that holds them."""
    levels = np.asarray(values, dtype=np.float64)
    low, high = levels.min(), levels.max()
    for scale in scales:
        if low >= 0 and high <= scale:
            return np.rint(levels * (255 / scale)).astype(np.uint8)
    # NaN comes here too
    problem = f"has {'grey ' * (levels.ndim == 2)}levels from {low:g} to {high:g}"
    raise not_a_picture(source, problem, "scale them to 0 to 1, or to 0 to 255")


def as_sound(source: object) -> np.ndarray:
    """Convert the samples of a sound to floats from -1 to 1.

    Parameters
    ----------
    source : array-like (n,)
        Floats, which stay as they are, or the integers of a wav file (int16, int32 or uint8).

    Returns
    -------
    ndarray (n,)
        The sound; of integers in float32.

    Raises
    ------
    InputError
        If they are neither, not finite, or floats far beyond -1 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> as_sound(np.array([0, 16384], dtype=np.int16)).tolist()
    [0.0, 0.5]
    """
    wave = np.asarray(source)
    if wave.dtype == np.uint8:  # the one format of wav files without a sign
        return (wave.astype(np.float32) - 128) / 128
    if wave.dtype in (np.int16, np.int32):
        return (wave / -float(np.iinfo(wave.dtype).min)).astype(np.float32)
    # not so for NaN
    if wave.dtype.kind == "f" and np.abs(wave, dtype=np.float64).max(initial=0) <= _LOUDEST:
        return wave
    numeric = wave.size and wave.dtype.kind in "fiu"
    span = f" from {wave.min():g} to {wave.max():g}" if numeric else ""
    raise unusable_prompt(
        f"a sound of {wave.dtype}{span}",
        "give floats from -1 to 1, or int16, int32 or uint8 as a wav file has them",
    )


def media(samples: Sequence[Sample]) -> dict[str, list]:
    """Return what samples show, under the name by which processors take it.

    Use it to give samples of any modality to a model.

    Parameters
    ----------
    samples : sequence of Sample
        Samples of one modality.

    Returns
    -------
    dict of str to list
        One key, "images", "videos" or "audio", with the content of each sample.

    Raises
    ------
    InputError
        If the samples are of different modalities, or of one that is not known.

    Examples
    --------
    >>> from PIL import Image
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.samples import media
    >>> scene = Sample("wall", Image.new("L", (6, 4)))
    >>> contents = media([scene, scene])
    >>> list(contents), len(contents["images"])
    (['images'], 2)
    """
    kinds = list(dict.fromkeys(sample.modality for sample in samples))
    names = {"image": "images", "video": "videos", "audio": "audio"}
    if len(kinds) != 1 or kinds[0] not in names:
        raise InputError(
            f"samples of modality {', '.join(kinds) or 'none'}",
            f"give samples of one of {', '.join(names)} at a time",
        )
    content = [sample.content for sample in samples]
    return {names[kinds[0]]: content}


def mentioning(
    samples: Iterable[Sample], words: str | Sequence[str], n: SupportsIndex | None = None
) -> list[Sample]:
    """Select the samples that have one of these words or phrases in a reference caption.

    Use it to collect pictures of one thing, whose activations hold its concept. Words count whole,
    in any case.

    Parameters
    ----------
    samples : iterable of Sample
        The samples to select from.
    words : str or sequence of str
        The word or phrase, or several of them.
    n : int, optional
        How many samples to return at most; by default all.

    Returns
    -------
    list of Sample
        In the order of ``samples``.

    Raises
    ------
    InputError
        If there are no words, one is empty, or n is below 1.
    TokenOfInterestError
        If no caption has one of the words; the message has the words that captions have most often.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample, mentioning
    >>> scenes = [Sample("a", None, ("A red key.",)), Sample("b", None, ("A monkey.",))]
    >>> [scene.id for scene in mentioning(scenes, "key")]
    ['a']
    """
    samples = list(samples)
    if n is not None and index(n) < 1:
        raise InputError(f"n={n!r}", "give 1 or more")
    pattern = _pattern(words)
    selected = [sample for sample in samples if any(map(pattern.search, sample.captions))]
    if not selected:
        raise _not_mentioned(words, [sample.captions for sample in samples])
    return selected[:n]


def _pattern(words: str | Sequence[str]) -> re.Pattern[str]:
    """Return what finds any of some words or phrases, whole, in any case."""
    words = [words] if isinstance(words, str) else list(words)
    written = all(isinstance(word, str) and word.strip() for word in words)
    if not words or not written:
        raise InputError(f"words {words!r}", "give words or phrases, none of them empty")
    return whole_words(words)


def _not_mentioned(
    words: str | Sequence[str], texts: Sequence[Iterable[str]]
) -> TokenOfInterestError:
    """Make the error that no text has one of the words, with the words that texts have most."""
    counts = Counter()
    for group in texts:
        for text in group:
            counts.update(set(re.findall(r"\w+", text.lower())))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    return TokenOfInterestError(
        [words] if isinstance(words, str) else list(words), len(texts), frequent
    )
