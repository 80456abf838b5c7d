"""What a trace says of layers, without a run beside it; and what it leaves as it was."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d

from megatron_ds.hf.config import read_model
from megatron_ds.layers.recompute import is_replaying
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.context import index_of_runs
from megatron_ds.planner.operations import Attention, Collective, HostCopy, LayerTrace, Product, Stream, Work
from megatron_ds.planner.trace import TraceSetting, trace_layers
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone

SETTING = TraceSetting(seq_length=32, micro_batch_size=4)


def model(case: str, **fields: Any) -> ModelConfig:
    return read_model({**ALL_CONFIGS[case], **fields}).core


def traced(case: str, setting: TraceSetting = SETTING, **fields: Any) -> list[LayerTrace]:
    return run_alone(trace, case, setting, fields)


def trace(case: str, setting: TraceSetting, fields: dict[str, Any]) -> list[LayerTrace]:
    return trace_layers(model(case, **fields).build_layers, setting)


def total(traces: list[LayerTrace]) -> Work:
    work = Work()
    for one in traces:
        work = work + one.forward + one.backward
    return work


@pytest.mark.parametrize("device_type", [pytest.param("cpu", marks=pytest.mark.sweep), "cuda"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3_moe-renormalised"])
def test_products_are_the_flops_of_the_model(case: str, device_type: str) -> None:
    """Against 6 flops a token and parameter that is multiplied with it, which biases and norms are not: at most 4 %."""
    core = model(case, vocab_size=128)
    with torch.device("meta"):
        parameters = list(SequentialModel(core.build_layers()).parameters())
    setting = replace(SETTING, device_type=device_type)
    work = total(traced(case, setting, vocab_size=128))
    tokens = setting.seq_length * setting.micro_batch_size
    expected = 6 * tokens * (sum(one.numel() for one in parameters) - core.num_idle_params)
    products = sum(one.flops * count for one, count in work.items() if isinstance(one, Product))
    assert 0.96 * expected <= products <= expected, (products, expected)


def test_functions_have_names_by_what_they_do_to_memory() -> None:
    """Formulas of GELU differ; tensors of zeros are written; a gradient of an embedding is zeros and added rows."""
    setting = replace(SETTING, device_type="cpu", precision="fp32")
    names = {one.name: one.num_bytes for one in total(traced("gpt2", setting)) if isinstance(one, Stream)}
    assert {"gelu_tanh", "gelu_tanh_backward", "index_select", "index_add_", "zero_"} <= names.keys()
    assert not {"gelu", "embedding", "embedding_dense_backward", "zeros", "new_zeros", "fill_"} & names.keys()


def test_attention_says_whether_it_has_a_mask() -> None:
    setting = replace(SETTING, device_type="cpu", precision="fp32")
    for case, masked in (("llama", {False}), ("mistral", {True}), ("gemma2-caps", set())):
        found = total(traced(case, setting))
        assert {one.masked for one in found if isinstance(one, Attention)} == masked, case


def test_equal_layers_are_run_once() -> None:
    traces = traced("llama", num_hidden_layers=8)
    assert [one.like for one in traces] == ["embedding", "entry", *["blocks.0"] * 8, "exit", "head"]
    assert [one.is_block for one in traces] == [False, False, *[True] * 8, False, False]
    assert len({one.like for one in traced("gemma2-caps") if one.is_block}) == 2  # with and without a window


def test_experts_are_run_once() -> None:
    traces = traced("qwen3_moe-renormalised")
    assert len({one.like for one in traces if one.is_block}) == 1


def test_recomputation_is_a_part_of_the_backward_pass() -> None:
    plain, full = (traced("llama", replace(SETTING, recompute=mode))[2] for mode in ("none", "full"))
    assert not plain.recompute and full.recompute
    assert full.backward - full.recompute == plain.backward
    assert not full.recompute - full.forward  # up to the last product, it repeats the forward pass
    assert full.kept_bytes == full.output_bytes < plain.kept_bytes


def test_offloaded_inputs_are_on_the_host() -> None:
    setting = replace(SETTING, recompute="full", offload_activations=True)
    block = traced("llama", setting)[2]
    hidden = 2 * SETTING.seq_length * SETTING.micro_batch_size * 32
    assert block.host_bytes == hidden
    assert block.forward[HostCopy(hidden, to_host=True)] == 1


def test_what_is_shared_counts_at_its_first_layer() -> None:
    """And the operations that make it are in no trace."""
    traces = traced("llama")
    blocks = [one for one in traces if one.is_block]
    angles = 2 * SETTING.seq_length * 4 * 2  # cos and sin of 4 dims in bf16
    assert [one.shared_bytes for one in blocks] == [angles, 0, 0, 0]
    assert not [
        one for one in total(traces) if isinstance(one, Stream) and one.name in ("cos", "sin", "outer", "arange")
    ]


def test_all_gathers_are_hidden_behind_products() -> None:
    work = traced("llama", replace(SETTING, tensor=2, sequence=True))[2].backward
    kinds = {(one.kind, one.hidden) for one in work if isinstance(one, Collective)}
    assert ("reduce_scatter", True) in kinds and ("all_reduce", False) in kinds


def test_evaluation_has_no_backward_pass() -> None:
    for one in traced("llama", replace(SETTING, trains=False)):
        assert not one.backward and not one.in_backward[:-1] and one.kept_bytes == one.output_bytes


def leaves_nothing() -> None:
    torch.manual_seed(5)
    random, dtype = torch.get_rng_state(), torch.get_default_dtype()
    groups = dict(c10d._world.pg_group_ranks)
    for device_type in ("cpu", "cuda"):
        setting = replace(SETTING, device_type=device_type, recompute="full", tensor=2, sequence=True)
        trace("llama", setting, {})
        with pytest.raises(ZeroDivisionError):
            trace_layers(lambda ctx: 1 / 0, setting)  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_default_dtype() == dtype and not is_replaying()
    assert dict(c10d._world.pg_group_ranks) == groups
    assert type(torch.ones(2) + 1) is torch.Tensor
    assert type(index_of_runs((range(3), range(5, 6)), torch.device("cpu"))) is torch.Tensor


def test_nothing_of_the_process_is_changed() -> None:
    run_alone(leaves_nothing)


def seconds_of_a_trace(case: str) -> float:
    trace(case, SETTING, {})
    begun_s = time.process_time()
    trace(case, SETTING, {})
    return time.process_time() - begun_s


def test_a_trace_takes_little_time() -> None:
    """Five layers differ; the bound is loose, because other processes share the caches."""
    assert run_alone(seconds_of_a_trace, "llama") < 1.0
