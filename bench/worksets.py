"""The layers and networks that are measured, and inputs for them with spectra like those met in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_ext


class LayerShape(NamedTuple):
    """One layer and the batch it sees; `size` is the side of the image, 0 for a linear layer."""

    name: str
    batch: int
    channels: int
    outputs: int
    size: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a Conv2d."""
        return self.size > 0

    @property
    def padding(self) -> int:
        """What keeps the image's size at stride 1."""
        return self.kernel // 2

    @property
    def output_size(self) -> int:
        """Side of the output image (1 for a linear layer)."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1 if self.size else 1

    @property
    def patch(self) -> int:
        """d, the size of the factor A without a bias."""
        return self.channels // self.groups * self.kernel**2

    @property
    def input_bytes(self) -> int:
        """Bytes of the float32 input."""
        return 4 * self.batch * self.channels * max(self.size, 1) ** 2

    @property
    def geometry(self) -> dict[str, Any]:
        """Keyword arguments of `conv2d_covariance` after the kernel size."""
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}

    def describe(self) -> str:
        """Its shape in one line."""
        if not self.is_convolution:
            return f"linear {self.channels}->{self.outputs}, batch {self.batch}"
        options = f" /{self.stride}" if self.stride > 1 else ""
        options += f" g{self.groups}" if self.groups > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}{options}"
        return f"{kernel} {self.channels}->{self.outputs} @{self.size}, batch {self.batch}"


def conv(
    name: str, batch: int, channels: int, outputs: int, size: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> LayerShape:
    """A convolution that keeps the size of the image but for its stride."""
    return LayerShape(name, batch, channels, outputs, size, kernel, stride, groups)


# ---- networks ----


def vgg(batch: int, plan: Sequence[int | str], size: int = 32) -> list[LayerShape]:
    """3x3 convolutions of the widths in `plan`, 'M' halves the image; one linear layer on the pooled image."""
    layers: list[LayerShape] = []
    channels = 3
    for item in plan:
        if isinstance(item, str):
            size //= 2
            continue
        layers.append(conv(f"conv{len(layers) + 1}", batch, channels, item, size))
        channels = item
    return [*layers, LayerShape("fc", batch, channels, 10)]


VGG_SMALL = (32, 32, "M", 64, 64, "M", 128, 128, "M")
VGG19 = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4)


def resnet(batch: int, blocks: int) -> list[LayerShape]:
    """ResNet for CIFAR (He et al. 2016), shortcuts without parameters: 6 `blocks` + 2 layers."""
    layers = [conv("conv1", batch, 3, 16, 32)]
    channels, size = 16, 32
    for stage, width in enumerate((16, 32, 64)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(conv(f"s{stage}b{block}c1", batch, channels, width, size, stride=stride))
            size //= stride
            layers.append(conv(f"s{stage}b{block}c2", batch, width, width, size))
            channels = width
    return [*layers, LayerShape("fc", batch, 64, 10)]


def resnet50(batch: int) -> list[LayerShape]:
    """ResNet50 on images of 224 x 224."""
    layers = [conv("conv1", batch, 3, 64, 224, 7, 2)]
    channels, size = 64, 56
    for stage, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(count):
            stride = 2 if stage and not block else 1
            name = f"l{stage + 1}.{block}"
            layers.append(conv(f"{name}.c1", batch, channels, width, size, 1))
            layers.append(conv(f"{name}.c2", batch, width, width, size, 3, stride))
            layers.append(conv(f"{name}.c3", batch, width, 4 * width, size // stride, 1))
            if not block:
                layers.append(conv(f"{name}.ds", batch, channels, 4 * width, size, 1, stride))
            channels, size = 4 * width, size // stride
    return [*layers, LayerShape("fc", batch, 2048, 1000)]


def mlp(batch: int) -> list[LayerShape]:
    """784-1024-1024-10."""
    widths = (784, 1024, 1024, 10)
    return [LayerShape(f"fc{i + 1}", batch, widths[i], widths[i + 1]) for i in range(3)]


def transformer(rows: int, width: int, blocks: int) -> list[LayerShape]:
    """Linear layers of an encoder's blocks on samples times positions rows: attention, then one four times as wide."""
    widths = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return [LayerShape(f"block{block}.{i}", rows, *pair) for block in range(blocks) for i, pair in enumerate(widths)]


def networks(quick: bool = False) -> dict[str, list[LayerShape]]:
    """Name -> layers, with batches that a CPU handles in a second or so."""
    few = {"VGG-small b64": vgg(64, VGG_SMALL), "MLP b256": mlp(256)}
    if quick:
        return few
    return {
        **few,
        "ResNet20 b32": resnet(32, 3),
        "VGG19 b32": vgg(32, VGG19),
        "ResNet32 b32": resnet(32, 5),
        "ResNet50 b2": resnet50(2),
    }


def layer_shape_key(layer: LayerShape) -> tuple[int, ...]:
    """What the cost of a layer's A depends on."""
    return (layer.batch, layer.channels, layer.size, layer.kernel, layer.stride, layer.groups)


def distinct(layers: Sequence[LayerShape]) -> list[LayerShape]:
    """One layer of each input shape and geometry."""
    found: dict[tuple[int, ...], LayerShape] = {}
    for layer in layers:
        found.setdefault(layer_shape_key(layer), layer)
    return list(found.values())


# samples, positions and features of linear layers in transformers: ViT-tiny on CIFAR and ImageNet, ViT-base, BERT-base
TOKENS = [(32, 65, 192), (8, 197, 192), (8, 197, 768), (32, 128, 768), (8, 128, 3072)]


def single_layers(quick: bool = False) -> dict[str, LayerShape]:
    """Layers measured one by one; those named '3x3 ...' are the ones with a goal of their own."""
    batch = 32
    plain = [(16, 32), (32, 16), (64, 8), (128, 16), (256, 8), (512, 4)]
    more = [(16, 8), (32, 32), (64, 16), (64, 32), (128, 8), (256, 4), (512, 2)]
    sizes = plain if quick else plain + more
    layers = {f"3x3 {c} channels @{s}": conv("", batch, c, c, s) for c, s in sizes}
    others = {
        "first layer 3x3, 3 channels @32": conv("", batch, 3, 64, 32),
        "strided 3x3 /2, 32 channels @32": conv("", batch, 32, 64, 32, 3, 2),
        "1x1, 64 channels @16": conv("", batch, 64, 128, 16, 1),
        "depthwise 3x3, 64 channels @16": conv("", batch, 64, 64, 16, 3, 1, 64),
        "linear 784": LayerShape("", 256, 784, 1024),
    }
    if not quick:
        others |= {
            "first layer 7x7 /2, 3 channels @224": conv("", 2, 3, 64, 224, 7, 2),
            "strided 3x3 /2, 64 channels @28": conv("", 8, 64, 128, 28, 3, 2),
            "strided 3x3 /2, 64 channels @57": conv("", 4, 64, 128, 57, 3, 2),
            "strided 3x3 /2, 128 channels @28": conv("", 8, 128, 128, 28, 3, 2),
            "strided 5x5 /2, 64 channels @28": conv("", 8, 64, 128, 28, 5, 2),
            "strided 1x1 /2, 256 channels @28": conv("", 8, 256, 512, 28, 1, 2),
            "1x1, 256 channels @14": conv("", 8, 256, 1024, 14, 1),
            "1x1, 512 channels @7": conv("", 8, 512, 2048, 7, 1),
            "depthwise 3x3, 256 channels @14": conv("", 8, 256, 256, 14, 3, 1, 256),
            "grouped 3x3, 64 channels in 4 groups @16": conv("", batch, 64, 64, 16, 3, 1, 4),
            "5x5, 6 channels @14": conv("", batch, 6, 16, 14, 5),
            "linear 2048": LayerShape("", 64, 2048, 1000),
            **{f"linear {d}, {n} x {t} tokens": LayerShape("", n * t, d, d) for n, t, d in TOKENS},
            "linear 64": LayerShape("", 32, 64, 10),
        }
    return layers | others


def network_layers() -> dict[str, LayerShape]:
    """Every distinct layer of every network."""
    return {
        f"{network}: {layer.describe().rsplit(',', 1)[0]}": layer
        for network, layers in networks().items()
        for layer in distinct(layers)
    }


# ---- inputs ----


def _randn(layer: LayerShape, shapes: Sequence[tuple[int, ...]], device: torch.device | str) -> list[Tensor]:
    """The same for layers of the same input, on the same device."""
    generator = torch.Generator(device).manual_seed(hash(layer_shape_key(layer)) % 2**31)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def activation(layer: LayerShape, device: torch.device | str = "cpu") -> Tensor:
    """What a layer sees in training: correlated channels and neighbours, rectified (images, 3 channels: not)."""
    side = (layer.size, layer.size) if layer.is_convolution else ()
    x, common = _randn(layer, [(layer.batch, layer.channels, *side), (layer.batch, 1, *side)], device)
    x = x + common
    if layer.size > 1:
        x = F.avg_pool2d(x, 3, 1, 1) * 2
    return x if layer.channels == 3 else x.relu_()


def gradient(layer: LayerShape, device: torch.device | str = "cpu") -> Tensor:
    """Gradients at a layer's output: zero mean, channels of falling size."""
    side = (layer.output_size,) * 2 if layer.is_convolution else ()
    (g,) = _randn(layer, [(layer.batch, layer.outputs, *side)], device)
    scale = torch.arange(1, layer.outputs + 1, device=device).pow(-0.5).view(1, -1, *[1] * len(side))
    return g * scale


def weight(layer: LayerShape, device: torch.device | str = "cpu") -> Tensor:
    """[O, d], with the scale of an initialised layer."""
    (w,) = _randn(layer, [(layer.outputs, layer.patch)], device)
    return w / layer.patch**0.5


def factor_a(layer: LayerShape) -> Tensor:
    """A of the layer's input."""
    x = activation(layer)
    if not layer.is_convolution:
        return kfac_ext.linear_covariance(x)
    return kfac_ext.conv2d_covariance(x, layer.kernel, **layer.geometry)


def factors(layers: Sequence[LayerShape]) -> list[Tensor]:
    """A and G of every layer, [A0, G0, A1, ...]; layers of one shape share the values, not the memory."""
    cache: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    found = []
    for layer in layers:
        key = (*layer_shape_key(layer), layer.outputs)
        if key not in cache:
            cache[key] = factor_a(layer), kfac_ext.gradient_covariance(gradient(layer))
        found += [matrix.clone() for matrix in cache[key]]
    return found


# ---- models for whole steps ----


def vgg_small(norm: bool = False) -> nn.Module:
    """VGG-small as a module: plain (biases, which every peer knows) or with batch norm."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG_SMALL:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, item, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(item), nn.ReLU()] if norm else [nn.ReLU()]
        channels = item
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels, 10))


def batch_of(size: int, image: tuple[int, ...] = (3, 32, 32)) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, *image, generator=generator), torch.randint(0, 10, (size,), generator=generator)
