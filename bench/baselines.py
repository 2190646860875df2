"""Plain PyTorch as users write it, layer by layer: what every case is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.worksets import LayerShape
from kfac_ext import reference

# ---- covariance of layer inputs ----


def rows_covariance(x: Tensor) -> Tensor:
    """A of a linear layer: one matmul."""
    return x.T @ x / x.shape[0]


def unfold_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    """F.unfold, then one matmul; grouped convolutions one block a group."""
    patches = F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)  # [N, C k k, S]
    if layer.groups > 1:
        rows = patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        return rows.mT @ rows / rows.shape[1]
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return rows.T @ rows / rows.shape[0]


def strided_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    """Patches as a strided view (Tensor.unfold), copied to rows once, then one matmul."""
    image = F.pad(x, (layer.padding,) * 4)
    windows = image.unfold(2, layer.kernel, layer.stride).unfold(3, layer.kernel, layer.stride)  # [N, C, H, W, k, k]
    if layer.groups > 1:
        windows = windows.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 4, 2, 5, 6)
        rows = windows.reshape(layer.groups, -1, layer.patch)
        return rows.mT @ rows / rows.shape[1]
    rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.patch)
    return rows.T @ rows / rows.shape[0]


def gradient_covariance(g: Tensor) -> Tensor:
    """G of [N, O] or [N, O, H, W]: channels last, then one matmul."""
    rows = g if g.dim() == 2 else g.permute(0, 2, 3, 1).reshape(-1, g.shape[1])
    return rows.T @ rows / g.shape[0]


def by_unfold(x: Tensor, layer: LayerShape) -> Tensor:
    """A of a layer of either kind, convolutions by F.unfold."""
    return unfold_covariance(x, layer) if layer.is_convolution else rows_covariance(x)


def by_strides(x: Tensor, layer: LayerShape) -> Tensor:
    """A of a layer of either kind, convolutions by a strided view."""
    return strided_covariance(x, layer) if layer.is_convolution else rows_covariance(x)


def has_shifts(layer: LayerShape) -> bool:
    """Whether `by_shifts` differs from `by_strides`."""
    return layer.is_convolution and layer.kernel > 1 and layer.stride == 1 and layer.groups == 1


def by_shifts(x: Tensor, layer: LayerShape) -> Tensor:
    """A of a layer of either kind; where the stride is 1, all shifts at once as the gradient of a weight."""
    if not has_shifts(layer):
        return by_strides(x, layer)
    return reference.conv2d_covariance_by_shifts(x, layer.kernel, padding=layer.padding)


def blend_(average: Tensor, value: Tensor, decay: float, scale: float) -> Tensor:
    """A running average as everyone writes it."""
    return average.mul_(decay).add_(value, alpha=scale)


# ---- inverses ----


def _damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def linalg_inverses(matrices: Sequence[Tensor], damping: float) -> list[Tensor]:
    """torch.linalg.inv of each damped matrix."""
    return [torch.linalg.inv(_damped(m, damping)) for m in matrices]


def cholesky_inverses(matrices: Sequence[Tensor], damping: float) -> list[Tensor]:
    """cholesky_ex and cholesky_inverse of each damped matrix."""
    return [torch.cholesky_inverse(torch.linalg.cholesky_ex(_damped(m, damping))[0]) for m in matrices]


# ---- power iteration ----


def power_loop(matrices: Sequence[Tensor], vectors: Sequence[Tensor], tol: float, max_iter: int) -> list[Tensor]:
    """Matrix by matrix until |A v - lambda v| <= tol lambda, tested every step; the eigenvalues."""
    values = []
    for matrix, vector in zip(matrices, vectors):
        for _ in range(max_iter):
            image = matrix @ vector
            value = vector @ image
            residual = (image - value * vector).norm()
            vector = image / image.norm()
            if residual.item() <= tol * value.item():
                break
        values.append(value)
    return values


def power_steps(matrices: Sequence[Tensor], vectors: Sequence[Tensor], steps: int) -> list[Tensor]:
    """So many steps matrix by matrix, none of them tested; the eigenvalues."""
    values = []
    for matrix, vector in zip(matrices, vectors):
        for _ in range(steps):
            image = matrix @ vector
            value = vector @ image
            vector = image / image.norm()
        values.append(value)
    return values


def matrix_free_steps(x: Tensor, layer: LayerShape, steps: int) -> Tensor:
    """So many steps with A v = X^T (X v), by a convolution and the gradient of its weight; the eigenvalue."""
    vector = x.new_ones(layer.patch) / layer.patch**0.5
    shape = (1, layer.channels, layer.kernel, layer.kernel)
    for _ in range(steps):
        if layer.is_convolution:
            place = {"stride": layer.stride, "padding": layer.padding}
            dots = F.conv2d(x, vector.view(shape), **place)
            image = torch.nn.grad.conv2d_weight(x, shape, dots, **place).flatten() / dots.numel()
        else:
            image = x.T @ (x @ vector) / len(x)
        value = vector @ image
        vector = image / image.norm()
    return value


def eigvalsh_largest(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The largest eigenvalue from a full decomposition."""
    return [torch.linalg.eigvalsh(m)[-1] for m in matrices]


# ---- saliency ----


def neuron_loop(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int]
) -> list[Tensor]:
    """1/2 tr(V_J^T G V_J (H_JJ)^-1), one neuron after the other."""
    scores = []
    for V, H, G, block in zip(weights, inverses, Gs, blocks):
        values = []
        for start in range(0, V.shape[1] // block * block, block):
            J = slice(start, start + block)
            form = V[:, J].T @ G @ V[:, J]
            values.append(0.5 * (form * torch.linalg.inv(H[J, J])).sum())
        scores.append(torch.stack(values))
    return scores


# ---- whole steps ----


class HookedFactors:
    """Factors of every layer by hooks, F.unfold and matmul: the loop found in most K-FAC code (empirical Fisher)."""

    def __init__(self, model: nn.Module, decay: float = 0.95) -> None:
        self.decay = decay
        self.enabled = True
        self.A: dict[nn.Module, Tensor] = {}
        self.G: dict[nn.Module, Tensor] = {}
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not self.enabled:
            return
        x = inputs[0].detach()
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
            x = x.transpose(1, 2)
        x = x.reshape(-1, x.shape[-1])  # positions as samples
        if module.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self._blend(self.A, module, x.T @ x / len(x))
        output.register_hook(lambda g: self._backward(module, g))

    def _backward(self, module: nn.Module, g: Tensor) -> None:
        g = g.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else g
        rows = g.reshape(-1, g.shape[-1])
        self._blend(self.G, module, rows.T @ rows * len(g))  # gradients of the mean loss

    def _blend(self, factors: dict[nn.Module, Tensor], module: nn.Module, value: Tensor) -> None:
        if module in factors:
            factors[module].mul_(self.decay).add_(value, alpha=1 - self.decay)
        else:
            factors[module] = value


class HookedPreconditioner:
    """K-FAC as kfac-pytorch does it, layer by layer, on factors by hooks: `backward()`, `step()`, `optimizer.step()`.

    "eigh": both factors are decomposed and (A (x) G + damping I)^-1 is applied in the eigenbases; "inv": each factor is
    inverted with the damping added to it.
    """

    def __init__(
        self, model: nn.Module, method: str, *, damping: float, kl_clip: float, lr: float, update_steps: int = 1
    ) -> None:
        self.factors = HookedFactors(model)
        self.method, self.damping, self.kl_clip, self.lr = method, damping, kl_clip, lr
        self.update_steps, self.step_count = update_steps, 0
        self.inverses: dict[nn.Module, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Renew the inverses if they are due, then replace every gradient."""
        if self.step_count % self.update_steps == 0:
            for module, A in self.factors.A.items():
                self.inverses[module] = self._inverse(A, self.factors.G[module])
        directions, change = {}, 0.0
        for module, inverse in self.inverses.items():
            gradient = module.weight.grad.flatten(1)
            if module.bias is not None:
                gradient = torch.cat([gradient, module.bias.grad[:, None]], dim=1)
            directions[module] = self._direction(gradient, inverse)
            change += (directions[module] * gradient).sum().item() * self.lr**2
        for module, direction in directions.items():
            self._write(module, direction * min(1.0, (self.kl_clip / abs(change)) ** 0.5))
        self.step_count += 1
        self.factors.enabled = self.step_count % self.update_steps == 0

    def _inverse(self, A: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        if self.method == "inv":
            return tuple(linalg_inverses([A, G], self.damping))
        (values_A, Q_A), (values_G, Q_G) = torch.linalg.eigh(A), torch.linalg.eigh(G)
        products = torch.outer(values_G.clamp_min(0), values_A.clamp_min(0))
        return Q_A, Q_G, 1 / (products + self.damping)

    def _direction(self, gradient: Tensor, inverse: tuple[Tensor, ...]) -> Tensor:
        if self.method == "inv":
            A_inverse, G_inverse = inverse
            return G_inverse @ gradient @ A_inverse
        Q_A, Q_G, scale = inverse
        return Q_G @ ((Q_G.T @ gradient @ Q_A) * scale) @ Q_A.T

    @staticmethod
    def _write(module: nn.Module, direction: Tensor) -> None:
        weight, bias = module.weight, module.bias
        if bias is not None:
            bias.grad.copy_(direction[:, -1])
            direction = direction[:, :-1]
        weight.grad.copy_(direction.view_as(weight))
