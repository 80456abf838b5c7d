"""The chat template of a tokenizer: its rendering by transformers at a fixed date, and what its source reads."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

import jinja2.meta
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from megatron_ds.data.chat.messages import Message
from megatron_ds.errors import DataError

Span = tuple[int, int]
"""Start and end of a range of characters, end excluded."""

_CLOCK = "strftime_now"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAG = re.compile(r"[<\[].+[>\]]|/\w+", re.DOTALL)


@dataclass(frozen=True)
class TemplateSource:
    """A template's source, read but not rendered.

    Attributes:
        text: the template.
        texts: every text in it, whether written or compared with.
        names: every key and attribute that it reads, of anything.
        variables: those that it reads from outside, such as `tools`.
        tags: a pattern of the texts that it may look for inside a message, such as `</think>`.
        marks_turns: whether it marks the assistant's turns with `{% generation %}`.
    """

    text: str
    texts: frozenset[str]
    names: frozenset[str]
    variables: frozenset[str]
    tags: re.Pattern[str]
    marks_turns: bool


def read_template(text: str, path: str) -> TemplateSource:
    """Read the source of a template.

    Args:
        text: the template.
        path: directory of its tokenizer, for errors.

    Raises:
        DataError: it is no template, or it draws at random.
    """
    try:
        tree = _compile_jinja_template(text).environment.parse(text)
    except jinja2.TemplateError as error:
        raise DataError(f"tokenizer {path}: its chat template is malformed ({error}); mend the template") from error
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) | {
        node.name for node in tree.find_all(nodes.Name)
    }
    if drawn := ({"random"} & filters) | ({"lipsum"} & variables):
        raise DataError(
            f"tokenizer {path}: its chat template draws at random ({', '.join(drawn)}), so that the same conversation "
            "would have other tokens in every run; remove that from the template"
        )
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names = {node.attr for node in tree.find_all(nodes.Getattr)} | texts
    tags = sorted({text.strip() for text in texts if _TAG.fullmatch(text.strip())}, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, tags))})" if tags else "((?!))")
    return TemplateSource(text, frozenset(texts), frozenset(names), variables, pattern, bool(_GENERATION.search(text)))


class TemplateRefusal(Exception):
    """A template refuses messages, or fails on them; other messages, or another form of them, may pass."""


class Template:
    """The template, or the templates, of a tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        path: its directory, for errors.
        today: ISO date that the template writes as today's.

    Attributes:
        path: as given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str, today: str) -> None:
        self.path = path
        self._tokenizer = tokenizer
        self._now = datetime.combine(date.fromisoformat(today), time())
        found = tokenizer.chat_template
        named = found if isinstance(found, dict) else {"default": found}
        self._sources = {text: read_template(text, path) for text in named.values()}

    @property
    def writes_date(self) -> bool:
        """True if it reads the clock."""
        return any(_CLOCK in source.variables for source in self._sources.values())

    def source(self, tools: Sequence[Any] | None) -> TemplateSource:
        """Return the source that is used with these tools: some tokenizers have one for tools."""
        text = self._tokenizer.get_chat_template(tools=list(tools) if tools else None)
        assert isinstance(text, str), type(text)
        return self._sources[text]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False, mask: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the rendering, and the spans that the template marks, in order; none unless `mask` is set.

        Raises:
            TemplateRefusal: the template refuses the messages, or cannot handle them.
        """
        source = self.source(tools)
        mask = mask and source.marks_turns
        options: dict[str, Any] = {
            **self._tokenizer.special_tokens_map,
            "tools": tools,
            "chat_template": source.text,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": mask,
        }
        with _clock_at(self._now, source.text):
            try:
                found: Any = render_jinja_template([[dict(message) for message in messages]], **options)
            except Exception as error:  # jinja2's, and any error of a template's expressions
                raise TemplateRefusal(" ".join(str(error).split())) from error
        (text,), spans = found
        return text, [(int(start), int(end)) for start, end in spans[0]] if mask else []


@contextmanager
def _clock_at(now: datetime, template: str) -> Iterator[None]:
    """Let a template read a fixed time instead of the clock."""
    functions: dict[str, Any] = _compile_jinja_template(template).environment.globals
    clock = functions[_CLOCK]
    functions[_CLOCK] = now.strftime
    try:
        yield
    finally:
        functions[_CLOCK] = clock
