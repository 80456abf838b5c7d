"""The data format `paragraphs`: a sample is one paragraph of a text file, cut or padded to `data.seq_length`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_ds.columns import INPUT_IDS, TARGETS
from megatron_ds.config.schema_base import Count, Section
from megatron_ds.data import FORMATS, Causal, DataFormat, DatasetRequest, Sample, blank_sample
from megatron_ds.data.readers.tokenizer import load_tokenizer, require_ids_below
from megatron_ds.errors import DataError


class ParagraphOptions(Section):
    """Keys under `data.options`: paragraphs of fewer tokens are left out."""

    min_tokens: Count = 2


class Paragraphs:
    """A `Dataset` of paragraphs, in the order of the files."""

    columns = ("input_ids", "targets")
    target_length = None  # no separate encoder
    ordered = False  # the run shuffles

    def __init__(self, request: DatasetRequest) -> None:
        assert isinstance(request.options, ParagraphOptions) and request.tokenizer_path is not None
        if not isinstance(request.objective, Causal):
            raise DataError("data.format=paragraphs is for decoders; use data.format=text")
        self.seq_length = request.seq_length
        tokenizer = load_tokenizer(request.tokenizer_path)
        texts = [text for source in request.sources for text in _read(source).split("\n\n") if text.strip()]
        tokens = [np.asarray(tokenizer(text)["input_ids"][: self.seq_length + 1]) for text in texts]
        self._tokens = [one for one in tokens if len(one) >= request.options.min_tokens]
        if not self._tokens:
            raise DataError(f"data: {', '.join(request.sources)}: no paragraph of {request.options.min_tokens} tokens")
        require_ids_below(request.vocab_size, max(int(one.max()) for one in self._tokens), request.tokenizer_path)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens: a resumed run checks that its data are the same."""
        return hashlib.sha256(b"".join(one.tobytes() + b"|" for one in self._tokens)).hexdigest()

    def sample(self, index: int) -> Sample:
        """Return `input_ids` and `targets`, (S,) each: a target is the next token, and padding has none."""
        tokens = self._tokens[index % len(self)]
        return {
            "input_ids": INPUT_IDS.pad(tokens[:-1], self.seq_length),
            "targets": TARGETS.pad(tokens[1:], self.seq_length),
        }

    def blank(self) -> Sample:
        """Return a sample without loss, which fills up the last batch of a validation."""
        return blank_sample(self.columns, self.seq_length, None)

    def describe(self) -> str:
        """Return a line for the log."""
        return f"{len(self):,} paragraphs of up to {self.seq_length} tokens"


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as problem:
        raise DataError(f"data: {source}: cannot be read ({problem.strerror})") from problem


FORMATS.register("paragraphs", DataFormat(Paragraphs, options=ParagraphOptions, needs_tokenizer=True))
