"""Fast Kronecker-factored curvature for PyTorch: covariances, damped inverses, power iteration, saliency.

Every function takes and returns ordinary tensors, runs as compiled C++ on the CPU, and has a twin of the same name in
`kfac_ext.reference`, written in plain PyTorch.
"""

import torch as _torch  # noqa: F401  (loads the OpenMP runtime whose threads the kernels share)

from kfac_ext import reference
from kfac_ext._version import __version__
from kfac_ext.curvature import Curvature
from kfac_ext.factors import FactorSet
from kfac_ext.ops._library import build_info, use_native
from kfac_ext.ops.covariance import (
    conv2d_covariance,
    conv2d_covariance_,
    gradient_covariance,
    gradient_covariance_,
    linear_covariance,
    linear_covariance_,
)
from kfac_ext.ops.covariance_group import CovarianceUpdate
from kfac_ext.ops.greedy import GreedyChoice, GreedySelection, greedy_selection
from kfac_ext.ops.inverse import damped_inverse, damped_inverse_ex
from kfac_ext.ops.power import PowerIteration, covariance_power_iteration, power_iteration, power_iteration_
from kfac_ext.ops.saliency import compensate, obd_saliency, obs_saliency
from kfac_ext.preconditioner import KFACPreconditioner

__all__ = [
    "CovarianceUpdate",
    "Curvature",
    "FactorSet",
    "GreedyChoice",
    "GreedySelection",
    "KFACPreconditioner",
    "PowerIteration",
    "__version__",
    "build_info",
    "compensate",
    "conv2d_covariance",
    "conv2d_covariance_",
    "covariance_power_iteration",
    "damped_inverse",
    "damped_inverse_ex",
    "gradient_covariance",
    "gradient_covariance_",
    "greedy_selection",
    "linear_covariance",
    "linear_covariance_",
    "obd_saliency",
    "obs_saliency",
    "power_iteration",
    "power_iteration_",
    "reference",
    "use_native",
]
