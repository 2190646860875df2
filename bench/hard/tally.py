"""What came of many cases of one family."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

FAULTS = ("crashed", "wrong", "silent", "lost", "unclear")


@dataclass
class Tally:
    """Counts of one family; the first examples of each fault, so that it can be run again alone.

    A case is *crashed* where the process died or hung, *wrong* where a result differs from its oracle, *silent* where
    something damaged was accepted without a word, *lost* where what was saved is not there again, *unclear* where an
    error names neither the argument nor the file that is at fault. `next` is the number of the case to go on with; it
    is None where a family cannot go on.
    """

    family: str
    seed: int
    tried: int = 0
    crashed: int = 0
    wrong: int = 0
    silent: int = 0
    lost: int = 0
    unclear: int = 0
    seconds: float = 0.0
    next: int | None = None
    examples: list[str] = field(default_factory=list)

    def fault(self, kind: str, example: str, keep: int = 5) -> None:
        """Count a fault of one of FAULTS; `example` tells how to see it again."""
        setattr(self, kind, getattr(self, kind) + 1)
        if sum(text.startswith(f"{kind}: ") for text in self.examples) < keep:
            self.examples.append(f"{kind}: {example}")

    def followed_by(self, part: Tally) -> Tally:
        """Both together: of the same family and seed, `part` of the cases from `self.next` on."""
        sums = {name: getattr(self, name) + getattr(part, name) for name in ("tried", *FAULTS, "seconds")}
        return replace(part, **sums, examples=self.examples + part.examples)

    @property
    def sound(self) -> bool:
        """Nothing crashed, wrong, silent or lost, and below 1 % unclear."""
        return not (self.crashed or self.wrong or self.silent or self.lost) and self.unclear <= 0.01 * self.tried

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)
