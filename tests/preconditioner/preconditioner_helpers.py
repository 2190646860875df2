"""Batches, backward passes and gradients that the tests of the preconditioner share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kfac_ext import KFACPreconditioner

DAMPING = 0.03


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def classes(x, *positions):
    return torch.randint(0, 3, (len(x), *positions), generator=generator(5))


def backward(model, x, y, scale=1.0):
    (scale * F.cross_entropy(model(x), y)).backward()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def preconditioned(model, x, y, **options):
    """(gradients before, gradients after) one step on this batch."""
    with KFACPreconditioner(model, damping=DAMPING, **options) as preconditioner:
        backward(model, x, y)
        before = gradients(model)
        preconditioner.step()
    return before, gradients(model)
