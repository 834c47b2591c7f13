"""Local folders as datasets.

COCO-format json (also Karpathy's), VQA-format json, csv and json lines, with pictures beside them.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd

from xlvlms_tutorial.data.annotations import samples_of
from xlvlms_tutorial.data.entries import KNOWN, Stray
from xlvlms_tutorial.data.formats import read
from xlvlms_tutorial.data.gathered import Gathered, Part, Picture, missing
from xlvlms_tutorial.data.tree import DATA, SPLITS, Tree, folder_split, hidden, listing, named_split
from xlvlms_tutorial.errors import AnnotationError, unknown_dataset
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.text import first_few, style_rate
from xlvlms_tutorial.validation import require

_SEEDS = {"train": 0, "validation": 2, "test": 4}  # each split is drawn in an order of its own


def folder_samples(folder: str | Path, n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """Load at most ``n`` samples of a folder's split, drawn by the seed.

    :func:`~xlvlms_tutorial.data.load_samples` calls it for a folder. The first of a longer list are
    those of a shorter one. Splits are told by a key or column "split", else by the folder or the
    name of a file (train/captions.json, captions_val2017.json), else by the folder of the picture.
    Where some pictures have a split, those without are in none, with a warning; a folder without
    splits gives every split from everything, in an order of its own: samples of two splits may then
    be the same. Files of no form that is known are left alone with a warning; :func:`folder_report`
    says what was taken and what was not.

    Parameters
    ----------
    folder : str or Path
        A folder with pictures, and annotations in COCO's, Karpathy's, Visual Genome's or VQA's
        form, in csv or in json lines.
    n : int
        How many samples, 1 or more.
    split : str, default "test"
        "train", "validation" or "test", by any of their usual names.
    seed : int, default 0
        Which samples are drawn, and in which order.

    Returns
    -------
    list of Sample
        Pictures are opened when they are used. Truth and questions are those of
        :func:`~xlvlms_tutorial.data.annotations.samples_of`.

    Raises
    ------
    AnnotationError
        If no file can be used, one is malformed or lacks a key, a picture is missing or outside of
        the folder, or is in two splits.
    InputError
        If ``n`` is below 1, or the folder has no such split.
    """
    require(isinstance(n, Integral) and n >= 1, f"n={n!r}", "give 1 or more")
    require(split in SPLITS, f"no split {split!r}", f"allowed: {', '.join(_SEEDS)}")
    split = SPLITS[split]
    gathered = _gathered(Path(folder))
    splits = sorted(gathered.splits())
    records = list(gathered.pictures)
    if splits:
        records = [picture for picture in records if picture.split == split]
    unused = [f"{part.file} ({part.why})" for part in _unread(gathered)]
    unused += _unsplit(gathered)
    if unused:
        message = first_few(unused, 3, "; ")
        warnings.warn(
            f"{folder}: left alone: {message}. Next: xlvlms data {folder} shows what "
            "was taken and what was not",
            stacklevel=3,
        )
    if gathered.shared:
        message = (
            f"{len(gathered.shared)} pictures are in two splits as copies, the first "
            f"as {' and '.join(gathered.shared[0])}"
        )
        warnings.warn(
            f"{folder}: {message}. Next: leave one copy of each, so that "
            "none leaks into another split",
            stacklevel=3,
        )
    require(
        records,
        f"{folder}: no split {split!r}",
        f"there are: {', '.join(splits) or 'no annotated pictures'}",
    )
    absent = [picture for picture in records if not picture.exists]
    if absent:
        raise missing(gathered.tree, absent)
    records.sort(key=lambda r: r.id)
    rng = np.random.default_rng([seed, _SEEDS[split]])
    order = rng.permutation(len(records))
    selected = []
    for k in order[:n]:
        record = records[k]
        selected.append(replace(record, source=Path(folder) / record.source))
    return samples_of(records, selected, tuple(gathered.names), seed)


def folder_report(folder: str | Path) -> pd.DataFrame:
    """Report what was read from each file of a folder, and what was left alone and why.

    Use it before :func:`~xlvlms_tutorial.data.load_samples` on a folder of your own; the command
    ``xlvlms data FOLDER`` prints it.

    Parameters
    ----------
    folder : str or Path
        A folder with pictures and annotations.

    Returns
    -------
    pandas.DataFrame
        A row a file; columns file, form, split, taken (what was read), "left alone" (what was not,
        and why). A last row says how many of the folder's pictures are in each split, and how many
        no file speaks of.

    Raises
    ------
    AnnotationError
        If no file can be used, or one is malformed.
    InputError
        If there is no such folder.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from xlvlms_tutorial.data import folder_report, write_coco
    >>> folder = write_coco(samples, Path(mkdtemp()) / "coco")
    >>> folder_report(folder)["file"].tolist()
    ['answers.json', 'captions.json', 'instances.json', 'questions.json', 'pictures']
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise unknown_dataset(str(folder), ("folders that exist",))
    gathered = _gathered(folder)
    rows = []
    for part in gathered.parts:
        counts = Counter() if part.reason else part.used | Counter(pictures=len(part.pictures))
        reason = part.why or _counts(part.unused)
        rows.append((part.file, part.form, part.split or "", _counts(counts), reason))
    n_pictures = Counter(picture.split for picture in gathered.pictures)
    splits = []
    for name in (*_SEEDS, None):
        if n_pictures[name]:
            splits.append(f"{name or 'without a split'}: {n_pictures[name]}")
    unused = []
    described = {picture.source for picture in gathered.pictures}
    silent = len(gathered.tree.pictures - described)
    if silent:
        unused.append(f"{silent} of which no file says anything")
    if gathered.shared:
        copies = " and ".join(gathered.shared[0])
        unused.append(f"{len(gathered.shared)} in two splits as copies: {copies}")
    rows.append(("pictures", "", "", ", ".join(splits), "; ".join(unused)))
    return pd.DataFrame(rows, columns=["file", "form", "split", "taken", "left alone"])


def _counts(counter: Counter) -> str:
    counts = []
    for kind, number in sorted(counter.items()):
        if number:
            counts.append(f"{kind}: {number}")
    return ", ".join(counts)


def _gathered(folder: Path) -> Gathered:
    """Read what a folder says, once as long as nothing in it changes.

    COCO's files take minutes, and a chapter asks for several splits.
    """
    listed = listing(folder)
    stamps = []
    for place, names in listed:
        for name in names:
            path = folder / f"{place}{name}"
            if not name.lower().endswith(DATA) or path.is_dir():
                continue
            is_file = path.is_file()
            state = os.stat(path, follow_symlinks=is_file)  # a link to nothing has a state too
            stamps.append((f"{place}{name}", state.st_mtime_ns, state.st_size, is_file))
    return _read(folder, listed, tuple(stamps))


@lru_cache(maxsize=1)
def _read(folder: Path, listed: tuple, files: tuple[tuple[str, int, int, bool], ...]) -> Gathered:
    gathered = Gathered(Tree(folder, listed))
    root = folder.resolve()
    private = set()
    for place, names in listed:
        for name in filter(hidden, names):
            file = f"{place}{name}"
            private.add(file)
            reason = "hidden: systems and editors make it for themselves"
            gathered.parts.append(Part(file, str(folder / file), reason=reason, quiet=True))
    later = []
    for file, *_, is_file in sorted(files):
        if file in private:
            continue
        stem = file.rpartition("/")[2].rpartition(".")[0]
        part = Part(file, str(folder / file), folder_split(file) or named_split(stem))
        gathered.parts.append(part)
        with _stray(part):
            if not is_file:
                raise Stray(f"{part} is no file, or a link to none", "leave files only")
            linked = not (folder / file).resolve().is_relative_to(root)
            for order, add in read(gathered, part, linked):
                later.append((order, len(later), part, add))
    for *_, part, add in sorted(later, key=lambda step: step[:2]):
        with _stray(part):
            add()
    gathered.finish()
    gathered.pictures = [picture for picture in gathered.pictures if _described(picture)]
    _count_alone(gathered)
    unread = _unread(gathered)
    if unread and not gathered.pictures:
        # what asks says more than what answers
        raise AnnotationError(min(unread, key=lambda part: part.form == "VQA answers").reason)
    if all(part.quiet for part in gathered.parts):
        raise AnnotationError(f"{folder}: no json or csv file", KNOWN)
    return gathered


def _described(picture: Picture) -> bool:
    """Return whether any file says something of a picture, be it that it has no boxes."""
    return bool(picture.captions or picture.boxes is not None or picture.questions or picture.truth)


def _unread(gathered: Gathered) -> list[Part]:
    """List the files that were meant for data and could not be read."""
    return [part for part in gathered.parts if part.reason and not part.quiet]


@contextmanager
def _stray(part: Part) -> Iterator[None]:
    """Leave a file alone of which nothing fits a known form, and keep the reason.

    One file too many must not make a folder useless.
    """
    try:
        yield
    except Stray as cause:
        part.reason = str(cause)


def _count_alone(gathered: Gathered) -> None:
    """Note of each file what of it can be in no sample."""
    divided = bool(gathered.splits())
    for part in gathered.parts:
        if part.form == "VQA answers" and not (part.used or part.unused or part.reason):
            part.reason = f"{part}: no question asks for its answers"
        if part.reason:
            continue
        pictures = part.pictures.values()
        if divided:
            unsplit = _count_unsplit(pictures)
            part.unused["pictures in no split, while others are in one"] = unsplit
        absent = sum(not picture.exists for picture in pictures)
        part.unused["pictures that are missing"] = absent


def _count_unsplit(pictures: Iterable[Picture]) -> int:
    return sum(picture.split is None for picture in pictures)


def _unsplit(gathered: Gathered) -> list[str]:
    count = _count_unsplit(gathered.pictures)
    if 0 < count < len(gathered.pictures):
        return [f"{count} pictures in no split, while others are in one"]
    return []


def in_style(samples: Sequence[Sample], style: str, dataset: str) -> list[Sample]:
    """Return the same samples, each with its one caption that has most of a style.

    Parameters
    ----------
    samples : sequence of Sample
        The samples; those without captions are left out.
    style : {"place", "colour", "mood"}
        The style.
    dataset : str
        Its name, for the message.

    Returns
    -------
    list of Sample
        With one caption each.

    Raises
    ------
    AnnotationError
        If no caption of any sample has a word of the style.
    """
    samples = [sample for sample in samples if sample.captions]
    rates = [style_rate(sample.captions, style) for sample in samples]
    if not any(rate.any() for rate in rates):
        raise AnnotationError(
            f"{dataset}: no caption of {len(samples)} samples has a word of {style}",
            "give more samples or other captions",
        )
    styled = []
    for sample, rate in zip(samples, rates, strict=True):
        caption = sample.captions[int(rate.argmax())]
        styled.append(replace(sample, captions=(caption,)))
    return styled
