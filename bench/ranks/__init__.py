"""Several processes: what they cost each other here, and what a model predicts for many GPUs."""
