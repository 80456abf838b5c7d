"""Reading conversations: OpenAI's messages, ShareGPT's conversations, alpaca's instructions, prompts with completions.

Every form becomes a list of messages. Which columns make up a form is a table, in the order in which they are looked
for; other columns are ignored.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from megatron_ds.data.chat.messages import (
    ASSISTANT,
    ROW_SWITCHES,
    SYSTEM,
    USER,
    Message,
    ReadMessage,
    kind,
    read_messages,
)
from megatron_ds.data.chat.tool_calls import read_tools, without_nulls
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError


class PlainText(NamedTuple):
    """A prompt and its completion as plain texts, for tokenizers without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """One checked conversation.

    Attributes:
        messages: in order, each with a role and a text.
        learned_from: index of the first message that may carry loss; with a prompt, that of the completion.
        tools: declarations of the tools that the assistant may call, for the template; None = no tools.
        where: file and line, for errors.
        switches: messages that say themselves whether they carry loss, by index.
        plain: the same as plain texts; None = it cannot be written without a template.
    """

    messages: Sequence[Message]
    learned_from: int
    tools: list[Any] | None
    where: str
    switches: Mapping[int, bool] = field(default_factory=dict)
    plain: PlainText | None = None

    @cached_property
    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == ASSISTANT]

    @property
    def learned(self) -> list[int]:
        """Indices of the assistant's messages that may carry loss; at least one."""
        return [index for index in self.turns if index >= self.learned_from and self.switches.get(index, True)]


def parse_conversation(located: Located) -> Conversation:
    """Return the conversation in one example; unrelated columns are ignored.

    Raises:
        DataError: the conversation is malformed.
    """
    given = without_nulls(located.columns) if located.fills_nulls else located.columns
    columns, where = {name: value for name, value in given.items() if value is not None}, located.where
    read = next((read for names, read in _FORMS if names <= columns.keys()), None)
    if read is None:
        raise DataError(_missing_columns(columns, where))
    if off := next((name for name in ROW_SWITCHES if columns.get(name) in (0, False)), None):
        raise DataError(
            f"data: {where}: {off}={columns[off]!r} switches off the loss of the whole row, so nothing to learn; "
            f"remove the row, or write {off} in its messages"
        )
    found = read(columns, where)
    tools = next((columns[name] for name in _TOOLS if name in columns), None)
    conversation = Conversation(
        [message.fields for message in found.messages],
        found.learned_from,
        read_tools(tools, where),
        where,
        {index: one.carries_loss for index, one in enumerate(found.messages) if one.carries_loss is not None},
        found.plain,
    )
    if not conversation.turns or conversation.turns[-1] < found.learned_from:
        raise DataError(f"data: {where}: no message of the assistant, so nothing to learn; remove the conversation")
    if not conversation.learned:
        raise DataError(
            f"data: {where}: loss is switched off for every message of the assistant (weight: 0, train: false), so "
            "nothing to learn; remove the conversation"
        )
    return conversation


def is_conversation(names: Sequence[str] | set[str]) -> bool:
    """Return whether columns of these names hold a conversation."""
    return any(form <= set(names) for form, _ in _FORMS)


class _Found(NamedTuple):
    """The content of a row: its messages, the first that may carry loss, and the same as plain texts."""

    messages: list[ReadMessage]
    learned_from: int = 0
    plain: PlainText | None = None


def _openai(columns: Mapping[str, Any], where: str) -> _Found:
    return _Found(read_messages(columns["messages"], f"{where}: messages"))


def _sharegpt(name: str) -> Callable[[Mapping[str, Any], str], _Found]:
    def read(columns: Mapping[str, Any], where: str) -> _Found:
        messages = read_messages(columns[name], f"{where}: {name}")
        return _Found([*_system(columns, messages, where), *messages])

    return read


def _alpaca(columns: Mapping[str, Any], where: str) -> _Found:
    texts = [_text(columns.get(name, ""), f"{where}: {name}") for name in ("instruction", "input")]
    output = _text(columns["output"], f"{where}: output")
    prompt = "\n".join(text for text in texts if text.strip())
    history = columns.get("history") or []
    if not isinstance(history, list | tuple) or any(not isinstance(pair, list | tuple) for pair in history):
        raise DataError(f"data: {where}: history must be a list of pairs of texts, found {kind(history)}")
    said = [text for pair in [*history, (prompt, output)] for text in pair]
    turns = [{"role": (USER, ASSISTANT)[number % 2], "content": text} for number, text in enumerate(said)]
    messages = read_messages(turns, f"{where}: instruction, output")
    messages = [*_system(columns, messages, where), *messages]
    return _Found(messages, plain=PlainText(f"{prompt}\n", output) if len(messages) == 2 else None)


def _prompt_and_completion(columns: Mapping[str, Any], where: str) -> _Found:
    if columns.get("label") is False:
        raise DataError(
            f"data: {where}: label=false marks an undesired completion (data for preference training), and "
            "data.format=chat would learn it; keep the rows with label: true"
        )
    sides = columns["prompt"], columns["completion"]
    prompt = _one_side(sides[0], USER, f"{where}: prompt")
    completion = _one_side(sides[1], ASSISTANT, f"{where}: completion")
    plain = PlainText(sides[0], sides[1]) if isinstance(sides[0], str) and isinstance(sides[1], str) else None
    return _Found([*prompt, *completion], len(prompt), plain)


_FORMS: Sequence[tuple[frozenset[str], Callable[[Mapping[str, Any], str], _Found]]] = (
    (frozenset({"messages"}), _openai),
    (frozenset({"conversations"}), _sharegpt("conversations")),
    (frozenset({"conversation"}), _sharegpt("conversation")),
    (frozenset({"prompt", "completion"}), _prompt_and_completion),
    (frozenset({"instruction", "output"}), _alpaca),
)
_TOOLS = ("tools", "functions")
_OTHER_NAMES = {
    "messages": ("dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "problem", "input"),
    "completion": ("answer", "response", "solution", "output"),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
}
"""Usual names of columns that `data.columns` maps to ours; for messages lists of mappings, otherwise texts."""
_OPTIONAL = {frozenset({"instruction", "output"}): {"input"}}


def _one_side(value: object, role: str, place: str) -> list[ReadMessage]:
    """Return the messages of a prompt or a completion, which is a text or messages."""
    return read_messages([{"role": role, "content": value}] if isinstance(value, str) else value, place)


def _system(columns: Mapping[str, Any], messages: Sequence[ReadMessage], where: str) -> list[ReadMessage]:
    """Return the system message that a row holds in a column of its own."""
    text = columns.get("system")
    if not isinstance(text, str) or not text:
        return []
    if messages[0].fields["role"] == SYSTEM:
        if messages[0].fields["content"] != text:
            raise DataError(f"data: {where}: the column system and the first message differ; keep one of them")
        return []
    return read_messages([{"role": SYSTEM, "content": text}], f"{where}: system")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"data: {place} must be a text, found {kind(value)}")
    return value


def _missing_columns(columns: Mapping[str, Any], where: str) -> str:
    if {"chosen", "rejected"} <= columns.keys():
        return (
            f"data: {where}: chosen and rejected are a pair for preference training (DPO), and data.format=chat learns "
            "from one reply; to learn the chosen one, write it as 'completion'"
        )
    names = ", ".join(sorted(columns)) or "nothing"
    return f"data: {where}: neither 'messages' nor 'prompt' and 'completion', only {names}{_hint(columns)}"


def _hint(columns: Mapping[str, Any]) -> str:
    """Return the nearest way out: names to map, the other half of a form, or a name to correct."""
    if mapping := _mapping(columns):
        return f"; try data.columns={{{', '.join(f'{ours}: {theirs}' for ours, theirs in mapping.items())}}}"
    for names, _ in _FORMS:
        if given := sorted(names & columns.keys()):
            return f"; {', '.join(given)} needs {', '.join(sorted(names - columns.keys()))} in the same row"
    known = sorted({name for names, _ in _FORMS for name in names})
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in columns}
    if typed := [f"did you mean {found[0]!r} by {name!r}?" for name, found in near.items() if found]:
        return f"; {typed[0]}"
    others = "; also read: 'conversations', and 'instruction' and 'output'"
    if sum(isinstance(value, str) for value in columns.values()) > 1:
        return f"{others}; other names are mapped, as in data.columns={{prompt: question, completion: answer}}"
    return others


def _mapping(columns: Mapping[str, Any]) -> dict[str, str]:
    """Return the `data.columns` that complete a form, ours first, with other usual names; may be empty."""
    texts = {name for name, value in columns.items() if isinstance(value, str)}
    chats = {name for name, value in columns.items() if isinstance(value, list | tuple) and _holds_messages(value)}
    for names, _ in _FORMS:
        usable = chats if names == {"messages"} else texts
        found = {
            ours: next(name for name in others if name in usable)
            for ours, others in _OTHER_NAMES.items()
            if ours not in columns and ours in names | _OPTIONAL.get(names, set()) and not usable.isdisjoint(others)
        }
        if found and names <= columns.keys() | found.keys():
            return found
    return {}


def _holds_messages(turns: Sequence[Any]) -> bool:
    """Return whether a list holds mappings, as messages are."""
    return bool(turns) and all(isinstance(turn, Mapping) for turn in turns)
