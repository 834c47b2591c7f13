"""Score blocks by how redundant they are, from pictures and prompts alone.

After the question of "Skip-It? Theoretical Conditions for Layer Skipping in Vision-Language Models"
(Hartman et al., arXiv 2509.25584): can it be told without scores of a task which layers may go? The
three measures are ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.methods.skipping.effects import resumable
from xlvlms_tutorial.methods.skipping.importance import block_similarity
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import Prompts, batches
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.validation import require

MEASURES = ("turn", "reading", "divergence")


def layer_redundancy(
    vlm: VLM,
    samples: Sequence[Sample],
    prompt: Prompts = None,
    measures: Sequence[str] = MEASURES,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    r"""Measure, without captions or answers, how much each block does.

    Use it to guess which blocks can be left out where no scores can be had. The smaller a number
    is, the more redundant is the block by that measure:

    - turn, of the geometry: one minus the mean cosine between what enters and what leaves the block
      at the tokens of the picture;
    - reading, of the information that flows: the share of attention that the positions behind the
      picture pay to it, a mean over heads;
    - divergence, of the function: :math:`\mathrm{KL}(p \,\|\, p_{-l})` of the next token with all
      blocks and without block :math:`l`, a mean over the positions behind the picture.

    The first two take a forward each. The last one takes a pass for each layer, which starts below
    it.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Samples with pictures. Nothing else of them is used.
    prompt : str, sequence of str, or function of a sample, optional
        What the model is asked. By default a description.
    measures : sequence of str
        Which of them, all by default.
    batch_size : int
        How many samples go through the model together.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    DataFrame
        A row for each layer, from 1 to L, which is the index. A column for each measure: turn from
        0 to 2, reading from 0 to 1, divergence in nats a token.

    Raises
    ------
    InputError
        If there are no samples, a measure is unknown, the batch size is below 1, or the model
        gives no attention of each block.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.skipping import layer_redundancy
    >>> table = layer_redundancy(vlm, samples[:1], measures=["turn", "reading"])
    >>> table.shape, table.columns.tolist()
    ((30, 2), ['turn', 'reading'])
    """
    samples = list(samples)
    unknown = sorted(set(measures) - set(MEASURES))
    require(not unknown, f"unknown measures {unknown}", f"give some of {', '.join(MEASURES)}")
    columns: dict[str, list[float]] = {}
    if "turn" in measures:
        options = {"prompt": prompt, "batch_size": batch_size, "progress": progress}
        alike = block_similarity(vlm, samples, "image", **options)
        columns["turn"] = (1 - alike["similarity"]).tolist()
    sums = {name: torch.zeros(vlm.n_layers, dtype=torch.float64) for name in measures}
    n_positions = 0
    for batch in batches(vlm, samples, prompt, batch_size=batch_size, progress=progress):
        behind = _behind_the_picture(batch)
        n_positions += int(behind.sum())
        if "reading" in sums:
            sums["reading"] += _attention_to_picture(vlm, batch, behind)
        if "divergence" in sums:
            sums["divergence"] += _divergence(vlm, batch, behind)
    for name in ("reading", "divergence"):
        if name in sums:
            columns[name] = (sums[name] / n_positions).tolist()
    layers = pd.RangeIndex(1, vlm.n_layers + 1, name="layer")
    return pd.DataFrame(columns, index=layers)[list(measures)]


def _behind_the_picture(batch: Batch) -> Bool[Tensor, "b t"]:
    """The positions after the picture's last one."""
    so_far = batch.mask("image").cumsum(dim=1)
    after = so_far == so_far[:, -1:]
    return after & (batch.spans != SPANS.index("image")) & (batch.spans != SPANS.index("padding"))


def _attention_to_picture(
    vlm: VLM, batch: Batch, behind: Bool[Tensor, "b t"]
) -> Float[Tensor, "l"]:
    """The attention that positions pay to the picture, summed over them, by layer."""
    with _with_weights(vlm):
        weights = vlm.forward(batch, logits=False, use_cache=False, output_attentions=True)
    weights = [one for one in weights.attentions or () if one is not None]
    require(
        len(weights) == vlm.n_layers,
        f"attention of {len(weights)} of {vlm.n_layers} blocks",
        "leave out 'reading' for this model",
    )
    image = batch.mask("image")[:, None, None, :]
    totals = []
    for of_layer in weights:
        to_picture = (of_layer.float() * image).sum(dim=-1).mean(dim=1)
        totals.append(float(to_picture[behind].sum()))
    return torch.tensor(totals, dtype=torch.float64)


@contextmanager
def _with_weights(vlm: VLM) -> Iterator[None]:
    """Let the language model compute attention in the way that has weights to give."""
    configs = {id(vlm.model.config): vlm.model.config}
    for module in anatomy.decoder(vlm.model).modules():
        if hasattr(module, "config"):
            configs[id(module.config)] = module.config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _divergence(vlm: VLM, batch: Batch, behind: Bool[Tensor, "b t"]) -> Float[Tensor, "l"]:
    """The divergences without each block, summed over positions, by layer."""
    run = Resumable(vlm, batch, resumes=resumable(vlm, batch))
    last = vlm.n_layers
    before = vlm.unembed(run.read(last, behind)).float().log_softmax(dim=-1)
    shares = before.exp()
    totals, states = [], None
    for layer in range(1, last + 1):
        start = layer - 1 if run.resumes else 0
        if start:
            states = run.read(start, start=start - 1, states=states)
        without = run.read(last, behind, start=start, states=states, change=skip(vlm, layer))
        after = vlm.unembed(without).float().log_softmax(dim=-1)
        # one sum a position, by a product: the vocabulary is large
        divergences = torch.linalg.vecdot(shares, before - after)
        totals.append(float(divergences.sum()))
    return torch.tensor(totals, dtype=torch.float64)
