"""Tests of the benchmark suite's own parts: they time nothing."""
