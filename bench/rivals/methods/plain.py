"""Training without pruning: of the whole network, and of the shape that ours ends with.

Source: none. From scratch is the question of Liu et al. 2019 (arXiv 1810.05270): whether the shape is all that pruning
finds. They give it the epochs of the whole network, and also more of them, since an epoch of a small network is cheap.
"""

from __future__ import annotations

from bench.rivals.method import Method


class Dense(Method):
    """The whole network."""

    title = "dense"
    source = "the network as it is"
    prunes = False


class Scratch(Method):
    """Fresh weights in the final shape of ours, for as many epochs."""

    title = "the shape of ours from scratch"
    source = "Liu et al. 2019, arXiv 1810.05270"
    shape_of = "ours"


class ScratchTwice(Scratch):
    """The same for twice the epochs."""

    title = "the same, twice the epochs"
    epochs = 2


METHODS = {"dense": Dense, "scratch": Scratch, "scratch-2x": ScratchTwice}
