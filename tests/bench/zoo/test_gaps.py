"""The oracle itself: against networks with the channels really taken out, by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.zoo.gaps import Gaps, open_gaps, plainly
from flatprune.coupling import NeuronGroup
from flatprune.coupling.neurons import Member

REMOVED, KEPT = torch.tensor([0, 5]), torch.tensor([1, 2, 3, 4, 6, 7])


def member(name, dim, groups=1, size=8):
    return Member((name,), dim, groups, frozenset(), torch.arange(size)[:, None], size)


def masked(model, x, *members):
    copied = copy.deepcopy(model)
    open_gaps(copied, [NeuronGroup("group", list(members))], {0: REMOVED})
    with plainly(), Gaps():
        return copied(x)


def cut(tensor, dim=0):
    return tensor.index_select(dim, KEPT)


def norms():
    return {
        "layer norm": (nn.LayerNorm(8), lambda x, n: F.layer_norm(x, (6,), cut(n.weight), cut(n.bias))),
        "rms norm": (nn.RMSNorm(8), lambda x, n: F.rms_norm(x, (6,), cut(n.weight))),
    }


@pytest.mark.parametrize("kind", norms())
def test_norms_run_over_what_is_there(kind):
    norm, by_hand = norms()[kind]
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Linear(5, 8), norm, nn.GELU(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    members = [member("0.weight", 0), member("0.bias", 0), member("1.weight", 0), member("3.weight", 1)]
    members += [member("1.bias", 0)] if kind == "layer norm" else []
    hidden = F.linear(x, cut(model[0].weight), cut(model[0].bias))
    expected = F.linear(F.gelu(by_hand(hidden, norm)), cut(model[3].weight, 1), model[3].bias)
    torch.testing.assert_close(masked(model, x, *members), expected)


def test_a_group_norm_and_grouped_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    members = [member("0.weight", 0), member("0.bias", 0), member("1.weight", 0), member("1.bias", 0)]
    members.append(member("2.weight", 1, groups=2))
    hidden = F.conv2d(x, cut(model[0].weight), cut(model[0].bias))
    hidden = F.group_norm(hidden, 2, cut(model[1].weight), cut(model[1].bias))
    weight = torch.stack([model[2].weight[:4, 1:], model[2].weight[4:][:, [0, 2, 3]]]).flatten(0, 1)
    expected = model[4](F.conv2d(hidden, weight, model[2].bias, groups=2).flatten(1))
    torch.testing.assert_close(masked(model, x, *members), expected)


def test_a_transposed_convolution_between_depthwise_ones():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1, groups=4)
    ).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    members = [member(f"{layer}.{key}", 0) for layer in (0, 1) for key in ("weight", "bias")] + [member("2.weight", 0)]
    hidden = F.conv2d(x, cut(model[0].weight), cut(model[0].bias))
    hidden = F.conv2d(hidden, cut(model[1].weight), cut(model[1].bias), groups=6)
    expected = model[3](F.conv_transpose2d(hidden, cut(model[2].weight), model[2].bias, 2))
    torch.testing.assert_close(masked(model, x, *members), expected)


def test_heads_of_an_attention_and_statistics_written_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 10), nn.Linear(10, 2)

        def forward(self, x, heads=slice(None)):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)[:, :, heads]
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            y = F.linear(y, self.out.weight.unflatten(1, (4, 2))[:, heads].flatten(1), self.out.bias)
            return self.head(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt())

    model, x = Block().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    entries = torch.arange(8).view(4, 2)
    parts = [
        Member(("qkv.weight",), 0, 1, frozenset(), torch.cat([entries, entries + 8, entries + 16], 1), 24),
        Member(("qkv.bias",), 0, 1, frozenset(), torch.cat([entries, entries + 8, entries + 16], 1), 24),
        Member(("out.weight",), 1, 1, frozenset(), entries, 8),
    ]
    copied = copy.deepcopy(model)
    open_gaps(copied, [NeuronGroup("heads", parts)], {0: torch.tensor([1, 3])})
    with plainly():
        expected = model(x, [0, 2])
        with Gaps():
            found = copied(x)
    torch.testing.assert_close(found, expected)


def test_standardised_and_normed_weights():
    weight = torch.randn(4, 8, 3, dtype=torch.float64)
    v, g = weight.clone(), torch.rand(1, 1, 3, dtype=torch.float64)
    v[:, REMOVED] = torch.nan
    with Gaps():
        found = [F.batch_norm(v.view(1, 4, -1), None, None, training=True).view_as(v), torch._weight_norm(v, g, 2)]
    whole = weight[:, KEPT].contiguous()
    expected = [F.batch_norm(whole.view(1, 4, -1), None, None, training=True).view_as(whole)]
    expected.append(torch._weight_norm(whole, g, 2))
    torch.testing.assert_close([t[:, KEPT] for t in found], expected)


def test_statistics_of_what_is_there():
    x = torch.randn(3, 8, dtype=torch.float64)
    whole = x[:, KEPT]
    x[:, REMOVED] = torch.nan
    with Gaps():
        found = [x.sum(1), x.mean(1), x.var(1), x.std(1, unbiased=False), x.norm(dim=1), x.amax(1), x.max(1).values]
        found.append(x.softmax(1)[:, KEPT])
        assert x.sum(0)[REMOVED].isnan().all()
    expected = [whole.sum(1), whole.mean(1), whole.var(1), whole.std(1, unbiased=False), whole.norm(dim=1)]
    expected += [whole.amax(1), whole.max(1).values, whole.softmax(1)]
    torch.testing.assert_close(found, expected)
