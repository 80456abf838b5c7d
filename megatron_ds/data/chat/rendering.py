"""Conversations rendered by the tokenizer's own chat template, and the spans of the assistant's turns in the text.

Templates do not report where a message ends up, unless they mark it with `{% generation %}`. So each conversation is
rendered a second time with markers in place of its texts (`probe`), and the bounds of the turns follow from what the
template writes between them (`turns`). If that cannot be determined exactly, the conversation is refused: an
almost-correct mask would go unnoticed.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from megatron_ds.config.data_section import DEFAULT_DATE
from megatron_ds.data.chat.conversations import Conversation
from megatron_ds.data.chat.messages import ASSISTANT, DEVELOPER, REASONING_KEYS, SYSTEM, TOOL, Message
from megatron_ds.data.chat.probe import Marked, Pieces, Selection, align, all_texts, mark_texts, split_at_markers
from megatron_ds.data.chat.template import Span, Template, TemplateSource, with_arguments_as_text
from megatron_ds.data.chat.turns import TurnBounds, find_turns
from megatron_ds.errors import DataError

LossOn = Literal["assistant", "all"]

_SPOKEN = ("content", *REASONING_KEYS)
_SELECTIONS: Sequence[Selection] = (
    lambda message, key: True,
    lambda message, key: message["role"] == ASSISTANT,  # some templates read what users write
    lambda message, key: message["role"] == ASSISTANT and key in _SPOKEN,
)
_WITHOUT_TEXT = frozenset({"role", "id", "tool_call_id", "type", "index", "timestamp", "created_at", "uuid"})
"""Keys of messages that are not expected in the text."""


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


@dataclass(frozen=True)
class _Located:
    """The texts of a conversation, located in its rendering."""

    marked: Marked
    pieces: Pieces
    spans: list[Span]


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
        self._special = control_tokens(tokenizer)
        self._arguments_as_text: dict[str, bool] = {}
        self._known: dict[str, tuple[dict[str, int | None], dict[tuple[str, bool], int | None]]] = {}

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
        source = self._template.source(conversation.tools)
        messages, (text, marks) = self._written(conversation, source)
        located = self._locate(messages, conversation, source, text)
        spans = self._spans(conversation, text, marks, located, source)
        return Rendered(text, spans, tuple(self._notes(conversation, messages, located, source)))

    def _written(
        self, conversation: Conversation, source: TemplateSource
    ) -> tuple[list[dict[str, Any]], tuple[str, list[Span]]]:
        """Return the messages in the form that the template reads, and their rendering with its marks."""
        messages = [dict(message) for message in conversation.messages]
        for message in messages:
            if message["role"] == DEVELOPER and DEVELOPER not in source.texts:
                message["role"] = SYSTEM
        if not any("tool_calls" in message for message in messages):
            return messages, self._apply(conversation, messages)
        forms = [messages, with_arguments_as_text(messages, partial(json.dumps, ensure_ascii=False))]
        forms += [[_null_content(message) for message in form] for form in forms]
        error: DataError | None = None
        for number, form in enumerate(forms):
            try:
                found = self._apply(conversation, form)
            except DataError as problem:
                error = error or problem
                continue
            if number % 2 or not _writes_python(form, found[0]):
                return form, found
        if error is None:
            error = DataError(
                f"data: {conversation.where}: the chat template of {self._path} writes the arguments of calls in "
                "Python's notation; write them in the template with `| tojson`"
            )
        raise error

    def _apply(self, conversation: Conversation, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        try:
            text, marks = self._template.render(messages, conversation.tools, mask=True)
            return text, [(start, end) for start, end in marks if start < end]
        except Exception as error:  # jinja2's, and any error of a template's expressions
            reason = " ".join(str(error).split())
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} refuses it: {reason}"
            ) from error

    def _render_part(self, tools: Sequence[Any] | None, messages: Sequence[Message], prompt: bool) -> str | None:
        """Return the rendering of a conversation that the template may refuse, such as the first messages of one."""
        try:
            return self._template.render(messages, tools, prompt=prompt)[0]
        except Exception:  # the template refuses it, or cannot handle it
            return None

    def _locate(
        self, messages: Sequence[Message], conversation: Conversation, source: TemplateSource, text: str
    ) -> _Located | None:
        for selected in _SELECTIONS:
            marked = mark_texts(messages, source, selected)
            rendered = self._render_part(conversation.tools, marked.messages, False)
            if rendered is None:
                continue
            pieces = split_at_markers(rendered, marked.stem)
            spans = align(pieces, marked.cores, text)
            if spans is not None:
                return _Located(marked, pieces, spans)
        return None

    def _spans(
        self,
        conversation: Conversation,
        text: str,
        marks: Sequence[Span],
        located: _Located | None,
        source: TemplateSource,
    ) -> tuple[Span, ...]:
        if self._loss_on == "all":
            off = [turn for turn in conversation.turns if not conversation.switches.get(turn, True)]
            others = [index for index, on in conversation.switches.items() if not on and index not in off]
            if others:
                raise DataError(
                    f"data: {conversation.where}: message {others[0]} of the {conversation.messages[others[0]]['role']}"
                    " switches its loss off, which is read for the assistant's messages; remove the switch, or set "
                    "data.loss_on=assistant"
                )
            found = self._turns(conversation, off, text, marks, located, source) if off else []
            return _complement(found, len(text))
        wanted = conversation.learned[-1:] if self._last_only else conversation.learned
        return tuple(self._turns(conversation, wanted, text, marks, located, source))

    def _turns(
        self,
        conversation: Conversation,
        wanted: Sequence[int],
        text: str,
        marks: Sequence[Span],
        located: _Located | None,
        source: TemplateSource,
    ) -> list[Span]:
        """Return the spans of some of the assistant's turns."""
        known = self._known.setdefault(source.text, ({}, {}))
        bounds = TurnBounds(partial(self._render_part, conversation.tools), self._special, *known)
        if source.marks_turns:
            return self._marked_turns(conversation, wanted, text, marks, located)
        places = find_turns(located.pieces, located.marked) if located is not None else {}
        found = []
        for turn in wanted:
            if located is None or turn not in places:
                raise DataError(self._not_found(conversation, turn, located))
            header = bounds.header_length(places[turn][0])
            ends = [(place, end) for place in places[turn] if (end := bounds.end_length(place)) is not None]
            if header is None:
                raise DataError(self._not_found(conversation, turn, located))
            if not ends:
                raise DataError(self._no_end(conversation, places[turn][0].closing))
            place, end = ends[0]
            start, stop = located.spans[place.first][0], located.spans[place.last][1]
            found.append((start - len(place.opening) + header, stop + end))
        return found

    def _not_found(self, conversation: Conversation, turn: int, located: _Located | None) -> str:
        message = conversation.messages[turn]
        if located is not None and not message["content"].strip():
            given = ", ".join(key for key in message if key not in ("role", "content"))
            return (
                f"data: {conversation.where}: the chat template of {self._path} writes nothing of message {turn}, "
                f"which holds {given}; use a template that writes it, or switch off its loss with weight: 0"
            )
        return (
            f"data: {conversation.where}: the chat template of {self._path} changes the assistant's messages, "
            "so that they cannot be found in the text; mark them with {% generation %} in the template"
        )

    def _marked_turns(
        self,
        conversation: Conversation,
        wanted: Sequence[int],
        text: str,
        marks: Sequence[Span],
        located: _Located | None,
    ) -> list[Span]:
        """Return the spans that the template marks as turns of the assistant; a turn may have several."""
        by_turn = _marks_by_turn(conversation.turns, marks, located)
        if by_turn is None:
            raise DataError(
                f"data: {conversation.where}: the chat template of {self._path} marks {len(marks)} turns with "
                f"{{% generation %}}, and the assistant has {len(conversation.turns)}; mend the template"
            )
        found = []
        for turn in wanted:
            first, (start, end) = by_turn[turn][:-1], by_turn[turn][-1]
            begin = first[0][0] if first else start
            found += [*first, (start, self._end_of_mark(conversation, turn, text, begin, end))]
        return found

    def _end_of_mark(self, conversation: Conversation, turn: int, text: str, start: int, end: int) -> int:
        """Return the end of a marked turn; if the mark lacks the control token that ends the turn, that of the token.

        The token must also follow when the conversation ends with the turn: else it begins the next message.
        """
        if text[start:end].rstrip().endswith(self._special):
            return end
        after = end + len(text[end:]) - len(text[end:].lstrip())
        token = next((token for token in self._special if text.startswith(token, after)), None)
        if token is not None:
            until = conversation.messages[: turn + 1]
            try:
                alone, marks = self._template.render(until, conversation.tools, mask=True)
            except Exception:  # a template may refuse the first messages alone
                alone, marks = text, [(start, end)]
            if marks and alone[marks[-1][1] :].lstrip().startswith(token):
                return after + len(token)
        raise DataError(self._no_end(conversation, text[end : end + 12]))

    def _no_end(self, conversation: Conversation, found: str) -> str:
        return (
            f"data: {conversation.where}: the chat template of {self._path} ends the assistant's turn with "
            f"{found[:12]!r}, which is no control token: the trained model would not know when to stop; "
            "let the template end the turn with eos_token"
        )

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        for index, message in enumerate(conversation.messages):
            refuse_control_tokens(all_texts(message), self._special, f"{conversation.where}: message {index}")
        refuse_control_tokens(all_texts(conversation.tools), self._special, f"{conversation.where}: tools")

    def _notes(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        located: _Located | None,
        source: TemplateSource,
    ) -> Iterator[str]:
        """Yield a note for what is given but does not reach the text, or has no effect."""
        hidden = "given in ... conversations, not shown by the chat template"
        if conversation.tools and self._hides_tools(conversation, messages, located, source):
            yield f"tools: {hidden}"
        for name, shown in _shown_keys(messages, located, source).items():
            if not all(shown):
                yield f"{name}: {hidden if not any(shown) else hidden.replace('not shown', 'shown only in part')}"
        roles = {conversation.messages[index]["role"] for index, on in conversation.switches.items() if on}
        if self._loss_on == "assistant":
            for role in sorted(roles - {ASSISTANT}):
                yield f"loss switched on for {role} messages: given in ... conversations, not done (data.loss_on)"

    def _hides_tools(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        located: _Located | None,
        source: TemplateSource,
    ) -> bool:
        if "tools" not in source.variables:
            return True
        shown = messages if located is None else located.marked.messages
        return self._render_part(conversation.tools, shown, False) == self._render_part(None, shown, False)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
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


def _shown_keys(messages: Sequence[Message], located: _Located | None, source: TemplateSource) -> dict[str, list[bool]]:
    """Return, for each key of messages, whether each text under it is in the rendering."""
    if located is None or not located.pieces.markers:
        return {}
    present = set(located.pieces.markers)
    found: dict[tuple[int, str], list[bool]] = {}
    for marker, core in enumerate(located.marked.cores):
        found.setdefault((core.owner, core.key), []).append(marker in present)
    shown: dict[str, list[bool]] = {}
    for owner, message in enumerate(messages):
        for key, value in message.items():
            if key == "name" and message["role"] == TOOL:
                continue  # of the function, which the call names too
            name = f"{message['role']} messages" if key == "content" else key
            if (owner, key) in found:
                shown.setdefault(name, []).extend(found[owner, key])
            elif key not in _WITHOUT_TEXT and not isinstance(value, str) and value not in ([], {}):
                shown.setdefault(name, []).append(key in source.names)
    return shown


def _marks_by_turn(
    turns: Sequence[int], marks: Sequence[Span], located: _Located | None
) -> dict[int, list[Span]] | None:
    """Return the marked spans of each turn; None if a turn has none, or a mark belongs to no turn."""
    starts = [start for start, _ in located.spans] if located is not None else []
    owners = [located.marked.cores[marker].owner for marker in located.pieces.markers] if located is not None else []
    firsts = [bisect_left(starts, start) for start, _ in marks]
    inside = [owners[n] if n < len(starts) and starts[n] < end else None for n, (_, end) in zip(firsts, marks)]
    if len(marks) == len(turns) and all(owner in (None, turn) for owner, turn in zip(inside, turns)):
        return {turn: [mark] for turn, mark in zip(turns, marks)}
    found: dict[int, list[Span]] = {turn: [] for turn in turns}
    for mark, first, owner in zip(marks, firsts, inside):
        # a mark without a text of a message, such as a token after the turn, belongs to the text before it
        turn = owner if owner is not None else owners[first - 1] if 0 < first <= len(owners) else None
        if turn not in found:
            return None
        found[turn].append(mark)
    return found if all(found.values()) else None


def _null_content(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose empty text is null, as some templates expect in a message with calls."""
    return {**message, "content": None} if "tool_calls" in message and not message["content"] else message


def _writes_python(messages: Sequence[Message], text: str) -> bool:
    """Return whether the arguments of a call are in the text in Python's notation."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return any(arguments and str(arguments) in text for arguments in calls if isinstance(arguments, dict))


def _complement(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), length]
    return tuple((start, end) for start, end in zip(starts, ends) if start < end)
