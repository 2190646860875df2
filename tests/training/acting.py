"""Observers of a training that act on it."""

from flatprune.training.trainer import Observer


class At(Observer):
    """Does something after a step."""

    def __init__(self, step, action):
        self.at, self.action = step, action

    def step(self, trainer):
        if trainer.progress.step == self.at:
            self.action()
