"""The sanitizers' runs look at what was built for them."""

import subprocess

from bench.hard import sanitize


def test_python_finds_the_module_of_the_build(tmp_path):
    package = tmp_path / "package" / "kfac_ext"
    package.mkdir(parents=True)
    for name in ("__init__.py", "_C.py"):
        (package / name).touch()
    environment = sanitize.environment_of("address", tmp_path, tmp_path)
    del environment["LD_PRELOAD"]
    (look,) = [command for command in sanitize.commands_of("address", tmp_path, []) if "-c" in command]
    assert subprocess.run(look, cwd=package.parent, env=environment).returncode == 0
    other = subprocess.run(look, cwd=sanitize.ROOT, env=environment, capture_output=True, text=True)
    assert other.returncode == 1 and str(sanitize.ROOT / "kfac_ext") in other.stderr
