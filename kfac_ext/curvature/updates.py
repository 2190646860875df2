"""From a forward that was looked at to an update of the factors: at once, or with the user's backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.fisher import make_early
from kfac_ext.curvature.losses import SeveralLosses
from kfac_ext.curvature.modes import reading_is_free
from kfac_ext.curvature.outputs import Reading
from kfac_ext.curvature.padding import OutputGradient
from kfac_ext.curvature.probabilities import ProbabilityWatch
from kfac_ext.curvature.running import RunningFactors
from kfac_ext.geometry import accumulator_dtype


@dataclass
class _Update:
    """One update on its way.

    Attributes:
        running: the factors it goes into.
        capture: the forward.
        decay: weight of the past, asked for when the update is made.
        gradient: of the user's loss at the output, as it comes.
        started: layers with factors before this update.
        looks: whether to look for predictions that the loss leaves out: on a GPU, where it means to wait, only for the
            first update, where the model has the labels, or once there have been some.
    """

    running: RunningFactors
    capture: Capture
    decay: Callable[[], float]
    started: set[str]
    looks: bool
    gradient: OutputGradient | None = None


class FisherUpdates:
    """Makes updates of running factors out of forwards and backwards.

    The empirical Fisher waits for the user's backward, the true one does not, but for two cases: once a backward has
    shown predictions that the loss leaves out, and where the model was given the labels and computes its own loss. It
    is then made at the beginning of that backward, from labels drawn for the predictions that count.

    Args:
        reading: of the model's output.
        fisher_type, kfac_approx, grad_scale: as for `Curvature`.
        draws: of labels.
        place: finds where the samples stand in what layers saw.

    Attributes:
        pads: whether a loss has left out predictions.
    """

    def __init__(
        self,
        reading: Reading,
        fisher_type: str,
        kfac_approx: str,
        grad_scale: float | Callable[[], float | Tensor],
        draws: Draws,
        place: Callable[[Capture], None],
    ) -> None:
        self.reading, self.fisher_type, self.kfac_approx = reading, fisher_type, kfac_approx
        self.grad_scale, self.draws, self._place = grad_scale, draws, place
        self.pads = False
        self._probabilities = ProbabilityWatch(reading.loss)
        self._pending: _Update | None = None
        self._watched: _Update | None = None

    def prepare(self, capture: Capture) -> None:
        """Before the forward of an update."""
        if self.fisher_type == "empirical":
            capture.on_gradient = self._on_gradient

    def start(
        self, running: RunningFactors, capture: Capture, output: Any, decay: Callable[[], float], *, has_labels: bool
    ) -> None:
        """After that forward, which returned `output`; `has_labels`: the model has been given the labels."""
        started, reads = set(running.started), self.reading.loss.needs_output
        self._probabilities.look(capture)
        self.pads = self.pads or running.pads
        free = reading_is_free(running.factors.buffer.device)
        looks = reads and (free or not started or has_labels or self.pads)
        update = _Update(running, capture, decay, started, looks)
        if self.fisher_type == "empirical":
            self._pending = update
            if looks:
                update.gradient = OutputGradient(output, capture.tensors, self.reading)
            return
        if (self.pads or has_labels) and not self._has_several:
            self._pending = update
            update.gradient = OutputGradient(output, capture.tensors, self.reading, self._on_output_gradient)
            return
        self._draw(update)
        if looks:
            self._watched = update
            update.gradient = OutputGradient(output, capture.tensors, self.reading, self._on_watched_gradient)

    def drop(self) -> None:
        """Forget what is on its way."""
        self._pending = self._watched = None

    def next_forward(self, updates: bool) -> None:
        """Finish what the backward before this forward has shown, before another update or if it has shown anything."""
        self._watched = None
        pending = self._pending
        if pending is not None and (updates or any(g is not None for g in _gradients(pending.capture))):
            self.finish()

    def finish(self) -> None:
        """Take what the backward of a pending update has shown, now."""
        update, self._pending = self._pending, None
        if update is not None and self.fisher_type == "empirical":
            self._take(update)

    def settle(self, loss: Tensor) -> None:
        """Take a pending update from the gradient of this mean loss, not from its backward."""
        update, self._pending = self._pending, None
        if update is None or not loss.requires_grad:
            return
        if update.gradient is not None:
            update.gradient.take(loss)
        if self.fisher_type == "empirical":
            update.capture.on_gradient = None
            update.capture.gradients = update.capture.gradients_of(loss)
            self._take(update, grad_scale=1.0)
        else:
            self._draw(update)

    # what the backward shows

    def _on_gradient(self, capture: Capture, name: str) -> None:
        update = self._pending
        if update is None or update.capture is not capture:
            return
        if self._makes_early(update):
            running = update.running
            make_early(running.layers[name], capture, self.kfac_approx, running.factors.buffer.dtype)
        if all(g is not None for g in _gradients(capture)):
            self._pending = None
            self._take(update)

    def _makes_early(self, update: _Update) -> bool:
        """Whether A and G of a layer can be made as soon as its gradient is there: nothing else has a say in them.

        Not on a GPU, where all layers share launches, and memory is never cleared.
        """
        running, capture = update.running, update.capture
        if not reading_is_free(running.factors.buffer.device) or running.is_shared or self._has_several:
            return False
        if running.guard.outlier_factor is not None or capture.rng is not None or callable(self.grad_scale):
            return False
        if update.gradient is not None and update.gradient.value is None:  # not yet: it is the output's own layer
            return False
        self._find_counted(update)
        return capture.counted is None

    def _on_output_gradient(self) -> None:
        update, self._pending = self._pending, None
        if update is not None:
            self._draw(update)

    def _on_watched_gradient(self) -> None:
        """Once it turns out that the loss leaves predictions out, make the update again, without them."""
        update, self._watched = self._watched, None
        if update is None:
            return
        before = self.pads
        self._find_counted(update)
        if update.capture.counted is None:
            return
        if update.running.is_shared:  # no rank may make an update again by itself
            update.running.note_padding()
            self.pads, update.capture.counted = before, None
            return
        if self._has_several:  # by now the backward has freed what leads to all outputs but the last
            if not before:
                warnings.warn(
                    "Curvature: the loss leaves out predictions of one of several outputs (labels of -100?), for which "
                    "labels are drawn all the same; fisher_type='empirical' leaves them out",
                    stacklevel=2,
                )
            update.capture.counted = None
            return
        update.running.started = set(update.started)  # what was measured with padding first of all is forgotten
        self._draw(update)

    @property
    def _has_several(self) -> bool:
        return isinstance(self.reading.loss, SeveralLosses)

    def _find_counted(self, update: _Update) -> None:
        gradient, capture = update.gradient, update.capture
        if gradient is None or gradient.value is None:
            return
        with torch.no_grad(), torch.autocast(gradient.value.device.type, enabled=False):
            ignored = self.reading.loss.ignored(_values(capture), gradient.value)
            if ignored is not None and bool(ignored.any()) and not bool(ignored.all()):
                capture.counted, self.pads = ~ignored, True

    # updates

    def _draw(self, update: _Update) -> None:
        """The true Fisher: labels drawn from the prediction, one more partial backward."""
        with update.running.together():
            self._draw_and_blend(update)

    def _draw_and_blend(self, update: _Update) -> None:
        capture, loss = update.capture, self.reading.loss
        finite = update.running.admits_output(capture.tensors)
        if finite is False:
            return
        self._find_counted(update)
        prediction = capture.prediction
        with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
            values = _values(capture)
            capture.targets = loss.draw(values, self.draws)
            seed = loss.gradient(values, capture.targets, capture.counted)
        try:
            capture.gradients = capture.gradients_of(prediction, seed.to(prediction.dtype))
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                "Curvature: the forward runs under torch.utils.checkpoint(use_reentrant=True), through which drawn "
                "labels have no gradient: set use_reentrant=False, take fisher_type='empirical', or call remove()"
            ) from error
        self._blend(update, 1.0, finite)

    def _take(self, update: _Update, grad_scale: float | Tensor | None = None) -> None:
        """The empirical Fisher: what the user's own backward has shown."""
        with update.running.together():
            self._blend_shown(update, grad_scale)

    def _blend_shown(self, update: _Update, grad_scale: float | Tensor | None) -> None:
        if grad_scale is None:
            grad_scale = self.grad_scale() if callable(self.grad_scale) else self.grad_scale
        capture, loss = update.capture, self.reading.loss
        if isinstance(grad_scale, Tensor):
            _divide(capture, grad_scale)
            grad_scale = 1.0
        looked_at = any(g is not None for g in _gradients(capture)) or update.running.is_shared  # others count on it
        finite = looked_at and update.running.admits_output(capture.tensors)
        if finite is False:
            return
        self._find_counted(update)
        factor = float(capture.terms(loss))
        if loss.reduction == "sum":
            factor = loss.terms(capture.prediction) / loss.elements(capture.prediction) if loss.needs_output else 1.0
        self._blend(update, factor / grad_scale, finite)

    def _blend(self, update: _Update, factor: float, finite: Tensor | bool) -> None:
        """Blend one forward's A and G (gradients times `factor`) into the factors."""
        capture = update.capture
        if capture.counted is not None:
            self._place(capture)
        update.running.blend_(
            capture, mode=self.kfac_approx, loss=self.reading.loss, decay=update.decay(), factor=factor, finite=finite
        )


def _gradients(capture: Capture) -> list[Tensor | None]:
    return [g for slots in capture.gradients.values() for g in slots]


def _divide(capture: Capture, scale: Tensor) -> None:
    """The gradients of a forward without a factor that only their device knows, in float32 or better."""
    with torch.no_grad():
        capture.gradients = {
            name: [None if g is None else g.to(accumulator_dtype(g.dtype)) / scale for g in slots]
            for name, slots in capture.gradients.items()
        }


def _values(capture: Capture) -> Tensor:
    """The prediction without its graph, in full precision."""
    values = capture.prediction.detach()
    return values.float() if values.itemsize < 4 else values
