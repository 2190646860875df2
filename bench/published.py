"""Sets the method beside published figures: CIFAR-10, the networks and savings of bench/studies/q5_published.yaml.

    python -m bench.published --data-dir data --out runs/published --minutes 9     # again and again, until it says done
    python -m bench.published --quick                                             # that it works, on a CPU

One training run of 200 epochs each, with shifts and mirror images; the accuracy is that of the last epoch. After so
many minutes the runs are stopped with checkpoints, and the next call goes on; nothing is run twice. Exit code 3: not
done yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from bench import documents
from flatprune.errors import InputError, Interrupted
from flatprune.study import Results, read_study, run_study, write_report

STUDY = Path(__file__).parent / "studies" / "q5_published.yaml"
NOT_DONE = 3
_QUICK = """title: Published figures, quick
base: {data: images.npz, epochs: 1, augment: true, batch_size: 16, flatness: off}
grid:
  network: {"ResNet20, 47 % fewer": {model: resnet20, widths: [8, 8, 8], target_macs: 0.53}}
  seed: [11]
variants: {method: {}}
"""


class Figure(NamedTuple):
    """A published accuracy: after pruning, and of the whole network where it is given (percent)."""

    method: str
    accuracy: float
    whole: float | None = None


# CHIP: NeurIPS 2021; PPSM and those it lists: Comput. Intell. Neurosci. 2022, 7775419, table 2. Best epochs.
PUBLISHED = {
    "ResNet56, 47 % fewer": (Figure("CHIP, 47.4 %", 94.16, 93.26),),
    "ResNet56, 54 % fewer": (Figure("SRR-GR, 53.8 %", 93.75), Figure("PPSM, 54.6 %", 93.57, 93.44)),
    "ResNet56, 75 % fewer": (Figure("PPSM, 75.6 %", 93.22), Figure("LRF, 73.9 %", 93.19)),
    "ResNet32, 64 % fewer": (Figure("PPSM, 64.4 %", 93.28, 93.19),),
    "VGG16, 66 % fewer": (Figure("SCP, 66.2 %", 93.79), Figure("PPSM, 66.2 %", 93.78, 93.72)),
}


def table(results: Results) -> str:
    """Ours beside theirs, Markdown; what has not been run stays empty."""
    head = "network", "multiply-accumulates removed, %", "last epoch, %", "best epoch, %", "n", "published, %"
    rows = []
    for group in results.groups:
        network = dict(group.point)["network"]
        left, last, best = (group.statistic(key) for key in ("macs_left", "test_accuracy_last", "test_accuracy_best"))
        removed = "" if left is None else f"{100.0 - left.mean:.1f}"
        ours = ["" if value is None else value.text(".2f") for value in (last, best)]
        theirs = "; ".join(_named(figure) for figure in PUBLISHED.get(network, ()))
        rows.append((network, removed, *ours, len(group.summaries), theirs))
    return "\n".join(documents.table(head, rows, "lrrrrl"))


def _named(figure: Figure) -> str:
    whole = "" if figure.whole is None else f" (whole network {figure.whole:.2f})"
    return f"{figure.method}: {figure.accuracy:.2f}{whole}"


def _quick_study(folder: Path) -> Path:
    """A study like the real one on a few random images, whose accuracy means nothing."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (96, 8, 8, 3), dtype=np.uint8), np.arange(96) % 10
    np.savez(folder / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    path = folder / "quick.yaml"
    path.write_text(_QUICK)
    return path


def make(study_file: Path, data_dir: Path | None, out: Path, minutes: float | None, jobs: int | None) -> int:
    """Go on with the runs for so many minutes; print the table once all are there."""
    study = read_study(study_file, data_dir)
    try:
        plan, failed = run_study(study, out, jobs=jobs, minutes=minutes, console=Console())
    except Interrupted as stopped:
        print(f"not done yet: {stopped}")
        return NOT_DONE
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(write_report(plan)))
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 2 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of cifar10.npz; default the current one")
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    parser.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    parser.add_argument("--jobs", type=int, help="runs at once; default one a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network on random images, in a minute, on a CPU")
    given = parser.parse_args(arguments)
    if not given.quick:
        return make(STUDY, given.data_dir, given.out, given.minutes, given.jobs)
    with tempfile.TemporaryDirectory() as folder:
        path = _quick_study(Path(folder))
        return make(path, Path(folder), Path(folder) / "out", given.minutes, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
