"""Clips: movement that the frames show and that one frame alone does not tell."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.strategies import any_scene
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket import world
from xlvlms_tutorial.pocket.clips import (
    Clip,
    clip_captions,
    clip_questions,
    clips,
    directions,
    render_clip,
    speeds,
)

# beartype picks the list items it checks with the random module, inside a strategy too
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
SCENE = world.Scene("robot", "walking", "key", "blue", 1, "right", "stone", "day", 12)


@st.composite
def any_clip(draw) -> Clip:
    scene = draw(any_scene(people_only=True))
    return Clip(
        scene,
        draw(st.sampled_from(directions(scene.action))),
        draw(st.sampled_from(speeds(scene.action))),
    )


def centre(frame, clip) -> tuple[float, float]:
    """Middle of the subject: where the frame differs from the same
    frame with another person in it.
    """
    without = world.render(
        replace(clip.scene, subject="man" if clip.scene.subject != "man" else "woman"),
        shift=(1000, 1000),
        frame=0,
    )
    rows, columns = np.abs(np.asarray(frame).astype(int) - np.asarray(without)).sum(2).nonzero()
    return columns.mean(), rows.mean()


def path(clip) -> np.ndarray:
    return np.array([centre(frame, clip) for frame in render_clip(clip)])


def test_clips_are_the_same_to_the_pixel_and_lists_grow_at_the_end():
    digest = lambda records: hashlib.sha256(
        b"".join(f.tobytes() for clip in records for f in render_clip(clip))
    ).hexdigest()
    assert digest(clips(6, "test", 1)) == digest(clips(6, "test", 1)) != digest(clips(6, "test", 2))
    assert clips(50, "train")[:20] == clips(20, "train")


@pytest.mark.parametrize("split", world.SPLITS)
def test_clips_keep_to_the_scenes_of_their_split(split):
    sampled = clips(200, split)
    assert all(
        clip.scene.held_out == (split == "composition") and clip.scene.action for clip in sampled
    )
    assert {clip.scene for clip in sampled} <= set(world.scenes(1000, split))


@settings(max_examples=30, deadline=None)
@given(any_clip())
def test_eight_pictures_a_clip(clip):
    frames = render_clip(clip)
    assert len(frames) == 8 and all(f.size == (256, 256) and f.mode == "RGB" for f in frames)
    moved = len({f.tobytes() for f in frames}) > 1
    assert moved == (clip.scene.action != "standing")


@pytest.mark.parametrize("side", world.SIDES)
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_a_walker_goes_where_the_record_says_and_faster_when_fast(side, speed):
    scene = replace(SCENE, side=side)
    rightwards, leftwards = (
        path(Clip(scene, direction, speed))[:, 0] for direction in ("right", "left")
    )
    assert rightwards[-1] - rightwards[0] > 12 and leftwards[-1] - leftwards[0] < -12
    if speed == "fast":
        assert (
            rightwards[-1] - rightwards[0]
            > 2 * np.ptp(path(Clip(scene, "right", "slow"))[:, 0]) * 0.9
        )


def test_up_and_down():
    climb = {
        way: render_clip(Clip(replace(SCENE, action="climbing"), way, "fast"))
        for way in ("up", "down")
    }
    height = {way: [np.asarray(f) for f in frames] for way, frames in climb.items()}
    first_rows = {way: [_top(a, b) for a, b in pairwise(stack)] for way, stack in height.items()}
    assert first_rows["up"][-1] < first_rows["up"][0]
    assert first_rows["down"][-1] > first_rows["down"][0]
    fall = path(Clip(replace(SCENE, action="falling"), None, "slow"))[:, 1]
    assert (np.diff(fall) > 0).all()
    jump = path(Clip(replace(SCENE, action="jumping"), None, "slow"))[:, 1]
    assert jump.argmin() in (3, 4)
    assert jump[0] == pytest.approx(jump[-1], abs=1)
    assert jump[0] - jump.min() > 30


def _top(a, b) -> int:
    return int((a != b).any(axis=(1, 2)).nonzero()[0].min())


def test_a_fast_jump_is_two_hops():
    rows = path(Clip(replace(SCENE, action="jumping"), None, "fast"))[:, 1]
    peaks = [k for k in range(1, 7) if rows[k] < rows[k - 1] and rows[k] <= rows[k + 1]]
    assert len(peaks) == 2


@pytest.mark.parametrize("speed", ["slow", "fast"])
@pytest.mark.parametrize("action", ["walking", "climbing"])
def test_one_frame_does_not_tell_the_direction(action, speed, monkeypatch):
    """Over the layouts, both directions show the same poses at the same places.

    Only their order differs.
    """
    beats = 8 if action == "walking" else 2

    def note(scene, frame, shift):
        picture = Image.new("RGB", (1, 1))
        picture.info = {"pose": frame % beats, "place": shift}
        return picture

    monkeypatch.setattr(world, "render", note)
    frames = []
    for way in directions(action):
        infos = set()
        for layout in range(8):
            scene = replace(SCENE, action=action, layout=layout)
            infos |= {tuple(frame.info.items()) for frame in render_clip(Clip(scene, way, speed))}
        frames.append(infos)
    assert frames[0] == frames[1]
    scene = replace(SCENE, action=action)
    first, second = (
        [frame.info["place"] for frame in render_clip(Clip(scene, way, speed))]
        for way in directions(action)
    )
    assert first == second[::-1] != first[::-1]


@settings(max_examples=150, deadline=None)
@given(any_clip())
def test_captions_and_questions_follow_from_the_record(clip):
    texts = clip_captions(clip)
    assert len(set(texts)) == 5
    way = {"left": "to the left", "right": "to the right"}.get(clip.direction, clip.direction)
    pace = {"slow": "slowly", "fast": "quickly", None: "still"}[clip.speed]
    for text in texts:
        assert clip.scene.subject in text.lower()
        assert clip.scene.place in text
        assert pace in text
        assert "None" not in text
        assert way is None or f"{pace} {way}" in text
    asked_questions = {q.type: q for q in clip_questions(clip)}
    for factor in ("direction", "speed"):
        value = getattr(clip, factor)
        assert (factor in asked_questions) == (value is not None)
        assert value is None or (
            asked_questions[factor].answer == value
            and clip.scene.subject in asked_questions[factor].text
            and "{" not in asked_questions[factor].text
        )
    assert asked_questions["place"].answer == clip.scene.place


def test_directions_and_speeds_are_balanced():
    drawn = clips(2000)
    frame = pd.DataFrame(
        {
            "action": [clip.scene.action for clip in drawn],
            "direction": [clip.direction for clip in drawn],
            "speed": [clip.speed for clip in drawn],
        }
    )
    assert len(frame) == 2000
    for action, ways in (("walking", ["left", "right"]), ("climbing", ["up", "down"])):
        shares = (
            frame.loc[frame.action == action, "direction"].astype(str).value_counts(normalize=True)
        )
        assert set(shares.index) == set(ways) and shares.between(0.4, 0.6).all()
    assert frame.loc[frame.action == "standing", ["direction", "speed"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((SCENE, "up", "slow"), "left, right"),
        ((SCENE, "left", "medium"), "slow, fast"),
        ((SCENE, None, "slow"), "left, right"),
        ((replace(SCENE, action="standing"), None, "slow"), "None"),
        ((replace(SCENE, subject="bee", action=None), None, None), "woman"),
        ((SCENE, "left", "slow", 1), "2 to 64"),
    ],
)
def test_impossible_clips_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        Clip(*arguments)


def test_impossible_lists_are_refused():
    with pytest.raises(InputError, match="composition"):
        clips(3, "dev")
    with pytest.raises(InputError, match="1 or more"):
        clips(0)
