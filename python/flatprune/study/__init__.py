"""Studies: a grid of settings as resumable runs in processes of their own, and what their summaries say together.

`read_study` reads the file (its format is described in `flatprune.study.grid`), `run_study` checks everything and makes
the runs, `write_report` writes the report of what is there.
"""

from flatprune.study.grid import Cell, Study, read_study
from flatprune.study.report import write_report
from flatprune.study.results import Group, Results
from flatprune.study.schedule import run_study

__all__ = ["Cell", "Group", "Results", "Study", "read_study", "run_study", "write_report"]
