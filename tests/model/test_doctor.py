"""``monkey doctor``: what a script in this directory would import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import monkey_model
from monkey_model.commands.__main__ import app

OWN = Path(monkey_model.__file__).resolve().parent


@pytest.fixture
def doctor(tmp_path, monkeypatch):
    """Its warnings in an empty folder, after what it finds there; what a script imports there."""
    monkeypatch.chdir(tmp_path)

    def doctor(*path: Path) -> list[str]:
        monkeypatch.setenv("PYTHONPATH", ":".join(map(str, path)))
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 0, result.output
        assert f"monkey_model: {OWN}" in result.output.splitlines()
        return [line for line in result.output.splitlines() if line.startswith("Warning: ")]

    return doctor


def imported_by_a_script(folder: Path) -> Path:
    """The package, from what Python does with a real script."""
    script = folder / "script.py"
    script.write_text("import monkey_model; print(*monkey_model.__path__)")
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1])


def installed(folder: Path, kind: str) -> Path:
    """A folder for the path as an installation of this package puts one there."""
    folder.mkdir()
    if kind == "regular":
        (folder / "monkey_model").symlink_to(OWN)
    else:  # nothing on the path, but a finder after the path's, as setuptools' for -e
        (folder / "sitecustomize.py").write_text(
            "import os, sys\n"
            "from importlib.machinery import PathFinder\n"
            "sys.path[:] = [p for p in sys.path if not os.path.isdir(p + '/monkey_model')]\n"
            "class Finder:\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n"
            f"        where = [{str(OWN.parent)!r}] if path is None else path\n"
            "        return PathFinder.find_spec(name, where) if name[:6] == 'monkey' else None\n"
            "sys.meta_path.append(Finder)\n"
            "print('from sitecustomize')\n"
        )
    return folder


def test_nothing_else_here(doctor, tmp_path):
    assert doctor(installed(tmp_path / "site", "regular")) == []
    assert imported_by_a_script(tmp_path).resolve() == OWN


@pytest.mark.parametrize("kind", ["regular", "editable"])
def test_a_package_of_the_same_name(doctor, tmp_path, kind):
    other = tmp_path / "monkey_model"
    other.mkdir()
    (other / "__init__.py").touch()
    (warning,) = doctor(installed(tmp_path / "site", kind))
    assert imported_by_a_script(tmp_path) == other
    assert warning.startswith(
        f"Warning: a script in this directory imports another monkey_model: {other}. Rename that"
    )


def test_a_clone_beside_an_editable_installation(doctor, tmp_path):
    """Upstream's folder has no __init__.py: it wins over what is found after the path."""
    clone = tmp_path / "monkey_model"
    clone.mkdir()
    (clone / "visual.py").touch()
    (warning,) = doctor(installed(tmp_path / "site", "editable"))
    assert imported_by_a_script(tmp_path) == clone
    assert f"imports another monkey_model: {clone}. Rename that folder, or, if it has" in warning


def test_a_clone_beside_a_regular_installation(doctor, tmp_path):
    """A regular package wins over it, from anywhere on the path."""
    clone = tmp_path / "monkey_model"
    clone.mkdir()
    (clone / "modeling_textmonkey.py").touch()
    (warning,) = doctor(installed(tmp_path / "site", "regular"))
    assert imported_by_a_script(tmp_path).resolve() == OWN
    assert f"a script in this directory does not import {clone}, which has no" in warning


def test_a_python_that_does_not_start(doctor, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\nos.write(2, b'one\\nno licence for this\\n')\nos._exit(3)"
    )
    (warning,) = doctor(site)
    assert warning == "Warning: a script in this directory may not start: no licence for this"
