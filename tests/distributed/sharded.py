"""A network that FSDP2 has sharded, beside its twin in one process."""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flatprune
from tests.distributed.training_loops import IMAGE, OPTIMIZERS, conv, own_part

STEPS = 16


def recipe(optimizer, process_group, mode="forward"):
    """How both are made."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def build():
        torch.manual_seed(0)
        return conv().double()

    def shard(model):
        for module in model:
            if next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def make_curvature(model):
        generator = torch.Generator().manual_seed(1)
        return flatprune.Curvature(model, process_group=process_group, generator=generator, factor_update_steps=3)

    def make_pruner(model, optimizer, curvature):
        return flatprune.Pruner(
            model,
            optimizer,
            curvature,
            torch.zeros(2, *IMAGE, dtype=torch.float64),
            target=flatprune.Target(params=0.5),
            total_steps=STEPS,
            schedule=flatprune.CubicSchedule(STEPS, 0.25, 0.75, 4),
        )

    def make_flatness(curvature):
        return flatprune.Flatness(curvature, total_steps=STEPS, start=3, every=2, strength=0.1, mode=mode)

    def make_optimizer(model):
        return OPTIMIZERS[optimizer](model.parameters())

    return flatprune.Recipe(build, shard, make_optimizer, make_curvature, make_pruner, make_flatness)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(24, *IMAGE, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (24,), generator=generator)


def gradients(training, x, y):
    training.optimizer.zero_grad()
    output = training.model(x)
    loss = F.cross_entropy(output, y)
    (loss + training.flatness.penalty(x, output, loss)).backward()
    training.optimizer.step()


def compare(optimizer):
    """(distance of weights, of what the optimizer keeps, neurons that went, those of the twin)."""
    warnings.simplefilter("ignore")
    made = recipe(optimizer, dist.group.WORLD)
    training = made.begin()
    removed = []
    for step in range(STEPS):
        gradients(training, *map(own_part, batch(step)))
        training = flatprune.prune_sharded(made, training)
        removed += [record.neurons for record in training.removals]
    model = {name: p.full_tensor() for name, p in training.model.named_parameters()}
    names = {p: name for name, p in training.model.named_parameters()}
    kept = {
        (names[p], key): value.full_tensor() if hasattr(value, "full_tensor") else value
        for p, state in training.optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }
    twin, theirs = alone(recipe(optimizer, None))
    moments = {
        (name, key): value
        for name, p in twin.model.named_parameters()
        for key, value in twin.optimizer.state[p].items()
        if torch.is_tensor(value)
    }
    distance = max(float((model[name] - p).abs().max()) for name, p in twin.model.named_parameters())
    return distance, max(float((kept[key] - moments[key]).abs().max()) for key in moments), removed, theirs


def alone(made):
    """The same training by one process."""
    model = made.build()
    optimizer, curvature = made.make_optimizer(model), made.make_curvature(model)
    pruner = made.make_pruner(model, optimizer, curvature)
    training = flatprune.ShardedTraining(model, optimizer, curvature, pruner, made.make_flatness(curvature))
    removed = []
    for step in range(STEPS):
        gradients(training, *batch(step))
        removed += [record.neurons for record in pruner.step()]
    return training, removed


def refused():
    """What is said to modes and models that cannot be."""
    warnings.simplefilter("ignore")
    said = []
    made = recipe("sgd", dist.group.WORLD)
    training = made.begin()
    attempts = (
        recipe("sgd", dist.group.WORLD, "double_backward").begin,
        recipe("sgd", None).begin,
        lambda: made.make_pruner(training.model, training.optimizer, training.curvature),
    )
    for attempt in attempts:
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def saved(folder):
    """Save a pruned, sharded network by DCP; its weights."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    warnings.simplefilter("ignore")
    made = recipe("sgd", dist.group.WORLD)
    training = made.begin()
    for step in range(STEPS):
        gradients(training, *map(own_part, batch(step)))
        training = flatprune.prune_sharded(made, training)
    dcp.save(get_model_state_dict(training.model), checkpoint_id=folder)
    return {name: p.full_tensor().detach().numpy() for name, p in training.model.named_parameters()}
