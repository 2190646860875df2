"""One home for each kind of layer: `layer.py` says what curvature must know, one file a kind knows it."""

from kfac_ext.layers.batch_norm import BatchNorm, can_be_folded, is_batch_norm
from kfac_ext.layers.convolution import Convolution, TransposedConvolution
from kfac_ext.layers.layer import Layer, kind_of, layer_of, register
from kfac_ext.layers.linear import InputMajorLinear, Linear
from kfac_ext.layers.operators import layer_from_state

__all__ = [
    "BatchNorm",
    "Convolution",
    "InputMajorLinear",
    "Layer",
    "Linear",
    "TransposedConvolution",
    "can_be_folded",
    "is_batch_norm",
    "kind_of",
    "layer_from_state",
    "layer_of",
    "register",
]
