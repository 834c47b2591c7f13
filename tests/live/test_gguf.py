"""Raw blocks of a GGUF file mean the numbers that gguf itself reads from it."""

import gguf
import numpy as np
import pytest

from tools.live.gguf import raw_tensors


@pytest.fixture
def file(tmp_path):
    """A small file with a matrix in each kind of block, and values of several kinds."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "be", "sea"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("eps", 1e-5)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(3, 64)).astype(np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
        raw = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(f"{kind.name}.weight", raw, raw_dtype=kind)
    writer.add_tensor("plain.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_each_tensor_is_the_bytes_that_gguf_reads(file):
    tensors = raw_tensors(file)
    reader = gguf.GGUFReader(file)
    assert {f"{name}.weight" for name in tensors} == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        raw = tensors[tensor.name.removesuffix(".weight")]
        assert raw.kind == tensor.tensor_type.name
        assert raw.shape == (3, 64)
        assert raw.data.tobytes() == tensor.data.tobytes()


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGML" + bytes(40))
    with pytest.raises(ValueError, match="no GGUF of version 3"):
        raw_tensors(path)


def test_a_block_that_no_kernel_knows_is_refused(tmp_path):
    path = tmp_path / "half.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("half.weight", np.ones((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="half.weight is in blocks of kind 1"):
        raw_tensors(path)
