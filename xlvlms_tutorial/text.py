"""Words, wherever they are counted.

Whole words in a text, their forms, numbers, answers as they are compared, and styles of captions.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float64

from xlvlms_tutorial.errors import InputError

_PLACES = """
    place ground grass sand snow stone dirt floor land landscape outdoors indoors outside inside
    wide open beach shore coast sea ocean lake river field meadow lawn garden forest woods jungle
    desert mountain hill valley cliff cave island road street sidewalk path trail city town village
    farm yard house room kitchen bedroom bathroom office restaurant shop station airport harbour
    harbor bridge roof wall background
"""
_COLOURS = """
    colour color coloured colored colourful colorful hue shade tint red orange yellow green blue
    purple violet pink magenta brown beige white grey gray black silver golden turquoise teal cyan
    maroon crimson scarlet navy indigo tan blonde reddish greenish bluish yellowish brownish whitish
"""
_MOODS = """
    mood feeling emotion cheerful dreamy quiet joy joyful joyfully fright frightened courage
    courageous patiently patient happy happily happiness sad sadly sadness calm calmly peaceful
    peacefully serene lonely loneliness gloomy melancholy angry angrily anger afraid fear fearful
    scared excited excitement delighted delight bored tired relaxed relaxing proud proudly shy
    surprised lovely romantic playful playfully fun funny tense nervous hopeful gentle gently
    smiling laughing crying eager eagerly content
"""
# Chosen by hand for scenes and photographs; every word is in one list only. "sky" is in none:
# captions name it for its colour as often as for where something is. Left out are colours that are
# as often things (rose, olive) and places that are as often verbs (building, park).
STYLE_WORDS = {
    "place": frozenset(_PLACES.split()),
    "colour": frozenset(_COLOURS.split()),
    "mood": frozenset(_MOODS.split()),
}
STYLES = tuple(STYLE_WORDS)

PREFIX = "A photo is described by the words "  # of words that are compared with a picture

NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset({"a", "an", "the"})
# Left out are those that are other words without their apostrophe: well, were, ill, id,
# its, hell, shell, wed, shed, lets.
_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
    needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't could've might've must've
    should've would've couldn't've hadn't've mightn't've shouldn't've wouldn't've i'm i've he's
    she's it'd it'll that's that'd that'll there's there'd there're they'd they'll they're they've
    we've what's what'll what're what've when's where's where'd where've who's who'd who'll who've
    why's how's how'd you'd you'll you're you've somebody's someone's something's everyone's y'all
    ma'am o'clock
"""


def _contractions() -> dict[str, str]:
    """Map each contraction without one apostrophe or more to its spelling."""
    spellings = {}
    for word in _CONTRACTED.split():
        parts = re.split(r"(')", word)
        apostrophes = range(1, len(parts), 2)
        for size in range(len(apostrophes)):
            for present in combinations(apostrophes, size):
                letters = [part for k, part in enumerate(parts) if part != "'" or k in present]
                spellings["".join(letters)] = word
    return spellings


_CONTRACTIONS = _contractions()
# What answers are rid of, one after another: expressions, and what stands in their place
_BY_THE_CHALLENGE = (
    (r"(?<=\d),(?=\d)", ""),
    (r'[;/\[\]"{}()=+\\_\-><@`,?!]', " "),  # apostrophes and colons stay: a boy's, 10:30
    (r"\.(?!\d)", ""),
)
_BUT_WORDS = (
    (r"(?<=\d),(?=\d)", ""),
    ("'", ""),
    (r"[^\w\s.]|(?<!\d)\.|\.(?!\d)", " "),  # points within numbers stay
)

# Nouns by their end, so that policeman, grandchild and penknife are among them; those
# that keep their form are here too
_IRREGULAR = {
    "man": "men",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "wife": "wives",
    "life": "lives",
    "leaf": "leaves",
    "loaf": "loaves",
    "shelf": "shelves",
    "calf": "calves",
    "half": "halves",
    "wolf": "wolves",
    "thief": "thieves",
    "scarf": "scarves",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "aircraft": "aircraft",
    "series": "series",
}
_PLURAL = re.compile(rf"(.*)({'|'.join(_IRREGULAR)})")
_NOT_IRREGULAR = re.compile(
    r".*(?:human|roman|german|norman|ottoman|shaman|talisman|caiman|\wox|mongoose)"
)
_VERB = re.compile(r"(\w*[aeiouy]\w*)ing")  # walking, not king or string
# vowel signs and accents, within words
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_TOKEN = re.compile(rf"[\w{_MARKS}]+(?:['\u2019][\w{_MARKS}]+)*")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_POSSESSIVE = re.compile(r"['\u2019]s\b", re.IGNORECASE)


def style_rate(captions: Sequence[str], style: str | Iterable[str]) -> Float64[np.ndarray, "n"]:
    """Compute the share of the words of each caption that speak of a style.

    Use it as the strength of a style: it needs no reference captions and no model, and cannot tell
    a fitting word from a wrong one. Words count whole, in any case and in the forms of
    :func:`forms`.

    Parameters
    ----------
    captions : sequence of str
        The captions.
    style : {"place", "colour", "mood"} or iterable of str
        The style, or a list of words of your own.

    Returns
    -------
    ndarray (n,)
        From 0 to 1; 0 for a caption without words.

    Raises
    ------
    InputError
        If there is no such style. If a list of words is empty, or one of them is not a single word.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import style_rate
    >>> style_rate(["A red car outside.", "Two cars."], "colour").tolist()
    [0.25, 0.0]
    """
    hits, lengths = _counts(captions, style)
    return hits / np.maximum(lengths, 1)


def style_share(captions: Sequence[str], style: str | Iterable[str]) -> Bool[np.ndarray, "n"]:
    """Return whether each caption has one word of a style or more.

    Its mean is the share of captions in that style; :func:`style_rate` says how strongly.

    Parameters
    ----------
    captions : sequence of str
        The captions.
    style : {"place", "colour", "mood"} or iterable of str
        The style, or a list of words of your own.

    Returns
    -------
    ndarray of bool (n,)
        True where a caption has such a word.

    Raises
    ------
    InputError
        If there is no such style. If a list of words is empty, or one of them is not a single word.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import style_share
    >>> style_share(["A red car outside.", "Two cars."], "colour").tolist()
    [True, False]
    """
    return _counts(captions, style)[0] > 0


def whole_words(*lists: Iterable[str], any_case: bool = True) -> re.Pattern[str]:
    r"""Make a regular expression that finds words and phrases whole.

    "car" is in "a car.", not in "cars" or "scar". Any white space may stand between the words of a
    phrase. Where several begin at one place, the longest is found.

    Parameters
    ----------
    *lists : iterable of str
        Words or phrases, each list a group of the expression: ``match.lastindex`` is the number of
        the list, from 1. An empty list, or word, matches nothing.
    any_case : bool, default True
        Whether upper and lower case are the same.

    Returns
    -------
    re.Pattern
        Of a single list, ``findall`` gives the matches themselves.

    Examples
    --------
    >>> whole_words(["traffic light", "car"]).findall("A car, cars, a Traffic\nlight.")
    ['car', 'Traffic\nlight']
    >>> [match.lastindex for match in whole_words(["woman"], ["man"]).finditer("a man, a woman")]
    [2, 1]
    """
    groups = []
    for listed in lists:
        phrases = sorted(filter(str.strip, listed), key=len, reverse=True)  # the longest wins
        patterns = [r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
        groups.append(f"({'|'.join(patterns) or '(?!)'})")
    groups = "|".join(groups) or "(?!)"
    return re.compile(rf"(?<!\w)(?:{groups})(?!\w)", re.IGNORECASE if any_case else re.NOFLAG)


def sentence(words: Iterable[str]) -> str:
    """Make the text by which words are compared with pictures.

    The prefix of CLIPScore (Hessel et al. 2021, arXiv 2104.08718), then the words.

    Parameters
    ----------
    words : iterable of str
        The words, in their order.

    Returns
    -------
    str
        One sentence.

    Examples
    --------
    >>> sentence(["woman", "lady"])
    'A photo is described by the words woman, lady.'
    """
    return f"{PREFIX}{', '.join(words)}."


def first_few(values: Iterable[object], n: int, separator: str = ", ") -> str:
    """Return the first n values as text, with an ellipsis where there are others.

    Parameters
    ----------
    values : iterable
        What is listed.
    n : int
        How many are listed at the most.
    separator : str, default ", "
        What stands between them.

    Returns
    -------
    str
        The list.

    Examples
    --------
    >>> from xlvlms_tutorial.text import first_few
    >>> first_few([3, 1, 4, 1], 2)
    '3, 1, ...'
    """
    texts = list(map(str, values))
    parts = texts[:n]
    if len(texts) > n:
        parts.append("...")
    return separator.join(parts)


def normalise(answer: str) -> str:
    """Normalise an answer as accuracy compares it: the words alone, in lower case.

    Use it before two answers are compared; :func:`vqa_normalise` does so by the rules of the VQA
    challenge. Articles go, number words up to ten become digits, and every mark becomes a space,
    but for points within numbers; apostrophes and commas between digits are dropped. Normalising
    twice changes nothing.

    Parameters
    ----------
    answer : str
        What a model or a person has said.

    Returns
    -------
    str
        Words with one space between them, or nothing.

    Examples
    --------
    >>> from xlvlms_tutorial.text import normalise
    >>> normalise("The two."), normalise("left-hand side"), normalise("1,000"), normalise("3.5")
    ('2', 'left hand side', '1000', '3.5')
    """
    return " ".join(_compared(answer, _BUT_WORDS))


def vqa_normalise(answer: str) -> str:
    """Normalise an answer as the VQA challenge compares it.

    Lower case; commas between digits are dropped and other punctuation becomes a space, periods are
    dropped unless a digit follows; number words up to ten become digits, articles go, contractions
    get their apostrophes back. Normalising twice changes nothing.

    The official script differs: it drops punctuation without a space in every answer that has a
    comma between digits, and a mark that stands next to a space anywhere in the answer
    ("1,000 t-shirts" is "1000 tshirts" there, "1000 t shirts" here); it knows rarer contractions
    ("hed", "twas", "y'all'll") and lacks a few that are here ("im", "ive", "shes").

    Parameters
    ----------
    answer : str
        What a model or a person has said.

    Returns
    -------
    str
        Words with one space between them, or nothing.

    Examples
    --------
    >>> from xlvlms_tutorial.text import vqa_normalise
    >>> vqa_normalise("The  two dogs."), vqa_normalise("dont"), vqa_normalise("10:30 a.m.")
    ('2 dogs', "don't", '10:30 am')
    """
    compared = _compared(answer, _BY_THE_CHALLENGE)
    return " ".join(_CONTRACTIONS.get(word, word) for word in compared)


def words(text: str) -> list[str]:
    """Split a text into words in lower case, without punctuation; apostrophes within a word stay.

    Of scripts without spaces (Chinese, Japanese, Thai) each character is a word, as their captions
    are usually scored. A letter with its accent is one character, however it was typed (NFC).

    Parameters
    ----------
    text : str
        Any text, such as a caption.

    Returns
    -------
    list of str
        The words in their order.

    Examples
    --------
    >>> words("A dog's ball.")
    ['a', "dog's", 'ball']
    """
    return _TOKEN.findall(_UNSPACED.sub(r" \g<0> ", composed(text)))


def composed(text: str) -> str:
    """Return a text in lower case, each letter and its accent one character (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text.lower())


def unspaced(text: str) -> bool:
    """Return whether a text of a script without spaces has none between its words."""
    return _UNSPACED.search(text) is not None and len(text.split()) == 1


def forms(word: str) -> list[str]:
    """List the forms of a word by which captions are searched, itself first.

    These are the word in lower case with its plural or present ("box", "boxes"), and of "walking"
    also "walk" and "walks".

    Parameters
    ----------
    word : str
        A noun, or a verb that ends in "ing".

    Returns
    -------
    list of str
        The forms. Where spelling leaves it open, some are no words.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import forms
    >>> forms("Box"), forms("goose")
    (['box', 'boxes'], ['goose', 'geese'])
    """
    word = composed(word)
    irregular = None if _NOT_IRREGULAR.fullmatch(word) else _PLURAL.fullmatch(word)
    if irregular:
        result = [word, irregular[1] + _IRREGULAR[irregular[2]]]
    else:
        result = [word, *_third_person(word)]
    # without the first condition the pattern tries every vowel for every other
    verb = _VERB.fullmatch(word) if word.endswith("ing") else None
    if verb is None:
        return result
    stem = verb[1]
    roots = [stem, f"{stem}e"]  # walk, ride
    if stem[-1:] == stem[-2:-1]:
        roots.append(stem[:-1])  # run
    for root in roots:
        result += [root, *_third_person(root)]
    return result


def _compared(answer: str, removed: Iterable[tuple[str, str]]) -> list[str]:
    """Split an answer into words but for articles, numbers as digits."""
    text = answer.lower().replace("\u2019", "'")
    for expression, instead in removed:
        text = re.sub(expression, instead, text)
    compared = []
    for word in text.split():
        if word not in ARTICLES:
            compared.append(NUMBERS.get(word, word))
    return compared


def _third_person(word: str) -> list[str]:
    if word.endswith("o"):
        return [f"{word}es", f"{word}s"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [f"{word}es"]
    if re.search(r"[^aeiou]y$", word):
        return [f"{word}s", f"{word[:-1]}ies"]
    return [f"{word}s"]


def _counts(captions: Sequence[str], style: str | Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Count the words of the style and all words of each caption."""
    vocabulary = _style_words(style)
    hits, lengths = [], []
    for caption in captions:
        caption_words = words(_POSSESSIVE.sub("", caption))
        hits.append(sum(map(vocabulary.__contains__, caption_words)))
        lengths.append(len(caption_words))
    return np.array(hits, dtype=np.int64), np.array(lengths, dtype=np.int64)


def _style_words(style: str | Iterable[str]) -> frozenset[str]:
    if isinstance(style, str) and style not in STYLE_WORDS:
        raise InputError(
            f"no style {style!r}", f"allowed: {', '.join(STYLE_WORDS)}, or a list of words"
        )
    listed = list(STYLE_WORDS[style] if isinstance(style, str) else style)
    advice = "give a list of one single word or more"
    if not listed:
        raise InputError("no words of the style", advice)
    for word in listed:
        if not isinstance(word, str) or words(word) != [composed(word)]:
            raise InputError(f"{word!r} is not one word", advice)
    vocabulary: set[str] = set()
    for word in listed:
        vocabulary.update(forms(word))
    return frozenset(vocabulary)
