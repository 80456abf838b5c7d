"""A conversation as the model reads it, by the tokenizer's own chat template, and where in it the assistant speaks.

Templates say nothing of where a message ends up, unless they mark it with `{% generation %}`. So each conversation is
rendered a second time with a word that stands nowhere else in the place of each thing the assistant said. What lies
between those words must lie, in the first rendering, between the things themselves; where it does not, the
conversation is refused: a mask that is nearly right cannot be told from one that is right.
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
"""Of characters, from the first to behind the last."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what of it is learned: what the assistant says and the token that ends its turn."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: which has one.
        path: its directory, for errors.
        last_only: learn only the last of the assistant's turns.

    Raises:
        DataError: it has none.
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
        """Changes with whatever changes a rendering or its spans."""
        return f"{self._tokenizer.chat_template!r}\nspecial={self._special!r}\nlast_only={self._last_only}"

    def render(self, conversation: Conversation) -> Rendered:
        """Text and spans.

        Raises:
            DataError: the template refuses it, or does not tell where the assistant speaks.
        """
        self._refuse_control_tokens(conversation)
        text, marked = self._apply(conversation, conversation.messages, mask=True)
        turns = [index for index, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        found = self._by_the_template(conversation, turns, marked) if marked else None
        if found is None:
            found = self._by_markers(conversation, turns, text) or self._by_prefix(conversation, turns, text)
        if found is None:
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} changes what the assistant says, so "
                "that what is to be learned cannot be told from the rest; mark it with {% generation %} in the template"
            )
        learned = conversation.learned[-1:] if self._last_only else conversation.learned
        spans = dict(zip(turns, found, strict=True))
        return Rendered(text, tuple(self._with_end(conversation, text, *spans[turn]) for turn in learned))

    def _apply(
        self, conversation: Conversation, messages: Sequence[Message], mask: bool = False, prompt: bool = False
    ) -> tuple[str, Sequence[Span]]:
        """The rendering, and the spans that the template itself marks, if it does and `mask` asks for them."""
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
        except Exception as error:  # jinja2's, and whatever a template's expressions come to
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

    def _by_the_template(
        self, conversation: Conversation, turns: Sequence[int], marked: Sequence[Span]
    ) -> Sequence[Span]:
        if len(marked) != len(turns):
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} marks {len(marked)} turns with "
                f"{{% generation %}}, and the assistant has {len(turns)}; mend the template"
            )
        return marked

    def _by_markers(self, conversation: Conversation, turns: Sequence[int], text: str) -> Sequence[Span] | None:
        pieces = self._pieces(conversation, turns)
        return _between(pieces, [conversation.messages[turn]["content"] for turn in turns], text) if pieces else None

    def _by_prefix(self, conversation: Conversation, turns: Sequence[int], text: str) -> Sequence[Span] | None:
        """Where the template writes the last turn in another way than the marker: all that follows its prompt.

        So it is with reasoning, which templates keep in the last turn.
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
        """What the template puts before, between and after the assistant's turns; nothing if it drops one."""
        everything = "".join(message["content"] for message in conversation.messages)
        stem = next(stem for stem in (f"assistantturn{number}x" for number in count()) if stem not in everything)
        messages = list(conversation.messages)
        for number, turn in enumerate(turns):
            messages[turn] = {**messages[turn], "content": f"{stem}{number}z"}
        rendered, _ = self._apply(conversation, messages)
        parts = re.split(f"{stem}(\\d+)z", rendered)
        return parts[::2] if parts[1::2] == [str(number) for number in range(len(turns))] else []

    def _end_of_turn(self, text: str, start: int) -> int | None:
        """Where the first control token after `start` begins."""
        places = [place for token in self._special if (place := text.find(token, start)) >= 0]
        return min(places, default=None)

    def _with_end(self, conversation: Conversation, text: str, start: int, end: int) -> Span:
        """The span up to the control token that ends the turn, that token included."""
        if any(text.endswith(token, start, end) for token in self._special):
            return start, end
        after = end + len(text[end:]) - len(text[end:].lstrip())
        for token in self._special:
            if text.startswith(token, after):
                return start, after + len(token)
        raise DataError(
            f"data: {conversation.where}: the chat template of {self._path} ends what the assistant says with "
            f"{text[end : end + 12]!r}, which is no control token: a model trained so would not know when to stop; "
            "let the template end the turn with eos_token"
        )


def _between(pieces: Sequence[str | None], contents: Sequence[str], text: str) -> list[Span] | None:
    """Where the contents stand in a text that is made of them and of pieces around them; None = it is not.

    A piece that is None may be anything. A template may strip a content, or keep only what follows its reasoning.
    """
    pattern = re.escape(pieces[0] or "")
    for content, piece in zip(contents, pieces[1:], strict=True):
        forms = "|".join(re.escape(form) for form in _forms(content))
        pattern += f"({forms})" + (".*" if piece is None else re.escape(piece))
    match = re.fullmatch(pattern, text, re.DOTALL)
    return [match.span(group) for group in range(1, len(contents) + 1)] if match else None


def _forms(content: str) -> list[str]:
    """What templates make of a text, the longest first."""
    answer = content.split(_REASONING_END)[-1]
    forms = {form for one in (content, answer) for form in (one, one.strip(), one.lstrip(), one.rstrip())}
    forms |= {one.strip("\n") for one in (content, answer)} | {one.lstrip("\n") for one in (content, answer)}
    return sorted((form for form in forms if form), key=len, reverse=True)
