"""The whole method against what a user would install instead, all in one training loop.

`python -m bench.rivals --data-dir DIR` runs the study, `make rivals` sets up what it needs before; docs/results.md has
the outcome. A rival is a file of `bench/rivals/methods`, which cites its source and its authors' settings.
"""
