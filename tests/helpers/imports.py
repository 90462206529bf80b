"""Who imports whom, read from the source: at the top of a file, in a function, for a type alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("monkey_kernels", "monkey_model")

FRONT_DOOR = "monkey_model"

# Modules of monkey_model that share a room with others; each other one is a room of its own, as is
# each package in it, and monkey_kernels.
_ROOMS = {
    "configuration": ("configuration_monkey", "configuration_qwen"),
    "modeling": ("chat", "modeling_monkey", "modeling_qwen"),
    "processing": ("image_processing_monkey", "processing_monkey", "tokenization_qwen"),
    "shared": (
        "crop_settings",
        "families",
        "files",
        "gradient_checkpointing",
        "parameter_names",
        "transformers_compat",
    ),
}
_ROOM_OF = {f"monkey_model.{name}": room for room, names in _ROOMS.items() for name in names}


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target`` in this line of its file; both are dotted names."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.target}"


def modules(root: Path = ROOT, packages: Sequence[str] = PACKAGES) -> dict[str, Path]:
    """The files of the packages, by the dotted names of their modules."""
    files = [file for package in packages for file in sorted((root / package).rglob("*.py"))]
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(known: Mapping[str, Path]) -> list[Import]:
    """All imports of these modules.

    ``from package import name`` imports ``package`` where the package's own file brings the name,
    and otherwise ``package.name``, if that is one of the modules.
    """
    trees = {module: ast.parse(file.read_text("utf-8")) for module, file in known.items()}
    found = []
    for module, tree in trees.items():
        package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(tree):
            for target in _targets(node, package, trees):
                found.append(Import(module, target, getattr(node, "lineno", 0)))
    return found


def _targets(node: ast.AST, package: str, trees: Mapping[str, ast.Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")
        above = above[: len(above) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        own = _imported_names(trees[base]) if base in trees else set()
        for name in {name.name for name in node.names}:
            full = f"{base}.{name}"
            yield full if full in trees and name not in own else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = ast.unparse(node.func).rpartition(".")[2]
        if function in ("import_module", "__import__"):
            yield str(node.args[0].value)


def _imported_names(tree: ast.Module) -> set[str]:
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name.asname or name.name for node in nodes for name in node.names}


def circle(edges: Mapping[str, set[str]]) -> list[str] | None:
    """Names that lead from the first back to it, or None where all arrows run one way."""
    path: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for target in sorted(edges.get(name, ())):
            if found := visit(target):
                return found
        done.add(path.pop())
        return None

    return next((found for name in sorted(edges) if (found := visit(name))), None)


def room(module: str) -> str:
    """The room that a module of the two packages belongs to."""
    if module == FRONT_DOOR or module.startswith("monkey_kernels"):
        return module.split(".")[0]
    return _ROOM_OF.get(module, module.split(".")[1])


def arrows(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    rooms: dict[str, set[str]] = {room(module): set() for module in known}
    for one in imports(known):
        if one.target in known and room(one.module) != room(one.target):
            rooms[room(one.module)].add(room(one.target))
    return rooms
