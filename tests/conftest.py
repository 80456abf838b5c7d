"""Set what must be set before torch is imported; the corpus that several folders train on."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.made_once import MakeOnce

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run on the CPU unless DS_ACCELERATOR=cuda asks for a GPU, which those in tests/gpu.txt can use.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU leaves this process able to fork
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our Triton kernels run in its interpreter, on CPU tensors

# gloo's socket thread polls without sleeping while another thread of its process holds a connection's lock. Where it
# may preempt that thread, it does so until its time slice ends: with more ranks than cores most of the time is lost
# there. Every process that tests start inherits this.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# The files that take longest, in this order: begun first, they do not keep one worker busy when the others are done.
LONGEST = (
    "tests/parity/test_layouts.py",
    "tests/parity/test_experts.py",
    "tests/parity/test_compiled.py",
    "tests/parity/test_families.py",
    "tests/cli/test_survival.py",
    "tests/parity/test_adapters.py",
    "tests/parity/test_encoders.py",
    "tests/bench/test_bench.py",
    "tests/cli/test_train_command.py",
    "tests/examples/test_chained.py",
    "tests/checkpoint/test_states.py",
    "tests/examples/test_examples.py",
    "tests/parity/test_ropes.py",
    "tests/parity/test_families_alone.py",
    "tests/training/test_adapter_runs.py",
    "tests/checkpoint/test_faults.py",
    "tests/parallel/test_watchdog.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the longest files to the front; `--dist loadfile` gives files to workers in this order."""
    place = {file: index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """Undo what a test, or a command in its process, changes of the package's logger: its stream is closed later."""
    logger = logging.getLogger("megatron_ds")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = list(logger.handlers)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> "MakeOnce":
    """See `made_once.make_once`."""
    from tests.made_once import folder_of_session, make_once

    return partial(make_once, folder_of_session(tmp_path_factory))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what `write_corpus` writes."""
    from tests.training.tiny import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
