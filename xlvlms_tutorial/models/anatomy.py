"""The parts of a vision-language model that the chapters name.

Found by rule in any architecture of transformers.
"""

from dataclasses import dataclass
from inspect import unwrap

from torch import Tensor, nn

from xlvlms_tutorial.errors import AnatomyError, SelectionError

_BLOCK_LISTS = ("layers", "block", "h", "blocks")
_FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "ln_f",
    "norm_f",
    "final_layernorm",
    "layer_norm",
    "embedding_norm",
)
# what mixes positions in the place of an attention, and keeps a state instead of keys and values
_RECURRENT = ("linear_attn", "conv")
_ATTENTION = ("self_attn", "cross_attn", "attn", "attention", "mixer", *_RECURRENT)
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")
# what stands beside an MLP and is added to it (Gemma 4), so that they are the MLP together
_BESIDE = ("experts", "shared_mlp")
# choose experts, or add an embedding of the layer
_BETWEEN = ("router", "per_layer_input_gate", "per_layer_projection")
_LAST_NORMS = ("post_feedforward_layernorm",)
_FIRST_NORMS = ("input_layernorm", "self_attn_layer_norm", "attn_norm", "ln_1", "operator_norm")
# Gemma 3 norms the attention's output under the usual name of the second norm, so its own
# second norm is asked for first
_SECOND_NORMS = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "final_layer_norm",
    "ff_norm",
    "ln_2",
    "ffn_norm",
)
_LAST_LINEARS = ("down_proj", "ff_out", "fc2", "c_proj", "w2", "dense_4h_to_h", "o_proj")
_CONNECTORS = (
    "multi_modal_projector",
    "connector",
    "language_projection",
    "merger",
    "aligner",
    "embed_vision",
    "mm_projector",
)
_CONNECTORS += ("projector", "perceiver_resampler")
_CROSS = ("gated_cross_attn_layers",)  # Idefics
_TOWERS = ("vision_tower", "visual", "vision_model", "audio_tower")

PLACES = ("attention_input", "attention", "middle", "mlp_input", "mlp_hidden", "mlp", "block")
MODALITIES = ("image", "video", "audio")


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of a module's children that has one of the names, or None."""
    return next((c for n in names if isinstance(c := getattr(module, n, None), nn.Module)), None)


def decoder(model: nn.Module) -> nn.Module:
    """The language model's stack of blocks, never the vision tower's.

    Raises
    ------
    AnatomyError
        If no list of decoder blocks is found.
    """
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    # BLIP-2 and others answer with a whole causal language model: go on until an answer
    # names itself and holds the blocks
    while found is not None:
        inner = found.get_decoder() if hasattr(found, "get_decoder") else found
        if inner is not found:
            found = inner
        elif child(found, _BLOCK_LISTS) is not None:
            return found
        else:
            found = child(found, ("model", "decoder", "transformer"))
    raise AnatomyError("decoder blocks", type(model).__name__, _BLOCK_LISTS)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order.

    Block ``l`` (from 1) writes layer ``l`` of the residual stream.
    """
    return child(decoder(model), _BLOCK_LISTS)


def attention(block: nn.Module) -> nn.Module:
    """A block's attention (in Mllama's cross-attention blocks, the attention to the picture).

    Raises
    ------
    AnatomyError
        If the block has none under a known name.
    """
    return _need(child(block, _ATTENTION), "attention", block, _ATTENTION)


def recurrent(block: nn.Module) -> bool:
    """Whether a block mixes positions by a recurrence or a short convolution.

    It then keeps a state instead of keys and values.
    """
    return attention(block) is child(block, _RECURRENT)


def key_sharing(block: nn.Module) -> str | None:
    """Whether a block ``lends`` its keys and values to later blocks or ``borrows`` earlier ones.

    As in Gemma 4's small models.
    """
    inside = attention(block)
    if getattr(inside, "is_kv_shared_layer", False):
        return "borrows"
    return "lends" if getattr(inside, "store_full_length_kv", False) else None


def mlp(block: nn.Module) -> nn.Module:
    """The module whose output is what a block's MLP adds to the residual stream.

    In OPT its last linear map.

    Raises
    ------
    AnatomyError
        If the block has none under a known name, or experts beside its MLP, so
        that no module is the whole of it.
    """
    if (beside := child(block, _BESIDE)) is not None:
        advice = (
            f"Its MLP has {type(beside).__name__} beside it: skip both (part 'mlp') or "
            "read their sum (place 'mlp')"
        )
        raise AnatomyError("single MLP", type(block).__name__, _MLP, advice)
    return _need(child(block, _MLP), "MLP", block, _MLP)


def mixed(mlp: nn.Module) -> bool:
    """Whether an MLP is a mixture of experts."""
    return child(mlp, ("experts",)) is not None


def mlp_parts(block: nn.Module) -> list[nn.Module]:
    """The modules that make what a block's MLP adds.

    The MLP (in OPT its two linear maps), and what stands beside it.

    Raises
    ------
    AnatomyError
        If the block has no MLP under a known name.
    """
    beside = [part for name in _BESIDE if (part := child(block, (name,))) is not None]
    whole = (
        (_need(child(block, _MLP), "MLP", block, _MLP), *beside)
        if beside
        else (mlp_entry(block), mlp(block))
    )
    return list(dict.fromkeys(whole))


def mlp_entry(block: nn.Module) -> nn.Module:
    """The module that receives the MLP's input: the MLP itself, or in OPT its first linear map.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.
    """
    first = child(block, ("fc1",)) if child(block, _MLP[:-1]) is None else None
    return mlp(block) if first is None else first


def mlp_exit(block: nn.Module) -> nn.Module:
    """The last linear map of a block's MLP, whose input is the MLP's hidden layer.

    Under LoRA, its adapted form.

    Raises
    ------
    AnatomyError
        If there is none under a known name, or several, as in a mixture of experts.
    """
    inside = mlp(block)
    if mixed(inside):
        advice = (
            "Its MLP is a mixture of experts, with one such map each: skip or read the "
            "whole MLP (part or place 'mlp')"
        )
        raise AnatomyError(
            "last linear map of the MLP", type(block).__name__, _LAST_LINEARS, advice
        )
    found = (
        inside
        if isinstance(getattr(inside, "base_layer", inside), nn.Linear)
        else child(inside, _LAST_LINEARS)
    )
    return _need(found, "last linear map of the MLP", block, _LAST_LINEARS)


def first_norm(block: nn.Module) -> nn.Module:
    """The norm before a block's attention.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.
    """
    return _need(child(block, _FIRST_NORMS), "norm before the attention", block, _FIRST_NORMS)


def second_norm(block: nn.Module) -> nn.Module:
    """The norm before a block's MLP.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.
    """
    return _need(child(block, _SECOND_NORMS), "norm before the MLP", block, _SECOND_NORMS)


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last residual stream and the unembedding, or None.

    None in decoders whose blocks end with a norm (OPT-350m).
    """
    return child(decoder(model), _FINAL_NORMS)


def unembedding(model: nn.Module) -> nn.Module:
    """The linear map from the normed residual stream to one logit a word of the vocabulary.

    Raises
    ------
    AnatomyError
        If the model has none.
    """
    return _need(model.get_output_embeddings(), "unembedding", model, ("get_output_embeddings()",))


def vocabulary_size(model: nn.Module) -> int:
    """How many logits the unembedding makes of a state."""
    head = unembedding(model)
    # Idefics has a second map for its marks
    return head.out_features + getattr(head, "out_additional_features", 0)


def tower(model: nn.Module, modality: str = "image") -> nn.Module | None:
    """The encoder of pictures or of sounds, or None where a model has none for this modality.

    Videos go through the pictures' one.
    """
    found = model.get_encoder("audio" if modality == "audio" else "image")
    if found is not model and isinstance(found, nn.Module):
        return found
    inside = getattr(model, "model", model)
    names = _TOWERS[-1:] if modality == "audio" else _TOWERS[:-1]
    return child(inside, names) or child(model, names)


def connector(model: nn.Module) -> nn.Module | None:
    """The map from a tower's output to the language model's width, or None.

    In Qwen-VL it sits inside the tower.
    """
    inside = getattr(model, "model", model)
    places = (inside, model, *(t for m in ("image", "audio") if (t := tower(model, m)) is not None))
    return next(
        (found for place in places if (found := child(place, _CONNECTORS)) is not None), None
    )


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of a model by the part of the work they do.

    Tower, connector, attention, mlp and unembedding, those that it has. ``attention`` and ``mlp``
    are those of all decoder blocks. A connector may lie inside a tower.

    Raises
    ------
    AnatomyError
        If a block has no attention or MLP under a known name.
    """
    blocks = decoder_blocks(model)
    found = {
        "tower": [tower(model, modality) for modality in ("image", "audio")],
        "connector": [connector(model)],
        "attention": [attention(block) for block in blocks],
        "mlp": [
            part for block in blocks for part in (*mlp_parts(block), child(block, _BETWEEN[:1]))
        ],
        "unembedding": [unembedding(model)],
    }
    held = {
        name: list(dict.fromkeys(module for module in modules if module is not None))
        for name, modules in found.items()
    }
    return {name: modules for name, modules in held.items() if modules}


def cross_attention_layers(model: nn.Module) -> frozenset[int]:
    """Layers (from 1) whose own attention looks at the picture instead of the sequence.

    Empty in all but Mllama's kind.
    """
    return frozenset(
        k + 1
        for k in getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None)
        or ()
    )


def crossing(model: nn.Module) -> bool:
    """Whether pictures enter by cross-attention, and have no positions in the sequence.

    In blocks (Mllama) or between them (Idefics).
    """
    return bool(cross_attention_layers(model)) or child(decoder(model), _CROSS) is not None


def placeholders(model: nn.Module) -> dict[str, int]:
    """The ids that stand in ``input_ids`` for one visual (video, audio) token each.

    None where pictures enter by cross-attention.
    """
    if crossing(model):
        return {}
    ids = {name: getattr(model.config, f"{name}_token_id", None) for name in MODALITIES}
    return {name: token for name, token in ids.items() if token is not None}


@dataclass(frozen=True)
class Site:
    """Where a state is read: a module, and whether it is its input or its output."""

    module: nn.Module
    side: str


def site(block: nn.Module, place: str = "block") -> Site:
    r"""Where the states of a place inside a block are read.

    With :math:`a = \mathrm{attention}(\mathrm{LN}_1 x)`,
    :math:`m = W_2\,\phi(\mathrm{LN}_2(x + a))`: ``attention_input`` is :math:`\mathrm{LN}_1 x`,
    ``attention`` :math:`a`, ``middle`` :math:`x + a`, ``mlp_input`` :math:`\mathrm{LN}_2(x + a)`,
    ``mlp_hidden`` :math:`\phi(\cdot)`, ``mlp`` :math:`m` and ``block`` :math:`x + a + m` (Shukor
    and Cord, 2024, name these LN1, SA, X+SA, LN2, FC1, FC2, X+FC2).

    Raises
    ------
    SelectionError
        If the place is unknown.
    AnatomyError
        If the block has no such part.
    """
    beside, whole = child(block, _BESIDE) is not None, lambda: Site(mlp(block), "output")
    found = {
        "attention_input": lambda: Site(first_norm(block), "output"),
        "attention": lambda: Site(attention(block), "output"),
        "middle": lambda: Site(second_norm(block), "input"),
        # experts beside an MLP have an input of their own
        "mlp_input": lambda: Site(mlp(block) and second_norm(block), "output"),
        "mlp_hidden": lambda: Site(mlp_exit(block), "input"),
        # what stands beside an MLP is added to it before a last norm
        "mlp": lambda: (
            Site(
                _need(child(block, _LAST_NORMS), "norm after the MLP", block, _LAST_NORMS), "input"
            )
            if beside
            else whole()
        ),
        "block": lambda: Site(block, "output"),
    }
    if place not in found:
        raise SelectionError(f"unknown place {place!r} in a block", f"allowed: {', '.join(PLACES)}")
    return found[place]()


def states_in(args: tuple, kwargs: dict) -> Tensor:
    """The states among what a module is called with: the first argument, or ``hidden_states``."""
    return args[0] if args else kwargs["hidden_states"]


def states_of(output: Tensor | tuple) -> Tensor:
    """The states among what a module returns.

    Some return them with attention weights in a tuple.
    """
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Tensor | tuple, states: Tensor) -> Tensor | tuple:
    """What a module returned, with other states in their place."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _need(
    found: nn.Module | None, part: str, where: nn.Module, known: tuple[str, ...]
) -> nn.Module:
    if found is None:
        raise AnatomyError(part, type(where).__name__, known)
    return found


def logit_rules(model: nn.Module) -> dict[str, float]:
    """What the model itself does to its logits.

    LLaVA's classes do nothing, even around a language model whose config asks for it.
    """
    head, text = unembedding(model), model.config.get_text_config(decoder=True)
    owner = next(
        module for module in model.modules() if any(part is head for part in module.children())
    )
    code = unwrap(type(owner).forward).__code__
    asked = {
        name: getattr(text, name, None)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    }
    return {
        name: value
        for name, value in asked.items()
        if value is not None and name in (*code.co_names, *code.co_consts)
    }


def embedded(model: nn.Module) -> int | None:
    """How many tokens the model embeds, or None where its embedding does not say so.

    Embeddings of another make do not.
    """
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    # Idefics holds its marks in a second table
    return None if rows is None else rows + getattr(table, "num_additional_embeddings", 0)
