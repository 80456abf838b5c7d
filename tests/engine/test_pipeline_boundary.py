"""What crosses a boundary is what stages declare: cut anywhere, packed and unpacked, a model computes the same."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_ds
from megatron_ds.engine.pipeline.boundary import Boundary
from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.hf.config import read_model
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.models.sequential import SequentialModel, head_of, input_activations
from tests.parallel.axes import ALONE
from tests.parity.batches import batch_for, ours
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.ranks import run_alone

CASES = {
    name: {**CONFIGS, **ENCODER_CASES}[name]
    for name in ("llama", "gpt2", "bert-pretraining", "roberta-masked", "t5-tied-relu", "t5-gated")
}
OPTIONAL = ("attention_mask", "token_type_ids")


def _run(specs: Any, model: SequentialModel, batch: dict[str, Tensor], cuts: set[int]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, with the wire packed, cut off from its past as between processes, and unpacked at `cuts`."""
    shapes = {name: column.shape for name, column in batch.items()}
    wire, crossings = input_activations(batch, specs[0].columns), []
    for index, (spec, stage) in enumerate(zip(specs, model.order)):
        if index in cuts:
            boundary = Boundary(spec, 1)
            sent = boundary.pack(wire, shapes)
            received = tuple(one.detach().requires_grad_(one.is_floating_point()) for one in sent)
            crossings.append((sent, received))
            wire = boundary.unpack(received, shapes)
            assert set(wire) == {*spec.hidden, *(name for name in spec.columns if name in batch)}
        if index < len(specs) - 1:
            wire = stage(wire)
    loss = model.order[-1](wire, {name: batch[name] for name in head_of(specs).label_columns}).sum()
    loss.backward()
    for sent, received in reversed(crossings):
        floats = [(out, back.grad) for out, back in zip(sent, received) if out.is_floating_point()]
        assert len(floats) == 1, "DeepSpeed runs a backward pass for each"
        floats[0][0].backward(floats[0][1])
    gradients = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), gradients


def _differences(config: dict[str, Any], dropped: tuple[str, ...]) -> dict[str, bool]:
    specs = read_model(config).core.build_layers()
    model = SequentialModel(specs)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_shard(name, spec_of(parameter), 3, ALONE))
    batch = ours(config["model_type"], batch_for(config["model_type"], Recipe(global_batch=4), 0))
    batch = {name: column for name, column in batch.items() if name not in dropped}
    loss, gradients = _run(specs, model, batch, set())
    same = {}
    for parts in range(2, 1 + sum(spec.is_block for spec in specs)):
        cut_loss, cut_gradients = _run(specs, model, batch, set(partition(specs, parts)[1:-1]))
        alike = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(gradients, cut_gradients))
        same[str(parts)] = bool(torch.allclose(loss, cut_loss, rtol=1e-6)) and alike
    return same


@pytest.mark.parametrize("dropped", [(), OPTIONAL], ids=["all columns", "only what must be there"])
@pytest.mark.parametrize("case", CASES)
def test_cut_anywhere_a_model_computes_the_same(case: str, dropped: tuple[str, ...]) -> None:
    same = run_alone(_differences, CASES[case], dropped)
    assert len(same) >= 3 and all(same.values()), same


@pytest.mark.parametrize("case", CASES)
def test_stages_take_no_more_than_they_declare(case: str) -> None:
    """What a later stage declares, all stages before it pass on: nothing appears on the way."""
    specs = read_model(CASES[case]).core.build_layers()
    for before, after in pairwise(specs):
        assert set(after.columns) <= set(before.columns), (before.name, after.name)


def test_a_part_begins_with_a_block_and_has_balanced_work() -> None:
    specs = read_model(ENCODER_CASES["t5-gated"]).core.build_layers()
    for parts in (2, 3, 4):
        bounds = partition(specs, parts)
        assert all(specs[begin].is_block for begin in bounds[1:-1])
        assert bounds[0] == 0 and bounds[-1] == len(specs)
    names = [spec.name for spec in specs[: partition(specs, 2)[1]]]
    assert names[-1] == "encoder.blocks.1" or "decoder.embedding" in names, names


def test_the_engine_knows_no_column_by_name() -> None:
    """What travels is declared by models; an engine that named a mask or an encoder would have it built in."""
    words = r"attention_mask|token_type|input_ids|decoder|encod|next_sentence|targets|hidden"
    for file in (Path(megatron_ds.__file__).parent / "engine").glob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""|#.*', "", file.read_text(encoding="utf-8"))
        assert not re.findall(rf'["\']({words})', code), file.name
