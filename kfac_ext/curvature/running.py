"""The running factors of known layers: what goes into them, how their eigenpairs follow, what they say of a radius."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.fisher import check_one_device, empty_factors, factor_dtype, update_factors_
from kfac_ext.curvature.guard import UpdateGuard
from kfac_ext.curvature.loss import Loss
from kfac_ext.factors import FactorSet, entries
from kfac_ext.layers import Layer

ROUNDING = 1e-10  # of the largest radius: less is rounding, as of the keys of a softmax, whose sum has no gradient
_DWARFED, _SMALL = 50, 64_000_000  # times the bytes of the model; bytes
_FIRST_POWER_STEPS, _POWER_STEPS, _REMOVAL_POWER_STEPS = 20, 3, 10


class RunningFactors:
    """Kronecker factors that forwards are blended into, with the layers they belong to.

    Attributes:
        layers: name -> Layer in forward order.
        started: layers whose factors have been measured.
        was_cut: neurons have been pruned since the eigenpairs were brought up to date.
        is_shared: whether they are a mean over ranks (`kfac_ext.curvature.shared`).
        pads: whether it is known of the ranks that the loss leaves out predictions.
        guard: decides which forwards go in.

    Args:
        layers: name -> Layer in forward order.
        outlier_factor, outlier_window: for the guard.
    """

    is_shared = pads = False

    def __init__(self, layers: dict[str, Layer], outlier_factor: float | None = None, outlier_window: int = 20) -> None:
        check_one_device(layers)
        self.layers = layers
        like = torch.empty(0, dtype=factor_dtype(layers), device=next(iter(layers.values())).weight.device)
        self.guard = UpdateGuard(list(layers), like, outlier_factor, outlier_window)
        self._factors: FactorSet | None = None
        self.started: set[str] = set()
        self.was_cut = False

    @property
    def factors(self) -> FactorSet:
        """Under the keys `name.A` and `name.G`; allocated, all zero, when first asked for, as by the first update."""
        if self._factors is None:
            self._factors = empty_factors(self.layers)
        return self._factors

    def replace(self, factors: FactorSet) -> None:
        """Take the factors of a network that has been cut."""
        self._factors, self.was_cut = factors, True

    def admits_output(self, tensors: Sequence[Tensor]) -> Tensor | bool:
        """Whether all values of the model's output are finite; False, with a warning, ends an update.

        A bool where the host may look, and before the first update, which is worth one wait; a 0-d tensor otherwise.
        """
        return self.guard.settle(*self.guard.judged_output(tensors), waits=not self.started)

    def warn_of_left_out(self) -> None:
        """Warn of the updates that were left out unseen."""
        self.guard.warn()

    def blend_(
        self, capture: Capture, *, mode: str, loss: Loss, decay: float, factor: float, finite: Tensor | bool
    ) -> None:
        """factors <- decay factors + (1 - decay) those of one forward, then follow their eigenvectors.

        Args:
            capture: the forward, with its gradients.
            mode: "expand" or "reduce".
            loss: which decides how many terms the mean loss has.
            decay: weight of the past; a layer that is new takes its factors whole.
            factor: for the gradients.
            finite: from `admits_output`; where it is False the factors stay.
        """
        admitted = self.guard.settle(*self.guard.judged(capture, factor), waits=not self.started)
        if admitted is False:
            return
        finite = finite & admitted if isinstance(finite, Tensor) else admitted
        kept = self.factors.buffer.clone() if isinstance(finite, Tensor) else None
        seen = self._measure(capture, mode=mode, loss=loss, decay=decay, factor=factor)
        if not seen:
            return
        if kept is not None and isinstance(finite, Tensor):
            self.factors.buffer.copy_(torch.where(finite, self.factors.buffer, kept))
        self._follow(seen)

    def together(self) -> AbstractContextManager[None]:
        """Around an update, for ranks that share the factors."""
        return nullcontext()

    def note_padding(self) -> None:
        """That the loss has been found to leave out predictions, for ranks that share the factors."""

    def _measure(self, capture: Capture, *, mode: str, loss: Loss, decay: float, factor: float) -> set[str]:
        """Blend what a forward has shown into the factors; the layers it has shown something of."""
        count = capture.terms(loss)
        positions = capture.positions(loss)
        with torch.no_grad(), torch.autocast(self.factors.buffer.device.type, enabled=False):
            return update_factors_(
                self.factors, self.layers, capture, mode, decay, self.started, count, factor**2, positions
            )

    def _follow(self, seen: set[str]) -> None:
        """Bring the eigenpairs up to date after an update of these layers."""
        if not self.started:
            self._warn_unreached(seen)
        steps = _POWER_STEPS if self.started.issuperset(seen) else _FIRST_POWER_STEPS
        self.started.update(seen)
        self.factors.power_iteration_(max_iter=_REMOVAL_POWER_STEPS if self.was_cut else steps)
        self.was_cut = False

    def spectral_radii(self) -> dict[str, Tensor]:
        """See `Curvature.spectral_radii`."""
        if self.was_cut:
            self.factors.power_iteration_(max_iter=_REMOVAL_POWER_STEPS)
            self.was_cut = False
        eigenvalue = self.factors.eigenvalue
        names = [name for name in self.layers if name in self.started]
        return {name: (eigenvalue(f"{name}.A") * eigenvalue(f"{name}.G")).max() for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and containers; "factors" is None before the first update."""
        return {
            "layers": {name: layer.state() for name, layer in self.layers.items()},
            "started": sorted(self.started),
            "was_cut": self.was_cut,
            "guard": self.guard.state_dict(),
            "factors": None if self._factors is None else self._factors.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of factors of the same layers.

        Raises:
            ValueError: naming the first factor that does not fit.
        """
        if state["factors"] is not None:
            self.factors.load_state_dict(state["factors"])
        self.started = set(state["started"])
        self.was_cut = state["was_cut"]
        self.guard.load_state_dict(state["guard"])

    def warn_of_size(self, model: nn.Module) -> None:
        """Warn, naming the largest, where the factors dwarf the model."""
        own = sum(p.nbytes for p in model.parameters())
        bytes_each = factor_dtype(self.layers).itemsize
        sizes = {
            name: bytes_each * sum(entries(size) for size in layer.factor_sizes().values())
            for name, layer in self.layers.items()
        }
        factors = sum(sizes.values())
        if factors <= max(_DWARFED * own, _SMALL):
            return
        name = max(sizes, key=lambda n: sizes[n])
        warnings.warn(
            f"Curvature: the factors take {factors / 1e6:,.0f} MB, {factors / own:.0f} times the model, most of it "
            f"those of {name!r}; skip_layers=[{f'^{re.escape(name)}$'!r}] or a max_factor_size leaves them out",
            stacklevel=3,
        )

    def _warn_unreached(self, seen: set[str]) -> None:
        missing = [name for name in self.layers if name not in seen]
        if missing:
            warnings.warn(
                f"Curvature: no gradient reaches {', '.join(map(repr, missing))}; no factors (parts under "
                "torch.utils.checkpoint need use_reentrant=False)",
                stacklevel=2,
            )
