"""The files of requirements as they are written, and the systems that they are for."""

import re

from packaging.requirements import Requirement

from tools import ROOT


def pins(name="requirements.txt"):
    """The requirements of a file, each with its hashes, in its order."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M).replace(
        "\\\n", " "
    )
    requirements = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        requirements.append((Requirement(requirement), hashes))
    return requirements


def environment(python, system):
    platform = {"Linux": "linux", "Darwin": "darwin", "Windows": "win32"}[system]
    names = {
        "os_name": "nt" if system == "Windows" else "posix",
        "platform_system": system,
        "sys_platform": platform,
        "extra": "",
    }
    machine = {
        "platform_machine": "arm64" if system == "Darwin" else "x86_64",
        "implementation_name": "cpython",
    }
    return (
        {
            "python_version": python,
            "python_full_version": f"{python}.9",
            "platform_python_implementation": "CPython",
        }
        | names
        | machine
    )
