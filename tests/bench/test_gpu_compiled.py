"""`make cuda-report`: what ptxas and the machine code tell of the kernels, their bounds, counts of schedules."""

import pytest

from bench.gpu import bounds, compiled, counts, sass
from bench.gpu.networks import work_sets
from kfac_ext import _C

REPORT = """
ptxas info    : Compiling entry function '_ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 208 registers, used 1 barriers, 384 bytes cmem[0]
"""


def test_a_report_of_ptxas_is_read():
    (kernel,) = compiled.kernels(REPORT)
    assert kernel == ("covariance_tiles_kernel<2>", "sm_90", 208, 8, 12)
    assert compiled.resident_blocks(kernel, 256, 73728) == 1


@pytest.mark.skipif(not _C.cuda_architectures(), reason="no CUDA kernels in this build")
def test_every_compiled_kernel_is_reported_and_within_its_bound():
    kernels = [line.split("|") for line in compiled.table().splitlines() if "_kernel" in line]
    assert {row[1].strip(" `") for row in kernels} == {name for name, *_ in _C.cuda_kernels()} >= set(bounds.BOUNDS)
    assert compiled.beyond() == []


LISTING = """
\t\tFunction : _ZN4kfac20inverse_update_kernelEv
        /*0000*/                   I2F.U32.RP R0, R7 ;                /* 0x1 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR6][R8.64] ;
        /*0020*/                   LDG.E R3, desc[UR6][R8.64] ;
        /*0030*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   LDG.E R3, desc[UR6][R8.64] ;
        /*0060*/                   LDG.E R4, desc[UR6][R8.64+0x80] ;
        /*0070*/                   STG.E desc[UR6][R8.64], R3 ;
        /*0080*/                   STG.E desc[UR6][R8.64+0x80], R4 ;
        /*0090*/              @P1  BRA 0x50 ;
        /*00a0*/              @P2  BRA 0x0 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
\t\tFunction : other
        /*0000*/                   EXIT ;
"""


def test_machine_code_is_counted():
    found = sass.functions(LISTING)
    assert found["_ZN4kfac20inverse_update_kernelEv"] == sass.Counts(divisions=1, stage_loads=1, loads_at_once=2)
    assert found["other"] == sass.Counts(0, 0, 0)


def test_no_report_where_the_machine_code_is_not_seen(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- cuda-report -->\nold\n<!-- cuda-report -->\n")
    monkeypatch.setattr(sass, "cuobjdump", lambda: None)
    monkeypatch.setattr("sys.argv", ["compiled", "--write", str(page)])
    with pytest.raises(SystemExit, match=r"no cuobjdump, .* --group cuda"):
        compiled.main()
    assert "old" in page.read_text()


BOUND = bounds.Bound(240, divisions=0, stage_loads=0, loads_at_once=16)


def test_what_is_beyond_its_bound_is_named(monkeypatch):
    monkeypatch.setitem(bounds.BOUNDS, "a_kernel", BOUND)
    assert list(bounds.passed_bounds("a_kernel", 200, 0, sass.Counts(0, 0, 16))) == []
    assert list(bounds.passed_bounds("some_other_kernel", 255, 0, None)) == []
    assert list(bounds.passed_bounds("a_kernel", 250, 8, sass.Counts(1, 24, 1))) == [
        "a_kernel: 250 registers, at most 240",
        "a_kernel: 8 bytes spilled, at most 0",
        "a_kernel: 1 divisions, at most 0",
        "a_kernel: 24 loads in the loop over stages, at most 0",
        "a_kernel: 1 loads before a store, at least 16",
    ]


def test_a_report_fails_where_a_bound_is_passed(monkeypatch):
    monkeypatch.setitem(bounds.BOUNDS, "a_kernel", BOUND)
    monkeypatch.setattr(compiled, "table", lambda: "")
    monkeypatch.setattr(compiled, "machine_code", dict)
    monkeypatch.setattr(sass, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(compiled, "reported", lambda: [compiled.Kernel("a_kernel", "sm_90", 250, 0, 0)])
    monkeypatch.setattr("sys.argv", ["compiled"])
    with pytest.raises(SystemExit, match="beyond its bound:\\na_kernel: 250 registers, at most 240"):
        compiled.main()


def test_counts_of_schedules():
    inverse = _C.InverseGroup([(256, 256), (128, 128), (20, 20)]).counts()
    assert inverse == {"products": 6 * 128.0**3, "launches": 8, "pivots": 384}  # a level: panel, panel, update
    assert _C.SaliencyGroup([(64, 130, 1, 130, 130, 64)]).counts() == {"products": 3 * 64.0**3, "tiles": 3}
    power = _C.PowerGroup([(300, 300), (40, 40)], 4, 64 << 10).counts()
    assert power["entries"] == 300**2 + 40**2 and power["kept"] < power["entries"] and power["most"] >= 300 * 75
    for table in (counts.covariance_table(), counts.algebra_table()):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1 and all(f"| {name} |" in table for name in work_sets(False))
