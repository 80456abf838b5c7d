"""Write a directory that transformers loads: config, weights, tokenizer, chat template, generation config."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.hf.config import HFModel, config_json
from megatron_ds.hf.io import ShardWriter, parse_size, write_json
from megatron_ds.hf.weights import to_hf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DirectoryExport:
    """Collect whole native parameters, one at a time, into a Hugging Face directory that appears at once.

    Args:
        target: the final directory.
        model: what is exported.
        dtype: of all weights; None = as they come.
        max_shard_size: such as "5GB".
    """

    def __init__(self, target: Path, model: HFModel, dtype: str | None, max_shard_size: str) -> None:
        self.model, self.dtype = model, DTYPES[dtype] if dtype else None
        self._target = target
        self.directory = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self._writer = ShardWriter(self.directory, parse_size(max_shard_size))
        self._dtype_written: torch.dtype | None = None

    def add(self, name: str, whole: Tensor) -> None:
        """Take one native parameter, without padding."""
        whole = whole.to("cpu", self.dtype)
        self._dtype_written = whole.dtype
        for theirs, tensor in to_hf(self.model, name, whole):
            self._writer.add(theirs, tensor)

    def finish(self, model_path: str | None, tokenizer_path: str | None) -> None:
        """Write the small files and put the directory in its place; an earlier export there is replaced."""
        self._writer.finish()
        dtype = str(self._dtype_written).removeprefix("torch.")
        write_json(self.directory / "config.json", config_json(self.model, dtype))
        self._generation_config(model_path)
        copy_tokenizer(tokenizer_path, self.directory)
        old = self._target.with_name(f".{self._target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self._target.exists():
            os.replace(self._target, old)
        os.replace(self.directory, self._target)
        shutil.rmtree(old, ignore_errors=True)

    def _generation_config(self, model_path: str | None) -> None:
        source = Path(model_path) / "generation_config.json" if model_path else None
        if source is not None and source.is_file():
            shutil.copyfile(source, self.directory / source.name)
            return
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(self.model.config).save_pretrained(self.directory)


@contextmanager
def exporting(target: Path, model: HFModel, dtype: str | None, max_shard_size: str) -> Iterator[DirectoryExport]:
    """A `DirectoryExport` whose unfinished files are removed when the block fails."""
    export = DirectoryExport(target, model, dtype, max_shard_size)
    try:
        yield export
    except BaseException:
        shutil.rmtree(export.directory, ignore_errors=True)
        raise


def copy_tokenizer(source: str | None, target: Path) -> None:
    """Copy a tokenizer's files byte for byte, chat templates included."""
    if source is None:
        return
    for name in TOKENIZER_FILES:
        file = Path(source) / name
        if file.is_file():
            shutil.copyfile(file, target / name)
    templates = Path(source) / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
