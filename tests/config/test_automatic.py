"""`parallel: auto` and `train.micro_batch_size: auto`: how they are written, overridden, dumped and refused."""

from typing import Any

import pytest
import yaml

from megatron_ds.config import EngineConfig, ParallelSection, build_run, dump_run
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import read_model
from megatron_ds.runtime.setup import plan_engine, plan_run
from tests.training.tiny import MODEL


def mapping(**sections: Any) -> dict[str, Any]:
    train = {"steps": 1, "global_batch_size": 8, **sections.pop("train", {})}
    return {"model": {"config": MODEL}, "data": {"train": ["a.txt"]}, "train": train, "output": "out", **sections}


@pytest.mark.parametrize("parallel", ["auto", {"auto": True}, {"auto": True, "shared_memory": True}])
def test_a_layout_that_is_chosen(parallel: Any) -> None:
    run = build_run(mapping(parallel=parallel))
    assert run.parallel.auto and not run.train.auto_micro_batch_size
    assert build_run(yaml.safe_load(dump_run(run))) == run


def test_a_micro_batch_that_is_chosen() -> None:
    run = build_run(mapping(train={"micro_batch_size": "auto"}))
    assert (run.train.auto_micro_batch_size, run.train.micro_batch_size, run.parallel.auto) == (True, 1, False)
    assert build_run(yaml.safe_load(dump_run(run))) == run


def test_an_override_takes_the_place_of_a_choice() -> None:
    given = mapping(parallel="auto", train={"micro_batch_size": "auto"})
    run = build_run(given, ["parallel.tensor=2", "train.micro_batch_size=4"])
    assert run.parallel == ParallelSection(tensor=2)
    assert (run.train.micro_batch_size, run.train.auto_micro_batch_size) == (4, False)
    again = build_run(mapping(parallel={"tensor": 2}), ["parallel=auto", "train.micro_batch_size=auto"])
    assert again.parallel == ParallelSection(auto=True) and again.train.auto_micro_batch_size


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": "automatic"},
            "parallel=automatic is neither sizes, such as {tensor: 2}, nor auto; nearest: auto",
        ),
        (
            {"parallel": {"auto": True, "tensor": 2}},
            "parallel.auto=true chooses parallel.tensor too, which is 2; keep one of them",
        ),
        (
            {"parallel": {"auto": True, "context": 4}},
            "parallel.auto=true chooses parallel.context too, which is 4; keep one of them",
        ),
        (
            {"train": {"auto_micro_batch_size": True, "micro_batch_size": 4}},
            "train.auto_micro_batch_size=true chooses train.micro_batch_size, which is 4; keep one of them",
        ),
        ({"train": {"micro_batch_size": "automatic"}}, "train.micro_batch_size=automatic is not an integer"),
    ],
)
def test_what_contradicts_a_choice(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        build_run(mapping(**sections))
    assert str(found.value) == message


def test_nothing_but_a_run_has_choices() -> None:
    hf = read_model(MODEL)
    with pytest.raises(ConfigError, match=r"^parallel=auto is chosen where a run starts.*try sizes, such as"):
        plan_engine(EngineConfig(parallel=ParallelSection(auto=True)), hf, 1, "cpu")
    run = build_run(mapping(train={"micro_batch_size": "auto"}))
    with pytest.raises(ConfigError, match=r"^train.micro_batch_size=auto is chosen where a run starts.*try a number"):
        plan_run(run, hf, 1, "cpu")
