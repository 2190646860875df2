"""One file a domain: schema, check, implementations, fake kernel, public function. Only here is `_C` imported."""

import sysconfig


def refuse_free_threading() -> None:
    """Raise in a CPython without a global interpreter lock, which guards what operations keep between calls."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("kfac_ext does not support free-threaded CPython (python3.13t and the like) yet")


refuse_free_threading()
