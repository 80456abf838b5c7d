"""Export of directories that transformers loads: config, weights, tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_ds import untrusted
from megatron_ds.cache import scratch_directory
from megatron_ds.dtypes import EXPORT_DTYPES
from megatron_ds.errors import ConversionError, DataError
from megatron_ds.hf.carried_files import copy_carried_files
from megatron_ds.hf.config import HFModel, generation_config, read_json
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.export_target import ExportTarget, removed_on_failure
from megatron_ds.hf.family import Row
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.tokenizer_config import for_both_versions, merge_lists
from megatron_ds.hf.weight_files import ShardWriter, parse_size, write_json
from megatron_ds.hf.weights import HFWeights
from megatron_ds.log import get_logger
from megatron_ds.untrusted import read_bytes
from megatron_ds.untrusted.limits import TOKENIZER, TOKENIZER_SETTINGS

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)

_CHECKED_AT_ONCE = 2**20


class DirectoryExport:
    """Collect full native parameters, one at a time, into a Hugging Face directory that appears at once.

    Until `finish` all files are in a hidden directory next to the target. Use it through `exporting`.

    Args:
        target: the final directory, with what it may replace.
        model: the model to export.
        dtype: of all weights, "float32", "bfloat16" or "float16"; None = the dtype of each parameter.
        max_shard_size: such as "5GB".
        source: reader of the directory that the model is from, whose tensors are passed through; None = it is from no
            directory, and has no such tensors.
        dtypes: Hugging Face name -> dtype, of tensors that `dtype` is not for.
    """

    def __init__(
        self,
        target: str | Path | ExportTarget,
        model: HFModel,
        dtype: str | None,
        max_shard_size: str,
        source: HFWeights | None = None,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        if dtype is not None and dtype not in EXPORT_DTYPES:
            raise ConversionError(f"dtype={dtype} is not one of {', '.join(EXPORT_DTYPES)}")
        assert source is not None or not model.passed_through, "its tensors are passed through from nowhere"
        self.model, self.dtype = model, EXPORT_DTYPES[dtype] if dtype else None
        self._source, self._dtypes = source, dtypes
        max_shard_bytes = parse_size(max_shard_size)
        self._target = ExportTarget.of(target)
        self.directory = self._target.begin()
        names = [name for row in model.table.values() for name in (*row.names, *row.copies)]
        self._writer = ShardWriter(self.directory, max_shard_bytes, [*names, *model.passed_through])
        self._to_hf = ToHF(model, reuse=True)
        self._added: Counter[str] = Counter()
        self._elements_of: Counter[torch.dtype] = Counter()

    def add(self, name: str, full: Tensor, expert: int | None = None) -> None:
        """Write one native parameter, without padding; afterwards the caller may change or free it.

        Args:
            name, full, expert: see `ToHF.add`.

        Raises:
            ConversionError: a value does not fit into the dtype asked for.
        """
        parts = len(self.model.table[name].parts)
        self._added[name] += parts if expert is None else 1
        assert self._added[name] <= parts, f"{name} was added before"
        row = self.model.table[name].of(expert)
        full = full.detach().to("cpu")
        wanted = {theirs: self._dtypes.get(theirs, self._dtype_of(row, full)) for theirs in row.names}
        if len(set(wanted.values())) == 1:
            full = check_fits(name, full, wanted[row.names[0]])
        for theirs, tensor in self._to_hf.add(name, full, expert):
            cast = check_fits(name, tensor, wanted.get(theirs, wanted[row.names[0]]))
            self._elements_of[cast.dtype] += cast.numel()
            self._writer.add(theirs, cast)

    def _dtype_of(self, row: Row, full: Tensor) -> torch.dtype:
        """Return the dtype of the tensors of a parameter that have none of their own."""
        return full.dtype if self.dtype is None or row.keeps_dtype else self.dtype

    def finish(
        self,
        model_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        last: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the other files and move the directory to the target.

        Args:
            model_path: source of generation_config.json, which is made from the config where it is missing, and of the
                `carried_files`; None = no such directory.
            tokenizer_path: source of the tokenizer and chat templates; None = no tokenizer.
            last: called with the directory to add more files before it is moved.

        Raises:
            ConversionError: see `ExportTarget.put`.
        """
        missing = [name for name, row in self.model.table.items() if self._added[name] < len(row.parts)]
        assert not missing, missing
        if self._source is not None and self.model.passed_through:
            for name, tensor in self._source.passed_through():
                self._writer.add(name, tensor)
        self._writer.finish()
        dtype = str(self._elements_of.most_common(1)[0][0]).removeprefix("torch.")
        write_small_files(self.directory, self.model, dtype, model_path, tokenizer_path)
        if last is not None:
            last(self.directory)
        self._target.put(self.directory)


def check_fits(name: str, full: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a parameter to another dtype.

    Raises:
        ConversionError: a finite value becomes infinite.
    """
    cast = full.to(dtype)
    if torch.finfo(cast.dtype).max >= torch.finfo(full.dtype).max:
        return cast
    rows = max(1, _CHECKED_AT_ONCE // max(1, full[0].numel()))
    for given, made in zip(full.split(rows), cast.split(rows)):
        if bool((made.isinf() & given.isfinite()).any()):
            largest = float(given[given.isfinite()].abs().max())
            raise ConversionError(
                f"dtype={str(cast.dtype).removeprefix('torch.')} cannot hold {name}, which has a value of size "
                f"{largest:g}; nearest: bfloat16"
            )
    return cast


def write_small_files(
    directory: Path,
    model: HFModel,
    dtype: str,
    model_path: str | Path | None,
    tokenizer_path: str | Path | None,
) -> None:
    """Write all files but the weights: config, generation config, tokenizer, chat templates and `carried_files`.

    Args:
        directory: existing directory.
        model: the model, with its config.
        dtype: of the weights, such as "bfloat16".
        model_path, tokenizer_path: see `DirectoryExport.finish`.
    """
    write_json(directory / "config.json", config_json(model, dtype))
    _write_generation_config(directory, model, model_path)
    if model_path is not None:
        copy_carried_files(Path(model_path), directory)
    if tokenizer_path is not None:
        copy_tokenizer(Path(tokenizer_path), directory)


def small_files(
    model: HFModel, dtype: str, model_path: str | Path | None, tokenizer_path: str | Path | None
) -> dict[str, bytes]:
    """Return the files that `write_small_files` writes: path in the directory -> content."""
    with tempfile.TemporaryDirectory(prefix="megatron_ds-", dir=scratch_directory()) as place:
        write_small_files(Path(place), model, dtype, model_path, tokenizer_path)
        files = sorted(path for path in Path(place).rglob("*") if path.is_file())
        return {str(path.relative_to(place)): path.read_bytes() for path in files}


def _write_generation_config(directory: Path, model: HFModel, model_path: str | Path | None) -> None:
    """Write the settings of `generate` if the model generates text: the source's file, or those in its config.json."""
    if not model.core.generates:
        return
    source = Path(model_path) if model_path is not None else directory
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", directory / "generation_config.json")
        return
    raw = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    generation_config(model.config, model.core, raw).save_pretrained(directory)


@contextmanager
def exporting(
    target: str | Path | ExportTarget,
    model: HFModel,
    dtype: str | None,
    max_shard_size: str,
    source: HFWeights | None = None,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Iterator[DirectoryExport]:
    """Provide a `DirectoryExport`; its unfinished files are removed if the block fails."""
    export = DirectoryExport(target, model, dtype, max_shard_size, source, dtypes)
    with removed_on_failure(export.directory):
        yield export


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, chat templates included. Only fields that transformers 4 cannot read are changed."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes(read_bytes(source / name, TOKENIZER, ConversionError))
    for file in sorted((source / "additional_chat_templates").glob("*.jinja")):
        if file.is_file():
            place = target / file.parent.name / file.name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(read_bytes(file, TOKENIZER_SETTINGS, ConversionError))
    from megatron_ds.data.readers.sentencepiece_model import sentencepiece_file  # imports transformers

    if sentencepiece_file(source) is not None:
        _add_converted(source, target)
    _write_for_both_versions(target)


def _add_converted(source: Path, target: Path) -> None:
    """Add tokenizer.json to a copied SentencePiece model, for the ids of training in any version of transformers."""
    from megatron_ds.data.readers.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(source))
    except DataError as problem:  # the weights can be exported all the same
        get_logger().warning("%s; its files are copied as they are", problem)
        return
    with tempfile.TemporaryDirectory(prefix="megatron_ds-", dir=scratch_directory()) as place:
        tokenizer.save_pretrained(place)
        shutil.copyfile(Path(place) / "tokenizer.json", target / "tokenizer.json")
        made = read_json(Path(place) / TOKENIZER_CONFIG, limits=TOKENIZER_SETTINGS)
    given = _read_object(target / TOKENIZER_CONFIG)
    about_loading = ("backend", "is_local", "local_files_only")
    kept = {name: value for name, value in made.items() if name not in about_loading}
    write_json(target / TOKENIZER_CONFIG, {**kept, **given})


def _write_for_both_versions(directory: Path) -> None:
    """Rewrite the files of a copied tokenizer that transformers 4 would not read as version 5 does."""
    backend = _read_object(directory / "tokenizer.json")
    for name, change in ((TOKENIZER_CONFIG, for_both_versions), ("special_tokens_map.json", merge_lists)):
        content = _read_object(directory / name)
        try:
            changed = change(content, backend)
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise ConversionError(
                f"tokenizer: {name} or tokenizer.json has not the structure that transformers writes "
                f"({type(problem).__name__}: {problem}); try to save the tokenizer again"
            ) from problem
        if content != changed:
            write_json(directory / name, changed)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a tokenizer; empty if it is missing."""
    if not file.is_file():
        return {}
    content = untrusted.read_json(file, TOKENIZER, ConversionError)
    if not isinstance(content, dict):
        raise ConversionError(f"tokenizer: {file.name} holds a {type(content).__name__}, not a JSON object")
    return content
