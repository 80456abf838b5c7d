"""What the planner does where a run starts: its choices, and the warning of a run that is not going to fit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ds.config import build_run
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.agreement import Council
from megatron_ds.planner import this_machine
from megatron_ds.planner.plan import plan_stages
from megatron_ds.planner.plan_input import Machines
from megatron_ds.training import automatic
from megatron_ds.training.automatic import choose, choose_together, describe_misfit, warn_of_misfit, with_choices
from megatron_ds.training.launch import train
from megatron_ds.training.planning import plan_input
from megatron_ds.training.resolve import resolve_run
from tests.parallel.test_agreement import together
from tests.ranks import preload
from tests.training.tiny import run_mapping

GIB = 1 << 30


def a_run(corpus: Path, output: Path, **changes: Any) -> dict[str, Any]:
    mapping = run_mapping(corpus, output)
    mapping["train"].update(global_batch_size=8, eval_every=0, **changes.pop("train", {}))
    return {**mapping, **changes}


def test_a_run_trains_with_what_was_chosen(corpus: Path, tmp_path: Path) -> None:
    given = build_run(a_run(corpus, tmp_path / "out", parallel="auto", train={"micro_batch_size": "auto"}))
    preload()
    train(given, 2)
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert not written["parallel"]["auto"] and not written["train"]["auto_micro_batch_size"]
    chosen = with_choices(given, 2, "cpu")
    assert written["parallel"]["tensor"] == chosen.run.parallel.tensor
    assert written["train"]["micro_batch_size"] == chosen.run.train.micro_batch_size
    (note,) = chosen.notes
    assert note.startswith("parallel=auto and train.micro_batch_size=auto: ") and note.endswith(" GB on a rank")


def test_ranks_of_a_launcher_have_the_choice_of_rank_0(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They choose the same, once, though one has less memory: its memory counts."""
    run = build_run(a_run(corpus, tmp_path, train={"micro_batch_size": "auto"}))

    def peak_bytes(micro_batch_size: int) -> int:
        one = build_run(a_run(corpus, tmp_path, train={"micro_batch_size": micro_batch_size}))
        return plan_stages(plan_input(one, Machines(1, 2, "cpu")))[0].peak_bytes

    little_bytes = int((peak_bytes(1) + peak_bytes(4)) / automatic.USABLE)  # for two ranks

    def act(council: Council) -> tuple[int, tuple[str, ...], int]:
        rank, searches = council.info.rank, []
        monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: (GIB, little_bytes)[rank])
        monkeypatch.setattr(automatic, "choose", lambda *given: searches.append(rank) or choose(*given))
        found = choose_together(run, 2, "cpu", council)
        return found.run.train.micro_batch_size, found.notes, len(searches)

    preload()
    zero, one = together(act, 2)
    assert zero[:2] == one[:2] and (zero[2], one[2]) == (1, 0)
    monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: GIB)
    assert zero[0] < with_choices(run, 2, "cpu").run.train.micro_batch_size


def test_what_cannot_be_chosen_ends_all_ranks_of_a_launcher(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(a_run(corpus, tmp_path, parallel="auto"))
    monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: 10**4)
    preload()
    zero, one = together(lambda council: choose_together(run, 2, "cpu", council), 2)
    assert zero.startswith("ConfigError: no layout of 2 ranks fits") and one == "SystemExit: 2"


def test_nothing_is_chosen_where_all_is_given(corpus: Path, tmp_path: Path) -> None:
    run = build_run(a_run(corpus, tmp_path))
    assert with_choices(run, 2, "cpu") == automatic.Choice(run)


def test_less_memory_gives_a_smaller_micro_batch(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak_bytes(micro_batch_size: int) -> int:
        run = build_run(a_run(corpus, tmp_path, train={"micro_batch_size": micro_batch_size}))
        return plan_stages(plan_input(run, Machines(1, 1, "cpu")))[0].peak_bytes

    run = build_run(a_run(corpus, tmp_path, train={"micro_batch_size": "auto"}))
    sizes = []
    for memory_bytes in (GIB, int((peak_bytes(1) + peak_bytes(8)) / 2 / automatic.USABLE)):
        monkeypatch.setattr(this_machine, "host_memory_bytes", lambda size=memory_bytes: size)
        sizes.append(with_choices(run, 1, "cpu").run.train.micro_batch_size)
    assert sizes[0] > sizes[1] >= 1, sizes
    monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: 10**4)
    with pytest.raises(ConfigError, match=r"no layout of 1 ranks fits"):
        with_choices(run, 1, "cpu")


def test_gpus_that_cannot_be_asked(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "first_gpu", lambda: None)
    run = build_run(a_run(corpus, tmp_path, parallel="auto"))
    with pytest.raises(ConfigError, match=r"^parallel=auto is chosen by the memory of the devices, .*; try a number"):
        with_choices(run, 2, "cuda")


def test_a_run_that_will_not_fit_is_warned_of(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolved = resolve_run(build_run(a_run(corpus, tmp_path)), 1, "cpu")
    assert describe_misfit(resolved, "cpu") is None, "this machine holds a tiny model"
    monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: 10**5)
    monkeypatch.setattr(logging.getLogger("megatron_ds"), "propagate", True)
    with caplog.at_level(logging.INFO, "megatron_ds"):
        warn_of_misfit(resolved, "cpu")
    (line,) = caplog.messages
    assert "the run is planned to need 0.0 GB on a rank, which has 0.0 GB" in line and "megatron-ds plan" in line


def test_what_cannot_be_planned_trains_all_the_same(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolved = resolve_run(build_run(a_run(corpus, tmp_path)), 1, "cpu")

    def refuse(given: object) -> None:
        raise TypeError("a layer from outside")

    monkeypatch.setattr(this_machine, "host_memory_bytes", lambda: 10**5)
    monkeypatch.setattr(automatic, "plan_stages", refuse)
    monkeypatch.setattr(logging.getLogger("megatron_ds"), "propagate", True)
    with caplog.at_level(logging.INFO, "megatron_ds"):
        warn_of_misfit(resolved, "cpu")
    assert caplog.messages == ["the memory of this run was not planned: TypeError: a layer from outside"]


def test_machines_by_what_a_launcher_sets() -> None:
    found = this_machine.machines_here(16, "cuda", {"LOCAL_WORLD_SIZE": "8"})
    assert (found.nodes, found.ranks_per_node) == (2, 8)
    for tasks, nodes in (("8(x2)", 2), ("4(x4)", 4), ("16", 1), ("8,8", 1), ("9(x1),7(x1)", 1)):
        assert this_machine.machines_here(16, "cuda", {"SLURM_STEP_TASKS_PER_NODE": tasks}).nodes == nodes, tasks
    assert this_machine.machines_here(16, "cuda", {}).nodes == 1
    assert this_machine.machines_here(15, "cuda", {"LOCAL_WORLD_SIZE": "8"}).nodes == 1, "ranks are not even"
