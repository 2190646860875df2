"""Trainers of other libraries that prune while they train; each module needs its library."""
