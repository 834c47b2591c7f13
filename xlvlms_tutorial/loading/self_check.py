"""Self-checks of a loaded model.

They show that it has the parts, positions and states that the chapters rely on.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import ModelOutput

from xlvlms_tutorial.errors import AnatomyError
from xlvlms_tutorial.loading.measured import (
    NEW_TOKENS,
    Outcome,
    apart,
    greedy_logits,
    rounding,
    words_of,
)
from xlvlms_tutorial.loading.site_checks import SITE_CHECKS
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input, on_output, record_calls


def self_check(vlm: VLM, batch: Batch) -> pd.DataFrame:
    """Run every check of ``CHECKS`` on one batch that holds a picture (video, sound).

    Use it on a model of an architecture that nobody has tested, or after you changed one. ``load``
    runs it itself for such a model. The batch may be made by hand (:meth:`VLM.prepare`), so that a
    model without a processor can be checked too.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        One row or more, each with a picture.

    Returns
    -------
    DataFrame
        A row for each check: check (its name), passed and detail. A check that raises has failed,
        and its detail is the error.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlavaConfig, LlavaForConditionalGeneration
    >>> from xlvlms_tutorial.loading import self_check
    >>> from xlvlms_tutorial.models import VLM
    >>> size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    >>> text = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 100, **size}
    >>> vision = {"model_type": "clip_vision_model", "num_hidden_layers": 2, **size}
    >>> vision |= {"image_size": 28, "patch_size": 14}
    >>> config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    >>> tiny = VLM(LlavaForConditionalGeneration(config).eval(), None, "tiny-llava")
    >>> ids = torch.tensor([[1, 99, 99, 99, 99, 5, 6]])  # a picture of four patches
    >>> inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    >>> inputs["pixel_values"] = torch.ones(1, 3, 28, 28)
    >>> table = self_check(tiny, tiny.prepare(inputs)).set_index("check")
    >>> table.loc["blocks counted", "detail"]
    '3 blocks found, the config says 3'
    """
    rows = [(name, *_outcome(check, vlm, batch)) for name, check in CHECKS.items()]
    return pd.DataFrame(rows, columns=["check", "passed", "detail"])


def blocks_counted(vlm: VLM, batch: Batch) -> Outcome:
    """There are as many decoder blocks as the config says."""
    expected = vlm.model.config.get_text_config(decoder=True).num_hidden_layers
    return vlm.n_layers == expected, f"{vlm.n_layers} blocks found, the config says {expected}"


def parts_found(vlm: VLM, batch: Batch) -> Outcome:
    """Each block has an attention and an MLP.

    A site that it has not is named, and refused where it is asked for.
    """
    for block in vlm.blocks:
        for part in (anatomy.attention, anatomy.mlp_parts):
            part(block)
    detail = f"attention, MLP and the norms before them in each of {vlm.n_layers} blocks"
    missing = [site for site in anatomy.SITES if not vlm.supports("read", site)]
    if missing:
        detail = (
            f"attention and MLP in each of {vlm.n_layers} blocks, not all of which have "
            f"{', '.join(missing)}"
        )
    return True, detail


def ends_found(vlm: VLM, batch: Batch) -> Outcome:
    """There is an unembedding, and the final norm has a known name or there is none."""
    norm = anatomy.final_norm(vlm.model)
    head = anatomy.unembedding(vlm.model)
    return head is not None, f"{_class_name(norm)} and {_class_name(head)}"


def _class_name(part: nn.Module | None) -> str:
    return "none" if part is None else type(part).__name__


def spans_measured(vlm: VLM, batch: Batch) -> Outcome:
    """Visual (video, audio) positions are those whose embedding is not that of its token.

    The embedding as given to the decoder.
    """
    if anatomy.crossing(vlm.model):
        return True, "skipped: pictures enter by cross-attention, not in the sequence"
    modalities = torch.tensor([SPANS.index(name) for name in anatomy.MODALITIES])
    labelled = torch.isin(batch.spans.cpu(), modalities)
    with record_calls(anatomy.decoder(vlm.model)) as calls:
        vlm.forward(batch, logits=False)
    embeddings = calls[0][1].get("inputs_embeds")
    if embeddings is None:
        return False, (
            "the decoder gets ids and no embeddings: pictures are words of its vocabulary, and "
            "their positions cannot be measured"
        )
    table = vlm.model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    # some placeholders lie behind the vocabulary and have no embedding of their own
    ids = batch["input_ids"] if rows is None else batch["input_ids"].clamp(max=rows - 1)
    with torch.no_grad():
        measured = (embeddings != table(ids).to(embeddings)).any(dim=-1).cpu()
    n_wrong = (measured != labelled).sum().item()
    counts = f"{labelled.sum()} positions labelled, {measured.sum()} measured, {n_wrong} differ"
    if not vlm.placeholders:
        return False, (
            f"{counts}: no id marks a picture's positions (the config names no "
            "image_token_id), as where a mask does"
        )
    replaced = set(batch["input_ids"].cpu()[measured & ~labelled].tolist())
    unknown = sorted(replaced - set(vlm.placeholders.values()))
    detail = counts
    if unknown:
        detail += f": more ids than the config's are replaced ({', '.join(map(str, unknown))})"
    return n_wrong == 0 and bool(measured.any()), detail


def states_recorded(vlm: VLM, batch: Batch) -> Outcome:
    """Block l < L gives ``hidden_states[l]``, and block 1 gets ``hidden_states[0]``.

    The final norm of what block L gives is the last.
    """
    hooked, output = _states(vlm, batch, output_hidden_states=True)
    output = getattr(output, "language_model_outputs", output)  # BLIP-2
    norm = anatomy.final_norm(vlm.model)
    with torch.no_grad():
        expected = [*hooked[:-1], hooked[-1] if norm is None else norm(hooked[-1])]
    if len(output.hidden_states) != len(expected):
        return False, f"{len(output.hidden_states)} hidden states for {vlm.n_layers} blocks"
    words = words_of(batch)
    shares = []
    for layer, states in enumerate(expected):
        share = apart(states[words], output.hidden_states[layer][words])
        if not share <= rounding(vlm):  # NaN is wrong too
            return False, f"layer {layer} differs by {share:.1e}"
        shares.append(share)
    return True, f"largest difference {max(shares):.1e}"


def logits_unembedded(vlm: VLM, batch: Batch) -> Outcome:
    """The unembedding of what leaves the last block is the logits."""
    hooked, output = _states(vlm, batch)
    words = words_of(batch)
    share = apart(vlm.unembed(hooked[-1])[words], output.logits[words])
    return share <= rounding(vlm), f"largest difference {share:.1e}"


def cache_equal(vlm: VLM, batch: Batch) -> Outcome:
    """Greedy tokens are the same with a KV cache as without one.

    Two tokens within rounding count as the same.
    """
    cached, _ = greedy_logits(vlm, batch, use_cache=True)
    plain, logits = greedy_logits(vlm, batch, use_cache=False)
    for row in range(len(plain)):
        different = (cached[row] != plain[row]).nonzero().flatten().tolist()
        if not different:
            continue
        step = different[0]
        scores = logits[row, step]
        largest = scores[scores.isfinite()].abs().max()
        with_cache = scores[cached[row, step]]
        without = scores[plain[row, step]]
        gap = (without - with_cache).abs() / largest
        if gap > rounding(vlm):
            return False, (
                f"sample {row}: tokens differ from new token {step + 1} on, "
                f"{cached[row].tolist()} and {plain[row].tolist()}"
            )
    return True, f"{NEW_TOKENS} tokens"


def block_in_path(vlm: VLM, batch: Batch) -> Outcome:
    """The logits change when a block's output is replaced by its input."""
    number = min(2, vlm.n_layers)
    plain = vlm.forward(batch).logits

    def _bypass(_: nn.Module, args: tuple, named: dict, output: Tensor | tuple) -> Tensor | tuple:
        return anatomy.with_states(output, anatomy.states_in(args, named))

    # first of all hooks: the model's own must see what the bypass leaves
    with vlm.blocks[number - 1].register_forward_hook(_bypass, with_kwargs=True, prepend=True):
        bypassed = vlm.forward(batch).logits
    words = words_of(batch)
    share = apart(bypassed[words], plain[words])
    return share > 0, f"without block {number} logits differ by {share:.1e}"


# Without one of these nothing can be done
REQUIRED: dict[str, Callable[[VLM, Batch], Outcome]] = {
    "blocks counted": blocks_counted,
    "parts of each block": parts_found,
    "final norm and unembedding": ends_found,
    "spans": spans_measured,
    "states": states_recorded,
    "logits": logits_unembedded,
    "generation": cache_equal,
    "block bypass": block_in_path,
}
# All self-checks by name, those of single sites included
CHECKS = REQUIRED | SITE_CHECKS


def _outcome(check: Callable[[VLM, Batch], Outcome], vlm: VLM, batch: Batch) -> Outcome:
    try:
        return check(vlm, batch)
    except Exception as error:
        # whatever an unknown model raises is what the table has to say about it
        return False, f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _states(
    vlm: VLM, batch: Batch, **options: object
) -> tuple[list[Float[Tensor, "b t d"]], ModelOutput]:
    """Return states of layers 0 to L as the blocks get and give them, and what the model returns.

    One forward gives both.
    """
    layers = range(vlm.n_layers + 1)
    states: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(on_input(vlm.blocks[0], partial(states.__setitem__, 0)))
        for layer, block in enumerate(vlm.blocks, 1):
            stack.enter_context(on_output(block, partial(states.__setitem__, layer)))
        output = vlm.forward(batch, **options)
    if missing := sorted(set(layers) - set(states)):
        raise AnatomyError(
            f"state of layer {missing[0]} in a forward",
            type(vlm.model).__name__,
            ("blocks that the model runs",),
        )
    in_order = [states[layer] for layer in layers]
    return in_order, output
