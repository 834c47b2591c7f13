"""Contract checks of what is changed.

Every intervention, generating with a cache, against a forward over everything without one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.contract.reference import (
    LAYERS,
    Case,
    agree,
    changed,
    copied_caches,
    copyable,
    differ,
    experts_beside,
    experts_inside,
    fed,
    generated,
    residual,
    whole,
)
from tests.zoo import SUPPRESS
from xlvlms_tutorial import interventions
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import AnatomyError, InterventionError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM


def each_attention(check: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """A check with eager attention, and with sdpa."""

    def with_each(case: Case) -> str | None:
        try:
            for kind in ("eager", "sdpa"):
                case.vlm.model.set_attn_implementation(kind)
                detail = check(case)
        finally:
            case.vlm.model.set_attn_implementation("sdpa")
        return detail

    return with_each


def same(
    case: Case, ours: AbstractContextManager, reference: AbstractContextManager, description: object
) -> None:
    """The logits of every step of a cached generation under ``ours`` are those of
    one forward under ``reference``.
    """
    with ours:
        new, logits = generated(case)
    with reference:
        agree(logits, whole(case, new), description)


def skipping(part: str) -> Callable[[Case], str | None]:
    """Each layer skipped in prefill, decode steps or both, and two layers at once."""

    def check(case: Case) -> None:
        for scope in ("prefill", "decode", "both"):
            for layer in LAYERS:
                ours = interventions.skip(case.vlm, layer, part, scope)
                same(case, ours, _skipped(case, layer, part, scope), (part, scope, layer))
        same(
            case,
            interventions.skip(case.vlm, [1, 3], part),
            _all(_skipped(case, layer, part, "both") for layer in (1, 3)),
            (part, "1, 3"),
        )

    return each_attention(check)


def _skipped(case: Case, layer: int, part: str, scope: str) -> AbstractContextManager:
    block = case.vlm.blocks[layer - 1]

    def change(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        mask = {"prefill": p < case.length, "decode": p >= case.length, "both": p >= 0}[scope]
        return torch.where(mask, x if part == "block" else torch.zeros_like(y), y)

    if part == "mlp" and experts_beside(block):  # what both make is added up before this norm
        return fed(
            block.post_feedforward_layernorm,
            lambda y: change(y, y, torch.arange(y.shape[1])[None, :, None]),
        )
    module = block
    if part == "attention":
        module = anatomy.attention(block)
    elif part == "mlp":
        module = anatomy.mlp(block)
    return changed(module, change)


@each_attention
def skip_previous(case: Case) -> str | None:
    """Skipped in the prefill, a block reads in decode steps what
    the block before it has written.
    """
    for layers in ([1], [2], [3], [2, 3]):
        with interventions.skip(case.vlm, layers, scope="prefill", cache="previous"):
            new, logits = generated(case)
        with copied_caches(case, layers):
            expected, theirs = generated(case)
        assert torch.equal(new, expected), f"tokens, {layers}"
        agree(logits, theirs, layers)
        with interventions.skip(case.vlm, layers, scope="prefill"):
            plain = generated(case)[1]
        if any(copyable(case, layer) for layer in layers):
            differ(logits[:, 1:], plain[:, 1:], ("previous instead of own", layers))
    copied = [layer for layer in LAYERS if copyable(case, layer)]
    return (
        None
        if copied == [2, 3]
        else f"layers {', '.join(map(str, copied)) or 'none'}; the others keep their own"
    )


def positions(case: Case) -> dict[object, Callable[[int], Tensor]]:
    """Ways to say where, and where that is in a sequence of a given length."""
    batch, length = case.batch, case.length

    def mask_of(*kinds: str) -> Callable[[int], Tensor]:
        mask = torch.isin(batch.spans, torch.tensor([SPANS.index(kind) for kind in kinds]))
        return lambda n: nn.functional.pad(mask, (0, n - length))

    last = lambda n: (torch.arange(n) >= length - 1).expand(2, -1)
    random_mask = torch.rand(batch.spans.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    ways = {
        "all": lambda n: torch.ones(2, n, dtype=torch.bool),
        "question": mask_of("question"),
        "last": last,
        "generated": lambda n: (torch.arange(n) >= length).expand(2, -1),
        random_mask: lambda n: nn.functional.pad(random_mask, (0, n - length)),
    }
    if case.modality is None:
        return ways
    return ways | {
        case.modality: mask_of(case.modality),
        (case.modality, "last"): lambda n: mask_of(case.modality)(n) | last(n),
    }


@each_attention
def adding(case: Case) -> None:
    """``add`` is the sum in the residual stream, at each kind of positions and with a gate."""
    vector = _noise(case, case.vlm.width) * 2
    clean = generated(case)[1]
    for layer in (0, *LAYERS):
        for selection, mask in positions(case).items():
            reference = residual(
                case,
                layer,
                lambda h, mask=mask: torch.where(mask(h.shape[1])[..., None], h + vector, h),
            )
            same(
                case,
                interventions.add(case.vlm, vector, layer, positions=selection),
                reference,
                ("add", layer, selection),
            )
        with interventions.add(case.vlm, vector, layer):
            differ(generated(case)[1], clean, ("add", layer))
    rows = _noise(case, 2, case.vlm.width)
    gated = residual(
        case, 2, lambda h: h + rows[:, None] * torch.tensor([1.0, 0.0])[:, None, None] * -3
    )
    same(
        case,
        interventions.add(case.vlm, rows, 2, -3.0, gate=torch.tensor([True, False])),
        gated,
        "one vector a sample, gated",
    )


@each_attention
def replacing(case: Case) -> None:
    """``replace`` is another state in the place of the one that was computed."""
    vlm, n = case.vlm, case.length
    rows, prompt = _noise(case, 2, vlm.width), _noise(case, 2, n, vlm.width)
    for layer in (0, *LAYERS):
        late = residual(
            case,
            layer,
            lambda h: torch.cat([h[:, : n - 1], rows[:, None].expand_as(h[:, n - 1 :])], 1),
        )
        same(case, interventions.patch(vlm, rows, layer, "last"), late, ("replace", layer, "last"))
        patched = residual(case, layer, lambda h: torch.cat([prompt, h[:, n:]], 1))
        same(case, interventions.patch(vlm, prompt, layer), patched, ("replace", layer, "prompt"))
    swapped_states = read(vlm, case.batch, 2)[2, "resid_post"].flip(0)
    swapped = residual(case, 2, lambda h: torch.cat([swapped_states, h[:, n:]], 1))
    same(case, interventions.patch(vlm, swapped_states, 2), swapped, "the other sample's states")


@each_attention
def projecting_out(case: Case) -> None:
    """``project_out`` takes away the part in the span of the directions (by QR)."""
    directions = _noise(case, 2, case.vlm.width)
    q = torch.linalg.qr(directions.double().T).Q
    for layer in (0, *LAYERS):
        without = residual(case, layer, lambda h: (h.double() - h.double() @ q @ q.T).float())
        same(
            case,
            interventions.ablate(case.vlm, directions, layer),
            without,
            ("project out", layer),
        )


@each_attention
def parallel(case: Case) -> str | None:
    """``parallel`` gives the MLP the input of the attention, through either norm."""
    if any(map(experts_beside, case.vlm.blocks)):
        for norm in ("first", "second"):
            with (
                pytest.raises(AnatomyError, match="no single MLP"),
                interventions.parallel(case.vlm, 2, norm),
            ):
                pass
        return "refused: experts beside the MLP"
    clean = generated(case)[1]
    for norm in ("first", "second"):
        for layers in ([1], [2], [1, 2, 3]):
            reference = _all(_parallel(case.vlm.blocks[layer - 1], norm) for layer in layers)
            same(
                case,
                interventions.parallel(case.vlm, layers, norm),
                reference,
                ("parallel", norm, layers),
            )
        with interventions.parallel(case.vlm, 2, norm):
            differ(generated(case)[1], clean, ("parallel", norm))
    return None


def _parallel(block: nn.Module, norm: str) -> AbstractContextManager:
    recorded = {}

    def keep(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        recorded["given"], recorded["normed"] = x, y
        return y

    take = lambda x: (recorded["normed"] if norm == "first" else recorded["given"]).reshape(x.shape)
    entry = anatomy.mlp_entry(block) if norm == "first" else anatomy.second_norm(block)
    return _all([changed(anatomy.first_norm(block), keep), fed(entry, take)])


@each_attention
def parallel_pairs(case: Case) -> None:
    """``parallel_pairs`` gives two blocks one input, and combines what they add."""
    clean = generated(case)[1]
    for combine in ("mean", "sum"):
        for layer in (1, 2):
            ours = interventions.parallel_pairs(case.vlm, layer, combine)
            same(case, ours, _pair(case, layer, combine), ("parallel pairs", combine, layer))
            with interventions.parallel_pairs(case.vlm, layer, combine):
                differ(generated(case)[1], clean, ("parallel pairs", combine, layer))


def _pair(case: Case, layer: int, combine: str) -> AbstractContextManager:
    recorded = {}
    first, second = case.vlm.blocks[layer - 1], case.vlm.blocks[layer]

    def start(x: Tensor) -> Tensor:
        recorded["start"] = x
        return x

    def restart(x: Tensor) -> Tensor:
        recorded["first"] = x
        return recorded["start"]

    def joined(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return (
            (recorded["first"] + y) / 2
            if combine == "mean"
            else recorded["first"] + y - recorded["start"]
        )

    return _all([fed(first, start), fed(second, restart), changed(second, joined)])


def folding(case: Case) -> str | None:
    """A folded vector is an added one; where a block does more than add its
    MLP's output, folding is refused.
    """
    vector, refused = _noise(case, case.vlm.width), []
    # Idefics runs on no embeddings without a picture, by which folding is measured
    cross = LAYERS if case.name == "idefics" else anatomy.cross_attention_layers(case.vlm.model)
    for layer in LAYERS:
        try:
            with interventions.fold(case.vlm, vector, layer, 0.5):
                new, logits = generated(case)
        except InterventionError:
            refused.append(layer)
            continue
        with interventions.add(case.vlm, vector, layer, 0.5):
            expected, theirs = generated(case)
        assert torch.equal(new, expected), f"tokens, layer {layer}"
        agree(logits, theirs, ("fold", layer))
    # a norm after the MLP; several last maps; a gate, and no sequence to look at
    normed = lambda block: (
        hasattr(block, "post_feedforward_layernorm") or hasattr(block, "post_mlp_layernorm")
    )
    due = [
        k
        for k, block in enumerate(case.vlm.blocks, 1)
        if normed(block) or experts_inside(block) or k in cross
    ]
    assert refused == due, f"refused in layers {refused}"
    return f"refused in layers {', '.join(map(str, refused))}" if refused else None


def masking(case: Case) -> None:
    """Masked weights are zeroed weights, and all weights return to the bit."""
    vlm = case.vlm
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    names = {module: name for name, module in vlm.model.named_modules()}
    linears = [
        module
        for block in vlm.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    random = torch.Generator().manual_seed(2)
    masks = {
        names[linear]: torch.rand(linear.weight.shape, generator=random) < 0.7 for linear in linears
    }
    copy = VLM(deepcopy(vlm.model), None, case.name)
    for name, mask in masks.items():
        weight = copy.model.get_submodule(name).weight
        weight.data = torch.where(mask, weight.data, torch.zeros_like(weight.data))
    with interventions.mask_weights(vlm, masks):
        new, logits = generated(case)
    expected, theirs = generated(case._replace(vlm=copy))
    assert torch.equal(new, expected) and torch.equal(logits, theirs)
    differ(logits, generated(case)[1], "masks")
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())


def beams(case: Case) -> str | None:
    """With two beams a sample, vectors, gates and masks that
    belong to samples follow their rows.
    """
    vlm, rows = case.vlm, _noise(case, 2, case.vlm.width) * 2
    search = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": SUPPRESS}
    if case.name == "llama4":
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            vlm.generate_ids(case.batch, **search)
        return "transformers does not repeat its pictures for beams"
    clean = vlm.generate_ids(case.batch, **search)
    alone = []
    for vector in rows:
        with interventions.add(vlm, vector, 2):
            alone.append(vlm.generate_ids(case.batch, **search))
    with interventions.add(vlm, rows, 2):
        assert torch.equal(
            vlm.generate_ids(case.batch, **search), torch.stack([alone[0][0], alone[1][1]])
        ), "vectors"
    for gate in (torch.tensor([True, False]), lambda states: _first_half(len(states))):
        with interventions.add(vlm, rows[0], 2, gate=gate):
            assert torch.equal(
                vlm.generate_ids(case.batch, **search), torch.stack([alone[0][0], clean[1]])
            ), "gates"
    mask = torch.zeros(2, case.length, dtype=torch.bool)
    mask[1, 5:] = True
    with interventions.add(vlm, rows[1] * 3, 1, positions=mask):
        masked = vlm.generate_ids(case.batch, **search)
    assert torch.equal(masked[0], clean[0]), "masks"
    for part in ("block", "attention", "mlp"):
        with interventions.skip(vlm, 1, part):
            cached = vlm.generate_ids(case.batch, **search)
            # Mllama without a cache would need its cross-attention mask lengthened,
            # which generate() does not do
            assert case.modality is None or torch.equal(
                cached, vlm.generate_ids(case.batch, use_cache=False, **search)
            ), part
    return None


def _first_half(rows: int) -> Tensor:
    return torch.arange(rows) < rows // 2


def _noise(case: Case, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(case.name)))


@contextmanager
def _all(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
