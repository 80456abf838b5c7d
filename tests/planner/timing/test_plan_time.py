"""Seconds of this package's runs: their parts follow from layout, ZeRO and options."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megatron_ds.planner.input_of_config import input_of
from megatron_ds.planner.operations import Collective, Message, ModuleHooks, Stream
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.timing.engine_work import HOST_UPDATES_PER_S, machine_of, step_of
from megatron_ds.planner.timing.step_time import StepTime, plan_time
from megatron_ds.planner.trace import trace_layers

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
PARAMS = 4 * (4 * 4096**2 + 3 * 4096 * 11_008) + 2 * 32_000 * 4096
DEVICE = find_device("h100", measured=False)
NETWORK = find_network("400Gb/s", DEVICE, 8)


@cache
def run(nodes: int = 2, *, zero: int = 1, batch: int = 64, **fields: Any) -> PlanInput:
    """A Llama on H100s."""
    sizes = {name: fields.pop(name) for name in ("tensor", "pipeline", "sequence", "context") if name in fields}
    stage: dict[str, Any] = {"stage": zero}
    if "kept" in fields:
        kept = fields.pop("kept")
        stage |= {"stage3_max_reuse_distance": kept, "stage3_max_live_parameters": kept}
    if "hpz" in fields:
        stage["zero_hpz_partition_size"] = fields.pop("hpz")
    if fields.pop("offload", False):
        stage["offload_optimizer"] = {"device": "cpu"}
    engine = {
        "parallel": sizes,
        "deepspeed": {"zero_optimization": stage, "bf16": {"enabled": True}},
        "optimizer": {"name": fields.pop("optimizer", "adamw"), "lr": 1e-4},
        "global_batch_size": batch,
        "micro_batch_size": fields.pop("micro_batch", 1),
        **fields,
    }
    return input_of(LLAMA, engine, Rows(4096), Machines(nodes, 8, "cuda"))


@cache
def timed(nodes: int = 2, **fields: Any) -> StepTime:
    found = plan_time(run(nodes, **fields), DEVICE, NETWORK)
    assert sum(found.parts.values()) == pytest.approx(found.total_s)
    assert all(value >= 0 for value in found.parts.values())
    assert found.tokens_per_s == pytest.approx(64 * 4096 / found.total_s)
    return found


def test_flops_are_those_that_training_counts() -> None:
    """6 N + 12 L d S for each token, without the embedding, which is looked up."""
    found = timed()
    by_formula = 6 * (PARAMS - 32_000 * 4096) + 12 * 4 * 4096 * 4096
    spent = found.mfu * 16 * DEVICE.peak_flops("bfloat16") / found.tokens_per_s
    assert spent == pytest.approx(by_formula, rel=0.01)
    assert 0.3 < found.mfu < 0.7


def test_parts_of_layouts() -> None:
    assert set(timed().exposed_s) == {"shard", "host", "loss"}
    assert "tensor" in timed(tensor=4).exposed_s
    pipelined = timed(pipeline=4)
    assert pipelined.bubble_s > 0 and "pipeline" in pipelined.exposed_s
    assert "context" in timed(context=2).exposed_s


def test_recomputation() -> None:
    again, without = timed(recompute="full"), timed()
    assert without.recompute_s == 0
    assert 0.2 < again.recompute_s / again.compute_s < 0.4
    assert again.compute_s == pytest.approx(without.compute_s, rel=0.02)


def test_gathers_of_weights_hide_behind_passes_at_stage_3() -> None:
    """They are those of both passes of every micro-batch, or fewer where weights stay gathered between the passes."""

    def gathered_bytes(given: PlanInput) -> int:
        end = step_of(given, trace_layers(given.layers, given.trace_setting())).ends[0]
        assert end.hiding == given.num_micro_batches == 4
        gathers = {one: count for one, count in end.sent.items() if isinstance(one, Collective) and one.hidden}
        return sum(one.num_bytes * count for one, count in gathers.items() if one.kind == "all_gather")

    assert gathered_bytes(run(zero=3, kept=0)) == pytest.approx(2 * 4 * 2 * PARAMS, rel=0.001)
    assert gathered_bytes(run(zero=3, kept=4 * PARAMS)) == pytest.approx(4 * 2 * PARAMS, rel=0.001)
    assert 4 * 2 * PARAMS < gathered_bytes(run(zero=3)) < 2 * 4 * 2 * PARAMS, "1e9 elements stay"
    assert not any(one.hidden for one in step_of(run(), ()).ends[0].sent if isinstance(one, Collective))


def test_weights_of_a_second_division_are_gathered_inside_a_node() -> None:
    found, without = timed(zero=3, hpz=8), timed(zero=3)
    assert found.exposed_s["hpz"] > 0 and "hpz" not in without.exposed_s
    assert found.exposed_s["shard"] < without.exposed_s["shard"]


def test_offloaded_optimizers_update_on_the_host() -> None:
    part, found = PARAMS / 16, timed(zero=2, offload=True).optimizer_s
    assert found == pytest.approx(part / HOST_UPDATES_PER_S + part * (4 + 2) / (DEVICE.host_gb_s * 1e9), rel=0.05)
    assert found > 2 * timed(zero=2).optimizer_s


def test_an_optimizer_of_one_moment_moves_fewer_bytes() -> None:
    def update(name: str) -> int:
        given = run(optimizer=name)
        end = step_of(given, trace_layers(given.layers, given.trace_setting())).ends[0]
        return sum(one.num_bytes for one in end.update if isinstance(one, Stream) and one.name == name)

    part = PARAMS // 16
    assert update("adamw") == pytest.approx(30 * part, rel=0.001)
    assert update("lion") == pytest.approx(22 * part, rel=0.001)


def test_zero_copies_gradients_and_weights() -> None:
    """Into buckets of each micro-batch, which stage 1 on GPUs in bf16 lacks, and a rank's part into one tensor."""

    def copied(zero: int) -> dict[str, float]:
        given = run(zero=zero)
        end = step_of(given, trace_layers(given.layers, given.trace_setting())).ends[0]
        found = dict.fromkeys(("copy_", "div_", "cat", "mul_"), 0.0)
        for one, count in end.update.items():
            if isinstance(one, Stream) and one.name in found:
                found[one.name] += one.num_bytes * count / PARAMS
        return found

    part, buckets = 1 / 16, 4 * 2 * 2  # of 4 micro-batches, read and written in bf16
    assert copied(1) == pytest.approx({"copy_": 0, "div_": 0, "cat": 4 * part, "mul_": 8 * part}, rel=0.01)
    assert copied(2) == pytest.approx({"copy_": buckets, "div_": buckets, "cat": 4 * part, "mul_": 8 * part}, rel=0.01)
    given = run(zero=3)
    sent = step_of(given, trace_layers(given.layers, given.trace_setting())).ends[0].sent
    gathered = sum(
        one.num_bytes * count for one, count in sent.items() if isinstance(one, Collective) and one.kind == "all_gather"
    )
    assert copied(3)["cat"] == pytest.approx(buckets + 4 * part + 2 * gathered / PARAMS, rel=0.01)


def test_hooks_of_modules_are_those_of_zero_3() -> None:
    """Each module of a layer has them in its forward pass, and in its backward pass for each output with a gradient."""

    def hooks(zero: int, traced: int) -> list[tuple[int, int]]:
        traces = trace_layers(run(zero=traced).layers, run(zero=traced).trace_setting())
        layers = step_of(run(zero=zero), traces).stages[0].layers
        assert len({id(one) for one in layers}) == len({id(one) for one in traces})
        return [(one.forward[ModuleHooks()], one.backward[ModuleHooks()]) for one in layers]

    assert set(hooks(1, 1)) == set(hooks(2, 3)) == {(0, 0)}
    assert all(forward > 0 and backward >= forward for forward, backward in hooks(3, 3)[1:-1])


def test_updates_of_whole_matrices_wait_for_each_other() -> None:
    """Muon's matrices go to their owners and back, and are multiplied there; Adafactor adds up rows and columns."""
    adamw, muon, adafactor = (timed(optimizer=name) for name in ("adamw", "muon", "adafactor"))
    assert "stage" not in adamw.exposed_s
    assert muon.exposed_s["stage"] > 5 * adafactor.exposed_s["stage"] > 0
    at_50_gb_s = 2 * 2 * (PARAMS - 2 * 32_000 * 4096) / 16 / 50e9  # there and back, in bf16, of a mean rank
    assert at_50_gb_s / 2 < muon.exposed_s["stage"] < 3 * at_50_gb_s
    flops = 5 * (2 * 4096**2 * (2 * 11_008 + 4096) * 3 + 3 * 2 * 4096**3 * 4) * 4 / 16
    iteration_s = muon.optimizer_s - adamw.optimizer_s
    assert flops / 989e12 < iteration_s < 3 * flops / 989e12


def test_gradients_are_added_apart_where_no_product_adds_them() -> None:
    traces = trace_layers(run().layers, run().trace_setting())
    of_norms, of_compiled = (
        sum(one.num_bytes for one in step_of(given, traces).stages[0].gradients if isinstance(one, Stream))
        for given in (run(), run(compile=True))
    )
    assert 0 < of_norms < 1e-3 * PARAMS
    assert 0.5 * PARAMS < of_compiled / 18 < PARAMS, "those of the embedding and of the head are added in products"
    (one,) = step_of(run(zero=2), traces).stages[0].gradients
    assert isinstance(one, Stream) and one.num_bytes == pytest.approx(6 * PARAMS, rel=0.001)


def test_boundaries_of_stages_send_hidden_states() -> None:
    given = run(pipeline=4, tensor=2, sequence=True)
    step = step_of(given, trace_layers(given.layers, given.trace_setting()))
    assert [list(stage.sends) for stage in step.stages] == [[Message("pipeline", 4096 * 4096 * 2 // 2)]] * 3 + [[]]
    assert step.blocks and step.schedule == "deepspeed"


def test_stages_of_tied_and_model_axes_have_placements() -> None:
    placed = machine_of(run(pipeline=4, tensor=2), DEVICE, NETWORK).placements
    assert placed["tied"].ranks == 2 and placed["tied"].islands == 2
    assert placed["model"].ranks == 8


def test_checkpoints_pause_steps() -> None:
    found = plan_time(replace(run(), save_every=100), DEVICE, NETWORK)
    assert found.pause_s == pytest.approx(12 * PARAMS / 16 / (DEVICE.host_gb_s * 1e9) / 100, rel=0.001)


def test_slower_networks_take_longer() -> None:
    slow = plan_time(run(), DEVICE, find_network("ethernet 25Gb/s", DEVICE, 8))
    assert slow.exposed_s["shard"] > 5 * timed().exposed_s["shard"]
