"""Ask which words image tokens would say, and show the answers.

For the chapter ``vocabulary``. The lens itself is :mod:`xlvlms_tutorial.methods.logit_lens`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xlvlms_tutorial import capture, logit_lens
from xlvlms_tutorial.activations import Activations
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.view import plots
from xlvlms_tutorial.view.cards import Html, picture_html

# Whose truth a word is compared with: that of its own picture, and of the next one.
PICTURES = ("own picture", "another picture")
FACTORS = ("subject", "action", "item", "colour", "place")
# The shares of the depth at which connectors are compared.
DEPTHS = (0.27, 0.8, 1.0)
# So many pictures must share a value for a linear reader to learn it.
MIN_PICTURES = 4

_WORD = (
    "padding:0 .3em;border-radius:4px;overflow-wrap:anywhere;color:#fff;font:0.72rem/1.5 monospace"
)
_CELL = "display:grid;place-content:center;border:1px solid #fff6"
_PICTURE = "position:relative;width:400px;max-width:100%;line-height:0"
_GRID = "position:absolute;inset:0;display:grid;grid:{}/{}"


def tokens(
    vlm: VLM, samples: Sequence[Sample], layers: Iterable[int] | str
) -> tuple[Activations, Activations]:
    """Read the states of all perceptual tokens, and of all tokens of a reference caption.

    Use it to compare the two kinds of tokens. The first reference caption is given as the answer.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples of one modality, with captions.
    layers : iterable of int, or "all"
        The layers to read.

    Returns
    -------
    tuple of two Activations
        The perceptual tokens P and the textual tokens T, one row a token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> P, T = vocabulary.tokens(vlm, samples[:2], [0])
    >>> P[0].shape
    torch.Size([32, 576])
    """
    captions = [sample.captions[0] for sample in samples]
    modality = samples[0].modality
    both = capture(vlm, samples, layers, span=(modality, "answer"), reduce=None, answers=captions)
    return both.select(f"span == '{modality}'"), both.select("span == 'answer'")


def words_of(vlm: VLM, states: Activations, k: int = 5) -> pd.DataFrame:
    """List the k most probable words of each token at each layer.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : Activations
        States of tokens, such as those of :func:`tokens`.
    k : int, default 5
        How many words of each token.

    Returns
    -------
    DataFrame
        One row for each layer, token (``row``) and ``rank``, with ``word``, ``token_id``,
        ``probability`` and the number of the ``sample`` that the token belongs to.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> P, _ = vocabulary.tokens(vlm, samples[:1], [0, 30])
    >>> len(vocabulary.words_of(vlm, P, k=2))  # 2 layers, 16 tokens, 2 words
    64
    """
    by_layer = {}
    for layer in states.layers:
        by_layer[layer] = logit_lens.top_tokens(vlm, states[layer], k)
    table = pd.concat(by_layer, names=["layer"]).reset_index("layer")
    samples = states.table["sample"].to_numpy()[table["row"]]
    return table.assign(sample=samples).reset_index(drop=True)


def word_frame(picture: Image.Image, top: pd.DataFrame, most: int = 8) -> Html:
    """Write the most probable word of each token on the square of the picture that it covers.

    Use it where tokens cover a picture row by row from the top left. The box behind a word is as
    dark as the word is probable.

    Parameters
    ----------
    picture : PIL.Image.Image
        The picture.
    top : DataFrame
        The word of each of its tokens in order, with columns ``word`` and ``probability``.
    most : int, default 8
        How many rows and columns of words there are at most; of more tokens every second one is
        written, or every third, and so on.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        The picture with its words.

    Examples
    --------
    >>> import pandas as pd
    >>> from PIL import Image
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> top = pd.DataFrame({"word": ["a", "key", "red", "."], "probability": 0.5})
    >>> html = vocabulary.word_frame(Image.new("RGB", (8, 8)), top)
    >>> "repeat(2,minmax(0,1fr))" in html, ">key<" in html
    (True, True)
    """
    rows, columns = _grid(len(top), picture)
    step = math.ceil(max(rows, columns) / most)
    places = np.arange(len(top)).reshape(rows, columns)[::step, ::step]
    subset = top.iloc[places.ravel()]
    cells = ""
    for word, probability in zip(subset["word"], subset["probability"], strict=True):
        shade = f"background:rgba(8,40,52,{0.55 + 0.45 * probability:.2f})"
        text = escape(word.strip() or repr(word)[1:-1])
        cells += _div(_CELL, _div(f"{_WORD};{shade}", text))
    size = picture.width, picture.width * rows // columns
    alt = f"A picture with a word on each cell: {', '.join(subset['word'])}"
    image = picture_html(ImageOps.fit(picture, size), alt, 400)
    grid = _GRID.format(*(f"repeat({number},minmax(0,1fr))" for number in places.shape))
    return Html(_div(_PICTURE, image + _div(grid, cells)))


def _div(style: str, inside: str) -> str:
    return f'<div style="{style}">{inside}</div>'


def _grid(n: int, picture: Image.Image) -> tuple[int, int]:
    """The rows and columns of n tokens: a square, or what is nearest to the picture's shape."""
    if math.isqrt(n) ** 2 == n:
        return math.isqrt(n), math.isqrt(n)
    ratio = picture.height / picture.width
    divisors = [rows for rows in range(1, n + 1) if n % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows * rows / n / ratio)))
    return rows, n // rows


def histogram_figure(
    vlm: VLM, states: Mapping[str, Float[Tensor, "_ d"]], k: int = 5, n: int = 8
) -> Figure:
    """Draw the most frequent words of several kinds of states as bars, a panel for each kind.

    Parameters
    ----------
    vlm : VLM
        The model whose unembedding reads the states.
    states : mapping of str to tensor (n, d)
        States by the title of their panel.
    k : int, default 5
        How many words of each state count.
    n : int, default 8
        How many words a panel shows.

    Returns
    -------
    matplotlib.figure.Figure
        The figure; a bar is the share of states that have the word among their k most probable.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> from xlvlms_tutorial.view import plots
    >>> figure = vocabulary.histogram_figure(vlm, {"equal": torch.ones(4, 576)}, k=2, n=2)
    >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
    [1.0, 1.0]
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    figure, axes = plots.panels(len(states), same=False)
    largest = 0.0
    for ax, (title, rows) in zip(axes, states.items(), strict=True):
        top = logit_lens.histogram(vlm, rows, k=k).head(n)
        words = [plots.literal(repr(word)) for word in top["word"]]
        places = np.arange(len(top))
        ax.barh(places, top["share"], color=plots.ACCENT)
        ax.set_yticks(places, words, fontsize="small")
        ax.invert_yaxis()
        ax.set(title=plots.literal(title), xlabel="share of tokens")
        largest = max(largest, float(top["share"].max()))
    for ax in axes:
        ax.set_xlim(0, largest)
    return figure


def agreement(words: pd.DataFrame, layer: int) -> dict[str, float]:
    """Count how often the same cell of two pictures, and two cells of one picture, share a word.

    Parameters
    ----------
    words : DataFrame
        A table of :func:`words_of`, of pictures with equally many tokens.
    layer : int
        The layer.

    Returns
    -------
    dict of str to float
        The share of pairs of cells with the same most probable word: pairs of the same cell in two
        pictures, and pairs of two cells of the same picture.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> columns = {"layer": 0, "rank": 1, "sample": [0, 0, 1, 1], "token_id": [5, 6, 5, 6]}
    >>> vocabulary.agreement(pd.DataFrame(columns), 0)
    {'same cell, other picture': 1.0, 'same picture, other cell': 0.0}
    """
    top = words.query("layer == @layer and rank == 1")
    top = top.assign(cell=top.groupby("sample").cumcount())
    return {
        "same cell, other picture": _equal_pairs(top, "cell"),
        "same picture, other cell": _equal_pairs(top, "sample"),
    }


def _equal_pairs(top: pd.DataFrame, by: str) -> float:
    """The share of pairs with the same ``by`` that have the same word."""
    pairs = []
    for columns in ([by, "token_id"], [by]):
        sizes = top.groupby(columns).size()
        pairs.append((sizes * (sizes - 1)).sum())
    return float(pairs[0] / pairs[1])


def crowds(vlm: VLM, P: Activations, T: Activations, layer: int) -> dict[str, float]:
    """Compare the mean distributions of two kinds of tokens, each from another half of samples.

    Parameters
    ----------
    vlm : VLM
        The model.
    P, T : Activations
        The perceptual and the textual tokens of the same samples.
    layer : int
        The layer.

    Returns
    -------
    dict of str to float
        The divergence in nats of one crowd from another: "P against T", "T against T" and
        "P against P".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> P, T = vocabulary.tokens(vlm, samples, [30])
    >>> far = vocabulary.crowds(vlm, P, T, 30)
    >>> far["P against T"] > far["P against P"]
    True
    """
    mean = {}
    for name, states in (("P", P), ("T", T)):
        groups = states.table["sample"] % 2
        mean[name] = logit_lens.mean_distribution(vlm, states[layer], groups=groups)
    far = {}
    for first, second in ("PT", "TT", "PP"):
        distance = logit_lens.relative_entropy(mean[first][0], mean[second][1])
        far[f"{first} against {second}"] = distance.item()
    return far


def names(word: str, value: str) -> bool:
    """Return whether a token of the vocabulary names a value of a factor.

    It does if it is a form of the value ("climbs" for climbing, "gems" for gem), or a piece of four
    letters or more that begins it ("zomb").

    Parameters
    ----------
    word : str
        The text of the token.
    value : str
        The value, such as "zombie".

    Returns
    -------
    bool
        True if the token names the value.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> vocabulary.names(" climbs", "climbing"), vocabulary.names("zo", "zombie")
    (True, False)
    """
    stem, word = value.removesuffix("ing"), word.strip().lower()
    is_piece = len(word) > 3 and stem.startswith(word)
    return is_piece or word in {stem + end for end in ("", "s", "es", "ing")}


def naming(
    words: pd.DataFrame, samples: Sequence[Sample], factors: Sequence[str] = FACTORS
) -> pd.DataFrame:
    """Tell for each token whether one of its words names something in a picture.

    Parameters
    ----------
    words : DataFrame
        A table of :func:`words_of`, or some of its rows.
    samples : sequence of Sample
        The samples whose tokens they are, with their truth.
    factors : sequence of str, optional
        The factors that count; by default subject, action, item, colour and place.

    Returns
    -------
    DataFrame
        True or false for each layer, sample and token: whether a word names a factor of its "own
        picture", or of "another picture", the next one, which is the baseline.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> scenes = [Sample(item, None, truth={"item": item}) for item in ("gem", "key")]
    >>> words = pd.DataFrame({"layer": 0, "row": [0, 1], "sample": [0, 1], "word": ["gems", "gem"]})
    >>> vocabulary.naming(words, scenes).to_numpy().tolist()
    [[True, False], [False, True]]
    """
    columns = {}
    for shift, name in enumerate(PICTURES):
        truths = [sample.truth for sample in [*samples[shift:], *samples[:shift]]]
        hits = []
        for word, sample in zip(words["word"], words["sample"], strict=True):
            values = [truths[sample].get(factor) for factor in factors]
            hits.append(any(names(word, str(value)) for value in values if value))
        columns[name] = hits
    by = ["layer", "sample", "row"]
    return words.assign(**columns).groupby(by)[list(PICTURES)].any()


def by_factor(
    words: pd.DataFrame, samples: Sequence[Sample], factors: Sequence[str] = FACTORS
) -> pd.Series:
    """Count for each factor how much more often tokens name their own picture than another.

    Parameters
    ----------
    words : DataFrame
        Rows of :func:`words_of`, of one layer.
    samples : sequence of Sample
        The samples whose tokens they are.
    factors : sequence of str, optional
        The factors; by default subject, action, item, colour and place.

    Returns
    -------
    Series
        By factor the share of tokens that name that of their own picture, minus the share that
        name that of another, rounded to two decimals.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> scenes = [Sample(item, None, truth={"item": item}) for item in ("gem", "key")]
    >>> words = pd.DataFrame({"layer": 0, "row": [0, 1], "sample": [0, 1], "word": ["gems", "a"]})
    >>> vocabulary.by_factor(words, scenes, ["item"]).to_dict()
    {'item': 0.5}
    """
    shares = {}
    for factor in factors:
        correct, another = naming(words, samples, [factor]).mean()
        shares[factor] = round(float(correct - another), 2) + 0.0  # never a negative zero
    return pd.Series(shares)


def linear_reader(
    states: Activations, samples: Sequence[Sample], factor: str, seed: int = 0
) -> dict[str, float]:
    """Measure how well a linear classifier reads a factor off one state a picture.

    Use it to see what states hold, whether or not it can be read as words. The classifier is
    trained on other pictures than those that it is judged by (four folds).

    Parameters
    ----------
    states : Activations
        One row a picture, such as the mean image token.
    samples : sequence of Sample
        The pictures, with their truth.
    factor : str
        The factor. Values that fewer than four pictures have are left out.
    seed : int, default 0
        Of the folds.

    Returns
    -------
    dict of str to float
        The accuracy at each layer ("layer 0", ...) and the share of the "most frequent value".
        Empty if the factor has fewer than two values.

    Examples
    --------
    >>> from xlvlms_tutorial import capture, load_samples
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> some = load_samples("scenes", n=24)
    >>> means = capture(vlm, some, [0], span="image")
    >>> sorted(vocabulary.linear_reader(means, some, "side"))
    ['layer 0', 'most frequent value']
    """
    values = pd.Series([sample.truth.get(factor) for sample in samples], dtype=object)
    values = values[values.groupby(values).transform("size") >= MIN_PICTURES]
    if values.nunique() < 2:
        return {}
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    folds = StratifiedKFold(MIN_PICTURES, shuffle=True, random_state=seed)
    row = {}
    for layer in states.layers:
        x = states[layer][list(values.index)].numpy()
        row[f"layer {layer}"] = float(cross_val_score(reader, x, values, cv=folds).mean())
    row["most frequent value"] = float(values.value_counts(normalize=True).max())
    return row


def distances(
    vlm: VLM, samples: Sequence[Sample], depths: Sequence[float] = DEPTHS
) -> dict[str, Estimate | float]:
    """Measure how far the tokens of a modality are from text, in pairs and as crowds.

    Use it for a table with a row for each connector and kind of data.

    Parameters
    ----------
    vlm : VLM
        The model with its connector.
    samples : sequence of Sample
        Samples of one modality.
    depths : sequence of float, default (0.27, 0.8, 1.0)
        Shares of the model's depth at which pairs of tokens are compared.

    Returns
    -------
    dict of str to Estimate or float
        At each depth the divergence of perceptual from textual tokens minus that of text from
        other text, in nats; and the three distances of :func:`crowds` at the last layer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import vocabulary
    >>> list(vocabulary.distances(vlm, samples, depths=[1.0]))[:2]
    ['100% of depth', 'crowds, P against T']
    """
    layers = [vlm.layer_at(depth) for depth in depths]
    P, T = tokens(vlm, samples, sorted({*layers, vlm.n_layers}))
    gaps = logit_lens.divergence_profile(vlm, P, T)
    gaps = gaps[gaps["kind"] == "difference"].set_index("layer")
    row: dict[str, Estimate | float] = {}
    for depth, layer in zip(depths, layers, strict=True):
        gap = gaps.loc[layer]
        row[f"{depth:.0%} of depth"] = Estimate(
            float(gap["value"]), float(gap["low"]), float(gap["high"]), int(gap["n"])
        )
    for name, distance in crowds(vlm, P, T, vlm.n_layers).items():
        row[f"crowds, {name}"] = distance
    return row
