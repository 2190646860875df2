"""Whole training steps: bare, with factors, radius and flatness, preconditioned, with pruning; and a removal itself."""

import pytest
import torch
import torch.nn.functional as F

import flatprune
import kfac_ext
from bench import baselines, peers, worksets
from flatprune import models
from flatprune.pruning.schedule import CubicSchedule

LR = 0.01
CYCLE = 40  # steps: four updates of a conv net's factors, five flatness terms, one removal
NETWORKS = {
    "VGG-small b64": (worksets.vgg_small, 64, (3, 32, 32)),
    "VGG-small with batch norm b64": (lambda: worksets.vgg_small(norm=True), 64, (3, 32, 32)),
    "ResNet20 b64": (lambda: models.build("resnet20", (3, 32, 32), 10), 64, (3, 32, 32)),
    "MLP 784-300-100-10 b128": (lambda: models.build("mlp", (1, 28, 28), 10, (300, 100)), 128, (1, 28, 28)),
}
DEEP = {  # measured without K-FAC and removals, which test_first_event.py has
    "ResNet56 b32": (lambda: models.build("resnet56", (3, 32, 32), 10), 32, (3, 32, 32)),
    "ViT-tiny b16": (lambda: models.build("vit_tiny", (3, 32, 32), 10), 16, (3, 32, 32)),
}
ALL = {**NETWORKS, **DEEP}
QUICK = ("VGG-small b64",)
MAGNITUDE = "torch-pruning, L1"


def chosen(name, quick):
    if quick and name not in QUICK:
        pytest.skip("full runs only")
    return name


@pytest.fixture(params=NETWORKS)
def network(request, quick):
    return chosen(request.param, quick)


@pytest.fixture(params=ALL)
def any_network(request, quick):
    return chosen(request.param, quick)


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, network, *, total_steps=None, **curvature):
        build, batch, image = ALL[network]
        torch.manual_seed(0)
        self.model = build()
        self.x, self.y = worksets.batch_of(batch, image)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)
        self.curvature = flatprune.Curvature(self.model, **curvature) if curvature else None
        self.flatness = self.pruner = self.preconditioner = None

    def with_flatness(self):
        """Add the flatness term, active from the third step on."""
        self.flatness = flatprune.Flatness(self.curvature, start=2)
        return self

    def with_preconditioner(self, preconditioner, **options):
        """Add a preconditioner of this class."""
        self.preconditioner = preconditioner(self.model, damping=0.1, kl_clip=0.01, lr=LR, **options)
        return self

    def with_pruner(self, schedule, params):
        """Add a pruner that brings the network to the fraction `params` of its parameters."""
        self.pruner = flatprune.Pruner(
            self.model,
            self.optimizer,
            self.curvature,
            self.x[:2],
            target=flatprune.Target(params=params),
            total_steps=schedule.total_steps,
            schedule=schedule,
        )
        return self

    def step(self):
        """What a user's loop does."""
        self.optimizer.zero_grad()
        logits = self.model(self.x)
        loss = F.cross_entropy(logits, self.y)
        if self.flatness is not None:
            loss = loss + self.flatness.penalty(self.x, logits, loss)
        loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()

    def steps(self, count=CYCLE):
        """Several steps."""
        for _ in range(count):
            self.step()


def defaults():
    """`Curvature` as the documentation makes it (an argument that changes nothing)."""
    return {"factor_decay": 0.95}


def hooked(network):
    training = Training(network)
    baselines.HookedFactors(training.model)
    return training


def test_factors_every_step(measure, any_network):
    """All with A and G of every layer renewed in each step; ours follows every radius as well."""
    network = any_network
    build, batch, image = ALL[network]
    foreign, skipped = peers.available(peers.training_steps(build, *worksets.batch_of(batch, image), LR))
    variants = {
        "native": Training(network, factor_update_steps=1, kfac_approx="expand", fisher_type="empirical").step,
        "native, true Fisher": Training(network, factor_update_steps=1, kfac_approx="expand").step,
        "native, true Fisher, reduce": Training(network, factor_update_steps=1).step,
        "bare": Training(network).step,
        "hooks + unfold": hooked(network).step,
        **foreign,
    }
    measure("training step", f"factors every step, {network}", variants, skipped=skipped)


def test_defaults(measure, any_network):
    """Factors every few steps, radius and flatness as `Curvature` and `Flatness` do by default; mean of CYCLE steps."""
    factors = Training(any_network, **defaults())
    flat = Training(any_network, **defaults()).with_flatness()
    for training in (factors, flat):
        training.steps(4)  # past the flatness term's warm-up
    variants = {"native": flat.steps, "native, factors only": factors.steps, "bare": Training(any_network).steps}
    rounds = 5 if any_network in DEEP else None
    measure("training step", f"defaults, {any_network}", variants, per=CYCLE, max_rounds=rounds)


@pytest.mark.parametrize("every", [1, 10])
def test_kfac(measure, network, every):
    """K-FAC with factors and inverses renewed every so many steps, against its plain recipe; mean of as many steps."""

    def native(**options):
        cycle = {"factor_update_steps": every, "inv_update_steps": every}
        return Training(network).with_preconditioner(kfac_ext.KFACPreconditioner, **cycle, **options)

    def plain(method):
        return Training(network).with_preconditioner(baselines.HookedPreconditioner, method=method, update_steps=every)

    trainings = {
        "native": native(fisher_type="empirical"),
        "native, true Fisher": native(),
        "bare": Training(network),
        "hooks + unfold, inv": plain("inv"),
        "hooks + unfold, eigh": plain("eigh"),
    }
    variants = {name: lambda training=training: training.steps(every) for name, training in trainings.items()}
    measure("training step", f"K-FAC every {every} steps, {network}", variants, per=every)


def test_pruning(measure, quick, network):
    """The same with a removal at the end of CYCLE steps, on a fresh network each time."""
    if quick:
        pytest.skip("full runs only; the removal itself is in the quick ones")
    schedule = CubicSchedule(CYCLE, start=0.0, end=1.0, every=CYCLE)
    trainings = {}

    def fresh():
        trainings["native"] = Training(network, **defaults()).with_flatness().with_pruner(schedule, 0.7)

    bare = Training(network)
    variants = {"native": lambda: trainings["native"].steps(), "bare": bare.steps}
    measure("training step", f"with pruning, {network}", variants, per=CYCLE, before={"native": fresh}, max_rounds=9)
    assert trainings["native"].pruner.history[0].removed


def magnitude_pruner(training):
    """torch-pruning's magnitude pruner, built from scratch as its users do: the same removal without curvature."""
    import torch_pruning

    last = [m for m in training.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        training.model,
        training.x[:2],
        torch_pruning.importance.GroupMagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=0.16,
        ignored_layers=[last],
    )
    pruner.step()


def test_removal(measure, network):
    """One event that brings the network to 70 % of its parameters: scores, compensation, surgery."""
    schedule = CubicSchedule(1, start=0.0, end=1.0, every=1)
    trainings = {}

    def prepare(name):
        training = trainings[name] = Training(network, **({} if name == MAGNITUDE else defaults()))
        if training.curvature is not None:
            training.steps(4)
            training.with_pruner(schedule, 0.7)

    def remove(native):
        with kfac_ext.use_native(native):
            trainings["native" if native else "plain operations"].pruner.step()

    variants = {
        "native": lambda: remove(True),
        "plain operations": lambda: remove(False),
    }
    missing = peers.load("torch_pruning")
    skipped = {} if missing is None else {MAGNITUDE: missing}
    if missing is None:
        variants[MAGNITUDE] = lambda: magnitude_pruner(trainings[MAGNITUDE])
    before = {name: lambda name=name: prepare(name) for name in variants}
    measure("removal", network, variants, before=before, skipped=skipped, max_rounds=11)
    assert trainings["native"].pruner.history[0].removed
