"""`python -m flatprune` is the command `flatprune`."""

import sys

from flatprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
