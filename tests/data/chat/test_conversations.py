"""Rows in the forms that data sets have become the same messages; what cannot be learned is named."""

import json
from typing import Any

import pytest

from megatron_ds.data.chat.conversations import Conversation, is_conversation, parse_conversation
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [LOOK]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def parse(**columns: Any) -> Conversation:
    return parse_conversation(Located(columns, "chats.jsonl:7"))


def refusal(**columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(**columns)
    assert str(caught.value).startswith("data: chats.jsonl:7") and "\n" not in str(caught.value)
    return str(caught.value)


def share(**fields: str) -> list[dict[str, str]]:
    return [{"from": name.rstrip("_"), "value": value} for name, value in fields.items()]


FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [HI, HELLO]}, [HI, HELLO]),
    "as JSON": ({"messages": json.dumps([HI, HELLO])}, [HI, HELLO]),
    "sharegpt": ({"conversations": share(human="Hi", gpt="Hello.")}, [HI, HELLO]),
    "sharegpt, other names": ({"conversations": share(user="Hi", chatgpt="Hello.")}, [HI, HELLO]),
    "sharegpt, roles": ({"conversations": [HI, HELLO]}, [HI, HELLO]),
    "conversation": ({"conversation": [HI, HELLO]}, [HI, HELLO]),
    "sharegpt, mixed keys": ({"conversations": [{"role": "user", "value": "Hi"}, HELLO]}, [HI, HELLO]),
    "sharegpt, system": (
        {"conversations": share(human="Hi", gpt="Hello."), "system": "Be brief."},
        [SYSTEM, HI, HELLO],
    ),
    "sharegpt, system twice": (
        {"conversations": share(system="Be brief.", human="Hi", gpt="Hello."), "system": "Be brief."},
        [SYSTEM, HI, HELLO],
    ),
    "sharegpt, tools": (
        {"conversations": share(human="Hi", function_call=json.dumps(LOOK["function"]), observation="y", gpt="Hello.")},
        [HI, CALLS, {"role": "tool", "content": "y"}, HELLO],
    ),
    "alpaca": ({"instruction": "Hi", "output": "Hello."}, [HI, HELLO]),
    "alpaca, input": (
        {"instruction": "Translate.", "input": "Hi", "output": "Hello."},
        [{"role": "user", "content": "Translate.\nHi"}, HELLO],
    ),
    "alpaca, all": (
        {
            "instruction": "Hi",
            "input": "",
            "output": "Hello.",
            "system": "Be brief.",
            "history": [["A?", "B."]],
        },
        [SYSTEM, {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, HI, HELLO],
    ),
    "prompt": ({"prompt": "Hi", "completion": "Hello."}, [HI, HELLO]),
    "prompt, messages": ({"prompt": [SYSTEM, HI], "completion": [HELLO]}, [SYSTEM, HI, HELLO]),
    "prompt, mixed": ({"prompt": [HI], "completion": "Hello."}, [HI, HELLO]),
    "more columns": ({"messages": [HI, HELLO], "prompt": "Hi", "chosen": [], "rejected": [], "id": 3}, [HI, HELLO]),
    "null columns": ({"messages": None, "prompt": "Hi", "completion": "Hello.", "tools": None}, [HI, HELLO]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_messages(name: str) -> None:
    columns, expected = FORMS[name]
    assert list(parse(**columns).messages) == expected
    assert is_conversation({key for key, value in columns.items() if value is not None})


def test_which_messages_carry_loss() -> None:
    assert parse(prompt=[HI, HELLO, HI], completion="Yes.").learned == [3]
    assert parse(instruction="Hi", output="Hello.", history=[["A?", "B."]]).learned == [1, 3]
    on, off = [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"masked": False}, {"training": 1}, {}], []
    off = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"masked": True}]
    messages = [message for switch in (*on, *off) for message in (HI, {**HELLO, **switch})]
    one = parse(messages=messages)
    assert one.learned == [1, 3, 5, 7, 9, 11] and len(one.turns) == 12
    assert all(set(message) == {"role", "content"} for message in one.messages)  # switches are not for the template
    assert "switched off for every message of the assistant" in refusal(messages=[HI, {**HELLO, "weight": 0}])
    assert parse(messages=[{**HI, "weight": 0}, {**HELLO, "weight": None}]).learned == [1]


@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ({"weight": 0.5}, "messages[1]: weight=0.5 is no switch of loss, which is on or off; nearest: weight: 0 or 1"),
        ({"weight": 2}, "weight=2 is no switch"),
        ({"weight": "0"}, "weight='0' is no switch"),
        ({"train": "no"}, "train='no' is no switch"),
        ({"weight": 1, "train": False}, "messages[1] switches its loss both on and off"),
        ({"mask": 1}, "messages[1]: mask=1 may switch loss on or off, or weigh it; write weight: 0 or 1"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail="),
    ],
)
def test_switches_that_mean_something_else_are_refused(switch: dict[str, Any], says: str) -> None:
    assert says in refusal(messages=[HI, {**HELLO, **switch}])


CALL_FORMS = [
    {"tool_calls": [{"id": "c1", **LOOK}]},
    {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}]},
    {"tool_calls": [{"id": "c1", "name": "look", "arguments": {"at": "x"}}]},
    {"tool_calls": json.dumps([{"id": "c1", **LOOK}])},
    {"tool_calls": [json.dumps({"id": "c1", **LOOK})]},
    {"tool_calls": {"id": "c1", **LOOK}},
]


@pytest.mark.parametrize("fields", CALL_FORMS, ids=str)
@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_every_form(fields: dict[str, Any], content: str | None) -> None:
    one = parse(messages=[HI, {"role": "assistant", "content": content, **fields}])
    assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **LOOK}]}


def test_other_forms_of_calls_and_results() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "x"}'}}
    result = {"role": "function", "name": "look", "content": {"seen": ["é", 1]}}
    one = parse(messages=[HI, old, result, HELLO], functions=[{"name": "look", "parameters": {}}])
    assert list(one.messages) == [
        HI,
        CALLS,
        {"role": "tool", "name": "look", "content": '{"seen": ["é", 1]}'},
        HELLO,
    ]
    assert one.tools == [TOOL]
    empty = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    assert parse(messages=[HI, empty]).messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}
    assert parse(messages=[HI, {**HELLO, "tool_calls": []}]).messages[1] == HELLO


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL["function"]]], ids=str)
def test_tools_of_every_form(tools: Any) -> None:
    assert parse(messages=[HI, HELLO], tools=tools).tools == [TOOL]
    assert parse(conversations=[HI, HELLO], tools="").tools is None


def test_nulls_of_tables_are_no_arguments() -> None:
    """In a table, the arguments of each call have the keys of all calls; in JSON, a null is an argument."""
    call = {"function": {"name": "look", "arguments": {"at": "x", "until": None}}, "id": None}
    row = {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    table = parse_conversation(Located(row, "table: row 0", fills_nulls=True))
    assert table.messages[1]["tool_calls"] == [LOOK]
    assert parse(**row).messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": "x", "until": None}


def test_contents_in_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, "lo", {"type": "output_text", "text": "."}]
    assert parse(messages=[HI, {"role": "assistant", "content": parts}]).messages[1] == HELLO
    thought = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello."}]
    assert parse(messages=[HI, {"role": "assistant", "content": thought}]).messages[1] == {
        **HELLO,
        "reasoning_content": "Hm.",
    }
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "messages[0] holds a part of type 'image_url', and data.format=chat learns from text" in refusal(
        messages=[{"role": "user", "content": image}, HELLO]
    )


def test_empty_messages() -> None:
    empty = {"role": "system", "content": ""}
    silent = {"role": "tool", "content": ""}
    assert list(parse(messages=[empty, HI, CALLS, silent, HELLO]).messages) == [empty, HI, CALLS, silent, HELLO]
    assert "messages[1] is empty; remove it" in refusal(messages=[HI, {"role": "assistant", "content": ""}, HELLO])
    thought = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert parse(messages=[HI, thought]).messages[1] == thought
    assert "must have a text as its content, found nothing" in refusal(messages=[{"role": "user"}, HELLO])


def test_developers_and_further_keys_are_kept() -> None:
    developer = {"role": "developer", "content": "Be brief.", "name": "me"}
    assert parse(messages=[developer, HI, {**HELLO, "mood": "glad"}]).messages[0] == developer


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "y"}, "a pair for preference training (DPO)"),
        ({"chosen": [HI, HELLO], "rejected": [HI, HELLO]}, "to learn the chosen one, write it as 'completion'"),
        ({"prompt": "Hi", "completion": "x", "label": False}, "label=false marks an undesired completion"),
        ({"prompt": "Hi"}, "only prompt; prompt needs completion in the same row"),
        ({"instruction": "Hi", "input": ""}, "instruction needs output in the same row"),
        ({"conversation_": [HI]}, "did you mean 'conversation' by 'conversation_'?"),
        ({"heading": "Hi", "body": "x"}, "as in data.columns={prompt: question, completion: answer}"),
        ({"conversations": share(human="Hi", gtp="x")}, "conversations[1] has the role 'gtp'; roles are"),
        (
            {"conversations": share(system="s", human="Hi", gpt="x"), "system": "t"},
            "system and the first message differ",
        ),
        ({"instruction": "Hi", "output": 3}, "output must be a text, found int '3'"),
        ({"instruction": "Hi", "output": "x", "history": "y"}, "history must be a list of pairs of texts"),
        ({"messages": [HI, {**HELLO, "tool_calls": [{"function": {}}]}]}, "tool_calls[0] must be a call"),
        (
            {"messages": [HI, {**HELLO, "tool_calls": [{"name": "look", "arguments": "{at"}]}]},
            "messages[1].tool_calls[0]: arguments is not JSON",
        ),
        ({"messages": [HI, {**HELLO, "tool_calls": [{"name": "look", "arguments": "[1]"}]}]}, "must be an object"),
        ({"messages": [HI, HELLO], "tools": [3]}, "tools[0] must be an object, found int '3'"),
        ({"conversations": share(human="Hi", function_call="look")}, "conversations[1] is not JSON"),
    ],
)
def test_what_cannot_be_learned_is_named(columns: dict[str, Any], says: str) -> None:
    assert says in refusal(**columns)


@pytest.mark.parametrize("column", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": 0}])
def test_a_row_that_switches_its_loss_off_is_not_learned(column: dict[str, Any]) -> None:
    columns = {"prompt": "a", "completion": "b"}
    name, value = next(iter(column.items()))
    with pytest.raises(DataError, match=rf"x:1: {name}={value!r} switches off the loss of the whole row"):
        parse_conversation(Located({**columns, **column}, "x:1"))
    assert parse_conversation(Located({**columns, name: 1, "loss": 0.0}, "x:1")).learned == [1]


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        ({"question": "Hi", "answer": "x"}, "prompt: question, completion: answer"),
        ({"input": "Hi", "output": "x"}, "prompt: input, completion: output"),
        ({"prompt": "Hi", "response": "x", "rank": 3}, "completion: response"),
        ({"instruction": "Hi", "context": "there", "response": "x"}, "input: context, output: response"),
        ({"dialogue": [HI, HELLO]}, "messages: dialogue"),
    ],
)
def test_a_mapping_is_named_where_it_works(columns: dict[str, Any], mapping: str) -> None:
    assert refusal(**columns).endswith(f"; try data.columns={{{mapping}}}")
    pairs = [pair.split(": ") for pair in mapping.split(", ")]
    mapped = {ours: columns[theirs] for ours, theirs in pairs}
    assert parse(**columns, **mapped).learned


@pytest.mark.parametrize("columns", [{"dialogue": ["Hi", "Hello"]}, {"question": "Hi", "answer": {"text": "x"}}])
def test_no_mapping_is_named_that_would_fail(columns: dict[str, Any]) -> None:
    assert "try data.columns" not in refusal(**columns)
