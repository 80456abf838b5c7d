"""The text of new ids after a prompt."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ds.errors import DataError
from megatron_ds.generation import added_text
from megatron_ds.generation.prompts import read_prompts
from tests.training.tiny import write_tokenizer


def test_a_space_between_prompt_and_new_text_stays(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("w1 w2 w3 w4")["input_ids"]
    assert added_text(tokenizer, ids[:2], ids[2:]) == " w3 w4"
    assert added_text(tokenizer, [], ids) == "w1 w2 w3 w4"
    assert added_text(tokenizer, [tokenizer.eos_token_id], ids[2:]) == "w3 w4"
    assert added_text(tokenizer, ids[:2], []) == ""


def test_a_row_without_a_prompt_is_told_which_name_to_use(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="1: has neither prompt nor messages; rename its field with the text to prompt"):
        read_prompts(path)
