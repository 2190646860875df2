"""Settings in a file: read for `--config`, written by `--print-config`."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from flatprune.cli.options import panel_of
from flatprune.files.yaml_file import read_yaml
from flatprune.settings import TARGETS, Settings
from flatprune.values import field_values


def read_config(path: Path, instead: Collection[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file whose keys are fields of `Settings`; what is null is as if it were not there.

    Args:
        path: of the file.
        instead: settings that are given beside; a target among them takes the place of the file's.

    Raises:
        InputError: naming the file, and the key that is no setting or cannot be used.
    """
    values = field_values(str(path), read_yaml(path)[0])
    replaced = TARGETS if any(name in TARGETS for name in instead) else ()
    return {name: value for name, value in values.items() if value is not None and name not in replaced}


def config_text(settings: Settings) -> str:
    """All settings as YAML that `read_config` reads, under the headings of the help."""
    values = settings.as_dict()
    parts = [
        f"# {panel}\n" + yaml.safe_dump({name: values[name] for name, _ in fields}, sort_keys=False, width=10**6)
        for panel, fields in groupby(Settings.model_fields.items(), lambda item: panel_of(item[1]))
    ]
    return "\n".join(parts)
