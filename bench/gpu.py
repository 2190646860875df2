"""Everything a machine with a GPU can tell about the CUDA kernels, in one JSON: build, tests, sanitizers, benchmarks.

    python -m bench.gpu [--out FILE] [--minutes 9] [--skip build,tests,sanitizer,bench]
    python -m bench.gpu --dry          # tries the script without a GPU: tiny sizes on the CPU, no build, no sanitizer
    python -m bench.gpu --table FILE   # writes the tables of docs/kernels.md from a JSON

Needs no network. Steps that would not end within `--minutes` are left out, and the JSON says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORMAT = 1
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED_CASES = ("kinds", "mlp")
TESTS = ("tests/ops/test_covariance.py", "tests/ops/test_covariance_group.py", "tests/ops/test_covariance_cuda.py")
ROUNDS = 15


class Run:
    """The JSON under way; written after every step, so that a run that is cut short keeps what it has."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "left_out": [],
        }

    def seconds_left(self) -> float:
        """Until the run has to end."""
        return self.end - time.monotonic()

    def keep(self, key: str, value: Any) -> None:
        """Store a step's outcome."""
        self.document[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")

    def command(self, name: str, *words: str, **environment: str) -> dict[str, Any]:
        """Run a command; its exit code, seconds and the end of its output. A timeout is exit code 124."""
        print(f"[{self.seconds_left():4.0f} s left] {name}", flush=True)
        start = time.monotonic()
        try:
            run = subprocess.run(
                words,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=max(10.0, self.seconds_left()),
            )
            code, output = run.returncode, run.stdout
        except subprocess.TimeoutExpired as late:
            code, output = 124, str(late.stdout or "")
        if code:
            print(output[-3000:], flush=True)
        return {"exit": code, "seconds": round(time.monotonic() - start, 1), "output": output[-3000:]}


# ---- build, tests, sanitizers ----


def build(run: Run) -> None:
    """Install in place with KFAC_CUDA=ON, without network, and build the emulation's cases for the GPU."""
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", ".")
    outcome = {"install": run.command("build", sys.executable, *install, KFAC_CUDA="ON")}
    if outcome["install"]["exit"]:
        run.keep("build", outcome)
        raise SystemExit("the build failed")
    code = "from kfac_ext import _C; print(_C.build_directory())"
    folder = run.command("build folder", sys.executable, "-c", code)["output"].split()[-1]
    cmake = shutil.which("cmake") or "cmake"
    outcome["cases"] = run.command("build cases", cmake, "--build", folder, "--target", "covariance_emulation")
    run.keep("build", outcome)


def tests(run: Run) -> None:
    """The CUDA half of the tests."""
    outcome = run.command("tests", sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda", *TESTS)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", outcome["output"])
    run.keep("tests", outcome | {kind: int(count) for count, kind in counts})


def sanitizer(run: Run) -> None:
    """Small cases, without Python: first alone, against the float64 oracle, then under each tool."""
    from kfac_ext import _C

    program = Path(_C.build_directory()) / "csrc" / "covariance_emulation"
    command = (str(program), "--device")
    outcome = {"alone": run.command("cases", *command, *SANITIZED_CASES)}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for name in TOOLS:
        if not Path(tool).exists():
            outcome[name] = {"exit": None, "output": "compute-sanitizer is not installed"}
        elif run.seconds_left() < 60:
            run.document["left_out"].append(name)
        else:
            # initcheck would report copies of padding back to the host
            words = (tool, "--tool", name, "--error-exitcode", "9", *command, *SANITIZED_CASES)
            outcome[name] = run.command(name, *words)
    run.keep("sanitizer", outcome)


# ---- benchmarks ----


def timer(device: Any) -> Callable[[Callable[[], None]], float]:
    """milliseconds(call): between device events with a cold second-level cache, or wall time on the CPU."""
    import torch

    if device.type == "cpu":

        def wall(call: Callable[[], None]) -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return wall
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=device)

    def events(call: Callable[[], None]) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return events


def alternate(variants: dict[str, Callable[[], None]], device: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant, taking turns: median, quartiles, minimum."""
    once = timer(device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(once(call))
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        found[name] = {"median": median, "q1": low, "q3": high, "min": min(values)}
    return found


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Float32 or tf32 products, in matmul and convolutions (and so in kfac_ext)."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def ceilings(device: Any, quick: bool) -> dict[str, float]:
    """What this device reaches: copying in GB/s (read + written), matmul in TFLOP/s."""
    import torch

    n, count = (256, 1 << 16) if quick else (8192, 1 << 29)
    source = torch.randn(count, device=device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=device)
    found = {"copy_gbs": 2e-6 * source.nbytes / alternate({"x": lambda: target.copy_(source)}, device, 5)["x"]["min"]}
    for name in ("float32", "tf32"):
        with precision(name):
            ms = alternate({"x": lambda: a @ a}, device, 5)["x"]["min"]
        found[f"matmul_{name}_tflops"] = 2e-9 * n**3 / ms
    return found


def work_sets(quick: bool) -> dict[str, list[Any]]:
    """The four networks; in a dry run the distinct kinds of their layers, small."""
    from bench import worksets as w

    full = {
        "VGG19 b128": w.vgg(128, w.VGG19),
        "ResNet32 b128": w.resnet(128, 5),
        "ResNet50 b32": w.resnet50(32),
        "MLP b256": w.mlp(256),
    }
    if not quick:
        return full
    small = {}
    for name, layers in full.items():
        kinds = {(i.kernel, i.stride, i.is_convolution): i for i in layers}
        small[name] = [
            i._replace(batch=2, channels=min(i.channels, 12), outputs=min(i.outputs, 12), size=min(i.size, 10))
            for i in kinds.values()
        ]
    return small


def covariance(layers: list[Any], device: Any, rounds: int) -> dict[str, Any]:
    """A and G of all layers, in both precisions: milliseconds of each variant, error of the native one."""
    from bench import gpu_covariance as family

    work, found = family.Work(layers, device), {}
    for name in ("float32", "tf32"):
        with precision(name):
            times = alternate(family.variants(work), device, rounds)
            found[name] = {"ms": times, "native_error": family.worst_error(work)}
    return found | {"plain_flops": family.products(layers)}


# name -> measurement of one network; inverses, power iteration and saliency join here
FAMILIES: dict[str, Callable[[list[Any], Any, int], dict[str, Any]]] = {"covariance": covariance}


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """Each baseline over native at the same precision, and over native in tf32."""
    found = {}
    for name in ("float32", "tf32"):
        times = entry[name]["ms"]
        for baseline in times.keys() - {"native"}:
            found[f"{baseline} {name} / native {name}"] = times[baseline]["median"] / times["native"]["median"]
    return dict(sorted(found.items()))


def shares(entry: dict[str, Any], reached: dict[str, float]) -> dict[str, float]:
    """Operations of the plain way in native's time, over what a matmul reaches: above 1 where work is saved."""
    rate = {name: 1e-9 * entry["plain_flops"] / entry[name]["ms"]["native"]["median"] for name in ("float32", "tf32")}
    return {name: value / reached[f"matmul_{name}_tflops"] for name, value in rate.items()}


def bench(run: Run, device: Any, quick: bool) -> None:
    """Every family on every network, and the ceilings."""
    run.keep("ceilings", ceilings(device, quick))
    results: dict[str, Any] = {}
    for family, measure in FAMILIES.items():
        for name, layers in work_sets(quick).items():
            if run.seconds_left() < 45:
                run.document["left_out"].append(f"{family}, {name}")
                continue
            print(f"[{run.seconds_left():4.0f} s left] {family}, {name}", flush=True)
            entry = measure(layers, device, 2 if quick else ROUNDS)
            results.setdefault(family, {})[name] = entry | {
                "ratios": ratios(entry),
                "share_of_matmul": shares(entry, run.document["ceilings"]),
            }
            run.keep("results", results)


def machine(device: Any) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    import torch

    import kfac_ext
    from bench.results import commit, cpu_name

    info: dict[str, Any] = {"cpu": cpu_name(), "commit": commit(), "build": kfac_ext.build_info()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        info |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": driver,
            "torch_cuda": torch.version.cuda,
        }
    return info


# ---- tables ----


def results_table(document: dict[str, Any]) -> str:
    """The Markdown table of docs/kernels.md."""
    m, c = document["machine"], document["ceilings"]
    lines = [
        f"{m.get('device', m['cpu'])}, driver {m.get('driver', '-')}, torch {m['build']['torch']}, "
        f"commit {m['commit']}; "
        f"copy {c['copy_gbs']:.0f} GB/s, matmul {c['matmul_float32_tflops']:.1f} (float32) and "
        f"{c['matmul_tf32_tflops']:.1f} (tf32) TFLOP/s.",
    ]
    for family, networks in document["results"].items():
        variants = list(next(iter(networks.values()))["float32"]["ms"])
        head = [f"{variant}, {name}" for name in ("float32", "tf32") for variant in variants]
        lines += ["", f"{family.capitalize()}, milliseconds (median); error of native against float64", ""]
        lines += [f"| | {' | '.join(head)} | error float32, tf32 |", f"| --- |{' ---: |' * (len(head) + 1)}"]
        for network, entry in networks.items():
            cells = [f"{entry[name]['ms'][v]['median']:.3g}" for name in ("float32", "tf32") for v in variants]
            errors = ", ".join(f"{entry[name]['native_error']:.1e}" for name in ("float32", "tf32"))
            lines.append(f"| {network} | {' | '.join(cells)} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/gpu-<device>.json")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--skip", default="", help="steps to leave out, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only write docs/kernels.md's table from this JSON")
    arguments = parser.parse_args()
    if arguments.table:
        from bench.cuda_report import replace_between

        replace_between(ROOT / "docs/kernels.md", "gpu-results", results_table(json.loads(arguments.table.read_text())))
        return
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; `--dry` tries the script without one")
    device = torch.device("cpu" if arguments.dry else "cuda", None if arguments.dry else 0)
    name = "dry" if arguments.dry else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    folder = ROOT / ("build" if arguments.dry else "bench/results")
    run = Run(arguments.out or folder / f"gpu-{name}.json", arguments.minutes)
    skipped = set(arguments.skip.split(",")) | ({"build", "tests", "sanitizer"} if arguments.dry else set())
    if "build" not in skipped:
        build(run)  # before kfac_ext is imported
    run.keep("machine", machine(device))
    for step, work in {"tests": tests, "sanitizer": sanitizer}.items():
        if step not in skipped:
            work(run)
    if "bench" not in skipped:
        bench(run, device, arguments.dry)
        print(results_table(run.document))
    run.keep("machine", machine(device))  # now with the outcome of the kernels' own checks
    run.keep("finished", time.strftime("%Y-%m-%d %H:%M:%S"))
    failed = [
        f"{part} {name}" for part in ("tests", "sanitizer") for name, code in _exits(run.document.get(part)) if code
    ]
    print(f"{run.path}: {'failed: ' + ', '.join(failed) if failed else 'all steps passed'}")
    raise SystemExit(1 if failed else 0)


def _exits(outcome: dict[str, Any] | None) -> list[tuple[str, int | None]]:
    if outcome is None:
        return []
    if "exit" in outcome:
        return [("", outcome["exit"])]
    return [(name, step["exit"]) for name, step in outcome.items()]


if __name__ == "__main__":
    main()
