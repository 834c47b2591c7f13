"""What a model allows, place by place.

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
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xlvlms_tutorial.errors import (
    AnatomyError,
    InputsError,
    InterventionError,
    LoadError,
    SelectionError,
    XlvlmsError,
)
from xlvlms_tutorial.models import anatomy

if TYPE_CHECKING:
    from xlvlms_tutorial.models.vlm import VLM


# a second norm without a first one comes after the attention
_BOTH_NORMS = (anatomy.first_norm, anatomy.second_norm)
# What each place needs of a block; what can be done, and where
_NEEDS: dict[tuple[str, str], tuple[Callable[[nn.Module], object], ...]] = {
    **{("read", place): (partial(anatomy.site, place=place),) for place in anatomy.PLACES},
    ("skip", "block"): (anatomy.mlp_parts,),
    ("skip", "mlp"): (anatomy.mlp_parts,),
    ("skip", "attention"): (anatomy.attention,),
    ("parallel", "first"): (*_BOTH_NORMS, anatomy.mlp),
    ("parallel", "second"): (*_BOTH_NORMS, anatomy.mlp),
    ("fold", "mlp"): (anatomy.mlp_exit,),
}
_NEEDS["read", "middle"] += _BOTH_NORMS
_NEEDS["read", "mlp_input"] += _BOTH_NORMS
# What hangs on norms that come before attention and MLP
_BEFORE = {
    ("read", "attention_input"),
    ("read", "middle"),
    ("read", "mlp_input"),
    ("parallel", "first"),
    ("parallel", "second"),
    ("fold", "mlp"),
}
# What hangs on a part being all of its kind in the block
_WHOLE = {
    "mlp": {
        ("read", "mlp_hidden"),
        ("read", "mlp"),
        ("skip", "mlp"),
        ("parallel", "first"),
        ("parallel", "second"),
        ("fold", "mlp"),
    },
    "attention": {("read", "attention"), ("skip", "attention")},
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


def check_known(what: str, place: str) -> None:
    """Stop a question about something that there is in no model.

    Raises
    ------
    SelectionError
        If what, or the place for it, is unknown.
    """
    if (what, place) not in _NEEDS:
        kinds = list(dict.fromkeys(kind for kind, _ in _NEEDS))
        places = [where for kind, where in _NEEDS if kind == what]
        raise SelectionError(
            f"unknown support {what!r}, {place!r}", f"allowed: {', '.join(places or kinds)}"
        )


def allowed(
    blocks: Iterable[nn.Module], refused: Mapping[tuple[str, str], str], what: str, place: str
) -> bool:
    """Whether all blocks allow something at a place, and no self-check has ``refused`` it.

    Raises
    ------
    SelectionError
        If what, or the place for it, is unknown.
    """
    check_known(what, place)
    return (what, place) not in refused and all(
        refusal(block, what, place) is None for block in blocks
    )


def require(vlm: "VLM", what: str, place: str, layers: Iterable[int]) -> None:
    """Stop what ``vlm.supports`` says is not possible in these layers.

    Raises
    ------
    AnatomyError
        If a block has no such part.
    InterventionError
        If a part is not all that does its work, or the self-checks found that it does not work.
    """
    for layer in layers:
        if (error := refusal(vlm.blocks[layer - 1], what, place)) is not None:
            raise error
    if (reason := vlm.refused.get((what, place))) is not None:
        raise InterventionError(
            f"{what} {place}, which fails this model's self-check ({reason})",
            "choose another place; see vlm.checks",
        )


def refusal(block: nn.Module, what: str, place: str) -> XlvlmsError | None:
    """Why something cannot be done at a place of a block, or None where it can.

    As the error to be raised.
    """
    try:
        for part in _NEEDS[what, place]:
            part(block)
    except AnatomyError as lacking:
        return lacking
    # OPT says it there
    if (what, place) in _BEFORE and not getattr(block, "do_layer_norm_before", True):
        return InterventionError(
            f"{what} {place}: the norms of {type(block).__name__} come after its parts",
            "choose another place",
        )
    if what == "fold" and (
        after := [name for name, _ in block.named_children() if re.fullmatch(_AFTER, name)]
    ):
        return InterventionError(
            "its block does not simply add its MLP's output to the residual stream "
            f"({after[0]} comes after it)"
        )
    for part, places in _WHOLE.items():
        if (what, place) in places and (others := beside(block, part)):
            told = (
                f"{what} {place}: {type(block).__name__} has {' and '.join(others)} beside its "
                f"{part}, which would go on working"
            )
            return InterventionError(told, "choose the whole block, or another part")
    return None


def beside(block: nn.Module, part: str) -> list[str]:
    """The names of what does a part's work beside the module that goes by its name.

    Of the part "mlp" or "attention" in a block, as experts do. Whatever holds a matrix and is
    neither of the two counts as both, unless its name says which.
    """
    known = {
        *_found(lambda block: [anatomy.attention(block)], block),
        *_found(anatomy.mlp_parts, block),
    }
    held = {
        name: list(module.parameters())
        for name, module in block.named_children()
        if module not in known
    }
    held |= {name: [weight] for name, weight in block.named_parameters(recurse=False)}
    others = [
        name
        for name, weights in held.items()
        if any(map(_matrix, weights)) and not re.search(_HARMLESS, name)
    ]
    kinds = {
        name: [kind for kind, like in _LIKE.items() if re.search(like, name)] or list(_LIKE)
        for name in others
    }
    return [name for name in others if part in kinds[name]]


def _found(find: Callable[[nn.Module], list[nn.Module]], block: nn.Module) -> list[nn.Module]:
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
        own = vars(module)
        compiled = "_orig_mod" in module._modules or own.get("_compiled_call_impl") is not None
        if (
            compiled
            or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
            or isinstance(module, torch.jit.ScriptModule)
        ):
            what = (
                f"{name or type(module).__name__!r} is compiled, and would ignore what is "
                "changed or read from now on"
            )
            raise LoadError(
                what,
                (
                    "give the model as it was before torch.compile (its _orig_mod), or load it "
                    "again and leave compiling out"
                ),
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout inside this block.

    Each part of it is left in the mode in which it was.
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
    """The transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted(model: nn.Module) -> frozenset[str]:
    """The arguments that a model's ``forward`` takes by name.

    Whatever wraps it or has been put in its place.
    """
    return frozenset(signature(type(base_of(model)).forward).parameters) - {"self"}


def require_arguments(model: nn.Module, inputs: Mapping[str, object]) -> None:
    """Refuse inputs without what a model cannot run without, as BLIP-2 without a picture.

    Raises
    ------
    InputsError
        If something is not there.
    """
    kind = type(base_of(model))
    taken = [value for name, value in signature(kind.forward).parameters.items() if name != "self"]
    needed = [
        value.name
        for value in taken
        if value.kind is value.POSITIONAL_OR_KEYWORD and value.default is value.empty
    ]
    if lacking := [name for name in needed if name not in inputs]:
        what = f"inputs without {', '.join(lacking)}, without which {kind.__name__} cannot run"
        raise InputsError(what, "give a picture (a clip, a sound) with each text")


def require_types(
    inputs: Mapping[str, object], accepts: frozenset[str], placeholders: Mapping[str, int]
) -> None:
    """Refuse inputs with a picture that lack the token types which the model takes.

    Raises
    ------
    InputsError
        If there are none.
    """
    lacking = [name for name in _TYPE_IDS if name in accepts and name not in inputs]
    if lacking and any((inputs["input_ids"] == token).any() for token in placeholders.values()):
        raise InputsError(lacking)


def require_left_padding(mask: Tensor | None) -> None:
    """Refuse rows that end with padding.

    What is last there is no word, and generation would go on from it.

    Raises
    ------
    InputsError
        If there is one.
    """
    if (
        mask is not None
        and mask.ndim == 2
        and (padded := (mask[:, -1] == 0).nonzero().flatten().tolist())
    ):
        advice = "make them with padding_side='left', or by vlm.batch"
        raise InputsError(
            f"inputs whose row {padded[0]} ends with padding, where its last word should be", advice
        )
