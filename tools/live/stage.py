"""The world's sprites and some of its scenes, in the form in which ``live/scene.js`` draws them."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from xlvlms_tutorial.pocket import world
from xlvlms_tutorial.pocket.language import captions, questions
from xlvlms_tutorial.pocket.world import ACTIONS, ANIMALS, COLOURED, PEOPLE, PLACES, PLAIN, TIMES
from xlvlms_tutorial.text import forms
from xlvlms_tutorial.text import words as words_of

WIDTH = 1024  # pixels of half the atlas; the other half says how opaque they are
LARGE, SMALL = 128, 104  # height of people and animals
RUNG = 64
FLOOR = world.SIZE - world._GROUND + 8
FRAMES = {"walking": 8, "climbing": 2}  # of other actions there is one
FACTORS = ("subject", "action", "item", "colour", "place", "time")


@dataclass(frozen=True)
class Sprite:
    """A picture of the atlas, how high it is above the ground, and what it shows."""

    name: str
    picture: Image.Image
    lift: int = 0
    shows: tuple[tuple[str, str], ...] = ()


def sprites() -> Iterator[Sprite]:
    """Everything that a scene is drawn from, at the sizes in which the world draws it."""
    for time in TIMES:
        sky = world._backdrop("grass", time).convert("RGBA")
        yield Sprite(f"sky {time}", sky.crop((0, 0, world.SIZE, world.SIZE - world._GROUND)))
    for place in PLACES:
        yield Sprite(f"ground {place}", world._sprite(f"tiles/{place}Mid", world._GROUND))
    yield Sprite("ladder", world._sprite("items/ladderMid", RUNG))
    for subject in PEOPLE:
        for action in ACTIONS:
            for frame in range(FRAMES.get(action, 1)):
                scene = example(subject=subject, action=action)
                picture = world._sprite(world.subject_sprite(scene, frame), LARGE)
                lift = world._LIFT.get(action, 0)
                shows = (("subject", subject), ("action", action))
                yield Sprite(f"{subject} {action} {frame}", picture, lift, shows)
    for subject in ANIMALS:
        name = world.subject_sprite(example(subject=subject, action=None), 0)
        lift = world._LIFT.get(subject, 0)
        yield Sprite(subject, world._sprite(name, SMALL), lift, (("subject", subject),))
    for item in (*COLOURED, *PLAIN):
        for colour in COLOURED.get(item, (None,)):
            name = world._item_sprite(example(item=item, colour=colour))
            shows = (("item", item), *((("colour", colour),) if colour else ()))
            for size in world._THING.values():
                yield Sprite(item_name(item, colour, size), world._sprite(name, size), 0, shows)


def item_name(item: str, colour: str | None, size: int) -> str:
    """The name of a thing's sprite, such as "red key 72"."""
    return f"{colour} {item} {size}" if colour else f"{item} {size}"


def example(**factors: object) -> world.Scene:
    """A scene with these factors, to ask the world for its sprite."""
    usual = {
        "subject": "woman",
        "action": "standing",
        "item": "rock",
        "colour": None,
        "count": 1,
        "side": "left",
        "place": "grass",
        "time": "day",
    }
    return world.Scene(**(usual | factors))


def atlas() -> tuple[Image.Image, dict[str, list[int]]]:
    """One opaque picture with all sprites: colours on the left, opacity on the right.

    Opaque, because a browser changes the colours of half-transparent pixels when it decodes them.

    Returns
    -------
    picture : PIL.Image.Image
        RGB, 2 x WIDTH pixels wide.
    places : dict
        x, y, width and height of each sprite in the left half.
    """
    everything = sorted(sprites(), key=lambda sprite: -sprite.picture.height)
    places, x, y, height = {}, 0, 0, 0
    for sprite in everything:
        size = sprite.picture.size
        if x + size[0] > WIDTH:
            x, y, height = 0, y + height, 0
        places[sprite.name] = [x, y, *size]
        x, height = x + size[0], max(height, size[1])
    pixels = np.zeros((y + height, 2 * WIDTH, 3), np.uint8)
    for sprite in everything:
        left, top, width, tall = places[sprite.name]
        rgba = np.asarray(sprite.picture.convert("RGBA"))
        opaque = rgba[..., 3:]
        here = slice(top, top + tall), slice(left, left + width)
        pixels[here] = rgba[..., :3] * (opaque > 0)
        pixels[:, WIDTH:][here] = opaque
    return Image.fromarray(pixels), places


def things(scene: world.Scene) -> list[dict[str, object]]:
    """What is drawn where in a scene, as ``world.render`` lays it out."""
    rng = np.random.default_rng(scene.layout)
    flip, beat = bool(rng.integers(2)), int(rng.integers(8))
    dx, dy, gap = (int(value) for value in rng.integers(-6, 7, size=3))
    on_left, size = scene.side == "left", world._THING[scene.count]
    start = 6 if on_left else world.SIZE - 6 - size * scene.count
    start += (gap + 6 if on_left else gap - 6) // 2
    item = item_name(scene.item, scene.colour, size)
    drawn = []
    for k in range(scene.count):
        drawn.append({"sprite": item, "x": start + k * size, "y": FLOOR - size})
    centre = (world.SIZE - 56 if on_left else 56) + dx
    if scene.action == "climbing":
        rung = world._sprite("items/ladderMid", RUNG)
        for y in range(FLOOR - RUNG, 0, -RUNG):
            drawn.append({"sprite": "ladder", "x": centre - rung.width // 2, "y": y})
    name = scene.subject
    if scene.action:
        name = f"{scene.subject} {scene.action} {beat % FRAMES.get(scene.action, 1)}"
    body = world._sprite(world.subject_sprite(scene, beat), LARGE if scene.action else SMALL, flip)
    lift = world._LIFT.get(scene.action or scene.subject, 0)
    y = FLOOR - body.height - lift - abs(dy) * (lift > 0)
    drawn.append({"sprite": name, "x": centre - body.width // 2, "y": y, "flip": flip})
    return drawn


def scenes(n: int, split: str = "test", seed: int = 77) -> list[dict[str, object]]:
    """Scenes of a split as ``live/scene.js`` takes them."""
    result = []
    for scene in world.scenes(n, split, seed):
        result.append({"place": scene.place, "time": scene.time, "things": things(scene)})
    return result


def words() -> dict[str, dict[str, list[str]]]:
    """The words by which captions are searched for each value of each factor."""
    values = {
        "subject": (*PEOPLE, *ANIMALS),
        "action": ACTIONS,
        "item": (*COLOURED, *PLAIN),
        "colour": world.COLOURS,
        "place": PLACES,
        "time": TIMES,
    }
    result = {}
    for factor in FACTORS:
        result[factor] = {value: forms(value) for value in values[factor]}
    return result


def language(n: int = 400) -> list[str]:
    """Every word of the world's captions and answers."""
    found = set()
    for scene in world.scenes(n, "train", 0):
        texts = [*captions(scene), *(question.answer for question in questions(scene))]
        found.update(word for text in texts for word in words_of(text))
    # the language model's own plurals and forms of the world's words
    for values in words().values():
        found.update(form for forms_of in values.values() for form in forms_of)
    return sorted(found)


def stage(n_scenes: int = 60) -> dict[str, object]:
    """Everything that the page needs to compose scenes, the atlas as a data address."""
    picture, places = atlas()
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    kinds = {}
    for sprite in sprites():
        if sprite.shows:
            kinds[sprite.name] = {"lift": sprite.lift, "shows": dict(sprite.shows)}
    return {
        "atlas": {"image": address, "width": 2 * WIDTH, "sprites": places, "tint": world._TINT},
        "kinds": kinds,
        "floor": FLOOR,
        "places": PLACES,
        "times": TIMES,
        "forms": words(),
        "language": language(),
        "scenes": scenes(n_scenes),
    }
