"""Kronecker factors of a whole model: hooks on its layers fill a `kfac_ext.FactorSet` while it trains."""

from kfac_ext.curvature.curvature import Curvature

__all__ = ["Curvature"]
