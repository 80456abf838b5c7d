"""Names of the config fields that transformers' own code of a model reads, found in its installed source.

A field that neither the configuration class, the modeling code, their base classes nor what these import reads cannot
change the mathematics. The search errs on the side of "is read": it takes each name that looks like an access to a
config, of any class in these files but those with another head.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

_BY_NAME = ("getattr", "hasattr")  # functions of an object and the name of an attribute
_OF_MAPPING = ("get", "pop", "setdefault")  # methods of a mapping that take a key
_BASE_CLASS = "modeling_utils.py"  # of all transformers' models
_OTHER_HEADS = re.compile("Classification|QuestionAnswering|MultipleChoice|RewardModel")


@cache
def fields_read(model_type: str, module: str, architecture: str) -> frozenset[str] | None:
    """Return the config fields that the code of a model may read.

    Args:
        model_type: decides the configuration class.
        module: name of the Python module that holds the model's class.
        architecture: name of that class.

    Returns:
        the names; None if the source is not installed, so that any field may be read.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    configurations = {_file_of(kind) for kind in config_class.__mro__ if kind is not object}
    models = _modeling_files(config_class, module, architecture)
    own = {file for file in configurations | models if file is not None}
    if None in configurations | models:
        return None
    own |= {file for file in _imports(own) if file.name == _BASE_CLASS}
    return frozenset(
        name
        for file in own | _imports(own)
        for name in _names_in(file, is_model=file in models, is_configuration=file in configurations)
    )


def _file_of(kind: type) -> Path | None:
    """Return the file of a class; None if it has no Python source."""
    try:
        source = inspect.getsourcefile(kind)
    except TypeError:
        return None
    return Path(source) if source is not None and Path(source).is_file() else None


def _modeling_files(config_class: type, module: str, architecture: str) -> set[Path | None]:
    """Return the files of the model's class. Those of transformers are not imported: they are next to the
    configuration, or, for another name of a family, where transformers finds the class.
    """
    place = _file_of(config_class)
    if module != "transformers" or place is None:
        bases = getattr(import_module(module), architecture).__mro__
        return {_file_of(kind) for kind in bases if kind.__module__.partition(".")[0] not in ("builtins", "torch")}
    files = place.parent.glob("modeling_*.py")
    own: set[Path | None] = {file for file in files if f"class {architecture}(" in file.read_text(encoding="utf-8")}
    return own or {_file_of_class(architecture)}


def _file_of_class(architecture: str) -> Path | None:
    """Return the file of a class of transformers, by the module that it would import for the class."""
    import transformers

    module = getattr(transformers, "_class_to_module", {}).get(architecture)
    file = Path(str(transformers.__file__)).parent.joinpath(*str(module).split(".")).with_suffix(".py")
    return file if module is not None and file.is_file() else None


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(files: Iterable[Path]) -> set[Path]:
    """Return the files of the same package, or of transformers, that these files import from."""
    return {found for file in files for found in _imports_of(file)}


@cache
def _imports_of(file: Path) -> frozenset[Path]:
    return frozenset(found for node in ast.walk(_tree(file)) for found in _imported(file, node))


def _imported(file: Path, node: ast.AST) -> Iterator[Path]:
    if not isinstance(node, ast.ImportFrom):
        return
    import transformers

    own = next(parent for parent in file.parents if not (parent.parent / "__init__.py").is_file())
    packages = {package.name: package.parent for package in (own, Path(str(transformers.__file__)).parent)}
    names = node.module.split(".") if node.module else []
    if node.level:
        base = file.parents[node.level - 1].joinpath(*names)
    elif names[0] in packages:
        base = packages[names[0]].joinpath(*names)
    else:
        return
    candidates = (base.with_suffix(".py"), base / "__init__.py", *(base / f"{one.name}.py" for one in node.names))
    yield from (found for found in candidates if found.is_file())


@cache
def _names_in(file: Path, is_model: bool, is_configuration: bool) -> frozenset[str]:
    """Return the names of the config fields that a file may read.

    Args:
        file: a file of source code.
        is_model: whether it holds the model's class, in which an object of any name may be the config.
        is_configuration: whether it holds the configuration class or a base class of it, in which `self` is the config.
    """
    search = _Search(is_model, is_configuration)
    search.visit(_tree(file))
    return frozenset(search.found)


class _Search(ast.NodeVisitor):
    """Search of a file for names of config fields, which it collects in `found`."""

    def __init__(self, is_model: bool, is_configuration: bool) -> None:
        self.found: set[str] = set()
        self._is_model, self._is_configuration = is_model, is_configuration
        self._other_names: set[str] = set()  # of variables that hold a config

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not _OTHER_HEADS.search(node.name):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any(self._reads_by_variable(one) for one in ast.walk(node)):
            self.found |= _texts(ast.walk(node))  # the names that the variable may have are among them
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._is_configuration and any(_is_plan(target) for target in node.targets):
            return
        if self._is_config(node.value):
            self._other_names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_config(node.value):
            self.found.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self._is_config(node.value):
            self.found |= _texts([node.slice])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self._of_config(node):
            self.found |= _texts(node.args)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._is_configuration:
            self.found.add(_last_name(node.target))
            if _is_plan(node.target):
                return
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        if self._is_configuration:  # such as attribute_map
            self.found |= _texts([*filter(None, node.keys), *node.values])
        self.generic_visit(node)

    def _is_config(self, node: ast.expr) -> bool:
        """Test whether an expression is a config by its last name; `self` and `kwargs` are in a configuration class."""
        name = _last_name(node)
        if name in self._other_names or (self._is_configuration and name in ("self", "cls", "kwargs")):
            return True
        return "config" in name.lower() or "cfg" in name.lower()

    def _of_config(self, node: ast.Call) -> bool:
        """Test for a call that reads a field by name: `getattr(config, name)` or `kwargs.pop(name)`."""
        called = _last_name(node.func)
        if called in _BY_NAME and len(node.args) > 1:
            return self._is_model or self._is_config(node.args[0])
        return (
            bool(node.args)
            and called in _OF_MAPPING
            and isinstance(node.func, ast.Attribute)
            and self._is_config(node.func.value)
        )

    def _reads_by_variable(self, node: ast.AST) -> bool:
        """Test for `getattr(config, variable)` or `kwargs.pop(variable)`."""
        if not isinstance(node, ast.Call) or not self._of_config(node):
            return False
        name = node.args[1 if _last_name(node.func) in _BY_NAME else 0]
        return not isinstance(name, ast.Constant)


def _is_plan(target: ast.AST) -> bool:
    """Test for a plan of parallelism, such as `base_model_tp_plan`: its keys are names of modules, not of fields."""
    return _last_name(target).startswith("base_model_") and _last_name(target).endswith("_plan")


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the texts among these nodes that can be the name of a field."""
    texts = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and text.isidentifier()}
