"""States, concepts and scores of the experiment in which one word of a caption becomes neutral.

The chapter on the style of captions makes the coarse vector and steers by concepts. What is here
sorts pictures, reads the states that decide on a word, and builds the gate.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.methods.steering import (
    ConceptVectors,
    SteeringVectors,
    concept_vectors,
    steer_by_concept,
)
from xlvlms_tutorial.metrics import difference, style_share
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment, describe
from xlvlms_tutorial.tutorials.steering_style import named_facts, steer
from xlvlms_tutorial.validation import require_one_of

# The ways to make a word neutral, with the strengths that are tried.
WAYS = {"coarse": (0.5, 1.0, 2.0), "by concept": (1.5, 3.0), "coarse, same gate": (1.5, 3.0)}
_BATCH = 32
_SHORT = 16  # tokens of captions by which settings are chosen
# How many concepts each kind of state gets: before the words, before other subjects, elsewhere.
_SIZES = {"words": 4, "subjects": 6, "rest": 20}

Gate = tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]


def first_word(caption: str, words: Sequence[str]) -> str | None:
    """Find the first of some words in a caption.

    Parameters
    ----------
    caption : str
        The caption.
    words : sequence of str
        The words, such as "woman" and "man".

    Returns
    -------
    str or None
        The word that comes first, or None.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> neutral_wording.first_word("A man and a woman.", ["woman", "man"])
    'man'
    >>> neutral_wording.first_word("A manor.", ["woman", "man"])
    """
    match = re.search(rf"\b(?:{'|'.join(words)})\b", caption.lower())
    return match[0] if match else None


def replace_words(caption: str, words: Sequence[str], neutral: str) -> str:
    """Put the neutral word in the place of each of some words.

    Use it as a baseline: it needs no model.

    Parameters
    ----------
    caption : str
        The caption.
    words : sequence of str
        The words that should go.
    neutral : str
        The word that should come.

    Returns
    -------
    str
        The new caption.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> neutral_wording.replace_words("A man walks.", ["woman", "man"], "person")
    'A person walks.'
    """
    return re.sub(rf"\b(?:{'|'.join(words)})\b", neutral, caption)


def people_and_others(
    dataset: str, n: int, n_each: int, split: str, words: Sequence[str], seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Take as many pictures whose caption has one of some words as pictures of which none has.

    Parameters
    ----------
    dataset : str
        As for ``load_samples``.
    n : int
        How many pictures to look through.
    n_each : int
        How many of either kind to take at most.
    split : str
        "train", "validation" or "test".
    words : sequence of str
        The words, such as "woman" and "man".
    seed : int, default 0
        Of the pictures.

    Returns
    -------
    tuple of two list of Sample
        Pictures whose first caption has one of the words, and pictures without them.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> people, others = neutral_wording.people_and_others(
    ...     "scenes", 20, 2, "train", ["woman", "man"]
    ... )
    >>> len(people), len(others)
    (2, 2)
    """
    people = []
    without = []
    for sample in load_samples(dataset, n, split, seed):
        if sample.captions and first_word(sample.captions[0], words):
            people.append(sample)
        elif sample.captions and not any(first_word(text, words) for text in sample.captions):
            without.append(sample)
    n = min(n_each, len(people), len(without))
    return people[:n], without[:n]


def less_picture(states: Activations) -> Activations:
    """Take off each picture's mean from its two states.

    Use it where k-means would sort states by picture rather than by word.

    Parameters
    ----------
    states : Activations
        States (2 n, d): those of n pictures, then those of the same pictures after other words.

    Returns
    -------
    Activations
        What is left, in the same order.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> table = pd.DataFrame({"sample": range(2), "id": ["a", "a"]})
    >>> states = Activations({(24, "resid_post"): torch.tensor([[5.0], [7.0]])}, table, {})
    >>> neutral_wording.less_picture(states)[24].flatten().tolist()
    [-1.0, 1.0]
    """
    tensors = {}
    for key, rows in states.tensors.items():
        half = len(rows) // 2
        mean = (rows[:half] + rows[half:]) / 2
        tensors[key] = rows - mean.repeat(2, 1)
    return Activations(tensors, states.table, states.provenance)


def both_sides(concepts: ConceptVectors) -> list[tuple[int, int]]:
    """Return the concepts of both states of each picture.

    Parameters
    ----------
    concepts : ConceptVectors
        Concepts of states (2 n, d) in the order of :func:`less_picture`.

    Returns
    -------
    list of (int, int)
        For each of the n pictures the concept of its first state and that of its second.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import concept_vectors
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> table = pd.DataFrame({"sample": range(4), "id": list("abab")})
    >>> rows = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> concepts = concept_vectors(Activations({(24, "resid_post"): rows}, table, {}), 24, 2)
    >>> [first != second for first, second in neutral_wording.both_sides(concepts)]
    [True, True]
    """
    numbers = concepts.dictionary.labels_.tolist()
    half = len(numbers) // 2
    return list(zip(numbers[:half], numbers[half:], strict=True))


def sorting(concepts: ConceptVectors, words: Sequence[str]) -> dict[str, float]:
    """Find out whether concepts sort states by picture or by word.

    Parameters
    ----------
    concepts : ConceptVectors
        Concepts of states (2 n, d) in the order of :func:`less_picture`.
    words : sequence of str
        The word of each of the n pictures.

    Returns
    -------
    dict of str to float
        "by picture", the share of pictures whose two states have one concept; "by word", 1 if each
        word has a concept, and another for what it becomes, that no other word shares, else 0.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import concept_vectors
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> table = pd.DataFrame({"sample": range(4), "id": list("abab")})
    >>> rows = torch.tensor([[0.0], [9.0], [0.1], [9.1]])
    >>> concepts = concept_vectors(Activations({(24, "resid_post"): rows}, table, {}), 24, 2)
    >>> neutral_wording.sorting(concepts, ["woman", "man"])
    {'by picture': 1.0, 'by word': 0.0}
    """
    sides = both_sides(concepts)
    together = [first == second for first, second in sides]
    kinds = {(word, *pair) for word, pair in zip(words, sides, strict=True)}
    used = {concept for _, first, second in kinds for concept in (first, second)}
    n_words = len(set(words))
    by_word = len(kinds) == n_words and len(used) == 2 * n_words
    return {"by picture": float(np.mean(together)), "by word": float(by_word)}


def deciding_states(
    vlm: VLM,
    people: Sequence[Sample],
    without: Sequence[Sample],
    layers: Sequence[int],
    words: Sequence[str],
) -> dict[str, Activations]:
    """Read the states at which a model decides on the subject of a caption, and all others.

    Parameters
    ----------
    vlm : VLM
        The model.
    people : sequence of Sample
        Pictures whose captions have one of the words.
    without : sequence of Sample
        Pictures whose captions have none.
    layers : sequence of int
        Where to read.
    words : sequence of str
        The words, such as "woman" and "man".

    Returns
    -------
    dict of str to Activations
        The states (n, d) that predict one of the "words", those that predict other "subjects", and
        the "rest": all other positions of the captions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> words = ["woman", "man"]
    >>> people, others = neutral_wording.people_and_others("scenes", 20, 2, "train", words)
    >>> states = neutral_wording.deciding_states(vlm, people, others, [2], words)
    >>> len(states["words"]), len(states["subjects"])
    (2, 2)
    """
    pictures = [*people, *without]
    subjects = [_subject(sample, words) for sample in pictures]
    answers = []
    for number, (sample, subject) in enumerate(zip(pictures, subjects, strict=True)):
        answers.append(_naming(sample.captions, number, subject))
    named = sorted(set(subjects) - {None})
    options = {"answers": answers, "batch_size": _BATCH}
    # places the words are is known from the tokens: layer 0 costs no block
    places = capture(vlm, pictures, 0, words=named, **options).table
    states = capture(vlm, pictures, layers, span="answer", reduce=None, **options)
    number = states.table["sample"]
    start = states.table.groupby("sample")["position"].transform("min")
    first = number.map(places.set_index("sample")["token_index"])
    decides = states.table["position"] - start == first - 1
    return {
        "words": states.select(decides & (number < len(people))),
        "subjects": states.select(decides & (number >= len(people))),
        "rest": states.select(~decides),
    }


def build_gate(
    states: dict[str, Activations],
    concepts: ConceptVectors,
    fallback: Float[Tensor, "d"],
    seed: int = 0,
) -> Gate:
    """Make the centres that states are compared with, and the vector that each of them gets.

    Use it before ``steer_by_concept``. Centres are those of the three kinds of states. Each centre
    of "words" gets the vector between the concepts of most of its pictures; all others get none.

    Parameters
    ----------
    states : dict of str to Activations
        As :func:`deciding_states` returns them.
    concepts : ConceptVectors
        Concepts of both sides of the pictures in ``states["words"]``, as for :func:`both_sides`.
    fallback : tensor (d,)
        The vector for a centre of which no picture has two different sides.
    seed : int, default 0
        Of k-means.

    Returns
    -------
    tuple of tensor (k, d) and tensor (k, d)
        The centres and their vectors.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.methods.steering import concept_vectors
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> def activations(rows):
    ...     table = pd.DataFrame({"sample": range(len(rows)), "id": list("abcd")[: len(rows)]})
    ...     return Activations({(24, "resid_post"): torch.tensor(rows)}, table, {})
    >>> sides = activations([[0.0, 1.0], [0.1, 1.0], [5.0, 1.0], [5.1, 1.0]])
    >>> states = {"words": activations([[1.0, 0.0], [2.0, 0.0]])}
    >>> states |= dict.fromkeys(("subjects", "rest"), activations([[0.0, 1.0], [0.0, 2.0]]))
    >>> pair = concept_vectors(sides, 24, 2)
    >>> centres, shifts = neutral_wording.build_gate(states, pair, torch.zeros(2))
    >>> shifts.any(dim=1).tolist()
    [True, True, False, False, False, False]
    """
    layer = concepts.layer
    parts = []
    members = np.array([], int)
    for kind, size in _SIZES.items():
        if kind == "words" or len(states[kind]) > 1:
            concepts_of_kind = concept_vectors(
                states[kind], layer, min(size, len(states[kind])), seed
            )
            parts.append(concepts_of_kind.concepts)
        if kind == "words":
            members = concepts_of_kind.dictionary.labels_
    centres = torch.cat(parts)
    shifts = torch.zeros_like(centres)
    samples = states["words"].table["sample"].to_numpy()
    sides = both_sides(concepts)
    for centre in set(members.tolist()):
        pairs = [sides[number] for number in samples[members == centre]]
        shifts[centre] = _most_common(pairs, concepts, fallback)
    return centres, shifts


@dataclass(frozen=True)
class Wording:
    """Hold three ways to make a word neutral: one coarse vector, free or gated, and concepts.

    Parameters
    ----------
    vlm : VLM
        The model.
    coarse : SteeringVectors
        The mean difference, at each layer.
    gates : mapping of int to tuple of tensor (k, d) and tensor (k, d)
        By layer the centres that states are compared with, and the vector of each, as
        :func:`build_gate` makes them.
    words : sequence of str
        The words that should go.
    neutral : str
        The word that should come.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.steering import SteeringVectors
    >>> from xlvlms_tutorial.tutorials.neutral_wording import Wording
    >>> coarse = SteeringVectors({24: torch.ones(vlm.width)}, {"model": "pocket-llava"})
    >>> gates = {24: (torch.eye(2, vlm.width), torch.eye(2, vlm.width))}
    >>> wording = Wording(vlm, coarse, gates, ["woman", "man"], "person")
    >>> len(wording.captions("by concept", 24, 0.5, samples[:1], max_new_tokens=2))
    1
    """

    vlm: VLM
    coarse: SteeringVectors
    gates: Mapping[int, Gate]
    words: Sequence[str]
    neutral: str

    def captions(
        self,
        by: str,
        layer: int,
        strength: float,
        samples: Sequence[Sample],
        max_new_tokens: int = 22,
    ) -> list[str]:
        """Describe pictures while one of the ways acts.

        Parameters
        ----------
        by : {"coarse", "coarse, same gate", "by concept"}
            Which way.
        layer : int
            Where.
        strength : float
            The factor of the vectors.
        samples : sequence of Sample
            The pictures.
        max_new_tokens : int, default 22
            How many tokens the model may write.

        Returns
        -------
        list of str
            A caption for each picture.
        """
        return self.at_strengths(by, layer, [strength], samples, max_new_tokens)[strength]

    def at_strengths(
        self,
        by: str,
        layer: int,
        strengths: Sequence[float],
        samples: Sequence[Sample],
        max_new_tokens: int = 22,
    ) -> dict[float, list[str]]:
        """Describe pictures while one of the ways acts, at several strengths in one batch.

        Parameters
        ----------
        by : {"coarse", "coarse, same gate", "by concept"}
            Which way.
        layer : int
            Where.
        strengths : sequence of float
            The factors of the vectors.
        samples : sequence of Sample
            The pictures.
        max_new_tokens : int, default 22
            How many tokens the model may write.

        Returns
        -------
        dict of float to list of str
            The captions by strength.
        """
        require_one_of(by, WAYS, "way")
        if by == "coarse":
            return steer(self.vlm, self.coarse, layer, strengths, samples, max_new_tokens, "last")
        centres, shifts = self.gates[layer]
        if by == "coarse, same gate":
            shifts = shifts.any(dim=1, keepdim=True) * self.coarse[layer]
        n = len(samples)
        pictures = list(samples) * len(strengths)
        factors = torch.tensor(strengths).repeat_interleave(n)
        with steer_by_concept(self.vlm, centres, shifts, layer, factors, "last"):
            captions = describe(self.vlm, pictures, max_new_tokens, batch_size=len(pictures))
        by_strength = {}
        for number, strength in enumerate(strengths):
            by_strength[strength] = captions[number * n : number * n + n]
        return by_strength

    def converted(self, captions: Sequence[str]) -> Bool[np.ndarray, "n"]:
        """Return whether each caption has the neutral word and none of the others.

        Parameters
        ----------
        captions : sequence of str
            The captions.

        Returns
        -------
        array of bool (n,)
            True where both hold.
        """
        neutral = style_share(captions, [self.neutral])
        return neutral & ~style_share(captions, list(self.words))

    def effects(
        self, captions: Sequence[str], usual: Sequence[str], samples: Sequence[Sample]
    ) -> dict[str, float]:
        """Measure what was done to captions that have the words, and to all others.

        Parameters
        ----------
        captions : sequence of str
            Captions with steering: first those of pictures of people, then as many others.
        usual : sequence of str
            The captions without steering.
        samples : sequence of Sample
            The pictures.

        Returns
        -------
        dict of str to float
            "converted", the share of the first half that became neutral; "elsewhere", the share of
            the second half that is not the same; "facts kept", the share of the facts of the first
            half that are named, the subject apart.
        """
        half = len(captions) // 2
        pairs = zip(captions[half:], usual[half:], strict=True)
        changed = [caption != before for caption, before in pairs]
        facts = named_facts(captions, samples).drop(columns="subject")[:half]
        return {
            "converted": float(self.converted(captions[:half]).mean()),
            "elsewhere": float(np.mean(changed)),
            "facts kept": float(facts.astype(float).stack().mean()),
        }

    def compare(
        self,
        samples: Sequence[Sample],
        usual: Sequence[str],
        settings: Mapping[str, tuple[int, float]],
    ) -> dict[str, list[str]]:
        """Describe pictures in each of several ways, and by replacing the words afterwards.

        Parameters
        ----------
        samples : sequence of Sample
            The pictures.
        usual : sequence of str
            The captions without steering.
        settings : mapping of str to (int, float)
            Layer and strength of each way. A name may end in ", at any price".

        Returns
        -------
        dict of str to list of str
            The captions by each way, and those with "words replaced".
        """
        texts = {}
        for name, (layer, strength) in settings.items():
            way = name.removesuffix(", at any price")
            texts[name] = self.captions(way, layer, strength, samples)
        replaced = [replace_words(caption, self.words, self.neutral) for caption in usual]
        return texts | {"words replaced": replaced}

    def sweep(self, samples: Sequence[Sample]) -> pd.DataFrame:
        """Try all ways at their layers and strengths on validation pictures.

        Parameters
        ----------
        samples : sequence of Sample
            Pictures of people, then as many others.

        Returns
        -------
        pandas.DataFrame
            A row for each setting: by, layer, strength and the :meth:`effects`, those with the
            smallest side effect first.
        """
        usual = describe(self.vlm, samples, _SHORT)
        rows = []
        for layer in self.gates:
            for by, strengths in WAYS.items():
                texts = self.at_strengths(by, layer, strengths, samples, _SHORT)
                for strength, captions in texts.items():
                    row = {"by": by, "layer": layer, "strength": strength}
                    rows.append(row | self.effects(captions, usual, samples))
        return pd.DataFrame(rows).sort_values("elsewhere", kind="stable")


def check_comparison(experiment: Experiment, compared: pd.DataFrame) -> None:
    """Write down whether what the chapter says of its comparison holds in this run.

    Parameters
    ----------
    experiment : Experiment
        The experiment, with its verdicts on STEER-5.
    compared : pandas.DataFrame
        A row for each way, with the columns of :meth:`Wording.effects`.
    """
    share, changed = compared["converted"], compared["elsewhere"]
    price = "coarse, at any price"
    gated = compared.loc[["by concept", "coarse, same gate"]]
    check = experiment.check
    check(
        "strong enough to convert, the coarse vector changes most others",
        share[price] > 0.8 and changed[price] > 0.6,
    )
    check("strong enough to convert, it loses facts too", compared["facts kept"][price] < 0.85)
    check("weak enough, it converts next to nothing", share["coarse"] < 0.15)
    check("side effects are not equal without a gate", changed["coarse"] > changed["by concept"])
    check("behind the gate no other caption changes", gated["elsewhere"].max() == 0)
    check(
        "behind the gate both convert most, and about as many",
        gated["converted"].min() > 0.65 and gated["converted"].std() < 0.14,
    )
    check(
        "replacing words converts all and changes no other caption",
        share["words replaced"] == 1 and changed["words replaced"] == 0,
    )
    for statement, variant in (
        ("with side effects ignored the claim is not confirmed", "side effects ignored"),
        ("behind the same gate the claim is not confirmed", "same gate for both"),
    ):
        check(statement, experiment.verdict("STEER-5", variant) != "confirmed")


def named_both_ways(
    people: Sequence[Sample], gendered_words: Sequence[str], neutral_word: str
) -> tuple[list[str], list[str]]:
    """Write sentences that name each person by the gendered word, and then by the neutral one.

    Parameters
    ----------
    people : sequence of Sample
        Pictures of people, whose first captions have a gendered word.
    gendered_words : sequence of str
        The words.
    neutral_word : str
        What takes their place.

    Returns
    -------
    words : list of str
        The gendered word of each picture.
    sentences : list of str
        Twice as many as pictures. Each names its word three times and stops where the next would
        stand.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import neutral_wording
    >>> people = [Sample("s", None, ("A man walks.",))]
    >>> neutral_wording.named_both_ways(people, ["woman", "man"], "person")[1]
    ['A man. A man. A man. A', 'A person. A person. A person. A']
    """
    words = [first_word(sample.captions[0], gendered_words) for sample in people]
    sentences = []
    for word in [*words, *[neutral_word] * len(people)]:
        sentences.append(3 * f"A {word}. " + "A")
    return words, sentences


def check_sorting(experiment: Experiment, shares: pd.DataFrame) -> None:
    """Write down what k-means sorts states by, with and without the mean of each picture.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    shares : pandas.DataFrame
        Columns "as they are" and "less the mean", each from :func:`sorting`.
    """
    experiment.check(
        "as they are k-means mostly sorts the states by picture",
        shares["as they are"]["by picture"] > 0.5,
    )
    experiment.check(
        "less the mean of each picture k-means sorts them by word",
        shares["less the mean"]["by word"],
    )


def record_leads(
    experiment: Experiment, converted: Mapping[str, Sequence[bool]], seed: int = 0
) -> None:
    """Record STEER-5: how many more captions the vectors by concept convert than each baseline.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    converted : mapping of str to sequence of bool
        Whether each caption was converted, by way: "by concept", "coarse", "coarse, at any price",
        "coarse, same gate" and "prompt".
    seed : int, default 0
        Of the intervals.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, neutral_wording
    >>> ways = ["by concept", "coarse", "coarse, at any price", "coarse, same gate", "prompt"]
    >>> converted = dict.fromkeys(ways, [True, False, False, False])
    >>> experiment = Experiment("steering-style", "tiny", "scenes")
    >>> neutral_wording.record_leads(experiment, converted)
    >>> len(experiment.records)
    4
    """
    variants = {
        "coarse": ("coarse vector", "side effects limited on validation"),
        "coarse, at any price": ("coarse vector, any side effect", "side effects ignored"),
        "coarse, same gate": ("coarse vector, same gate", "same gate for both"),
        "prompt": ("prompt", "minus the prompt"),
    }
    for way, (against, variant) in variants.items():
        lead = difference(converted["by concept"], converted[way], paired=True, seed=seed)
        experiment.record("STEER-5", lead, against, variant, choice="validation")


def check_strengths(
    experiment: Experiment, captions: Mapping[float, Sequence[str]], wording: Wording
) -> None:
    """Write down which sentences hold about vectors by concept at several strengths.

    Parameters
    ----------
    experiment : Experiment
        The chapter's.
    captions : mapping of float to sequence of str
        Captions of three people and three other pictures, at 0 and further strengths up to 3.
    wording : Wording
        Tells which captions are converted.
    """
    experiment.check(
        "the vectors by concept convert at 3", wording.converted(captions[3.0][:3]).all()
    )
    experiment.check(
        "the vectors by concept leave the other three captions alone",
        all(texts[3:] == captions[0.0][3:] for texts in captions.values()),
    )


def _subject(sample: Sample, words: Sequence[str]) -> str | None:
    return first_word(sample.captions[0], words) or sample.truth.get("subject")


def _naming(captions: Sequence[str], number: int, subject: str | None) -> str:
    """The caption of a number, or the next one that names the subject."""
    number = number % len(captions)
    turned = [*captions[number:], *captions[:number]]
    for caption in turned:
        if str(subject) in caption.lower().split():
            return caption
    return turned[0]


def _most_common(
    pairs: list[tuple[int, int]], concepts: ConceptVectors, fallback: Float[Tensor, "d"]
) -> Float[Tensor, "d"]:
    """The vector between the two concepts that most pictures have."""
    apart = Counter(pair for pair in pairs if pair[0] != pair[1])
    if not apart:
        return fallback
    (source, target), _ = apart.most_common(1)[0]
    return concepts.between(source, target)[concepts.layer]
