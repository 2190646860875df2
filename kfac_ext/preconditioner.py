"""KFACPreconditioner: natural-gradient directions from Kronecker factors, for any optimizer of PyTorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState

from kfac_ext.curvature import Curvature
from kfac_ext.curvature.curvature import inverter
from kfac_ext.curvature.outputs import Pick
from kfac_ext.factors import FactorSet
from kfac_ext.inverse_stack import InverseStack, stack_layers, write_gradients_
from kfac_ext.layers import Layer

Number: TypeAlias = "float | Callable[[int], float]"
Count: TypeAlias = "int | Callable[[int], int]"

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "damping": (lambda v: math.isfinite(v) and v > 0, "a finite number > 0"),
    "factor_decay": (lambda v: 0 <= v < 1, "0 <= factor_decay < 1"),
    "factor_update_steps": (lambda v: isinstance(v, int) and v >= 1, "an int >= 1"),
    "inv_update_steps": (lambda v: isinstance(v, int) and v >= 1, "an int >= 1"),
    "kl_clip": (lambda v: v > 0, "a number > 0, or None"),
    "lr": (lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0"),
}


class KFACPreconditioner:
    """Turns the gradient of every layer into K-FAC's direction: call between backward and step.

    Layers are those of `kfac_ext.Curvature`: Linears, convolutions, and what else multiplies a parameter. For a layer
    with weight W, as a matrix [O, d] in the order of its patches, and its bias, if any, as the last column:

        V = (G + sqrt(damping)/pi I)^-1  dL/d[W, b]  (A + pi sqrt(damping) I)^-1     pi^2 = mean diag A / mean diag G

    (Martens & Grosse 2015, sections 4 and 6.3; convolutions: Grosse & Martens 2016), A = E[a a^T] and
    G = 1/N sum of g g^T in the scales of `kfac_ext.Curvature`: A (x) G estimates the Fisher block of the *mean* loss,
    and the gradient is that of the mean loss, so nothing else is scaled. A and G are those of the layer's own
    pre-activation, before any batch norm. A grouped convolution has one A, G and pi a group. With `kl_clip` all V
    are multiplied by nu = min(1, sqrt(kl_clip / (lr^2 sum over layers of <V, dL/dW>))), which bounds the
    second-order change of the prediction (Ba, Grosse, Martens 2017). What is left alone: gradients of all other
    parameters, of layers in `skip_layers`, and of a layer that has no inverse yet. Weight decay is the optimizer's.

    A "step" is one call of `step`; every number may also be a function of how many there were before. On every
    `factor_update_steps`-th step each forward and backward renews the factors. A pair of factors that cannot be
    inverted keeps its last inverse, with a warning that names the layer. On a GPU `step` waits for nothing; the
    warning comes some steps later there.

    Args:
        model: what is trained, as for `kfac_ext.Curvature`; gradients of a `DistributedDataParallel` are those of the
            whole batch by then, and so are factors and inverses.
        damping: lambda.
        factor_decay: weight of the past in the factors' running averages, per update step.
        factor_update_steps, inv_update_steps: how often factors and inverses are renewed.
        kl_clip: None: no clipping.
        lr: the optimizer's learning rate, which `kl_clip` needs; `lambda step: optimizer.param_groups[0]["lr"]`
            follows a schedule.
        fisher_type, kfac_approx, loss, output, class_dim, batch_dim, layer_batch_dims, reduction, skip_layers,
            max_factor_size, generator, process_group, outlier_factor, outlier_window: as for `kfac_ext.Curvature`,
            whose `left_out` counts the updates of factors that were left out.
        accumulation_steps: forwards and backwards that make one step, each of the mean loss divided by this number.
            On an update step they count equally in the factors.
        grad_scaler: the `torch.amp.GradScaler` of the loss. `step` may come before or after `unscale_`; where
            there are several optimizers, before all or after all.

    Raises:
        TypeError, ValueError: naming the argument; `Curvature`'s errors about the model.

    Example:
        >>> preconditioner = KFACPreconditioner(model, damping=1e-2, kl_clip=1e-3, lr=0.1)
        >>> criterion(model(x), y).backward()
        >>> preconditioner.step()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: Number = 1e-3,
        factor_decay: Number = 0.95,
        factor_update_steps: Count = 10,
        inv_update_steps: Count = 10,
        kl_clip: Number | None = None,
        lr: Number | None = None,
        fisher_type: str = "true",
        kfac_approx: str = "expand",
        loss: str | Callable[..., Any] | Sequence[Any] = "cross_entropy",
        output: Pick = None,
        class_dim: int | None = None,
        batch_dim: int = 0,
        layer_batch_dims: Mapping[str, int] | None = None,
        reduction: str | None = None,
        skip_layers: Iterable[str] = (),
        max_factor_size: int | None = None,
        generator: torch.Generator | None = None,
        outlier_factor: float | None = None,
        outlier_window: int = 20,
        accumulation_steps: int = 1,
        grad_scaler: GradScaler | None = None,
        process_group: Any = None,
    ) -> None:
        self.damping, self.factor_decay, self.kl_clip, self.lr = damping, factor_decay, kl_clip, lr
        self.factor_update_steps, self.inv_update_steps = factor_update_steps, inv_update_steps
        self.accumulation_steps, self.grad_scaler = accumulation_steps, grad_scaler
        self.step_count = 0
        self._check_arguments()
        self.curvature = Curvature(
            model,
            factor_decay=self._forward_decay,
            factor_update_steps=1,  # `_await_forwards` pauses it
            fisher_type=fisher_type,
            kfac_approx=kfac_approx,
            loss=loss,
            output=output,
            class_dim=class_dim,
            batch_dim=batch_dim,
            layer_batch_dims=layer_batch_dims,
            reduction=reduction,
            skip_layers=skip_layers,
            max_factor_size=max_factor_size,
            fold_norms=False,
            generator=generator,
            grad_scale=self._loss_scale,
            process_group=process_group,
            outlier_factor=outlier_factor,
            outlier_window=outlier_window,
        )
        self._stacks: list[InverseStack] = []
        self._inverted: frozenset[str] = frozenset()
        self._unread: list[_InverseReport] = []
        self._warned: set[str] = set()
        self._is_checked = self._is_removed = False
        self._pause = ExitStack()
        self._await_forwards()

    @torch.no_grad()
    def step(self) -> None:
        """Put V into the `.grad` of every layer's weight and bias, in place.

        Raises:
            RuntimeError: the model has made no training forward, or the preconditioner was removed.
            ValueError: a layer's weight belongs to another module too or is computed from other parameters, or a
                function of the step gave a number out of range, named; no gradient is changed then.
        """
        self._check_ready()
        self.curvature.finish_update()
        self._check_forwards()
        updated = self.curvature.updated_layers
        if updated and (updated != self._inverted or self.step_count % self._value("inv_update_steps") == 0):
            self._update_inverses(updated)
        self._warn_failures()
        self._precondition()
        self.step_count += 1
        self._await_forwards()

    def remove(self) -> None:
        """Take every hook off the model; calling it twice does nothing. `step` is an error then."""
        self._is_removed = True
        self.curvature.remove()

    def __enter__(self) -> KFACPreconditioner:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remove()

    # what is in range

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        value = value(self.step_count) if callable(value) else value
        fits, wanted = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            raise ValueError(f"KFACPreconditioner: {name} is {value!r} at step {self.step_count}, expected {wanted}")
        return value

    def _check_arguments(self) -> None:
        for name in _RANGES:
            value = getattr(self, name)
            if not callable(value) and not (value is None and name in ("kl_clip", "lr")):
                self._value(name)
        if self.kl_clip is not None and self.lr is None:
            raise ValueError("KFACPreconditioner: kl_clip needs lr, the learning rate of the optimizer")
        if not isinstance(self.accumulation_steps, int) or self.accumulation_steps < 1:
            raise ValueError(
                f"KFACPreconditioner: accumulation_steps is {self.accumulation_steps!r}, expected an int >= 1"
            )
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, GradScaler):
            kind = type(self.grad_scaler).__name__
            raise TypeError(f"KFACPreconditioner: grad_scaler is a {kind}, expected torch.amp.GradScaler")

    def _check_ready(self) -> None:
        if self._is_removed or self.curvature.step_count == 0:
            why = "was removed" if self._is_removed else "has seen no training forward of its model"
            raise RuntimeError(f"KFACPreconditioner.step: the preconditioner {why}")
        if not self._is_checked:
            _check_parameters(self.curvature.model, self.curvature.layers)
            self._is_checked = True

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"KFACPreconditioner: {message}", stacklevel=4)

    # factors

    def _await_forwards(self) -> None:
        """Let the forwards of the coming step renew the factors, or count for nothing."""
        due = not self.curvature.is_updated or self.step_count % self._value("factor_update_steps") == 0
        self._pause.close()
        if not due:
            self._pause.enter_context(self.curvature.paused())
        self._due, self._first_forward = due, self.curvature.step_count

    def _check_forwards(self) -> None:
        forwards = self.curvature.step_count - self._first_forward
        if self._due and forwards != self.accumulation_steps:
            self._warn_once(
                f"{forwards} training forwards in one step, but accumulation_steps is {self.accumulation_steps}"
            )

    def _forward_decay(self, _forward: int) -> float:
        """Weight of all before the j-th of k forwards: w_(j-1)/w_j, w_j = decay + (1 - decay) j/k.

        In the end the past weighs `decay` and each forward (1 - decay)/k.
        """
        decay = self._value("factor_decay") if self._inverted else 0.0
        weight = (1 - decay) / self.accumulation_steps
        forward = self.curvature.step_count - self._first_forward
        return (decay + weight * (forward - 1)) / (decay + weight * forward)

    def _loss_scale(self) -> float | Tensor:
        """What the backpropagated loss is, as a multiple of the mean loss of its batch."""
        if self.grad_scaler is None:
            return 1.0 / self.accumulation_steps
        one = torch.ones((), device=self.curvature.factors.buffer.device)
        return self.grad_scaler.scale(one) / self.accumulation_steps  # `get_scale` would wait for the device

    # inverses

    def _update_inverses(self, updated: frozenset[str]) -> None:
        damping = self._value("damping")
        if updated != self._inverted:
            self._set_stacks(updated, self._inverse_state())
        layers = [layer for stack in self._stacks for layer in stack.layers]
        pairs = [(f"{layer.name}.A", f"{layer.name}.G") for layer in layers]
        keys = [a for a, _ in pairs] + [g for _, g in pairs]
        inverses, info = self.curvature.factors.damped_inverse(damping, keys, pi=pairs, invert=inverter(self.curvature))
        failed = (info != 0).view(2, -1).any(dim=0)  # of each block, A or G
        for stack, of_stack in zip(self._stacks, failed.split([stack.blocks for stack in self._stacks])):
            stack.take_(inverses, of_stack)
        self._unread.append(_InverseReport.of(failed, [layer.name for layer in layers for _ in range(layer.groups)]))

    def _set_stacks(self, names: frozenset[str], inverses: Mapping[str, Mapping[str, Tensor]]) -> None:
        layers = [layer for name, layer in self.curvature.layers.items() if name in names]
        self._stacks = stack_layers(layers, self.curvature.factors) if layers else []
        for stack in self._stacks:
            stack.load_(inverses)
        self._inverted = names

    def _inverse_state(self) -> dict[str, dict[str, Tensor]]:
        return {name: entry for stack in self._stacks for name, entry in stack.state().items()}

    def _warn_failures(self) -> None:
        """Name the layers whose inverse failed once the device has told: on a CPU at once, else some steps later."""
        while self._unread and self._unread[0].is_ready():
            names = self._unread.pop(0).failed_layers()
            if names:
                warnings.warn(
                    f"KFACPreconditioner: A or G of {', '.join(map(repr, names))} is not positive definite with this "
                    "damping; the last inverse is kept (the plain gradient where there is none)",
                    stacklevel=3,
                )

    # the direction

    def _precondition(self) -> None:
        products = []
        for stack in self._stacks:
            layers = [layer for layer in stack.layers if self._has_gradient(layer)]
            if layers:
                gradients = stack.gradients(layers)
                products.append((layers, gradients, stack.directions(layers, gradients)))
        if self.kl_clip is not None and products:
            nu = self._clip([(gradients, directions) for _, gradients, directions in products])
            torch._foreach_mul_([directions for _, _, directions in products], nu)
        for layers, _, directions in products:
            write_gradients_(layers, directions)

    def _has_gradient(self, layer: Layer) -> bool:
        parameters = [p for p in (layer.weight, layer.bias) if p is not None]
        missing = [p for p in parameters if p.grad is None]
        if missing and len(missing) < len(parameters):
            self._warn_once(
                f"weight or bias of layer {layer.name!r} has no gradient; that of the other is left as it is"
            )
        return not missing

    def _clip(self, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """nu, a 0-d tensor; products of gradients that carry the loss scale S are S^2 times as large."""
        change = torch.stack([torch.sum(gradients * directions) for gradients, directions in products]).sum()
        if self.grad_scaler is not None and not _is_unscaled(self.grad_scaler):
            change = change / self.grad_scaler.scale(torch.ones_like(change)) ** 2
        change = change * self._value("lr") ** 2
        return (self._value("kl_clip") / change.clamp_min(torch.finfo(change.dtype).tiny)).sqrt().clamp_max(1.0)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and containers, to be taken between steps; loadable with `torch.load(weights_only=True)`.

        `layers` has for each layer's name its factors "A", "G" and, once there, "A_inverse", "G_inverse"; `kinds` what
        the layer is made of.
        """
        curvature = self.curvature.state_dict()
        state: dict[str, Any] = {"step_count": self.step_count, "layers": {}}
        state |= {key: curvature[key] for key in ("generator", "reading")}
        if "layers" in curvature:
            state["updated"], state["kinds"] = curvature["started"], curvature["layers"]
            state["guard"] = curvature["guard"]
            for name in self.curvature.layers:
                state["layers"][name] = {kind: self.curvature.factors[f"{name}.{kind}"].clone() for kind in "AG"}
        for name, entry in self._inverse_state().items():
            state["layers"][name] |= entry
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of a preconditioner of a model of the same shapes, bit for bit.

        Options are not part of the state.

        Raises:
            ValueError: naming the first layer or factor that does not fit; nothing is changed then.
        """
        layers: Mapping[str, Mapping[str, Tensor]] = state["layers"]
        curvature = {
            "step_count": state["step_count"],
            "generator": state["generator"],
            "recent_calls": [],
            "reading": state["reading"],
        }
        if layers:
            factors = FactorSet.of({f"{name}.{kind}": entry[kind] for name, entry in layers.items() for kind in "AG"})
            curvature |= {
                "layers": state["kinds"],
                "started": state["updated"],
                "guard": state["guard"],
                "was_cut": True,  # eigenpairs are not part of this state
                "factors": factors.state_dict(),
            }
        self.curvature.load_state_dict(curvature)
        self.step_count = state["step_count"]
        inverted = frozenset(name for name, entry in layers.items() if "A_inverse" in entry)
        self._set_stacks(inverted, layers)
        self._unread, self._is_checked = [], False
        self._await_forwards()


class _InverseReport(NamedTuple):
    """Which blocks could not be inverted, on its way to the host."""

    failed: Tensor
    names: list[str]
    arrival: torch.cuda.Event | None

    @classmethod
    def of(cls, failed: Tensor, names: list[str]) -> _InverseReport:
        """`names` tells the layer of every block of `failed`."""
        if not failed.is_cuda:
            return cls(failed, names, None)
        with torch.cuda.device(failed.device):
            host = failed.to("cpu", non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        return cls(host, names, arrival)

    def is_ready(self) -> bool:
        """Whether reading it waits for nothing."""
        return self.arrival is None or self.arrival.query()

    def failed_layers(self) -> list[str]:
        """The layers of the blocks, each once."""
        return list(dict.fromkeys(self.names[i] for i in self.failed.nonzero().flatten().tolist()))


def _check_parameters(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """ValueError where the gradient of a layer's parameter is not that of this place in the network alone."""
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    for name, layer in layers.items():
        for kind, key, parameter in (("weight", layer.weight_key, layer.weight), ("bias", layer.bias_key, layer.bias)):
            if parameter is None:
                continue
            if key not in layer.module._parameters:
                raise ValueError(
                    f"KFACPreconditioner: the {kind} of layer {name!r} is computed from other parameters, whose "
                    "gradients cannot be preconditioned; name the layer in skip_layers"
                )
            if len(owners[parameter]) > 1:
                raise ValueError(
                    f"KFACPreconditioner: the {kind} of layer {name!r} is shared by the modules "
                    f"{', '.join(map(repr, owners[parameter]))}; name them in skip_layers"
                )


def _is_unscaled(scaler: GradScaler) -> bool:
    """Whether `unscale_` has been called since the last `update`; torch itself keeps it in this place only."""
    return any(state["stage"] is OptState.UNSCALED for state in scaler._per_optimizer_states.values())
