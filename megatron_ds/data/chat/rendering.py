"""Conversations rendered by the tokenizer's own chat template, and the spans of the assistant's turns in the text.

Templates do not report where a message ends up, unless they mark it with `{% generation %}`. So each conversation is
rendered a second time with markers in place of its texts (`probe`), and the bounds of the turns follow from what the
template writes between them (`turns`). If that cannot be determined exactly, the conversation is refused: an
almost-correct mask would go unnoticed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_ds.config.data_section import DEFAULT_DATE
from megatron_ds.data.chat.conversations import Conversation
from megatron_ds.data.chat.notes import find_notes
from megatron_ds.data.chat.probe import all_texts
from megatron_ds.data.chat.spans import marked_spans, unmarked_spans
from megatron_ds.data.chat.template import Span, Template
from megatron_ds.data.chat.turns import Known, TurnBounds
from megatron_ds.data.chat.written import Written, write_conversation
from megatron_ds.errors import DataError

LossOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: the text.
        spans: ranges of characters with loss: the assistant's turns, each with the token that ends it.
        notes: what of the conversation is given but has no effect, such as `tools: ..., not shown by the chat template`
            (with `...` in place of a count).
        adds_special_tokens: whether the tokenizer adds its tokens at the beginning and the end of the text.
    """

    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()
    adds_special_tokens: bool = False


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        path: its directory, for errors.
        last_only: loss on the last of the assistant's turns only.
        loss_on: `all` = loss on the whole text, except for turns whose loss is switched off.
        date: ISO date that the template writes as today's.

    Raises:
        DataError: the tokenizer has no chat template, or it cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        last_only: bool,
        loss_on: LossOn = "assistant",
        date: str = DEFAULT_DATE,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(no_template(path))
        self._tokenizer, self._path, self._last_only = tokenizer, path, last_only
        self._loss_on, self._date = loss_on, date
        self._template = Template(tokenizer, path, date)
        self._special = control_texts(tokenizer)
        self._known: dict[str, Known] = {}

    @property
    def identity(self) -> str:
        """A text that changes with everything that affects a rendering or its spans; part of cache keys."""
        options: dict[str, tuple[str, str]] = {"loss_on": (self._loss_on, "assistant")}
        if self._template.writes_date:
            options["date"] = (self._date, DEFAULT_DATE)
        changed = "".join(f"\n{name}={value}" for name, (value, default) in options.items() if value != default)
        return f"{self._tokenizer.chat_template!r}\nspecial={self._special!r}\nlast_only={self._last_only}{changed}"

    @property
    def date(self) -> str | None:
        """The date that the template writes as today's; None = it writes none."""
        return self._date if self._template.writes_date else None

    def render(self, conversation: Conversation) -> Rendered:
        """Return text and spans of a conversation.

        Raises:
            DataError: the template refuses it, or the assistant's turns cannot be located.
        """
        self._refuse_control_tokens(conversation)
        written = write_conversation(conversation, self._template)
        spans = self._spans_of_all(written) if self._loss_on == "all" else self._spans_of_assistant(written)
        return Rendered(written.text, spans, tuple(find_notes(written, self._loss_on == "assistant")))

    def _spans_of_assistant(self, written: Written) -> tuple[Span, ...]:
        learned = written.conversation.learned
        return tuple(self._turns(written, learned[-1:] if self._last_only else learned))

    def _spans_of_all(self, written: Written) -> tuple[Span, ...]:
        """Return all but the turns of the assistant whose loss is switched off."""
        conversation = written.conversation
        switched_off = [index for index, on in conversation.switches.items() if not on]
        others = [index for index in switched_off if index not in conversation.turns]
        if others:
            raise DataError(
                f"data: {conversation.where}: message {others[0]} of the {conversation.messages[others[0]]['role']}"
                " switches its loss off, which is read for the assistant's messages; remove the switch, or set "
                "data.loss_on=assistant"
            )
        off = self._turns(written, switched_off) if switched_off else []
        starts, ends = [0, *(end for _, end in off)], [*(start for start, _ in off), len(written.text)]
        return tuple((start, end) for start, end in zip(starts, ends) if start < end)

    def _turns(self, written: Written, turns: Sequence[int]) -> list[Span]:
        """Return the spans of some of the assistant's turns."""
        if written.source.marks_turns:
            return marked_spans(written, turns, self._special)
        known = self._known.setdefault(written.source.text, Known())
        return unmarked_spans(written, turns, TurnBounds(written.render_part, self._special, known))

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            refuse_control_tokens(all_texts(message), self._special, f"{conversation.where}: message {index}")
        refuse_control_tokens(all_texts(conversation.tools), self._special, f"{conversation.where}: tools")


def control_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a tokenizer's control tokens, the longest first."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    added.update(dict.fromkeys(tokenizer.all_special_tokens, True))
    return tuple(sorted((text for text, special in added.items() if special), key=len, reverse=True))


def refuse_control_tokens(texts: Iterable[str], tokens: Sequence[str], place: str) -> None:
    """Refuse texts that the tokenizer would read as control tokens.

    Raises:
        DataError: a text holds one.
    """
    for text in texts:
        for token in tokens:
            if token in text:
                raise DataError(
                    f"data: {place} holds {token!r}, which the tokenizer takes for a control token; remove it from the "
                    "text"
                )


def no_template(path: str) -> str:
    """Return the error for conversations without a chat template."""
    return (
        f"tokenizer {path}: has no chat template, but data.format=chat needs one; put chat_template.jinja into "
        "the directory, or point model.tokenizer at a tokenizer that was made for conversations, or write the data as "
        "texts 'prompt' and 'completion', which need none"
    )
