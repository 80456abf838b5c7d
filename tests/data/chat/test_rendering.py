"""What is learned of a conversation: the assistant's text and the token that ends its turn, nothing else."""

import itertools
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_ds.data.chat.conversations import Conversation, parse_conversation
from megatron_ds.data.chat.rendering import ChatTemplate
from megatron_ds.data.chat.tokens import offset_backend, tokenize
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

ENDS = {"qwen3": "<|im_end|>", "header": "<|eot|>", "instruct": " </s>", "marked": "<|im_end|>"}
TEXTS = [
    "Call me Ishmael.",
    "def f(x):\n    return x  # two\n\n\nprint(f(1))",
    "naïve café — 🐳🐋 ✓ 白鯨",
    "n",
    "a  b   c\tend.",
]


def conversation(*texts: str, system: str | None = None, **columns: Any) -> Conversation:
    messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return parse_conversation(Located({"messages": messages, **columns}, "chats.jsonl:7"))


def learned(path: str, one: Conversation, last_only: bool = False) -> list[str]:
    """The text of each run of learned tokens, from the ids alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rendered = ChatTemplate(tokenizer, path, last_only).render(one)
    ((ids, mask),) = tokenize([rendered], offset_backend(tokenizer, path))
    assert tokenizer(rendered.text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert rendered.text == tokenizer.apply_chat_template(list(one.messages), tokenize=False, tools=one.tools)
    runs = itertools.groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1])
    groups = [[token for token, _ in group] for is_learned, group in runs if is_learned]
    return [tokenizer.decode(group, clean_up_tokenization_spaces=False) for group in groups]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_only_what_the_assistant_says_is_learned(name: str, text: str, system: str | None, chat_tokenizer: Any) -> None:
    said = text.upper() if name == "marked" else text
    found = learned(chat_tokenizer(name), conversation("Who are you?", text, system=system))
    if name == "instruct":
        found = [one.removeprefix(" ") for one in found]  # the template's space may be of the first word's token
    assert found == [said + ENDS[name]]


@pytest.mark.parametrize("name", ENDS)
def test_every_turn_or_the_last(name: str, chat_tokenizer: Any) -> None:
    one = conversation("Hi.", "First one.", "And?", "First one.", "So?", "And that is all.")
    found = [part.strip().upper() for part in learned(chat_tokenizer(name), one)]
    end = ENDS[name].upper()
    assert found == [f"FIRST ONE.{end}", f"FIRST ONE.{end}", f"AND THAT IS ALL.{end}"]
    assert [part.strip().upper() for part in learned(chat_tokenizer(name), one, last_only=True)] == found[-1:]


def test_a_tokenizer_of_pieces(chat_tokenizer: Any) -> None:
    found = learned(chat_tokenizer("instruct", pieces=True), conversation("Who?", "Call me so.", "Why?", "It is so."))
    assert [part.replace(" ", "") for part in found] == ["Callmeso.</s>", "Itisso.</s>"]


@pytest.mark.parametrize(("text", "kept"), [("  spaced out \n", True), ("\n\nlines\n", False)])
def test_spaces_that_a_template_keeps_or_takes_away(text: str, kept: bool, chat_tokenizer: Any) -> None:
    assert learned(chat_tokenizer("header"), conversation("Hi.", text)) == [text.strip() + "<|eot|>"]
    mine = learned(chat_tokenizer("qwen3"), conversation("Hi.", text))
    assert mine == [(text if kept else text.lstrip("\n")) + "<|im_end|>"]


def test_reasoning_is_learned_where_the_template_keeps_it(chat_tokenizer: Any) -> None:
    """Qwen3's drops it from earlier turns."""
    reasoned = "<think>\nHm.\n</think>\n\nYes."
    found = learned(chat_tokenizer("qwen3"), conversation("Is it?", reasoned, "Sure?", reasoned))
    assert found == ["Yes.<|im_end|>", "<think>\nHm.\n</think>\n\nYes.<|im_end|>"]


def test_a_prompt_and_its_completion(chat_tokenizer: Any) -> None:
    path = chat_tokenizer("header")
    plain = parse_conversation(Located({"prompt": "Who?", "completion": "Me."}, "here"))
    assert learned(path, plain) == ["Me.<|eot|>"]
    before = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    after = [{"role": "user", "content": "C?"}, {"role": "assistant", "content": "D."}]
    several = parse_conversation(Located({"prompt": [*before, after[0]], "completion": [after[1]]}, "here"))
    assert learned(path, several) == ["D.<|eot|>"]


def test_tools_reach_the_template(chat_tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
    one = conversation("Where?", "There.", tools=[tool])
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer("qwen3"))
    assert '"name": "look"' in ChatTemplate(tokenizer, "", False).render(one).text
    assert learned(chat_tokenizer("qwen3"), one) == ["There.<|im_end|>"]


def refusal(path: str, one: Conversation, template: str | None = None) -> str:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(DataError) as caught:
        ChatTemplate(tokenizer, "the/tokenizer", False).render(one)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_told_is_refused(chat_tokenizer: Any) -> None:
    path = chat_tokenizer("header")
    changed = "{% for m in messages %}{{ m.content | replace('a', 'o') }}<|eot|>{% endfor %}"
    assert "chats.jsonl:7: the chat template of the/tokenizer changes the" in refusal(
        path, conversation("a", "bad"), changed
    )
    dropped = "{% for m in messages %}{% if loop.last %}{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    assert "changes the assistant's messages" in refusal(path, conversation("a", "b", "c", "d"), dropped)
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert "which is no control token: the trained model would not know when to stop" in refusal(
        path, conversation("a", "b"), endless
    )
    unmarked = "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    assert "marks 1 turns with {% generation %}, and the assistant has 2" in refusal(
        path, conversation("a", "b", "c", "d"), unmarked + "<|eot|>{% endfor %}"
    )
    assert "message 0 holds '<|eot|>', which the tokenizer takes for a control token" in refusal(
        path, conversation("stop <|eot|> here", "b")
    )
    twice = parse_conversation(
        Located(
            {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}, "chats.jsonl:7"
        )
    )
    assert "refuses it: roles must alternate" in refusal(chat_tokenizer("instruct"), twice)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": "x"}, "neither 'messages' nor 'prompt' and 'completion', only text"),
        ({"mesages": []}, "did you mean 'messages' by 'mesages'?"),
        ({"prompt": "x"}, "only prompt; prompt needs completion in the same row"),
        ({"conversations": []}, "conversations must be a list of messages"),
        ({"messages": "x"}, "messages must be a list of messages with role and content, found str 'x'"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": ["x"]}, "messages[0] must be an object with role and content, found str 'x'"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role; roles are system, user, assistant, tool"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "has the role 'asistant'; roles are"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0] must have a text as its content, found int '3'"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0] is empty; remove it"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant, so nothing to learn"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0] must be a call with the name of a function and arguments, found {}",
        ),
        ({"prompt": "x", "completion": [{"role": "user", "content": "y"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}, "tools is not JSON"),
    ],
)
def test_malformed_conversations_are_named(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_conversation(Located(columns, "chats.jsonl:7"))
    assert str(caught.value).startswith("data: chats.jsonl:7") and says in str(caught.value)


def test_tokenizers_that_will_not_do(byte_level: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    with pytest.raises(DataError, match=r"has no chat template, but data\.format=chat needs one"):
        ChatTemplate(tokenizer, byte_level, False)
