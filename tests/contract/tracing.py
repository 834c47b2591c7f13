"""Contract checks of attention knock-out and activation patching."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.contract.intervening import each_attention, same
from tests.contract.reference import LAYERS, Case, agree, differ, generated, residual
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions import knock_out, patch, patch_spans
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS, Batch

_STATES = ("linear_attention", "conv")


@each_attention
def knocking_out(case: Case) -> str | None:
    """Cut attention is attention with a mask of our own, and what is cut off everywhere is not
    seen.
    """
    refused = [layer for layer in LAYERS if not _has_keys(case, layer)]
    for layer in refused:
        with (
            pytest.raises(InterventionError, match=f"of layer {layer}"),
            knock_out(case.vlm, "last", "question", layer),
        ):
            pass
    cut = [layer for layer in LAYERS if layer not in refused]
    clean = generated(case)[1]
    drawn = torch.rand(case.batch.spans.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    drawn[:, -1] = True  # what is cut shows in the logits
    queries = {"drawn": (drawn, lambda i: i < case.length, drawn)}
    keys = ~drawn  # each position keeps itself
    if case.modality is not None:
        picture = case.batch.mask(case.modality)
        everywhere = torch.ones_like(picture)
        queries["last"] = ("last", lambda i: i >= case.length - 1, everywhere)
        queries["generated"] = ("generated", lambda i: i >= case.length, everywhere)
    for name, (positions, chosen, mask) in queries.items():
        to_span, columns = (keys, keys) if name == "drawn" else (case.modality, picture)
        for layers in ([layer] for layer in cut):
            ours = knock_out(case.vlm, positions, to_span, layers)
            same(case, ours, _hidden(case, layers, chosen, mask, columns), (name, layers))
        ours = knock_out(case.vlm, positions, to_span, cut)
        same(case, ours, _hidden(case, cut, chosen, mask, columns), (name, cut))
    with knock_out(case.vlm, drawn, keys, cut):
        differ(generated(case)[1], clean, "knock-out")
    if not refused and case.modality is not None:
        _blind(case)
    return f"refused in layers {', '.join(map(str, refused))}" if refused else None


def _has_keys(case: Case, layer: int) -> bool:
    config = case.vlm.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * 3
    cross = anatomy.cross_attention_layers(case.vlm.model)
    return kinds[layer - 1] not in _STATES and layer not in cross


@contextmanager
def _hidden(
    case: Case, layers: list[int], chosen: object, mask: Tensor, columns: Tensor
) -> Iterator[None]:
    """In these layers, of one forward over the whole sequence, some positions do not see others.

    A query i is cut where ``chosen`` takes it and its row's mask holds it (or it comes after the
    prompt); a key j where ``columns`` of the prompt holds it.
    """

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
        states = anatomy.states_in(args, kwargs)
        rows, length = states.shape[:2]
        given = kwargs.get("attention_mask")
        scores = torch.zeros(rows, 1, length, length)
        for b in range(rows):
            for i in range(length):
                for j in range(length):
                    from_here = chosen(i) and (i >= case.length or bool(mask[b, i]))
                    to_there = j < case.length and bool(columns[b, j])
                    if (from_here and to_there) or (given is None and j > i):
                        scores[b, 0, i, j] = -torch.inf
        if given is not None and given.dtype == torch.bool:
            scores = scores.masked_fill(~given, -torch.inf)
        elif given is not None:
            scores = scores + given
        # rows of padding see nothing, and would become NaN
        return args, kwargs | {"attention_mask": scores.clamp(min=torch.finfo(scores.dtype).min)}

    modules = [anatomy.attention(case.vlm.blocks[layer - 1]) for layer in layers]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blind(case: Case) -> None:
    """Where no word sees the picture in any layer, another picture gives the same logits."""
    vlm, batch = case.vlm, case.batch

    def words(batch: Batch) -> Tensor:
        return ~torch.isin(
            batch.spans, torch.tensor([SPANS.index(k) for k in (case.modality, "padding")])
        )

    noise = torch.randn(*batch.spans.shape, vlm.width, generator=torch.Generator().manual_seed(4))
    seen = words(batch)
    with knock_out(vlm, words, case.modality, LAYERS):
        expected = vlm.forward(batch).logits[seen]
        with patch(vlm, noise, 0, case.modality):
            agree(vlm.forward(batch).logits[seen], expected, "another picture")
    with patch(vlm, noise, 0, case.modality):
        differ(vlm.forward(batch).logits[seen], expected, "another picture, seen")


@each_attention
def patching(case: Case) -> None:
    """Each cell of the grid is a whole forward with the states of the other input."""
    vlm, clean = case.vlm, case.batch
    corrupt = Batch(dict(clean) | {"input_ids": clean["input_ids"].clone()})
    corrupt["input_ids"][:, -2:] = torch.tensor([41, 42])
    corrupt.spans = clean.spans
    direction = torch.randn(
        vlm.forward(clean).logits.shape[-1], generator=torch.Generator().manual_seed(5)
    )
    metric = lambda logits: logits @ direction
    masks = {"question": clean.mask("question"), "last": clean.predicting}
    if case.modality is not None:
        masks[case.modality] = clean.mask(case.modality)
    for way, (source, target) in {"denoise": (clean, corrupt), "noise": (corrupt, clean)}.items():
        grid = patch_spans(vlm, clean, corrupt, list(masks), range(4), metric, way)
        for row, layer in enumerate(range(4)):
            states = read(vlm, source, layer)[layer, "resid_post"]
            for column, mask in enumerate(masks.values()):
                change = lambda h, new=states, m=mask: torch.where(m[..., None], new, h)
                with residual(case, layer, change):
                    expected = metric(vlm.forward(target).logits[:, -1])
                ours = torch.tensor(grid.values[row, column]).float()
                agree(ours, expected, ("patching", way, layer, column))
    differ(torch.tensor(grid.clean), torch.tensor(grid.corrupt), "the other input")
