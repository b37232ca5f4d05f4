"""The house holds: imports go downward, siblings on one floor do not import each other, nothing runs in circles, core needs torch alone, nothing is
unpickled. Read from the source, so that a missing extra changes nothing."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

import qatlas

ROOT = Path(qatlas.__file__).parent
# job, one paper's run from load to report, and prepare, its first step, are landings between two floors
FLOORS = {"core": 1, "kernels": 2, "export": 2, "layers": 3, "model": 4, "train": 5, "record": 6, "trial": 6, "search": 6, "papers": 7, "report": 7,
          "keep": 7, "bench": 7.4,
          "prepare": 7.4, "job": 7.5, "compare": 8, "demo": 8, "flags": 8, "table": 8, "commands": 8.5, "serve": 8.6, "cli": 9, "__main__": 9.5}
FILES = sorted(ROOT.rglob("*.py"))
named = [str(path.relative_to(ROOT)) for path in FILES]


@dataclass(frozen=True)
class Import:
    """One import: of `module` (dotted, absolute), `name` from it or "", in line `line`; lazy: inside a function; typing: under TYPE_CHECKING."""

    module: str
    name: str
    line: int
    lazy: bool
    typing: bool


def dotted(path: Path) -> str:
    parts = ("qatlas", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache
def imports(path: Path) -> list[Import]:
    found: list[Import] = []
    here = dotted(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]

    def walk(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, "", node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend(Import(module, alias.name, node.lineno, lazy, typing) for alias in node.names)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            walk(child, inner, typing or (checking and isinstance(node, ast.If) and child in node.body))

    walk(ast.parse(path.read_text()), False, False)
    return found


def modules() -> dict[str, Path]:
    return {dotted(path): path for path in FILES}


def target(imported: Import) -> str | None:
    """The module of ours that is imported: `from .grid import Grid` -> qatlas.core.grid, `from . import grid` -> qatlas.core.grid."""
    if imported.module.split(".")[0] != "qatlas":
        return None
    inner = f"{imported.module}.{imported.name}"
    return inner if inner in modules() else imported.module


def room(module: str) -> str:
    """The folder or file directly below qatlas; "" for qatlas itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_downward(path: Path) -> None:
    mine = room(dotted(path))
    if not mine:
        return                                                     # the front page shows every floor
    assert mine in FLOORS, f"{mine} stands on no floor: give it one in tests/test_imports.py and in the design"
    for imported in imports(path):
        other = target(imported)
        if other is None or room(other) == mine:
            continue
        assert room(other), f"{path.name}:{imported.line} imports qatlas itself: the front page is above all floors"
        above, below = FLOORS[mine], FLOORS[room(other)]
        assert below < above, f"{path.name}:{imported.line} on floor {above} imports {other} on floor {below}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_is_imported_exists(path: Path) -> None:
    missing = [f"line {i.line}: {i.module}" for i in imports(path) if (name := target(i)) and name not in modules()]
    assert not missing


def test_nothing_runs_in_circles() -> None:
    """At import: neither lazily nor for types. A circle that a function hides is a circle still, so lazy ones of our own count."""
    edges = {name: sorted({t for i in imports(path) if not i.typing and (t := target(i)) in modules() and t != name})
             for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle: " + " -> ".join((*trail[trail.index(name):], name))
        if name not in done:
            for other in edges[name]:
                if not name.startswith(other + "."):               # a module may read its own folder's front page
                    visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in FILES if room(dotted(p)) == "core"], ids=[n for n in named if n.startswith("core")])
def test_core_needs_torch_alone(path: Path) -> None:
    outside = {i.module.split(".")[0] for i in imports(path)} - set(sys.stdlib_module_names) - {"qatlas", "torch", "__future__"}
    assert not outside, f"{path.name} imports {', '.join(sorted(outside))}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_is_unpickled(path: Path) -> None:
    for imported in imports(path):
        assert imported.module.split(".")[0] not in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, imported
        assert (imported.module, imported.name) not in {("torch", "load"), ("numpy", "load")}, f"line {imported.line}: call it by its full name"
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
            continue
        called, words = (node.func.value.id, node.func.attr), {w.arg: w.value for w in node.keywords}
        if called == ("torch", "load"):
            only = words.get("weights_only")
            assert isinstance(only, ast.Constant) and only.value is True, f"line {node.lineno}: torch.load without weights_only=True"
        if called in {("numpy", "load"), ("np", "load")}:
            pickled = words.get("allow_pickle")
            never = pickled is None or (isinstance(pickled, ast.Constant) and pickled.value is False)
            assert never, f"line {node.lineno}: numpy.load with allow_pickle"
        assert called[0] not in {"eval", "exec"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_is_read_at_one_sitting(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines: it holds two things"
    star = [i.line for i in imports(path) if i.name == "*"]
    assert not star, f"star imports in lines {star}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 80, f"{node.name} in line {node.lineno} is {node.end_lineno - node.lineno + 1} lines long"
    for i, line in enumerate(lines, 1):
        assert "/work/" not in line and "/tmp/" not in line, f"line {i} names a path of one machine"
