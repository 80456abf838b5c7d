"""Registries: named entries of one kind, to which other packages may add.

A registry is defined where its entries are used (`FORMATS` in data/, `FAMILIES` in hf/, ...). A module that is named
under `imports` in the run file, or by an entry point, registers its entries when it is imported, before the file is
checked.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar, overload

from megatron_ds.errors import ConfigError, not_one_of, show, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind by name, in the order of registration.

    Args:
        kind: the name of such an entry in error messages, such as `data format`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    @overload
    def register(self, name: str, entry: T) -> T: ...

    @overload
    def register(self, name: str) -> Callable[[T], T]: ...

    def register(self, name: str, entry: T | None = None) -> T | Callable[[T], T]:
        """Add an entry and return it; without an entry, return a decorator that adds what it decorates.

        Raises:
            ConfigError: the name is taken by another entry, or is not text.
        """
        if entry is None:
            return lambda decorated: self.register(name, decorated)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self.kind} name {show(name)} is not text; give the name that a run file uses for it")
        taken = self._entries.setdefault(name, entry)
        if taken is not entry:
            raise ConfigError(f"{self.kind} {name} is already registered, by {_origin(taken)}; rename one")
        return entry

    def get(self, name: Any, field: str | None = None) -> T:
        """Return the entry of a name.

        Args:
            name: the name, as the user wrote it.
            field: the run file's key of the name, such as `data.format`; None = the kind.

        Raises:
            ConfigError: nothing is registered under the name; names the nearest ones.
        """
        if not self._entries:
            place = f"{field or self.kind}={show(name)}"
            raise ConfigError(f"{place} is not registered, nor is any {self.kind}; name its module under imports")
        if name not in self:
            raise ConfigError(f"{field or self.kind}={show(name)} {not_one_of(name, self._entries)}")
        return self._entries[name]

    @property
    def names(self) -> tuple[str, ...]:
        """All registered names."""
        return tuple(self._entries)

    def items(self) -> ItemsView[str, T]:
        """All names and their entries."""
        return self._entries.items()

    def values(self) -> ValuesView[T]:
        """All entries."""
        return self._entries.values()

    def __getitem__(self, name: str) -> T:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries


def _origin(entry: object) -> str:
    named = entry if hasattr(entry, "__qualname__") else type(entry)
    return f"{named.__module__}.{named.__qualname__}"


def check_options(entry: Callable[..., Any], num_given: int, options: Mapping[str, Any], field: str) -> None:
    """Check the options of a registered entry against its signature.

    Args:
        entry: the entry, which is called as `entry(*given, **options)`.
        num_given: the number of positional arguments.
        options: the options that the user wrote.
        field: the run file's key of the options, such as `callbacks[0]`.

    Raises:
        ConfigError: the entry does not take an option, or one that it needs is missing.
    """
    parameters = list(signature(entry).parameters.values())
    named = [
        one for one in parameters[num_given:] if one.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]
    legal = [one.name for one in named]
    takes_any = any(one.kind is Parameter.VAR_KEYWORD for one in parameters)
    for name in options:
        if name not in legal and not takes_any:
            hint = suggest(name, legal, f"{field}.") if legal else "it takes none"
            raise ConfigError(f"{field}.{name}: unknown option; {hint}")
    for one in named:
        if one.default is Parameter.empty and one.name not in options:
            raise ConfigError(f"{field}.{one.name} is missing; add it")
