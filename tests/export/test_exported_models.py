"""Networks of every code that ships, pruned and exported in every format: the file computes what the network does."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

import flatprune
from flatprune import models
from flatprune.coupling import find_coupling
from flatprune.cutting import surgery
from flatprune.data import Normalization
from flatprune.export import export_run, save_model
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.limits import Limits
from flatprune.pruning.selection import select
from tests.conftest import thorough
from tests.pruning.shipped_networks import CLASSES, SHAPE, arguments, build, image_batch

ONE_OF_A_FAMILY = ("mlp", "lenet5", "convnet", "vgg11_bn", "resnet20", "mobilenetv2", "densenet40", "vit_tiny")
OF_EVERY_CODE = (*ONE_OF_A_FAMILY, "wide_resnet32", "resnet18")
IN_TORCH_EXPORT = ("mlp", "convnet", "resnet20", "mobilenetv2", "vit_tiny")  # one takes seconds
IN_ONNX = ("convnet", "vit_tiny")
NORMALIZATION = Normalization(torch.tensor([0.4, 0.3]), torch.tensor([0.2, 0.5]))
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxscript")),
    reason="onnx and onnxscript are not installed (the extra 'export')",
)
WITHOUT_OURS = """
import sys
sys.modules["flatprune"] = sys.modules["kfac_ext"] = None
sys.path.insert(0, sys.argv[1])
import numpy, torch, network
images = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    numpy.save(sys.argv[3], network.load()(images).numpy())
"""


@functools.cache
def pruned(name):
    model = build(name)
    coupling = find_coupling(model, image_batch()[0][:2])
    groups = coupling.groups
    scores = [torch.rand(group.width, dtype=torch.float64) for group in groups]
    pruned = select(
        ParameterCount(model, groups), groups, scores, int(0.3 * models.parameter_count(model)), Limits(1, 1, 1.0)
    )
    surgery.plan(model, coupling, pruned).commit()
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    def make(name):
        save_model(tmp_path / "model.pt", pruned(name), arguments(name), NORMALIZATION)
        return tmp_path

    return make


def outputs(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("name", thorough(OF_EVERY_CODE, but=["mlp", "resnet20", "vit_tiny"]))
def test_safetensors(folder, name):
    made = export_run(folder(name), "safetensors")
    loaded, expected = flatprune.load(made.files[-1]), pruned(name)
    assert torch.equal(outputs(loaded, image_batch()[0]), outputs(expected, image_batch()[0]))
    assert repr(loaded) == repr(expected)
    assert (loaded.image_shape, loaded.classes) == (SHAPE, CLASSES)
    assert torch.equal(loaded.normalization.mean, NORMALIZATION.mean)
    assert torch.equal(loaded.normalization.std, NORMALIZATION.std)


@pytest.mark.parametrize("name", thorough(OF_EVERY_CODE, seldom=["wide_resnet32", "densenet40", "mobilenetv2"]))
def test_plain_source(folder, name):
    made = export_run(folder(name), "torch")
    assert made.difference == 0.0  # the same operations on the same numbers
    assert made.params == models.parameter_count(pruned(name))
    assert max(len(line) for line in made.files[-1].read_text().splitlines()) <= 120


@pytest.mark.parametrize("takes", thorough(["normalized", "float", "uint8"], but=["uint8"]))
def test_plain_source_runs_without_this_package(folder, takes):
    made = export_run(folder("resnet20"), "torch", input=takes)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 2)).astype(np.uint8)
    normalized = NORMALIZATION(pixels)
    given = {"normalized": normalized.numpy(), "float": pixels.astype(np.float32) / 255, "uint8": pixels}[takes]
    images, logits = made.files[-1].with_name("images.npy"), made.files[-1].with_name("logits.npy")
    np.save(images, given)
    command = [sys.executable, "-c", WITHOUT_OURS, *map(str, (images.parent, images, logits))]
    subprocess.run(command, check=True, cwd=images.parent)
    expected = outputs(pruned("resnet20"), normalized)
    torch.testing.assert_close(torch.from_numpy(np.load(logits)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", thorough(IN_TORCH_EXPORT, but=["mlp", "convnet"]))
def test_torch_export(folder, name):
    made = export_run(folder(name), "torch-export", input="uint8")
    program = torch.export.load(made.files[-1]).module()
    for n in (1, 2, 7):
        pixels = torch.randint(0, 256, (n, 8, 8, 2), dtype=torch.uint8)
        expected = outputs(pruned(name), NORMALIZATION(pixels))
        torch.testing.assert_close(program(pixels), expected, rtol=0, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("name", thorough(IN_ONNX, but=["convnet"]))
def test_onnx(folder, name):
    from onnx.reference import ReferenceEvaluator

    made = export_run(folder(name), "onnx", input="uint8")
    model = ReferenceEvaluator(str(made.files[-1]))
    for n in (1, 7):
        pixels = torch.randint(0, 256, (n, 8, 8, 2), dtype=torch.uint8)
        (found,) = model.run(["logits"], {"images": pixels.numpy()})
        expected = outputs(pruned(name), NORMALIZATION(pixels))
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
