"""Samples written as a COCO-format folder, which any tool for COCO reads, this package too."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xlvlms_tutorial.errors import OutputError, SelectionError, XlvlmsError
from xlvlms_tutorial.samples import Sample


def write_coco(samples: Sequence[Sample], folder: str | Path) -> Path:
    """Write samples with pictures as a COCO-format folder, and return it.

    Holds images/, captions.json, instances.json, and questions.json with answers.json in VQA
    format. Where truth knows subject and item, boxes stand for them in their number and on their
    side: places that are plausible, not measured.

    Raises
    ------
    OutputError
        If the folder holds files already, or cannot be written.
    SelectionError
        If there are no samples, or one is no picture.
    """
    folder = Path(folder).absolute()
    if not samples or any(sample.modality != "image" for sample in samples):
        raise SelectionError(
            "no samples with pictures to write", "give one sample or more, all of modality image"
        )
    # unlike Path's, these take any name
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise OutputError(folder, "it holds files already")
    part = folder.with_name(f".{folder.name}.part")
    try:
        (part / "images").mkdir(parents=True)
        for name, content in _as_coco(samples, part / "images").items():
            (part / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, folder)  # at once, so that no half of it is ever taken for the whole
    except XlvlmsError:
        raise
    except (OSError, ValueError) as cause:  # a name with a null is a ValueError
        raise OutputError(folder, cause) from cause
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _as_coco(samples: Sequence[Sample], images: Path) -> dict[str, dict]:
    kinds = sorted(
        {
            str(s.truth[factor])
            for s in samples
            for factor in ("subject", "item")
            if s.truth.get(factor)
        }
    )
    listed, captions, boxes, questions, answers = [], [], [], [], []
    for key, sample in enumerate(samples, 1):
        picture, name = sample.image, f"{key:06d}.png"
        picture.save(images / name)
        listed.append(
            {"id": key, "file_name": name, "width": picture.width, "height": picture.height}
        )
        captions += [{"image_id": key, "caption": caption} for caption in sample.captions]
        for noun, box in _boxes(sample.truth, *picture.size):
            area = box[2] * box[3]
            boxes.append(
                {
                    "image_id": key,
                    "category_id": kinds.index(noun) + 1,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                }
            )
        for asked in sample.questions:
            more = {"type": asked.type, "target": asked.target, "stratum": asked.stratum}
            questions.append(
                {"question_id": len(questions) + 1, "image_id": key, "question": asked.text} | more
            )
            given = {
                "multiple_choice_answer": asked.answer,
                "answers": [{"answer": asked.answer, "answer_id": 1}],
            }
            answers.append({"question_id": len(questions), "image_id": key} | given)
    numbered = lambda entries: [{"id": number} | entry for number, entry in enumerate(entries, 1)]
    categories = [{"id": number, "name": noun} for number, noun in enumerate(kinds, 1)]
    return {
        "captions": {"images": listed, "annotations": numbered(captions)},
        "instances": {"images": listed, "annotations": numbered(boxes), "categories": categories},
        "questions": {"questions": questions},
        "answers": {"annotations": answers},
    }


def _boxes(
    truth: Mapping[str, object], width: int, height: int
) -> Iterator[tuple[str, list[float]]]:
    """Boxes as x, y, width, height in pixels.

    The items on their side, the subject larger on the other.
    """
    left = {"left": 0.05, "right": 0.55}.get(truth.get("side"), 0.3) * width
    if truth.get("subject"):
        other = {"left": 0.5, "right": 0.0}.get(truth.get("side"), 0.25) * width
        yield str(truth["subject"]), [other, 0.1 * height, 0.5 * width, 0.8 * height]
    count = int(truth.get("count") or 1) if truth.get("item") else 0
    for k in range(count):
        wide = 0.4 * width / count
        yield str(truth["item"]), [left + k * wide, 0.6 * height, wide, 0.3 * height]
