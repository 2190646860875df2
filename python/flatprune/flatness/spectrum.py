"""The flatness term: the gradient of the blocks' spectral radii, added to the loss.

J = L + strength L_0 (1/B) sum over the B layers of max(0, log(rho_l / K_l)), rho_l = lambda_1(A_l) lambda_1(G_l), L_0
the loss that training began with. After Sandler, Klabjan, Luo (arXiv 2102.11210: f + mu max(0, rho - K), gradient
v^T (dH) v with the eigenvector held); the logarithm, the sum over blocks, the scale and the estimate are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatprune.flatness.hessian import hessian_lambda_max
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.capture import UNSEEN, Capture
from kfac_ext.curvature.fisher import projected_gradients, projected_inputs
from kfac_ext.curvature.modes import device_of, reading_is_free, undisturbed
from kfac_ext.curvature.probing import observe
from kfac_ext.curvature.recent import Call
from kfac_ext.curvature.running import ROUNDING
from kfac_ext.curvature.samples import Layout
from kfac_ext.layers import Layer

__all__ = ["Flatness", "hessian_lambda_max"]

MODES = ("forward", "double_backward")
STRENGTH = 0.003
_STEP_SIZE = 0.1  # length of the largest shift of a z in mode "forward", as a part of the root mean square of |z|
_LEAST_KAPPA = 1e-4  # no block is pressed below this part of its radius, also with kappa 0: rho -> 0 is a dead network


class _Block(NamedTuple):
    """One layer's part: unit vectors (zero but in the group of the largest radius), weights c lambda; all constant."""

    layer: Layer
    u: Tensor
    s: Tensor
    input_weight: Tensor  # c_l lambda(G_l) = 1 / (B lambda(A_l)), 0 below the floor
    gradient_weight: Tensor  # c_l lambda(A_l) = 1 / (B lambda(G_l)), 0 below the floor


class Flatness:
    """Penalises the spectral radii of the curvature blocks while the model trains.

    With c_l = 1/(B rho_l) for blocks above their floor, u_l and s_l the top eigenvectors of A_l and G_l, the gradient
    is that of sum over l of c_l lambda(G_l) mean (u.a)^2 + c_l lambda(A_l) mean (s.g)^2, times strength L_0, L_0 the
    first loss: a scale that has the loss's units and stays, since the loss itself vanishes where a network fits its
    training set, and a term in proportion to it would vanish with it. The second part is computed by

    - "forward" (default): one more forward with every z_l moved by eps r sqrt(c_l lambda(A_l)) s_l, r = +-1 drawn per
      sample and block; t = (change of the output) / eps; mean[sum p t^2 - (sum p t)^2], p the softmax. Its mean over r
      is sum c_l lambda(A_l) s^T G s with G the exact Fisher (GGN) factor of the batch, up to O(eps^2);
    - "double_backward": gradients g of a sampled loss that can be differentiated again, exact for these labels.

    The extra forward draws the same dropout masks as the user's and leaves running statistics and random streams as
    they are. `K_l = kappa rho_l` at the end of warm-up; a kappa below 1e-4 acts as 1e-4, so that no block is driven
    to nothing, and blocks below 1e-10 of the largest radius, which are rounding, are left alone. Where the network has
    shrunk below `fade_below` of its parameters the strength falls, to nothing at half of that.

    Args:
        curvature: of the model that is trained.
        total_steps: calls of `penalty` in the whole training.
        strength: alpha.
        kappa: floor as a part of the radius after warm-up.
        every: the penalty is computed on every so many calls, with so many times the weight; None: 4 without
            convolutions, 8 with.
        start: warm-up, a part (< 1) of `total_steps` or a number of calls (int).
        mode: "forward" or "double_backward".
        fade_below: see above; 0: never fades.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> flatness = Flatness(curvature, total_steps=1000)
        >>> logits = model(x)
        >>> loss = criterion(logits, y)
        >>> (loss + flatness.penalty(x, logits, loss)).backward()
    """

    def __init__(
        self,
        curvature: Curvature,
        *,
        total_steps: int | None = None,
        strength: float = STRENGTH,
        kappa: float = 0.0,
        every: int | None = None,
        start: float | int = 0.1,
        mode: str = "forward",
        fade_below: float = 0.05,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Flatness: mode is {mode!r}, expected 'forward' or 'double_backward'")
        if every is not None and every < 1:
            raise ValueError(f"Flatness: every is {every}, expected >= 1")
        for name, value in (("strength", strength), ("kappa", kappa), ("fade_below", fade_below), ("start", start)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"Flatness: {name} is {value!r}, expected a number >= 0")
        if not curvature.loss.needs_output:
            raise ValueError("Flatness: the curvature's loss is 'other', of which nothing is known; name the loss")
        self.curvature, self.mode, self.fade_below = curvature, mode, fade_below
        self.strength, self.kappa, self._every = strength, kappa, every
        self.warmup_steps = _warmup_steps(start, total_steps)
        self.step_count = 0
        self.floors: dict[str, Tensor] | None = None  # K_l, from the end of warm-up on
        self._start_step = 0
        self._scale: Tensor | None = None  # the first loss
        self._full_size = self._size()
        self._ask_for_record()

    @property
    def every(self) -> int:
        """The calls from one penalty to the next."""
        if self._every is not None:
            return self._every
        return 8 if self.curvature.has_convolutions else 4

    def penalty(self, x: Any, logits: Tensor, loss: Tensor) -> Tensor:
        """A 0-d tensor to add to the loss before `backward()`: 0 in warm-up and between the steps it acts on.

        Its gradient is what counts: it is that of strength L_0 (1/B) sum log rho_l; its value is not that sum's.
        Under gradient accumulation call it for every batch with the batch's mean loss, and divide the sum of both.
        If `logits` is not the very tensor the model returned (or the forward ran in autocast, or in mode
        "double_backward" through a fused attention, which has no second derivative), the forward is repeated.

        Args:
            x: what the model was given: a tensor, a tuple of its positional inputs, a dict of keywords, or a
                `kfac_ext.curvature.recent.Call`; read where the forward is repeated.
            logits: what it returned, or of that what the loss is of.
            loss: the mean loss of these, with its graph.

        Raises:
            RuntimeError: warm-up is over and the curvature has seen no forward of the model, so that the term cannot
                begin; a warning says so at the first call.
        """
        if not self.curvature.step_count and len(logits):
            self._tell_of_unseen_forwards()
        self.curvature.settle(loss)
        self._take_scale(loss)
        if self.floors is None and self.step_count >= self.warmup_steps and self.curvature.is_updated:
            self.end_warmup()
        value = self._value(x, logits) if self._acts() and len(logits) and self._scale is not None else None
        self.step_count += 1
        self._ask_for_record()
        return loss.new_zeros(()) if value is None else value.to(loss.dtype)

    def _tell_of_unseen_forwards(self) -> None:
        message = f"Flatness: the term cannot begin, the model has made no training forward; {UNSEEN}"
        if self.step_count >= self.warmup_steps:
            raise RuntimeError(message)
        if self.step_count == 0:
            warnings.warn(message, stacklevel=3)

    def end_warmup(self) -> None:
        """Fix the floors K_l as they stand; the next step is penalised.

        Raises:
            RuntimeError: before the first factors.
        """
        kappa = max(self.kappa, _LEAST_KAPPA)
        self.floors = {name: kappa * rho for name, rho in self.curvature.spectral_radii().items()}
        self._start_step = self.step_count
        self._ask_for_record()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "step_count": self.step_count,
            "start_step": self._start_step,
            "full_size": self._full_size,
            "floors": None if self.floors is None else {name: k.clone() for name, k in self.floors.items()},
            "scale": self._scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, bit for bit."""
        device = device_of(self.curvature.model)
        floors = state["floors"]
        self.floors = None if floors is None else {name: k.to(device) for name, k in floors.items()}
        self._scale = None if state["scale"] is None else state["scale"].to(device)
        self.step_count, self._start_step = state["step_count"], state["start_step"]
        self._full_size = state["full_size"]
        self._ask_for_record()

    def _ask_for_record(self) -> None:
        """Have the next training forward recorded if the next call of `penalty` acts (or may act) on it."""
        if self._acts() or (self.floors is None and self.step_count >= self.warmup_steps):
            self.curvature.recorder.ask()

    def _acts(self) -> bool:
        return self.floors is not None and (self.step_count - self._start_step) % self.every == 0

    def _take_scale(self, loss: Tensor) -> None:
        """Take the first loss that is finite, of the whole batch where ranks share it."""
        if self._scale is None:
            group = self.curvature.group
            first = loss.detach().clone() if group is None else group.start_mean(loss, "loss")()
            self._scale = first if bool(first.isfinite()) else None

    def _weight(self) -> Tensor:
        """strength L_0 every, faded."""
        assert self._scale is not None
        return self.strength * self.every * self._fade() * self._scale

    def _fade(self) -> float:
        """1 down to `fade_below` of the parameters, 0 from half of that on."""
        if self.fade_below == 0:
            return 1.0
        return min(max(2 * self._size() / self._full_size / self.fade_below - 1, 0.0), 1.0)

    def _size(self) -> int:
        return sum(p.numel() for p in self.curvature.model.parameters())

    def _value(self, x: Any, logits: Tensor) -> Tensor | None:
        if self.strength * self._fade() == 0:
            return None
        weight, blocks = self._weight(), self._blocks()
        if not blocks:
            return None
        capture = self._capture(x, logits)
        blocks = [block for block in blocks if block.layer.name in capture.names]
        mode = self.curvature.kfac_approx
        with torch.autocast(logits.device.type, enabled=False):
            total = logits.new_zeros(())
            for block in blocks:
                seen = capture.inputs(block.layer.name)
                if any(a.requires_grad for a in seen):  # the data themselves have no gradient
                    values = projected_inputs(block.layer, seen, block.u, mode)
                    total = total + block.input_weight * values.square().mean(dim=0).sum()
            second = self._forward_part if self.mode == "forward" else self._double_backward_part
            return weight * (total + second(blocks, capture))

    def _capture(self, x: Any, logits: Tensor) -> Capture:
        """The user's forward if it was recorded and can be differentiated as often as it must be, else one more."""
        record = self.curvature.recorder.take(logits)
        if record is not None and (self.mode == "forward" or not _has_fused_attention(logits)):
            return record
        call = Call.from_inputs(x, self.curvature.model.forward)
        if self.mode == "forward":
            return observe(self.curvature, *call.args, **call.kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return observe(self.curvature, *call.args, **call.kwargs)

    def _blocks(self) -> list[_Block]:
        """The blocks above their floor; on a GPU all, those below with weight 0, so that the host need not wait."""
        radii, factors, floors = self.curvature.spectral_radii(), self.curvature.factors, self.floors
        assert floors is not None
        noise = ROUNDING * torch.stack(list(radii.values())).max()
        above = {name: radii[name] > torch.maximum(floors[name], noise) for name in radii if name in floors}
        look = reading_is_free(factors.buffer.device)
        blocks = []
        for name in (name for name in above if not look or bool(above[name])):
            u, s = factors.vector(f"{name}.A"), factors.vector(f"{name}.G")
            value_a, value_g = factors.eigenvalue(f"{name}.A"), factors.eigenvalue(f"{name}.G")
            if value_a.dim():
                best = (value_a * value_g).argmax() == torch.arange(len(value_a), device=value_a.device)
                best = best.to(value_a.dtype)
                u, s = best[:, None] * u, best[:, None] * s
                value_a, value_g = best @ value_a, best @ value_g
            layer = self.curvature.layers[name]
            weights = [1 / (len(radii) * value) for value in (value_a, value_g)]
            if not look:
                weights = [torch.where(above[name], weight, 0.0) for weight in weights]
            # copies: the factors' views may be overwritten before backward is called
            blocks.append(_Block(layer, u.clone(), s.clone(), *weights))
        return blocks

    def _double_backward_part(self, blocks: list[_Block], capture: Capture) -> Tensor:
        """Sum over blocks of c lambda(A) mean (s.g)^2, g from labels drawn from the model's prediction."""
        curvature, output = self.curvature, capture.prediction
        if capture.targets is None:
            capture.targets = curvature.loss.draw(output, curvature.draws)
        # the label's gradient depends on the output too, through the softmax
        seed = curvature.loss.gradient(output, capture.targets, capture.counted)
        loss_gradients = capture.gradients_of(output, seed, create_graph=True)
        count, total = capture.terms(curvature.loss), output.new_zeros(())
        for block in blocks:
            found = capture.samples_first(block.layer.name, loss_gradients[block.layer.name])
            grads = [g for g in found if g is not None]
            if grads:
                values = projected_gradients(block.layer, grads, block.s, curvature.kfac_approx)
                total = total + block.gradient_weight * values.square().sum() / count
        return total

    def _forward_part(self, blocks: list[_Block], capture: Capture) -> Tensor:
        """The same, its expectation over labels, from the change of the output in one forward with moved z."""
        curvature, output = self.curvature, capture.prediction
        lengths = torch.stack([block.gradient_weight for block in blocks]).sqrt()
        squares = self._z_squares(capture)
        sizes = torch.stack([squares[block.layer.name] for block in blocks]).sqrt()
        longest = (lengths / sizes).max()
        step = _STEP_SIZE / torch.where(longest > 0, longest, 1.0)  # 0: no block is above its floor
        shifts = {block.layer.name: (length * step) * block.s.flatten() for block, length in zip(blocks, lengths)}
        signs: dict[str, Tensor] = {}

        def move(layer: Layer, _x: Tensor, z: Tensor) -> Tensor:
            axis = 1 if layer.is_convolution else z.dim() - 1
            shift = shifts[layer.name].to(z.dtype).view([-1 if d == axis else 1 for d in range(z.dim())])
            layout = capture.layouts.get(layer.name, [Layout()])[0]
            if curvature.kfac_approx == "expand":  # positions and calls apart
                shape = [1 if d == axis else n for d, n in enumerate(z.shape)]
                return z + curvature.draws.signs(shape, z, layout.dim) * shift
            sign = signs.get(layer.name)
            if sign is None:
                sign = signs[layer.name] = curvature.draws.signs([len(layout.samples_first(z, capture.samples))], z)
            return z + layout.spread(sign, z) * shift

        layers = [block.layer for block in blocks]
        with curvature.paused(), undisturbed(curvature.model, capture.rng), call_hooks(layers, move):
            moved = curvature.reading.read(curvature.model(*capture.call.args, **capture.call.kwargs))
        return curvature.loss.variance(output, (moved - output) / step)

    def _z_squares(self, capture: Capture) -> dict[str, Tensor]:
        """Layer -> mean of |z|^2, over all ranks: what moves z is to be as long on one as on all."""
        group, names = self.curvature.group, list(capture.z_squares)
        if group is None:
            return capture.z_squares
        return dict(zip(names, group.mean([capture.z_squares[name] for name in names], "sizes of z")))


def _has_fused_attention(output: Tensor) -> bool:
    """Whether a fused `scaled_dot_product_attention`, which has no second derivative, is in the graph of `output`."""
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith("ScaledDotProduct"):
            return True
        seen.add(node)
        todo += [source for source, _ in node.next_functions]
    return False


def _warmup_steps(start: float | int, total_steps: int | None) -> int:
    if isinstance(start, int):
        return start
    if start >= 1:
        raise ValueError(f"Flatness: start is {start}, expected a part < 1 of total_steps or an int number of steps")
    if total_steps is None:
        raise ValueError(f"Flatness: start={start} is a part of total_steps, which is missing")
    if total_steps < 1:
        raise ValueError(f"Flatness: total_steps is {total_steps}, expected >= 1")
    return round(start * total_steps)
