"""Example inputs in every form that people have, and what is said of those that do not fit."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flatprune
from flatprune.coupling import Call
from flatprune.coupling.example_inputs import described, example_calls

X, MASK = torch.randn(2, 20), torch.ones(2, 32)


class Body(nn.Module):
    """Three layers; how it is called is left to those below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 32), nn.Linear(32, 24), nn.Linear(24, 5)

    def compute(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = F.relu(self.a(x))
        return self.head(F.relu(self.b(h)))


class Plain(Body):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return scale * self.compute(x, mask)


class OfBatch(Body):
    """Takes a whole batch as one argument."""

    def forward(self, batch) -> Tensor:
        return self.compute(batch["x"] if isinstance(batch, (dict, UserDict)) else batch[0])


class OfImages(Body):
    """Takes a list of images, and boxes in training alone, as detectors do."""

    def forward(self, images: list, targets: list | None = None) -> Tensor:
        assert isinstance(images, list), "images is expected to be a list"
        return self.compute(torch.stack(images))


class OfKeywords(Body):
    """Whatever keywords come."""

    def forward(self, **inputs) -> Tensor:
        return self.compute(inputs["x"])


class Pair(Body):
    """A tuple and a dict are two arguments of its own."""

    def forward(self, features: tuple, options: dict) -> Tensor:
        return options["scale"] * self.compute(features[0])


READ = {
    "tensor": (Plain, X, Call((X,))),
    "tuple": (Plain, (X, MASK), Call((X, MASK))),
    "list": (Plain, [X, MASK], Call((X, MASK))),
    "dict": (Plain, {"x": X, "scale": 2.0}, Call((), {"x": X, "scale": 2.0})),
    "mapping": (Plain, UserDict(x=X), Call((), {"x": X})),
    "args and kwargs": (Plain, ((X,), {"scale": 2.0}), Call((X,), {"scale": 2.0})),
    "args and no kwargs": (Plain, ((X, MASK), {}), Call((X, MASK))),
    "call": (Plain, Call((X,)), Call((X,))),
    "dict as one": (OfBatch, {"x": X, "y": MASK}, Call(({"x": X, "y": MASK},))),
    "tuple as one": (OfBatch, (X, MASK), Call(((X, MASK),))),
    "list as one": (OfImages, [X[0], X[1]], Call(([X[0], X[1]],))),
    "long list as one": (OfImages, [*X, *X], Call(([*X, *X],))),
    "any keywords": (OfKeywords, {"x": X, "y": MASK}, Call((), {"x": X, "y": MASK})),
    "tuple and dict of its own": (Pair, ((X,), {"scale": 2.0}), Call(((X,), {"scale": 2.0}))),
}


@pytest.mark.parametrize("name", READ)
def test_every_form_is_read_as_the_call_that_works(name):
    kind, given, expected = READ[name]
    model = kind()
    (call,) = example_calls(model, given)
    assert described(call) == described(expected)
    assert torch.equal(call.run(model), expected.run(model))
    pruner = flatprune.Pruner(
        model, None, flatprune.Curvature(model), given, target=flatprune.Target(params=0.5), total_steps=8
    )
    assert pruner.widths() == {"a": 32, "b": 24}


def test_several_calls_stay_several():
    calls = [Call((X,)), Call((X,), {"scale": 2.0})]
    assert example_calls(Plain(), calls) == calls


BATCH = {"image": X, "label": torch.tensor([0, 1]), "name": ["a", "b"]}


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, batch: F.cross_entropy(model(batch["image"], scale=2.0), batch["label"]),
        lambda model, batch, weight=1.0: weight * model(batch["image"], scale=2.0),
    ],
)
def test_forward_takes_a_batch_of_a_loader(forward):
    model = Plain().train()
    (call,) = example_calls(model, BATCH, forward)
    assert described(call) == described((X, {"scale": 2.0}))
    assert model.training and not model._forward_pre_hooks
    loader = DataLoader(TensorDataset(torch.randn(8, 20), torch.zeros(8)), batch_size=2)
    pruner = flatprune.Pruner(
        model,
        None,
        flatprune.Curvature(model),
        next(iter(loader)),
        forward=lambda model, batch: model(batch[0]),
        target=flatprune.Target(params=0.5),
        total_steps=8,
    )
    assert pruner.widths() == {"a": 32, "b": 24}


def test_forward_may_take_the_batch_alone_and_call_often():
    model = Plain()
    views = torch.randn(3, 2, 20)
    calls = example_calls(model, views, lambda batch: [model(view) for view in batch] + [model(batch[0], MASK)])
    assert [described(call) for call in calls] == ["(float32 [2, 20])", "(float32 [2, 20], float32 [2, 32])"]


def test_choosing_a_reading_leaves_the_model_as_it_was():
    class Noisy(OfBatch):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(20)

        def forward(self, batch, other=None) -> Tensor:
            return self.compute(self.norm(batch[0] + torch.randn(20)))

    model = Noisy().train()
    rng, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    (call,) = example_calls(model, (X, MASK))
    assert described(call) == described(((X, MASK),))  # two arguments raise behind the noise
    assert model.training and torch.equal(rng, torch.get_rng_state()) and torch.equal(mean, model.norm.running_mean)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (
            Plain,
            (X, torch.tensor([0, 1]), 3),
            r"\(float32 \[2, 20\], int64 \[2\], 3\), as pos.* too many",
        ),
        (Plain, {"x": X, "labels": MASK}, r"as keywords: TypeError: .*'labels'; as one argument: .* forward=lambda"),
        (
            Plain,
            torch.randn(2, 19),
            r"raises in evaluation mode, in a .* given \(float32 \[2, 19\]\); give",
        ),
        (Plain, ((X,), {"size": 2.0}), r"as \(args, kwargs\): .*'size'; as positional arguments: "),
        (Plain, (), "example_inputs is empty"),
    ],
    ids=["batch", "keyword", "shape", "both", "empty"],
)
def test_inputs_that_do_not_fit_are_refused_with_all_readings(kind, given, words):
    with pytest.raises(ValueError, match=words):
        flatprune.find_coupling(kind(), given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (DataLoader(TensorDataset(X)), r"is DataLoader, expected a batch out of it, next\(iter\(loader\)\)"),
        (TensorDataset(X), "is TensorDataset, expected a batch"),
        (iter([X]), "is list_iterator, expected a batch"),
        (None, "example_inputs is None"),
    ],
)
def test_a_loader_is_no_input(given, words):
    with pytest.raises(TypeError, match=words):
        example_calls(Plain(), given)


@pytest.mark.parametrize(
    ("forward", "error", "words"),
    [
        ("image", TypeError, "forward is str, expected one such as lambda model, batch"),
        (lambda: X, TypeError, r"forward takes \(\), expected \(model, batch\) or \(batch\)"),
        (lambda model, batch: model.compute(batch["image"]), ValueError, "does not call the model"),
        (lambda model, batch: model(batch["images"]), ValueError, r"it raises with .*'image': float32 .*KeyError"),
        (
            lambda model, batch: model(batch["image"]).sum().backward(),
            ValueError,
            "only calls the model, without a back",
        ),
    ],
)
def test_a_forward_that_does_not_fit_is_refused(forward, error, words):
    model = Plain()
    with pytest.raises(error, match=words):
        example_calls(model, BATCH, forward)
    assert not model._forward_pre_hooks and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("given", [X[:0], (X[:0],)])
def test_inputs_without_samples_are_refused(given):
    """On which every cut would look right."""
    with pytest.raises(ValueError, match=r"example_inputs: .*float32 \[0, .* has no samples"):
        example_calls(Plain(), given)
