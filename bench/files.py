"""Contestants that work on files: conversion of weights, `cp`, and three ways to tokenize a corpus."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from bench.contestant import Step
from bench.work import Spec

TEXT, TOKENIZER = "corpus.jsonl", "tokenizer"


def copy(spec: Spec) -> Step:
    """Run `cp -r`, which writes into the page cache like the others."""
    return _making(spec, lambda source, target: subprocess.run(["cp", "-r", source, target], check=True))


def rewrite_directory(spec: Spec) -> Step:
    """Read a Hugging Face directory, map it through our tables in both directions, and write it with the same names."""
    from megatron_ds.hf.convert import rewrite

    return _making(spec, rewrite)


def _making(spec: Spec, make: Callable[[str, str], object]) -> Step:
    target = Path(spec.folder).parent / f"made-{spec.runner}"

    def step() -> float:
        make(spec.folder, str(target))
        shutil.rmtree(target)
        return 0.0

    return step


def plain_loop(spec: Spec) -> Step:
    """Tokenize each line and write its ids to a file, like a script of ten lines."""
    from transformers import AutoTokenizer

    source = Path(spec.folder)
    tokenizer = AutoTokenizer.from_pretrained(source / TOKENIZER)

    def step() -> float:
        with open(source / TEXT) as lines, open(source / "loop.bin", "wb") as file:
            for line in lines:
                ids = tokenizer(json.loads(line)["text"])["input_ids"]
                file.write(np.asarray(ids, dtype="<u2").tobytes())
        return 0.0

    return step


def datasets_map(spec: Spec) -> Step:
    """Run `datasets.map` with one process per core; its result is Arrow, which would still have to be packed."""
    import datasets
    from transformers import AutoTokenizer

    source = Path(spec.folder)
    tokenizer = AutoTokenizer.from_pretrained(source / TOKENIZER)
    table = datasets.load_dataset("json", data_files=str(source / TEXT), split="train", cache_dir=str(source / "cache"))

    def step() -> float:
        table.map(
            lambda rows: {"ids": tokenizer(rows["text"])["input_ids"]},
            batched=True,
            batch_size=64,
            num_proc=spec.options["workers"],
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        return 0.0

    return step


def prepare_corpus(spec: Spec) -> Step:
    """Run `megatron-ds prepare`, from text to `.bin` and `.idx` with checksums and manifest."""
    from megatron_ds.data.prepare import PrepareOptions, prepare

    source = Path(spec.folder)
    options = PrepareOptions(
        (str(source / TEXT),),
        str(source / TOKENIZER),
        str(source / "prepared" / "corpus"),
        spec.options["workers"],
        overwrite=True,
        restart=True,
    )

    def step() -> float:
        prepare(options)
        return 0.0

    return step


def write_corpus(size_bytes: int, folder: Path) -> int:
    """Write distinct documents made from the examples' book, and their tokenizer; returns the number of tokens."""
    from transformers import AutoTokenizer

    example = Path(__file__).parents[1] / "examples" / "pretrain_moby_dick"
    shutil.copytree(example / "tokenizer", folder / TOKENIZER)
    book = "\n".join(path.read_text(encoding="utf-8") for path in sorted((example / "data").glob("*.txt")))
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    texts = documents(book, size_bytes)
    (folder / TEXT).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def documents(book: str, size: int) -> list[str]:
    """Yield distinct documents of 4,000 to 20,000 characters, about `size` in total, cut out of a book."""
    texts, at, length = [], 0, 0
    for number in count(1):
        if length >= size:
            break
        at = (at + 7919 * number) % (len(book) - 20_000)
        texts.append(book[at : at + 4000 + number * 131 % 16_000])
        length += len(texts[-1])
    return texts


FIRST_STEP = "output "  # the last line that a run prints before its first step


def from_pretrained(spec: Spec) -> Step:
    """Load the model with transformers in a new Python process."""
    code = f"from transformers import AutoModelForCausalLM as Model; Model.from_pretrained({spec.folder!r})"

    def step() -> float:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        return 0.0

    return step


def start_training(spec: Spec) -> Step:
    """Run `megatron-ds train` until its first step begins, then stop it."""
    place = Path(tempfile.mkdtemp(prefix="start-", dir=Path(spec.folder).parent))  # it runs in turns, and alone
    (place / "data.jsonl").write_text(json.dumps({"input_ids": list(range(3, 35))}) + "\n")
    run = {
        "model": {"path": spec.folder},
        "parallel": {"tensor": spec.options["tensor"]},
        "deepspeed": {"zero_optimization": {"stage": spec.options["zero"]}},
        "data": {"format": "tokenized", "train": [str(place / "data.jsonl")], "seq_length": 32},
        "train": {"steps": 1, "global_batch_size": 1},
        "output": str(place / "out"),
    }
    (place / "run.yaml").write_text(json.dumps(run))  # JSON is valid YAML
    ranks = str(spec.options["tensor"])
    command = [sys.executable, "-m", "megatron_ds", "train", str(place / "run.yaml"), "--nproc", ranks]

    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # it is set there

    def step() -> float:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        lines: list[str] = []
        while line := process.stdout.readline():
            lines.append(line)
            if line.startswith(FIRST_STEP):
                break
        else:
            raise RuntimeError("".join(lines))
        process.kill()  # its ranks exit with it
        process.communicate()
        return 0.0

    return step
