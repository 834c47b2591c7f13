"""Pool image tokens before they enter the decoder: a shorter prompt, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.errors import InterventionError
from xlvlms_tutorial.interventions.active import recorded
from xlvlms_tutorial.interventions.overrides import overridden
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require


@recorded
@contextmanager
def pool_tokens(vlm: VLM, size: int | tuple[int, int] = 2) -> Iterator[None]:
    """Give the decoder means of neighbouring image tokens in the place of the tokens.

    Use it as the baseline of :func:`drop_tokens`: it needs no scores, saves in all blocks, and
    keeps something of every part of the picture. What leaves the connector is averaged over
    rectangles of the picture's grid. Prompts made inside ``with`` have as many placeholders.

    Parameters
    ----------
    vlm : VLM
        A LLaVA with its processor, whose pictures are all of one size.
    size : int or (int, int)
        How many rows and columns of tokens become one: 2 (default) makes a mean of 2 x 2 tokens,
        (1, 2) of two neighbours in a row.

    Returns
    -------
    context manager
        Tokens are pooled inside ``with``. Batches have to be made there too.

    Raises
    ------
    InputError
        If the grid of tokens cannot be divided so.
    InterventionError
        If the model is no LLaVA with a processor: other architectures mark rows or pictures in the
        prompt, or number positions by rows and columns (M-RoPE).

    Examples
    --------
    >>> from xlvlms_tutorial.methods.dropping import pool_tokens
    >>> with pool_tokens(vlm, 2):
    ...     inputs = vlm.batch([samples[0].image], ["What is it?"])
    ...     answers = vlm.generate([samples[0].image], ["What is it?"], max_new_tokens=2)
    >>> int(inputs.mask("image").sum()), len(answers)
    (4, 1)
    """
    kind = vlm.model.config.model_type
    processor = vlm.processor
    if kind != "llava" or not hasattr(processor, "replace_image_token"):
        raise InterventionError(
            f"image tokens of {kind} cannot be pooled: its prompts are not those of a LLaVA with "
            "its processor, or its positions are a grid (M-RoPE)",
            "take a LLaVA from load, or give smaller pictures",
        )
    sizes = (size, size) if isinstance(size, int) else size
    vision = vlm.model.config.vision_config
    side = vision.image_size // processor.patch_size
    fits = all(part >= 1 and side % part == 0 for part in sizes)
    require(fits, f"size {size!r} for a grid of {side} x {side} tokens", f"divide {side} by each")

    def pooled(original: Callable, features: Tensor) -> Tensor:
        return _means(original(features), side, sizes)

    before = processor.replace_image_token

    def placeholders(*args: object, **kwargs: object) -> str:
        text = before(*args, **kwargs)
        n = text.count(processor.image_token)
        return processor.image_token * (n // prod(sizes))

    processor.replace_image_token = placeholders
    try:
        with overridden({anatomy.connector(vlm.model): pooled}):
            yield
    finally:
        del processor.replace_image_token


def _means(
    tokens: Float[Tensor, "b n d"], side: int, sizes: tuple[int, int]
) -> Float[Tensor, "b m d"]:
    """Means over rectangles of the grids that follow one another in a row (frames of a clip)."""
    rows, _, width = tokens.shape
    grids = tokens.reshape(-1, side, side, width).permute(0, 3, 1, 2)
    means = nn.functional.avg_pool2d(grids, sizes)
    return means.flatten(2).transpose(1, 2).reshape(rows, -1, width)
