"""Flat minima: the spectral-radius term and its alternatives, and the true radius to hold them against."""
