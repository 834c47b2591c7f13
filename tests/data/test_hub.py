"""Datasets of the hub, read from local folders that hold parquet files with the hub's columns.

No network is used.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from xlvlms_tutorial.data import DATASETS, hub, load_samples
from xlvlms_tutorial.errors import InputError, LoadError

IMAGES = {"image": datasets.Image()}


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A function that makes a local repository of parquet files by configuration and
    split, and points a name at it.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(hub, "HUB", dict(hub.HUB))

    def make(name, media=None, **parts):
        folder, splits = tmp_path / "repo", {}
        for part, rows in parts.items():
            config, _, split = part.rpartition("__")
            table = datasets.Dataset.from_list(rows)
            for column, feature in (media or {}).items():
                table = (
                    table.cast_column(column, feature) if column in table.column_names else table
                )
            file = f"{config or 'data'}/{split}-00000-of-00001.parquet"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(str(folder / file))
            splits.setdefault(config or "default", []).append({"split": split, "path": file})
        configs = [{"config_name": config, "data_files": files} for config, files in splits.items()]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        hub.HUB[name] = replace(hub.HUB[name], repo=str(folder))

    return make


def karpathy(k, split, **picture):
    sentences = [f"A dog {k} by a red cup.", f"Snow {k}."]
    return {
        "filepath": "val2014",
        "sentids": [k],
        "filename": f"{k}.jpg",
        "imgid": k,
        "split": split,
        "sentences": sentences,
        "cocoid": 100 + k,
        "url": f"http://127.0.0.1:1/{k}.png",
    } | picture


def test_coco_has_captions_truth_questions_and_restval_in_train(repo):
    rows = {
        split: [karpathy(k, split) for k in ks]
        for split, ks in {"train": (0, 1), "restval": (2,), "test": range(3, 30)}.items()
    }
    repo("coco", **rows)
    assert sorted(s.id for s in load_samples("coco", 10, "train")) == ["100", "101", "102"]
    samples = load_samples("coco", 9)
    assert [s.id for s in samples[:4]] == [s.id for s in load_samples("coco", 4)]
    assert len({s.id for s in samples}) == 9
    assert [s.id for s in samples] != [s.id for s in load_samples("coco", 9, seed=1)]
    k = int(samples[0].id) - 100
    assert samples[0].captions == (f"A dog {k} by a red cup.", f"Snow {k}.")
    truth = {factor: value for factor, value in samples[0].truth.items() if value is not None}
    assert truth == {"subject": "dog", "item": "cup", "colour": "red", "place": "snow"}
    assert [q.type for q in samples[0].questions] == ["presence"] * 3 + ["colour", "place"]
    assert load_samples("coco-place", 1)[0].captions == (f"Snow {k}.",)


def test_pictures_may_come_from_their_address(repo, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "3.png").write_bytes(png(30)["bytes"])
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "web")))
    Thread(target=server.serve_forever, daemon=True).start()
    repo(
        "coco",
        test=[
            karpathy(k, "test", url=f"http://127.0.0.1:{server.server_port}/{k}.png")
            for k in (3, 4)
        ],
    )
    samples = {s.id: s for s in load_samples("coco")}
    try:
        assert samples["103"].image.getpixel((0, 0)) == (30, 0, 0)
        with pytest.raises(LoadError, match="4.png"):
            _ = samples["104"].image
    finally:
        server.shutdown()
        server.server_close()


def test_addresses_that_are_none_of_the_web_are_refused(repo):
    repo("coco", test=[karpathy(1, "test", url="file:///etc/hostname")])
    with pytest.raises(LoadError, match="file:///etc/hostname.* none of the web"):
        load_samples("coco")


def test_vqav2_has_a_question_a_sample_and_divides_validation_by_picture(repo):
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": "red" if k % 3 else "yes",
            "answers": [{"answer": "red", "answer_id": 1}],
            "image_id": k // 3,
            "answer_type": "other",
            "question_id": k,
            "question": "What color is the dog?" if k % 3 else "Is it wet?",
            "image": png(k),
        }
        for k in range(60)
    ]
    repo("vqav2", IMAGES, validation=rows)
    parts = {split: load_samples("vqav2", 60, split) for split in ("validation", "test")}
    pictures = {split: {s.id.partition("-")[0] for s in part} for split, part in parts.items()}
    assert not pictures["validation"] & pictures["test"]
    assert sum(map(len, parts.values())) == 60
    assert len(pictures["test"]) > 3
    for sample in parts["test"]:
        k = int(sample.id.partition("-")[2])
        (question,) = sample.questions
        assert (question.type, question.answer, question.target) == (
            ("colour", "red", "dog") if k % 3 else ("yes/no", "yes", "")
        )
        assert sample.image.getpixel((0, 0)) == (k, 0, 0)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"multiple_choice_answer": 2}, "2"),
        ({"answers": [{"answer": a} for a in "abbab"]}, "b"),
        ({"answers": ["a", "b", "b"]}, "b"),
        ({"multiple_choice_answer": ""}, None),
        ({"answers": []}, None),
        ({"multiple_choice_answer": ["x", None]}, "x"),
    ],
)
def test_answers_are_texts_numbers_or_the_most_frequent_of_several(repo, fields, answer):
    repo(
        "vqav2",
        IMAGES,
        validation=[
            {"question": "How many?", "image_id": k, "question_id": k, "image": png(k)} | fields
            for k in range(9)
        ],
    )
    if answer is None:
        with pytest.raises(LoadError, match="question 'How many.' with answer"):
            load_samples("vqav2")
        return
    assert {q.answer for s in load_samples("vqav2") for q in s.questions} == {answer}


def test_rows_with_values_of_another_type_are_told(repo):
    repo("coco", test=[{"cocoid": 1, "url": "http://127.0.0.1:1/x.png", "sentences": [5]}])
    with pytest.raises(LoadError, match="'coco'|coco"):
        load_samples("coco")


def test_gqas_pictures_are_found_in_their_own_table(repo):
    questions = [
        {"id": f"q{k}", "imageId": f"n{k % 3}", "question": "Where is the cat?", "answer": "sofa"}
        for k in range(9)
    ]
    # two that nobody asks for come first
    images = [{"id": f"n{k}", "image": png(k)} for k in (4, 3, 2, 1, 0)]
    repo(
        "gqa",
        IMAGES,
        testdev_balanced_instructions__testdev=questions,
        testdev_balanced_images__testdev=images,
    )
    for sample in load_samples("gqa", 7):
        assert sample.image.getpixel((0, 0)) == (int(sample.id[1:]) % 3, 0, 0)
        assert [(q.type, q.answer, q.target) for q in sample.questions] == [
            ("place", "sofa", "cat")
        ]
    repo(
        "gqa",
        IMAGES,
        testdev_balanced_instructions__testdev=questions,
        testdev_balanced_images__testdev=images[:2] + images[3:],
    )
    with pytest.raises(LoadError, match="has no picture n2"):
        load_samples("gqa", 9)


def test_pope_has_its_three_strata(repo):
    rows = [
        {
            "id": str(k),
            "question_id": str(k // 3),
            "question": f"Is there a {noun} in the image?",
            "answer": answer,
            "image_source": f"COCO_val2014_{k:012d}",
            "image": png(k),
            "category": ("adversarial", "popular", "random")[k % 3],
        }
        for k, (noun, answer) in enumerate([("dog", "yes"), ("hot dog", "no")] * 6)
    ]
    repo("pope", IMAGES, test=rows)
    samples = load_samples("pope", 100)
    questions = [q for s in samples for q in s.questions]
    assert len({s.id for s in samples}) == 12 and {q.type for q in questions} == {"presence"}
    assert (
        sorted(q.stratum for q in questions)
        == ["adversarial"] * 4 + ["popular"] * 4 + ["random"] * 4
    )
    assert {(q.target, q.answer) for q in questions} == {("dog", "yes"), ("hot dog", "no")}
    with pytest.raises(InputError, match="pope has no split 'train'; there are: test"):
        load_samples("pope", 1, "train")


def test_visual_genome_keeps_pictures_with_words_of_the_style(repo):
    phrases = [["green grass", "a tall man"], ["two cups"], ["a happy man on grass"]]
    rows = [
        {
            "image": png(k),
            "image_id": k,
            "url": "x",
            "regions": [{"region_id": 1, "phrase": p, "x": 0} for p in phrases[k % 3]],
        }
        for k in range(60)
    ]
    for style, expected in {
        "place": {0: "green grass", 2: "a happy man on grass"},
        "colour": {0: "green grass"},
        "mood": {2: None},
    }.items():
        repo(f"visual-genome-{style}", IMAGES, **{f"{hub._VG}__train": rows})
        parts = [
            load_samples(f"visual-genome-{style}", 60, split)
            for split in ("train", "validation", "test")
        ]
        loaded = [sample for part in parts for sample in part]
        # disjoint, and all there are
        assert all(parts)
        assert sorted(int(s.id) for s in loaded) == [k for k in range(60) if k % 3 in expected]
        assert all(
            s.captions == (expected[int(s.id) % 3] or "a happy man on grass",) for s in loaded
        )


def test_sounds_are_mono_at_16_khz(repo):
    buffer = io.BytesIO()
    wave = np.sin(2 * np.pi * 1000 * np.arange(32_000) / 32_000)
    soundfile.write(buffer, np.stack([wave, wave], 1), 32_000, format="wav")
    row = {
        "audiocap_id": 5,
        "youtube_id": "x",
        "start_time": 0,
        "caption": "A beep.",
        "audio": {"bytes": buffer.getvalue(), "path": None},
    }
    repo("audiocaps", {"audio": datasets.Audio(decode=False)}, test=[row])
    (sample,) = load_samples("audiocaps")
    assert (sample.id, sample.modality, sample.captions, sample.questions) == (
        "5",
        "audio",
        ("A beep.",),
        (),
    )
    heard = sample.content
    assert heard.shape == (16_000,) and np.abs(np.fft.rfft(heard)).argmax() == 1000


def test_videos_give_frames_evenly_spaced(repo, monkeypatch):
    repo(
        "msr-vtt",
        {"video": datasets.Video(decode=False)},
        test=[{"video": {"bytes": b"film", "path": "v1.mp4"}, "caption": "A film."}],
    )
    (sample,) = load_samples("msr-vtt")
    assert (sample.id, sample.modality, sample.captions) == ("v1.mp4", "video", ("A film.",))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(LoadError, match="pip install av"):
        _ = sample.content
    frame = lambda k: SimpleNamespace(to_image=lambda: Image.new("RGB", (4, 4), (k, 0, 0)))

    class Film(io.BytesIO):
        decode = lambda self, video: map(frame, range(15))

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda file: Film(file.read())))
    assert [picture.getpixel((0, 0))[0] for picture in sample.content] == [
        0,
        2,
        4,
        6,
        8,
        10,
        12,
        14,
    ]


def test_rows_without_a_column_are_told_with_the_way_to_another_repository(repo):
    repo("coco", test=[{"cocoid": 1, "url": "http://127.0.0.1:1/x.png", "caption": "A dog."}])
    with pytest.raises(
        LoadError,
        match=(
            r"no column 'sentences'; use a repository that has: HUB\[name\] = dataclasses.replace"
        ),
    ):
        load_samples("coco")


def test_loading_scripts_are_never_run(tmp_path, monkeypatch):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "repo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setitem(hub.HUB, "pope", replace(hub.HUB["pope"], repo=str(tmp_path / "repo")))
    with pytest.raises(LoadError):
        load_samples("pope")
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        LoadError,
        match="'coco' needs the package datasets, which is not installed; pip install datasets",
    ):
        load_samples("coco")


def test_a_hub_that_cannot_be_reached_is_told_with_the_offline_choices(tmp_path):
    code = "from xlvlms_tutorial import load_samples; load_samples('coco')"
    place = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=place, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert (
        "LoadError: 'yerevann/coco-karpathy' is neither in the cache nor to be had from the hub"
        in ran.stderr
    )
    assert "folder" in ran.stderr


def test_names_and_numbers(repo):
    with pytest.raises(InputError, match="scenes.* coco, vqav2, gqa.*or a folder"):
        load_samples("cocos")
    with pytest.raises(InputError, match="give 1 or more"):
        load_samples("coco", 0)
    assert not set(DATASETS) & set(hub.HUB)
