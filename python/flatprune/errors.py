"""Errors that the user of the command line or of the package can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be used; the message is one line that names the culprit and what is wanted."""


class DamagedError(InputError):
    """A file is not what was written, or lacks what it needs beside it."""


class MissingPackageError(InputError, ImportError):
    """A package that only a part of flatprune needs is not installed; the message says what installs it."""


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number; the last checkpoint on disk is from before that."""


class Interrupted(RuntimeError):  # noqa: N818 - the user asked for it, nothing went wrong
    """Training was asked to stop; everything needed to go on is in the checkpoint."""


class ExportError(RuntimeError):
    """A network cannot be written in the format asked for, or what was written computes something else."""


class RunsFailedError(RuntimeError):
    """Runs of a study ended by a failure that is not their own result, such as a killed process."""


def did_you_mean(given: str, known: Iterable[str], *, at_most: int = 1) -> str:
    """The rest of a message about a name that is not known: the names nearest to it, or all there are.

    Example:
        >>> did_you_mean("sdg", ["sgd", "adam"])
        'did you mean sgd?'
        >>> did_you_mean("?", ["sgd", "adam"])
        'expected one of sgd, adam'
    """
    known = list(known)
    near = difflib.get_close_matches(given.lower(), known, n=at_most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
