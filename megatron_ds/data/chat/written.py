"""A conversation as a chat template writes it, with its messages in the form that the template reads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_ds.data.chat.conversations import Conversation
from megatron_ds.data.chat.messages import ASSISTANT, DEVELOPER, SYSTEM, Message
from megatron_ds.data.chat.probe import Located, locate
from megatron_ds.data.chat.template import Span, Template, TemplateRefusal, TemplateSource
from megatron_ds.errors import DataError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """A conversation and its rendering.

    Attributes:
        conversation: the conversation.
        template: writes it.
        messages: of the conversation, as the template reads them.
        text: the rendering.
        marks: spans of the text that the template marks as the assistant's, in order.
    """

    conversation: Conversation
    template: Template
    messages: Messages
    text: str
    marks: list[Span]

    @property
    def subject(self) -> str:
        """The beginning of errors: the place of the conversation, and the template."""
        return f"data: {self.conversation.where}: the chat template of {self.template.path}"

    @cached_property
    def source(self) -> TemplateSource:
        """The source of the template."""
        return self.template.source(self.conversation.tools)

    @cached_property
    def located(self) -> Located | None:
        """The texts of the messages in the rendering; None = the template changes them."""
        return locate(self.messages, self.source, self.text, lambda messages: self.render_part(messages, False))

    @property
    def shows_replies(self) -> bool:
        """True if the rendering holds a text of each message of the assistant, or they cannot be located in it."""
        if self.located is None:
            return True
        cores = self.located.marked.cores
        shown = {cores[marker].owner for marker in self.located.pieces.markers}
        return {core.owner for core in cores if self.messages[core.owner]["role"] == ASSISTANT} <= shown

    def render_part(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """Return the rendering of other messages; None if the template refuses them, as it may the first ones alone."""
        try:
            return self.template.render(messages, self.conversation.tools, prompt=prompt)[0]
        except TemplateRefusal:
            return None


def write_conversation(conversation: Conversation, template: Template) -> Written:
    """Render a conversation, in the first form of its messages that the template accepts.

    A form whose replies the template writes comes before one in which it passes over them without an error.

    Raises:
        DataError: the template refuses all of them.
    """
    problem: TemplateRefusal | None = None
    writes_python = False
    accepted: Written | None = None
    for messages in _forms(conversation, template.source(conversation.tools)):
        try:
            text, marks = template.render(messages, conversation.tools, mask=True)
        except TemplateRefusal as refusal:
            problem = problem or refusal
            continue
        if not _has_python_notation(messages, text):
            written = Written(conversation, template, messages, text, [(a, b) for a, b in marks if a < b])
            if written.shows_replies:
                return written
            accepted = accepted or written
            continue
        writes_python = True
    if accepted is not None:
        return accepted
    subject = f"data: {conversation.where}: the chat template of {template.path}"
    if writes_python:
        raise DataError(f"{subject} writes the arguments of calls in Python's notation; write them with `| tojson`")
    raise DataError(f"{subject} refuses it: {problem}") from problem


def _forms(conversation: Conversation, source: TemplateSource) -> Iterator[Messages]:
    """Yield the messages in the forms that templates expect, the most usual first."""
    messages = [dict(message) for message in conversation.messages]
    for message in messages:
        if message["role"] == DEVELOPER and DEVELOPER not in source.texts:
            message["role"] = SYSTEM
    yield messages
    if any("tool_calls" in message for message in messages):
        as_json = [_arguments_as_json(message) for message in messages]
        yield as_json
        yield from ([_null_content(message) for message in form] for form in (messages, as_json))
    if {"type", "text"} <= source.names:
        yield [_content_in_parts(message) for message in messages]


def _arguments_as_json(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as JSON, for templates that join them to text."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**function, "arguments": text}}
        for call, function, text in zip(message["tool_calls"], functions, texts)
    ]
    return {**message, "tool_calls": calls}


def _null_content(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose empty text is null, as some templates expect in a message with calls."""
    return {**message, "content": None} if "tool_calls" in message and not message["content"] else message


def _content_in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its text as a list of parts, for templates of models that also read images."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _has_python_notation(messages: Messages, text: str) -> bool:
    """Return whether the arguments of a call are in the text in Python's notation."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return any(arguments and str(arguments) in text for arguments in calls if isinstance(arguments, dict))
