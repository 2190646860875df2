"""A look at a network: what it is made of, and which of its layers bear what."""

from flatprune.inspection.sizes import LayerSize, Summary, summary
from flatprune.inspection.trial_cuts import Sensitivity, sensitivity

__all__ = ["LayerSize", "Sensitivity", "Summary", "sensitivity", "summary"]
