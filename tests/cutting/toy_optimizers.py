"""Optimizers that keep what others' do: in nested states, in attributes, in blocks, in factors, in objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Toy(torch.optim.Optimizer):
    """Plain gradient descent; `keep` fills the state of each parameter at its first step."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def keep(self, p: Tensor) -> dict:
        return {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update(self.keep(p))
                p.sub_(group["lr"] * p.grad)


class Nested(Toy):
    """Several averages in a dict, and the last gradients in a list (as AggMo and AdaShift)."""

    def keep(self, p):
        return {"averages": {0.9: torch.zeros_like(p), 0.99: torch.ones_like(p)}, "last": [p.grad.clone()], "count": 3}


class Flat(Toy):
    """The first values in a row (as Prodigy)."""

    def keep(self, p):
        return {"start": p.flatten().clone(), "step": torch.zeros(())}


class PerAxis(Toy):
    """One accumulator a dimension (as SM3), and one number a row (as Nero)."""

    def keep(self, p):
        shapes = ([n if d == i else 1 for d, n in enumerate(p.shape)] for i in range(p.dim()))
        return {f"accumulator_{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}


class SlowWeights(torch.optim.Optimizer):
    """A wrapper: weights that follow those of another optimizer, kept beside its state (as some Lookaheads)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}
        self.slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group, slow in zip(self.param_groups, self.slow):
            for p, s in zip(group["params"], slow):
                s.lerp_(p, 0.5)
                p.copy_(s)


class Preconditioned(Toy):
    """A matrix for each dimension (as Shampoo): of a square weight it has the weight's own shape."""

    def keep(self, p):
        return {f"pre_cond_{i}": torch.eye(n) for i, n in enumerate(p.shape)} if p.dim() == 2 else {}


class Closured(Preconditioned):
    """Steps on a closure alone (as SAM)."""

    def step(self, closure=None):
        assert closure is not None, "a closure is wanted"
        with torch.enable_grad():
            closure()
        super().step()


class Rotated(Toy):
    """Averages of the weight's shape, in a basis of a list of matrices (as SOAP)."""

    def keep(self, p):
        return {"exp_avg_sq": torch.zeros_like(p), "Q": [torch.eye(n) for n in p.shape] if p.dim() == 2 else []}


class Quantised(Toy):
    """Bytes and a scale for each block of 8 entries (as 8-bit Adam); there may be as many blocks as rows."""

    def keep(self, p):
        return {"state1": torch.zeros_like(p, dtype=torch.uint8), "absmax1": torch.zeros(-(-p.numel() // 8))}


class Bytes(torch.Tensor):
    """A tensor that stands for something else."""


class Packed(Toy):
    """States of a class of their own."""

    def keep(self, p):
        return {"exp_avg": torch.zeros_like(p).as_subclass(Bytes)}


class Projector:
    """An object that keeps a matrix."""

    def __init__(self, p: Tensor) -> None:
        self.matrix = p.detach().clone()


class Projected(Toy):
    """An object in the state (as GaLore)."""

    def keep(self, p):
        return {"projector": Projector(p)}


class Copies(Toy):
    """All parameters in one piece, beside the state (as optimizers with master weights)."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self.flat = nn.utils.parameters_to_vector([p for g in self.param_groups for p in g["params"]]).detach()


class Shared(Toy):
    """A tensor under a name instead of a parameter."""

    def __init__(self, params, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        self.state["history"] = torch.zeros(7)


class Later(Toy):
    """Begins to keep something that cannot be cut when it has taken a number of steps."""

    def __init__(self, params, after: int) -> None:
        super().__init__(params)
        self.left = after

    def step(self, closure=None):
        super().step()
        self.left -= 1
        if self.left == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["basis"] = torch.zeros(p.shape[0] + 1, 2)
