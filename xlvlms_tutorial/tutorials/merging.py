"""Merge two connectors that were trained from one start: the experts, their scores, the records.

One expert learned captions, one learned to answer yes or no about presence. Nothing but the
connector was trained, so that mixing weights is exact and pictures are encoded once.
``python -m tools.expert_scores`` measures the experts again, picture by picture; what it wrote is
shipped, and :func:`scores` reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.merging import above_chord, interpolate, loss_barrier
from xlvlms_tutorial.metrics import Estimate, caption_attributes, difference
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import with_eos
from xlvlms_tutorial.models.finetune import loss_of
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.hallucination import read_first
from xlvlms_tutorial.validation import require
from xlvlms_tutorial.view.plots import ACCENT, INK

FILE = Path(__file__).with_name("merging.json")
HOME = "pocket-llava"
SKILLS = ("captions", "presence")
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # shares of the presence expert
COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the control and of the second order of the data
PARTS = {"test": 24, "validation": 12, "composition": 12}  # splits and their pictures
# connectors that are measured by themselves, by part
ALONE = {
    "test": ("start", "joint", "early"),
    "validation": (),
    "composition": ("start", "joint"),
}
FRONTS = {"one start": ACCENT, "two starts": "#9a5d10"}  # colours of the figure
MARKERS = {
    "start": ("start", "D"),
    "joint": ("joint training", "*"),
    "early": ("captions expert, half way", "^"),
}
COLUMNS = ("captions", "presence", "other", "caption loss", "presence loss")
LONGEST = 32  # tokens of a caption

State = Mapping[str, Tensor]


@contextmanager
def connected(vlm: VLM, state: State) -> Iterator[VLM]:
    """Let a model see through another connector inside a ``with`` block.

    Use it to try many mixtures on one model: tower and language model stay where they are.

    Parameters
    ----------
    vlm : VLM
        A model with a connector.
    state : mapping of str to Tensor
        The connector's weights by name.

    Yields
    ------
    VLM
        The model itself; afterwards it has its own connector again.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> from xlvlms_tutorial.tutorials.merging import connected, connector_of
    >>> before = connector_of(vlm)
    >>> silent = {name: 0 * weight for name, weight in before.items()}
    >>> with connected(vlm, silent):
    ...     float(anatomy.connector(vlm.model).linear_2.weight.detach().abs().max())
    0.0
    """
    module = anatomy.connector(vlm.model)
    before = connector_of(vlm)
    module.load_state_dict(state)
    try:
        yield vlm
    finally:
        module.load_state_dict(before)


def connector_of(vlm: VLM) -> dict[str, Tensor]:
    """Return a copy of the weights of a model's connector.

    Parameters
    ----------
    vlm : VLM
        The model.

    Returns
    -------
    dict of str to Tensor
        The weights by name.

    Raises
    ------
    InputError
        If the model has no connector under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import connector_of
    >>> list(connector_of(vlm))
    ['linear_1.weight', 'linear_1.bias', 'linear_2.weight', 'linear_2.bias']
    """
    module = anatomy.connector(vlm.model)
    require(module is not None, f"{vlm.name!r} has no connector", "give a model that has one")
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


@dataclass(frozen=True)
class Reading:
    """What a model says to some pictures: its captions, and with which probabilities it answers.

    Parameters
    ----------
    named : array (pictures,)
        The share of what is known of a picture that the model's caption names.
    token_probs : sequence of Tensor (tokens,)
        The probability of each token of a reference caption, by picture.
    answer_probs : Tensor (questions, vocabulary)
        The probabilities of the first token of each answer.
    targets : Tensor (questions,)
        The first token of the right answers.
    presence : array (questions,)
        True for yes/no questions, False for all others.
    rows : array (questions,)
        The number of the picture that each question is about.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from xlvlms_tutorial.tutorials.merging import Reading
    >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> reading = Reading(np.ones(1), [torch.tensor([1.0, 0.5])], probs, torch.tensor([0, 0]),
    ...                   np.array([True, False]), np.array([0, 0]))
    >>> reading.scores()["presence"], reading.scores()["other"]
    (1.0, 0.0)
    """

    named: Float[np.ndarray, "pictures"]
    token_probs: Sequence[Float[Tensor, "_"]]
    answer_probs: Float[Tensor, "questions v"]
    targets: Int[Tensor, "questions"]
    presence: Bool[np.ndarray, "questions"]
    rows: Int[np.ndarray, "questions"]

    def by_picture(self) -> pd.DataFrame:
        """Score each picture.

        Returns
        -------
        pandas.DataFrame
            A row a picture: captions (the share of what is known that its caption names), presence
            and other (the share of its questions of a kind that are answered correctly, by the most
            probable first token), caption loss (nats a token) and presence loss (nats). NaN where
            nothing was asked.
        """
        table = pd.DataFrame({"captions": self.named}).rename_axis("picture")
        table["caption loss"] = [-probs.log().mean().item() for probs in self.token_probs]
        correct = self.answer_probs.gather(1, self.targets[:, None]).flatten()
        answers = pd.DataFrame(
            {
                "right": (self.answer_probs.argmax(dim=-1) == self.targets).float().numpy(),
                "loss": -correct.log().numpy(),
            }
        )
        yes_or_no = answers[self.presence].groupby(self.rows[self.presence]).mean()
        others = answers[~self.presence].groupby(self.rows[~self.presence]).mean()
        table["presence"], table["presence loss"] = yes_or_no["right"], yes_or_no["loss"]
        table["other"] = others["right"]
        return table[list(COLUMNS)]

    def scores(self) -> dict[str, float]:
        """Return the means over pictures.

        Returns
        -------
        dict of str to float
            The columns of :meth:`by_picture`.
        """
        return {name: float(value) for name, value in self.by_picture().mean().items()}


def ensemble(first: Reading, second: Reading, weight: float) -> Reading:
    """Mix what two models predict, word by word, in place of their weights.

    It costs two passes for each word, where a merged model costs one. The captions of an ensemble
    are not generated, so that ``named`` is NaN.

    Parameters
    ----------
    first, second : Reading
        Of the two models, on the same part.
    weight : float
        The share of the second.

    Returns
    -------
    Reading
        Of the mixed probabilities.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from xlvlms_tutorial.tutorials.merging import Reading, ensemble
    >>> yes, no = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> rest = torch.tensor([0]), np.array([True]), np.array([0])
    >>> one = Reading(np.ones(1), [torch.tensor([0.8])], yes, *rest)
    >>> two = Reading(np.ones(1), [torch.tensor([0.4])], no, *rest)
    >>> ensemble(one, two, 0.25).answer_probs.tolist()
    [[0.75, 0.25]]
    """
    tokens = []
    for one, two in zip(first.token_probs, second.token_probs, strict=True):
        tokens.append((1 - weight) * one + weight * two)
    answers = (1 - weight) * first.answer_probs + weight * second.answer_probs
    unknown = np.full(len(first.named), np.nan)
    return replace(first, named=unknown, token_probs=tokens, answer_probs=answers)


class Bench:
    """Pictures to describe and questions about them, on which every mixture is measured.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures with captions and questions.
    n_presence, n_other : int, default 2 and 1
        Questions of a picture: those with the answer yes or no, and all others.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench
    >>> bench = Bench(samples, n_presence=1)
    >>> len(bench.questions), bench.pictures[0] is samples[0]
    (8, True)
    """

    def __init__(self, samples: Sequence[Sample], n_presence: int = 2, n_other: int = 1) -> None:
        self.pictures = list(samples)
        self.images = [sample.image for sample in samples]
        self.questions, self.rows = [], []
        for row, sample in enumerate(samples):
            yes_or_no = [q for q in sample.questions if q.answer in ("yes", "no")]
            others = [q for q in sample.questions if q.answer not in ("yes", "no")]
            turned = [others[(row + k) % len(others)] for k in range(min(n_other, len(others)))]
            for question in (*yes_or_no[:n_presence], *turned):
                self.questions.append(question)
                self.rows.append(row)

    def captions(self, vlm: VLM) -> list[str]:
        """Let a model describe the pictures.

        Parameters
        ----------
        vlm : VLM
            The model.

        Returns
        -------
        list of str
            A caption a picture.
        """
        prompts = [PROMPTS["image"]] * len(self.images)
        return vlm.generate(self.images, prompts, LONGEST, batch_size=64)

    @torch.no_grad()
    def read(self, vlm: VLM) -> Reading:
        """Measure a model.

        Parameters
        ----------
        vlm : VLM
            The model, with the connector that is to be measured.

        Returns
        -------
        Reading
            What it says.
        """
        named = []
        for caption, sample in zip(self.captions(vlm), self.pictures, strict=True):
            named.append(_share_named(caption, sample))
        texts = [question.text for question in self.questions]
        images = [self.images[row] for row in self.rows]
        logits = read_first(vlm, images, texts, batch_size=60).logits
        answers = [question.answer for question in self.questions]
        first = [ids[0] for ids in vlm.tokenizer(answers, add_special_tokens=False).input_ids]
        yes_or_no = [answer in ("yes", "no") for answer in answers]
        return Reading(
            np.array(named),
            self._token_probs(vlm),
            logits.softmax(dim=-1),
            torch.tensor(first),
            np.array(yes_or_no),
            np.array(self.rows),
        )

    def _token_probs(self, vlm: VLM) -> list[Tensor]:
        """The probability of each token of one reference caption a picture."""
        references = with_eos(vlm, [sample.captions[0] for sample in self.pictures])
        prompts = [PROMPTS["image"]] * len(references)
        batch = vlm.batch_of(self.pictures, prompts, references)
        mask = batch.mask("answer")
        first = int(mask.any(dim=0).int().argmax())
        options = {}
        if "logits_to_keep" in vlm.accepts:
            options["logits_to_keep"] = torch.arange(first - 1 - mask.shape[1], 0)
        with vlm.run(batch):
            logits = vlm.model(**batch, **options).logits
        length = logits.shape[1] - 1
        targets = batch["input_ids"][:, -length:]
        probs = logits[:, :-1].float().softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
        return [row[keep].cpu() for row, keep in zip(probs, mask[:, -length:], strict=True)]


def _share_named(caption: str, sample: Sample) -> float:
    """Share of what is known of a picture that a caption names.

    Without truth it is the share of the words of the first reference.
    """
    if sample.truth:
        named = caption_attributes([caption], [sample.truth]).iloc[0].dropna()
        if len(named):
            return float(named.astype(float).mean())
    words = set(sample.captions[0].lower().rstrip(".").split())
    return len(words & set(caption.lower().rstrip(".").split())) / len(words)


def train_expert(
    vlm: VLM,
    start: State,
    samples: Sequence[Sample],
    skill: str,
    steps: int = 20,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train an expert of any model: its connector, on one skill.

    Use it for a model whose experts are not shipped.

    Parameters
    ----------
    vlm : VLM
        The model; it has its own connector again afterwards.
    start : mapping of str to Tensor
        The connector's weights to start from.
    samples : sequence of Sample
        Pictures with captions and questions whose answers are yes or no.
    skill : {"captions", "presence", "both"}
        What is learned.
    steps, batch_size : int, default 20 and 4
        Length of the training, and texts a step.
    seed : int, default 0
        Of the order of the texts.

    Returns
    -------
    dict of str to Tensor
        The trained weights.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import connector_of, train_expert
    >>> trained = train_expert(vlm, connector_of(vlm), samples, "captions", steps=1, batch_size=1)
    >>> bool((trained["linear_2.bias"] != connector_of(vlm)["linear_2.bias"]).any())
    True
    """
    lessons = []
    for sample in samples:
        if skill != "presence":
            lessons.append((sample, PROMPTS["image"], sample.captions[0]))
        for question in sample.questions:
            if skill != "captions" and question.answer in ("yes", "no"):
                lessons.append((sample, question.text, question.answer))

    def loss(step: int) -> Float[Tensor, ""]:
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(lessons), min(batch_size, len(lessons)), replace=False)
        pictures, prompts, answers = zip(*(lessons[row] for row in rows), strict=True)
        return loss_of(vlm, pictures, prompts, answers)

    with connected(vlm, start):
        module = anatomy.connector(vlm.model).requires_grad_(True)
        try:
            optimise(
                dict(module.named_parameters()),
                loss,
                steps,
                lambda step: 1e-3 * warmup_cosine(step, steps),
                disable=True,
            )
        finally:
            module.requires_grad_(False)
        return connector_of(vlm)


def family(
    vlm: VLM, dataset: str = "scenes", seed: int = 0, steps: int = 20, n_samples: int = 16
) -> dict[str, dict[str, Tensor]]:
    """Train all connectors that the page compares.

    Use it for a model whose experts are not shipped.

    Parameters
    ----------
    vlm : VLM
        The model.
    dataset : str, default "scenes"
        Pictures to train on.
    seed : int, default 0
        Of the order of the data.
    steps, n_samples : int, default 20 and 16
        Length of the training, and how many pictures it sees.

    Returns
    -------
    dict of str to dict of str to Tensor
        "start", the model's own connector; "captions" and "presence", the experts; "presence,
        again", another order of its data; "other", a captions expert from another start, which is
        the connector plus noise; "joint", which learned both in as many steps; and "early", the
        captions expert after half of the steps.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import family
    >>> sorted(family(vlm, steps=1, n_samples=2))
    ['captions', 'early', 'joint', 'other', 'presence', 'presence, again', 'start']
    """
    start = connector_of(vlm)
    generator = torch.Generator().manual_seed(seed)
    noisy = {}
    for name, weight in start.items():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        noisy[name] = weight + noise * weight.std(correction=0)
    samples = load_samples(dataset, n_samples, "train", seed)
    trained = {"start": start}
    for skill in SKILLS:
        trained[skill] = train_expert(vlm, start, samples, skill, steps, seed=seed)
    trained["presence, again"] = train_expert(vlm, start, samples, "presence", steps, seed=seed + 1)
    trained["joint"] = train_expert(vlm, start, samples, "both", steps, seed=seed)
    trained["other"] = train_expert(vlm, noisy, samples, "captions", steps, seed=seed)
    few = max(1, steps // 2)
    trained["early"] = train_expert(vlm, start, samples, "captions", few, seed=seed)
    return trained


def front(
    vlm: VLM,
    bench: Bench,
    first: State,
    second: State,
    weights: Sequence[float] = WEIGHTS,
) -> dict[float, Reading]:
    """Measure the mixtures of two experts.

    Parameters
    ----------
    vlm : VLM
        The model.
    bench : Bench
        On what.
    first, second : mapping of str to Tensor
        The experts.
    weights : sequence of float, default WEIGHTS
        Shares of the second expert.

    Returns
    -------
    dict of float to Reading
        By share.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench, connector_of, front
    >>> same = connector_of(vlm)
    >>> readings = front(vlm, Bench(samples[:1]), same, same, [0.0, 1.0])
    >>> readings[0.0].scores() == readings[1.0].scores()
    True
    """
    readings = {}
    for weight in weights:
        with connected(vlm, interpolate(first, second, weight)):
            readings[weight] = bench.read(vlm)
    return readings


def front_table(readings: Mapping[float, Reading]) -> pd.DataFrame:
    """Return the scores of mixtures, a row for each share of the second expert.

    Parameters
    ----------
    readings : mapping of float to Reading
        From :func:`front`.

    Returns
    -------
    pandas.DataFrame
        The columns of :meth:`Reading.scores`.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from xlvlms_tutorial.tutorials.merging import Reading, front_table
    >>> reading = Reading(np.ones(1), [torch.ones(2)], torch.eye(2), torch.arange(2),
    ...                   np.array([True, False]), np.array([0, 0]))
    >>> front_table({0.5: reading}).loc[0.5, "presence"].item()
    1.0
    """
    rows = {weight: reading.scores() for weight, reading in readings.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("weight")


def captions_and_answers(vlm: VLM, bench: Bench) -> list[str]:
    """Return what a model says of each picture: its caption, then its answers.

    Parameters
    ----------
    vlm : VLM
        The model.
    bench : Bench
        Pictures, with few questions.

    Returns
    -------
    list of str
        A text a picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench, captions_and_answers
    >>> text = captions_and_answers(vlm, Bench(samples[:1], n_presence=1, n_other=0))[0]
    >>> "? " in text
    True
    """
    texts = bench.captions(vlm)
    images = [bench.images[row] for row in bench.rows]
    prompts = [question.text for question in bench.questions]
    answers = vlm.generate(images, prompts, max_new_tokens=6, batch_size=60)
    for row, prompt, answer in zip(bench.rows, prompts, answers, strict=True):
        texts[row] += f" | {prompt} {answer}"
    return texts


def measure(
    vlm: VLM,
    experts: Mapping[str, State],
    benches: Mapping[str, Bench],
    weights: Sequence[float] = WEIGHTS,
    coarse: Sequence[float] = COARSE,
) -> pd.DataFrame:
    """Measure all that the page compares, picture by picture.

    On "test": the mixtures of captions and presence expert and their ensembles; the mixtures of a
    captions expert from another start with the presence expert; those of the captions expert with a
    presence expert of another order of the data; and every other connector by itself. On
    "validation" the mixtures alone. On "composition" the experts, their average and what they are
    compared with.

    Parameters
    ----------
    vlm : VLM
        The model.
    experts : mapping of str to State
        As :func:`family` makes them; what is not there is not measured.
    benches : mapping of str to Bench
        By part: "test", "validation", and "composition", which shows what training did not.
    weights, coarse : sequence of float
        Shares of the presence expert, and those of the two other pairs.

    Returns
    -------
    pandas.DataFrame
        The columns of :meth:`Reading.by_picture`, and part, kind ("one start", "two starts",
        "second order", "ensemble", "start", "joint" or "early"), weight and picture.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench, connector_of, measure
    >>> same = {name: connector_of(vlm) for name in ("start", "captions", "presence")}
    >>> rows = measure(vlm, same, {"test": Bench(samples[:1])}, [0.0, 1.0])
    >>> rows["kind"].unique().tolist()
    ['one start', 'ensemble', 'start']
    """
    tables = []
    for part, bench in benches.items():
        shares = (0.0, 0.5, 1.0) if part == "composition" else weights
        readings = front(vlm, bench, experts["captions"], experts["presence"], shares)
        by_kind = {"one start": readings}
        if part == "test":
            captions, presence = readings[0.0], readings[1.0]
            by_kind["ensemble"] = {
                weight: ensemble(captions, presence, weight) for weight in shares
            }
            if "other" in experts:
                pair = experts["other"], experts["presence"]
                mixtures = front(vlm, bench, *pair, coarse[:-1])
                by_kind["two starts"] = mixtures | {1.0: presence}
            if "presence, again" in experts:
                pair = experts["captions"], experts["presence, again"]
                by_kind["second order"] = {0.0: captions} | front(vlm, bench, *pair, coarse[1:])
        for kind in ALONE[part]:
            if kind in experts:
                with connected(vlm, experts[kind]):
                    by_kind[kind] = {np.nan: bench.read(vlm)}
        for kind, of_kind in by_kind.items():
            for weight, reading in of_kind.items():
                table = reading.by_picture().reset_index()
                tables.append(table.assign(part=part, kind=kind, weight=weight))
    return pd.concat(tables, ignore_index=True)


def scores(
    model: str = HOME,
    dataset: str = "scenes",
    experts: Mapping[str, State] | None = None,
    pictures: int = 4,
) -> pd.DataFrame:
    """Return the scores of mixtures and of what they are compared with, by picture.

    Of pocket LLaVA they are read from the shipped records, which ``python -m tools.expert_scores``
    makes again. Of another model they are measured here.

    Parameters
    ----------
    model : str, default "pocket-llava"
        The model.
    dataset : str, default "scenes"
        Pictures of another model.
    experts : mapping of str to State, optional
        The connectors of another model, from :func:`family`.
    pictures : int, default 4
        Pictures of a part, of another model.

    Returns
    -------
    pandas.DataFrame
        As :func:`measure` returns it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import scores
    >>> table = scores()
    >>> sorted(table["part"].unique())
    ['composition', 'test', 'validation']
    """
    if model == HOME:
        table = pd.DataFrame(read_json(FILE)["rows"])
        return table.astype(dict.fromkeys((*COLUMNS, "weight"), float))
    vlm = load(model)
    benches = {}
    for number, part in enumerate(PARTS):
        benches[part] = Bench(load_samples(dataset, pictures, "test", seed=number))
    return measure(vlm, experts or family(vlm, dataset), benches, COARSE)


def means(table: pd.DataFrame, part: str = "test") -> pd.DataFrame:
    """Return the means over pictures.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`scores`.
    part : str, default "test"
        On which pictures.

    Returns
    -------
    pandas.DataFrame
        A row for each kind and weight.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.merging import COLUMNS, means
    >>> rows = pd.DataFrame([[0.0] * 5, [1.0] * 5], columns=COLUMNS)
    >>> rows = rows.assign(part="test", kind="one start", weight=0.5)
    >>> means(rows).loc[("one start", 0.5), "captions"].item()
    0.5
    """
    of_part = table[table["part"] == part]
    return of_part.groupby(["kind", "weight"], dropna=False, sort=False)[list(COLUMNS)].mean()


def draw_fronts(ax: Axes, table: pd.DataFrame) -> None:
    """Draw what mixtures can do: presence against captions, with the chords.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where to draw.
    table : pandas.DataFrame
        From :func:`means`.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from xlvlms_tutorial.tutorials.merging import draw_fronts, means, scores
    >>> figure, ax = plt.subplots()
    >>> draw_fronts(ax, means(scores()))
    >>> ax.get_xlabel()
    'share of what is known that captions name'
    """
    for kind, colour in FRONTS.items():
        path = table.loc[kind].sort_index()
        ax.plot(path["captions"], path["presence"], "o-", color=colour, label=kind)
        ends = path.loc[[0.0, 1.0]]
        ax.plot(ends["captions"], ends["presence"], "--", color=colour, lw=1)
        if kind == "one start":
            for weight, row in path.iterrows():
                place = (row["captions"], row["presence"])
                ax.annotate(f"{weight:g}", place, (5, 4), textcoords="offset points", fontsize=8)
    for kind, (label, marker) in MARKERS.items():
        if kind in table.index:
            point = table.loc[kind].iloc[0]
            ax.plot(point["captions"], point["presence"], marker, color=INK, ms=8, label=label)
    ax.set(xlabel="share of what is known that captions name", ylabel="presence questions answered")


def areas(
    table: pd.DataFrame, kind: str, measures: Sequence[str] = SKILLS, part: str = "test"
) -> pd.DataFrame:
    """Return by how much each picture's scores lie above the chord between the two experts.

    The area is linear in the scores, so that its mean over pictures is the area of the means.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`scores`.
    kind : str
        Which mixtures: "one start", "two starts", "second order" or "ensemble".
    measures : sequence of str, default ("captions", "presence")
        Columns; of a loss, the area below the chord is returned, so that more is always better.
    part : str, default "test"
        On which pictures.

    Returns
    -------
    pandas.DataFrame
        A row a picture, a column a measure, and "mean" over the measures.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.merging import areas
    >>> rows = [(0, "one start", weight, "test", 0.5, 1 - weight) for weight in (0.0, 0.5, 1.0)]
    >>> names = ["picture", "kind", "weight", "part", "captions", "presence"]
    >>> areas(pd.DataFrame(rows, columns=names), "one start").loc[0, "mean"].item()
    0.0
    """
    of_kind = _of(table, kind, part)
    result = {}
    for name in measures:
        sign = -1 if name.endswith("loss") else 1
        values = of_kind.pivot(index="picture", columns="weight", values=name).dropna()
        result[name] = pd.Series(
            above_chord(sign * values.to_numpy(), values.columns.to_numpy()), values.index
        )
    return pd.DataFrame(result).assign(mean=lambda frame: frame.mean(axis=1))


def barriers(table: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """Return how far the losses rise above the chord between two experts.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`means`.
    kinds : sequence of str
        Which mixtures.

    Returns
    -------
    pandas.DataFrame
        A row a loss, a column a kind, in nats; "both" is the barrier of the mean of the two losses.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.merging import barriers
    >>> index = pd.MultiIndex.from_product([["one start"], [0.0, 0.5, 1.0]])
    >>> losses = {"caption loss": [1.0, 4.0, 3.0], "presence loss": 2.0}
    >>> barriers(pd.DataFrame(losses, index), ["one start"])["one start"].to_dict()
    {'caption loss': 2.0, 'presence loss': 0.0, 'both': 1.0}
    """
    columns = {}
    for kind in kinds:
        losses = table.loc[kind].sort_index()[["caption loss", "presence loss"]]
        losses = losses.assign(both=losses.mean(axis=1))
        columns[kind] = {
            name: float(loss_barrier(values, losses.index)) for name, values in losses.items()
        }
    return pd.DataFrame(columns)


def chosen_weight(table: pd.DataFrame, measure: str) -> float:
    """Choose the true mixture that is best on validation; of equals the first.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`scores`.
    measure : str
        A column, or "mean", that of both skills.

    Returns
    -------
    float
        The share of the presence expert, never 0 or 1.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.merging import chosen_weight
    >>> rows = [(0, "one start", weight, "validation", score)
    ...         for weight, score in ((0.0, 0.9), (0.25, 0.7), (0.5, 0.8), (1.0, 0.1))]
    >>> names = ["picture", "kind", "weight", "part", "captions"]
    >>> chosen_weight(pd.DataFrame(rows, columns=names), "captions")
    0.5
    """
    by_weight = _of(table, "one start", "validation").groupby("weight")[measure].mean()
    return float(by_weight.drop([0.0, 1.0]).idxmax())


def gain(
    table: pd.DataFrame,
    measure: str,
    baseline: str | float,
    weight: float = 0.5,
    part: str = "test",
    seed: int = 0,
) -> Estimate:
    """Return by how much a mixture of one start exceeds a baseline on the same pictures.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`scores`.
    measure : str
        A column, or "mean", that of both skills.
    baseline : str or float
        A kind ("start", "joint", "early"), or the share of a mixture: 0 and 1 are the experts.
    weight : float, default 0.5
        Which mixture.
    part : str, default "test"
        On which pictures.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The mean difference, with pictures drawn again.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.merging import gain
    >>> rows = [(picture, "one start", weight, "test", weight) for picture in (0, 1)
    ...         for weight in (0.0, 0.5, 1.0)]
    >>> names = ["picture", "kind", "weight", "part", "captions"]
    >>> gain(pd.DataFrame(rows, columns=names), "captions", 0.0).value
    0.5
    """
    mixtures = _of(table, "one start", part)
    against = mixtures if isinstance(baseline, float) else _of(table, baseline, part)
    if isinstance(baseline, float):
        against = against[against["weight"] == baseline]
    ours = mixtures[mixtures["weight"] == weight]
    pair = []
    for rows in (ours, against):
        pair.append(rows.set_index("picture")[measure].rename(len(pair)))
    both = pd.concat(pair, axis=1).dropna()
    return difference(both[0], both[1], paired=True, seed=seed)


def random_expert(start: State, expert: State, seed: int = 0) -> dict[str, Tensor]:
    """Move from a start as far as an expert did, weight by weight, in a random direction.

    Parameters
    ----------
    start, expert : mapping of str to Tensor
        Their weights.
    seed : int, default 0
        Of the direction.

    Returns
    -------
    dict of str to Tensor
        The moved weights.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.merging import random_expert
    >>> moved = random_expert({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 3.0, 4.0])})
    >>> round(float(moved["w"].norm()), 4)
    5.0
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, weight in start.items():
        direction = torch.randn(weight.shape, generator=generator).to(weight)
        length = (expert[name] - weight).norm()
        moved[name] = weight + direction / direction.norm().clamp_min(1e-12) * length
    return moved


@torch.no_grad()
def last_states(vlm: VLM, bench: Bench, n: int = 40) -> Float[Tensor, "layers n d"]:
    """Return the states of the last token of the first questions, after the input and each block.

    Parameters
    ----------
    vlm : VLM
        The model.
    bench : Bench
        Pictures with questions.
    n : int, default 40
        How many questions.

    Returns
    -------
    Tensor
        Layers from 0, the input, on.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench, last_states
    >>> last_states(vlm, Bench(samples[:1]), n=2).shape
    torch.Size([31, 2, 576])
    """
    rows = bench.rows[:n]
    texts = [question.text for question in bench.questions[:n]]
    batch = vlm.batch_of([bench.pictures[row] for row in rows], texts)
    states = vlm.forward(batch, logits=False, output_hidden_states=True).hidden_states
    return torch.stack([layer[:, -1].float().cpu() for layer in states])


def explained(
    moved: Float[Tensor, "layers n d"], expected: Float[Tensor, "layers n d"]
) -> Float[np.ndarray, "layers n"]:
    r"""Return the share of a movement of states that an expected movement explains.

    :math:`1 - |m - e|^2 / |m|^2`, for each layer and question. It is 1 where both are equal, 0
    where the expected movement is none, and negative where it leads astray.

    Parameters
    ----------
    moved, expected : Tensor of shape (layers, n, d)
        The movement, and what it was expected to be.

    Returns
    -------
    array of shape (layers, n)
        The shares; NaN where nothing moved.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.merging import explained
    >>> moved = torch.tensor([[[2.0, 0.0]]])
    >>> explained(moved, 0.5 * moved).item()
    0.75
    """
    rest = (moved - expected).square().sum(dim=-1)
    return (1 - rest / moved.square().sum(dim=-1)).numpy()


def straightness(
    vlm: VLM, bench: Bench, start: State, expert: State, weight: float = 0.5, n: int = 40
) -> tuple[Float[np.ndarray, "layers n"], Float[np.ndarray, "layers n"]]:
    """Tell whether states move straight when weights do.

    Weights go from a start to an expert. On the way, at a share of it, states should have moved by
    the same share of what they move in all. The baseline is a random direction of states, as long.

    Parameters
    ----------
    vlm : VLM
        The model.
    bench : Bench
        Questions, at whose last token states are read.
    start, expert : mapping of str to Tensor
        Their connectors.
    weight : float, default 0.5
        The share of the way.
    n : int, default 40
        How many questions.

    Returns
    -------
    tuple of two arrays (layers, n)
        The share of the movement that is explained, by the expert's own and by the random one.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.merging import Bench, connector_of, straightness
    >>> start = connector_of(vlm)
    >>> doubled = {name: 2 * value for name, value in start.items()}
    >>> ours, random = straightness(vlm, Bench(samples[:1]), start, doubled, n=1)
    >>> bool(ours[-1, 0] > random[-1, 0])
    True
    """
    states = []
    for share in (0.0, weight, 1.0):
        with connected(vlm, interpolate(start, expert, share)):
            states.append(last_states(vlm, bench, n))
    origin, middle, end = states
    expected = weight * (end - origin)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    random_change = (
        direction / direction.norm(dim=-1, keepdim=True) * expected.norm(dim=-1, keepdim=True)
    )
    return explained(middle - origin, expected), explained(middle - origin, random_change)


def _of(table: pd.DataFrame, kind: str, part: str = "test") -> pd.DataFrame:
    """Rows of a kind and a part, with the mean of both skills."""
    rows = table[(table["kind"] == kind) & (table["part"] == part)]
    skills = [name for name in SKILLS if name in rows]
    return rows.assign(mean=rows[skills].mean(axis=1))
