"""Say where in a scene's picture things are: the pixels of its subject, its items, its ground.

They are read off the picture itself, by drawing it again without the subject and without items.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from xlvlms_tutorial.pocket.world import SIZE, Scene, render

_GROUND = 64  # height of the strip of ground in pixels
_OUTSIDE = (2 * SIZE, 0)  # a shift that moves the subject out of the picture


def regions(scene: Scene) -> dict[str, Bool[np.ndarray, "height width"]]:
    """Mark the pixels of what a scene shows, by the word for it.

    Use it as the truth of what a part of the picture holds. A ladder belongs to who climbs it.
    Where the subject covers an item, the pixels are the subject's.

    Parameters
    ----------
    scene : Scene
        The scene.

    Returns
    -------
    dict of str to array of bool (256, 256)
        Masks by the subject, the item, the item's colour (the item's pixels, where it has one), and
        the place (the ground that is to be seen). Nothing stands for the sky.

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import Scene
    >>> from xlvlms_tutorial.pocket.regions import regions
    >>> scene = Scene("frog", None, "key", "red", 1, side="left", place="sand", time="day")
    >>> masks = regions(scene)
    >>> list(masks), bool((masks["key"] == masks["red"]).all())
    (['frog', 'key', 'red', 'sand'], True)
    >>> masks["key"].nonzero()[1].max() < masks["frog"].nonzero()[1].min()
    np.True_
    """
    without_subject = _pixels(scene)
    subject = (_pixels(scene, subject=True) != without_subject).any(axis=-1)
    # one item fills less than half of a picture, so the other half shows what is behind items
    left = _pixels(replace(scene, count=1, side="left"))
    right = _pixels(replace(scene, count=1, side="right"))
    behind = np.concatenate([right[:, : SIZE // 2], left[:, SIZE // 2 :]], axis=1)
    item = (without_subject != behind).any(axis=-1) & ~subject
    ground = ~subject & ~item
    ground[: SIZE - _GROUND] = False
    masks = {scene.subject: subject, scene.item: item}
    if scene.colour is not None:
        masks[scene.colour] = item
    masks[scene.place] = ground
    return masks


def _pixels(scene: Scene, subject: bool = False) -> Int[np.ndarray, "height width 3"]:
    return np.asarray(render(scene, shift=(0, 0) if subject else _OUTSIDE), dtype=int)
