"""The pace of `prepare` and the memory of all its processes, beside a plain loop and beside `datasets.map`."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.files import documents

LOOP = """
import json, sys, time
import numpy as np
from transformers import AutoTokenizer
source, tokenizer, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
began, count = time.perf_counter(), 0
with open(source) as lines, open(output, "wb") as file:
    for line in lines:
        ids = [*tokenizer(json.loads(line)["text"])["input_ids"], 0]
        file.write(np.asarray(ids, dtype="<u2").tobytes())
        count += len(ids)
print(count / (time.perf_counter() - began))
"""
MAP = """
import sys, time
import datasets
from transformers import AutoTokenizer
source, tokenizer, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
table = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output)
began = time.perf_counter()
made = table.map(
    lambda rows: {"ids": tokenizer(rows["text"])["input_ids"]},
    batched=True, batch_size=64, num_proc=2, remove_columns=["text"], load_from_cache_file=False,
)
took = time.perf_counter() - began
print((sum(map(len, made["ids"])) + len(made)) / took)
"""
OURS = """
import sys, time
from megatron_ds.data.prepare import PrepareOptions, prepare
source, tokenizer, output = sys.argv[1:]
began = time.perf_counter()
done = prepare(PrepareOptions([source], tokenizer, output, workers=2, overwrite=True, restart=True))
print(done.manifest["num_tokens"] / (time.perf_counter() - began))
"""


def write_source(book: Path, path: Path, size: int) -> None:
    """About so many bytes of JSON lines, of documents that are all different."""
    texts = documents(book.read_text(encoding="utf-8"), size)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def run(code: str, source: Path, tokenizer: str, output: Path) -> tuple[float, float]:
    """Tokens a second, and the most MB that all of its processes held."""
    command = [sys.executable, "-c", code, str(source), tokenizer, str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        try:
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(one.memory_full_info().pss for one in everyone))
        except psutil.Error:  # one of them has just ended
            continue
        finally:
            time.sleep(0.5)
    assert process.stdout is not None and process.returncode == 0
    return float(process.stdout.read().split()[-1]), peak / 1e6


def compare(book: Path, tokenizer: str, place: Path, size: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of tokens a second and largest memory, of rounds that take turns."""
    write_source(book, place / "source.jsonl", size)
    found: dict[str, list[tuple[float, float]]] = {"loop": [], "map": [], "ours": []}
    for number in range(rounds):
        for name, code in (("loop", LOOP), ("map", MAP), ("ours", OURS)):
            found[name].append(run(code, place / "source.jsonl", tokenizer, place / f"{name}{number}"))
    return {
        name: (statistics.median(rate for rate, _ in each), max(peak for _, peak in each))
        for name, each in found.items()
    }


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_twice_as_fast_as_a_loop(book: Path, tokenizer_path: str, tmp_path: Path) -> None:
    found = compare(book, tokenizer_path, tmp_path, 40_000_000, rounds=3)
    for name, (rate, peak) in found.items():
        print(f"{name:5} {rate:10,.0f} tokens/s  {peak:6,.0f} MB")
    assert found["ours"][0] > 2 * found["loop"][0] and found["ours"][0] > found["map"][0]


@pytest.mark.sweep
def test_the_comparison_runs(book: Path, tokenizer_path: str, tmp_path: Path) -> None:
    found = compare(book, tokenizer_path, tmp_path, 200_000, rounds=1)
    assert all(rate > 0 for rate, _ in found.values())
