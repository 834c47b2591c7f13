"""Shards hold every byte, are named after their digests, and are made anew where damaged."""

import hashlib

import numpy as np
import pytest

from tools.live import shards
from tools.live.shards import (
    Tensor,
    cached_shards,
    escaped,
    is_whole,
    joined,
    read_shard,
    read_tensor,
    write_shards,
)
from xlvlms_tutorial.io import read_json


@pytest.fixture
def tensors():
    everything = np.arange(256, dtype=np.uint8).repeat(3)
    return [Tensor("bytes", "U8", (768,), everything), Tensor("one", "F32", (1,), np.ones(1, "f4"))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XLVLMS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_escaped_has_no_end_of_line_and_no_bare_quote():
    text = escaped(bytes(range(256)))
    assert b"\n" not in text
    assert b"\r" not in text
    assert len(text) == 256 + 4
    assert text.count(b'\\"') == text.count(b'"') == 1


def test_the_manifest_says_where_each_tensor_lies(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(shards, "SIZE", 256)
    manifest = write_shards(tmp_path, tensors, {"eps": 1e-5})
    raw = b""
    for shard in manifest["shards"]:
        content = read_shard(tmp_path / shard["file"])
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["file"] == f"{shard['sha256'][:16]}.js"
        assert len(content) == shard["bytes"]
        raw += content
    assert len(raw) == manifest["bytes"]
    for tensor in tensors:
        where = manifest["tensors"][tensor.name]
        assert raw[where["at"] : where["at"] + where["bytes"]] == tensor.data.tobytes()
        assert where["at"] % shards.ALIGNMENT == 0
    assert manifest["eps"] == 1e-5
    assert read_tensor(tmp_path, "one").tolist() == [1.0]


def test_packs_are_joined_one_after_the_other(tmp_path, tensors):
    first = write_shards(tmp_path, tensors[:1], {"eps": 1e-5})
    second = write_shards(tmp_path, tensors[1:], {})
    both = joined([first, second])
    assert both["tensors"]["one"]["at"] == first["bytes"]
    assert both["bytes"] == first["bytes"] + second["bytes"]
    assert both["shards"] == first["shards"] + second["shards"]
    assert both["eps"] == 1e-5


def test_a_pack_is_made_once_and_again_where_a_shard_was_cut(cache, tensors):
    calls = []

    def made():
        calls.append(1)
        return tensors

    folder = cached_shards("pack", made, {}, 1000)
    assert cached_shards("pack", made, {}, 1000) == folder
    assert len(calls) == 1
    (shard,) = read_json(folder / shards.MANIFEST)["shards"]
    (folder / shard["file"]).write_bytes(b"cut")
    assert not is_whole(folder)
    cached_shards("pack", made, {}, 1000)
    assert len(calls) == 2
    assert is_whole(folder)
