"""Files that are whole: how they are written, sealed, locked, read again and checked."""
