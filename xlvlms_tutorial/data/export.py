"""Samples written as a COCO-format folder, which any tool for COCO reads, this package too."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xlvlms_tutorial.errors import XlvlmsError, not_written
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require


def write_coco(samples: Sequence[Sample], folder: str | Path) -> Path:
    """Write samples with pictures as a COCO-format folder, and return it.

    Use it to look at a dataset with other tools, or to give it to
    :func:`~xlvlms_tutorial.data.load_samples` as a folder. Where truth knows subject and item,
    boxes stand for them in their number and on their side: places that are plausible, not measured.

    Parameters
    ----------
    samples : sequence of Sample
        One sample or more, all of them pictures.
    folder : str or Path
        The folder to write, absent or empty.

    Returns
    -------
    Path
        The folder, which holds images/, captions.json, instances.json, and questions.json with
        answers.json in VQA format.

    Raises
    ------
    FileError
        If the folder holds files already, or cannot be written.
    InputError
        If there are no samples, or one is no picture.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from xlvlms_tutorial.data import write_coco
    >>> folder = write_coco(samples, Path(mkdtemp()) / "coco")
    >>> sorted(path.name for path in folder.iterdir())
    ['answers.json', 'captions.json', 'images', 'instances.json', 'questions.json']
    """
    folder = Path(folder).absolute()
    modalities = {sample.modality for sample in samples}
    require(
        modalities == {"image"},
        "no samples with pictures to write",
        "give one sample or more, all of modality image",
    )
    # unlike Path's, these take any name
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise not_written(folder, "it holds files already")
    part = folder.with_name(f".{folder.name}.part")
    try:
        (part / "images").mkdir(parents=True)
        for name, content in _as_coco(samples, part / "images").items():
            (part / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, folder)  # at once, so that no half of it is ever taken for the whole
    except XlvlmsError:
        raise
    except (OSError, ValueError) as cause:  # a name with a null is a ValueError
        raise not_written(folder, cause) from cause
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _as_coco(samples: Sequence[Sample], images: Path) -> dict[str, dict]:
    """Return what the files of a folder hold in COCO's form; pictures are written."""
    nouns = set()
    for sample in samples:
        for factor in ("subject", "item"):
            noun = sample.truth.get(factor)
            if noun:
                nouns.add(str(noun))
    kinds = sorted(nouns)
    pictures = []
    captions = []
    boxes = []
    questions = []
    answers = []
    for key, sample in enumerate(samples, 1):
        picture = sample.image
        name = f"{key:06d}.png"
        picture.save(images / name)
        width, height = picture.size
        pictures.append({"id": key, "file_name": name, "width": width, "height": height})
        captions += [{"image_id": key, "caption": caption} for caption in sample.captions]
        for noun, box in _boxes(sample.truth, width, height):
            entry = {"image_id": key, "category_id": kinds.index(noun) + 1, "bbox": box}
            entry["area"] = box[2] * box[3]
            entry["iscrowd"] = 0
            boxes.append(entry)
        for question in sample.questions:
            number = len(questions) + 1
            questions.append(
                {
                    "question_id": number,
                    "image_id": key,
                    "question": question.text,
                    "type": question.type,
                    "target": question.target,
                    "stratum": question.stratum,
                }
            )
            answers.append(
                {
                    "question_id": number,
                    "image_id": key,
                    "multiple_choice_answer": question.answer,
                    "answers": [{"answer": question.answer, "answer_id": 1}],
                }
            )
    categories = _numbered([{"name": noun} for noun in kinds])
    instances = {"images": pictures, "annotations": _numbered(boxes), "categories": categories}
    return {
        "captions": {"images": pictures, "annotations": _numbered(captions)},
        "instances": instances,
        "questions": {"questions": questions},
        "answers": {"annotations": answers},
    }


def _numbered(entries: list[dict]) -> list[dict]:
    """Give every entry an id, from 1."""
    return [{"id": number} | entry for number, entry in enumerate(entries, 1)]


def _boxes(
    truth: Mapping[str, object], width: int, height: int
) -> Iterator[tuple[str, list[float]]]:
    """Yield boxes as x, y, width, height in pixels.

    The items on their side, the subject larger on the other.
    """
    side = truth.get("side")
    if truth.get("subject"):
        x = {"left": 0.5, "right": 0.0}.get(side, 0.25) * width
        yield str(truth["subject"]), [x, 0.1 * height, 0.5 * width, 0.8 * height]
    if not truth.get("item"):
        return
    count = int(truth.get("count") or 1)
    x = {"left": 0.05, "right": 0.55}.get(side, 0.3) * width
    item_width = 0.4 * width / count if count else 0
    for k in range(count):
        yield str(truth["item"]), [x + k * item_width, 0.6 * height, item_width, 0.3 * height]
