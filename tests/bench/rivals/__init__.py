"""Tests of the study of rivals that need none of them."""
