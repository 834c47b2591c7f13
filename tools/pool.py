"""Put the measurements of batches into the package, for the pooled ledger.

``python -m tools.pool [BATCH ...]``, after ``make reproduce FULL=1``. Writes
``claims/runs.parquet`` of the package, and beside it the versions, the hardware and the recipes.
Runs that are missing or failed are left out, so that it may be called while a batch is at work.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.execute import BUILD
from xlvlms_tutorial.batch import gather
from xlvlms_tutorial.claims.pooled import FILE, write_runs
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.io import digest

_VARIED = ("model", "dataset", "seed")  # what differs between runs of one recipe
Result = Mapping[str, object]


def collect(
    batches: Sequence[str | Path],
) -> tuple[list[dict[str, object]], dict[str, dict[str, object]]]:
    """List what the runs of batches measured of their own models.

    A chapter that compares models of a family measures the others too, in each of its runs; only
    what it says of the model of the run is taken.

    Parameters
    ----------
    batches : sequence of path
        Folders of batches.

    Returns
    -------
    records : list of dict
        The records of all runs that are done, each with its recipe.
    made_with : dict of str to dict
        The recipes by their names, each a chapter and its parameters; and the hardware.

    Raises
    ------
    InputError
        If no run is done.
    FileError
        If a folder holds no batch.
    """
    records = []
    recipes = {}
    machines = []
    for batch in batches:
        for result in gather(batch, write=False).results.values():
            recipe = recipe_of(result)
            name = digest([recipe, result["code"]])[:12]
            recipes[name] = recipe
            machines.append(hardware_of(result["machine"]))
            for record in result["claims"]:
                if record["model"] == result["parameters"]["model"]:
                    records.append(record | {"recipe": name})
    if not records:
        raise InputError(f"no run of {', '.join(map(str, batches))} is done", "run the batch first")
    hardware = [
        machine for number, machine in enumerate(machines) if machine not in machines[:number]
    ]
    return records, {"hardware": hardware, "recipes": recipes}


def recipe_of(result: Result) -> dict[str, object]:
    """Return chapter and parameters of a run, without what runs of one recipe differ in.

    Parameters
    ----------
    result : mapping
        The content of a results file.

    Returns
    -------
    dict
        "chapter" and "parameters".
    """
    parameters = {}
    for name, value in result["parameters"].items():
        if name not in _VARIED:
            parameters[name] = value
    return {"chapter": result["chapter"], "parameters": parameters}


def hardware_of(machine: Mapping[str, object]) -> dict[str, object]:
    """Return the class of a machine: nothing that tells one machine from others of its kind.

    Parameters
    ----------
    machine : mapping
        What a results file says of the machine.

    Returns
    -------
    dict
        "system" without its release, "processor", "cores" and "gpu".
    """
    system = str(machine["system"])
    kind = re.search(r"x86_64|AMD64|arm64|aarch64", system)
    name = system.partition("-")[0]
    return {
        "system": f"{name} {kind.group()}" if kind else name,
        "processor": machine["processor"],
        "cores": machine["cores"],
        "gpu": machine["gpu"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read batches and write the table.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("batches", nargs="*", default=[str(BUILD / "full")], metavar="BATCH")
    parser.add_argument("--out", default=str(FILE), help="the table to write")
    options = parser.parse_args(arguments)
    records, made_with = collect(options.batches)
    table = write_runs(records, options.out, made_with)
    models = table["model"].nunique()
    print(f"{len(table)} measurements, {table['chapter'].nunique()} chapters, {models} models")


if __name__ == "__main__":
    main()
