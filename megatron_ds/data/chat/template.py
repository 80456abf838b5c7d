"""The chat template of a tokenizer: its rendering by transformers at a fixed date, and what its source reads.

Both are done in a process of their own, with limits: see `limited_process`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, NamedTuple

import jinja2.meta
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from megatron_ds.data.chat.limited_process import LimitedProcess, LimitExceeded, RequestFailed
from megatron_ds.data.chat.messages import Message
from megatron_ds.errors import ConfigError, DataError

Span = tuple[int, int]
"""Start and end of a range of characters, end excluded."""

_CLOCK = "strftime_now"
_LONGEST = 2**20  # characters of a template; published ones have some 10,000
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


def _read_source(text: str) -> dict[str, list[str]]:
    """Return what the source of a template holds: its texts, names, variables, filters and tags.

    It is called in a `LimitedProcess`: jinja computes constant expressions while it reads a template.

    Raises:
        jinja2.TemplateError: it is no template.
    """
    tree = _compile_jinja_template("").environment.parse(text)  # another template, with the same environment
    names = {node.name for node in tree.find_all(nodes.Name)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    found = {
        "texts": texts,
        "names": {node.attr for node in tree.find_all(nodes.Getattr)} | texts,
        "variables": jinja2.meta.find_undeclared_variables(tree) | names,
        "filters": {node.name for node in tree.find_all(nodes.Filter)},
        "tags": {text.strip() for text in texts if _TAG.fullmatch(text.strip())},
    }
    return {name: sorted(values) for name, values in found.items()}


def _template_source(text: str, read: dict[str, list[str]], path: str) -> TemplateSource:
    """Return the source of a template.

    Args:
        text: the template.
        read: what `_read_source` returns.
        path: directory of its tokenizer, for errors.

    Raises:
        DataError: it draws at random.
    """
    if drawn := ({"random"} & set(read["filters"])) | ({"lipsum"} & set(read["variables"])):
        raise DataError(
            f"tokenizer {path}: its chat template draws at random ({', '.join(drawn)}), so that the same conversation "
            "would have other tokens in every run; remove that from the template"
        )
    tags = sorted(read["tags"], key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, tags))})" if tags else "((?!))")
    texts, names, variables = (frozenset(read[name]) for name in ("texts", "names", "variables"))
    return TemplateSource(text, texts, names, variables, pattern, bool(_GENERATION.search(text)))


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
        self._process = LimitedProcess(_answer)
        self._sources = {text: self._read(text) for text in named.values()}

    def _read(self, text: str) -> TemplateSource:
        if len(text) > _LONGEST:
            raise DataError(
                f"tokenizer {self.path}: its chat template has {len(text):,} characters; {_LONGEST:,} may be"
            )
        try:
            read = self._process.call(_Request(text))
        except RequestFailed as problem:
            raise DataError(
                f"tokenizer {self.path}: its chat template is malformed ({problem}); mend the template"
            ) from problem
        except LimitExceeded as limit:
            raise self._endless(limit) from None
        return _template_source(text, read, self.path)

    def _endless(self, limit: LimitExceeded) -> ConfigError:
        """Return the error for a template without limits. No row is to blame: it must not be skipped as a bad one."""
        return ConfigError(
            f"tokenizer {self.path}: its chat template takes more than {limit} for one conversation; mend the "
            "template, or take another tokenizer"
        )

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
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        prompt: bool = False,
        mask: bool = False,
        unfinished: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the rendering, and the spans that the template marks, in order; none unless `mask` is set.

        Args:
            messages: the conversation.
            tools: schemas of the functions that it may call.
            prompt: end with what comes before an answer.
            mask: return the spans.
            unfinished: leave out what ends the last message.

        Raises:
            TemplateRefusal: the template refuses the messages, or cannot handle them.
            ConfigError: it takes more time, memory or output than one conversation may.
        """
        source = self.source(tools)
        mask = mask and source.marks_turns
        options: dict[str, Any] = {
            **self._tokenizer.special_tokens_map,
            "tools": tools,
            "chat_template": source.text,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": mask,
            "continue_final_message": unfinished,
        }
        request = _Request(source.text, [dict(message) for message in messages], options, self._now)
        try:
            text, spans = self._process.call(request)
        except RequestFailed as problem:
            raise TemplateRefusal(str(problem)) from problem
        except LimitExceeded as limit:
            raise self._endless(limit) from None
        return text, [(int(start), int(end)) for start, end in spans] if mask else []


class _Request(NamedTuple):
    """A request to the process that renders: of a template alone, to read its source.

    Attributes:
        template: its text.
        messages: a conversation to render; None = read the source.
        options: of `render_jinja_template`.
        now: the time that the template reads.
    """

    template: str
    messages: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = {}
    now: datetime = datetime.min


def _answer(request: _Request) -> Any:
    """Return the texts of a template's source, or a rendering and its spans. Any exception is a refusal."""
    if request.messages is None:
        return _read_source(request.template)
    with _clock_at(request.now, request.template):
        found: Any = render_jinja_template([request.messages], **request.options)
    (text,), spans = found
    return text, spans[0] if spans else []


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
