"""Which neurons go, when, and what that is worth."""
