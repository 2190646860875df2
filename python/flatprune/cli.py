"""The command `flatprune`: `run` trains and prunes, `study` makes a grid of runs, `eval`, `export`, `check` follow.

Exit codes: 0 done; 2 something given cannot be used, the loss diverged, or a file could not be written (one line on
stderr says which); 130 interrupted, with a checkpoint to resume from.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flatprune import models
from flatprune.errors import DivergedError, ExportError, InputError, Interrupted, RunsFailedError
from flatprune.export import FORMATS, INPUTS, export_run
from flatprune.settings import (
    AMP,
    COMPENSATE,
    CRITERIA,
    FLATNESS,
    FLATNESS_MODES,
    OPTIMIZERS,
    OPTIMUM_SHIFT,
    SELECTIONS,
    Settings,
)

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130
_NAMED = 10  # files in a message
_LONGEST = 2000  # characters of a message
_ON_OFF = {"on": True, "off": False}

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train a network and prune its neurons at the same time, toward flat minima.",
)


@app.command(name="run")
def run_command(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="digits, or an .npz with x_train, y_train, x_test, y_test")] = Settings.data,
    model: Annotated[str, typer.Option(help=", ".join(models.names()))] = Settings.model,
    target_params: Annotated[
        float | None,
        typer.Option(help="fraction of the parameters left at the end; 1 does not prune  [default: 0.1]"),
    ] = None,
    target_macs: Annotated[
        float | None, typer.Option(help="instead: fraction of the multiply-accumulates left")
    ] = None,
    target_neurons: Annotated[float | None, typer.Option(help="instead: fraction of the neurons left")] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="instead: fraction of the measured inference latency left")
    ] = None,
    latency_batch: Annotated[
        int, typer.Option(help="images in the forward that target-latency times")
    ] = Settings.latency_batch,
    round_to: Annotated[int, typer.Option(help="widths become multiples of this")] = Settings.round_to,
    min_width: Annotated[int, typer.Option(help="neurons that every layer keeps at least")] = Settings.min_width,
    tie_widths: Annotated[
        bool, typer.Option("--tie-widths", help="layers of one kind (the MLPs of all blocks, say) keep one width")
    ] = False,
    max_predicted_loss: Annotated[
        float | None, typer.Option(help="how far the loss may be predicted to rise at one removal event")
    ] = None,
    stop_accuracy_drop: Annotated[
        float | None,
        typer.Option(help="end pruning when the accuracy on held-out training images falls by more points than this"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = Settings.epochs,
    seed: Annotated[int, typer.Option(help="of initialisation, order, subset, noise")] = Settings.seed,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("runs/latest"),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX")] = Settings.device,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default 1 for small networks, else all cores")
    ] = None,
    train_size: Annotated[
        float | None, typer.Option(help="train on a random subset: a number of images, or a fraction below 1")
    ] = None,
    label_noise: Annotated[
        float, typer.Option(help="fraction of the training labels drawn anew, uniformly over the classes")
    ] = Settings.label_noise,
    image_size: Annotated[int | None, typer.Option(help="average the images down to this height and width")] = None,
    classes: Annotated[int | None, typer.Option(help="number of classes, if not the largest label + 1")] = None,
    widths: Annotated[str | None, typer.Option(help="hidden widths of the network, as in 300,100")] = None,
    flatness: Annotated[
        str, typer.Option(help=f"{_one_of(FLATNESS)}: penalise the curvature's spectral radius; sam, msam are rivals")
    ] = Settings.flatness,
    flatness_mode: Annotated[
        str, typer.Option(help=f"{_one_of(FLATNESS_MODES)}: how the penalty's gradient is computed")
    ] = Settings.flatness_mode,
    flatness_strength: Annotated[float | None, typer.Option(help="weight of the penalty")] = None,
    flatness_every: Annotated[int | None, typer.Option(help="the penalty acts on every so many steps")] = None,
    flatness_fade_below: Annotated[
        float | None, typer.Option(help="the penalty fades below this fraction of the parameters; 0 never")
    ] = None,
    sam_radius: Annotated[float, typer.Option(help="how far sam and msam move the parameters")] = Settings.sam_radius,
    sam_every: Annotated[int, typer.Option(help="sam acts on every so many steps")] = Settings.sam_every,
    optimum_shift: Annotated[
        str, typer.Option(help=f"{_one_of(OPTIMUM_SHIFT)}: the smallest weights with the same outputs on 256 images")
    ] = Settings.optimum_shift,
    disout: Annotated[
        float, typer.Option(help="distort feature maps with a probability that rises to this; 0 does not")
    ] = Settings.disout,
    criterion: Annotated[str, typer.Option(help=f"which neurons go: {_one_of(tuple(CRITERIA))}")] = Settings.criterion,
    selection: Annotated[
        str,
        typer.Option(help=f"{_one_of(SELECTIONS)}: whether a score knows which neurons went before (obs, obd)"),
    ] = Settings.selection,
    compensate: Annotated[
        str, typer.Option(help=f"{_one_of(COMPENSATE)}: survivors take over what removed neurons did")
    ] = Settings.compensate,
    exclude: Annotated[str | None, typer.Option(help="layers that keep their neurons: names as in 3,5")] = None,
    batch_size: Annotated[int, typer.Option(help="images a step")] = Settings.batch_size,
    optimizer: Annotated[str, typer.Option(help=_one_of(OPTIMIZERS))] = Settings.optimizer,
    lr: Annotated[
        float | None,
        typer.Option(help="learning rate; default 0.1 with batch norm, 0.05 without; adam and adamw 0.001"),
    ] = None,
    momentum: Annotated[
        float, typer.Option(help="of sgd; the first of the betas of adam and adamw")
    ] = Settings.momentum,
    weight_decay: Annotated[
        float | None, typer.Option(help="of weights, not biases and norms; default 5e-4, adamw 0.01")
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="fraction of each training label that is spread over all classes")
    ] = Settings.label_smoothing,
    mixup: Annotated[
        float, typer.Option(help="alpha of the Beta distribution that training images are mixed by; 0 does not")
    ] = Settings.mixup,
    ema: Annotated[
        float | None, typer.Option(help="test and save an exponential moving average of the weights with this decay")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(help="parts that a step's images go through the network in, for less memory")
    ] = Settings.accumulate,
    amp: Annotated[str, typer.Option(help=f"{_one_of(AMP)}: mixed precision of the forwards")] = Settings.amp,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="memory format of images and convolutions")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="train through torch.compile")] = False,
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="of several processes on GPUs, batch norms see the whole batch")
    ] = False,
    schedule: Annotated[
        str,
        typer.Option(
            help="flat_cosine (constant until pruning ends, then a cosine to 0), cosine, or two cosines, before and "
            "after the end of pruning, the second from the full rate (restart) or a tenth (finetune)"
        ),
    ] = Settings.schedule,
    augment: Annotated[str, typer.Option(help="on or off: random shifts, and mirror images for colour")] = "off",
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="first train the same network the same way without pruning")
    ] = False,
    prune_start: Annotated[float, typer.Option(help="fraction of the training before pruning")] = Settings.prune_start,
    prune_end: Annotated[
        float, typer.Option(help="fraction of the training at which pruning ends; as prune-start: all at once")
    ] = Settings.prune_end,
    prune_every: Annotated[
        int | None, typer.Option(help="steps between removals; default 20, or as many as make about 25 removals")
    ] = None,
    factor_update_steps: Annotated[
        int | None, typer.Option(help="steps between measurements of the curvature; default 5, 10 with convolutions")
    ] = None,
    test_every: Annotated[
        int, typer.Option(help="epochs between tests; the last one is always tested")
    ] = Settings.test_every,
    validation: Annotated[
        float | None, typer.Option(help="test on this fraction of the training images instead of on the test images")
    ] = None,
    architecture_of: Annotated[
        str | None, typer.Option(help="train the final network of the run in this folder, from fresh weights")
    ] = None,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="test on corrupted images too")] = False,
    measure_latency: Annotated[bool, typer.Option("--measure-latency", help="time inference before and after")] = False,
    track_hessian: Annotated[
        int | None, typer.Option(help="measure the true largest Hessian eigenvalue every so many epochs")
    ] = None,
    rank_timeout: Annotated[
        float | None,
        typer.Option(help="seconds to wait for one of torchrun's processes that does not come  [default: 1800]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in --out")] = False,
    restart_damaged: Annotated[
        bool,
        typer.Option("--restart-damaged", help="as --resume; a damaged checkpoint is put aside, the run made anew"),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that is in --out")] = False,
) -> None:
    """Train and prune; results go to --out."""
    values = {
        **{key: value for key, value in context.params.items() if key in Settings.__dataclass_fields__},
        "widths": _widths(widths),
        "exclude": tuple(part for part in (exclude or "").split(",") if part),
        "augment": _switch("augment", augment),
    }
    if (resume or restart_damaged) and overwrite:
        first = "--resume" if resume else "--restart-damaged"
        raise InputError(f"{first} and --overwrite: expected one of them")
    from flatprune import runs

    if resume or restart_damaged:
        work = partial(runs.resume, out, _given(context, values), restart_damaged=restart_damaged)
        _shown(out, work, rank_timeout, done=runs.is_finished(out))
    else:
        _shown(out, partial(runs.run, Settings(**values), out, overwrite=overwrite), rank_timeout)


def _shown(out: Path, work: Callable[..., dict[str, Any]], rank_timeout: float | None, *, done: bool = False) -> None:
    """Do what gives a summary, shown as it goes on and at its end; `done`: the run was finished already."""
    from flatprune.reporting import progress
    from flatprune.training.ranks import is_follower

    console = progress.SteadyConsole()
    summary = work(rank_timeout=rank_timeout, observer=lambda title: progress.observer(console, title))
    if is_follower():
        return
    with _dispensable():
        if done:
            console.print(f"{out}: this run is finished already", highlight=False, markup=False, soft_wrap=True)
        progress.print_summary(console, summary, str(out))


@contextlib.contextmanager
def _dispensable() -> Iterator[None]:
    """What is said of a run that has ended well: its files say it too, so that nobody has to be there to read it."""
    try:
        yield
        sys.stdout.flush()
    except (OSError, ValueError):
        _forget_stdout()


def _forget_stdout() -> None:
    """Let what cannot be written to a closed pipe or a full disk vanish, instead of failing at exit once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@app.command(name="study")
def study_command(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.yaml]", help="the grid")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for runs and report; default runs/NAME-OF-FILE")] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at once; default as many as cores or GPUs")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many; the same command goes on")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data files; default the current one")] = None,
    restart_damaged: Annotated[
        bool, typer.Option("--restart-damaged", help="make runs anew whose checkpoint or summary is damaged")
    ] = False,
    report_only: Annotated[
        Path | None, typer.Option("--report-only", metavar="DIR", help="only write the report of the study in DIR")
    ] = None,
) -> None:
    """Make the runs of a grid, those that are not there yet, and a report of all of them."""
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
    console = progress.SteadyConsole()
    if file is not None:
        folder = out or Path("runs") / file.stem
        plan, failed = run_study(
            read_study(file, data_dir),
            folder,
            jobs=jobs,
            minutes=minutes,
            restart_damaged=restart_damaged,
            console=console,
        )
    else:
        plan = open_study(Path(str(report_only)))
        failed = plan.failures(DAMAGED)
    results = write_report(plan)
    with _dispensable():
        for table in [*overview(results), *differences(results)]:
            console.print()
            table.show(console)
        console.print()
        console.print(f"report in {plan.folder / PAGE_FILE}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        name, reason = next(iter(failed.items()))
        again = "; the same command tries them again" if file is not None else ""
        raise RunsFailedError(f"{len(failed)} runs failed, the first is {name!r} ({reason}){again}")


@app.command(name="eval")
def eval_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a finished run")],
    data: Annotated[str | None, typer.Option(help="digits or an .npz; default the data of the run")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:INDEX")] = Settings.device,
) -> None:
    """Print the accuracy of the saved network on the test images."""
    from flatprune.runs import evaluate_saved

    accuracy, loss, images = evaluate_saved(folder, data, Settings(device=device).torch_device())
    correct = round(accuracy * images / 100.0)
    print(f"test accuracy {accuracy!r} % ({correct} of {images}), loss {loss:.4f}")


@app.command(name="export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a finished run")],
    to: Annotated[str, typer.Option(help=f"{_one_of(tuple(FORMATS))} (Python source and weights)")],
    out: Annotated[Path | None, typer.Option(help="file to write; default one named for the format, in DIR")] = None,
    takes: Annotated[
        str,
        typer.Option(
            "--input",
            help=f"what the file takes: {_one_of(INPUTS)}; the last two are images as in the data, normalized inside",
        ),
    ] = INPUTS[0],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
) -> None:
    """Write the saved network in another format, once its outputs are known to be the same."""
    made = export_run(folder, to, out=out, input=takes, overwrite=overwrite)
    print(f"wrote {' and '.join(str(file) for file in reversed(made.files))}: {made.size:,} bytes")
    print(f"{made.params:,} parameters; takes {made.images}, any n")
    print(f"largest difference from the network {made.difference:.2g}, of outputs up to {made.largest:.3g}")


@app.command(name="check")
def check_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run or of a study")],
) -> None:
    """Say of each file of a run or of a study whether it is whole; exit code 2 where one is not."""
    from flatprune.run_folder import FINE
    from flatprune.study.whole import check_folder

    found = check_folder(folder)
    for name, state in found.items():
        print(f"{name}: {state.removeprefix(f'{folder / name}: ')}")
    wrong = [name for name, state in found.items() if state not in FINE]
    if wrong:
        named = ", ".join([*wrong[:_NAMED], *(["..."] if len(wrong) > _NAMED else [])])
        raise InputError(f"{folder}: {len(wrong)} of {len(found)} files are not whole: {named}")


def _given(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the command line, as against those left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in values if name in context.params}
    return {name: values[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"widths is {text!r}, expected whole numbers as in 300,100") from None


def _one_of(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _switch(name: str, text: str) -> bool:
    if text not in _ON_OFF:
        raise InputError(f"{name} is {text!r}, expected on or off")
    return _ON_OFF[text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure that a user can cause is one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            given = None if arguments is None else list(arguments)
            result = app(args=given, standalone_mode=False, prog_name="flatprune")
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Interrupted as error:
        return _fail(error, EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except (InputError, DivergedError, ExportError, RunsFailedError) as error:
        return _fail(error, EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            _forget_stdout()
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), EXIT_FAILED)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}", EXIT_FAILED)
    except RuntimeError as error:
        if "memory" not in str(error) or "alloc" not in str(error):  # as torch says it, on all devices
            raise
        return _fail(f"not enough memory: {error}", EXIT_FAILED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a command line it cannot parse
            raise
        return _fail(error.format_message(), EXIT_FAILED)


def _warn(message: Warning | str, *_: Any) -> None:
    _say(f"warning: {message}")


def _fail(what: Exception | str, code: int) -> int:
    if not getattr(what, "is_said", False):  # by another rank
        _say(str(what))
    return code


def _say(message: str) -> None:
    """One line on stderr, if somebody is there to read it."""
    line = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
    shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"flatprune: {shown}", file=sys.stderr, flush=True)
