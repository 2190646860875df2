"""laplace-torch with Kronecker factors of kfac_ext: a backend, and how much sooner it is done than laplace's own.

pip install . opt_einsum scipy torchmetrics tqdm curvlinops-for-pytorch && pip install --no-deps laplace-torch
OMP_NUM_THREADS=1 python examples/laplace_backend.py   # ratio 1.45 of at most 1.7, on 2 busy cores
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from laplace.curvature import CurvlinopsGGN, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfac_ext import CovarianceUpdate, FactorSet


class KfacExtGGN(GGNInterface):
    """The exact generalized Gauss-Newton matrix in Kronecker factors, "expand", of nn.Linear and nn.Conv2d.

    For `Laplace(model, "classification", hessian_structure="kron", backend=KfacExtGGN)`, or "regression". All else that
    has parameters, such as batch norms in evaluation mode, needs `requires_grad_(False)`, as with laplace's own.

    Raises:
        ValueError: parameters elsewhere, grouped convolutions, padding not of zeros, no [N, C] output, `stochastic`.
    """

    def kron(self, x: Any, y: Tensor, N: int, **_options: Any) -> tuple[Tensor, Kron]:
        """The loss of a batch, and for each weight sum g g^T with A M / N, for each bias the former.

        One forward for A, and one partial backward for each output, or each class but one; gradients of parameters are
        not computed.
        """
        if self.stochastic:
            raise ValueError("KfacExtGGN: stochastic is True, expected False: labels are not drawn")
        layers, calls = self._layers(), []
        factors = _empty_factors(layers)

        def look(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            factors.accumulate_([_input_update(name, layer, inputs[0].detach())])
            calls.append((name, get_gradient_edge(output)))  # an activation in place may follow

        handles = [m.register_forward_hook(lambda *seen, n=name: look(n, *seen)) for name, m in layers.items()]
        try:
            f = self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        if f.dim() != 2:
            raise ValueError(f"KfacExtGGN: the output has shape {tuple(f.shape)}, expected [N, C]")
        names, edges = zip(*calls, strict=True)
        for column in self._columns(f.detach()):
            grads = torch.autograd.grad(f, edges, column, retain_graph=True)
            factors.accumulate_(_gradient_update(name, g) for name, g in zip(names, grads, strict=True))
        blocks: list[Any] = []
        for name, layer in layers.items():
            A, G = factors[f"{name}.A"] * (len(y) / N), factors[f"{name}.G"]
            blocks += [[G, A]] if layer.bias is not None or A.numel() * G.numel() > 1 else [[G * A]]
            blocks += [[G]] if layer.bias is not None else []
        return self.factor * self.lossfunc(f.detach(), y), Kron(blocks) * self.factor

    def _layers(self) -> dict[str, Any]:
        layers, wanted = {}, {id(p) for p in self.params}
        for name, layer in self.model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer.weight) in wanted:
                wanted -= {id(p) for p in layer.parameters()}
                layers[name] = layer
                if getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
                    raise ValueError(f"KfacExtGGN: {name} is {layer}, expected one group and padding of zeros")
        if wanted:
            other = [name for name, p in self.model.named_parameters() if id(p) in wanted]
            raise ValueError(f"KfacExtGGN: {other} are of no Linear or Conv2d; requires_grad_(False) leaves them out")
        return layers

    def _columns(self, f: Tensor) -> Iterator[Tensor]:
        """Columns [N, C] of a square root of the Hessian of the summed loss by the outputs.

        That of cross-entropy, diag(p) - p p^T, has one rank less than there are classes: its Cholesky factor in closed
        form (Tanabe and Sagae 1992), from what of the mass is `left` from a class on.
        """
        if self.likelihood == "regression":
            yield from 2.0**0.5 * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, *f.shape)
            return
        p = f.softmax(dim=1)
        left = p.flip(1).cumsum(dim=1).flip(1).clamp_min(torch.finfo(p.dtype).tiny)
        for c in range(f.shape[1] - 1):
            root, rest = (p[:, c : c + 1] / left[:, c : c + 1]).sqrt(), left[:, c + 1 : c + 2].sqrt()
            yield torch.cat([torch.zeros_like(p[:, :c]), root * rest, -p[:, c + 1 :] * root / rest], dim=1)


def _empty_factors(layers: dict[str, Any]) -> FactorSet:
    weights = {name: layer.weight for name, layer in layers.items()}
    sizes = {f"{name}.A": w[0].numel() for name, w in weights.items()} | {f"{n}.G": len(w) for n, w in weights.items()}
    weight = next(iter(weights.values()))
    return FactorSet(sizes, dtype=weight.dtype, device=weight.device)


def _input_update(name: str, layer: Any, x: Tensor) -> CovarianceUpdate:
    if isinstance(layer, nn.Linear):
        return CovarianceUpdate.linear(f"{name}.A", x, decay=1.0)
    place = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return CovarianceUpdate.conv2d(f"{name}.A", x, layer.kernel_size, decay=1.0, **place)


def _gradient_update(name: str, g: Tensor) -> CovarianceUpdate:
    g = g if g.dim() == 4 else g.flatten(0, -2)  # of a Linear on sequences, positions count as samples
    return CovarianceUpdate.gradient(f"{name}.G", g, decay=1.0, scale=float(len(g)))  # sums, where kfac_ext averages


if __name__ == "__main__":  # median CPU seconds of a batch's factors, in turns
    torch.manual_seed(0)
    stages = [
        (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)) for i, o in ((3, 32), (32, 64))
    ]
    model = nn.Sequential(*(part for stage in stages for part in stage), nn.Flatten(), nn.Linear(4096, 10)).eval()
    for norm in (model[1], model[5]):
        norm.requires_grad_(False)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    alone = patch.object(FactorSet, "accumulate_")  # forward and backwards of PyTorch, and nothing made of them
    runs: dict[str, tuple[Any, Any]] = {"kfac_ext": (KfacExtGGN, nullcontext()), "backwards alone": (KfacExtGGN, alone)}
    runs["curvlinops"] = CurvlinopsGGN, nullcontext()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(12):
        for name, (backend, context) in runs.items():
            with context:
                start = time.process_time()
                backend(model, "classification").kron(x, y, N=len(x))
                seconds[name].append(time.process_time() - start)
    ours, least, theirs = (median(times[2:]) for times in seconds.values())
    print(
        f"CPU ms: kfac_ext {1e3 * ours:.0f}, curvlinops {1e3 * theirs:.0f}, backwards alone {1e3 * least:.0f};", end=" "
    )
    print(f"ratio {theirs / ours:.2f}, {theirs / least:.2f} at most")
