"""`flatprune tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatprune.cli.options import key_values
from flatprune.cli.output import dispensable
from flatprune.cli.study import EXECUTOR_NAMES
from flatprune.errors import RunsFailedError
from flatprune.files.atomic import write_atomically

BEST_FILE = "best.yaml"


def tune_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="what every trial has, and what is searched")],
    out: Annotated[Path | None, typer.Option(help="folder for trials and tables; default runs/NAME-OF-FILE")] = None,
    trials: Annotated[int, typer.Option(help="altogether, those that are there included")] = 50,
    timeout: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="stop after so many; the same command goes on")
    ] = None,
    early: Annotated[
        str,
        typer.Option(
            help="which trials end early: median (those below it), halving (all but the best quarter), never",
            autocompletion=lambda: ["median", "halving", "never"],
        ),
    ] = "median",
    jobs: Annotated[int, typer.Option(help="trials at once; with one the search is the same every time")] = 1,
    executor: Annotated[
        str, typer.Option(help="who makes them, as for `flatprune study`", autocompletion=lambda: EXECUTOR_NAMES)
    ] = EXECUTOR_NAMES[0],
    executor_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="of the executor; wins over the file's; repeatable")
    ] = None,
) -> None:
    """Search settings with the best held-out accuracy at the wanted size, by Optuna."""
    from flatprune.cli.config import config_text
    from flatprune.reporting import progress
    from flatprune.tuning import read_tuning, tune

    console = progress.SteadyConsole()
    folder = out or Path("runs") / file.stem
    options = key_values("--executor-option", executor_option)
    search = tune(
        read_tuning(file),
        folder,
        trials=trials,
        minutes=timeout,
        early=early,
        jobs=jobs,
        executor=executor,
        options=options,
        console=console,
    )
    if search.best is not None:
        write_atomically(folder / BEST_FILE, config_text(search.best))
    with dispensable():
        console.print()
        search.table().show(console)
        console.print()
        if search.best is not None:
            text = f"flatprune run --config {folder / BEST_FILE} trains the best on all training images"
            console.print(text, soft_wrap=True, highlight=False, markup=False)
    if search.failed:
        number, reason = next(iter(search.failed.items()))
        raise RunsFailedError(
            f"{len(search.failed)} trials failed, the first is {number} ({reason}); the same command tries them again"
        )
