"""Messages in the forms of data sets, brought to one form: a role, a text, and the fields that templates read.

The names of roles and keys are tables, so that another convention is a line in one of them.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.data.chat.tool_calls import parse_json, read_call, read_tool_calls
from megatron_ds.errors import DataError

SYSTEM, USER, ASSISTANT, TOOL, DEVELOPER = "system", "user", "assistant", "tool", "developer"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value")
_ROLES_BY_NAME: Mapping[str, str] = {
    **{role: role for role in (*ROLES, DEVELOPER)},
    **dict.fromkeys(("human",), USER),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response", "ipython"), TOOL),
}
_CALLING_ROLES = ("function_call", "tool_call")  # ShareGPT: a message of the assistant whose text is a call in JSON

_SWITCHES = ("weight", "train", "training", "trainable", "loss")  # 1 or true: the message carries loss
_INVERTED_SWITCHES = ("masked",)
ROW_SWITCHES = ("weight", "train", "training", "trainable")
"""Of these, the columns that switch off a whole row; `loss` may be a figure there."""
_UNCLEAR_SWITCHES = ("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail")
_SWITCH_VALUES: Mapping[Any, bool] = {0: False, 1: True}  # also 0.0, 1.0, False and True

_TEXT_PARTS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_REASONING_PARTS: Mapping[str, str] = {"thinking": "thinking", "reasoning": "reasoning"}

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ReadMessage:
    """A message in the form that templates expect.

    Attributes:
        fields: `role`, `content` (a text), and all other keys that are not null, apart from those that switch loss.
        carries_loss: as the message itself says; None = it does not.
    """

    fields: Message
    carries_loss: bool | None


def read_messages(value: object, place: str) -> list[ReadMessage]:
    """Return the messages of a list, or of a list written as JSON.

    Args:
        value: the list.
        place: its place, for errors.

    Raises:
        DataError: it is not a list of messages, or a message is malformed; names the message.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, place)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"data: {place} must be a list of messages with role and content, found {kind(value)}")
    return [read_message(message, f"{place}[{index}]") for index, message in enumerate(value)]


def read_message(value: object, place: str) -> ReadMessage:
    """Return one message.

    Raises:
        DataError: the message is malformed.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"data: {place} must be an object with role and content, found {kind(value)}")
    given = {name: entry for name, entry in value.items() if entry is not None}  # tables hold nulls
    carries_loss = _take_switches(given, place)
    name = next((given.pop(key) for key in _ROLE_KEYS if key in given), None)
    content = next((given.pop(key) for key in _TEXT_KEYS if key in given), None)
    if name in _CALLING_ROLES:
        calls: list[Any] = read_tool_calls(content, place)
        return ReadMessage({"role": ASSISTANT, "content": "", **given, "tool_calls": calls}, carries_loss)
    role = _ROLES_BY_NAME.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(_unknown_role(name, place))
    calls = read_tool_calls(given.pop("tool_calls", None), f"{place}.tool_calls")
    if "function_call" in given:  # OpenAI's older form
        calls.append(read_call(given.pop("function_call"), f"{place}.function_call"))
    fields = {"role": role, **_read_content(content, role, place, may_lack=bool(calls)), **given}
    if calls:
        fields["tool_calls"] = calls
    if not fields["content"].strip() and role in (USER, ASSISTANT) and not _has_other_text(fields):
        raise DataError(f"data: {place} is empty; remove it")
    return ReadMessage(fields, carries_loss)


def kind(value: object) -> str:
    """Return a value's type and beginning, for errors."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _has_other_text(fields: Message) -> bool:
    reasoning: Iterable[Any] = (fields.get(key) for key in REASONING_KEYS)
    return "tool_calls" in fields or any(isinstance(text, str) and text.strip() for text in reasoning)


def _unknown_role(name: object, place: str) -> str:
    found = "has no role" if name is None else f"has the role {name!r}"
    nearest = difflib.get_close_matches(str(name), ROLES, n=1)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    return f"data: {place} {found}; roles are {', '.join(ROLES)}{hint}"


def _take_switches(given: dict[str, Any], place: str) -> bool | None:
    """Remove the keys that switch a message's loss; return their meaning, None without such keys."""
    for key in _UNCLEAR_SWITCHES:
        if key in given:
            raise DataError(
                f"data: {place}: {key}={given[key]!r} may switch loss on or off, or weigh it; write weight: 0 or 1, or "
                "train: true or false"
            )
    meanings = set()
    for key in (*_SWITCHES, *_INVERTED_SWITCHES):
        if key not in given:
            continue
        value = given.pop(key)
        if not isinstance(value, int | float) or value not in _SWITCH_VALUES:
            raise DataError(
                f"data: {place}: {key}={value!r} is no switch of loss, which is on or off; nearest: {key}: 0 or 1"
            )
        meanings.add(_SWITCH_VALUES[value] != (key in _INVERTED_SWITCHES))
    if len(meanings) > 1:
        raise DataError(f"data: {place} switches its loss both on and off; keep one of {', '.join(_SWITCHES)}")
    return meanings.pop() if meanings else None


def _read_content(content: object, role: str, place: str, may_lack: bool) -> dict[str, str]:
    """Return the text of a message, and with it the reasoning that its parts hold."""
    if content is None and (may_lack or role == ASSISTANT):
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if isinstance(content, list | tuple) and all(_is_part(part) for part in content):
        return _join_parts(content, place)
    if role == TOOL and isinstance(content, Mapping | list | tuple):  # the result itself
        return {"content": json.dumps(content, ensure_ascii=False, default=str)}
    raise DataError(f"data: {place} must have a text as its content, found {kind(content)}")


def _is_part(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("type"), str))


def _join_parts(parts: Sequence[Any], place: str) -> dict[str, str]:
    texts: dict[str, list[str]] = {"content": [], REASONING_KEYS[0]: []}
    for part in parts:
        if isinstance(part, str):
            texts["content"].append(part)
            continue
        for names, target in ((_TEXT_PARTS, "content"), (_REASONING_PARTS, REASONING_KEYS[0])):
            text = part.get(names.get(part["type"], ""))
            if isinstance(text, str):
                texts[target].append(text)
                break
        else:
            raise DataError(
                f"data: {place} holds a part of type {part['type']!r}, and data.format=chat learns from text; remove "
                "the part, or write it as text"
            )
    return {name: "".join(found) for name, found in texts.items() if found or name == "content"}
