"""DeepSpeed's process groups of one engine, which it keeps in its module `groups` and looks up in every step.

A process may have several engines, such as a model that is trained and one that it is compared with. DeepSpeed 0.19.8
finds the groups of the engine that was built last. So each engine puts its own back before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.utils import groups

_NAMES = (
    "mpu",
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)


def read_group_tables() -> Mapping[str, Any]:
    """Return the tables of the engine that was built last, to be put back later."""
    return {name: getattr(groups, name) for name in _NAMES}


def set_group_tables(tables: Mapping[str, Any]) -> None:
    """Set DeepSpeed's tables to those of an engine."""
    for name, value in tables.items():
        setattr(groups, name, value)


def set_expert_groups(name: str, expert: tuple[Any, list[int]], shard: tuple[Any, list[int]]) -> None:
    """Set new tables with the groups of experts' parameters; those of earlier engines stay as they are.

    Args:
        name: of the groups.
        expert: process group and ranks of those that divide the experts.
        shard: the same of those that have the same experts.
    """
    tables = {
        "_EXPERT_PARALLEL_GROUP": expert[0],
        "_EXPERT_PARALLEL_GROUP_RANKS": expert[1],
        "_EXPERT_DATA_PARALLEL_GROUP": shard[0],
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS": shard[1],
    }
    set_group_tables({table: {name: value} for table, value in tables.items()})
