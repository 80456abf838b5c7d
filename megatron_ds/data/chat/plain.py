"""Prompts and completions as plain text, for tokenizers without a chat template, such as those of base models.

The text is the prompt, the completion and eos_token; the tokenizer adds its bos_token as it does to every text.
"""

from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.conversations import Conversation
from megatron_ds.data.chat.rendering import LossOn, Rendered, control_texts, no_template, refuse_control_tokens
from megatron_ds.data.readers.tokenizer import special_id
from megatron_ds.errors import DataError


class PlainTemplate:
    """Rendering without a chat template.

    Args:
        tokenizer: the tokenizer.
        path: its directory, for errors.
        loss_on: `all` = loss on the prompt too.
    """

    date = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str, loss_on: LossOn = "assistant") -> None:
        self._path, self._loss_on = path, loss_on
        self._tokenizer = tokenizer
        self._special = control_texts(tokenizer)
        self._end = str(tokenizer.eos_token)
        # where the tokenizer itself ends each text with eos_token, another one would be learned after it
        self._adds_end = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id

    @property
    def identity(self) -> str:
        """A text that changes with everything that affects a rendering or its spans; part of cache keys."""
        return f"plain text\nspecial={self._special!r}\nend={self._end!r}\nloss_on={self._loss_on}"

    def render(self, conversation: Conversation) -> Rendered:
        """Return text and span of a prompt and its completion.

        Raises:
            DataError: the conversation cannot be written without a template, or the tokenizer has no eos_token, so that
                the trained model would not know when to stop.
        """
        if conversation.plain is None:
            raise DataError(f"data: {conversation.where}: {no_template(self._path)}")
        special_id(self._tokenizer, self._path, "eos_token", "it ends each completion")
        prompt, completion = conversation.plain
        completion = completion.removesuffix(self._end)
        refuse_control_tokens((prompt, completion), self._special, conversation.where)
        text = prompt + completion + ("" if self._adds_end else self._end)
        return Rendered(text, ((0 if self._loss_on == "all" else len(prompt), len(text)),), adds_special_tokens=True)
