"""Make sounds: seeded two-second mixtures of CC0 sound effects with a background.

And their picture for the vision tower.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soundfile
from jaxtyping import Float
from PIL import Image
from scipy.signal import resample_poly

from xlvlms_tutorial.errors import not_in_world
from xlvlms_tutorial.pocket.assets import asset_path
from xlvlms_tutorial.samples import Question

RATE = 16_000  # samples a second
SAMPLES = 2 * RATE
SPLITS = ("train", "validation", "test", "recordings")
FILES = {
    "coin": tuple(f"coin{k}" for k in range(1, 6)),
    "explosion": ("explosion1", "explosion2"),
    "laser": tuple(f"laser{k}" for k in range(1, 6)),
    "jump": tuple(f"jump{k}" for k in range(1, 6)),
    "hit": tuple(f"hit{k}" for k in range(1, 6)),
    "hurt": tuple(f"hurt{k}" for k in range(1, 6)),
    "fall": tuple(f"fall{k}" for k in range(1, 5)),
    "error": tuple(f"error{k}" for k in range(1, 6)),
    "upgrade": tuple(f"upgrade{k}" for k in range(1, 6)),
    "game over": tuple(f"gameover{k}" for k in range(1, 6)),
    "rock": ("rockHit2",),
}
NAMES = tuple(FILES)
# The last recording of each kind that has at least four: the split "recordings" holds nothing else,
# as "composition" does for scenes.
HELD_OUT = tuple(files[-1] for files in FILES.values() if len(files) >= 4)
BACKGROUNDS = ("silence", "hiss", "rumble", "hum")
LOUDNESS = {"loud": (-3.0, 0.0), "soft": (-21.0, -18.0)}  # gain of the effect's peak in decibels

_BACKGROUND_LEVEL = 0.02  # root mean square: 13 dB below the peak of the softest effect
# others: a <name>
_NOUN = {
    "hurt": "a cry of hurt",
    "explosion": "an explosion",
    "error": "an error",
    "upgrade": "an upgrade",
}
_OVER = {
    "silence": "in silence",
    "hiss": "over a hiss",
    "rumble": "over a rumble",
    "hum": "over a hum",
}
_ASK = {
    "sound": ("What do you hear?", "Which sound is it?", "What makes the sound?"),
    "loudness": (
        "Is the sound loud or soft?",
        "How loud is the sound?",
        "Is it a loud sound or a soft one?",
    ),
    "background": (
        "What is in the background?",
        "What lies behind the sound?",
        "Which background does the sound have?",
    ),
}
_PRESENCE = ("Is there {a} in the sound?", "Do you hear {a}?", "Can {a} be heard?")


@dataclass(frozen=True)
class Sound:
    """One sound: what it is, which recording, how loud, over what background, when it starts.

    ``start`` is in seconds from 0 to 2, and the recording has to end within the two seconds;
    ``layout`` seeds the background and the exact gain.

    Raises
    ------
    InputError
        If a factor has a value that the world cannot sound, with the allowed values.
    """

    name: str
    recording: str
    loudness: str
    background: str
    start: float
    layout: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "name": NAMES,
            "recording": FILES.get(self.name, ()),
            "loudness": tuple(LOUDNESS),
            "background": BACKGROUNDS,
        }
        for factor, values in allowed.items():
            if getattr(self, factor) not in values:
                raise not_in_world(factor, getattr(self, factor), values)
        latest = _latest(self.recording)
        if not 0 <= self.start <= latest:
            raise not_in_world("start", self.start, f"0 to {latest:.3f} seconds")


def sounds(n: int, split: str = "train", seed: int = 0) -> list[Sound]:
    """Draw sounds of a split; the first sounds of a longer list are those of a shorter one.

    The splits train, validation and test share recordings and differ in the mixture; the split
    "recordings" holds only recordings that the others never use.

    Parameters
    ----------
    n : int
        Number of sounds.
    split : str, default "train"
        "train", "validation", "test" or "recordings".
    seed : int, default 0
        Seed of the sounds.

    Returns
    -------
    list of Sound
        The sounds.

    Raises
    ------
    InputError
        If the split is unknown or ``n`` is below 1.
    """
    if split not in SPLITS:
        raise not_in_world("split", split, SPLITS)
    if n < 1:
        raise not_in_world("n", n, "1 or more")
    recordings = {}
    for name, files in FILES.items():
        allowed = tuple(file for file in files if (file in HELD_OUT) == (split == "recordings"))
        if allowed:
            recordings[name] = allowed
    rng = np.random.default_rng([seed, SPLITS.index(split), 3])
    return [_draw(rng, recordings) for _ in range(n)]


def _draw(rng: np.random.Generator, files: dict[str, tuple[str, ...]]) -> Sound:
    pick = lambda values: values[rng.integers(len(values))]
    name = pick(tuple(files))
    recording = pick(files[name])
    # whole milliseconds are the same in every file
    start = int(rng.random() * _latest(recording) * 1000) / 1000
    return Sound(
        name, recording, pick(tuple(LOUDNESS)), pick(BACKGROUNDS), start, int(rng.integers(2**31))
    )


@lru_cache(maxsize=64)
def _recording(name: str) -> Float[np.ndarray, "samples"]:
    """A recording at 16 kHz, one channel, its peak at 1."""
    wave, rate = soundfile.read(
        asset_path("arcade", f"resources/assets/sounds/{name}.wav"), always_2d=True
    )
    divisor = np.gcd(rate, RATE)
    wave = resample_poly(wave.mean(axis=1), RATE // divisor, rate // divisor)
    return wave / np.abs(wave).max()


def _latest(recording: str) -> float:
    return (SAMPLES - len(_recording(recording))) / RATE


def waveform(sound: Sound) -> Float[np.ndarray, "samples"]:
    """Mix the sound: 32,000 float32 samples from -1 to 1, 16 kHz, one channel, two seconds."""
    rng = np.random.default_rng(sound.layout)
    gain = 10 ** (rng.uniform(*LOUDNESS[sound.loudness]) / 20)
    effect = _recording(sound.recording)
    first = int(sound.start * RATE)
    wave = _background(sound.background, rng)
    wave[first : first + len(effect)] += gain * effect
    return np.clip(wave, -1, 1).astype(np.float32)


def _background(kind: str, rng: np.random.Generator) -> Float[np.ndarray, "samples"]:
    if kind == "silence":
        return np.zeros(SAMPLES)
    if kind == "hum":
        time = np.arange(SAMPLES) / RATE
        wave = sum(np.sin(2 * np.pi * (120 * k * time + rng.random())) / k for k in range(1, 6))
    else:
        spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
        if kind == "rumble":  # noise whose amplitude falls with the square of frequency, from 50 Hz
            spectrum /= np.maximum(np.arange(len(spectrum)) * RATE / SAMPLES, 50.0) ** 2
        wave = np.fft.irfft(spectrum, SAMPLES)
    return wave * (_BACKGROUND_LEVEL / np.sqrt(np.mean(wave**2)))


@lru_cache(maxsize=4)
def mel_filters(
    bands: int = 128, fft: int = 2048, low: float = 40.0, high: float = RATE / 2
) -> Float[np.ndarray, "bands bins"]:
    """Compute triangular filters with a peak of 1, evenly spaced on the mel scale.

    The scale is 2595 log10(1 + f / 700).

    Parameters
    ----------
    bands : int, default 128
        Number of filters.
    fft : int, default 2048
        Samples of the Fourier transform.
    low : float, default 40.0
        Where the first filter begins, in hertz.
    high : float, default 8000.0
        Where the last filter ends, in hertz.

    Returns
    -------
    numpy.ndarray of shape (bands, bins)
        The filters.
    """
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    hertz = lambda m: 700 * (10 ** (m / 2595) - 1)
    edges = hertz(np.linspace(mel(low), mel(high), bands + 2))
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.fft.rfftfreq(fft, 1 / RATE)
    return np.clip(
        np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)), 0, None
    )


def log_mel(wave: Float[np.ndarray, "samples"], floor: float = -80.0) -> Image.Image:
    """Draw the sound as a picture for the vision tower.

    RGB, 256 x 256, time to the right, pitch upwards, brighter is louder. 128 mel bands of two rows
    each, 256 windows of 64 ms; black is ``floor`` decibels below a full-scale sine, white is 0.

    Raises
    ------
    InputError
        If the wave is not 32,000 finite samples.
    """
    if np.shape(wave) != (SAMPLES,) or not np.isfinite(wave).all():
        raise not_in_world(
            "wave",
            f"array of shape {np.shape(wave)}",
            f"{SAMPLES} finite samples ({RATE} a second)",
        )
    width = 1024
    hop = SAMPLES // 256
    padded = np.pad(np.asarray(wave, float), width // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[:SAMPLES:hop] * np.hanning(
        width
    )
    # a full-scale sine has power 1 in its bin
    power = np.abs(np.fft.rfft(windows, 2048) / (width / 4)) ** 2
    decibels = 10 * np.log10(mel_filters() @ power.T + 1e-12)
    grey = np.rint(np.clip(1 - decibels / floor, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[::-1], 2, axis=0)).convert("RGB")


def noun(name: str) -> str:
    """Return the noun phrase of a kind of sound."""
    return _NOUN.get(name, f"a {name}")


def sound_captions(sound: Sound) -> list[str]:
    """Write five reference captions of a sound.

    Each names the sound, its loudness and its background.
    """
    phrase = noun(sound.name)
    over = _OVER[sound.background]
    loud = sound.loudness
    behind = "nothing but silence" if sound.background == "silence" else f"a {sound.background}"
    return [
        f"The {loud} sound of {phrase} {over}.",
        f"{phrase[0].upper()}{phrase[1:]}, {loud}, {over}.",
        f"One can hear {phrase}: it is {loud}, with {behind} behind it.",
        f"There is {behind} in the background of {phrase} that is {loud}.",
        f"This is {phrase}. It sounds {loud} {over}.",
    ]


def sound_questions(sound: Sound, seed: int = 0) -> list[Question]:
    """Write every question the sound can answer, one a type.

    The answer to the presence question is yes as often as no; negatives are drawn at random.
    """
    rng = np.random.default_rng([seed, sound.layout, 4])
    pick = lambda values: values[rng.integers(len(values))]
    yes = bool(rng.integers(2))
    target = sound.name if yes else pick([name for name in NAMES if name != sound.name])
    questions = [
        Question(
            "presence",
            pick(_PRESENCE).format(a=noun(target)),
            "yes" if yes else "no",
            target,
            "random",
        )
    ]
    answers = {"sound": sound.name, "loudness": sound.loudness, "background": sound.background}
    for kind, answer in answers.items():
        questions.append(Question(kind, pick(_ASK[kind]), answer, sound.name))
    return questions
