"""Locating texts in a rendering: the conversation is rendered again with a marker in place of each text.

The rendering of the markers shows what the template writes itself (the pieces between markers) and which texts it puts
where. Pieces and texts in turn must then be the first rendering, character by character; otherwise nothing is located.
Only the inside of a text is replaced: surrounding white space, and tags that the template may look for, such as
`</think>`, remain, so that the template treats both alike. Time is linear in the length of the conversation.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from megatron_ds.data.chat.messages import ASSISTANT, REASONING_KEYS, Message
from megatron_ds.data.chat.template import Span, TemplateSource

_KEPT_KEYS = frozenset({"role", "id", "tool_call_id", "type", "index"})
"""Keys whose values are identifiers, which templates check for their form: they are not replaced."""

Selection = Callable[[Message, str], bool]
"""Whether the texts under a key of a message are replaced."""

_SPOKEN = ("content", *REASONING_KEYS)
_SELECTIONS: Sequence[Selection] = (
    lambda message, key: True,
    lambda message, key: message["role"] == ASSISTANT,  # some templates read what users write
    lambda message, key: message["role"] == ASSISTANT and key in _SPOKEN,
)


class Core(NamedTuple):
    """A text in a message, without the white space and tags around it.

    Attributes:
        owner: index of the message.
        key: key of the message.
        text: the text.
    """

    owner: int
    key: str
    text: str


@dataclass(frozen=True)
class Marked:
    """Messages with markers in place of their texts.

    Attributes:
        messages: the messages.
        cores: the text of each marker.
        stem: begins each marker; occurs in no message.
    """

    messages: list[dict[str, Any]]
    cores: list[Core]
    stem: str

    def spare(self, number: int = 0) -> str:
        """Return a marker that is not in use."""
        return _marker(self.stem, len(self.cores) + number)


class Pieces(NamedTuple):
    """A rendering of markers: marker `markers[k]` is between `texts[k]` and `texts[k + 1]`."""

    texts: list[str]
    markers: list[int]


@dataclass(frozen=True)
class Located:
    """The texts of a conversation, located in its rendering.

    Attributes:
        marked: the messages with markers.
        pieces: their rendering.
        spans: range of characters of the text of each of `pieces.markers`.
    """

    marked: Marked
    pieces: Pieces
    spans: list[Span]


def locate(
    messages: Sequence[Message],
    source: TemplateSource,
    text: str,
    render: Callable[[Sequence[Message]], str | None],
) -> Located | None:
    """Locate the texts of messages; None if the template changes them.

    Args:
        messages: the messages.
        source: of the template.
        text: their rendering.
        render: renders messages; None = the template refuses them.
    """
    for selected in _SELECTIONS:
        marked = mark_texts(messages, source, selected)
        rendered = render(marked.messages)
        if rendered is not None:
            pieces = split_at_markers(rendered, marked.stem)
            spans = align(pieces, marked.cores, text)
            if spans is not None:
                return Located(marked, pieces, spans)
    return None


def mark_texts(messages: Sequence[Message], source: TemplateSource, selected: Selection) -> Marked:
    """Replace the texts of messages by markers.

    Args:
        messages: the messages.
        source: of the template; its tags, and names of functions that it compares with, are not replaced.
        selected: which keys of which messages.
    """
    everything = "\n".join((*all_texts(messages), source.text))
    stem = next(stem for stem in (f"assistantturn{number}x" for number in count()) if stem not in everything)
    cores: list[Core] = []

    def replace(value: Any, owner: int, key: str) -> Any:
        if isinstance(value, str):
            return "".join(part(text, owner, key) for text in source.tags.split(value))
        if isinstance(value, Mapping):
            return {name: v if name in _KEPT_KEYS else replace(v, owner, key) for name, v in value.items()}
        return [replace(entry, owner, key) for entry in value] if isinstance(value, list | tuple) else value

    def part(text: str, owner: int, key: str) -> str:
        core = text.strip()
        if not core or (key == "tool_calls" and text in source.texts) or source.tags.fullmatch(text):
            return text
        start = len(text) - len(text.lstrip())
        cores.append(Core(owner, key, core))
        return text[:start] + _marker(stem, len(cores) - 1) + text[start + len(core) :]

    marked = [
        {
            key: replace(value, owner, key) if key not in _KEPT_KEYS and selected(message, key) else value
            for key, value in message.items()
        }
        for owner, message in enumerate(messages)
    ]
    return Marked(marked, cores, stem)


def split_at_markers(rendered: str, stem: str) -> Pieces:
    """Split a rendering at its markers."""
    parts = re.split(f"{stem}(\\d+)z", rendered)
    return Pieces(parts[::2], [int(number) for number in parts[1::2]])


def align(pieces: Pieces, cores: Sequence[Core], text: str) -> list[Span] | None:
    """Return the span of each marker's text in a text that consists of pieces and texts in turn; None if it does not.

    Inside of JSON and of Python's own notation, texts are escaped.
    """
    if not text.startswith(pieces.texts[0]):
        return None
    place, spans = len(pieces.texts[0]), []
    for marker, piece in zip(pieces.markers, pieces.texts[1:]):
        for form in _forms(cores[marker].text):
            end = place + len(form)
            if text.startswith(form, place) and text.startswith(piece, end):
                break
        else:
            return None
        spans.append((place, end))
        place = end + len(piece)
    return spans if place == len(text) else None


def all_texts(value: object) -> Iterator[str]:
    """Yield every text in nested lists and mappings, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield str(name)
            yield from all_texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from all_texts(entry)


def _marker(stem: str, number: int) -> str:
    return f"{stem}{number}z"


def _forms(text: str) -> Iterator[str]:
    """Yield the forms in which templates write a text."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]
