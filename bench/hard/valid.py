"""Random valid calls of every public operator, and of the registered ones, against the reference in float64."""

from bench.hard.batches import Found, run_forked
from bench.hard.random_calls import random_call
from bench.hard.tally import Tally

SIZES = {"quick": 4000, "full": 100_000}


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """A call that raises or differs from its oracle is wrong."""
    return run_forked("valid", _case, cases, seed, seconds, first=first)


def _case(seed: int, index: int) -> Found:
    call = random_call(seed, index)
    try:
        result = call.run()
    except Exception as error:
        return [("wrong", f"{call} raised {type(error).__name__}: {error}")]
    return [("wrong", f"{call}: {text}") for text in call.check(result)]
