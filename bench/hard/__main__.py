"""`python -m bench.hard [FAMILY ...]`: run the families, print one table, end with 1 where one is not sound.

Each family is a module of this package with `SIZES`, the number of cases of each size, and
`run(cases, seed, seconds) -> Tally`, which ends early when the seconds are over; cases that depend
on nothing but seed and number begin at its `first`.
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
    parser.add_argument("families", nargs="*", choices=FAMILIES, help="those to run; default all", metavar="FAMILY")
    parser.add_argument("--size", choices=("quick", "full"), default="quick", help="two minutes, or a night")
    parser.add_argument("--cases", type=int, help="number of cases of each family instead of the size's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case of this number, as examples name it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit of each family")
    parser.add_argument("--json", type=Path, help="file for the counts and examples")
    asked = parser.parse_args(arguments)
    tallies = []
    for name in asked.families or FAMILIES:
        module = importlib.import_module(f"bench.hard.{name}")
        if asked.only is None:
            tallies.append(module.run(asked.cases or module.SIZES[asked.size], asked.seed, asked.seconds))
        else:
            tallies.append(module.run(1, asked.seed, asked.seconds, first=asked.only))
    show(tallies)
    if asked.json:
        asked.json.write_text(json.dumps([tally.as_dict() for tally in tallies], indent=1) + "\n")
    return 0 if all(tally.sound for tally in tallies) else 1


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
