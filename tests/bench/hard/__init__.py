"""Tests of bench.hard."""
