"""A sample of the test suite on the device: parity with transformers, packing, checkpoints, adapters, kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.record import DEVICE, OUT, TINY, guarded, record, wait_for_turn

SAMPLE = (
    "tests/parity/test_layouts.py::test_five_steps_equal_transformers[qwen2-tied-tp1pp1dp1z1sp0-none]",
    "tests/parity/test_layouts.py::test_five_steps_equal_transformers[qwen2-tp2pp1dp1z1sp1-none]",
    "tests/parity/test_layouts.py::test_five_steps_equal_transformers[llama-tp1pp2dp1z1sp0-none]",
    "tests/parity/test_layouts.py::test_five_steps_equal_transformers[qwen3-tp2pp1dp2z2sp1-none]",
    "tests/parity/test_layouts.py::test_five_steps_equal_transformers[llama-tp1pp1dp2z3sp0-none]",
    "tests/parity/test_encoders.py::test_five_steps_equal_transformers[roberta-masked-tp2pp1dp2z2sp0-full]",
    "tests/parity/test_encoders.py::test_five_steps_equal_transformers[t5-gated-tp2pp2dp1z1sp1-none]",
    "tests/parity/test_packing.py::test_five_steps_equal_transformers",
    "tests/checkpoint/test_layouts.py::test_another_layout_goes_on_where_one_stopped[tp2-sp-alone]",
    "tests/engine/test_engine.py",
    "tests/layers/test_triton_norm.py",
    "tests/layers/test_triton_gated.py",
    "tests/layers/test_triton_rotary.py",
    "tests/layers/test_triton_blocks.py",
    "tests/layers/test_cross_entropy_kernel.py",
    "tests/layers/test_ring.py::test_equals_attention_over_full_rows",
)
TINY_SAMPLE = SAMPLE[:1]
WORKERS = "4"
LIMIT_S = 200.0


def main() -> None:
    """Run the sample; a row for each test that fails, and one for all."""
    if find_spec("pytest") is None:
        record("tests", "sample", None, skipped="pytest is not installed")
        return
    guarded("tests", "sample", _run)


def _run() -> None:
    file = OUT / "tests.xml"
    words = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None and not TINY:
        words += ["-n", WORKERS, "--dist", "load"]
    words += TINY_SAMPLE if TINY else SAMPLE
    environment = {**os.environ, "DS_ACCELERATOR": DEVICE}
    with (OUT / "tests.log").open("w") as log:
        done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=LIMIT_S)
    counts = _record_failures(file) if file.is_file() else {}
    file.unlink(missing_ok=True)
    record("tests", "sample", done.returncode == 0, **counts)


def _record_failures(file: Path) -> dict[str, int]:
    """Record each failed test of a JUnit file; returns the numbers of tests."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = skipped = 0
    for case in cases:
        skipped += case.find("skipped") is not None
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            failed += 1
            lines = (problem.get("message") or problem.text or "").strip().splitlines()
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            record("tests", name, False, error=" ".join(lines)[:300])
    return {"run": len(cases) - skipped, "failed": failed, "skipped": skipped}


if __name__ == "__main__":
    wait_for_turn()
    main()
