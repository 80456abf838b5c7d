"""Few and cheap runs that cover what many do: the sample of `make test`, chosen from the runs of the sweep.

A run is described by facts, such as its case, its layout, or a pair of two options. A sample covers the runs if each of
their facts is a fact of one of its own. The choice is greedy, and the same in every process.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Run = TypeVar("Run")
Facts = Callable[[Run], Iterable[Hashable]]


def covering(runs: Sequence[Run], facts: Facts[Run], cost: Callable[[Run], float]) -> list[Run]:
    """Return runs that have every fact of all of them, in their order.

    Each choice is the run with the most facts that are still missing for its cost, the first of equal ones. Runs whose
    facts the later choices have too are dropped in the end.
    """
    known = [frozenset(facts(run)) for run in runs]
    missing, chosen = frozenset[Hashable]().union(*known), list[int]()
    while missing:
        best = max(range(len(runs)), key=lambda at: (len(known[at] & missing) / cost(runs[at]), -at))
        chosen.append(best)
        missing -= known[best]
    for at in sorted(chosen, key=lambda at: -cost(runs[at])):
        others = frozenset[Hashable]().union(*(known[other] for other in chosen if other != at))
        if known[at] <= others:
            chosen.remove(at)
    return [runs[at] for at in sorted(chosen)]


def uncovered(sample: Iterable[Run], runs: Iterable[Run], facts: Facts[Run]) -> set[Hashable]:
    """Return the facts of runs that no run of the sample has."""
    return {fact for run in runs for fact in facts(run)} - {fact for run in sample for fact in facts(run)}
