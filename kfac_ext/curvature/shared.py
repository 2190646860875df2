"""Running factors of ranks that share a batch: each blends in its part, and the mean of all is everyone's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.modes import reading_is_free, sent
from kfac_ext.curvature.running import RunningFactors
from kfac_ext.distributed import Group, RanksError
from kfac_ext.factors import FactorSet
from kfac_ext.layers import Layer
from kfac_ext.triangles import pack_, packed_size, unpacked

_CLOCK = 1 << 20  # steps that float32 tells apart


class SharedFactors(RunningFactors):
    """Factors that are the mean of what all ranks have measured, as exact as sums are: the blend is linear.

    The mean is begun when an update is made, as triangles in one call, and waited for when the factors are next looked
    at; that waits for nothing of the other ranks but the update itself, so one rank alone may look. With the triangles
    goes what each rank has seen: how many samples, whether all was finite, which layers, and its clock. So a batch that
    is not finite on one rank is left out by all, and a layer that only some ranks have called has the A of those.

    Args:
        layers: name -> Layer in forward order.
        group: the ranks.
        outlier_factor, outlier_window: for the guard of each rank; what one rank leaves out all do.
    """

    is_shared = True

    def __init__(
        self, layers: dict[str, Layer], group: Group, outlier_factor: float | None = None, outlier_window: int = 20
    ) -> None:
        self._under_way: Callable[[], None] | None = None
        super().__init__(layers, outlier_factor, outlier_window)
        self.group = group
        self._fault = self.guard.no_fault()
        self._has_padding = False  # has this rank seen predictions that its loss leaves out?
        self._unread: list[Tensor] = []  # what ranks have said on GPUs that has not been looked at

    # what waits for the mean

    @property
    def factors(self) -> FactorSet:
        """See `RunningFactors`; waits for the update that is on its way."""
        self.finish()
        return super().factors

    @property
    def started(self) -> set[str]:
        """See `RunningFactors`; waits like `factors`."""
        self.finish()
        return self._started

    @started.setter
    def started(self, names: set[str]) -> None:
        self._started = names

    def finish(self) -> None:
        """Take the mean that is on its way, and follow its eigenvectors.

        Raises:
            RanksError: on all ranks: their batches were of different sizes, or they have taken other steps.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way()

    def replace(self, factors: FactorSet) -> None:
        """See `RunningFactors`."""
        self.finish()
        super().replace(factors)

    def spectral_radii(self) -> dict[str, Tensor]:
        """See `RunningFactors`."""
        self.finish()
        return super().spectral_radii()

    def state_dict(self) -> dict[str, Any]:
        """See `RunningFactors`."""
        self.finish()
        return super().state_dict()

    def warn_of_left_out(self) -> None:
        """See `RunningFactors`; on a GPU the sizes of batches are looked at here too."""
        self.finish()
        unread, self._unread = self._unread, []
        for said in unread:
            self._read(said.tolist())
        super().warn_of_left_out()

    # updates

    def admits_output(self, tensors: Sequence[Tensor]) -> Tensor:
        """Whether all values on this rank are finite, a 0-d tensor: no rank may leave an update out by itself."""
        finite, self._fault = self.guard.judged_output(tensors)
        return finite

    @contextmanager
    def together(self) -> Iterator[None]:
        """An update inside that fails on this rank before it is told of, fails on all."""
        self.finish()
        try:
            yield
        except Exception:
            if self._under_way is None:
                factors = self.factors
                with torch.no_grad():
                    none = self.guard.no_fault()
                    flat = self._packed(factors, set(), 0.0, torch.cat([none.new_tensor([0, 0, 1]), none]), 0)
                self.group.start_sum_(flat, "factors")()
            raise

    def note_padding(self) -> None:
        """Have all ranks know, with the next update, that the loss leaves out predictions; then `pads` is true."""
        self._has_padding = True

    def blend_(
        self, capture: Capture, *, mode: str, loss: Loss, decay: float, factor: float, finite: Tensor | bool
    ) -> None:
        """See `RunningFactors`; begins the mean."""
        factors = self.factors
        kept = factors.buffer.clone()
        admitted, fault = self.guard.judged(capture, factor)
        padding, failed = fault.new_full((1,), self._has_padding), fault.new_zeros(1)
        flags = torch.cat([(finite & admitted).view(1), padding, failed, self._fault + fault])
        seen = self._measure(capture, mode=mode, loss=loss, decay=decay, factor=factor)
        with torch.no_grad():
            flat = self._packed(factors, seen, decay, flags, capture.samples)
        wait = self.group.start_sum_(flat, "factors")

        def finish() -> None:
            wait()
            with torch.no_grad():
                self._take(factors, flat, kept)

        self._under_way = finish

    def _packed(self, factors: FactorSet, seen: set[str], decay: float, flags: Tensor, samples: int) -> Tensor:
        """The triangles of what this rank has measured, then what it says.

        That is: flags (finite, padding, failed, what is at fault), layers seen, and in places of each rank its samples
        and its clock.
        """
        buffer, layers, ranks = factors.buffer, len(self.layers), self.group.size
        said = torch.tensor([*(name in seen for name in self.layers), *[0] * (2 * ranks)], dtype=buffer.dtype)
        said[layers + self.group.rank] = samples
        said[layers + ranks + self.group.rank] = self.group.clock() % _CLOCK
        sizes = [packed_size(factors[key].shape) for key in factors]
        flat = buffer.new_empty(sum(sizes) + len(flags) + len(said))
        for key, part in zip(factors, flat.split([*sizes, len(flat) - sum(sizes)])):
            name, _, kind = key.rpartition(".")
            if name not in seen and kind == "A":  # a mean over the ranks that have seen the layer
                part.zero_()
                continue
            pack_(part, factors[key])
            if name not in seen:  # a mean over all samples, to which this rank's add nothing
                part.mul_(decay if name in self._started else 0.0)
        flat[sum(sizes) :] = torch.cat([flags.to(flat.dtype), sent(said, flat.device)])
        return flat

    def _take(self, factors: FactorSet, flat: Tensor, kept: Tensor) -> None:
        """Put the sums over ranks into the factors as means, unless a rank has seen what is not finite."""
        sizes = [packed_size(factors[key].shape) for key in factors]
        *parts, said = flat.split([*sizes, len(flat) - sum(sizes)])
        looks = reading_is_free(flat.device) or not self._started  # the first update is worth one wait
        new: set[str] = set()
        if looks:
            try:
                is_finite, new = self._read(said.tolist())
            except RanksError:
                factors.buffer.copy_(kept)
                raise
            if not is_finite:
                self.guard.settle(said[0] == self.group.size, self._faults(said), waits=True)
                factors.buffer.copy_(kept)
                return
        else:
            self._unread.append(said.clone())
        counts = dict(zip(self.layers, said[3 + len(self.layers) + 1 :]))
        for key, part in zip(factors, parts):
            name, _, kind = key.rpartition(".")
            matrix, count = factors[key], counts[name]
            mean = unpacked(part, matrix.shape).div_(count.clamp_min(1) if kind == "A" else self.group.size)
            matrix.copy_(torch.where(count > 0, mean, matrix))
        if not looks:
            finite = said[0] == self.group.size
            factors.buffer.copy_(torch.where(finite, factors.buffer, kept))
            self.guard.settle(finite, self._faults(said), waits=False)
        self._follow(new)

    def _faults(self, said: Tensor) -> Tensor:
        """Which layers, or the output last, are at fault on some rank."""
        return (said[3 : 3 + len(self.layers) + 1] > 0).long()

    def _read(self, said: Sequence[float]) -> tuple[bool, set[str]]:
        """Whether all was finite, and the layers seen; takes note of padding.

        Raises:
            RanksError: one has failed, or they have seen other numbers of samples, or taken other numbers of steps.
        """
        finite, padding, failed, *rest = said
        rest = rest[len(self.layers) + 1 :]
        counts, numbers = rest[: len(self.layers)], [int(n) for n in rest[len(self.layers) :]]
        if failed:
            raise RanksError("Curvature: an update of the factors has failed on another rank, which says why")
        samples, clocks = numbers[: self.group.size], numbers[self.group.size :]
        if len(set(clocks)) > 1:
            raise RanksError(f"Curvature: ranks differ in step: {', '.join(map(str, clocks))} steps of the pruner")
        if len(set(samples)) > 1:
            raise RanksError(
                f"Curvature: batches of different sizes on ranks: {', '.join(map(str, samples))} samples; ranks share "
                "a batch in equal parts"
            )
        if padding and not self.pads:
            self.pads, self._started = True, set()  # what was measured with padding is forgotten
        return finite == self.group.size, {name for name, count in zip(self.layers, counts) if count}

    def _warn_unreached(self, seen: set[str]) -> None:
        if self.group.rank == 0:
            super()._warn_unreached(seen)
