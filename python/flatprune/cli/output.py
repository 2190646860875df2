"""What the command says, and to whom, if there is somebody to read it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_LONGEST = 2000  # characters of a message


@contextlib.contextmanager
def dispensable() -> Iterator[None]:
    """What is said of a run that has ended well: its files say it too, so that nobody has to be there to read it."""
    try:
        yield
        sys.stdout.flush()
    except (OSError, ValueError):
        forget_stdout()


def forget_stdout() -> None:
    """Let what cannot be written to a closed pipe or a full disk vanish, instead of failing at exit once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(message: str) -> None:
    """One line on stderr, if somebody is there to read it."""
    line = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
    shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"flatprune: {shown}", file=sys.stderr, flush=True)


def warn(message: Warning | str, *_: Any) -> None:
    """`warnings.showwarning` of the command line."""
    say(f"warning: {message}")


def fail(what: Exception | str, code: int) -> int:
    """Say what went wrong, unless another rank has; `code`."""
    if not getattr(what, "is_said", False):
        say(str(what))
    return code
