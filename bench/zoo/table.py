"""The table of docs/networks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench import documents
from bench.zoo.checks import AMOUNTS, Record, agree, outcome
from bench.zoo.runner import share

WHOLE, HALF = 0.95, 0.51  # shares of the parameters: could go, left of a target of a half
REASONS, LONGEST = 2, 100
HEADS = (
    "network",
    "verdict",
    "parameters",
    "could go",
    "left",
    f"cut vs masked: {', '.join(AMOUNTS)}",
    "Pruner(), CPU s",
    "obs",
    "what stays, and why",
)


def verdict(record: Record) -> str:
    """Whole: nearly everything could go, the cut is right, training reached its target. Partly: less. Else fails."""
    coupling, training = record.get("coupling", {}), record.get("l1", {})
    if "error" in record or "error" in coupling or "error" in training or not right(record):
        return "fails"
    return "whole" if coupling["could_go"] >= WHOLE and training["left"] <= HALF else "partly"


def right(record: Record) -> bool:
    """Whether every cut that was compared is what masking is."""
    for stage in AMOUNTS:
        found = record.get(stage)
        if found is not None and ("error" in found or not agree(outcome(found))):
            return False
    return True


def table(document: Mapping[str, Any]) -> str:
    """Counts in a line, then a row for each network."""
    records = document["networks"]
    verdicts = {name: verdict(record) for name, record in records.items()}
    counts = ", ".join(f"{list(verdicts.values()).count(word)} {word}" for word in ("whole", "partly", "fails"))
    wrong = sum(not right(record) for record in records.values())
    lines = [
        f"{len(records)} networks: {counts}; {wrong} with a cut that is not what masking is. "
        f"torch {document['torch']}, {document['cpu']}, one thread.",
        "",
    ]
    rows = (_row(name, verdicts[name], records[name]) for name in sorted(records))
    return "\n".join([*lines, *documents.table(HEADS, rows, "l")])


def _row(name: str, word: str, record: Record) -> list[str]:
    coupling, training = record.get("coupling", {}), record.get("l1", {})
    cells = [
        name,
        word,
        f"{record['parameters']:,}" if "parameters" in record else "",
        f"{coupling['could_go']:.1%}" if "could_go" in coupling else "",
        f"{training['left']:.0%}" if "left" in training else "",
        ", ".join(_compared(record)),
        f"{training['cpu']:.3g}" if "cpu" in training else "",
        _default(record),
        "; ".join(_why(record)),
    ]
    return [cell.replace("|", "/") for cell in cells]


def _compared(record: Record) -> Iterator[str]:
    for stage in AMOUNTS:
        if stage in record:
            yield record[stage]["error"] if "error" in record[stage] else share(record[stage])


def _default(record: Record) -> str:
    found = record.get("obs")
    if found is None:
        return ""
    return _short(found["error"]) if "error" in found else f"{found['left']:.0%}"


def _why(record: Record) -> Iterator[str]:
    for place, found in (("", record), ("coupling: ", record.get("coupling", {})), ("l1: ", record.get("l1", {}))):
        if "error" in found:
            yield _short(place + found["error"])
    refused = record.get("coupling", {}).get("refused", {})
    for reason, count in list(refused.items())[:REASONS]:
        yield _short(reason) + (f" (x {count})" if count > 1 else "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
