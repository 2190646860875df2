"""The pruned network as Python source that needs torch only: `network.py` beside `network_weights.pt`.

The source is made from the module tree: layers of `torch.nn` are written as the call that makes them, with the pruned
widths (their repr is that call), and modules of other classes as their parts around the source of their `forward`.
So such a `forward` may use nothing but `self`, `torch`, `F`, `nn` and `Tensor`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import pprint
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flatprune.errors import ExportError
from flatprune.export.subject import Subject
from flatprune.files.atomic import damaged, read_bytes, sha256
from flatprune.files.sealed import seal, seal_problem

TEMPLATE = '''\
"""{name}, pruned by flatprune to {params:,} parameters. Needs torch, and its file of weights beside it.

images: {images}
logits: float32 [n, {outputs}]

Example:
    >>> import {module}
    >>> logits = {module}.load()(images)
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
{functional}from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name({weights})
DESCRIPTION = {description}


{classes}def build() -> nn.Module:
    """The network with untrained weights."""
    return {network}


def load(weights=WEIGHTS, device="cpu") -> nn.Module:
    """The trained network in evaluation mode; ValueError where the file of weights is damaged."""
    if zipfile.ZipFile(weights).testzip():  # torch itself does not look at the checksums
        raise ValueError(f"{{weights}}: is damaged")
    network = build()
    network.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    return network.to(device).eval()
'''
PARTS = '''\
class Parts(nn.Module):
    """A module made of the parts it is given."""

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


'''
CLASS_TEMPLATE = '''\
class {name}(Parts):
    """{doc}"""

{forward}


'''


def write(subject: Subject, path: Path) -> list[Path]:
    """Write the source to `path` and the weights beside it, which come first in what is returned.

    Raises:
        ExportError: a module is of a kind that cannot be written as source.
    """
    weights = weights_path(path)
    buffer = io.BytesIO()
    torch.save(subject.network.state_dict(), buffer)
    weights.write_bytes(seal(buffer))
    source = network_source(subject, path.stem).encode()
    path.write_bytes(source + _last_line(source))
    return [weights, path]


def _last_line(source: bytes) -> bytes:
    return f"# sha256 of the lines above: {sha256(source)}\n".encode()


def check(path: Path) -> None:
    """Raise DamagedError where source or weights are not what `write` wrote; the source is not run."""
    content = read_bytes(path)
    if path.suffix != ".py":
        if problem := seal_problem(content):
            raise damaged(path, problem)
        return
    length = len(_last_line(b""))
    if content[-length:] != _last_line(content[:-length]):
        raise damaged(path, "it was changed after it was written: its text has not the SHA-256 in its last line")


def weights_path(path: Path) -> Path:
    """The file of weights that belongs to the source at `path`."""
    return path.with_name(f"{path.stem}_weights.pt")


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes."""
    spec = importlib.util.spec_from_file_location("flatprune_exported_network", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)  # leaves no __pycache__ behind
    return module.load()


def network_source(subject: Subject, module: str) -> str:
    """The text of the module that is to be imported as `module`."""
    forwards = {type(part): _forward_source(type(part)) for part in subject.network.modules() if not _is_torchs(part)}
    classes = [
        CLASS_TEMPLATE.format(name=kind.__name__, doc=(kind.__doc__ or kind.__name__).splitlines()[0], forward=forward)
        for kind, forward in forwards.items()
    ]
    uses_functional = any("F." in forward for forward in forwards.values())
    return TEMPLATE.format(
        name=subject.saved.arguments["name"],
        params=subject.params,
        images=subject.input_text(),
        outputs=subject.saved.arguments["classes"],
        module=module if module.isidentifier() else "this_module",
        weights=repr(weights_path(Path(f"{module}.py")).name),
        functional="import torch.nn.functional as F\n" if uses_functional else "",
        description=pprint.pformat(subject.description(), width=116, sort_dicts=False),
        classes="".join([PARTS, *classes] if classes else []),
        network=textwrap.indent(_expression(subject.network), "    ").lstrip(),
    )


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _forward_source(kind: type[nn.Module]) -> str:
    return textwrap.indent(textwrap.dedent(inspect.getsource(kind.forward)), "    ").rstrip()


def _expression(module: nn.Module) -> str:
    """The call that makes `module` as it is, over several lines where it has parts."""
    if type(module) is nn.Sequential:
        return _call("nn.Sequential", [_expression(part) for part in module])
    if not _is_torchs(module):
        return _call(type(module).__name__, [f"{name}={value}" for name, value in _parts(module)])
    if next(module.children(), None) is not None:
        raise ExportError(f"{type(module).__name__} has parts, expected a plain layer or nn.Sequential")
    return f"nn.{module!r}"


def _parts(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in _plain_attributes(module).items():
        yield name, repr(value)
    for name, parameter in module.named_parameters(recurse=False):
        yield name, f"nn.Parameter(torch.zeros({tuple(parameter.shape)}))"
    for name, buffer in module.named_buffers(recurse=False):
        yield name, f"nn.Buffer(torch.zeros({tuple(buffer.shape)}))"
    for name, part in module.named_children():
        yield name, _expression(part)


def _plain_attributes(module: nn.Module) -> dict[str, bool | int | float | str]:
    """The numbers and strings that its `forward` reads from `self`."""
    read = {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    found = {name: value for name, value in vars(module).items() if name in read}
    for name, value in found.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ExportError(
                f"{type(module).__name__}.{name} is a {type(value).__name__}, expected a number or a string"
            )
    return found


def _call(name: str, arguments: list[str]) -> str:
    if not arguments:
        return f"{name}()"
    return f"{name}(\n" + textwrap.indent(",\n".join(arguments), "    ") + ",\n)"
