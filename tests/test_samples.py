"""Samples: pictures, clips and sounds, made when asked for; datasets by name."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.errors import InputError, TokenOfInterestError
from xlvlms_tutorial.pocket import clips, postcard_texts, postcards, sounds, world
from xlvlms_tutorial.samples import (
    PROMPTS,
    Sample,
    as_image,
    as_sound,
    media,
    mentioning,
)

MEDIA = {
    "scenes": "images",
    "composition": "images",
    "postcards": "images",
    "clips": "videos",
    "sounds": "audio",
}


def test_sources_may_be_pictures_files_or_functions(tmp_path):
    picture = Image.new("RGBA", (4, 3), (1, 2, 3, 255))
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png", lambda: picture):
        image = Sample("a", source).image
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("wrong", [b"bytes", 3.5, None])
def test_other_sources_are_refused(wrong):
    with pytest.raises(InputError, match="give a PIL image"):
        as_image(wrong)


def test_a_truncated_file_is_refused(tmp_path):
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InputError, match="cut.png"):
        as_image(tmp_path / "cut.png")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_picture_stands_as_its_exif_says(orientation, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(6, 10, 3)).save(tmp_path / f"phone.{ending}", exif=exif)
    image = as_image(tmp_path / f"phone.{ending}")
    assert image.size == ((6, 10) if orientation > 4 else (10, 6))
    assert image.tobytes() == load_image(str(tmp_path / f"phone.{ending}")).tobytes()
    with Image.open(tmp_path / f"phone.{ending}") as opened:
        assert as_image(opened).tobytes() == image.tobytes()
    assert as_image(image).tobytes() == image.tobytes()  # it is turned once


def test_a_damaged_exif_leaves_the_picture_as_it_is(tmp_path):
    Image.fromarray(noise(6, 10, 3)).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(
        tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40
    )
    assert as_image(tmp_path / "b.jpg").size == (10, 6)


def test_pictures_in_rgb_stay_as_they_are():
    pixels = noise(6, 10, 3)
    assert np.array_equal(np.asarray(as_image(Image.fromarray(pixels))), pixels)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("mode", "white"),
    [
        ("I;16", 65535),
        ("I;16B", 65535),
        ("I", 255),
        ("I", 65535),
        ("I", 2**31 - 1),
        ("F", 1.0),
        ("F", 255.0),
    ],
)
def test_grey_levels_of_any_depth_become_those_of_eight_bits(mode, white):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
    levels = (RAMP * white).round(0 if white > 1 else 9).astype(dtype)
    picture = Image.fromarray(levels)
    assert picture.mode == mode
    image = np.asarray(as_image(picture)).astype(float)
    assert np.abs(image - 255 * RAMP[..., None]).max() <= 1
    assert image.mean() == pytest.approx(127.5, abs=1)


def test_a_dark_picture_of_16_bits_is_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(as_image(tmp_path / "dark.png")).max() == 1


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 1e20])
def test_grey_levels_that_have_no_scale_are_refused(wrong):
    with pytest.raises(
        InputError, match="grey levels from .*; scale them to 0 to 1, or to 0 to 255"
    ):
        as_image(Image.fromarray(np.array([[0.5, wrong]], np.float32)))


def transparent(mode: str) -> Image.Image:
    picture = Image.fromarray(noise(8, 8, 4), "RGBA")
    if mode == "P":
        picture = picture.convert("RGB").quantize(8)
        picture.info["transparency"] = 3
    elif mode in ("RGB", "L"):
        picture = Image.fromarray(np.full((8, 8), 7, np.uint8)).convert(mode)
        picture.info["transparency"] = 7 if mode == "L" else (7, 7, 7)
    return picture.convert(mode) if mode in ("LA", "RGBa") else picture


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_laid_on_white_as_transformers_lays_it(mode):
    picture = transparent(mode)
    image = np.asarray(as_image(picture))
    assert np.array_equal(image, convert_to_rgb(picture, return_numpy=True))
    assert not np.array_equal(image, np.asarray(picture.convert("RGB")))
    flat = Image.new("RGBA", (2, 2), (9, 9, 9, 0)).convert("RGBa")
    assert (
        np.asarray(as_image(flat)).min()
        == 255
        == np.asarray(as_image(Image.new("LA", (2, 2), (9, 0)).convert("La"))).min()
    )


# Arrays, bytes, addresses

PIXELS = noise(6, 10, 4)
FLOATS = PIXELS / 255
ARRAYS = {
    "bytes": (PIXELS[..., :3], PIXELS[..., :3]),
    "with opacity": (PIXELS, np.asarray(as_image(Image.fromarray(PIXELS)))),
    "grey": (PIXELS[..., 0], PIXELS[..., [0, 0, 0]]),
    "grey in one channel": (PIXELS[..., :1], PIXELS[..., [0, 0, 0]]),
    "channels first": (np.moveaxis(PIXELS[..., :3], 2, 0), PIXELS[..., :3]),
    "one channel first": (PIXELS[None, ..., 0], PIXELS[..., [0, 0, 0]]),
    "floats to 1": (FLOATS[..., :3], PIXELS[..., :3]),
    "half floats to 255": (PIXELS[..., :3].astype(np.float16), PIXELS[..., :3]),
    "16 bits": (PIXELS[..., :3].astype(np.uint16) * 257, PIXELS[..., :3]),
    "whole numbers": (PIXELS[..., :3].astype(np.int64), PIXELS[..., :3]),
    "yes and no": (PIXELS[..., 0] > 99, 255 * (PIXELS[..., [0, 0, 0]] > 99)),
    "torch": (torch.tensor(FLOATS[..., :3]).permute(2, 0, 1), PIXELS[..., :3]),
    "torch that is trained": (torch.tensor(FLOATS[..., :3]).requires_grad_(True), PIXELS[..., :3]),
    "a view": (PIXELS[::-1, ::-1, :3], PIXELS[::-1, ::-1, :3]),
    "as OpenCV's, turned": (PIXELS[..., 2::-1][..., ::-1], PIXELS[..., :3]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_pictures(name):
    array, expected = ARRAYS[name]
    image = as_image(array)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    assert Sample("a", array).image.tobytes() == image.tobytes()


WRONG_ARRAYS = {
    "one dimension": np.zeros(5),
    "a number": np.float64(3.0),
    "two pictures": np.zeros((2, 6, 10, 3)),
    "five channels": np.zeros((6, 10, 5)),
    "two channels": np.zeros((6, 10, 2)),
    "words": np.array([["a", "b"]]),
    "objects": np.array([[None]]),
    "complex": np.zeros((2, 2), complex),
    "structured": np.zeros((2, 2), [("r", "u1")]),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_arrays_that_are_no_picture_are_refused_with_their_shape(name):
    with pytest.raises(
        InputError,
        match=(
            r"of .* and shape \(.*\) is not a picture; give numbers of shape \(height, width\) or"
        ),
    ):
        as_image(WRONG_ARRAYS[name])


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 1e20])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3), (3, 2, 2)])
def test_arrays_of_no_known_scale_are_refused(wrong, shape):
    levels = np.full(shape, 0.5)
    levels.flat[1] = wrong
    with pytest.raises(InputError, match="levels from .*; scale them to 0 to 1, or to 0 to 255"):
        as_image(levels)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (3, 0, 7)])
def test_arrays_without_a_pixel_are_refused(shape):
    with pytest.raises(InputError, match="pixels; give a picture of at least one pixel"):
        as_image(np.zeros(shape, np.uint8))


def test_tensors_that_numpy_does_not_know_are_refused():
    with pytest.raises(InputError, match="Tensor is not a picture that can be read"):
        as_image(torch.zeros(4, 4, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_bytes_open_files_and_addresses_are_read_as_the_file(ending, tmp_path):
    file = tmp_path / f"a b%20ü.{ending}"
    Image.fromarray(PIXELS[..., :3]).save(file)
    expected = as_image(file).tobytes()
    content = file.read_bytes()
    for source in (
        content,
        bytearray(content),
        memoryview(content),
        BytesIO(content),
        str(file),
        file.as_uri(),
        file.as_uri().replace("///", "//localhost/"),
    ):
        assert as_image(source).tobytes() == expected
    with file.open("rb") as opened:
        assert as_image(opened).tobytes() == expected
    assert (
        Sample("a", content).image.tobytes()
        == Sample("a", file.as_uri()).content.tobytes()
        == expected
    )


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/a.png",
        "HTTP://example.org/a.png",
        "ftp://x/a.png",
        "s3://b/a.png",
        "hf://d/a.png",
        "file://server/share/a.png",
    ],
)
def test_nothing_is_fetched_from_the_network(address, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(
        InputError,
        match=(
            "is an address on the network, from which nothing is fetched here; "
            "download it, and give its path"
        ),
    ):
        as_image(address)


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"GIF89a",
        b"\x89PNG" + bytes(40),
        bytearray(5),
        BytesIO(b"x"),
        "x" * 5000,
        "file:///absent.png",
    ],
)
def test_bytes_and_texts_that_are_no_picture_are_refused_in_few_words(wrong):
    with pytest.raises(
        InputError,
        match="is not a picture that can be read; give a PIL image, an array, or the path or bytes",
    ) as raised:
        as_image(wrong)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_a_pixel_is_refused(size):
    with pytest.raises(InputError, match=f"has {size[0]} x {size[1]} pixels"):
        as_image(Image.new("RGB", size))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, bits: int = 1) -> bytes:
    rows = zlib.compress((b"\0" + b"\xff" * ((width * bits + 7) // 8)) * height, 1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )


def test_a_picture_of_too_many_pixels_is_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    (tmp_path / "scan.png").write_bytes(png(200, 200))
    with pytest.raises(
        InputError,
        match=r"scan.png has more than the 10,000 pixels .*raise PIL.Image.MAX_IMAGE_PIXELS",
    ):
        as_image(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert as_image(tmp_path / "scan.png").size == (200, 200)


LONG = zlib.compress(b"a" * (2 * PngImagePlugin.MAX_TEXT_CHUNK))
DAMAGED = {
    "a long text": png(4, 4, chunk(b"zTXt", b"note\0\0" + LONG)),
    "much text": png(4, 4, *[chunk(b"tEXt", b"note\0" + b"a" * 1_000_000)] * 70),
    "a wrong checksum": png(4, 4)[:-20] + b"\0" * 20,
    "a wrong header": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 3),
    "no end": png(64, 64)[:60],
    "nothing": b"",
    "a JPEG cut off": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "a WebP cut off": b"RIFF\x20\0\0\0WEBPVP8 ",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_by_their_name(damage, tmp_path):
    (tmp_path / "a.png").write_bytes(DAMAGED[damage])
    for read in (
        lambda: as_image(tmp_path / "a.png"),
        lambda: Sample("a", tmp_path / "a.png").content,
    ):
        with pytest.raises(InputError, match="a.png is not a picture that can be read"):
            read()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA"])
def test_other_formats_are_not_read(kind, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        as_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "raised",
    [
        OSError("gone"),
        ValueError("odd"),
        SyntaxError("broken"),
        Image.DecompressionBombError("large"),
    ],
)
def test_a_source_that_cannot_be_made_names_its_sample(raised):
    def make():
        raise raised

    for modality in ("image", "video", "audio"):
        sample = Sample("s7", make, modality=modality)
        for read in (lambda sample=sample: sample.image, lambda sample=sample: sample.content):
            with pytest.raises(
                InputError, match=f"sample 's7' makes .{type(raised).__name__}: {raised}"
            ):
                read()


WAVE = (0.9 * np.sin(np.arange(400) / 7)).astype(np.float32)


@pytest.mark.parametrize(
    ("written", "step"),
    [
        ((WAVE * 32767).astype(np.int16), 2**-14),
        ((WAVE.astype(float) * (2**31 - 1)).astype(np.int32), 2**-23),
        ((WAVE * 127 + 128).astype(np.uint8), 2**-6),
        (WAVE, 0),
        (WAVE.astype(np.float64), 0),
        (WAVE.tolist(), 0),
    ],
)
def test_sounds_are_floats_however_a_file_has_them(written, step):
    wave = as_sound(written)
    assert wave.dtype.kind == "f" and np.abs(wave - WAVE).max() <= step
    assert np.array_equal(Sample("a", lambda: written, modality="audio").content, wave)
    assert np.array_equal(as_sound(wave), wave)


@pytest.mark.parametrize(
    "wrong",
    [
        WAVE * 32767,
        (WAVE * 32767).astype(int),
        [1, 2],
        WAVE + np.nan,
        WAVE.astype(complex),
        WAVE > 0,
        ["a"],
        None,
    ],
)
def test_what_is_no_sound_is_refused(wrong):
    with pytest.raises(
        InputError, match="a sound of .*; give floats from -1 to 1, or int16, int32 or uint8"
    ):
        as_sound(wrong)


def test_scenes_carry_references_questions_and_truth():
    samples = load_samples("scenes", n=5, seed=3)
    scenes = world.scenes(5, "test", 3)
    assert [s.truth["subject"] for s in samples] == [s.subject for s in scenes]
    assert all(
        len(s.captions) == 5 and len(s.questions) >= 6 and set(s.truth) == set(world.FACTORS)
        for s in samples
    )
    assert np.array_equal(np.asarray(samples[2].image), np.asarray(world.render(scenes[2])))
    assert len({s.id for s in samples}) == 5


def test_composition_holds_only_combinations_kept_out_of_training():
    for sample in load_samples("composition", n=20):
        pair, colour = (
            (sample.truth["subject"], sample.truth["place"]),
            (sample.truth["item"], sample.truth["colour"]),
        )
        assert pair in world.HELD_OUT_SUBJECT_PLACE or colour in world.HELD_OUT_ITEM_COLOUR


def test_clips_carry_frames_references_questions_and_truth():
    samples, sampled = load_samples("clips", n=6, seed=3), clips.clips(6, "test", 3)
    for sample, clip in zip(samples, sampled, strict=True):
        assert sample.modality == "video"
        assert set(sample.truth) == {*world.FACTORS, "direction", "speed"}
        factors = (clip.scene.subject, clip.scene.action, clip.direction, clip.speed)
        assert (
            tuple(sample.truth[factor] for factor in ("subject", "action", "direction", "speed"))
            == factors
        )
        assert sample.captions == tuple(clips.clip_captions(clip))
        assert sample.questions == tuple(clips.clip_questions(clip))
        answers = {q.type: q.answer for q in sample.questions}
        assert answers["action"] == clip.scene.action and answers.get("speed") == clip.speed
    content, expected = samples[1].content, clips.render_clip(sampled[1])
    assert len(content) == clips.FRAMES and all(frame.mode == "RGB" for frame in content)
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(content, expected, strict=True)
    )
    with pytest.raises(InputError):
        _ = samples[1].image


def test_sounds_carry_samples_references_questions_and_truth():
    samples, sampled = (
        load_samples("sounds", n=6, split="recordings", seed=3),
        sounds.sounds(6, "recordings", 3),
    )
    for sample, sound in zip(samples, sampled, strict=True):
        assert sample.modality == "audio"
        assert sample.truth == {
            "sound": sound.name,
            "loudness": sound.loudness,
            "background": sound.background,
            "recording": sound.recording,
        }
        assert sample.captions == tuple(sounds.sound_captions(sound))
        assert sample.questions == tuple(sounds.sound_questions(sound))
    assert {sample.truth["recording"] for sample in samples} <= set(sounds.HELD_OUT)
    content = samples[2].content
    assert content.shape == (sounds.SAMPLES,) and np.array_equal(
        content, sounds.waveform(sampled[2])
    )
    with pytest.raises(InputError):
        _ = samples[2].image


def test_postcards_carry_references_questions_and_truth_by_the_names_of_scenes():
    samples = load_samples("postcards", n=5, seed=3)
    cards = postcards.postcards(5, "test", 3)
    for sample, card in zip(samples, cards, strict=True):
        assert sample.truth == {factor: getattr(card, factor) for factor in world.FACTORS}
        assert sample.captions == tuple(postcard_texts.captions(card))
        assert sample.questions == tuple(postcard_texts.questions(card))
        assert np.array_equal(np.asarray(sample.image), np.asarray(postcards.draw(card)))
    scenes = load_samples("scenes", n=5, seed=3)
    assert set(samples[0].truth) == set(scenes[0].truth)
    assert not {sample.id for sample in samples} & {scene.id for scene in scenes}
    types = {question.type for sample in samples for question in sample.questions}
    assert types == {question.type for scene in scenes for question in scene.questions}


@pytest.mark.parametrize("dataset", ["scenes", "postcards", "clips", "sounds"])
def test_drawing_again_gives_the_same_and_another_seed_or_split_another(dataset):
    first, again = load_samples(dataset, n=4), load_samples(dataset, n=6)[:4]
    content_of = lambda samples: [(s.id, dict(s.truth), s.captions, s.questions) for s in samples]
    assert content_of(first) == content_of(again)
    assert np.array_equal(np.asarray(first[3].content), np.asarray(again[3].content))
    for variation in (
        load_samples(dataset, n=4, seed=1),
        load_samples(dataset, n=4, split="validation"),
    ):
        assert [s.captions for s in variation] != [s.captions for s in first]
        assert not {s.id for s in variation} & {s.id for s in first}
    assert len({s.id for s in again}) == 4


@pytest.mark.parametrize(("dataset", "name"), MEDIA.items())
def test_media_are_named_as_processors_take_them(dataset, name):
    samples = load_samples(dataset, n=2)
    (entry,) = media(samples).items()
    assert entry[0] == name and len(entry[1]) == 2
    assert np.array_equal(np.asarray(entry[1][1]), np.asarray(samples[1].content))
    assert samples[0].modality in PROMPTS


def test_media_of_several_modalities_or_of_an_unknown_one_are_refused():
    mixed = [load_samples(dataset, n=1)[0] for dataset in ("scenes", "clips", "scenes")]
    with pytest.raises(
        InputError,
        match=(
            "samples of modality image, video; give samples of one of image, video, audio at a time"
        ),
    ):
        media(mixed)
    with pytest.raises(InputError, match="smell"):
        media([Sample("a", np.zeros(3), modality="smell")])
    with pytest.raises(InputError, match="modality none"):
        media([])


def test_content_of_a_file_frames_and_samples(tmp_path):
    frame = Image.new("RGBA", (4, 3), (1, 2, 3, 255))
    frame.save(tmp_path / "a.png")
    assert Sample("a", tmp_path / "a.png").content.getpixel((0, 0)) == (1, 2, 3)
    assert [
        f.mode for f in Sample("a", lambda: [frame, tmp_path / "a.png"], modality="video").content
    ] == ["RGB", "RGB"]
    assert Sample("a", lambda: [0.0, 1.0], modality="audio").content.tolist() == [0.0, 1.0]
    with pytest.raises(InputError):
        _ = Sample("a", lambda: [frame, tmp_path / "b.png"], modality="video").content


def test_unknown_datasets_and_splits_list_what_there_is():
    for wrong in ("scene", "no/such/folder", "coc-mood", "postcards-mood"):
        with pytest.raises(
            InputError,
            match="scenes, composition, clips, sounds.* coco, vqav2, gqa, pope, .*or a folder",
        ):
            load_samples(wrong)
    for dataset in ("scenes", "postcards"):
        with pytest.raises(InputError, match="validation"):
            load_samples(dataset, split="dev")
        with pytest.raises(InputError, match="1 or more"):
            load_samples(dataset, n=0)
        with pytest.raises(InputError, match="0 or more"):
            load_samples(dataset, seed=-1)
    with pytest.raises(InputError, match="train, validation, test"):
        load_samples("postcards", split="composition")


def captioned(*captions):
    return [Sample(str(k), Image.new("RGB", (4, 4)), lines) for k, lines in enumerate(captions)]


def test_samples_that_mention_a_word_have_it_whole_in_some_caption():
    samples = captioned(
        ("Cattle rest.", "A cat sleeps."),
        ("Cattle rest.",),
        ("The CAT!", "A dog."),
        ("A hot  dog.",),
        (),
    )
    ids = lambda words, n=None: [sample.id for sample in mentioning(samples, words, n)]
    assert ids("cat") == ["0", "2"]
    assert ids("cat", 1) == ids("cat", np.int64(1)) == ["0"]
    assert ids(["hot dog", "cat"]) == ["0", "2", "3"]
    assert [s.truth["subject"] for s in mentioning(load_samples("scenes", n=60), "frog", 3)] == [
        "frog"
    ] * 3


def test_words_in_no_caption_are_told_with_those_that_are():
    with pytest.raises(
        TokenOfInterestError,
        match=r"'c.t': in 0 of 2 samples; said instead: 'a' \(2\), 'cat' \(1\), 'dog' \(1\)",
    ):
        mentioning(captioned(("A cat.",), ("A dog.",)), "c.t")


@pytest.mark.parametrize(
    ("words", "n"), [([], None), ("", None), (["cat", " "], None), ("cat", 0), ("cat", np.int64(0))]
)
def test_no_words_and_no_samples_cannot_be_asked_for(words, n):
    with pytest.raises(InputError, match="give words or phrases|give 1 or more"):
        mentioning(captioned(("A cat.",)), words, n)


@pytest.mark.parametrize("style", ["place", "colour", "mood"])
def test_styled_scenes_are_the_same_pictures_with_one_caption(style):
    plain, styled = load_samples("scenes", n=5), load_samples(f"scenes-{style}", n=5)
    assert [sample.id for sample in styled] == [sample.id for sample in plain]
    assert all(
        first.truth == second.truth and first.questions == second.questions
        for first, second in zip(plain, styled, strict=True)
    )
    assert plain[0].image.tobytes() == styled[0].image.tobytes()
    assert all(len(sample.captions) == 1 for sample in styled)
    begins = {"place": "A wide place of ", "colour": "Under a", "mood": "What a "}[style]
    assert all(sample.captions[0].startswith(begins) for sample in styled)
