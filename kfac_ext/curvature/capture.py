"""What one forward shows of the layers, and the hook that starts looking."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.modes import RngState
from kfac_ext.curvature.outputs import Reading
from kfac_ext.curvature.recent import Call
from kfac_ext.curvature.samples import Layout
from kfac_ext.layers import Layer

REMOVE = "kfac_ext.Curvature watches the model's forwards; call its remove() first"
UNSEEN = "calls in evaluation mode, inside torch.func, of a method, or of what torch.compile made of it are not seen"

_REASON = {"reason": REMOVE} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}  # not in 2.6


class Capture:
    """One forward: each call's input and the place of its z in the autograd graph, the output, the RNG state before.

    Attributes:
        rng: the random streams before the forward, if asked for.
        autocast: whether it ran in autocast.
        call: its arguments.
        tensors: what of the model's output the loss is of.
        prediction: the same as the loss reads it.
        samples: N.
        targets: labels that were sampled from the prediction, if any.
        counted: which terms of the loss count, where some do not.
        z_squares: layer -> mean of |z|^2 over rows (samples and positions) of its first call, if `rng` was asked for.
        gradients: layer -> g of each call; None where there is none (yet).
        layouts: layer -> where the samples stand in what each call sees, where it is not the first dimension.
        made: layer -> its A and G, without a factor for the gradients, where they have been made of input and gradient
            as soon as both were there, and these let go.
        on_gradient: if set, z's gradients of the user's backward are taken down and this is called after each, with the
            layer's name.
    """

    def __init__(self, rng: RngState | None = None, autocast: bool = False) -> None:
        self.rng, self.autocast = rng, autocast
        self.call = Call()
        self.tensors: tuple[Tensor, ...] = ()
        self.prediction: Any = None
        self.samples = 0
        self.targets: Tensor | None = None
        self.counted: Tensor | None = None
        self.z_squares: dict[str, Tensor] = {}
        self.gradients: dict[str, list[Tensor | None]] = {}
        self.layouts: dict[str, list[Layout]] = {}
        self.made: dict[str, tuple[Tensor, Tensor]] = {}
        self.on_gradient: Callable[[Capture, str], None] | None = None
        self._inputs: dict[str, list[Tensor]] = {}
        self._versions: dict[str, list[int]] = {}
        self._edges: dict[str, list[GradientEdge]] = {}

    def add(self, layer: Layer, x: Tensor, z: Tensor) -> None:
        """Take down one call; calls without gradient (frozen below) are left out."""
        if not z.requires_grad:
            return
        self._inputs.setdefault(layer.name, []).append(x)
        self._versions.setdefault(layer.name, []).append(x._version)
        # the edge keeps pointing at z as it is now, also after an in-place activation
        self._edges.setdefault(layer.name, []).append(get_gradient_edge(z))
        if self.rng is not None and layer.name not in self.z_squares:
            outputs = z.shape[layer.channel_dim]
            self.z_squares[layer.name] = z.detach().square().mean() * outputs
        slots = self.gradients.setdefault(layer.name, [])
        slots.append(None)
        if self.on_gradient is not None:
            z.register_hook(self._gradient_hook(layer.name, len(slots) - 1))

    def _gradient_hook(self, name: str, index: int) -> Callable[[Tensor], None]:
        own = weakref.ref(self)  # the graph must not hold what holds the graph

        def hook(gradient: Tensor) -> None:
            capture = own()
            if capture is not None and capture.on_gradient is not None:
                capture.gradients[name][index] = gradient.detach()
                capture.on_gradient(capture, name)

        return hook

    @property
    def names(self) -> list[str]:
        """The layers that were called, in the order of their first call."""
        return list(self._edges)

    def read(self, reading: Reading, output: Any, layers: Mapping[str, Layer], call: Call) -> None:
        """Take down the call and what it returned, as the loss reads it, and N."""
        self.call, told = call, call.samples
        if not reading.loss.needs_output:
            self._count_samples(layers, told)
            return
        self.tensors = reading.picked(output)
        self.prediction = reading.prediction(self.tensors)
        self.samples = len(self.prediction)

    def terms(self, loss: Loss) -> int:
        """How many terms of the loss count: D."""
        if not loss.needs_output:
            return self.samples
        return loss.counted_terms(self.prediction, self.counted)

    def positions(self, loss: Loss) -> dict[str, list[Tensor]]:
        """Which predictions count, bool [N, P] of each output that a layer leads to; empty: all do."""
        if self.counted is None:
            return {}
        masks = loss.positions(self.counted)
        if len(masks) == 1:
            return dict.fromkeys(self._edges, masks)
        behind = [_nodes_behind(tensor) for tensor in self.tensors]
        return {
            name: [mask for mask, nodes in zip(masks, behind) if any(edge.node in nodes for edge in edges)]
            for name, edges in self._edges.items()
        }

    def _count_samples(self, layers: Mapping[str, Layer], told: int) -> None:
        """N where no output tells it: as many as the call seems to have if layers see so many, else what most see."""
        shapes = [(layers[name], shape) for name, calls in self.shapes().items() for shape in calls]
        places = (shape[:1] if layer.is_convolution else shape[:-1] for layer, shape in shapes)
        if any(told in place for place in places):
            self.samples = told
        else:
            self.samples = Counter(shape[0] for _, shape in shapes).most_common(1)[0][0] if shapes else told

    def shapes(self) -> dict[str, list[torch.Size]]:
        """Layer -> of the input of every call."""
        return {name: [x.shape for x in inputs] for name, inputs in self._inputs.items()}

    def inputs(self, name: str) -> list[Tensor]:
        """The inputs of every call of a layer, samples first.

        Raises:
            RuntimeError: one was changed in place since.
        """
        for x, version in zip(self._inputs[name], self._versions[name]):
            if x._version != version:
                raise RuntimeError(f"Curvature: the input of layer {name!r} was changed in place after the call")
        return [x for x in self.samples_first(name, self._inputs[name]) if x is not None]

    def samples_first(self, name: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Tensors that belong to each call's positions, such as its gradient, samples first."""
        if name not in self.layouts:
            return list(tensors)
        pairs = zip(tensors, self.layouts[name])
        return [None if t is None else layout.samples_first(t, self.samples) for t, layout in pairs]

    def calls(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(input, g) of every call of a layer that has a gradient, samples first."""
        grads = self.samples_first(name, self.gradients[name])
        return [(x.detach(), g) for x, g in zip(self.inputs(name), grads) if g is not None]

    def let_go(self, name: str) -> None:
        """Hold the input and gradient of a layer no longer; that there was a gradient is not forgotten."""
        self._inputs[name], self._versions[name] = [], []
        self.gradients[name] = [g if g is None else g.new_empty(0) for g in self.gradients[name]]

    def gradients_of(
        self, output: Tensor, seed: Tensor | None = None, *, create_graph: bool = False
    ) -> dict[str, list[Tensor | None]]:
        """d(output . seed)/dz of every call, None where z does not reach the output; the graph stays."""
        edges = [edge for calls in self._edges.values() for edge in calls]
        found = torch.autograd.grad(
            output, edges, seed, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        rest = iter(found)
        return {name: [next(rest) for _ in calls] for name, calls in self._edges.items()}


def _nodes_behind(tensor: Tensor) -> set[Node]:
    """The nodes of the autograd graph that a tensor was made by; none where it needs no gradient."""
    found: set[Node] = set()
    open_ = [get_gradient_edge(tensor).node] if tensor.requires_grad else []
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_.extend(before for before, _ in node.next_functions if before is not None)
    return found


class ForwardHook:
    """A forward pre-hook that calls `function(args, kwargs)`, uncompiled; deep copies and pickles get an inert one."""

    def __init__(self, function: Callable[[tuple[Any, ...], dict[str, Any]], None] | None) -> None:
        self._function = None if function is None else uncompiled(function)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What torch calls before the forward."""
        if self._function is not None and not _is_exporting():
            self._function(args, kwargs)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[None]]:
        return ForwardHook, (None,)

    @property
    def __name__(self) -> str:  # torch.jit.script asks for it
        raise AttributeError(f"torch.jit.script cannot compile a model with a hook of Python: {REMOVE}")


def _is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.9 takes to be true whenever it compiles, and 2.6 does not have."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never compiled; where it must be, as with fullgraph=True, the error says what to do."""
    return torch.compiler.disable(function, **_REASON)
