"""What goes wrong on one rank, and what each rank then says."""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flatprune
from flatprune.training.averaging import AveragedWeights
from kfac_ext import Curvature
from tests.distributed.training_loops import IMAGE, Loop, digest, mlp, own_part


def said(function):
    """The error that a call ends with, as "Kind: text"; empty if it ends well."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def until_event(spoil, **options):
    """Train up to an event, spoil this rank, go on; (what is said, whether neurons went)."""
    loop = Loop(wrap=DistributedDataParallel, flat=False, **options)

    def train():
        for _ in range(10):
            if loop.pruner.is_event():
                spoil(loop)
            loop.step(*([own_part(part)] for part in loop.batch()))

    return said(train), not loop.pruner.history


def other_weight():
    def spoil(loop):
        if dist.get_rank() == 1:
            with torch.no_grad():
                loop.model[1].weight[0, 0] += 1e-9

    return until_event(spoil)


def other_step():
    """An event is at other steps of ranks."""
    loop = Loop(wrap=DistributedDataParallel, flat=False)
    events = loop.pruner.schedule.events
    loop.pruner.step_count = events[dist.get_rank()] - 1
    loop.pruner._ranks.group.clock = lambda: 0  # which would say it before
    return said(lambda: loop.step(*([own_part(part)] for part in loop.batch()))), not loop.pruner.history


def lost_step():
    """Rank 1 has not called the pruner once: said before the next event."""
    loop = Loop(wrap=DistributedDataParallel, flat=False)

    def train():
        for _ in range(5):
            if loop.step_count == 1:
                loop.pruner.step_count -= dist.get_rank()
            loop.step(*([own_part(part)] for part in loop.batch()))

    return said(train), not loop.pruner.history


def other_settings():
    rank = dist.get_rank()
    return said(lambda: Loop(wrap=DistributedDataParallel, flat=False, min_width=2 + rank)), True


def other_widths():
    def spoil(loop):
        if dist.get_rank() == 1:
            loop.pruner.groups[0].members[0].index = loop.pruner.groups[0].members[0].index[:-1]

    return until_event(spoil)


def other_sizes():
    loop = Loop(wrap=DistributedDataParallel, flat=False, target=None)
    x, y = loop.batch(5 + dist.get_rank())

    def train():
        for _ in range(4):
            loop.step([x], [y])

    return said(train), True


def no_samples():
    """A part of a batch that is empty on rank 1; its process would end then, here it lives on."""
    loop = Loop(wrap=DistributedDataParallel, flat=False, target=None)
    x = loop.batch(4)[0]
    loop.parallel(x)

    def forwards():
        for _ in range(10):
            loop.parallel(x[: 0 if dist.get_rank() else 4])
        loop.curvature.spectral_radius()

    return said(forwards)


def failing_update():
    """An update that raises on rank 1 alone."""

    def fail(*_):
        raise MemoryError("no memory for labels")

    loop = Loop(wrap=DistributedDataParallel, flat=False, target=None)
    if dist.get_rank() == 1:
        loop.curvature.draws.uniform = fail

    def forward():
        loop.parallel(own_part(loop.batch()[0]))
        loop.curvature.spectral_radius()

    return said(forward)


def not_finite():
    """A batch of one rank that is not finite leaves the factors of all as they were."""
    curvature = Curvature(DistributedDataParallel(mlp()), factor_update_steps=1)
    x = torch.randn(4, *IMAGE)
    curvature.model(x)
    before = curvature.factors.buffer.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curvature.model(x * (float("nan") if dist.get_rank() == 1 else 1.0))
        after = curvature.factors.buffer.clone()
    curvature.model(x)
    later = curvature.factors.buffer
    return bool(torch.equal(before, after)), bool(later.isfinite().all()), [str(w.message) for w in caught]


def one_rank_reads():
    """Rank 0 alone may look at radii, factors and state while an update is on its way."""
    loop = Loop(wrap=DistributedDataParallel)
    for _ in range(4):
        loop.step(*([own_part(part)] for part in loop.batch()))
    if dist.get_rank() == 0:
        loop.curvature.spectral_radius()
        loop.curvature.state_dict()
        loop.flatness.state_dict()
    for _ in range(2):
        loop.step(*([own_part(part)] for part in loop.batch()))
    return loop.digests()


def some_ranks_call_a_layer():
    """A branch that only rank 1 goes down: its A is the mean over the rows that it has seen, its G over all."""

    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.extra, self.head = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))

        def forward(self, x, mask):
            h = self.stem(x).tanh()
            rows = mask.nonzero().flatten()
            if len(rows):
                h = h.index_add(0, rows, self.extra(h[rows]))
            return self.head(h)

    def factors(model, wrap, x, mask):
        generator = torch.Generator().manual_seed(0)
        parallel = wrap(model)
        curvature = Curvature(parallel, factor_update_steps=1, kfac_approx="expand", generator=generator)
        curvature.trace(x[:2], torch.tensor([True, True]))
        for _ in range(2):
            F.cross_entropy(parallel(x, mask), torch.zeros(len(x), dtype=torch.int64)).backward()
        return {key: curvature.factors[key].clone() for key in curvature.factors}

    torch.manual_seed(0)
    model = Branched()
    x, mask = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) >= 4
    wrap = lambda m: DistributedDataParallel(m, find_unused_parameters=True)  # noqa: E731
    shared = factors(model, wrap, own_part(x), own_part(mask))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = factors(model, lambda m: m, x, mask)
    return {key: float((shared[key] - alone[key]).abs().max()) for key in alone}, float(alone["extra.G"].abs().max())


def plain_model():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Curvature(mlp())
    return [str(warning.message) for warning in caught]


def refused():
    model = mlp()
    ddp = DistributedDataParallel(model)
    x = torch.randn(2, *IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Curvature(model)
    curvature = Curvature(ddp)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"target": flatprune.Target(params=0.5), "total_steps": 10}
    return [
        said(lambda: Curvature(DistributedDataParallel(ddp))),
        said(lambda: Curvature(nn.DataParallel(mlp()))),
        said(lambda: flatprune.Pruner(ddp, optimizer, plain, x, **options)),
        said(lambda: flatprune.Pruner(model, optimizer, curvature, x, **options)),
        said(lambda: flatprune.Pruner(nn.DataParallel(model), optimizer, curvature, x, **options)),
        said(lambda: flatprune.find_coupling(ddp, x)),
        said(lambda: flatprune.attach_disout(ddp, probability=0.1)),
        said(lambda: flatprune.hessian_lambda_max(ddp, x, torch.tensor([0, 1]), nn.functional.cross_entropy)),
        said(lambda: AveragedWeights(ddp, 0.9)),
    ]


def equal_numbers():
    """The digest of a module that lost neurons on all ranks, and of what its optimizer keeps."""
    loop = Loop(wrap=DistributedDataParallel).train(own_part)
    return digest(loop.model.parameters())
