"""What the machine code of the CUDA kernels does, counted in the listing that cuobjdump prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_DIVISION = re.compile(r"\bI2F\S*\.RP\b")  # how every division of integers that is not known beforehand begins
_LOAD, _STORE = re.compile(r"\bLDG\."), re.compile(r"\bSTG\.")


class Counts(NamedTuple):
    """Of one kernel."""

    divisions: int
    """of integers, by numbers that are not known when it is compiled"""
    stage_loads: int
    """loads into registers, in loops that multiply what asynchronous copies have brought"""
    loads_at_once: int
    """the fewest loads before the first store, in innermost loops that load and store; 0 where there are none"""


class _Instruction(NamedTuple):
    address: int
    text: str


def cuobjdump() -> str | None:
    """The program, of the toolkit or of the package nvidia-cuda-cuobjdump."""
    beside = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/cuobjdump"
    return shutil.which("cuobjdump") or next(
        (str(p) for p in (Path("/usr/local/cuda/bin/cuobjdump"), beside) if p.exists()), None
    )


def listing(program: str, file: Path) -> str:
    """The machine code of an object file."""
    return subprocess.run([program, "-sass", str(file)], capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, Counts]:
    """Mangled name of each kernel -> what is counted of it."""
    found: dict[str, list[_Instruction]] = {}
    own: list[_Instruction] = []
    for line in text.splitlines():
        if name := _FUNCTION.search(line):
            own = found[name[1]] = []
        elif instruction := _INSTRUCTION.match(line):
            own.append(_Instruction(int(instruction[1], 16), instruction[2]))
    return {name: _counts(instructions) for name, instructions in found.items()}


def _counts(instructions: list[_Instruction]) -> Counts:
    loops = list(_loops(instructions))
    stages = [loop for loop in loops if _has(loop, "HMMA") and _has(loop, "LDGSTS") and not _has(loop, "STG")]
    inner = [loop for loop in loops if _number(loop, _LOAD) and _number(loop, _STORE) and _is_innermost(loop, loops)]
    return Counts(
        divisions=_number(instructions, _DIVISION),
        stage_loads=max((_number(loop, _LOAD) for loop in stages), default=0),
        loads_at_once=min((_loads_before_a_store(loop) for loop in inner), default=0),
    )


def _loops(instructions: list[_Instruction]) -> Iterator[list[_Instruction]]:
    """The body of every branch back; one to itself is what follows the end."""
    for last in instructions:
        target = _BRANCH.search(last.text)
        if target and int(target[1], 16) < last.address:
            yield [i for i in instructions if int(target[1], 16) <= i.address <= last.address]


def _is_innermost(loop: list[_Instruction], loops: list[list[_Instruction]]) -> bool:
    first, last = loop[0].address, loop[-1].address
    return not any(first <= other[0].address and other[-1].address < last for other in loops)


def _has(instructions: list[_Instruction], word: str) -> bool:
    return any(word in instruction.text for instruction in instructions)


def _number(instructions: list[_Instruction], pattern: re.Pattern[str]) -> int:
    return sum(1 for instruction in instructions if pattern.search(instruction.text))


def _loads_before_a_store(loop: list[_Instruction]) -> int:
    first = next(place for place, instruction in enumerate(loop) if _STORE.search(instruction.text))
    return _number(loop[:first], _LOAD)
