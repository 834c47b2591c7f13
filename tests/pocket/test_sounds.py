"""Sounds: the same sample by sample, held-out recordings, pictures that
show pitch, time and loudness.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.pocket.sounds import (
    BACKGROUNDS,
    FILES,
    HELD_OUT,
    LOUDNESS,
    NAMES,
    RATE,
    SAMPLES,
    SPLITS,
    Sound,
    log_mel,
    mel_filters,
    noun,
    sound_captions,
    sound_questions,
    sounds,
    waveform,
)

SOUND = Sound("coin", "coin2", "loud", "silence", 0.5, 3)


def test_a_sound_is_the_same_again():
    digest = lambda records: hashlib.sha256(
        b"".join(waveform(s).tobytes() + log_mel(waveform(s)).tobytes() for s in records)
    ).hexdigest()
    assert (
        digest(sounds(12, "test", 4))
        == digest(sounds(12, "test", 4))
        != digest(sounds(12, "test", 5))
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_shorter_list_is_the_start_of_a_longer_one(split):
    assert sounds(40, split, 5)[:13] == sounds(13, split, 5)


def test_recordings_are_held_out_and_splits_share_no_sound():
    by_split = {split: sounds(1500, split) for split in SPLITS}
    for split, sampled in by_split.items():
        assert all((s.recording in HELD_OUT) == (split == "recordings") for s in sampled)
        assert not any(
            set(sampled) & set(others) for name, others in by_split.items() if name != split
        )
    assert {s.name for s in by_split["train"]} == set(NAMES)
    assert {s.name for s in by_split["recordings"]} == {
        name for name, files in FILES.items() if len(files) >= 4
    }


def test_waves_are_two_seconds_within_bounds_and_keep_their_gain():
    for sound in sounds(60, "validation"):
        wave = waveform(sound)
        assert wave.shape == (SAMPLES,) and wave.dtype == np.float32 and np.abs(wave).max() <= 1
        low, high = (10 ** (g / 20) for g in LOUDNESS[sound.loudness])
        assert low - 0.13 < np.abs(wave).max() < high + 0.13
    quiet = waveform(replace(SOUND, loudness="soft"))
    assert np.abs(waveform(SOUND)).max() / np.abs(quiet).max() == pytest.approx(
        10 ** (18 / 20), rel=1e-4
    )


def test_a_sound_starts_when_the_record_says():
    wave, first = waveform(SOUND), round(SOUND.start * RATE)
    assert not wave[:first].any() and np.abs(wave[first : first + 800]).max() > 0.05


def test_backgrounds_differ_in_pitch():
    centres = {}
    for kind in BACKGROUNDS[1:]:
        tail = waveform(replace(SOUND, background=kind, start=0.0))[RATE:]
        power = np.abs(np.fft.rfft(tail)) ** 2
        centres[kind] = (power * np.fft.rfftfreq(len(tail), 1 / RATE)).sum() / power.sum()
        assert np.sqrt(np.mean(tail**2)) == pytest.approx(0.02, rel=0.2)
    assert centres["rumble"] < centres["hum"] < centres["hiss"]
    assert not waveform(replace(SOUND, start=0.0))[RATE:].any()


def test_the_picture_shows_pitch_upwards_time_to_the_right_and_loudness_as_brightness():
    time = np.arange(SAMPLES) / RATE
    rows = []
    for pitch in (200, 1000, 5000):
        picture = np.asarray(log_mel(np.sin(2 * np.pi * pitch * time)))
        assert picture.shape == (256, 256, 3) and (picture[..., 0] == picture[..., 2]).all()
        rows.append(picture[:, 128, 0].argmax())
        assert picture[:, 128, 0].max() >= 240
    assert rows[0] > rows[1] > rows[2]
    late = np.asarray(log_mel(np.where(time > 1, np.sin(2 * np.pi * 1000 * time), 0)))[..., 0]
    assert late[:, :120].max() == 0 and late[:, 136:].max() >= 240
    grey = [
        int(np.asarray(log_mel(gain * np.sin(2 * np.pi * 1000 * time))).max())
        for gain in (0.1, 0.01)
    ]
    assert grey[0] - grey[1] == pytest.approx(20 / 80 * 255, abs=1)  # 20 decibels of a range of 80


def test_filters_cover_every_pitch():
    filters = mel_filters()
    assert filters.shape == (128, 1025) and (filters >= 0).all() and (filters.max(1) > 0.3).all()
    bins = np.fft.rfftfreq(2048, 1 / RATE)
    assert (filters[:, (bins > 60) & (bins < 7700)].sum(0) > 0.9).all()


def test_captions_and_questions_follow_from_the_record():
    for sound in sounds(200, "test"):
        texts = sound_captions(sound)
        assert len(set(texts)) == 5
        for text in texts:
            assert sound.name in text.lower()
            assert sound.loudness in text
            assert sound.background in text
            assert not any(f"a {kind}" in text for kind in BACKGROUNDS if kind != sound.background)
        asked_questions = {q.type: q for q in sound_questions(sound)}
        assert asked_questions["sound"].answer == sound.name
        assert asked_questions["loudness"].answer == sound.loudness
        assert asked_questions["background"].answer == sound.background
        presence = asked_questions["presence"]
        assert presence.answer == ("yes" if presence.target == sound.name else "no")
        assert noun(presence.target) in presence.text


def test_yes_is_as_frequent_as_no():
    replies = [
        q.answer == "yes"
        for s in sounds(1500, "train")
        for q in sound_questions(s)
        if q.type == "presence"
    ]
    assert abs(np.mean(replies) - 0.5) < 4 * 0.5 / np.sqrt(len(replies))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "bell"}, "coin"),
        ({"recording": "laser1"}, "coin1"),
        ({"loudness": "deafening"}, "loud, soft"),
        ({"background": "rain"}, "rumble"),
        ({"start": 1.9}, "seconds"),
        ({"start": -0.1}, "seconds"),
        ({"start": float("nan")}, "seconds"),
    ],
)
def test_impossible_sounds_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        replace(SOUND, **change)


@pytest.mark.parametrize("wave", [np.zeros(100), np.full(SAMPLES, np.nan), np.zeros(0)])
def test_a_wave_that_is_not_two_seconds_is_refused(wave):
    with pytest.raises(InputError, match="32000 finite samples"):
        log_mel(wave)


def test_impossible_lists_are_refused():
    with pytest.raises(InputError, match="recordings"):
        sounds(3, "composition")
    with pytest.raises(InputError, match="1 or more"):
        sounds(0)
