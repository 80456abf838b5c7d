"""Every layout over several machines trains like one process: losses equal to 1e-6 of their value.

The ranks are forks of this process with the variables that a launcher sets; see `test_launchers.py` for real launchers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.commands import difference, losses
from tests.cluster.conftest import Alone, Cluster
from tests.training.tiny import MODEL

BOUND = 1e-6  # of a loss in fp32 (a unit in the last place is 1e-7), after six steps with another order of additions
EXPERTS = {**MODEL, "model_type": "minimax_m2", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS["intermediate_size"] = 16
MIXTURE: dict[str, Any] = {"model": {"config": EXPERTS}}
THREE_LAYERS: dict[str, Any] = {"model": {"config": {**MODEL, "num_hidden_layers": 3}}}


@dataclass(frozen=True)
class Case:
    """A layout, and the model that one process trains for comparison."""

    name: str
    changes: dict[str, Any]
    machines: int = 2
    per_machine: int = 1
    model: dict[str, Any] | None = None


def _zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage}}}


CASES = [
    Case("dp2-zero1", {}),
    Case("dp2-zero2", _zero(2)),
    Case("dp2-zero3", _zero(3)),
    Case("tp2-sp", {"parallel": {"tensor": 2, "sequence": True}}),
    Case("pp2", {"parallel": {"pipeline": 2}}),
    Case("cp2", {"parallel": {"context": 2}}),
    Case("ep2", {"parallel": {"expert": 2}}, model=MIXTURE),
    Case("tp2-sp-dp2", {"parallel": {"tensor": 2, "sequence": True}}, per_machine=2),
    Case("tp2-pp2", {"parallel": {"tensor": 2, "pipeline": 2}}, per_machine=2),
    Case("pp3", {"parallel": {"pipeline": 3}}, machines=3, model=THREE_LAYERS),
    Case("tp2-sp-pp2-dp2", {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}}, per_machine=4),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout(case: Case, cluster: Cluster, alone: Alone, seen: Callable[[object], None]) -> None:
    model = case.model or {}
    expected = alone(model)
    job = cluster.start_ranks(
        cluster.write_run(model, case.changes), num_machines=case.machines, per_machine=case.per_machine
    )
    statuses = job.wait(120)
    assert set(statuses) == {0}, job.text
    found = difference(losses(cluster.folder / "run"), expected)
    seen(f"{case.machines} machines, {len(statuses)} ranks, {len(expected)} losses, {found:.0e} from one process's")
    assert found <= BOUND
