"""`python -m bench.hard [FAMILY ...]`: run the families, print one table, end with 1 where one is not sound.

Each family is a module of this package with `SIZES`, the number of cases of each size, and
`run(cases, seed, seconds, first) -> Tally`, which begins with the case of number `first` and ends early
when the seconds are over; `long_run`, whose cases are steps of one run, has no `first`.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.hard.tally import FAULTS, Tally

FAMILIES: tuple[str, ...] = ("valid", "hostile", "geometry", "memory", "damage", "kills", "rank_kills", "long_run")


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m bench.hard", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "families", nargs="*", type=_family, help=f"default all: {', '.join(FAMILIES)}", metavar="FAMILY"
    )
    parser.add_argument("--size", choices=("quick", "full"), default="quick", help="two minutes, or a night")
    parser.add_argument("--cases", type=int, help="number of cases of each family instead of the size's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case of this number, as examples name it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit of each family")
    parser.add_argument("--json", type=Path, help="file for counts and examples; what it has of them is gone on with")
    asked = parser.parse_args(arguments)
    if asked.json and asked.only is not None:
        parser.error("--only is of one case, --json of all up to some number")
    try:
        tallies = read(asked.json)
    except (ValueError, TypeError) as error:
        parser.error(f"--json {asked.json}: holds no tallies: {error}")
    for name in asked.families or FAMILIES:
        tallies[name, asked.seed] = _run(name, asked, tallies.get((name, asked.seed)))
        if asked.json:
            text = json.dumps([tally.as_dict() for tally in tallies.values()], indent=1)
            asked.json.write_text(text + "\n")
    show(list(tallies.values()))
    return 0 if all(tally.sound for tally in tallies.values()) else 1


def _family(name: str) -> str:
    """For argparse, whose `choices` refuse that nothing is given."""
    if name not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FAMILIES)}")
    return name


def _run(name: str, asked: argparse.Namespace, before: Tally | None) -> Tally:
    """The family's cases that are asked for, those done before among them."""
    module = importlib.import_module(f"bench.hard.{name}")
    if asked.only is not None:
        return module.run(1, asked.seed, asked.seconds, first=asked.only)
    cases = asked.cases or module.SIZES[asked.size]
    if before is None or before.next is None:
        return module.run(cases, asked.seed, asked.seconds)
    if before.next >= cases:
        return before
    return before.followed_by(module.run(cases - before.next, asked.seed, asked.seconds, first=before.next))


def read(path: Path | None) -> dict[tuple[str, int], Tally]:
    """The tallies of an earlier call by family and seed; none where there is no such file."""
    if path is None or not path.exists():
        return {}
    tallies = [Tally(**entry) for entry in json.loads(path.read_text())]
    return {(tally.family, tally.seed): tally for tally in tallies}


def show(tallies: list[Tally]) -> None:
    """One row a family, then the examples of faults."""
    table = Table("family", "seed", "tried", *FAULTS, "seconds")
    for tally in tallies:
        counts = [f"{getattr(tally, name):,}" for name in ("tried", *FAULTS)]
        table.add_row(tally.family, str(tally.seed), *counts, f"{tally.seconds:.0f}")
    console = Console()
    console.print(table)
    for tally in tallies:
        for example in tally.examples:
            console.print(f"{tally.family}: {example}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
