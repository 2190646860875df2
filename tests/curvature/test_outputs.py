"""What of an output the loss is of, and where its classes stand."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext import Curvature, KFACPreconditioner


@dataclass
class Answer:
    scores: Tensor
    features: Tensor


Pair = namedtuple("Pair", ["scores", "features"])
BUILD = {
    "tuple": lambda s, f: (s, f),
    "list": lambda s, f: [s, [f]],
    "dict": lambda s, f: {"scores": s, "features": f},
    "ordered": lambda s, f: OrderedDict(scores=s, features=f),
    "dataclass": Answer,
    "named": Pair,
    "object": lambda s, f: SimpleNamespace(scores=s, features=f),
}


class Net(nn.Module):
    """An output of some kind."""

    def __init__(self, build):
        super().__init__()
        self.hidden, self.head, self.build = nn.Linear(6, 5), nn.Linear(5, 3), build

    def forward(self, x):
        features = torch.tanh(self.hidden(x))
        return self.build(self.head(features), features)


def watched(build, **options):
    torch.manual_seed(0)
    model, x = Net(build).double(), torch.randn(16, 6, dtype=torch.float64)
    return model, x, Curvature(model, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("by", ["key", "index", "function"])
def test_what_is_picked_is_what_counts(kind, by):
    plain, x, expected = watched(lambda s, _f: s)
    plain(x)
    key = 0 if by == "index" or kind in ("tuple", "list") else "scores"
    pick = key if by != "function" else lambda out: out.scores if hasattr(out, "scores") else out[key]
    model, x, curvature = watched(BUILD[kind], output=pick)
    model(x)
    assert torch.equal(curvature.factors.buffer, expected.factors.buffer)


@pytest.mark.parametrize("kind", BUILD)
def test_several_tensors_are_refused_by_name(kind):
    model, x, curvature = watched(BUILD[kind])
    with pytest.raises(ValueError, match=r"\(16, 3\) or .*\(16, 5\); output= says of which"):
        curvature.trace(x)
    with pytest.raises(ValueError, match="output="):
        model(x)


@pytest.mark.parametrize(
    "build",
    [
        lambda s, f: {"logits": s, "hidden_states": (f, f)},
        lambda s, f: {"loss": s.mean(), "scores": s, "count": 3},
        lambda s, f: (s,),
        lambda s, f: [s, f.argmax(-1), None],
    ],
)
def test_what_can_only_be_meant_needs_no_word(build):
    plain, x, expected = watched(lambda s, _f: s)
    plain(x)
    model, x, curvature = watched(build)
    model(x)
    assert torch.equal(curvature.factors.buffer, expected.factors.buffer)


def test_bad_picks_say_what_there_is():
    for pick, error, match in (
        ("logits", ValueError, r"output='logits', but the model returns dict with \['scores', 'features'\]"),
        (7, ValueError, "output=7"),
        (lambda out: 3, TypeError, "gives a int"),
        (lambda out: tuple(out.values()), ValueError, "2 tensors, expected one, or as many losses"),
    ):
        _, x, curvature = watched(BUILD["dict"], output=pick)
        with pytest.raises(error, match=match):
            curvature.trace(x)
    with pytest.raises(TypeError, match=r"output is 1\.5"):
        watched(BUILD["dict"], output=1.5)
    with pytest.raises(TypeError, match="class_dim is 'last'"):
        watched(BUILD["dict"], class_dim="last")
    with pytest.raises(ValueError, match="batch_dim is -1"):
        watched(BUILD["dict"], batch_dim=-1)


def test_the_preconditioner_reads_outputs_too():
    model = Net(BUILD["dict"])
    preconditioner = KFACPreconditioner(model, output="scores", damping=0.1)
    F.cross_entropy(model(torch.randn(9, 6))["scores"], torch.zeros(9, dtype=torch.long)).backward()
    preconditioner.step()
    assert preconditioner.curvature.is_updated


# where the classes stand


class Sequence(nn.Module):
    """Outputs [N, T, 7] of a Linear, turned round or changed by a function."""

    def __init__(self, after=lambda out: out):
        super().__init__()
        self.hidden, self.head, self.after = nn.Linear(6, 5), nn.Linear(5, 7), after

    def forward(self, x):
        return self.after(self.head(torch.tanh(self.hidden(x))))


def exact(output):
    p = output.detach().reshape(-1, 7).softmax(-1)
    return torch.diag(p.mean(0)) - p.T @ p / len(p)


@pytest.mark.parametrize("length", [5, 7])
@pytest.mark.parametrize(
    ("after", "options"),
    [
        (lambda out: out, {}),
        (lambda out: out.transpose(1, 2), {"class_dim": 1}),
        (lambda out: out * 1.5, {"class_dim": -1}),
        (lambda out: out.flatten(0, 1), {}),
        (lambda out: out.transpose(0, 1), {"class_dim": -1, "batch_dim": 1}),
    ],
)
def test_classes_of_sequences(after, options, length):
    torch.manual_seed(0)
    model, x = Sequence(after).double(), torch.randn(4000, length, 6, dtype=torch.float64)
    curvature = Curvature(model, kfac_approx="expand", generator=torch.Generator().manual_seed(0), **options)
    output = model(x)
    if "class_dim" in options and options["class_dim"] == 1:
        output = output.transpose(1, 2)
    wanted = exact(output)
    if options.get("class_dim") == -1 and "batch_dim" not in options:
        wanted = wanted * 1.5**2
    torch.testing.assert_close(curvature.factors["head.G"], wanted, rtol=0.03, atol=4e-3)


def test_sizes_tell_where_the_classes_went():
    model = Sequence(lambda out: out.transpose(1, 2) * 2)
    curvature = Curvature(model, factor_update_steps=1)
    curvature.trace(torch.randn(2, 5, 6))
    assert curvature.reading.prediction((model(torch.randn(3, 4, 6)),)).shape == (3, 7, 4)
    with pytest.raises(ValueError, match=r"7 classes if they are dimension 1.*or 7 if they are the last; class_dim=1"):
        model(torch.randn(3, 7, 6))


def test_an_output_of_no_layer_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2))
    with pytest.raises(ValueError, match="class_dim=1 or class_dim=-1"):
        Curvature(model).trace(torch.randn(2, 3, 4, 4))
    Curvature(model, class_dim=1).trace(torch.randn(2, 3, 4, 4))


def test_features_are_known_after_loading():
    model, x = Sequence(), torch.randn(4, 7, 6)
    curvature = Curvature(model)
    curvature.trace(x)
    other = Curvature(Sequence())
    other.load_state_dict(curvature.state_dict())
    assert other.reading.prediction((model(x),)).shape == (4, 7, 7)
    assert other.reading.features == [(-1, 7)]


def test_losses_that_are_none():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="fisher_type='empirical'"):
        Curvature(model, loss=nn.CTCLoss())
    with pytest.raises(ValueError, match="fisher_type='empirical'"):
        Curvature(model, loss="other")
    with pytest.raises(TypeError, match="loss is 3"):
        Curvature(model, loss=3)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        Curvature(model, reduction="none")
    with pytest.raises(ValueError, match="loss is empty"):
        Curvature(model, loss=[])
    with pytest.raises(ValueError, match="expected two outputs, mean and variance"):
        Curvature(model, loss="gaussian_nll").trace(torch.randn(4, 3)[:, None])
    with pytest.raises(ValueError, match="2 losses, and output gives 1 of what the model returns"):
        Curvature(model, loss=["mse", "mse"]).trace(torch.randn(4, 3))


def test_classes_of_each_output_stand_where_its_layer_has_them():
    """Pixels of a convolution, then tokens of a Linear that sizes alone would not tell from channels."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

        def forward(self, x):
            return self.conv(x), self.linear(x.mean(dim=1)[:, :4])

    curvature = Curvature(Both(), loss=["cross_entropy"] * 2, output=[0, 1])
    curvature.trace(torch.randn(2, 3, 6, 5))
    assert curvature.reading.features == [(1, 4), (-1, 4)]
    curvature.model(torch.randn(2, 3, 6, 5))
    assert curvature.loss.shapes == [(4, 6, 5), (4, 4)]
