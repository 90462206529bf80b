"""The import rule of docs/architecture.md: arrows run down, none in a circle.

An import counts wherever it stands: in a function, and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.imports import FRONT_DOOR, ROOT, Import, arrows, circle, imports, modules, room

#: What a room may import. monkey_model itself, the front door, names what is in the others.
MAY_IMPORT = {
    "commands": {
        "checkpoint", "configuration", "evaluation", "inputs", "modeling", "monkey_kernels",
        "processing", "serving", "shared", "training",
    },
    "evaluation": {"checkpoint", "inputs", "monkey_kernels", "serving", "shared", "visual"},
    "serving": {
        "checkpoint", "configuration", "inputs", "modeling", "monkey_kernels", "processing",
        "shared", "training", "visual",
    },
    "training": {
        "checkpoint", "freeze", "inputs", "monkey_kernels", "processing", "shared", "visual",
    },
    "checkpoint": {
        "configuration", "modeling", "monkey_kernels", "processing", "shared", "visual",
    },
    "patching": {"encoder", "inputs", "shared", "visual"},
    "freeze": {"shared"},
    "modeling": {
        "configuration", "encoder", "inputs", "monkey_kernels", "processing", "shared", "visual",
    },
    "processing": {"configuration", "inputs", "monkey_kernels", "shared"},
    "configuration": {"monkey_kernels", "shared"},
    "visual": {"encoder", "inputs", "monkey_kernels", "shared"},
    "encoder": {"monkey_kernels", "shared"},
    "inputs": {"monkey_kernels", "shared"},
    "shared": {"monkey_kernels"},
    "monkey_kernels": set(),
}  # fmt: skip

#: What monkey_model may use of monkey_kernels.
PUBLIC_KERNELS = ("monkey_kernels", "monkey_kernels.backend", "monkey_kernels.checks")

KNOWN = modules()
IMPORTS = imports(KNOWN)


def is_tool(module: str) -> bool:
    """Whether it is for developers: ahead-of-time compilation, benchmarks, tests, docs."""
    parts = module.split(".")
    outside = parts[0] in ("benchmarks", "tests", "docs", "examples")
    return outside or parts[-1] in ("aot", "aot_analysis", "aot_cases")


def listed(offending: list[Import]) -> str:
    return "\n".join(map(str, offending))


def test_no_circle():
    edges = {module: {i.target for i in IMPORTS if i.module == module} for module in KNOWN}
    found = circle(edges)
    assert found is None, f"imports in a circle: {' -> '.join(found or [])}"


def test_a_room_imports_what_the_table_allows():
    inside = [i for i in IMPORTS if i.target in KNOWN and room(i.module) != FRONT_DOOR]
    wrong = [
        i
        for i in inside
        if room(i.target) not in {room(i.module), *MAY_IMPORT.get(room(i.module), ())}
    ]
    assert not wrong, listed(wrong)
    assert circle(MAY_IMPORT) is None
    assert {room(module) for module in KNOWN} == {FRONT_DOOR, *MAY_IMPORT}


def test_kernels_know_torch_and_triton_alone():
    allowed = {"monkey_kernels", "torch", "triton", "_typeshed", *sys.stdlib_module_names}
    wrong = [
        i
        for i in IMPORTS
        if room(i.module) == "monkey_kernels" and i.target.split(".")[0] not in allowed
    ]
    assert not wrong, listed(wrong)


def test_the_model_calls_kernels_by_their_public_names():
    wrong = [
        i
        for i in IMPORTS
        if room(i.module) != "monkey_kernels"
        and i.target.startswith("monkey_kernels")
        and i.target not in PUBLIC_KERNELS
    ]
    assert not wrong, listed(wrong)


def test_what_runs_imports_no_developer_tool():
    wrong = [i for i in IMPORTS if is_tool(i.target) and not is_tool(i.module)]
    assert not wrong, listed(wrong)


def test_what_runs_with_torch_alone_imports_no_transformers():
    """The encoder, and what patches it into a model of upstream's own code."""
    alone = {"monkey_model.visual", "monkey_model.patching"}
    while grown := {i.target for i in IMPORTS if i.module in alone and i.target in KNOWN} - alone:
        alone |= grown
    others = ("transformers", "peft", "typer", "rich", "tokenizers")
    wrong = [i for i in IMPORTS if i.module in alone and i.target.split(".")[0] in others]
    assert not wrong, listed(wrong)


def test_the_picture_is_of_today():
    with Image.open(ROOT / "docs" / "architecture.png") as picture:
        drawn = json.loads(picture.info["Description"])
    expected = {name: sorted(targets) for name, targets in arrows(KNOWN).items()}
    assert drawn == expected, "run python -m docs.architecture"


# ---- the reader ---------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with every way to import, and a circle that only a type closes."""
    files = {
        "house/__init__.py": "from house.op import op\n",
        "house/op.py": "def op(): ...\n",
        "house/a.py": "def f():\n    from house import b\n",
        "house/b.py": "if TYPE_CHECKING:\n    from house.deep.c import C\n",
        "house/deep/__init__.py": "",
        "house/deep/c.py": "from .. import a\nimport os.path\nfrom .d import D\n",
        "house/deep/d.py": "from house import op\nimport importlib\n"
        "importlib.import_module('house.op')\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_way_to_import_is_read(package: Path):
    found = {str(i) for i in imports(modules(package, ["house"]))}
    assert found == {
        "house (line 1) imports house.op",
        "house.a (line 2) imports house.b",
        "house.b (line 2) imports house.deep.c",
        "house.deep.c (line 1) imports house.a",
        "house.deep.c (line 2) imports os.path",
        "house.deep.c (line 3) imports house.deep.d",
        "house.deep.d (line 1) imports house",  # the function, which the package brings
        "house.deep.d (line 2) imports importlib",
        "house.deep.d (line 3) imports house.op",
    }


def test_a_circle_is_found(package: Path):
    known = modules(package, ["house"])
    edges = {module: {i.target for i in imports(known) if i.module == module} for module in known}
    assert circle(edges) == ["house.a", "house.b", "house.deep.c", "house.a"]
    edges["house.b"].clear()
    assert circle(edges) is None
