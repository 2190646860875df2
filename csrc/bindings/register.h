// One function a domain, each in a file of its own; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

void register_covariance(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
void register_greedy(pybind11::module_& m);
void register_inverse(pybind11::module_& m);
void register_power_iteration(pybind11::module_& m);
void register_saliency(pybind11::module_& m);
