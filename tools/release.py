"""Tag this state as a release, or say what keeps it from being one: ``python -m tools.release``."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime

import yaml

from tools import ROOT
from tools.chapters import PLACEHOLDER, config

ADVICE = "set repository.url and repository.branch in _config.yml, run `make pairs` and commit"
TAG = r"v\d+(\.\d+)*"


def version() -> str:
    """The version of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["version"]


def cited() -> str:
    """The version that readers are asked to cite."""
    return str(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"])


def obstacles(tag: str, repository: Mapping[str, str], version: str, cited: str) -> list[str]:
    """Why a state must not carry a tag; empty if it may.

    First cells clone ``repository["url"]`` at ``repository["branch"]``, so a release names an
    address that is owned, and itself.
    """
    url, branch = repository["url"], repository["branch"]
    problems = []
    if PLACEHOLDER in url:
        problems.append(f"the address is still {url}, where any stranger may settle; {ADVICE}")
    if branch != tag:
        problems.append(f"the pages install {branch}, not {tag}; {ADVICE}")
    if not tag == f"v{version}" == f"v{cited}":
        problems.append(
            f"the tag is {tag}, the version {version} in pyproject.toml and {cited} in "
            "CITATION.cff; make them one"
        )
    return problems


def settled(repository: Mapping[str, str]) -> bool:
    """Whether first cells are as they should be between releases.

    Without an owner, or at a tag, which does not move as a branch does.
    """
    return PLACEHOLDER in repository["url"] or re.fullmatch(TAG, repository["branch"]) is not None


def git(*command: str) -> str:
    """What git prints."""
    return subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout


def day() -> str:
    """The day of the commit that is checked out, such as "2026-12-01".

    Today where there is no repository. SOURCE_DATE_EPOCH, seconds since 1970, replaces both.
    """
    if seconds := os.environ.get("SOURCE_DATE_EPOCH"):
        return datetime.fromtimestamp(int(seconds), UTC).date().isoformat()
    try:
        return git("log", "-1", "--format=%cs").strip()
    except (OSError, subprocess.CalledProcessError):
        return datetime.now(UTC).date().isoformat()


def tags() -> list[str]:
    """The version tags of the commit that is checked out."""
    return [tag for tag in git("tag", "--points-at", "HEAD").split() if re.fullmatch(TAG, tag)]


def main() -> int:
    """Judge the state and tag it; 1 if something keeps it from being a release."""
    tag = f"v{version()}"
    problems = obstacles(tag, config()["repository"], version(), cited())
    if git("status", "--porcelain"):
        problems.append("there are changes that are not committed; commit or stash them")
    for problem in problems:
        print(f"no release: {problem}", file=sys.stderr)
    if not problems:
        git("tag", "-a", tag, "-m", tag)
        print(f"tagged {tag}; `git push origin {tag}` publishes it")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
