"""Installed peers, each as its own documentation uses it; one that is not installed is skipped by name."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine import PEERS
from bench.worksets import LayerShape

Skipped = dict[str, str]
Step = Callable[[], Any]


class UnsupportedError(Exception):
    """What a peer does not compute, and so is not asked for."""


def load(name: str) -> str | None:
    """None if the peer can be imported, else why not."""
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"does not import: {error}"
    except Exception as error:  # a peer broken by other versions must not stop the suite
        return f"does not import: {type(error).__name__}: {error}"
    return None


def available(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], Skipped]:
    """Run each peer once: those that work, and why the others are skipped."""
    steps: dict[str, Step] = {}
    skipped: Skipped = {}
    for name, maker in makers.items():
        reason = load(name)
        if reason is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    step = maker()
                    step()
                steps[name] = step
            except UnsupportedError as error:
                reason = str(error)
            except Exception as error:  # as above
                reason = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is not None:
            skipped[name] = reason
    return steps, skipped


# ---- the covariance of one layer's input, by the functions the peers use inside ----


def _conv_module(layer: LayerShape) -> nn.Conv2d:
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    return nn.Conv2d(layer.channels, layer.outputs, layer.kernel, bias=False, **options)  # type: ignore[arg-type]


def _asdl_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    from asdl.operations.conv import Conv2d

    if layer.groups > 1:
        raise UnsupportedError("no grouped convolutions")
    module = _conv_module(layer)
    return Conv2d.cov_kron_A(module, Conv2d.preprocess_in_data(module, x, None)) / len(x)


def _curvlinops_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    from curvlinops.kfac_utils import extract_patches

    if layer.groups > 1:
        raise UnsupportedError("averages over groups: another quantity")
    patches = extract_patches(x, layer.kernel, layer.stride, layer.padding, 1, layer.groups)
    rows = patches.flatten(0, 1)
    return torch.einsum("b i, b j -> i j", rows, rows) / len(rows)


def _singd_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    from singd.optim.utils import process_input

    if layer.groups > 1:
        raise UnsupportedError("averages over groups: another quantity")
    rows = process_input(x, _conv_module(layer), "expand")
    return rows.T @ rows


def _backpack_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    from backpack.utils.conv import unfold_input

    if layer.groups > 1:
        raise UnsupportedError("no grouped convolutions")
    patches = unfold_input(_conv_module(layer), x)
    return torch.einsum("nis,njs->ij", patches, patches) / (len(x) * patches.shape[2])


COVARIANCE: dict[str, Callable[[Tensor, LayerShape], Tensor]] = {
    "asdl": _asdl_covariance,
    "curvlinops": _curvlinops_covariance,
    "singd": _singd_covariance,
    "backpack": _backpack_covariance,
}


def covariance_of(name: str) -> Callable[[Tensor, LayerShape], Tensor]:
    """A peer's covariance of a layer of either kind (linear ones by one matmul)."""
    method = COVARIANCE[name]
    return lambda x, layer: method(x, layer) if layer.is_convolution else x.T @ x / len(x)


def covariances(layers: Sequence[LayerShape], inputs: Sequence[Tensor]) -> dict[str, Callable[[], Step]]:
    """Makers of the covariances of all layers."""

    def maker(name: str) -> Callable[[], Step]:
        method = covariance_of(name)
        return lambda: lambda: [method(x, layer) for layer, x in zip(layers, inputs)]

    return {name: maker(name) for name in COVARIANCE}


# ---- inverses ----


def inverses(matrices: Sequence[Tensor], damping: float) -> dict[str, Callable[[], Step]]:
    """Makers of all damped inverses."""

    def asdl() -> Step:
        from asdl.utils import cholesky_inv

        return lambda: [cholesky_inv(m, damping) for m in matrices]

    return {"asdl": asdl}


# ---- the factors of a whole training step ----


def training_steps(build: Callable[[], nn.Module], x: Tensor, y: Tensor, lr: float) -> dict[str, Callable[[], Step]]:
    """Makers of one training step with A and G of every layer, expand, renewed in it.

    asdl and singd use the gradients of the step's own backward, backpack adds to it; curvlinops and nngeometry make
    passes of their own. backpack, nngeometry: one sampled label; the others the empirical Fisher.
    """

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def bare(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def asdl() -> Step:
        from asdl import FISHER_EMP, SHAPE_KRON, FisherConfig, get_fisher_maker

        model = build()
        optimizer = sgd(model)
        config = FisherConfig(FISHER_EMP, [SHAPE_KRON], loss_type="cross_entropy", data_size=len(x))
        maker = get_fisher_maker(model, config)

        def step() -> None:
            optimizer.zero_grad()
            output = maker.setup_model_call(model, x)
            maker.setup_loss_call(F.cross_entropy, output, y, reduction="sum")
            maker.forward_and_backward(calc_loss_grad=True)
            optimizer.step()

        return step

    def curvlinops() -> Step:
        from curvlinops import KFACLinearOperator

        model, loss = build(), nn.CrossEntropyLoss()
        optimizer = sgd(model)

        def step() -> None:
            bare(model, optimizer)
            operator = KFACLinearOperator(
                model,
                loss,
                [p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()],
                [(x, y)],
                check_deterministic=False,
                fisher_type="empirical",
                separate_weight_and_bias=False,
                num_per_example_loss_terms=1,
            )
            operator.compute_kronecker_factors()

        return step

    def nngeometry() -> Step:
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM_MonteCarlo
        from nngeometry.object import PMatKFAC

        model = build()
        optimizer = sgd(model)
        layers = LayerCollection()
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                layers.add_layer_from_model(model, module)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))

        def step() -> None:
            bare(model, optimizer)
            FIM_MonteCarlo(model, loader, PMatKFAC, layer_collection=layers)

        return step

    def backpack() -> Step:
        from backpack import backpack, extend, extensions

        model, loss = extend(build()), extend(nn.CrossEntropyLoss())
        optimizer = sgd(model)

        def step() -> None:
            optimizer.zero_grad()
            value = loss(model(x), y)
            with backpack(extensions.KFAC(mc_samples=1)):
                value.backward()
            optimizer.step()
            if not any(hasattr(p, "kfac") for p in model.parameters()):
                raise RuntimeError("no factors")

        return step

    def singd() -> Step:
        from singd.optim.optimizer import SINGD

        model = build()
        optimizer = SINGD(model, lr=lr, T=1, kfac_like=True, warn_unsupported=False)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    makers = {"asdl": asdl, "curvlinops": curvlinops, "nngeometry": nngeometry, "backpack": backpack, "singd": singd}
    assert set(makers) == set(PEERS)
    return makers
