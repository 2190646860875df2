"""Sharpness-aware minimisation (SAM), the rival that the flatness term is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_ext.curvature import Curvature
from kfac_ext.curvature.capture import ForwardHook
from kfac_ext.curvature.layers import RngState, device_of, undisturbed


class SAM:
    """Replaces the gradient g at w by the one at w + radius g / |g| (Foret et al. 2021, arXiv 2010.01412).

    The parameters are moved, the loss of the same batch is differentiated there, and the parameters are put back, bit
    for bit. The second pass draws the same dropout masks and leaves running statistics, random streams and the
    curvature's factors as they are. |g| is the norm over all parameters together. It costs one more forward and
    backward on the steps it acts on.

    Args:
        model: the network; the optimizer may be any.
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
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"SAM: radius is {radius}, expected a number above 0")
        if every < 1:
            raise ValueError(f"SAM: every is {every}, expected >= 1")
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
            zero or not finite there is no direction to move in: they stay, and the result is None too.

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
        norm = torch.stack([g.norm() for g in gradients]).norm()
        if not 0 < float(norm) < math.inf:
            return None
        paused = nullcontext() if self.curvature is None else self.curvature.paused()
        moved = _moved(moving, gradients, self.radius / norm)
        with paused, undisturbed(self.model, rng), moved, torch.enable_grad():
            loss = closure()
            found = torch.autograd.grad(loss, moving, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for gradient, new in zip(gradients, found):
                gradient.copy_(new)  # in place: gradients may be views of one buffer
        return loss.detach()


@contextmanager
def _moved(parameters: list[nn.Parameter], directions: list[Tensor], scale: Tensor) -> Iterator[None]:
    """Inside, the parameters are further by `scale` times the directions; afterwards exactly what they were."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, direction in zip(parameters, directions):
                p.add_(direction * scale.to(direction.device))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept):
                p.copy_(value)
