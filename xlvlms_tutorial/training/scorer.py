"""Train the pocket scorer's heads to tell which texts are true of which scenes.

With frozen features of both, computed once. The loss is CLIP's (Radford et al., 2021), symmetric
cross-entropy of scaled cosines, with every true pair of a batch as positive: two scenes of a batch
may both be what a text says, and the world knows it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from time import perf_counter

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.io import save_tensors, write_json
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.pocket import build, world
from xlvlms_tutorial.pocket.scorer import ENCODER, RUN, Heads, Reader
from xlvlms_tutorial.training import connector_runs, scorer_texts


@dataclass(frozen=True)
class ScorerRecipe:
    """How the scorer is trained: everything that its weights depend on.

    The defaults are those of the shipped scorer.

    Parameters
    ----------
    steps : int, default 800
        Training steps.
    batch_size : int, default 256
        Scenes a step.
    foreign : int, default 96
        Texts of each batch that are spoilt lists and words that are not of the world.
    learning_rate : float, default 1e-3
        The highest learning rate.
    weight_decay : float, default 0.05
        Weight decay of AdamW.
    warmup : int, default 50
        Steps of warm-up.
    largest_scale : float, default 30.0
        The scale of the cosines at most.
    seed : int, default 0
        Seed of the texts and of the training.
    n_scenes : int, default 6000
        Training scenes.

    Examples
    --------
    >>> from xlvlms_tutorial.training.scorer import ScorerRecipe
    >>> ScorerRecipe(steps=100).steps, ScorerRecipe().batch_size
    (100, 256)
    """

    steps: int = 800
    batch_size: int = 256
    foreign: int = 96
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    largest_scale: float = 30.0
    seed: int = 0
    n_scenes: int = 6000


class States:
    """States of the words of many texts, float16, each text read once.

    Taken out again as padded batches.
    """

    def __init__(self, reader: Reader, texts: Sequence[str], size: int = 100) -> None:
        ids = reader.tokenizer(list(texts), truncation=True, max_length=256).input_ids
        lengths = list(map(len, ids))
        order = np.argsort(lengths, kind="stable")
        stored = [torch.empty(0)] * len(texts)
        # of like length, so that little is padded
        starts = range(0, len(texts), size)
        for start in tqdm(starts, desc="read texts", unit="batch"):
            rows = order[start : start + size]
            with torch.no_grad():
                states, words = reader([texts[row] for row in rows])
            for row, state, is_word in zip(rows, states.half(), words, strict=True):
                stored[row] = state[is_word]
        self.of = dict(zip(texts, stored, strict=True))

    def batch(self, texts: Sequence[str]) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """Return states padded on the right, float32, and where they are words."""
        rows = [self.of[text] for text in texts]
        lengths = torch.tensor(list(map(len, rows)))
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
        words = torch.arange(int(lengths.max())) < lengths[:, None]
        return states, words


def contrastive(
    pictures: Float[Tensor, "n e"],
    texts: Float[Tensor, "m e"],
    scale: Float[Tensor, ""],
    true: Bool[Tensor, "n m"],
) -> Float[Tensor, ""]:
    r"""Compute the mean of the two cross-entropies of the scaled cosines.

    The true pairs of a row (a column) are equally likely targets.

    .. math::

        -\frac{1}{|P(i)|} \sum_{j \in P(i)} \log \frac{\exp(s\, v_i^\top
        t_j)}{\sum_{j'} \exp(s\, v_i^\top t_{j'})}

    for pictures over texts and likewise for texts over pictures. A text that is true of no picture
    is only there to be told apart.

    Parameters
    ----------
    pictures : Tensor of shape (n, e)
        Embeddings of pictures, of length 1.
    texts : Tensor of shape (m, e)
        Embeddings of texts, of length 1.
    scale : Tensor
        The scale of the cosines, a scalar.
    true : Tensor of shape (n, m)
        Whether each text is true of each picture.

    Returns
    -------
    Tensor
        The loss in nats, a scalar.
    """
    logits = scale * pictures @ texts.T

    def one_way(scores: Tensor, positive: Tensor) -> Tensor:
        has_positive = positive.any(dim=1)
        targets = positive[has_positive].float()
        log_shares = scores[has_positive].log_softmax(dim=1)
        losses = -(log_shares * targets).sum(dim=1)
        return losses.div(targets.sum(dim=1)).mean()

    of_pictures = one_way(logits, true)
    of_texts = one_way(logits.T, true.T)
    return (of_pictures + of_texts) / 2


def train_scorer(recipe: ScorerRecipe | None = None) -> dict:
    """Train the heads of the scorer, ship them in float16 and write the record beside them.

    Use it to make the shipped scorer again; pictures and texts are encoded once, by frozen models.

    Parameters
    ----------
    recipe : ScorerRecipe, optional
        How it is trained; by default as the shipped scorer.

    Returns
    -------
    dict
        The record: recipe, data, losses, seconds and versions.

    Examples
    --------
    >>> from xlvlms_tutorial.training.scorer import ScorerRecipe, train_scorer
    >>> record = train_scorer(ScorerRecipe(steps=100))  # doctest: +SKIP
    """
    recipe = recipe or ScorerRecipe()
    start = perf_counter()
    scenes = world.scenes(recipe.n_scenes)
    tower = connector_runs.calibrated_tower(ENCODER).fuse()
    tokens = connector_runs.visual_tokens(tower, ENCODER, "image", scenes)
    tokens = torch.from_numpy(np.array(tokens))
    true_texts, false_texts = _texts(scenes, recipe.seed)
    texts = [text.text for text in (*chain.from_iterable(true_texts), *false_texts)]
    states = States(Reader(), list(dict.fromkeys(texts)))
    prepared = perf_counter()
    torch.manual_seed(recipe.seed)
    heads = Heads()
    bits = scorer_texts.scene_bits(scenes)
    losses = _fit(heads, recipe, tokens, bits, true_texts, false_texts, states)
    folder = build.WEIGHTS / RUN
    weights = {name: weight.detach().half() for name, weight in heads.state_dict().items()}
    save_tensors(folder / f"step-{recipe.steps:04d}.safetensors", weights)
    trained = perf_counter()
    seconds = {"features": round(prepared - start), "steps": round(trained - prepared)}
    scale = round(heads.log_scale.exp().item(), 2)
    return _record(recipe, losses, seconds, {"texts": len(states.of), "scale": scale})


def _texts(scenes: Sequence[world.Scene], seed: int) -> tuple[list[tuple], list]:
    """Draw three texts that are true of each scene, and for every other scene one that is not."""
    rng = np.random.default_rng([seed, 1])
    true_texts = []
    for scene in scenes:
        caption = scorer_texts.caption(scene, rng)
        lists = scorer_texts.word_list(scene, rng), scorer_texts.word_list(scene, rng)
        true_texts.append((caption, *lists))
    false_texts = []
    for k, scene in enumerate(scenes[::2]):
        make = scorer_texts.foreign_list if k % 2 else scorer_texts.spoilt_list
        false_texts.append(make(scene, rng))
    return true_texts, false_texts


def _fit(
    heads: Heads,
    recipe: ScorerRecipe,
    tokens: Tensor,
    bits: Int[np.ndarray, "n f"],
    true_texts: list,
    false_texts: list,
    states: States,
) -> list[float]:
    """Train, and give the loss of each step."""

    def loss(step: int) -> Float[Tensor, ""]:
        rng = np.random.default_rng([recipe.seed, 2, step])
        rows = rng.choice(len(true_texts), recipe.batch_size, replace=False)
        batch = [true_texts[row][rng.integers(3)] for row in rows]
        foreign = rng.choice(len(false_texts), recipe.foreign, replace=False)
        batch += [false_texts[k] for k in foreign]
        claims = np.array([text.claim for text in batch])
        true = scorer_texts.true_of(claims, bits[rows])
        pictures = heads.picture(tokens[rows].float())
        word_states, words = states.batch([text.text for text in batch])
        texts = heads.text(word_states, words)
        return contrastive(pictures, texts, heads.log_scale.exp(), torch.from_numpy(true))

    def rate(step: int) -> float:
        return recipe.learning_rate * warmup_cosine(step, recipe.steps, recipe.warmup)

    def bound_scale(done: int) -> None:
        heads.log_scale.detach().clamp_(max=math.log(recipe.largest_scale))

    history = optimise(
        dict(heads.named_parameters()),
        loss,
        recipe.steps,
        rate,
        weight_decay=recipe.weight_decay,
        at_step=bound_scale,
        desc="train",
    )
    return [round(row["loss"], 4) for row in history]


def _record(recipe: ScorerRecipe, losses: list[float], seconds: dict, measured: dict) -> dict:
    """Write the record of a training beside the weights."""
    data = {"split": "train", "seed": 0, "n_scenes": recipe.n_scenes, "texts": measured["texts"]}
    record = {"run": RUN, "recipe": asdict(recipe), "encoder": ENCODER, "data": data}
    record["loss"] = connector_runs.thinned(losses)
    record["scale"] = measured["scale"]
    record["seconds"] = seconds
    record["seconds_total"] = sum(seconds.values())
    record["versions"] = connector_runs.versions(torch, transformers)
    write_json(build.WEIGHTS / RUN / "training.json", record, indent=1)
    return record
