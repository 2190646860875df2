"""Kronecker factors of a model while it trains: hooks -> kfac_ext.FactorSet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.capture import Capture, ForwardHook, uncompiled
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.losses import OtherLoss, loss_of
from kfac_ext.curvature.modes import RngState, device_of
from kfac_ext.curvature.outputs import Pick, Reading
from kfac_ext.curvature.recent import Call, RecentCalls
from kfac_ext.curvature.recorder import Recorder
from kfac_ext.curvature.running import ROUNDING, RunningFactors
from kfac_ext.curvature.samples import Layout, Layouts
from kfac_ext.curvature.shortened import inputs_with_and_without_last
from kfac_ext.curvature.tracing import check_model, trace_layers
from kfac_ext.curvature.transforms import is_transformed
from kfac_ext.curvature.updates import FisherUpdates
from kfac_ext.factors import FactorSet
from kfac_ext.layers import Layer, layer_from_state
from kfac_ext.ops.inverse import damped_inverse_ex

if TYPE_CHECKING:
    from kfac_ext.distributed import Group


class Curvature:
    """Running Kronecker factors A = E[a a^T], G = E[g g^T] of every Linear and convolution of a model in training.

    Layers are Linears and convolutions of one to three dimensions, transposed or not, kinds that are registered
    (`kfac_ext.layers.register`), and in modules of any other type the parameters that an operator of theirs takes
    itself as its weight, by what that operator sees. Layer l maps a (its input, 1 appended where there is a bias or a
    batch norm) to z, taken after the batch norm that directly follows; g = d(loss summed over samples)/dz. A (x) G
    estimates the Fisher block of the mean loss in the folded weights (Martens & Grosse 2015; scales as in `kfac_ext`).
    Radius of a block: lambda_1(A) lambda_1(G)
    (Ebrahimi & Klabjan 2021, arXiv 2111.08577, explore the spectral radius of the Hessian with K-FAC; Sandler,
    Klabjan, Luo, arXiv 2102.11210, track it by warm power iteration).

    One forward pre-hook on the model does it all: on every `factor_update_steps`-th forward in train mode with
    gradients on, hooks on the layers are put up, and taken down when that forward ends. The model's random stream,
    running statistics, outputs and gradients are untouched. Tensor hooks of the user on activations fire once more
    in such a forward with the true Fisher. The layers and their batch norms are found out in one extra forward
    without gradients, before the first training forward or in `trace`; weights that get no factors are named in a
    warning, each with the reason.

    The first update of a layer takes its factors whole, later ones give `factors <- decay factors + (1 - decay) new`.
    A forward is left out whole, for all layers, where the A or G of one would not be finite or its output is not: the
    factors of all layers stay averages over the same batches. `left_out` counts it, a warning names the layers, the
    first time and when there are ten times as many; on a GPU it comes when a radius, `left_out` or the state is read
    next, since nothing here waits for the device after the first update.

    Ranks that train one model, given as the `DistributedDataParallel`, have the factors of their whole batch, up to
    rounding those of one process (docs/distributed.md); reading them waits for an update that is on its way and for
    no rank.

    Forwards on the side, which count for nothing in the factors, are functions of `kfac_ext.curvature.probing`.

    Args:
        model: not compiled; `torch.compile` hides the layers from hooks. A `DistributedDataParallel` stands for its
            module and the ranks that share a batch.
        factor_decay: weight of the past, a float or a function of `step_count`.
        factor_update_steps: k, an int or a function of `step_count`; None: 10 with convolutions, else 5.
        fisher_type: "true" draws labels from the model's prediction (with a generator of its own), one extra partial
            backward an update; "empirical" uses the gradients of the user's own backward of the mean loss.
        kfac_approx: "reduce" averages a and sums g over positions first, "expand" keeps positions apart; a layer
            called several times in one forward: calls count as positions (on batches of different sizes: "expand").
        loss: "cross_entropy", "bce" (with logits), "mse" (torch's mean over all elements), "poisson_nll",
            "gaussian_nll", a criterion of torch (its weights and reduction are read), or a list of these for several
            outputs. "other", or any other function: the empirical Fisher of a mean over samples.
        output: what of the model's output the loss is of: a key, attribute or index, a function of the output, or a
            list of keys for as many losses. None: the only floating-point tensor, or what is called "logits".
        class_dim: dimension of the classes in that. None: 1 of two; of more that of the features of the layer whose
            output it is, so 1 of a convolution's and the last of a Linear's.
        batch_dim: dimension that counts samples in inputs and outputs of three dimensions or more (1: sequence-first).
        layer_batch_dims: regular expression of layer names -> the same for what these layers see, where sizes do not
            tell it (see `kfac_ext.curvature.samples`); "reduce" needs to know.
        reduction: "mean" or "sum", of the loss that is backpropagated; None: that of the criterion, else "mean".
        skip_layers: regular expressions of layer names that get no factors.
        max_factor_size: layers of which A or G has more rows get no factors, which is said once. None: 11,180 in
            float32, 7,905 in float64, which is 0.5 GB a factor.
        fold_norms: False: z is always the layer's own output, so that A (x) G is the block of its raw weight and
            bias, whatever batch norm follows.
        generator: for the labels; None: a CPU generator seeded with `torch.initial_seed()`.
        outlier_factor: leave out, too, forwards in which the mean square of a layer's inputs or gradients, the trace of
            an "expand" A or G, is more than this many times its median over the last `outlier_window` updates; None:
            whatever is finite counts.
        outlier_window: updates.
        grad_scale: empirical only: by how much the loss that is backpropagated exceeds the mean loss (1/k for gradient
            accumulation over k batches), a float or a function. One that returns a 0-d tensor, as
            `lambda: scaler.scale(torch.ones((), device=device))`, does not wait as `GradScaler.get_scale` does.
        process_group: of the ranks that share a batch, where the model does not tell it (FSDP2).

    Attributes:
        model: the network, without a wrapper.
        wrapper: the `DistributedDataParallel` of it that was given, or None.
        group: the ranks that share a batch (`kfac_ext.distributed.Group`); None: one process.

    Raises:
        TypeError: `model` is no module, `skip_layers` is one string; an argument is nothing of the kind.
        ValueError: an argument out of range; the model has no parameters, has uninitialised (lazy) ones, is compiled,
            scripted, a DataParallel or wrapped twice. In `trace` or the first training forward: it is ambiguous what
            the loss is of, or where its classes stand; an entry of `layer_batch_dims` is of no layer.

    Example:
        >>> curvature = Curvature(model)
        >>> criterion(model(x), y).backward()
        >>> curvature.spectral_radius()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor_decay: float | Callable[[int], float] = 0.95,
        factor_update_steps: int | Callable[[int], int] | None = None,
        fisher_type: str = "true",
        kfac_approx: str = "reduce",
        loss: str | Callable[..., Any] | Sequence[Any] = "cross_entropy",
        output: Pick = None,
        class_dim: int | None = None,
        batch_dim: int = 0,
        layer_batch_dims: Mapping[str, int] | None = None,
        reduction: str | None = None,
        skip_layers: Iterable[str] = (),
        max_factor_size: int | None = None,
        fold_norms: bool = True,
        generator: torch.Generator | None = None,
        grad_scale: float | Callable[[], float | Tensor] = 1.0,
        process_group: Any = None,
        outlier_factor: float | None = None,
        outlier_window: int = 20,
    ) -> None:
        _check_choice("fisher_type", fisher_type, ("true", "empirical"))
        _check_choice("kfac_approx", kfac_approx, ("reduce", "expand"))
        if not callable(factor_decay) and not 0 <= factor_decay < 1:
            raise ValueError(f"Curvature: factor_decay is {factor_decay}, expected 0 <= factor_decay < 1")
        if factor_update_steps is not None and not callable(factor_update_steps) and factor_update_steps < 1:
            raise ValueError(f"Curvature: factor_update_steps is {factor_update_steps}, expected >= 1")
        if isinstance(skip_layers, str):  # would be taken apart into letters
            raise TypeError(f"Curvature: skip_layers is {skip_layers!r}, expected a list of regular expressions")
        skip_layers = tuple(skip_layers)
        _check_patterns("skip_layers", skip_layers)
        _check_patterns("layer_batch_dims", layer_batch_dims or ())
        if max_factor_size is not None and max_factor_size < 1:
            raise ValueError(f"Curvature: max_factor_size is {max_factor_size}, expected >= 1")
        if outlier_factor is not None and not outlier_factor > 1:
            raise ValueError(f"Curvature: outlier_factor is {outlier_factor}, expected a number > 1, or None")
        if not isinstance(outlier_window, int) or outlier_window < 1:
            raise ValueError(f"Curvature: outlier_window is {outlier_window}, expected an int >= 1")
        given = model
        model, self.group = unwrapped(model, process_group, "Curvature")
        check_model(model)
        self.wrapper = None if given is model else given
        self.reading = Reading(loss_of(loss, reduction), output, class_dim, batch_dim)
        if isinstance(self.loss, OtherLoss) and fisher_type == "true":
            raise ValueError(
                f"Curvature: loss is {getattr(loss, '__name__', loss)!r}, of which no labels can be drawn; "
                "fisher_type='empirical' takes the gradients of your own backward"
            )
        self.model = model
        self.factor_decay, self.factor_update_steps = factor_decay, factor_update_steps
        self.fisher_type, self.kfac_approx = fisher_type, kfac_approx
        self.skip_layers, self.max_factor_size = skip_layers, max_factor_size
        self.fold_norms = fold_norms
        self._outliers = outlier_factor, outlier_window
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self.step_count = 0
        self._running: RunningFactors | None = None
        self.draws = Draws(self.generator, self.group)
        self._recent = RecentCalls(self.ranks)
        self._layouts = Layouts(layer_batch_dims)
        self._updates = FisherUpdates(self.reading, fisher_type, kfac_approx, grad_scale, self.draws, self.place)
        self._pauses = 0
        self._open: ExitStack | None = None
        self.recorder = Recorder()
        self._handle = model.register_forward_pre_hook(ForwardHook(self._before_forward), with_kwargs=True)

    # what is there

    @property
    def ranks(self) -> int:
        """How many ranks share a batch."""
        return 1 if self.group is None else self.group.size

    @property
    def layers(self) -> dict[str, Layer]:
        """Name -> Layer in forward order; raises RuntimeError before the first training forward or `trace`."""
        return self._traced().layers

    @property
    def factors(self) -> FactorSet:
        """The factors under the keys `name.A` and `name.G`; raises RuntimeError like `layers`."""
        return self._traced().factors

    @factors.setter
    def factors(self, factors: FactorSet) -> None:
        self._traced().replace(factors)
        self._updates.drop()
        self.recorder.record = None

    @property
    def loss(self) -> Loss:
        """What is known of the loss."""
        return self.reading.loss

    @property
    def recent_calls(self) -> tuple[Call, ...]:
        """The model's last calls in training, whole and detached, oldest first.

        256 samples, or a batch more, once seen; at most 64 calls and 256 MB, the newest in any case.
        """
        return self._recent.calls()

    @property
    def is_updated(self) -> bool:
        """Whether factors have been measured at least once."""
        return bool(self.updated_layers)

    @property
    def updated_layers(self) -> frozenset[str]:
        """The layers whose factors have been measured at least once."""
        return frozenset(() if self._running is None else self._running.started)

    @property
    def left_out(self) -> dict[str, int]:
        """Updates that were left out, by the layer at fault, "output" for the model's output; see `outlier_factor`.

        One update may count for several layers. On a GPU reading it waits for the device.
        """
        if self._running is None:
            return {}
        self._running.warn_of_left_out()
        return self._running.guard.left_out

    def trace(self, *args: Any, **kwargs: Any) -> None:
        """Find the layers by one forward on these inputs (any batch size) if they are not known yet.

        Warns once of layers that are never called. Raises ValueError if no layer is left.
        """
        if self._running is None:
            with self.paused():
                layers = trace_layers(
                    self.model,
                    args,
                    kwargs,
                    self.skip_layers,
                    fold_norms=self.fold_norms,
                    max_factor_size=self.max_factor_size,
                    reading=self.reading if self.loss.needs_output else None,
                )
            self._layouts.check(layers)
            self._running = self._running_factors(layers)
            self._running.warn_of_size(self.model)

    def layer(self, name: str) -> Layer:
        """The layer of this name; raises KeyError that lists the names there are, RuntimeError like `layers`."""
        layer = self.layers.get(name)
        if layer is None:
            raise KeyError(f"Curvature: no layer named {name!r}, there are {', '.join(self.layers)}")
        return layer

    def folded_weight(self, name: str) -> Tensor:
        """V of a layer, see `Layer.folded_weight`."""
        return self.layer(name).folded_weight()

    # the radius

    def spectral_radii(self) -> dict[str, Tensor]:
        """rho_l = lambda_1(A_l) lambda_1(G_l) of every layer that has factors, the largest over groups; 0-d tensors.

        Raises:
            RuntimeError: before the first update.
        """
        if self._running is None or not self._running.started:
            raise RuntimeError("Curvature: no factors yet, the model has made no training forward")
        return self._running.spectral_radii()

    def spectral_radius(self) -> float:
        """max over l of rho_l."""
        return float(self._radii().max())

    def geometric_mean_radius(self) -> float:
        """(prod over l of rho_l)^(1/B): follows the true lambda_max of the Hessian better than the maximum.

        Blocks below 1e-10 of the largest are rounding and left out.
        """
        radii = self._radii()
        radii = radii[radii >= ROUNDING * radii.max()]
        return float(radii.clamp_min(torch.finfo(radii.dtype).tiny).log().mean().exp())

    def _radii(self) -> Tensor:
        if self._running is not None:
            self._running.warn_of_left_out()
        return torch.stack(list(self.spectral_radii().values()))

    # control

    def narrow(self, keep: Mapping[str, Tensor], groups: Mapping[str, Tensor] | None = None) -> None:
        """Keep these rows and columns of the factors named (see `FactorSet.narrowed`), e.g. after neurons went.

        An error leaves everything as it was. A pending empirical update is dropped; the eigenpairs are brought up to
        date (10 steps) when they are needed next.
        """
        self.factors = self.factors.narrowed(keep, groups)

    @property
    def is_paused(self) -> bool:
        """Whether forwards count for nothing now, see `paused`."""
        return self._pauses > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside count for nothing."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def remove(self) -> None:
        """Take every hook off the model; factors stay readable. Calling it twice does nothing."""
        self._handle.remove()
        self._close()
        self._updates.drop()
        self.recorder.begin()  # forget it, and the wish for one

    def __enter__(self) -> Curvature:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remove()

    # forwards that are looked at

    @property
    def observes_next(self) -> bool:
        """Whether the next training forward gets hooks on the layers, which compiled code may not see.

        Call the plain model then, and the compiled one otherwise.
        """
        return self._running is None or self._updates_next() or self.recorder.is_asked

    def settle(self, loss: Tensor) -> None:
        """Take a pending update from the gradient of this mean loss now, not from its backward."""
        if self.group is None:
            self._updates.settle(loss)
            return
        from kfac_ext.distributed import beside_static_graph

        with beside_static_graph(self.wrapper):
            self._updates.settle(loss)

    def finish_update(self) -> None:
        """Empirical Fisher: take what the backward of a pending update has shown now, not at the next forward.

        Where the loss reaches every layer an update is finished at the end of that backward already.
        """
        self._updates.finish()

    def place(self, capture: Capture, call: Call | None = None) -> None:
        """Find where the samples stand in what the layers of a forward saw, the newest or that of `call`."""
        newest = call or self._recent.calls()[-1]

        def probe() -> dict[str, tuple[Tensor, Tensor]]:
            with self.paused():
                return inputs_with_and_without_last(self.model, self.layers.values(), newest, self.reading.batch_dim)

        shapes, warns = capture.shapes(), self.kfac_approx == "reduce"
        capture.layouts = self._layouts.of(shapes, capture.samples, self.layers, probe, warns=warns)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and containers: counters, layers, factors, generator, recent calls."""
        state: dict[str, Any] = {
            "step_count": self.step_count,
            "generator": self.generator.get_state(),
            "recent_calls": self._recent.state(),
            "reading": {
                "features": self.reading.features,
                "layouts": {name: tuple(layout) for name, layout in self._layouts.found.items()},
                "pads": self._updates.pads,
            },
        }
        if self._running is not None:
            self._running.warn_of_left_out()
            state |= self._running.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of a curvature of a model of the same shapes, bit for bit.

        Raises:
            ValueError: naming the first layer or factor that does not fit; nothing is changed then.
        """
        running: RunningFactors | None = None
        if "layers" in state:
            modules = dict(self.model.named_modules())
            running = self._running_factors({n: layer_from_state(s, modules) for n, s in state["layers"].items()})
            running.load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
        self._running = running
        self.step_count = state["step_count"]
        self._recent = RecentCalls.from_state(state["recent_calls"], device_of(self.model), self.ranks)
        reading = state["reading"]
        self.reading.features = reading["features"]
        self._layouts.found = {name: Layout(*layout) for name, layout in reading["layouts"].items()}
        self._updates.pads = reading["pads"]
        self._updates.drop()
        self.recorder.record = None

    # inside

    def _running_factors(self, layers: dict[str, Layer]) -> RunningFactors:
        if self.group is None:
            return RunningFactors(layers, *self._outliers)
        from kfac_ext.curvature.shared import SharedFactors

        return SharedFactors(layers, self.group, *self._outliers)

    def _traced(self) -> RunningFactors:
        if self._running is None:
            raise RuntimeError(
                "Curvature: the layers are known from the first training forward on; call trace(inputs) before"
            )
        return self._running

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pauses or not self.model.training or not torch.is_grad_enabled():
            return
        if is_transformed((*args, *kwargs.values())):
            return
        call = Call.of(args, kwargs, self.reading.batch_dim)
        if call.samples == 0:
            self._skip_empty()
            return
        if self._running is None:
            self.trace(*args, **kwargs)
        self._recent.add(call)
        update, observe = self._updates_next(), self.observes_next
        self._updates.next_forward(update)
        self.step_count += 1
        if observe:
            self._observe_forward(update, isinstance(kwargs.get("labels"), Tensor))

    def _skip_empty(self) -> None:
        """Have a batch without samples count for nothing, but among ranks, which must all see as many.

        Raises:
            ValueError: this rank has no samples where ranks make an update; the others raise a RanksError then.
        """
        if self.group is None:
            return
        if self._running is None or self._updates_next():
            with nullcontext() if self._running is None else self._running.together():
                raise ValueError(
                    f"Curvature: the batch of rank {self.group.rank} has no samples; ranks share a batch in equal parts"
                )
        self.step_count += 1

    def _updates_next(self) -> bool:
        return self.step_count % self._update_steps() == 0

    def _update_steps(self) -> int:
        steps = self.factor_update_steps
        if callable(steps):
            return steps(self.step_count)
        return steps if steps is not None else 10 if self.has_convolutions else 5

    @property
    def has_convolutions(self) -> bool:
        """Whether a layer is a convolution: decides defaults that differ between MLPs and conv nets."""
        return any(layer.is_convolution for layer in self.layers.values())

    def _observe_forward(self, update: bool, has_labels: bool) -> None:
        """Put up hooks for the forward that begins now; the last one takes them all down again."""
        self._close()
        device = device_of(self.model)
        record = self.recorder.begin()
        capture = Capture(RngState.now(device) if record else None, torch.is_autocast_enabled(device.type))
        if update:
            self._updates.prepare(capture)
        stack = ExitStack()
        stack.enter_context(call_hooks(self.layers.values(), capture.add))

        @uncompiled
        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            self._close()
            if output is None or not self._read(capture, output):  # a forward that raised comes by here with None
                return
            if record:
                self.recorder.record = capture
            if update:
                self._updates.start(self._traced(), capture, output, self._decay, has_labels=has_labels)

        stack.enter_context(self.model.register_forward_hook(finish, always_call=True))
        self._open = stack

    def _close(self) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def _read(self, capture: Capture, output: Any) -> bool:
        """Take down what the forward returned; False if no gradient can come from it."""
        capture.read(self.reading, output, self.layers, self._recent.calls()[-1])
        if self.loss.needs_output and not capture.prediction.requires_grad:
            return False
        if not capture.names:
            raise RuntimeError(
                f"Curvature: the forward called none of {', '.join(self.layers)} through its module; a model that is "
                "compiled hides its layers: call the plain model wherever `observes_next` says so"
            )
        if self.kfac_approx == "reduce":
            self.place(capture)
        return True

    def _decay(self) -> float:
        return self.factor_decay(self.step_count - 1) if callable(self.factor_decay) else self.factor_decay


def unwrapped(model: nn.Module, process_group: Any, who: str) -> tuple[nn.Module, Group | None]:
    """The network itself and the ranks that share its batches; without a process group that costs nothing.

    Warns, in the name of `who`, of a plain model where there are several ranks.

    Raises:
        ValueError: the model is wrapped twice.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return model, None
    from kfac_ext.distributed import plain_and_group

    return plain_and_group(model, process_group, who)


def inverter(curvature: Curvature) -> Callable[..., tuple[list[Tensor], Tensor]]:
    """`kfac_ext.damped_inverse_ex`, or the same with the work shared by the ranks of a curvature."""
    if curvature.group is None:
        return damped_inverse_ex
    from kfac_ext.distributed import shared_damped_inverse

    return partial(shared_damped_inverse, curvature.group)


def _check_patterns(argument: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"Curvature: {argument}: {pattern!r} is no regular expression ({error})") from error


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"Curvature: {argument} is {value!r}, expected {' or '.join(map(repr, choices))}")
