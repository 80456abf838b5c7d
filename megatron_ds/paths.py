"""Paths as users write them: `~`, `~user`, `$NAME` and `${NAME}` are replaced, as in a shell."""

import os
import re
from pathlib import Path

from megatron_ds.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")

_SUBSTITUTION = re.compile(r"\$\{\{[^}]*\}\}|\$\{\w+[^\w}][^}]*\}|\$\([^)]*\)")


def expand_path(path: str) -> str:
    """Return a path with its home directory and its environment variables replaced.

    Raises:
        ConfigError: a variable is not set, or there is no such user; the message does not name the field.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ConfigError(f"uses the environment variable {name}, which is not set; set it, or write the path out")
        return os.environ[name]

    unread = _SUBSTITUTION.search(path)
    if unread:
        raise ConfigError(
            f"has {unread[0]}, which only a shell replaces; $NAME and ${{NAME}} are replaced here, "
            "or write the path out"
        )
    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        who = "HOME is not set" if user == "~" else f"there is no user {user[1:]}"
        raise ConfigError(f"begins with {user}, and {who}; write the path out, or ./{user} if that is its name")
    return expanded


def expanded_text(path: str, named: str = "") -> str:
    """Return a path, expanded.

    Args:
        path: the path.
        named: the beginning of errors; by default the path, as for those of the command line or a program.

    Raises:
        ConfigError: see `expand_path`.
    """
    try:
        return expand_path(path)
    except ConfigError as problem:
        raise ConfigError(f"{named or path} {problem}") from None


def expanded(path: str | Path) -> Path:
    """Return `expanded_text` as a `Path`."""
    return Path(expanded_text(str(path)))
