"""Plain PyTorch for images: classifiers, U-Nets, generators, autoencoders, super-resolution, diffusion."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.network import Builder, Network, images, normal

CLASSES = 5


def convolved(inputs: int, outputs: int, stride: int = 1, dims: int = 2) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU."""
    convolution, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    return nn.Sequential(convolution(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(True))


def vgg() -> nn.Module:
    """Convolutions, pools, and a perceptron on what is flattened."""
    body = [convolved(3, 16), nn.MaxPool2d(2), convolved(16, 32), nn.MaxPool2d(2), convolved(32, 48), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, CLASSES)]
    return nn.Sequential(*body, *head)


class UNet(nn.Module):
    """Down and up again with what was there before joined; ups are transposed convolutions or interpolated."""

    def __init__(self, dims: int, transposed: bool) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.downs = nn.ModuleList(convolved(i, o, dims=dims) for i, o in zip((1, *widths), widths))
        pairs = ((32, 16), (16, 8))
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.ups = nn.ModuleList(up(i, o, 2, 2) if transposed else nn.Upsample(scale_factor=2) for i, o in pairs)
        self.joins = nn.ModuleList(convolved(2 * o if transposed else i + o, o, dims=dims) for i, o in pairs)
        self.head = {2: nn.Conv2d, 3: nn.Conv3d}[dims](8, CLASSES, 1)
        self.pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes, ...] of [n, 1, ...]."""
        skips = []
        for number, down in enumerate(self.downs):
            x = down(x if number == 0 else self.pool(x))
            skips.append(x)
        for up, join, skip in zip(self.ups, self.joins, skips[-2::-1]):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


def generator() -> nn.Module:
    """DCGAN's: transposed convolutions from noise [n, 32, 1, 1] to an image."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((32, 64, 1), (64, 32, 2), (32, 16, 2)):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, stride // 2, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Module:
    """DCGAN's with spectral norms."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2)]
    for inputs, outputs in ((16, 32), (32, 64)):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 2))


class Variational(nn.Module):
    """A variational autoencoder of images; noise enters in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            convolved(1, 16, 2), convolved(16, 32, 2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU()
        )
        self.mean, self.log_variance = nn.Linear(64, 8), nn.Linear(64, 8)
        self.start = nn.Linear(8, 32 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The image again, [n, 1, 16, 16]."""
        h = self.encoder(x)
        z, log_variance = self.mean(h), self.log_variance(h)
        if self.training:
            z = z + torch.randn_like(z) * (0.5 * log_variance).exp()
        return self.decoder(torch.relu(self.start(z)).unflatten(1, (32, 4, 4)))


class SuperResolution(nn.Module):
    """Residual blocks without norms, then pixels shuffled up (EDSR)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)) for _ in range(3)
        )
        self.up = nn.Sequential(nn.Conv2d(24, 96, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(24, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """An image of twice the size."""
        x = first = self.first(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.up(x + first)


class TimedBlock(nn.Module):
    """A residual block of a diffusion model: group norms, and the time added to every pixel."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h, w]."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class PixelAttention(nn.Module):
    """Attention of all pixels to all pixels by 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, h, w], as before."""
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.out((v @ weights.mT).view_as(x))


class Diffusion(nn.Module):
    """The noise of an image at a time: a U-Net of timed blocks with attention in its middle (DDPM)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.shrink = TimedBlock(16, 16, 64), nn.Conv2d(16, 16, 3, 2, 1)
        self.down2, self.middle = TimedBlock(16, 32, 64), TimedBlock(32, 32, 64)
        self.attention = PixelAttention(32)
        self.up2, self.grow = TimedBlock(64, 32, 64), nn.Conv2d(32, 32, 3, padding=1)
        self.up1 = TimedBlock(48, 16, 64)
        self.norm, self.last = nn.GroupNorm(8, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """[n, 3, h, w] of images and steps [n]."""
        phase = step[:, None] * torch.exp(-torch.arange(8) * math.log(1e4) / 8).to(x.dtype)
        time = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        first = self.first(x)
        high = self.down1(first, time)
        low = self.down2(self.shrink(high), time)
        y = self.attention(self.middle(low, time))
        y = self.grow(F.interpolate(self.up2(torch.cat([y, low], 1), time), scale_factor=2.0))
        return self.last(F.silu(self.norm(self.up1(torch.cat([y, high], 1), time))))


class Siamese(nn.Module):
    """Two images through the same layers; how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(convolved(1, 16, 2), convolved(16, 32, 2), nn.Flatten(), nn.Linear(512, 32))
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Logits [n, 2]."""
        return self.head((self.body(a) - self.body(b)).abs())


def noised(n: int) -> tuple[Tensor, Tensor]:
    """Images and times."""
    return torch.randn(n, 3, 16, 16), torch.randint(0, 100, (n,))


def two_images(n: int) -> tuple[Tensor, Tensor]:
    """A pair of images each."""
    return torch.randn(n, 1, 16, 16), torch.randn(n, 1, 16, 16)


NETWORKS: dict[str, Builder] = {
    "plain_vgg": lambda: Network(vgg(), images(32)),
    "plain_unet": lambda: Network(UNet(2, transposed=True), images(16, 1)),
    "plain_unet_interpolated": lambda: Network(UNet(2, transposed=False), images(16, 1)),
    "plain_unet3d": lambda: Network(UNet(3, transposed=True), normal(1, 8, 8, 8)),
    "plain_generator": lambda: Network(generator(), normal(32, 1, 1), loss="mse"),
    "plain_discriminator": lambda: Network(discriminator(), images(32)),
    "plain_variational": lambda: Network(Variational(), images(16, 1), loss="mse"),
    "plain_super_resolution": lambda: Network(SuperResolution(), images(12), loss="mse"),
    "plain_diffusion": lambda: Network(Diffusion(), noised, loss="mse"),
    "plain_siamese": lambda: Network(Siamese(), two_images),
}
