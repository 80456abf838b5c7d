"""A micro-batch that is computed twice in every `train.check_repeats`-th step, on every rank."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from megatron_ds.config import RunConfig
from megatron_ds.engine import Engine, MicroBatch, RepeatedPass
from megatron_ds.errors import HardwareError
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.training.replica_check import describe_ranks

MOST_NAMED = 3  # gradients in a message


class RepeatCheck:
    """The check of a run; without `train.check_repeats` it does nothing.

    Args:
        run: the run file.
        engine: the live engine.
        give_up: see `ReplicaCheck`.
    """

    def __init__(self, run: RunConfig, engine: Engine, give_up: Callable[[], str]) -> None:
        self._every, self._engine, self._give_up = run.train.check_repeats, engine, give_up
        self._repeated: RepeatedPass | None = None
        if self._every:
            exact = engine.device.type == "cpu" or run.train.deterministic
            self._repeated = RepeatedPass(engine, is_exact=exact)

    def before_step(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Compute the first micro-batch of a step twice, if the step is checked. Collective over the world.

        Raises:
            HardwareError: on rank 0, results differ on a rank.
        """
        if self._repeated is None or step % self._every:
            return
        found = self._repeated.differing(batches[0])
        everyone = gather_objects((socket.gethostname(), found[:MOST_NAMED], len(found)), self._engine.grid.host.group)
        ranks = [rank for rank, (_, _, count) in enumerate(everyone) if count]
        if not ranks:
            return
        _, names, count = everyone[ranks[0]]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        text = (
            f"two computations of the same micro-batch differ on {describe_ranks(ranks, [one[0] for one in everyone])} "
            f"in {', '.join(names)}{more}, before step {step} (train.check_repeats={self._every}){self._give_up()}"
        )

        def raise_error() -> None:
            raise HardwareError(text)

        run_on_all_ranks(raise_error)
