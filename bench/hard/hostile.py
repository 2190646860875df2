"""Valid calls with one argument made invalid: each must raise an error that names it, and change nothing."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.hard.batches import Found, run_forked
from bench.hard.random_calls import RandomCall, random_call
from bench.hard.tally import Tally

SIZES = {"quick": 3000, "full": 20_000}

_REFUSALS = (TypeError, ValueError, RuntimeError, OverflowError, MemoryError, KeyError)

_HUGE = (2**31, 2**53, 2**62, 2**63, 2**70, -(2**63))
_NO_INTS = (-1, 0, -(2**40), -(2**63), 1.5, "3", None, (1,), (1, 2, 3), float("nan"))


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """What is accepted is silent, an error that does not name the argument unclear, an `out` that is changed wrong."""
    return run_forked("hostile", _case, cases, seed, seconds, first=first)


def _case(seed: int, index: int) -> Found:
    call = random_call(seed, index)
    rng = random.Random(f"hostile {seed} {index}")
    name = rng.choice([name for name in call.arguments if _spoilers(call, name)])
    bad = rng.choice(_spoilers(call, name))(rng, call.arguments[name])
    spoiled = call._replace(arguments={**call.arguments, name: bad})
    before = _copies(call)
    try:
        spoiled.run()
    except _REFUSALS as error:
        return _judged(spoiled, name, error, before)
    except BaseException as error:  # of a kind that nobody would catch
        return [("unclear", f"{spoiled}: {name} gives {type(error).__name__}: {error}")]
    return [("silent", f"{spoiled}: {name} is accepted")]


def _judged(call: RandomCall, name: str, error: BaseException, before: dict[str, Tensor]) -> Found:
    found: Found = []
    if not any(word in str(error) for word in _NAMES.get(name, (name,))):
        found.append(("unclear", f"{call}: {name} gives {type(error).__name__}: {error}"))
    for key, copy in before.items():
        if key != name and not torch.equal(call.arguments[key].nan_to_num(), copy):
            found.append(("wrong", f"{call}: {key} is changed though {name} is refused"))
    return found


# What else an error may call an argument: the other half of what does not fit together.
_NAMES = {
    "x": ("x", "input", "out", "kernel_size"),
    "out": ("out",),
    "stride": ("stride", "padding"),
    "groups": ("groups", "out"),
    "bias": ("bias", "out"),
    "padding": ("padding", "kernel_size"),
    "dilation": ("dilation", "padding"),
    "Gs": ("Gs",),
}


def _copies(call: RandomCall) -> dict[str, Tensor]:
    out = call.arguments.get("out")
    return {"out": out.nan_to_num().clone()} if isinstance(out, Tensor) else {}


# ---- ways to spoil an argument ----

Spoiler = Callable[[random.Random, Any], Any]


def _spoilers(call: RandomCall, name: str) -> list[Spoiler]:
    value = call.arguments[name]
    if name == "kernel_size" and call.name == "covariance_power_iteration":  # None, for rows, may fit as well
        return [lambda rng, _: rng.choice([v for v in _NO_INTS if v is not None]), _no_pair]
    if name in ("kernel_size", "stride", "dilation"):
        return [_no_int, _no_raw_pair if call.name.startswith("ops.") else _no_pair]
    if name == "padding":
        return [_no_padding, _no_raw_pair if call.name.startswith("ops.") else _no_pair]
    if name == "groups":
        return [lambda rng, _: rng.choice((0, -1, 1.5, "2", None, 10**6 + 1, *_HUGE))]
    if name in ("bias", "reduce") and not call.name.startswith("ops."):  # which take numbers for flags
        return [lambda rng, _: rng.choice((None, "yes", 2.5, (1,), object()))]
    if name in ("decay", "scale"):
        return [lambda rng, _: rng.choice((float("nan"), float("inf"), "1", None, (1.0,), [0.5]))]
    if name == "mode":
        return [lambda rng, _: rng.choice(("", "EXPAND", None, 1, b"reduce", torch.ones(2)))]
    if name == "tol":
        return [lambda rng, _: rng.choice((-1.0, float("nan"), float("inf"), "0", None, True))]
    if name == "max_iter":
        return [lambda rng, _: rng.choice((0, -1, 2**31, 2**70, 1.5, "9", None, True))]
    if name == "count":
        return [lambda rng, _: rng.choice((-1, 10**6, 1.5, "1", None, True, 2**70))]
    if name == "pi":
        return [lambda rng, _: rng.choice(([(0, 0)], [(0, 99)], [(-1, 0)], [(0,)], [0], "01", 5, [(0, 1.0)]))]
    if name == "damping":
        return [_no_damping]
    if name == "blocks":
        return [
            lambda rng, v: rng.choice(([0] * len(v), [10**6] * len(v), v[1:], [1.5] * len(v), None, [2**70] * len(v)))
        ]
    if isinstance(value, Tensor):
        if name == "vector":
            return [_other_dtype, _other_kind, _other_shape, _elsewhere]
        more = {"out": [_other_shape, _requires_grad, _elsewhere]}
        return [_no_tensor, _other_dtype, _other_kind, *more.get(name, [])]
    if isinstance(value, list):
        pairs = ("pi",)  # which leave matrices out
        others = [other for key, other in call.arguments.items() if key != name and key not in pairs]
        alone = not any(isinstance(other, (list, tuple)) for other in others)
        return [_no_list, _spoiled_entry, _spoiled_entry] if not alone else [_spoiled_entry]
    return []


def _no_int(rng: random.Random, _value: Any) -> Any:
    return rng.choice(_NO_INTS)


def _no_padding(rng: random.Random, _value: Any) -> Any:
    return rng.choice([v for v in (*_NO_INTS, "other", b"same", 2**70) if v != 0])


def _no_pair(rng: random.Random, value: Any) -> Any:
    bad = rng.choice((-1, None, 1.5, "1", True))
    if isinstance(value, (list, tuple)):  # as many, one of them spoiled
        place = rng.randrange(len(value))
        return [bad if i == place else v for i, v in enumerate(value)]
    return (bad, 1)


def _no_raw_pair(rng: random.Random, value: Any) -> Any:
    """Registered operators take bools for numbers."""
    found = True
    while any(item is True for item in (found if isinstance(found, (list, tuple)) else [found])):
        found = _no_pair(rng, value)
    return found


def _no_damping(rng: random.Random, value: Any) -> Any:
    bad = (-1.0, float("nan"), float("inf"), "1", None, True, [], [1.0] * 99, torch.ones(99), torch.ones(2, 2, 2), 1j)
    return rng.choice(bad)


def _no_tensor(rng: random.Random, value: Any) -> Any:
    return rng.choice((None, 1.0, "tensor", [1.0, 2.0], value.tolist() if value.numel() < 100 else None))


def _other_dtype(rng: random.Random, value: Tensor) -> Tensor:
    return value.detach().to(rng.choice((torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)))


def _other_kind(rng: random.Random, value: Tensor) -> Tensor:
    return value.detach().to_sparse() if rng.random() < 0.5 else value.detach().new_empty((0, *value.shape[1:]))


def _elsewhere(_rng: random.Random, value: Tensor) -> Tensor:
    return value.detach().to("meta")


def _other_shape(rng: random.Random, value: Tensor) -> Tensor:
    plain = value.detach()
    options = [plain[..., :-1], plain[None], plain.new_zeros(*plain.shape, 1), plain.new_zeros(())]
    if plain.dim() > 1 and plain.shape[-1] > 1:
        options += [
            plain.clone().mT if not plain.mT.is_contiguous() else plain[None],
            plain[..., :1].expand(plain.shape),
        ]
    return rng.choice(options)


def _requires_grad(_rng: random.Random, value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _no_list(rng: random.Random, value: list) -> Any:
    more = [*value, value[0]] if value else 3
    return rng.choice((3, "list", {}, more))


def _spoiled_entry(rng: random.Random, value: list) -> Any:
    if not value:
        return None
    place = rng.randrange(len(value))
    entry = value[place]
    bad: Any = None
    if isinstance(entry, Tensor):
        wide = entry.detach()[..., None] if entry.dtype != torch.int64 else entry.float()
        options = [None, "entry", wide] + ([entry.detach().new_empty(0)] if entry.dtype != torch.int64 else [])
        options += [entry.detach().to(torch.int32), entry.detach().to_sparse()] if entry.numel() else []
        if entry.dtype == torch.int64 and entry.numel():
            options += [entry - 10**6, entry + 10**6, torch.cat([entry, entry])]
        bad = rng.choice(options)
    return [bad if i == place else v for i, v in enumerate(value)]
