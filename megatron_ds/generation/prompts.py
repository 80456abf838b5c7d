"""Prompts as texts or conversations, and what a model writes after them as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.messages import read_messages
from megatron_ds.data.chat.template import Template, TemplateRefusal
from megatron_ds.data.readers.json_rows import lines, parse_json_line
from megatron_ds.errors import DataError
from megatron_ds.generation.generator import Generator
from megatron_ds.generation.sampling import GREEDY, Sampling

OnText = Callable[[int, str], None]
"""(number of the prompt from 0, the text that was added to it)."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the tokenizer's text for the first bytes of a character
_NEAR = 8  # ids of a prompt that are decoded with those that follow


@dataclass(frozen=True)
class Prompt:
    """A text or a conversation that a model continues.

    Attributes:
        text: a text; of a conversation its last message, for display.
        messages: a conversation that the tokenizer's chat template renders; None = the text is continued as it is.
    """

    text: str
    messages: tuple[dict[str, Any], ...] | None = None

    @classmethod
    def of_user(cls, text: str) -> Prompt:
        """Return a conversation with one message of the user."""
        return cls(text, ({"role": "user", "content": text},))

    @classmethod
    def of_messages(cls, messages: object, where: str) -> Prompt:
        """Return a conversation, in the forms that training data have; `where` names it in errors.

        Raises:
            DataError: it is no sequence of messages.
        """
        read = tuple(dict(one.fields) for one in read_messages(messages, where))
        return cls(str(read[-1].get("content", "")), read)


@dataclass(frozen=True)
class Completion:
    """The text that a model has written after a prompt.

    Attributes:
        prompt: the prompt.
        text: the new text, without special tokens, and without what stopped it.
        ids: the new ids, that of the end included.
        num_prompt_tokens: number of ids of the prompt.
        stopped_by: "end" (an end token of the model), "stop" (a text) or "length".
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    num_prompt_tokens: int
    stopped_by: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSON-lines file whose rows have a `prompt`, a text, or `messages`, a conversation.

    Raises:
        DataError: the file cannot be read, or a row has neither or both.
    """
    found = []
    try:
        with path.open("rb") as stream:
            for line in lines(stream, str(path)):
                where = f"{path}:{line.number}"
                row = parse_json_line(line.raw, where)
                found.append(_prompt_of(row, where))
    except OSError as problem:
        raise DataError(f"prompts {path}: cannot be read ({problem.strerror}); try another path") from problem
    if not found:
        raise DataError(f'prompts {path}: the file is empty; try a line such as {{"prompt": "Once"}}')
    return found


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        if text is not None:
            raise DataError(f"{where}: has both of prompt and messages; keep one")
        raise DataError(f"{where}: has neither prompt nor messages; rename its field with the text to prompt")
    if messages is not None:
        return Prompt.of_messages(messages, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: prompt is a {type(text).__name__}; try a text, or messages for a conversation")
    return Prompt(text)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], path: str) -> list[list[int]]:
    """Return the ids of each prompt, with those that the tokenizer, or the chat template, puts around it.

    Args:
        tokenizer: the model's tokenizer.
        prompts: texts and conversations.
        path: directory of the tokenizer, for errors.

    Raises:
        DataError: there is a conversation, and the tokenizer has no chat template, or its template refuses it.
    """
    template = None
    if any(prompt.messages is not None for prompt in prompts):
        if not tokenizer.chat_template:
            raise DataError(f"tokenizer {path}: has no chat template for a conversation; try without --chat")
        template = Template(tokenizer, path, date.today().isoformat())
    found = []
    for number, prompt in enumerate(prompts, start=1):
        if prompt.messages is None or template is None:
            found.append(list(tokenizer(prompt.text)["input_ids"]))
            continue
        try:
            text, _ = template.render(prompt.messages, None, prompt=True)
        except TemplateRefusal as problem:
            raise DataError(f"prompt {number}: the chat template of {path} refuses it ({problem})") from problem
        found.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found


def added_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that ids add to others, without special tokens.

    Ids alone are decoded as the beginning of a text, where some tokenizers drop a space.

    Args:
        tokenizer: decodes them.
        before: the ids that they follow; the last few are read.
        ids: the new ones.
    """
    near = list(before[-_NEAR:])
    alone, start, whole = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (list(ids), near, [*near, *ids])
    )
    return whole.removeprefix(start) if start and whole.startswith(start) else alone


class TextGenerator:
    """A generator with its tokenizer. Every rank has one, and calls it with the same arguments.

    Args:
        generator: the model.
        tokenizer: its tokenizer.
        path: directory of the tokenizer, for errors.
        end_ids: ids at which a text ends.
    """

    def __init__(
        self, generator: Generator, tokenizer: PreTrainedTokenizerBase, path: str, end_ids: Sequence[int]
    ) -> None:
        self._generator, self._tokenizer = generator, tokenizer
        self._path, self._end_ids = path, list(end_ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Continue prompts; see `Generator.generate`. Collective over the world.

        Args:
            prompts: texts and conversations.
            max_new_tokens, sampling, batch_size: see `Generator.generate`.
            stop: texts before which a completion ends.
            on_text: called with each piece of text as soon as no later token can change it, on every rank.

        Raises:
            ConfigError, DataError: see `encode_prompts` and `Generator.generate`.
        """
        encoded = encode_prompts(self._tokenizer, prompts, self._path)
        is_extended = not self._generator.has_encoder
        texts = [
            _NewText(
                self._tokenizer, self._end_ids, stop, before=ids if is_extended and prompt.messages is None else ()
            )
            for prompt, ids in zip(prompts, encoded)
        ]

        def show(number: int, token: int) -> None:
            texts[number].ids.append(token)
            piece = texts[number].take()
            if piece and on_text is not None:
                on_text(number, piece)

        rows = self._generator.generate(
            encoded,
            max_new_tokens,
            sampling=sampling,
            end_ids=self._end_ids,
            is_stop=(lambda ids: _NewText(self._tokenizer, self._end_ids, stop, ids).is_stopped) if stop else None,
            on_token=show if on_text is not None else None,
            batch_size=batch_size,
        )
        found = []
        for prompt, row, text in zip(prompts, rows, texts):
            text.ids = row.ids
            rest = text.take(is_complete=True)
            if rest and on_text is not None:
                on_text(row.number, rest)
            found.append(Completion(prompt, text.whole, tuple(row.ids), len(row.prompt), row.stopped_by))
        return found


class _NewText:
    """The text of new ids, without special tokens, up to the first of some texts.

    Args:
        tokenizer: decodes the ids.
        end_ids: ids that are no text.
        stop: texts before which it ends.
        ids: the ids so far.
        before: those of the text that they continue.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        stop: Sequence[str],
        ids: Sequence[int] = (),
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._end_ids, self._stop, self._before = tokenizer, end_ids, stop, before
        self.ids = list(ids)
        self._taken = 0

    @property
    def _decoded(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self._end_ids else self.ids
        return added_text(self._tokenizer, self._before, ids)

    @property
    def is_stopped(self) -> bool:
        """One of the texts has been written."""
        return any(stop in self._decoded for stop in self._stop)

    @property
    def whole(self) -> str:
        """The text up to the first of the texts that end it."""
        text = self._decoded
        return text[: min((text.find(stop) for stop in self._stop if stop in text), default=len(text))]

    def take(self, *, is_complete: bool = False) -> str:
        """Return what was added since the last call; until it is complete, without what may still change or be cut."""
        text = self.whole
        if not is_complete:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - max((len(stop) - 1 for stop in self._stop), default=0)]
        piece = text[self._taken :]
        self._taken = max(self._taken, len(text))
        return piece
