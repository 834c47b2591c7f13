"""Encode each picture once, however many prompts are about it."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM

Value = Tensor | None | tuple[Tensor | None, ...]


def remember_pictures(vlm: VLM, max_pictures: int = 1000) -> None:
    """Let a model's vision tower encode each picture once, from now on.

    Use it at the head of an experiment that asks about the same pictures again and again with a
    frozen tower; a quarter of a forward of pocket LLaVA is its tower. Outputs agree with those of
    the tower up to rounding. They are computed anew where the tower's weights have changed, where
    gradients are wanted, where something hooks into the tower, and where its outputs have no row
    for each picture.

    Parameters
    ----------
    vlm : VLM
        The model. The tower's ``forward`` is replaced on this object; a second call changes only
        the number of pictures.
    max_pictures : int, default 1000
        How many pictures are remembered, the latest ones.

    Examples
    --------
    >>> from xlvlms_tutorial import load
    >>> from xlvlms_tutorial.models.pictures import remember_pictures
    >>> model = load("pocket-llava")
    >>> remember_pictures(model)
    >>> model.generate([samples[0].image], ["Is there a frog?"], 2)
    ['no']
    """
    tower = anatomy.tower(vlm.model)
    if tower is None:
        return
    if not isinstance(tower.forward, _Memory):
        tower.forward = _Memory(tower)
    tower.forward.max_pictures = max_pictures


class _Memory:
    """The forward of a tower, with what it gave for the latest pictures."""

    def __init__(self, tower: nn.Module) -> None:
        self.max_pictures = 0
        self._tower = tower
        self._forward = tower.forward
        self._rows: OrderedDict[bytes, dict[str, Value]] = OrderedDict()
        self._weights: list[tuple[int, int]] = []
        self._kind: type = ModelOutput

    def __call__(self, pixel_values: Tensor, **options: object) -> object:
        plain = not any(isinstance(value, Tensor) for value in options.values())
        if pixel_values.ndim < 4 or torch.is_grad_enabled() or self._hooked() or not plain:
            return self._forward(pixel_values, **options)
        weights = [(tensor.data_ptr(), tensor._version) for tensor in self._tensors()]
        if weights != self._weights:
            self._rows.clear()
            self._weights = weights
        named = repr(sorted(options.items())).encode()
        keys = [picture_digest(picture, named) for picture in pixel_values]
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        rows = {key: self._rows[key] for key in first if key in self._rows}
        new = sorted(number for key, number in first.items() if key not in rows)
        if new:
            output = self._forward(pixel_values[new], **options)
            if not _has_rows(output, len(new)):
                whole = len(new) == len(keys)
                return output if whole else self._forward(pixel_values, **options)
            for row, number in enumerate(new):
                rows[keys[number]] = {name: _row(value, row) for name, value in output.items()}
            self._kind = type(output)
        self._remember(rows)
        joined = {}
        for name in rows[keys[0]]:
            joined[name] = _stacked([rows[key][name] for key in keys])
        return self._kind(**joined)

    def _remember(self, rows: dict[bytes, dict[str, Value]]) -> None:
        for key, row in rows.items():
            self._rows[key] = row
            self._rows.move_to_end(key)
        while len(self._rows) > self.max_pictures:
            self._rows.popitem(last=False)

    def _hooked(self) -> bool:
        for module in list(self._tower.modules())[1:]:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                # transformers collects outputs by hooks of its own
                if not getattr(hook, "__module__", "").startswith("transformers."):
                    return True
        return False

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._tower.parameters()
        yield from self._tower.buffers()


def picture_digest(picture: Tensor, options: bytes = b"") -> bytes:
    """Return a digest of a picture's values, the same for equal pictures alone.

    Parameters
    ----------
    picture : tensor
        The values, as a processor makes them.
    options : bytes
        What else is to be told apart; nothing by default.

    Returns
    -------
    bytes
        16 bytes.
    """
    raw = picture.detach().contiguous().cpu().view(torch.uint8).numpy()
    digest = hashlib.blake2b(raw, digest_size=16)
    digest.update(options)
    return digest.digest()


def _has_rows(output: object, n: int) -> bool:
    """Whether all tensors of an output have a row for each of n pictures."""
    if not isinstance(output, ModelOutput):
        return False
    for value in output.values():
        for tensor in value if isinstance(value, tuple) else (value,):
            # layers that were not wanted are None
            if tensor is not None and not (isinstance(tensor, Tensor) and len(tensor) == n):
                return False
    return True


def _row(value: Value, row: int) -> Value:
    """A copy of one row, so that the rest of a batch is not kept in memory."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_row(tensor, row) for tensor in value)
    return value[row].clone()


def _stacked(rows: list[Value]) -> Value:
    if rows[0] is None:
        return None
    if isinstance(rows[0], tuple):
        return tuple(_stacked(list(tensors)) for tensors in zip(*rows, strict=True))
    return torch.stack(rows)
