"""Names of registered things in the run file, and a schedule, an optimizer and a metric sink from outside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.config import OptimizerSection, RunConfig, build_run
from megatron_ds.engine import OPTIMIZERS, GuardedOptimizer
from megatron_ds.errors import ConfigError
from megatron_ds.layers.kernels import KERNELS
from megatron_ds.monitor import SINKS, SinkInfo, StepMetrics
from megatron_ds.training.callbacks import CALLBACKS, Callback
from megatron_ds.training.lr_schedule import SCHEDULES, SchedulePoint
from megatron_ds.training.registered_names import check_registered_names
from megatron_ds.training.resolve import resolve_run
from tests.halves import swept
from tests.ranks import preload
from tests.training.tiny import run_mapping

MakeRun = Callable[..., RunConfig]


def halves(point: SchedulePoint, *, every: int = 2) -> float:
    return max(point.min_lr, point.peak_lr * 0.5 ** ((point.step - point.warmup_steps) // every))


class SGD(GuardedOptimizer, torch.optim.SGD):
    @classmethod
    def from_section(
        cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device, *, momentum: float = 0.0
    ) -> "SGD":
        return cls(groups, lr=section.lr, momentum=momentum)


class SlowAdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW by another name and without the fused kernel."""

    has_adam_state = True

    @classmethod
    def from_section(cls, groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device) -> "SlowAdamW":
        return cls(groups, lr=section.lr, betas=section.betas, eps=section.eps, foreach=False)


class Lines:
    """Writes `step loss` lines."""

    def __init__(self, info: SinkInfo, *, file: str = "lines.txt") -> None:
        self.path, self.is_open = info.output / file, True
        assert info.continue_after is None and info.run.output == str(info.output)

    def write(self, metrics: Any) -> None:
        value = metrics.loss if isinstance(metrics, StepMetrics) else -metrics.valid_loss
        with self.path.open("a") as lines:
            lines.write(f"{metrics.step} {value!r}\n")

    def close(self) -> None:
        assert self.is_open
        self.is_open = False
        with self.path.open("a") as lines:
            lines.write("closed\n")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES._entries, "halves", halves)
    monkeypatch.setitem(OPTIMIZERS._entries, "sgd", SGD)
    monkeypatch.setitem(OPTIMIZERS._entries, "slow_adamw", SlowAdamW)
    monkeypatch.setitem(SINKS._entries, "lines", Lines)
    monkeypatch.setitem(CALLBACKS._entries, "idle", Callback)


def run_with(make_run: MakeRun, corpus: Path, output: Path, **top: Any) -> RunConfig:
    return build_run({**run_mapping(corpus, output), **top})


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"schedule": {"name": "cosin"}},
        "schedule.name=cosin is not one of constant, linear, cosine, polynomial, inverse_sqrt, cosine_with_restarts, "
        "wsd, halves; did you mean cosine?",
    ),
    (
        {"schedule": {"name": "halves", "options": {"evry": 3}}},
        "schedule.options.evry: unknown option; did you mean schedule.options.every?",
    ),
    ({"schedule": {"options": {"every": 3}}}, "schedule.options.every: unknown option; it takes none"),
    (
        {"schedule": {"name": "halves", "options": {"every": "3"}}},
        "schedule.options.every=3 is text, not an integer; remove the quotes",
    ),
    (
        {"schedule": {"name": "wsd", "options": {"decay": "sqrt"}}},
        "schedule.options.decay=sqrt is not one of linear, 1-sqrt, cosine, exponential",
    ),
    (
        {"schedule": {"name": "wsd", "options": {"decay_share": 1.5}}},
        "schedule.options.decay_share=1.5 must be at most 1.0; nearest: 1.0",
    ),
    (
        {"optimizer": {"name": "lyon"}},
        "optimizer.name=lyon is not one of adamw, adafactor, adamw8bit, lion, muon, sgd, slow_adamw; "
        "did you mean lion?",
    ),
    ({"optimizer": {"options": {"momentum": 0.9}}}, "optimizer.options.momentum: unknown option; it takes none"),
    (
        {"optimizer": {"name": "sgd", "options": {"nesterov": True}}},
        "optimizer.options.nesterov: unknown option; legal here: momentum",
    ),
    (
        {"optimizer": {"name": "sgd"}, "checkpoint": {"every": 2}},
        "optimizer.name=sgd can be neither saved nor resumed: its class does not list its state in state_kinds; "
        "try checkpoint.every=0",
    ),
    (
        {"optimizer": {"name": "sgd"}, "train": {"steps": 2, "ema": {"decay": 0.9}}},
        "train.ema: optimizer.name=sgd has no place for it: its class does not list its state in state_kinds; remove "
        "it",
    ),
    (
        {"optimizer": {"name": "sgd"}, "deepspeed": {"optimizer": {"type": "AdamW"}}},
        "optimizer.name=sgd (run file) and deepspeed.optimizer.type=AdamW (run file) disagree",
    ),
    (
        {"monitor": ["tensorbord"]},
        "monitor[0]=tensorbord is not one of csv, mlflow, tensorboard, trackio, wandb, lines; did you mean "
        "tensorboard?",
    ),
    (
        {"monitor": ["lines", {"name": "lines", "flie": "x"}]},
        "monitor[1].flie: unknown option; did you mean monitor[1].file?",
    ),
    ({"callbacks": ["idel"]}, "callbacks[0]=idel is not one of idle; did you mean idle?"),
    ({"callbacks": [{"name": "idle", "patience": 3}]}, "callbacks[0].patience: unknown option; it takes none"),
    ({"train": {"steps": 5, "kernels": "fast"}}, "train.kernels=fast is not one of auto, torch"),
    (
        {"train": {"steps": 5, "kernels": {"attention": "flsh"}}},
        "train.kernels.attention=flsh is not one of auto, torch, flash3, flash4, flash, varlen, flex; did you mean "
        "flash?",
    ),
]


@pytest.mark.parametrize(("top", "message"), REFUSALS, ids=[message.split(" ")[0] for _, message in REFUSALS])
def test_refused_in_one_line(corpus: Path, tmp_path: Path, top: dict[str, Any], message: str) -> None:
    run = build_run({**run_mapping(corpus, tmp_path / "out"), **top})
    with pytest.raises(ConfigError) as caught:
        resolve_run(run, 1, "cpu")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_without_sinks_an_unknown_one_names_imports(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SINKS, "_entries", {})
    with pytest.raises(ConfigError) as caught:
        resolve_run(build_run({**run_mapping(corpus, tmp_path / "out"), "monitor": ["tensorboard"]}), 1, "cpu")
    assert str(caught.value) == (
        "monitor[0]=tensorboard is not registered, nor is any metric sink; name its module under imports"
    )


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]


def test_a_schedule_from_outside(make_run: MakeRun) -> None:
    preload()
    run = make_run(schedule={"name": "halves", "warmup_steps": 1, "min_lr": 1e-3, "options": {"every": 1}})
    mds.train(run)
    assert [line["lr"] for line in lines_of(run) if "lr" in line] == [3e-3, 1.5e-3, 1e-3, 1e-3, 1e-3]
    assert mds.load_run(Path(run.output) / "config.yaml") == run


def test_a_metric_sink_gets_every_line_on_rank_0(corpus: Path, tmp_path: Path) -> None:
    preload()
    sinks = ["lines", {"name": "lines", "file": "other.txt"}]
    run = build_run({**run_mapping(corpus, tmp_path / "out"), "monitor": sinks})
    mds.train(run, nproc=2)
    expected = [f"{line['step']} {line.get('loss', -line.get('valid_loss', 0))!r}" for line in lines_of(run)]
    for name in ("lines.txt", "other.txt"):
        assert (tmp_path / "out" / name).read_text().splitlines() == [*expected, "closed"], "once"
    assert len(expected) == 7


@pytest.mark.parametrize("stage", [1, 3, *swept(0, 2)])
def test_an_optimizer_from_outside_is_the_same_at_every_stage_of_zero(make_run: MakeRun, stage: int) -> None:
    """AdamW by another name: bit for bit at the same stage, up to the rounding of the fused kernel."""
    preload()
    losses = {}
    for name in ("adamw", "slow_adamw"):
        zero = {"zero_optimization": {"stage": stage}}
        run = make_run(f"{name}{stage}", optimizer={"name": name}, deepspeed=zero)
        mds.train(run, nproc=2)
        losses[name] = [line["loss"] for line in lines_of(run) if "loss" in line]
    assert losses["slow_adamw"] == pytest.approx(losses["adamw"], rel=1e-6)


def test_an_optimizer_with_adams_state_is_saved_and_resumed(make_run: MakeRun) -> None:
    preload()
    through = make_run("through", optimizer={"name": "slow_adamw"}, train={"steps": 6})
    mds.train(through, nproc=2)
    first = make_run("cut", optimizer={"name": "slow_adamw"}, train={"steps": 6}, checkpoint={"every": 3})

    class StopAt3(Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == 3:
                state.stop()

    mds.train(first, nproc=2, callbacks=[StopAt3()])
    mds.train(first, nproc=2)
    losses = [[line["loss"] for line in lines_of(run) if "loss" in line] for run in (through, first)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_an_optimizer_with_other_state_trains_and_resumes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    losses = []
    for ranks, momentum in ((1, 0.9), (2, 0.9), (2, 0.0)):
        options = {"name": "sgd", "lr": 0.3, "options": {"momentum": momentum}}
        run = make_run(f"sgd{ranks}{momentum}", optimizer=options)
        mds.train(run, nproc=ranks)
        losses.append([line["loss"] for line in lines_of(run) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[1][:2] == losses[2][:2] and losses[1][3] != losses[2][3]
    with pytest.raises(ConfigError, match=r"^optimizer.name=sgd can be neither saved nor resumed.*=never$"):
        resolve_run(run, 1, "cpu", tmp_path)


def test_options_may_have_annotations_that_only_type_checkers_know(make_run: MakeRun) -> None:
    def steps(point: SchedulePoint, *, bounds: tuple[float, ...] = (), of: Any = 0) -> float:
        return 1.0

    steps.__annotations__["of"] = "NameOfAnImportForTypeCheckers"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULES._entries, "steps", steps)
        check_registered_names(
            make_run("steps", schedule={"name": "steps", "options": {"bounds": [0.1, 2], "of": "any"}}), resumes=False
        )
        wrong = make_run("wrong", schedule={"name": "steps", "options": {"bounds": ["a"]}})
        with pytest.raises(ConfigError, match=r"^schedule.options.bounds\[0\]=a is not a number"):
            check_registered_names(wrong, resumes=False)


def test_the_instances_are_what_the_package_has() -> None:
    assert SCHEDULES.names[:3] == ("constant", "linear", "cosine")
    assert OPTIMIZERS.names[0] == "adamw"
    assert {name: operation.kind for name, operation in KERNELS.items()} == {
        "rms_norm": "rms_norm kernel",
        "swiglu": "swiglu kernel",
        "attention": "attention kernel",
        "cross_entropy": "cross_entropy kernel",
        "add_rms_norm": "add_rms_norm kernel",
        "fp32_rms_norm": "fp32_rms_norm kernel",
        "geglu": "geglu kernel",
        "rotary": "rotary kernel",
    }
