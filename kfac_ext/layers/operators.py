"""The operators that multiply a weight, and what their arguments say: for modules of no registered kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.layers.convolution import Convolution, Geometry, TransposedConvolution
from kfac_ext.layers.layer import Layer, kind_of
from kfac_ext.layers.linear import InputMajorLinear, Linear


class Operator(NamedTuple):
    """One operator: the kind of layer it makes of its weight, its arguments in order, and which of them are what."""

    kind: type[Layer]
    arguments: tuple[str, ...]
    x: str = "input"
    weight: str = "weight"
    bias: str = "bias"


class OperatorCall(NamedTuple):
    """What one operator saw.

    Attributes:
        kind: the kind of layer.
        x, weight, bias: its tensors.
        geometry: of a convolution, resolved, with its groups; plain numbers.
    """

    kind: type[Layer]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: dict[str, Any] | None

    def agrees(self, layer: Layer) -> bool:
        """Whether it is a call of this layer as it was traced."""
        if isinstance(layer, Convolution):
            return self.geometry == {**layer.geometry._asdict(), "groups": layer.groups}
        return type(layer) is self.kind


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_MATMUL = Operator(InputMajorLinear, ("input", "other"), weight="other")
_MM = Operator(InputMajorLinear, ("input", "mat2"), weight="mat2")
_ADDMM = Operator(InputMajorLinear, ("input", "mat1", "mat2"), x="mat1", weight="mat2", bias="input")

OPERATORS: dict[Callable[..., Any], Operator] = {
    F.linear: Operator(Linear, ("input", "weight", "bias")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _MATMUL),
    **dict.fromkeys((torch.mm, Tensor.mm), _MM),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _ADDMM),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), Operator(Convolution, _CONVOLUTION)),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), Operator(TransposedConvolution, _TRANSPOSED)
    ),
}


def layer_from_state(state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Layer:
    """The layer of `Layer.state`, in the model that has these modules.

    Raises:
        ValueError: naming a module that is missing or of no registered kind.
    """
    module, norm, host = (
        None if state[key] is None else _module(modules, state[key]) for key in ("module", "norm", "host")
    )
    assert module is not None
    names = {"norm": norm, "norm_name": state["norm"], "host": host, "host_name": state["host"]}
    own = {"keys": (state["weight"], state["bias"]), "geometry": state["geometry"]}
    if state["operator"] is not None:
        kinds = {operator.kind.__name__: operator.kind for operator in OPERATORS.values()}
        return kinds[state["operator"]](module, state["module"], **names, **own)
    kind = kind_of(module)
    if kind is None:
        name, found = state["module"], type(module).__name__
        raise ValueError(f"Curvature.load_state_dict: {name!r} ({found}) is of no registered kind of layer")
    return kind(module, state["module"], **names, **own)


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise ValueError(f"Curvature.load_state_dict: the model has no module named {name!r}")
    return modules[name]


def operator_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> OperatorCall | None:
    """What an operator saw that multiplies a weight as some kind of layer does; None of any other call."""
    operator = OPERATORS.get(function)
    if operator is None:
        return None
    named = dict(zip(operator.arguments, args)) | dict(kwargs)
    x, weight, bias = (named.get(name) for name in (operator.x, operator.weight, operator.bias))
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    if bias is not None and not (isinstance(bias, Tensor) and bias.dim() == 1):
        return None
    if operator is _ADDMM and not named.get("alpha", 1) == named.get("beta", 1) == 1:
        return None
    if "stride" in operator.arguments:
        place = Geometry.of(weight.dim() - 2, named)
        geometry = {**place._asdict(), "groups": int(named.get("groups", 1))}
        return OperatorCall(operator.kind, x, weight, bias, geometry)
    if weight.dim() != 2:
        return None
    whole = transposed(weight)
    if whole is None:
        return OperatorCall(operator.kind, x, weight, bias, None)
    kind = Linear if operator.kind is InputMajorLinear else InputMajorLinear
    return OperatorCall(kind, x, whole, bias, None)


def transposed(view: Tensor) -> Tensor | None:
    """The matrix whose transpose this is, as in `x @ weight.T`; None if it is a tensor of its own or another view."""
    base = view._base
    if base is None or base.dim() != 2 or view.dim() != 2:
        return None
    turned = view.shape == base.shape[::-1] and view.stride() == base.stride()[::-1]
    return base if turned and view.storage_offset() == base.storage_offset() else None
