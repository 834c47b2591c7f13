"""Datasets of the hub by short names, streamed.

A seeded subset comes without downloading the whole.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, islice
from numbers import Integral
from urllib.request import urlopen
from zlib import crc32

import numpy as np
from PIL import Image

from xlvlms_tutorial.data.annotations import (
    Record,
    answer_text,
    objects_in,
    question_type,
    samples_of,
)
from xlvlms_tutorial.errors import LoadError, XlvlmsError, not_on_hub
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.text import STYLES, style_share
from xlvlms_tutorial.validation import require

BUFFER = 1000  # rows from which shuffling draws the next
RATE = 16_000  # samples a second of sounds
FRAMES = 8  # of a video, evenly spaced


@dataclass(frozen=True)
class HubSet:
    """Describe where a dataset of the hub lies and how a row of it is read.

    Use ``dataclasses.replace(HUB[name], repo=...)`` to read the same form from elsewhere.

    Parameters
    ----------
    repo : str
        The repository, or a local folder in the same form.
    splits : mapping of str to tuple
        Our names, each with the (configuration, split) pairs of the repository that make it up;
        names with the same pairs divide them, picture by picture.
    read : callable
        Makes a record of a row.
    revision : str, optional
        A commit of the repository, which makes it the same for ever; by default the newest.
    modality : {"image", "video", "audio"}, default "image"
        What the samples are.
    style : str, optional
        Only pictures with a caption in this style are used, with these captions alone.
    pictures : mapping of str to (str, str), optional
        Where the pictures of each split lie if they are apart.
    """

    repo: str
    splits: Mapping[str, tuple[tuple[str | None, str], ...]]
    read: Callable[[Mapping[str, object]], Record]
    revision: str | None = None
    modality: str = "image"
    style: str | None = None
    pictures: Mapping[str, tuple[str | None, str]] | None = None


def hub_samples(name: str, n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Load at most ``n`` samples of a dataset of ``HUB``, shuffled within a buffer.

    :func:`~xlvlms_tutorial.data.load_samples` calls it for a name of the hub. The first samples are
    those of a shorter list. Loading scripts are never run.

    Parameters
    ----------
    name : str
        A key of ``HUB``.
    n : int
        How many samples, 1 or more.
    split : str, default "test"
        One of the dataset's splits.
    seed : int, default 0
        Of the shuffling.

    Returns
    -------
    list of Sample
        Pictures, sounds and videos are decoded when they are used. Truth and questions of pictures
        are those of :func:`~xlvlms_tutorial.data.annotations.samples_of`, where strata rest on the
        samples drawn.

    Raises
    ------
    LoadError
        If the repository cannot be reached and is not in the cache. If the package datasets is
        missing, or the repository lacks a column or needs a loading script.
    InputError
        If ``n`` is below 1, or the dataset has no such split.
    """
    source = HUB[name]
    split = "validation" if split == "val" else split
    splits = ", ".join(source.splits)
    require(isinstance(n, Integral) and n >= 1, f"n={n!r}", "give 1 or more")
    require(split in source.splits, f"{name} has no split {split!r}", f"there are: {splits}")
    records = []
    with _translated(name, source):
        rows = _stream(source, source.splits[split], seed)
        records = list(islice(_selected(source, split, map(source.read, rows)), n))
        if source.pictures:
            _find_pictures(source, source.pictures[split], records)
    if source.modality == "image":
        return samples_of(records, records, seed=seed)
    samples = []
    for record in records:
        samples.append(
            Sample(
                record.id,
                record.source,
                tuple(record.captions),
                tuple(record.questions),
                record.truth,
                source.modality,
            )
        )
    return samples


@contextmanager
def _translated(name: str, source: HubSet) -> Iterator[None]:
    """Turn errors of the libraries below into ours."""
    # of the client that this version of the hub's library uses
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except ImportError as cause:
        raise LoadError(
            f"{name!r} needs the package {cause.name}, which is not installed",
            f"pip install {cause.name}",
        ) from cause
    except (HTTPError, OSError) as cause:
        raise not_on_hub(source.repo) from cause
    except KeyError as cause:
        problem = f"a row of {source.repo!r} ({name}) has no column {cause.args[0]!r}"
        raise LoadError(
            problem,
            "use a repository that has: HUB[name] = dataclasses.replace(HUB[name], repo=...)",
        ) from cause
    except (AttributeError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, XlvlmsError):
            raise
        raise LoadError(
            f"{source.repo!r} ({name}) cannot be read without running its "
            f"code, or not at all ({cause})",
            "use a copy in parquet form: HUB[name] = "
            "dataclasses.replace(HUB[name], repo=...), or a folder",
        ) from cause


def _stream(
    source: HubSet, parts: tuple[tuple[str | None, str], ...], seed: int | None
) -> Iterator[Mapping[str, object]]:
    """Stream the rows of some splits, shuffled where a seed is given, media as bytes."""
    from datasets import concatenate_datasets, load_dataset

    undecoded = []
    for config, split in parts:
        dataset = load_dataset(
            source.repo, config, split=split, streaming=True, revision=source.revision
        )
        undecoded.append(dataset.decode(False))
    rows = concatenate_datasets(undecoded)
    return iter(rows if seed is None else rows.shuffle(seed=seed, buffer_size=BUFFER))


def _selected(source: HubSet, split: str, records: Iterator[Record]) -> Iterator[Record]:
    """Yield the records of a split, with the captions of the style alone where there is one."""
    # several of our splits may share one of the repository: the picture's id decides
    sharing = [name for name, parts in source.splits.items() if parts == source.splits[split]]
    for record in records:
        if crc32(record.id.partition("-")[0].encode()) % len(sharing) != sharing.index(split):
            continue
        if source.style:
            fitting = style_share(record.captions, source.style) if record.captions else []
            record.captions = list(compress(record.captions, fitting))
        if record.captions or not source.style:
            yield record


def _find_pictures(source: HubSet, part: tuple[str | None, str], records: list[Record]) -> None:
    """Fill in pictures that lie apart from the questions, by their id."""
    ids = {str(record.source) for record in records}
    pictures: dict[str, Callable] = {}
    for row in _stream(source, (part,), None):
        if str(row["id"]) in ids:
            pictures[str(row["id"])] = _picture(row)
            if len(pictures) == len(ids):
                break
    missing = sorted(ids - set(pictures))
    if missing:
        raise LoadError(f"{source.repo!r} has no picture {missing[0]}", "use a complete copy")
    for record in records:
        record.source = pictures[str(record.source)]


def _picture(row: Mapping[str, object]) -> Callable[[], Image.Image]:
    """Make a function that opens a row's picture: from its bytes or file, else from its address."""
    content = row.get("image")
    if content is None and not str(row["url"]).startswith(("http://", "https://")):
        raise LoadError(
            f"the address {row['url']!r} of a picture is none of the web",
            "use a repository that holds its pictures",
        )
    if content is None:
        return lambda: Image.open(_fetch(str(row["url"])))
    return lambda: Image.open(_file(content))


def _file(cell: Mapping[str, object] | bytes) -> io.BytesIO:
    """Read the bytes of a picture, sound or video as rows hold it undecoded."""
    content = cell if isinstance(cell, bytes) else cell["bytes"]
    if content is not None:
        return io.BytesIO(content)
    from datasets.utils.file_utils import xopen

    with xopen(cell["path"], "rb") as opened:
        return io.BytesIO(opened.read())


def _fetch(url: str) -> io.BytesIO:
    try:
        with urlopen(url, timeout=60) as answer:  # http or https: checked before
            return io.BytesIO(answer.read())
    except OSError as cause:
        raise not_on_hub(url) from cause


def _sound(cell: Mapping[str, object]) -> np.ndarray:
    """Decode a sound as mono float32 at ``RATE``."""
    import soundfile
    from scipy.signal import resample_poly

    wave, rate = soundfile.read(_file(cell), dtype="float32", always_2d=True)
    return resample_poly(wave.mean(axis=1), RATE, rate).astype(np.float32)


def _frames(cell: Mapping[str, object]) -> list[Image.Image]:
    """Decode ``FRAMES`` frames of a video, evenly spaced."""
    try:
        import av
    except ImportError as cause:
        raise LoadError(
            "videos are read by the package av, which is not installed", "pip install av"
        ) from cause
    with av.open(_file(cell)) as opened:
        frames = [frame.to_image() for frame in opened.decode(video=0)]
    numbers = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return [frames[k] for k in numbers]


def _texts(value: object) -> list[str]:
    """List captions: of a text, or of texts or records with the text as "raw" or "phrase"."""
    captions = []
    for entry in [value] if isinstance(value, str) else list(value or ()):
        text = entry
        if not isinstance(entry, str):
            text = entry["raw" if "raw" in entry else "phrase"]
        if text.strip():
            captions.append(text.strip())
    return list(dict.fromkeys(captions))


def _question(text: str, answer: object, stratum: str | None = None) -> Question:
    plain = answer_text(answer)
    if plain is None or not text.strip():
        raise ValueError(f"question {text!r} with answer {answer!r}")
    target = next(iter(objects_in(text)), "")
    return Question(question_type(text, plain), text, plain, target, stratum)


def _read_coco(row: Mapping[str, object]) -> Record:
    return Record(str(row["cocoid"]), _picture(row), _texts(row["sentences"]))


def _read_vqa(row: Mapping[str, object]) -> Record:
    """Read a row of VQAv2."""
    answer = (
        row.get("multiple_choice_answer") if "answers" in row else row["multiple_choice_answer"]
    )
    question = _question(row["question"], row["answers"] if answer is None else answer)
    name = f"{row['image_id']}-{row['question_id']}"
    return Record(name, _picture(row), questions=[question])


def _read_gqa(row: Mapping[str, object]) -> Record:
    return Record(
        str(row["id"]), row["imageId"], questions=[_question(row["question"], row["answer"])]
    )


def _read_regions(row: Mapping[str, object]) -> Record:
    return Record(str(row["image_id"]), _picture(row), _texts(row["regions"]))


def _read_pope(row: Mapping[str, object]) -> Record:
    """Read a row of POPE."""
    question = _question(row["question"], row["answer"], row["category"])
    name = f"{row['image_source']}-{row['category']}-{row['question_id']}"
    return Record(name, _picture(row), questions=[question])


def _read_clip(row: Mapping[str, object]) -> Record:
    cell = row["video"]
    captions = _texts(row["caption"])
    return Record(str(row.get("video_id") or cell["path"]), lambda: _frames(cell), captions)


def _read_sound(row: Mapping[str, object]) -> Record:
    cell = row["audio"]
    captions = _texts(row["caption"])
    return Record(str(row["audiocap_id"]), lambda: _sound(cell), captions)


def _same(*names: str, config: str | None = None) -> dict[str, tuple[tuple[str | None, str], ...]]:
    """Return splits that are called here as there."""
    return {name: ((config, name),) for name in names}


_KARPATHY = _same("validation", "test") | {"train": ((None, "train"), (None, "restval"))}
_GQA = {"train": "train", "validation": "val", "test": "testdev"}
_VG = "region_descriptions_v1.2.0"
# Repositories in parquet form by their documentation. Visual Genome lies there with a loading
# script only: give a copy in parquet form.
HUB: dict[str, HubSet] = {
    "coco": HubSet("yerevann/coco-karpathy", _KARPATHY, _read_coco),
    # answers of test are withheld
    "vqav2": HubSet(
        "lmms-lab/VQAv2", _same("validation") | {"test": ((None, "validation"),)}, _read_vqa
    ),
    "gqa": HubSet(
        "lmms-lab/GQA",
        {name: ((f"{part}_balanced_instructions", part),) for name, part in _GQA.items()},
        _read_gqa,
        pictures={name: (f"{part}_balanced_images", part) for name, part in _GQA.items()},
    ),
    "pope": HubSet("lmms-lab/POPE", _same("test"), _read_pope),
    "msr-vtt": HubSet("mteb/MSR-VTT", _same("test"), _read_clip, modality="video"),
    "audiocaps": HubSet(
        "OpenSound/AudioCaps", _same("train", "validation", "test"), _read_sound, modality="audio"
    ),
} | {
    f"visual-genome-{style}": HubSet(
        "ranjaykrishna/visual_genome",
        dict.fromkeys(("train", "validation", "test"), ((_VG, "train"),)),
        _read_regions,
        style=style,
    )
    for style in STYLES
}
