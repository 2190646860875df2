"""A run on the screen and as a page."""
