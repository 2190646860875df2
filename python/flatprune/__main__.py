"""The command `flatprune`, also as `python -m flatprune`."""

from __future__ import annotations

import sys

from flatprune.errors import MissingPackageError
from flatprune.extras import needed_by


def main() -> int:
    """Run the command of `sys.argv`; 2 where a package is missing, with a line that says which."""
    try:
        with needed_by("the command line"):
            from flatprune import cli
    except MissingPackageError as error:
        print(f"flatprune: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
