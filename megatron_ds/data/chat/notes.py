"""Notes about conversations: keys and columns that are given but do not reach the text, or have no effect."""

from collections.abc import Iterator

from megatron_ds.data.chat.messages import ASSISTANT, TOOL
from megatron_ds.data.chat.template import TemplateRefusal
from megatron_ds.data.chat.written import Written

_COUNT = "..."  # stands for the number of conversations that a note is about
_HIDDEN = f"given in {_COUNT}, not shown by the chat template"
_PARTLY = f"given in {_COUNT}, shown only in part by the chat template"
_NO_SWITCH = f"given in {_COUNT}, not done (data.loss_on)"
_WITHOUT_TEXT = frozenset({"role", "id", "tool_call_id", "type", "index", "timestamp", "created_at", "uuid"})
"""Keys of messages that are not expected in the text."""


def find_notes(written: Written, on_assistant: bool) -> Iterator[str]:
    """Yield the notes about one conversation.

    Args:
        written: the conversation.
        on_assistant: whether only the assistant's messages carry loss.
    """
    conversation = written.conversation
    if conversation.tools and _hides_tools(written):
        yield f"tools: {_HIDDEN}"
    for name, shown in _shown_keys(written).items():
        if not all(shown):
            yield f"{name}: {_PARTLY if any(shown) else _HIDDEN}"
    roles = {conversation.messages[index]["role"] for index, on in conversation.switches.items() if on}
    if on_assistant:
        yield from (f"loss switched on for {role} messages: {_NO_SWITCH}" for role in sorted(roles - {ASSISTANT}))


def counted(note: str, count: int) -> str:
    """Return a note with the number of conversations that it is about."""
    return note.replace(_COUNT, f"{count:,} conversation{'s' * (count != 1)}", 1)


def _hides_tools(written: Written) -> bool:
    """Return whether the text is the same without the declarations of tools."""
    if "tools" not in written.source.variables:
        return True
    messages = written.messages if written.located is None else written.located.marked.messages
    try:
        without, _ = written.template.render(messages, None)
    except TemplateRefusal:  # the template needs them
        return False
    return written.render_part(messages, False) == without


def _shown_keys(written: Written) -> dict[str, list[bool]]:
    """Return, for each key of messages, whether each text under it is in the rendering."""
    located = written.located
    if located is None or not located.pieces.markers:
        return {}
    present = set(located.pieces.markers)
    found: dict[tuple[int, str], list[bool]] = {}
    for marker, core in enumerate(located.marked.cores):
        found.setdefault((core.owner, core.key), []).append(marker in present)
    shown: dict[str, list[bool]] = {}
    for owner, message in enumerate(written.messages):
        for key, value in message.items():
            if key == "name" and message["role"] == TOOL:
                continue  # of the function, which the call names too
            name = f"{message['role']} messages" if key == "content" else key
            if (owner, key) in found:
                shown.setdefault(name, []).extend(found[owner, key])
            elif key not in _WITHOUT_TEXT and not isinstance(value, str) and value not in ([], {}):
                shown.setdefault(name, []).append(key in written.source.names)
    return shown
