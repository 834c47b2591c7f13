"""Where a running decoder is in its sequence.

Interventions on the prompt alone, or on the answer alone, have to know this.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM


class Clock:
    """Follow where the decoder is, in the prompt or beyond it.

    The position is read off the decoder's cache each time it is called.
    """

    def __init__(self, vlm: VLM) -> None:
        self.reached = False  # whether this call has come to its owner's layer
        # rows and positions of this call: OPT's MLP puts all positions in one row
        self.shape = (0, 0)
        self.start = 0  # positions that the cache held before this call
        self.prompt = 1  # positions of the prompt, as far as it is known
        self._vlm, self._decoder = vlm, anatomy.decoder(vlm.model)

    @property
    def decoding(self) -> bool:
        """Whether this call computes only tokens after the prompt, with a cache."""
        return self.start >= self.prompt

    @property
    def partial(self) -> bool:
        """Whether this call computes a part of the prompt.

        This is so in a prefill in chunks, or one that goes on from an earlier cache.
        """
        return not self.decoding and (self.start > 0 or self.shape[1] < self.prompt)

    @property
    def mixed(self) -> bool:
        """Whether this call computes the prompt together with tokens that follow it.

        Each decode step without a cache does.
        """
        return not self.decoding and self.start + self.shape[1] > self.prompt

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Follow the decoder inside this block."""
        with self._decoder.register_forward_pre_hook(self.tick, with_kwargs=True):
            yield

    def tick(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read off how the decoder is called: a forward pre-hook of it, with keyword arguments.

        ``module`` is the decoder; ``args`` and ``kwargs`` are what it is called with.
        """
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        before = self.shape
        self.shape = tuple(tokens.shape[:2])
        self.reached = False
        self.start = 0 if cache is None else int(cache.get_seq_length())
        if self._vlm.running is not None:
            self.prompt = self._vlm.running["input_ids"].shape[1]
        elif cache is None and self.shape == (before[0], before[1] + 1):
            # one token more than in the last call, and no cache: a step of
            # generate(use_cache=False), with the same prompt
            pass
        elif self.start == 0 or self.shape[1] > 1:
            # no batch is known: several tokens at once are a prompt
            self.prompt = self.start + self.shape[1]
