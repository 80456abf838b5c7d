"""Models on the hub: what is downloaded of them, by which rank, and when."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from megatron_ds import load_model
from megatron_ds.parallel.grid import Grid, Layout
from tests.hub.local_hub import LocalHub
from tests.hub.models import FIRST, SECOND, write_model
from tests.parity.ours import session_of
from tests.ranks import run_grid

SMALL_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json"]
OF_TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub_models") / "model")


def test_opening_reads_headers_alone(hub: LocalHub, model: Path) -> None:
    commit = hub.publish(model, "org/name")
    loaded = load_model("org/name@main")
    assert loaded.section.path == str(hub.cache / "models--org--name" / "snapshots" / commit)
    assert sorted(hub.downloads()) == sorted(SMALL_FILES + OF_TOKENIZER)
    ranges = [one for one in hub.requests if one.range is not None and "/cdn/" in one.path]
    assert sorted(one.name for one in ranges) == [FIRST, SECOND] and all(
        one.range == "bytes=0-131071" for one in ranges
    )
    hub.forget_requests()
    load_model(f"org/name@{commit}")
    assert hub.requests == []
    weights = loaded.weights
    assert weights is not None
    names = ["embedding.weight", "head.weight"]
    assert [file.name for name in names for file in weights.files_of([name])] == [FIRST, SECOND]
    assert torch.equal(weights.full(names[0]), load_model(model).weights.full(names[0]))  # type: ignore[union-attr]
    assert hub.downloads() == [FIRST]


def test_a_long_header(hub: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(model, "org/name")
    monkeypatch.setattr("megatron_ds.hub.snapshot._FIRST_BYTES", 100)
    loaded = load_model("org/name").weights
    assert loaded is not None and {*loaded.source.names} == {*load_model(model).weights.source.names}  # type: ignore[union-attr]
    assert len([one for one in hub.requests if one.range is not None and "/cdn/" in one.path]) == 4


def test_a_directory_here_wins(hub: LocalHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish({"config.json": b"{}"}, "org/name")
    shutil.copytree(model, tmp_path / "work" / "org" / "name")
    monkeypatch.chdir(tmp_path / "work")
    assert load_model("org/name").section.path == "org/name" and hub.requests == []


def test_formats_that_are_not_downloaded(hub: LocalHub, model: Path, tmp_path: Path) -> None:

    both = tmp_path / "both"
    shutil.copytree(model, both)
    weights = {name: one for file in (FIRST, SECOND) for name, one in load_file(model / file).items()}
    torch.save(weights, both / "pytorch_model.bin")
    (both / "pytorch_model.bin.index.json").write_text("{}")
    for name in ("onnx/config.json", "original/tokenizer.model", "figure.png", "model.gguf"):
        (both / name).parent.mkdir(exist_ok=True)
        (both / name).write_bytes(b"other")
    hub.publish(both, "org/both")
    read_all(load_model("org/both"))
    assert sorted(hub.downloads()) == sorted([*SMALL_FILES, *OF_TOKENIZER, FIRST, SECOND])
    for name in (FIRST, SECOND, "model.safetensors.index.json"):
        (both / name).unlink()
    (both / "pytorch_model.bin.index.json").unlink()
    hub.publish(both, "org/old")
    read_all(load_model("org/old"))
    assert "pytorch_model.bin" in hub.downloads()


def read_all(loaded: Any) -> None:
    for name in loaded.hf.table:
        loaded.weights.full(name)


def test_a_pipeline_stage_downloads_the_file_that_its_layers_are_in(hub: LocalHub, model: Path) -> None:
    """Each rank is given a cache of its own, as on a machine of its own."""
    hub.publish(model, "org/name")
    weights = run_grid(weights_on, Layout(pipeline=2), "org/name", hub.cache.parent / "machine")
    for rank, (kept, other) in enumerate(((FIRST, SECOND), (SECOND, FIRST))):
        (snapshot,) = (hub.cache.parent / f"machine-{rank}" / "models--org--name" / "snapshots").iterdir()
        assert (snapshot / kept).is_file() and not (snapshot / other).exists()
    assert sorted(name for name in hub.downloads() if name in (FIRST, SECOND)) == [FIRST, SECOND]
    expected = run_grid(weights_on, Layout(pipeline=2), str(model), None)[0]
    assert weights[0].keys() == expected.keys() and all(
        torch.equal(weights[0][name], expected[name]) for name in expected
    )


def test_ranks_of_a_machine_download_a_file_once(hub: LocalHub, model: Path) -> None:
    hub.publish(model, "org/name")
    run_grid(weights_on, Layout(tensor=2), "org/name", None)
    downloads = hub.downloads()
    assert [downloads.count(name) for name in (FIRST, SECOND)] == [1, 1]
    headers = [one for one in hub.requests if one.range is not None and "/cdn/" in one.path]
    assert len(headers) == 2


def weights_on(grid: Grid, model: str, cache: Path | None) -> dict[str, torch.Tensor]:
    """The full parameters on rank 0."""
    if cache is not None:
        constants.HF_HUB_CACHE = f"{cache}-{grid.rank}"
    parallel = {"tensor": grid.layout.tensor, "pipeline": grid.layout.pipeline}
    fields = {"parallel": parallel, "deepspeed": {}, "optimizer": None, "micro_batch_size": 1}
    made = session_of(grid).build_engine(load_model(model), **fields, global_batch_size=1)
    return {name: full.clone() for name, full in made.engine.full_parameters() if full is not None}
