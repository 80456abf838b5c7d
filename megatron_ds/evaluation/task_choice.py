"""The tasks of lm-eval to evaluate: their names, checked before ranks start."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ds.errors import ConfigError, suggest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Tasks:
    """Tasks to evaluate.

    Attributes:
        names: of tasks, groups or tags, as lm-eval has them; `*` stands for any characters.
        folder: directory with the YAML files of further tasks; None = lm-eval's own alone.
        num_fewshot: examples before each question; None = as each task says.
        limit: number of questions of each task, a share of them below 1; None = all.
        chat: questions are written by the tokenizer's chat template.
        log_samples: the result has every question, with what the model answered.
    """

    names: Sequence[str]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    chat: bool = False
    log_samples: bool = False

    def manager(self) -> TaskManager:
        """Find the tasks.

        Raises:
            ConfigError: lm-eval is not installed, the folder does not exist, or a task has no such name.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("--tasks needs the package lm-eval; try pip install 'megatron-ds[eval]'")
        from lm_eval.tasks import TaskManager

        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"--tasks-dir={self.folder} is not a directory; name one with YAML files of tasks")
        path = str(self.folder) if self.folder is not None else None
        if path is not None:
            own = TaskManager(include_path=path, include_defaults=False)
            if all(own.match_tasks([name]) for name in self.names):
                return own  # lm-eval's thousands of files need not be read
        manager = TaskManager(include_path=path)
        for name in self.names:
            if not manager.match_tasks([name]):
                raise ConfigError(f"--tasks: lm-eval has no task {name}; {_nearest(name, manager.all_tasks)}")
        return manager


def _nearest(name: str, names: Sequence[str]) -> str:
    found = suggest(name, names)
    return found if found.startswith("did you mean") else "lm-eval ls tasks lists them; --tasks-dir adds others"
