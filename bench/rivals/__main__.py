"""Ours against what a user would install instead, in one training loop.

    python -m bench.rivals --data-dir data                      # all of it: days on one core
    python -m bench.rivals --data-dir data --tasks fashion --targets 5 2 --methods ours scratch --seeds 3 --minutes 60
    python -m bench.rivals --report                             # what there is, into docs/results.md
    python -m bench.rivals --example oto                        # our loop against the rival's own script

`data` holds `fashion-mnist.npz` and `cifar10.npz`. Every run is one JSON in --out; the next call goes on, and refuses a
folder that was made with other code, settings or data. Each method is run as its authors recommend and with the best of
three values of its knob, chosen on a fifth of the training images with seeds of their own. A method that is not
installed is left out by name (`make rivals` installs all). Exit code 3: not done yet.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.documents import replace_between
from bench.machine import ROOT
from bench.rivals.examples import EXAMPLES, compare
from bench.rivals.method import Method, all_methods, chosen_methods, is_installed
from bench.rivals.plan import FIRST_SEED, FIRST_TUNING_SEED, Folder, stamp
from bench.rivals.report import section, tables
from bench.rivals.runner import Study, go_on
from bench.rivals.tasks import DEFAULT_TARGETS, DEFAULT_TASKS, TARGETS, TASKS
from flatprune.errors import InputError
from flatprune.files.lock import FolderLock

PAGE = ROOT / "docs" / "results.md"
NOT_DONE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        if given.example:
            return compare(given.example)
        return report(given) if given.report else run(given)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, default=Path(), help="folder of the .npz files; default the current one"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(DEFAULT_TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(DEFAULT_TARGETS), metavar="SIZE", help=", ".join(TARGETS)
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default all: " + ", ".join(all_methods()))
    parser.add_argument("--seeds", type=int, default=5, help="of the tables; default 5")
    parser.add_argument(
        "--tuning-seeds", type=int, default=2, help="of the choice of knobs; default 2, 0 tunes nothing"
    )
    parser.add_argument("--minutes", type=float, help="begin no run after so many; the next call goes on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread; default 1")
    parser.add_argument("--out", type=Path, default=Path("build/rivals"), help="default build/rivals")
    parser.add_argument("--report", action="store_true", help="run nothing; put the tables of --out into --page")
    parser.add_argument("--page", type=Path, default=PAGE, help="default docs/results.md")
    parser.add_argument("--marker", default="rivals", help="of the place in --page; default rivals")
    parser.add_argument("--example", choices=EXAMPLES, help="run nothing but this rival's own example, twice")
    return parser


def run(given: argparse.Namespace) -> int:
    """Go on with the runs."""
    methods = chosen_methods(given.methods)
    for name in [name for name, method in methods.items() if not is_installed(method)]:
        print(f"{name}: {methods.pop(name).distribution} is not installed, not run")
    folder = Folder(given.out, stamp(given.data_dir, given.tasks))
    lock = FolderLock(given.out)
    try:
        study = Study(given.tasks, given.targets, methods, _seeds(given), _tuning_seeds(given))
        left = go_on(study, folder, given.data_dir, given.minutes, given.jobs)
    finally:
        lock.release()
    print("done" if left == 0 else f"not done yet: {left} runs or more are left")
    return 0 if left == 0 else NOT_DONE


def report(given: argparse.Namespace) -> int:
    """Write what there is."""
    methods: dict[str, type[Method]] = chosen_methods(given.methods)
    folder, seeds, tuning = Folder(given.out, None), _seeds(given), _tuning_seeds(given)
    shown = list(tables(folder, methods, given.tasks, given.targets, seeds, tuning))
    replace_between(given.page, given.marker, section(shown, folder, _command(given), seeds, tuning))
    return 0


def _command(given: argparse.Namespace) -> str:
    """The call that makes these runs, without the places of this machine."""
    words = ["python -m bench.rivals --data-dir data"]
    for name, default in (("tasks", list(DEFAULT_TASKS)), ("targets", list(DEFAULT_TARGETS)), ("methods", None)):
        value = getattr(given, name)
        words += [f"--{name} {shlex.join(value)}"] if value not in (None, default) else []
    words += [f"--seeds {given.seeds}"] if given.seeds != 5 else []
    return " ".join(words + ([f"--tuning-seeds {given.tuning_seeds}"] if given.tuning_seeds != 2 else []))


def _seeds(given: argparse.Namespace) -> list[int]:
    return list(range(FIRST_SEED, FIRST_SEED + given.seeds))


def _tuning_seeds(given: argparse.Namespace) -> list[int]:
    return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + given.tuning_seeds))


if __name__ == "__main__":
    sys.exit(main())
