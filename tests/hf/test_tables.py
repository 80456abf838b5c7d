"""The tables name exactly the parameters of our models and the tensors of transformers', with their shapes."""

import re
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from megatron_ds.engine.base import weights_of
from megatron_ds.engine.matrix_exchange import Holding, pieces
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.family import Family, Row, renamed
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_mapping import FusedPiece, copy
from megatron_ds.models.sequential import SequentialModel
from tests.parity.cases import CONFIGS
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.muon import NO_MATRICES
from tests.parity.reference import WEIGHTS_AMONG_BUFFERS
from tests.parity.sampling import sampled

OPTIONS: dict[str, dict[str, Any]] = {
    **CONFIGS,
    **FAMILY_CASES,
    **ENCODER_CASES,
    "llama-attention-bias": {**CONFIGS["llama"], "attention_bias": True},
    "llama-mlp-bias": {**CONFIGS["llama"], "mlp_bias": True},
    "llama-head-dim": {**CONFIGS["llama"], "head_dim": 6},
    "qwen3-tied-bias": {**CONFIGS["qwen3"], "attention_bias": True},
}


@cache
def model_of(case: str) -> HFModel:
    return read_model(OPTIONS[case])


@pytest.mark.parametrize("case", sampled(OPTIONS))
def test_table_is_the_model(case: str) -> None:
    model = model_of(case)
    with torch.device("meta"):
        ours = dict(weights_of(SequentialModel(model.core.build_layers())))
    assert set(model.table) == set(ours)
    for name, row in model.table.items():
        assert row.native == name
        assert row.op.native_shape(model.axis_sizes) == ours[name].spec.shape, name
        dims = {split.axis: split.dim for split in ours[name].spec.splits}
        axis = "expert" if row.split == "x" else "tensor"
        assert dims == ({} if row.split is None else {axis: row.op.split_dim(row.split)}), name


@pytest.mark.parametrize("case", sampled(OPTIONS))
def test_table_is_transformers_model(case: str) -> None:
    model = model_of(case)
    with torch.device("meta"):
        theirs: Any = getattr(transformers, model.architecture)(AutoConfig.for_model(**OPTIONS[case]))
        if model.family.tied_by_bytes and not model.core.tied:
            theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())  # transformers 5 ties every T5
    named = dict(theirs.named_parameters())  # a tied head is one, and by XLM-RoBERTa's code the first
    named |= {name: buffer for name, buffer in theirs.named_buffers() if name.endswith(WEIGHTS_AMONG_BUFFERS)}
    is_renamed = (
        any(stack.moe is not None for stack in model.core.stacks.values())
        or model.family.passes_through
        or model.family.other_rows
    )
    on_disk = revert_weight_conversion(theirs, named) if is_renamed else named
    passed = [name for name in on_disk if any(re.search(pattern, name) for pattern in model.family.passes_through)]
    assert bool(passed) == bool(model.family.passes_through)
    on_disk = {name: tensor for name, tensor in on_disk.items() if name not in passed}
    expected = {model.family.aliases.get(name, name): tuple(tensor.shape) for name, tensor in on_disk.items()}
    if model.family.model_type == "gpt_neox" and "lm_head.weight" in expected:
        expected["embed_out.weight"] = expected.pop("lm_head.weight")  # its name on disk
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for row in model.table.values():
        for at, name in enumerate(row.names):
            shapes.setdefault(name, set()).add(row.op.source_shape(at, model.axis_sizes))
    assert shapes == {name: {shape} for name, shape in expected.items()}


@pytest.mark.parametrize("case", sampled(OPTIONS))
def test_every_piece_stands_in_one_row(case: str) -> None:
    """A whole tensor once, a fused one once a piece: nothing is read twice, nothing is left out."""
    model, pieces = model_of(case), Counter[tuple[str, int]]()
    of_one: dict[str, set[int]] = {}
    for row in model.table.values():
        for name, source in zip(row.names, row.op.sources):
            piece = source.piece if isinstance(source, FusedPiece) else 0
            pieces[name, piece] += 1
            of_one.setdefault(name, set()).add(source.pattern.count("|") + 1 if isinstance(source, FusedPiece) else 1)
    assert set(pieces.values()) == {1}
    assert all(len(counts) == 1 for counts in of_one.values()), "a tensor is fused in two ways"
    assert all((name, piece) in pieces for name, counts in of_one.items() for piece in range(max(counts)))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_buffers_are_ignored_by_their_whole_names(family: Family) -> None:
    """What is ignored can't be a weight, and a longer name that ends or begins alike is not ignored."""
    names = {
        name
        for case, config in OPTIONS.items()
        if config["model_type"] == family.model_type
        for name in _names(model_of(case))
    }
    assert names
    for pattern in family.ignored:
        assert pattern.startswith("^") and pattern.endswith("$")
        assert not [name for name in names if re.search(pattern, name)]


@pytest.mark.parametrize(
    ("family", "buffer"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.11.attn.masked_bias"),
        ("gptj", "transformer.h.3.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.5.attention.bias"),
        ("gpt_neox", "layers.5.attention.rotary_emb.inv_freq"),
        ("llama", "model.layers.31.self_attn.rotary_emb.inv_freq"),
        ("qwen2", "rotary_emb.inv_freq"),
        ("opt", "decoder.version"),
        ("falcon", "transformer.h.7.self_attention.rotary_emb.inv_freq"),
    ],
)
def test_buffers_of_old_checkpoints_are_ignored(family: str, buffer: str) -> None:
    assert any(re.search(pattern, buffer) for pattern in FAMILIES[family].ignored)
    assert not any(re.search(pattern, f"other.{buffer}") for pattern in FAMILIES[family].ignored)


@pytest.mark.parametrize("case", sampled(OPTIONS))
def test_what_a_class_leaves_unread_is_a_weight_of_another(case: str) -> None:
    """And never its own. Base models' tables have no prefix."""
    model = model_of(case)
    prefix, unread = model.family.prefix, set(model.family.unused_tensors(model.core))
    family = [model_of(name) for name, config in OPTIONS.items() if _rows_of(config) == _rows_of(OPTIONS[case])]
    whole = {prefix + name.removeprefix(prefix) for other in family for name in _names(other)}
    has_pooler = any("pooler" in name for name in whole)
    assert bool(unread) == (model.architecture.endswith("ForMaskedLM") and has_pooler)
    assert unread <= whole and not unread & _names(model)


def _rows_of(config: dict[str, Any]) -> str:
    """The family that a config's tensors are named by."""
    family = FAMILIES[config["model_type"]]
    return family.same_as or family.model_type


def _names(model: HFModel) -> set[str]:
    return {name for row in model.table.values() for name in row.names}


def test_renamed_replaces_complete_parts_of_names_at_once() -> None:
    """Two names may be exchanged, a longer one is found first, and a part of a part is left as it is."""
    rows = [
        Row("a", ("model.layers.{n}.post_norm.weight", "model.layers.{n}.pre_norm.weight"), copy("h")),
        Row("b", ("model.norm.weight",), copy("h"), copies=("model.norm_copy.weight",), layers=(0,)),
        Row("c", ("model.layers.{n}.attn.o_proj.weight", "model.layers.{n}.attn.o_proj_too.weight"), copy("h")),
    ]
    names = {
        "post_norm": "pre_norm",
        "pre_norm": "post_norm",
        "attn": "attention",
        "attn.o_proj": "attn.dense",
        "norm": "final_norm",
    }
    found = renamed(lambda config: rows, names)(None)
    assert [row.names for row in found] == [
        ("model.layers.{n}.pre_norm.weight", "model.layers.{n}.post_norm.weight"),
        ("model.final_norm.weight",),
        ("model.layers.{n}.attn.dense.weight", "model.layers.{n}.attention.o_proj_too.weight"),
    ]
    assert found[1].copies == ("model.norm_copy.weight",) and found[1].layers == (0,) and found[2].op is rows[2].op


def test_tied_model_has_no_head_and_knows_it_again() -> None:
    model = read_model(CONFIGS["gpt2"])
    assert model.core.tied and "head.weight" not in model.table
    untied = model.with_tied(False)
    assert "head.weight" in untied.table and "head.weight" not in model.table


@pytest.mark.parametrize("case", sampled(OPTIONS))
def test_matrices_are_those_of_transformers_linear_layers(case: str) -> None:
    """Each is one tensor of transformers, a piece of one, or an expert of either; no element of another is in it."""
    model = model_of(case)
    with torch.device("meta"):
        ours = dict(SequentialModel(model.core.build_layers()).named_parameters())
    for name, row in ((name, row) for name, row in model.table.items() if name in ours):
        spec: Any = ours[name].spec
        if spec.matrix_shape is None:
            assert spec.numel == max(spec.shape) or all(re.search(NO_MATRICES, name) for name in row.names), row.names
            continue
        assert not any(re.search(NO_MATRICES, name) for name in row.names), row.names
        native = torch.arange(spec.numel).view(spec.shape)
        found = defaultdict(set)
        for piece in pieces(spec, Holding(0, spec.full_ranges, 0, spec.numel)):
            found[piece.matrix].update(piece.of(native.view(-1)).flatten().tolist())
        expected = []
        for part in row.parts:
            op, own = row.of(part.expert).op, native if part.expert is None else native[part.expert]
            for source in range(len(op.sources)):
                slot = op.slot(source, own, model.axis_sizes)
                expected += slot.unbind(op._order.index("x")) if op is row.op and row.split == "x" else [slot]
        assert sorted(map(sorted, found.values())) == sorted(sorted(one.flatten().tolist()) for one in expected), name
