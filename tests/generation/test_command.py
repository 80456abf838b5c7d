"""The command and `mds.generate`: texts, conversations, ends, draws, what is printed, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.errors import ConfigError, DataError, TopologyError
from tests.cli.conftest import Fork, Start, fork, start  # noqa: F401
from tests.generation.models import NEW_OF_TEXTS, TEXTS, save_speaking_model
from tests.ranks import preload


@pytest.fixture(scope="module")
def speaking(corpus: Path, once: Any) -> tuple[Path, list[str]]:
    """A directory with model and tokenizer, and transformers' texts."""
    preload()
    directory, texts = once(save_speaking_model, corpus / "train.txt")
    return directory, texts


def test_texts_are_those_of_transformers(speaking: tuple[Path, list[str]]) -> None:
    directory, expected = speaking
    found = mds.generate(directory, TEXTS, tp=2, max_new_tokens=NEW_OF_TEXTS)
    assert [one.text for one in found] == expected
    assert [one.prompt.text for one in found] == TEXTS
    assert {one.stopped_by for one in found} == {"length"} and {len(one.ids) for one in found} == {NEW_OF_TEXTS}


def test_one_prompt_is_shown_as_it_is_written(speaking: tuple[Path, list[str]], fork: Fork) -> None:  # noqa: F811
    directory, expected = speaking
    command = fork("-m", "megatron_ds", "generate", directory, "--prompt", TEXTS[0], "--max-new-tokens", NEW_OF_TEXTS)
    shown, errors = command.communicate()
    assert command.returncode == 0, errors
    assert shown == f"{TEXTS[0]}{expected[0]}\n"
    assert f"{NEW_OF_TEXTS} tokens in" in errors and "tokens/s" in errors


def test_json_has_a_line_for_each_prompt(
    speaking: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, expected = speaking
    messages = [{"role": "user", "content": "In"}]
    rows = [{"prompt": TEXTS[1]}, {"messages": messages}]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["generate", str(directory), "--prompts", str(tmp_path / "prompts.jsonl"), "--json", "--pp", "2"]
    assert _run([*arguments, "--max-new-tokens", str(NEW_OF_TEXTS)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["prompt"] == TEXTS[1] and first["text"] == expected[1]
    assert first["stopped_by"] == "length" and first["num_tokens"] == len(first["ids"]) == NEW_OF_TEXTS
    assert second["messages"] == messages and second["num_prompt_tokens"] > first["num_prompt_tokens"]


def test_a_text_ends_at_a_stop_and_at_the_models_end(speaking: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, expected = speaking
    stop = expected[0][4:7]
    (stopped,) = mds.generate(directory, TEXTS[:1], max_new_tokens=NEW_OF_TEXTS, stop=[stop])
    assert stopped.text == expected[0].partition(stop)[0] and stopped.stopped_by == "stop"
    ids = mds.generate(directory, TEXTS[:1], max_new_tokens=NEW_OF_TEXTS)[0].ids
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((directory / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [ids[5]]}))
    ended, other = mds.generate(tmp_path, TEXTS[:2], max_new_tokens=NEW_OF_TEXTS)
    assert ended.ids == ids[: ids.index(ids[5]) + 1] and ended.stopped_by == "end"
    assert other.text == expected[1] or other.stopped_by == "end"


def test_draws_depend_on_the_seed_and_not_on_the_batch(speaking: tuple[Path, list[str]]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": NEW_OF_TEXTS, "temperature": 1.0, "top_p": 0.9}
    together = mds.generate(speaking[0], TEXTS, **settings, seed=3, tp=2)
    one_by_one = mds.generate(speaking[0], TEXTS, **settings, seed=3, batch_size=1)
    assert [one.ids for one in together] == [one.ids for one in one_by_one]
    assert together[0].ids != mds.generate(speaking[0], TEXTS[:1], **settings, seed=4)[0].ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 3}, "--tp=3 does not divide"),
        ({"dtype": "int8"}, "--dtype=int8"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 adds nothing; nearest: 1"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": 5}, "top_k=5 has no effect at temperature=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 is not a probability above 0; nearest: 1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_value_is_refused(settings: dict[str, Any], message: str, speaking: tuple[Path, list[str]]) -> None:
    with pytest.raises((ConfigError, TopologyError), match=re.escape(message)):
        mds.generate(speaking[0], TEXTS[:1], **settings)


@pytest.mark.parametrize("prompts", [[], [""], [[]]])
def test_a_prompt_is_refused(prompts: list[Any], speaking: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match=r"no prompt|has no tokens|must be a list of messages"):
        mds.generate(speaking[0], prompts)


@pytest.mark.sweep
def test_a_launcher_starts_the_ranks(speaking: tuple[Path, list[str]], start: Start) -> None:  # noqa: F811
    directory, expected = speaking
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "megatron_ds", "generate")
    shown, errors = start(
        *launch, directory, "--prompt", TEXTS[0], "--tp", 2, "--max-new-tokens", NEW_OF_TEXTS
    ).communicate()
    assert shown == f"{TEXTS[0]}{expected[0]}\n", errors
    other, errors = start(*launch, directory, "--prompt", TEXTS[0]).communicate()
    assert "--tp * --pp = 1 is not the launcher's number of ranks, 2; try --tp 2" in errors and not other
