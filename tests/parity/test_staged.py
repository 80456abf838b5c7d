"""The staged collectives: equal to gloo's own, stale before `wait`, and enough for training at every layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.parallel.launch import RankInfo
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.context_cases import RING_2X2, RING_4
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on
from tests.ranks import run_grid, run_ranks


def _collectives(info: RankInfo) -> dict[str, Any]:
    """Results of each kind on a rank; the same calls with and without staging."""
    mine = torch.arange(4.0) + 10 * info.rank
    peer = 1 - info.rank
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        total = mine.to(dtype)
        dist.all_reduce(total)
        found[f"all_reduce {dtype}"] = total
    largest = mine.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    parts = [torch.empty(4) for _ in range(2)]
    dist.all_gather(parts, mine)
    scattered = torch.empty(2)
    dist.reduce_scatter_tensor(scattered, mine)
    sent = mine.clone()
    dist.broadcast(sent, src=1)
    received = torch.empty(4)
    works = [dist.isend(mine, peer), dist.irecv(received, peer)]
    for work in works:
        work.wait()
    gathered = [torch.empty(4) for _ in range(2)] if info.rank == 0 else None
    dist.gather(mine, gathered, dst=0)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": info.rank})
    found.update(largest=largest, parts=parts, scattered=scattered, sent=sent, received=received)
    return {**found, "gathered": gathered, "objects": objects}


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _flat(one) for name, one in value.items()}
    return [_flat(one) for one in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


def test_results_are_those_of_gloo() -> None:
    assert _flat(run_ranks(_collectives, 2, staged=True)) == _flat(run_ranks(_collectives, 2))


def _asynchronous(info: RankInfo) -> dict[str, Any]:
    x, mean = torch.full((3,), float(info.rank + 1)), torch.full((3,), float(info.rank + 1))
    work = dist.all_reduce(x, async_op=True)
    before = x.tolist()
    work.wait()
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    outputs = [torch.zeros(2) for _ in range(2)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True):
        for output in outputs:
            last = dist.all_gather_into_tensor(output, torch.tensor([info.rank + 1.0]), async_op=True)
    last.wait()  # DeepSpeed waits for the last one alone
    return {
        "before": before,
        "after": x.tolist(),
        "mean": mean.tolist(),
        "coalesced": [one.tolist() for one in outputs],
    }


def test_a_result_is_stale_before_it_is_waited_for() -> None:
    for rank, found in enumerate(run_ranks(_asynchronous, 2, staged=True)):
        assert found["before"] == [rank + 1.0] * 3
        assert found["after"] == [3.0] * 3 and found["mean"] == [1.5] * 3
        assert found["coalesced"] == [[1.0, 2.0]] * 2


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("llama", Place(2, 1, 1, 1, True)),
        ("gpt2", Place(1, 2, 2, 1)),
        ("qwen2", Place(1, 1, 2, 3)),
        ("llama", RING_4),  # whose hops are under way while it computes
        *swept(("qwen2", Place(2, 1, 2, 3)), ("mistral", RING_2X2)),
    ],
    ids=str,
)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    recipe = Recipe()
    directory, reference = references(case, recipe)
    found = run_grid(train_on, place.layout, directory, place, recipe, staged=True)[0]
    errors = relative_errors(found, reference)
    assert within_fp32(errors), errors
