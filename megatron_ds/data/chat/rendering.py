"""Conversations rendered by the tokenizer's own chat template, and the spans of the assistant's turns in the text.

Templates do not report where a message ends up, unless they mark it with `{% generation %}`. So each conversation is
rendered a second time, with each turn of the assistant replaced by a unique marker. The text between the
markers must also be, in the first rendering, between the turns themselves; otherwise the conversation is refused:
an almost-correct mask would go unnoticed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_ds.data.chat.conversations import ASSISTANT, Conversation, Message
from megatron_ds.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING_END = "</think>"

Span = tuple[int, int]
"""Start and end of a range of characters, end excluded."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans with loss: the assistant's turns, each with the token that ends it."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        path: its directory, for errors.
        last_only: loss on the last of the assistant's turns only.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str, last_only: bool) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"tokenizer {path}: has no chat template, but data.format=chat needs one; put chat_template.jinja into "
                "the directory, or point model.tokenizer at a tokenizer that was made for conversations"
            )
        self._tokenizer, self._path, self._last_only = tokenizer, path, last_only
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        added.update(dict.fromkeys(tokenizer.all_special_tokens, True))
        self._special = tuple(sorted((text for text, special in added.items() if special), key=len, reverse=True))

    @property
    def identity(self) -> str:
        """A text that changes with everything that affects a rendering or its spans; part of cache keys."""
        return f"{self._tokenizer.chat_template!r}\nspecial={self._special!r}\nlast_only={self._last_only}"

    def render(self, conversation: Conversation) -> Rendered:
        """Return text and spans of a conversation.

        Raises:
            DataError: the template refuses it, or the assistant's turns cannot be located.
        """
        self._refuse_control_tokens(conversation)
        text, marked = self._apply(conversation, conversation.messages, mask=True)
        turns = [index for index, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        found = self._spans_of_template(conversation, turns, marked) if marked else None
        if found is None:
            found = self._spans_by_marker(conversation, turns, text) or self._spans_by_prompt(conversation, turns, text)
        if found is None:
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} changes the assistant's messages, so "
                "that they cannot be found in the text; mark them with {% generation %} in the template"
            )
        learned = conversation.learned[-1:] if self._last_only else conversation.learned
        spans = dict(zip(turns, found, strict=True))
        return Rendered(text, tuple(self._with_end(conversation, text, *spans[turn]) for turn in learned))

    def _apply(
        self, conversation: Conversation, messages: Sequence[Message], mask: bool = False, prompt: bool = False
    ) -> tuple[str, Sequence[Span]]:
        """Return the rendering and, if `mask` is set, the spans that the template itself marks, if it does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        mask = mask and _GENERATION.search(template) is not None
        options: dict[str, Any] = {
            **self._tokenizer.special_tokens_map,
            "tools": conversation.tools,
            "chat_template": template,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": mask,
        }
        try:
            found: Any = render_jinja_template([[dict(message) for message in messages]], **options)
        except Exception as error:  # jinja2's, and any error of a template's expressions
            reason = " ".join(str(error).split())
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} refuses it: {reason}"
            ) from error
        (text,), spans = found
        return text, [(int(start), int(end)) for start, end in spans[0]] if mask else []

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            for token in self._special:
                if token in message["content"]:
                    raise DataError(
                        f"data: {conversation.where}: message {index} holds {token!r}, which the tokenizer takes for a "
                        "control token; remove it from the text"
                    )

    def _spans_of_template(
        self, conversation: Conversation, turns: Sequence[int], marked: Sequence[Span]
    ) -> Sequence[Span]:
        if len(marked) != len(turns):
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} marks {len(marked)} turns with "
                f"{{% generation %}}, and the assistant has {len(turns)}; mend the template"
            )
        return marked

    def _spans_by_marker(self, conversation: Conversation, turns: Sequence[int], text: str) -> Sequence[Span] | None:
        pieces = self._pieces(conversation, turns)
        return _between(pieces, [conversation.messages[turn]["content"] for turn in turns], text) if pieces else None

    def _spans_by_prompt(self, conversation: Conversation, turns: Sequence[int], text: str) -> Sequence[Span] | None:
        """Return the spans where the template renders the last turn differently: it is all that follows its prompt.

        Templates do so for reasoning, which they keep in the last turn only.
        """
        last = len(conversation.messages) - 1
        if turns[-1] != last:
            return None
        prompt, _ = self._apply(conversation, conversation.messages[:last], prompt=True)
        pieces = self._pieces(conversation, turns)
        if not text.startswith(prompt) or not pieces:
            return None
        before = [*pieces[: len(turns) - 1], None]
        contents = [conversation.messages[turn]["content"] for turn in turns[:-1]]
        earlier = _between(before, contents, prompt) if contents else []
        if earlier is None:
            return None
        tail = prompt[earlier[-1][1] :] if earlier else prompt
        if not pieces[len(turns) - 1].startswith(tail):
            return None
        end = self._end_of_turn(text, len(prompt))
        return [*earlier, (len(prompt), end)] if end is not None else None

    def _pieces(self, conversation: Conversation, turns: Sequence[int]) -> list[str]:
        """Return the text before, between and after the assistant's turns; nothing if the template drops a turn."""
        everything = "".join(message["content"] for message in conversation.messages)
        stem = next(stem for stem in (f"assistantturn{number}x" for number in count()) if stem not in everything)
        messages = list(conversation.messages)
        for number, turn in enumerate(turns):
            messages[turn] = {**messages[turn], "content": f"{stem}{number}z"}
        rendered, _ = self._apply(conversation, messages)
        parts = re.split(f"{stem}(\\d+)z", rendered)
        return parts[::2] if parts[1::2] == [str(number) for number in range(len(turns))] else []

    def _end_of_turn(self, text: str, start: int) -> int | None:
        """Return the start of the first control token after `start`."""
        places = [place for token in self._special if (place := text.find(token, start)) >= 0]
        return min(places, default=None)

    def _with_end(self, conversation: Conversation, text: str, start: int, end: int) -> Span:
        """Return the span extended by the control token that ends the turn."""
        if any(text.endswith(token, start, end) for token in self._special):
            return start, end
        after = end + len(text[end:]) - len(text[end:].lstrip())
        for token in self._special:
            if text.startswith(token, after):
                return start, after + len(token)
        raise DataError(
            f"data: {conversation.where}: the chat template of {self._path} ends the assistant's turn with "
            f"{text[end : end + 12]!r}, which is no control token: the trained model would not know when to stop; "
            "let the template end the turn with eos_token"
        )


def _between(pieces: Sequence[str | None], contents: Sequence[str], text: str) -> list[Span] | None:
    """Return the spans of the contents in a text that consists of pieces and contents in turn; None if it does not.

    A piece that is None matches anything. A template may strip a content, or keep only the part after its reasoning.
    """
    pattern = re.escape(pieces[0] or "")
    for content, piece in zip(contents, pieces[1:], strict=True):
        forms = "|".join(re.escape(form) for form in _forms(content))
        pattern += f"({forms})" + (".*" if piece is None else re.escape(piece))
    match = re.fullmatch(pattern, text, re.DOTALL)
    return [match.span(group) for group in range(1, len(contents) + 1)] if match else None


def _forms(content: str) -> list[str]:
    """Return the forms that templates give to a text, the longest first."""
    answer = content.split(_REASONING_END)[-1]
    forms = {form for one in (content, answer) for form in (one, one.strip(), one.lstrip(), one.rstrip())}
    forms |= {one.strip("\n") for one in (content, answer)} | {one.lstrip("\n") for one in (content, answer)}
    return sorted((form for form in forms if form), key=len, reverse=True)
