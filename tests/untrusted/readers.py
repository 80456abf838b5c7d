"""Every reader of files that others may have written, with small files that it reads."""

import gzip
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from megatron_ds.checkpoint.directory import (
    MANIFEST,
    PROGRESS,
    STATE,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
)
from megatron_ds.checkpoint.files import record_file
from megatron_ds.checkpoint.progress import DataPosition, Origin, Progress, decode, encode
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.config import load_run
from megatron_ds.config.deepspeed_json import load_deepspeed
from megatron_ds.config.rope_section import RopeSection
from megatron_ds.config.run_config import HeadSection
from megatron_ds.config.yaml_text import format_yaml, parse_yaml
from megatron_ds.data.indexed.files import IndexedFile, write_index
from megatron_ds.data.prepare.journal import Journal, State
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import find_source
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.text.documents import TextSource
from megatron_ds.data.text.token_cache import cached_tokens
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.generation.prompts import read_prompts
from megatron_ds.hf.config import read_model
from megatron_ds.hf.end_tokens import add_end_ids, known_end_ids
from megatron_ds.hf.export import copy_tokenizer
from megatron_ds.hf.export_mark import MARK, first_change, write_mark
from megatron_ds.hf.missing_config import why_missing
from megatron_ds.hf.peft.config import AdapterConfig, named_base
from megatron_ds.hf.peft.run_sections import read_section
from megatron_ds.hf.sentence_modules import read_pooling
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.monitor import read_metrics
from megatron_ds.monitor.metrics import MetricsWriter, StepMetrics, ValidMetrics
from megatron_ds.monitor.report.page import write_report
from megatron_ds.monitor.trackers import csv as csv_tracker
from megatron_ds.monitor.trackers import ids
from megatron_ds.planner.profiles import find_device
from megatron_ds.training.samples import _step_of
from megatron_ds.untrusted import read_lines, read_text
from megatron_ds.untrusted.limits import RUN_FILE, RUN_LINE
from tests.training.tiny import MODEL, run_mapping, write_tokenizer
from tests.untrusted.limited_process import Reader
from tests.untrusted.mutations import pipe, sparse

MODELS: Mapping[str, dict[str, Any]] = {
    "llama": {
        **MODEL,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
    },
    "t5": {
        "model_type": "t5",
        "d_model": 8,
        "num_layers": 1,
        "num_heads": 1,
        "d_kv": 8,
        "d_ff": 8,
        "vocab_size": 32,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "id2label": {"0": "a", "1": "b"},
        "label2id": {"a": 0, "b": 1},
        "architectures": ["BertForSequenceClassification"],
        "problem_type": "single_label_classification",
    },
    "mixtral": {
        **MODEL,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_aux_loss_coef": 0.01,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {
        **MODEL,
        "model_type": "qwen3",
        "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma2": {
        **MODEL,
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 30.0,
    },
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def _json_files(files: Mapping[str, Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, content in files.items():
            write_json(folder / name, content)

    return make


# ---- models ----------------------------------------------------------------------------------------------------------


def _tensors() -> dict[str, torch.Tensor]:
    return {"model.norm.weight": torch.ones(4), "a": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(2, 0)}


def _weights(folder: Path) -> None:
    save_file(_tensors(), folder / "model.safetensors")


def _indexed(folder: Path) -> None:
    shards = {"a.safetensors": {"a": torch.ones(3)}, "b.safetensors": {"b": torch.ones(2, 2)}}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 28}, "weight_map": weight_map})


def _bin(folder: Path, **options: Any) -> None:
    torch.save({"a": torch.ones(3), "b": torch.arange(8.0).reshape(2, 4).T}, folder / "pytorch_model.bin", **options)


def _read_weights(folder: Path) -> None:
    source = open_directory(folder)
    for name in source.names:
        source.dtype(name), source.nbytes(name), source.tensor(name).sum()


ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {},
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "base_model_name_or_path": "base",
    "use_rslora": False,
    "init_lora_weights": True,
    "trainable_token_indices": [1, 2],
    "bias": "none",
}


def _read_adapter(folder: Path) -> None:
    named_base(folder)
    config = AdapterConfig(folder)
    for name in ("q_proj", "model.layers.0.self_attn.v_proj"):
        if config._config.target_modules and config.matches(name):
            config.adapter(name, 8)
    assert None not in (config.modules_to_save, config.token_rows, config.parameters)


def _base_of(folder: Path) -> None:
    assert isinstance(why_missing(folder / "config.json"), str)


def _read_sections(folder: Path) -> None:
    read_section(folder / "rope.json", RopeSection)
    read_section(folder / "head.json", HeadSection)


SENTENCE_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def _read_end_ids(folder: Path) -> None:
    known_end_ids(read_model(MODELS["llama"]), folder)
    add_end_ids(folder, [3])


def _read_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder / "tokenizer"))("w1 w2")


def _copy_tokenizer(folder: Path) -> None:
    (folder / "copy").mkdir()
    copy_tokenizer(folder / "tokenizer", folder / "copy")


def _marked(folder: Path) -> None:
    export = folder / "export"
    export.mkdir()
    (export / "model.bin").write_bytes(bytes(range(256)))
    (export / "config.json").write_text("{}")
    write_mark(export, Path("/target"))


def _changed(folder: Path) -> str | None:
    return first_change(folder / "export", Path("/target"), thorough=True)


# ---- runs and checkpoints --------------------------------------------------------------------------------------------


def _run_file(folder: Path) -> None:
    text = format_yaml(run_mapping(Path("/corpus"), Path("/out")))
    (folder / "run.yaml").write_text(text.replace("train: [", "train: &t [").replace("valid: [", "valid: &v ["))


def _yaml_as_json(folder: Path) -> None:
    write_json(folder / "run.json", run_mapping(Path("/corpus"), Path("/out")))


DEEPSPEED = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}


def _checkpoint(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "step_00000004"
    (checkpoint / STATE).mkdir(parents=True)
    write_json(checkpoint / "config.json", MODEL)
    _weights(checkpoint)
    save_file({"master/a/0": torch.ones(12)}, checkpoint / STATE / "state-0.safetensors")
    data = DataPosition(samples=8, fingerprint="x", phases=((0, (0.5, 0.5)),), settings={"train": ["a"]})
    progress = Progress(step=4, applied=3, data=data, loss_scale={"scale": 2.0}, trained=("a", "b"), end_ids=(1,))
    (checkpoint / PROGRESS).write_text(encode(progress, Origin(expert=1)))
    write_manifest(checkpoint, {name: record_file(checkpoint / name) for name in _CHECKSUMMED})
    (folder / "checkpoints" / "latest").write_text("step_00000004\n")


_CHECKSUMMED = ("config.json", "model.safetensors", PROGRESS, f"{STATE}/state-0.safetensors")
_STEP = "checkpoints/step_00000004"


def _read_checkpoint(folder: Path) -> None:
    checkpoint = resolve_checkpoint(folder)
    read_manifest(folder / _STEP)
    decode(folder / _STEP / PROGRESS)
    StateReader(checkpoint if checkpoint != folder else folder / _STEP)


def _damage_of_checkpoint(folder: Path) -> str | None:
    checkpoint = folder / _STEP
    if (found := first_damage(checkpoint)) is not None:
        return found
    intact = {name: record_file(checkpoint / name) for name in _CHECKSUMMED}
    return "the manifest is written in other words" if read_manifest(checkpoint) == intact else None


def _metrics(folder: Path) -> None:
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in (1, 2, 3):
            writer.write(StepMetrics(step, 2.5, 1.0, 1e-3, 128, 0.5, 256.0, 0.01, metrics={"accuracy": 0.5}))
        writer.write(ValidMetrics(3, float("nan"), {"perplexity": 3.0}))
    write_json(folder / "data.json", {"sources": [{"name": "a", "samples": 3, "weight": 1.0, "epochs": 0.5}]})
    (folder / "config.yaml").write_text("model: {path: x}\ntrain: {steps: 3}\n")
    saves = [{"step": 2, "bytes": 10**6, "paused_s": 0.5, "path": "x"}] * 2
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "saves.jsonl").write_text("".join(json.dumps(one) + "\n" for one in saves))
    time = "2026-01-31T12:34:56+00:00"
    start = {"event": "start", "time": time, "resumed_after": None, "facts": [["a", "b"]], "environment": {"a": "b"}}
    end = {"event": "end", "time": time, "outcome": "done"}
    (folder / "sessions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (start, end)))


def _profile(folder: Path) -> None:
    rows = [{"m": 8, "n": 8, "k": 8, "dtype": "float32", "us": 1.5}]
    link = {"source": "a", "ring": {"base_us": 0.0, "step_us": 1.0, "gb_s": 2.5}}
    times = [{"kind": "all_reduce", "axis": "tensor", "ranks": 2, "num_bytes": 1024, "us": 20.5}]
    fields = {
        "source": "a",
        "type": "cpu",
        "tflops": {"float32": 0.1},
        "memory_gib": 8,
        "memory_gb_s": 20,
        "products": {"sustained": 1.0, "fill_us": 0, "num_cores": 1, "tiles": [{"m": 1, "n": 1}]},
        "attention": {"forward": 0.5, "backward": 0.5, "fill_keys": 0, "fill_dim": 0},
        "streams": {"share": 1.0, "launch_us": 5},
        "link": {**link, "measured": times},
        "measured_products": rows,
    }
    (folder / "machine.yaml").write_text(format_yaml(fields))


def _continue_metrics(folder: Path) -> None:
    read_metrics(folder / "metrics.jsonl")
    MetricsWriter(folder / "metrics.jsonl", continue_after=2).close()


def _report(folder: Path) -> None:
    write_report(folder)


def _samples(folder: Path) -> None:
    lines = ({"step": step, "prompt": "a", "text": "b", "stopped_by": "length"} for step in (1, 2))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def _read_samples(folder: Path) -> None:
    for line in read_lines(folder / "samples.jsonl", RUN_LINE, DataError):
        _step_of(line)


def _table(folder: Path) -> None:
    (folder / "metrics.csv").write_text("step,loss\n1,2.5\n2,2.25\n")


# ---- data ------------------------------------------------------------------------------------------------------------


def _journal(folder: Path) -> None:
    from dataclasses import asdict

    partial_output = folder / ".corpus.partial"
    partial_output.mkdir()
    (partial_output / "tokens.bin").write_bytes(bytes(40))
    (partial_output / "lengths.bin").write_bytes(bytes(8))
    state = State("key", 1, 40, 2, 20, 5, 10, 100, 0, 2, 1, ["a: b"])
    write_json(partial_output / "journal.json", asdict(state))


def _read_journal(folder: Path) -> None:
    with Journal(str(folder / "corpus"), "key", restart=False):
        pass


def _indexed_tokens(folder: Path) -> None:
    np.arange(20, dtype="<u2").tofile(folder / "corpus.bin")
    write_index(folder / "corpus.idx", np.dtype("<u2"), [5, 7, 8], [0, 2, 3])
    write_json(folder / "corpus.json", {"largest_id": 19, "num_tokens": 20, "num_documents": 3, "key": "x"})


def _read_indexed(folder: Path) -> None:
    file = IndexedFile(str(folder / "corpus"))
    assert file.num_tokens >= 0 and file.num_documents >= 0


def _rows(name: str, content: str | bytes) -> Reader:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def read(folder: Path) -> None:
        assert all(isinstance(one, str) for one in TextSource(str(folder / name)).documents())

    return Reader(make, (name,), read, without=(sparse,))


def _saved_dataset(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    tables = {name: Dataset.from_dict({"text": ["a", "b"]}) for name in ("train", "test")}
    DatasetDict(tables).save_to_disk(folder / "saved")


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "id": [1, 2]}), buffer)
    return buffer.getvalue()


def _token_cache(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer")
    (folder / "text.jsonl").write_text(_LINES.replace("row", "w1"))
    _cached_tokens(folder)


def _cached_tokens(folder: Path) -> str | None:
    """Return a text if the ids are right, from the cache or made again; None = damage was taken."""
    source, tokenizer = TextSource(str(folder / "text.jsonl")), load_tokenizer(str(folder / "tokenizer"))
    found = cached_tokens(source, tokenizer, 0, folder / "cache", with_lengths=True)
    assert found.lengths is not None
    is_right = found.tokens.tolist() == [3, 1, 0] * 4 and found.lengths.tolist() == [3] * 4
    return "the right ids" if is_right else None


def _array_cache(folder: Path) -> None:
    (folder / "cache").mkdir()
    _cached_array(folder)


def _cached_array(folder: Path) -> str | None:
    right = np.arange(100, dtype=np.int64)
    found = cached_arrays(folder / "cache", "key", {"order": "i8 1"}, lambda: {"order": right})
    return "the right array" if np.array_equal(found["order"], right) else None


def _prompts(folder: Path) -> None:
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


_ROWS = [{"text": f"row {number}", "id": number, "tags": ["a", None]} for number in range(4)]
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS)

READERS: Mapping[str, Reader] = {
    **{
        f"config.json of {name}": Reader(_json_files({"config.json": fields}), ("config.json",), read_model)
        for name, fields in MODELS.items()
    },
    "safetensors": Reader(_weights, ("model.safetensors",), _read_weights),
    "index": Reader(_indexed, ("model.safetensors.index.json", "a.safetensors"), _read_weights),
    "bin": Reader(_bin, ("pytorch_model.bin",), _read_weights),
    "bin of torch 1.5": Reader(
        partial(_bin, _use_new_zipfile_serialization=False), ("pytorch_model.bin",), _read_weights
    ),
    "adapters": Reader(_json_files({"adapter_config.json": ADAPTER}), ("adapter_config.json",), _read_adapter),
    "base of adapters": Reader(_json_files({"adapter_config.json": ADAPTER}), ("adapter_config.json",), _base_of),
    "saved sections": Reader(
        _json_files({"rope.json": {"type": "yarn", "factor": 2.0}, "head.json": {"labels": ["a", "b"]}}),
        ("rope.json", "head.json"),
        lambda folder: (
            (read_section(folder / "rope.json", RopeSection), read_section(folder / "head.json", HeadSection))
        ),
    ),
    "sentence modules": Reader(
        _json_files({"modules.json": SENTENCE_MODULES, "1_Pooling/config.json": {"pooling_mode_cls_token": True}}),
        ("modules.json", "1_Pooling/config.json"),
        lambda folder: read_pooling(folder),
    ),
    "generation settings": Reader(
        _json_files({"generation_config.json": {"eos_token_id": [1, 2], "_from_model_config": True}}),
        ("generation_config.json",),
        _read_end_ids,
    ),
    "tokenizer": Reader(
        lambda folder: write_tokenizer(folder / "tokenizer"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        _read_tokenizer,
    ),
    "copied tokenizer": Reader(
        lambda folder: write_tokenizer(folder / "tokenizer"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        _copy_tokenizer,
    ),
    "export mark": Reader(_marked, ("export/config.json", "export/model.bin"), _changed, is_checksummed=True),
    "damaged export mark": Reader(_marked, (f"export/{MARK}",), _changed),
    "run file": Reader(_run_file, ("run.yaml",), lambda folder: load_run(folder / "run.yaml")),
    "run file in JSON": Reader(_yaml_as_json, ("run.json",), lambda folder: load_run(folder / "run.json")),
    "YAML": Reader(
        _run_file, ("run.yaml",), lambda folder: parse_yaml(read_text(folder / "run.yaml", RUN_FILE, ConfigError), "x")
    ),
    "profile of a device": Reader(
        _profile, ("machine.yaml",), lambda folder: find_device(str(folder / "machine.yaml"))
    ),
    "DeepSpeed JSON": Reader(
        _json_files({"ds.json": DEEPSPEED}),
        ("ds.json",),
        lambda folder: load_deepspeed(str(folder / "ds.json")),
    ),
    "checkpoint": Reader(
        _checkpoint,
        (f"{_STEP}/{MANIFEST}", f"{_STEP}/{PROGRESS}", f"{_STEP}/{STATE}/state-0.safetensors", "checkpoints/latest"),
        _read_checkpoint,
    ),
    "files of a checkpoint": Reader(
        _checkpoint,
        tuple(f"{_STEP}/{name}" for name in (MANIFEST, PROGRESS, "config.json", "model.safetensors")),
        _damage_of_checkpoint,
        is_checksummed=True,
    ),
    "metrics": Reader(_metrics, ("metrics.jsonl",), _continue_metrics),
    "report": Reader(
        _metrics, ("metrics.jsonl", "sessions.jsonl", "data.json", "config.yaml", "checkpoints/saves.jsonl"), _report
    ),
    "samples": Reader(_samples, ("samples.jsonl",), _read_samples),
    "tracker ids": Reader(
        _json_files({ids.FILE: {"wandb": {"id": "x", "step": 3, "valid": 2}}}),
        (ids.FILE,),
        lambda folder: ids._read(folder),
    ),
    "tracker table": Reader(_table, ("metrics.csv",), lambda folder: csv_tracker._read(folder / "metrics.csv")),
    "journal": Reader(_journal, (".corpus.partial/journal.json",), _read_journal),
    "indexed tokens": Reader(_indexed_tokens, ("corpus.idx", "corpus.bin"), _read_indexed),
    "JSON lines": _rows("rows.jsonl", _LINES),
    "JSON document": _rows("rows.json", json.dumps(_ROWS, indent=1)),
    "CSV": _rows("rows.csv", 'text,id\nrow 1,1\n"row, 2",2\n'),
    "text": _rows("text.txt", "some words\n"),
    "JSON lines in gzip": _rows("rows.jsonl.gz", gzip.compress(_LINES.encode(), mtime=0)),
    "parquet": _rows("rows.parquet", _parquet()),
    "token cache": Reader(
        _token_cache,
        ("cache/*.bin", "cache/*.lengths", "cache/*.json", "cache/*.checksums"),
        _cached_tokens,
        is_checksummed=True,
        without=(sparse,),
    ),
    "array cache": Reader(
        _array_cache, ("cache/key/order.npy",), _cached_array, is_checksummed=True, without=(sparse,)
    ),
    "prompts": Reader(
        _prompts, ("prompts.jsonl",), lambda folder: read_prompts(folder / "prompts.jsonl"), without=(pipe,)
    ),
    "splits": Reader(
        _saved_dataset,
        ("saved/dataset_dict.json",),
        lambda folder: find_source(Source(str(folder / "saved"), split="train"), plain_text=True),
    ),
}
