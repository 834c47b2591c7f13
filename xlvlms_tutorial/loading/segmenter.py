"""A small network that segments the embedded world: what class activation maps are tried on."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from xlvlms_tutorial.samples import as_image
from xlvlms_tutorial.validation import require


@dataclass(frozen=True)
class Segmenter:
    """A network that gives the logit of each class at each pixel, and what it takes.

    Parameters
    ----------
    network : torch.nn.Module
        Takes pictures (n, 3, side, side) and returns logits (n, classes, side, side).
    classes : tuple of str
        The classes; a pixel may have several or none.
    side : int
        Pixels a side.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_segmenter
    >>> segmenter = load_segmenter()
    >>> inputs = segmenter.inputs([sample.image for sample in samples])
    >>> tuple(segmenter.network(inputs).shape), segmenter.classes
    ((4, 3, 64, 64), ('subject', 'item', 'ground'))
    """

    network: nn.Module
    classes: tuple[str, ...]
    side: int

    def inputs(self, pictures: Sequence[object]) -> Float[Tensor, "n 3 side side"]:
        """Bring pictures to what the network takes.

        Parameters
        ----------
        pictures : sequence
            PIL images, or paths of image files; n of them.

        Returns
        -------
        Tensor (n, 3, side, side)
            Values of 0 (black) to 1.

        Raises
        ------
        InputError
            If there is no picture, or something given is none.
        """
        from xlvlms_tutorial.pocket.segmenter import seen

        single = isinstance(pictures, (str, Image.Image))
        require(not single and len(pictures), "no list of pictures", "give a list with one or more")
        return seen([as_image(picture) for picture in pictures])


def load_segmenter() -> Segmenter:
    """Load the pocket segmenter, a U-Net of 0.2 million weights trained on the embedded world.

    Use it where a decision about each pixel is to be explained and the truth is known
    (:func:`~xlvlms_tutorial.data.truth_masks`). It knows scenes of the world and nothing else. For
    photographs take a segmenter of transformers, such as SegFormer.

    Returns
    -------
    Segmenter
        The network in evaluation mode, float32, on the CPU.

    Examples
    --------
    >>> from xlvlms_tutorial.loading import load_segmenter
    >>> load_segmenter().classes
    ('subject', 'item', 'ground')
    """
    from xlvlms_tutorial.pocket.segmenter import SIDE, build_segmenter
    from xlvlms_tutorial.pocket.world import PARTS

    return Segmenter(build_segmenter(), PARTS, SIDE)
