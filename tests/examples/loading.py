"""Examples as modules."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def example(name):
    """The module of an example, run once but for its main part."""
    spec = spec_from_file_location(name, Path(__file__).parents[2] / f"examples/{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
