"""Prepare pictures, clips and sounds for the pocket models.

Pictures as they are, clips as four of their frames, sounds as log-mel pictures.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import AutoProcessor, BatchFeature, LlavaProcessor

from xlvlms_tutorial.errors import unusable_prompt
from xlvlms_tutorial.pocket.sounds import log_mel
from xlvlms_tutorial.pocket.tower import TowerConfig
from xlvlms_tutorial.samples import as_image

FRAMES_SEEN = 4  # of a clip's frames, evenly from the first to the last


class PocketProcessor(LlavaProcessor):
    """LLaVA's processor that also takes clips and sounds.

    Whatever is given stands where the picture's placeholder is. ``reads`` names what the connector
    behind it was trained on: "image", "video", "audio". A model refuses the rest. Importing this
    module registers it for AutoProcessor, so that a saved model loads again.
    """

    advice = (
        "load 'pocket-llava' for pictures, 'pocket-llava-video' for clips, 'pocket-llava-audio' "
        "for sounds, or 'pocket-llava-joint'"
    )

    def __init__(
        self,
        image_processor: object = None,
        tokenizer: object = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        reads: Sequence[str] = ("image",),
        **kwargs: object,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )
        self.reads = tuple(reads)

    def __call__(
        self,
        images: Sequence[object] | None = None,
        text: Sequence[str] | None = None,
        videos: Sequence[object] | None = None,
        audio: Sequence[object] | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Model inputs for texts about pictures, clips or sounds.

        A clip is a sequence of frames, a sound 32,000 samples at 16 kHz.

        Raises
        ------
        InputError
            If texts are about more than one kind of thing. If a frame is no picture, or a sound is
            not two seconds of finite samples.
        """
        inputs = {"pictures": images, "videos": videos, "sounds": audio}
        kinds = [kind for kind, value in inputs.items() if value is not None]
        if len(kinds) > 1:
            raise unusable_prompt(" and ".join(kinds))
        if videos is not None:
            return self._clips(videos, text, **kwargs)
        if audio is not None:
            images = [[log_mel(np.asarray(wave))] for wave in audio]
        return super().__call__(images=images, text=text, **kwargs)

    def _clips(
        self, videos: Sequence[Sequence[object]], text: Sequence[str], **kwargs: object
    ) -> BatchFeature:
        frames = [frame for video in videos for frame in seen(video)]
        inputs = super().__call__(
            images=[[frame] for frame in frames], text=[self.image_token] * len(frames), **kwargs
        )
        pixels = inputs["pixel_values"]
        placeholders = self.replace_image_token({"pixel_values": pixels}, 0) * FRAMES_SEEN
        prompts = [prompt.replace(self.image_token, placeholders) for prompt in text]
        words = self.tokenizer(prompts, **kwargs)
        return BatchFeature(
            {**words, "pixel_values": pixels.reshape(len(videos), FRAMES_SEEN, *pixels.shape[1:])}
        )


def seen(frames: Sequence[object]) -> list[Image.Image]:
    """Select the frames of a clip that the model sees, evenly from the first to the last.

    A shorter clip repeats some.

    Raises
    ------
    InputError
        If there are no frames, or one is no picture.
    """
    if not len(frames):
        return [as_image(None)]  # which is refused
    indices = np.linspace(0, len(frames) - 1, FRAMES_SEEN).round().astype(int)
    return [as_image(frames[k]) for k in indices]


AutoProcessor.register(TowerConfig, PocketProcessor)
