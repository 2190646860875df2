"""Each setting is declared once, and what the declaration says is held."""

import pytest
import yaml

from flatprune.errors import InputError
from flatprune.settings import Settings
from flatprune.values import field_value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected 1 or more"),
        ({"batch_size": 1}, "batch_size is 1, expected 2 or more"),
        ({"threads": 2000}, "threads is 2000, expected at most 1024"),
        ({"lr": -1.0}, "lr is -1.0, expected a number above 0"),
        ({"lr": float("inf")}, "lr is inf, expected a number above 0"),
        ({"momentum": 1}, "momentum is 1, expected 0 or more and below 1"),
        ({"optimizer": "sdg"}, "optimizer is 'sdg'; did you mean sgd?"),
        ({"optimizer": None}, "optimizer is None, expected one of sgd, adam, adamw"),
        ({"epochs": True}, "epochs is True, expected a whole number"),
        ({"epochs": 2.0}, "epochs is 2.0, expected a whole number"),
        ({"lr": "0.1"}, "lr is '0.1', expected a number or nothing"),
        ({"lr": False}, "lr is False, expected a number or nothing"),
        (
            {"flatness": "off", "compare_no_flatness": True},
            "compare_no_flatness and flatness off: expected one of them",
        ),
        ({"augment": 1}, "augment is 1, expected true or false"),
        ({"data": 3}, "data is 3, expected a word"),
        ({"widths": [8, 0]}, "widths has 0, expected 1 or more"),
        ({"widths": "8,8"}, "widths is '8,8', expected a list or nothing"),
        ({"epoch": 3}, "there is no setting 'epoch'; did you mean epochs?"),
        ({"epochs": 0, "lr": -1.0}, "epochs is 0, expected 1 or more"),
    ],
)
def test_a_fault_is_one_line(values, message):
    with pytest.raises(InputError) as error:
        Settings(**values)
    assert str(error.value) == message


def test_faults_of_a_long_value_are_short():
    with pytest.raises(InputError) as error:
        Settings(lr=10**400)
    assert len(str(error.value)) < 250


def test_settings_are_values():
    settings = Settings(widths=[30, 20], lr=1, train_size=100.0)
    assert settings == Settings(widths=(30, 20), lr=1.0, train_size=100) != Settings()
    assert hash(settings) == hash(settings.changed()) and settings.changed(seed=1).seed == 1
    assert isinstance(settings.train_size, int) and isinstance(settings.lr, float)
    with pytest.raises(ValueError, match="frozen"):
        settings.lr = 0.2
    with pytest.raises(InputError, match="epochs is 0"):
        settings.changed(epochs=0)


def test_files_of_other_versions_are_read():
    values = Settings(widths=(4,), exclude=("1",)).as_dict()
    assert values["widths"] == [4]
    assert Settings.from_dict({**values, "of_another_version": 1}) == Settings(widths=(4,), exclude=("1",))


def test_one_setting_by_itself():
    assert Settings.value("accumulate", 3) == 3  # no divisor of the default batch_size, which may differ
    assert Settings.value("widths", [3]) == (3,)
    with pytest.raises(InputError, match="there is no setting 'lrs'; did you mean lr"):
        Settings.value("lrs", 1)


def test_words_of_yaml():
    values = yaml.safe_load("{augment: true, flatness: off}")
    assert field_value("f", "augment", values["augment"]) is True
    assert field_value("f", "flatness", values["flatness"]) == "off"
    assert field_value("f", "augment", "on") is True
    with pytest.raises(InputError, match="f: augment is 'yes', expected true or false"):
        field_value("f", "augment", "yes")


def test_every_setting_is_described():
    for name, field in Settings.model_fields.items():
        assert field.description and field.json_schema_extra["panel"], name
        assert field.default is not None or field.json_schema_extra["unset"] or name not in ("lr", "weight_decay")
