"""Chat templates that never end or fill the memory: refused by name, and no process is left."""

import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data import Causal, ChatOptions, load_tokenizer, open_dataset
from megatron_ds.data.chat import limited_process
from megatron_ds.data.chat import template as template_module
from megatron_ds.data.chat.limited_process import LimitedProcess, LimitExceeded, Limits, RequestFailed
from megatron_ds.data.chat.template import Template, TemplateRefusal
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.generation.prompts import Prompt, encode_prompts

MESSAGES = [{"role": "user", "content": "call me"}, {"role": "assistant", "content": "ishmael"}]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TIME, MEMORY = "1 s of processor time", r"512 MB of memory"
SMALL = Limits(time_s=0.5)
DOUBLED = "{% set s = namespace(v='abcdefgh') %}{% for i in range(60) %}{% set s.v = s.v ~ s.v %}{% endfor %}"
NESTED = "{% set s = namespace(v=[1]) %}{% for i in range(60) %}{% set s.v = [s.v, s.v] %}{% endfor %}{{ s.v|tojson }}"
QUICK = {
    "a text times a number": ("{{ messages[0]['content'] * 10**10 }}", MEMORY),
    "a constant": ("{{ 'a' * 10**11 }}", MEMORY),
    "a text that doubles": (DOUBLED, MEMORY),
    "padding": ("{{ messages[0]['content'].center(10**11) }}", MEMORY),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
}
MUCH_TEXT = "{% for i in range(99999) %}" + "long text " * 100 + "{% endfor %}"
MORE = {
    "a constant number": ("{{ 9**(9**9) }}", TIME),
    "lists in lists": (NESTED, "of"),
    "a width": ("{{ '%99999999999d' % 1 }}", "of"),
    "a number": ("{% set n = messages|length + 7 %}{{ n**n**n }}", TIME),
    "calls": (
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "of",
    ),
    "a filter": ("{{ (range(99999)|list|join('x' * 99999)) }}", MEMORY),
    "sums": ("{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}", TIME),
}


def with_template(tokenizer_path: str, text: str) -> Any:
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = text
    return tokenizer


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "LimitedProcess", partial(LimitedProcess, limits=SMALL))


def check_refusal(tokenizer_path: str, text: str, says: str) -> None:
    before, start = children(), time.process_time()
    with pytest.raises(ConfigError, match=f"tokenizer here: its chat template takes more than .*{says}.*; mend the"):
        Template(with_template(tokenizer_path, text), "here", "2024-07-26").render(MESSAGES, None)
    assert children() <= before and time.process_time() - start < 1


@pytest.mark.parametrize("name", QUICK)
def test_a_template_without_limits_is_stopped(tokenizer_path: str, small_limits: None, name: str) -> None:
    says = QUICK[name][1].replace("1 s", r"0\.5 s")
    check_refusal(tokenizer_path, QUICK[name][0], says)


@pytest.mark.sweep
@pytest.mark.parametrize("name", MORE)
def test_more_templates_without_limits(tokenizer_path: str, small_limits: None, name: str) -> None:
    try:
        check_refusal(tokenizer_path, MORE[name][0], MORE[name][1].replace("1 s", r"0\.5 s"))
    except TemplateRefusal as refusal:  # Python's own limit of recursion or of digits was first
        assert "recursion" in str(refusal) or "digits" in str(refusal) or "too" in str(refusal)


def test_what_the_process_has_and_how_it_ends(tokenizer_path: str) -> None:
    before = children()
    template = Template(with_template(tokenizer_path, PLAIN), "here", "2024-07-26")
    (child,) = children() - before
    assert template.render(MESSAGES, None)[0] == "call meishmael"
    assert children() - before == {child}, "the same process answers"
    files = [os.readlink(f"/proc/{child}/fd/{one}") for one in os.listdir(f"/proc/{child}/fd")]
    assert [one for one in files if one.startswith("socket:")] == [] and len(files) <= 5 + 3
    os.kill(int(child), signal.SIGKILL)
    with pytest.raises(ConfigError, match="or its process was killed"):
        template.render(MESSAGES, None)
    assert template.render(MESSAGES, None)[0] == "call meishmael" and child not in children()
    del template
    assert children() <= before


def test_signals_to_a_whole_job_do_not_end_it(tokenizer_path: str) -> None:
    before = children()
    template = Template(with_template(tokenizer_path, PLAIN), "here", "2024-07-26")
    (child,) = children() - before
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(int(child), number)
    assert template.render(MESSAGES, None)[0] == "call meishmael" and children() - before == {child}


def test_it_has_no_file_above_the_limit_of_files() -> None:
    """The limit may have been lowered since; where it is 2^30, a call for each number would take minutes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading, writing = os.pipe()
    os.dup2(writing, 700)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        process = LimitedProcess(lambda request: os.path.exists(f"/proc/self/fd/{request}"))
        assert [process.call(one) for one in (writing, 700)] == [False, False]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in (reading, writing, 700):
            os.close(descriptor)


def test_a_run_may_have_more_than_1024_files() -> None:
    """Each array of a cache that is mapped has one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this machine allows fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]
    try:
        assert LimitedProcess(str).call(1) == "1"
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_was_forked_has_one_of_its_own(tokenizer_path: str) -> None:
    before = children()
    template = Template(with_template(tokenizer_path, PLAIN), "here", "2024-07-26")
    (child,) = children() - before
    forked = os.fork()
    if forked == 0:
        rendered, _ = template.render(MESSAGES, None)
        os._exit(0 if rendered == "call meishmael" and len(children()) == 1 else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert template.render(MESSAGES, None)[0] == "call meishmael" and child in children()


def test_it_ends_with_the_process_that_forked_it(tokenizer_path: str) -> None:
    reading, writing = os.pipe()
    forked = os.fork()
    if forked == 0:
        template = Template(with_template(tokenizer_path, PLAIN), "here", "2024-07-26")
        os.write(writing, max(children(), key=int).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        del template
    child = int(os.read(reading, 99))
    os.waitpid(forked, 0)
    for pipe in (reading, writing):
        os.close(pipe)
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{child}") and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for %}", "its chat template is malformed"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "its chat template is malformed"),
        ("x" * (2**20 + 1), "its chat template has 1,048,577 characters; 1,048,576 may be"),
        ("{{ lipsum() }}", "draws at random"),
    ],
)
def test_a_template_that_cannot_be_read(tokenizer_path: str, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Template(with_template(tokenizer_path, text), "here", "2024-07-26")


def test_no_row_is_skipped_for_it(write_jsonl: Any, chat_tokenizer: Any, tmp_path: Path, small_limits: None) -> None:
    tokenizer = load_tokenizer(chat_tokenizer("header"))
    tokenizer.chat_template = MUCH_TEXT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows, path = write_jsonl([{"messages": MESSAGES}] * 3), str(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match="takes more than 64 MB of text"):
        open_dataset("chat", Causal(), [rows], 64, 4096, path, str(tmp_path / "cache"), options=ChatOptions())
    with pytest.raises(ConfigError, match="takes more than 64 MB of text"):
        encode_prompts(tokenizer, [Prompt.of_user("call me")], path)


def test_one_without_requests_ends_and_another_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "_TICK_S", 0.01)
    before, process = children(), LimitedProcess(str)
    assert process.call(1) == "1"
    (child,) = children() - before
    deadline = time.monotonic() + 20
    while "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.call(2) == "2" and child not in children()


def test_an_exception_and_a_limit_of_any_function() -> None:
    process = LimitedProcess(lambda request: [request, 1 // request], Limits(answer_bytes=100))
    assert process.call(2) == [2, 0]
    with pytest.raises(RequestFailed, match="division or modulo by zero"):
        process.call(0)
    with pytest.raises(LimitExceeded):
        process.call(10**200)
    assert process.call(1) == [1, 1]
