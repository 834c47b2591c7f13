"""Samples, states and comparisons of the chapter on fine-tuning shift.

The chapter finds concepts, moves them and measures recovery. What is here prepares the samples,
compares concepts of two models with their baselines, and pushes the base model at one word.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from xlvlms_tutorial.activations import Activations, capture
from xlvlms_tutorial.data import Sample, load_samples, mentioning
from xlvlms_tutorial.interventions import edit
from xlvlms_tutorial.methods import logit_lens
from xlvlms_tutorial.methods.concepts import KMeans
from xlvlms_tutorial.methods.shift import (
    assign_concepts,
    consistency,
    null_shifts,
    pairwise_consistency,
    recovery,
    recovery_curve,
    shift_magnitude,
    shift_vectors,
    shifted,
    t_overlap,
)
from xlvlms_tutorial.metrics import (
    Estimate,
    adjusted_mutual_information,
    bootstrap,
    correlation,
    forms,
    frequent_words,
    match_concepts,
)
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.experiments import describe as describe

_AT_LEAST = 8  # where a model would say the token of fewer samples, all stay
_SHORT = 20  # tokens of captions in which one word is pushed
MEASURES = ("shifted", "global", "original")

Words = Callable[[np.ndarray], dict[int, list[str]]]


def begin(caption: str, token: str) -> str:
    """Cut a caption behind the token of interest.

    Parameters
    ----------
    caption : str
        The caption.
    token : str
        The token.

    Returns
    -------
    str
        What stands before the token, and the token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> shift.begin("What a scene: a woman walks.", "woman")
    'What a scene: a woman'
    """
    return re.split(rf"\b{token}\b", caption, maxsplit=1)[0] + token


def samples_with(
    dataset: str, n: int, token: str, seed: int = 0
) -> tuple[str, list[Sample], list[Sample]]:
    """Take the samples with a caption in which the token stands, that caption first.

    Parameters
    ----------
    dataset : str
        As for ``load_samples``.
    n : int
        How many samples to look through.
    token : str
        The token of interest; where captions lack it, the most frequent word takes its place.
    seed : int, default 0
        Of the samples.

    Returns
    -------
    tuple of str, list of Sample and list of Sample
        The token, the samples with it, and all that were looked through.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> token, with_token, everything = shift.samples_with("scenes", 40, "woman")
    >>> token, all("woman" in sample.captions[0] for sample in with_token), len(everything)
    ('woman', True, 40)
    """
    everything = load_samples(dataset, n=n, seed=seed)
    token = frequent_words(everything, [token])[0]
    chosen = []
    for sample in mentioning(everything, token):
        captions = sorted(
            sample.captions, key=lambda caption: not caption.startswith(begin(caption, token))
        )
        if captions[0].startswith(begin(captions[0], token)):
            chosen.append(_with_captions(sample, captions))
    return token, chosen, everything


def forms_of(sample: Sample, factor: str) -> list[str]:
    """List the forms of the word for a factor of a sample; none where it is not known.

    Parameters
    ----------
    sample : Sample
        The sample.
    factor : str
        The factor, such as "action".

    Returns
    -------
    list of str
        The forms.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import shift
    >>> shift.forms_of(Sample("a", None, truth={"action": "walking"}), "action")[:3]
    ['walking', 'walkings', 'walk']
    >>> shift.forms_of(Sample("a", None), "action")
    []
    """
    value = sample.truth.get(factor)
    return [] if value is None else forms(str(value))


def read(
    vlm: VLM, samples: Sequence[Sample], layers: Sequence[int], token: str
) -> tuple[Activations, Activations]:
    """Read the first caption of each sample up to the token: two states in one forward.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples whose first caption has the token.
    layers : sequence of int
        Where to read.
    token : str
        The token of interest.

    Returns
    -------
    tuple of two Activations
        The states (n, d) that predict the token, and those at it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> token, chosen, _ = shift.samples_with("scenes", 40, "woman")
    >>> predicting, at = shift.read(vlm, chosen[:2], [2], token)
    >>> len(predicting), at.table["token"].str.strip().tolist()
    (2, ['woman', 'woman'])
    """
    both = capture(
        vlm,
        samples,
        layers,
        positions=(-2, -1),
        reduce=None,
        answers=lambda sample: begin(sample.captions[0], token),
    )
    here = (both.table["token"].str.strip() == token).to_numpy()
    return both.select(~here), both.select(here)


def read_where_said(
    vlm: VLM, samples: Sequence[Sample], layers: Sequence[int], token: str
) -> tuple[Activations, Activations]:
    """Read as :func:`read` does, and keep the samples whose token the model would say itself.

    Where it would say the token of fewer than eight samples, all stay.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples whose first caption has the token.
    layers : sequence of int
        Where to read; whether the model would say the token is seen at the last of them.
    token : str
        The token of interest.

    Returns
    -------
    tuple of two Activations
        The states (n, d) that predict the token, and those at it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> token, chosen, _ = shift.samples_with("scenes", 40, "woman")
    >>> predicting, at = shift.read_where_said(vlm, chosen[:2], [30], token)
    >>> len(predicting) == len(at)
    True
    """
    predicting, at = read(vlm, samples, layers, token)
    top = logit_lens.top_tokens(vlm, predicting[layers[-1]], 1)["word"]
    said = (top.str.strip() == token).to_numpy()
    if said.sum() < _AT_LEAST:
        return predicting, at
    return predicting.select(said), at.select(said)


def same_samples(states: Activations, others: Activations) -> Activations:
    """Keep the states of samples that others have too.

    Parameters
    ----------
    states : Activations
        The states to choose from.
    others : Activations
        States of some of the samples.

    Returns
    -------
    Activations
        Those of ``states`` whose sample is in ``others``.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.tutorials import shift
    >>> def states(*ids):
    ...     table = pd.DataFrame({"sample": range(len(ids)), "id": ids})
    ...     return Activations({(24, "resid_post"): torch.zeros(len(ids), 2)}, table, {})
    >>> len(shift.same_samples(states("a", "b", "c"), states("c", "a")))
    2
    """
    return states.select(states.table["id"].isin(others.table["id"]).to_numpy())


def overlap(
    one: Float[np.ndarray, "k d"], other: Float[np.ndarray, "j d"], words: Words, how: str
) -> Float[np.ndarray, "k"]:
    """Compute the T-Overlap of each concept with the one of another set that it is matched to.

    Parameters
    ----------
    one, other : ndarray (k, d) and ndarray (j, d)
        Two sets of concepts.
    words : callable
        Gives the words of concepts.
    how : {"one-to-one", "argmax"}
        How concepts are matched, by cosine.

    Returns
    -------
    ndarray (k,)
        The share of the words of each concept that its match has too, in per cent.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import shift
    >>> def words(concepts):
    ...     return {k: ["a", "b"] if row[0] else ["b", "c"] for k, row in enumerate(concepts)}
    >>> shift.overlap(np.eye(2), np.array([[1.0, 1.0]]), words, "argmax").tolist()
    [100.0, 50.0]
    """
    partners = match_concepts(one, other, how)["b"]
    all_words = words(other)
    theirs = {number: all_words[partner] for number, partner in enumerate(partners)}
    return t_overlap(words(one), theirs)


def became(
    base: KMeans, tuned: Mapping[str, KMeans], words: Words, n: int = 6, n_words: int = 4
) -> pd.DataFrame:
    """List the words of the largest concepts beside those of what they became in tuned models.

    Parameters
    ----------
    base : KMeans
        Fitted concepts of the base model.
    tuned : mapping of str to KMeans
        Fitted concepts of tuned models, by name.
    words : callable
        Gives the words of concepts.
    n : int, default 6
        How many concepts.
    n_words : int, default 4
        How many words of each.

    Returns
    -------
    pandas.DataFrame
        A row for each concept: its samples, its words in the base model, and those of the concept
        that it is matched to one-to-one in each tuned model.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial import KMeans
    >>> from xlvlms_tutorial.tutorials import shift
    >>> def words(concepts):
    ...     return {k: [f"{row[0]:.0f}"] for k, row in enumerate(concepts)}
    >>> fitted = KMeans(2).fit(np.array([[1.0, 9.0], [9.0, 1.0], [9.0, 1.0]]))
    >>> shift.became(fitted, {"mood": fitted}, words)[["base", "mood"]].to_numpy().tolist()
    [['9', '9'], ['1', '1']]
    """
    of_base = words(base.components_)
    sizes = np.bincount(base.labels_, minlength=len(base.components_))
    columns: dict[str, list[object]] = {"samples": sizes.tolist()}
    columns["base"] = [", ".join(said[:n_words]) for said in of_base.values()]
    for name, fitted in tuned.items():
        theirs = words(fitted.components_)
        partners = match_concepts(base.components_, fitted.components_)["b"]
        columns[name] = [", ".join(theirs[partner][:n_words]) for partner in partners]
    return pd.DataFrame(columns).rename_axis("concept").nlargest(n, "samples")


def first_words(fitted: KMeans, words: Words, verbs: Sequence[str], few: int = 3) -> float:
    """Return the share of concepts that have one of some verbs among their first words.

    Parameters
    ----------
    fitted : KMeans
        Fitted concepts.
    words : callable
        Gives the words of concepts.
    verbs : sequence of str
        The verbs.
    few : int, default 3
        How many words count as first.

    Returns
    -------
    float
        The share.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial import KMeans
    >>> from xlvlms_tutorial.tutorials import shift
    >>> def words(concepts):
    ...     return {0: ["leaps", "walks"], 1: ["lies", "looks"]}
    >>> fitted = KMeans(2).fit(np.array([[1.0, 9.0], [9.0, 1.0]]))
    >>> shift.first_words(fitted, words, ["leaps"])
    0.5
    """
    said = words(fitted.components_).values()
    return float(np.mean([bool(set(verbs) & set(one[:few])) for one in said]))


def text_share(
    base: Float[Tensor, "n d"], tuned: Float[Tensor, "n d"], same_text: Float[Tensor, "n d"]
) -> float:
    """Compute the share of a shift that comes from the text that was read, not from the weights.

    Parameters
    ----------
    base : tensor (n, d)
        States of the base model that has read the plain text.
    tuned : tensor (n, d)
        States of the tuned model that has read the styled text.
    same_text : tensor (n, d)
        States of the base model that has read the styled text.

    Returns
    -------
    float
        The mean of what the text moves along the shift, over the length of the shift.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import shift
    >>> base = torch.zeros(3, 2)
    >>> shift.text_share(base, base + 4, base + 1)
    0.25
    """
    whole = tuned - base
    text = same_text - base
    return float(((text * whole).sum(1) / whole.square().sum(1)).mean())


def inertia(states: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "k d"]) -> float:
    """Sum the squared distances of states to their nearest centre, which k-means makes small.

    Parameters
    ----------
    states : ndarray (n, d)
        The states.
    centres : ndarray (k, d)
        The centres.

    Returns
    -------
    float
        The sum.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import shift
    >>> shift.inertia(np.array([[0.0], [3.0]]), np.array([[1.0], [9.0]]))
    5.0
    """
    return float(((states[:, None] - centres[None]) ** 2).sum(-1).min(1).sum())


class Comparison:
    """Hold concepts of a base and a tuned model, the shifts between them, and the baselines.

    Parameters
    ----------
    a : tensor (n, d)
        States of the base model.
    b : tensor (n, d)
        States of the tuned one, of the same samples.
    words : callable
        Gives the words of concepts.
    k : int
        The number of concepts.
    seed : int, default 0
        Of k-means; baselines take the next one.

    Attributes
    ----------
    start, goal : ndarray (k, d)
        The concepts of the base model and of the tuned one.
    labels : ndarray (n,)
        The concept of each sample.
    shifts : dict of str to ndarray (k, d)
        What is added to the concepts: "shifted", then the baselines by name.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.shift import Comparison
    >>> a = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> def words(concepts):
    ...     return {k: ["a"] for k in range(len(concepts))}
    >>> comparison = Comparison(a, a + 1, words, k=3)
    >>> list(comparison.shifts)
    ['shifted', 'original', 'seed', 'global', 'shuffled', 'random']
    >>> comparison.recovered("shifted")["t_overlap_after"].tolist()
    [100.0, 100.0, 100.0]
    """

    def __init__(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "n d"],
        words: Words,
        k: int,
        seed: int = 0,
    ) -> None:
        self.a = a
        self.b = b
        self.words = words
        self.k = k
        before = KMeans(k, seed=seed).fit(a)
        self.start = before.components_
        self.goal = KMeans(k, seed=seed).fit(b).components_
        self.labels = assign_concepts(before.transform(a))
        self.shifts = {"shifted": shift_vectors(a, b, self.labels, k)}
        self.shifts |= null_shifts(a, b, self.labels, self.goal, self.start, seed=seed + 1)

    def recovered(self, by: str | Float[np.ndarray, "k d"] = "shifted") -> pd.DataFrame:
        """Measure how near the base concepts come to the tuned ones after a shift.

        Parameters
        ----------
        by : str or ndarray (k, d), default "shifted"
            The name of a shift, or one of another comparison.

        Returns
        -------
        pandas.DataFrame
            A row for each concept, as ``recovery`` returns it.
        """
        shifts = self.shifts[by] if isinstance(by, str) else by
        return recovery(shifted(self.start, shifts), self.goal, self.start, self.words)

    def means(self) -> dict[str, float]:
        """Return the mean T-Overlap of shifted concepts and of the baselines drawn as curves."""
        return {way: float(self.recovered(way)["t_overlap_after"].mean()) for way in MEASURES}

    def points(self) -> pd.DataFrame:
        """Measure how consistent and long the shift of each concept is, beside its recovery.

        Returns
        -------
        pandas.DataFrame
            As :meth:`recovered`, with the columns consistency and pairwise (NaN for a concept of
            one sample, of which they would be 1 whatever it is), magnitude, and perfect: the
            improvement if the concept were recovered perfectly.
        """
        table = self.recovered()
        several = np.bincount(self.labels, minlength=self.k) > 1
        rows = torch.from_numpy(several[self.labels])
        number = (np.cumsum(several) - 1)[self.labels][rows.numpy()]
        chosen = self.a[rows], self.b[rows], number, int(several.sum())
        for name, measure in (("consistency", consistency), ("pairwise", pairwise_consistency)):
            table[name] = np.nan
            table.loc[several, name] = measure(*chosen)
        before = table["cosine_before"]
        table["magnitude"] = shift_magnitude(self.shifts["shifted"])
        table["perfect"] = 1 / before.where(before > 0) - 1
        return table


def curve_over_strength(comparison: Comparison, alphas: Sequence[float]) -> pd.DataFrame:
    """Measure the mean T-Overlap after shifts of several strengths.

    Parameters
    ----------
    comparison : Comparison
        The two models.
    alphas : sequence of float
        The strengths.

    Returns
    -------
    pandas.DataFrame
        A row for each strength, a column for shifted and global.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import shift
    >>> a = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> def words(concepts):
    ...     return {k: ["a"] for k in range(len(concepts))}
    >>> comparison = shift.Comparison(a, a + 1, words, k=3)
    >>> shift.curve_over_strength(comparison, [0.0, 1.0])["shifted"].tolist()
    [100.0, 100.0]
    """
    shifts = {way: comparison.shifts[way] for way in ("shifted", "global")}
    table = recovery_curve(shifts, comparison.goal, comparison.start, alphas, comparison.words)
    table = table.query("measure == 't_overlap_after'")
    return table.pivot(index="alpha", columns="shift", values="value")[list(shifts)]


def curve_over_sizes(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    words: Words,
    sizes: Sequence[int],
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the mean T-Overlap for several numbers of concepts.

    Parameters
    ----------
    a, b : tensor (n, d)
        States of the base model and of the tuned one.
    words : callable
        Gives the words of concepts.
    sizes : sequence of int
        The numbers of concepts.
    seed : int, default 0
        Of k-means.

    Returns
    -------
    pandas.DataFrame
        A row for each number, a column for shifted, global and original.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import shift
    >>> a = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> def words(concepts):
    ...     return {k: ["a"] for k in range(len(concepts))}
    >>> shift.curve_over_sizes(a, a + 1, words, [2, 3]).index.tolist()
    [2, 3]
    """
    rows = {}
    for size in sizes:
        rows[size] = Comparison(a, b, words, size, seed).means()
    return pd.DataFrame.from_dict(rows, orient="index")


def curve_over_layers(
    a: Activations,
    b: Activations,
    words: Words,
    layers: Sequence[int],
    k: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the mean T-Overlap at several layers.

    Parameters
    ----------
    a, b : Activations
        States (n, d) of the base model and of the tuned one, of the same samples.
    words : callable
        Gives the words of concepts.
    layers : sequence of int
        The layers.
    k : int
        The number of concepts.
    seed : int, default 0
        Of k-means.

    Returns
    -------
    pandas.DataFrame
        A row for each layer, a column for shifted, global and original.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from xlvlms_tutorial import Activations
    >>> from xlvlms_tutorial.tutorials import shift
    >>> rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> table = pd.DataFrame({"sample": range(40), "id": [f"{k}" for k in range(40)]})
    >>> a = Activations({(24, "resid_post"): rows}, table, {})
    >>> b = Activations({(24, "resid_post"): rows + 1}, table, {})
    >>> def words(concepts):
    ...     return {k: ["a"] for k in range(len(concepts))}
    >>> shift.curve_over_layers(a, b, words, [24], 3)["shifted"].tolist()
    [100.0]
    """
    rows = {}
    for layer in layers:
        rows[layer] = Comparison(a[layer], b[layer], words, k, seed).means()
    return pd.DataFrame.from_dict(rows, orient="index")


def within_groups(points: pd.DataFrame, group: str) -> pd.DataFrame:
    """Standardise each measure in each group, so that groups as such cannot correlate.

    Parameters
    ----------
    points : pandas.DataFrame
        A row for each concept.
    group : str
        The column that names the group.

    Returns
    -------
    pandas.DataFrame
        The numbers less their group's mean, in units of its standard deviation.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import shift
    >>> points = pd.DataFrame({"adapter": list("aabb"), "x": [1.0, 3.0, 10.0, 30.0]})
    >>> shift.within_groups(points, "adapter")["x"].round(2).tolist()
    [-0.71, 0.71, -0.71, 0.71]
    """
    numbers = points.select_dtypes("number").columns
    grouped = points.groupby(group)[list(numbers)]
    return grouped.transform(lambda values: (values - values.mean()) / values.std())


def related(points: pd.DataFrame, x: str, y: str, seed: int = 0) -> Estimate | None:
    """Correlate two measures over concepts; None where there are too few points, or equal ones.

    Parameters
    ----------
    points : pandas.DataFrame
        A row for each concept.
    x, y : str
        The columns.
    seed : int, default 0
        Of the bootstrap over concepts.

    Returns
    -------
    Estimate or None
        Pearson's r with its interval.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import shift
    >>> points = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "y": [2.0, 4.0, 6.0, 8.0]})
    >>> shift.related(points, "x", "y").value, shift.related(points[:3], "x", "y")
    (1.0, None)
    """
    both = points[[x, y]].dropna()
    if len(both) < 4 or both.nunique().min() < 2:
        return None
    return correlation(both[x], both[y], seed=seed)


def beyond_geometry(points: pd.DataFrame, x: str, seed: int = 0) -> Estimate | None:
    """Correlate a measure with the improvement, less its correlation with perfect recovery.

    Use it because the improvement is large where a concept was far off, however well it is
    recovered.

    Parameters
    ----------
    points : pandas.DataFrame
        A row for each concept, with the columns improvement and perfect.
    x : str
        The column of the measure.
    seed : int, default 0
        Of the bootstrap over concepts.

    Returns
    -------
    Estimate or None
        The difference of the two correlations; None where there are too few points, or equal ones.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import shift
    >>> points = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "improvement": [1.0, 3.0, 2.0, 4.0]})
    >>> points["perfect"] = points["improvement"]
    >>> shift.beyond_geometry(points, "x").value
    0.0
    """
    rows = points[[x, "improvement", "perfect"]].dropna().to_numpy(float)
    if len(rows) < 4 or not np.ptp(rows, axis=0).all():
        return None

    def gap(sample: Float[np.ndarray, "n 3"]) -> float:
        r = np.corrcoef(sample, rowvar=False)
        return r[0, 1] - r[0, 2]

    return bootstrap(rows, statistic=gap, seed=seed)


def truth_row(
    fitted: KMeans,
    values: pd.Series,
    words: Mapping[int, Sequence[str]],
    few: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Ask what concepts know of a factor: by their samples, and by their words.

    Parameters
    ----------
    fitted : KMeans
        Fitted concepts.
    values : pandas.Series
        The factor of each sample on which they were fitted, missing where there is none.
    words : mapping of int to sequence of str
        The words of each concept.
    few : int, default 3
        How many words count as the first ones.
    seed : int, default 0
        Of the interval.

    Returns
    -------
    dict of str to float
        "samples", the adjusted mutual information of concepts and factor; and the shares of
        concepts among whose first or all words the usual value of their samples is.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from xlvlms_tutorial import KMeans
    >>> from xlvlms_tutorial.tutorials import shift
    >>> rows = np.array([[0.0, 9.0], [0.1, 9.0], [9.0, 0.0], [9.0, 0.1]])
    >>> fitted = KMeans(2).fit(rows)
    >>> values = pd.Series(["walking", "walking", "falling", "falling"])
    >>> of_first = int(fitted.labels_[0])
    >>> words = {of_first: ["walks"], 1 - of_first: ["lies"]}
    >>> row = shift.truth_row(fitted, values, words)
    >>> row["samples"], row["named in 3 words"]
    (1.0, 0.5)
    """
    values = values.reset_index(drop=True)
    known = values.notna().to_numpy()
    by_concept = values[known].groupby(fitted.labels_[known])
    usual = by_concept.agg(lambda group: group.mode()[0])
    information = adjusted_mutual_information(fitted.labels_, values, seed=seed)
    row = {"samples": information.value}
    for n in (few, max(len(said) for said in words.values())):
        named = []
        for concept, value in usual.items():
            named.append(bool(set(words[concept][:n]) & set(forms(str(value)))))
        row[f"named in {n} words"] = float(np.mean(named))
    return row


def push(
    vlm: VLM,
    vector: Float[Tensor, "d"],
    layer: int,
    strength: float,
    samples: Sequence[Sample],
    plain: Sequence[str],
    token: str,
) -> list[str]:
    """Let a model describe pictures, and add a vector when it has just written the token.

    Captions up to the token are the same with and without the push, so the step in which the model
    reads it is known from the captions that it writes without.

    Parameters
    ----------
    vlm : VLM
        The model.
    vector : tensor (d,)
        What is added.
    layer : int
        Where.
    strength : float
        The factor of the vector.
    samples : sequence of Sample
        The pictures.
    plain : sequence of str
        The captions without a push.
    token : str
        The token.

    Returns
    -------
    list of str
        A caption for each picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import shift
    >>> plain = shift.describe(vlm, samples[:1], 20)
    >>> shift.push(vlm, torch.zeros(vlm.width), 27, 1.0, samples[:1], plain, "a") == plain
    True
    """
    lengths = []
    for caption in plain:
        pieces = vlm.tokenizer(begin(caption, token), add_special_tokens=False)
        lengths.append(len(pieces.input_ids))
    when = torch.tensor(lengths)
    step = count()

    def change(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        here = (when == next(step)).view(-1, 1, 1)
        return states + (strength * here * vector).to(states)

    images = [sample.image for sample in samples]
    prompts = [PROMPTS["image"]] * len(samples)
    with edit(vlm, change, layer, positions="last"):
        return vlm.generate(images, prompts, max_new_tokens=_SHORT, batch_size=len(samples))


def word_after(caption: str, token: str) -> str:
    """Find the word that follows the token, "is" left out.

    Parameters
    ----------
    caption : str
        The caption.
    token : str
        The token.

    Returns
    -------
    str
        The word, or "" where none follows.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> shift.word_after("A woman is walking.", "woman")
    'walking'
    """
    after = caption.partition(token)[2].replace(".", "").split()
    return next((word for word in after if word != "is"), "")


def follow(
    captions: Sequence[str], token: str, actions: Sequence[Sequence[str]], theirs: set[str]
) -> dict[str, float]:
    """Count which words follow the token: those of the picture, or those of an adapter.

    Parameters
    ----------
    captions : sequence of str
        A caption for each picture.
    token : str
        The token.
    actions : sequence of sequence of str
        The forms of the action in each picture; empty where it is not known.
    theirs : set of str
        Words that the adapter writes there and the base model does not.

    Returns
    -------
    dict of str to float
        The shares of "the action" and of "a word of the adapter".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import shift
    >>> shift.follow(["A man walks.", "A man leaps."], "man", [["walks"], ["jumps"]], {"leaps"})
    {'the action': 0.5, 'a word of the adapter': 0.5}
    """
    words = [word_after(caption, token) for caption in captions]
    right = [word in known for word, known in zip(words, actions, strict=True) if known]
    return {
        "the action": float(pd.Series(right, dtype=float).mean()),
        "a word of the adapter": float(np.mean([word in theirs for word in words])),
    }


def _with_captions(sample: Sample, captions: Sequence[str]) -> Sample:
    return replace(sample, captions=tuple(captions))
