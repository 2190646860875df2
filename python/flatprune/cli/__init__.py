"""The command `flatprune`: `run` trains and prunes, `study` makes a grid of runs, `tune` searches settings.

`eval`, `export` and `check` follow.

Exit codes: 0 done; 2 something given cannot be used, the loss diverged, or a file could not be written (one line on
stderr says which); 130 interrupted, with a checkpoint to resume from.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from flatprune.cli.folders import check_command, eval_command, export_command
from flatprune.cli.help import PanelCommand
from flatprune.cli.listing import list_command
from flatprune.cli.output import fail, forget_stdout, warn
from flatprune.cli.run import run_command
from flatprune.cli.study import study_command
from flatprune.cli.tune import tune_command
from flatprune.errors import DivergedError, ExportError, InputError, Interrupted, RunsFailedError
from kfac_ext import __version__

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
for _command in (run_command, study_command, tune_command, eval_command, export_command, check_command, list_command):
    app.command(_command.__name__.removesuffix("_command"), cls=PanelCommand if _command is run_command else None)(
        _command
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flatprune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a network and prune its neurons at the same time, toward flat minima."""


_OF_PYTORCH = (  # nobody who types a command can do anything about these
    "Attempting to run cuBLAS",  # the first product in a thread of autograd
    "TensorFloat32 tensor cores",  # float32 is what was asked for
    "`torch.jit",  # deprecated, and used by PyTorch's own compiler
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure that a user can cause is one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn  # type: ignore[assignment]
            for message in _OF_PYTORCH:
                warnings.filterwarnings("ignore", message=message)
            given = None if arguments is None else list(arguments)
            result = app(args=given, standalone_mode=False, prog_name="flatprune")
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Interrupted as error:
        return fail(error, EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)
    except (InputError, DivergedError, ExportError, RunsFailedError) as error:
        return fail(error, EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            forget_stdout()
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), EXIT_FAILED)
    except MemoryError as error:
        return fail(f"not enough memory: {error}", EXIT_FAILED)
    except RuntimeError as error:
        if "memory" not in str(error) or "alloc" not in str(error):  # as torch says it, on all devices
            raise
        return fail(f"not enough memory: {error}", EXIT_FAILED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a command line it cannot parse
            raise
        return fail(error.format_message(), EXIT_FAILED)
