"""The exported directory: whole or not there, complete, and loaded by transformers without a word."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.export import DirectoryExport, copy_tokenizer, exporting
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.weight_files import ShardWriter, open_directory, parse_size
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.sequential import HeadSpec
from megatron_ds.parallel.grid import Axis
from megatron_ds.runtime.export import check_export, fits_in, reference_outputs
from tests.hf.models import declarations, export, gathered, hashes
from tests.ranks import run_alone

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def weights_of(saved: Path, case: str, dtype: str = "float32") -> HFWeights:
    directory = saved / case / dtype
    return HFWeights(directory, read_model(directory))


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        ("1.5MB", 1_500_000),
        ("20KB", 20_000),
        ("2TB", 2 * 10**12),
        ("1GiB", 2**30),
        ("1TiB", 2**40),
        ("3KiB", 3072),
        ("100B", 100),
        ("500mb", 5 * 10**8),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "1e3MB", "5 G B", "5GB 3MB", "0.1B", "5.GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConversionError) as caught:
        parse_size(text)
    assert str(caught.value) == f"max_shard_size={text!r} is not a size; write for example 5GB or 500MB"


def test_every_size_of_the_run_file_is_understood() -> None:
    from megatron_ds.config import ExportSection

    for unit in ("B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", " GB"):
        assert parse_size(ExportSection(path="x", max_shard_size=f"2.5{unit}").max_shard_size) > 0


def test_shards_and_index(saved: Path, tmp_path: Path) -> None:
    export(weights_of(saved, "llama"), tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert set(index) == {"metadata", "weight_map"}
    total_size = total_parameters = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        total_size += size
        total_parameters += sum(tensor.numel() for tensor in tensors.values())
    assert index["metadata"] == {"total_parameters": total_parameters, "total_size": total_size}
    assert len(index["weight_map"]) == len(hashes(saved / "llama" / "float32"))


def test_one_file_has_no_index(saved: Path, tmp_path: Path) -> None:
    export(weights_of(saved, "gpt2"), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        MARK,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_tensor_may_change_after_it_was_added(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**6, ["first", "transposed", "last", "never"])
    live = torch.arange(6.0)
    writer.add("first", live)
    writer.add("transposed", live.reshape(2, 3).t())
    live.fill_(-1.0)
    writer.add("last", live[2:4])
    writer.finish()
    source = open_directory(tmp_path)
    assert torch.equal(source.tensor("first"), torch.arange(6.0))
    assert torch.equal(source.tensor("transposed"), torch.arange(6.0).reshape(2, 3).t())
    assert source.tensor("last").tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_live_parameters_may_change_or_be_freed_while_exporting(case: str, saved: Path, tmp_path: Path) -> None:
    """As under ZeRO-3, which lets go of a gathered parameter once it was handed out."""
    export(weights_of(saved, case), tmp_path / "out", after_each=lambda name, tensor: tensor.zero_())
    assert hashes(tmp_path / "out") == hashes(saved / case / "float32")


def test_room_for_the_header_is_enough_for_long_names_and_large_tensors(tmp_path: Path) -> None:
    """Blanks fill the rest; readers of the format skip them."""
    names = [f"model.layers.{number}." + 'ä"' * 40 for number in range(50)]
    writer = ShardWriter(tmp_path, 10**6, names)
    for name in names:
        writer.add(name, torch.zeros(0, 10**9, 10**9) if name == names[0] else torch.zeros(1, 1, 1, 1))
    writer.finish()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert set(handle.keys()) == set(names)
        assert handle.get_tensor(names[0]).shape == (0, 10**9, 10**9)
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 64 == 0 and len(content) == start + 49 * 4


# ---- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype: str, saved: Path, tmp_path: Path) -> None:
    export(weights_of(saved, "qwen2"), tmp_path / "out", dtype=dtype)
    source, before = open_directory(tmp_path / "out"), open_directory(saved / "qwen2" / "float32")
    for name in source.names:
        assert torch.equal(source.tensor(name), before.tensor(name).to(getattr(torch, dtype))), name
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_in_the_config_is_that_of_the_weights(dtype: str, saved: Path, tmp_path: Path) -> None:
    export(weights_of(saved, "qwen2", dtype), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_value_that_the_dtype_cannot_hold(saved: Path, tmp_path: Path) -> None:
    weights = weights_of(saved, "gpt2")
    with exporting(tmp_path / "out", weights.model, "bfloat16", "5GB") as out:
        out.add("exit.norm.weight", torch.full((32,), 1e5))
        out.add("exit.norm.bias", torch.full((32,), float("inf")))  # was infinite before: not the cast's doing
        with pytest.raises(ConversionError) as caught:
            DirectoryExport(tmp_path / "half", weights.model, "float16", "5GB").add(
                "exit.norm.weight", torch.full((32,), -1e5)
            )
        assert str(caught.value) == (
            "dtype=float16 cannot hold exit.norm.weight, which has a value of size 100000; nearest: bfloat16"
        )
        with pytest.raises(AssertionError, match="added before"):
            out.add("exit.norm.weight", torch.ones(32))
        with pytest.raises(AssertionError, match=r"blocks\.0"):
            out.finish()


# ---- the directory ---------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def fail_while_adding(out: DirectoryExport, add_all: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    raise KeyboardInterrupt


def fail_in_finish(out: DirectoryExport, add_all: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    add_all()
    out.finish(tokenizer_path=_BROKEN)


_BROKEN = "broken-tokenizer"


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fail", [fail_while_adding, fail_in_finish])
def test_failing_export_leaves_everything_as_it_was(
    fail: Callable[..., None], existing: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / _BROKEN).mkdir()
    (tmp_path / _BROKEN / "tokenizer_config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    if existing:
        export(weights_of(saved, "gpt2"), place / "out")
    before = contents(place)
    weights = weights_of(saved, "llama")
    with (
        pytest.raises((ConversionError, OSError, KeyboardInterrupt)),
        exporting(place / "out", weights.model, None, "20KB") as out,
    ):
        specs = declarations(weights)
        fail(out, lambda: [out.add(name, gathered(weights, name, specs[name], 1)) for name in specs], monkeypatch)
    assert contents(place) == before
    assert [file.name for file in place.iterdir()] == ["out"] * existing


@pytest.mark.parametrize("existing", [True, False])
def test_a_finished_export_is_kept_if_it_cannot_be_moved(
    existing: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, original = tmp_path / "out", os.replace
    if existing:
        export(weights_of(saved, "gpt2"), target)
    before = contents(tmp_path)

    def replace(source: Any, destination: Any) -> None:
        if Path(source).name.endswith(".tmp") and Path(destination) == target:
            raise OSError(16, "Device or resource busy")
        original(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    beside = tmp_path / "out.1"
    with pytest.raises(ConversionError, match=f"cannot be replaced .*busy.*; the new files are in {beside}$"):
        export(weights_of(saved, "llama"), target)
    assert hashes(beside) == hashes(saved / "llama" / "float32")
    shutil.rmtree(beside)
    assert contents(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"] * existing


def test_earlier_export_is_replaced_as_a_whole(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    export(weights_of(saved, "llama"), target, max_shard_size="20KB")
    left = DirectoryExport(target, weights_of(saved, "llama").model, None, "5GB").directory  # of a run that was killed
    (left / "rest").touch()
    export(weights_of(saved, "gpt2"), target)
    assert hashes(target) == hashes(saved / "gpt2" / "float32")
    assert sorted(file.name for file in target.iterdir()) == [
        MARK,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [file.name for file in target.parent.iterdir()] == ["out"]


def test_target_may_be_a_link_or_relative(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    export(weights_of(saved, "gpt2"), Path("link"))
    assert (tmp_path / "link").is_symlink()
    assert hashes(tmp_path / "real") == hashes(saved / "gpt2" / "float32")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_of_the_umask(mask: int, saved: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        export(weights_of(saved, "llama"), tmp_path / "out", max_shard_size="20KB")
    finally:
        os.umask(before)
    files = list((tmp_path / "out").iterdir())
    assert len(files) > 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


# ---- tokenizer, templates, generation config -------------------------------------------------------------------------


def make_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, **{letter: number for number, letter in enumerate("abcdefgh ", start=1)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[])), bos_token="<s>", eos_token="<s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    tokenizer.chat_template = {"default": TEMPLATE, "tool": TEMPLATE + "tool"}
    tokenizer.save_pretrained(directory)


def test_tokenizer_and_templates_are_carried(tmp_path: Path) -> None:
    run_alone(make_tokenizer, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "model.safetensors").touch()
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "tokenizer", tmp_path / "out")
    given, taken = contents(tmp_path / "tokenizer"), contents(tmp_path / "out")
    assert "chat_template.jinja" in given and "additional_chat_templates/tool.jinja" in given
    del given["model.safetensors"]
    assert taken.keys() == given.keys()
    config = json.loads(given["tokenizer_config.json"])
    # if these two fail, our rewriting is not needed any more
    assert config["tokenizer_class"] == "TokenizersBackend"
    assert config.pop("extra_special_tokens") == ["<x>", "<y>"]
    changed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>", "<y>"]}
    assert json.loads(taken["tokenizer_config.json"]) == {**config, **changed}
    for name in given.keys() - {"tokenizer_config.json"}:
        assert taken[name] == given[name]


def test_templates_are_files_of_limited_size(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer" / "additional_chat_templates"
    folder.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    os.mkfifo(folder / "pipe.jinja")
    (folder / "endless.jinja").symlink_to("/dev/zero")
    (folder / "tool.jinja").write_text(TEMPLATE)
    copy_tokenizer(tmp_path / "tokenizer", tmp_path / "out")
    assert contents(tmp_path / "out") == {"additional_chat_templates/tool.jinja": TEMPLATE.encode()}
    with (folder / "huge.jinja").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConversionError, match=r"huge.jinja has 1,073,741,824 bytes, more than the"):
        copy_tokenizer(tmp_path / "tokenizer", tmp_path / "out")


def test_template_in_the_tokenizer_config_is_carried_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "out").mkdir()
    content = json.dumps({"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE})
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(content)
    copy_tokenizer(tmp_path / "tokenizer", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == content


def test_generation_config_is_carried_or_made(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    content = '{"do_sample": true, "temperature": 0.7}'
    (tmp_path / "source" / "generation_config.json").write_text(content)
    export(weights_of(saved, "llama"), tmp_path / "out", model_path=tmp_path / "source")
    assert (tmp_path / "out" / "generation_config.json").read_text() == content
    export(weights_of(saved, "llama"), tmp_path / "out", model_path=tmp_path)
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert made["eos_token_id"] == made["bos_token_id"] == 0


# ---- transformers ----------------------------------------------------------------------------------------------------


def model_of(directory: str, attention: str) -> HFModel:
    """What a directory holds, to be compared with an implementation of transformers' attention."""
    model = read_model(directory)
    return replace(model, family=replace(model.family, reference_attention=attention))


def logits_of(directory: str, attention: str, ids: torch.Tensor) -> torch.Tensor:
    return reference_outputs(directory, model_of(directory, attention), {"input_ids": ids})["logits"]


def load_as_a_user(directory: Path, screen: Path) -> dict[str, Any]:
    """Load with transformers, its warnings and bars going to a file; then again through our check."""
    import logging as standard_logging
    import sys

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    sys.stdout = sys.stderr = open(screen, "w", buffering=1)  # noqa: SIM115
    logging.add_handler(standard_logging.StreamHandler(sys.stderr))
    logging.hf_hub_utils = SimpleNamespace(enable_progress_bars=lambda: None, disable_progress_bars=lambda: None)
    logging.set_verbosity_warning()
    logging.enable_progress_bar()  # as in a process where our command line has not turned them off for good

    ids = torch.arange(24).reshape(2, 12)
    ours = logits_of(str(directory), "sdpa", ids)
    after_our_check = screen.read_text()
    restored = logging.is_progress_bar_enabled()
    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = model(ids).logits
    return {
        "class": type(model).__name__,
        "found": {kind: list(names) for kind, names in found.items()},
        "same": torch.equal(ours, logits.float()),
        "ours": after_our_check,
        "screen": screen.read_text(),
        "restored": restored,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "eos": tokenizer.eos_token_id,
        "special": sorted(tokenizer.all_special_tokens),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False),
    }


@pytest.mark.parametrize("case", ["gpt2", "llama-tied-bias", "mistral", "qwen2", "qwen3"])
def test_transformers_loads_it_in_silence(case: str, saved: Path, tmp_path: Path) -> None:
    run_alone(make_tokenizer, tmp_path / "tokenizer")
    weights = weights_of(saved, case)
    export(weights, tmp_path / "out", tensor_size=2, max_shard_size="30KB", tokenizer_path=tmp_path / "tokenizer")
    seen = run_alone(load_as_a_user, tmp_path / "out", tmp_path / "screen")
    assert seen["class"] == weights.model.family.architecture
    assert not any(seen["found"].values()), seen["found"]
    assert seen["same"] and seen["restored"]
    assert seen["ours"] == ""
    assert "warn" not in seen["screen"].lower() and "missing" not in seen["screen"].lower(), seen["screen"]
    assert "Loading weights" in seen["screen"]  # so the silence of our own check above means something
    assert seen["tied"] == weights.model.core.tied
    assert {"<s>", "<x>", "<y>"} <= set(seen["special"])  # for a Qwen2 model, transformers 5 adds Qwen's own
    assert seen["eos"] == 0 and seen["chat"] == "abc"


def check_with(logits: torch.Tensor | None, directory: str, precision: str, dtype: str | None) -> float:
    """`check_export` on one rank whose live model gives these logits."""
    axis = SimpleNamespace(rank=0, size=1, group=None, ranks=(0,))
    grid = SimpleNamespace(rank=0, tensor=axis, replica=axis, world=axis)
    predicted = None if logits is None else {"logits": logits}
    engine: Any = SimpleNamespace(
        grid=grid, device=torch.device("cpu"), head=HeadSpec.per_column("targets"), outputs=lambda columns: predicted
    )
    section: Any = SimpleNamespace(path=directory, dtype=dtype)
    ids = torch.arange(24).reshape(2, 12)
    return check_export(engine, model_of(directory, "sdpa"), section, precision, {"input_ids": ids, "targets": ids})


def outcome(logits: torch.Tensor, directory: str, precision: str, dtype: str | None) -> float | str:
    try:
        return check_with(logits, directory, precision, dtype)
    except RuntimeError as problem:
        return str(problem)


def run_checks(directory: str) -> dict[str, float | str]:
    right = logits_of(directory, "sdpa", torch.arange(24).reshape(2, 12))
    seen = {"right": outcome(right, directory, "fp32", None)}
    for name, wrong in {"off": right * 1.001, "nan": right * float("nan"), "zero": right * 0}.items():
        for precision, dtype in (("fp32", None), ("bf16", None), ("fp32", "bfloat16"), ("bf16", "float32")):
            seen[f"{name} {precision} {dtype}"] = outcome(wrong, directory, precision, dtype)
    return seen


def test_check_of_an_export_finds_what_is_wrong(saved: Path) -> None:
    directory = str(saved / "gpt2" / "float32")
    seen = run_alone(run_checks, directory)
    assert seen.pop("right") == 0.0
    assert seen.pop("off fp32 None") == (
        f"export.path={directory}: transformers' predictions differ from the live model's by 1.00e-03 (relative L2), "
        "more than 1e-05; the export is wrong, please report it"
    )
    for key in ("off bf16 None", "off fp32 bfloat16", "off bf16 float32"):  # within bf16's rounding
        assert seen.pop(key) == pytest.approx(1e-3, rel=1e-2)
    assert len(seen) == 8 and all(isinstance(message, str) for message in seen.values()), seen


def missing_tensor_is_refused(directory: str) -> str:
    try:
        logits_of(directory, "eager", torch.arange(4)[None])
    except ConversionError as problem:
        return str(problem)
    return "loaded"


def test_check_refuses_what_transformers_fills_in(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "gpt2" / "float32" / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / "gpt2" / "float32" / "config.json").read_bytes())
    assert run_alone(missing_tensor_is_refused, str(tmp_path)) == (
        f"{tmp_path}: transformers has missing keys: transformer.h.0.mlp.c_fc.bias"
    )


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [(1e6, "float16", False), (1e6, "bfloat16", True), (6e4, "float16", True), (float("inf"), "float16", True)],
)
def test_a_dtype_that_cannot_hold_a_weight_is_known_before_the_export(value: float, dtype: str, fits: bool) -> None:
    parameters = {"a": torch.ones(3), "b": torch.tensor([0.5, -value])}
    grid = SimpleNamespace(world=Axis())
    engine: Any = SimpleNamespace(
        grid=grid,
        device=torch.device("cpu"),
        local_parameters=lambda: iter(parameters.items()),
        gathered=lambda parameter: nullcontext(),
    )
    assert fits_in(engine, dtype) is fits
