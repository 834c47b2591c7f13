"""A forward that is resumed at a layer.

Tower, connector and the blocks below have been run once, and are not run again.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK
from xlvlms_tutorial.activations.hooks import computed, reading
from xlvlms_tutorial.interventions.edits import replace
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import record_calls


class Resumable:
    """A forward over one batch that can be run again from a layer on.

    Other states may stand there, or other blocks above.

    The first pass goes through the whole model and records how it calls its decoder; later ones
    call the decoder alone. Where blocks share more than the residual stream, what is resumed may
    differ from a whole forward: try it first, and compare by :func:`same_up_to_rounding`.

    Parameters
    ----------
    vlm : VLM
        The model. What changes it in the first pass changes what tower and
        connector give later ones too.
    batch : Batch
        One batch, of samples or of plain texts.
    resumes : bool
        False makes every pass a whole forward, for models where resuming gives something else.

    Attributes
    ----------
    calls : list of (args, kwargs)
        What the decoder was called with in the first pass; empty before it.

    Examples
    --------
    The first tokens of the answers without block 2, at the cost of the blocks above it:

    >>> run = Resumable(vlm, batch)
    >>> states = run.read(1)
    >>> last = run.read(vlm.n_layers, "last", start=1, states=states, change=skip(vlm, 2))
    >>> first = vlm.unembed(last[:, 0]).argmax(dim=-1)
    >>> with skip(vlm, 2):
    ...     whole = vlm.forward(batch).logits[:, -1].argmax(dim=-1)
    >>> torch.equal(first, whole)
    True
    """

    def __init__(self, vlm: VLM, batch: Batch, resumes: bool = True) -> None:
        self.vlm, self.batch, self.resumes = vlm, batch, resumes
        self.calls: list[tuple[tuple, dict]] = []

    def forward(self) -> Float[Tensor, "b v"]:
        """Logits of the last position from the whole model, without a cache.

        Records the decoder's call.
        """
        with record_calls(anatomy.decoder(self.vlm.model)) as calls:
            self.calls = calls if self.resumes else []
            return self.vlm.forward(self.batch, logits=False, use_cache=False).logits[:, -1].float()

    @torch.no_grad()
    def read(
        self,
        layer: int,
        positions: str | Bool[Tensor, "b t"] = "all",
        *,
        start: int = 0,
        states: Float[Tensor, "b t d"] | None = None,
        change: AbstractContextManager | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "*n d"]:
        """What leaves a layer, at which the pass ends.

        Parameters
        ----------
        layer : int
            The layer that is read, 0 to L.
        positions : str or mask (b, t)
            Which positions are read, as in :func:`~xlvlms_tutorial.activations.hooks.reading`.
        start : int
            The layer at which the pass starts, with ``states`` in the place of what
            the blocks up to it would give.
        states : tensor (b, t, d), optional
            What leaves layer ``start``, at all positions; without a meaning where that is 0.
        change : context manager, optional
            An intervention that holds during this pass; edits of layer ``start`` act on ``states``.
        dtype : torch.dtype, optional
            The number format of what is read; by default the model's.

        Returns
        -------
        tensor
            On the CPU: (b, t, d) of all positions, (b, 1, d) of "last", (n, d) of a mask.
        """
        vlm = self.vlm
        with ExitStack() as stack:
            if start:
                stack.enter_context(skip(vlm, range(1, start + 1)))
                stack.enter_context(replace(vlm, states, start))
            stack.enter_context(change or nullcontext())
            found = stack.enter_context(
                reading(vlm, layer, positions=positions, dtype=dtype, stop=True)
            )
            if self.calls:
                args, kwargs = self.calls[0]
                stack.enter_context(vlm.run(self.batch))
                anatomy.decoder(vlm.model)(*args, **kwargs)
            else:
                self.forward()
        return computed(found)[layer, WHOLE_BLOCK][0]


def same_up_to_rounding(
    states: Float[Tensor, "*n"], expected: Float[Tensor, "*n"], dtype: torch.dtype
) -> bool:
    """Whether what a resumed pass gives is what a whole forward gives.

    Parameters
    ----------
    states, expected : tensor
        States or logits of the two passes, in one shape.
    dtype : torch.dtype
        The number format in which the model computes.

    Returns
    -------
    bool
        Whether no difference is more than two roundings (or 1e-5) of the largest expected value.

    Examples
    --------
    >>> import torch
    >>> expected = torch.tensor([-100.0, 1.0])
    >>> same_up_to_rounding(expected + 9e-4, expected, torch.float32)
    True
    >>> same_up_to_rounding(expected + 2e-3, expected, torch.float32)
    False
    """
    near = max(2 * torch.finfo(dtype).eps, 1e-5) * float(expected.abs().max())
    return torch.allclose(states, expected, rtol=0, atol=near)
