"""How the evaluation script of the VQA challenge compares answers, with all its slips.

For numbers that stand beside published ones. Read and run at GT-Vision-Lab/VQA a013f00. What it
counts is in :func:`metrics.vqa.vqa_accuracy`.
"""

import re

from xlvlms_tutorial.text import ARTICLES, NUMBERS

# A bar is where the apostrophe is missing in the spelling that is mended, a word
# without a bar lacks all of its own.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't|ve couldn|t've didn't doesn't don't hadn't
    hadn|t've hadn't|ve hasn't haven't he'd he|d've he'd|ve he's how'd how'll how's isn't it'd
    it|d've it'd|ve it'll ma'am mightn't mightn|t've mightn't|ve might've mustn't must've needn't
    not've o'clock |ow's'at 'ow|s'at 'ow's|at oughtn't shan't she|d've she'd|ve should've shouldn't
    shouldn|t've shouldn't|ve somebody|d've somebody'd|ve somebody'll somebody's someone'd
    someone|d've someone'd|ve someone'll someone's something'd something|d've something'd|ve
    something'll that's there'd there|d've there'd|ve there're there's they'd they|d've they'd|ve
    they'll they're they've 'twas wasn't we|d've we'd|ve we've weren't what'll what're what's
    what've when's where'd where's where've who'd who|d've who'd|ve who'll who's who've why'll
    why're why's won't would've wouldn't wouldn|t've wouldn't|ve y'all y|all'll y'all|ll y|all'd've
    y'all|d've y'all'd|ve you'd you|d've you'd|ve you'll you're you've
"""


def _spellings() -> dict[str, str]:
    """Map each word that is mended to its spelling."""
    spellings = {}
    for word in _CONTRACTED.split():
        bare = word.replace("|", "") if "|" in word else word.replace("'", "")
        spellings[bare] = word.replace("|", "'")
    return spellings | {"somebody'd": "somebodyd"}


_MENDED = _spellings()
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # a flag is given there in the place of the count


def as_compared(answer: str, references: list[str]) -> tuple[str, list[str]]:
    """Return a prediction and its references as the script compares them.

    They are normalised, but as they are where all references are the same.
    """
    answer = _one_line(answer)
    references = list(map(_one_line, references))
    if len(set(references)) == 1:
        return answer, references
    return _normalised(answer), list(map(_normalised, references))


def _one_line(text: str) -> str:
    return re.sub(r"[\n\t]", " ", text).strip()


def _normalised(answer: str) -> str:
    """Normalise an answer: marks are dropped here, and become spaces elsewhere.

    They are dropped where the answer holds digit, comma, digit, or this mark beside a space
    anywhere.
    """
    joined = _COMMA.search(answer) is not None
    marks = {}
    for mark in _MARKS:
        dropped = joined or f"{mark} " in answer or f" {mark}" in answer
        marks[mark] = "" if dropped else " "
    text = _PERIOD.sub("", answer.translate(str.maketrans(marks)), count=_MAX_PERIODS)
    words = []
    for word in text.lower().split():
        spelling = NUMBERS.get(word, word)
        if spelling not in ARTICLES:
            words.append(_MENDED.get(spelling, spelling))
    return " ".join(words)
