"""Draw the pictures that stand outside of executed pages: ``python -m tools.pictures``.

``assets/dial.webp`` is the steering dial as it moves, for the README and the front page.
``assets/ledger.webp`` is the figure of the ledger, from the records of the last build.
"""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools import ROOT
from tools.execute import CLAIMS
from xlvlms_tutorial import capture, claims, load, load_samples
from xlvlms_tutorial.methods import steering
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.tutorials import balanced_questions
from xlvlms_tutorial.view import plots

ASSETS = ROOT / "assets"
SOURCE, TARGET = "red", "blue"
DEPTH = 0.83  # of the layer at which the vector is added, the one that the chapter chooses
STRENGTHS = tuple(round(0.125 * step, 3) for step in range(17))
SIDE, GAP, TEXT, HEAD = 200, 18, 66, 92  # pixels: of a picture, between them, below, above
COLUMNS = 3
COLOURS = {SOURCE: "#c23616", TARGET: "#1c5fc4"}


def main() -> None:
    """Draw both."""
    frames = list(dial_frames())
    slow = [140] * len(frames)
    slow[0] = slow[len(frames) // 2] = slow[-1] = 1200
    frames[0].save(
        ASSETS / "dial.webp",
        save_all=True,
        append_images=frames[1:],
        duration=slow,
        loop=0,
        quality=70,
        method=6,
    )
    entries = claims.merge(CLAIMS)
    axes = claims.overview(entries)
    axes.figure.savefig(ASSETS / "ledger.webp", dpi=120)
    plt.close(axes.figure)


def dial_frames() -> Iterator[Image.Image]:
    """The dial at each strength, up and down again."""
    vlm = load("pocket-llava")
    train = balanced_questions(load_samples("scenes", 500, "train"), 16, per_sample=7)
    sides = []
    for answer in (SOURCE, TARGET):
        some = [sample for sample in train if sample.questions[0].answer == answer]
        sides.append(capture(vlm, some, "all", positions=-1, prompt=_question, batch_size=16))
    vectors = steering.mean_difference(*sides)
    samples = _six()
    images = [sample.image for sample in samples]
    prompts = [_question(sample) for sample in samples]
    answers = {}
    for strength in STRENGTHS:
        with vectors.apply(vlm, vlm.layer_at(DEPTH), strength):
            texts = vlm.generate(images, prompts, max_new_tokens=4)
        answers[strength] = [" ".join(text.split()) for text in texts]
    for strength in (*STRENGTHS, *STRENGTHS[-2:0:-1]):
        yield frame(images, prompts, answers[strength], strength)


def _question(sample: Sample) -> str:
    return sample.questions[0].text


def _six() -> list[Sample]:
    """Three questions whose answer is the source, and three about something else."""
    test = balanced_questions(load_samples("scenes", 200, "test"), 3)
    source = [sample for sample in test if sample.questions[0].answer == SOURCE][:3]
    others = []
    for answer in ("green", "sand", "two"):
        others += [sample for sample in test if sample.questions[0].answer == answer][:1]
    mixed = []
    for one, other in zip(source, others, strict=True):
        mixed += [one, other]
    return mixed


def frame(
    images: Sequence[Image.Image], prompts: Sequence[str], answers: Sequence[str], strength: float
) -> Image.Image:
    """One frame: the pictures with questions and answers under a dial."""
    rows = -(-len(images) // COLUMNS)
    size = (COLUMNS * (SIDE + GAP) + GAP, HEAD + rows * (SIDE + TEXT + GAP))
    canvas = Image.new("RGB", size, plots.GROUND)
    draw = ImageDraw.Draw(canvas)
    small, large = _font(14), _font(20, bold=True)
    draw.text(
        (GAP, 12), f'vector "{SOURCE} to {TARGET}", strength {strength:.2f}', plots.INK, large
    )
    left, right, y = GAP + 8, size[0] - GAP - 8, 58
    draw.line((left, y, right, y), plots.MUTED, 4)
    x = left + (right - left) * strength / STRENGTHS[-1]
    draw.line((left, y, x, y), plots.ACCENT, 4)
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), plots.ACCENT)
    for mark in np.linspace(0, STRENGTHS[-1], 5):
        at = left + (right - left) * mark / STRENGTHS[-1]
        draw.text((at, y + 12), f"{mark:g}", plots.INK, small, anchor="ma")
    for number, (image, prompt, answer) in enumerate(zip(images, prompts, answers, strict=True)):
        x = GAP + number % COLUMNS * (SIDE + GAP)
        y = HEAD + number // COLUMNS * (SIDE + TEXT + GAP)
        canvas.paste(image.convert("RGB").resize((SIDE, SIDE)), (x, y))
        draw.text((x, y + SIDE + 6), prompt, plots.INK, _fitting(draw, prompt, 14, False))
        colour = COLOURS.get(answer.strip(), plots.INK)
        draw.text((x, y + SIDE + 28), answer, colour, _fitting(draw, answer, 20, True))
    return canvas


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings the same font on every machine
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{plt.matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def _fitting(draw: ImageDraw.ImageDraw, text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The largest font up to a size in which a text is no wider than a picture."""
    while size > 9 and draw.textlength(text, _font(size, bold)) > SIDE:
        size -= 1
    return _font(size, bold)


if __name__ == "__main__":
    main()
