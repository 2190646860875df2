"""The goals on two cores, in float32, and on a GPU; each is decided by the results of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from bench.documents import table

REACHED, MISSED, UNKNOWN = "reached", "MISSED", "not measured"
Case = Mapping[str, Any]


class Verdict(NamedTuple):
    """A goal, what it wants, what the results say, and whether that reaches it."""

    goal: str
    wanted: str
    measured: str
    state: str


class Goal(NamedTuple):
    """The values that must all be at least (or at most) `bound`; `values` gives (what, value) pairs of a document."""

    name: str
    bound: float
    at_least: bool
    values: Callable[[list[Case]], Iterator[tuple[str, float]]]

    def verdict(self, cases: list[Case]) -> Verdict:
        """Reached if every value is within the bound; names those that are not, or the tightest one."""
        wanted = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        found = sorted(self.values(cases), key=lambda pair: pair[1], reverse=not self.at_least)
        if not found:
            return Verdict(self.name, wanted, "", UNKNOWN)
        bad = [pair for pair in found if (pair[1] < self.bound if self.at_least else pair[1] > self.bound)]
        shown = bad or found[:1]
        text = "; ".join(f"{value:.2f} ({what})" for what, value in shown)
        return Verdict(
            self.name, wanted, f"{text}; {len(found) - len(bad)} of {len(found)}", MISSED if bad else REACHED
        )


def _of(cases: list[Case], suite: str, prefix: str = "") -> Iterator[Case]:
    return (case for case in cases if case["suite"] == suite and case["name"].startswith(prefix))


def _speedup(case: Case, *variants: str) -> float:
    """By how much native is faster than the fastest of these variants."""
    return min(case["variants"][name]["speedup"] for name in variants if name in case["variants"])


def _networks(
    suite: str, prefix: str, variant: str, *parts: str
) -> Callable[[list[Case]], Iterator[tuple[str, float]]]:
    """Speedups over `variant` in cases whose name has `prefix` and one of `parts` (default: all)."""

    def values(cases: list[Case]) -> Iterator[tuple[str, float]]:
        for case in _of(cases, suite, prefix):
            if variant in case["variants"] and (not parts or any(part in case["name"] for part in parts)):
                yield case["name"].removeprefix(prefix), _speedup(case, variant)

    return values


def _each_layer(*prefixes: str) -> Callable[[list[Case]], Iterator[tuple[str, float]]]:
    def values(cases: list[Case]) -> Iterator[tuple[str, float]]:
        for case in _of(cases, "covariance of one layer"):
            if case["name"].startswith(prefixes):
                yield case["name"], _speedup(case, "unfold", "strided")

    return values


def _steps(prefix: str, variant: str, *parts: str) -> Callable[[list[Case]], Iterator[tuple[str, float]]]:
    """Time of `variant` in bare steps."""

    def values(cases: list[Case]) -> Iterator[tuple[str, float]]:
        for case in _of(cases, "training step", prefix):
            if any(part in case["name"] for part in parts):
                times = case["variants"]
                yield case["name"].removeprefix(prefix), times[variant]["median"] / times["bare"]["median"]

    return values


def _first_event(network: str) -> Callable[[list[Case]], Iterator[tuple[str, float]]]:
    """Time of an event in bare steps."""

    def values(cases: list[Case]) -> Iterator[tuple[str, float]]:
        for case in _of(cases, "removal", f"first event to half of {network}"):
            yield network, case["variants"]["native"]["median"] / case["variants"]["bare step"]["median"]

    return values


def _memory(prefix: str, beside: str, *names: str) -> Callable[[list[Case]], Iterator[tuple[str, float]]]:
    """Peak extra memory of cases of these names (default: all), as a part of the fact `beside`."""

    def values(cases: list[Case]) -> Iterator[tuple[str, float]]:
        for case in _of(cases, "memory", prefix):
            name = case["name"].removeprefix(prefix)
            if not names or name in names:
                yield name, case["variants"]["native"]["median"] / case[beside]

    return values


def _covariance_memory(cases: list[Case]) -> Iterator[tuple[str, float]]:
    for case in _of(cases, "memory", "covariance, "):
        native, *others = (entry["median"] for entry in case["variants"].values())
        yield case["name"].removeprefix("covariance, "), native / min(others)


# bare steps of a batch of 128 images of 32x32, of 32 texts of 128 tokens
FIRST_EVENTS = {"ResNet-18": 2.5, "VGG16": 8, "ResNet-56": 1.5, "U-Net on ResNet-18": 3, "BERT-base": 2}
GOALS = [
    Goal(
        "covariance of all layers, VGG and ResNet, against F.unfold + matmul",
        5,
        True,
        _networks("covariance", "A, ", "unfold", "VGG", "ResNet20", "ResNet32"),
    ),
    Goal("covariance of a 3x3 layer of 16 to 512 channels, against the better plain way", 3, True, _each_layer("3x3")),
    Goal("covariance of a strided 3x3 layer of 64 or 128 channels, against the better plain way", 2.2, True,
         _each_layer("strided 3x3 /2, 64", "strided 3x3 /2, 128")),
    Goal("covariance of a strided 5x5 layer, against the better plain way", 3, True, _each_layer("strided 5x5")),
    Goal("covariance of any layer, against the better plain way", 1, True, _each_layer("")),
    Goal("power iteration over ResNet32's 64 matrices, against the loop", 6, True,
         _networks("power iteration", "", "loop", "ResNet32")),
    Goal("damped inverses of a network, against torch.linalg.inv per layer", 2, True,
         _networks("inverse", "", "linalg.inv")),
    Goal("saliency of a network, against batched PyTorch per layer", 3, True,
         _networks("saliency", "", "batched")),
    Goal("step with factors every step, in bare steps", 1.4, False,
         _steps("factors every step, ", "native", "VGG-small b64", "ResNet", "ViT")),
    Goal("step with the defaults (factors, radius, flatness), in bare steps", 1.15, False,
         _steps("defaults, ", "native", "VGG-small b64", "ResNet", "ViT")),
    Goal("step with K-FAC, factors and inverses as often, against the plain recipe with inverses", 1, True,
         _networks("training step", "K-FAC every ", "hooks + unfold, inv")),
    *(Goal(f"first removal event to half of {network}, in bare steps", bound, False, _first_event(network))
      for network, bound in FIRST_EVENTS.items()),
    Goal("peak extra memory of the first event, in those of factors and H", 1.2, False,
         _memory("first event, ", "working_set")),
    Goal("peak extra memory of making a pruner, in models", 1.3, False,
         _memory("pruner construction, ", "model", "ResNet-50", "BERT-base")),
    Goal("peak extra memory of the covariances, in that of the better plain way", 1, False, _covariance_memory),
]  # fmt: skip

# against this variant, PyTorch in tf32 like native, on an H100; by the counts of docs/kernels.md
_ON_A_GPU: dict[str, tuple[str, dict[str, float]]] = {
    "covariance": ("strided unfold", {"VGG19 b128": 2.2, "ResNet32 b128": 5, "ResNet50 b32": 1.6}),
    "inverses": ("cholesky", {"VGG19 b128": 6, "ResNet32 b128": 60, "ResNet50 b32": 10}),
    "power iteration": ("loop without test", {"VGG19 b128": 3, "ResNet32 b128": 100, "ResNet50 b32": 10}),
    "saliency": ("batched", {"VGG19 b128": 2, "ResNet32 b128": 30, "ResNet50 b32": 6}),
}
GPU_GOALS = [
    Goal(f"{family} of {network}, against {variant}", bound, True, _networks(family, "", variant, f"{network}, tf32"))
    for family, (variant, bounds) in _ON_A_GPU.items()
    for network, bound in bounds.items()
]


def verdicts(document: Mapping[str, Any], goals: list[Goal] = GOALS) -> list[Verdict]:
    """One for each goal."""
    return [goal.verdict(list(document["cases"])) for goal in goals]


def goals_table(document: Mapping[str, Any], goals: list[Goal] = GOALS) -> Iterator[str]:
    """The verdicts as lines of Markdown."""
    return table(("goal", "wanted", "measured", ""), verdicts(document, goals), "l")
