"""A smallest run, as a mapping, as a file and built."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run

MINIMAL = """\
model: {path: hf_dir}
data: {train: [corpus.txt]}
train: {steps: 1000}
output: out/run
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a run file and gives its path."""

    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_run() -> Callable[..., RunConfig]:
    """Builds a smallest run with whole sections replaced: `make_run(parallel={"tensor": 2})`."""

    def make(**sections: Any) -> RunConfig:
        train = {"steps": 1000, **sections.pop("train", {})}
        data = {"train": ["corpus.txt"], **sections.pop("data", {})}
        return build_run({"model": {"path": "hf_dir"}, "output": "out/run", "train": train, "data": data, **sections})

    return make
