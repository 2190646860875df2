"""Faults looked for on purpose: random and hostile calls, damaged files, kills (`python -m bench.hard`)."""
