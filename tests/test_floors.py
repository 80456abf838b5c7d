"""Imports go down only, lazy ones too; DeepSpeed is imported in engine/ alone; only cli/ prints; no mutable globals."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megatron_ds"
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
FLOORS = [
    set(line.split()) for line in CONTRIBUTING.read_text().partition("```floors\n")[2].partition("```")[0].splitlines()
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVEL)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield node.lineno, node.module or ""


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def broken_floors(floor: str, tree: ast.AST) -> list[str]:
    """Imports of a file on `floor` that go up, or sideways to another folder of the same floor."""
    found = []
    for line, module in imports(tree):
        parts = module.split(".")
        if parts[0] == "deepspeed" and floor not in ("engine", "checkpoint"):
            found.append(f"line {line}: deepspeed")
        if parts[0] == "megatron_ds" and len(parts) > 1:
            target = parts[1]
            if target != floor and LEVEL[target] >= LEVEL[floor] and not {target, floor} <= FLOORS[0]:
                found.append(f"line {line}: {module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    assert broken_floors(floor_of(path), ast.parse(path.read_text())) == []


def test_every_folder_is_on_a_floor() -> None:
    assert len(FILES) > 50
    assert {floor_of(path) for path in FILES} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("floor", "code"),
    [
        ("layers", "import megatron_ds.models.gpt"),
        ("hf", "def f():\n    from megatron_ds.engine import base"),
        ("parallel", "from megatron_ds.data import collate"),
        ("training", "import deepspeed"),
    ],
)
def test_a_broken_floor_is_seen(floor: str, code: str) -> None:
    assert broken_floors(floor, ast.parse(code))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_global_statements_and_no_prints_below_the_command_line(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    if floor_of(path) != "cli":
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert not [call.lineno for call in calls if call.func.id == "print"]  # type: ignore[attr-defined]
