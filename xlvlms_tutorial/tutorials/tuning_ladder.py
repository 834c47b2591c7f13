"""Compare tuning of representations with tuning of weights, on answers whose form the picture sets.

The rungs go from a learned constant to LoRA of all blocks. All learn the second behaviour of
``learned_steering`` from the same questions in as many steps, each with the learning rate that
validation prefers. ``python -m xlvlms_tutorial.tutorials.tuning_ladder`` trains and measures them
again; what it wrote is shipped, and :func:`ladder` and :func:`margins` read it.

A pilot of 30 steps came first, in which no rung learned the behaviour. Steps, tuned layers and
learning rates were chosen after its scores were seen; the test questions are of other pictures.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from xlvlms_tutorial.data import PROMPTS, Sample, load_samples
from xlvlms_tutorial.interventions import edit
from xlvlms_tutorial.io import digest, read_json, write_json
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.steering import RepresentationTuning
from xlvlms_tutorial.methods.steering.representation_tuning import batch_rows, frozen
from xlvlms_tutorial.metrics.answers import exact_match
from xlvlms_tutorial.metrics.intervals import Estimate, percentile_interval, resampled_shares
from xlvlms_tutorial.models.batching import with_eos
from xlvlms_tutorial.models.finetune import import_peft, loss_of
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.tutorials.learned_steering import Item, forms, leakage, successes
from xlvlms_tutorial.validation import require, require_one_of
from xlvlms_tutorial.view import plots

FILE = Path(__file__).with_name("tuning_ladder.json")
STEPS, BATCH_SIZE, WARMUP = 150, 9, 10
TRIAL = 50  # steps with each learning rate, before validation chooses one
LAYERS = (0.2, 0.3, 0.4)  # shares of the depth whose states are tuned
LAST = 5  # positions: what the chat puts between question and answer
N_TEST, N_OTHER, N_NEUTRAL = 30, 24, 12  # the first of each class
TEST_SEED = 1  # other pictures than those of the pilot
OTHER_SEED = 7  # of the pictures behind neutral prompts and other questions
VIRTUAL = "<empty_output>"  # a token of the vocabulary that no text here has
N_VIRTUAL = 8
REFERENCE = "LoReFT, r = 4"
DATASET = "scenes"
BASELINES = {
    "LoRA at full size": "LoRA, r = 8, all blocks",
    "LoRA at equal count": "LoRA, equal count",
    "IA3": "IA3",
    "prompt tuning": "prompt tuning",
    "a learned constant": "constant, r = 4",
}


@dataclass(frozen=True)
class Rung:
    """One way to tune a model, with the learning rates that validation chooses from.

    Parameters
    ----------
    name : str
        What tables call it.
    kind : str
        "loreft", "direft", "constant", "lora", "ia3" or "prompt".
    rates : tuple of float
        The learning rates that are tried.
    rank : int, default 0
        The rank, where the way has one.
    blocks : tuple of int, optional
        The blocks, from 0, that LoRA adapts; by default all of them.
    n_seeds : int, default 1
        How many seeds it is trained with: several for those that a claim compares.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import RUNGS
    >>> RUNGS[0].name, RUNGS[0].rank
    ('LoReFT, r = 4', 4)
    """

    name: str
    kind: str
    rates: tuple[float, ...]
    rank: int = 0
    blocks: tuple[int, ...] | None = None
    n_seeds: int = 1

    @property
    def tunes_states(self) -> bool:
        """Whether it changes states at the end of the prompt alone."""
        return self.kind in ("loreft", "direft", "constant")

    @property
    def prefix(self) -> str:
        """What stands before each question: places for learned tokens, or nothing."""
        return VIRTUAL * N_VIRTUAL if self.kind == "prompt" else ""


RUNGS = (
    Rung(REFERENCE, "loreft", (3e-3, 1e-2, 3e-2), 4, n_seeds=3),
    Rung("LoRA, r = 8, all blocks", "lora", (1e-3, 3e-3), 8, n_seeds=3),
    Rung("LoRA, equal count", "lora", (1e-2, 3e-2), 1, tuple(range(6, 13)), 3),
    Rung("constant, r = 4", "constant", (0.5, 1.5, 5.0), 4, n_seeds=3),
    Rung("IA3", "ia3", (3e-2, 1e-1), n_seeds=3),
    Rung("prompt tuning", "prompt", (1e-1, 3e-1), n_seeds=3),
    Rung("DiReFT, r = 4", "direft", (3e-3, 1e-2, 3e-2), 4, n_seeds=3),
    Rung("LoReFT, r = 1", "loreft", (3e-3, 1e-2, 3e-2), 1, n_seeds=3),
)


@contextmanager
def attached(rung: Rung, vlm: VLM, seed: int = 0) -> Iterator[dict[str, nn.Parameter]]:
    """Put a rung's own parameters into a model inside a ``with`` block, as they are at the start.

    Use it to train them, or to copy trained ones into them. The model's weights stay as they are.

    Parameters
    ----------
    rung : Rung
        The way to tune.
    vlm : VLM
        The model, whose blocks are those of a Llama.
    seed : int, default 0
        Draws the parameters.

    Returns
    -------
    context manager
        Its block sees the parameters by name.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import RUNGS, attached
    >>> for rung in RUNGS[:3]:
    ...     with attached(rung, vlm) as parameters:
    ...         print(rung.name, sum(weight.numel() for weight in parameters.values()))
    LoReFT, r = 4 13836
    LoRA, r = 8, all blocks 460800
    LoRA, equal count 13440
    """
    if rung.tunes_states:
        layers = [vlm.layer_at(share) for share in LAYERS]
        tuning = RepresentationTuning(vlm, layers, rung.kind, rung.rank, last=LAST, seed=seed)
        with tuning.apply(vlm):
            yield dict(tuning.functions.named_parameters())
    elif rung.kind == "prompt":
        with _virtual_tokens(vlm, seed) as parameters:
            yield parameters
    else:
        with _adapted(rung, vlm, seed) as parameters:
            yield parameters


@contextmanager
def _adapted(rung: Rung, vlm: VLM, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    import_peft()
    from peft import IA3Config, LoraConfig, get_peft_model

    names = {id(module): name for name, module in vlm.model.named_modules()}
    stack = re.escape(names[id(vlm.blocks[0])].rpartition(".")[0])
    blocks = range(vlm.n_layers) if rung.blocks is None else rung.blocks
    start = rf"{stack}\.({'|'.join(map(str, blocks))})\..*"
    if rung.kind == "lora":
        pattern = rf"{start}(q_proj|v_proj)"
        config = LoraConfig(r=rung.rank, lora_alpha=2 * rung.rank, target_modules=pattern)
    else:
        pattern = rf"{start}(k_proj|v_proj|down_proj)"
        config = IA3Config(target_modules=pattern, feedforward_modules=rf"{start}down_proj")
    torch.manual_seed(seed)
    model = get_peft_model(vlm.model, config)
    try:
        vlm.model.eval()
        yield {
            name: weight for name, weight in vlm.model.named_parameters() if weight.requires_grad
        }
    finally:
        model.unload()


@contextmanager
def _virtual_tokens(vlm: VLM, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Put learned embeddings in the place of the tokens in front of each question."""
    import_peft()
    from peft import PromptEmbedding, PromptTuningConfig

    torch.manual_seed(seed)
    config = PromptTuningConfig(
        num_virtual_tokens=N_VIRTUAL,
        token_dim=vlm.width,
        num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )
    prompt = PromptEmbedding(config, vlm.model.get_input_embeddings())
    token = vlm.tokenizer.convert_tokens_to_ids(VIRTUAL)

    def places(batch: Batch) -> Bool[Tensor, "b t"]:
        return batch["input_ids"] == token

    def change(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        mask = places(vlm.running)
        numbers = (mask.cumsum(dim=1) - 1).clamp(0, N_VIRTUAL - 1)
        return prompt(numbers).to(states.dtype)

    with edit(vlm, change, 0, places):
        yield dict(prompt.named_parameters())


@contextmanager
def encoded_once(vlm: VLM) -> Iterator[None]:
    """Let a LLaVA encode each picture once inside a ``with`` block, however often it is shown.

    Use it where tower and connector are frozen and the same pictures come again and again.

    Parameters
    ----------
    vlm : VLM
        A LLaVA.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import encoded_once
    >>> with encoded_once(vlm):
    ...     logits = [vlm.forward(batch).logits for _ in range(2)]
    >>> bool((logits[0] == logits[1]).all())
    True
    """
    inner, encoded = vlm.model.model, {}
    encode = inner.get_image_features

    def features(pixel_values: Tensor, **options: object) -> SimpleNamespace:
        names = []
        for row in pixel_values:
            names.append(hash(row.float().numpy().tobytes()))
            if names[-1] not in encoded:
                with torch.no_grad():
                    encoded[names[-1]] = encode(pixel_values=row[None], **options).pooler_output[0]
        return SimpleNamespace(pooler_output=[encoded[name] for name in names])

    inner.get_image_features = features
    try:
        yield
    finally:
        del inner.get_image_features


class PromptCache:
    """Keys and values of prompts before the positions that are tuned, computed once.

    Where only a prompt's last positions are tuned, nothing before them changes while a rung learns.
    A training step then runs these positions and the answers alone. Make it of the untuned model.

    Parameters
    ----------
    vlm : VLM
        A LLaVA.
    items : sequence of Item
        Questions with what is to be answered, n of them.
    last : int, default 5
        How many positions at the end of each prompt are tuned.

    Examples
    --------
    >>> from xlvlms_tutorial.models import loss_of
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import PromptCache
    >>> items = forms(1, 1, 1)["train"]
    >>> whole = loss_of(
    ...     vlm, [i.sample for i in items], [i.prompt for i in items], [i.target for i in items]
    ... )
    >>> bool((PromptCache(vlm, items).loss([0, 1, 2]) - whole).abs() < 1e-4)
    True
    """

    def __init__(self, vlm: VLM, items: Sequence[Item], last: int = LAST) -> None:
        self.vlm, self.items, self.last = vlm, list(items), last
        self._parts: list[Float[Tensor, "two l h t d"]] = []
        for start in range(0, len(self.items), 30):
            part = self.items[start : start + 30]
            batch = vlm.batch([item.image for item in part], [item.prompt for item in part])
            mask = batch["attention_mask"]
            # padding does not count, as where the prompts run on
            places = (mask.cumsum(dim=1) - 1).clamp_min(0)
            options = {"use_cache": True, "position_ids": places}
            layers = vlm.forward(batch, logits=False, **options).past_key_values.layers
            keys = torch.stack([layer.keys for layer in layers])
            values = torch.stack([layer.values for layer in layers])
            both = torch.stack([keys, values])
            for row, length in enumerate(mask.sum(dim=1).tolist()):
                self._parts.append(both[:, :, row, :, -length:].clone())

    def loss(self, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Return what ``loss_of`` returns for these items, with what is tuned in force.

        Parameters
        ----------
        rows : sequence of int
            Numbers of items.

        Returns
        -------
        Tensor
            The mean cross-entropy of targets and EOS, in nats a token.
        """
        items = [self.items[row] for row in rows]
        answers = with_eos(self.vlm, [item.target for item in items])
        samples = [item.sample for item in items]
        batch = self.vlm.batch_of(samples, [item.prompt for item in items], answers)
        ids, mask = batch["input_ids"], batch.mask("answer")
        attention_mask = batch["attention_mask"]
        starts = mask.int().argmax(dim=1).tolist()
        cut = min(starts) - self.last
        columns = []
        for row, start in zip(rows, starts, strict=True):
            part = self._parts[row]
            # the prompt ends at ``start``, and what its end leaves out is run again
            part = part[..., : part.shape[-2] - (start - cut), :]
            columns.append(nn.functional.pad(part, (0, 0, cut - part.shape[-2], 0)))
        keys, values = torch.stack(columns, dim=2)
        cache = DynamicCache()
        for layer in range(len(keys)):
            cache.update(keys[layer], values[layer], layer)
        places = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        with self.vlm.run(batch):
            logits = self.vlm.model(
                input_ids=ids[:, cut:],
                attention_mask=attention_mask,
                position_ids=places[:, cut:],
                past_key_values=cache,
                use_cache=True,
            ).logits
        predicted = mask[:, cut + 1 :]
        return nn.functional.cross_entropy(
            logits[:, :-1][predicted].float(), ids[:, cut + 1 :][predicted]
        )


def train(
    rung: Rung,
    vlm: VLM,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    rate: float,
    seed: int = 0,
    steps: int = STEPS,
    cache: PromptCache | None = None,
) -> float:
    """Train what :func:`attached` gave towards the items' targets, in place.

    Parameters
    ----------
    rung : Rung
        The way to tune.
    vlm : VLM
        The model with the parameters attached.
    parameters : mapping of str to Parameter
        What is trained.
    items : sequence of Item
        Questions with what is to be answered.
    rate : float
        The largest learning rate.
    seed : int, default 0
        Draws the items of each step.
    steps : int, default 150
        Training steps.
    cache : PromptCache, optional
        Of the same items, for a rung that tunes states; by default each prompt runs whole.

    Returns
    -------
    float
        Seconds a step, of processor time.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import RUNGS, attached, train
    >>> items = forms(1, 1, 1)["train"]
    >>> with attached(RUNGS[0], vlm) as parameters:
    ...     seconds = train(RUNGS[0], vlm, parameters, items, rate=0.01, steps=1)
    >>> seconds > 0
    True
    """

    def loss(step: int) -> Float[Tensor, ""]:
        rows = batch_rows(len(items), BATCH_SIZE, seed, step)
        if cache is not None:
            return cache.loss(rows)
        chosen_items = [items[row] for row in rows]
        samples = [item.sample for item in chosen_items]
        prompts = [rung.prefix + item.prompt for item in chosen_items]
        return loss_of(vlm, samples, prompts, [item.target for item in chosen_items])

    start = time.process_time()
    # for sequences this short, the backward pass of fused attention takes a third of a step
    with sdpa_kernel(SDPBackend.MATH):
        optimise(
            dict(parameters),
            loss,
            steps,
            lambda step: rate * warmup_cosine(step, steps, warmup=WARMUP),
            desc=rung.name,
            leave=False,
            disable=True,
        )
    return (time.process_time() - start) / steps


@torch.no_grad()
def forced_success(rung: Rung, vlm: VLM, items: Sequence[Item]) -> tuple[float, float]:
    """Return the share of items whose target a greedy answer would be, and the mean loss.

    One forward tells it: each token of the target has to be the most probable after those before.

    Parameters
    ----------
    rung : Rung
        The way in which the model is tuned.
    vlm : VLM
        The model with the parameters attached.
    items : sequence of Item
        Questions with their targets.

    Returns
    -------
    tuple of float and float
        Share of items, and nats a token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import RUNGS, forced_success
    >>> share, loss = forced_success(RUNGS[0], vlm, forms(1, 1, 1)["test"])
    >>> 0 <= share <= 1, loss > 0
    (True, True)
    """
    hits, losses = [], []
    for start in range(0, len(items), 30):
        part = items[start : start + 30]
        answers = with_eos(vlm, [item.target for item in part])
        prompts = [rung.prefix + item.prompt for item in part]
        log_probs, ids, rows = _answer_log_probs(
            vlm, [item.sample for item in part], prompts, answers
        )
        right_token = log_probs.argmax(dim=-1) == ids
        hits += [bool(right_token[rows == row].all()) for row in range(len(part))]
        losses += (-log_probs.gather(1, ids[:, None])).flatten().tolist()
    return float(np.mean(hits)), float(np.mean(losses))


def _answer_log_probs(
    vlm: VLM, samples: Sequence[Sample], prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Float[Tensor, "n v"], Tensor, Tensor]:
    """The log-probabilities that answers' tokens are predicted with, their ids and their rows."""
    batch = vlm.batch_of(samples, prompts, answers)
    mask = batch.mask("answer")
    n_kept = mask.shape[1] - int(mask.any(dim=0).int().argmax()) + 1
    with vlm.run(batch):
        logits = vlm.model(**batch, logits_to_keep=torch.arange(-n_kept, 0)).logits
    mask = mask[:, -(n_kept - 1) :]
    rows = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    ids = batch["input_ids"][:, -(n_kept - 1) :][mask]
    return logits[:, :-1][mask].float().log_softmax(dim=-1), ids, rows


class Measurement:
    """What a tuned model is measured on: the behaviour, other questions, and neutral prompts.

    Parameters
    ----------
    vlm : VLM
        The untuned model in float32.
    items : sequence of Item
        Test questions of the behaviour.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.learned_steering import forms
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import Measurement
    >>> items = forms(1, 1, 1)["test"]
    >>> result = Measurement(vlm, items, n_other=2, n_neutral=2).of(vlm)
    >>> len(result["successes"]), round(result["kl"], 4)
    (3, 0.0)
    """

    def __init__(
        self, vlm: VLM, items: Sequence[Item], n_other: int = N_OTHER, n_neutral: int = N_NEUTRAL
    ) -> None:
        self.items = list(items)
        self.neutral = load_samples("scenes", n_neutral, "test", OTHER_SEED)
        self.other = _other_questions(n_other)
        self.before = self._neutral(vlm, "")

    def of(self, vlm: VLM, prefix: str = "") -> dict[str, object]:
        """Measure a model; ``prefix`` stands before each prompt.

        Parameters
        ----------
        vlm : VLM
            The model, with what tunes it in force.
        prefix : str, default ""
            Places for learned tokens.

        Returns
        -------
        dict
            ``successes`` (a digit for each item), ``success``, ``by_class``, ``leakage``, ``kl``
            (nats a token of captions) and ``other`` (accuracy on other types of question).
        """
        answers = self._answers(vlm, [item.sample for item in self.items], prefix)
        values = successes(self.items, answers)
        table = leakage(self.items, answers).round(4)
        by_class = pd.Series(values).groupby([item.group for item in self.items]).mean()
        after = self._neutral(vlm, prefix)
        kl = (self.before.exp() * (self.before - after)).sum(dim=-1).mean()
        replies = self._answers(vlm, self.other, prefix)
        pairs = zip(replies, self.other, strict=True)
        accurate = [exact_match(reply, sample.questions[0].answer) for reply, sample in pairs]
        return {
            "successes": "".join(str(int(value)) for value in values),
            "success": round(float(values.mean()), 4),
            "by_class": by_class.round(4).to_dict(),
            "leakage": table.to_dict("index"),
            "kl": round(float(kl), 4),
            "other": round(float(np.mean(accurate)), 4),
        }

    def _answers(self, vlm: VLM, samples: Sequence[Sample], prefix: str) -> list[str]:
        prompts = [prefix + sample.questions[0].text for sample in samples]
        images = [sample.image for sample in samples]
        return vlm.generate(images, prompts, max_new_tokens=6, batch_size=30)

    @torch.no_grad()
    def _neutral(self, vlm: VLM, prefix: str) -> Float[Tensor, "n v"]:
        captions = [sample.captions[0] for sample in self.neutral]
        prompts = [prefix + PROMPTS["image"]] * len(captions)
        return _answer_log_probs(vlm, self.neutral, prompts, captions)[0]


def _other_questions(n: int) -> list[Sample]:
    """Test pictures with a question of a type that the behaviour does not have."""
    samples = []
    for number, sample in enumerate(load_samples("scenes", n, "test", OTHER_SEED)):
        kind = ("presence", "place")[number % 2]
        of_kind = [question for question in sample.questions if question.type == kind]
        samples.append(replace(sample, questions=(of_kind[0],)))
    return samples


def run_ladder(
    model: str = "pocket-llava",
    file: Path | None = None,
    rungs: Sequence[Rung] = RUNGS,
    report: Callable[[str], object] = print,
) -> dict[str, object]:
    """Train and measure all rungs with all seeds, and write what came out after each run.

    A run that was killed goes on: what the file has is not done again. Training is in bfloat16 with
    the parameters in float32, measuring in float32.

    Parameters
    ----------
    model : str
        As ``load`` takes it.
    file : Path, optional
        The records, which are written after each finished run; by default those of the package.
    rungs : sequence of Rung
        The ways to tune.
    report : callable
        Is called with a line for each finished run; ``print`` by default.

    Returns
    -------
    dict
        ``settings``, ``base`` (the untuned model) and ``runs``.
    """
    torch.set_num_threads(1)
    file = file or FILE
    parts = forms() | {"test": forms(n_test=N_TEST, seed=TEST_SEED)["test"]}
    pupil, judge = load(model, dtype="bfloat16"), load(model, dtype="float32")
    settings = {"model": model, "steps": STEPS, "batch_size": BATCH_SIZE, "last": LAST}
    settings |= {"trial": TRIAL, "layers": [judge.layer_at(share) for share in LAYERS]}
    settings |= {"labels": len(parts["train"]), "items": digest([i.prompt for i in parts["test"]])}
    records = read_json(file) if file.exists() else {"settings": settings, "runs": []}
    same = records["settings"] == settings
    require(same, f"{file!s} has runs with other settings", "remove the file")
    done = {(run["rung"], run["seed"]) for run in records["runs"]}
    with frozen(pupil.model), encoded_once(pupil), encoded_once(judge):
        measurement = Measurement(judge, parts["test"])
        if "base" not in records:
            records["base"] = measurement.of(judge)
            write_json(file, records, indent=1)
        cache = PromptCache(pupil, parts["train"])
        for rung in rungs:
            for seed in range(rung.n_seeds):
                if (rung.name, seed) in done:
                    continue
                lessons = _Lessons(rung, pupil, parts, cache if rung.tunes_states else None)
                before = [run for run in records["runs"] if run["rung"] == rung.name]
                if before:
                    rate, trials = before[0]["rate"], {}
                else:
                    rate, trials = _chosen_rate(lessons)
                run = _run(lessons, judge, measurement, rate, seed) | {"trials": trials}
                records["runs"].append(run)
                write_json(file, records, indent=1)
                report(f"{rung.name}, seed {seed}: {run['success']:.2f}, {run['validation']}")
    return records


class _Lessons(NamedTuple):
    """A rung, the model that learns, the questions, and what of their prompts is known already."""

    rung: Rung
    pupil: VLM
    parts: Mapping[str, Sequence[Item]]
    cache: PromptCache | None


def _chosen_rate(lessons: _Lessons) -> tuple[float, dict[str, float]]:
    """Train a little with each rate; return that of the lowest loss on validation, and all losses.

    Shares of successes would not do: so early, the highest is that of what changes nothing.
    """
    rung, pupil, parts, cache = lessons
    losses = {}
    for rate in rung.rates:
        with attached(rung, pupil) as parameters:
            train(rung, pupil, parameters, parts["train"], rate, steps=TRIAL, cache=cache)
            losses[rate] = round(forced_success(rung, pupil, parts["validation"])[1], 4)
    return min(losses, key=losses.get), {str(rate): loss for rate, loss in losses.items()}


def _run(
    lessons: _Lessons, judge: VLM, measurement: Measurement, rate: float, seed: int
) -> dict[str, object]:
    """Train a rung, and measure it in the model of full precision."""
    rung, pupil, parts, cache = lessons
    with attached(rung, pupil, seed) as parameters:
        seconds = train(rung, pupil, parameters, parts["train"], rate, seed, cache=cache)
        share, loss = forced_success(rung, pupil, parts["validation"])
        state = {name: weight.detach().clone() for name, weight in parameters.items()}
    with attached(rung, judge, seed) as parameters, torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(state[name])
        measured = measurement.of(judge, rung.prefix)
    count = sum(weight.numel() for weight in state.values())
    run = {"rung": rung.name, "kind": rung.kind, "seed": seed, "parameters": count, "rate": rate}
    run |= {"validation": [round(share, 4), round(loss, 4)], "seconds": round(seconds, 4)}
    return run | measured


def load_ladder(file: Path | None = None) -> dict[str, object]:
    """Read the records that :func:`run_ladder` wrote; by default the shipped ones.

    Parameters
    ----------
    file : Path, optional
        The records; by default those of the package.

    Returns
    -------
    dict
        ``settings``, ``base`` and ``runs``, one a rung and seed.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import load_ladder
    >>> load_ladder()["settings"]["model"]
    'pocket-llava'
    """
    return read_json(file or FILE)


def ladder(records: Mapping[str, object] | None = None) -> pd.DataFrame:
    """Return the ladder as a table: what each rung costs and what it brings, as means over seeds.

    Parameters
    ----------
    records : mapping, optional
        As :func:`load_ladder` gives them; by default the shipped ones.

    Returns
    -------
    pandas.DataFrame
        A row for each rung, the fewest parameters first, and "no tuning" before them. Columns
        parameters, labels, rate, seconds (of processor time a step), success (share of test
        questions) with low and high (95 %, over seeds and questions), its share in each class,
        leakage (share of answers in the form of another class), kl (nats a token of captions),
        other (accuracy on other types of question) and seeds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import ladder
    >>> table = ladder()
    >>> table.index[0], bool(table["success"].between(table["low"], table["high"]).all())
    ('no tuning', True)
    """
    records = load_ladder() if records is None else records
    of_rung: dict[str, list[dict]] = {"no tuning": [records["base"]]}
    for run in sorted(records["runs"], key=lambda run: run["parameters"]):
        of_rung.setdefault(run["rung"], []).append(run)
    rows = {}
    for name, runs in of_rung.items():
        tuned = name != "no tuning"
        success = _over_seeds_and_items(_values(runs))
        row = {
            "parameters": runs[0].get("parameters", 0),
            "labels": records["settings"]["labels"] if tuned else 0,
            "rate": runs[0].get("rate", np.nan),
            "seconds": np.mean([run.get("seconds", np.nan) for run in runs]),
            "success": success.value,
            "low": success.low,
            "high": success.high,
        }
        for group in runs[0]["by_class"]:
            row[group] = np.mean([run["by_class"][group] for run in runs])
        row["leakage"] = np.mean([_leak(run["leakage"]) for run in runs])
        for column in ("kl", "other"):
            row[column] = np.mean([run[column] for run in runs])
        rows[name] = row | {"seeds": len(runs)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rung")


def margins(records: Mapping[str, object] | None = None) -> dict[str, Estimate]:
    """Return by how much LoReFT of rank 4 succeeds more often than each baseline.

    Use it for LEARN-4: the differences are paired by test question, at equal steps.

    Parameters
    ----------
    records : mapping, optional
        As :func:`load_ladder` gives them; by default the shipped ones.

    Returns
    -------
    dict of str to Estimate
        By baseline, such as "LoRA at full size", the difference of success with
        its interval over seeds and questions. Baselines without records are left out.

    Raises
    ------
    InputError
        If there are no records of LoReFT.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import margins
    >>> margin = margins()["LoRA at full size"]
    >>> margin.low <= margin.value <= margin.high
    True
    """
    records = load_ladder() if records is None else records
    of_rung: dict[str, list[dict]] = {}
    for run in records["runs"]:
        of_rung.setdefault(run["rung"], []).append(run)
    require_one_of(REFERENCE, of_rung, "rung")
    reference, estimates = _values(of_rung[REFERENCE]), {}
    for description, name in BASELINES.items():
        if name in of_rung:
            values = _values(of_rung[name])
            n_seeds = min(len(values), len(reference))
            estimates[description] = _over_seeds_and_items(reference[:n_seeds] - values[:n_seeds])
    return estimates


def record_margins(
    experiment: Experiment, records: Mapping[str, object] | None = None
) -> dict[str, Estimate]:
    """Record for LEARN-4 by how much LoReFT succeeds more often than each baseline.

    Nothing is recorded where the records are of another model or other pictures than the
    experiment.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    records : mapping, optional
        As :func:`load_ladder` gives them; by default the shipped ones.

    Returns
    -------
    dict of str to Estimate
        What was recorded, as :func:`margins` gives it.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment
    >>> from xlvlms_tutorial.tutorials.tuning_ladder import record_margins
    >>> record_margins(Experiment("learned-steering", "another model", "scenes"))
    {}
    """
    records = load_ladder() if records is None else records
    current = experiment.run["model"], experiment.run["dataset"]
    if current != (records["settings"]["model"], DATASET):
        return {}
    estimates = margins(records)
    for description, estimate in estimates.items():
        experiment.record(
            "LEARN-4",
            estimate,
            BASELINES[description],
            f"LoReFT against {description}",
            "validation",
            interval_over="seeds and questions",
        )
    return estimates


def draw(ax: Axes, table: pd.DataFrame) -> None:
    """Draw success against the number of trained parameters, a point a rung.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Where it is drawn.
    table : pandas.DataFrame
        From :func:`ladder`.
    """
    tuned = table[table["parameters"] > 0]
    for marker, (name, row) in zip("osD^vP*X", tuned.iterrows(), strict=False):
        reach = [[row["success"] - row["low"]], [row["high"] - row["success"]]]
        ax.errorbar(row["parameters"], row["success"], reach, fmt=marker, ms=8, label=name)
    ax.axhline(table["success"].iloc[0], color=plots.MUTED, ls="--", lw=1)
    ax.set(xscale="log", xlabel="trained parameters", ylabel="success", ylim=(0, 1.03))


def _values(runs: Sequence[Mapping[str, str]]) -> Float[np.ndarray, "seeds items"]:
    return np.array([[int(digit) for digit in run["successes"]] for run in runs], dtype=float)


def _over_seeds_and_items(values: Float[np.ndarray, "seeds items"]) -> Estimate:
    """The mean, with an interval from resampling both seeds and items."""
    n_seeds, n_items = values.shape
    of_items = resampled_shares(n_items, seed=0)
    of_seeds = np.ones((len(of_items), 1))
    if n_seeds > 1:
        of_seeds = resampled_shares(n_seeds, seed=1)
    resampled = np.einsum("rs,si,ri->r", of_seeds, values, of_items)
    return percentile_interval(float(values.mean()), resampled, n_items)


def _leak(table: Mapping[str, Mapping[str, float]]) -> float:
    """The mean over classes of the share of answers in the form of another class."""
    shares = [sum(row.values()) - row[group] for group, row in table.items()]
    return float(np.mean(shares))


if __name__ == "__main__":
    run_ladder()
