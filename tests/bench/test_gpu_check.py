"""The parts of `make gpu-check` on the CPU, at tiny shapes: each result is a row, and a fault stays in its own."""

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.commands import COMMANDS
from bench.gpu.right.parts import PARTS
from tests.ranks import run_alone

TINY = {"DEVICE": "cpu", "TINY": "1"}


def rows_of(file: Path) -> dict[str, Any]:
    return {row["name"]: row for row in map(json.loads, file.read_text().splitlines())}


def begin(folder: Path) -> Path:
    """Have this forked process write its records to a folder; returns the file. Before any part is imported."""
    os.environ.update(TINY, OUT=str(folder), GPU_RESULTS=str(folder / "check.jsonl"))
    return folder / "check.jsonl"


def test_every_part_is_a_module_and_has_its_own_name() -> None:
    assert all(find_spec(part.module) is not None for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS) > 10


def test_every_part_can_be_selected_by_one_word() -> None:
    """`make gpu-check PARTS="..."` separates the names by spaces."""
    names = [part.name for command in COMMANDS.values() for part in command.parts]
    assert names and [name for name in names if len(name.split()) != 1] == []


def _axes(folder: Path) -> tuple[set[tuple[str, int]], set[tuple[str, int]], int]:
    begin(folder)
    from bench.gpu.right.layouts import LAYOUTS
    from bench.gpu.right.matrix import SETTINGS

    settings = [one for group in SETTINGS.values() for one in group.values()]
    axes = [axis for one in LAYOUTS.values() for axis in one.engine.get("parallel", {}).items()]
    parallel = {(name, size["size"] if isinstance(size, dict) else size) for name, size in axes}
    return {(one.precision, one.zero) for one in settings}, parallel, max(one.ranks for one in LAYOUTS.values())


def test_the_matrix_has_every_stage_and_precision_and_the_layouts_every_axis(tmp_path: Path) -> None:
    settings, parallel, ranks = run_alone(_axes, tmp_path)
    assert settings >= {(precision, zero) for precision in ("fp32", "bf16", "fp16") for zero in (1, 2, 3)}
    assert (
        parallel >= {("tensor", 2), ("tensor", 4), ("context", 2), ("pipeline", 2), ("sequence", True)} and ranks == 4
    )


def _kernels(folder: Path) -> Any:
    file = begin(folder)
    from bench.gpu.right import chosen_kernels, kernels
    from megatron_ds.layers.kernels import KERNELS, Candidate

    def wrong() -> Any:
        def swiglu(wide: Tensor) -> Tensor:
            return 1.1 * KERNELS["swiglu"].reference(wide)

        return swiglu

    def missing() -> Any:
        raise ImportError("no such symbol")

    KERNELS["swiglu"].register("wrong", Candidate("numpy", wrong, devices=("cpu",)))
    KERNELS["rms_norm"].register("missing", Candidate("numpy", missing, devices=("cpu",)))
    for operation in KERNELS.values():
        operation.register("same", Candidate("numpy", partial(getattr, operation, "reference"), devices=("cpu",)))
    kernels.main()
    return rows_of(file), chosen_kernels.read_choice()


def test_a_wrong_kernel_is_a_row_and_is_not_used_by_the_other_parts(tmp_path: Path) -> None:
    rows, choice = run_alone(_kernels, tmp_path)
    assert rows["swiglu, wrong"]["ok"] is False and rows["swiglu, wrong"]["examples"] == pytest.approx(0.1, rel=0.1)
    assert rows["rms_norm, missing"]["error"] == "ImportError: no such symbol"
    same = {name: row for name, row in rows.items() if name.endswith(", same")}
    assert len(same) > 5 and all(row["ok"] and row["real_shapes"] == 0 for row in same.values())
    assert choice["swiglu"] == choice["rms_norm"] == "same" and choice["attention"] == "auto"


def _runs(folder: Path) -> Any:
    file = begin(folder)
    from bench.gpu.right import experts, layouts, matrix, reference

    reference.main()
    matrix.main("bf16", "zero2 offload")
    matrix.main("fp16", "zero1")
    matrix.BOUNDS["fp32"] = -1.0
    matrix.main("fp32", "zero1")
    layouts.main("tp2 sequence")
    experts._losses("experts", experts.SETTINGS["fp32 zero0"])
    return rows_of(file)


def test_runs_are_held_against_the_reference(tmp_path: Path) -> None:
    rows = run_alone(_runs, tmp_path)
    assert rows["bf16 zero2 offload"]["ok"] and 0 < rows["bf16 zero2 offload"]["difference"] < 1e-2
    assert rows["fp16 zero1"]["ok"] is None and "no fp16" in rows["fp16 zero1"]["skipped"]
    assert rows["fp32 zero1"]["ok"] is False and rows["fp32 zero1"]["applied"] == 4
    assert rows["tp2 sequence"]["ok"] and rows["tp2 sequence"]["staged_calls"] > 100
    assert rows["experts"]["ok"] and rows["experts"]["difference"] < 1e-5


def _products(folder: Path) -> Any:
    file = begin(folder)
    from bench.gpu.right import experts

    def misplaced(x: Tensor, groups: Any, *others: Tensor) -> Tensor:
        return right(x, experts.Groups(groups.counts.flip(0)), *others)

    right = experts.grouped_linear
    experts._products("right", torch.bfloat16, 2e-2, True)
    experts.grouped_linear = misplaced
    experts._products("wrong", torch.float32, 1e-5, False)
    return rows_of(file)


def test_products_of_the_wrong_rows_are_a_row_that_says_so(tmp_path: Path) -> None:
    rows = run_alone(_products, tmp_path)
    assert rows["right"]["ok"] and 1e-3 < rows["right"]["uneven"] < 1e-2, "bf16 was held against fp32"
    assert rows["wrong"]["ok"] is False and rows["wrong"]["uneven"] > 0.1 and rows["wrong"]["even"] == 0


def _failures(folder: Path) -> Any:
    file = begin(folder)
    from bench.gpu.right.tests import SAMPLE, _record_failures

    (folder / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.a.test_b" name="one"/>'
        '<testcase classname="tests.a.test_b" name="two"><failure message="assert 1 == 2">long</failure></testcase>'
        '<testcase classname="tests.a.test_b" name="three"><skipped message="no"/></testcase></testsuite></testsuites>'
    )
    return _record_failures(folder / "tests.xml"), rows_of(file), {name for name in SAMPLE if "[" in name}


def test_the_sample_exists_and_each_failed_test_is_a_row(tmp_path: Path) -> None:
    counts, rows, names = run_alone(_failures, tmp_path)
    assert names <= set(Path("tests/quick.txt").read_text().splitlines()) and len(names) > 5
    assert counts == {"run": 2, "failed": 1, "skipped": 1}
    assert rows["test_b::two"]["ok"] is False and rows["test_b::two"]["error"] == "assert 1 == 2"
