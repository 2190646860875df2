"""What the compiled kernels must not exceed on the architecture that is tuned for, or `make cuda-report` fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.gpu.sass import Counts

ARCHITECTURE = "sm_90"


class Bound(NamedTuple):
    """At most, but for `loads_at_once`; None: any number."""

    registers: int
    spilled: int = 0
    """bytes, stores and loads"""
    divisions: int | None = None
    stage_loads: int | None = None
    loads_at_once: int = 0
    """at least"""


# two blocks of 256 threads fit on a multiprocessor up to 128 registers, one up to 255; four up to 64
BOUNDS = {
    "covariance_pack_kernel": Bound(64, divisions=0),
    "covariance_tiles_kernel<0>": Bound(128, stage_loads=0),
    "covariance_tiles_kernel<1>": Bound(128, stage_loads=0),
    "covariance_tiles_kernel<2>": Bound(240, stage_loads=0),
    "covariance_tiles_kernel<3>": Bound(128, stage_loads=0),
    "covariance_wide_tiles_kernel<0>": Bound(255, stage_loads=0),
    "covariance_wide_tiles_kernel<1>": Bound(255, stage_loads=0),
    "covariance_wide_tiles_kernel<3>": Bound(255, stage_loads=0),
    "covariance_expand_kernel": Bound(64, divisions=0, loads_at_once=3),
    "inverse_begin_kernel": Bound(64, divisions=0, loads_at_once=4),
    "inverse_panel_kernel": Bound(240, divisions=0, stage_loads=0),
    "inverse_update_kernel": Bound(255, divisions=0, stage_loads=0),
}
REST = Bound(255)


def passed_bounds(name: str, registers: int, spilled: int, counts: Counts | None) -> Iterable[str]:
    """What of a kernel is beyond its bound, in words."""
    bound = BOUNDS.get(name, REST)
    if registers > bound.registers:
        yield f"{name}: {registers} registers, at most {bound.registers}"
    if spilled > bound.spilled:
        yield f"{name}: {spilled} bytes spilled, at most {bound.spilled}"
    if counts is None:
        return
    for what, number, most in (
        ("divisions", counts.divisions, bound.divisions),
        ("loads in the loop over stages", counts.stage_loads, bound.stage_loads),
    ):
        if most is not None and number > most:
            yield f"{name}: {number} {what}, at most {most}"
    if counts.loads_at_once < bound.loads_at_once:
        yield f"{name}: {counts.loads_at_once} loads before a store, at least {bound.loads_at_once}"
