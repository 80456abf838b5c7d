"""What starting costs: nothing is imported that a run does not use."""

import subprocess
import sys

CODE = """
import sys, torch
compile_ = torch.compile
from megatron_ds.engine import preload
for compiles in (False, True):
    preload(compiles)
    assert torch.compile is compile_
    print("torch._inductor.compile_fx" in sys.modules, "deepspeed.runtime.zero.stage3" in sys.modules)
"""


def test_the_compiler_is_imported_by_runs_that_compile() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split()[-4:] == ["False", "True", "True", "True"]
