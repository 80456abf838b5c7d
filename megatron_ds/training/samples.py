"""Samples of what a model writes while it is trained: `train.samples`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_ds.atomic import replacing
from megatron_ds.config import RunConfig
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.generation import Prompt, Sampling, added_text, check_prompts, encode_prompts, generate_by_rows
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead
from megatron_ds.monitor import archive_name
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.parallel.watchdog import Heartbeat
from megatron_ds.runtime import LoadedModel
from megatron_ds.training.callbacks import Callback, RunState
from megatron_ds.untrusted import parse_record, read_lines
from megatron_ds.untrusted.limits import RUN_LINE
from megatron_ds.untrusted.records import Record

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts of a run as ids.

    Attributes:
        core: the model.
        tokenizer: decodes what it writes.
        texts, ids: of each prompt.
        end_ids: ids at which a text ends.
    """

    core: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    end_ids: Sequence[int]


def prepare_samples(run: RunConfig, model: LoadedModel, taught_ends: Sequence[int]) -> SamplePrompts | None:
    """Read the prompts of a run, and refuse those that its model cannot continue; None = the run has none.

    Args:
        run: the run file.
        model: its model.
        taught_ends: ids that its training data teach as an end.

    Raises:
        ConfigError: the model does not generate text, or there is no tokenizer or no validation.
        DataError: a prompt is too long, or the tokenizer has no chat template for it.
    """
    section, path = run.train.samples, run.model.tokenizer_path
    if section is None:
        return None
    build = model.layers(BuildContext())[-1].build
    has_head = isinstance(build, partial) and isinstance(build.func, type) and issubclass(build.func, LanguageModelHead)
    if model.hf.core.decoding is None or not has_head:
        raise ConfigError(
            f"train.samples continues texts, which this {model.hf.family.model_type} is not trained for; remove it"
        )
    if path is None:
        raise ConfigError("train.samples needs a tokenizer, and model.config brings none; set model.tokenizer")
    tokenizer = load_tokenizer(path)
    prompts = [Prompt.of_user(text) if section.chat else Prompt(text) for text in section.prompts]
    try:
        ids = encode_prompts(tokenizer, prompts, path)
        check_prompts(model.hf.core, ids, section.max_new_tokens)
    except DataError as problem:
        raise DataError(f"train.samples: {problem}") from problem
    ends = dict.fromkeys([*known_end_ids(model.hf, run.model.path), *taught_ends])
    return SamplePrompts(model.hf.core, tokenizer, section.prompts, ids, list(ends))


class SampleWriter(Callback):
    """A callback that lets the model continue the prompts, and shows and writes what it writes.

    Args:
        run: the run file.
        prompts: of the run.
        note: shows a line of text.
        heartbeat: called before samples are drawn, since they may take long.
        continue_after: the last step before a resumed run; None for a new run.
    """

    def __init__(
        self,
        run: RunConfig,
        prompts: SamplePrompts,
        note: Callable[[str], None],
        heartbeat: Heartbeat,
        continue_after: int | None,
    ) -> None:
        assert run.train.samples is not None
        self._section, self._prompts, self._note, self._heartbeat = run.train.samples, prompts, note, heartbeat
        self._file, self._continue_after = Path(run.output) / SAMPLES, continue_after
        self._lines = LineFile(self._file)
        self._sampling = Sampling(run.train.samples.temperature, seed=run.train.seed)

    def on_run_start(self, state: RunState) -> None:
        """Put the file of an earlier run aside, or remove the samples of steps that will be done again."""
        if state.rank != 0 or not self._file.is_file():
            return
        if self._continue_after is None:
            self._file.rename(archive_name(self._file))
            return
        lines = list(read_lines(self._file, RUN_LINE, DataError))
        kept = [line for line in lines if _step_of(line) <= self._continue_after]
        if kept != lines:
            with replacing(self._file) as temporary:
                temporary.write_bytes(b"".join(kept))

    def on_run_end(self, state: RunState) -> None:
        """Close the file."""
        self._lines.close()

    def on_step_end(self, state: RunState) -> None:
        if isinstance(self._section.every, int) and state.step % self._section.every == 0:
            self._sample(state)

    def on_validation_end(self, state: RunState) -> None:
        if not isinstance(self._section.every, int):
            self._sample(state)

    def _sample(self, state: RunState) -> None:
        self._heartbeat(f"samples after step {state.step}", may_take_long=True)
        given = self._prompts
        rows = generate_by_rows(
            state.engine,
            given.core,
            given.ids,
            self._section.max_new_tokens,
            sampling=self._sampling,
            end_ids=given.end_ids,
        )
        if state.rank != 0:
            return
        continues = not self._section.chat and given.core.decoding is not None and given.core.decoding.start_id is None
        texts = [added_text(given.tokenizer, row.prompt if continues else (), row.ids) for row in rows]
        found = [
            {"step": state.step, "prompt": prompt, "text": text, "stopped_by": row.stopped_by}
            for prompt, text, row in zip(given.texts, texts, rows)
        ]
        self._lines.add(*map(_line, found))
        for prompt, text in zip(given.texts, texts):
            self._note(f"sample {json.dumps(prompt, ensure_ascii=False)}: {json.dumps(text, ensure_ascii=False)}")


class _SampleLine(Record):
    step: int


def _step_of(line: bytes) -> float:
    """Return the step of a line of the file; infinity if it is torn or damaged, so that it is not kept."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return parse_record(line.decode("utf-8"), SAMPLES, _SampleLine, RUN_LINE, DataError).step
    except (UnicodeDecodeError, DataError):
        return math.inf


def _line(found: Mapping[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False) + "\n"
