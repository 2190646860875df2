"""Sharpness-aware minimisation (SAM) and momentum-SAM, the rivals that the flatness term is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flatprune.moved import moved_models, refuse_moved
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.capture import ForwardHook
from kfac_ext.curvature.curvature import unwrapped
from kfac_ext.curvature.modes import RngState, device_of, reading_is_free, undisturbed

_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


class SAM:
    """Replaces the gradient g at w by the one at w + radius g / |g| (Foret et al. 2021, arXiv 2010.01412).

    The parameters are moved, the loss of the same batch is differentiated there, and the parameters are put back, bit
    for bit. The second pass draws the same dropout masks and leaves running statistics, random streams and the
    curvature's factors as they are. |g| is the norm over all parameters together. It costs one more forward and
    backward on the steps it acts on.

    Args:
        model: the network; the optimizer may be any. Of a `DistributedDataParallel` the gradients at the moved point
            are averaged over ranks, as those at hand are.
        radius: length of the move.
        every: acts on every so many calls, the first one included; the other calls cost nothing.
        curvature: of the model, where there is one, so that the second pass does not count for it.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> sam = SAM(model)
        >>> optimizer.zero_grad()
        >>> criterion(model(x), y).backward()
        >>> sam.replace_gradients(lambda: criterion(model(x), y))
        >>> optimizer.step()
    """

    def __init__(
        self, model: nn.Module, *, radius: float = 0.1, every: int = 1, curvature: Curvature | None = None
    ) -> None:
        _check_radius("SAM", radius)
        if every < 1:
            raise ValueError(f"SAM: every is {every}, expected >= 1")
        self._wrapper = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        if curvature is not None and model is curvature.model:
            self.group = curvature.group
        else:
            model, self.group = unwrapped(model, None, "SAM")
        if curvature is not None and curvature.model is not model:
            raise ValueError("SAM: the curvature belongs to another model")
        self.model, self.radius, self.every, self.curvature = model, radius, every, curvature
        self.step_count = 0
        self._rng: RngState | None = None  # before the first training forward of this step
        self._handle = model.register_forward_pre_hook(ForwardHook(self._before_forward), with_kwargs=True)

    def replace_gradients(self, closure: Callable[[], Tensor]) -> Tensor | None:
        """Put the gradients of `closure` at the moved point in place of those at hand; once a step, after `backward`.

        Args:
            closure: computes the loss whose gradients are at hand again (scaled alike, if it was scaled), and does
                not call `backward`.

        Returns:
            The loss at the moved point, detached; None on the steps between. Where the gradients at hand are all
            zero or not finite there is no direction to move in: they stay, and the result is None too; on a GPU, which
            is not waited for, it is the loss where the parameters are.

        Raises:
            RuntimeError: no parameter has a gradient. Parameters and gradients are as before whatever is raised,
                also by `closure`.
        """
        acts, rng = self.step_count % self.every == 0, self._rng
        value = self._replace(closure, rng) if acts else None
        self.step_count += 1
        self._rng = None
        return value

    def remove(self) -> None:
        """Take the hook off the model. Calling it twice does nothing."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of calls."""
        return {"step_count": self.step_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, bit for bit."""
        self.step_count, self._rng = state["step_count"], None

    def _before_forward(self, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        first = self._rng is None and self.step_count % self.every == 0
        if first and self.model.training and torch.is_grad_enabled():
            self._rng = RngState.now(device_of(self.model))

    def _replace(self, closure: Callable[[], Tensor], rng: RngState | None) -> Tensor | None:
        moving = [p for p in self.model.parameters() if p.grad is not None]
        if not moving:
            raise RuntimeError("SAM: no parameter has a gradient, call backward() of the loss before")
        gradients = [p.grad for p in moving if p.grad is not None]
        norm = _length(gradients)
        usable = (norm > 0) & norm.isfinite()
        look = reading_is_free(norm.device)
        if look and not bool(usable):
            return None
        directions = gradients if look else [torch.where(usable.to(g.device), g, 0.0) for g in gradients]
        paused = nullcontext() if self.curvature is None else self.curvature.paused()
        unsynced = nullcontext() if self._wrapper is None else self._wrapper.no_sync()  # its backward is not the DDP's
        moved = _moved(self.model, moving, directions, self.radius / torch.where(usable, norm, 1.0))
        with paused, unsynced, undisturbed(self.model, rng), moved, torch.enable_grad():
            loss = closure()
            found = torch.autograd.grad(loss, moving, allow_unused=True, materialize_grads=True)
        if self.group is not None:
            found = tuple(self.group.mean(found, "gradients of SAM"))
        with torch.no_grad():
            for gradient, new in zip(gradients, found):  # in place: gradients may be views of one buffer
                gradient.copy_(new if look else torch.where(usable.to(new.device), new, gradient))
        return loss.detach()


class MomentumSAM:
    """Takes the gradient at w - radius v / |v|, v the optimizer's momentum (Becker et al. 2024, arXiv 2401.12033).

    v is what the optimizer keeps anyway: `momentum_buffer` of SGD (v <- mu v + g, then w <- w - lr v), `exp_avg` of
    Adam and its like (not divided by the second moments), weight decay included where the optimizer adds it to g. |v|
    is its norm over all parameters together. So the move goes *on* in the direction of the last step, where SAM goes
    along +g: having come that far, the steps overshoot what is narrow, and -v points uphill there.

    Inside `moved()` the parameters are moved; forward and backward are called there, `optimizer.step()` after it, when
    they are again what they were, bit for bit. Before the first step of the optimizer there is no v and no move.
    Between two steps nothing is kept, so there is nothing to save or to resume; the momentum is the optimizer's, which
    removals cut with the parameters. A removal, a step or a second `moved()` inside raises RuntimeError.

    The forward is the only one, so running statistics of batch norms and a `Curvature`'s factors are measured at the
    moved point: a forward at w for them alone would cost what the method saves.

    Args:
        model: the network, or a `DistributedDataParallel` of it.
        optimizer: of its parameters, with momentum.
        radius: length of the move.

    Raises:
        ValueError: radius out of range; a group of the optimizer has no momentum.

    Example:
        >>> msam = MomentumSAM(model, optimizer, radius=0.3)
        >>> optimizer.zero_grad()
        >>> with msam.moved():
        ...     criterion(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, radius: float = 0.3) -> None:
        _check_radius("MomentumSAM", radius)
        model, _ = unwrapped(model, None, "MomentumSAM")
        for number, group in enumerate(optimizer.param_groups):
            if not group.get("momentum", group.get("betas", (0.0,))[0]):
                raise ValueError(
                    f"MomentumSAM: group {number} of {type(optimizer).__name__} has no momentum, expected momentum (or "
                    "the first of betas) above 0"
                )
        self.model, self.optimizer, self.radius = model, optimizer, radius

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Inside, the parameters are at w - radius v / |v|; a v that is zero moves nothing.

        Raises:
            RuntimeError: the parameters are moved already, or the optimizer has taken steps and keeps no momentum
                under a name known here.
        """
        refuse_moved(self.model, "MomentumSAM.moved")
        pairs = list(self._momenta())
        if self.optimizer.state and not pairs:
            keys = " or ".join(map(repr, _MOMENTUM_KEYS))
            raise RuntimeError(
                f"MomentumSAM: {type(self.optimizer).__name__} keeps no {keys} of the model's parameters"
            )
        parameters, momenta = [p for p, _ in pairs], [v for _, v in pairs]
        step_hook = self.optimizer.register_step_pre_hook(self._refuse_step)
        try:
            with _moved(self.model, parameters, momenta, self._scale(momenta)):
                yield
        finally:
            step_hook.remove()

    def _momenta(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self.model.parameters():
            state = self.optimizer.state.get(parameter, {})
            momentum = next((state[key] for key in _MOMENTUM_KEYS if state.get(key) is not None), None)
            if momentum is not None:
                yield parameter, momentum

    def _scale(self, momenta: list[Tensor]) -> Tensor:
        """- radius / |v|, or 0 where v is zero; without a wait for the device."""
        if not momenta:
            return torch.zeros(())
        scale = -self.radius / _length(momenta)
        return torch.where(scale.isfinite(), scale, 0.0)

    @staticmethod
    def _refuse_step(*_: Any) -> NoReturn:
        raise RuntimeError("MomentumSAM: optimizer.step() inside of moved(), expected after it")


def _check_radius(caller: str, radius: float) -> None:
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"{caller}: radius is {radius}, expected a number above 0")


def _length(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


@contextmanager
def _moved(model: nn.Module, parameters: list[nn.Parameter], directions: list[Tensor], scale: Tensor) -> Iterator[None]:
    """Inside, the parameters are further by `scale` times the directions; afterwards exactly what they were."""
    kept = [p.detach().clone() for p in parameters]
    moved_models.add(model)
    try:
        with torch.no_grad():
            for p, direction in zip(parameters, directions):
                p.add_(direction * scale.to(direction.device))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept):
                p.copy_(value)
        moved_models.discard(model)
