"""A of every layer of a network, A of single layers, G of every layer of a network."""

import pytest

import kfac_ext
from bench import baselines, peers, worksets
from bench.check import agreeing

NETWORKS = worksets.networks()
QUICK_NETWORKS = worksets.networks(quick=True)
LAYERS = worksets.single_layers()
QUICK_LAYERS = worksets.single_layers(quick=True)


def native(layers, inputs):
    return [
        kfac_ext.conv2d_covariance(x, layer.kernel, **layer.geometry)
        if layer.is_convolution
        else kfac_ext.linear_covariance(x)
        for layer, x in zip(layers, inputs)
    ]


def variants_of(layers, inputs):
    """Native, two ways in plain PyTorch and the peers, on these layers."""
    own = {
        "native": lambda: native(layers, inputs),
        "unfold": lambda: [baselines.covariance(x, i, baselines.unfold_covariance) for i, x in zip(layers, inputs)],
        "strided": lambda: [baselines.covariance(x, i, baselines.strided_covariance) for i, x in zip(layers, inputs)],
    }
    if not any(layer.is_convolution and layer.kernel > 1 for layer in layers):
        del own["strided"]  # the same matmul
    foreign, skipped = peers.available(peers.covariances(layers, inputs))
    return agreeing(own | foreign, "unfold", skipped), skipped


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
    variants, skipped = variants_of([layer], [worksets.activation(layer)])
    flops = 2 * layer.batch * layer.output_size**2 * layer.patch**2 * layer.groups
    measure("covariance of one layer", name, variants, skipped=skipped, shape=layer.describe(), plain_flops=flops)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_network(measure, quick, name):
    if quick and name not in QUICK_NETWORKS:
        pytest.skip("full runs only")
    layers = NETWORKS[name]
    grads = [worksets.gradient(layer) for layer in layers]
    variants = {
        "native": lambda: [kfac_ext.gradient_covariance(g) for g in grads],
        "matmul": lambda: [baselines.gradient_covariance(g) for g in grads],
    }
    measure("covariance", f"G, {name}", agreeing(variants, "matmul", {}), layers=len(layers))
