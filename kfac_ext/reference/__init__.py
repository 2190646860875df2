"""Every operation of `kfac_ext` in plain PyTorch, as others write it: the oracle of the tests and the baseline."""

from kfac_ext.reference.covariance import (
    conv2d_covariance,
    conv2d_covariance_,
    gradient_covariance,
    gradient_covariance_,
    linear_covariance,
    linear_covariance_,
)
from kfac_ext.reference.greedy import greedy_remove_, greedy_selection
from kfac_ext.reference.inverse import damped_inverse, damped_inverse_ex
from kfac_ext.reference.power import covariance_power_iteration, power_iteration
from kfac_ext.reference.saliency import compensate, obd_saliency, obs_saliency
from kfac_ext.reference.shifts import conv2d_covariance_by_shifts

__all__ = [
    "compensate",
    "conv2d_covariance",
    "conv2d_covariance_",
    "conv2d_covariance_by_shifts",
    "covariance_power_iteration",
    "damped_inverse",
    "damped_inverse_ex",
    "gradient_covariance",
    "gradient_covariance_",
    "greedy_remove_",
    "greedy_selection",
    "linear_covariance",
    "linear_covariance_",
    "obd_saliency",
    "obs_saliency",
    "power_iteration",
]
