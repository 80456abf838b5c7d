"""Reading conversations: `messages`, or a `prompt` and its `completion`, in JSON lines or tables."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One checked conversation.

    Attributes:
        messages: in order, each with a role and a text.
        learned_from: index of the first message that may carry loss; with a prompt, that of the completion.
        tools: declarations of the tools that the assistant may call, for the template; None = no tools.
        where: file and line, for errors.
    """

    messages: Sequence[Message]
    learned_from: int
    tools: list[Any] | None
    where: str

    @property
    def learned(self) -> list[int]:
        """Indices of the assistant's messages that may carry loss; at least one."""
        roles = [message["role"] for message in self.messages]
        return [index for index, role in enumerate(roles) if role == ASSISTANT and index >= self.learned_from]


def parse_conversation(located: Located) -> Conversation:
    """Return the conversation in one example; unrelated columns are ignored.

    Raises:
        DataError: the conversation is malformed.
    """
    columns, where = {name: value for name, value in located.columns.items() if value is not None}, located.where
    if "messages" in columns:
        messages, learned_from = _messages(columns["messages"], f"{where}: messages"), 0
    elif {"prompt", "completion"} <= columns.keys():
        prompt = _one_side(columns["prompt"], "user", f"{where}: prompt")
        completion = _one_side(columns["completion"], ASSISTANT, f"{where}: completion")
        messages, learned_from = [*prompt, *completion], len(prompt)
    else:
        raise DataError(_missing_columns(columns, where))
    conversation = Conversation(messages, learned_from, _tools(columns.get("tools"), where), where)
    if not conversation.learned:
        raise DataError(f"data: {where}: no message of the assistant, so nothing to learn; remove the conversation")
    return conversation


def _one_side(value: object, role: str, place: str) -> list[Message]:
    """Return the messages of a prompt or a completion, which is a text or messages."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, place)


def _messages(value: object, place: str) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"data: {place} must be a list of messages with role and content, found {_kind(value)}")
    return [_message(message, f"{place}[{index}]") for index, message in enumerate(value)]


def _message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"data: {place} must be an object with role and content, found {_kind(value)}")
    message = {name: entry for name, entry in value.items() if entry is not None}  # tables hold nulls
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        found = "has no role" if role is None else f"has the role {role!r}"
        nearest = difflib.get_close_matches(str(role), ROLES, n=1)
        raise DataError(
            f"data: {place} {found}; roles are {', '.join(ROLES)}{f'; nearest: {nearest[0]}' if nearest else ''}"
        )
    if message.get("tool_calls"):
        raise DataError(f"data: {place} calls tools, which cannot be learned yet; write the call as its content")
    if not isinstance(content, str):
        raise DataError(f"data: {place} must have a text as its content, found {_kind(content)}")
    if not content.strip():
        raise DataError(f"data: {place} is empty; remove it")
    return message


def _tools(value: object, where: str) -> list[Any] | None:
    if isinstance(value, str):  # tables hold structures without fixed columns as JSON
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"data: {where}: tools is not JSON ({error})") from error
    if value is not None and not isinstance(value, list):
        raise DataError(f"data: {where}: tools must be a list, found {_kind(value)}")
    return value or None


def _missing_columns(columns: Mapping[str, Any], where: str) -> str:
    if "conversations" in columns:
        return (
            f"data: {where}: 'conversations' is another format (ShareGPT's); write each as 'messages' with role (user, "
            "assistant) and content"
        )
    known = ("messages", "prompt", "completion")
    near = {name: difflib.get_close_matches(name, known, n=1) for name in columns}
    hint = next((f"; did you mean {found[0]!r} by {name!r}?" for name, found in near.items() if found), "")
    names = ", ".join(sorted(columns)) or "nothing"
    return f"data: {where}: neither 'messages' nor 'prompt' and 'completion', only {names}{hint}"


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
