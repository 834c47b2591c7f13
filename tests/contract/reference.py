"""References that know nothing of our interventions.

One forward over the whole sequence, without a cache, with plain hooks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.zoo import SUPPRESS, build, extended, padded
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

STEPS = 4
GENERATION = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "suppress_tokens": SUPPRESS}
ROUNDING = 1e-4
LAYERS = (1, 2, 3)

# what went in (b, t, d), what came out, positions (1, t, 1) -> what shall come out
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """A tiny model, a batch of two rows of which the second is padded on the
    left, and the length of the prompt.
    """

    name: str
    vlm: VLM
    batch: Batch
    length: int

    @property
    def modality(self) -> str | None:
        """What kind of positions the picture (clip, sound) has in the
        sequence, or None for cross-attention.
        """
        kinds = [SPANS[k] for k in self.batch.spans.unique().tolist()]
        return next((kind for kind in anatomy.MODALITIES if kind in kinds), None)


def case(name: str) -> Case:
    model, inputs = build(name)
    vlm = VLM(model, None, name)
    batch = vlm.prepare(padded(name, inputs))
    return Case(name, vlm, batch, batch["input_ids"].shape[1])


def repeated(batch: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """The rows of a batch several times over, one copy after the other."""
    longer = {key: torch.cat([value] * times) for key, value in batch.items()}
    # Molmo2 numbers the patches through all pictures of a batch
    if (pooling := batch.get("image_token_pooling")) is not None:
        longer["image_token_pooling"] = torch.cat(
            [pooling + copy * (int(pooling.max()) + 1) for copy in range(times)]
        )
    return longer


def generated(case: Case, **options: object) -> tuple[Tensor, Tensor]:
    """The new ids (b, steps) of a greedy generation with a cache, and the logits (b,
    steps, v) they were chosen by.
    """
    logits = []
    hook = anatomy.unembedding(case.vlm.model).register_forward_hook(
        lambda module, args, output: logits.append(output[:, -1].clone())
    )
    try:
        new = case.vlm.generate_ids(case.batch, **GENERATION, **options)
    finally:
        hook.remove()
    return new, torch.stack(logits, dim=1)


def whole(case: Case, new: Tensor) -> Tensor:
    """The logits (b, steps, v) at the same sites from one forward over
    prompt and new ids, without a cache.
    """
    recorded = []
    hook = anatomy.unembedding(case.vlm.model).register_forward_hook(
        lambda module, args, output: recorded.append(output.clone())
    )
    try:
        with torch.no_grad():
            case.vlm.model(**extended(case.name, dict(case.batch), new[:, :-1]), use_cache=False)
    finally:
        hook.remove()
    return recorded[0][:, case.length - 1 :]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return ((a - b).abs().max() / b.abs().max()).item()


DIFFERENCES: list[float] = []  # every difference that was measured, for the table of the report


def agree(a: Tensor, b: Tensor, description: object) -> None:
    difference = apart(a, b)
    DIFFERENCES.append(difference)
    assert difference <= ROUNDING, f"{description}: differ by {difference:.1e}"  # NaN differs too


def differ(a: Tensor, b: Tensor, description: object) -> None:
    assert apart(a, b) > 100 * ROUNDING, f"{description}: changes nothing"


@contextmanager
def changed(module: nn.Module, change: Change, rows: int = 2) -> Iterator[None]:
    """Pass what a module gives through a function of its input, its output and the positions."""

    def hook(
        module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple
    ) -> Tensor | tuple:
        inputs, outputs = _inputs(args, kwargs), anatomy.states_of(output)
        y = outputs.reshape(
            rows, -1, outputs.shape[-1]
        )  # OPT's last linear map gets all rows in one
        new = change(inputs, y, torch.arange(y.shape[1])[None, :, None])
        return anatomy.with_states(output, new.reshape(outputs.shape))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def fed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass what goes into a module through a function."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def residual(case: Case, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the residual stream of a layer through a function."""
    block = case.vlm.blocks[max(layer, 1) - 1]
    with fed(block, change) if layer == 0 else changed(block, lambda x, y, p: change(y)):
        yield


@contextmanager
def copied_caches(case: Case, layers: Sequence[int]) -> Iterator[None]:
    """In the prefill, these blocks hand on their input, and then get the previous block's
    keys and values for their own.
    """

    def hook(layer: int) -> Callable:
        def run(
            module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple
        ) -> Tensor | tuple:
            inputs = _inputs(args, kwargs)
            if inputs.shape[1] == 1:
                return output
            cache = kwargs["past_key_values"].layers
            if copyable(case, layer):
                own_cache, previous = cache[layer - 1], cache[layer - 2]
                n_held = own_cache.keys.shape[-2]  # a sliding window holds less than the prompt
                own_cache.keys, own_cache.values = (
                    previous.keys[..., -n_held:, :].clone(),
                    previous.values[..., -n_held:, :].clone(),
                )
            return anatomy.with_states(output, inputs)

        return run

    handles = [
        case.vlm.blocks[layer - 1].register_forward_hook(hook(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copyable(case: Case, layer: int) -> bool:
    """Whether the previous block has keys and values of the whole prompt, and
    this one keeps such keys itself.

    Not before block 1, of a picture, of a sliding window or a chunk, in a block that keeps a state
    instead, lends its keys or borrows them, or has wider heads.
    """
    cross = anatomy.cross_attention_layers(case.vlm.model)
    kinds = (
        getattr(case.vlm.model.config.get_text_config(decoder=True), "layer_types", None)
        or ["full_attention"] * 3
    )
    if (
        layer == 1
        or {layer, layer - 1} & cross
        or kinds[layer - 2] != "full_attention"
        or kinds[layer - 1] in ("linear_attention", "conv")
    ):
        return False
    previous, layer_attention = (
        anatomy.attention(case.vlm.blocks[k]) for k in (layer - 2, layer - 1)
    )
    shared = getattr(layer_attention, "is_kv_shared_layer", False) or getattr(
        layer_attention, "store_full_length_kv", False
    )
    return not shared and getattr(previous, "head_dim", None) == getattr(
        layer_attention, "head_dim", None
    )


def experts_beside(block: nn.Module) -> bool:
    """Whether a block has experts beside a dense MLP, so that its MLP
    is no single module (Gemma 4).
    """
    return hasattr(block, "mlp") and hasattr(block, "experts")


def experts_inside(block: nn.Module) -> bool:
    """Whether a block's MLP is a mixture of experts, without a single last linear map."""
    return not experts_beside(block) and hasattr(anatomy.mlp(block), "experts")


def traces(vlm: VLM) -> list[str]:
    """What an intervention has left behind on a model.

    Hooks, replaced forwards, books that are not empty.
    """
    leftovers = []
    for name, module in vlm.model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        leftovers += [f"hook of {name}" for hook in hooks if not _of_transformers(hook)]
        leftovers += [f"forward of {name}"] if "forward" in module.__dict__ else []
    leftovers += [f"edits of layer {layer}" for layer, queue in vlm.edits.items() if queue]
    leftovers += [f"fold in layer {layer}" for layer in vlm.folded if vlm.folded[layer]]
    leftovers += [f"bypass of layer {layer}" for layer in vlm.bypassed if vlm.bypassed[layer]]
    leftovers += [f"active: {name}" for name in vlm.active]
    return leftovers + (["running batch"] if vlm.running is not None else [])


def _of_transformers(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers")


def _inputs(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
