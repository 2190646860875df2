"""Numbers that no kernel can compute with are errors that name them, also where operators are called by their names."""

import pytest
import torch

import kfac_ext
from kfac_ext import reference
from tests.ops.covariance_oracle import oracle

raw = torch.ops.kfac_ext
IMAGE = torch.randn(2, 1, 6, 6)
POINT = {"kernel_size": [2, 2], "stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}


def raw_conv(out, x=IMAGE, **changed):
    place = {**POINT, **changed}
    raw.conv2d_covariance_(out, x, *place.values(), False, False, 0.0, 1.0)


BAD_PLACES = {
    "negative padding": ({"padding": [-2, 1, -2, 1]}, "padding"),
    "three paddings": ({"padding": [1, 1, 1]}, "padding"),
    "huge padding": ({"padding": [2**62, 2**62, 0, 0]}, "padding"),
    "no stride": ({"stride": [0, 1]}, "stride"),
    "one stride": ({"stride": [1]}, "stride"),
    "negative dilation": ({"dilation": [-1, 1]}, "dilation"),
    "huge dilation": ({"dilation": [2**40, 1], "padding": [0, 0, 2**62, 2**62]}, "padding"),
    "no kernel": ({"kernel_size": [0, 1]}, "kernel_size"),
    "huge kernel": ({"kernel_size": [2**30, 1], "padding": [0, 0, 2**30, 2**30]}, "kernel_size"),
    "no groups": ({"groups": 0}, "groups"),
}


@pytest.mark.parametrize("name", BAD_PLACES)
def test_a_registered_operator_checks_its_geometry(name):
    place, argument = BAD_PLACES[name]
    out = torch.ones(4, 4)
    with pytest.raises(ValueError, match=rf"^conv2d_covariance: .*{argument}"):
        raw_conv(out, **place)
    assert torch.equal(out, torch.ones(4, 4))


FAR = {
    "taps that meet no pixel": {"kernel_size": 2, "padding": 10**6, "dilation": 10**6},
    "far apart, one output": {"kernel_size": 2, "padding": (2**30, 2**29), "dilation": (2**31, 2**30)},
    "a long stride": {
        "kernel_size": (3, 1),
        "stride": (2**40, 2**54),
        "padding": (7487409, 2),
        "dilation": (7487410, 2),
    },
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_far_apart_taps_see_single_pixels(name, mode, threads):
    x = torch.randn(2, 3, 4, 4)
    found = kfac_ext.conv2d_covariance(x, **FAR[name], mode=mode)
    assert bool(found.isfinite().all()) and torch.equal(found, found.mT)
    assert float(found.trace()) <= float(x.square().sum())


def test_far_apart_taps_against_the_oracle():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    far = {"kernel_size": (2, 1), "dilation": (60, 1), "padding": (30, 0)}
    for mode in ("expand", "reduce"):
        found = kfac_ext.conv2d_covariance(x, **far, mode=mode)
        torch.testing.assert_close(found, oracle(x, **far, mode=mode))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_kernels_too_large_for_a_plan(groups, mode):
    x, place = torch.randn(2, 4, 30, 26, dtype=torch.float64), {"kernel_size": (23, 21), "padding": (11, 3)}
    x = x[:, :1] if groups == 1 else x
    found = kfac_ext.conv2d_covariance(x, **place, groups=groups, bias=True, mode=mode)
    torch.testing.assert_close(found, reference.conv2d_covariance(x, **place, groups=groups, bias=True, mode=mode))


def test_more_rows_than_can_be_counted():
    with pytest.raises(ValueError, match=r"linear_covariance: x has .* entries, expected at most"):
        kfac_ext.linear_covariance(torch.zeros(1, 1).expand(2**54, 1))


OVERLAPS = {
    "linear_covariance": lambda x: kfac_ext.linear_covariance_(x, x),
    "gradient_covariance": lambda x: kfac_ext.gradient_covariance_(x, x[1:]),
    "conv2d_covariance": lambda x: kfac_ext.conv2d_covariance_(x, x.view(1, 4, 2, 2), 1),
    "power_iteration": lambda x: raw.power_iteration_(x.view(-1)[2:6], [0], [x], 0.0, 3),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_an_output_that_is_part_of_the_input(name):
    x = torch.randn(4, 4)
    before = x.clone()
    with pytest.raises(ValueError, match=rf"^{name}: .*share memory"):
        OVERLAPS[name](x)
    assert torch.equal(x, before)


def test_vectors_that_overlap():
    with pytest.raises(ValueError, match="power_iteration: vectors share memory"):
        raw.power_iteration_(torch.ones(5), [0, 2], [torch.eye(3), torch.eye(3)], 0.0, 3)


RAW_CALLS = {
    "covariance_group calls": (
        lambda: raw.covariance_group_([torch.ones(2, 2)], [torch.ones(3, 2)], [0], [0.0], [1.0]),
        "calls",
    ),
    "covariance_group kind": (
        lambda: raw.covariance_group_([torch.ones(2, 2)], [torch.ones(3, 2)], [7, *[1] * 13], [0.0], [1.0]),
        "kind",
    ),
    "damped_inverse diagonals": (
        lambda: raw.damped_inverse([torch.eye(2)] * 2, torch.ones(2).double(), [torch.ones(2)], False),
        "diagonals",
    ),
    "damped_inverse amounts": (lambda: raw.damped_inverse([torch.eye(2)], torch.ones(1), [], False), "amounts"),
    "damped_inverse nothing": (lambda: raw.damped_inverse([], torch.ones(0).double(), [], False), "matrices"),
    "pi_damping pairs": (lambda: raw.pi_damping([torch.eye(2)] * 2, 1.0, [0, 7]), "pi"),
    "power_iteration max_iter": (
        lambda: raw.power_iteration_(torch.ones(2), [0], [torch.eye(2)], 0.0, 2**40),
        "max_iter",
    ),
    "power_iteration starts": (lambda: raw.power_iteration_(torch.ones(2), [-1], [torch.eye(2)], 0.0, 3), "starts"),
    "saliency blocks": (
        lambda: raw.saliency([torch.ones(2, 2)], [torch.eye(2)], [torch.eye(2)], [-1], False),
        "blocks",
    ),
    "compensate pruned": (lambda: raw.compensate([torch.ones(2, 2)], [torch.eye(2)], [torch.tensor([5])]), "pruned"),
    "linear_covariance decay": (
        lambda: raw.linear_covariance_(torch.ones(2, 2), torch.ones(3, 2), False, float("nan"), 1.0),
        "decay",
    ),
}


@pytest.mark.parametrize("name", RAW_CALLS)
def test_registered_operators_check_all_that_they_are_given(name):
    call, argument = RAW_CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"^[a-z0-9_]+: .*{argument}"):
        call()


def greedy_state(**changed):
    n, outputs = 4, 3
    state = {
        "weights": [torch.ones(outputs, n)],
        "inverses": [torch.eye(n)],
        "Gs": [torch.eye(outputs)],
        "removed": [torch.zeros(n, dtype=torch.int64)],
        "pending": [torch.zeros(n, outputs)],
        "counts": [0, 0],
        "lost": [torch.tensor([1])],
        "columns": [torch.arange(n)[:, None]],
        "layers": [0],
        "blocks": [torch.ones(n, 1, 1, dtype=torch.float64)],
        "forms": [torch.ones(n, 1, 1, dtype=torch.float64)],
        "scores": [torch.zeros(n, dtype=torch.float64)],
    }
    return {**state, **changed}


GREEDY = {
    "lost is no column": {"lost": [torch.tensor([4])]},
    "lost is negative": {"lost": [torch.tensor([-1])]},
    "lost twice": {"lost": [torch.tensor([1, 1])]},
    "lost of floats": {"lost": [torch.tensor([1.0])]},
    "counts beyond the columns": {"counts": [9, 0]},
    "counts of pending alone": {"counts": [0, 3]},
    "counts are missing": {"counts": [0]},
    "columns that are none": {"columns": [torch.tensor([[0], [1], [2], [40]])]},
    "layers that are none": {"layers": [1]},
    "removed is short": {"removed": [torch.zeros(2, dtype=torch.int64)]},
    "inverses of another size": {"inverses": [torch.eye(3)]},
    "weights across": {"weights": [torch.ones(4, 3).mT]},
    "scores of float32": {"scores": [torch.zeros(4)]},
    "forms of one": {"forms": [torch.ones(1, 1, 1, dtype=torch.float64)]},
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_step_checks_its_state(name):
    state = greedy_state(**GREEDY[name])
    with pytest.raises((TypeError, ValueError), match=rf"^greedy_\w+: .*{name.split()[0]}"):
        raw.greedy_remove_(*state.values())
    assert torch.equal(greedy_state()["Gs"][0], state["Gs"][0])


def test_a_greedy_step_that_is_right():
    changes, failures = raw.greedy_remove_(*greedy_state().values())
    assert changes.tolist() == [1.5] and failures.tolist() == [[-1, -1, -1]]


def test_a_bias_row_keeps_its_own_past():
    x, old = torch.randn(6, 3), torch.randn(4, 4)
    for form in ("linear", "conv2d"):
        found, wanted = old.clone(), old.clone()
        for module, out in ((kfac_ext, found), (reference, wanted)):
            if form == "linear":
                module.linear_covariance_(out, x, decay=0.5, scale=0.5, bias=True)
            else:
                module.conv2d_covariance_(out, x[:, :, None, None], 1, decay=0.5, scale=0.5, bias=True)
        torch.testing.assert_close(found, wanted)


DEAD = {
    "zero": torch.zeros(2, 2),
    "a dead input": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    "infinite diagonal": torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]),
    "infinite below": torch.tensor([[1.0, 0.0], [float("inf"), 1.0]]),
    "nan": torch.full((2, 2), float("nan")),
}


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("native", [True, False])
def test_info_instead_of_an_error(name, native):
    with kfac_ext.use_native(native):
        inverses, info = kfac_ext.damped_inverse_ex([torch.eye(2), DEAD[name]], 0.0)
        assert info[0] == 0 and torch.equal(inverses[0], torch.eye(2))
        assert info[1] > 0 and bool(inverses[1].isnan().all())
        with pytest.raises(torch.linalg.LinAlgError, match=r"matrices \[1\]"):
            kfac_ext.damped_inverse([torch.eye(2), DEAD[name]], 0.0)


@pytest.mark.parametrize("place", [3, 20, 40])
def test_info_of_a_large_matrix_with_an_infinity(place):
    matrix = torch.eye(50)
    matrix[45, place] = matrix[place, 45] = float("inf")
    _, info = kfac_ext.damped_inverse_ex([matrix], 1e-3)
    assert int(info) > 0
