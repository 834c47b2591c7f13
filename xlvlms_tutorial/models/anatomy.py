"""The parts of a vision-language model that the chapters name.

Found by rule in any architecture of transformers.
"""

from dataclasses import dataclass
from inspect import unwrap

from torch import Tensor, nn

from xlvlms_tutorial.errors import AnatomyError, InputError

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
_LAST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# what blocks with a norm after the MLP call the one after attention
_ATTENTION_NORMS = ("post_self_attn_layernorm", "post_attention_layernorm")
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

SITES = ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post")
MODALITIES = ("image", "video", "audio")


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the first child of a module that has one of the given names, or None.

    Use it to add a rule for an architecture whose part goes by another name.

    Parameters
    ----------
    module : nn.Module
        Whose direct children are looked at.
    names : tuple of str
        Attribute names, the preferred one first. An attribute that is no module does not count.

    Returns
    -------
    nn.Module or None
        The child, or None if there is none under these names.

    Examples
    --------
    >>> from torch import nn
    >>> from xlvlms_tutorial.models import anatomy
    >>> block = nn.ModuleDict({"ffn": nn.Identity()})
    >>> anatomy.child(block, ("mlp", "ffn"))
    Identity()
    >>> anatomy.child(block, ("attention",)) is None
    True
    """
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            return part
    return None


def decoder(model: nn.Module) -> nn.Module:
    """Return the language model's stack of blocks, never the vision tower's.

    Use it to hook or call the language model alone: it gets embeddings with the picture merged in.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    nn.Module
        The module that holds the list of blocks and the final norm.

    Raises
    ------
    AnatomyError
        If no list of decoder blocks is found.

    Examples
    --------
    >>> from xlvlms_tutorial.models import decoder
    >>> decoder(vlm.model) is vlm.model.model.language_model
    True
    """
    candidate = model.get_decoder() if hasattr(model, "get_decoder") else None
    # BLIP-2 and others answer with a whole causal language model: go on until an answer
    # names itself and holds the blocks
    while candidate is not None:
        inner = candidate.get_decoder() if hasattr(candidate, "get_decoder") else candidate
        if inner is not candidate:
            candidate = inner
        elif child(candidate, _BLOCK_LISTS) is not None:
            return candidate
        else:
            candidate = child(candidate, ("model", "decoder", "transformer"))
    raise AnatomyError("decoder blocks", type(model).__name__, _BLOCK_LISTS)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks in order.

    Block ``l`` (from 1) writes layer ``l`` of the residual stream; a loaded model has them as
    ``vlm.blocks``.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    nn.ModuleList
        The L blocks.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> len(anatomy.decoder_blocks(vlm.model))
    30
    """
    return child(decoder(model), _BLOCK_LISTS)


def attention(block: nn.Module) -> nn.Module:
    """Return a block's attention, whose output is added to the residual stream.

    In Mllama's cross-attention blocks it is the attention to the picture.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The attention, or the recurrence or short convolution that stands in its place.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.attention(vlm.blocks[0]) is vlm.blocks[0].self_attn
    True
    """
    return _need(child(block, _ATTENTION), "attention", block, _ATTENTION)


def recurrent(block: nn.Module) -> bool:
    """Tell whether a block mixes positions by a recurrence or a short convolution.

    Such a block keeps a state instead of keys and values.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    bool
        False for a block with an attention.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.recurrent(vlm.blocks[0])
    False
    """
    return attention(block) is child(block, _RECURRENT)


def key_sharing(block: nn.Module) -> str | None:
    """Tell whether a block lends its keys and values to later blocks or borrows earlier ones.

    Gemma 4's small models share them.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    str or None
        "lends", "borrows", or None for a block that keeps its keys and values to itself.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.key_sharing(vlm.blocks[0]) is None
    True
    """
    module = attention(block)
    if getattr(module, "is_kv_shared_layer", False):
        return "borrows"
    return "lends" if getattr(module, "store_full_length_kv", False) else None


def mlp(block: nn.Module) -> nn.Module:
    """Return the module whose output is what a block's MLP adds to the residual stream.

    In OPT it is the MLP's last linear layer.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The MLP.

    Raises
    ------
    AnatomyError
        If the block has none under a known name, or experts beside its MLP, so that no single
        module is the MLP.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.mlp(vlm.blocks[0]) is vlm.blocks[0].mlp
    True
    """
    if (beside := child(block, _BESIDE)) is not None:
        advice = (
            f"Its MLP has {type(beside).__name__} beside it: skip both (part 'mlp') or "
            "read their sum (site 'mlp_out')"
        )
        raise AnatomyError("single MLP", type(block).__name__, _MLP, advice)
    return _need(child(block, _MLP), "MLP", block, _MLP)


def mixed(mlp: nn.Module) -> bool:
    """Tell whether an MLP is a mixture of experts.

    Such an MLP has no single hidden layer and no single last linear layer.

    Parameters
    ----------
    mlp : nn.Module
        An MLP, as :func:`mlp` returns it.

    Returns
    -------
    bool
        True if it holds experts.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.mixed(anatomy.mlp(vlm.blocks[0]))
    False
    """
    return child(mlp, ("experts",)) is not None


def mlp_parts(block: nn.Module) -> list[nn.Module]:
    """Return the modules that together make what a block's MLP adds.

    They are the MLP (in OPT its two linear layers), and what stands beside it. Skip or count all of
    them where the MLP as a whole is meant.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    list of nn.Module
        One module in most blocks.

    Raises
    ------
    AnatomyError
        If the block has no MLP under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.mlp_parts(vlm.blocks[0]) == [vlm.blocks[0].mlp]
    True
    """
    beside = [part for name in _BESIDE if (part := child(block, (name,))) is not None]
    if beside:
        modules = [_need(child(block, _MLP), "MLP", block, _MLP), *beside]
    else:
        modules = [mlp_entry(block), mlp(block)]
    return list(dict.fromkeys(modules))


def mlp_entry(block: nn.Module) -> nn.Module:
    """Return the module that receives the MLP's input: the MLP, or in OPT its first linear layer.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The module whose input is the MLP's.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.mlp_entry(vlm.blocks[0]) is vlm.blocks[0].mlp
    True
    """
    first = child(block, ("fc1",)) if child(block, _MLP[:-1]) is None else None
    return mlp(block) if first is None else first


def mlp_exit(block: nn.Module) -> nn.Module:
    """Return the last linear layer of a block's MLP, whose input is the MLP's hidden layer.

    Under LoRA it is the adapted form of this layer.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The linear layer from the hidden layer to the residual stream.

    Raises
    ------
    AnatomyError
        If there is none under a known name, or several, as in a mixture of experts.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.mlp_exit(vlm.blocks[0]).out_features
    576
    """
    module = mlp(block)
    if mixed(module):
        advice = (
            "Its MLP is a mixture of experts, with one such map each: skip or read the "
            "whole MLP (part 'mlp' or site 'mlp_out')"
        )
        raise AnatomyError(
            "last linear map of the MLP", type(block).__name__, _LAST_LINEARS, advice
        )
    linear = (
        module
        if isinstance(getattr(module, "base_layer", module), nn.Linear)
        else child(module, _LAST_LINEARS)
    )
    return _need(linear, "last linear map of the MLP", block, _LAST_LINEARS)


def first_norm(block: nn.Module) -> nn.Module:
    """Return the norm before a block's attention.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The norm, whose output is the attention's input.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.first_norm(vlm.blocks[0]) is vlm.blocks[0].input_layernorm
    True
    """
    return _need(child(block, _FIRST_NORMS), "norm before the attention", block, _FIRST_NORMS)


def second_norm(block: nn.Module) -> nn.Module:
    """Return the norm before a block's MLP.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.

    Returns
    -------
    nn.Module
        The norm; what enters it is the residual stream between attention and MLP.

    Raises
    ------
    AnatomyError
        If the block has none under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.second_norm(vlm.blocks[0]) is vlm.blocks[0].post_attention_layernorm
    True
    """
    return _need(child(block, _SECOND_NORMS), "norm before the MLP", block, _SECOND_NORMS)


def final_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm between the last residual stream and the unembedding, or None.

    Apply it to a state of layer L before you compare it with ``hidden_states[-1]`` of transformers,
    which is normed.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    nn.Module or None
        None in decoders whose blocks end with a norm (OPT-350m).

    Examples
    --------
    >>> from xlvlms_tutorial.models import final_norm
    >>> final_norm(vlm.model) is vlm.model.model.language_model.norm
    True
    """
    return child(decoder(model), _FINAL_NORMS)


def unembedding(model: nn.Module) -> nn.Module:
    """Return the linear layer from the normed residual stream to one logit per vocabulary entry.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    nn.Module
        The unembedding; where weights are tied it shares them with the embedding.

    Raises
    ------
    AnatomyError
        If the model has none.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.unembedding(vlm.model) is vlm.model.lm_head
    True
    """
    return _need(model.get_output_embeddings(), "unembedding", model, ("get_output_embeddings()",))


def vocabulary_size(model: nn.Module) -> int:
    """Return how many logits the unembedding makes of a state.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    int
        The number of logits, a second table of special tokens (Idefics) included.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.vocabulary_size(vlm.model)
    49152
    """
    head = unembedding(model)
    # Idefics has a second map for its marks
    return head.out_features + getattr(head, "out_additional_features", 0)


def tower(model: nn.Module, modality: str = "image") -> nn.Module | None:
    """Return the encoder of pictures or of sounds, or None where the model has none.

    Videos go through the encoder of pictures.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.
    modality : str
        "audio" for the encoder of sounds; "image" (the default) and any other for that of pictures.

    Returns
    -------
    nn.Module or None
        The encoder.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.tower(vlm.model) is vlm.model.model.vision_tower
    True
    >>> anatomy.tower(vlm.model, "audio") is None
    True
    """
    encoder = model.get_encoder("audio" if modality == "audio" else "image")
    if encoder is not model and isinstance(encoder, nn.Module):
        return encoder
    base = getattr(model, "model", model)
    names = _TOWERS[-1:] if modality == "audio" else _TOWERS[:-1]
    return child(base, names) or child(model, names)


def connector(model: nn.Module) -> nn.Module | None:
    """Return the map from a tower's output to the language model's width, or None.

    In Qwen-VL it sits inside the tower.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    nn.Module or None
        The connector, or None if there is none under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.connector(vlm.model) is vlm.model.model.multi_modal_projector
    True
    """
    base = getattr(model, "model", model)
    parents = (base, model, *(t for m in ("image", "audio") if (t := tower(model, m)) is not None))
    return next(
        (module for parent in parents if (module := child(parent, _CONNECTORS)) is not None), None
    )


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules of a model by the part of the work they do.

    Use it to count weights or operations part by part. ``attention`` and ``mlp`` are those of all
    decoder blocks. A connector may lie inside a tower.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    dict of str to list of nn.Module
        The keys are tower, connector, attention, mlp and unembedding, those that the model has.

    Raises
    ------
    AnatomyError
        If a block has no attention or MLP under a known name.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> {name: len(modules) for name, modules in anatomy.parts(vlm.model).items()}
    {'tower': 1, 'connector': 1, 'attention': 30, 'mlp': 30, 'unembedding': 1}
    """
    blocks = decoder_blocks(model)
    in_mlps = []
    for block in blocks:
        in_mlps += [*mlp_parts(block), child(block, _BETWEEN[:1])]
    candidates = {
        "tower": [tower(model, "image"), tower(model, "audio")],
        "connector": [connector(model)],
        "attention": list(map(attention, blocks)),
        "mlp": in_mlps,
        "unembedding": [unembedding(model)],
    }
    present = {}
    for name, modules in candidates.items():
        unique = dict.fromkeys(module for module in modules if module is not None)
        if unique:
            present[name] = list(unique)
    return present


def cross_attention_layers(model: nn.Module) -> frozenset[int]:
    """Return the layers (from 1) whose own attention looks at the picture instead of the sequence.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    frozenset of int
        Empty in all but Mllama's kind.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.cross_attention_layers(vlm.model)
    frozenset()
    """
    return frozenset(
        k + 1
        for k in getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None)
        or ()
    )


def crossing(model: nn.Module) -> bool:
    """Tell whether pictures enter by cross-attention, and have no positions in the sequence.

    They enter in blocks (Mllama) or between them (Idefics).

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    bool
        False where pictures are positions of the sequence, as in LLaVA.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.crossing(vlm.model)
    False
    """
    return bool(cross_attention_layers(model)) or child(decoder(model), _CROSS) is not None


def placeholders(model: nn.Module) -> dict[str, int]:
    """Return the ids that stand in ``input_ids`` for one visual (video, audio) token each.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    dict of str to int
        The id for each of ``anatomy.MODALITIES`` that the model's config names. Empty where
        pictures enter by cross-attention.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> list(anatomy.placeholders(vlm.model))
    ['image']
    """
    if crossing(model):
        return {}
    ids = {name: getattr(model.config, f"{name}_token_id", None) for name in MODALITIES}
    return {name: token for name, token in ids.items() if token is not None}


@dataclass(frozen=True)
class Site:
    """A site to read a state from: a module, and whether the state is its input or its output.

    Parameters
    ----------
    module : nn.Module
        The module to hook.
    side : str
        "input" or "output".

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.site(vlm.blocks[0], "resid_post").side
    'output'
    """

    module: nn.Module
    side: str


def site(block: nn.Module, site: str = "resid_post") -> Site:
    r"""Return where the states of a site inside a block are read.

    With :math:`a = \mathrm{attention}(\mathrm{LN}_1 x)`,
    :math:`m = W_2\,\phi(\mathrm{LN}_2(x + a))`: ``attn_in`` is :math:`\mathrm{LN}_1 x`,
    ``attn_out`` :math:`a`, ``resid_mid`` :math:`x + a`, ``mlp_in`` :math:`\mathrm{LN}_2(x + a)`,
    ``mlp_hidden`` :math:`\phi(\cdot)`, ``mlp_out`` :math:`m` and ``resid_post`` :math:`x + a + m`
    (Shukor and Cord, 2024, name these LN1, SA, X+SA, LN2, FC1, FC2, X+FC2). Where a block norms
    them before it adds them, as Gemma does, ``attn_out`` and ``mlp_out`` are what is added.

    Parameters
    ----------
    block : nn.Module
        A decoder block, such as ``vlm.blocks[0]``.
    site : str
        One of ``anatomy.SITES``; by default "resid_post", the residual stream that the block
        writes.

    Returns
    -------
    Site
        The module to hook, and the side of it.

    Raises
    ------
    InputError
        If the site is unknown.
    AnatomyError
        If the block has no such part.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> hidden = anatomy.site(vlm.blocks[0], "mlp_hidden")
    >>> hidden.module is vlm.blocks[0].mlp.down_proj, hidden.side
    (True, 'input')
    """
    sites = {
        "attn_in": lambda: Site(first_norm(block), "output"),
        "attn_out": lambda: _attention_output(block),
        "resid_mid": lambda: Site(second_norm(block), "input"),
        # experts beside an MLP have an input of their own
        "mlp_in": lambda: Site(mlp(block) and second_norm(block), "output"),
        "mlp_hidden": lambda: Site(mlp_exit(block), "input"),
        "mlp_out": lambda: _mlp_output(block),
        "resid_post": lambda: Site(block, "output"),
    }
    if site not in sites:
        raise InputError(f"unknown site {site!r} in a block", f"allowed: {', '.join(SITES)}")
    return sites[site]()


def _attention_output(block: nn.Module) -> Site:
    """Return where what attention adds is read."""
    module = attention(block)
    if child(block, _LAST_NORMS) is None:
        return Site(module, "output")
    return Site(child(block, _ATTENTION_NORMS) or module, "output")


def _mlp_output(block: nn.Module) -> Site:
    """Return where what the MLP adds is read."""
    last_norm = child(block, _LAST_NORMS)
    if child(block, _BESIDE) is not None:
        # what stands beside an MLP is added to it before a last norm
        last_norm = _need(last_norm, "norm after the MLP", block, _LAST_NORMS)
        return Site(last_norm, "output")
    module = mlp(block)
    return Site(module if last_norm is None else last_norm, "output")


def states_in(args: tuple, kwargs: dict) -> Tensor:
    """Return the states that a module is called with: the first argument, or ``hidden_states``.

    Use it in a forward pre-hook that is registered with ``with_kwargs=True``.

    Parameters
    ----------
    args : tuple
        The positional arguments of the call.
    kwargs : dict
        The named ones.

    Returns
    -------
    Tensor
        The states (b, t, d).

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.states_in((), {"hidden_states": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    return args[0] if args else kwargs["hidden_states"]


def states_of(output: Tensor | tuple) -> Tensor:
    """Return the states among what a module returns.

    Some modules return them with attention weights in a tuple.

    Parameters
    ----------
    output : Tensor or tuple
        What the module returned.

    Returns
    -------
    Tensor
        The states (b, t, d).

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.states_of((torch.ones(1, 2), None))
    tensor([[1., 1.]])
    """
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Tensor | tuple, states: Tensor) -> Tensor | tuple:
    """Return what a module returned, with other states in their place.

    Use it in a forward hook that changes the states.

    Parameters
    ----------
    output : Tensor or tuple
        What the module returned.
    states : Tensor
        The states (b, t, d) to put in.

    Returns
    -------
    Tensor or tuple
        Of the same form as ``output``.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.with_states((torch.zeros(2), None), torch.ones(2))
    (tensor([1., 1.]), None)
    """
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _need(
    module: nn.Module | None, part: str, parent: nn.Module, names: tuple[str, ...]
) -> nn.Module:
    if module is None:
        raise AnatomyError(part, type(parent).__name__, names)
    return module


def logit_rules(model: nn.Module) -> dict[str, float]:
    """Return what the model itself does to its logits after the unembedding.

    LLaVA's classes do nothing, even around a language model whose config asks for it.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    dict of str to float
        The values of ``final_logit_softcapping``, ``logit_scale`` and ``logits_scaling``, those
        that the model applies.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.logit_rules(vlm.model)
    {}
    """
    head = unembedding(model)
    text = model.config.get_text_config(decoder=True)
    owner = next(
        module for module in model.modules() if any(part is head for part in module.children())
    )
    code = unwrap(type(owner).forward).__code__
    in_code = (*code.co_names, *code.co_consts)
    rules = {}
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(text, name, None)
        if value is not None and name in in_code:
            rules[name] = value
    return rules


def embedded(model: nn.Module) -> int | None:
    """Return how many tokens the model embeds, or None where its embedding does not say so.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, such as ``vlm.model``.

    Returns
    -------
    int or None
        The rows of the embedding, a second table of special tokens (Idefics) included. None for
        embeddings that are no ``nn.Embedding``-like table.

    Examples
    --------
    >>> from xlvlms_tutorial.models import anatomy
    >>> anatomy.embedded(vlm.model)
    49152
    """
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    # Idefics holds its marks in a second table
    return None if rows is None else rows + getattr(table, "num_additional_embeddings", 0)
