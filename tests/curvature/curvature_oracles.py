"""Oracles by loops over samples and positions, in float64, that share no code with the package."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn


def source_index(i, size, mode):
    """Which pixel a padded position shows: an index, or None for a zero."""
    if 0 <= i < size:
        return i
    if mode == "zeros":
        return None
    if mode == "circular":
        return i % size
    if mode == "replicate":
        return min(max(i, 0), size - 1)
    return -i if i < 0 else 2 * (size - 1) - i  # reflect


def conv_patches(image, conv):
    """[positions, C kh kw] of one image [C, H, W], pixel by pixel."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    channels, height, width = image.shape
    if conv.padding == "same":
        top, left = dh * (kh - 1) // 2, dw * (kw - 1) // 2
        bottom, right = dh * (kh - 1) - top, dw * (kw - 1) - left
    else:
        top, left = conv.padding
        bottom, right = top, left
    rows = []
    for oy in range((height + top + bottom - dh * (kh - 1) - 1) // sh + 1):
        for ox in range((width + left + right - dw * (kw - 1) - 1) // sw + 1):
            patch = image.new_zeros(channels, kh, kw)
            for ky in range(kh):
                for kx in range(kw):
                    y = source_index(oy * sh - top + ky * dh, height, conv.padding_mode)
                    x = source_index(ox * sw - left + kx * dw, width, conv.padding_mode)
                    if y is not None and x is not None:
                        patch[:, ky, kx] = image[:, y, x]
            rows.append(patch.flatten())
    return torch.stack(rows)


def transposed_patches(image, conv):
    """[positions, C kh kw] of one image [C, H, W]: which input pixel reaches an output pixel by which weight.

    Output pixel o gets weight k times input pixel i where i stride - padding + k dilation = o; the patch lists k from
    the last to the first.
    """
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    channels, height, width = image.shape
    sizes = conv(image[None]).shape[2:]
    rows = []
    for oy in range(sizes[0]):
        for ox in range(sizes[1]):
            patch = image.new_zeros(channels, kh, kw)
            for ky in range(kh):
                for kx in range(kw):
                    (y, ry), (x, rx) = divmod(oy + ph - ky * dh, sh), divmod(ox + pw - kx * dw, sw)
                    if ry == rx == 0 and 0 <= y < height and 0 <= x < width:
                        patch[:, kh - 1 - ky, kw - 1 - kx] = image[:, y, x]
            rows.append(patch.flatten())
    return torch.stack(rows)


def as_2d(conv):
    """The two-dimensional convolution that does to images of height 1 what a one-dimensional one does to sequences."""
    options = {
        "kernel_size": (1, *conv.kernel_size),
        "stride": (1, *conv.stride),
        "dilation": (1, *conv.dilation),
        "padding": conv.padding if isinstance(conv.padding, str) else (0, *conv.padding),
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
        "dtype": conv.weight.dtype,
    }
    if isinstance(conv, nn.ConvTranspose1d):
        options["output_padding"] = (0, *conv.output_padding)
        return nn.ConvTranspose2d(conv.in_channels, conv.out_channels, **options)
    return nn.Conv2d(conv.in_channels, conv.out_channels, **options)


def input_rows(module, x):
    """[N, positions, in] of one call."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return input_rows(as_2d(module), x[:, :, None])
    if isinstance(module, nn.ConvTranspose2d):
        return torch.stack([transposed_patches(image, module) for image in x])
    if isinstance(module, nn.Conv2d):
        return torch.stack([conv_patches(image, module) for image in x])
    return torch.stack([sample.reshape(-1, sample.shape[-1]) for sample in x])


def gradient_rows(module, g):
    """[N, positions, out] of one call."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return torch.stack([sample.flatten(1).T for sample in g])
    return torch.stack([sample.reshape(-1, sample.shape[-1]) for sample in g])


def observe(model, layers, x, summed_loss):
    """Inputs and d(summed loss)/dz of every call, through zeros added to z. `layers`: name -> (module, z module)."""
    inputs, probes = {name: [] for name in layers}, {name: [] for name in layers}

    def take_input(name):
        return lambda _module, args: inputs[name].append(args[0].detach().clone())

    def add_probe(name):
        def hook(_module, _args, output):
            probe = torch.zeros_like(output, requires_grad=True)
            probes[name].append(probe)
            return output + probe

        return hook

    with ExitStack() as stack:
        for name, (module, z_module) in layers.items():
            stack.enter_context(module.register_forward_pre_hook(take_input(name)))
            stack.enter_context(z_module.register_forward_hook(add_probe(name)))
        loss = summed_loss(model(x))
    flat = [probe for calls in probes.values() for probe in calls]
    grads = iter(torch.autograd.grad(loss, flat))
    return inputs, {name: [next(grads) for _ in calls] for name, calls in probes.items()}


def factors(module, inputs, grads, mode, constant, predictions):
    """(A, G), each [groups, n, n], summed outer product by outer product."""
    groups = getattr(module, "groups", 1)
    a_rows = torch.cat([input_rows(module, x) for x in inputs], dim=1)  # [N, positions of all calls, groups d]
    g_rows = torch.cat([gradient_rows(module, g) for g in grads], dim=1)
    if mode == "reduce":
        a_rows, g_rows = a_rows.mean(dim=1, keepdim=True), g_rows.sum(dim=1, keepdim=True)
    d, o = a_rows.shape[2] // groups, g_rows.shape[2] // groups
    A = torch.zeros(groups, d + constant, d + constant, dtype=torch.float64)
    G = torch.zeros(groups, o, o, dtype=torch.float64)
    one = torch.ones(int(constant), dtype=torch.float64)
    for sample_a, sample_g in zip(a_rows, g_rows):
        for row in sample_a:
            for group in range(groups):
                a = torch.cat([row[group * d : (group + 1) * d], one])
                A[group] += torch.outer(a, a) / (len(a_rows) * a_rows.shape[1])
        for row in sample_g:
            for group in range(groups):
                g = row[group * o : (group + 1) * o]
                G[group] += torch.outer(g, g) / predictions
    return A, G


def cross_entropy_sum(targets):
    """The cross entropy of all predictions, summed."""
    return lambda output: F.cross_entropy(output, targets, reduction="sum")


def top_eigenvalue(blocks):
    """lambda_1 of each block."""
    return torch.linalg.eigvalsh(blocks)[..., -1]


def dense_hessian(function, parameters):
    """Hessian of function(flat vector) at the flattened parameters."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    return torch.autograd.functional.hessian(function, flat)
