"""Imports point downward: a room knows only the rooms on the floors below it."""

import ast
from pathlib import Path

from helpers.paths import ROOT

PACKAGE = ROOT / "hf_sparselr"
FLOORS = (
    {"__main__"},
    {"cli"},
    {"bench"},
    {"entrypoints"},
    {"integrations"},
    {"compression"},
    {"nn", "config"},
    {"solvers"},
    {"kernels", "data"},
    {"format", "utils"},
)
NO_ROOM = {"__version__"}  # names of the package itself
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Full names of the package's modules, or of names in them, that a file imports anywhere."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("hf_sparselr.") and room(name) not in NO_ROOM}


def room(name: str) -> str:
    return name.split(".")[1]


def sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_point_downward():
    wrong = []
    for path in sources():
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imported(path):
            there = room(name)
            if there != here and FLOOR_OF[there] <= FLOOR_OF[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()}
    known = {name.removesuffix(".__init__"): name for name in modules.values()}
    graph = {}
    for path, module in modules.items():
        owners = {name if name in known else name.rpartition(".")[0] for name in imported(path)}
        graph[module] = {known[name] for name in owners if name in known} - {module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_few_modules_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= {"__init__", "__main__", "cli"}
