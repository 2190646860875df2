"""Small copies of layers that other libraries ship, each with a network of plain modules that computes the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PaddedConv(nn.Conv2d):
    """As efficientnet_pytorch: pads by hand so that no pixel is lost; the module's own padding is unused."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 1, 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ConvNormAct(nn.Conv2d):
    """As detectron2: a convolution with norm and activation inside."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.relu(self.norm(x), inplace=True)


class BatchNormAct(nn.BatchNorm2d):
    """As timm: the activation is inside the batch norm."""

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return torch.tanh(x)


class InputMajor(nn.Module):
    """As transformers' Conv1D: a weight [in, out], and rows of all samples and positions at once."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        shape = (*x.shape[:-1], len(self.bias))
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class TurnedInputMajor(nn.Module):
    """A weight [in, out] that F.linear takes."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)

    def forward(self, x):
        return F.linear(x, self.weight.t())


class Multiplied(nn.Module):
    """As layers of graph networks: x @ weight, the bias added later."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.shift


class Turned(nn.Linear):
    """As Falcon's linear layer: the transpose of the weight, the bias added later."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class ForeignLinear(nn.Module):
    """As torch_geometric's Linear."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 2), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Adapted(nn.Linear):
    """As a low-rank adapter: the base's forward and something more."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Attention(nn.Module):
    """Queries, keys and values by one parameter, the output by a module that is never called."""

    def __init__(self, width, heads):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / 2)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width))
        self.out_proj, self.heads = nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(mixed, self.out_proj.weight, self.out_proj.bias)


class PlainAttention(Attention):
    """The same of modules."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.in_proj = nn.Linear(width, 3 * width)
        del self.in_proj_weight, self.in_proj_bias

    def forward(self, x):
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    """torch's own, with itself, on [N, T, d]."""

    def __init__(self, width, heads):
        super().__init__(width, heads, batch_first=True)
        nn.init.normal_(self.in_proj_bias)
        nn.init.normal_(self.out_proj.bias)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Upsample(nn.ConvTranspose2d):
    """A transposed convolution with a forward of its own."""

    def forward(self, x):
        return torch.tanh(F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1, groups=self.groups))


class Pooled(nn.Module):
    """Mean over positions [N, T, d] or [N, C, h, w]."""

    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(dim=self.dims)


def rows(layer, activation=None):
    """A network on [N, T, 4] with `layer` 4 -> 6 in it."""
    activation = nn.Tanh() if activation is None else activation
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, activation, Pooled(1), nn.Linear(6, 3))


def images(*layers, channels=6):
    """A network on images of 2 channels with `layers` in it, which make `channels` of 4."""
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), *layers, nn.Tanh(), Pooled(2, 3), nn.Linear(channels, 3))


ROWS, IMAGE = (3, 4), (2, 6, 5)
# name -> (network, plain network, input shape, {layer: (its place in the plain network, that of z)},
#          {name in the plain network: name in the other}, layers whose weight [in, out] is the plain one's transpose)
CASES = {
    "padded_conv": (
        lambda: images(PaddedConv(4, 6, 2, stride=2, padding=3)),
        lambda: images(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(4, 6, 2, stride=2)),
        IMAGE, {"0": ("0", "0"), "2": ("3", "3"), "5": ("6", "6")}, {"3.": "2.", "6.": "5."}, (),
    ),
    "padded_depthwise": (
        lambda: images(PaddedConv(4, 4, 2, groups=4, bias=False), channels=4),
        lambda: images(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(4, 4, 2, groups=4, bias=False), channels=4),
        IMAGE, {"0": ("0", "0"), "2": ("3", "3"), "5": ("6", "6")}, {"3.": "2.", "6.": "5."}, (),
    ),
    "conv_norm_act": (
        lambda: images(ConvNormAct(4, 6, 3, padding=1, bias=False)),
        lambda: images(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        IMAGE, {"0": ("0", "0"), "2": ("2", "3"), "5": ("7", "7")}, {"3.": "2.norm.", "7.": "5."}, (),
    ),
    "norm_with_activation": (
        lambda: images(nn.Conv2d(4, 6, 3), BatchNormAct(6)),
        lambda: images(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh()),
        IMAGE, {"0": ("0", "0"), "2": ("2", "2"), "6": ("7", "7")}, {"7.": "6."}, (),
    ),
    "input_major": (
        lambda: rows(InputMajor(6, 4)), lambda: rows(nn.Linear(4, 6)),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {}, ("2",),
    ),
    "input_major_in_place": (
        lambda: rows(InputMajor(6, 4), nn.ReLU(inplace=True)), lambda: rows(nn.Linear(4, 6), nn.ReLU()),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {}, ("2",),
    ),
    "multiplied": (
        lambda: rows(Multiplied(6, 4)), lambda: rows(nn.Linear(4, 6)),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {"2.bias": "2.shift"}, ("2",),
    ),
    "turned": (
        lambda: rows(Turned(4, 6)), lambda: rows(nn.Linear(4, 6)),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {}, (),
    ),
    "turned_input_major": (
        lambda: rows(TurnedInputMajor(6, 4)), lambda: rows(nn.Linear(4, 6, bias=False)),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {}, ("2",),
    ),
    "foreign_linear": (
        lambda: rows(ForeignLinear(4, 6)), lambda: rows(nn.Linear(4, 6)),
        ROWS, {"0": ("0", "0"), "2": ("2", "2"), "5": ("5", "5")}, {}, (),
    ),
    "attention": (
        lambda: nn.Sequential(Attention(4, 2), nn.Tanh(), Pooled(1), nn.Linear(4, 3)),
        lambda: nn.Sequential(PlainAttention(4, 2), nn.Tanh(), Pooled(1), nn.Linear(4, 3)),
        ROWS, {"0.in_proj_weight": ("0.in_proj",) * 2, "0.out_proj": ("0.out_proj",) * 2, "3": ("3", "3")},
        {"0.in_proj.": "0.in_proj_"}, (),
    ),
    "torch_attention": (
        lambda: nn.Sequential(TorchAttention(4, 2), nn.Tanh(), Pooled(1), nn.Linear(4, 3)),
        lambda: nn.Sequential(PlainAttention(4, 2), nn.Tanh(), Pooled(1), nn.Linear(4, 3)),
        ROWS, {"0.in_proj_weight": ("0.in_proj",) * 2, "0.out_proj": ("0.out_proj",) * 2, "3": ("3", "3")},
        {"0.in_proj.": "0.in_proj_"}, (),
    ),
    "upsample": (
        lambda: images(Upsample(4, 6, 3, groups=2)),
        lambda: images(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh()),
        IMAGE, {"0": ("0", "0"), "2": ("2", "2"), "5": ("6", "6")}, {"6.": "5."}, (),
    ),
}  # fmt: skip


def make(name):
    """(network, plain network with the same values, a batch of 5, the places of layers)."""
    torch.manual_seed(0)
    builder, plain_builder, shape, places, renamed, transposed = CASES[name]
    model, plain = builder().double(), plain_builder().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # an affine map that is not the identity
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    values = model.state_dict()
    for key, tensor in plain.state_dict().items():
        other = next((new + key.removeprefix(old) for old, new in renamed.items() if key.startswith(old)), key)
        is_transposed = any(key == f"{layer}.weight" for layer in transposed)
        tensor.copy_(values[other].T if is_transposed else values[other])
    return model, plain, torch.randn(5, *shape, dtype=torch.float64), places
