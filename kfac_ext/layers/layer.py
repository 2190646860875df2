"""What curvature needs to know of a layer; each kind of layer is a subclass in a file of its own, registered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kfac_ext.layers.batch_norm import BatchNorm, norm_affine
from kfac_ext.ops.covariance_group import CovarianceUpdate

_Kind = TypeVar("_Kind", bound="type[Layer]")
_KINDS: dict[Callable[..., Any], type[Layer]] = {}  # the forward that a kind describes


class Layer(ABC):
    """A weight that some operator multiplies with: z = M a (+ bias) for every position and group of channels.

    M is the *matrix* [O, d] of the weight, a the d inputs of one output, d = inputs/groups area in the order (channel,
    kernel). Where z goes into a batch norm and nowhere else, `norm` is that batch norm and z its output. A subclass is
    one kind of layer and says how weight and matrix, input and a, gradient and g belong together; `register` names
    the modules it describes. Where the weight is called otherwise it sets `weight_key` and `bias_key`.

    Args:
        module: owns the weight.
        module_name: its qualified name.
        keys: the names of weight and bias in the module, None for no bias; default those of the kind. A weight that is
            not called "weight" makes its name part of the layer's.
        norm, norm_name: the batch norm behind the layer.
        host, host_name: the module in whose forward the operator is seen; None: `module` itself is called, and
            `input_of` says what the operator sees.
        geometry: of an operator that is seen, whatever its kind keeps of it.

    Example:
        A layer of one's own takes a subclass of the kind it resembles, here a linear layer that scales its input:

        >>> class Equalized(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(x * self.in_features**-0.5, self.weight, self.bias)
        >>> @register(Equalized)
        ... class EqualizedLayer(kfac_ext.layers.Linear):
        ...     def input_of(self, args, kwargs):
        ...         return super().input_of(args, kwargs) * self.module.in_features**-0.5
    """

    weight_key: str = "weight"
    """the weight's name in the module"""
    bias_key: str | None = "bias"
    output_dim: ClassVar[int] = 0
    """dimension of the weight that counts outputs"""
    input_dim: ClassVar[int] = 1
    channel_dim: ClassVar[int]
    """dimension of z that holds the channels"""

    def __init__(
        self,
        module: nn.Module,
        module_name: str = "",
        *,
        keys: tuple[str, str | None] | None = None,
        norm: BatchNorm | None = None,
        norm_name: str | None = None,
        host: nn.Module | None = None,
        host_name: str | None = None,
        geometry: Mapping[str, Any] | None = None,
    ) -> None:
        self.module, self.module_name = module, module_name
        if keys is not None:
            self.weight_key, self.bias_key = keys
        self.norm, self.norm_name = norm, norm_name
        self.host, self.host_name = host, host_name
        self.own_geometry = None if geometry is None else dict(geometry)
        self.name = module_name if self.weight_key == "weight" else self.weight_name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.module).__name__})"

    def state(self) -> dict[str, Any]:
        """Plain names and numbers, from which `layer_from_state` makes the layer again."""
        operator = None if self.host is None else type(self).__name__
        return {
            "module": self.module_name,
            "operator": operator,
            "weight": self.weight_key,
            "bias": self.bias_key,
            "norm": self.norm_name,
            "host": self.host_name,
            "geometry": self.own_geometry,
        }

    # tensors

    @property
    def weight_name(self) -> str:
        """Qualified name of the weight."""
        return f"{self.module_name}.{self.weight_key}".lstrip(".")

    @property
    def bias_name(self) -> str | None:
        """Qualified name of the bias; None if there is none."""
        return None if self.bias is None else f"{self.module_name}.{self.bias_key}".lstrip(".")

    @property
    def weight(self) -> Tensor:
        """The weight as the operator takes it."""
        return getattr(self.module, self.weight_key)

    @property
    def bias(self) -> Tensor | None:
        """[O], or None."""
        return None if self.bias_key is None else getattr(self.module, self.bias_key, None)

    # sizes

    @property
    def is_convolution(self) -> bool:
        """Whether the channels of z are its second dimension, not its last."""
        return self.channel_dim == 1

    @property
    def groups(self) -> int:
        """Groups of channels that are multiplied apart: of a grouped convolution, else 1."""
        return 1

    @property
    def outputs(self) -> int:
        """O, all output channels."""
        return self._channels(self.output_dim)

    @property
    def inputs(self) -> int:
        """All input channels."""
        return self._channels(self.input_dim)

    def _channels(self, dim: int) -> int:
        return self.weight.shape[dim] * (self.groups if dim == 1 else 1)  # torch's weights are grouped along dim 0

    @property
    def area(self) -> int:
        """Columns of the matrix per input channel: 1, or the entries of a convolution's kernel."""
        return math.prod(self.weight.shape[2:])

    @property
    def patch_size(self) -> int:
        """d: the inputs of one output, inputs/groups area."""
        return self.inputs // self.groups * self.area

    @property
    def constant(self) -> bool:
        """Whether the map to z has a constant part (a bias, or the batch norm's shift): then A has a last row for 1."""
        return self.bias is not None or self.norm is not None

    def factor_sizes(self) -> dict[str, int | tuple[int, int]]:
        """Sizes of the factors `name.A` and `name.G` as `kfac_ext.FactorSet` takes them."""
        inputs, outputs = self.patch_size + self.constant, self.outputs
        if self.groups == 1:
            return {f"{self.name}.A": inputs, f"{self.name}.G": outputs}
        return {f"{self.name}.A": (self.groups, inputs), f"{self.name}.G": (self.groups, outputs // self.groups)}

    # the matrix

    def weight_matrix(self, tensor: Tensor | None = None) -> Tensor:
        """The weight, or a tensor of its shape, as its matrix [O, d]."""
        return (self.weight if tensor is None else tensor).flatten(1)

    def weight_like(self, matrix: Tensor) -> Tensor:
        """The inverse of `weight_matrix`: a matrix [O, d] in the shape of the weight."""
        return matrix.reshape(self.weight.shape)

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """V [O, d] or, if `constant`, [O, d + 1] with z = V [a; 1]: the batch norm's affine map is part of V.

        With s = gamma / sqrt(running_var + eps): V[:, :d] = s M and V[:, d] = s (bias - running_mean) + beta. The
        running statistics are used, as in eval mode.
        """
        weight, bias = self.weight_matrix(), self.bias
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        if self.norm is not None:
            scale, offset = norm_affine(self.norm)
            weight, shift = scale[:, None] * weight, scale * shift + offset
        if self.constant:
            return torch.cat([weight, shift[:, None]], dim=1)
        return weight.clone(memory_format=torch.contiguous_format)

    # what a call shows

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What the operator sees of a call of the module: by default its first argument.

        Raises:
            ValueError: the call is one that the kind has no factors for.
        """
        x = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
        return self.checked_input(x)

    def checked_input(self, x: Tensor) -> Tensor:
        """The operator's input with a first dimension for samples; ValueError if it has too few or many."""
        return x if x.dim() > 1 else x[None]

    @abstractmethod
    def input_update(self, x: Tensor, mode: str, *, bias: bool, decay: float, scale: float) -> CovarianceUpdate:
        """`name.A` <- decay A + scale (A of one call); `bias` appends the 1."""

    @abstractmethod
    def gradient_update(self, g: Tensor, mode: str, *, decay: float, scale: float) -> CovarianceUpdate:
        """`name.G` <- decay G + scale (sum of g g^T over samples and positions of one call)."""

    @abstractmethod
    def position_count(self, x: Tensor) -> int:
        """Positions of a sample at which the weight is applied."""

    @abstractmethod
    def mean_rows(self, x: Tensor) -> Tensor:
        """a averaged over positions: [N, groups d]."""

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """a at every position: [N, positions, groups d]."""

    @abstractmethod
    def gradient_rows(self, g: Tensor) -> Tensor:
        """g as [N, positions, O]."""

    @abstractmethod
    def projected(self, x: Tensor, filters: Tensor) -> Tensor:
        """u.a at every position, for one u a group in `filters` [groups, d]: [N, positions, groups]; differentiable."""

    @abstractmethod
    def projected_sum(self, x: Tensor, filters: Tensor) -> Tensor:
        """`projected` summed over positions: [N, groups]; differentiable."""


def register(*types: type[nn.Module]) -> Callable[[_Kind], _Kind]:
    """Class decorator: modules with the forward of one of `types` are layers of this kind.

    A subclass with a forward of its own is none; its operators are looked at while it runs. The last registration of
    a forward counts.

    Raises:
        TypeError: naming what is no subclass of nn.Module.

    Example:
        >>> @register(nn.Linear)
        ... class Linear(Layer): ...
    """
    for module_type in types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"register: {module_type!r} is no subclass of torch.nn.Module")

    def decorator(kind: _Kind) -> _Kind:
        for module_type in types:
            _KINDS[module_type.forward] = kind
        return kind

    return decorator


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The kind registered for the module's forward; None if there is none."""
    if "forward" in vars(module):  # replaced in this one instance
        return None
    return _KINDS.get(type(module).forward)


def layer_of(module: nn.Module, name: str = "") -> Layer:
    """The layer that a module of a registered kind is.

    Raises:
        TypeError: naming the module and its type.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"layer_of: {name or 'the module'} ({type(module).__name__}) is of no registered kind of layer")
    return kind(module, name)
