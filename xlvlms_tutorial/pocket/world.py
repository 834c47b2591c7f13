"""Draw the world: seeded scenes whose truth is known, made of CC0 sprites.

A :class:`Scene` is a record of factors (who, doing what, beside which things,
where, when). The record alone fixes the picture to the pixel, the captions and
the questions (see :mod:`xlvlms_tutorial.pocket.language`).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from xlvlms_tutorial.errors import not_in_world
from xlvlms_tutorial.pocket.assets import open_sprite

SIZE = 256  # pixels a side: 8 x 8 cells of the vision tower's stride of 32
PEOPLE = ("woman", "man", "robot", "zombie")
ANIMALS = ("bee", "fish", "fly", "frog", "ladybug", "mouse", "worm")
SUBJECTS = PEOPLE + ANIMALS
ACTIONS = ("standing", "walking", "jumping", "falling", "climbing")
COLOURED = {
    "gem": ("blue", "green", "red", "yellow"),
    "key": ("blue", "green", "red", "yellow"),
    "flag": ("green", "red", "yellow"),
}
PLAIN = ("cactus", "bush", "mushroom", "rock", "box", "bomb", "torch", "sign")
ITEMS = (*COLOURED, *PLAIN)
COLOURS = ("blue", "green", "red", "yellow")
PLACES = ("grass", "sand", "snow", "stone", "dirt")
TIMES = ("day", "dusk", "night")
SIDES = ("left", "right")
COUNTS = (1, 2, 3)
SPLITS = ("train", "validation", "test", "composition")
PARTS = ("subject", "item", "ground")  # what masks tell apart
FACTORS = ("subject", "action", "item", "colour", "count", "side", "place", "time")

# Combinations that training never sees; the split "composition" holds nothing else.
HELD_OUT_SUBJECT_PLACE = {
    ("robot", "snow"),
    ("woman", "sand"),
    ("zombie", "grass"),
    ("frog", "stone"),
}
HELD_OUT_ITEM_COLOUR = {("key", "green"), ("gem", "yellow")}

# Popularity and co-occurrence, as in photographs: what POPE's "popular" and
# "adversarial" negatives rest on.
POPULARITY = {"key": 4.0, "gem": 4.0, "flag": 4.0, "bush": 2.0, "rock": 2.0, "box": 1.5}
COMPANY = {"cactus": "sand", "mushroom": "grass", "rock": "stone", "sign": "dirt", "torch": "snow"}

_CHARACTER = {
    "woman": "female_person/femalePerson",
    "man": "male_person/malePerson",
    "robot": "robot/robot",
    "zombie": "zombie/zombie",
}
_POSE = {
    "standing": "idle",
    "walking": "walk{}",
    "jumping": "jump",
    "falling": "fall",
    "climbing": "climb{}",
}
_ANIMAL = {"fish": "fishPink", "worm": "wormPink"}
_TILE = {
    "mushroom": "mushroomRed",
    "box": "boxCrate_double",
    "torch": "torch1",
    "sign": "signRight",
}
_SKY = {
    "day": ((126, 192, 238), (205, 232, 250)),
    "dusk": ((106, 76, 147), (250, 160, 100)),
    "night": ((12, 16, 48), (44, 56, 104)),
}
_TINT = {"day": (255, 255, 255), "dusk": (255, 236, 216), "night": (196, 202, 236)}
# pixels above the ground
_LIFT = {"jumping": 34, "falling": 70, "climbing": 26, "bee": 60, "fly": 60, "fish": 40}
_GROUND = 64  # height of the strip of ground in pixels
_THING = {1: 72, 2: 60, 3: 48}  # side of one thing in pixels, by how many there are


@dataclass(frozen=True)
class Scene:
    """One scene: its factors, and the seed of the small accidents of its layout.

    Use it to make a picture of your own; :func:`scenes` draws many.

    Parameters
    ----------
    subject : str
        A person ("woman", "man", "robot", "zombie") or an animal ("bee", "fish", "fly", "frog",
        "ladybug", "mouse", "worm").
    action : str or None
        What a person does: "standing", "walking", "jumping", "falling" or "climbing"; None for
        animals.
    item : str
        The kind of the things beside the subject, such as "key" or "cactus".
    colour : str or None
        "blue", "green", "red" or "yellow" for gems, keys and flags (which are never blue); None for
        things without a colour.
    count : int
        How many things there are, 1 to 3.
    side : str
        Where the things are, seen from the viewer, relative to the subject: "left" or "right".
    place : str
        "grass", "sand", "snow", "stone" or "dirt".
    time : str
        "day", "dusk" or "night".
    layout : int, default 0
        The seed of the layout, 0 or more.

    Raises
    ------
    InputError
        If a factor has a value that the world cannot draw, with the allowed values.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import Scene
    >>> scene = Scene("woman", "walking", "key", "red", 2, side="left", place="sand", time="day")
    >>> scene.objects, scene.held_out
    (('woman', 'key'), True)
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
        actions = ACTIONS if self.subject in PEOPLE else (None,)
        allowed = {
            "subject": SUBJECTS,
            "action": actions,
            "item": ITEMS,
            "colour": COLOURED.get(self.item, (None,)),
            "count": COUNTS,
            "side": SIDES,
            "place": PLACES,
            "time": TIMES,
        }
        for factor, values in allowed.items():
            value = getattr(self, factor)
            if value not in values or type(value) is not type(values[0]):  # 2.0 is no count
                raise not_in_world(factor, value, values)
        if not isinstance(self.layout, int) or self.layout < 0:
            raise not_in_world("layout", self.layout, "a whole number of 0 or more")

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a combination that training never sees."""
        return (self.subject, self.place) in HELD_OUT_SUBJECT_PLACE or (
            self.item,
            self.colour,
        ) in HELD_OUT_ITEM_COLOUR

    @property
    def objects(self) -> tuple[str, str]:
        """The kinds of objects in the picture."""
        return self.subject, self.item


def _draw_factors(rng: np.random.Generator) -> Scene:
    pick = lambda values: values[rng.integers(len(values))]
    subject = pick(PEOPLE) if rng.random() < 0.6 else pick(ANIMALS)
    place = pick(PLACES)
    weight = np.array(
        [POPULARITY.get(i, 1.0) * (4.0 if COMPANY.get(i) == place else 1.0) for i in ITEMS]
    )
    item = ITEMS[rng.choice(len(ITEMS), p=weight / weight.sum())]
    return Scene(
        subject=subject,
        action=pick(ACTIONS) if subject in PEOPLE else None,
        item=item,
        colour=pick(COLOURED[item]) if item in COLOURED else None,
        count=int(pick(COUNTS)),
        side=pick(SIDES),
        place=place,
        time=pick(TIMES),
        layout=int(rng.integers(2**31)),
    )


def scenes(n: int, split: str = "train", seed: int = 0) -> list[Scene]:
    """Draw scenes of a split; the first scenes of a longer list are those of a shorter one.

    Use it where scenes are wanted as records; ``load_samples`` gives them as samples.

    Parameters
    ----------
    n : int
        Number of scenes.
    split : str, default "train"
        "train", "validation", "test", or "composition", which holds nothing but combinations that
        the others never show.
    seed : int, default 0
        Seed of the scenes.

    Returns
    -------
    list of Scene
        The scenes.

    Raises
    ------
    InputError
        If the split is unknown or ``n`` is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import scenes
    >>> scenes(5)[:2] == scenes(2), scenes(1, split="composition")[0].held_out
    (True, True)
    """
    if split not in SPLITS:
        raise not_in_world("split", split, SPLITS)
    if n < 1:
        raise not_in_world("n", n, "1 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    accepted: list[Scene] = []
    while len(accepted) < n:
        scene = _draw_factors(rng)
        if scene.held_out == (split == "composition"):
            accepted.append(scene)
    return accepted


@lru_cache(maxsize=512)
def _sprite(name: str, size: int, flip: bool = False) -> Image.Image:
    picture = open_sprite(name)
    scaled = picture.resize((round(picture.width * size / 128), size), Image.Resampling.BOX)
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else scaled


@lru_cache(maxsize=16)
def _backdrop(place: str, time: str) -> Image.Image:
    top, bottom = (np.array(c, float) for c in _SKY[time])
    mix = np.linspace(0, 1, SIZE)[:, None]
    rows = np.rint(top * (1 - mix) + bottom * mix).astype(np.uint8)
    picture = Image.fromarray(np.repeat(rows[:, None], SIZE, axis=1))
    draw = ImageDraw.Draw(picture)
    if time == "night":
        for x, y in ((30, 22), (74, 48), (120, 16), (168, 40), (212, 70), (18, 84), (240, 26)):
            draw.ellipse((x, y, x + 2, y + 2), fill=(240, 240, 220))
        draw.ellipse((196, 14, 222, 40), fill=(236, 236, 214))
    else:
        draw.ellipse((200, 12, 232, 44), fill=(255, 236, 130) if time == "day" else (255, 120, 70))
    tile = _sprite(f"tiles/{place}Mid", _GROUND)
    for x in range(0, SIZE, _GROUND):
        picture.paste(tile, (x, SIZE - _GROUND), tile)
    return picture


def subject_sprite(scene: Scene, frame: int) -> str:
    """Name the sprite of the scene's subject at a frame of its movement."""
    if scene.subject in ANIMALS:
        return f"enemies/{_ANIMAL.get(scene.subject, scene.subject)}"
    beat = frame % (8 if scene.action == "walking" else 2)
    return f"animated_characters/{_CHARACTER[scene.subject]}_{_POSE[scene.action].format(beat)}"


def _item_sprite(scene: Scene) -> str:
    if scene.colour is None:
        return f"tiles/{_TILE.get(scene.item, scene.item)}"
    return f"items/{scene.item}{scene.colour.capitalize()}{'1' if scene.item == 'flag' else ''}"


def render(scene: Scene, frame: int | None = None, shift: tuple[int, int] = (0, 0)) -> Image.Image:
    """Draw a scene as an RGB picture of 256 x 256 pixels, the same to the pixel each time.

    Parameters
    ----------
    scene : Scene
        The scene.
    frame : int, optional
        The frame of the subject's movement, for clips; by default the layout seed chooses it.
    shift : (int, int), default (0, 0)
        Pixels by which the subject is moved to the right and down, for clips.

    Returns
    -------
    PIL.Image.Image
        The picture.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import render, scenes
    >>> picture = render(scenes(1)[0])
    >>> picture.size, picture.mode
    ((256, 256), 'RGB')
    """
    picture = _backdrop(scene.place, scene.time).copy()
    for _, sprite, corner in _placed(scene, frame, shift):
        picture.paste(sprite, corner, sprite)
    return ImageChops.multiply(picture, Image.new("RGB", picture.size, _TINT[scene.time]))


def masks(scene: Scene) -> dict[str, np.ndarray]:
    """Return which pixels of the picture of a scene show what.

    Use it as the truth of segmentations, and of maps that say where something is seen. What lies
    behind something else is not seen: no pixel belongs to two masks.

    Parameters
    ----------
    scene : Scene
        The scene, as :func:`render` draws it.

    Returns
    -------
    dict of str to ndarray (256, 256)
        True where the "subject", the things beside it ("item") and the "ground" are seen; sky and
        ladder belong to none.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import Scene, masks
    >>> scene = Scene("fish", None, "cactus", None, 1, side="left", place="sand", time="day")
    >>> parts = masks(scene)
    >>> list(parts), bool((parts["subject"] & parts["item"]).any())
    (['subject', 'item', 'ground'], False)
    """
    owner = np.zeros((SIZE, SIZE), dtype=np.int8)
    owner[SIZE - _GROUND :] = PARTS.index("ground") + 1
    for part, sprite, corner in _placed(scene):
        alpha = Image.new("L", (SIZE, SIZE))
        alpha.paste(sprite.getchannel("A"), corner)
        owner[np.asarray(alpha) > 127] = PARTS.index(part) + 1 if part in PARTS else 0
    return {part: owner == number for number, part in enumerate(PARTS, start=1)}


def _placed(
    scene: Scene, frame: int | None = None, shift: tuple[int, int] = (0, 0)
) -> list[tuple[str, Image.Image, tuple[int, int]]]:
    """List what stands before the backdrop, back to front: kind, sprite and its top left corner."""
    rng = np.random.default_rng(scene.layout)
    flip, beat = bool(rng.integers(2)), int(rng.integers(8))
    dx, dy, gap = (int(v) for v in rng.integers(-6, 7, size=3))
    placed = []
    floor = SIZE - _GROUND + 8
    on_left = scene.side == "left"
    size = _THING[scene.count]
    ground = _sprite(_item_sprite(scene), _THING[scene.count])
    start = (6 if on_left else SIZE - 6 - size * scene.count) + (
        gap + 6 if on_left else gap - 6
    ) // 2
    for k in range(scene.count):
        placed.append(("item", ground, (start + k * size, floor - size)))
    centre = (SIZE - 56 if on_left else 56) + dx
    if scene.action == "climbing":
        rung = _sprite("items/ladderMid", 64)
        for y in range(floor - 64, 0, -64):
            placed.append(("ladder", rung, (centre + shift[0] - rung.width // 2, y)))
    body = _sprite(
        subject_sprite(scene, beat if frame is None else frame),
        104 if scene.subject in ANIMALS else 128,
        flip,
    )
    lift = _LIFT.get(scene.action or scene.subject, 0)
    x = centre + shift[0] - body.width // 2
    y = floor - body.height - lift - abs(dy) * (lift > 0) + shift[1]
    return [*placed, ("subject", body, (x, y))]


def counterfactuals(scene: Scene, factor: str) -> list[Scene]:
    """Change one factor of a scene to each other value that it can take.

    Use it for pairs of pictures that differ in one thing, such as for activation patching.

    Parameters
    ----------
    scene : Scene
        The scene.
    factor : str
        The name of the factor, such as "time".

    Returns
    -------
    list of Scene
        The changed scenes; they have the same layout.

    Raises
    ------
    InputError
        If the factor is unknown or has no meaning in this scene.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import Scene, counterfactuals
    >>> scene = Scene("fish", None, "cactus", None, 1, side="left", place="sand", time="day")
    >>> [changed.time for changed in counterfactuals(scene, "time")]
    ['dusk', 'night']
    """
    values = {
        "subject": PEOPLE if scene.subject in PEOPLE else ANIMALS,
        "action": ACTIONS if scene.action else (),
        "item": PLAIN if scene.colour is None else (),
        "colour": COLOURED.get(scene.item, ()),
        "count": COUNTS,
        "side": SIDES,
        "place": PLACES,
        "time": TIMES,
    }
    if not values.get(factor):
        raise not_in_world("factor", factor, tuple(f for f, v in values.items() if v))
    return [
        replace(scene, **{factor: value})
        for value in values[factor]
        if value != getattr(scene, factor)
    ]
