"""Prepare the experiments on image tokens that are left out: settings, baselines, scores, times."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.methods.dropping import drop_tokens, pool_tokens
from xlvlms_tutorial.metrics import bootstrap, count_flops
from xlvlms_tutorial.metrics.captions import caption_attributes
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS
from xlvlms_tutorial.tutorials.experiments import Experiment, describe
from xlvlms_tutorial.tutorials.pruning import two_questions
from xlvlms_tutorial.validation import require

Context = Callable[[], AbstractContextManager]
Setting = tuple[int, int]  # layer, and tokens that stay
_FACTORS = ["subject", "action", "item", "colour", "place"]
_POCKET = "pocket_tower"  # the vision tower of pocket models
_BATCH = 16


def quiz(dataset: str, n: int, split: str, seed: int = 0) -> list[Sample]:
    """Draw pictures with two questions each: whether something is there, and one of another kind.

    Parameters
    ----------
    dataset : str
        The name of the dataset, or a folder.
    n : int
        How many pictures.
    split : str
        The split they are drawn from.
    seed : int, default 0
        The seed of the draw.

    Returns
    -------
    list of Sample
        Those that have a question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> [len(sample.questions) for sample in dropping.quiz("scenes", 2, "test")]
    [2, 2]
    """
    samples = two_questions(load_samples(dataset, n, split, seed))
    return [sample for sample in samples if sample.questions]


def image_tokens(vlm: VLM, sample: Sample) -> int:
    """Count the image tokens of a picture.

    Parameters
    ----------
    vlm : VLM
        The model.
    sample : Sample
        The picture.

    Returns
    -------
    int
        How many positions of the prompt are the picture's.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> dropping.image_tokens(vlm, samples[0])
    16
    """
    return int(vlm.batch([sample.image], [PROMPTS["image"]]).mask("image").sum())


def settings(
    vlm: VLM, n_tokens: int, depths: Sequence[float], shares: Sequence[float]
) -> list[Setting]:
    """List the layers and numbers of tokens to try.

    Parameters
    ----------
    vlm : VLM
        The model.
    n_tokens : int
        The image tokens of a picture.
    depths : sequence of float
        Where tokens are left out, as shares of the depth.
    shares : sequence of float
        Which shares of the tokens stay.

    Returns
    -------
    list of (int, int)
        The layer, 1 to L - 1, and how many tokens stay, 1 or more; each once.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> dropping.settings(vlm, 16, (0.07, 0.5), (0.5, 0.01))
    [(2, 8), (2, 1), (15, 8), (15, 1)]
    """
    pairs = []
    for depth in depths:
        layer = min(max(vlm.layer_at(depth), 1), vlm.n_layers - 1)
        for share in shares:
            pairs.append((layer, max(1, round(share * n_tokens))))
    return list(dict.fromkeys(pairs))


@contextmanager
def smaller_pictures(vlm: VLM, side: int = 3) -> Iterator[None]:
    """Show a pocket model smaller pictures: fewer patches of the same number of pixels.

    A picture of half the side has a quarter of the tokens, each of which covers four times as much
    of the scene. The tower has less to do as well. By default the side is three quarters of what it
    was, and 9 tokens are left of 16.

    Parameters
    ----------
    vlm : VLM
        A pocket model.
    side : int, default 3
        Image tokens a side; those of whole pictures are 4.

    Returns
    -------
    context manager
        Pictures are smaller inside ``with``. Batches have to be made there too.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> with dropping.smaller_pictures(vlm):
    ...     dropping.image_tokens(vlm, samples[0])
    9
    """
    config = vlm.model.config.vision_config
    require(
        config.model_type == _POCKET and 1 <= side <= config.grid,
        f"{side} tokens a side of a {config.model_type}",
        "take a pocket model, and 1 to 4 tokens a side",
    )
    processor = vlm.processor.image_processor
    tower = anatomy.tower(vlm.model).config
    before, grid = processor.size, tower.grid
    pixels = side * config.patch_size
    processor.size = {"height": pixels, "width": pixels}
    tower.grid = side
    try:
        yield
    finally:
        processor.size, tower.grid = before, grid


def baselines(vlm: VLM, n_tokens: int) -> dict[str, Context]:
    """List ways to give the decoder fewer image tokens from its first block on.

    Parameters
    ----------
    vlm : VLM
        The model.
    n_tokens : int
        The image tokens of a picture.

    Returns
    -------
    dict of str to callable
        By name, what gives a context manager: tokens pooled two and two, and pictures of three
        quarters of the side. A model that allows none of them gets half of its tokens, drawn at
        random, behind its first block.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> list(dropping.baselines(vlm, 16))
    ['pooled by two', 'smaller picture']
    """
    ways: dict[str, Context] = {
        "pooled by two": partial(pool_tokens, vlm, (1, 2)),
    }
    try:
        with pool_tokens(vlm, (1, 2)):
            pass
    except InterventionError:
        return {"random from block 2": partial(drop_tokens, vlm, 1, n_tokens // 2, "random")}
    if vlm.model.config.vision_config.model_type == _POCKET:
        ways["smaller picture"] = partial(smaller_pictures, vlm)
    return ways


@torch.no_grad()
def accuracy(
    vlm: VLM, samples: Sequence[Sample], context: Context = nullcontext
) -> Float[np.ndarray, "n"]:
    """Score the first tokens of answers to all questions, which costs one pass and no decoding.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with questions.
    context : callable, default contextlib.nullcontext
        Gives the context manager under which the model answers.

    Returns
    -------
    array (n,)
        For each picture the share of its questions whose answer begins with the right token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> dropping.accuracy(vlm, dropping.quiz("scenes", 2, "test")).tolist()
    [1.0, 1.0]
    """
    rows = [(k, question) for k, sample in enumerate(samples) for question in sample.questions]
    correct = []
    with context():
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            images = [samples[k].image for k, _ in part]
            batch = vlm.batch(images, [question.text for _, question in part])
            first = vlm.forward(batch, logits=False).logits[:, -1].argmax(dim=-1).tolist()
            for token, (_, question) in zip(first, part, strict=True):
                correct.append(token in _beginnings(vlm, question.answer))
    pictures = [k for k, _ in rows]
    return pd.Series(correct, dtype=float).groupby(pictures).mean().to_numpy()


def _beginnings(vlm: VLM, answer: str) -> set[int]:
    """The tokens with which an answer may begin."""
    forms = (answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}")
    return {vlm.tokenizer(form, add_special_tokens=False).input_ids[0] for form in forms}


def captions_and_scores(
    vlm: VLM, samples: Sequence[Sample], context: Context = nullcontext, n_tokens: int = 22
) -> tuple[list[str], Float[np.ndarray, "n"]]:
    """Let a model describe pictures, and score the share of known facts that captions name.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The pictures.
    context : callable, default contextlib.nullcontext
        Gives the context manager under which the model writes.
    n_tokens : int, default 22
        How many tokens it may write.

    Returns
    -------
    captions : list of str
        One for each picture.
    scores : array (n,)
        The share of its facts; NaN where none are known.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> captions, scores = dropping.captions_and_scores(vlm, samples[:2])
    >>> scores.tolist()
    [1.0, 1.0]
    """
    with context():
        captions = describe(vlm, samples, n_tokens, batch_size=_BATCH)
    truths = [sample.truth for sample in samples]
    factors = [name for name in _FACTORS if any(truth.get(name) is not None for truth in truths)]
    if not factors:
        return captions, np.full(len(samples), np.nan)
    named = caption_attributes(captions, truths, factors)
    return captions, named.astype("Float64").mean(axis=1).to_numpy(float, na_value=np.nan)


def operations(
    vlm: VLM, samples: Sequence[Sample], ways: Mapping[Hashable, Context]
) -> dict[Hashable, float]:
    """Count the operations until the first logits, as shares of those of the plain model.

    Counted is all that runs: tower, connector, decoder and unembedding of one question.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        The first of them is shown.
    ways : mapping of hashable to callable
        What gives a context manager, by name.

    Returns
    -------
    dict of hashable to float
        Shares by name.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> dropping.operations(vlm, samples, {"plain": nullcontext})
    {'plain': 1.0}
    """
    counts = {}
    for name, context in {None: nullcontext, **ways}.items():
        with _prefill(vlm, samples[:1], context) as call:
            counts[name] = int(count_flops(call)["flops"].iloc[-1])
    whole = counts.pop(None)
    return {name: count / whole for name, count in counts.items()}


def best_within(
    scores: Mapping[Setting, Float[np.ndarray, "n"]],
    costs: Mapping[Setting, float],
    limit: float,
) -> Setting:
    """Choose the setting with the highest mean score among those that cost no more than a limit.

    Parameters
    ----------
    scores : mapping of (layer, tokens) to array (n,)
        Scores on validation.
    costs : mapping of (layer, tokens) to float
        What each costs.
    limit : float
        The cost of a baseline; a hundredth more counts as equal.

    Returns
    -------
    (int, int)
        The setting; the cheapest one where all cost more.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> scores = {(2, 8): np.ones(3), (2, 1): np.zeros(3)}
    >>> dropping.best_within(scores, {(2, 8): 0.8, (2, 1): 0.7}, limit=0.75)
    (2, 1)
    """
    allowed = [setting for setting in scores if costs[setting] <= limit * 1.01]
    if not allowed:
        return min(scores, key=lambda setting: costs[setting])
    return max(allowed, key=lambda setting: (scores[setting].mean(), -costs[setting]))


def gain(
    scores: Float[np.ndarray, "n"], others: Float[np.ndarray, "n"], seed: int = 0
) -> Estimate | None:
    """Estimate a mean difference of scores over the same pictures, with its interval.

    Parameters
    ----------
    scores, others : array (n,)
        The scores of two ways; pictures without a score are left out.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate or None
        The first minus the second; None where no picture has a score.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> dropping.gain(np.ones(4), np.zeros(4)).value
    1.0
    """
    differences = (scores - others)[~np.isnan(scores - others)]
    return bootstrap(differences, seed=seed) if len(differences) else None


def record_gains(
    experiment: Experiment,
    task: str,
    scores: Mapping[str, Float[np.ndarray, "n"]],
    seed: int = 0,
) -> None:
    """Record DROP-1: tokens dropped by attention against each baseline, at its operations.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    task : str
        "answers" or "captions".
    scores : mapping of str to array (n,)
        For each baseline its scores under its name, those of tokens dropped at its operations under
        "as NAME", and those of random tokens in the same place under "random as NAME".
    seed : int, default 0
        Of the bootstrap.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, dropping
    >>> experiment = Experiment("dropping", "pocket-llava", "scenes")
    >>> half, none = np.full(4, 0.5), np.zeros(4)
    >>> dropping.record_gains(experiment, "answers", {"pooled": none, "as pooled": half})
    >>> experiment.verdict("DROP-1", "answers, at the cost of pooled")
    'confirmed'
    """
    for name in [name for name in scores if f"as {name}" in scores]:
        dropped = scores[f"as {name}"]
        variant = f"{task}, at the cost of {name}"
        estimate = gain(dropped, scores[name], seed)
        if estimate is not None:
            experiment.record("DROP-1", estimate, name, variant, "validation")
        if f"random as {name}" in scores:
            estimate = gain(dropped, scores[f"random as {name}"], seed)
            if estimate is not None:
                variant = f"{variant}, against random tokens"
                experiment.record("DROP-1", estimate, "random tokens", variant, "validation")


@contextmanager
def _prefill(vlm: VLM, samples: Sequence[Sample], context: Context) -> Iterator[Callable]:
    """Prepare a pass over the questions of samples, and give the function that runs it."""
    with context():
        images = [sample.image for sample in samples]
        batch = vlm.batch(images, [sample.questions[0].text for sample in samples])
        yield lambda: vlm.forward(batch, logits=False, use_cache=True)


@contextmanager
def _decode(
    vlm: VLM, samples: Sequence[Sample], context: Context, steps: int
) -> Iterator[Callable]:
    """Prepare a cache, and give the function that runs decode steps on it."""
    with context():
        images = [sample.image for sample in samples]
        batch = vlm.batch(images, [sample.questions[0].text for sample in samples])
        output = vlm.forward(batch, logits=False, use_cache=True)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        mask = batch["attention_mask"]
        turned = getattr(vlm.model.model, "rope_deltas", None)

        @torch.no_grad()
        def run() -> None:
            cache = output.past_key_values
            with vlm.run(batch):
                for step in range(steps):
                    longer = torch.nn.functional.pad(mask, (0, step + 1), value=1)
                    places = longer.sum(dim=1, keepdim=True) - 1
                    if turned is not None:  # M-RoPE: a picture takes fewer numbers than tokens
                        places = (places + turned).expand(3, -1, -1)
                    inputs = {"input_ids": token, "attention_mask": longer}
                    vlm.model(**inputs, position_ids=places, past_key_values=cache, use_cache=True)
            cache.crop(-steps)

        yield run


def prefills(
    vlm: VLM, samples: Sequence[Sample], ways: Mapping[str, Context]
) -> dict[str, Callable[[], AbstractContextManager]]:
    """Prepare prefills for ``compare_times(..., prepared=True)``.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with questions, that run together.
    ways : mapping of str to callable
        What gives a context manager, by name.

    Returns
    -------
    dict of str to callable
        Each prepares one pass up to the first logits, tower and connector among it.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> list(dropping.prefills(vlm, samples[:1], {"plain": nullcontext}))
    ['plain']
    """
    return {name: partial(_prefill, vlm, samples, context) for name, context in ways.items()}


def decodes(
    vlm: VLM, samples: Sequence[Sample], ways: Mapping[str, Context], steps: int = 6
) -> dict[str, Callable[[], AbstractContextManager]]:
    """Prepare decode steps for ``compare_times(..., prepared=True)``.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with questions, that run together.
    ways : mapping of str to callable
        What gives a context manager, by name.
    steps : int, default 6
        How many tokens are decoded after each prompt.

    Returns
    -------
    dict of str to callable
        Each prepares a cache, and decodes on it.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> list(dropping.decodes(vlm, samples[:1], {"plain": nullcontext}))
    ['plain']
    """
    return {name: partial(_decode, vlm, samples, context, steps) for name, context in ways.items()}


@torch.no_grad()
def kept_cells(
    vlm: VLM, samples: Sequence[Sample], layer: int, keep: int, by: str = "attention"
) -> Float[np.ndarray, "rows columns"]:
    """Count how often each cell of the pictures stays.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures with questions.
    layer : int
        The layer behind which tokens are left out.
    keep : int
        How many stay.
    by : str, default "attention"
        How they are chosen, as in ``drop_tokens``.

    Returns
    -------
    array (rows, columns)
        The share of pictures in which the cell stays, on the grid of the image tokens (one row
        where they are no square).

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import dropping
    >>> shares = dropping.kept_cells(vlm, dropping.quiz("scenes", 2, "test"), 2, 4)
    >>> shares.shape, float(shares.sum())
    ((4, 4), 4.0)
    """
    with drop_tokens(vlm, layer, keep, by) as kept, _prefill(vlm, samples, nullcontext) as call:
        call()
    batch = vlm.batch(
        [sample.image for sample in samples], [sample.questions[0].text for sample in samples]
    )
    stays = [row[mask] for row, mask in zip(kept.mask, batch.mask("image").cpu(), strict=True)]
    n = min(map(len, stays))
    shares = torch.stack([row[:n] for row in stays]).double().mean(dim=0).numpy()
    side = int(n**0.5)
    return shares.reshape(side, side) if side * side == n else shares[None]
