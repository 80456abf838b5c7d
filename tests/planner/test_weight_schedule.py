"""The replay of ZeRO-3's gathers, of a model with two layers that nothing measures."""

from dataclasses import replace

from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.planner.held_parameters import HeldParameter
from megatron_ds.planner.moments import MODEL_BEGINS, MODEL_ENDS, MODEL_TURNS, Event, ModulePass
from megatron_ds.planner.weight_schedule import WeightSchedule
from megatron_ds.planner.zero_settings import ZeroSettings, zero_settings
from tests.planner.memory_cases import MemoryCase

SIZE = 100


def settings(**changes: int) -> ZeroSettings:
    zero = zero_settings(MemoryCase("settings", zero=3, data=2).plan_input())
    limits = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
    return replace(zero, **{**limits, **changes})


def passed(module: str, *, backward: bool = False) -> list[ModulePass]:
    return [ModulePass(event, module, backward) for event in (Event.BEFORE, Event.AFTER)]


def replayed(zero: ZeroSettings, passes: list[ModulePass], frozen: str = "") -> list[str]:
    """All changes of a micro-batch as text, such as "gather a"."""
    weights = [HeldParameter(name, 0, ParamSpec((SIZE,)), SIZE, name != frozen, apart=False) for name in "ab"]
    used = {one.name: (one,) for one in weights}
    changes = WeightSchedule(zero, weights, used, passes, num_micro_batches=1).run()
    return [f"{one.change.value} {''.join(weight.name for weight in one.weights)}" for one in changes]


FORWARD = [MODEL_BEGINS, *passed("a"), *passed("b"), MODEL_ENDS, MODEL_TURNS]
PLAIN = [*FORWARD, *passed("b", backward=True), *passed("a", backward=True)]


def test_without_limits_each_pass_gathers_and_releases_its_weights() -> None:
    each = ["gather", "arrive", "release"]
    assert replayed(settings(), PLAIN) == [f"{change} {name}" for name in "abba" for change in each]


def test_weights_are_gathered_ahead_while_few_are_there() -> None:
    found = replayed(settings(prefetch_bucket_size=2 * SIZE), PLAIN)
    assert found[0] == "gather ab"  # before the model's first module
    assert replayed(settings(prefetch_bucket_size=2 * SIZE, max_live_parameters=SIZE), PLAIN)[0] == "gather a"


def test_a_weight_stays_if_its_next_use_is_near() -> None:
    found = replayed(settings(max_reuse_distance=SIZE), PLAIN)
    assert [one for one in found if one.endswith("b")] == ["gather b", "arrive b", "release b"]
    assert [one for one in found if one.endswith("a")] == 2 * ["gather a", "arrive a", "release a"]


def test_a_frozen_weight_of_a_recomputed_module_stays_until_its_block_has_ended() -> None:
    """The block `a` computes `b` again in its backward pass."""
    block = [ModulePass(Event.BEFORE, "a", True), *passed("b"), ModulePass(Event.AFTER, "a", True)]
    trained, frozen = (replayed(settings(), [*FORWARD, *block], frozen=name) for name in ("", "b"))
    assert trained[-2:] == ["release b", "release a"] and frozen[-1] == "release ab"
