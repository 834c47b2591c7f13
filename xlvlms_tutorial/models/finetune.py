"""Fine-tune a vision-language model towards other answers with LoRA, by peft.

Hu et al., 2021; the steps on the way are kept.
"""

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

from xlvlms_tutorial.errors import LoadError, SelectionError
from xlvlms_tutorial.io import save_tensors
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.adapters import import_peft
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.models.prompts import require_counts
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample

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
    r"""Train a LoRA of the language model's blocks, or the connector, in place.

    Returns a row a step: step, loss (nats a token), seconds. The model gives ``answers`` (by
    default the first caption of each sample) to ``prompt`` (by default the one that asks for a
    description): :math:`W + \frac{2 r}{r} B A` for the linear maps whose names end in ``targets``,
    or with "connector" for those of the map from the tower to the language model; everything else
    is frozen. What is left out meanwhile, as in ``with skip(vlm, layers):``, is trained through.
    AdamW with ten steps of warmup and a cosine to 0. ``vlm.model.disable_adapters()`` gives the
    model as it was. With ``folder`` the adapter goes to ``folder/step-0050`` and the like, at the
    steps of ``save_at`` and at the end, in float16; ``load(..., adapter=...)`` takes it from
    there, and a killed run goes on.

    Raises
    ------
    LoadError
        If peft is not installed, or the model has an adapter already.
    SelectionError
        If there are no samples, as many answers as samples are not given, a number is below 1, or
        no linear map has such a name.
    """
    samples = list(samples)
    told = _answers(samples, answers)
    require_counts(steps=steps, batch_size=batch_size, rank=rank)
    if seed < 0:
        raise SelectionError(f"seed is {seed}", "give 0 or more")
    parameters = _add(vlm, rank, targets, seed)
    folder = None if folder is None else Path(folder)
    asked = prompt or PROMPTS.get(samples[0].modality, PROMPTS["image"])

    def loss(step: int) -> Float[Tensor, ""]:
        rows = np.random.default_rng([seed, step]).choice(
            len(samples), min(batch_size, len(samples)), replace=False
        )
        return loss_of(vlm, [samples[row] for row in rows], asked, [told[row] for row in rows])

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
    vlm: VLM, samples: Sequence[Sample], prompt: str, answers: Sequence[str]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of answers and their end, in nats a token.

    Given what the samples show and the prompt.
    """
    end = vlm.model.generation_config.eos_token_id
    mark = vlm.tokenizer.convert_ids_to_tokens(end[0] if isinstance(end, list) else end)
    batch = vlm.batch_of(samples, [prompt] * len(samples), [answer + mark for answer in answers])
    ids, wanted = batch["input_ids"], batch.mask("answer")
    # the unembedding is a fifth of the work: only where an answer may stand
    first = int(wanted.any(dim=0).int().argmax())
    kept = {"logits_to_keep": ids.shape[1] - first + 1} if "logits_to_keep" in vlm.accepts else {}
    with vlm.run(batch):
        logits = vlm.model(**batch, **kept).logits
    length = logits.shape[1] - 1
    where = wanted[:, -length:]
    return nn.functional.cross_entropy(logits[:, :-1][where].float(), ids[:, -length:][where])


def save_adapter(vlm: VLM, folder: str | Path) -> Path:
    """Write the model's adapter to a folder as peft does, in float16, and return the folder.

    Raises
    ------
    LoadError
        If the model has no adapter.
    OutputError
        If the weights cannot be written.
    """
    folder = Path(folder)
    if not getattr(vlm.model, "peft_config", None):
        raise LoadError(
            "a model without adapter", "call fine_tune first, or load it with adapter=..."
        )
    state = {
        _PREFIX + name: weight.detach().half().cpu()
        for name, weight in vlm.model.get_adapter_state_dict().items()
    }
    save_tensors(folder / "adapter_model.safetensors", state, {"format": "pt"})
    # in the model's own, peft would ask the hub for what the name stands for
    config = copy(vlm.model.peft_config["default"])
    config.base_model_name_or_path = vlm.name.partition(" + ")[0]
    config.save_pretrained(folder)
    return folder


def _answers(
    samples: list[Sample], answers: Sequence[str] | Callable[[Sample], str] | None
) -> list[str]:
    if not samples:
        raise SelectionError("no samples", "give at least one")
    if answers is None:
        if bare := [sample.id for sample in samples if not sample.captions]:
            raise SelectionError(
                f"{len(bare)} samples without a caption, such as {bare[0]!r}",
                "give the answers to train on",
            )
        return [sample.captions[0] for sample in samples]
    told = [answers(sample) for sample in samples] if callable(answers) else list(answers)
    if len(told) != len(samples) or not all(
        isinstance(text, str) and text.strip() for text in told
    ):
        raise SelectionError(
            f"{len(told)} answers for {len(samples)} samples",
            "give one text for each, none of them empty",
        )
    return told


def _add(vlm: VLM, rank: int, targets: Sequence[str], seed: int) -> dict[str, nn.Parameter]:
    if not is_peft_available():
        raise LoadError(
            "fine-tuning needs peft, which is not installed", "pip install peft and try again"
        )
    if getattr(vlm.model, "peft_config", None):
        raise LoadError(f"{vlm.name!r} has an adapter already", "load the model again without one")
    import_peft()
    from peft import LoraConfig

    pattern = _connector_pattern(vlm) if targets == "connector" else _blocks_pattern(vlm, targets)
    torch.manual_seed(seed)  # of the first of the two factors; the second starts at 0
    vlm.model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern))
    # the factors learn in float32, whatever the format of the frozen weights
    parameters = {name: weight for name, weight in vlm.model.named_parameters() if "lora_" in name}
    for weight in parameters.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    vlm.model.eval()
    return parameters


def _blocks_pattern(vlm: VLM, targets: Sequence[str]) -> str:
    names = {id(module): name for name, module in vlm.model.named_modules()}
    inside = {
        name
        for block in vlm.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not any(name.split(".")[-1] in targets for name in inside):
        known = sorted({name.split(".")[-1] for name in inside})
        raise SelectionError(
            f"targets {targets!r}",
            f"'connector', or some of the blocks' linear maps {', '.join(known)}",
        )
    stack = names[id(vlm.blocks[0])].rpartition(".")[0]
    return rf"{re.escape(stack)}\.\d+\..*?({'|'.join(map(re.escape, targets))})"


def _connector_pattern(vlm: VLM) -> str:
    connector = anatomy.connector(vlm.model)
    own = (
        {id(module) for module in connector.modules() if isinstance(module, nn.Linear)}
        if connector is not None
        else ()
    )
    names = [name for name, module in vlm.model.named_modules() if id(module) in own]
    if not names:
        raise SelectionError(
            (
                f"targets 'connector' of {vlm.name!r}, which has no linear "
                "maps between tower and blocks"
            ),
            "name those of blocks",
        )
    return "|".join(map(re.escape, names))
