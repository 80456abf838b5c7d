"""Our model as a model of lm-eval. Imports the optional package `lm-eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.template import Template, TemplateRefusal
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.evaluation.continuation import Continuer
from megatron_ds.evaluation.scorer import Request, Scorer
from megatron_ds.generation import Sampling

MAX_NEW_TOKENS = 256  # as in lm-eval's `hf` model, where a task does not say
_NO_EFFECT: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}
"""Further options of generation, and the values with which they change nothing."""


class MegatronLM(TemplateLM):
    """A model whose likelihoods all ranks compute. Texts become ids as in lm-eval's `hf` model.

    Args:
        scorer, continuer: on rank 0.
        tokenizer: that of the model.
        max_length: number of ids that a row may have.
        has_decoder: the model is an encoder-decoder, whose encoder gets the context.
    """

    def __init__(
        self,
        scorer: Scorer,
        continuer: Continuer,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        has_decoder: bool,
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._scorer, self._continuer = scorer, continuer
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
        """Return a conversation as the tokenizer's chat template writes it.

        Raises:
            DataError: the template refuses the conversation.
            ConfigError: it takes more time, memory or text than one conversation may.
        """
        try:
            text, _ = self._template.render(
                chat_history, None, prompt=add_generation_prompt, unfinished=not add_generation_prompt
            )
        except TemplateRefusal as problem:
            raise DataError(
                f"--tasks: the chat template of {self.tokenizer.name_or_path} refuses a conversation ({problem}); try "
                "without --chat-template"
            ) from problem
        return text

    @cached_property
    def _template(self) -> Template:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"tokenizer {self.tokenizer.name_or_path}: has no chat template; try without --chat-template"
            )
        return Template(self.tokenizer, str(self.tokenizer.name_or_path), date.today().isoformat())

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
        """Return what the model writes after each context, up to the texts that end it.

        Raises:
            ConfigError: a task asks for another way of choosing tokens than greedy or a draw.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        found = [""] * len(requests)
        for indices in groups.values():
            contexts = [str(requests[index].args[0]) for index in indices]
            for index, text in zip(indices, self._generate(contexts, requests[indices[0]].args[1])):
                found[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return found

    def _generate(self, contexts: Sequence[str], wanted: dict[str, Any]) -> list[str]:
        """Return the texts after some contexts, for which a task wants the same."""
        options = normalize_gen_kwargs(wanted, MAX_NEW_TOKENS)
        end = str(self.tokenizer.decode(self.eot_token_id))
        stop = handle_stop_sequences(options.pop("until", None), eos=end)
        max_new_tokens = int(options.pop("max_gen_toks"))
        sampling = _sampling(dict(options))
        room = self.max_length if self.backend == "seq2seq" else self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"--tasks: a task asks for {max_new_tokens} new tokens, and the model has {self.max_length} positions; "
                "choose another task"
            )
        prompts = [self._prompt(context)[-room:] for context in contexts]
        texts = self._continuer.texts(prompts, max_new_tokens, [one for one in stop if one], sampling)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is continued, unless it has its first special token already."""
        begins = self.backend == "causal" and has_bos_prefix(text, self.tokenizer.bos_token)
        return list(self.tokenizer.encode(text, **({"add_special_tokens": False} if begins else {})))


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return the choice of tokens that a task asks for, in transformers' words.

    Raises:
        ConfigError: an option has no counterpart here.
    """
    draws = bool(options.pop("do_sample", False))
    temperature = float(options.pop("temperature", 1.0) or 1.0)
    top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
    for name, value in options.items():
        if _NO_EFFECT.get(name) != value:
            raise ConfigError(f"--tasks: a task asks for {name}={value}, which is not supported; choose another task")
    return Sampling(temperature, top_k or None, top_p) if draws else Sampling()
