"""``from monkey_model import NAME``: lazy, complete, and the same in any order."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import monkey_model


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", monkey_model.__all__)
def test_names(name):
    home = import_module(f"monkey_model.{monkey_model._HOME[name]}")
    assert getattr(monkey_model, name) is vars(home)[name]
    assert name in dir(monkey_model)


def test_no_other_name():
    with pytest.raises(AttributeError, match="module 'monkey_model' has no attribute 'thaw'"):
        _ = monkey_model.thaw
    with pytest.raises(ImportError, match="cannot import name 'thaw' from 'monkey_model'"):
        from monkey_model import thaw  # noqa: F401
    from monkey_model import visual  # a submodule

    assert visual.__name__ == "monkey_model.visual"
    assert {"checkpoint", "VisionTransformer", "__file__"} <= set(dir(monkey_model))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(monkey_model.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
    )
    seen = {
        alias.name: node.module.removeprefix("monkey_model.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # what makes it public in a typed package
    }
    assert seen == monkey_model._HOME
    assert (files("monkey_model") / "py.typed").is_file()


def test_the_package_alone_is_quick():
    run(
        "import sys, monkey_model\n"
        "dir(monkey_model)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'PIL', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not [name for name in sys.modules if name.startswith('monkey_model.')]\n"
    )


def test_freeze_is_the_function_in_any_order():
    """It has the name of its module, which an import puts on the package."""
    run(
        "import importlib, sys, types\n"
        "for first in ("
        " 'from monkey_model import freeze',"
        " 'import monkey_model.freeze',"
        " 'from monkey_model.freeze import FLAGS',"
        " 'import importlib; importlib.import_module(\"monkey_model.freeze\")',"
        "):\n"
        "    for name in [name for name in sys.modules if name.startswith('monkey_model')]:\n"
        "        del sys.modules[name]\n"
        "    exec(first, {})\n"
        "    import monkey_model\n"
        "    from monkey_model import freeze\n"
        "    assert isinstance(freeze, types.FunctionType), first\n"
        "    import monkey_model.freeze\n"
        "    assert monkey_model.freeze is freeze\n"
        "    module = importlib.import_module('monkey_model.freeze')\n"
        "    assert isinstance(module, types.ModuleType) and module.freeze is freeze\n"
        "    from monkey_model.freeze import FLAGS, freeze as again\n"
        "    assert again is freeze and FLAGS is module.FLAGS\n"
    )


def test_a_name_can_be_replaced_in_a_test(monkeypatch):
    monkeypatch.setattr(monkey_model, "freeze", len)
    from monkey_model import freeze

    assert freeze is len
