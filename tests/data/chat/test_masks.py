"""The tokens under loss decode to the assistant's turns, for the templates of many families and random conversations.

The expected turns are cut out of the rendered text at the template's own header and end tokens, which no message
contains.
"""

import itertools
import json
import random
import re
import time
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


@pytest.mark.parametrize("seed", range(30))
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


@pytest.mark.parametrize("name", ["qwen3", "chatml_marked", "mistral"])
@pytest.mark.parametrize("piece", ["a", "< ", "</think", "\n", "ab " * 7])
def test_time_grows_with_the_length(name: str, piece: str) -> None:
    """Ten times the length takes about ten times as long, also where a text repeats itself."""
    template = ChatTemplate(tokenizer_of(name), name, False)

    def seconds(length: int) -> float:
        reply = "x" + piece * (length // len(piece)) + "x"
        rows = [{"role": "user", "content": reply}, {"role": "assistant", "content": reply}] * 2
        one = parse_conversation(Located({"messages": rows}, "here"))
        template.render(one)
        return min(timed(template, one) for _ in range(3))

    assert seconds(200_000) < 15 * seconds(20_000) + 0.02


def timed(template: ChatTemplate, one: Any) -> float:
    began = time.perf_counter()
    rendered = template.render(one)
    assert len(rendered.spans) == 2
    return time.perf_counter() - began


def test_many_turns_take_no_more_time_each() -> None:
    template = ChatTemplate(tokenizer_of("qwen3"), "qwen3", False)

    def seconds(turns: int) -> float:
        rows = [{"role": role, "content": f"{turn} x"} for turn in range(turns) for role in ("user", "assistant")]
        one = parse_conversation(Located({"messages": rows}, "here"))
        return min(once_timed(template, one, turns) for _ in range(3))

    assert seconds(400) < 15 * seconds(40) + 0.02


def once_timed(template: ChatTemplate, one: Any, turns: int) -> float:
    began = time.perf_counter()
    assert len(template.render(one).spans) == turns
    return time.perf_counter() - began


def row(*messages: dict[str, Any], **columns: Any) -> Any:
    return parse_conversation(Located({"messages": list(messages), **columns}, "here:1"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def spans(name: str, one: Any, **options: Any) -> list[str]:
    rendered = ChatTemplate(tokenizer_of(name), name, False, **options).render(one)
    return [rendered.text[start:end] for start, end in rendered.spans]
