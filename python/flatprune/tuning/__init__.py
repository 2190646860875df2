"""Hyper-parameters by Optuna: settings that give the best held-out accuracy at the wanted size.

`read_tuning` reads the file (its format is described in `flatprune.tuning.space`), `tune` makes the trials.
"""

from flatprune.tuning.search import EARLY, Search, tune
from flatprune.tuning.space import Tuning, read_tuning

__all__ = ["EARLY", "Search", "Tuning", "read_tuning", "tune"]
