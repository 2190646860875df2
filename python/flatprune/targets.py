"""How small a network shall become."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The size to reach.

    Args:
        params: parameters left, as a share in (0, 1] of those at the start.

    Raises:
        ValueError: `params` is not in (0, 1].

    Example:
        >>> Target(params=0.1).params_of(72666)
        7266
    """

    params: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.params, bool) or not isinstance(self.params, (int, float)) or not 0.0 < self.params <= 1.0:
            raise ValueError(f"Target: params is {self.params!r}, expected a number above 0 and at most 1")

    def params_of(self, start: int) -> int:
        """The largest number of parameters that meets the target, for a network of `start` parameters."""
        return int(self.params * start + 1e-6)  # 0.1 * 30 is a little above 3 only by rounding
