"""Which CUDA kernels are trusted, with devices played by plain objects."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kfac_ext.ops import _cuda

TENSOR = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 1))


@pytest.fixture
def family(monkeypatch):
    """A family 'fake' whose check gives fake.error; nothing else is known of any device."""
    fake = SimpleNamespace(error=0.0, checks=0, problem="", capturing=False)

    def check(device):
        fake.checks += 1
        if isinstance(fake.error, Exception):
            raise fake.error
        return fake.error

    monkeypatch.setattr(_cuda, "_families", {})
    monkeypatch.setattr(_cuda, "_verdicts", {})
    monkeypatch.setattr(_cuda, "_warned", set())
    monkeypatch.setattr(_cuda._C, "cuda_architectures", lambda: ["80-real", "90"])
    monkeypatch.setattr(_cuda._C, "cuda_device_problem", lambda index: fake.problem)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    _cuda.register_family("fake", frozenset({torch.float32}), check)
    return fake


def test_a_family_is_checked_once_a_device(family):
    other = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(_cuda.cuda_serves("op", "fake", tensor) for tensor in [TENSOR, TENSOR, other])
    assert family.checks == 2
    assert _cuda.cuda_verdicts() == {"fake on cuda:1": "ok", "fake on cuda:0": "ok"}


@pytest.mark.parametrize("error", [1.5, float("inf"), float("nan")])
def test_wrong_numbers_warn_once_and_leave_the_reference(family, error):
    family.error = error
    with pytest.warns(
        UserWarning, match=r"kfac_ext.op: .*'fake' do not serve on cuda:1 \(Some GPU\): wrong on a small"
    ):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _cuda.cuda_serves("op", "fake", TENSOR)
    assert family.checks == 1
    assert "times what is allowed" in _cuda.cuda_verdicts()["fake on cuda:1"]


def test_a_launch_that_fails_leaves_the_reference(family):
    family.error = RuntimeError("covariance_cuda: out of resources")
    with pytest.warns(UserWarning, match="their check failed: covariance_cuda: out of resources"):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuda: out of memory")])
def test_want_of_memory_is_no_verdict(family, error):
    family.error = error
    with pytest.warns(UserWarning, match="no memory is left for their check, which the next call repeats"):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)
    assert _cuda.cuda_verdicts() == {}
    family.error = 0.0
    assert _cuda.cuda_serves("op", "fake", TENSOR) and family.checks == 2


def test_a_check_is_not_cast():
    seen = []
    fake = _cuda.Family(frozenset(), lambda device: seen.append(torch.is_autocast_enabled("cpu")) or 0.0)
    with torch.autocast("cpu"):
        assert _cuda._self_check(fake, torch.device("cpu")) == "ok" and seen == [False]


def test_the_worst_error_is_told_and_nan_is_infinite():
    assert _cuda.worst([torch.tensor(2.0), 3.0], 1.5) == 2.0
    assert _cuda.worst([torch.tensor(float("nan")), 3.0], 1.5) == float("inf")


def test_a_device_that_cannot_run_the_kernels_is_named(family):
    family.problem = "cudaErrorInsufficientDriver: too old"
    with pytest.warns(UserWarning, match=r"for 80-real, 90, device of capability 7.5: cudaErrorInsufficientDriver"):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)
    assert family.checks == 0


def test_a_build_without_kernels_says_how_to_get_them(family, monkeypatch):
    monkeypatch.setattr(_cuda._C, "cuda_architectures", list)
    with pytest.warns(UserWarning, match="rebuild with KFAC_CUDA=1 and an nvcc"):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)


def test_other_dtypes_warn_once(family):
    with pytest.warns(UserWarning, match="no CUDA kernels for torch.float64"):
        tensor = SimpleNamespace(dtype=torch.float64, device=TENSOR.device)
        assert not _cuda.cuda_serves("op", "fake", tensor)
    assert _cuda.cuda_serves("op", "fake", TENSOR)


def test_nothing_is_checked_while_a_graph_is_captured(family):
    family.capturing = True
    with pytest.warns(UserWarning, match="call the operation once before capturing"):
        assert not _cuda.cuda_serves("op", "fake", TENSOR)
    family.capturing = False
    assert _cuda.cuda_serves("op", "fake", TENSOR)
