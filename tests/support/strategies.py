"""Scenes of every kind that the world allows, for hypothesis."""

from hypothesis import strategies as st

from xlvlms_tutorial.pocket.world import (
    ACTIONS,
    COLOURED,
    COUNTS,
    ITEMS,
    PEOPLE,
    PLACES,
    SIDES,
    SUBJECTS,
    TIMES,
    Scene,
)


@st.composite
def any_scene(draw, people_only: bool = False) -> Scene:
    subject, item = (
        draw(st.sampled_from(PEOPLE if people_only else SUBJECTS)),
        draw(st.sampled_from(ITEMS)),
    )
    return Scene(
        subject=subject,
        action=draw(st.sampled_from(ACTIONS)) if subject in PEOPLE else None,
        item=item,
        colour=draw(st.sampled_from(COLOURED[item])) if item in COLOURED else None,
        count=draw(st.sampled_from(COUNTS)),
        side=draw(st.sampled_from(SIDES)),
        place=draw(st.sampled_from(PLACES)),
        time=draw(st.sampled_from(TIMES)),
        layout=draw(st.integers(0, 2**31 - 1)),
    )
