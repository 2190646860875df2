"""Oracles by loops over samples and positions, in float64, that share no code with the package."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product

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
    """[positions, C kernel] of one image [C, pixels] of any number of dimensions, pixel by pixel."""
    sizes, kernel, stride, dilation = image.shape[1:], conv.kernel_size, conv.stride, conv.dilation
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    if conv.padding == "same":
        before = [r // 2 for r in reach]
        after = [r - b for r, b in zip(reach, before)]
    else:
        before = after = (0,) * len(sizes) if conv.padding == "valid" else conv.padding
    outputs = [(s + b + a - r - 1) // step + 1 for s, b, a, r, step in zip(sizes, before, after, reach, stride)]
    rows = []
    for place in product(*map(range, outputs)):
        patch = image.new_zeros(len(image), *kernel)
        for tap in product(*map(range, kernel)):
            pixel = [o * step - b + k * d for o, step, b, k, d in zip(place, stride, before, tap, dilation)]
            pixel = [source_index(i, size, conv.padding_mode) for i, size in zip(pixel, sizes)]
            if None not in pixel:
                patch[(slice(None), *tap)] = image[(slice(None), *pixel)]
        rows.append(patch.flatten())
    return torch.stack(rows)


def transposed_patches(image, conv):
    """[positions, C kernel] of one image [C, pixels]: which input pixel reaches an output pixel by which weight.

    Output pixel o gets weight k times input pixel i where i stride - padding + k dilation = o; the patch lists k from
    the last to the first.
    """
    kernel, sizes = conv.kernel_size, image.shape[1:]
    rows = []
    for place in product(*map(range, conv(image[None]).shape[2:])):
        patch = image.new_zeros(len(image), *kernel)
        for tap in product(*map(range, kernel)):
            steps = zip(place, conv.padding, tap, conv.dilation, conv.stride)
            pixel, rest = zip(*(divmod(o + p - k * d, step) for o, p, k, d, step in steps))
            if not any(rest) and all(0 <= i < size for i, size in zip(pixel, sizes)):
                turned = tuple(k - 1 - t for k, t in zip(kernel, tap))
                patch[(slice(None), *turned)] = image[(slice(None), *pixel)]
        rows.append(patch.flatten())
    return torch.stack(rows)


def input_rows(module, x):
    """[N, positions, in] of one call."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return torch.stack([transposed_patches(image, module) for image in x])
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
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
