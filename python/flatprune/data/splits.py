"""The test part of data that come without one."""

from __future__ import annotations

import numpy as np

TEST_FRACTION = 0.2
_SEED = 0  # fixed: the test set is the same for every --seed


def held_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train and to test on: of each class a fifth is tested on, at least one, but never all of it.

    Args:
        labels: integers [n].
    """
    generator = np.random.default_rng(_SEED)
    tested: list[np.ndarray] = []
    for value in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == value))
        tested.append(places[: min(max(1, round(TEST_FRACTION * len(places))), len(places) - 1)])
    chosen = np.zeros(len(labels), bool)
    chosen[np.concatenate(tested)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def split(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays as of an .npz, a fifth of them held out."""
    train, test = held_out(y)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
