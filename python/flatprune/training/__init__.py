"""The training loop of `flatprune run`: its parts, its state, what it measures."""
