"""Episodes of in-context learning: demonstrations of a support set before each query."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models.turns import Turn
from xlvlms_tutorial.samples import PROMPTS, Sample, as_image
from xlvlms_tutorial.validation import require, require_equal, require_one_of

SELECTIONS = ("random", "rices", "rices_text", "oracle")
ORDERS = ("nearest_last", "nearest_first")
PARTS = {"images": "image", "questions": "question", "answers": "answer"}
CHANGES = ("remove", "swap", "blank")
CAPTION = "caption"  # the kind of examples in which the first caption answers
_GREY = (128, 128, 128)
_ELLIPSIS = "..."  # a text that says nothing

Embed = Callable[[list], ArrayLike] | tuple[ArrayLike, ArrayLike] | None


@dataclass(frozen=True)
class Example:
    """A picture with a question and its answer: a demonstration, or a query.

    Parameters
    ----------
    id : str
        The name of the picture. Examples about one picture share it, and a query never gets a
        demonstration of its own name.
    image : object
        A picture as ``vlm.batch`` takes it, a function without arguments that makes it when it is
        used, or None.
    question : str
        What is asked; empty where nothing is.
    answer : str
        The answer; of a query the reference, which the prompt does not show.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Example
    >>> Example("s1", None, "What colour is the sky?", "blue").picture is None
    True
    """

    id: str
    image: object
    question: str
    answer: str

    @property
    def picture(self) -> Image.Image | None:
        """The picture in RGB; None where there is none."""
        image = self.image() if callable(self.image) else self.image
        return None if image is None else as_image(image)


@dataclass(frozen=True)
class Episode:
    """A query with its demonstrations.

    Parameters
    ----------
    query : Example
        What is asked in the end.
    demonstrations : tuple of Example
        What is shown before it, in the order of the prompt.
    order : {"nearest_last", "nearest_first"}
        Whether the demonstration that was chosen first stands last or first.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example
    >>> sky = Example("s1", None, "What colour is the sky?", "blue")
    >>> grass = Example("s2", None, "What colour is the grass?", "green")
    >>> Episode(grass, (sky,)).ranked[0].answer
    'blue'
    """

    query: Example
    demonstrations: tuple[Example, ...]
    order: str = ORDERS[0]

    @property
    def ranked(self) -> tuple[Example, ...]:
        """The demonstrations from the one that was chosen first on, whatever their order."""
        return self.demonstrations[:: -1 if self.order == ORDERS[0] else 1]


def examples(samples: Sequence[Sample], types: str | Collection[str] = CAPTION) -> list[Example]:
    """Return the questions of samples, or their captions, as examples.

    Parameters
    ----------
    samples : sequence of Sample
        Samples of pictures.
    types : str or collection of str
        Types of questions, such as "colour". "caption" (the default) asks for a description, and
        the first caption answers.

    Returns
    -------
    list of Example
        One for each question of these types, in the order of the samples.

    Raises
    ------
    InputError
        If there are none.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import examples
    >>> items = examples(samples, "place")
    >>> items[0].id == samples[0].id, items[0].question.endswith("?")
    (True, True)
    """
    names = {types} if isinstance(types, str) else set(types)
    items = []
    for sample in samples:
        if CAPTION in names and sample.captions:
            question = PROMPTS["image"]
            items.append(Example(sample.id, sample.source, question, sample.captions[0]))
        for question in sample.questions:
            if question.type in names:
                items.append(Example(sample.id, sample.source, question.text, question.answer))
    if not items:
        present = {question.type for sample in samples for question in sample.questions}
        raise InputError(
            f"no questions of type {', '.join(sorted(names))}",
            f"there are: {', '.join(sorted(present | {CAPTION}))}",
        )
    return items


def episodes(
    support: Sequence[Example],
    queries: Sequence[Example],
    shots: int,
    select: str = "random",
    *,
    embed: Embed = None,
    order: str = "nearest_last",
    seed: int = 0,
) -> list[Episode]:
    r"""Choose demonstrations for each query.

    Retrieval (RICES) takes the supports with the highest cosine similarity
    :math:`\cos(\phi(x), \phi(x_i))` to the query and puts the most similar last. The same arguments
    give the same demonstrations, in either order, and those of fewer shots are among those of more:
    so conditions are compared on equal queries and demonstrations.

    Parameters
    ----------
    support : sequence of Example
        n examples to choose from, with answers.
    queries : sequence of Example
        m examples to answer. None of their pictures may be in the support.
    shots : int
        Demonstrations of each query, 0 to n.
    select : str
        "random" (default): drawn for each query. "rices": by the picture. "rices_text": by the
        question. "oracle": by the answer, which only an experiment knows.
    embed : function or pair of arrays, optional
        What similarity is measured with: a function of a list of pictures (of texts, for
        "rices_text" and "oracle") that returns rows (k, d), such as ``scorer.images``; or arrays
        (n, d) and (m, d) of supports and queries. Needed for "rices"; texts are compared by
        their words by default.
    order : str
        "nearest_last" (default) or "nearest_first". Random demonstrations are as near as they were
        drawn early.
    seed : int
        Of the random draws.

    Returns
    -------
    list of Episode
        One for each query.

    Raises
    ------
    InputError
        If there are fewer supports than shots, a query's picture is in the support, an answer is
        empty, or the selection is unknown or lacks an embedding.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.methods.in_context import Example, episodes
    >>> support = [Example(f"s{k}", None, "Which?", answer) for k, answer in enumerate("abc")]
    >>> query = Example("q", None, "Which?", "b")
    >>> rows = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), np.array([[1.0, 0.1]])
    >>> (episode,) = episodes(support, [query], 2, "rices", embed=rows)
    >>> [example.answer for example in episode.demonstrations]
    ['b', 'a']
    """
    support, queries = list(support), list(queries)
    require_one_of(select, SELECTIONS, "selection")
    require_one_of(order, ORDERS, "order")
    _require_usable(support, queries, shots, select)
    if select == "random":
        ranks = [
            np.random.default_rng([seed, row]).permutation(len(support))[:shots]
            for row in range(len(queries))
        ]
    else:
        ranks = list(_nearest(_similarity(support, queries, select, embed), shots))
    result = []
    for query, numbers in zip(queries, ranks, strict=True):
        ranked = tuple(support[number] for number in numbers)
        episode = Episode(query, ranked, ORDERS[1])
        if order == ORDERS[0]:
            episode = Episode(query, ranked[::-1], order)
        result.append(episode)
    return result


def _require_usable(
    support: list[Example], queries: list[Example], shots: int, select: str
) -> None:
    """Refuse what no episodes can be made of."""
    require(
        isinstance(shots, Integral) and not isinstance(shots, bool) and shots >= 0,
        f"shots={shots!r}",
        "give a whole number from 0 on",
    )
    require(queries, "no queries", "give at least one")
    require(
        len(support) >= shots,
        f"{len(support)} supports for {shots} shots",
        "give more supports, or ask for fewer shots",
    )
    shared = {example.id for example in support} & {query.id for query in queries}
    require(
        not shared,
        f"{len(shared)} pictures are both support and query, such as {min(shared, default='')!r}",
        "take supports and queries from different splits",
    )
    answered = support + (queries if select == "oracle" else [])
    for example in answered:
        require(
            isinstance(example.answer, str) and example.answer.strip(),
            f"the answer of {example.id!r} is {example.answer!r}",
            "leave out examples without an answer",
        )


def _similarity(
    support: list[Example], queries: list[Example], select: str, embed: Embed
) -> Float[np.ndarray, "m n"]:
    """Return the cosine of each query with each support; 0 where either has no direction."""
    if embed is not None and not callable(embed):
        rows, query_rows = embed
    elif select == "rices":
        require(
            embed is not None,
            "rices without an embedding of pictures",
            "give embed=, such as load_scorer().images, or arrays of supports and queries",
        )
        rows, query_rows = _embedded_pictures(support + queries, len(support), embed)
    else:
        name = {"rices_text": "question", "oracle": "answer"}[select]
        texts, query_texts = (
            [getattr(example, name) for example in part] for part in (support, queries)
        )
        if embed is None:
            words = CountVectorizer(binary=True, token_pattern=r"\w+").fit(texts + query_texts)
            rows, query_rows = words.transform(texts).toarray(), words.transform(query_texts)
            query_rows = query_rows.toarray()
        else:
            rows, query_rows = embed(texts), embed(query_texts)
    units = _unit(rows, len(support), "supports"), _unit(query_rows, len(queries), "queries")
    require_equal(
        "widths of embeddings", units[0].shape[1], units[1].shape[1], "embed both in one space"
    )
    return units[1] @ units[0].T


def _embedded_pictures(
    items: list[Example], n_support: int, embed: Callable[[list], ArrayLike]
) -> tuple[np.ndarray, np.ndarray]:
    """Embed each picture once, however many examples are about it."""
    first_of: dict[str, int] = {}
    pictures = []
    for example in items:
        if example.id in first_of:
            continue
        picture = example.picture
        require(picture is not None, f"{example.id!r} has no picture", "select in another way")
        first_of[example.id] = len(pictures)
        pictures.append(picture)
    rows = _array(embed(pictures))
    require(
        len(rows) == len(pictures),
        f"{len(rows)} embeddings of {len(pictures)} pictures",
        "return one row for each picture",
    )
    numbers = [first_of[example.id] for example in items]
    return rows[numbers[:n_support]], rows[numbers[n_support:]]


def _array(rows: ArrayLike) -> np.ndarray:
    """Return rows as an array, from whichever device."""
    return np.asarray(rows.detach().cpu().float() if hasattr(rows, "detach") else rows)


def _unit(rows: ArrayLike, n: int, name: str) -> Float[np.ndarray, "n d"]:
    array = _array(rows).astype(np.float64)
    require(
        array.ndim == 2 and len(array) == n and np.isfinite(array).all(),
        f"embeddings {array.shape} of {n} {name}",
        "give one row of finite numbers for each",
    )
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norms == 0, 1, norms)


def _nearest(similarity: Float[np.ndarray, "m n"], shots: int) -> Int[np.ndarray, "m shots"]:
    """The most similar supports of each query, the nearest first; ties in the support's order."""
    return np.argsort(-similarity, axis=1, kind="stable")[:, :shots]


def ablate(
    episodes: Sequence[Episode], part: str, by: str = "remove", *, seed: int = 0
) -> list[Episode]:
    """Take one part out of all demonstrations: their pictures, questions or answers.

    Use it on the episodes of the intact condition, so that everything else stays as it is: queries,
    the other parts, and the order.

    Parameters
    ----------
    episodes : sequence of Episode
        As :func:`episodes` makes them.
    part : str
        "images", "questions" or "answers".
    by : str
        "remove" (default) leaves it out, its place included. "swap" puts that of a random other
        demonstration there, drawn from all episodes, about another picture than this episode's.
        "blank" keeps its place: a grey picture of the same size, or an ellipsis for a text.
    seed : int
        Of the random draws of "swap".

    Returns
    -------
    list of Episode
        Changed copies.

    Raises
    ------
    InputError
        If part or change is unknown. If there is nothing to change, or "swap" has no other
        demonstration, or only equal ones.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import Episode, Example, ablate
    >>> sky = Example("s1", None, "What colour is the sky?", "blue")
    >>> query = Example("s2", None, "What colour is the grass?", "green")
    >>> ablate([Episode(query, (sky,))], "answers")[0].demonstrations[0].answer
    ''
    """
    require_one_of(part, PARTS, "part")
    require_one_of(by, CHANGES, "change")
    name = PARTS[part]
    pool: dict[tuple[str, str, str], Example] = {}
    for episode in episodes:
        for example in episode.ranked:  # so that the order of prompts does not matter
            pool.setdefault((example.id, example.question, example.answer), example)
    require(pool, "episodes without demonstrations", "ask for at least one shot")
    others = list(pool.values())
    if by == "swap" and part != "images":
        values = {getattr(example, name) for example in others}
        require(
            len(values) > 1,
            f"all {part} are {min(values)!r}: swapping changes nothing",
            "remove or blank them",
        )
    changed = []
    for row, episode in enumerate(episodes):
        if by == "swap":
            values = _swapped(episode, others, name, np.random.default_rng([seed, row]))
        elif by == "remove":
            values = [None if part == "images" else ""] * len(episode.demonstrations)
        else:
            values = [_blank(example, name) for example in episode.ranked]
        ranked = []
        for example, value in zip(episode.ranked, values, strict=True):
            ranked.append(replace(example, **{name: value}))
        demonstrations = tuple(ranked[:: -1 if episode.order == ORDERS[0] else 1])
        changed.append(replace(episode, demonstrations=demonstrations))
    return changed


def _blank(example: Example, name: str) -> object:
    if name != "image":
        return _ELLIPSIS
    picture = example.picture
    return None if picture is None else Image.new("RGB", picture.size, _GREY)


def _swapped(
    episode: Episode, others: list[Example], name: str, generator: np.random.Generator
) -> list[object]:
    """Draw a part of another demonstration for each of an episode's, the nearest first."""
    shown = {example.id for example in (*episode.demonstrations, episode.query)}
    values = [getattr(example, name) for example in others if example.id not in shown]
    require(
        values,
        f"no demonstration about another picture for the query {episode.query.id!r}",
        "give the episodes of more queries together",
    )
    numbers = generator.integers(len(values), size=len(episode.demonstrations))
    return [values[number] for number in numbers]


def as_prompts(episodes: Sequence[Episode], mark: str = "") -> dict[str, list]:
    """Return what ``vlm.batch`` and ``vlm.generate`` take for episodes.

    Demonstrations become earlier turns: ``vlm.generate(**as_prompts(episodes))`` answers the
    queries, and in ``vlm.batch(**as_prompts(episodes))`` the spans "demonstration",
    "demonstration answer", "image 1" and so on say what stands where.

    Parameters
    ----------
    episodes : sequence of Episode
        As :func:`episodes` or :func:`ablate` make them.
    mark : str
        What stands for a picture in a prompt of a model without a chat template, such as
        "<image>"; put before the question of each picture. Empty by default.

    Returns
    -------
    dict of str to list
        ``images``, ``texts`` and ``history``, one of each for each episode.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.in_context import as_prompts, episodes, examples
    >>> support, queries = examples(samples[:3], "place"), examples(samples[3:], "place")
    >>> inputs = vlm.batch(**as_prompts(episodes(support, queries[:1], shots=2)))
    >>> inputs.mask("image").sum().item(), inputs.mask("image 3").sum().item()
    (48, 16)
    """
    inputs: dict[str, list] = {"images": [], "texts": [], "history": []}
    for episode in episodes:
        history = []
        for example in episode.demonstrations:
            shown, text = _shown(example, mark)
            history.append(Turn(shown, text, example.answer))
        shown, text = _shown(episode.query, mark)
        inputs["images"].append(shown)
        inputs["texts"].append(text)
        inputs["history"].append(history)
    return inputs


def _shown(example: Example, mark: str) -> tuple[list[Image.Image], str]:
    picture = example.picture
    if picture is None:
        return [], example.question
    return [picture], f"{mark}{example.question}"
