"""Networks that people train, with random weights: what of each can be pruned, and whether a cut is what masking is.

`python -m bench.zoo` runs them all, `make zoo` sets up what they need before; docs/networks.md has the outcome.
"""
