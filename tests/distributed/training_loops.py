"""The same training by one process and by ranks that share its batches, and how far apart they end."""

import copy
import hashlib
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import flatprune
import flatprune.criteria
from kfac_ext import KFACPreconditioner

IMAGE = (1, 6, 6)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 5))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(7, 9, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )


def normed():
    return nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "conv": conv, "normed": normed}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
}


CURVATURE, OTHERS = {"fisher", "approx", "loss"}, {"mode", "flat", "sam", "preconditioned"}


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Loop:
    """A training loop of a user's own; the only difference between one process and ranks is what `wrap` does."""

    def __init__(self, network="mlp", *, wrap=lambda model: model, steps=24, seed=0, parts=1, **options):
        torch.manual_seed(seed)
        dtype, optimizer = options.pop("dtype", torch.float64), options.pop("optimizer", "sgd")
        self.device = options.pop("device", "cpu")
        self.dtype, self.model = dtype, NETWORKS[network]().to(self.device, dtype)
        self.parallel, self.parts, self.steps = wrap(self.model), parts, steps
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self._make_curvature(**{name: options.pop(name) for name in CURVATURE & options.keys()})
        self._make_others(**{name: options.pop(name) for name in OTHERS & options.keys()})
        self._make_pruner(**options)
        self.step_count = 0
        self.at_events = []

    def _make_curvature(self, fisher="true", approx="reduce", loss="cross_entropy"):
        self.curvature = flatprune.Curvature(
            self.parallel,
            fisher_type=fisher,
            kfac_approx=approx,
            loss=loss,
            factor_update_steps=3,
            generator=torch.Generator().manual_seed(1),
            grad_scale=1 / self.parts,
        )

    def _make_others(self, mode="forward", flat=True, sam=False, preconditioned=False):
        self.flatness = self.sam = self.kfac = None
        if flat:
            options = {"start": 4, "every": 2, "strength": 0.1, "mode": mode}
            self.flatness = flatprune.Flatness(self.curvature, total_steps=self.steps, **options)
        if sam:
            self.sam = flatprune.SAM(self.parallel, radius=0.05, curvature=self.curvature)
        if preconditioned:
            options = {"damping": 0.1, "factor_update_steps": 2, "inv_update_steps": 2}
            self.kfac = KFACPreconditioner(self.parallel, generator=torch.Generator().manual_seed(2), **options)

    def _make_pruner(self, criterion="obs", target=0.35, **options):
        self.pruner = None
        if target is not None:
            self.pruner = flatprune.Pruner(
                self.parallel,
                self.optimizer,
                self.curvature,
                torch.zeros(2, *IMAGE, dtype=self.dtype, device=self.device),
                target=flatprune.Target(params=target),
                total_steps=self.steps,
                criterion=getattr(flatprune.criteria, criterion[0])(criterion[1]) if len(criterion) == 2 else criterion,
                schedule=flatprune.CubicSchedule(self.steps, 0.25, 0.75, 4),
                **options,
            )

    def batch(self, size=24):
        generator = torch.Generator().manual_seed(100 + self.step_count)
        x = torch.randn(size, *IMAGE, dtype=torch.float64, generator=generator)
        y = torch.randint(5, (size,), generator=generator)
        return x.to(self.device, self.dtype), y.to(self.device)

    def step(self, x, y):
        self.optimizer.zero_grad()
        for part, (a, b) in enumerate(zip(x, y)):
            hold = part < self.parts - 1 and hasattr(self.parallel, "no_sync")
            with self.parallel.no_sync() if hold else torch.enable_grad():
                out = self.parallel(a)
                loss = F.cross_entropy(out, b)
                penalty = 0.0 if self.flatness is None else self.flatness.penalty(a, out, loss)
                ((loss + penalty) / self.parts).backward()
        if self.sam is not None:
            self.sam.replace_gradients(lambda: F.cross_entropy(self.parallel(x[0]), y[0]))
        if self.kfac is not None:
            self.kfac.step()
        self.optimizer.step()
        if self.pruner is not None:
            event = self.pruner.is_event()
            removals = self.pruner.step()
            if event:
                digests = [*self.digests(), digest(self.model.buffers())]
                self.at_events.append((digests, [record.state() for record in removals]))
        self.step_count += 1

    def digests(self):
        momentum = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        factors = self.curvature.factors
        return [digest(t) for t in (self.model.parameters(), momentum, [factors.buffer, factors.vectors])]

    def train(self, own=lambda tensor: tensor):
        for _ in range(self.steps):
            self.step(*([own(part) for part in tensor.chunk(self.parts)] for tensor in self.batch()))
        return self


def own_part(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def _scaled(state, bucket):
    state.append(bucket.index())
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


class Wrapped(DistributedDataParallel):
    """A user's own, with what he keeps in it."""


def wrapped(kind, **arguments):
    """How a user may make a DDP."""
    if kind == "own_group":
        arguments["process_group"] = dist.new_group(list(range(dist.get_world_size())))

    def wrap(model):
        ddp = (Wrapped if kind == "subclass" else DistributedDataParallel)(model, **arguments)
        if kind == "communication_hook":
            ddp.used = []
            ddp.register_comm_hook(ddp.used, _scaled)
        if kind == "power_sgd":
            ddp.register_comm_hook(PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1), powerSGD_hook)
        if kind == "subclass":
            ddp.forwards = []
            ddp.register_forward_hook(lambda *_: ddp.forwards.append(1))
        return ddp

    return wrap


def compare(options, kind="plain", arguments=None):
    """Train with DDP and, on rank 0, with one process; (distance of weights, same neurons, what each rank had)."""
    together = Loop(**options, wrap=wrapped(kind, **(arguments or {}))).train(own_part)
    mine = (together.at_events, together.digests())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() > 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = Loop(**options).train()
    neurons = [[[r["neurons"] for r in records] for _, records in loop.at_events] for loop in (together, alone)]
    same = neurons[0] == neurons[1]
    distance = 0.0
    if same:
        pairs = zip(together.model.state_dict().values(), alone.model.state_dict().values())
        distance = max(float((a - b).abs().max()) for a, b in pairs)
        a, b = together.curvature.factors.buffer, alone.curvature.factors.buffer
        distance = max(distance, float((a - b).norm() / b.norm()))
    kept = getattr(together.parallel, "used", None) or getattr(together.parallel, "forwards", [])
    return {
        "distance": distance,
        "same_neurons": same,
        "events": len(together.at_events),
        "removed": sum(len(n) for event in neurons[1] for n in event),
        "ranks_alike": all(one == everyone[0] for one in everyone),
        "kept": len(kept),
        "class": type(together.parallel).__name__,
    }


def compare_with_shared_work(options):
    """The same where no work is too little to be shared."""
    import kfac_ext.distributed

    kept, kfac_ext.distributed.WORTH_SHARING = kfac_ext.distributed.WORTH_SHARING, 0.0
    try:
        return compare(options)
    finally:
        kfac_ext.distributed.WORTH_SHARING = kept


def compare_shifted():
    """`optimum_shift` by ranks and by one process: how far apart they end, how far weights moved, what a rank has."""
    torch.manual_seed(0)
    model = conv().double()
    before = [p.detach().clone() for p in model.parameters()]
    alone, x = copy.deepcopy(model), torch.randn(12, *IMAGE, dtype=torch.float64)
    flatprune.optimum_shift(DistributedDataParallel(model), own_part(x))
    pairs = list(zip(model.parameters(), before))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plain model among ranks
        flatprune.optimum_shift(alone, x)
    distance = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), alone.parameters()))
    return distance, max(float((a - b).abs().max()) for a, b in pairs), digest(model.parameters())
