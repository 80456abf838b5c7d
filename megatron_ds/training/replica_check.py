"""Comparison of what several ranks hold, every `train.check_replicas` steps and before each checkpoint.

In a step that is checked, weights are compared twice: between the backward pass and the optimizer, when they still are
what the gradients were computed with (under ZeRO the next update overwrites them), and after the update.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from megatron_ds.config import RunConfig
from megatron_ds.engine import Engine, ReplicaChecksums
from megatron_ds.engine.replica_checksums import Difference
from megatron_ds.errors import HardwareError
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks

MOST_NAMED = 3  # tensors in a message


class ReplicaCheck:
    """The check of a run; without `train.check_replicas`, or with one rank, it does nothing.

    Args:
        run: the run file.
        engine: the live engine. Collective over pipeline.
        give_up: called on every rank before the error is raised: it completes what was saved before, and returns the
            end of the message, which states from where the run can resume.
    """

    def __init__(self, run: RunConfig, engine: Engine, give_up: Callable[[], str]) -> None:
        self._every, self._engine, self._give_up = run.train.check_replicas, engine, give_up
        self._checksums: ReplicaChecksums | None = None
        if self._every > 0 and engine.grid.world.size > 1:
            exact = engine.device.type == "cpu" or run.train.deterministic
            self._checksums = ReplicaChecksums(engine, with_tensor_ranks=exact)

    def prepare(self, step: int) -> None:
        """Have the engine check before it updates the weights in this step, if the step is checked."""
        is_due = self._checksums is not None and step % self._every == 0
        self._engine.before_update = (lambda: self._check(f"in step {step}")) if is_due else None

    def after_step(self, step: int, *, is_last: bool) -> None:
        """Check after a step, if it is one to check or the last one. Collective over the world.

        Raises:
            HardwareError: on rank 0, copies differ.
        """
        if self._every and (is_last or step % self._every == 0):
            self._check(f"after step {step}")

    def before_save(self, step: int) -> None:
        """Check the state after a step, which is about to be written, as `after_step` does."""
        self._check(f"before saving step {step}")

    def _check(self, when: str) -> None:
        if self._checksums is None:
            return
        found = self._checksums.differing()
        if not found:
            return
        hosts = gather_objects(socket.gethostname(), self._engine.grid.host.group)
        text = f"{describe_differences(found, hosts)} {when} (train.check_replicas={self._every}){self._give_up()}"

        def raise_error() -> None:
            raise HardwareError(text)

        run_on_all_ranks(raise_error)


def describe_differences(found: Sequence[Difference], hosts: Sequence[str]) -> str:
    """Return a sentence about the ranks whose copies differ, with their machines, and the first of the tensors.

    Args:
        found: at least one.
        hosts: the host name of every rank.
    """
    first = found[0]
    names = ", ".join(one.name for one in found[:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    suspects = describe_ranks(first.suspects, hosts)
    if not first.majority:
        return f"copies of {names}{more} differ between {suspects}, of which none is in the majority,"
    return f"copies of {names}{more} on {suspects} differ from those of {count_ranks(len(first.majority))}"


def count_ranks(count: int) -> str:
    """Return such as `3 other ranks`."""
    return f"{count} other rank{'s' if count > 1 else ''}"


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return such as `rank 3 (host gpu07) and rank 5 (host gpu08)`; of many ranks, the first few."""
    named = [f"rank {rank} (host {hosts[rank]})" for rank in ranks[:8]]
    if len(ranks) > len(named):
        return f"{', '.join(named)} and {len(ranks) - len(named)} more ranks"
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
