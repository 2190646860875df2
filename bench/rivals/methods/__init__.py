"""A file a method: its source, its authors' settings, and how a user calls it."""
