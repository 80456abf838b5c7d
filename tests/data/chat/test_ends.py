"""The control tokens with which learned turns end, by each kind of template."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, ChatOptions, Order, open_dataset
from megatron_ds.data.chat.ends import learned_ends
from megatron_ds.data.parts import ends_of

MESSAGES = [{"role": role, "content": f"call me {role}"} for role in ("user", "assistant") * 2]


def part(ids: list[int], learned: list[int], starts: list[int]) -> Any:
    return SimpleNamespace(ids=np.asarray(ids, np.int32), learned=np.asarray(learned, bool), starts=np.asarray(starts))


@pytest.mark.parametrize(
    ("ids", "learned", "starts", "ends"),
    [
        ([5, 6, 9], [0, 1, 1], [0, 3], {9: "<end>"}),
        ([5, 6, 9, 7], [0, 1, 1, 1], [0, 4], {9: "<end>"}),  # white space after the end, learned too
        ([5, 6, 9, 7], [0, 1, 1, 0], [0, 4], {9: "<end>"}),
        ([9, 6, 7, 7], [0, 1, 0, 0], [0, 4], {}),  # the end is of the prompt
        ([9, 6, 9, 8], [1, 1, 1, 1], [0, 2, 4], {8: "<other>", 9: "<end>"}),  # all is learned: two conversations
        ([9], [1], [0, 1], {9: "<end>"}),
        ([5, 6], [0, 0], [0, 2], {}),
    ],
)
def test_the_last_control_token_of_a_span(ids: Any, learned: Any, starts: Any, ends: dict[int, str]) -> None:
    assert learned_ends([part(ids, learned, starts)], {8: "<other>", 9: "<end>", 10: "<never>"}) == ends
    assert learned_ends([part(ids, learned, starts)] * 2, {}) == {}


@pytest.mark.parametrize(
    ("template", "end"),
    [("header", "<|eot|>"), ("instruct", "</s>"), ("marked", "<|im_end|>"), ("qwen3", "<|im_end|>")],
)
def test_templates(template: str, end: str, chat_tokenizer: Any, write_jsonl: Any, tmp_path: Any) -> None:
    source, path = write_jsonl([{"messages": MESSAGES}] * 3), chat_tokenizer(template)
    shared: Any = ("chat", Causal(), [source], 128, 4096, path, str(tmp_path / "cache"))
    expected = {AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(end): end}
    assert (
        ends_of(open_dataset(*shared)) == ends_of(open_dataset(*shared, options=ChatOptions(packing=True))) == expected
    )
    assert ends_of(open_dataset(*shared, weights=[1], order=Order(3, 0, shuffle=True))) == expected
