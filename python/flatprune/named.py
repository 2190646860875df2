"""Functions of a user's own, by "module:function"; only what the user has named in this process is ever called.

Files of a run tell which function made its network. A file may come from somebody else, so that its word alone loads
no code: the same name has to come from the user too, on the command line or in a call.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatprune.errors import InputError, did_you_mean

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_allowed: set[str] = set()


def is_named(name: str) -> bool:
    """Whether this means a function of the user's: "module:function", and no file of that name is there."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def allow(*names: str | None) -> None:
    """Note that the user has named these."""
    _allowed.update(name for name in names if name is not None and is_named(name))


def call(what: str, name: str, **offered: Any) -> Any:
    """What the function gives, called with those of the keywords that it takes.

    Args:
        what: setting that named it, for messages.
        name: "module:function"; the module may lie in the current folder.
        offered: keywords.

    Raises:
        InputError: the user has not named it, there is no such function, or it raises.
    """
    function = _function(what, name)
    taken = inspect.signature(function).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
    known = {parameter.name for parameter in taken}
    try:
        return function(**{key: value for key, value in offered.items() if everything or key in known})
    except Exception as error:
        raise InputError(f"{what} {name}: raises {type(error).__name__}: {error}") from error


def takes(what: str, name: str, keyword: str) -> bool:
    """Whether the function takes a keyword; errors as in `call`."""
    taken = inspect.signature(_function(what, name)).parameters.values()
    return any(parameter.name == keyword or parameter.kind is parameter.VAR_KEYWORD for parameter in taken)


def _function(what: str, name: str) -> Callable[..., Any]:
    if name not in _allowed:
        raise InputError(f"{what} {name}: a file names it, which runs no code unless you do: say --{what} {name}")
    module_name, _, function_name = name.partition(":")
    module = _module(what, name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = did_you_mean(function_name, [key for key, value in vars(module).items() if callable(value)])
        raise InputError(f"{what} {name}: {module_name} has no function {function_name}; {near}")
    return function


def _module(what: str, name: str, module_name: str) -> Any:
    here = os.getcwd()
    sys.path.append(here)  # after all others: no file of this folder takes the place of a package
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None and module_name.startswith(error.name):
            raise InputError(f"{what} {name}: there is no module {error.name} here or among the installed") from error
        raise InputError(f"{what} {name}: importing {module_name} raises {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
