"""Names of torch that its oldest supported release lacks, and the names that a file uses.

`newer_torch_names.txt` holds the names, and the parameters of older names, that torch 2.13 has and torch 2.11 has not.
To renew it, run this file by the Python of an environment with each release:

    OLD/bin/python tests/torch_names.py > old.txt
    NEW/bin/python tests/torch_names.py old.txt > tests/newer_torch_names.txt
"""

import ast
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

NEWER = Path(__file__).with_name("newer_torch_names.txt")
# Packages whose modules need other libraries, are for tests, or are not for use from outside.
LEFT_OUT = ("ao", "contrib", "distributed.benchmarks", "distributed.elastic", "export", "fx", "jit", "onnx", "package")
LEFT_OUT += ("quantization", "testing", "utils.benchmark", "utils.tensorboard")


def public_names(module: ModuleType) -> Iterator[str]:
    """Dotted names of a module and its submodules, and `name(parameter)` for what can be called."""
    name = module.__name__
    for attribute, value in sorted(vars(module).items()):
        owner = str(getattr(value, "__module__", "torch"))
        if not attribute.startswith("__") and not inspect.ismodule(value) and owner.partition(".")[0] == "torch":
            yield f"{name}.{attribute}"
            yield from (f"{name}.{attribute}({parameter})" for parameter in _parameters(value))
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        dotted = f"{name}.{found.name}"
        if not found.name.startswith("_") and dotted.removeprefix("torch.") not in LEFT_OUT:
            try:
                yield from public_names(importlib.import_module(dotted))
            except (ImportError, OSError, RuntimeError) as problem:
                print(f"{dotted}: {problem}", file=sys.stderr)


def _parameters(value: Any) -> list[str]:
    """Names by which arguments are passed; none where Python cannot see them, as for functions written in C++."""
    if not callable(value) or getattr(value, "__name__", "_").startswith("_"):
        return []
    try:
        kinds = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in kinds if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each use of torch in a file, and `name(parameter)` for each argument passed by name."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := _dotted(node, known)):
            yield node.lineno, dotted
        if isinstance(node, ast.Call) and (dotted := _dotted(node.func, known)):
            yield from ((node.lineno, f"{dotted}({one.arg})") for one in node.keywords)


def _dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    """Return the dotted name of torch that an expression is, or None."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, known)
        return f"{owner}.{node.attr}" if owner else None
    dotted = known.get(node.id, "") if isinstance(node, ast.Name) else ""
    return dotted if dotted.partition(".")[0] == "torch" else None


def main(older: Path | None) -> None:
    """Print the names of the installed torch, or those that the printed list of an older release lacks."""
    warnings.simplefilter("ignore")
    names = set(public_names(importlib.import_module("torch")))
    if older is not None:
        names -= set(older.read_text().split())
        names = {name for name in names if "(" not in name or name.partition("(")[0] not in names}
    print("\n".join(sorted(names)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
