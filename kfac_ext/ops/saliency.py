"""What the removal of a neuron costs, seen from the layer that it feeds, and the compensation of those that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.geometry import is_int
from kfac_ext.ops._launch import full_precision
from kfac_ext.ops._library import DTYPE_CODES, define, native_device
from kfac_ext.ops._lists import as_list, check_count, check_index, check_matrix, check_square, row_major
from kfac_ext.ops._saliency_kernels import Layer, fits_cuda, run_cpu, run_cuda
from kfac_ext.ops.inverse import damped_inverse_ex

__all__ = ["compensate", "obd_saliency", "obs_saliency"]

_FAMILY = "saliency"

# ---- scores ----


def _operation(obs: bool) -> str:
    return "obs_saliency" if obs else "obd_saliency"


def _check_scores(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int], obs: bool
) -> None:
    operation, name = _operation(obs), "inverses" if obs else "As"
    if not weights:
        raise ValueError(f"{operation}: weights is empty")
    for given, argument in ((inputs, name), (Gs, "Gs"), (blocks, "blocks")):
        check_count(operation, argument, len(given), len(weights), "weights")
    for i, (weight, matrix, G, block) in enumerate(zip(weights, inputs, Gs, blocks)):
        check_matrix(operation, f"weights[{i}]", weight, weights[0])
        outputs, columns = weight.shape
        check_square(operation, f"{name}[{i}]", matrix, weights[0], columns)
        check_square(operation, f"Gs[{i}]", G, weights[0], outputs)
        if not 1 <= block <= columns or columns % block > 1:
            raise ValueError(
                f"{operation}: blocks[{i}] is {block}, expected a divisor of the {columns} columns of weights[{i}] "
                "(or of all but the last, the bias)"
            )


def _scores(
    weights: list[Tensor], inputs: list[Tensor], Gs: list[Tensor], blocks: list[int], obs: bool
) -> list[Tensor]:
    _check_scores(weights, inputs, Gs, blocks, obs)
    layers = list(zip(weights, inputs, Gs, blocks))
    if not native_device(_operation(obs), weights[0], _FAMILY):
        return _reference(layers, obs)
    wide = [i for i, layer in enumerate(layers) if not (layer[0].is_cpu or fits_cuda(layer))]
    narrow = [i for i in range(len(layers)) if i not in wide]
    found = dict(zip(wide, _reference([layers[i] for i in wide], obs)))
    if narrow:
        scores, failed = _run([layers[i] for i in narrow], obs)
        _raise_failure(obs, dict(zip(narrow, failed)))
        found.update(zip(narrow, scores))
    return [found[i] for i in range(len(layers))]


def _reference(layers: list[Layer], obs: bool) -> list[Tensor]:
    return getattr(reference, _operation(obs))(*zip(*layers)) if layers else []


def _run(layers: list[Layer], obs: bool) -> tuple[list[Tensor], list[int]]:
    return (run_cpu if layers[0][0].is_cpu else run_cuda)(layers, obs)


def _raise_failure(obs: bool, failed: dict[int, int]) -> None:
    for i, neuron in failed.items():
        if neuron >= 0:
            raise torch.linalg.LinAlgError(
                f"{_operation(obs)}: the block of neuron {neuron} in inverses[{i}] is not positive definite"
            )


def _scores_fake(
    weights: list[Tensor], inputs: list[Tensor], Gs: list[Tensor], blocks: list[int], obs: bool
) -> list[Tensor]:
    _check_scores(weights, inputs, Gs, blocks, obs)
    return [weight.new_empty(weight.shape[1] // block) for weight, block in zip(weights, blocks)]


_scores_op = define(
    "saliency(Tensor[] weights, Tensor[] inputs, Tensor[] Gs, int[] blocks, bool obs) -> Tensor[]",
    _scores,
    _scores_fake,
)


def _score_layers(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int], obs: bool
) -> list[Tensor]:
    operation = _operation(obs)
    lists = [
        as_list(operation, name, tensors)
        for name, tensors in (("weights", weights), ("inverses" if obs else "As", inputs), ("Gs", Gs))
    ]
    if not lists[0]:
        return []
    if not isinstance(blocks, Sequence) or not all(is_int(block) for block in blocks):
        raise TypeError(f"{operation}: blocks is {blocks!r}, expected a list of ints")
    return _scores_op(*lists, list(blocks), obs)


def obd_saliency(
    weights: Sequence[Tensor], As: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int]
) -> list[Tensor]:
    """Score of every neuron by the weights that read it: S_j = 1/2 tr(V_J^T G V_J A_JJ).

    The second-order change of the loss when neuron j, which feeds the columns J = [j block, (j+1) block) of a layer
    with weights V and Kronecker-factored curvature A (x) G, becomes silent. All layers in one call.

    Args:
        weights: V of each layer, [O, d], float32 or float64, of one dtype and device.
        As: [d, d] covariance of the layer's inputs, symmetric.
        Gs: [O, O] covariance of the gradients at its outputs, symmetric.
        blocks: columns a neuron feeds: 1 for a Linear layer, kh kw for a convolution. A last column left over (the
            bias) belongs to no neuron.

    Returns:
        One [d // block] a layer.

    Raises:
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> V, A, G = torch.ones(3, 2), torch.eye(2), torch.eye(3)
        >>> kfac_ext.obd_saliency([V], [A], [G], [1])
        [tensor([1.5000, 1.5000])]
    """
    return _score_layers(weights, As, Gs, blocks, False)


def obs_saliency(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int]
) -> list[Tensor]:
    """Score of every neuron once the others have made up for it: S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1).

    H = (A + D)^-1 is the damped inverse of the input covariance: optimal brain surgeon (Hassibi & Stork 1992) for a
    block of columns under the curvature A (x) G. `compensate` gives the weights that reach this change.

    Args:
        weights: V of each layer, [O, d], float32 or float64, of one dtype and device.
        inverses: H of each layer, [d, d], symmetric positive definite, from `damped_inverse`.
        Gs: [O, O] covariance of the gradients at its outputs, symmetric.
        blocks: columns a neuron feeds, as for `obd_saliency`.

    Returns:
        One [d // block] a layer.

    Raises:
        torch.linalg.LinAlgError: naming the layer and the first neuron whose block H_JJ is not positive definite.
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> V, H, G = torch.ones(3, 2), torch.eye(2), torch.eye(3)
        >>> kfac_ext.obs_saliency([V], [H], [G], [1])
        [tensor([1.5000, 1.5000])]
    """
    return _score_layers(weights, inverses, Gs, blocks, True)


# ---- compensation ----


def _check_compensate(weights: Sequence[Tensor], inverses: Sequence[Tensor], pruned: Sequence[Tensor]) -> None:
    operation = "compensate"
    if not weights:
        raise ValueError(f"{operation}: weights is empty")
    for given, argument in ((inverses, "inverses"), (pruned, "pruned")):
        check_count(operation, argument, len(given), len(weights), "weights")
    for i, (weight, inverse, index) in enumerate(zip(weights, inverses, pruned)):
        check_matrix(operation, f"weights[{i}]", weight, weights[0])
        check_square(operation, f"inverses[{i}]", inverse, weights[0], weight.shape[1])
        check_index(operation, f"pruned[{i}]", index, ["m"])
        if index.device != weight.device:
            raise ValueError(f"{operation}: pruned[{i}] is on {index.device}, the weights on {weight.device}")
        if index.shape[0] > weight.shape[1]:
            raise ValueError(f"{operation}: pruned[{i}] has {index.shape[0]} indices of {weight.shape[1]} columns")


def _kept_columns(i: int, index: Tensor, columns: int) -> Tensor:
    """The columns not in `index`, in order; raise unless those are distinct columns."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= columns):
        raise ValueError(
            f"compensate: pruned[{i}] has indices from {int(index.min())} to {int(index.max())}, "
            f"expected columns 0 to {columns - 1}"
        )
    kept = index.new_ones(columns, dtype=torch.bool).index_fill_(0, index, False).nonzero().flatten()
    if kept.numel() != columns - index.numel():
        raise ValueError(f"compensate: pruned[{i}] names a column twice")
    return kept


def _compensate(weights: list[Tensor], inverses: list[Tensor], pruned: list[Tensor]) -> list[Tensor]:
    _check_compensate(weights, inverses, pruned)
    on_host = torch.cat(pruned).cpu().split([len(index) for index in pruned])  # waits for the device once
    kept = [
        _kept_columns(i, index, weight.shape[1]).to(weight.device)
        for i, (weight, index) in enumerate(zip(weights, on_host))
    ]
    if not native_device("compensate", weights[0], "damped_inverse"):
        return reference.compensate(weights, inverses, pruned)
    found, failed = (_compensate_cpu if weights[0].is_cpu else _compensate_grouped)(weights, inverses, pruned, kept)
    if failed:
        raise torch.linalg.LinAlgError(
            f"compensate: inverses[{failed[0]}] at the columns pruned[{failed[0]}] is not positive definite"
        )
    return found


def _compensate_cpu(
    weights: list[Tensor], inverses: list[Tensor], pruned: list[Tensor], kept: list[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """New weights, and the layers whose H_JJ is not positive definite."""
    rows = [(row_major(weight), row_major(inverse)) for weight, inverse in zip(weights, inverses)]
    lost = [index.contiguous() for index in pruned]
    found = [weight.new_empty(weight.shape[0], len(keep)) for weight, keep in zip(weights, kept)]
    problems = [
        (W.data_ptr(), len(W), W.stride(0), H.data_ptr(), H.stride(0), *_span(index), *_span(keep), out.data_ptr())
        for (W, H), index, keep, out in zip(rows, lost, kept, found)
    ]
    infos = _C.compensate_cpu(problems, DTYPE_CODES[weights[0].dtype], torch.get_num_threads())
    return found, [i for i, info in enumerate(infos) if info]


def _compensate_grouped(
    weights: list[Tensor], inverses: list[Tensor], pruned: list[Tensor], kept: list[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """As `_compensate_cpu`, for a GPU: all H_JJ are inverted in one call, the products are torch's."""
    found = [weight.index_select(1, keep) for weight, keep in zip(weights, kept)]
    layers = [i for i, index in enumerate(pruned) if len(index)]
    if not layers:
        return found, []
    rows = [inverses[i].index_select(0, pruned[i]) for i in layers]  # H_J.
    solved, info = damped_inverse_ex([row.index_select(1, pruned[i]) for i, row in zip(layers, rows)], 0.0)
    with full_precision(found[0].device):  # in tf32 the products would lose what H_JJ, of high condition, needs
        for i, row, inverse in zip(layers, rows, solved):
            found[i] -= weights[i].index_select(1, pruned[i]) @ inverse @ row.index_select(1, kept[i])
    return found, [layers[k] for k in info.nonzero().flatten().tolist()]


def _span(index: Tensor) -> tuple[int, int]:
    return index.data_ptr(), index.numel()


def _compensate_fake(weights: list[Tensor], inverses: list[Tensor], pruned: list[Tensor]) -> list[Tensor]:
    _check_compensate(weights, inverses, pruned)
    return [
        weight.new_empty(weight.shape[0], weight.shape[1] - index.shape[0]) for weight, index in zip(weights, pruned)
    ]


_compensate_op = define(
    "compensate(Tensor[] weights, Tensor[] inverses, Tensor[] pruned) -> Tensor[]", _compensate, _compensate_fake
)


def compensate(weights: Sequence[Tensor], inverses: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[Tensor]:
    """Weights of the columns K that stay, making up for the pruned columns J: W_K - W_J (H_JJ)^-1 H_JK.

    The minimum of the layer's squared change under its input covariance: since H = (A + D)^-1, it equals
    W_K + W_J R^T with R = (A_KK + D)^-1 A_KJ (optimal brain surgeon, Hassibi & Stork 1992). All layers in one call.

    Args:
        weights: W of each layer, [O, d], float32 or float64, of one dtype and device.
        inverses: H of each layer, [d, d], symmetric positive definite, from `damped_inverse`.
        pruned: J of each layer, int64 [m], distinct column indices in any order; may be empty.

    Returns:
        One new [O, d - m] a layer, the columns in their old order.

    Raises:
        torch.linalg.LinAlgError: naming the layer whose H_JJ is not positive definite.
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> W, H = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> kfac_ext.compensate([W], [H], [torch.tensor([0])])
        [tensor([[1.5000]])]
    """
    operation = "compensate"
    lists = [
        as_list(operation, name, tensors)
        for name, tensors in (("weights", weights), ("inverses", inverses), ("pruned", pruned))
    ]
    return _compensate_op(*lists) if lists[0] else []
