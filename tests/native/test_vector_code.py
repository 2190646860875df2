"""The compiled hot loops are made of vector instructions, and only the files that may use newer ones do.

Where there is a cross compiler (Debian's g++-aarch64-linux-gnu), the loops are also compiled for arm64.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kfac_ext import _C

FOLDER = Path(_C.build_directory()) / "csrc" / "CMakeFiles"
X86 = platform.machine() in ("x86_64", "AMD64")
SETS = ["baseline", "avx2", "avx512", "arm64"] if X86 else ["arm64"]
REGISTER = {"avx2": "%ymm", "avx512": "%zmm"}
SOURCES = Path(__file__).parents[2] / "csrc"
CROSS = "aarch64-linux-gnu-"
PRODUCTS = ["gram", "gram_diagonal", "left_product", "lower_product", "row_products", "filter", "filter_gradient"]
PRODUCTS += ["invert_factor", "lane_dots", "rayleigh", "lane_traces", "lane_updates", "blend_tile", "add_rows"]
SUMS = ["column_sums", "sum_lines"]
DOUBLES = ("rayleigh", "lane_traces", "lane_updates")  # these sum in double
PLAIN = ("lane_traces", "lane_updates")  # no templates
FILES = ("simd_greedy", "simd_kernels", "simd_linalg")

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the extension's build folder {FOLDER} is not there"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump"),
    pytest.mark.skipif(not (X86 or platform.machine() == "aarch64"), reason="instructions of x86-64 and arm64 only"),
]


def disassemble(*paths, prefix=""):
    command = [f"{prefix}objdump", "-d", "--demangle", "--no-show-raw-insn", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(listing):
    """(name, type) -> the instructions of its loops, each loop a list of lines."""
    found = {}
    for block in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        head = re.match(r"[0-9a-f]+ <.*?::(\w+)(?:<(\w+)>)?\(", block)
        if head:
            lines = re.findall(r"^ *([0-9a-f]+):\t(.+)$", block, flags=re.M)
            found.setdefault(head.groups(), []).extend(loops([(int(at, 16), text) for at, text in lines]))
    return found


def loops(lines):
    """What lies between a jump back and where it goes."""
    for place, text in lines:
        jump = re.match(r"(?:j\w+|b\.?\w*|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+) <", text)
        if jump and lines[0][0] <= int(jump[1], 16) < place:
            yield [t for at, t in lines if int(jump[1], 16) <= at <= place]


def packed(simd, element, product):
    """A pattern of full-width vector arithmetic."""
    if simd == "arm64":
        lanes = {"s": "4s", "d": "2d"}[element]
        return re.compile(rf"{'fml[as]' if product else 'fadd'}\s+v\d+\.{lanes}")
    if simd == "baseline":
        return re.compile(rf"{'mul' if product else 'add'}p{element}\s.*%xmm")
    return re.compile(rf"{'vfn?m(add|sub)[0-9]+' if product else 'vadd'}p{element}\s.*{REGISTER[simd]}")


def cross_compiled(folder):
    """The hot loops, and what chooses among their copies, compiled for arm64."""
    if not shutil.which(f"{CROSS}g++"):
        pytest.skip(f"needs {CROSS}g++")
    options = ["-O3", "-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    for name in (*FILES, "simd"):
        command = [f"{CROSS}g++", *options, "-DKFAC_SIMD=baseline", "-I", SOURCES / "include", "-c"]
        subprocess.run([*command, SOURCES / "cpu" / f"{name}.cpp", "-o", folder / f"{name}.o"], check=True)
    return disassemble(*(folder / f"{name}.o" for name in FILES), prefix=CROSS)


@pytest.fixture(scope="module", params=SETS)
def compiled(request, tmp_path_factory):
    """The instruction set, and the loops of every function of the files that are compiled for it."""
    if request.param == "arm64" and X86:
        return "arm64", functions(cross_compiled(tmp_path_factory.mktemp("arm64")))
    simd = "baseline" if request.param == "arm64" else request.param
    objects = sorted((FOLDER / f"kfac_simd_{simd}.dir" / "cpu").glob("*.o"))
    assert [path.name for path in objects] == [f"{name}.cpp.o" for name in FILES]
    return request.param, functions(disassemble(*objects))


@pytest.mark.parametrize("kind", ["float", "double"])
@pytest.mark.parametrize("kernel", PRODUCTS + SUMS)
def test_hot_loops_use_whole_vectors(compiled, kernel, kind):
    simd, found = compiled
    element = "s" if kind == "float" and kernel not in DOUBLES else "d"
    pattern = packed(simd, element, kernel in PRODUCTS)
    bodies = found[kernel, None if kernel in PLAIN else kind]
    assert any(pattern.search(line) for body in bodies for line in body), f"{len(bodies)} loops, none with {pattern}"


@pytest.mark.skipif(not X86, reason="arm64 has one instruction set")
def test_only_chosen_code_needs_a_newer_processor():
    common = [*(FOLDER / "kfac.dir").rglob("*.o"), *(FOLDER / "_C.dir").rglob("*.o")]
    common += (FOLDER / "kfac_simd_baseline.dir").rglob("*.o")
    assert len(common) > 10
    assert not re.search(r"%[yz]mm|%k[0-7]\b|\tvfmadd", disassemble(*common))


@pytest.mark.skipif(not X86, reason="arm64 has one instruction set")
@pytest.mark.parametrize("simd", ["avx2", "avx512"])
def test_no_symbol_of_an_instruction_set_can_serve_the_rest(simd):
    """A weak one (an inline function of a header, say) could be the copy that the linker keeps for all."""
    objects = map(str, (FOLDER / f"kfac_simd_{simd}.dir").rglob("*.o"))
    names = subprocess.run(["nm", "--demangle", *objects], capture_output=True, text=True, check=True).stdout
    defined = re.findall(r"^[0-9a-f]{16} ([A-Zuvw]) (.*)$", names, flags=re.M)
    assert sorted(defined) == [
        ("D", f"kfac::{simd}::k{table}") for table in ("GreedySimd", "LinalgSimd", "SimdKernels")
    ]
