"""What starting costs: nothing is imported that a run does not use."""

import subprocess
import sys

CODE = """
import sys, torch
compile_ = torch.compile
from megatron_ds.engine import preload
preload({compiles})
assert torch.compile is compile_
print("torch._inductor.compile_fx" in sys.modules, "deepspeed.runtime.zero.stage3" in sys.modules)
"""


def imported(compiles: bool) -> list[str]:
    command = [sys.executable, "-c", CODE.format(compiles=compiles)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()[-2:]


def test_the_compiler_is_imported_by_runs_that_compile() -> None:
    assert imported(False) == ["False", "True"]
    assert imported(True) == ["True", "True"]
