"""Continuations of texts: rank 0 is asked for them, and all ranks generate them.

Data ranks continue different prompts; if experts are divided over them, every rank continues all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from megatron_ds.engine import Engine
from megatron_ds.evaluation.shared_calls import SharedCalls
from megatron_ds.generation import Generator, Sampling
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.parallel.consensus import gather_objects

CALL = "continuations"


class Continuer:
    """A model that continues ids on all ranks.

    Args:
        engine: this rank's part of the model.
        model: the model.
        path: the directory of the model, with what ends a text; None = it has none.
        tokenizer: that of the model.
        batch_size: prompts that a rank continues at a time.
        calls: what rank 0 calls this by.
    """

    def __init__(
        self,
        engine: Engine,
        model: HFModel,
        path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        calls: SharedCalls,
    ) -> None:
        self._engine, self._model, self._tokenizer = engine, model, tokenizer
        self._end_ids, self._batch_size, self._calls = list(known_end_ids(model, path)), batch_size, calls
        calls.add(CALL, self._run)

    @cached_property
    def _generator(self) -> Generator:
        engine = self._engine
        return Generator(engine.built, self._model.core, engine.grid, engine.device)

    def texts(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str], sampling: Sampling
    ) -> list[str]:
        """Return what the model writes after each prompt, without special tokens. Called on rank 0.

        A text ends at an end of the model, after `max_new_tokens`, or when it contains a text of `stop`, which is not
        cut off.
        """
        found: list[list[int]] = self._calls.call(CALL, list(prompts), max_new_tokens, list(stop), sampling)
        return [self._text(ids) for ids in found]

    def _run(
        self, prompts: list[list[int]], max_new_tokens: int, stop: list[str], sampling: Sampling
    ) -> list[list[int]]:
        """Generate new ids for all prompts. Collective over the world."""
        grid = self._engine.grid
        mine = range(grid.batch.rank, len(prompts), grid.batch.size)
        if grid.experts_span_data:
            mine = range(len(prompts))
        rows = self._generator.generate(
            [prompts[index] for index in mine],
            max_new_tokens,
            sampling=sampling,
            end_ids=self._end_ids,
            is_stop=lambda ids: any(one in self._text(ids) for one in stop),
            batch_size=self._batch_size,
        )
        found: dict[int, list[int]] = {}
        for part in gather_objects({index: row.ids for index, row in zip(mine, rows)}):
            found |= part
        return [found[index] for index in range(len(prompts))]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
