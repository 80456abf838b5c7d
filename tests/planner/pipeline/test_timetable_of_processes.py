"""DeepSpeed's instructions run by processes that sleep for passes and send real messages, against the timetable."""

import time

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import TrainSchedule

from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.planner.pipeline.timetable import StageTimes, simulate
from tests.ranks import run_ranks

UNEVEN = [StageTimes(0.02, 0.04), StageTimes(0.05, 0.05), StageTimes(0.02, 0.09), StageTimes(0.03, 0.03)]


def seconds_of_steps(info: RankInfo, stages: list[StageTimes], num_micro_batches: int) -> list[float]:
    """Seconds of three steps on this rank."""
    schedule = TrainSchedule(num_micro_batches, len(stages), info.rank)
    mine, message, found = stages[info.rank], torch.zeros(100), []
    for _ in range(3):
        dist.barrier()
        begin = time.perf_counter()
        for instruction in (one for step in schedule.steps() for one in step):
            match type(instruction).__name__:
                case "ForwardPass":
                    time.sleep(mine.forward_s)
                case "BackwardPass":
                    time.sleep(mine.backward_s)
                case "RecvActivation":
                    dist.recv(message, info.rank - 1)
                case "RecvGrad":
                    dist.recv(message, info.rank + 1)
                case "SendActivation":
                    dist.send(message, info.rank + 1)
                case "SendGrad":
                    dist.send(message, info.rank - 1)
        found.append(time.perf_counter() - begin)
    return found


@pytest.mark.sweep
@pytest.mark.parametrize(
    "stages", [[StageTimes(0.03, 0.06)] * 4, UNEVEN, UNEVEN[::-1]], ids=["even", "uneven", "turned"]
)
@pytest.mark.parametrize("num_micro_batches", [2, 10])
def test_processes(stages: list[StageTimes], num_micro_batches: int) -> None:
    """No step is shorter than its timetable, and the fastest is longer by 8 % at most: messages and late wake-ups."""
    steps = run_ranks(seconds_of_steps, len(stages), stages, num_micro_batches)
    planned = simulate(stages, num_micro_batches, "deepspeed").duration_s
    assert 1.0 <= min(max(of_ranks) for of_ranks in zip(*steps)) / planned < 1.08
