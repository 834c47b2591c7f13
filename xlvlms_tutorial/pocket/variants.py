"""List the embedded models: a frozen language model behind several connectors.

Trained for one modality, for all three, for other encoders, or for a second language model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A connector that is shipped.

    ``VARIANTS`` holds them by the names that ``load`` takes.

    Parameters
    ----------
    run : str
        The training run it comes from.
    encoder : str, default "lite0"
        The vision encoder before it.
    reads : tuple of str, default ("image",)
        What it was trained to read: "image", "video", "audio".
    language : str, default "smollm2"
        The language model behind it: "smollm2" or "gemma".

    Examples
    --------
    >>> from xlvlms_tutorial.pocket import VARIANTS
    >>> VARIANTS["pocket-llava-video"].reads, VARIANTS["pocket-llava"].encoder
    (('video',), 'lite0')
    """

    run: str
    encoder: str = "lite0"
    reads: tuple[str, ...] = ("image",)
    language: str = "smollm2"


# The embedded models by the names that load takes.
VARIANTS = {
    "pocket-llava": Variant("image"),
    "pocket-llava-video": Variant("video", reads=("video",)),
    "pocket-llava-audio": Variant("audio", reads=("audio",)),
    "pocket-llava-joint": Variant("joint", reads=("image", "video", "audio")),
    # four encoders with one short recipe, for comparison with each other
    "pocket-llava-lite0": Variant("encoder-lite0", "lite0"),
    "pocket-llava-lite2": Variant("encoder-lite2", "lite2"),
    "pocket-llava-random": Variant("encoder-random", "random"),
    "pocket-llava-patches": Variant("encoder-patches", "patches"),
    # other seeds of the first 450 steps of pocket-llava's connector (its revision "step-0450")
    "pocket-llava-seed1": Variant("image-1"),
    "pocket-llava-seed2": Variant("image-2"),
    # connectors trained through a language model with less work: what has to be left out with
    # them is in methods, not in them
    "pocket-llava-skipped": Variant("skipped"),
    "pocket-llava-pruned": Variant("pruned"),
    "pocket-llava-short": Variant("short"),
    # the same tower before Gemma 3 270M, whose weights have terms of their own: only by name
    "pocket-gemma": Variant("gemma", language="gemma"),
}
