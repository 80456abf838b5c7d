"""Directories with the names of the hub come back bit by bit, in each dtype and in a mixture; transformers loads them.

`make test` has a case of each way in which weights are stored, the sweep has all cases.
"""

from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from megatron_ds.config import ExportSection, ModelSection
from megatron_ds.engine import Engine
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import LoadedModel
from megatron_ds.runtime.export import export_live
from tests.hf.models import DTYPES, Tensors, hashes
from tests.parity.cases import Recipe
from tests.parity.label_head_cases import LABEL_HEAD_CASES
from tests.parity.ours import Place, engine_on
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_alone, run_grid

SAMPLE = (
    "gpt2",  # transposed, and fused in blocks
    "gpt_bigcode-all-heads",  # fused by head
    "codegen-partial",  # fused in four blocks of heads
    "phi3-plain",  # gate and up fused
    "stablelm-parallel-normed-heads",  # a tensor for each head
    "apertus-bias",  # numbers without a dim, which are no parameters
    "gptj-partial",  # a bias of the logits
    "mixtral-four-experts",  # a tensor for each expert
    "gpt_oss-yarn",  # all experts in one tensor
    "bert-pretraining",  # several heads
    "t5-gated",  # two stacks
)
MIXED = "mixed"


def in_dtype(tensors: Tensors, name: str) -> Tensors:
    """The tensors in one dtype, or in one after the other in alphabetical order."""
    dtypes = cycle(DTYPES.values()) if name == MIXED else cycle([DTYPES[name]])
    return {one: tensors[one].to(dtype) for one, dtype in zip(sorted(tensors), dtypes)}


def differences(source: Path, target: Path) -> Iterator[str]:
    """What is not the same in a rewritten directory, and what transformers finds wrong with it."""
    expected, found = hashes(source), hashes(target)
    yield from (
        f"{name} is {found.get(name)}, not {expected.get(name)}"
        for name in expected | found
        if expected.get(name) != found.get(name)
    )
    model = read_model(target)
    _, info = getattr(transformers, model.architecture).from_pretrained(
        target, output_loading_info=True, **model.family.load_options(model.core)
    )
    yield from (
        f"{kind}: {info[kind]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    )


def rewritten(cases: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, list[str]]:
    """Differences of the directories that have some, by case and dtype."""
    transformers.logging.disable_progress_bar()
    wrong = {}
    for case, config in cases.items():
        make_model(config).save_pretrained(folder / case)
        tensors = load_file(folder / case / "model.safetensors")
        for dtype in (*DTYPES, MIXED):
            save_file(in_dtype(tensors, dtype), folder / case / "model.safetensors", metadata={"format": "pt"})
            rewrite(folder / case, folder / f"{case}-{dtype}")
            wrong[f"{case} in {dtype}"] = list(differences(folder / case, folder / f"{case}-{dtype}"))
    return {name: found for name, found in wrong.items() if found}


def _damaged(folder: Path) -> list[str]:
    """Differences of a directory that lost one tensor, has one too many, and has another value in a third."""
    transformers.logging.disable_progress_bar()
    make_model(ALL_CONFIGS["llama"]).save_pretrained(folder / "source")
    rewrite(folder / "source", folder / "target")
    tensors = load_file(folder / "target" / "model.safetensors")
    tensors["model.layers.9.extra"] = tensors.pop("model.norm.weight").clone()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "target" / "model.safetensors", metadata={"format": "pt"})
    return list(differences(folder / "source", folder / "target"))


def test_damage_is_seen(tmp_path: Path) -> None:
    found = run_alone(_damaged, tmp_path)
    named = ("lm_head.weight is", "model.layers.9.extra is", "model.norm.weight is", "missing_keys", "unexpected_keys")
    assert len(found) == len(named)
    assert all(any(line.startswith(name) for line in found) for name in named), found


def _export_from_ranks(grid: Grid, source: Path, target: Path, place: Place) -> None:
    engine, model = engine_on(grid, source, place, Recipe())
    assert isinstance(engine, Engine)
    export_live(engine, LoadedModel(model, ModelSection(path=str(source))), ExportSection(path=str(target)), "fp32")


def _save(case: str, directory: Path) -> None:
    make_model(ALL_CONFIGS[case]).save_pretrained(directory)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("stablelm-tied-two-kv-heads", Place(4, 1, 1, 1)),  # two ranks hold the same key head
        pytest.param("apertus-bias", Place(2, 2, 1, 1, True), marks=pytest.mark.sweep),
        pytest.param("codegen-tied-twelve-heads", Place(2, 1, 2, 3), marks=pytest.mark.sweep),
        pytest.param("cohere-normed-two-kv-heads", Place(4, 1, 1, 1), marks=pytest.mark.sweep),
        pytest.param("gpt_bigcode-one-kv-head", Place(2, 1, 1, 1), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_ranks_write_what_they_read(case: str, place: Place, tmp_path: Path) -> None:
    run_alone(_save, case, tmp_path / "source")
    run_grid(_export_from_ranks, place.layout, tmp_path / "source", tmp_path / "target", place)
    assert hashes(tmp_path / "target") == hashes(tmp_path / "source")


def test_the_sample_comes_back(tmp_path: Path) -> None:
    assert run_alone(rewritten, {case: ALL_CONFIGS[case] for case in SAMPLE}, tmp_path, timeout_s=120.0) == {}


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", sorted({config["model_type"] for config in ALL_CONFIGS.values()}))
def test_every_case_comes_back(model_type: str, tmp_path: Path) -> None:
    labelled = {f"labels-{case}": config for case, config in LABEL_HEAD_CASES.items()}
    cases = {case: one for case, one in {**ALL_CONFIGS, **labelled}.items() if one["model_type"] == model_type}
    assert run_alone(rewritten, cases, tmp_path, timeout_s=280.0) == {}
