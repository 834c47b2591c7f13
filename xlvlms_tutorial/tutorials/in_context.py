"""Ask with demonstrations, with parts of them taken out, and compare with copying."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from PIL import Image

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.methods.in_context import (
    Episode,
    Example,
    ablate,
    as_prompts,
    copy_rate,
    majority_vote,
)
from xlvlms_tutorial.metrics import Estimate, difference, proportion
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require

NAMES = ("dax", "wug", "toma", "kiki")  # of no language, so that only demonstrations reveal them
NAMING = "What is this called?"
DECODINGS = ("constrained", "open")
# what the pages do to the demonstrations of both tasks: part, change
ABLATIONS = (
    ("images", "remove"),
    ("images", "swap"),
    ("questions", "remove"),
    ("answers", "swap"),
)


def value_of(sample: Sample) -> str | None:
    """Return what a picture shows: its subject, or the answer of its first question.

    Parameters
    ----------
    sample : Sample
        A picture; of photographs the truth is not known, and the first question stands in.

    Returns
    -------
    str or None
        The value; None where there is neither.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.in_context import value_of
    >>> value_of(samples[0]) == samples[0].truth["subject"]
    True
    """
    subject = sample.truth.get("subject")
    if subject is not None:
        return str(subject)
    return sample.questions[0].answer if sample.questions else None


def values_to_name(samples: Sequence[Sample], others: Sequence[Sample] = ()) -> list[str]:
    """Choose what gets a name: the most frequent values, at most as many as there are names.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures.
    others : sequence of Sample
        Pictures of another world; where given, a value has to be in both.

    Returns
    -------
    list of str
        The values, the most frequent first.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.in_context import values_to_name
    >>> 1 <= len(values_to_name(samples)) <= 4
    True
    """
    counts = Counter(value_of(sample) for sample in samples)
    shared = {value_of(sample) for sample in others} if others else set(counts)
    values = [value for value, _ in counts.most_common() if value in shared and value is not None]
    return values[: len(NAMES)]


def named(samples: Sequence[Sample], values: Sequence[str], n: int) -> list[Example]:
    """Give made-up names to what pictures show, with the same number of each if possible.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures.
    values : sequence of str
        What has a name; pictures of other things are left out.
    n : int
        At most so many examples.

    Returns
    -------
    list of Example
        The values take turns, until none is left.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.in_context import named, values_to_name
    >>> [example.answer for example in named(samples, values_to_name(samples), 1)]
    ['dax']
    """
    members: list[list[Sample]] = [[] for _ in values]
    for sample in samples:
        if value_of(sample) in values:
            members[values.index(value_of(sample))].append(sample)
    items: list[Example] = []
    for turn in range(max(map(len, members), default=0)):
        for name, group in zip(NAMES, members, strict=False):
            if turn < len(group):
                sample = group[turn]
                items.append(Example(sample.id, sample.source, NAMING, name))
    return items[:n]


def revealing(
    support: Sequence[Example], queries: Sequence[Example], shots: int, seed: int = 0
) -> list[Episode]:
    """Choose demonstrations with different answers, one of which is that of the query.

    Copying any one of them is right one time in ``shots``, and no vote can be won.

    Parameters
    ----------
    support, queries : sequence of Example
        The examples; a support may not be about the picture of a query.
    shots : int
        Demonstrations of each episode; fewer where there are not so many answers.
    seed : int
        Of the draws.

    Returns
    -------
    list of Episode
        One for each query whose answer the support has, its demonstrations in random order.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Example
    >>> from xlvlms_tutorial.tutorials.in_context import revealing
    >>> support = [Example(f"s{k}", None, "Which?", answer) for k, answer in enumerate("aabbc")]
    >>> (episode,) = revealing(support, [Example("q", None, "Which?", "b")], 2)
    >>> answers = {example.answer for example in episode.demonstrations}
    >>> len(answers), "b" in answers
    (2, True)
    """
    by_answer: dict[str, list[Example]] = {}
    for example in support:
        by_answer.setdefault(example.answer, []).append(example)
    result = []
    for row, query in enumerate(queries):
        if query.answer not in by_answer:
            continue
        generator = np.random.default_rng([seed, row])
        others = [answer for answer in by_answer if answer != query.answer]
        picked = [query.answer, *generator.permutation(others)[: shots - 1]]
        demonstrations = []
        for answer in generator.permutation(picked):
            group = by_answer[str(answer)]
            demonstrations.append(group[int(generator.integers(len(group)))])
        result.append(Episode(query, tuple(demonstrations)))
    return result


def captioned(episodes: Sequence[Episode], samples: Sequence[Sample]) -> list[Episode]:
    """Put a true caption in the place of each picture, that of the query too.

    What a model still cannot do then is not a matter of seeing.

    Parameters
    ----------
    episodes : sequence of Episode
        The episodes.
    samples : sequence of Sample
        Where the captions are; a picture without one only loses its picture.

    Returns
    -------
    list of Episode
        Changed copies.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, examples
    >>> from xlvlms_tutorial.tutorials.in_context import captioned
    >>> query = examples(samples[:1], "place")[0]
    >>> captioned([Episode(query, ())], samples)[0].query.image is None
    True
    """
    captions = {sample.id: sample.captions[0] for sample in samples if sample.captions}

    def described(example: Example) -> Example:
        question = f"{captions.get(example.id, '')} {example.question}".strip()
        return replace(example, image=None, question=question)

    changed = []
    for episode in episodes:
        demonstrations = tuple(described(example) for example in episode.demonstrations)
        changed.append(
            replace(episode, query=described(episode.query), demonstrations=demonstrations)
        )
    return changed


def blind(episodes: Sequence[Episode]) -> list[Episode]:
    """Take the picture of the query away, and leave its demonstrations.

    Parameters
    ----------
    episodes : sequence of Episode
        The episodes.

    Returns
    -------
    list of Episode
        Changed copies.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> from xlvlms_tutorial.tutorials.in_context import blind
    >>> blind([Episode(Example("q", object(), "Which?", "a"), ())])[0].query.image is None
    True
    """
    return [replace(e, query=replace(e.query, image=None)) for e in episodes]


@torch.no_grad()
def answer(
    vlm: VLM, episodes: Sequence[Episode], words: Sequence[str], batch_size: int = 12
) -> pd.DataFrame:
    """Answer queries in one pass each: by the first piece of the answer.

    Parameters
    ----------
    vlm : VLM
        The model.
    episodes : sequence of Episode
        The episodes.
    words : sequence of str
        The answers to choose from.
    batch_size : int
        Episodes that run together, 12 by default.

    Returns
    -------
    DataFrame
        A row for each episode. constrained: the word with the likeliest first piece. open: the
        word whose first piece is the likeliest of the whole vocabulary, "" where it is no word's.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, examples
    >>> from xlvlms_tutorial.tutorials.in_context import answer
    >>> episode = Episode(examples(samples[:1], "place")[0], ())
    >>> answer(vlm, [episode], ["sand", "snow"]).columns.tolist()
    ['constrained', 'open']
    """
    require(words, "no words to choose from", "give the answers of the demonstrations")
    pieces = [vlm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    rows = []
    for start in range(0, len(episodes), batch_size):
        batch = vlm.batch(**as_prompts(episodes[start : start + batch_size]))
        logits = vlm.forward(batch, logits=False, use_cache=False).logits[:, -1].float()
        for best, first in zip(logits[:, pieces].argmax(-1), logits.argmax(-1), strict=True):
            free = words[pieces.index(int(first))] if int(first) in pieces else ""
            rows.append((words[int(best)], free))
    return pd.DataFrame(rows, columns=list(DECODINGS))


def right(answers: Iterable[str], episodes: Sequence[Episode]) -> np.ndarray:
    """Tell which answers are those of the queries.

    Parameters
    ----------
    answers : iterable of str
        One for each episode.
    episodes : sequence of Episode
        The episodes.

    Returns
    -------
    ndarray (n,)
        1.0 where the answer is right, else 0.0.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> from xlvlms_tutorial.tutorials.in_context import right
    >>> right(["Red."], [Episode(Example("q", None, "Which?", "red"), ())]).tolist()
    [1.0]
    """
    pairs = zip(answers, episodes, strict=True)
    return np.array([float(exact_match(text, e.query.answer)) for text, e in pairs])


def conditions(episodes: Sequence[Episode], seed: int = 0) -> dict[str, list[Episode]]:
    """Make every condition of the same episodes: intact, reversed and each part changed.

    Where all demonstrations have one question, nothing is done to questions.

    Parameters
    ----------
    episodes : sequence of Episode
        The intact episodes.
    seed : int
        Of the swaps.

    Returns
    -------
    dict of str to list of Episode
        The conditions by name, such as "images swap".

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Example, episodes
    >>> from xlvlms_tutorial.tutorials.in_context import conditions
    >>> support = [Example(f"s{k}", None, "Which?", word) for k, word in enumerate("abcdef")]
    >>> queries = [Example(f"q{k}", None, "Which?", "a") for k in range(6)]
    >>> list(conditions(episodes(support, queries, 2)))[:3]
    ['intact', 'reversed', 'query blind']
    """
    result = {"intact": list(episodes)}
    result["reversed"] = [replace(e, demonstrations=e.demonstrations[::-1]) for e in episodes]
    result["query blind"] = blind(episodes)
    demonstrations = [example for episode in episodes for example in episode.demonstrations]
    for part, change in ABLATIONS:
        if part == "questions" and len({example.question for example in demonstrations}) < 2:
            continue
        if part == "answers" and len({example.answer for example in demonstrations}) < 2:
            continue
        result[f"{part} {change}"] = ablate(episodes, part, change, seed=seed)
    return result


def score(
    results: Mapping[tuple[str, str, int], tuple[Sequence[Episode], pd.DataFrame]],
) -> pd.DataFrame:
    """Arrange accuracies by condition and shots, with the vote of the same demonstrations.

    Parameters
    ----------
    results : mapping
        Episodes and answers by (task, condition, shots).

    Returns
    -------
    DataFrame
        A row for each: constrained with its 95 % interval, open, and vote (NaN without shots).

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> from xlvlms_tutorial.tutorials.in_context import score
    >>> episode = Episode(Example("q", None, "Which?", "a"), ())
    >>> answers = pd.DataFrame({"constrained": ["a"], "open": [""]})
    >>> score({("naming", "intact", 0): ([episode], answers)})["constrained"].tolist()
    [1.0]
    """
    rows = []
    for (task, condition, shots), (episodes, answers) in results.items():
        estimate = proportion(right(answers["constrained"], episodes))
        answered = all(any(d.answer for d in e.demonstrations) for e in episodes)
        vote = (
            right(majority_vote(episodes), episodes).mean() if shots and answered else float("nan")
        )
        row = {"task": task, "condition": condition, "shots": shots}
        row |= {"constrained": estimate.value, "low": estimate.low, "high": estimate.high}
        rows.append(row | {"open": right(answers["open"], episodes).mean(), "vote": vote})
    return pd.DataFrame(rows).set_index(["task", "condition", "shots"])


def drop(
    results: Mapping[tuple[str, str, int], tuple[Sequence[Episode], pd.DataFrame]],
    first: tuple[str, str, int],
    second: tuple[str, str, int],
    decoding: str = "constrained",
) -> Estimate:
    """Estimate the accuracy under one condition minus that under another, on the same queries.

    Parameters
    ----------
    results : mapping
        As for :func:`score`.
    first, second : tuple of str, str, int
        Two of its keys.
    decoding : str
        "constrained" (default) or "open".

    Returns
    -------
    Estimate
        The paired difference.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> from xlvlms_tutorial.tutorials.in_context import drop
    >>> asked = [Episode(Example(f"q{k}", None, "Which?", "a"), ()) for k in range(4)]
    >>> good, bad = (pd.DataFrame({"constrained": [word] * 4}) for word in "ab")
    >>> results = {("t", "intact", 1): (asked, good), ("t", "images swap", 1): (asked, bad)}
    >>> drop(results, ("t", "intact", 1), ("t", "images swap", 1)).value
    1.0
    """
    sides = []
    for key in (first, second):
        episodes, answers = results[key]
        sides.append(right(answers[decoding], episodes))
    groups = [episode.query.id for episode in results[first][0]]
    return difference(*sides, groups_a=groups, paired=True)


def copies(
    results: Mapping[tuple[str, str, int], tuple[Sequence[Episode], pd.DataFrame]],
    keys: Sequence[tuple[str, str, int]],
) -> pd.DataFrame:
    """Stack how often demonstrations at each position are copied, for several conditions.

    Parameters
    ----------
    results : mapping
        As for :func:`score`.
    keys : sequence of tuple of str, str, int
        Some of its keys.

    Returns
    -------
    DataFrame
        The tables of :func:`~xlvlms_tutorial.methods.in_context.copy_rate` with the columns task
        and condition before them.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> from xlvlms_tutorial.tutorials.in_context import copies
    >>> shown = tuple(Example(f"s{k}", None, "Which?", text) for k, text in enumerate("ab"))
    >>> asked = [Episode(Example("q", None, "Which?", "c"), shown)]
    >>> results = {("t", "intact", 2): (asked, pd.DataFrame({"constrained": ["b"]}))}
    >>> copies(results, list(results))["rate"].tolist()
    [0.0, 1.0]
    """
    parts = []
    for task, condition, shots in keys:
        episodes, answers = results[task, condition, shots]
        rates = copy_rate(list(answers["constrained"]), episodes)
        rates.insert(0, "condition", condition)
        rates.insert(0, "task", task)
        parts.append(rates)
    return pd.concat(parts, ignore_index=True)


def record(
    experiment: Experiment,
    results: Mapping[tuple[str, str, int], tuple[Sequence[Episode], pd.DataFrame]],
    shots: int,
    rates: pd.DataFrame,
) -> None:
    """Record the claims ICL-1 to ICL-5 as far as these results have what they need.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    results : mapping
        As for :func:`score`: the tasks "naming" and "questions", and "naming, shifted".
    shots : int
        Demonstrations of the conditions.
    rates : DataFrame
        As :func:`copies` returns it.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, in_context
    >>> experiment = Experiment("in-context", "pocket-llava", "scenes")
    >>> columns = ["task", "condition", "position", "n", "rate", "low", "high", "uniform"]
    >>> in_context.record(experiment, {}, 3, pd.DataFrame(columns=columns))
    >>> experiment.records
    []
    """
    for change in ("remove", "swap"):
        name = f"images {change}"
        for claim, task in (("ICL-1", "naming"), ("ICL-2", "questions")):
            keys = (task, "intact", shots), (task, name, shots)
            if all(key in results for key in keys):
                estimate = drop(results, *keys)
                experiment.record(claim, estimate, f"the same, {name}", f"{task}, {name}")
    for task in ("naming", "questions"):
        if (task, "RICES", shots) not in results:
            continue
        episodes, answers = results[task, "RICES", shots]
        sides = right(answers["constrained"], episodes), right(majority_vote(episodes), episodes)
        groups = [episode.query.id for episode in episodes]
        estimate = difference(*sides, groups_a=groups, paired=True)
        experiment.record("ICL-3", estimate, "vote of the same demonstrations", task)
    _record_copies(experiment, rates)
    _record_slope(experiment, results, shots)


def _record_copies(experiment: Experiment, rates: pd.DataFrame) -> None:
    """The last demonstration's rate of being copied, above that of copying any one."""
    for (task, condition), part in rates.groupby(["task", "condition"], sort=False):
        last = part.iloc[-1]
        if last["n"] < 1:
            continue
        bar = last["uniform"]
        estimate = Estimate(
            last["rate"] - bar, last["low"] - bar, last["high"] - bar, int(last["n"])
        )
        experiment.record("ICL-4", estimate, "one of them at random", f"{task}, {condition}")


def _record_slope(experiment: Experiment, results: Mapping, shots: int) -> None:
    """The change from one shot to all under a shift, and against that without one."""
    changes: dict[str, np.ndarray] = {}
    for name in ("naming, shifted", "naming"):
        keys = (name, "random", shots), (name, "random", 1)
        if not all(key in results for key in keys):
            return
        sides = [right(results[key][1]["constrained"], results[key][0]) for key in keys]
        changes[name] = sides[0] - sides[1]
        groups = [episode.query.id for episode in results[keys[0]][0]]
    shifted, plain = changes.values()
    still = np.zeros_like(shifted)
    estimate = difference(shifted, still, groups_a=groups, paired=True)
    experiment.record("ICL-5", estimate, "one shot", "shifted demonstrations")
    estimate = difference(shifted, plain, groups_a=groups, paired=True)
    experiment.record("ICL-5", estimate, "the change without a shift", "minus no shift")


def check_scores(
    experiment: Experiment,
    results: Mapping[tuple[str, str, int], tuple[Sequence[Episode], pd.DataFrame]],
    scores: pd.DataFrame,
    shots: int,
) -> None:
    """Check what the page says of its two tasks, beside chance, the vote and the adapter.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    results : mapping
        As for :func:`score`. With a condition "no adapter" the adapter is compared too.
    scores : DataFrame
        As :func:`score` returns it.
    shots : int
        Demonstrations of the conditions.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import Experiment, in_context
    >>> rows = {"naming": ("intact", "caption as image", "RICES"),
    ...         "questions": ("intact", "query blind")}
    >>> keys = [(task, name, 3) for task, names in rows.items() for name in names]
    >>> keys.append(("questions", "intact", 0))
    >>> numbers = {"constrained": 0.4, "low": 0.3, "high": 0.5, "vote": 0.6}
    >>> scores = pd.DataFrame([numbers] * 6, index=pd.MultiIndex.from_tuples(keys))
    >>> in_context.check_scores(Experiment("in-context", "pocket-llava", "s"), {}, scores, 3)
    """
    check = experiment.check
    naming, questions = scores.loc["naming"], scores.loc["questions"]
    chance = 1 / shots  # whoever copies a demonstration at random
    check(
        "naming is not surely better than copying one at random",
        naming.loc[("intact", shots), "low"] <= chance,
    )
    check(
        "true captions do not surely help naming",
        naming.loc[("caption as image", shots), "low"] <= chance,
    )
    retrieved = naming.loc[("RICES", shots)]
    check(
        "retrieved demonstrations help naming, and the vote names at least as well",
        retrieved["low"] > chance and retrieved["vote"] >= retrieved["constrained"],
    )
    alone = questions.loc[("intact", 0)]
    check("without any demonstration most questions are answered", alone["low"] > 0.5)
    check(
        "questions need the picture of the query",
        questions.loc[("query blind", shots), "high"] < alone["low"],
    )
    check(
        "demonstrations do not surely help questions",
        questions.loc[("intact", shots), "low"] <= alone["constrained"],
    )
    without = ("naming", "no adapter", shots)
    if without in results:
        gain = drop(results, ("naming", "intact", shots), without)
        check("the adapter is not surely better than none", gain.low <= 0)


def spelled(answers: Iterable[str]) -> list[str]:
    """Spell out answers for readers: what is none of the task's words has no text.

    Parameters
    ----------
    answers : iterable of str
        A column that :func:`answer` returned.

    Returns
    -------
    list of str
        The answers, "(something else)" for "".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.in_context import spelled
    >>> spelled(["dax", ""])
    ['dax', '(something else)']
    """
    return [text or "(something else)" for text in answers]


def strip(episode: Episode, height: int = 96) -> Image.Image:
    """Put the pictures of a prompt side by side, the query's last, behind a gap.

    Parameters
    ----------
    episode : Episode
        An episode with pictures.
    height : int
        Pixels of the strip.

    Returns
    -------
    PIL.Image.Image
        The strip.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, examples
    >>> from xlvlms_tutorial.tutorials.in_context import strip
    >>> strip(Episode(examples(samples[:1], "place")[0], ())).size
    (112, 96)
    """
    images = [example.picture for example in (*episode.demonstrations, episode.query)]
    pictures = [picture.resize((height, height)) for picture in images if picture is not None]
    whole = Image.new("RGB", (height * len(pictures) + 16, height), "white")
    for number, picture in enumerate(pictures):
        gap = 16 if number == len(pictures) - 1 else 0
        whole.paste(picture, (number * height + gap, 0))
    return whole
