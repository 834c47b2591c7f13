"""Make texts about scenes, to train and measure the pocket scorer.

Captions and lists of words, each with the scenes that it is true of. A claim is what a text
says, as bits: for each factor the values that it allows. A text that leaves a factor open allows
all of them. A text is true of a scene if each factor of the scene is allowed, so the truth of
any text about any scene is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from xlvlms_tutorial.pocket import language, world
from xlvlms_tutorial.pocket.world import FACTORS, Scene
from xlvlms_tutorial.text import sentence

VALUES = {
    "subject": world.SUBJECTS,
    "action": (*world.ACTIONS, None),
    "item": world.ITEMS,
    "colour": (*world.COLOURS, None),
    "count": world.COUNTS,
    "side": world.SIDES,
    "place": world.PLACES,
    "time": world.TIMES,
}
ANY = 2**30 - 1  # allows every value
# The words for each value; the first is the world's own
SAID: dict[str, dict[str, tuple[str, ...]]] = {
    "subject": {
        "woman": ("woman", "lady", "female", "girl"),
        "man": ("man", "guy", "male", "gentleman"),
        "robot": ("robot", "android", "machine"),
        "zombie": ("zombie", "undead", "monster"),
        "bee": ("bee", "bees", "wasp"),
        "fish": ("fish", "fishes"),
        "fly": ("fly", "flies"),
        "frog": ("frog", "toad", "amphibian"),
        "ladybug": ("ladybug", "ladybird", "beetle"),
        "mouse": ("mouse", "mice", "rodent"),
        "worm": ("worm", "worms"),
    },
    "action": {
        "standing": ("standing", "stands", "stand"),
        "walking": ("walking", "walks", "strolling"),
        "jumping": ("jumping", "jumps", "leaping"),
        "falling": ("falling", "falls", "tumbling"),
        "climbing": ("climbing", "climbs", "ladder"),
    },
    "item": {
        "gem": ("gem", "gems", "jewel", "diamond"),
        "key": ("key", "keys"),
        "flag": ("flag", "flags", "banner"),
        "cactus": ("cactus", "cactuses", "cacti"),
        "bush": ("bush", "bushes", "shrub"),
        "mushroom": ("mushroom", "mushrooms", "fungus"),
        "rock": ("rock", "rocks", "boulder"),
        "box": ("box", "boxes", "crate"),
        "bomb": ("bomb", "bombs", "explosive"),
        "torch": ("torch", "torches", "flame"),
        "sign": ("sign", "signs", "arrow"),
    },
    "colour": {colour: (colour,) for colour in world.COLOURS},
    "place": {
        "grass": ("grass", "lawn", "meadow"),
        "sand": ("sand", "sandy", "desert"),
        "snow": ("snow", "snowy", "winter"),
        "stone": ("stone", "stones"),
        "dirt": ("dirt", "soil", "mud"),
    },
    "time": {
        "day": ("day", "daytime", "daylight"),
        "dusk": ("dusk", "sunset", "evening", "twilight"),
        "night": ("night", "dark", "moon", "nighttime"),
    },
}
BROAD = {
    "person": ("subject", ("woman", "man")),
    "people": ("subject", ("woman", "man")),
    "human": ("subject", ("woman", "man")),
    "animal": ("subject", world.ANIMALS),
    "creature": ("subject", world.ANIMALS),
    "insect": ("subject", ("bee", "fly", "ladybug")),
    "plant": ("item", ("cactus", "bush")),
    "moving": ("action", ("walking", "jumping", "falling", "climbing")),
    "outdoors": ("place", world.PLACES),
}
# Words that are true of no scene
_FOREIGN = """
    accident account airport album answer apple army bakery bank bathroom beer bicycle bird boat
    book bottle bread bridge budget building bus butter cake camera candle car carpet cat century
    chair cheese church cinema city clock coffee computer concert country court cow cup dance debate
    desk dinner doctor dog door dream economy elephant engine exam factory farm film fork football
    fruit furniture garage giraffe glass guitar hammer hat history horse hospital hotel idea
    internet island jacket journey judge kitchen lamp language law letter library lion market meal
    medicine memory method minute mirror money mountain museum music nation newspaper ocean office
    orange oven paint paper party pencil phone piano pizza plane police pond president price problem
    queen question radio rain reason restaurant river road roof room sandwich school science
    scissors sheep ship shirt shoe shop sink skirt soccer sofa song soup station story street
    student suitcase sugar table tax teacher telephone television tennis theory ticket tiger toilet
    tower town toy traffic train truck umbrella university vase village violin voice wall war watch
    water wedding weather wheel window wine wire word year zebra always because become before
    between consider could during eating enough every however important likely maybe never often
    playing possible quickly reading really running several should sitting sleeping sometimes
    swimming talking therefore think very which while without would writing
"""
FOREIGN = tuple(_FOREIGN.split())
# Which factors a caption leaves open: each of the five references, then each style
_OPEN_REFERENCE = (("side", "time"), ("side", "time"), (), ("time",), ("side",))
_OPEN_STYLE = {"place": ("action", "side"), "colour": ("action", "side"), "mood": ("side",)}


@dataclass(frozen=True)
class Text:
    """A text and its claim: for each factor, the bits of the values that it allows."""

    text: str
    claim: tuple[int, ...]


def bit(factor: str, value: object) -> int:
    """Return the bit of a factor's value."""
    return 1 << VALUES[factor].index(value)


def scene_bits(scenes: Sequence[Scene]) -> Int[np.ndarray, "n factors"]:
    """Return the bit of each factor's value in each scene."""
    rows = []
    for scene in scenes:
        rows.append([bit(factor, getattr(scene, factor)) for factor in FACTORS])
    return np.array(rows)


def claim(bits: Mapping[str, int]) -> tuple[int, ...]:
    """Make the claim that allows these bits of some factors, and everything of the others."""
    return tuple(bits.get(factor, ANY) for factor in FACTORS)


def true_of(
    claims: Int[np.ndarray, "m factors"], bits: Int[np.ndarray, "n factors"]
) -> Bool[np.ndarray, "n m"]:
    """Whether each claim is true of each scene."""
    return ((bits[:, None] & claims[None]) != 0).all(axis=2)


def caption(scene: Scene, rng: np.random.Generator) -> Text:
    """Draw one of the five references or of the three styles."""
    candidates = list(zip(language.captions(scene), _OPEN_REFERENCE, strict=True))
    for style, open_factors in _OPEN_STYLE.items():
        candidates.append((language.styled_caption(scene, style), open_factors))
    text, open_factors = candidates[rng.integers(len(candidates))]
    bits = {}
    for factor in FACTORS:
        if factor not in open_factors:
            bits[factor] = bit(factor, getattr(scene, factor))
    return Text(text, claim(bits))


def words_of(scene: Scene, n: int, rng: np.random.Generator) -> tuple[list[str], dict[str, int]]:
    """Draw words that are true of a scene, no two of one factor.

    Parameters
    ----------
    scene : Scene
        The scene.
    n : int
        Words at most.
    rng : numpy.random.Generator
        What draws them.

    Returns
    -------
    words : list of str
        The words.
    bits : dict of str to int
        The bits that each factor's word allows.
    """
    factors = [factor for factor in SAID if getattr(scene, factor) is not None]
    bits = {}
    words = []
    for factor in rng.permutation(factors)[:n]:
        value = getattr(scene, factor)
        broad = []
        for word, (about, values) in BROAD.items():
            if about == factor and value in values:
                broad.append(word)
        if broad and rng.random() < 0.15:
            word = broad[rng.integers(len(broad))]
            bits[factor] = sum(bit(factor, allowed) for allowed in BROAD[word][1])
        else:
            names = SAID[factor][value]  # the world's own word half of the time
            word = names[0 if rng.random() < 0.5 else rng.integers(len(names))]
            bits[factor] = bit(factor, value)
        words.append(word)
    return words, bits


def word_list(scene: Scene, rng: np.random.Generator) -> Text:
    """Draw one to six words that are true of a scene.

    As the sentence by which lists are scored or, one time in five, bare.
    """
    words, bits = words_of(scene, int(rng.integers(1, 7)), rng)
    return Text(sentence(words) if rng.random() < 0.8 else ", ".join(words), claim(bits))


def spoilt_list(scene: Scene, rng: np.random.Generator) -> Text:
    """Draw a list that is true of a scene but for one word.

    That word names another value of its factor (any, if the word allowed all of them).
    """
    factors = [factor for factor in SAID if getattr(scene, factor) is not None]
    words, bits = words_of(scene, int(rng.integers(1, 7)), rng)
    candidates = list(bits) or factors
    factor = candidates[rng.integers(len(candidates))]
    names = SAID[factor]
    others = [value for value in names if not bits[factor] & bit(factor, value)]
    others = others or list(names)
    value = others[rng.integers(len(others))]
    number = list(bits).index(factor)
    words[number] = names[value][0]
    bits[factor] = bit(factor, value)
    return Text(sentence(words), claim(bits))


def foreign_list(scene: Scene, rng: np.random.Generator) -> Text:
    """Draw one to six words that have nothing to do with the world: true of no scene."""
    return Text(
        sentence(rng.choice(FOREIGN, int(rng.integers(1, 7)), replace=False).tolist()),
        (0,) * len(FACTORS),
    )
