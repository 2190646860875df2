"""The true largest eigenvalues of the Hessian, by Hessian-vector products in the folded weights."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from flatprune.distributed import refuse_wrapped
from kfac_ext.curvature.modes import module_modes, undisturbed
from kfac_ext.curvature.tracing import trace_layers
from kfac_ext.layers import Layer

Criterion = Callable[[Any, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
_METHODS = ("lanczos", "power")


def hessian_lambda_max(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Criterion,
    *,
    method: str = "lanczos",
    iterations: int = 50,
    generator: torch.Generator | None = None,
    tol: float = 1e-4,
    batch_size: int = 1024,
) -> float:
    """Largest (algebraic) eigenvalue of the Hessian of the mean loss of (x, y) in the folded weights.

    The model is taken in eval mode. A batch norm that directly follows a layer is folded: the parameters are
    V[:, :d] = s W and the constant s (bias - running_mean) + beta, s = gamma / sqrt(running_var + eps) (a constant
    only where the layer has a bias or the batch norm an affine map), so that scaling a weight under a batch norm does
    not change the answer. All other parameters that require gradients count as they are. Hessian-vector products by
    double backprop, in one of two iterations:

    - "lanczos" (default): the Ritz value rises towards the eigenvalue from below, in fewer products;
    - "power": v <- H v / |H v| finds the eigenvalue mu of the largest magnitude. Where mu is negative it is not the
      one wanted: a second iteration, with H - mu I, whose eigenvalue of the largest magnitude is lambda_max - mu,
      follows, of at most `iterations` products again. It keeps one vector, and needs many more products.

    An iteration that ends before it has converged gives less than the eigenvalue, never more.

    Args:
        model: unchanged, also its modes, buffers and gradients.
        x: inputs [N, ...].
        y: targets [N, ...].
        criterion: mean loss of (output, target), twice differentiable.
        method: "lanczos" or "power".
        iterations: at most so many Hessian-vector products.
        generator: for the start vector; None: a fixed one.
        tol: stops when the residual of the Ritz pair is below tol times its value (of H - mu I, in the second).
        batch_size: samples a forward; the mean over all of x is exact whatever it is.

    Raises:
        ValueError: no samples, x and y of different lengths, no parameter that requires a gradient, or another method.
    """
    if method not in _METHODS:
        raise ValueError(f"hessian_lambda_max: method is {method!r}, expected 'lanczos' or 'power'")

    with _folded("hessian_lambda_max", model, x, y, criterion, batch_size) as point:
        start = point.start(generator)
        if method == "power":
            return _power(point.product, start, iterations, tol)
        return _lanczos(point.product, start, 1, iterations, tol)[0][0]


def hessian_eigenvalues(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Criterion,
    *,
    k: int,
    iterations: int = 100,
    generator: torch.Generator | None = None,
    tol: float = 1e-4,
    batch_size: int = 1024,
) -> list[float]:
    """The k largest (algebraic) eigenvalues of the Hessian that `hessian_lambda_max` measures, largest first.

    Lanczos iteration with full reorthogonalisation, so that no Ritz value is a copy of another (Golub and Van Loan,
    Matrix Computations, section 10.3): it keeps `iterations` float64 vectors of the number of parameters. From one
    start vector an eigenvalue that occurs several times is found once.

    Args:
        model: unchanged, also its modes, buffers and gradients.
        x: inputs [N, ...].
        y: targets [N, ...].
        criterion: mean loss of (output, target), twice differentiable.
        k: how many; at most `iterations` and the number of parameters.
        iterations: at most so many Hessian-vector products.
        generator: for the start vector; None: a fixed one.
        tol: stops when the residuals of all k Ritz pairs are below tol times the largest of their absolute values.
        batch_size: samples a forward; the mean over all of x is exact whatever it is.

    Raises:
        ValueError: as `hessian_lambda_max`; k out of range; fewer than k distinct eigenvalues can be found.

    Example:
        >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> first, second = hessian_eigenvalues(model, x, y, nn.functional.cross_entropy, k=2)
        >>> first >= second
        True
    """
    if not 1 <= k <= iterations:
        raise ValueError(f"hessian_eigenvalues: k is {k}, expected 1 to {iterations} (iterations)")

    with _folded("hessian_eigenvalues", model, x, y, criterion, batch_size) as point:
        values, _ = _lanczos(point.product, point.start(generator), k, iterations, tol)
    if len(values) < k:
        raise ValueError(f"hessian_eigenvalues: k is {k}, but only {len(values)} distinct eigenvalues can be found")
    return values


class Valley(NamedTuple):
    """The loss along a line through the parameters.

    Attributes:
        distances: from the parameters, in their own (folded) units.
        losses: mean loss at each.
        curvature: the second derivative at 0, lambda_max.
    """

    distances: list[float]
    losses: list[float]
    curvature: float


def loss_along_top_eigenvector(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Criterion,
    *,
    reach: float = 1.0,
    points: int = 41,
    iterations: int = 50,
    generator: torch.Generator | None = None,
    tol: float = 1e-3,
    batch_size: int = 1024,
) -> Valley:
    """The mean loss of (x, y) at V + t v, |t| <= reach, v the unit eigenvector of the Hessian's largest eigenvalue.

    V are the folded weights of `hessian_lambda_max`, so that networks that compute the same give the same line. Near
    t = 0 it is L + lambda_max t^2 / 2 plus what is left of the gradient.

    Args:
        model: unchanged, also its modes, buffers and gradients.
        x: inputs [N, ...].
        y: targets [N, ...].
        criterion: mean loss of (output, target), twice differentiable.
        reach: the largest distance.
        points: how many distances, evenly from -reach to reach.
        iterations, generator, tol, batch_size: as for `hessian_lambda_max`.

    Raises:
        ValueError: as `hessian_lambda_max`; `reach` or `points` out of range.

    Example:
        >>> valley = loss_along_top_eigenvector(model, x, y, nn.functional.cross_entropy)
        >>> plt.plot(valley.distances, valley.losses)
    """
    if not 0 < reach < math.inf:
        raise ValueError(f"loss_along_top_eigenvector: reach is {reach}, expected a number above 0")
    if not isinstance(points, int) or points < 3:
        raise ValueError(f"loss_along_top_eigenvector: points is {points}, expected a whole number from 3")
    distances = [reach * (2 * i / (points - 1) - 1) for i in range(points)]
    with _folded("loss_along_top_eigenvector", model, x, y, criterion, batch_size) as point:
        (value,), vector = _lanczos(point.product, point.start(generator), 1, iterations, tol, keep=True)
        assert vector is not None
        return Valley(distances, [point.loss(distance * vector) for distance in distances], value)


class _Folded(NamedTuple):
    """The mean loss of samples as a function of the folded weights, around their values."""

    model: nn.Module
    x: Tensor
    y: Tensor
    criterion: Criterion
    batch_size: int
    fixed: dict[str, Tensor]
    leaves: dict[str, Tensor]

    def product(self, vector: Tensor) -> Tensor:
        """H v of the loss; v and the result are flat, in float64 for the recurrence."""
        parameters = list(self.leaves.values())
        parts = self._parts(vector)
        total = torch.zeros_like(vector)
        for inputs, targets in self._batches():
            with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attentions have no second derivative
                loss = self.criterion(functional_call(self.model, {**self.fixed, **self.leaves}, (inputs,)), targets)
            grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(grads, parts) if g is not None and g.requires_grad]
            directional = sum(((g * v).sum() for g, v in pairs), start=loss.new_zeros(()))
            if not directional.requires_grad:  # the loss is linear here
                continue
            products = torch.autograd.grad(directional, parameters, allow_unused=True, materialize_grads=True)
            flat = torch.cat([t.detach().flatten() for t in products])
            total += flat.to(total.dtype) * (len(inputs) / len(self.x))
        return total

    @torch.no_grad()
    def loss(self, vector: Tensor) -> float:
        """The loss with the weights moved by v."""
        moved = {name: p + v for (name, p), v in zip(self.leaves.items(), self._parts(vector))}
        total = 0.0
        for inputs, targets in self._batches():
            outputs = functional_call(self.model, {**self.fixed, **moved}, (inputs,))
            total += float(self.criterion(outputs, targets)) * len(inputs)
        return total / len(self.x)

    def start(self, generator: torch.Generator | None) -> Tensor:
        """A random vector for iterations to begin with; without a generator always the same."""
        size = sum(p.numel() for p in self.leaves.values())
        generator = generator or torch.Generator().manual_seed(0)
        vector = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64)
        return vector.to(next(iter(self.leaves.values())).device)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        parameters = list(self.leaves.values())
        split = vector.split([p.numel() for p in parameters])
        return [v.view_as(p).to(p.dtype) for v, p in zip(split, parameters)]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size))


@contextmanager
def _folded(
    caller: str, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion, batch_size: int
) -> Iterator[_Folded]:
    """The loss in the folded weights; the model is in eval mode meanwhile, and untouched after.

    Raises:
        ValueError: see `hessian_lambda_max`.
    """
    refuse_wrapped(model, caller)
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"{caller}: {len(x)} inputs and {len(y)} targets, expected equally many, at least 1")
    modes = dict.fromkeys(model.modules(), False)
    with module_modes(modes), undisturbed(model), torch.enable_grad():
        fixed, leaves = _folded_parameters(model, x[:1])
        if not leaves:
            raise ValueError(f"{caller}: no parameter requires a gradient")
        yield _Folded(model, x, y, criterion, batch_size, fixed, leaves)


def _folded_parameters(model: nn.Module, example: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(constants, leaves) that `functional_call` puts in the place of parameters and buffers; same function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without factors do not matter here
        layers = _layers(model, example)
    fixed: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for layer in layers:
        for name, value, is_leaf in _folded_layer(layer):
            carried = is_leaf and layer.weight_name in trainable
            (leaves if carried else fixed)[name] = value
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in fixed and name not in leaves:
            leaves[name] = parameter
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    return fixed, leaves


def _layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """The layers with a batch norm behind them, weight and norm their own (what serves two cannot be folded)."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return []
    layers = trace_layers(model, (example,)).values()
    norms = Counter(layer.norm_name for layer in layers)
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return [
        layer
        for layer in layers
        if layer.norm_name is not None and norms[layer.norm_name] == holders[id(layer.weight)] == 1
    ]


def _folded_layer(layer: Layer) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, value, whether it is a parameter) of everything that changes: V in the layer, an identity batch norm."""
    norm = layer.norm
    assert norm is not None and norm.running_mean is not None and norm.running_var is not None
    folded = layer.folded_weight()
    weight, constant = layer.weight_like(folded[:, :-1]), folded[:, -1]
    zero = torch.zeros_like(norm.running_mean)
    yield layer.weight_name, weight, True
    yield f"{layer.norm_name}.running_var", torch.full_like(norm.running_var, 1 - norm.eps), False
    in_bias, in_norm = layer.bias is not None, norm.bias is not None
    if layer.bias_name is not None:
        yield layer.bias_name, constant, True
    if norm.weight is not None:
        yield f"{layer.norm_name}.weight", torch.ones_like(norm.weight), False
    if norm.bias is not None:
        yield f"{layer.norm_name}.bias", zero if in_bias else constant, not in_bias
    yield f"{layer.norm_name}.running_mean", zero if in_bias or in_norm else -constant, False


def _power(product: Product, start: Tensor, iterations: int, tol: float) -> float:
    """The largest eigenvalue; see `hessian_lambda_max`."""
    value = _dominant(product, start, iterations, tol)
    if value >= 0:
        return value
    return value + _dominant(lambda vector: product(vector) - value * vector, start, iterations, tol)


def _dominant(product: Product, start: Tensor, iterations: int, tol: float) -> float:
    """The Rayleigh quotient at the end of v <- H v / |H v|."""
    vector, value = start / start.norm(), 0.0
    for _ in range(iterations):
        image = product(vector)
        value = float(vector @ image)
        if float((image - value * vector).norm()) <= tol * abs(value):
            break
        vector = image / image.norm()
    return value


def _lanczos(
    product: Product, start: Tensor, k: int, iterations: int, tol: float, *, keep: bool = False
) -> tuple[list[float], Tensor | None]:
    """The k largest Ritz values, and the unit vector of the largest where a basis is kept.

    It is for several, and where `keep` asks for it; one value needs none (lost orthogonality repeats Ritz values, it
    moves none).
    """
    keep = keep or k > 1
    current, previous = start / start.norm(), torch.zeros_like(start)
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    largest: list[float] = []
    vector: Tensor | None = None
    for _ in range(min(iterations, len(start)) if keep else iterations):
        image = product(current)
        alpha = float(current @ image)
        size = float(image.norm())
        image = image - alpha * current - (betas[-1] if betas else 0.0) * previous
        if keep:
            basis.append(current)
            for earlier in [*basis, *basis]:
                image = image - (earlier @ image) * earlier
        beta = float(image.norm())
        alphas.append(alpha)
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.tensor(betas, dtype=torch.float64)
            tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        largest = values[-k:].flip(0).tolist()
        residual = beta * float(vectors[-1, -k:].abs().max())
        exhausted = beta <= 1e-12 * size
        if exhausted or (len(largest) == k and residual <= tol * max(abs(value) for value in largest)):
            break
        previous, current = current, image / beta
        betas.append(beta)
    if keep:
        vector = sum((w * v for w, v in zip(vectors[:, -1].tolist(), basis)), start=torch.zeros_like(start))
        vector = vector / vector.norm()
    return largest, vector
