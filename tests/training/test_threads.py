"""The start of local ranks: torch reads the number of threads when it is imported, so the launcher must come first."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["megatron_ds.training.launch", "megatron_ds.cli.train"])
def test_torch_is_imported_after_the_cores_are_divided(module: str) -> None:
    code = (
        f"import sys, {module}; from megatron_ds.training.launch import share_cores\n"
        "early = 'torch' in sys.modules\n"
        "share_cores(2)\n"
        "import os, torch; print(early, torch.get_num_threads() <= max(1, len(os.sched_getaffinity(0)) // 2))"
    )
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=unset)
    assert done.stdout.split() == ["False", "True"]
