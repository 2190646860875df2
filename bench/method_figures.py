"""Measures what the method gives: accuracies and paired differences over five seeds, as a table for docs/figures.md.

    python -m bench.method_figures --data fashion-mnist.npz --out runs/figures --write docs/figures.md

Every run is a `flatprune run` in a process of its own with one thread, two at a time. Runs that are in --out already,
with the same command, are not made again; use another folder after a change to the code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = range(11, 16)
NOISY = "--model mlp --widths 300,100 --train-size 4000 --label-noise 0.4 --criterion obd --schedule cosine"
TASKS = {
    "C5": "--model convnet --image-size 14 --train-size 5000 --epochs 10",
    "A": "--model mlp --widths 300,100 --train-size 10000 --epochs 15",
    "N": f"{NOISY} --epochs 25",
    "N15": f"{NOISY} --epochs 15",
    "digits": "--data digits --model mlp --epochs 60",
}
TASK_NOTES = {
    "C5": "5,000 clean images averaged to 14x14, convolutions 16-16-M-32-32-M-64-64 with batch norm, 72,666 parameters",
    "A": "10,000 clean images, perceptron 784-300-100-10, 266,610 parameters",
    "N": "4,000 images with 40 % of the labels drawn anew, perceptron 784-300-100-10, plain OBD score, 25 epochs",
    "N15": "N with 15 epochs",
    "digits": "scikit-learn's 8x8 digits, perceptron 64-128-64-10, 17,226 parameters",
}
OFF = "--flatness off"
VARIANTS = {
    "": "",  # the defaults: obs, compensation "auto", flatness on
    "flatness off": OFF,
    "no compensation": f"{OFF} --compensate off",
    "obd": f"{OFF} --criterion obd --compensate off",
    "L1 global": f"{OFF} --criterion l1",
    "L1 uniform": f"{OFF} --criterion l1_uniform",
    "SAM": "--flatness sam --sam-radius 0.1",
    "SAM every 4th": "--flatness sam --sam-radius 0.4 --sam-every 4",
}
SCRATCH = "scratch"  # trains the widths that another run ended with


@dataclass(frozen=True)
class Run:
    """What is run once a seed: a task at a fraction of the parameters, in one of the variants.

    Attributes:
        task: key of TASKS.
        percent: parameters left; 100 does not prune.
        variant: key of VARIANTS.
        scratch: train the widths, from the start, that this very run ended with, without the flatness term.
    """

    task: str
    percent: int
    variant: str = ""
    scratch: bool = False

    @property
    def name(self) -> str:
        """As in "C5 5 %, L1 global"."""
        parts = [f"{self.task} {self.percent} %", "same widths from scratch" if self.scratch else "", self.variant]
        return ", ".join(filter(None, parts))

    def folder(self, out: Path, seed: int) -> Path:
        """Where the run of a seed is."""
        slug = self.name.replace(" %", "").replace(",", "").replace(" ", "-").lower()
        return out / slug / str(seed)

    def options(self, out: Path, data: str, seed: int) -> str:
        """Options of `flatprune run`, without --out."""
        options = TASKS[self.task] + f" --seed {seed}"
        if self.task != "digits":
            options = f"--data {shlex.quote(data)} {options}"
        if not self.scratch:
            return f"{options} --target-params {self.percent / 100:g} {VARIANTS[self.variant]}".strip()
        pruned = json.loads((self.pruned.folder(out, seed) / "summary.json").read_text())
        *hidden, _classes = pruned["widths_after"].values()
        return f"{options} --target-params 1 --widths {','.join(map(str, hidden))} {OFF}"

    @property
    def pruned(self) -> Run:
        """The run whose widths a scratch run takes."""
        return Run(self.task, self.percent, self.variant)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        title: what is measured.
        run: whose figure.
        bound: the least value, or the largest if `below`.
        expected: the figure that was measured when the method was designed.
        minus: runs to compare with, seed by seed; of several the one of the best mean.
        figure: key of summary.json.
        ratio: divide by the figure of `minus` (geometric mean over seeds) instead of subtracting it.
        below: the bound is from above.
    """

    title: str
    run: Run
    expected: str
    bound: float | None = None
    minus: tuple[Run, ...] = ()
    figure: str = "test_accuracy_last"
    ratio: bool = False
    below: bool = False


def accuracies(task: str, rows: dict[int, tuple[str, float | None]], variants: tuple[str, ...]) -> list[Check]:
    """Accuracy at several sizes; the bound is that of every variant."""
    return [
        Check(f"{task} {percent} %{', ' + variant if variant else ''}", Run(task, percent, variant), *row)
        for percent, row in rows.items()
        for variant in variants
    ]


def noise_checks(task: str, percent: int, gain: tuple[str, float], against_sam: str) -> list[Check]:
    """What the penalty is worth under label noise, against nothing and against SAM."""
    penalty, none = Run(task, percent), Run(task, percent, "flatness off")
    name = f"{task} {percent} %: penalty minus"
    return [
        Check(f"{name} none", penalty, *gain, (none,)),
        Check(f"{name} SAM 0.1 on every step", penalty, against_sam, -0.5, (Run(task, percent, "SAM"),)),
        Check(f"{name} SAM 0.4 on every 4th", penalty, "", None, (Run(task, percent, "SAM every 4th"),)),
    ]


def sharpness_check(task: str, percent: int) -> Check:
    """How far the penalty brings the largest Hessian eigenvalue down."""
    title, none = f"{task} {percent} %: lambda_max with the penalty / without", Run(task, percent, "flatness off")
    return Check(title, Run(task, percent), "0.26", 0.5, (none,), figure="hessian_lambda_max", ratio=True, below=True)


def _conv_checks() -> list[Check]:
    off, on = Run("C5", 5, "flatness off"), Run("C5", 5)
    baselines = Run("C5", 5, "L1 global"), Run("C5", 5, "L1 uniform")
    checks = accuracies("C5", {5: ("83.8", 83.0), 2: ("81.4", 80.3)}, ("", "flatness off"))
    for run, label in ((on, ""), (off, ", flatness off")):
        scratch = Run("C5", 5, run.variant, scratch=True)
        checks += [
            Check(f"C5 5 %{label}: minus the same widths from scratch", run, "+1.2", 0.4, (scratch,)),
            Check(f"C5 5 %{label}: minus the better L1", run, "+3.9", 2.5, baselines),
        ]
    with_, without = Run("C5", 2, "flatness off"), Run("C5", 2, "no compensation")
    checks.append(Check("C5 2 %, flatness off: compensation on minus off", with_, "+1.7", 0.3, (without,)))
    return checks


CHECKS = [
    *_conv_checks(),
    *accuracies("A", {10: ("85.8", 85.4), 5: ("85.0", 84.6), 2: ("82.6", 81.8)}, ("", "flatness off")),
    *(
        check
        for task in ("N", "N15")
        for check in (
            *noise_checks(task, 10, ("+4.6", 3.0), "+0.2"),
            *noise_checks(task, 5, ("+2.6", 1.5), "-0.2"),
            sharpness_check(task, 10),
        )
    ),
    *accuracies("digits", {100: ("98.3", None), 20: ("97.5", 96.0), 10: ("96.8", 95.0)}, ("", "flatness off")),
]
EXTRA_RUNS = [  # for the tables of accuracies only; made with --all
    *(Run(task, 100, variant) for task in ("C5", "A") for variant in ("flatness off", "")),
    *(Run("C5", 10, variant) for variant in ("", "flatness off")),
    *(Run("C5", percent, variant) for percent in (10, 2) for variant in ("L1 global", "L1 uniform")),
    *(Run("C5", percent, "obd") for percent in (10, 5, 2)),
    *(Run("C5", percent, "no compensation") for percent in (10, 5)),
    *(Run("C5", percent, "flatness off", scratch=True) for percent in (10, 2)),
    *(Run("A", percent, variant) for percent in (10, 5, 2) for variant in ("L1 global", "L1 uniform")),
    *(Run("A", percent, "flatness off", scratch=True) for percent in (10, 5, 2)),
]


class Figures:
    """Makes the runs and reads their summaries."""

    def __init__(self, out: Path, data: str, seeds: range) -> None:
        self.out, self.data, self.seeds = out, data, seeds
        self.failed: list[str] = []

    def make(self, runs: list[Run], processes: int) -> None:
        """Run what is not there; from-scratch runs wait for the pruned ones whose widths they take."""
        runs = list(dict.fromkeys([*(run.pruned for run in runs if run.scratch), *runs]))
        for scratch in (False, True):
            jobs = [(run, seed) for run in runs if run.scratch is scratch for seed in self.seeds]
            with ThreadPoolExecutor(processes) as pool:
                list(pool.map(lambda job: self._run(*job), jobs))

    def _run(self, run: Run, seed: int) -> None:
        folder = run.folder(self.out, seed)
        try:
            options = run.options(self.out, self.data, seed)
        except FileNotFoundError as error:
            self.failed.append(f"{run.name}, seed {seed}: no widths ({error.filename})")
            return
        command = f"flatprune run {options} --threads 1"
        note = folder / "command.txt"
        if (folder / "summary.json").is_file() and note.is_file() and note.read_text() == command + "\n":
            return
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [*shlex.split(command)[1:], "--out", str(folder), "--overwrite"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-m", "flatprune", *arguments], capture_output=True, text=True, env=environment
        )
        if result.returncode:
            self.failed.append(f"{run.name}, seed {seed}: exit code {result.returncode} {result.stderr.strip()}")
        else:
            note.write_text(command + "\n")
            print(f"{run.name}, seed {seed}: done", flush=True)

    def values(self, run: Run, figure: str = "test_accuracy_last") -> list[float]:
        """The figure of every seed."""
        return [self._summary(run, seed)[figure] for seed in self.seeds]

    def _summary(self, run: Run, seed: int) -> dict[str, Any]:
        return json.loads((run.folder(self.out, seed) / "summary.json").read_text())

    def is_there(self, run: Run) -> bool:
        """Whether all seeds of a run are done."""
        return all((run.folder(self.out, seed) / "summary.json").is_file() for seed in self.seeds)

    def versions(self) -> str:
        """Of the run at hand, in one line."""
        found = self._summary(CHECKS[0].run, self.seeds[0])["versions"]
        return ", ".join(f"{name} {version}" for name, version in found.items())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _with_error(values: list[float]) -> str:
    return "{:.2f} ± {:.2f}".format(*mean_and_error(values))


def check_line(figures: Figures, check: Check) -> str:
    """One line of the table of checks."""
    values = figures.values(check.run, check.figure)
    sign = ""
    title = check.title
    if check.minus:
        others = {run: figures.values(run, check.figure) for run in check.minus}
        best = max(others, key=lambda run: statistics.fmean(others[run]))
        if check.ratio:
            values = [math.log(a / b) for a, b in zip(values, others[best])]
        else:
            values, sign = [a - b for a, b in zip(values, others[best])], "+"
        if len(check.minus) > 1:
            title += f" ({best.variant.split()[-1]})"
    mean, error = mean_and_error(values)
    if check.ratio:
        mean, error = math.exp(mean), math.exp(mean) * error
    bound, met = "", ""
    if check.bound is not None:
        bound = f"{'<' if check.below else '>' if sign else '>='} {check.bound:{sign}g}"
        met = "yes" if (mean < check.bound if check.below else mean > check.bound) else "**no**"
    return f"| {title} | {check.expected} | {mean:{sign}.2f} ± {error:.2f} | {bound} | {met} |"


def accuracy_table(figures: Figures, task: str, rows: list[tuple[str, str, bool]], percents: list[int]) -> list[str]:
    """Mean test accuracy of several variants at several sizes; what was not run is left out."""
    lines = [
        f"| {task} | {' | '.join(f'{percent} %' for percent in percents)} | lambda_max | seconds |",
        "| --- |" + " ---: |" * (len(percents) + 2),
    ]
    for label, variant, scratch in rows:
        cells = []
        for percent in percents:
            run = Run(task, percent, variant, scratch)
            cells.append(
                "{:.2f} ± {:.2f}".format(*mean_and_error(figures.values(run))) if figures.is_there(run) else ""
            )
        last = [run for p in percents if figures.is_there(run := Run(task, p, variant, scratch))][-1]
        sharpness, seconds = (statistics.median(figures.values(last, key)) for key in ("hessian_lambda_max", "seconds"))
        lines.append(f"| {label} | {' | '.join(cells)} | {sharpness:.3g} | {seconds:.1f} |")
    return lines


ROWS = [
    ("**default**", "", False),
    ("flatness off", "flatness off", False),
    ("flatness off, compensation off", "no compensation", False),
    ("plain OBD score, flatness and compensation off", "obd", False),
    ("L1 global, flatness off", "L1 global", False),
    ("L1 uniform, flatness off", "L1 uniform", False),
    ("SAM 0.1 on every step", "SAM", False),
    ("SAM 0.4 on every 4th", "SAM every 4th", False),
    ("widths of 'flatness off' from scratch", "flatness off", True),
]


def report(figures: Figures) -> str:
    """All tables and commands, Markdown."""
    seeds = f"{figures.seeds[0]} to {figures.seeds[-1]}"
    lines = [
        f"Mean ± standard error over the seeds {seeds}; differences and ratios are paired by seed. Versions: "
        f"{figures.versions()}.",
        "",
        "| check | expected | measured | bound | met |",
        "| --- | --- | --- | --- | --- |",
        *(check_line(figures, check) for check in CHECKS if all(map(figures.is_there, (check.run, *check.minus)))),
    ]
    for task, options in TASKS.items():
        runs = [run for run in [*(check.run for check in CHECKS), *EXTRA_RUNS] if run.task == task]
        percents = sorted({run.percent for run in runs if figures.is_there(run)}, reverse=True)
        if not percents:
            continue
        rows = [row for row in ROWS if any(figures.is_there(Run(task, p, row[1], row[2])) for p in percents)]
        data = "" if task == "digits" else "--data fashion-mnist.npz "
        lines += [
            "",
            f"### {task}: {TASK_NOTES[task]}",
            "",
            "Test accuracy (%) by fraction of the parameters; median lambda_max and seconds at the smallest fraction.",
            "",
            *accuracy_table(figures, task, rows, percents),
            "",
            f"    flatprune run {data}{options} --seed S --target-params P",
        ]
    lines += ["", "The rows add:", ""]
    lines += [f"    {name:<30}{options}" for name, options in VARIANTS.items() if options]
    lines += [f"    {'from scratch':<30}--target-params 1 --widths W {OFF}"]
    return "\n".join(lines)


def write_between_marks(path: Path, text: str) -> None:
    """Replace what stands between the two marks in a file."""
    begin, end = "<!-- method_figures: begin -->", "<!-- method_figures: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: expected the lines {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist.npz", help="Fashion-MNIST as an .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--task", choices=TASKS, action="append", help="only these tasks, without the report")
    parser.add_argument("--all", action="store_true", help="more rows in the tables of accuracies, twice the time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this file")
    arguments = parser.parse_args()
    figures = Figures(arguments.out, arguments.data, SEEDS)
    runs = [run for check in CHECKS for run in (check.run, *check.minus)] + (EXTRA_RUNS if arguments.all else [])
    figures.make([run for run in runs if run.task in (arguments.task or TASKS)], arguments.processes)
    for line in figures.failed:
        print(line, file=sys.stderr)
    if figures.failed:
        return 1
    if not arguments.task:
        text = report(figures)
        print(text)
        if arguments.write:
            write_between_marks(arguments.write, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
