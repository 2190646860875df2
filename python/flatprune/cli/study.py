"""`flatprune study`."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flatprune.cli.options import key_values
from flatprune.cli.output import dispensable
from flatprune.errors import InputError, RunsFailedError
from flatprune.files.lock import locked

EXECUTOR_NAMES = ["local", "submitit", "dask", "ray"]
_PART = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


def study_command(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.yaml]", help="the grid")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for runs and report; default runs/NAME-OF-FILE")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="runs at once; default as many as cores or GPUs, on a cluster all there are")
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="who makes them: local, submitit (Slurm), dask or ray", autocompletion=lambda: EXECUTOR_NAMES
        ),
    ] = EXECUTOR_NAMES[0],
    executor_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="of the executor, as in partition=gpu; wins over the file's; repeatable"
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="only the I-th of N parts, as in a job array; all in one --out")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many; the same command goes on")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data files; default the current one")] = None,
    restart_damaged: Annotated[
        bool, typer.Option("--restart-damaged", help="make runs anew whose checkpoint or summary is damaged")
    ] = False,
    report_only: Annotated[
        Path | None, typer.Option("--report-only", metavar="DIR", help="only write the report of the study in DIR")
    ] = None,
) -> None:
    """Make the missing runs of a grid, and a report of all."""
    from flatprune.reporting import progress
    from flatprune.study import read_study, run_study, write_report
    from flatprune.study.plan import DAMAGED
    from flatprune.study.report import PAGE_FILE, open_study
    from flatprune.study.tables import differences, overview
    from flatprune.training.ranks import is_follower

    if is_follower():  # each run of a study is one process's, and the first of torchrun's makes them all
        return
    if (file is None) == (report_only is None):
        raise InputError("study: expected a FILE.yaml, or --report-only DIR")
    part, own = _shard(shard), shard is not None
    console = progress.SteadyConsole()
    if file is not None:
        folder = out or Path("runs") / file.stem
        plan, failed = run_study(
            read_study(file, data_dir),
            folder,
            jobs=jobs,
            minutes=minutes,
            restart_damaged=restart_damaged,
            executor=executor,
            options=key_values("--executor-option", executor_option),
            shard=part,
            console=console,
        )
    else:
        plan = open_study(Path(str(report_only)))
        failed = plan.failures(DAMAGED)
    with locked(plan.folder, wait=True) if own else nullcontext():  # other parts may be about to write it, too
        results = write_report(plan)
    with dispensable():
        for table in [*overview(results), *differences(results)]:
            console.print()
            table.show(console)
        console.print()
        console.print(f"report in {plan.folder / PAGE_FILE}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        name, reason = next(iter(failed.items()))
        again = "; the same command tries them again" if file is not None else ""
        raise RunsFailedError(f"{len(failed)} runs failed, the first is {name!r} ({reason}){again}")


def _shard(text: str | None) -> tuple[int, int]:
    """The two numbers in "2/4"."""
    found = _PART.fullmatch(text or "1/1")
    if found is None:
        raise InputError(f"--shard is {text}, expected I/N, as in 2/4")
    return int(found[1]), int(found[2])
