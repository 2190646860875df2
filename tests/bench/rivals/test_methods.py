"""The files of methods, and which of them are run."""

from pathlib import Path

import pytest

from bench.rivals import methods
from bench.rivals.method import all_methods, chosen_methods, is_installed, multistep, two_cosines
from bench.rivals.plan import settings
from flatprune.errors import InputError

FILES = [path for path in Path(methods.__file__).parent.glob("*.py") if path.name != "__init__.py"]


def test_every_file_is_a_page_and_cites_its_source():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) < 120, path.name
        assert any(line.startswith("Source: ") for line in lines[:10]), path.name


def test_every_method_has_three_values_of_one_knob():
    known = all_methods()
    assert next(iter(known)) == "ours" and {"oto", "tp-group-norm", "ocspruner", "scratch-2x"} <= set(known)
    for name, method in known.items():
        assert len(set(method.knob.values)) == 3, name
        assert method.source and (method.package is None) == (method.distribution is None)
    assert set(settings()["methods"]) == set(known)


def test_no_rival_is_imported_before_it_is_run():
    for path in FILES:
        tops = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in tops if "torch_pruning as" in line or "only_train_once" in line]


def test_from_scratch_brings_the_method_whose_shape_it_trains():
    assert list(chosen_methods(["scratch"])) == ["ours", "scratch"]
    with pytest.raises(InputError, match="no method is called 'otto', expected some of ours, "):
        chosen_methods(["otto"])


def test_what_is_not_installed_is_known(study):
    assert is_installed(study["ours"]) and not is_installed(study["absent"])


def test_rates_of_learning():
    assert [two_cosines(p, 0.5, 0.1) for p in (0.0, 0.25, 0.5, 0.75)] == [1.0, 0.5, 0.1, 0.05]
    assert multistep(0.29, (0.3, 0.6), 0.2) == 1.0 and multistep(0.6, (0.3, 0.6), 0.5) == 0.25
