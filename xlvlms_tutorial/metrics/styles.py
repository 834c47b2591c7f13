"""What a caption dwells on: lists of words for a style, the forms that English gives them, and their share of a caption."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from xlvlms_tutorial.errors import SelectionError, WordListError

_PLACES = """
    place ground grass sand snow stone dirt floor land landscape outdoors indoors outside inside wide open beach shore coast sea
    ocean lake river field meadow lawn garden forest woods jungle desert mountain hill valley cliff cave island road street
    sidewalk path trail city town village farm yard house room kitchen bedroom bathroom office restaurant shop station airport
    harbour harbor bridge roof wall background
"""
_COLOURS = """
    colour color coloured colored colourful colorful hue shade tint red orange yellow green blue purple violet pink magenta
    brown beige white grey gray black silver golden turquoise teal cyan maroon crimson scarlet navy indigo tan blonde reddish
    greenish bluish yellowish brownish whitish
"""
_MOODS = """
    mood feeling emotion cheerful dreamy quiet joy joyful joyfully fright frightened courage courageous patiently patient happy
    happily happiness sad sadly sadness calm calmly peaceful peacefully serene lonely loneliness gloomy melancholy angry angrily
    anger afraid fear fearful scared excited excitement delighted delight bored tired relaxed relaxing proud proudly shy
    surprised lovely romantic playful playfully fun funny tense nervous hopeful gentle gently smiling laughing crying eager
    eagerly content
"""
# Chosen by hand for scenes and photographs; every word is in one list only. "sky" is in none: captions name it for its colour as often as
# for where something is. Left out are colours that are as often things (rose, olive) and places that are as often verbs (building, park).
STYLE_WORDS = {name: frozenset(words.split()) for name, words in (("place", _PLACES), ("colour", _COLOURS), ("mood", _MOODS))}

_IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice"}
_VERB = re.compile(r"(\w*[aeiouy]\w*)ing")  # walking, not king or string
_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*")
_POSSESSIVE = re.compile(r"['\u2019]s\b", re.IGNORECASE)


def style_rate(captions: Sequence[str], style: str | Iterable[str]) -> Float64[np.ndarray, "n"]:
    """Share of the words of each caption that speak of a style: "place", "colour" or "mood", or a list of words of your own.

    Words count whole, in any case and in the forms of :func:`forms`; a caption without words has the rate 0. The rate is a style
    strength: it needs no reference captions and no model, and cannot tell a fitting word from a wrong one.

    Raises
    ------
    SelectionError
        If there is no such style.
    WordListError
        If a list of words is empty, or one of them is not a single word.
    """
    hits, lengths = _counts(captions, style)
    return hits / np.maximum(lengths, 1)


def style_share(captions: Sequence[str], style: str | Iterable[str]) -> Bool[np.ndarray, "n"]:
    """Whether each caption has one word of a style or more; the words and the errors are those of :func:`style_rate`."""
    return _counts(captions, style)[0] > 0


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; apostrophes within a word stay."""
    return _TOKEN.findall(text.lower())


def forms(word: str) -> list[str]:
    """A word in lower case with its plural or present ("box", "boxes"); of "walking" also "walk" and "walks"."""
    word = word.lower()
    stem = _VERB.fullmatch(word)
    found = [word, _IRREGULAR[word]] if word in _IRREGULAR else [word, *_third_person(word)]
    if stem:
        roots = [stem[1], f"{stem[1]}e"] + ([stem[1][:-1]] if stem[1][-1:] == stem[1][-2:-1] else [])  # walk, ride, run
        found += [form for root in roots for form in (root, *_third_person(root))]
    return found


def _third_person(word: str) -> list[str]:
    if re.search(r"(s|x|z|ch|sh|o)$", word):
        return [f"{word}es", f"{word}s"] if word.endswith("o") else [f"{word}es"]
    return [f"{word}s", f"{word[:-1]}ies"] if re.search(r"[^aeiou]y$", word) else [f"{word}s"]


def _counts(captions: Sequence[str], style: str | Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many words of the style and how many words at all each caption has."""
    wanted = _wanted(style)
    told = [words(_POSSESSIVE.sub("", caption)) for caption in captions]
    hits = [sum(map(wanted.__contains__, caption)) for caption in told]
    return np.array(hits, dtype=np.int64), np.array(list(map(len, told)), dtype=np.int64)


def _wanted(style: str | Iterable[str]) -> frozenset[str]:
    if isinstance(style, str) and style not in STYLE_WORDS:
        raise SelectionError(f"no style {style!r}", f"allowed: {', '.join(STYLE_WORDS)}, or a list of words")
    listed = list(STYLE_WORDS[style] if isinstance(style, str) else style)
    wrong = [word for word in listed if not _TOKEN.fullmatch(word)]
    if wrong or not listed:
        raise WordListError(f"{wrong[0]!r} is not one word" if wrong else "no words of the style", "give a list of one single word or more")
    return frozenset(form for word in listed for form in forms(word))
