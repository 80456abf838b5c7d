"""Cases compared with transformers as `megatron-ds verify` compares: outputs, loss, hidden states, every gradient.

Cases at one layout are compared in the same processes, a few at a time: forks, imports and connections take longer than
a small model does. If one of them fails, each is compared in processes of its own, so that the others do not fail too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import ParallelSection
from megatron_ds.engine import start_distributed, stop_distributed
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.probe import Probe
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.watchdog import watch_peers
from megatron_ds.runtime import Session
from megatron_ds.verify.layer_names import position_names
from megatron_ds.verify.loss import ReferenceLoss
from megatron_ds.verify.ours import Findings, compare_inputs
from megatron_ds.verify.reference import run_reference
from megatron_ds.verify.run import merge
from tests.parity.reference import make_model
from tests.ranks import run_alone, run_local_ranks

Cases = Mapping[str, dict[str, Any]]
Prepared = tuple[Path, HFWeights, list[Probe], list[ReferenceLoss]]
Layouts = Callable[[str, Any, HFWeights], ParallelSection]
"""(case, place, its weights) -> the layout that a place is for the case; its number of ranks is the place's alone."""
AT_A_TIME = 8


def prepare_together(cases: Cases, folder: Path, multiple_of: int = 4) -> dict[str, Prepared]:
    """Return what transformers computes for each case, for rows of multiples of a length; in one process."""
    made = run_alone(_compute_references, cases, folder, multiple_of, timeout_s=280.0)
    return {case: (folder / case, _weights(folder / case), *made[case]) for case in cases}


def prepare(cases: Cases, folders: pytest.TempPathFactory, multiple_of: int = 4) -> Callable[[str], Prepared]:
    """Return a function that makes this for a case, once."""
    made: dict[str, Prepared] = {}

    def get(case: str) -> Prepared:
        if case not in made:
            made.update(prepare_together({case: cases[case]}, folders.mktemp("model"), multiple_of))
        return made[case]

    return get


def _compute_references(cases: Cases, folder: Path, multiple_of: int) -> dict[str, Any]:
    made = {}
    for case, config in cases.items():
        make_model(config).save_pretrained(folder / case / "model")
        weights = _weights(folder / case)
        inputs, _ = weights.model.core.probes(multiple_of)
        made[case] = inputs, run_reference(weights.directory, weights.model, inputs, folder / case)
    return made


def _weights(folder: Path) -> HFWeights:
    return HFWeights(folder / "model", read_model(folder / "model"))


def _run_each(info: RankInfo, given: Sequence[tuple[Any, ...]]) -> list[list[Findings]]:
    with watch_peers(info):
        session = Session(info, start_distributed(info))
        found = [compare_inputs(session, *each) for each in given]
        stop_distributed()
    return found


class Verified:
    """Checks of cases at places, which are made a few at a time.

    Args:
        cases: the config of every case.
        layout: see `Layouts`.
        runs: (case, place) of the tests of a session, which may be made together.
        folders, multiple_of: of the references.
    """

    def __init__(
        self,
        cases: Cases,
        layout: Layouts,
        runs: Sequence[tuple[str, Any]],
        folders: pytest.TempPathFactory,
        multiple_of: int = 4,
    ) -> None:
        self._cases, self._layout, self._folders, self._multiple_of = cases, layout, folders, multiple_of
        self._groups = {run: group for group in _groups(runs) for run in group}
        self._prepared: dict[str, Prepared] = {}
        self._found: dict[tuple[str, Any], list[tuple[Findings, ...]]] = {}

    def check(self, case: str, place: Any) -> None:
        """Compare a case at a place with transformers; others with it, if they have not failed."""
        run = case, place
        if run not in self._found:
            group = self._groups.pop(run, [run])
            try:
                self._compare([other for other in group if other not in self._found])
            except Exception:
                if len(group) == 1:
                    raise
                for other in group:  # each for itself from here on
                    self._groups[other] = [other]
                self._compare([run])
        _, weights, inputs, losses = self._prepared[case]
        check_findings(weights, inputs, losses, self._found[run])

    def _compare(self, runs: Sequence[tuple[str, Any]]) -> None:
        missing = {case: self._cases[case] for case, _ in runs if case not in self._prepared}
        if missing:
            self._prepared.update(prepare_together(missing, self._folders.mktemp("models"), self._multiple_of))
        given = []
        for case, place in runs:
            results, weights, inputs, _ = self._prepared[case]
            given.append((weights, inputs, self._layout(case, place, weights), results))
        (world_size,) = {parallel.least_ranks for _, _, parallel, _ in given}
        ranks = run_local_ranks(_run_each, world_size, given)
        self._found.update({run: list(zip(*parts)) for run, parts in zip(runs, zip(*ranks))})


def _groups(runs: Sequence[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Runs at one place, at most `AT_A_TIME`."""
    places = defaultdict[Any, list[tuple[str, Any]]](list)
    for run in runs:
        places[run[1]].append(run)
    for same in places.values():
        for begin in range(0, len(same), AT_A_TIME):
            yield same[begin : begin + AT_A_TIME]


def check_findings(
    weights: HFWeights,
    inputs: Sequence[Probe],
    losses: Sequence[ReferenceLoss],
    found: Sequence[Sequence[Findings]],
) -> None:
    """Check what the ranks found for each input, and that nothing was left out."""
    for probe, loss, ranks in zip(inputs, losses, found, strict=True):
        report = merge(probe, loss, ranks)
        assert report.ok, (report.name, report.outputs, report.loss, report.worst_gradient, report.first_difference)
        assert report.first_difference is None
        assert list(report.hidden) == position_names(weights.model.core)
    gradients = merge(inputs[0], losses[0], found[0]).gradients
    assert gradients.keys() == {name for row in weights.model.table.values() for name in row.names}


def runs_of(request: pytest.FixtureRequest, *arguments: str) -> list[tuple[Any, ...]]:
    """The arguments of all tests of this module and session that have these, in their order."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    mine = [item.callspec.params for item in items if item.path == request.path and hasattr(item, "callspec")]
    found = [tuple(each[name] for name in arguments) for each in mine if {*arguments} <= each.keys()]
    return list(dict.fromkeys(found))


def has_experts(weights: HFWeights) -> bool:
    return any(stack.moe is not None for stack in weights.model.core.stacks.values())
