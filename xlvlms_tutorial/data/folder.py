"""Local folders as datasets.

COCO-format json (also Karpathy's), VQA-format json, csv and json lines, with pictures beside them.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
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
from xlvlms_tutorial.data.gathered import Gathered, Part, missing
from xlvlms_tutorial.data.tree import DATA, SPLITS, Tree, folder_split, hidden, listing, named_split
from xlvlms_tutorial.errors import AnnotationError, DatasetError, SelectionError
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.text import style_rate

_SEEDS = {"train": 0, "validation": 2, "test": 4}  # each split is drawn in an order of its own


def folder_samples(folder: str | Path, n: int, split: str = "test", seed: int = 0) -> list[Sample]:
    """At most ``n`` samples of a folder's split, drawn by the seed.

    The first of a longer list are those of a shorter one. Splits are told by a key or column
    "split", else by the folder or the name of a file
    (train/captions.json, captions_val2017.json), else by the folder of the picture. Where some
    pictures have a split, those without are in none, with a warning; a folder without splits
    gives every split from everything, in an order of its own: samples of two splits may then be
    the same. Pictures are opened when asked for. Truth and questions are those of
    :func:`~xlvlms_tutorial.data.annotations.samples_of`. Files of no form that is known are left
    alone with a warning; :func:`folder_report` says what was taken and what was not.

    Raises
    ------
    AnnotationError
        If no file can be used, one is malformed or lacks a key, a picture is missing or outside of
        the folder, or is in two splits.
    SelectionError
        If ``n`` is below 1, or the folder has no such split.
    """
    if not isinstance(n, Integral) or n < 1:
        raise SelectionError(f"n={n!r}", "give 1 or more")
    if split not in SPLITS:
        raise SelectionError(f"no split {split!r}", f"allowed: {', '.join(_SEEDS)}")
    split = SPLITS[split]
    gathered = _gathered(Path(folder))
    splits = sorted({p.split for p in gathered.pictures} - {None})
    records = [p for p in gathered.pictures if not splits or p.split == split]
    if alone := [
        f"{part.file} ({part.why})" for part in gathered.parts if part.reason and not part.quiet
    ] + _unsplit(gathered):
        message = "; ".join(alone[:3]) + ("; ..." if len(alone) > 3 else "")
        warnings.warn(
            (
                f"{folder}: left alone: {message}. Next: xlvlms data {folder} shows what "
                "was taken and what was not"
            ),
            stacklevel=3,
        )
    if gathered.shared:
        message = (
            f"{len(gathered.shared)} pictures are in two splits as copies, the first "
            f"as {' and '.join(gathered.shared[0])}"
        )
        warnings.warn(
            (
                f"{folder}: {message}. Next: leave one copy of each, so that "
                "none leaks into another split"
            ),
            stacklevel=3,
        )
    if not records:
        raise SelectionError(
            f"{folder}: no split {split!r}",
            f"there are: {', '.join(splits) or 'no annotated pictures'}",
        )
    if absent := [p for p in records if not p.there]:
        raise missing(gathered.tree, absent)
    records.sort(key=lambda r: r.id)
    order = np.random.default_rng([seed, _SEEDS[split]]).permutation(len(records))
    drawn = [replace(records[k], source=Path(folder) / records[k].source) for k in order[:n]]
    return samples_of(records, drawn, tuple(gathered.names), seed)


def folder_report(folder: str | Path) -> pd.DataFrame:
    """What each file of a folder gave.

    A row a file, with its form, its split, what was taken, what was left alone and why. A last row
    says how many of the folder's pictures are in each split, and how many no file speaks of.

    Raises
    ------
    AnnotationError
        If no file can be used, or one is malformed.
    DatasetError
        If there is no such folder.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DatasetError(str(folder), ("folders that exist",))
    gathered = _gathered(folder)
    counts = lambda counter: ", ".join(
        f"{what}: {number}" for what, number in sorted(counter.items()) if number
    )
    rows = []
    for part in gathered.parts:
        taken = Counter() if part.reason else part.taken | Counter(pictures=len(part.pictures))
        rows.append(
            (part.file, part.form, part.split or "", counts(taken), part.why or counts(part.left))
        )
    splits = {name: sum(p.split == name for p in gathered.pictures) for name in (*_SEEDS, None)}
    counted = ", ".join(
        f"{name or 'without a split'}: {number}" for name, number in splits.items() if number
    )
    silent = len(gathered.tree.pictures - {p.source for p in gathered.pictures})
    left = [f"{silent} of which no file says anything"] if silent else []
    left += (
        [f"{len(gathered.shared)} in two splits as copies: {' and '.join(gathered.shared[0])}"]
        if gathered.shared
        else []
    )
    rows.append(("pictures", "", "", counted, "; ".join(left)))
    return pd.DataFrame(rows, columns=["file", "form", "split", "taken", "left alone"])


def _gathered(folder: Path) -> Gathered:
    """What a folder says, read once as long as nothing in it changes.

    COCO's files take minutes, and a chapter asks for several splits.
    """
    listed = listing(folder)
    files = [
        f"{place}{name}" for place, names in listed for name in names if name.lower().endswith(DATA)
    ]
    stamps = ((file, (folder / file).is_file()) for file in files if not (folder / file).is_dir())
    stamps = (
        (file, os.stat(folder / file, follow_symlinks=there), there) for file, there in stamps
    )
    return _read(
        folder,
        listed,
        tuple((file, at.st_mtime_ns, at.st_size, there) for file, at, there in stamps),
    )


@lru_cache(maxsize=1)
def _read(folder: Path, listed: tuple, files: tuple[tuple[str, int, int, bool], ...]) -> Gathered:
    gathered, later, root = Gathered(Tree(folder, listed)), [], folder.resolve()
    private = [f"{place}{name}" for place, names in listed for name in names if hidden(name)]
    gathered.parts = [
        Part(
            file,
            str(folder / file),
            reason="hidden: systems and editors make it for themselves",
            quiet=True,
        )
        for file in private
    ]
    for file, *_, there in sorted(one for one in files if one[0] not in set(private)):
        stem = file.rpartition("/")[2].rpartition(".")[0]
        part = Part(file, str(folder / file), folder_split(file) or named_split(stem))
        gathered.parts.append(part)
        with _stray(part):
            if not there:
                raise Stray(f"{part} is no file, or a link to none", "leave files only")
            linked = not (folder / file).resolve().is_relative_to(root)
            later += [(order, len(later), part, add) for order, add in read(gathered, part, linked)]
    for *_, part, add in sorted(later, key=lambda step: step[:2]):
        with _stray(part):
            add()
    gathered.finish()
    gathered.pictures = [
        p for p in gathered.pictures if p.captions or p.boxes is not None or p.questions or p.truth
    ]
    _count_alone(gathered)
    alone = [part for part in gathered.parts if part.reason and not part.quiet]
    if alone and not gathered.pictures:
        # what asks says more than what answers
        raise AnnotationError(min(alone, key=lambda part: part.form == "VQA answers").reason)
    if all(part.quiet for part in gathered.parts):
        raise AnnotationError(f"{folder}: no json or csv file", KNOWN)
    return gathered


@contextmanager
def _stray(part: Part) -> Iterator[None]:
    """A file of which nothing fits a known form is left alone, and why is kept.

    One file too many must not make a folder useless.
    """
    try:
        yield
    except Stray as cause:
        part.reason = str(cause)


def _count_alone(gathered: Gathered) -> None:
    """Say of each file what of it can be in no sample."""
    divided = any(p.split for p in gathered.pictures)
    for part in gathered.parts:
        if part.form == "VQA answers" and not (part.taken or part.left or part.reason):
            part.reason = f"{part}: no question asks for its answers"
        if not part.reason:
            part.left["pictures in no split, while others are in one"] = divided * sum(
                p.split is None for p in part.pictures.values()
            )
            part.left["pictures that are missing"] = sum(
                not p.there for p in part.pictures.values()
            )


def _unsplit(gathered: Gathered) -> list[str]:
    count = sum(p.split is None for p in gathered.pictures)
    return (
        [f"{count} pictures in no split, while others are in one"]
        if 0 < count < len(gathered.pictures)
        else []
    )


def in_style(samples: Sequence[Sample], style: str, where: str) -> list[Sample]:
    """The same samples, each with its one caption that has most of a style.

    "place", "colour" or "mood".

    Raises
    ------
    AnnotationError
        If no caption of any sample has a word of the style.
    """
    samples = [sample for sample in samples if sample.captions]
    rates = [style_rate(sample.captions, style) for sample in samples]
    if not any(rate.any() for rate in rates):
        raise AnnotationError(
            f"{where}: no caption of {len(samples)} samples has a word of {style}",
            "give more samples or other captions",
        )
    return [
        replace(s, captions=(s.captions[int(rate.argmax())],))
        for s, rate in zip(samples, rates, strict=True)
    ]
