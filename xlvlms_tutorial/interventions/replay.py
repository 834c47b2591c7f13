"""Resume a forward at a layer.

Vision tower, connector and the blocks below have run once, and are not run again.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.activations.activations import WHOLE_BLOCK
from xlvlms_tutorial.activations.hooks import computed, reading
from xlvlms_tutorial.interventions.edits import patch
from xlvlms_tutorial.interventions.skipping import skip
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import record_calls

# interventions that leave MLPs alone, or out
_OF_STREAM = {"add", "knock_out", "patch", "skip"}


class Resumable:
    """Run a forward over one batch once, and then again from a layer on.

    Use it to compare many interventions on upper layers: other states at a layer, or other blocks
    above it. The first pass goes through the whole model and records how it calls its decoder;
    later passes call the decoder alone. Where blocks share more than the residual stream, a resumed
    pass may differ from a whole forward: try it first, and compare by ``same_up_to_rounding``.

    Parameters
    ----------
    vlm : VLM
        The model. What changes it in the first pass changes what tower and connector give in later
        passes too.
    batch : Batch
        One batch, of samples or of plain texts, as ``vlm.batch`` makes it.
    resumes : bool
        True (default) resumes. False makes every pass a whole forward, for models where resuming
        gives something else.

    Attributes
    ----------
    calls : list of (args, kwargs)
        What the decoder was called with in the first pass; empty before it.

    Examples
    --------
    The first tokens of the answers without block 2, at the cost of the blocks above it:

    >>> import torch
    >>> from xlvlms_tutorial.interventions import skip
    >>> from xlvlms_tutorial.interventions.replay import Resumable
    >>> run = Resumable(vlm, batch)
    >>> states = run.read(1)
    >>> last = run.read(vlm.n_layers, "last", start=1, states=states, change=skip(vlm, 2))
    >>> first_tokens = vlm.unembed(last[:, 0]).argmax(dim=-1)
    >>> with skip(vlm, 2):
    ...     expected = vlm.forward(batch).logits[:, -1].argmax(dim=-1)
    >>> torch.equal(first_tokens.cpu(), expected.cpu())
    True
    """

    def __init__(self, vlm: VLM, batch: Batch, resumes: bool = True) -> None:
        self.vlm = vlm
        self.batch = batch
        self.resumes = resumes
        self.calls: list[tuple[tuple, dict]] = []

    def forward(self) -> Float[Tensor, "b v"]:
        """Run the whole model without a cache, and record the decoder's call.

        Call it for the unchanged logits; ``read`` calls it where it has not been called.

        Returns
        -------
        tensor (b, v)
            Logits of the last position, v the size of the vocabulary, in float32.

        Examples
        --------
        >>> from xlvlms_tutorial.interventions.replay import Resumable
        >>> logits = Resumable(vlm, batch).forward()
        >>> len(logits)
        4
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
        """Read what leaves a layer, at which the pass ends.

        Parameters
        ----------
        layer : int
            The layer that is read, 0 to L.
        positions : str or mask (b, t)
            Which positions are read: "all" (default), "last", or as in
            :func:`~xlvlms_tutorial.activations.hooks.reading`.
        start : int
            The layer at which the pass starts, with ``states`` in place of what the blocks up to it
            would compute. 0 (default) starts at the embeddings.
        states : tensor (b, t, d), optional
            What leaves layer ``start``, at all positions; not used where ``start`` is 0.
        change : context manager, optional
            An intervention that is in force during this pass; edits of layer ``start`` act on
            ``states``. By default there is none.
        dtype : torch.dtype, optional
            The dtype of the result; by default the model's.

        Returns
        -------
        tensor
            On the CPU: (b, t, d) of all positions, (b, 1, d) of "last", (n, d) of a mask.

        Examples
        --------
        >>> from xlvlms_tutorial.interventions.replay import Resumable
        >>> Resumable(vlm, batch).read(12, "last").shape
        torch.Size([4, 1, 576])
        """
        vlm = self.vlm
        with ExitStack() as stack:
            if start:
                stack.enter_context(skip(vlm, range(1, start + 1)))
                stack.enter_context(patch(vlm, states, start))
            stack.enter_context(change or nullcontext())
            if start < layer and positions == "last" and self._reads_one():
                mlp = anatomy.mlp(vlm.blocks[layer - 1])
                stack.enter_context(mlp.register_forward_pre_hook(_last_position))
            collected = stack.enter_context(
                reading(vlm, layer, positions=positions, dtype=dtype, stop=True)
            )
            if self.calls:
                args, kwargs = self.calls[0]
                stack.enter_context(vlm.run(self.batch))
                anatomy.decoder(vlm.model)(*args, **kwargs)
            else:
                self.forward()
        return computed(collected)[layer, WHOLE_BLOCK][0]

    def _reads_one(self) -> bool:
        """Whether the MLP of the block that is read may run at the last position alone.

        Behind its attention no position sees another. It may where this is known: in a LLaVA whose
        residual stream alone is changed.
        """
        names = {name.partition("(")[0] for name in self.vlm.active}
        return self.vlm.model.config.model_type == "llava" and names <= _OF_STREAM


def _last_position(module: nn.Module, args: tuple) -> tuple:
    states, *rest = args
    return (states[:, -1:], *rest)  # what comes out is broadcast over the residual stream


def same_up_to_rounding(
    states: Float[Tensor, "*n"], expected: Float[Tensor, "*n"], dtype: torch.dtype
) -> bool:
    """Whether two results agree up to rounding, as those of a resumed and a whole forward should.

    Use it before relying on ``Resumable``: where it is False, blocks of this model share more than
    the residual stream.

    Parameters
    ----------
    states, expected : tensor
        States or logits of the two passes, in one shape.
    dtype : torch.dtype
        The dtype in which the model computes.

    Returns
    -------
    bool
        Whether no difference exceeds two roundings of this dtype, or 1e-5, times the largest
        absolute expected value.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.interventions.replay import same_up_to_rounding
    >>> expected = torch.tensor([-100.0, 1.0])
    >>> same_up_to_rounding(expected + 9e-4, expected, torch.float32)
    True
    >>> same_up_to_rounding(expected + 2e-3, expected, torch.float32)
    False
    """
    largest = float(expected.abs().max())
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5) * largest
    return torch.allclose(states, expected, rtol=0, atol=tolerance)
