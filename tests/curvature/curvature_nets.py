"""Small networks that stand for what models contain; each entry: builder, input shape, what layers have a norm."""

from __future__ import annotations

import torch
from torch import nn


class Sequence(nn.Module):
    """Linear layers on [N, T, d], mean over T at the end."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).mean(dim=1))


class CalledTwice(nn.Module):
    """One Linear called twice in a forward."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class ConvCalledTwice(nn.Module):
    """One grouped convolution called on images of two sizes."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(x[:, :, ::2, ::2]))
        return self.head(x.mean(dim=(2, 3)))


class Residual(nn.Module):
    """The output of `second` goes to a batch norm and past it: no norm of its own. `first` has one."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.side = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        y = self.second(x)
        return self.head((self.side(y) + y).mean(dim=(2, 3)))


class Segmenter(nn.Module):
    """Predictions per pixel: output [N, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)))


def mlp():
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


def mlp_norm():
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def conv(**options):
    body = nn.Conv2d(4, 6, 3, **options)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=False), nn.ReLU(), body, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip


def conv_norm():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def sequence_conv(**options):
    """Convolutions over [N, C, L]; `options` of the second one."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, bias=False), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 3, **options),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def transposed(kind=nn.ConvTranspose2d, **options):
    """A transposed convolution with a batch norm behind it; `options` of it."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if kind is nn.ConvTranspose2d else (nn.Conv1d, nn.BatchNorm1d)
    return nn.Sequential(
        conv(2, 4, 3, stride=2), nn.ReLU(), kind(4, 6, 3, **options), norm(6), nn.ReLU(inplace=True), conv(6, 3, 1),
    )  # fmt: skip


class Volumes(nn.Module):
    """A convolution over volumes called twice, on two sizes."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Conv3d(2, 2, 2, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(self.shared(x[:, :, ::2])).mean(dim=(2, 3, 4)))


def volumes(**options):
    """Convolutions over [N, C, D, H, W]; `options` of the second one, which has a batch norm behind it."""
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 1, 2), bias=False), nn.ReLU(), nn.Conv3d(4, 6, (2, 3, 2), **options), nn.BatchNorm3d(6),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def transposed_volumes(**options):
    """A transposed convolution over volumes; `options` of it."""
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, stride=2), nn.ReLU(), nn.ConvTranspose3d(4, 6, (2, 3, 2), **options), nn.BatchNorm3d(6),
        nn.ReLU(inplace=True), nn.Conv3d(6, 3, 1),
    )  # fmt: skip


IMAGE = (2, 6, 5)
VOLUME = (2, 4, 3, 4)
SEQUENCE = (2, 9)
NETS = {
    "mlp": (mlp, (4,)),
    "mlp_norm": (mlp_norm, (4,)),
    "sequence": (Sequence, (3, 4)),
    "called_twice": (CalledTwice, (4,)),
    "conv_called_twice": (ConvCalledTwice, (4, 5, 6)),
    "residual": (Residual, IMAGE),
    "segmenter": (Segmenter, IMAGE),
    "conv_norm_depthwise": (conv_norm, IMAGE),
    "conv_stride_dilation": (lambda: conv(stride=2, dilation=(1, 2), padding=(2, 1)), IMAGE),
    "conv_same": (lambda: conv(padding="same", dilation=2), IMAGE),
    "conv_grouped": (lambda: conv(groups=2, padding=1), IMAGE),
    "conv_circular": (lambda: conv(padding=1, padding_mode="circular"), IMAGE),
    "conv_reflect": (lambda: conv(padding=(1, 2), padding_mode="reflect"), IMAGE),
    "conv_replicate": (lambda: conv(padding="same", padding_mode="replicate"), IMAGE),
    "sequence_conv": (lambda: sequence_conv(stride=2, dilation=2, padding=3), SEQUENCE),
    "sequence_conv_grouped": (lambda: sequence_conv(groups=2, padding="same"), SEQUENCE),
    "sequence_conv_circular": (lambda: sequence_conv(padding=2, padding_mode="circular"), SEQUENCE),
    "sequence_conv_reflect": (lambda: sequence_conv(padding=2, padding_mode="reflect"), SEQUENCE),
    "transposed": (lambda: transposed(stride=2, padding=1, output_padding=(1, 0)), IMAGE),
    "transposed_cropped": (lambda: transposed(stride=(4, 2), padding=2, dilation=(1, 2), bias=False), IMAGE),
    "transposed_grouped": (lambda: transposed(groups=2), IMAGE),
    "transposed_sequence": (lambda: transposed(nn.ConvTranspose1d, stride=2, output_padding=1), SEQUENCE),
    "volumes_called_twice": (Volumes, VOLUME),
    "volumes": (lambda: volumes(stride=(1, 2, 3), padding=(2, 1, 2), dilation=(2, 1, 1)), VOLUME),
    "volumes_same": (lambda: volumes(padding="same", dilation=(1, 2, 1), bias=False), VOLUME),
    "volumes_valid": (lambda: volumes(padding="valid", groups=2), VOLUME),
    "volumes_grouped": (lambda: volumes(padding=(1, 0, 2), stride=2, groups=2), VOLUME),
    "volumes_circular": (lambda: volumes(padding=(1, 2, 0), padding_mode="circular"), VOLUME),
    "volumes_reflect": (lambda: volumes(padding=(1, 2, 1), padding_mode="reflect", groups=2), VOLUME),
    "volumes_replicate": (lambda: volumes(padding="same", padding_mode="replicate"), VOLUME),
    "transposed_volumes": (lambda: transposed_volumes(stride=(2, 1, 2), output_padding=(1, 0, 0)), VOLUME),
    "transposed_volumes_grouped": (
        lambda: transposed_volumes(stride=2, padding=(1, 1, 0), dilation=(1, 2, 1), groups=2),
        VOLUME,
    ),
}


def make(name, *, seed=0, dtype=torch.float64):
    """(model in training mode, a batch of 5)."""
    torch.manual_seed(seed)
    builder, shape = NETS[name]
    model = builder().to(dtype)
    for module in model.modules():
        if isinstance(
            module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        ):  # an affine map that is not the identity
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(5, *shape, dtype=dtype)
