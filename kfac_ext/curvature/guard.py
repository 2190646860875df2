"""Which forwards go into the running factors: none whose A or G would not be finite, on request no outliers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.modes import reading_is_free, sent

OUTPUT = "output"
"""What `left_out` counts updates under whose model output was not finite; layers count under their names."""

_LEAST_HISTORY = 5  # updates before one can be an outlier


class UpdateGuard:
    """Decides for each update, from its layers' inputs and gradients, whether it is left out, and counts.

    The energy of a tensor x of R samples is |x|^2 / R: for kfac_approx "expand" the trace of A or G, up to a constant.
    A sum of squares that is finite bounds every entry of A and G, so one pass over x tells whether they will be. All
    layers of a forward go in or none: what follows a layer sees what the layer did, and A and G of all layers stay
    averages over the same batches.

    On a GPU nothing here waits: the decision is a 0-d tensor, counts are read when asked for.

    Args:
        names: of the layers.
        factors: a tensor of their dtype and on their device.
        outlier_factor: leave out updates in which the energy of an input or gradient is more than this many times its
            median over the last `window` updates, those left out included; None: no outliers.
        window: how many.
    """

    def __init__(
        self, names: Sequence[str], factors: Tensor, outlier_factor: float | None = None, window: int = 20
    ) -> None:
        device = factors.device
        self.names, self.outlier_factor, self.window = list(names), outlier_factor, window
        self._counts = torch.zeros(len(self.names) + 1, dtype=torch.int64, device=device)  # the last: of the output
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._history = factors.new_full((window, 2 * len(self.names)), torch.nan)
        self._seen = 0
        self._warned = 0

    @property
    def left_out(self) -> dict[str, int]:
        """Updates that were left out, by the layer whose A or G was at fault ("output": the model's output).

        One update may count for several. Reading it waits for the device.
        """
        counts = dict(zip([*self.names, OUTPUT], self._counts.tolist()))
        return {name: count for name, count in counts.items() if count}

    def judged_output(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Whether all values of the model's output are finite, and the fault otherwise, as `judged` has it."""
        with torch.no_grad():
            finite = torch.stack([t.isfinite().all() for t in tensors] or [self._total == self._total]).all()
        fault = self.no_fault()
        fault[-1] = ~finite
        return finite, fault

    def no_fault(self) -> Tensor:
        """The fault of an update that is admitted: zeros [L + 1]."""
        return torch.zeros_like(self._counts)

    def judged(self, capture: Capture, gradient_scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Whether a forward goes in, a bool, and 1 for each layer that is at fault and for the output, [L + 1].

        Args:
            capture: the forward, with its gradients.
            gradient_scale: what gradients are multiplied by.
        """
        with torch.no_grad():
            calls = {name: capture.calls(name) for name in capture.gradients}
            energies = energies_of(self.names, calls, gradient_scale, self._history)
            for i, name in enumerate(self.names):
                if name in capture.made:  # a trace is NaN or infinite where an entry is
                    A, G = (factor.diagonal(dim1=-2, dim2=-1).sum() for factor in capture.made[name])
                    pair = torch.stack([A, G * gradient_scale**2])
                    energies[i :: len(self.names)] = torch.where(pair.isfinite(), pair, torch.inf)
        return self._judged(energies)

    def _judged(self, energies: Tensor) -> tuple[Tensor, Tensor]:
        bad = ~energies.isfinite() & ~energies.isnan()
        if self.outlier_factor is not None:
            bad |= self._is_outlier(energies)
        self._history[self._seen % self.window] = energies
        self._seen += 1
        fault = torch.cat([bad.view(2, -1).any(dim=0), bad.new_zeros(1)]).long()
        return ~bad.any(), fault

    def _is_outlier(self, energies: Tensor) -> Tensor:
        assert self.outlier_factor is not None
        median = self._history.nanmedian(dim=0).values  # NaN where a layer has not been seen: then nothing is more
        known = (~self._history.isnan()).sum(dim=0) >= min(_LEAST_HISTORY, self.window)
        return known & (energies > self.outlier_factor * median)

    def settle(self, admitted: Tensor, fault: Tensor, *, waits: bool) -> Tensor | bool:
        """Count an update that is not admitted; `admitted` as a bool, with a warning, where the host may look."""
        self._counts += fault
        self._total += ~admitted
        if not (waits or reading_is_free(self._counts.device)):
            return admitted
        if bool(admitted):
            return True
        self.warn()
        return False

    def warn(self) -> None:
        """Say how many updates were left out, and for which layers: first of one, then of ten times as many.

        Reading the count waits for the device.
        """
        total = int(self._total)
        if total < max(1, 10 * self._warned):
            return
        self._warned = total
        counts = sorted(self.left_out.items(), key=lambda item: -item[1])
        named = ", ".join("the model's output" if name == OUTPUT else repr(name) for name, _ in counts[:3])
        more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
        what = "not finite" if self.outlier_factor is None else f"not finite, or {self.outlier_factor} times the median"
        times = "1 update" if total == 1 else f"{total} updates"
        warnings.warn(
            f"Curvature: {times} of the factors left out so far, whose inputs or gradients were {what}: {named}{more}; "
            "`left_out` counts them",
            stacklevel=3,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and containers."""
        return {
            "left_out": dict(zip([*self.names, OUTPUT], self._counts.tolist())),
            "total": int(self._total),
            "warned": self._warned,
            "history": None if self.outlier_factor is None else self._history.clone(),
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of a guard of the same layers; a history of another window is forgotten."""
        counts = [state["left_out"].get(name, 0) for name in [*self.names, OUTPUT]]
        self._counts.copy_(torch.tensor(counts))
        self._total.fill_(state["total"])
        self._warned = state["warned"]
        history = state["history"]
        if self.outlier_factor is None:
            self._seen = state["seen"]
        elif history is not None and history.shape == self._history.shape:
            self._history.copy_(history)
            self._seen = state["seen"]


def energies_of(
    names: Sequence[str],
    calls: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    gradient_scale: Tensor | float,
    like: Tensor,
) -> Tensor:
    """|x|^2 / R of the inputs, then of the gradients of each layer [2 L]; NaN of layers that are not seen.

    Infinite where a sum of squares is not finite in the factors' dtype, for gradients that of their sums over positions
    too, which "reduce" squares.
    """
    energies = torch.full_like(like[0], torch.nan)
    seen = [(i, calls[name]) for i, name in enumerate(names) if calls.get(name)]
    tensors = [tensor for _, pairs in seen for pair in pairs for tensor in pair]
    if not tensors:
        return energies
    samples = [max(1, sum(len(x) for x, _ in pairs)) for _, pairs in seen for pair in pairs for _ in pair]
    squares = _square_sums(tensors, gradient_scale, like.dtype)
    parts = (squares / sent(torch.tensor(samples, dtype=like.dtype), squares.device)).unbind()
    of_inputs, of_gradients = [energies[0]] * len(names), [energies[0]] * len(names)
    place = 0
    for i, pairs in seen:
        own = parts[2 * place : 2 * (place + len(pairs))]
        of_inputs[i], of_gradients[i] = sum(own[2::2], own[0]), sum(own[3::2], own[1])
        place += len(pairs)
    return torch.stack(of_inputs + of_gradients)


def _square_sums(tensors: Sequence[Tensor], gradient_scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Sums of squares of inputs and gradients by turns; infinite where the factors' dtype could not hold them."""
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype)).view(-1, 2)
    counts = torch.tensor([g.numel() // max(1, len(g)) for g in tensors[1::2]], dtype=dtype)
    positions = sent(counts, norms.device)  # or more
    norms[:, 1] *= gradient_scale
    squares = norms.square()
    bound = torch.stack([squares[:, 0], squares[:, 1] * positions], dim=1)
    return torch.where(bound.isfinite(), squares, torch.inf).flatten()
