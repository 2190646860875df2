"""What is kept of schedules, and how long, with the device played by plain objects."""

from types import SimpleNamespace

import pytest
import torch

from kfac_ext.ops import _schedules
from kfac_ext.ops._schedules import Schedules

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def played(monkeypatch):
    """A device whose current stream is played.stream, and schedules of 10 kB each."""
    state = SimpleNamespace(stream=SimpleNamespace(cuda_stream=1), capturing=False, made=[], told=[])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)

    def make(device, key):
        if state.capturing:
            raise RuntimeError("these shapes are new")
        state.made.append(key)
        return SimpleNamespace(nbytes=10_000, record_stream=lambda stream: state.told.append((key, stream)))

    state.schedules = Schedules(make, lambda value: [value], most_bytes=5 * 12_000)
    return state


def test_what_is_asked_for_again_is_not_made_again(played):
    first = played.schedules(DEVICE, "a")
    assert played.schedules(DEVICE, "a") is first and played.made == ["a"]
    played.schedules(torch.device("cuda", 1), "a")
    assert played.made == ["a", "a"]


def test_the_oldest_go_where_there_are_too_many(played):
    for key in "abcde":
        played.schedules(DEVICE, key)
    played.schedules(DEVICE, "a")
    played.schedules(DEVICE, "f")  # b is the oldest now
    played.made.clear()
    for key in "acdefb":
        played.schedules(DEVICE, key)
    assert played.made == ["b"]


def test_one_that_is_too_large_is_kept_for_its_next_call(played):
    large = Schedules(lambda device, key: SimpleNamespace(nbytes=10**9, record_stream=print), lambda value: [value])
    assert large(DEVICE, "a") is large(DEVICE, "a")


def test_a_call_of_more_shapes_than_64_makes_them_once(monkeypatch):
    made = []
    schedules = Schedules(lambda device, key: made.append(key), lambda value: [])
    for _ in range(2):
        for key in range(3000):
            schedules(torch.device("cpu"), key)
    assert len(made) == 3000


def test_what_a_graph_has_seen_stays(played):
    captured = played.schedules(DEVICE, "graph")
    played.capturing = True
    assert played.schedules(DEVICE, "graph") is captured
    played.capturing = False
    for key in range(100):
        played.schedules(DEVICE, key)
    assert played.schedules(DEVICE, "graph") is captured and played.made.count("graph") == 1


def test_a_new_one_while_a_graph_is_captured_is_an_error(played):
    played.capturing = True
    with pytest.raises(RuntimeError, match="these shapes are new"):
        played.schedules(DEVICE, "new")
    played.capturing = False
    played.schedules(DEVICE, "new")


def test_every_other_stream_that_reads_it_is_told_once(played):
    own, other = played.stream, SimpleNamespace(cuda_stream=2)
    for stream in (own, other, own, other):
        played.stream = stream
        played.schedules(DEVICE, "a")
    assert played.told == [("a", other)]  # the allocator knows of the one that it was allocated on


def test_all_families_keep_their_schedules_so():
    from kfac_ext.ops import _covariance_kernels, _inverse_kernels, _power_kernels, _saliency_kernels, covariance_group

    of_covariances = (_covariance_kernels._schedules, covariance_group._plans)
    families = (*of_covariances, _inverse_kernels._group, _power_kernels._group, _saliency_kernels._group)
    assert all(isinstance(kept, _schedules.Schedules) for kept in families)
