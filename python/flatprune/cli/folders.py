"""`flatprune eval`, `export` and `check`: what is done with the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatprune import named
from flatprune.errors import InputError
from flatprune.export import FORMATS, INPUTS, export_run
from flatprune.settings import Settings

_LISTED = 10  # files in a message


def eval_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a finished run")],
    data: Annotated[str | None, typer.Option(help="see `flatprune list data`; default the data of the run")] = None,
    model: Annotated[str | None, typer.Option(help="module:function of a network of your own")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX")] = "cpu",
) -> None:
    """Print the accuracy of the saved network on the test images."""
    from flatprune.training.evaluation import evaluate_saved

    accuracy, loss, images = evaluate_saved(folder, data, Settings(device=device).torch_device(), model)
    correct = round(accuracy * images / 100.0)
    print(f"test accuracy {accuracy!r} % ({correct} of {images}), loss {loss:.4f}")


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a finished run")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"{', '.join(FORMATS)} (Python source and weights)")],
    out: Annotated[Path | None, typer.Option(help="file to write; default one named for the format, in DIR")] = None,
    takes: Annotated[
        str,
        typer.Option(
            "--input",
            help=f"what the file takes: {', '.join(INPUTS)}; the last two are images as in the data, normalized inside",
        ),
    ] = INPUTS[0],
    model: Annotated[str | None, typer.Option(help="module:function of a network of your own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
) -> None:
    """Write the saved network in another format.

    Its outputs are compared with the network's first.
    """
    named.allow(model)
    made = export_run(folder, to, out=out, input=takes, overwrite=overwrite)
    print(f"wrote {' and '.join(str(file) for file in reversed(made.files))}: {made.size:,} bytes")
    print(f"{made.params:,} parameters; takes {made.images}, any n")
    print(f"largest difference from the network {made.difference:.2g}, of outputs up to {made.largest:.3g}")


def check_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run or of a study")],
) -> None:
    """Say whether the files of a run or study are whole.

    The exit code is 2 where one is not.
    """
    from flatprune.runs.folder import FINE
    from flatprune.study.whole import check_folder

    found = check_folder(folder)
    for name, state in found.items():
        print(f"{name}: {state.removeprefix(f'{folder / name}: ')}")
    wrong = [name for name, state in found.items() if state not in FINE]
    if wrong:
        listed = ", ".join([*wrong[:_LISTED], *(["..."] if len(wrong) > _LISTED else [])])
        raise InputError(f"{folder}: {len(wrong)} of {len(found)} files are not whole: {listed}")
