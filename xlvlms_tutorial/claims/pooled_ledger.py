"""Show pooled runs: headlines by model beside those of a build, and where models disagree."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from itertools import groupby

import pandas as pd

from xlvlms_tutorial.claims.claims import claim
from xlvlms_tutorial.claims.headlines import Entry, distance, headlines
from xlvlms_tutorial.claims.pooled import pool, read_runs
from xlvlms_tutorial.metrics.intervals import Estimate
from xlvlms_tutorial.view.cards import Html, style_of
from xlvlms_tutorial.view.tables import badge

# How the models of the grid are called on pages.
MODELS = {
    "pocket-llava": "SmolLM2, first connector",
    "pocket-llava-seed1": "SmolLM2, second connector",
    "pocket-llava-seed2": "SmolLM2, third connector",
    "pocket-gemma": "Gemma 3 270M",
}
# Fewer runs say next to nothing about how much runs differ: with two, Student's t is 12.7.
MIN_RUNS = 3


def pooled_headlines(
    entries: Sequence[Entry] | None = None,
) -> dict[str, dict[str, dict[str, object]]]:
    """Sum up pooled measurements by claim and by model, by the rules of the ledger.

    Use it to say beside a page's verdict what more runs gave. Measurements of fewer than three runs
    do not count.

    Parameters
    ----------
    entries : sequence of mapping, optional
        The entries of :func:`pool`; by default of the runs in the package.

    Returns
    -------
    dict of str to dict of str to dict
        For each claim, for each model: its line of :func:`headlines`, and "runs", the smallest
        number of runs of a measurement.

    Examples
    --------
    >>> from xlvlms_tutorial.claims.pooled_ledger import pooled_headlines
    >>> lines = pooled_headlines()
    >>> all(line["runs"] >= 3 for by_model in lines.values() for line in by_model.values())
    True
    """
    by_claim: dict[str, dict[str, dict[str, object]]] = {}
    entries = _of_package() if entries is None else entries
    enough = [entry for entry in entries if int(entry["runs"]) >= MIN_RUNS]
    enough.sort(key=_model_order)
    for model, of_model in groupby(enough, key=lambda entry: str(entry["model"])):
        rows = list(of_model)  # sorting left them in the order of the register
        fewest: dict[str, int] = {}
        for row in rows:
            name = str(row["id"])
            fewest[name] = min(int(row["runs"]), fewest.get(name, int(row["runs"])))
        for line in headlines(rows):
            name = str(line["id"])
            by_claim.setdefault(name, {})[model] = line | {"runs": fewest[name]}
    return by_claim


def _model_order(entry: Entry) -> tuple[int, str]:
    model = str(entry["model"])
    return (list(MODELS).index(model) if model in MODELS else len(MODELS), model)


@cache
def _of_package() -> tuple[dict[str, object], ...]:
    return tuple(pool(read_runs()))


def pooled_table(
    entries: Sequence[Entry],
    pooled: Sequence[Entry] | None = None,
    link: str = "#{}",
) -> Html:
    """Show this build's headlines beside those of more runs, a column for each model.

    Use it on the ledger's page. Claims that no run measured are left out.

    Parameters
    ----------
    entries : sequence of mapping
        The entries of :func:`merge`: what this build measured.
    pooled : sequence of mapping, optional
        The entries of :func:`pool`; by default of the runs in the package.
    link : str, default "#{}"
        The address of a claim's measurements, with its id in place of the braces.

    Returns
    -------
    :class:`~xlvlms_tutorial.view.cards.Html`
        A row a claim, with its style.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import merge, pooled_table
    >>> "SmolLM2, first connector" in str(pooled_table(merge("no/such/folder")))
    True
    """
    by_claim = pooled_headlines(pooled)
    models: list[str] = []
    for by_model in by_claim.values():
        models += [model for model in by_model if model not in models]
    models.sort(key=lambda model: _model_order({"model": model}))
    names = ["claim", "what is claimed", "this build", *map(_label, models), "what differs"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for line in headlines(entries):
        by_model = by_claim.get(str(line["id"]))
        if by_model:
            cells = _cells(line, by_model, models, link)
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    title = "Headlines of this build and of more runs"
    return Html(
        f'{style_of("sign")}{style_of("ledger")}<div class="ledger"><div class="scroll headlines" '
        f'tabindex="0" role="region" aria-label="{title}"><table><tr>{head}</tr>{body}</table>'
        "</div></div>"
    )


def _label(model: str) -> str:
    return MODELS.get(model, model)


def _cells(
    line: Mapping[str, object],
    by_model: Mapping[str, Mapping[str, object]],
    models: Sequence[str],
    link: str,
) -> list[str]:
    name = escape(str(line["id"]))
    cells = [
        f'<a href="{escape(link.format(name))}">{name}</a>',
        escape(str(line["statement"])),
        badge(str(line["headline"])),
    ]
    for model in models:
        pooled = by_model.get(model)
        if pooled is None:
            cells.append("not run")
            continue
        counted = f"{pooled['confirmed']} / {pooled['undecided']} / {pooled['refuted']}"
        runs = f"{pooled['runs']} runs, {counted}"
        cells.append(f"{badge(str(pooled['headline']))} <small>{runs}</small>")
    cells.append(escape(what_differs(line, by_model)))
    return cells


def what_differs(line: Mapping[str, object], by_model: Mapping[str, Mapping[str, object]]) -> str:
    """Say in words whose headline differs from that of a build.

    Parameters
    ----------
    line : mapping
        The line of :func:`headlines` of the build.
    by_model : mapping of str to mapping
        The lines of the same claim by model, from :func:`pooled_headlines`.

    Returns
    -------
    str
        Empty where nothing differs, or the build has not measured the claim.

    Examples
    --------
    >>> from xlvlms_tutorial.claims.pooled_ledger import what_differs
    >>> what_differs({"headline": "holds"}, {"pocket-gemma": {"headline": "cannot tell"}})
    'Gemma 3 270M'
    """
    if line["headline"] == "not measured":
        return ""
    differing = []
    for model, pooled in by_model.items():
        if pooled["headline"] != line["headline"]:
            differing.append(_label(model))
    return "; ".join(differing)


def agreement(entries: Sequence[Entry] | None = None) -> pd.DataFrame:
    """Compare models, measurement by measurement.

    Use it to see where a finding belongs to one connector or one language model. Measurements of
    fewer than three runs do not count.

    Parameters
    ----------
    entries : sequence of mapping, optional
        The entries of :func:`pool`; by default of the runs in the package.

    Returns
    -------
    pandas.DataFrame
        A row for each measurement that two or more models have: claim, chapter, setting, models
        (their number), same side (of the bar), same verdict, and contradict (one model confirms
        what another refutes).

    Examples
    --------
    >>> from xlvlms_tutorial.claims import agreement
    >>> list(agreement().columns)[:4]
    ['claim', 'chapter', 'setting', 'models']
    """
    by_setting: dict[tuple[object, ...], list[Entry]] = {}
    for entry in _of_package() if entries is None else entries:
        if int(entry["runs"]) >= MIN_RUNS:
            setting = (entry["id"], entry["chapter"], entry["variant"], entry["dataset"])
            by_setting.setdefault(setting, []).append(entry)
    rows = []
    for (name, chapter, variant, _), of_setting in by_setting.items():
        if len(of_setting) < 2:
            continue
        claimed = claim(str(name))
        sides = {distance(claimed, float(entry["value"])) > 0 for entry in of_setting}
        verdicts = {entry["verdict"] for entry in of_setting}
        rows.append(
            {
                "claim": name,
                "chapter": chapter,
                "setting": variant,
                "models": len(of_setting),
                "same side": len(sides) == 1,
                "same verdict": len(verdicts) == 1,
                "contradict": {"confirmed", "refuted"} <= verdicts,
            }
        )
    columns = ["claim", "chapter", "setting", "models", "same side", "same verdict", "contradict"]
    return pd.DataFrame(rows, columns=columns)


def entry_table(entries: Iterable[Entry], power: bool = False) -> pd.DataFrame:
    """List pooled measurements with their spread between runs, or with what would decide them.

    Use it for a page; a row's numbers are text.

    Parameters
    ----------
    entries : iterable of mapping
        Entries of :func:`pool`.
    power : bool, default False
        Whether to say how many runs and samples are needed, in place of the spread.

    Returns
    -------
    pandas.DataFrame
        A row a measurement: setting, model, effect with its interval, runs; then τ, I² and verdict,
        or runs needed and samples needed.

    Examples
    --------
    >>> from xlvlms_tutorial.claims import pool, read_runs
    >>> from xlvlms_tutorial.claims.pooled_ledger import entry_table
    >>> list(entry_table(pool(read_runs()), power=True).columns)[-2:]
    ['runs needed', 'samples needed']
    """
    rows = []
    for entry in entries:
        row = {
            "claim": entry["id"],
            "setting": entry["variant"],
            "model": _label(str(entry["model"])),
            "effect": str(Estimate(entry["value"], entry["low"], entry["high"], entry["n"])),
            "runs": str(entry["runs"]),
        }
        if power:
            row["runs needed"] = str(entry["needed_runs"] or "-")
            row["samples needed"] = str(entry["needed_samples"] or "-")
        else:
            row["τ"] = f"{entry['between']:.2g}"
            row["I²"] = f"{entry['inconsistency']:.0%}"
            row["verdict"] = str(entry["verdict"])
        rows.append(row)
    columns = ["claim", "setting", "model", "effect", "runs"]
    columns += ["runs needed", "samples needed"] if power else ["τ", "I²", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("claim")


def runs_listed(records: Iterable[Mapping[str, object]] | None = None) -> pd.DataFrame:
    """List which runs there are: the seeds of each chapter and model.

    Use it where a page says what its pooled verdicts rest on.

    Parameters
    ----------
    records : iterable of mapping, optional
        Records, as for :func:`pool`; by default those of the package.

    Returns
    -------
    pandas.DataFrame
        A row a chapter, a column a model, in each cell the seeds as text, "" where there are none.

    Examples
    --------
    >>> from xlvlms_tutorial.claims.pooled_ledger import runs_listed
    >>> rows = [{"chapter": "inside", "model": "pocket-llava", "seeds": [seed]} for seed in (0, 2)]
    >>> runs_listed(rows).loc["inside", "SmolLM2, first connector"]
    '0, 2'
    """
    records = read_runs() if records is None else records
    seeds: dict[str, dict[str, set[int]]] = {}
    for record in sorted(records, key=_model_order):
        by_chapter = seeds.setdefault(_label(str(record["model"])), {})
        by_chapter.setdefault(str(record["chapter"]), set()).update(record["seeds"])
    columns = {}
    for model, by_chapter in seeds.items():
        columns[model] = {name: ", ".join(map(str, sorted(of))) for name, of in by_chapter.items()}
    return pd.DataFrame(columns).fillna("").rename_axis("chapter")
