"""Turn the ledger into a short report: ``python -m tools.report [--claims FILE] [--out FOLDER]``.

Always ``report.md``; ``report.html`` and ``report.pdf`` beside it, the PDF where Chromium is
installed. The same ledger at the same commit gives the same files.
"""

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from jsonschema import ValidationError, validate
from markdown_it import MarkdownIt

from tools import ROOT
from tools.crate import ARXIV, citation, papers, published, software
from tools.execute import BUILD
from tools.release import day
from xlvlms_tutorial.claims.claims import claim
from xlvlms_tutorial.claims.headlines import HEADLINES, SCHEMA
from xlvlms_tutorial.claims.ledger import FIDELITY
from xlvlms_tutorial.claims.pooled_ledger import MODELS, pooled_headlines
from xlvlms_tutorial.io import read_json, replacing, write_utf8

STYLE = ROOT / "tools" / "report.css"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
METHOD = """\
Each claim is stated as an effect, a direction and a bar before anything is measured; the number of
a baseline is subtracted from the effect wherever there is one. A measurement confirms a claim
where all of its 95 % interval lies on the claimed side of the bar, refutes it where none of it
does, and leaves it undecided elsewhere. Every measurement counts. The verdicts of one claim are
corrected for their number by Holm's method. A claim then *holds* where all measurements confirm
it, *holds in part* where some do, *does not hold* where none does and more than half refute it,
and all else *cannot tell*. A measurement that asks another question than the paper settles
nothing. Hyper-parameters are fixed beforehand, chosen on validation data, or least favourable to
the claim. The data are drawn scenes whose truth is known, so models are judged by the factors of
each scene rather than by annotators."""


def plain(value: object) -> str:
    r"""Text of the data as markdown that shows it as it is, on one line.

    Nothing in it begins a tag, a link, a formula, a table cell or an emphasis.
    """
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&!^])", r"\\\1", line)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown; its cells are data."""
    lines = [head, ["---"] * len(head)]
    lines += [[plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(content: Mapping[str, object]) -> str:
    """The title, with the number of claims that were measured."""
    return (
        f"{citation()['title']}: {content['multiplicity']['families']} published claims, re-run on "
        "small models whose world is known"
    )


def abstract(content: Mapping[str, object]) -> str:
    """The counts of the ledger in words."""
    many = content["multiplicity"]
    counts = Counter(line["headline"] for line in content["headlines"])
    said = ", ".join(f"{counts[name]} *{name}*" for name in HEADLINES if counts[name])
    measured = [line for line in content["headlines"] if line["measurements"]]
    survived = sum(line["survived"] is True for line in measured)
    return (
        f"We state {len(content['headlines'])} claims of {len(papers(content))} papers on "
        f"vision-language models as effects with a direction and measure them {many['intervals']} "
        f"times, on models small enough for two processor cores. By rule: {said}. {survived} of "
        f"the {len(measured)} measured claims hold against the strongest baseline that we gave "
        f"them. {many['excluding']} intervals exclude their bar, where about "
        f"{many['by_chance']:.0f} would by chance alone; {many['after_holm']} still do after "
        f"correction within each claim. {published(content)}"
    )


def results(content: Mapping[str, object]) -> str:
    """A line for each claim: headline, effect, strongest baseline and numbers of measurements."""
    values: dict[str, list[float]] = {}
    for row in content["measurements"]:
        if row["value"] is not None:
            values.setdefault(row["id"], []).append(row["value"])
    rows = []
    for line in content["headlines"]:
        counts = f"{line['confirmed']} / {line['refuted']} / {line['undecided']}"
        effects = _range(values.get(line["id"], ()))
        if line["effect"]:
            effects += f" ({line['effect']})"
        rival = line["strongest_rival"] or ""
        if line["survived"]:
            rival += " (survived)"
        head = (line["id"], line["statement"], line["headline"], effects, rival)
        rows.append((*head, counts, FIDELITY[line["fidelity"]]))
    head = ("id", "claim", "headline", "effects", "strongest baseline", "+ / − / ?", "measured by")
    return table(head, rows)


def pooled() -> str:
    """A line for each claim that was measured in several runs: the headline over them, by model."""
    by_claim = pooled_headlines()
    models = [name for name in MODELS if any(name in lines for lines in by_claim.values())]
    rows = []
    for name, lines in by_claim.items():
        cells = []
        for model in models:
            line = lines.get(model)
            cells.append(f"{line['headline']} ({line['runs']} runs)" if line else "")
        rows.append((name, claim(name).statement, *cells))
    shown = table(("id", "claim", *(MODELS[model] for model in models)), rows)
    if "pocket-gemma" in models:
        shown += "\n\nGemma's weights are those of an unofficial repackage."
    return shown


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = (f"{end:.2g}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def limits(content: Mapping[str, object]) -> str:
    """What the numbers do not say, with counts."""
    lines = content["headlines"]
    rows = [row for row in content["measurements"] if row["value"] is not None]
    models = sorted({plain(row["model"]) for row in rows})
    scales = Counter(row["scale"] for row in rows)
    varied = sum(line["connectors_varied"] for line in lines)
    other = Counter(line["fidelity"] for line in lines)
    between = sum(row["between_machines"] for row in rows)
    kinds = ", ".join(f"{plain(name)} {scales[name]}" for name in sorted(scales))
    items = [
        f"The models are small: {', '.join(models) or 'none'}. Measurements by scale: "
        f"{kinds or 'none'}.",
        f"{varied} of {len(lines)} claims have an interval over models, connectors or seeds. The "
        "intervals of the others say nothing about another training run.",
        f"{other['proxy']} claims are measured by a proxy, and {other['other question']} by "
        "another question than the paper's.",
        f"{between} measurements would get another verdict on a processor of another kind, and "
        "count as undecided.",
        "One generator draws the pictures, writes the texts and knows the answers.",
    ]
    return "\n".join(f"- {item}" for item in items)


def markdown(content: Mapping[str, object], date: str) -> str:
    """The report as markdown."""
    said = citation()
    versions: dict[str, list[str]] = {}
    for name, version in software(content):
        versions.setdefault(name, []).append(version)
    references = []
    for number, paper in papers(content).items():
        authors = ", ".join(paper["authors"])
        words = ". ".join(filter(None, [authors, paper["title"], paper["year"]]))
        references.append(f"- {plain(words)}. <{ARXIV}{number}>")
    parts = [
        f"# {plain(title(content))}",
        f"{plain(said['authors'][0]['name'])} · version {plain(said['version'])} · {date}",
        f"## Abstract\n\n{abstract(content)}",
        f"## Method\n\n{METHOD}",
        "## Results\n\nEffects are the smallest and the largest measured value; the last but one "
        "column counts measurements that confirm, refute and leave the claim undecided, after the "
        f"correction.\n\n{results(content)}",
        "## Over samples, connectors and language models\n\nSome chapters were run several times, "
        "each time with other samples. Measurements of three runs or more are pooled by random "
        "effects, and headlines made of them by the same rules; few runs make wide intervals.\n\n"
        f"{pooled()}",
        f"## Limits\n\n{limits(content)}",
        "## Hardware and software\n\nPages run on processors alone, in float32, on two cores; "
        "intervals and verdicts are computed in float64. The rows of the ledger carry the versions "
        "below, and no name of a machine; the page *How this book was built* has that of its "
        "build.\n\n"
        + table(("package", "version"), [(k, ", ".join(v)) for k, v in versions.items()]),
        "## References\n\n" + "\n".join(references),
    ]
    return "\n\n".join(parts) + "\n"


def page(text: str, name: str) -> str:
    """The report as one HTML page; tags in the markdown are shown, not obeyed."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}"
        "</body>\n</html>\n"
    )


def browser() -> str | None:
    """Chromium's program, or None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def write_pdf(source: Path, target: Path, program: str) -> None:
    """Print an HTML page as PDF, without the times at which that was done."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        view = running.new_page(java_script_enabled=False, offline=True)
        view.goto(source.resolve().as_uri())
        footer = (
            '<div style="font-size:7pt;width:100%;text-align:center">'
            '<span class="pageNumber"></span> / <span class="totalPages"></span></div>'
        )
        content = view.pdf(
            prefer_css_page_size=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=footer,
        )
        running.close()
    content = re.sub(
        rb"(/(?:Creation|Mod)Date \(D:)(\d{14})", lambda found: found[1] + b"0" * 14, content
    )
    with replacing(target) as draft:
        draft.write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, and say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claims", default=str(BUILD / "claims.json"), help="the ledger")
    parser.add_argument("--out", default=str(BUILD / "report"), help="the folder to write to")
    chosen = parser.parse_args(arguments)
    try:
        content = read_json(chosen.claims)
        validate(content, read_json(SCHEMA))
    except (OSError, ValueError, ValidationError) as problem:
        reason = getattr(problem, "message", problem)
        print(
            f"{chosen.claims} is no ledger ({reason}); `make book` writes one, and so does "
            "`xlvlms claims --json FILE`",
            file=sys.stderr,
        )
        return 1
    folder = Path(chosen.out)
    text = markdown(content, day())
    print(f"written: {write_utf8(folder / 'report.md', text)}")
    html = write_utf8(folder / "report.html", page(text, title(content)))
    program = browser()
    if program is None:
        print(f"no PDF: Chromium is not installed; print {html} from a browser")
        return 0
    write_pdf(html, folder / "report.pdf", program)
    print(f"written: {folder / 'report.pdf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
