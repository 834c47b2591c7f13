"""Fine-tune a vision-language model towards other answers with LoRA, by peft.

Hu et al., 2021, arXiv 2106.09685; the steps on the way are kept.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import is_peft_available

from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.io import save_tensors
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import first_captions, require_samples, with_eos
from xlvlms_tutorial.models.failures import require_installed
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.validation import require_counts

RESUME_EVERY = 50  # steps between the files from which a killed run goes on
TARGETS = ("q_proj", "v_proj")
_PREFIX = "base_model.model."  # by which peft marks its weights in a file


def fine_tune(
    vlm: VLM,
    samples: Iterable[Sample],
    answers: Sequence[str] | Callable[[Sample], str] | None = None,
    *,
    prompt: str | None = None,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    rank: int = 4,
    targets: Sequence[str] | str = TARGETS,
    seed: int = 0,
    folder: str | Path | None = None,
    save_at: Sequence[int] = (),
    progress: bool = False,
) -> pd.DataFrame:
    r"""Train a LoRA of the language model's blocks, or of the connector, in place.

    Use it to teach a model another way to answer with few weights. The model learns to give
    ``answers`` to ``prompt``: :math:`W + \frac{2 r}{r} B A` for the chosen linear layers (Hu et
    al., 2021, arXiv 2106.09685), with everything else frozen. The optimiser is AdamW with ten steps
    of warm-up and a cosine to 0. What is left out meanwhile, as in ``with skip(vlm, layers):``, is
    trained through. ``vlm.model.disable_adapters()`` gives the model as it was.

    Parameters
    ----------
    vlm : VLM
        The model, without an adapter; it is changed in place, its name too.
    samples : iterable of Sample
        What the answers are about, all of one modality.
    answers : sequence of str, or callable, optional
        One answer for each sample, or a function from a sample to its answer. By default the first
        caption of each sample.
    prompt : str, optional
        What the model is asked. By default the prompt that asks for a description.
    steps : int
        How many steps the run has, 200 by default.
    batch_size : int
        Samples of a step, 16 by default; at most all of them.
    learning_rate : float
        The largest learning rate, reached after the warm-up; 1e-3 by default.
    rank : int
        Rank r of the factors A and B, 4 by default.
    targets : sequence of str, or "connector"
        Endings of the names of the blocks' linear layers that are adapted, by default "q_proj" and
        "v_proj"; "connector" adapts those between tower and language model instead.
    seed : int
        Draws the first factor and the samples of each step. The same seed gives the same adapter.
    folder : str or Path, optional
        Where the adapter goes, as ``folder/step-0050`` and the like, in float16;
        ``load(..., adapter=...)`` takes it from there, and a killed run goes on. By default nothing
        is written.
    save_at : sequence of int
        After which steps the adapter is written too; it always is at the end. None by default.
    progress : bool
        Whether a progress bar is shown; not by default.

    Returns
    -------
    DataFrame
        A row for each step: step (from 1), loss (nats a token) and seconds.

    Raises
    ------
    LoadError
        If peft is not installed, or the model has an adapter already.
    InputError
        If there are no samples, the answers are not as many as the samples, a number is below 1, or
        no linear layer has such a name.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load
    >>> from xlvlms_tutorial.models import fine_tune
    >>> pupil = load("pocket-llava")
    >>> history = fine_tune(pupil, samples, ["A scene."] * 4, steps=1, batch_size=1, rank=1)
    >>> history.columns.tolist(), history["step"].tolist()
    (['step', 'loss', 'seconds'], [1])
    >>> pupil.name
    'pocket-llava + LoRA of 1 steps, seed 0'
    """
    samples = list(samples)
    texts = _answers(samples, answers)
    require_counts(steps=steps, batch_size=batch_size, rank=rank)
    if seed < 0:
        raise InputError(f"seed is {seed}", "give 0 or more")
    parameters = add_lora(vlm, rank, targets, seed)
    folder = None if folder is None else Path(folder)
    prompt = prompt or PROMPTS.get(samples[0].modality, PROMPTS["image"])

    def loss(step: int) -> Float[Tensor, ""]:
        n_rows = min(batch_size, len(samples))
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(samples), n_rows, replace=False)
        examples = [samples[row] for row in rows]
        example_answers = [texts[row] for row in rows]
        return loss_of(vlm, examples, prompt, example_answers)

    def save(done: int) -> None:
        if folder is not None and done and (done in save_at or done == steps):
            save_adapter(vlm, folder / f"step-{done:04d}")

    history = optimise(
        parameters,
        loss,
        steps,
        lambda step: learning_rate * warmup_cosine(step, steps, warmup=10),
        at_step=save,
        folder=folder,
        keep_at=range(RESUME_EVERY, steps + 1, RESUME_EVERY),
        desc="fine-tune",
        leave=False,
        disable=not progress,
    )
    for weight in parameters.values():
        weight.requires_grad_(False)
    # states captured from here on are not the plain model's
    vlm.name += f" + LoRA of {steps} steps, seed {seed}"
    return pd.DataFrame(history).assign(step=lambda rows: rows["step"] + 1)


def loss_of(
    vlm: VLM, samples: Sequence[Sample], prompt: str | Sequence[str], answers: Sequence[str]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of answers and their EOS token, in nats a token.

    Use it to train, or to measure how well answers fit what the samples show. Gradients flow into
    the weights that require them.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        What the answers are about.
    prompt : str or sequence of str
        What the model is asked about each sample: one text for all, or one for each.
    answers : sequence of str
        One for each sample.

    Returns
    -------
    Tensor
        A scalar: the mean over all tokens of all answers.

    Examples
    --------
    >>> from xlvlms_tutorial.models import loss_of
    >>> captions = [sample.captions[0] for sample in samples]
    >>> loss = loss_of(vlm, samples, "Describe the picture.", captions)
    >>> shuffled = loss_of(vlm, samples, "Describe the picture.", captions[::-1])
    >>> loss.ndim, bool(loss < shuffled)
    (0, True)
    """
    prompts = [prompt] * len(samples) if isinstance(prompt, str) else prompt
    return loss_of_batch(vlm, vlm.batch_of(samples, prompts, with_eos(vlm, answers)))


def loss_of_batch(vlm: VLM, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the answers in a batch, in nats a token.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        Prompts with answers, as ``vlm.batch`` makes them.

    Returns
    -------
    Tensor
        A scalar: the mean over all tokens of all answers.

    Examples
    --------
    >>> from xlvlms_tutorial.models.finetune import loss_of_batch
    >>> pictures = [sample.image for sample in samples]
    >>> answered = vlm.batch(pictures, ["Describe the picture."] * 4, ["A scene."] * 4)
    >>> loss_of_batch(vlm, answered).ndim
    0
    """
    ids = batch["input_ids"]
    mask = batch.mask("answer")
    # the unembedding is a fifth of the work: only where an answer may stand
    first = int(mask.any(dim=0).int().argmax())
    options = {}
    if "logits_to_keep" in vlm.accepts:
        # as numbers: for a count, a view is cut, and a CPU then copies the unembedding for each row
        options["logits_to_keep"] = torch.arange(first - 1 - ids.shape[1], 0)
    with vlm.run(batch):
        logits = vlm.model(**batch, **options).logits
    length = logits.shape[1] - 1
    mask = mask[:, -length:]
    predictions = logits[:, :-1][mask].float()
    targets = ids[:, -length:][mask]
    return nn.functional.cross_entropy(predictions, targets)


def save_adapter(vlm: VLM, folder: str | Path) -> Path:
    """Write the model's adapter to a folder as peft does, in float16.

    ``load(..., adapter=folder)`` takes it from there.

    Parameters
    ----------
    vlm : VLM
        A model with an adapter, trained by :func:`fine_tune` or loaded.
    folder : str or Path
        Where to write; it is made if it is not there.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    LoadError
        If the model has no adapter.
    FileError
        If the weights cannot be written.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from xlvlms_tutorial.loading import load
    >>> from xlvlms_tutorial.models import save_adapter
    >>> styled = load("pocket-llava", adapter="pocket-place")
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in save_adapter(styled, folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(folder)
    if not getattr(vlm.model, "peft_config", None):
        raise LoadError(
            "a model without adapter", "call fine_tune first, or load it with adapter=..."
        )
    state = {}
    for name, weight in vlm.model.get_adapter_state_dict().items():
        state[_PREFIX + name] = weight.detach().half().cpu()
    save_tensors(folder / "adapter_model.safetensors", state, {"format": "pt"})
    # in the model's own, peft would ask the hub for what the name stands for
    config = copy(vlm.model.peft_config["default"])
    config.base_model_name_or_path = vlm.name.partition(" + ")[0]
    config.save_pretrained(folder)
    return folder


def import_peft() -> None:
    """Import peft without the warning of bitsandbytes.

    Where bitsandbytes is installed peft imports it, and it warns of a kernel for 4-bit weights.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("peft")
    finally:
        logger.setLevel(level)


def _answers(
    samples: list[Sample], answers: Sequence[str] | Callable[[Sample], str] | None
) -> list[str]:
    """Return the texts to train on, one for each sample, or refuse them."""
    require_samples(samples)
    if answers is None:
        return first_captions(samples, "give the answers to train on")
    texts = [answers(sample) for sample in samples] if callable(answers) else list(answers)
    written = all(isinstance(text, str) and text.strip() for text in texts)
    if len(texts) != len(samples) or not written:
        raise InputError(
            f"{len(texts)} answers for {len(samples)} samples",
            "give one text for each, none of them empty",
        )
    return texts


def add_lora(
    vlm: VLM, rank: int, targets: Sequence[str] | str = TARGETS, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Add an untrained LoRA, in place; the model's answers stay as they are.

    Parameters
    ----------
    vlm : VLM
        The model, without an adapter.
    rank : int
        Rank of the factors.
    targets : sequence of str, or "connector"
        As for :func:`fine_tune`.
    seed : int
        Draws the first factor; the second is 0.

    Returns
    -------
    dict of str to Parameter
        The factors by name, in float32, ready to be trained.

    Raises
    ------
    LoadError
        If peft is not installed, or the model has an adapter already.
    InputError
        If no linear layer has such a name.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load
    >>> from xlvlms_tutorial.models.finetune import add_lora
    >>> len(add_lora(load("pocket-llava"), rank=1))  # two factors of two maps in 30 blocks
    120
    """
    require_installed("peft", is_peft_available(), "fine-tuning", "try again")
    if getattr(vlm.model, "peft_config", None):
        raise LoadError(f"{vlm.name!r} has an adapter already", "load the model again without one")
    import_peft()
    from peft import LoraConfig

    pattern = _connector_pattern(vlm) if targets == "connector" else blocks_pattern(vlm, targets)
    torch.manual_seed(seed)  # of the first of the two factors; the second starts at 0
    vlm.model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern))
    # the factors learn in float32, whatever the dtype of the frozen weights
    parameters = {}
    for name, weight in vlm.model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
            parameters[name] = weight
    vlm.model.eval()
    return parameters


def blocks_pattern(vlm: VLM, targets: Sequence[str]) -> str:
    """Return the pattern of the names of the blocks' linear maps to train.

    Raises
    ------
    InputError
        If no linear layer of the blocks has such a name.
    """
    endings = set()
    for block in vlm.blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                endings.add(name.split(".")[-1])
    if not any(ending in targets for ending in endings):
        listed = ", ".join(sorted(endings))
        raise InputError(
            f"targets {targets!r}", f"'connector', or some of the blocks' linear maps {listed}"
        )
    names = {id(module): name for name, module in vlm.model.named_modules()}
    stack, _, _ = names[id(vlm.blocks[0])].rpartition(".")
    options = "|".join(map(re.escape, targets))
    return rf"{re.escape(stack)}\.\d+\..*?({options})"


def _connector_pattern(vlm: VLM) -> str:
    connector = anatomy.connector(vlm.model)
    parts = set() if connector is None else set(connector.modules())
    names = []
    for name, module in vlm.model.named_modules():
        if isinstance(module, nn.Linear) and module in parts:
            names.append(name)
    if not names:
        raise InputError(
            (
                f"targets 'connector' of {vlm.name!r}, which has no linear "
                "maps between tower and blocks"
            ),
            "name those of blocks",
        )
    return "|".join(map(re.escape, names))
