"""From what one forward (and backward) shows to Kronecker factors: A and G of one layer, projections.

A layer that is called several times in one forward shares its weight over the calls as a convolution does over
positions, so calls count as more positions (Eschenhagen et al. 2023, arXiv 2311.00636): *expand* averages a a^T over
samples, positions and calls and sums g g^T over positions and calls; *reduce* first averages a and sums g over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import zip_longest

import torch
from torch import Tensor

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.padding import counted_input_updates, counted_rows
from kfac_ext.factors import FactorSet
from kfac_ext.geometry import accumulator_dtype
from kfac_ext.layers import Layer
from kfac_ext.ops.covariance_group import CovarianceUpdate, covariance_group_


def check_one_device(layers: Mapping[str, Layer]) -> None:
    """ValueError if these layers are not on one device."""
    devices = {layer.weight.device: name for name, layer in layers.items()}
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"Curvature: layers are on several devices ({places}), expected one")


def empty_factors(layers: Mapping[str, Layer]) -> FactorSet:
    """The factors of these layers, all zero."""
    sizes = {key: size for layer in layers.values() for key, size in layer.factor_sizes().items()}
    return FactorSet(sizes, dtype=factor_dtype(layers), device=next(iter(layers.values())).weight.device)


def factor_dtype(layers: Mapping[str, Layer]) -> torch.dtype:
    """float64 if a layer computes in it, else float32."""
    double = any(layer.weight.dtype == torch.float64 for layer in layers.values())
    return torch.float64 if double else torch.float32


def update_factors_(
    factors: FactorSet,
    layers: Mapping[str, Layer],
    capture: Capture,
    mode: str,
    decay: float,
    started: Set[str],
    count: int,
    gradient_scale: float,
    positions: Mapping[str, Sequence[Tensor]],
) -> set[str]:
    """factors <- decay factors + (1 - decay) (A, gradient_scale G) of one forward; layers not in `started`: decay 0.

    One call of `FactorSet.accumulate_` for all layers. `positions` of a layer are [N, P] of predictions that count,
    where some do not. Returns the layers seen. Raises RuntimeError if a layer's shape is not its factor's; nothing is
    changed then.
    """
    seen = {}
    for name in capture.gradients:
        used = capture.calls(name)
        if used:
            seen[name] = used
            _check_sizes(factors, layers[name])
    calls: list[list[CovarianceUpdate]] = []
    for name, used in list(seen.items()):
        past, layer = decay if name in started else 0.0, layers[name]
        inputs, grads = [x for x, _ in used], [g for _, g in used]
        kept = [counted_rows(layer, x, g, positions.get(name, ())) for x, g in used]
        if all(rows is None for rows in kept):
            of_inputs = input_updates(layer, inputs, mode, decay=past, scale=1 - past)
        else:
            of_inputs = counted_input_updates(layer, inputs, kept, mode, decay=past, scale=1 - past)
        if not of_inputs:
            del seen[name]
            continue
        calls.append(of_inputs)
        calls.append(gradient_updates(layer, grads, mode, count, decay=past, scale=(1 - past) * gradient_scale))
    # first the first calls of all layers: what goes into the same factor again needs a launch of its own
    factors.accumulate_(update for nth in zip_longest(*calls) for update in nth if update is not None)
    _blend_made(factors, layers, capture.made, decay, started, gradient_scale / count)
    return {*seen, *capture.made}


def make_early(layer: Layer, capture: Capture, mode: str, dtype: torch.dtype) -> None:
    """A and G of a layer that was called once, in place of its input and gradient, if they take no more memory.

    What a backward does not let go as it proceeds, it cannot use again: memory that is new has to be cleared first.
    """
    if len(capture.gradients[layer.name]) != 1:
        return
    ((x, g),) = capture.calls(layer.name)
    blocks = [size if isinstance(size, tuple) else (1, size) for size in layer.factor_sizes().values()]
    if sum(groups * n * n for groups, n in blocks) * dtype.itemsize > x.nbytes + g.nbytes:
        return
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        A, G = (x.new_empty(*((groups,) if layer.groups > 1 else ()), n, n, dtype=dtype) for groups, n in blocks)
        of_gradient = gradient_updates(layer, [g], mode, 1, decay=0.0, scale=1.0)
        covariance_group_([A, G], [*input_updates(layer, [x], mode, decay=0.0, scale=1.0), *of_gradient])
    capture.made[layer.name] = A, G
    capture.let_go(layer.name)


def _blend_made(
    factors: FactorSet,
    layers: Mapping[str, Layer],
    made: Mapping[str, tuple[Tensor, Tensor]],
    decay: float,
    started: Set[str],
    gradient_scale: float,
) -> None:
    """factors <- decay factors + (1 - decay) (A, gradient_scale G)."""
    for name, pair in made.items():
        _check_sizes(factors, layers[name])
        past = decay if name in started else 0.0
        for kind, new, scale in zip("AG", pair, (1.0, gradient_scale)):
            target = factors[f"{name}.{kind}"]
            if past:
                target.mul_(past).add_(new, alpha=(1 - past) * scale)
            else:
                torch.mul(new, scale, out=target)


def _check_sizes(factors: FactorSet, layer: Layer) -> None:
    for key, size in layer.factor_sizes().items():
        if factors.sizes[key] != size:
            raise RuntimeError(
                f"Curvature: factor {key!r} has size {factors.sizes[key]}, layer {layer.name!r} now wants {size}: "
                "call narrow() when the model's shapes change"
            )


def input_covariance(
    layer: Layer, x: Tensor, mode: str, *, bias: bool, past: Tensor | None = None, share: float = 1.0
) -> Tensor:
    """A of one call: [d(+1), d(+1)], or [groups, ...] for a grouped convolution.

    With the `past` it is blended into that: past <- (1 - share) past + share A.
    """
    n = layer.patch_size + bias
    shape = (n, n) if layer.groups == 1 else (layer.groups, n, n)
    A = x.new_empty(shape, dtype=accumulator_dtype(x.dtype)) if past is None else past
    decay, scale = (0.0, 1.0) if past is None else (1.0 - share, share)
    covariance_group_([A], [layer.input_update(x, mode, bias=bias, decay=decay, scale=scale)])
    return A


def input_updates(
    layer: Layer, inputs: Sequence[Tensor], mode: str, *, decay: float, scale: float
) -> list[CovarianceUpdate]:
    """`layer.A` <- decay A + scale (A over all calls of the layer in one forward)."""
    bias, mode = layer.constant, _mode(mode, inputs)
    if len(inputs) > 1 and mode == "reduce":
        pixels = _mean_rows(layer, inputs)[:, :, None, None]  # one position: a block a group, as of a 1x1 convolution
        update = CovarianceUpdate.conv2d(
            f"{layer.name}.A", pixels, 1, groups=layer.groups, bias=bias, decay=decay, scale=scale
        )
        return [update]
    counts = [layer.position_count(x) * len(x) for x in inputs] if len(inputs) > 1 else [1]
    return [
        layer.input_update(x, mode, bias=bias, decay=decay if i == 0 else 1.0, scale=scale * count / sum(counts))
        for i, (x, count) in enumerate(zip(inputs, counts))
    ]


def gradient_updates(
    layer: Layer, grads: Sequence[Tensor], mode: str, count: int, *, decay: float, scale: float
) -> list[CovarianceUpdate]:
    """`layer.G` <- decay G + scale (1/count sum of g g^T over all calls); g = d(summed loss)/dz."""
    mode = _mode(mode, grads)
    if len(grads) > 1 and mode == "reduce":
        grads = [torch.stack([layer.gradient_rows(g).sum(dim=1) for g in grads]).sum(dim=0)]
    return [
        layer.gradient_update(g, mode, decay=decay if i == 0 else 1.0, scale=scale / count) for i, g in enumerate(grads)
    ]


def projected_inputs(layer: Layer, inputs: Sequence[Tensor], unit: Tensor, mode: str) -> Tensor:
    """u.a of every row that A averages over: [rows, groups], so that its mean square is u^T A u of this batch."""
    filters, d = unit.view(layer.groups, -1), layer.patch_size
    constant = filters[:, d] if layer.constant else 0.0
    if _mode(mode, inputs) == "expand":
        return torch.cat([(layer.projected(x, filters[:, :d]) + constant).flatten(0, 1) for x in inputs])
    counts = [layer.position_count(x) for x in inputs]
    sums = [layer.projected_sum(x, filters[:, :d]) + count * constant for x, count in zip(inputs, counts)]
    return torch.stack(sums).sum(dim=0) / sum(counts)


def projected_gradients(layer: Layer, grads: Sequence[Tensor], unit: Tensor, mode: str) -> Tensor:
    """s.g of every row that G sums over: [rows, groups], so that its sum of squares / N is s^T G s of this batch."""
    filters = unit.view(layer.groups, -1)
    values = [(layer.gradient_rows(g).unflatten(-1, filters.shape) * filters).sum(dim=-1) for g in grads]
    if _mode(mode, grads) == "expand":
        return torch.cat([v.flatten(0, 1) for v in values])
    return torch.cat(values, dim=1).sum(dim=1)


def _mean_rows(layer: Layer, inputs: Sequence[Tensor]) -> Tensor:
    """a averaged over positions and calls: [N, groups d]."""
    counts = [layer.position_count(x) for x in inputs]
    return torch.stack([layer.mean_rows(x) * (n / sum(counts)) for x, n in zip(inputs, counts)]).sum(dim=0)


def _mode(mode: str, tensors: Sequence[Tensor]) -> str:
    """The mode, but "expand" where calls of one forward are on different batches: positions, say, without samples."""
    return mode if len({len(t) for t in tensors}) == 1 else "expand"
