"""Draw the second world: postcards, a check on what depends on the first world's generator.

The same kinds of factors are drawn with other sprites, other backgrounds and another composition,
and described in other words (see :mod:`xlvlms_tutorial.pocket.postcard_texts`). No drawing code is
shared with :mod:`xlvlms_tutorial.pocket.world`, and no embedded model has been trained on them.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from xlvlms_tutorial.errors import not_in_world
from xlvlms_tutorial.pocket.assets import open_sprite

WIDTH, HEIGHT = 320, 240  # pixels, with the frame
FRAME = 8  # pixels of the pale frame on each side
FIGURES = ("woman", "man", "alien")
CREATURES = ("fish", "frog", "worm", "slime")
SUBJECTS = (*FIGURES, *CREATURES)
ACTIONS = ("standing", "walking", "jumping", "falling", "climbing")
HUES = {
    "flag": ("green", "red", "yellow"),
    "key": ("blue", "green", "red", "yellow"),
    "gem": ("blue", "green", "red", "yellow"),
    "tank": ("blue", "green", "red"),
}
HUELESS = ("box", "sign", "torch", "rock", "bush", "cactus", "star", "door")
ITEMS = (*HUES, *HUELESS)
COLOURS = ("blue", "green", "red", "yellow")
PLACES = ("grass", "sand", "snow", "stone", "dirt")
TIMES = ("day", "dusk", "night")
SIDES = ("left", "right")
COUNTS = (1, 2, 3)
SPLITS = ("train", "validation", "test")
FACTORS = ("subject", "action", "item", "colour", "count", "side", "place", "time")

FIGURE_SHARE = 0.55  # of postcards that show a figure
HUE_WEIGHT = 2.0  # how much more often a coloured thing is drawn than one without a colour

# of ten parts, those that belong to each split
_PARTS = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}
_PEOPLE = "animated_characters"
_POSES = {
    "woman": {
        "standing": (f"{_PEOPLE}/female_adventurer/femaleAdventurer_idle",),
        "walking": (
            f"{_PEOPLE}/female_adventurer/femaleAdventurer_walk2",
            f"{_PEOPLE}/female_adventurer/femaleAdventurer_walk6",
        ),
        "jumping": (f"{_PEOPLE}/female_adventurer/femaleAdventurer_jump",),
        "falling": (f"{_PEOPLE}/female_adventurer/femaleAdventurer_fall",),
        "climbing": (
            f"{_PEOPLE}/female_adventurer/femaleAdventurer_climb0",
            f"{_PEOPLE}/female_adventurer/femaleAdventurer_climb1",
        ),
    },
    "man": {
        "standing": (f"{_PEOPLE}/male_adventurer/maleAdventurer_idle",),
        "walking": (
            f"{_PEOPLE}/male_adventurer/maleAdventurer_walk2",
            f"{_PEOPLE}/male_adventurer/maleAdventurer_walk6",
        ),
        "jumping": (f"{_PEOPLE}/male_adventurer/maleAdventurer_jump",),
        "falling": (f"{_PEOPLE}/male_adventurer/maleAdventurer_fall",),
        "climbing": (
            f"{_PEOPLE}/male_adventurer/maleAdventurer_climb0",
            f"{_PEOPLE}/male_adventurer/maleAdventurer_climb1",
        ),
    },
    "alien": {
        "standing": ("alien/alienBlue_front",),
        "walking": ("alien/alienBlue_walk1", "alien/alienBlue_walk2"),
        "jumping": ("alien/alienBlue_jump",),
        "falling": ("alien/alienBlue_fall",),
        "climbing": ("alien/alienBlue_climb1", "alien/alienBlue_climb2"),
    },
    "fish": {None: ("enemies/fishGreen",)},
    "frog": {None: ("enemies/frog_move",)},
    "worm": {None: ("enemies/wormGreen", "enemies/wormGreen_move")},
    "slime": {None: ("enemies/slimePurple",)},
}
_THINGS = {
    "box": "tiles/boxCrate_single",
    "sign": "tiles/signLeft",
    "torch": "tiles/torch2",
    "rock": "space_shooter/meteorGrey_big1",
    "bush": "topdown_tanks/treeGreen_large",
    "star": "items/star",
    "door": "tiles/doorClosed_mid",
}
_PAPER = (246, 240, 226)
_PAINT = {
    "blue": (38, 98, 214),
    "green": (34, 150, 62),
    "red": (212, 36, 44),
    "yellow": (246, 206, 36),
}
# from the top of the sky to the horizon
_SKY = {
    "day": ((70, 140, 226), (150, 198, 244), (236, 244, 250)),
    "dusk": ((62, 38, 104), (196, 84, 120), (255, 186, 106)),
    "night": ((4, 6, 26), (16, 22, 62), (46, 54, 104)),
}
_HILLS = {
    "day": ((142, 172, 200), (112, 150, 160)),
    "dusk": ((120, 66, 112), (84, 48, 92)),
    "night": ((24, 30, 66), (14, 18, 44)),
}
# by which what stands on the ground is darkened
_LIGHT = {"day": (255, 255, 255), "dusk": (255, 230, 216), "night": (172, 180, 226)}
# of the ground, from the horizon to the front
_GROUND = {
    "grass": ((150, 196, 104), (62, 134, 50)),
    "sand": ((246, 230, 184), (226, 192, 122)),
    "snow": ((238, 244, 250), (252, 254, 255)),
    "stone": ((188, 190, 194), (138, 142, 148)),
    "dirt": ((168, 124, 84), (112, 72, 42)),
}
_BASE = (170, 216)  # where the back row and the front row stand, in pixels from the top
_FIGURE = (84, 106)  # height of a figure in the two rows
_CREATURE = (58, 74)  # width of a creature in the two rows
_THING = {1: (54, 64), 2: (46, 54), 3: (38, 42)}  # side of a thing, by their number
_RAISED = {"jumping": 30, "falling": 50, "climbing": 22, "fish": 12}  # pixels above the ground


@dataclass(frozen=True)
class Postcard:
    """One postcard: its factors, and the seed of what they leave open.

    The factors have the names and the meaning of those of a scene; their values differ in part.

    Parameters
    ----------
    subject : str
        A figure ("woman", "man", "alien") or a creature ("fish", "frog", "worm", "slime").
    action : str or None
        What a figure does: "standing", "walking", "jumping", "falling" or "climbing"; None for
        creatures.
    item : str
        The kind of the things beside the subject, one of ``ITEMS``.
    colour : str or None
        One of the colours of this kind in ``HUES``; None for things without a colour.
    count : int
        How many things there are, 1 to 3.
    side : str
        Where the things are, seen from the viewer, relative to the subject: "left" or "right".
    place : str
        "grass", "sand", "snow", "stone" or "dirt".
    time : str
        "day", "dusk" or "night".
    layout : int, default 0
        The seed of rows, horizon, sky and ground, 0 or more.

    Raises
    ------
    InputError
        If a factor has a value that a postcard cannot show, with the allowed values.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket.postcards import Postcard
    >>> Postcard("alien", "walking", "tank", "red", 2, "left", "sand", "day").objects
    ('alien', 'tank')
    """

    subject: str
    action: str | None
    item: str
    colour: str | None
    count: int
    side: str
    place: str
    time: str
    layout: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "subject": SUBJECTS,
            "action": ACTIONS if self.subject in FIGURES else (None,),
            "item": ITEMS,
            "colour": HUES.get(self.item, (None,)),
            "count": COUNTS,
            "side": SIDES,
            "place": PLACES,
            "time": TIMES,
        }
        for factor, values in allowed.items():
            value = getattr(self, factor)
            if value not in values or isinstance(value, (bool, float)):  # neither True nor 1.0
                raise not_in_world(factor, value, values)
        if not isinstance(self.layout, int) or self.layout < 0:
            raise not_in_world("layout", self.layout, "a whole number of 0 or more")

    @property
    def objects(self) -> tuple[str, str]:
        """The kinds of objects in the picture."""
        return self.subject, self.item

    @property
    def split(self) -> str:
        """The one split that shows this combination of factors, whatever the layout."""
        values = " ".join(str(getattr(self, factor)) for factor in FACTORS)
        part = zlib.crc32(values.encode()) % 10
        return next(split for split, parts in _PARTS.items() if part in parts)


def postcards(n: int, split: str = "train", seed: int = 0) -> list[Postcard]:
    """Draw postcards of a split; the first ones of a longer list are those of a shorter one.

    Splits share no combination of factors: a checksum of the factors decides. Use it where records
    are wanted; ``load_samples("postcards")`` gives samples.

    Parameters
    ----------
    n : int
        Number of postcards.
    split : str, default "train"
        "train", "validation" or "test". No embedded model has been trained on any of them.
    seed : int, default 0
        Seed of the postcards, 0 or more.

    Returns
    -------
    list of Postcard
        The postcards.

    Raises
    ------
    InputError
        If the split is unknown or ``n`` is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket.postcards import postcards
    >>> postcards(5)[:2] == postcards(2), postcards(1, split="test")[0].split
    (True, 'test')
    """
    if split not in SPLITS:
        raise not_in_world("split", split, SPLITS)
    if not isinstance(n, Integral) or n < 1:
        raise not_in_world("n", n, "1 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split), 2])
    accepted: list[Postcard] = []
    while len(accepted) < n:
        card = _drawn(rng)
        if card.split == split:
            accepted.append(card)
    return accepted


def _drawn(rng: np.random.Generator) -> Postcard:
    def one_of(values: tuple) -> object:
        return values[int(rng.integers(len(values)))]

    subject = one_of(FIGURES if rng.random() < FIGURE_SHARE else CREATURES)
    weights = np.array([HUE_WEIGHT if item in HUES else 1.0 for item in ITEMS])
    item = ITEMS[int(rng.choice(len(ITEMS), p=weights / weights.sum()))]
    return Postcard(
        subject,
        action=one_of(ACTIONS) if subject in FIGURES else None,
        item=item,
        colour=one_of(HUES[item]) if item in HUES else None,
        count=one_of(COUNTS),
        side=one_of(SIDES),
        place=one_of(PLACES),
        time=one_of(TIMES),
        layout=int(rng.integers(2**31)),
    )


def draw(card: Postcard) -> Image.Image:
    """Draw a postcard in RGB, 320 x 240 pixels, the same to the pixel each time.

    Subject and things stand in two rows, one nearer than the other; the layout says which.

    Parameters
    ----------
    card : Postcard
        The postcard.

    Returns
    -------
    PIL.Image.Image
        The picture.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket.postcards import draw, postcards
    >>> draw(postcards(1)[0]).size
    (320, 240)
    """
    # every choice is drawn for every postcard, so that a changed factor leaves the others alone
    rng = np.random.default_rng([card.layout, 1])
    subject_row, pose, mirrored = (int(v) for v in rng.integers(2, size=3))
    subject_shift, things_shift = (int(v) for v in rng.integers(-6, 7, size=2))
    horizon = int(rng.integers(100, 122))
    picture = _sky(card.time, horizon, rng)
    land = _land(card.place, horizon, rng)
    x_subject, x_things = (236, 84) if card.side == "left" else (84, 236)
    x_subject += subject_shift
    x_things += things_shift
    if subject_row == 1:  # who stands in the back row is drawn first
        _place_things(land, card, x_things, 0)
        _place_subject(land, card, x_subject, 1, pose, bool(mirrored))
    else:
        _place_subject(land, card, x_subject, 0, pose, bool(mirrored))
        _place_things(land, card, x_things, 1)
    light = Image.new("RGB", land.size, _LIGHT[card.time])
    picture.paste(ImageChops.multiply(land.convert("RGB"), light), (0, 0), land.getchannel("A"))
    framed = Image.new("RGB", picture.size, _PAPER)
    inner = (FRAME, FRAME, WIDTH - FRAME, HEIGHT - FRAME)
    framed.paste(picture.crop(inner), inner)
    return framed


def _gradient(colours: tuple, height: int) -> Image.Image:
    """A strip as wide as the postcard that goes through some colours from top to bottom."""
    stops = np.linspace(0, 1, len(colours))
    rows = np.linspace(0, 1, height)
    channels = [np.interp(rows, stops, channel) for channel in zip(*colours, strict=True)]
    column = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], WIDTH, axis=1))


def _sky(time: str, horizon: int, rng: np.random.Generator) -> Image.Image:
    """The sky with sun or moon, clouds or stars, and two ranges of hills at the horizon."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.paste(_gradient(_SKY[time], horizon + 12), (0, 0))
    pen = ImageDraw.Draw(picture)
    x = int(rng.integers(60, WIDTH - 60))
    spots = rng.random((40, 2))
    phases = rng.random(4) * 2 * np.pi
    if time == "day":
        pen.ellipse((x - 13, 24, x + 13, 50), fill=(255, 240, 150))
        for u, v in spots[:4]:
            left, top = 10 + u * (WIDTH - 80), 20 + v * (horizon - 70)
            pen.ellipse((left, top + 5, left + 44, top + 17), fill=(250, 252, 255))
            pen.ellipse((left + 10, top, left + 32, top + 16), fill=(250, 252, 255))
    elif time == "dusk":
        pen.ellipse((x - 20, horizon - 34, x + 20, horizon + 6), fill=(255, 224, 130))
    else:
        for u, v in spots:
            left, top = u * WIDTH, v * (horizon - 20)
            pen.rectangle((left, top, left + 1, top + 1), fill=(230, 230, 246))
        pen.ellipse((x - 14, 22, x + 14, 50), fill=(240, 238, 214))
        pen.ellipse((x - 7, 19, x + 19, 45), fill=picture.getpixel((x, 16)))  # a crescent
    across = np.arange(WIDTH)
    for k, colour in enumerate(_HILLS[time]):
        waves = np.sin(across / (34 - 9 * k) + phases[2 * k])
        waves += 0.6 * np.sin(across / (15 + 6 * k) + phases[2 * k + 1])
        tops = horizon - (14 - 6 * k) - 5 * waves
        outline = [(0, HEIGHT), *zip(across.tolist(), tops.tolist(), strict=True), (WIDTH, HEIGHT)]
        pen.polygon(outline, fill=colour)
    return picture


def _land(place: str, horizon: int, rng: np.random.Generator) -> Image.Image:
    """The ground below the horizon, as seen from the front, on nothing."""
    ground = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    ground.paste(_gradient(_GROUND[place], HEIGHT - horizon), (0, horizon))
    marks = rng.random((220, 3))
    depths = marks[:, 1] ** 1.5  # 0 at the horizon, 1 in front: more marks far away
    pen = ImageDraw.Draw(ground)
    if place == "stone":
        _pave(pen, horizon)
        return ground
    for (u, _, tone), depth in zip(marks.tolist(), depths.tolist(), strict=True):
        x, y = u * WIDTH, horizon + 3 + depth * (HEIGHT - horizon)
        _MARKS[place](pen, x, y, 0.35 + depth, tone)
    return ground


def _pave(pen: ImageDraw.ImageDraw, horizon: int) -> None:
    """Draw the joints of slabs that run towards the horizon."""
    joint = (96, 100, 106)
    for k in range(7):
        y = horizon + (HEIGHT - horizon) * (k / 6) ** 1.7
        pen.line((0, y, WIDTH, y), fill=joint, width=1 + k // 3)
    for k in range(-9, 10):
        pen.line((WIDTH / 2 + 18 * k, horizon, WIDTH / 2 + 62 * k, HEIGHT), fill=joint, width=2)


def _blade(pen: ImageDraw.ImageDraw, x: float, y: float, size: float, tone: float) -> None:
    colour = (40, 108, 34) if tone < 0.6 else (178, 214, 110)
    pen.line((x, y, x - 3 * size, y - 9 * size), fill=colour, width=1)
    pen.line((x, y, x + 3 * size, y - 9 * size), fill=colour, width=1)


def _ripple(pen: ImageDraw.ImageDraw, x: float, y: float, size: float, tone: float) -> None:
    if tone < 0.45:
        box = (x - 20 * size, y - 4 * size, x + 20 * size, y + 4 * size)
        pen.arc(box, 200, 340, fill=(206, 166, 98), width=1)
    else:
        pen.point((x, y), fill=(184, 146, 84))


def _drift(pen: ImageDraw.ImageDraw, x: float, y: float, size: float, tone: float) -> None:
    if tone < 0.2:
        box = (x - 26 * size, y - 5 * size, x + 26 * size, y + 7 * size)
        pen.ellipse(box, fill=(255, 255, 255))
        pen.arc(box, 10, 170, fill=(196, 212, 232), width=2)
    else:
        pen.point((x, y), fill=(206, 220, 238))


def _clod(pen: ImageDraw.ImageDraw, x: float, y: float, size: float, tone: float) -> None:
    colour = (82, 50, 28) if tone < 0.6 else (186, 144, 104)
    pen.ellipse((x - 4 * size, y - 2 * size, x + 4 * size, y + 2 * size), fill=colour)


_MARKS: dict[str, Callable] = {"grass": _blade, "sand": _ripple, "snow": _drift, "dirt": _clod}


def _place_subject(
    land: Image.Image, card: Postcard, x: int, row: int, pose: int, mirrored: bool
) -> None:
    poses = _POSES[card.subject][card.action]
    body = _cut_out(poses[pose % len(poses)])
    if card.subject in FIGURES:
        body = _scaled(body, _FIGURE[row] / body.height)
    else:
        body = _scaled(body, _CREATURE[row] / body.width)
    if mirrored:
        body = body.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    base = _BASE[row]
    pen = ImageDraw.Draw(land)
    raised = _RAISED.get(card.action or card.subject, 0)
    _cast_shadow(land, x, base, body.width // 2 - raised // 5)
    if card.action == "climbing":
        for y in range(0, base, 8):  # a rope from the edge of the picture to the ground
            pen.rectangle((x - 2, y, x + 2, y + 7), fill=(186, 136, 78, 255))
            pen.line((x - 2, y + 6, x + 2, y + 2), fill=(112, 74, 36, 255))
    if card.action == "falling":
        body = body.rotate(32 if mirrored else -32, Image.Resampling.BICUBIC, expand=True)
    top = base - raised - body.height
    land.alpha_composite(body, (x - body.width // 2, max(top, FRAME)))
    if card.action == "falling":  # streaks above tell that it goes down
        for offset, length in ((-22, 20), (0, 28), (22, 20)):
            line = (x + offset, max(top - length, 0), x + offset, max(top, FRAME) + 4)
            pen.line(line, fill=(250, 250, 250, 255), width=2)


def _place_things(land: Image.Image, card: Postcard, x: int, row: int) -> None:
    side = _THING[card.count][row]
    picture = _thing(card.item, card.colour)
    picture = _scaled(picture, side / max(picture.size))
    step = side + 3
    start = x - step * (card.count - 1) / 2
    for k in range(card.count):
        centre, base = round(start + k * step), _BASE[row] - 4 * (k % 2)
        _cast_shadow(land, centre, base, picture.width // 2)
        land.alpha_composite(picture, (centre - picture.width // 2, base - picture.height))


def _cast_shadow(land: Image.Image, x: int, y: int, half: int) -> None:
    half = max(half, 8)
    shade = Image.new("L", land.size, 0)
    ImageDraw.Draw(shade).ellipse((x - half, y - 5, x + half, y + 4), fill=110)
    shade = shade.filter(ImageFilter.BoxBlur(2))
    dark = Image.new("RGBA", land.size, (20, 20, 30, 255))
    dark.putalpha(shade)
    land.alpha_composite(dark)


@lru_cache(maxsize=256)
def _cut_out(name: str) -> Image.Image:
    """A sprite without the empty margin around it."""
    sprite = open_sprite(name)
    return sprite.crop(sprite.getchannel("A").getbbox())


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=64)
def _thing(item: str, colour: str | None) -> Image.Image:
    """One thing; the keys, gems and cactuses are painted here, as no second sprite shows them."""
    if item == "flag":
        return _cut_out(f"items/flag{colour.capitalize()}2")
    if item == "tank":
        return _cut_out(f"topdown_tanks/tank_{colour}")
    if item in _THINGS:
        return _cut_out(_THINGS[item])
    canvas = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    paint = {"key": _paint_key, "gem": _paint_gem, "cactus": _paint_cactus}[item]
    paint(ImageDraw.Draw(canvas), _PAINT.get(colour, _PAINT["green"]))
    return canvas.crop(canvas.getchannel("A").getbbox())


def _paint_key(pen: ImageDraw.ImageDraw, colour: tuple[int, int, int]) -> None:
    """A key that stands on its bit, its round bow on top."""
    edge = _mixed(colour, (0, 0, 0))
    pen.rounded_rectangle((112, 92, 144, 250), 8, fill=colour, outline=edge, width=6)
    for y in (174, 214):
        pen.rectangle((138, y, 188, y + 22), fill=colour, outline=edge, width=6)
    pen.ellipse((72, 6, 184, 118), outline=edge, width=38)
    pen.ellipse((78, 12, 178, 112), outline=colour, width=26)


def _paint_gem(pen: ImageDraw.ImageDraw, colour: tuple[int, int, int]) -> None:
    """A brilliant: eight facets around a flat table."""
    outer, table = [], []
    for k in range(8):
        angle = np.pi * (k / 4 + 1 / 8)
        outer.append((128 + 120 * np.cos(angle), 128 + 120 * np.sin(angle)))
        table.append((128 + 62 * np.cos(angle), 128 + 62 * np.sin(angle)))
    for k in range(8):
        shade = (0, 0, 0) if k in (0, 1, 2, 3) else (255, 255, 255)
        share = 0.18 + 0.1 * (k % 2)
        facet = (outer[k], outer[k - 1], table[k - 1], table[k])
        pen.polygon(facet, fill=_mixed(colour, shade, share))
    pen.polygon(table, fill=colour)
    pen.line([*outer, outer[0]], fill=_mixed(colour, (0, 0, 0)), width=6)


def _paint_cactus(pen: ImageDraw.ImageDraw, colour: tuple[int, int, int]) -> None:
    """A trunk with two arms of different height, and ribs."""
    dark = _mixed(colour, (0, 0, 0), 0.35)
    for arm in ((40, 96, 72, 172), (184, 58, 216, 146)):
        pen.rounded_rectangle(arm, 16, fill=colour)
    pen.rounded_rectangle((40, 142, 120, 174), 14, fill=colour)
    pen.rounded_rectangle((136, 116, 216, 148), 14, fill=colour)
    pen.rounded_rectangle((98, 8, 158, 252), 30, fill=colour)
    for x in (116, 128, 140):
        pen.line((x, 30, x, 246), fill=dark, width=4)


def _mixed(colour: tuple, other: tuple, share: float = 0.4) -> tuple[int, int, int]:
    """A colour with a share of another one."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
