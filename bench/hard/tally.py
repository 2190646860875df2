"""What came of many cases of one family."""

from dataclasses import asdict, dataclass, field

FAULTS = ("crashed", "wrong", "silent", "lost", "unclear")


@dataclass
class Tally:
    """Counts of one family; the first examples of each fault, so that it can be run again alone.

    A case is *crashed* where the process died or hung, *wrong* where a result differs from its oracle, *silent* where
    something damaged was accepted without a word, *lost* where what was saved is not there again, *unclear* where an
    error names neither the argument nor the file that is at fault.
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
    examples: list[str] = field(default_factory=list)

    def fault(self, kind: str, example: str, keep: int = 5) -> None:
        """Count a fault of one of FAULTS; `example` tells how to see it again."""
        setattr(self, kind, getattr(self, kind) + 1)
        if sum(text.startswith(f"{kind}: ") for text in self.examples) < keep:
            self.examples.append(f"{kind}: {example}")

    @property
    def sound(self) -> bool:
        """Nothing crashed, wrong, silent or lost, and below 1 % unclear."""
        return not (self.crashed or self.wrong or self.silent or self.lost) and self.unclear <= 0.01 * self.tried

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)
