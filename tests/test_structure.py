"""The shape of the code itself: who imports whom, how long things are, and what is never written.

Everything is read by syntax tree, so that an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The picture in DESIGN.md: each area and the areas it may import; what those may import is allowed as well.
PICTURE: dict[str, set[str]] = {
    "functional": set(),
    "layers": {"functional", "backbones"},
    "files": {"layers"},
    "settings": set(),
    "optimizer": {"settings"},
    "seeding": set(),
    "stopping": set(),
    "sharding": set(),
    "non_finite": {"seeding", "sharding"},
    "module": {"files", "settings", "optimizer", "seeding", "non_finite", "sharding"},
    "backbones": set(),
    "tasks": {"backbones", "layers"},
    "data": {"tasks"},
    "task_module": {"module", "tasks"},
    "pretrain_module": {"module"},
    "scoring": {"task_module"},
    "sourced_module": {"task_module"},
    "methods": {"sourced_module", "pretrain_module", "scoring"},
    "loading": {"methods"},
    "exchange": {"loading", "analysis"},
    "analysis": {"methods"},
    "callbacks": {"methods", "analysis", "stopping"},
    "study": {"methods", "data"},
    "cli": {"study", "analysis", "callbacks", "data", "exchange", "stopping"},
}
# Packages that only some areas may import.
KEPT_TO: dict[str, set[str]] = {"jsonargparse": {"cli"}, "lightning.pytorch.cli": {"cli"}}
KEPT_FROM: dict[str, set[str]] = {
    "functional": {"lightning", "transformers", "datasets"},
    "layers": {"lightning"},
}
FREE = {"atomic", "checks", "errors", "reading", "trust", "__init__", "__main__"}


def _name(path: Path) -> str:
    """Return a file's module name, relative to the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _area(module: str) -> str:
    """Return the area of a dotted module name inside the package ("__init__" for the package itself)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports anywhere, as an absolute dotted name."""
    package = _name(path).split(".") if path.name == "__init__.py" else _name(path).split(".")[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "peft_lightning":
                yield from (f"{origin}.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield origin


def _reachable(area: str) -> set[str]:
    found, front = {area}, {area}
    while front:
        front = {target for source in front for target in PICTURE[source]} - found
        found |= front
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _exports(path: Path) -> list[str] | None:
    """Return the names in a module's ``__all__``, or None where it has none."""
    for node in _tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def _public(path: Path) -> dict[str, ast.stmt]:
    """Return what a module defines for others: the names in ``__all__``, else those without underscore."""
    names: dict[str, ast.stmt] = {}
    exports = _exports(path)
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return {name: node for name, node in names.items() if (name in exports if exports else name[0] != "_")}


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with its dotted name as written."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    area = _area(_name(path))
    if area in FREE:
        return
    assert area in PICTURE, f"{area} has no place in the picture of imports"
    allowed = _reachable(area) | {"atomic", "checks", "errors", "reading", "trust"}
    wrong = [name for name in _imports(path) if _within(name, "peft_lightning") and _area(name) not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} may import {sorted(allowed)}, not {wrong}"


def test_the_picture_has_no_cycle_and_keeps_data_and_module_apart() -> None:
    for area, targets in PICTURE.items():
        assert not any(area in _reachable(target) for target in targets), f"a cycle through {area}"
    assert "module" not in _reachable("data")
    assert "data" not in _reachable("module")


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_outside_packages_stay_where_they_belong(path: Path) -> None:
    area, imported = _area(_name(path)), list(_imports(path))
    for package, homes in KEPT_TO.items():
        assert area in homes or not any(_within(name, package) for name in imported), f"{package} in {area}"
    for package in KEPT_FROM.get(area, set()):
        assert not any(_within(name, package) for name in imported), f"{package} in {area}"
    assert not any(_within(name, package) for name in imported for package in ("pickle", "joblib", "dill"))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=_name)
def test_functions_files_and_modules_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, "a file is longer than 300 lines"
    for function in _functions(path):
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
        assert lines <= 50, f"{_where(path, function)} {function.name} has a body of {lines} lines"
    assert len(_public(path)) <= 5, f"{sorted(_public(path))}: more than 5 public names"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=_name)
def test_public_objects_are_documented(path: Path) -> None:
    assert path.read_text(encoding="utf-8").strip() == "" or ast.get_docstring(_tree(path)), "no module docstring"
    for name, node in _public(path).items():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), f"{_where(path, node)} {name} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_exports_resolve(path: Path) -> None:
    if path.name == "__main__.py":
        return
    module = importlib.import_module(_name(path))
    names = getattr(module, "__all__", [])
    assert not [name for name in names if not hasattr(module, name)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=_name)
def test_nothing_private_is_imported(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.ImportFrom) or not _within(node.module or "", "peft_lightning"):
            continue
        source = ROOT.joinpath(*str(node.module).split(".")).with_suffix(".py")
        exports = _exports(source) if source.is_file() else None
        for alias in node.names:
            if alias.name == "__version__":
                continue
            assert alias.name[0] != "_", f"{_where(path, node)} imports {alias.name}"
            assert exports is None or alias.name in exports, f"{alias.name} is not in __all__ of {node.module}"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS, *TESTS], ids=_name)
def test_what_is_never_called(path: Path) -> None:
    for name, call in _calls(path):
        assert name != "print", f"{_where(path, call)} prints"
        assert not name.endswith("allclose"), f"{_where(path, call)}: use torch.testing.assert_close"
        if name == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only")
            assert safe == "True", f"{_where(path, call)}: torch.load without weights_only=True"


def test_no_method_inherits_from_a_method() -> None:
    files = sorted((PACKAGE / "methods").glob("*.py"))
    classes = {node.name: node for path in files for node in ast.walk(_tree(path)) if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        parents = {ast.unparse(base).split(".")[-1] for base in node.bases}
        assert not parents & (classes.keys() - {name}), f"{name} inherits from {sorted(parents)}"


def test_every_source_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.json")), ids=lambda path: path.name)
def test_results_name_no_place_of_a_machine(path: Path) -> None:
    assert not re.findall(r'"/[^"]*"', path.read_text(encoding="utf-8"))
