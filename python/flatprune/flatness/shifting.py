"""Optimum shifting: each layer gets the smallest weights that compute the same on a batch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from flatprune.moved import refuse_moved
from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.curvature import unwrapped
from kfac_ext.curvature.fisher import input_covariance
from kfac_ext.curvature.modes import module_modes, undisturbed
from kfac_ext.curvature.tracing import trace_layers
from kfac_ext.layers import Layer


class LayerShift(NamedTuple):
    """What `optimum_shift` did to one layer.

    Attributes:
        layer: its name.
        rank: dimensions that the inputs of the batch span; the rows of the weight now lie in them.
        inputs: dimensions of the inputs, d = in_features or in_channels/groups kh kw; both summed over groups.
        norm_before, norm_after: Frobenius norm of the weight.
    """

    layer: str
    rank: int
    inputs: int
    norm_before: float
    norm_after: float


@torch.no_grad()
def optimum_shift(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    layers: Iterable[str] | None = None,
    tolerance: float | None = None,
) -> list[LayerShift]:
    """Give each Linear and convolution the weights of the smallest norm with the same outputs on a batch.

    Zhou, Li, Feng, Huang 2024 (arXiv 2405.14111): where a batch has fewer input vectors than a layer has inputs, W X is
    an underdetermined system; its solution of the least Frobenius norm is W P, P = X (X^T X)^+ X^T the projector onto
    the span of the inputs X, and the trace of the Hessian falls with the norm. Here P = U U^T, U the eigenvectors of
    A = X X^T / n (float64) whose eigenvalues exceed `tolerance` times the largest: the same span, and convolutions are
    the same case with patches for X. A layer whose inputs span everything keeps its weights to the bit.

    The batch's outputs of every layer stay what they are up to rounding, so that all layers come from one forward;
    outputs for other inputs change by what W does outside the span. Biases stay (W X is what is solved for, without
    them). Batch norms are in the mode they are in, and the outputs stay in that mode; the raw weights under one are
    projected like any, but their norm says nothing about flatness, as the batch norm divides any scale out. Dropout is
    off. Left alone are frozen weights, weights that another module holds too, and parametrized ones. The optimizer's
    momentum is not projected.

    Args:
        model: changed in place; of a `DistributedDataParallel` the batch is that of all ranks. Buffers, random streams,
            modes and `Curvature`s of it are untouched.
        inputs: the batch, as the model takes it; small on purpose, as fewer than d input vectors leave room.
        layers: names; None: all.
        tolerance: eigenvalues below this part of the largest count as zero; None: d times the float64 epsilon. More
            makes weights smaller and outputs only nearly the same.

    Returns:
        One record a layer, in the order of the forward.

    Raises:
        TypeError: `layers` is one string.
        KeyError: `layers` names one that cannot be shifted.
        ValueError: tolerance out of range, or the inputs of a layer are not finite; nothing is changed then.

    Example:
        >>> for shift in optimum_shift(model, x[:64]):
        ...     print(shift.layer, shift.rank, shift.norm_after / shift.norm_before)
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"optimum_shift: tolerance is {tolerance}, expected 0 <= tolerance < 1")
    if isinstance(layers, str):  # would be taken apart into letters
        raise TypeError(f"optimum_shift: layers is {layers!r}, expected a list of names")
    model, group = unwrapped(model, None, "optimum_shift")
    refuse_moved(model, "optimum_shift")
    batch = inputs if isinstance(inputs, tuple) else (inputs,)
    chosen = _chosen(model, batch, layers)
    covariances = _covariances(model, chosen, batch)
    if group is not None:
        covariances = dict(
            zip(covariances, group.mean_of_symmetric(list(covariances.values()), "covariances to shift by"))
        )
    _refuse_not_finite(covariances)
    planned = [(layer.weight, *_projected(layer, covariances[layer.name], tolerance)) for layer in chosen]
    for weight, projected, _shift in planned:
        weight.copy_(projected)
    if group is not None:
        group.first_([weight for weight, *_ in planned], "shifted weights")
    return [shift for _weight, _projected_weight, shift in planned]


def _chosen(model: nn.Module, batch: tuple[Tensor, ...], names: Iterable[str] | None) -> list[Layer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be shifted stays, which is no news
        found = trace_layers(model, batch)
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    usable = {name: layer for name, layer in found.items() if _can_be_shifted(layer, holders)}
    if names is None:
        return list(usable.values())
    names = set(names)
    for name in names - usable.keys():
        raise KeyError(f"optimum_shift: no layer {name!r} that can be shifted, there are {', '.join(usable)}")
    return [layer for name, layer in usable.items() if name in names]


def _can_be_shifted(layer: Layer, holders: Counter[int]) -> bool:
    weight = layer.weight
    return isinstance(weight, nn.Parameter) and holders[id(weight)] == 1 and weight.requires_grad


def _covariances(model: nn.Module, layers: list[Layer], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Layer name -> sum over its calls of A [groups, d, d] in float64, without the 1 of the bias."""
    found: dict[str, Tensor] = {}

    def report(layer: Layer, x: Tensor, _z: Tensor) -> None:
        A = input_covariance(layer, x.double(), "expand", bias=False)
        found[layer.name] = found.get(layer.name, 0.0) + A.view(layer.groups, *A.shape[-2:])

    dropouts: dict[nn.Module, bool] = {module: False for module in model.modules() if isinstance(module, _DropoutNd)}
    with module_modes(dropouts), undisturbed(model), call_hooks(layers, report):
        model(*batch)
    return found


def _refuse_not_finite(covariances: Mapping[str, Tensor]) -> None:
    for name, A in covariances.items():
        if not bool(A.isfinite().all()):
            raise ValueError(f"optimum_shift: the inputs of layer {name!r} are not finite")


def _projected(layer: Layer, A: Tensor, tolerance: float | None) -> tuple[Tensor, LayerShift]:
    """W P in the weight's shape (the weight itself where P is the identity), and the record of it."""
    weight = layer.weight
    values, vectors = torch.linalg.eigh(A)
    if tolerance is None:
        tolerance = A.shape[-1] * torch.finfo(A.dtype).eps
    kept = values > tolerance * values[:, -1:]
    rank, inputs = int(kept.sum()), kept.numel()
    projected = weight
    if rank < inputs:
        U = vectors * kept[:, None]
        rows = layer.weight_matrix().double().unflatten(0, (layer.groups, -1))
        projected = layer.weight_like((rows @ U @ U.mT).flatten(0, 1)).to(weight.dtype)
    norms = [float(w.double().norm()) for w in (weight, projected)]
    return projected, LayerShift(layer.name, rank, inputs, *norms)
