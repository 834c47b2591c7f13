"""Make clips: scenes whose subject moves.

Which way it goes is told by the order of the frames alone, how fast by what changes between them.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from xlvlms_tutorial.errors import not_in_world
from xlvlms_tutorial.pocket import language, world
from xlvlms_tutorial.pocket.world import Scene
from xlvlms_tutorial.samples import Question

FRAMES = 8
SPEEDS = ("slow", "fast")
# other actions leave no choice
DIRECTIONS = {"walking": ("left", "right"), "climbing": ("up", "down")}

_MANNER = {"slow": "slowly", "fast": "quickly"}
_WAY = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
# pixels walked in a clip: short enough to leave the things on their side
_WALK = {"slow": 24, "fast": 64}
_CLIMB = {"slow": 20, "fast": 60}
_HOPS = {"slow": 1, "fast": 2}
_HOP = 62  # pixels between the ground and the top of a jump: the head stays in the picture
_FALL = {"slow": 60, "fast": 160}
# how high above the ground the scene itself shows the subject
_REST = {"jumping": 34, "falling": 70, "climbing": 26}
_ASK = {
    "direction": (
        "Which way does the {subject} go?",
        "In which direction does the {subject} move?",
        "Does the {subject} go {ways}?",
    ),
    "speed": (
        "Is the {subject} slow or fast?",
        "How fast is the {subject}?",
        "Does the {subject} move slow or fast?",
    ),
}


@dataclass(frozen=True)
class Clip:
    """A scene with a person in it, and how the person moves.

    ``direction`` is None but for walking and climbing, ``speed`` is None for standing. The sprite
    faces either way and climbs alike up and down, so a frame by itself does not tell the direction.

    Raises
    ------
    InputError
        If the scene has no person, or a factor has a value that the action does not allow.
    """

    scene: Scene
    direction: str | None
    speed: str | None
    frames: int = FRAMES

    def __post_init__(self) -> None:
        if self.scene.action is None:
            raise not_in_world("subject", self.scene.subject, world.PEOPLE)
        allowed = {"direction": directions(self.scene.action), "speed": speeds(self.scene.action)}
        for factor, values in allowed.items():
            if getattr(self, factor) not in values:
                raise not_in_world(factor, getattr(self, factor), values)
        if not 2 <= self.frames <= 64:
            raise not_in_world("frames", self.frames, "2 to 64")


def directions(action: str) -> tuple[str | None, ...]:
    """List the directions that an action can take; (None,) where it leaves no choice."""
    return DIRECTIONS.get(action, (None,))


def speeds(action: str) -> tuple[str | None, ...]:
    """List the speeds that an action can have; (None,) for standing."""
    return (None,) if action == "standing" else SPEEDS


def clips(n: int, split: str = "train", seed: int = 0) -> list[Clip]:
    """Draw clips of a split: its scenes with people in them, in order, each with a movement.

    The first clips of a longer list are those of a shorter one, and splits share no scene.

    Parameters
    ----------
    n : int
        Number of clips.
    split : str, default "train"
        "train", "validation", "test" or "composition".
    seed : int, default 0
        Seed of the scenes.

    Returns
    -------
    list of Clip
        The clips.

    Raises
    ------
    InputError
        If the split is unknown or ``n`` is below 1.
    """
    moving = []
    n_scenes = n
    while not moving or len(moving) < n:
        moving = [scene for scene in world.scenes(n_scenes, split, seed) if scene.action]
        n_scenes *= 2
    return [_move(scene, seed) for scene in moving[:n]]


def _move(scene: Scene, seed: int) -> Clip:
    rng = np.random.default_rng([seed, scene.layout, 1])
    ways, paces = directions(scene.action), speeds(scene.action)
    return Clip(scene, ways[rng.integers(len(ways))], paces[rng.integers(len(paces))])


def render_clip(clip: Clip) -> list[Image.Image]:
    """Draw the frames of a clip, RGB pictures of 256 x 256 pixels.

    They are the same to the pixel each time.
    """
    pace = 2 if clip.scene.action == "walking" and clip.speed == "fast" else 1
    # else the pose and the place of one frame together would tell the direction
    start = clip.scene.layout % FRAMES
    return [
        world.render(clip.scene, start + k * pace, _shift(clip, k / (clip.frames - 1)))
        for k in range(clip.frames)
    ]


def _shift(clip: Clip, t: float) -> tuple[int, int]:
    """How far the subject is from its place in the scene at a time from 0 to 1.

    In pixels to the right and down.
    """
    action = clip.scene.action
    height = _REST.get(clip.scene.action, 0)
    if action == "walking":
        inward = 1 if clip.scene.side == "right" else -1  # towards the things
        fraction = t if (clip.direction == "right") == (inward == 1) else 1 - t
        return round(inward * (fraction * _WALK[clip.speed] - 16)), 0
    if action == "climbing":
        fraction = t if clip.direction == "up" else 1 - t
        return 0, round(height - fraction * _CLIMB[clip.speed])
    if action == "jumping":
        hop = (t * _HOPS[clip.speed]) % 1
        return 0, round(height - 4 * _HOP * hop * (1 - hop))
    if action == "falling":
        return 0, round(height - _FALL[clip.speed] * (1 - t**2))
    return 0, 0


def _phrases(clip: Clip) -> tuple[str, str]:
    """What the subject does: "walks slowly to the left" and "walking slowly to the left"."""
    if clip.speed is None:
        return "stands still", "standing still"
    tail = (
        f"{_MANNER[clip.speed]} {_WAY[clip.direction]}" if clip.direction else _MANNER[clip.speed]
    )
    return f"{language._PRESENT[clip.scene.action]} {tail}", f"{clip.scene.action} {tail}"


def clip_captions(clip: Clip) -> list[str]:
    """Write five reference captions of a clip.

    Each names subject, movement, things with number and colour, and place.
    """
    scene = clip.scene
    subject = language.article(scene.subject)
    things = language.things(scene)
    place = language._WHERE[scene.place]
    does, doing = _phrases(clip)
    be = "is" if scene.count == 1 else "are"
    sentences = [
        f"{subject} is {doing} {place} next to {things}.",
        f"{place} {subject} {does} beside {things}.",
        f"{subject} {does} {place} {language._WHEN[scene.time]}, and there {be} {things}.",
        f"there {be} {things} {place} near {subject} {doing}.",
        f"{language._WHEN[scene.time]}, {subject} {does} {place} near {things}.",
    ]
    return [line[0].upper() + line[1:] for line in sentences]


def clip_questions(clip: Clip, seed: int = 0) -> list[Question]:
    """Write the questions of the clip's scene, and those of direction and speed.

    Where the movement has them.
    """
    rng = np.random.default_rng([seed, clip.scene.layout, 2])
    questions = language.questions(clip.scene, seed)
    subject = clip.scene.subject
    ways = " or ".join(w for w in directions(clip.scene.action) if w)
    for kind, answer in (("direction", clip.direction), ("speed", clip.speed)):
        if answer is not None:
            text = _ASK[kind][rng.integers(3)].format(subject=subject, ways=ways)
            questions.append(Question(kind, text, answer, subject))
    return questions
