"""The committed module is what its source compiles to."""

import pytest

from tools.live import SOURCE, kernels


@pytest.mark.skipif(
    kernels.compiler() != kernels.VERSION,
    reason="runs where the compiler is: pip install -r live/requirements.txt",
)
def test_the_module_is_built_from_its_source_byte_for_byte():
    assert kernels.build() == (SOURCE / "kernels.wasm").read_bytes()


def test_the_compilers_version_is_pinned_in_one_place():
    pins = (SOURCE / "requirements.txt").read_text()
    assert f"{kernels.COMPILER}=={kernels.VERSION} " in pins
