"""Our model as a model of lm-eval. Imports the optional package `lm-eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from megatron_ds.errors import ConfigError
from megatron_ds.evaluation.scorer import Request, Scorer


class MegatronLM(TemplateLM):
    """A model whose likelihoods all ranks compute. Texts become ids as in lm-eval's `hf` model.

    Args:
        scorer: on rank 0.
        tokenizer: that of the model.
        max_length: number of ids that a row may have.
        has_decoder: the model is an encoder-decoder, whose encoder gets the context.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, max_length: int, *, has_decoder: bool
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self._scorer = tokenizer, max_length, scorer
        self.backend = "seq2seq" if has_decoder else "causal"

    @property
    def eot_token_id(self) -> int:
        """The id of the end of a text."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("--tasks: the tokenizer has no eos_token; add one to its tokenizer_config.json")
        return int(end)

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text: with the tokenizer's special tokens, unless it begins with the first of them."""
        if add_special_tokens is None and has_bos_prefix(string, str(self.tokenizer.decode(self.prefix_token_id))):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether it is what greedy decoding chooses."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._scorer.score([Request(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), one in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [(one.log_p, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return log p of each text, in windows of the model's length that follow one another."""
        windows = [[Request(*one) for one in self._windows(request.args[0])] for request in requests]
        found = iter(self._scorer.score([one for text in windows for one in text]))
        return [sum(next(found).log_p for _ in text) for text in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(one) for one in rolling]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Refuse: text is not generated yet.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("--tasks: tasks that generate text (generate_until) are not supported; choose others")
