"""A run in a folder: which files it makes, when it may start there, how it is interrupted and resumed.

Files of a run: `checkpoint.pt` (see `flatprune.checkpoint`), `settings.json`, `history.jsonl` (a line an epoch and a
line a removal), and at the end `model.pt` (see `flatprune.export`), `progress.png`, `report.html`, `digests.json` (see
`flatprune.files.finished`) and, last, `summary.json`; `dense/` holds the same for the network that is trained without
pruning, where that is wanted. Each file is written atomically, so that it is whole at any time, and all that a run
knows is in its checkpoint: the others are made of it, again too, when it is resumed. `lock` is held while it goes on.

What is in `summary.json` stands in `flatprune.runs.summary`.

`history.jsonl`, by `kind`: "head" (the first line: format, version, number of records), "epoch" (losses, accuracies in
percent, those of an epoch not tested null, params, radii, seconds so far), "removal" (fields of
`flatprune.pruning.removals.Removal` without the neurons' indices; width and params are those after it), "event" (one
at which nothing was removed; the reason is its note), "stop" (the end of pruning before its time, likewise),
"optimum_shift" (a layer after the last removal: rank and number of its inputs, norm of its weight before and after).
"""

from flatprune.runs.begin import resume, run
from flatprune.runs.found import is_finished
from flatprune.runs.summary import TIMES

__all__ = ["TIMES", "is_finished", "resume", "run"]
