"""The command line of the benchmarks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import Options, Report, run, verdict

Measure = Callable[[Report], None]
DEVICES = ("auto", "cpu", "cuda")


def application(scripts: Mapping[str, Measure]) -> typer.Typer:
    """The command that runs these scripts, or the one that is named."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def bench(
        only: Annotated[
            str | None, typer.Argument(help=f"One of {', '.join(scripts)}; all of them by default.")
        ] = None,
        device: Annotated[
            str, typer.Option(help="cpu: pocket LLaVA; cuda: the 7B shapes; auto: what is there.")
        ] = "auto",
        repeats: Annotated[
            int | None,
            typer.Option(min=2, help="Rounds of each measurement; by default each script's own."),
        ] = None,
        quick: Annotated[
            bool,
            typer.Option(
                "--quick", help="Small and short: shows that it works, the numbers mean nothing."
            ),
        ] = False,
        folder: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    ) -> None:
        """Measure the promises of the package against today's way."""
        if only is not None and only not in scripts:
            raise typer.BadParameter(
                f"there is no benchmark {only!r}; there are: {', '.join(scripts)}.",
                param_hint="ONLY",
            )
        if device not in DEVICES:
            raise typer.BadParameter(
                f"unknown device {device!r}; there are: {', '.join(DEVICES)}.",
                param_hint="--device",
            )
        options = Options(device, repeats, quick, folder)
        reports = [
            run(name, measure, options) for name, measure in scripts.items() if only in (None, name)
        ]
        typer.echo(verdict(reports))

    return app


def start(scripts: Mapping[str, Measure]) -> None:
    """Run the command line."""
    application(scripts)(prog_name="benchmarks")
