"""The parts of a vision-language model that the chapters name: decoder blocks, final norm, unembedding."""

from torch import nn

from xlvlms_tutorial.errors import AnatomyError

_BLOCK_LISTS = ("layers", "h", "blocks")
_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "norm_f", "final_layernorm")


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((c for n in names if isinstance(c := getattr(module, n, None), nn.Module)), None)


def decoder(model: nn.Module) -> nn.Module:
    """The language model's stack of blocks, never the vision tower's.

    Raises
    ------
    AnatomyError
        If no list of decoder blocks is found.
    """
    found = model.get_decoder()
    # BLIP-2 and others answer with a whole causal language model: ask it again until it answers with itself
    while (inner := found.get_decoder() if hasattr(found, "get_decoder") else found) is not found:
        found = inner
    found = found if _child(found, _BLOCK_LISTS) is not None else _child(found, ("model", "decoder", "transformer"))
    if found is None or _child(found, _BLOCK_LISTS) is None:
        raise AnatomyError("decoder blocks", type(model).__name__, _BLOCK_LISTS)
    return found


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order; block ``l`` (from 1) writes layer ``l`` of the residual stream."""
    return _child(decoder(model), _BLOCK_LISTS)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last residual stream and the unembedding.

    Raises
    ------
    AnatomyError
        If the decoder has none under a known name.
    """
    norm = _child(decoder(model), _FINAL_NORMS)
    if norm is None:
        raise AnatomyError("final norm", type(model).__name__, _FINAL_NORMS)
    return norm


def unembedding(model: nn.Module) -> nn.Module:
    """The linear map from the normed residual stream to one logit a word of the vocabulary."""
    return model.get_output_embeddings()
