"""Trainers of other libraries that prune while they train, and loggers that are told; each needs its library."""
