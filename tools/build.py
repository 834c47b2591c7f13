"""Build the book into ``_build/html``: ``python -m tools.build [--page NAME]``.

With a page, only that one is executed, and the others show what is kept of them, or their code with
a note. So a reader sees a first chapter within minutes.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from jsonschema import validate

from tools import ROOT, exports, ties
from tools.chapters import config, notebooks, pages
from tools.execute import BUILD, CLAIMS, QUIET, cached, fill, locked
from tools.fetch_assets import fetch
from tools.live import site
from tools.release import day
from xlvlms_tutorial.batch.results import measurements
from xlvlms_tutorial.claims import merge, write_claims
from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.io import read_json

OFFLINE = {
    "mathjax_path": "vendor/mathjax/tex-mml-chtml.js",
    # a browser compares no hash, and loads nothing that has one, where a page is opened as a file
    "mathjax_options": {},
    "nb_ipywidgets_js": {
        "vendor/widgets/require.js": {},
        "paths.js": {},
        "vendor/widgets/embed-amd.js": {},
    },
}


def sources() -> Iterator[Path]:
    """What a chapter's outputs depend on besides its own cells."""
    yield from sorted(
        p
        for p in (ROOT / "xlvlms_tutorial").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    )
    yield from sorted(ROOT.glob("requirements*.txt"))


def fingerprint() -> str:
    """One hash over the package and its pins."""
    total = hashlib.sha256()
    for path in sources():
        total.update(
            str(path.relative_to(ROOT)).encode()
            + b"\0"
            + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()


def refresh_cache() -> None:
    """Forget cached outputs when the package or its pins changed.

    The cache itself looks at cells only.
    """
    stamp, now = BUILD / "fingerprint.txt", fingerprint()
    with locked():
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != now:
            shutil.rmtree(BUILD / ".jupyter_cache", ignore_errors=True)
            shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
            # records live and die with the outputs of the pages that made them
            shutil.rmtree(CLAIMS, ignore_errors=True)
        stamp.write_text(now, encoding="utf-8")


def write_config(offline: bool, without: Sequence[Path] = ()) -> Path:
    """The book's settings, with the fetched libraries where there are any.

    Pages ``without`` outputs are not executed, and say so.
    """
    settings = config()
    if without:
        names = [page.relative_to(ROOT).as_posix() for page in without]
        settings["execute"]["exclude_patterns"] = names
        settings["sphinx"]["config"]["extensions"].append("tools.not_executed")
        settings["sphinx"]["config"]["not_executed"] = [name.removesuffix(".md") for name in names]
    if offline:
        settings["sphinx"]["config"] |= OFFLINE
    path = BUILD / "config.yml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def build_pages(settings: Path, *options: str) -> int:
    """Run jupyter-book with these settings; its exit status."""
    book = Path(sys.executable).with_name("jupyter-book")
    command = [str(book), "build", str(ROOT), "--config", str(settings), *options]
    # extensions of our own lie under the root
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | QUIET | {"PYTHONPATH": path}
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, env=environment, check=False
    ).returncode


def lay_live() -> None:
    """Put the model of the page ``live`` beside the built pages, and say what is missing."""
    if missing := site.install(BUILD / "html"):
        print(f"the live page says that its model is missing: {missing}")


def show(page: Path) -> None:
    """Open a built page where there is a screen, and say where it lies."""
    file = (BUILD / "html" / page.relative_to(ROOT)).with_suffix(".html")
    print(f"open {file}")
    if sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open_new_tab(file.as_uri())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build with every warning an error; the exit status is that of the build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", help="the one page to execute, such as inside; by default all")
    name = parser.parse_args(arguments).page
    wanted = [page for page in notebooks() if name in (None, page.stem)]
    if not wanted:
        known = ", ".join(page.stem for page in notebooks())
        parser.error(f"no page {name!r}; there are: {known}")
    offline = fetch()
    if not offline:
        print(
            "npm is missing or cannot fetch: pages will load MathJax and widgets from their servers"
        )
    refresh_cache()
    if failed := fill(wanted):
        print(f"pages that failed: {', '.join(failed)}")
        return 1
    if name is not None:
        others = [page for page in notebooks() if not cached(page)]
        if status := build_pages(write_config(offline, others), "-n"):
            return status
        lay_live()
        show(wanted[0])
        return 0
    files = [ROOT / "README.md", *(ROOT / f"{page}.md" for page in pages())]
    if untrue := ties.problems(files, CLAIMS):
        print("sentences that the run does not bear out:\n" + "\n".join(untrue))
        return 1
    built = build_pages(write_config(offline), "-W", "-n", "--keep-going")
    if built == 0:
        lay_live()
        batch = BUILD / "reproduce"
        more = measurements(batch) if batch.exists() else ()
        content = write_claims(merge(CLAIMS, more), BUILD / "claims.json")
        validate(content, read_json(SCHEMA))
        exports.lay(content, BUILD / "html" / exports.FOLDER, day())
    return built


if __name__ == "__main__":
    sys.exit(main())
