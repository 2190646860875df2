"""The first removal event of the default score, to half of the parameters: time and memory, and how they grow."""

import pytest

from bench import first_event, memory, worksets
from bench.first_event import CLASSES, IMAGE, SUBJECTS, Subject, Training
from bench.peers import load
from flatprune import models

QUICK = ("ResNet-56",)
pytestmark = pytest.mark.filterwarnings("ignore")  # what stays of a network is not the matter here


@pytest.fixture(params=SUBJECTS)
def network(request, quick):
    if quick and request.param not in QUICK:
        pytest.skip("full runs only")
    if why := load(SUBJECTS[request.param].package):
        pytest.skip(f"{SUBJECTS[request.param].package}: {why}")
    return request.param


def test_time(measure, network):
    """Beside a bare training step of the same network in the same process."""
    trainings = {}

    def fresh():
        trainings["native"] = Training(SUBJECTS[network])

    fresh()
    variants = {"native": lambda: trainings["native"].event(), "bare step": Training(SUBJECTS[network]).bare_step}
    measure("removal", f"first event to half of {network}", variants, before={"native": fresh}, max_rounds=3)


def test_memory(benchmark, record, network):
    """Beside the running factors and an H of each layer that reads neurons."""
    if reason := memory.supported():
        pytest.skip(reason)
    found = []
    benchmark.pedantic(lambda: found.append(first_event.peak(network)), rounds=1, iterations=1)
    variants = {"native": dict.fromkeys(("median", "min", "max"), found[0]["bytes"])}
    working_set = found[0]["working_set"]
    record("memory", f"first event, {network}", "memory", "bytes", variants, working_set=working_set)
    print(f"\n  memory / first event, {network}: {found[0]['bytes'] / working_set:.2f} of factors and H", end="")


def event_growth(measure, name, along, nets):
    """First events of networks, a batch of 32, made anew for each."""
    subjects = {x: Subject(build, lambda: worksets.batch_of(32, IMAGE)) for x, build in nets.items()}
    ready = {}

    def fresh(x):
        ready[x] = Training(subjects[x])

    points = {x: {"native": lambda x=x: ready[x].event()} for x in nets}
    before = {x: {"native": lambda x=x: fresh(x)} for x in nets}
    measure.growth(name, along, points, before=before)


def test_width(measure, quick):
    def build(width):
        return models.build("convnet", IMAGE, CLASSES, (width,) * 6)

    sizes = (16, 32) if quick else (16, 32, 64, 128, 256)
    event_growth(measure, "first event of six 3x3 layers", "channels", {n: lambda n=n: build(n) for n in sizes})


def test_depth(measure, quick):
    names = {20: "resnet20", 32: "resnet32"} if quick else {n: f"resnet{n}" for n in (20, 32, 44, 56, 110)}
    nets = {n: lambda name=name: models.build(name, IMAGE, CLASSES) for n, name in names.items()}
    event_growth(measure, "first event of a ResNet", "layers", nets)
