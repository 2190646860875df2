"""A of every layer of a network, A of single layers, G of every layer of a network."""

import pytest
import torch

import kfac_ext
from bench import baselines, peers, worksets
from bench.check import agreeing

NETWORKS = worksets.networks()
QUICK_NETWORKS = worksets.networks(quick=True)
LAYERS = worksets.single_layers()
QUICK_LAYERS = worksets.single_layers(quick=True)
NETWORK_LAYERS = worksets.network_layers()
BLEND = {"decay": 0.95, "scale": 0.05}


def native(layers, inputs):
    return [
        kfac_ext.conv2d_covariance(x, layer.kernel, **layer.geometry)
        if layer.is_convolution
        else kfac_ext.linear_covariance(x)
        for layer, x in zip(layers, inputs)
    ]


def native_into(averages, layers, inputs):
    for A, layer, x in zip(averages, layers, inputs):
        if layer.is_convolution:
            kfac_ext.conv2d_covariance_(A, x, layer.kernel, **BLEND, **layer.geometry)
        else:
            kfac_ext.linear_covariance_(A, x, **BLEND)


def blended(method, averages, layers, inputs):
    """The same by a function that returns a new tensor."""
    for A, layer, x in zip(averages, layers, inputs):
        baselines.blend_(A, method(x, layer), **BLEND)


def variants_of(layers, inputs, with_peers=True):
    """The running average A <- 0.95 A + 0.05 new: native, two ways in plain PyTorch and the peers, on these layers.

    All share the averages, which are at rest: blending in the same value again changes nothing but rounding.
    """
    methods = {"unfold": baselines.by_unfold, "strided": baselines.by_strides}
    if not any(layer.is_convolution and layer.kernel > 1 for layer in layers):
        del methods["strided"]  # the same matmul
    if any(baselines.has_shifts(layer) for layer in layers):
        methods["conv2d_weight"] = baselines.by_shifts
    foreign, skipped = peers.available(peers.covariances(layers, inputs)) if with_peers else ({}, {})
    values = {name: lambda m=m: [m(x, layer) for layer, x in zip(layers, inputs)] for name, m in methods.items()}
    values = agreeing({"native": lambda: native(layers, inputs)} | values | foreign, "unfold", skipped)
    averages = native(layers, inputs)
    variants = {"native": lambda: native_into(averages, layers, inputs)}
    for name in [name for name in values if name != "native"]:
        method = methods.get(name) or peers.covariance_of(name)
        variants[name] = lambda method=method: blended(method, averages, layers, inputs)
    return variants, skipped


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_a_network(measure, quick, name):
    if quick and name not in QUICK_NETWORKS:
        pytest.skip("full runs only")
    layers = NETWORKS[name]
    shared = {worksets.layer_shape_key(layer): worksets.activation(layer) for layer in layers}
    inputs = [shared[worksets.layer_shape_key(layer)] for layer in layers]
    variants, skipped = variants_of(layers, inputs)
    measure("covariance", f"A, {name}", variants, skipped=skipped, layers=len(layers))


@pytest.mark.parametrize("name", LAYERS)
def test_input_of_a_layer(measure, quick, name):
    if quick and name not in QUICK_LAYERS:
        pytest.skip("full runs only")
    layer = LAYERS[name]
    x = worksets.activation(layer)
    variants, skipped = variants_of([layer], [x], with_peers=not quick)
    variants["native, new tensor"] = lambda: native([layer], [x])
    flops = 2 * layer.batch * layer.output_size**2 * layer.patch**2 * layer.groups
    measure("covariance of one layer", name, variants, skipped=skipped, shape=layer.describe(), plain_flops=flops)


FORMS = {
    "bf16": lambda x: x.bfloat16(),
    "fp16": lambda x: x.half(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "bf16 channels last": lambda x: x.bfloat16().contiguous(memory_format=torch.channels_last),
}
FORMED = [
    "3x3 64 channels @16",
    "strided 3x3 /2, 64 channels @28",
    "1x1, 256 channels @14",
    "linear 768, 8 x 197 tokens",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORMED)
def test_input_of_another_form(measure, quick, name, form):
    """Read as it is: as fast as a contiguous float32 input, and than a copy of that kind made first."""
    layer = LAYERS[name]
    if quick or (not layer.is_convolution and "last" in form):
        pytest.skip("full runs only" if quick else "of images only")
    plain = worksets.activation(layer)
    x = FORMS[form](plain)
    values = {
        "native": lambda: native([layer], [x]),
        "native of a copy": lambda: native([layer], [x.float().contiguous()]),
        "unfold": lambda: [baselines.by_unfold(x.float(), layer)],
    }
    variants = agreeing(values, "unfold", {}) | {"native, float32": lambda: native([layer], [plain])}
    measure("covariance of one layer", f"{form}: {name}", variants, shape=layer.describe())


@pytest.mark.parametrize("name", NETWORK_LAYERS)
def test_every_layer_of_the_networks(measure, quick, name):
    """None may be slower than in plain PyTorch."""
    if quick:
        pytest.skip("full runs only")
    layer = NETWORK_LAYERS[name]
    variants, _ = variants_of([layer], [worksets.activation(layer)], with_peers=False)
    measure("covariance of one layer", name, variants, shape=layer.describe(), max_rounds=11)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_network(measure, quick, name):
    if quick and name not in QUICK_NETWORKS:
        pytest.skip("full runs only")
    layers = NETWORKS[name]
    grads = [worksets.gradient(layer) for layer in layers]
    values = {
        "native": lambda: [kfac_ext.gradient_covariance(g) for g in grads],
        "matmul": lambda: [baselines.gradient_covariance(g) for g in grads],
    }
    agreeing(values, "matmul", {})
    averages = values["native"]()
    variants = {
        "native": lambda: [kfac_ext.gradient_covariance_(G, g, **BLEND) for g, G in zip(grads, averages)],
        "matmul": lambda: [
            baselines.blend_(G, baselines.gradient_covariance(g), **BLEND) for g, G in zip(grads, averages)
        ],
    }
    measure("covariance", f"G, {name}", variants, layers=len(layers))
