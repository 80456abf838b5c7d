"""Compile Triton kernels for GPUs that are not here, and report the registers that each takes and spills.

It runs in a process of its own, because this one has triton as an interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """A kernel to compile.

    Attributes:
        kernel: "module:function", the module within `megatron_ds.layers.kernels.triton`.
        signature: parameter -> type by Triton's names, such as "*bf16" or "i32", or None for one that is None.
        constants: parameter -> value of each `tl.constexpr`.
        num_warps: as at launch.
        unaligned: names of pointers and sizes that are not known to be multiples of 16.
    """

    kernel: str
    signature: Mapping[str, str | None]
    constants: Mapping[str, Any]
    num_warps: int = 4
    unaligned: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Usage:
    """Registers per thread, and bytes spilled to memory per thread."""

    registers: int
    spilled_bytes: int


def compile_for(
    capabilities: Sequence[int], kernels: Sequence[Compiled], timeout_s: float = 120.0
) -> list[list[Usage]]:
    """Return the usage of each kernel for each compute capability, such as 90."""
    request = json.dumps([list(capabilities), [asdict(one) for one in kernels]])
    environ = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
    environ.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name if __spec__ else __name__],
        input=request,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120.0,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [[Usage(*usage) for usage in one] for one in json.loads(run.stdout.splitlines()[-1])]


def _compile(capability: int, one: Compiled) -> tuple[int, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = one.kernel.split(":")
    kernel = getattr(importlib.import_module(f"megatron_ds.layers.kernels.triton.{module}"), function)
    constants = {**one.constants, **{name: None for name, kind in one.signature.items() if kind is None}}
    signature = {name: "constexpr" if name in constants else one.signature[name] for name in kernel.arg_names}
    aligned = [
        (index,)
        for index, (name, kind) in enumerate(signature.items())
        if kind and (kind[0] == "*" or kind[0] == "i") and name not in one.unaligned
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": one.num_warps})
    text = log.getvalue()
    registers, stores, loads = (
        re.search(pattern, text)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    assert registers and stores and loads, text
    return int(registers[1]), int(stores[1]) + int(loads[1])


def main() -> None:
    capabilities, kernels = json.load(sys.stdin)
    cases = [Compiled(**one) for one in kernels]
    print(json.dumps([[_compile(capability, one) for capability in capabilities] for one in cases]))


if __name__ == "__main__":
    main()
