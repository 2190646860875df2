"""A look at a network: what it is made of, and which of its layers bear what."""

from flatprune.inspection.sensitivity import Sensitivity, sensitivity
from flatprune.inspection.summary import LayerSize, Summary, summary

__all__ = ["LayerSize", "Sensitivity", "Summary", "sensitivity", "summary"]
