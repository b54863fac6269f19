"""A module imports only from its own folder or from folders above it in this list, which is also the reading order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "autoseg"
LAYERS = (
    "core",
    "data",
    "planning",
    "preprocessing",
    "networks",
    "training",
    "inference",
    "evaluation",
    "reporting",
    "cluster",
    "pipeline",
    "cli",
)
# The package itself holds the version, and names that are loaded lazily; `__main__` starts the command line.
FREE = {"__init__", "__main__"}
FORBIDDEN = {"inference": {"autoseg.training.trainer"}}
HEAVY = {"torch", "monai", "SimpleITK", "matplotlib", "scipy", "nibabel", "PIL", "tifffile"}


def layer_of(file: Path) -> str:
    relative = file.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(tree: ast.AST) -> set[str]:
    """Every autoseg module that a file imports, inside functions too, `from autoseg import x` as `autoseg.x`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "autoseg" else {node.module}
            )
    return {name for name in found if name.split(".")[0] == "autoseg" and name != "autoseg.__version__"}


FILES = sorted(file for file in ROOT.rglob("*.py") if layer_of(file) not in FREE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_upwards(file: Path) -> None:
    layer = layer_of(file)
    assert layer in LAYERS, f"{file.name} is in a folder that the list of layers does not have"
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    imported = imported_modules(ast.parse(file.read_text()))
    wrong = {name for name in imported if name.split(".")[1] not in allowed}
    assert not wrong, f"{layer} imports from layers below it"
    assert not imported & FORBIDDEN.get(layer, set())


def top_level_imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", ["core", "data", "planning", "pipeline", "cli"])
def test_heavy_packages_are_imported_where_they_are_used(layer: str) -> None:
    """So that the command line starts quickly and a dataset is checked without torch."""
    for file in FILES:
        if layer_of(file) == layer:
            assert not top_level_imports(ast.parse(file.read_text())) & HEAVY, file


def test_print_is_only_for_scripts() -> None:
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], f"{file} prints"
