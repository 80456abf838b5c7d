"""Prompts and completions for tokenizers without a chat template: as the tokenizer encodes them, with an end."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ds.data.chat.conversations import parse_conversation
from megatron_ds.data.chat.plain import PlainTemplate
from megatron_ds.data.chat.tokens import offset_backend, tokenize
from megatron_ds.data.readers.examples import Located
from megatron_ds.errors import DataError

# What the tokenizer adds to each text: nothing as GPT-2, <s> as Llama, <s> and </s> as some others.
SINGLE = {"nothing": "$A", "bos": "<s> $A", "both": "<s> $A </s>"}


def tokenizer_that_adds(added: str, *, pieces: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>") if pieces else models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first") if pieces else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first") if pieces else decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["The capital of France is Paris. Say hello."], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=SINGLE[added], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>", unk_token="<unk>")


def learned(tokenizer: PreTrainedTokenizerFast, columns: dict[str, Any], **options: Any) -> tuple[list[int], str]:
    """All ids, and the text of those under loss."""
    one = parse_conversation(Located(columns, "here:1"))
    rendered = PlainTemplate(tokenizer, "the/tokenizer", **options).render(one)
    ((ids, mask),) = tokenize([rendered], offset_backend(tokenizer, "here"))
    return ids.tolist(), tokenizer.decode(ids[mask])


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("added", SINGLE)
def test_prompt_completion_and_end(added: str, pieces: bool) -> None:
    tokenizer = tokenizer_that_adds(added, pieces=pieces)
    prompt, completion = "The capital of France is", " Paris."
    ids, said = learned(tokenizer, {"prompt": prompt, "completion": completion})
    whole = tokenizer(prompt + completion)["input_ids"]
    assert ids == (whole if added == "both" else [*whole, tokenizer.eos_token_id])
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert said.strip() == "Paris.</s>"
    assert learned(tokenizer, {"prompt": prompt, "completion": f"{completion}</s>"})[0] == ids
    everything, all_said = learned(tokenizer, {"prompt": prompt, "completion": completion}, loss_on="all")
    assert everything == ids and all_said.removeprefix("<s>").strip() == f"{prompt}{completion}</s>"


def test_instructions() -> None:
    tokenizer = tokenizer_that_adds("nothing")
    ids, said = learned(tokenizer, {"instruction": "Name the capital.", "input": "France", "output": "Paris."})
    assert tokenizer.decode(ids) == "Name the capital.\nFrance\nParis.</s>" and said == "Paris.</s>"


def test_what_needs_a_template_or_an_end_is_refused() -> None:
    tokenizer = tokenizer_that_adds("bos")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]
    for columns in ({"messages": messages}, {"prompt": messages[:1], "completion": "x"}):
        with pytest.raises(DataError, match=r"here:1: .*has no chat template, .*'prompt' and 'completion', which need"):
            learned(tokenizer, columns)
    with pytest.raises(DataError, match="here:1 holds '<s>', which the tokenizer takes for a control token"):
        learned(tokenizer, {"prompt": "a <s>", "completion": "b"})
    with pytest.raises(DataError, match="eos_token is not set, but it ends each completion"):
        learned(tokenizer_that_adds("bos", eos=None), {"prompt": "a", "completion": "b"})


def test_a_run_without_a_chat_template(write_jsonl: Any, byte_level: str, tmp_path: Path) -> None:
    from megatron_ds.data import Causal, ChatOptions, open_dataset

    source = write_jsonl([{"prompt": "Call me", "completion": " Ishmael."}])
    arguments = ("chat", Causal(), [source], 64, 4096, byte_level, str(tmp_path))
    datasets = [open_dataset(*arguments, options=ChatOptions(loss_on=on)) for on in ("assistant", "all")]
    counts = [int((one.sample(0)["targets"] != -100).sum()) for one in datasets]
    assert counts[0] < counts[1] == int((datasets[0].sample(0)["input_ids"] != 0).sum()) - 1
    assert datasets[0].fingerprint != datasets[1].fingerprint
