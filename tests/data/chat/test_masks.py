"""The tokens under loss decode to the assistant's turns, for the templates of many families and random conversations.

The expected turns are cut out of the rendered text at the template's own header and end tokens, which no message
contains.
"""

import gc
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ds.data.chat.conversations import parse_conversation
from megatron_ds.data.chat.rendering import ChatTemplate, Rendered
from megatron_ds.data.chat.tokens import offset_backend, tokenize
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError
from tests.data.conftest import TEMPLATES

CHATML = r"<\|im_start\|>assistant\n"


@dataclass(frozen=True)
class Family:
    """A template: how its turns look in a text, and what it can render.

    `header` and `turn` are patterns; `control` are the tokens that it writes, of which the first is eos_token.
    """

    header: str
    turn: str
    control: tuple[str, ...]
    features: frozenset[str] = frozenset({"system"})
    template: str | None = None


def family(header: str, turn: str, control: str, features: str = "system", template: str | None = None) -> Family:
    return Family(header, turn, tuple(control.split()), frozenset(features.split()), template)


FAMILIES = {
    "chatml": family(CHATML, r".*?<\|im_end\|>", "<|im_end|> <|im_start|>", "system consecutive inline"),
    "chatml_marked": family(CHATML, r".*?<\|im_end\|>\n", "<|im_end|> <|im_start|>", "system consecutive"),
    "qwen2_5": family(CHATML, r".*?<\|im_end\|>", "<|im_end|> <|im_start|>", "system tools consecutive"),
    "qwen3": family(
        CHATML + r"(?:<think>\n\n</think>\n\n)?",
        r".*?<\|im_end\|>",
        "<|im_end|> <|im_start|>",
        "system tools consecutive reasoning inline",
    ),
    "llama3_1": family(
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r".*?<\|eot_id\|>",
        "<|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <s>",
        "system tools consecutive",
    ),
    "mistral": family(
        r"\[/(?:INST|TOOL_RESULTS)\](?!\[AVAILABLE_TOOLS\]|\[INST\]|\[TOOL_RESULTS\])",
        r".*?</s>",
        "</s> <s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]",
        "system tools",
    ),
    "gemma": family(
        r"<start_of_turn>model\n", r".*?<end_of_turn>", "<eos> <start_of_turn> <end_of_turn> <s>", "system"
    ),
    "deepseek": family(
        r"(?:<\|Assistant\|>|<\|tool_outputs_end\|>(?!<\|tool_output))",
        r".*?</s>",
        "</s> <s> <|User|> <|Assistant|> <|tool_calls_begin|> <|tool_calls_end|> <|tool_call_begin|> <|tool_call_end|> "
        "<|tool_sep|> <|tool_outputs_begin|> <|tool_outputs_end|> <|tool_output_begin|> <|tool_output_end|>",
        "system tools inline",
    ),
    "phi3": family(r"<\|assistant\|>\n", r".*?<\|end\|>", "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>"),
    "phi4": family(
        r"<\|im_start\|>assistant<\|im_sep\|>", r".*?<\|im_end\|>", "<|im_end|> <|im_start|> <|im_sep|>", "consecutive"
    ),
    "glm4_marked": family(
        r"<\|assistant\|>",
        r".*?<\|endoftext\|>\n",
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|tool|>",
        "system tools reasoning consecutive",
    ),
    "glm4_ended": family(
        r"<\|assistant\|>\n",
        r".*?<\|endoftext\|>",
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|>",
        "system consecutive",
        template="glm4",
    ),
    "harmony": family(
        r"<\|start\|>assistant",
        r"(?:<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant)?.*?(?:<\|end\|>|<\|return\|>|<\|call\|>)",
        "<|return|> <|start|> <|end|> <|message|> <|channel|> <|call|>",
        "system tools thinking",
    ),
}
WORDS = [
    "Paris",
    "is",
    "it",
    "assistant\n",
    "user",
    "naïve",
    "白鯨",
    "🐳",
    '"x"',
    "a\\b",
    "{",
    "}",
    "<b>",
    "]",
    "'",
    "aaa",
]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    found = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=found.control[0], bos_token="<s>")
    takes_space = name == "phi3"  # its control tokens take the white space after them
    fast.add_tokens([AddedToken(token, special=True, rstrip=takes_space) for token in found.control], True)
    fast.add_tokens(["<think>", "</think>"])
    source = (TEMPLATES / f"{found.template or name}.jinja").read_text(encoding="utf-8")
    if name == "glm4_ended":
        ended = "+ message.content + (eos_token if message.role == 'assistant' else '') }}"
        source = source.replace("+ message.content }}", ended)
    fast.chat_template = source
    return fast


def said(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 6))).strip()


def conversation(seed: int, features: frozenset[str]) -> dict[str, Any]:
    """A random conversation of what the template can render, with repeated texts and switches of loss."""
    chance = random.Random(seed)
    repeated = said(chance)

    def text() -> str:
        return repeated if chance.random() < 0.3 else said(chance)

    messages: list[dict[str, Any]] = []
    if "system" in features and chance.random() < 0.5:
        messages.append({"role": "system", "content": chance.choice(["", text()])})
    for _turn in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        if "tools" in features and chance.random() < 0.5:
            calls = call(chance, text())
            messages.append({"role": "assistant", "content": chance.choice([None, text()]), "tool_calls": [calls]})
            messages.append({"role": "tool", "tool_call_id": calls["id"], "content": chance.choice(["", text()])})
        reply = {"role": "assistant", "content": text()}
        if "reasoning" in features and chance.random() < 0.4:
            reply["reasoning_content"] = text()
        elif "thinking" in features and chance.random() < 0.4:
            reply["thinking"] = text()
        elif "inline" in features and chance.random() < 0.4:
            reply["content"] = f"<think>\n{text()}\n</think>\n\n{reply['content']}"
        messages.append(reply)
        if "consecutive" in features and chance.random() < 0.2:
            messages.append({"role": "assistant", "content": text()})
    if chance.random() < 0.2:
        messages.append({"role": "user", "content": text()})
    for message in messages:
        if message["role"] == "assistant" and chance.random() < 0.3:
            message.update(chance.choice([{"weight": 0}, {"train": False}, {"weight": 1}, {"training": True}]))
    declared = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}]
    return {"messages": messages, **({"tools": declared} if "tools" in features and chance.random() < 0.5 else {})}


def call(chance: random.Random, text: str) -> dict[str, Any]:
    arguments = {"city": text, "days": 3}
    written = chance.choice([arguments, json.dumps(arguments), {}])
    return {"id": "abcdefg12", "type": "function", "function": {"name": "look", "arguments": written}}


def is_on(message: dict[str, Any]) -> bool:
    return bool(message.get("weight", 1)) and message.get("train", True)


def decoded(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> tuple[str, str]:
    """The text of all tokens, and of those under loss."""
    ((ids, mask),) = tokenize([rendered], offset_backend(tokenizer, "here"))
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


def expected_turns(name: str, text: str) -> list[str]:
    found = FAMILIES[name]
    return re.findall(f"(?:{found.header})({found.turn})", text, re.DOTALL)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(8, 30))])
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_turns_of_the_assistant_are_learned(name: str, seed: int) -> None:
    row = conversation(seed, FAMILIES[name].features)
    own = [message for message in row["messages"] if message["role"] == "assistant"]
    if not any(map(is_on, own)):
        own[-1].update({"weight": 1, "train": True})
    tokenizer = tokenizer_of(name)
    one = parse_conversation(Located(row, "here"))
    rendered = ChatTemplate(tokenizer, name, False).render(one)
    turns = expected_turns(name, rendered.text)
    assert len(turns) == len(own)
    switched_on = [turn for turn, message in zip(turns, own, strict=True) if is_on(message)]
    assert [rendered.text[start:end] for start, end in rendered.spans] == switched_on
    assert decoded(tokenizer, rendered)[1] == "".join(switched_on)
    last = ChatTemplate(tokenizer, name, True).render(one)
    assert decoded(tokenizer, last)[1] == switched_on[-1]
    everything = ChatTemplate(tokenizer, name, False, loss_on="all").render(one)
    assert everything.text == rendered.text
    off = [turn for turn, message in zip(turns, own, strict=True) if not is_on(message)]
    pieces = [everything.text[start:end] for start, end in everything.spans]
    assert "".join(itertools.chain(*itertools.zip_longest(pieces, off, fillvalue=""))) == rendered.text


def seconds(template: ChatTemplate, texts: Sequence[str]) -> float:
    """CPU time of rendering a conversation in which each text is said by the user and by the assistant."""
    rows = [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]
    one = parse_conversation(Located({"messages": rows}, "here"))
    times = []
    gc.disable()  # its time grows with the objects of all tests
    try:
        for _ in range(4):
            began = time.process_time()
            assert len(template.render(one).spans) == len(texts)
            times.append(time.process_time() - began)
    finally:
        gc.enable()
    return min(times)


@pytest.mark.parametrize("name", ["qwen3", "chatml_marked", "mistral"])
@pytest.mark.parametrize("piece", ["a", "< ", "</think", "\n", "ab " * 7])
def test_time_grows_with_the_length(name: str, piece: str) -> None:
    """Ten times the length takes about ten times as long, also where a text repeats itself."""
    template = ChatTemplate(tokenizer_of(name), name, False)
    short, long = ([f"x{piece * (length // len(piece))}x"] * 2 for length in (20_000, 200_000))
    assert seconds(template, long) < 15 * seconds(template, short) + 0.02


def test_time_grows_with_the_number_of_turns() -> None:
    template = ChatTemplate(tokenizer_of("qwen3"), "qwen3", False)
    few, many = ([f"{turn} x" for turn in range(number)] for number in (50, 500))
    assert seconds(template, many) < 15 * seconds(template, few) + 0.02


def row(*messages: dict[str, Any], **columns: Any) -> Any:
    return parse_conversation(Located({"messages": list(messages), **columns}, "here:1"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def spans(name: str, one: Any, **options: Any) -> list[str]:
    rendered = ChatTemplate(tokenizer_of(name), name, False, **options).render(one)
    return [rendered.text[start:end] for start, end in rendered.spans]


CALL = {"id": "abcdefg12", "type": "function", "function": {"name": "look", "arguments": {"at": 'a "b"\n', "n": 1}}}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}]


def with_template(name: str, template: str, **options: Any) -> ChatTemplate:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(name).backend_tokenizer)
    tokenizer.add_special_tokens(dict(tokenizer_of(name).special_tokens_map))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, "the/tokenizer", False, **options)


def test_reasoning_in_a_field_or_in_the_text() -> None:
    inline = row(user("2+2?"), assistant("<think>\nTwo.\n</think>\n\n4."))
    for key in ("reasoning_content", "reasoning", "thinking"):
        field = row(user("2+2?"), assistant("4.", **{key: "Two."}))
        assert spans("qwen3", field) == spans("qwen3", inline) == ["<think>\nTwo.\n</think>\n\n4.<|im_end|>"]
    assert spans("qwen3", row(user("2+2?"), assistant("4."))) == ["4.<|im_end|>"]


def test_tokens_that_belong_to_two_turns() -> None:
    """A token of a span's last character and of the next header is not learned; a space before a word is."""
    tokenizer = tokenizer_of("chatml")
    backend = offset_backend(tokenizer, "here")
    rendered = Rendered("user: aaa, aaa", ((7, 9),))
    ((ids, mask),) = tokenize([rendered], backend)
    assert tokenizer.decode(ids[mask]) == "" and tokenizer.decode(ids) == rendered.text
    ((ids, mask),) = tokenize([Rendered("user: aaa, aaa", ((6, 9),))], backend)
    assert tokenizer.decode(ids[mask]) == " aaa"


@pytest.mark.parametrize(
    ("ends", "learned"),
    [
        (("<|im_end|><|im_start|>", "<|im_end|>"), "<|im_end|>"),  # the last turn is followed by another token
        (("<|im_end|><|im_start|>\n", "<|im_end|><|im_start|>\n"), "<|im_end|><|im_start|>"),  # two tokens end each
        (("<|im_start|>", "<|im_end|>"), None),  # the last turn ends in a token of its own
    ],
)
def test_ends_of_turns(ends: tuple[str, str], learned: str | None) -> None:
    last, others = ends
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        f"{{{{ {last!r} if loop.last and m.role == 'assistant' else {others!r} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    one = row(user("Hi"), assistant("it"), user("Hi"), assistant("is"))
    rendered = with_template("chatml", template).render(one)
    found = [rendered.text[start:end] for start, end in rendered.spans]
    assert found == ["it" + (learned or others), "is" + (learned or last)]


def test_marks_without_the_end_token() -> None:
    """The end token is added to a mark, the token that begins the next message is not."""
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    ended = "{{ '<|im_start|>' + m.role + ' ' }}" + marked + "{{ '<|im_end|>' }}"
    one = row(user("Hi"), assistant("it"), user("Hi"))
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{ended}{{% else %}}{{{{ '<|im_start|>' + m.content }}}}{{% endif %}}{{% endfor %}}"
    )
    rendered = with_template("chatml", template).render(one)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["it<|im_end|>"]
    endless = with_template("chatml", template.replace("{{ '<|im_end|>' }}", ""))
    with pytest.raises(DataError, match="would not know when to stop"):
        endless.render(one)


def test_several_marks_of_a_turn() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.reasoning_content }}{% endgeneration %}|"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if messages[-1].role == 'assistant' %}{% generation %}{{ '\n' }}{% endgeneration %}{% endif %}"
    )
    own = [assistant("it", reasoning_content="so", weight=weight) for weight in (1, 0, 1)]
    rendered = with_template("chatml", template).render(row(user("Hi"), own[0], user("Hi"), *own[1:]))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["so", "it<|im_end|>"] * 2 + ["\n"]


def test_arguments_in_the_form_that_a_template_writes() -> None:
    """As an object where it writes JSON itself, else as JSON; never in Python's notation."""
    write = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    end = "{{ '<|im_end|>' }}{% endfor %}"
    loop = "{% for call in m.tool_calls or [] %}{{ WRITTEN }}{% endfor %}"
    one = row(user("Hi"), assistant(None, tool_calls=[CALL]))
    expected = json.dumps(CALL["function"]["arguments"])
    for written in ("call.function.arguments | tojson", "call.function.arguments", "'' + call.function.arguments"):
        template = write + loop.replace("WRITTEN", written) + end
        rendered = with_template("chatml", template).render(one)
        assert [rendered.text[start:end] for start, end in rendered.spans] == [expected + "<|im_end|>"]


def notes(name: str, one: Any, **options: Any) -> list[str]:
    found = ChatTemplate(tokenizer_of(name), name, False, **options).render(one).notes
    return [note.replace("given in ..., ", "") for note in found]


def test_what_the_template_does_not_show_is_named() -> None:
    hidden = "not shown by the chat template"
    thought = assistant("it", reasoning_content="so")
    assert notes("qwen3", row(user("Hi"), thought, tools=TOOLS)) == []
    assert notes("qwen3", row(user("Hi"), thought, user("Hi"), thought)) == [
        "reasoning_content: shown only in part by the chat template"
    ]
    inline = assistant("<think>\nso\n</think>\n\nit")
    assert notes("qwen3", row(user("Hi"), inline, user("Hi"), assistant("it"))) == [
        "assistant messages: shown only in part by the chat template"
    ]
    given = row({"role": "user", "content": "Hi", "name": "me"}, {**thought, "mood": "glad", "id": "7"}, tools=TOOLS)
    assert notes("chatml", given) == [
        f"tools: {hidden}",
        f"name: {hidden}",
        f"reasoning_content: {hidden}",
        f"mood: {hidden}",
    ]
    calls = row(user("Hi"), assistant("it", tool_calls=[CALL]), {"role": "tool", "content": "so"}, assistant("is"))
    assert notes("chatml", calls) == [f"tool_calls: {hidden}"]
    assert notes("chatml", row({**user("Hi"), "train": True}, assistant("it"))) == [
        "loss switched on for user messages: not done (data.loss_on)"
    ]


def test_a_turn_that_the_template_does_not_write() -> None:
    one = row(user("Hi"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "so"}, assistant("is"))
    with pytest.raises(DataError, match="writes nothing of message 1, which holds tool_calls; use a template that"):
        spans("chatml", one)
    off = row(user("Hi"), assistant(None, tool_calls=[CALL], weight=0), assistant("is"))
    assert spans("chatml", off) == ["is<|im_end|>"]


@pytest.mark.parametrize("think", ["", "<think>\\n"])
def test_a_system_message_of_the_template_before_the_first_turn_has_no_loss(think: str) -> None:
    template = with_template(
        "chatml",
        "{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n{think}' }}}}{{% endif %}}",
    )
    for first, learned in ((assistant("it"), "it"), (assistant("it", reasoning_content="so"), "<think>soit")):
        rendered = template.render(row(first, user("Hi"), assistant("is")))
        found = [rendered.text[start:end] for start, end in rendered.spans]
        assert found == [f"{learned}<|im_end|>", "is<|im_end|>"]


def test_the_form_of_the_messages_that_shows_the_replies() -> None:
    of_nulls = with_template(
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}",
    )
    of_parts = with_template(
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.content %}{% if c.type == 'text' %}"
        "{{ c.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}",
    )
    calls = row(user("Hi"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "so"}, assistant("is"))
    texts = row(user("Hi"), assistant("it"))
    for template, one, first in ((of_nulls, calls, CALL["function"]["name"]), (of_parts, texts, "it")):
        rendered = template.render(one)
        start, end = rendered.spans[0]
        assert rendered.text[start:end].startswith(first), rendered.text


def test_a_token_of_the_next_message_is_no_end() -> None:
    template = with_template("chatml", "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"ends the assistant's turn with nothing before '<\|im_start\|>': the trained"):
        template.render(row(user("Hi"), assistant("it"), user("so"), assistant("is")))


def test_developers_are_written_as_the_template_knows_them() -> None:
    one = row({"role": "developer", "content": "so"}, user("Hi"), assistant("it"))
    assert "<|im_start|>system\nso<|im_end|>" in ChatTemplate(tokenizer_of("chatml"), "", False).render(one).text
    assert "<|start|>developer<|message|>so<|end|>" in ChatTemplate(tokenizer_of("harmony"), "", False).render(one).text


def test_control_tokens_are_refused_in_every_field() -> None:
    for one in (
        row(user("Hi"), assistant("it", reasoning_content="a <|im_end|> b")),
        row(user("Hi"), assistant(None, tool_calls=[{"name": "look", "arguments": {"at": "<|im_start|>"}}])),
    ):
        with pytest.raises(DataError, match=r"here:1: message 1 holds '<\|im_(end|start)\|>'"):
            spans("qwen3", one)
    with pytest.raises(DataError, match=r"here:1: tools holds '<\|im_end\|>'"):
        spans("qwen3", row(user("Hi"), assistant("it"), tools=[{"name": "look", "description": "<|im_end|>"}]))


@pytest.mark.parametrize("name", ["llama3_1", "harmony"])
def test_templates_write_the_date_of_the_run_file(name: str) -> None:
    one = row(user("Hi"), assistant("it"))
    tokenizer = tokenizer_of(name)
    plain, other = (ChatTemplate(tokenizer, name, False, date=date) for date in ("2024-07-26", "2025-01-02"))
    shown = {"llama3_1": ("26 Jul 2024", "02 Jan 2025"), "harmony": ("2024-07-26", "2025-01-02")}[name]
    assert [date in template.render(one).text for date, template in zip(shown, (plain, other))] == [True, True]
    assert plain.date == "2024-07-26" and other.date == "2025-01-02"
    assert plain.identity != other.identity and "date=" not in plain.identity  # earlier runs can be resumed
    today = tokenizer.apply_chat_template([user("Hi")], tokenize=False)
    assert not any(date in today for date in shown)  # others still read the clock
    fixed, moved = (ChatTemplate(tokenizer_of("chatml"), "", False, date=date) for date in ("2024-07-26", "2025-01-02"))
    assert fixed.date is None and fixed.identity == moved.identity


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_templates_that_draw_at_random_are_refused(drawn: str) -> None:
    with pytest.raises(DataError, match="its chat template draws at random"):
        with_template("chatml", drawn + "{% for m in messages %}{{ m.content }}{% endfor %}")
