"""Disout: feature maps are distorted at random places while the network trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.distributed import refuse_wrapped
from kfac_ext.layers import kind_of


class Disout(nn.Module):
    """Replaces random places of a feature map by noise of the map's own spread (Tang et al. 2020, arXiv 2002.11022).

    In training y = (M x + (1 - M) alpha std(x) n) / mean(M), n standard normal, std over the whole batch and without a
    gradient; otherwise y = x. The mask M is 0 at the places that are distorted: in images [N, C, H, W] blocks of
    block_size x block_size (or the map, if that is smaller) whose corners are drawn with the probability
    dist_prob H W / (block_size^2 (H - block_size + 1) (W - block_size + 1)), the part `dist_prob` of the places but for
    overlaps (DropBlock's, Ghiasi et al. 2018); in all other shapes single elements, with the probability `dist_prob`.
    The paper's own code scales the noise by a mean of the largest weights that read the map besides, or by 0.01: its
    alpha times that is alpha here. alpha = 0 is dropout in blocks.

    It draws from torch's default generator of the input's device.

    Args:
        dist_prob: the part of the places that is distorted, in [0, 1).
        block_size: side of the blocks.
        alpha: size of the distortion.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Disout(0.1, block_size=3)(torch.randn(8, 4, 16, 16)).shape
        torch.Size([8, 4, 16, 16])
    """

    def __init__(self, dist_prob: float, block_size: int = 6, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 <= dist_prob < 1:
            raise ValueError(f"Disout: dist_prob is {dist_prob}, expected 0 <= dist_prob < 1")
        if block_size < 1:
            raise ValueError(f"Disout: block_size is {block_size}, expected >= 1")
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f"Disout: alpha is {alpha}, expected a number >= 0")
        self.dist_prob, self.block_size, self.alpha = dist_prob, block_size, alpha

    def forward(self, x: Tensor) -> Tensor:
        """The map x [N, ...], distorted in training; another tensor, x is not changed."""
        if not self.training or self.dist_prob == 0:
            return x
        mask = self._mask(x)
        noise = self.alpha * x.detach().std(correction=0) * torch.randn_like(x)
        kept = mask.mean().clamp_min(1 / mask.numel())
        return torch.where(mask.bool(), x, noise) / kept.to(x.dtype)

    def _mask(self, x: Tensor) -> Tensor:
        """0 where x is distorted, 1 elsewhere; float32, as half precision cannot count the places."""
        if x.dim() != 4:
            return (torch.rand(x.shape, device=x.device) >= self.dist_prob).float()
        (height, width), size = x.shape[2:], min(self.block_size, *x.shape[2:])
        corners = (height - size + 1, width - size + 1)
        probability = self.dist_prob * height * width / (size**2 * math.prod(corners))
        seeds = (torch.rand(*x.shape[:2], *corners, device=x.device) < probability).float()
        # a place is in a block if one of the size x size corners up and left of it was drawn
        return 1 - F.max_pool2d(F.pad(seeds, [size - 1] * 4), size, stride=1)


class DisoutHandle:
    """Takes the distortion of `attach_disout` off again, and raises its probability step by step.

    Attributes:
        distortion: the one `Disout` that all layers share.
        layers: names of the layers.
        probability: what the probability rises to.
        steps: optimizer steps it rises for.
    """

    def __init__(self, modules: Mapping[str, nn.Module], distortion: Disout, steps: int) -> None:
        self.distortion, self.layers, self.steps = distortion, tuple(modules), steps
        self.probability = distortion.dist_prob
        self._step_count = 0
        self._follow_schedule()
        self._hooks = [module.register_forward_hook(_Hook(distortion)) for module in modules.values()]

    @property
    def step_count(self) -> int:
        """Calls of `step` so far."""
        return self._step_count

    def step(self) -> None:
        """Count one optimizer step: the probability is now `probability` min(1, step_count / steps)."""
        self._step_count += 1
        self._follow_schedule()

    def remove(self) -> None:
        """Take every hook off the model. Calling it twice does nothing."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"step_count": self._step_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; bit for bit, if torch's random streams do too."""
        self._step_count = state["step_count"]
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        fraction = min(1.0, self._step_count / self.steps) if self.steps else 1.0
        self.distortion.dist_prob = self.probability * fraction


class _Hook:
    """Distorts the output of a layer that is in training; deep copies and pickles get one that does nothing."""

    def __init__(self, distortion: Disout | None) -> None:
        self._distortion = distortion

    def __call__(self, module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """What torch calls after the layer's forward."""
        training = module.training and torch.is_grad_enabled()  # not where a forward only looks at the network
        return self._distortion(output) if self._distortion is not None and training else None

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


def attach_disout(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    *,
    probability: float = 0.1,
    block_size: int = 6,
    alpha: float = 1.0,
    steps: int = 0,
) -> DisoutHandle:
    """Distort the outputs of layers of a model in training by `Disout` (Tang et al. 2020, arXiv 2002.11022).

    Forward hooks do it: the model's structure, parameters and `state_dict` stay the same, so it is pruned, saved and
    exported as if there were nothing; copies of the model do not distort. A layer distorts while gradients
    are on and its `training` flag is set. The extra forwards of `Flatness` and `SAM` draw the same places as the
    forward they belong to.

    Args:
        model: the network.
        layers: names of modules whose output is one tensor; None: every Linear and convolution but the last, in the
            order of `model.named_modules()`.
        probability: of `Disout`, once `steps` are done.
        block_size, alpha: of `Disout`.
        steps: the probability rises linearly from 0 over so many calls of `DisoutHandle.step`; 0: it is there at once.

    Returns:
        The handle: `step()` after each optimizer step, `remove()` to end it, `state_dict()` to resume.

    Raises:
        TypeError: `layers` is one string.
        KeyError: `layers` names a module that the model does not have.
        ValueError: an argument out of range, or no layer is left.

    Example:
        >>> distortion = attach_disout(model, probability=0.1, steps=1000)
        >>> loss.backward(); optimizer.step(); distortion.step()
    """
    if isinstance(layers, str):  # would be taken apart into letters
        raise TypeError(f"attach_disout: layers is {layers!r}, expected a list of names")
    if steps < 0:
        raise ValueError(f"attach_disout: steps is {steps}, expected >= 0")
    refuse_wrapped(model, "attach_disout")
    known = dict(model.named_modules())
    if layers is None:
        layers = [name for name, module in known.items() if kind_of(module) is not None][:-1]
    names = list(layers)
    for name in names:
        if name not in known:
            raise KeyError(
                f"attach_disout: the model has no module named {name!r}; it has {', '.join(filter(None, known))}"
            )
    if not names:
        raise ValueError("attach_disout: no layer to distort; the default is every Linear and convolution but the last")
    return DisoutHandle({name: known[name] for name in names}, Disout(probability, block_size, alpha), steps)
