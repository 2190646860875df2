"""Random valid calls of kfac_ext's operators, each with what it must give, in float64."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kfac_ext
from kfac_ext import reference

raw = torch.ops.kfac_ext
_EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-23}


class RandomCall(NamedTuple):
    """A call and its oracle."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    check: Callable[[Any], Iterator[str]]
    """what is wrong with a result"""

    def run(self) -> Any:
        """What the call returns."""
        return self.function(**self.arguments)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({shown})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}/{list(value.stride())}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


def random_call(seed: int, index: int) -> RandomCall:
    """The call of this index: the same whenever it is asked for."""
    rng = random.Random(f"{seed} {index}")
    torch.manual_seed(rng.getrandbits(60))
    torch.set_num_threads(rng.choice((1, 1, 2, 3)))
    return rng.choice(MAKERS)(rng)


# ---- tensors ----


def factor_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice((torch.float32, torch.float32, torch.float64))


def any_dtype(rng: random.Random) -> torch.dtype:
    return rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))


def size(rng: random.Random, most: int) -> int:
    """Small ones and those around a panel's 16 columns the most."""
    return min(most, rng.choice((1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, rng.randint(1, most))))


def laid_out(rng: random.Random, value: Tensor) -> Tensor:
    """The same numbers under strides and offsets of some other kind."""
    kind = rng.choice(("plain", "plain", "permuted", "sliced", "offset", "expanded", "negated", "parameter"))
    if kind == "permuted":
        order = list(range(value.dim()))
        rng.shuffle(order)
        back = [order.index(d) for d in range(value.dim())]
        return value.permute(order).contiguous().permute(back)
    if kind == "sliced" and value.dim():
        dim, step = rng.randrange(value.dim()), rng.randint(2, 3)
        wide = value.repeat_interleave(step, dim)
        return wide[(slice(None),) * dim + (slice(rng.randrange(step), None, step),)]
    if kind == "offset":
        lead = rng.randint(1, 5)
        memory = value.new_empty(lead + value.numel())
        memory[lead:] = value.flatten()
        return memory[lead:].view(value.shape)
    if kind == "expanded" and value.dim():
        dim = rng.randrange(value.dim())
        return value.narrow(dim, 0, 1).expand(value.shape)
    if kind == "negated" and value.dtype in (torch.float32, torch.float64):
        return torch.complex(value, -value).conj().imag  # a lazy minus of minus the value
    if kind == "parameter":
        return torch.nn.Parameter(value)
    return value


def matrix_laid_out(rng: random.Random, value: Tensor) -> Tensor:
    """As `laid_out`, but the numbers stay what they are."""
    found = laid_out(rng, value)
    return found if torch.equal(found, value) else value


def definite(rng: random.Random, n: int, dtype: torch.dtype) -> Tensor:
    """Symmetric positive definite, of condition up to some hundreds."""
    x = torch.randn(n + rng.randint(0, 8), n, dtype=torch.float64)
    matrix = x.mT @ x / len(x) + 0.1 * torch.eye(n, dtype=torch.float64)
    return matrix.to(dtype)


# ---- what is wrong ----


def differs(name: str, found: Tensor, wanted: Tensor, bound: Tensor) -> Iterator[str]:
    """A message unless |found - wanted| <= bound everywhere."""
    if found.shape != wanted.shape:
        yield f"{name} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
        return
    error = (found.detach().double() - wanted).abs()
    if not bool((error <= bound).all()):
        worst = (error / bound.clamp_min(1e-300)).max()
        yield f"{name} is off by {float(worst):.3g} times what is allowed"


# ---- covariances ----


def _blended(old: Tensor, value: Tensor, magnitude: Tensor, decay: float, scale: float) -> tuple[Tensor, Tensor]:
    past = decay * old.double() if decay else torch.zeros_like(value)
    return past + scale * value, past.abs() + abs(scale) * magnitude


def _covariance_call(
    rng: random.Random, name: str, x: Tensor, options: dict[str, Any], argument: str = "x", raw_form: Any = None
) -> RandomCall:
    exact = x.detach().double()
    value = getattr(reference, name)(exact, **options)
    magnitude = getattr(reference, name)(exact.abs(), **options)
    tolerance = 64 * _EPS[x.dtype]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rng.random() < 0.4:
        check = lambda found: differs("the result", found, value, tolerance * magnitude + 1e-37)  # noqa: E731
        return RandomCall(name, getattr(kfac_ext, name), {argument: x, **options}, check)
    decay, scale = rng.choice(((0.0, 1.0), (0.95, 0.05), (1.0, -0.5), (-0.3, 2.0)))
    old = torch.randn(value.shape, dtype=dtype)
    if decay == 0:
        old = torch.full_like(old, torch.nan)
    wanted, scaled = _blended(old, value, magnitude, decay, scale)

    def check_out(_result: Any) -> Iterator[str]:
        yield from differs("out", out, wanted, tolerance * scaled + 1e-37)

    out = old.clone()
    if raw_form is not None and rng.random() < 0.5:
        function, arguments = raw_form(out, decay, scale)
        return RandomCall(f"ops.{name}_", function, arguments, check_out)
    weights = {"decay": decay, "scale": scale}
    if rng.random() < 0.3:
        update = {"linear_covariance": "linear", "conv2d_covariance": "conv2d", "gradient_covariance": "gradient"}[name]
        return RandomCall(
            f"CovarianceUpdate.{update}",
            lambda **given: _accumulate(out, update, **given),
            {argument: x, **options, **weights},
            check_out,
        )
    return RandomCall(
        f"{name}_", getattr(kfac_ext, f"{name}_"), {"out": out, argument: x, **options, **weights}, check_out
    )


def _accumulate(out: Tensor, kind: str, **given: Any) -> None:
    size = (out.shape[0], out.shape[1]) if out.dim() == 3 else out.shape[0]
    factors = kfac_ext.FactorSet({"other": 3, "key": size}, dtype=out.dtype)
    factors["key"].copy_(out)
    factors.accumulate_([getattr(kfac_ext.CovarianceUpdate, kind)("key", **given)])
    if bool(factors["other"].any()):
        raise AssertionError("another factor was written to")
    out.copy_(factors["key"])


def linear(rng: random.Random) -> RandomCall:
    shape = [size(rng, 40) for _ in range(rng.randint(0, 2))] + [size(rng, 70)]
    x = laid_out(rng, torch.randn(shape).to(any_dtype(rng)))
    bias = rng.random() < 0.5

    def raw_form(out: Tensor, decay: float, scale: float) -> Any:
        given = {"out": out, "x": x.detach(), "bias": bias, "decay": decay, "scale": scale}
        return raw.linear_covariance_, given

    return _covariance_call(rng, "linear_covariance", x, {"bias": bias}, raw_form=raw_form)


def geometry(rng: random.Random, height: int, width: int) -> dict[str, Any]:
    """Arguments of a convolution that fits an image of this size."""
    while True:
        kernel = (rng.randint(1, 4), rng.randint(1, 4))
        pads = (rng.randint(0, 3), rng.randint(0, 3))
        dilation = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3)))
        reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
        if height + 2 * pads[0] > reach[0] and width + 2 * pads[1] > reach[1]:
            break
    stride = (rng.choice((1, 1, 2, 3, 7)), rng.choice((1, 1, 2, 3)))
    given: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": pads, "dilation": dilation}
    if rng.random() < 0.2:
        given["stride"], given["padding"] = 1, "same"
    elif rng.random() < 0.3 and kernel[0] == kernel[1]:
        given["kernel_size"] = kernel[0]
    return given


def images(rng: random.Random, groups: int) -> Tensor:
    channels = groups * (1 if rng.random() < 0.3 else size(rng, 20 if groups == 1 else 5))
    x = torch.randn(size(rng, 5), channels, size(rng, 12), size(rng, 12)).to(any_dtype(rng))
    if rng.random() < 0.2:
        return x.contiguous(memory_format=torch.channels_last)
    return laid_out(rng, x)


def conv2d(rng: random.Random) -> RandomCall:
    groups = rng.choice((1, 1, 1, 2, 3, 17))
    x = images(rng, groups)
    place = geometry(rng, *x.shape[2:])
    options = {**place, "groups": groups, "bias": rng.random() < 0.5, "mode": rng.choice(("expand", "reduce"))}
    found = kfac_ext.geometry.conv_geometry(x.shape, *(place[k] for k in ("kernel_size", "stride", "padding")),
                                            place["dilation"], groups)  # fmt: skip

    def raw_form(out: Tensor, decay: float, scale: float) -> Any:
        steps = {"kernel_size": found.kernel_size, "stride": found.stride, "padding": found.padding}
        rest = {"dilation": found.dilation, "groups": groups, "bias": options["bias"]}
        given = {**steps, **rest, "reduce": options["mode"] == "reduce", "decay": decay, "scale": scale}
        return raw.conv2d_covariance_, {"out": out, "x": x.detach(), **given}

    return _covariance_call(rng, "conv2d_covariance", x, options, raw_form=raw_form)


def gradient(rng: random.Random) -> RandomCall:
    groups = rng.choice((1, 1, 1, 2, 5))
    shape = [size(rng, 20), groups * size(rng, 30)]
    if rng.random() < 0.5:
        shape += [size(rng, 7), size(rng, 7)]
    g = laid_out(rng, torch.randn(shape).to(any_dtype(rng)))
    options = {"groups": groups, "mode": rng.choice(("expand", "reduce"))}

    def raw_form(out: Tensor, decay: float, scale: float) -> Any:
        given = {"groups": groups, "reduce": options["mode"] == "reduce", "decay": decay, "scale": scale}
        return raw.gradient_covariance_, {"out": out, "g": g.detach(), **given}

    return _covariance_call(rng, "gradient_covariance", g, options, argument="g", raw_form=raw_form)


# ---- inverses ----


def inverse(rng: random.Random) -> RandomCall:
    dtype = factor_dtype(rng)
    matrices = [definite(rng, size(rng, 150), dtype) for _ in range(rng.randint(1, 4))]
    given = [matrix_laid_out(rng, matrix) for matrix in matrices]
    kind = rng.choice(("number", "numbers", "diagonals", "pi", "scalar"))
    pi, damping = None, rng.choice((0.0, 1e-3, 0.5))
    amounts: Any = damping
    if kind == "numbers":
        amounts = [rng.random() for _ in matrices]
    elif kind == "diagonals":
        amounts = [rng.choice((0.1, torch.tensor(0.2), torch.rand(len(m)).to(dtype))) for m in matrices]
    elif kind == "scalar":
        amounts = torch.tensor(damping)
    elif kind == "pi" and len(matrices) > 1:
        pi = [(1, 0)]
    exact, info = reference.damped_inverse_ex([m.double() for m in matrices], _doubled(amounts), pi=pi)
    bounds = [
        64 * _EPS[dtype] * (len(m) + 8) * (torch.linalg.norm(x, 2) ** 2 * torch.linalg.norm(m.double(), 2) + 1)
        for m, x in zip(matrices, exact)
    ]

    def check(result: Any) -> Iterator[str]:
        inverses, found = result if isinstance(result, tuple) else (result, info)
        if found.tolist() != info.tolist():
            yield f"info is {found.tolist()}, expected {info.tolist()}"
        for i, (x, wanted, bound) in enumerate(zip(inverses, exact, bounds)):
            yield from differs(f"inverses[{i}]", x, wanted, bound)
            if not torch.equal(x, x.mT):
                yield f"inverses[{i}] is not symmetric"

    name = rng.choice(("damped_inverse", "damped_inverse_ex"))
    return RandomCall(name, getattr(kfac_ext, name), {"matrices": given, "damping": amounts, "pi": pi}, check)


def _doubled(amounts: Any) -> Any:
    if isinstance(amounts, list):
        return [a.double() if isinstance(a, Tensor) else a for a in amounts]
    return amounts.double() if isinstance(amounts, Tensor) else amounts


# ---- power iteration ----


def _check_pairs(
    result: Any, products: list[Callable[[Tensor], Tensor]], starts: list[Tensor], steps: int, dtype: torch.dtype
) -> Iterator[str]:
    """With tol 0 each has gone through the same steps as the reference, which starts from the same vector."""
    for i, (product, start) in enumerate(zip(products, starts)):
        value, vector, residual, _ = reference.power.iterate(product, start.double(), 0.0, steps)
        size = float(torch.linalg.norm(product(vector))) + 1e-30
        yield from differs(f"eigenvalues[{i}]", result.eigenvalues[i], value, torch.tensor(_POWER[dtype] * size))
        yield from differs(f"eigenvectors[{i}]", result.eigenvectors[i], vector, torch.tensor(_POWER[dtype] * 10))
        worth = 10 * max(1.0, float(residual)) ** 2  # |A v| / |lambda|, by which an error of lambda is multiplied
        yield from differs(f"residuals[{i}]", result.residuals[i], residual, torch.tensor(_POWER[dtype] * worth))


_POWER = {torch.float32: 2e-4, torch.float64: 1e-10}  # after a few steps


def power(rng: random.Random) -> RandomCall:
    dtype = factor_dtype(rng)
    matrices = [definite(rng, size(rng, 300), dtype) for _ in range(rng.randint(1, 5))]
    starts = [torch.randn(len(m), dtype=dtype) for m in matrices]
    steps = rng.randint(1, 6)
    products = [m.double().mv for m in matrices]
    given = {"matrices": [matrix_laid_out(rng, m) for m in matrices], "tol": 0.0, "max_iter": steps}

    def check(result: Any) -> Iterator[str]:
        yield from _check_pairs(result, products, starts, steps, dtype)

    if rng.random() < 0.5:
        vectors = [matrix_laid_out(rng, start) for start in starts]
        return RandomCall("power_iteration", kfac_ext.power_iteration, {**given, "vectors": vectors}, check)
    vectors = [matrix_laid_out(rng, start).detach().clone() for start in starts]
    return RandomCall("power_iteration_", kfac_ext.power_iteration_, {"vectors": vectors, **given}, check)


def covariance_power(rng: random.Random) -> RandomCall:
    bias, steps = rng.random() < 0.5, rng.randint(1, 5)
    if rng.random() < 0.5:
        x, place = images(rng, 1), {}
        place = geometry(rng, *x.shape[2:])
        A = reference.conv2d_covariance(x.detach().double(), **place, bias=bias)
    else:
        x = laid_out(rng, torch.randn(size(rng, 50), size(rng, 60)).to(any_dtype(rng)))
        place, A = {}, reference.linear_covariance(x.detach().double(), bias=bias)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = torch.randn(len(A), dtype=dtype)

    def check(result: Any) -> Iterator[str]:
        if float(A.abs().max()) > 0:
            yield from _check_pairs(result, [A.mv], [start], steps, dtype)

    given = {"x": x, "vector": start, **place, "bias": bias, "tol": 0.0, "max_iter": steps}
    return RandomCall("covariance_power_iteration", kfac_ext.covariance_power_iteration, given, check)


# ---- neurons ----


def _layers(
    rng: random.Random, dtype: torch.dtype, count: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    Vs, Hs, Gs, blocks = [], [], [], []
    for _ in range(count):
        block = rng.choice((1, 1, 2, 4, 9))
        d, outputs = block * size(rng, 20) + rng.randint(0, 1), size(rng, 40)
        Vs.append(matrix_laid_out(rng, torch.randn(outputs, d, dtype=dtype)))
        Hs.append(matrix_laid_out(rng, definite(rng, d, dtype)))
        Gs.append(matrix_laid_out(rng, definite(rng, outputs, dtype)))
        blocks.append(block)
    return Vs, Hs, Gs, blocks


def _doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def saliency(rng: random.Random) -> RandomCall:
    dtype, obs = factor_dtype(rng), rng.random() < 0.5
    Vs, Hs, Gs, blocks = _layers(rng, dtype, rng.randint(1, 3))
    name, argument = ("obs_saliency", "inverses") if obs else ("obd_saliency", "As")
    exact = getattr(reference, name)(_doubles(Vs), _doubles(Hs), _doubles(Gs), blocks)

    def check(result: Any) -> Iterator[str]:
        for i, (found, wanted) in enumerate(zip(result, exact)):
            yield from differs(f"scores[{i}]", found, wanted, 1e5 * _EPS[dtype] * wanted.abs().max() * 0.02)

    given = {"weights": Vs, argument: Hs, "Gs": Gs, "blocks": blocks}
    return RandomCall(name, getattr(kfac_ext, name), given, check)


def compensation(rng: random.Random) -> RandomCall:
    dtype = factor_dtype(rng)
    Vs, Hs, _, _ = _layers(rng, dtype, rng.randint(1, 3))
    pruned = [torch.randperm(V.shape[1])[: rng.randint(0, V.shape[1])] for V in Vs]
    exact = reference.compensate(_doubles(Vs), _doubles(Hs), pruned)

    def check(result: Any) -> Iterator[str]:
        for i, (found, wanted) in enumerate(zip(result, exact)):
            size = wanted.abs().max() + 1 if wanted.numel() else torch.ones(())
            yield from differs(f"weights[{i}]", found, wanted, 1e4 * _EPS[dtype] * size)

    return RandomCall("compensate", kfac_ext.compensate, {"weights": Vs, "inverses": Hs, "pruned": pruned}, check)


def greedy(rng: random.Random) -> RandomCall:
    dtype = factor_dtype(rng)
    Vs, Hs, Gs, blocks = _layers(rng, dtype, 1)
    neurons, block = Vs[0].shape[1] // blocks[0], blocks[0]
    columns = torch.randperm(neurons * block).view(neurons, block)
    count = rng.randint(0, neurons)
    order, scores, weights = reference.greedy_selection(_doubles(Vs), _doubles(Hs), _doubles(Gs), [columns], count)

    def check(result: Any) -> Iterator[str]:
        if result.neurons.tolist() != order.tolist():
            if dtype == torch.float64:
                yield f"neurons are {result.neurons.tolist()}, expected {order.tolist()}"
            return
        if count:
            yield from differs("scores", result.scores, scores, 1e4 * _EPS[dtype] * scores.abs().max())
        yield from differs(
            "weights[0]", result.weights[0], weights[0], 1e4 * _EPS[dtype] * (weights[0].abs().max() + 1)
        )

    given = {"weights": Vs, "inverses": Hs, "Gs": Gs, "columns": [columns], "count": count}
    return RandomCall("greedy_selection", kfac_ext.greedy_selection, given, check)


MAKERS = (linear, conv2d, conv2d, gradient, inverse, power, covariance_power, saliency, compensation, greedy)
