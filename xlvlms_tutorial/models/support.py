"""What a model allows, site by site.

Which states can be read, and which parts can be left out, moved or folded into. Blocks differ in
kind: mixtures of experts have no single hidden layer, parallel blocks no state between attention
and MLP, blocks whose norms come after their parts none before them, and some have experts beside a
dense MLP. What a block does not have is refused by name, and all else works.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn

from xlvlms_tutorial.errors import (
    AnatomyError,
    InputError,
    InterventionError,
    LoadError,
    XlvlmsError,
    lacking_inputs,
)
from xlvlms_tutorial.models import anatomy

# a second norm without a first one comes after the attention
_BOTH_NORMS = (anatomy.first_norm, anatomy.second_norm)
# What each site needs of a block; what can be done, and where
_NEEDS: dict[tuple[str, str], tuple[Callable[[nn.Module], object], ...]] = {
    **{("read", site): (partial(anatomy.site, site=site),) for site in anatomy.SITES},
    ("skip", "block"): (anatomy.mlp_parts,),
    ("skip", "mlp"): (anatomy.mlp_parts,),
    ("skip", "attention"): (anatomy.attention,),
    ("parallel", "first"): (*_BOTH_NORMS, anatomy.mlp),
    ("parallel", "second"): (*_BOTH_NORMS, anatomy.mlp),
    ("fold", "mlp"): (anatomy.mlp_exit,),
}
_NEEDS["read", "resid_mid"] += _BOTH_NORMS
_NEEDS["read", "mlp_in"] += _BOTH_NORMS
# What hangs on norms that come before attention and MLP
_BEFORE = {
    ("read", "attn_in"),
    ("read", "resid_mid"),
    ("read", "mlp_in"),
    ("parallel", "first"),
    ("parallel", "second"),
    ("fold", "mlp"),
}
# What hangs on a part being all of its kind in the block
_WHOLE = {
    "mlp": {
        ("read", "mlp_hidden"),
        ("read", "mlp_out"),
        ("skip", "mlp"),
        ("parallel", "first"),
        ("parallel", "second"),
        ("fold", "mlp"),
    },
    "attention": {("read", "attn_out"), ("skip", "attention")},
}
_LIKE = {
    "mlp": r"mlp|moe|expert|router|ffn|feed_?forward|gate|dense|fc\d",
    "attention": r"attn|attention|mamba|conv|ssm|mixer|recurrent",
}
# Gemma's embeddings of each layer come after the MLP and stay; a router alone adds nothing
_HARMLESS = r"per_layer|router"
_AFTER = r"post_(feedforward|mlp|ffn)\w*norm"

# Left out, these change positions or masks without an error: Qwen2.5-VL then answers
# with one-dimensional positions
_TYPE_IDS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


def check_known(action: str, site: str) -> None:
    """Refuse a question about something that no model has.

    Raises
    ------
    InputError
        If ``action``, or the ``site`` for it, is unknown.
    """
    if (action, site) not in _NEEDS:
        sites: dict[str, list[str]] = {}
        for kind, name in _NEEDS:
            sites.setdefault(kind, []).append(name)
        allowed_names = ", ".join(sites.get(action, sites))
        raise InputError(f"unknown support {action!r}, {site!r}", f"allowed: {allowed_names}")


def allowed(
    blocks: Iterable[nn.Module], refused: Mapping[tuple[str, str], str], action: str, site: str
) -> bool:
    """Tell whether all blocks allow something at a site, and no self-check has refused it.

    Parameters
    ----------
    blocks : iterable of nn.Module
        The decoder blocks that are asked about.
    refused : Mapping
        What the self-checks found wrong, as ``vlm.refused``.
    action : str
        "read", "skip", "parallel" or "fold".
    site : str
        Where: for "read" one of ``anatomy.SITES``; for "skip" "block", "mlp" or "attention"; for
        "parallel" "first" or "second"; for "fold" "mlp".

    Raises
    ------
    InputError
        If ``action``, or the site for it, is unknown.
    """
    check_known(action, site)
    if (action, site) in refused:
        return False
    return all(refusal(block, action, site) is None for block in blocks)


def require_support(
    blocks: Iterable[nn.Module], refused: Mapping[tuple[str, str], str], action: str, site: str
) -> None:
    """Refuse what ``vlm.supports`` says is not possible in these blocks.

    Parameters
    ----------
    blocks : iterable of nn.Module
        The decoder blocks that are asked about.
    refused : Mapping
        What the self-checks found wrong, as ``vlm.refused``.
    action : str
        "read", "skip", "parallel" or "fold".
    site : str
        Where: for "read" one of ``anatomy.SITES``; for "skip" "block", "mlp" or "attention"; for
        "parallel" "first" or "second"; for "fold" "mlp".

    Raises
    ------
    AnatomyError
        If a block has no such part.
    InterventionError
        If a part is not all that does its work, or the self-checks found that it does not work.
    """
    for block in blocks:
        error = refusal(block, action, site)
        if error is not None:
            raise error
    reason = refused.get((action, site))
    if reason is not None:
        raise InterventionError(
            f"{action} {site}, which fails this model's self-check ({reason})",
            "choose another site; see vlm.checks",
        )


def refusal(block: nn.Module, action: str, site: str) -> XlvlmsError | None:
    """Return the error that says why something cannot be done at a site of a block, or None.

    Parameters
    ----------
    block : nn.Module
        A decoder block.
    action : str
        "read", "skip", "parallel" or "fold".
    site : str
        Where: for "read" one of ``anatomy.SITES``; for "skip" "block", "mlp" or "attention"; for
        "parallel" "first" or "second"; for "fold" "mlp".
    """
    try:
        for part in _NEEDS[action, site]:
            part(block)
    except AnatomyError as error:
        return error
    # OPT says it there
    if (action, site) in _BEFORE and not getattr(block, "do_layer_norm_before", True):
        return InterventionError(
            f"{action} {site}: the norms of {type(block).__name__} come after its parts",
            "choose another site",
        )
    if action == "fold":
        for name, _ in block.named_children():
            if re.fullmatch(_AFTER, name):
                return InterventionError(
                    "its block does not simply add its MLP's output to the residual stream "
                    f"({name} comes after it)"
                )
    for part, sites in _WHOLE.items():
        if (action, site) not in sites:
            continue
        names = beside(block, part)
        if names:
            message = (
                f"{action} {site}: {type(block).__name__} has {' and '.join(names)} beside its "
                f"{part}, which would go on working"
            )
            return InterventionError(message, "choose the whole block, or another part")
    return None


def beside(block: nn.Module, part: str) -> list[str]:
    """Return the names of modules that do a part's work beside the module that goes by its name.

    ``part`` is "mlp" or "attention" of a ``block``; experts do the work of an MLP. Whatever holds a
    matrix and is neither of the two counts as both, unless its name says which.
    """
    parts = {
        *_modules(lambda block: [anatomy.attention(block)], block),
        *_modules(anatomy.mlp_parts, block),
    }
    weights = {}
    for name, module in block.named_children():
        if module not in parts:
            weights[name] = list(module.parameters())
    for name, weight in block.named_parameters(recurse=False):
        weights[name] = [weight]
    names = []
    for name, tensors in weights.items():
        if re.search(_HARMLESS, name) or not any(map(_matrix, tensors)):
            continue
        kinds = [kind for kind, pattern in _LIKE.items() if re.search(pattern, name)]
        if part in (kinds or _LIKE):
            names.append(name)
    return names


def _modules(find: Callable[[nn.Module], list[nn.Module]], block: nn.Module) -> list[nn.Module]:
    try:
        return find(block)
    except AnatomyError:
        return []


def _matrix(weight: Tensor) -> bool:
    return sum(side > 1 for side in weight.shape) > 1


def require_hookable(model: nn.Module) -> None:
    """Refuse a model that does not see the hooks which are registered from now on.

    Raises
    ------
    LoadError
        If the model or a part of it is compiled or scripted.
    """
    for name, module in model.named_modules():
        attributes = vars(module)
        compiled = (
            "_orig_mod" in module._modules
            or attributes.get("_compiled_call_impl") is not None
            or hasattr(attributes.get("forward"), "_torchdynamo_orig_callable")
            or isinstance(module, torch.jit.ScriptModule)
        )
        if compiled:
            message = (
                f"{name or type(module).__name__!r} is compiled, and would ignore what is "
                "changed or read from now on"
            )
            raise LoadError(
                message,
                (
                    "give the model as it was before torch.compile (its _orig_mod), or load it "
                    "again and leave compiling out"
                ),
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout inside this block.

    Each part of it goes back to the mode in which it was.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted(model: nn.Module) -> frozenset[str]:
    """Return the arguments that a model's ``forward`` takes by name.

    They are those of its class, whatever wraps it or has been put in its place.
    """
    return frozenset(signature(type(base_of(model)).forward).parameters) - {"self"}


def require_arguments(model: nn.Module, inputs: Mapping[str, object]) -> None:
    """Refuse inputs without what a model cannot run without, as BLIP-2 without a picture.

    Raises
    ------
    InputError
        If something is not there.
    """
    kind = type(base_of(model))
    missing = []
    for name, value in signature(kind.forward).parameters.items():
        needed = value.kind is value.POSITIONAL_OR_KEYWORD and value.default is value.empty
        if needed and name != "self" and name not in inputs:
            missing.append(name)
    if missing:
        message = f"inputs without {', '.join(missing)}, without which {kind.__name__} cannot run"
        raise lacking_inputs(message, "give a picture (a clip, a sound) with each text")


def require_types(
    inputs: Mapping[str, object], accepts: frozenset[str], placeholders: Mapping[str, int]
) -> None:
    """Refuse inputs with a picture that lack the token types which the model takes.

    Parameters
    ----------
    inputs : Mapping
        What the model's ``forward`` gets.
    accepts : frozenset of str
        The arguments that it takes by name.
    placeholders : Mapping of str to int
        The ids that stand for pictures, videos and sounds.

    Raises
    ------
    InputError
        If there are none.
    """
    missing = [name for name in _TYPE_IDS if name in accepts and name not in inputs]
    if not missing:
        return
    for token in placeholders.values():
        if (inputs["input_ids"] == token).any():
            raise lacking_inputs(missing)


def require_left_padding(mask: Tensor | None) -> None:
    """Refuse rows that end with padding.

    Their last token is no word, and generation would go on from it.

    Raises
    ------
    InputError
        If there is one.
    """
    if mask is None or mask.ndim != 2:
        return
    if padded := (mask[:, -1] == 0).nonzero().flatten().tolist():
        advice = "make them with padding_side='left', or by vlm.batch"
        raise lacking_inputs(
            f"inputs whose row {padded[0]} ends with padding, where its last word should be", advice
        )
