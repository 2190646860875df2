"""What can be pruned of the networks that people train.

    python -m bench.zoo                      # all of them; those that the JSON has already are left out
    python -m bench.zoo hf_bert '^timm_.*vit'   # some, by regular expressions
    python -m bench.zoo --fresh --write docs/networks.md

`make zoo` is the last, with what it needs; hours on two cores. `make zoo-quick` runs a dozen.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from bench.zoo.environment import ROOT, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="regular expressions of names; default all")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/zoo.json")
    parser.add_argument("--fresh", action="store_true", help="forget what these networks gave before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="networks at a time, each on one thread")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of each network")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="memory of each network")
    parser.add_argument("--quick", action="store_true", help="a dozen small ones of all packages")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of the JSON into this document")
    arguments = parser.parse_args()
    prepare()
    from bench.zoo.networks import QUICK, load_packages, networks  # torchvision can be imported now
    from bench.zoo.runner import Limits, Runner, chosen
    from bench.zoo.table import table

    builders = chosen(networks(), [*arguments.names, *(f"^{name}$" for name in QUICK if arguments.quick)])
    if not builders:
        raise SystemExit(f"no network is called {' or '.join(arguments.names)}; --list prints the names")
    if arguments.list:
        print("\n".join(builders))
        return
    load_packages()
    limits = Limits(0.4 * arguments.seconds, arguments.seconds, arguments.gigabytes)
    runner = Runner(arguments.results, limits, arguments.jobs)
    if arguments.fresh:
        runner.forget(builders)
    runner.run(builders)
    if arguments.write:
        from bench.documents import replace_between

        replace_between(arguments.write, "zoo", table(json.loads(arguments.results.read_text())))


if __name__ == "__main__":
    main()
