"""`flatprune run`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatprune.cli.options import settings_of, with_settings
from flatprune.cli.output import dispensable
from flatprune.errors import InputError
from flatprune.integrations.loggers import LOGGERS, check_logger
from flatprune.settings import FILES, Settings

if TYPE_CHECKING:
    from flatprune.training.trainer import Observer

_option = partial(typer.Option, rich_help_panel=FILES)


@with_settings
def run_command(
    out: Annotated[
        Path, _option(help="folder for the results [runs/latest]", metavar="DIR", show_default=False)
    ] = Path("runs/latest"),
    config: Annotated[
        Path | None, _option(help="settings from a file; options on the line win over it", metavar="FILE.yaml")
    ] = None,
    print_config: Annotated[
        bool, _option("--print-config", help="print all settings as a file for --config, and do no more")
    ] = False,
    resume: Annotated[bool, _option("--resume", help="go on from the checkpoint in --out")] = False,
    restart_damaged: Annotated[
        bool, _option("--restart-damaged", help="as --resume; a damaged checkpoint is put aside, the run made anew")
    ] = False,
    overwrite: Annotated[bool, _option("--overwrite", help="replace the run that is in --out")] = False,
    logger: Annotated[
        str | None,
        _option(
            help="who is told of events and epochs: tensorboard (in --out/tensorboard), wandb or mlflow",
            metavar="NAME",
            autocompletion=lambda: list(LOGGERS),
        ),
    ] = None,
    rank_timeout: Annotated[
        float | None,
        _option(help="seconds to wait for one of torchrun's processes that does not come [1800]", metavar="NUM"),
    ] = None,
    **given: Any,
) -> None:
    """Train and prune; results go to --out.

    In brackets: what holds where an option is not given.
    """
    from flatprune.cli.config import config_text, read_config  # which loads yaml

    values = settings_of(given)
    if config is not None:
        values = {**read_config(config, instead=values), **values}
    if print_config:
        print(config_text(Settings(**values)), end="")
        return
    if (resume or restart_damaged) and overwrite:
        first = "--resume" if resume else "--restart-damaged"
        raise InputError(f"{first} and --overwrite: expected one of them")
    if logger is not None:
        check_logger(logger)
    from flatprune import runs

    if resume or restart_damaged:
        work = partial(runs.resume, out, values, restart_damaged=restart_damaged)
        _shown(out, work, rank_timeout, logger, done=runs.is_finished(out))
    else:
        _shown(out, partial(runs.run, Settings(**values), out, overwrite=overwrite), rank_timeout, logger)


def _shown(
    out: Path,
    work: Callable[..., dict[str, Any]],
    rank_timeout: float | None,
    logger: str | None,
    *,
    done: bool = False,
) -> None:
    """Do what gives a summary, shown as it goes on and at its end; `done`: the run was finished already."""
    from flatprune.reporting import logged, progress
    from flatprune.training.ranks import is_follower

    console = progress.SteadyConsole()

    def observer(title: str) -> Observer:
        display = progress.observer(console, title)
        if logger is None:
            return display
        return logged.Observers(logged.LoggedRun(logger, partial(LOGGERS[logger], out, title)), display)

    summary = work(rank_timeout=rank_timeout, observer=observer)
    if is_follower():
        return
    with dispensable():
        if done:
            console.print(f"{out}: this run is finished already", highlight=False, markup=False, soft_wrap=True)
        progress.print_summary(console, summary, str(out))
