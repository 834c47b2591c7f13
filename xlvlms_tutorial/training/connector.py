"""Train a connector between a frozen tower and a frozen language model.

On captions and questions together. The tower's tokens are computed once. One training row holds a
picture once and several texts about it, each in a branch of its own: branches see the picture and
themselves, not each other (a block mask), so a row costs little more than its words. Checkpoints
resume a killed run; the record beside the weights says how they were made.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.pocket.languages import LANGUAGES, LanguageModel

SAVE_EVERY = 50  # steps between checkpoints that resume

Dialogue = Sequence[tuple[str, str]]  # what is asked about one picture, and the answers


@dataclass(frozen=True)
class Mix:
    """How many texts of each kind are asked about one picture, up to a step.

    Captions, presence questions and other questions.
    """

    until: int
    captions: int
    presence: int
    others: int


@dataclass(frozen=True)
class Recipe:
    """How a run is made; everything that its weights depend on besides the data.

    The frozen language model cannot tell "yes" from "no" even when the words are given; mixed with
    captions from the start, presence stays at chance. Asked alone for a while, once the pictures
    speak the model's language, it is learnt in fifty steps and kept. After ``restart`` the rate
    rises once more, to two fifths, for captions, and so it does at each step of ``again``.
    """

    steps: int = 1350
    restart: int = 1200
    again: tuple[int, ...] = ()
    batch_size: int = 12
    learning_rate: float = 2e-3
    warmup: int = 50
    seed: int = 0
    n_scenes: int = 10_000
    mixes: tuple[Mix, ...] = (
        Mix(600, 1, 2, 2),
        Mix(720, 0, 5, 0),
        Mix(1200, 1, 3, 2),
        Mix(1350, 3, 1, 1),
    )
    save_at: tuple[int, ...] = (0, 100, 250, 450, 800)

    def mix(self, step: int) -> Mix:
        """Return the mix of texts at a step."""
        return next(mix for mix in self.mixes if step < mix.until)


@dataclass(frozen=True)
class Packed:
    """Rows ready for the language model: ``labels`` are -100 where nothing is predicted.

    ``mask`` is True where attention may look. ``weights`` give each text, long or short, the same
    say: one over its number of predicted tokens, 0 elsewhere.
    """

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    weights: Float[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b 1 t t"]


def pack(
    dialogues: Sequence[Dialogue],
    tokenizer: object,
    image_id: int,
    n_image: int,
    language: LanguageModel = LANGUAGES["smollm2"],
) -> Packed:
    """Pack each picture with its texts into one row.

    Picture first, then one branch a text, each at the positions it would have by itself.

    Parameters
    ----------
    dialogues : sequence of sequence of (str, str)
        Prompts and answers about each picture.
    tokenizer : PreTrainedTokenizer
        The tokenizer of the language model.
    image_id : int
        The token id of the picture's placeholder.
    n_image : int
        Visual tokens of a picture.
    language : LanguageModel, optional
        The form of its prompts; by default that of SmolLM2.

    Returns
    -------
    Packed
        The rows, padded on the right.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    head = encode(language.head) + [image_id] * n_image
    n_head = len(head)
    rows = []
    for dialogue in dialogues:
        ids = list(head)
        labels = [-100] * n_head
        weights = [0.0] * n_head
        positions = list(range(n_head))
        branch = [0] * n_head
        for number, (prompt, answer) in enumerate(dialogue, start=1):
            question = encode(language.question.format(prompt))
            reply = encode(language.answer.format(answer))
            n_question = len(question)
            n_reply = len(reply)
            n_both = n_question + n_reply
            ids += question + reply
            labels += [-100] * n_question + reply
            weights += [0.0] * n_question + [1 / n_reply] * n_reply
            positions += range(n_head, n_head + n_both)
            branch += [number] * n_both
        rows.append((ids, labels, weights, positions, branch))
    width = max(len(ids) for ids, *_ in rows)
    fills = (image_id, -100, 0.0, 0, -1)
    padded = []
    for k, fill in enumerate(fills):
        column = [row[k] + [fill] * (width - len(row[k])) for row in rows]
        padded.append(torch.tensor(column))
    ids, labels, weights, positions, branch = padded
    same_branch = branch[:, :, None] == branch[:, None, :]
    in_head = branch[:, None, :] == 0
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    mask = (same_branch | in_head) & earlier
    return Packed(ids, labels, weights, positions, mask[:, None])


def loss_of(model: nn.Module, tokens: Float[Tensor, "b n d"], packed: Packed) -> Float[Tensor, ""]:
    """Compute the cross-entropy of the answers, given the tower's tokens of each picture.

    Averaged over the tokens of a text and then over texts, in nats.

    Parameters
    ----------
    model : nn.Module
        The LLaVA model.
    tokens : Tensor of shape (b, n, d)
        The tower's tokens of each picture.
    packed : Packed
        The rows of texts, from :func:`pack`.

    Returns
    -------
    Tensor
        The loss, a scalar.
    """
    device = model.device
    ids = packed.input_ids.to(device)
    projector = model.model.multi_modal_projector
    language = model.model.language_model
    embeddings = language.get_input_embeddings()(ids).clone()
    dtype = next(projector.parameters()).dtype
    visual = projector(tokens.to(device, dtype))
    first = int((ids[0] != model.config.image_token_id).int().argmin())
    embeddings[:, first : first + visual.shape[1]] = visual.to(embeddings.dtype)
    states = language(
        inputs_embeds=embeddings,
        attention_mask=additive_mask(packed.mask, embeddings),
        position_ids=packed.position_ids.to(device),
        use_cache=False,
    ).last_hidden_state
    targets = packed.labels[:, 1:].to(device)
    # the unembedding is a fifth of the work: only where something is predicted
    predicted = targets != -100
    logits = model.lm_head(states[:, :-1][predicted]).float()
    losses = nn.functional.cross_entropy(logits, targets[predicted], reduction="none")
    weights = packed.weights[:, 1:].to(device)[predicted]
    return (weights * losses).sum() / weights.sum()


def additive_mask(mask: Bool[Tensor, "b 1 t t"], like: Tensor) -> Float[Tensor, "b 1 t t"]:
    """Write the mask as what is added to attention scores.

    transformers' own attention, in Python, knows no other kind.
    """
    added = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    masked_out = ~mask.to(like.device)
    return added.masked_fill_(masked_out, torch.finfo(like.dtype).min)


@torch.no_grad()
def encode_pictures(tower: nn.Module, pictures: Iterable[Tensor], n: int, file: Path) -> np.ndarray:
    """Compute the tower's tokens of pictures once, and keep them in a file.

    A killed run starts again, a finished file is opened.

    Parameters
    ----------
    tower : nn.Module
        The vision tower.
    pictures : iterable of Tensor
        Batches of pixel values, in order.
    n : int
        Number of pictures.
    file : pathlib.Path
        The file.

    Returns
    -------
    numpy.ndarray of shape (n, tokens, width)
        The tokens in float16, read from the disk as they are used.
    """
    if not file.exists():
        part = file.with_suffix(".part.npy")
        done = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=n, desc="encode pictures", unit="picture") as bar:
            store = None
            for pixels in pictures:
                tokens = tower(pixels).last_hidden_state.half().numpy()
                if store is None:
                    store = np.lib.format.open_memmap(
                        part, mode="w+", dtype=np.float16, shape=(n, *tokens.shape[1:])
                    )
                store[done : done + len(tokens)] = tokens
                done += len(tokens)
                bar.update(len(tokens))
        os.replace(part, file)
    return np.load(file, mmap_mode="r")


def scale_projector(projector: nn.Module, tokens: Float[Tensor, "b n d"], norm: float) -> None:
    """Scale the projector's last layer to the norm of the word embeddings.

    Its outputs then have this norm on average.

    Parameters
    ----------
    projector : nn.Module
        The projector, changed in place.
    tokens : Tensor of shape (b, n, d)
        The tower's tokens of some pictures.
    norm : float
        The norm that outputs should have on average.
    """
    with torch.no_grad():
        ratio = norm / projector(tokens.float()).norm(dim=-1).mean()
        projector.linear_2.weight.mul_(ratio)
        projector.linear_2.bias.mul_(ratio)


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batch: Callable[[np.random.Generator, Mix], tuple[Tensor, Packed]],
    recipe: Recipe,
    folder: Path,
    export: Callable[[str], None],
    factors: Mapping[str, float] | None = None,
) -> dict:
    """Train parameters of a model whose rest stays frozen, and export them at the steps to keep.

    Parameters
    ----------
    model : nn.Module
        The LLaVA model.
    parameters : dict of str to nn.Parameter
        What is trained.
    batch : callable
        It draws the tower's tokens and the packed texts of one step, given a generator and a mix.
    recipe : Recipe
        How the run is made.
    folder : pathlib.Path
        The folder of checkpoints; a killed run resumes from it.
    export : callable
        It is called with "step-NNNN" at the steps to keep.
    factors : mapping of str to float, optional
        How many times the rate some parameters get, by name.

    Returns
    -------
    dict
        "recipe", and "history" with the loss and the seconds of each step.
    """

    def export_some(done: int) -> None:
        if done in recipe.save_at or done == recipe.steps:
            export(f"step-{done:04d}")

    def loss(step: int) -> Float[Tensor, ""]:
        rng = np.random.default_rng([recipe.seed, step])
        tokens, packed = batch(rng, recipe.mix(step))
        return loss_of(model, tokens, packed)

    def rate(step: int) -> float:
        return recipe.learning_rate * _cosine(step, recipe)

    history = optimise(
        parameters,
        loss,
        recipe.steps,
        rate,
        at_step=export_some,
        folder=folder,
        keep_at={*range(SAVE_EVERY, recipe.steps, SAVE_EVERY), recipe.steps},
        factors=factors,
        desc="train",
    )
    for row in history:
        row["loss"] = round(row["loss"], 4)
        row["seconds"] = round(row["seconds"], 2)
    return {"recipe": asdict(recipe), "history": history}


def _cosine(step: int, recipe: Recipe) -> float:
    # warm restarts, at two fifths of the rate
    for start, end in pairwise((recipe.restart, *recipe.again, recipe.steps)):
        if start <= step < end:
            return 0.4 * warmup_cosine(step - start, end - start)
    return warmup_cosine(step, recipe.restart, recipe.warmup)
