"""Train the adapter "pocket-names": to name what only demonstrations name.

``python -m xlvlms_tutorial.training.names STEPS FOLDER`` makes it again, with the language model in
bfloat16. Connector and language model stay frozen; a LoRA beside the attention of all blocks
learns. Each step has conversations in which demonstrations give made-up words to different
subjects, and further pictures of these subjects follow; only the latter's names are learned. Others
are of captions and questions about several pictures, so that these are not forgotten.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.data import load_samples
from xlvlms_tutorial.io import write_json
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.models.finetune import add_lora, save_adapter
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.training.connector_runs import versions
from xlvlms_tutorial.training.interleaved import NAMES, QUESTION

RUN = "pocket-names"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS = ("caption", "presence", "colour", "place", "subject")  # the last gives captions too
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_IGNORED = -100  # a label that is not learned


class Part(NamedTuple):
    """One turn of a conversation: a picture by its row, and whether its answer is learned."""

    row: int
    question: str
    answer: str
    learned: bool


@dataclass(frozen=True)
class NamesRecipe:
    """How the adapter is made.

    Parameters
    ----------
    steps : int
        Steps of the schedule: a cosine falls to 0 at its end.
    stop : int
        After how many steps the run ends.
    scenes : int
        Pictures of the training split.
    naming, others : int
        Conversations of a step: with names, and with captions or questions.
    shots : tuple of int
        Numbers of demonstrations; each step draws one.
    queries : int
        Further pictures in a conversation with names.
    learning_rate : float
        The largest.
    rank : int
        Of the LoRA.
    seed : int
        Of everything that is drawn.
    """

    steps: int = 200
    stop: int = 200
    scenes: int = 600
    naming: int = 6
    others: int = 3
    shots: tuple[int, ...] = (2, 3, 4)
    queries: int = 2
    learning_rate: float = 1.5e-3
    rank: int = 8
    seed: int = 0


def made_up(generator: np.random.Generator) -> str:
    """Draw a word of three or four letters that is none of the names of tests and pages."""
    while True:
        letters = (_CONSONANTS, _VOWELS, _CONSONANTS)
        if generator.random() >= 0.5:
            letters = (*letters, _VOWELS)
        word = "".join(generator.choice(list(group)) for group in letters)
        if word not in NAMES:
            return word


def naming_turns(
    groups: Sequence[Sequence[int]], shots: int, queries: int, generator: np.random.Generator
) -> list[Part]:
    """Draw a conversation in which demonstrations name subjects, and pictures of them follow.

    Parameters
    ----------
    groups : sequence of sequence of int
        Rows of the pictures of each subject, two or more.
    shots, queries : int
        Demonstrations, and what follows.
    generator : numpy.random.Generator
        What draws.

    Returns
    -------
    list of Part
        The turns; no query shows the picture of its demonstration.
    """
    kinds = generator.permutation(len(groups))[:shots]
    words: list[str] = []
    while len(words) < shots:
        word = made_up(generator)
        if word not in words:
            words.append(word)
    turns = []
    for group, word in zip(kinds, words, strict=True):
        turns.append(Part(int(generator.choice(groups[group])), QUESTION, word, False))
    for _ in range(queries):
        position = int(generator.integers(shots))
        rows = groups[kinds[position]]
        row = int(generator.choice(rows))
        while row == turns[position].row:
            row = int(generator.choice(rows))
        turns.append(Part(row, QUESTION, words[position], True))
    return turns


def other_turns(samples: Sequence[Sample], generator: np.random.Generator) -> list[Part]:
    """Draw a conversation of one to four captions, or questions of one type."""
    kind = str(generator.choice(list(KINDS)))
    length = int(generator.integers(1, 5))
    turns: list[Part] = []
    while len(turns) < length:
        row = int(generator.integers(len(samples)))
        sample = samples[row]
        if kind in ("caption", "subject"):
            caption = sample.captions[int(generator.integers(len(sample.captions)))]
            turns.append(Part(row, PROMPTS["image"], caption, True))
            continue
        questions = [question for question in sample.questions if question.type == kind]
        if questions:
            question = questions[int(generator.integers(len(questions)))]
            turns.append(Part(row, question.text, question.answer, True))
    return turns


@torch.no_grad()
def image_states(vlm: VLM, samples: Sequence[Sample], size: int = 20) -> Float[Tensor, "n t d"]:
    """Return what the frozen connector makes of each picture, once for the whole run.

    Parameters
    ----------
    vlm : VLM
        A model of one picture a text.
    samples : sequence of Sample
        The pictures.
    size : int, default 20
        Pictures that are encoded together.

    Returns
    -------
    Tensor (n, t, d)
        t image tokens a picture, of the language model's width d.
    """
    parts = []
    for start in range(0, len(samples), size):
        pictures = [sample.image for sample in samples[start : start + size]]
        batch = vlm.batch([[picture] for picture in pictures], [""] * len(pictures))
        output = vlm.model.model.get_image_features(
            pixel_values=batch["pixel_values"], return_dict=True
        )
        parts += [states.reshape(-1, states.shape[-1]) for states in output.pooler_output]
    return torch.stack(parts)


def conversation_loss(
    vlm: VLM, states: Float[Tensor, "n t d"], conversations: Sequence[Sequence[Part]]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the answers to learn.

    Parameters
    ----------
    vlm : VLM
        The model, whose chat template is ChatML.
    states : Tensor (n, t, d)
        Image tokens, as :func:`image_states` returns them.
    conversations : sequence of sequences of Part
        The turns of each text; a turn's ``row`` is that of its picture in ``states``.

    Returns
    -------
    Tensor ()
        Nats a token, over the tokens of the answers that are learned.
    """
    tokenizer, config = vlm.tokenizer, vlm.model.config
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    rows, labels, pictures = [], [], []
    for turns in conversations:
        ids: list[int] = []
        learned: list[int] = []
        for turn in turns:
            before = encode("<|im_start|>user\n") + [config.image_token_id] * states.shape[1]
            before += encode(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")
            answer = encode(f"{turn.answer}<|im_end|>")
            after = encode("\n")
            ids += before + answer + after
            target = answer if turn.learned else [_IGNORED] * len(answer)
            learned += [_IGNORED] * len(before) + target + [_IGNORED] * len(after)
            pictures.append(turn.row)
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(learned))
    pad = nn.utils.rnn.pad_sequence
    tokens = pad(rows, batch_first=True)
    targets = pad(labels, batch_first=True, padding_value=_IGNORED)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    inputs = vlm.model.get_input_embeddings()(tokens)
    shown = states[pictures].flatten(0, 1).to(inputs.dtype)
    inputs = inputs.masked_scatter((tokens == config.image_token_id)[..., None], shown)
    output = vlm.model.model.language_model(inputs_embeds=inputs, attention_mask=mask)
    places = targets[:, 1:] != _IGNORED
    logits = vlm.model.lm_head(output.last_hidden_state[:, :-1][places]).float()
    return nn.functional.cross_entropy(logits, targets[:, 1:][places])


def train_names(
    vlm: VLM,
    samples: Sequence[Sample],
    recipe: NamesRecipe,
    folder: Path | None = None,
    save_every: int = 25,
) -> list[dict]:
    """Add a LoRA to a pocket model and train it on conversations with made-up names, in place.

    Parameters
    ----------
    vlm : VLM
        The model, without an adapter.
    samples : sequence of Sample
        Pictures with captions, questions and subjects.
    recipe : NamesRecipe
        How the adapter is made.
    folder : pathlib.Path, optional
        Where the adapter goes, as ``folder/step-0050`` and the like, and from where a killed run
        goes on; by default nothing is written.
    save_every : int
        Steps between the adapters that are written, 25 by default.

    Returns
    -------
    list of dict
        A row for each step: step (from 0), loss and seconds.
    """
    by_subject: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        by_subject[sample.truth["subject"]].append(row)
    groups = [by_subject[name] for name in sorted(by_subject) if len(by_subject[name]) > 1]
    states = image_states(vlm, samples)
    parameters = add_lora(vlm, recipe.rank, TARGETS, recipe.seed)

    def loss(step: int) -> Float[Tensor, ""]:
        generator = np.random.default_rng([recipe.seed, step])
        shots = int(generator.choice(list(recipe.shots)))
        named = []
        for _ in range(recipe.naming):
            named.append(naming_turns(groups, shots, recipe.queries, generator))
        others = [other_turns(samples, generator) for _ in range(recipe.others)]
        total = conversation_loss(vlm, states, named)
        return total + 0.5 * conversation_loss(vlm, states, others)

    def save(done: int) -> None:
        if folder is not None and done and (done % save_every == 0 or done == recipe.stop):
            save_adapter(vlm, folder / f"step-{done:04d}")

    history = optimise(
        parameters,
        loss,
        recipe.stop,
        lambda step: recipe.learning_rate * warmup_cosine(step, recipe.steps, warmup=10),
        at_step=save,
        folder=folder,
        keep_at=range(save_every, recipe.stop + 1, save_every),
        disable=True,
    )
    for weight in parameters.values():
        weight.requires_grad_(False)
    return history


def main(arguments: Sequence[str]) -> None:
    """Make the adapter again, and write its record beside it."""
    stop = int(arguments[0]) if arguments else NamesRecipe.stop
    folder = Path(arguments[1] if len(arguments) > 1 else "_build/names")
    recipe = NamesRecipe(stop=stop)
    vlm = load("pocket-llava", dtype="bfloat16")
    samples = load_samples("scenes", n=recipe.scenes, split="train")
    history = train_names(vlm, samples, recipe, folder)
    write_json(folder / "training.json", names_record(recipe, history), indent=1)


def names_record(recipe: NamesRecipe, history: Sequence[dict]) -> dict:
    """Return the record of a run: recipe, data, losses, seconds and versions."""
    seconds = [row["seconds"] for row in history]
    return {
        "run": RUN,
        "base": "pocket-llava",
        "recipe": asdict(recipe),
        "data": {"dataset": "scenes", "split": "train", "seed": 0},
        "loss": [round(row["loss"], 4) for row in history],
        "seconds_per_step": round(float(np.median(seconds)), 2),
        "versions": versions(torch, transformers, peft),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
