"""What `find_coupling` takes, says and leaves as it was; which operators couple what is tested beside this file."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import Call, find_coupling
from kfac_ext import Curvature
from tests.coupling.tiny_networks import Net, check, conv, image, pooled
from tests.pruning.pruning_networks import NETWORKS, Concat, chain, digits

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def perceptron(**options) -> Net:
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 6, **options), b=nn.Linear(6, 3, **options))


def names(coupling) -> set[str]:
    return {group.name for group in coupling.groups}


# what it says


def test_the_output_stays_and_unused_layers_are_left_alone():
    coupling = find_coupling(Concat(), digits()[0][:2])
    assert coupling.refused == {"head": "it is an output of the model"}
    assert coupling.expected == {"head"}
    assert names(coupling) == {"left", "right", "join", "gate", "after"}


def test_groups_are_in_forward_order_and_know_their_width():
    groups = find_coupling(chain(), digits()[0][:2]).groups
    assert [(group.name, group.width, group.unit) for group in groups] == [("0", 8, 1), ("3", 12, 1), ("8", 20, 1)]


def test_a_stream_that_stays_is_one_refusal():
    """One reason for all layers that make it, however many."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = x
        for layer in m.layers:
            y = y + layer(F.relu(y))
        return m.head(y)

    net = Net(forward, layers=nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), head=nn.Linear(5, 3))
    coupling = find_coupling(net, X)
    surprising = [refusal for refusal in coupling.refusals if not refusal.expected]
    assert len(surprising) == 1
    assert set(surprising[0].layers) == {f"layers.{i}" for i in range(4)}
    assert "add" in surprising[0].reason
    assert str(surprising[0]).startswith("'layers.0', 'layers.1', 'layers.2' and 1 more: ")


def test_groups_of_one_layer_have_names_apart():
    net = Net(
        lambda m, x: m.b(m.a(x)[:, : m.size]) + m.c(m.a(x)[:, m.size :]),
        a=nn.Linear(5, 9),
        b=nn.Linear(4, 3),
        c=nn.Linear(5, 3),
        size=4,
    )
    found = [group.name for group in find_coupling(net, X).groups]
    assert len(set(found)) == 2


def test_roles():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    (group,) = find_coupling(net, image()).groups
    found = {(member.names[0], member.dim): member.roles for member in group.members}
    assert found == {
        ("0.weight", 0): {"producer"},
        ("3.weight", 1): {"consumer"},
        **{(name, 0): {"channelwise"} for name in ("0.bias", "2.weight", "2.bias")},
        **{(f"1.{name}", 0): {"channelwise"} for name in ("weight", "bias", "running_mean", "running_var")},
    }
    assert [member.names[0] for member in group.of_role("producer")] == ["0.weight"]
    assert all(member.index.dtype == torch.int64 for member in group.members)


def test_one_channel_is_no_group():
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 1), b=nn.Linear(1, 3))
    check(net, X)
    check(
        Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 2), b=nn.Linear(2, 3)),
        X,
        {"a": range(2), "b.weight[1]": range(2)},
    )


# exclude


def test_exclude_by_name_container_and_type():
    x = digits()[0][:2]
    assert names(find_coupling(chain(), x, exclude=["3"])) == {"0", "8"}
    assert names(find_coupling(chain(), x, exclude=[nn.Linear])) == {"0", "3"}
    assert "conv" not in names(find_coupling(NETWORKS["resnet"](), x, exclude=["stages.0"]))
    coupling = find_coupling(chain(), x, exclude=["3"])
    assert "excluded" in coupling.refused["3"]
    assert "3" in coupling.expected
    assert not find_coupling(chain(), x, exclude=[""]).groups


def test_exclude_names_what_the_model_does_not_have():
    with pytest.raises(KeyError, match="'nowhere'"):
        find_coupling(chain(), digits()[0][:2], exclude=["nowhere"])


@pytest.mark.parametrize(
    ("name", "exclude", "left"),
    [
        ("attention", ["attn"], {"mlp.1"}),
        ("attention", [NETWORKS["attention"].Heads], {"mlp.1"}),
        ("attention", ["mlp"], {"attn.qkv"}),
        ("attention", ["position"], {"attn.qkv", "mlp.1"}),
        ("attention", ["embed"], {"attn.qkv", "mlp.1"}),
        ("sequence", [nn.Conv1d], set()),
        ("transposed", [nn.ConvTranspose2d], {"down", "mix"}),
        ("transposed", ["up"], {"down", "grouped", "mix"}),
        ("norms", [nn.LayerNorm], {"first", "second", "third"}),
        ("norms", [nn.GroupNorm], {"fourth", "fifth"}),
    ],
)
def test_exclude_reaches_every_kind_of_tensor(name, exclude, left):
    assert names(find_coupling(NETWORKS[name](), digits()[0][:2], exclude=exclude)) == left


# what it takes


class Padded(nn.Module):
    """Words and a mask, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.a(self.words(ids))
        return self.b(x if mask is None else x * mask[..., None] * scale)


def test_inputs_by_position_keyword_or_call():
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    for inputs in (ids, (ids,), {"ids": ids, "mask": mask}, Call((ids,), {"mask": mask, "scale": 2.0}), [Call((ids,))]):
        assert names(find_coupling(Padded(), inputs)) == {"words", "a"}


def test_nested_inputs_and_outputs():
    def forward(m: Net, batch: dict) -> dict:
        x, (y, times) = batch["x"], batch["others"]
        return {"logits": m.b(F.relu(m.a(x) + m.c(y)) * times), "extra": [x, None, "text"]}

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, Call(({"x": X, "others": (X.clone(), 3)},)), {**PLAIN, "c": range(6)}, refused={"b": "output"})


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class Record(OrderedDict):
    """As other libraries return: a dict with attributes."""


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, h: (y, h),
        lambda y, h: {"a": [y, {"b": h}]},
        lambda y, h: Record(logits=y, features=h),
        lambda y, h: Output(y, h),
    ],
    ids=["tuple", "nested", "record", "dataclass"],
)
def test_features_that_are_returned_stay(pack):
    net = Net(lambda m, x: pack(m.b(m.a(x)), m.a(x)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, X, refused={"a": "output of the model"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_dtypes(dtype):
    net = perceptron(dtype=dtype)
    check(net, X.to(dtype), PLAIN)
    assert net.a.weight.dtype == dtype


def test_a_forward_with_a_dtype_written_into_it():
    net = Net(lambda m, x: m.b(m.a(x.float()).to(torch.float32)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, X, PLAIN)


def test_autocast_and_no_gradients():
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = m.a(x)
        with torch.no_grad():
            return m.b(x.float())

    check(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), X, PLAIN)
    with torch.no_grad():
        check(perceptron(), X, PLAIN)
    with torch.inference_mode():
        assert names(find_coupling(perceptron(), torch.randn(2, 5))) == {"a"}


def test_gradients_inside_the_forward():
    """An energy whose gradient is the output."""

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = m.b(torch.tanh(m.a(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 1))
    coupling = find_coupling(net, X)
    assert names(coupling) == {"a"} or "a" in coupling.refused


def test_one_sample_is_enough_for_batch_norm_in_training():
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    assert names(find_coupling(net, torch.randn(1, 5))) == {"0"}


def test_frozen_parameters_are_traced_too():
    assert names(find_coupling(chain().requires_grad_(False), digits()[0][:2])) == {"0", "3", "8"}


def test_a_layer_with_two_names():
    net = Net(
        lambda m, x: m.head(F.relu(m.alias(F.relu(m.shared(F.relu(m.body(x))))))),
        body=nn.Linear(5, 6),
        shared=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    net.alias = net.shared
    coupling = check(
        net, X, {"body": range(6), "shared": range(6), "shared.weight[1]": range(6), "head.weight[1]": range(6)}
    )
    named = {name for member in coupling.groups[0].members for name in member.names}
    assert {"shared.weight", "alias.weight"} <= named


# what it leaves as it was


def test_the_model_is_left_as_it_was():
    model = chain().train()
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    tensors = [(t, t.data_ptr(), t.clone()) for t in (*model.parameters(), *model.buffers())]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    types = [type(module) for module in model.modules()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    find_coupling(model, digits()[0][:2])
    assert all(t.data_ptr() == place and torch.equal(t, value) for t, place, value in tensors)
    assert all(vars(module) == before for module, before in attributes)
    assert [type(module) for module in model.modules()] == types
    assert model.training
    assert not model[4].training
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_buffer_that_is_empty_so_far_is_left_so():
    """As those of observers are that gather the ranges of quantisation."""

    class Observed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("largest", torch.tensor([]))

        def forward(self, x):
            with torch.no_grad():
                self.largest.resize_(4).copy_(x.abs().amax(0))
            return self.last(self.first(x).relu())

    model = Observed()
    coupling, curvature = find_coupling(model, torch.randn(2, 4)), Curvature(model)
    curvature.trace(torch.randn(2, 4))
    assert [group.name for group in coupling.groups] == ["first"]
    assert model.largest.shape == (0,)


def test_inputs_are_left_as_they_were():
    """A forward that writes to its input."""
    x = torch.randn(2, 5)
    before = x.clone()
    check(Net(lambda m, x: m.b(m.a(x.mul_(2))), a=nn.Linear(5, 6), b=nn.Linear(6, 3)), x, PLAIN)
    assert torch.equal(x, before)


def test_a_forward_that_raises_leaves_everything_and_is_named():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.body(x)

    def fails(m: Net, x: Tensor) -> Tensor:
        raise RuntimeError("no such thing")

    body = Net(fails, attend=nn.MultiheadAttention(6, 2))
    net = Net(forward, body=body).train()
    with pytest.raises(ValueError, match=r"example_inputs: .*body.*no such thing"):
        find_coupling(net, X)
    assert net.training
    assert type(body.attend) is nn.MultiheadAttention
    assert not net._forward_hooks
    assert not body._forward_pre_hooks


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(2, 4), "in a"),
        (torch.zeros(2, 5, dtype=torch.long), "in a"),
        ((), "example_inputs is empty"),
        ((X, X), "takes"),
        ({"nothing": X}, "nothing"),
        (X.to("meta"), "a"),
    ],
    ids=["shape", "dtype", "empty", "many", "keyword", "device"],
)
def test_bad_inputs_are_one_clear_error(inputs, words):
    net = perceptron()
    net.forward = lambda x: net.b(F.relu(net.a(x)))
    with pytest.raises(ValueError, match=words):
        find_coupling(net, inputs)
    assert names(find_coupling(net, X)) == {"a"}


def test_logits_of_which_a_loss_is_made_are_outputs():
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = m.b(F.relu(m.a(x)))
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), logits

    coupling = find_coupling(Net(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), X)
    assert names(coupling) == {"a"}
    assert coupling.refused == {"b": "it is an output of the model"} and coupling.expected == {"b"}


def test_a_model_without_neurons_has_no_groups():
    coupling = find_coupling(nn.Linear(5, 3), X)
    assert not coupling.groups
    assert coupling.expected == set(coupling.refused)
    assert not find_coupling(nn.ReLU(), X).groups


def test_what_is_found_does_not_depend_on_the_example():
    def forward(m: Net, x: Tensor) -> Tensor:
        return pooled(m.b(F.relu(m.norm(m.a(x)))))

    net = Net(forward, a=conv(3, 6), norm=nn.BatchNorm2d(6), b=conv(6, 3))
    for x in (image(), image(size=9), torch.zeros(1, 3, 4, 4), torch.full((3, 3, 6, 6), 1e4)):
        check(net, x, {**PLAIN, "norm": range(6)})
