"""Build ``live/kernels.wasm`` from ``live/kernels.c``: ``python -m tools.live.kernels``.

The compiler is clang in the wheel ``ziglang``, of a pinned version, so that the same bytes come out
everywhere. Only those who change the kernels need it; the built module is in the repository.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.live import SOURCE

COMPILER, VERSION = "ziglang", "0.17.1"
OPTIONS = (
    *("-target", "wasm32-freestanding", "-msimd128", "-O3", "-s", "-nostdlib"),
    # no start function; the memory is the page's; buffers begin where the module's own data end
    *("-Wl,--no-entry", "-Wl,--export-dynamic", "-Wl,--import-memory", "-Wl,--export=__heap_base"),
    *("-Wl,-z,stack-size=65536",),
)


def compiler() -> str | None:
    """The version of the compiler's wheel, None where it is not installed."""
    try:
        return importlib.metadata.version(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return None


def build() -> bytes:
    """Compile the kernels; the module's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "kernels.wasm"
        command = [sys.executable, "-m", COMPILER, "cc", *OPTIONS, "-o", str(module), "kernels.c"]
        subprocess.run(command, cwd=SOURCE, check=True)
        return module.read_bytes()


def main() -> int:
    """Build and write the module; the exit status is 1 where the compiler is missing."""
    if compiler() != VERSION:
        print(
            f"{COMPILER} {VERSION} is not installed: python -m pip install -r live/requirements.txt"
        )
        return 1
    module = build()
    (SOURCE / "kernels.wasm").write_bytes(module)
    print(f"live/kernels.wasm: {len(module):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
