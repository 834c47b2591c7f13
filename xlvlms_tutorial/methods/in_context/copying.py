"""What copying alone would answer, and how often a model copies."""

import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from xlvlms_tutorial.methods.in_context.episodes import Episode
from xlvlms_tutorial.metrics import proportion
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.text import normalise
from xlvlms_tutorial.validation import require, require_same_length


def majority_vote(episodes: Sequence[Episode]) -> list[str]:
    """Return the most frequent answer of each episode's demonstrations.

    It is the baseline of retrieval without a model (RICES-KNN): what the same demonstrations give
    by themselves. Answers are compared as accuracy does
    (:func:`~xlvlms_tutorial.text.normalise`); of equally frequent ones the one counts whose nearest
    demonstration is nearest, so that the order of the prompt does not matter.

    Parameters
    ----------
    episodes : sequence of Episode
        With the answers of their demonstrations.

    Returns
    -------
    list of str
        An answer for each episode, as the nearest of its demonstrations says it.

    Raises
    ------
    InputError
        If an episode has no demonstration with an answer.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example, majority_vote
    >>> shown = [Example(f"s{k}", None, "Which?", text) for k, text in enumerate(["b", "a", "B"])]
    >>> majority_vote([Episode(Example("q", None, "Which?", "a"), tuple(shown))])
    ['B']
    """
    votes = []
    for episode in episodes:
        answers = [example.answer for example in episode.ranked if _compared(example.answer)]
        require(
            answers,
            f"no demonstration of the query {episode.query.id!r} has an answer",
            "give episodes of one shot or more, with their answers",
        )
        counts = Counter(map(_compared, answers))
        # the first of the largest counts is that of the nearest
        winner = max(counts, key=counts.__getitem__)
        votes.append(next(answer for answer in answers if _compared(answer) == winner))
    return votes


def copy_rate(outputs: Sequence[str], episodes: Sequence[Episode]) -> pd.DataFrame:
    r"""Measure how often outputs repeat the demonstration at each position.

    For position j it is :math:`P(y = R_j \mid R_j \ne R, R_j \text{ unique})`: only demonstrations
    count whose answer is wrong for the query and stands in the episode once, so that neither a
    right answer nor a frequent one passes for a copy. Reverse the order (``order=`` of
    :func:`episodes`) to tell the position from the demonstration.

    Parameters
    ----------
    outputs : sequence of str
        What was answered to each episode.
    episodes : sequence of Episode
        All with the same number of demonstrations N.

    Returns
    -------
    DataFrame
        A row for each position from 1 (the first of the prompt) to N: position, n (how many
        demonstrations count there), rate, low and high (its 95 % interval over queries; NaN where n
        is 0), and uniform (1/N, the rate of copying any one of them).

    Raises
    ------
    InputError
        If the numbers of outputs and episodes, or of demonstrations, differ. If there is no
        demonstration, or an answer is empty.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example, copy_rate
    >>> shown = tuple(Example(f"s{k}", None, "Which?", text) for k, text in enumerate("ab"))
    >>> table = copy_rate(["b"], [Episode(Example("q", None, "Which?", "c"), shown)])
    >>> table["rate"].tolist(), table["uniform"].tolist()
    ([0.0, 1.0], [0.5, 0.5])
    """
    require_same_length(outputs=outputs, episodes=episodes)
    numbers = {len(episode.demonstrations) for episode in episodes}
    require(
        len(numbers) == 1 and min(numbers) > 0,
        f"episodes of {', '.join(map(str, sorted(numbers))) or 'no'} demonstrations",
        "give episodes with the same number of shots, 1 or more",
    )
    (n_shots,) = numbers
    copied: list[list[bool]] = [[] for _ in range(n_shots)]
    groups: list[list[str]] = [[] for _ in range(n_shots)]
    for output, episode in zip(outputs, episodes, strict=True):
        answers = [_compared(example.answer) for example in episode.demonstrations]
        truth = _compared(episode.query.answer)
        require(
            truth and all(answers),
            f"an answer in the episode of {episode.query.id!r} is empty",
            "measure copying with the answers of query and demonstrations",
        )
        counts = Counter(answers)
        for position, answer in enumerate(answers):
            if answer != truth and counts[answer] == 1:
                copied[position].append(_repeats(output, answer))
                groups[position].append(episode.query.id)
    rows = []
    for position, (trials, ids) in enumerate(zip(copied, groups, strict=True), start=1):
        rate = low = high = float("nan")
        if trials:
            estimate = proportion(trials, ids)
            rate, low, high = estimate.value, estimate.low, estimate.high
        rows.append((position, len(trials), rate, low, high, 1 / n_shots))
    columns = ["position", "n", "rate", "low", "high", "uniform"]
    return pd.DataFrame(rows, columns=columns)


def _compared(answer: str) -> str:
    """Return an answer as accuracy compares it; one that is an article alone stays, as option A."""
    return normalise(answer) or re.sub(r"\W+", " ", answer.lower()).strip()


def _repeats(output: str, answer: str) -> bool:
    """Whether an output says an answer that is in its compared form."""
    return exact_match(output, answer) if normalise(answer) else _compared(output) == answer
