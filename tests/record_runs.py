"""Record twelve small training runs bit for bit, to show that a change of the code changed no mathematics.

    python tests/record_runs.py record BEFORE                         # on the old code
    python tests/record_runs.py record AFTER --inputs BEFORE          # on the new code, from the same models and data
    python tests/record_runs.py compare BEFORE AFTER                  # equal, or what differs first
    python tests/record_runs.py resume BEFORE RESUMED                 # the new code continues the old checkpoints

It uses only the command line, the run file and the files that are written. Recordings are
comparable on one machine with one version of PyTorch only. In a directory of recordings are `models/` and `data/` (the
inputs), `cache/` (XDG_CACHE_HOME), `prepared/` (what `prepare` wrote), `runs/NAME/` (run.yaml, output, export, log.txt)
and `record.json`.

Not compared, because they hold paths or time: of metrics.jsonl all but COMPARED; of checkpoints progress.json,
manifest.json, adapter_config.json and all else that is not safetensors; the manifest of `prepare`; hidden files.
Exports are compared whole: in their JSON files the path of the directory of recordings is replaced by a word before
they are hashed, for adapter_config.json names its base model by its path.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS, RESUMED_FROM, TIME_LIMIT = 6, 3, 300
COMPARED = ("step", "loss", "terms", "grad_norm", "lr", "tokens", "valid_loss", "valid_terms")

Json = dict[str, Any]
LAST, FIRST = f"step_{STEPS:08d}", f"step_{RESUMED_FROM:08d}"

_GPT_TOKENS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128}
_LLAMA = {**_GPT_TOKENS, **_LAYERS, "pad_token_id": None, "num_attention_heads": 8, "num_key_value_heads": 2}
_BERT = {**_LAYERS, "vocab_size": 4096, "num_attention_heads": 4, "pad_token_id": 0}

# Name -> class in transformers, config. BLOOM's six heads take ALiBi's second series of slopes. Dropout, where it is by
# default (GPT-2, OPT, BERT, RoBERTa, T5), stays; the two runs that recompute have it in attention too.
MODELS: dict[str, tuple[str, Json]] = {
    "gpt2": ("GPT2LMHeadModel", {**_GPT_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**_LLAMA, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16, "query_pre_attn_scalar": 16}
        | {"sliding_window": 9, "sliding_window_pattern": 2, "attention_dropout": 0.1},
    ),
    "bloom": ("BloomForCausalLM", {**_GPT_TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "opt": (
        "OPTForCausalLM",
        {**_GPT_TOKENS, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "pad_token_id": 1}
        | {"attention_dropout": 0.1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "bert": ("BertForPreTraining", _BERT),
    "roberta": ("RobertaForMaskedLM", {**_BERT, "type_vocab_size": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 2048, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
}
TOKENIZERS = {"bert": "pretrain_bert", "roberta": "pretrain_bert", "t5": "finetune_t5"}  # others: pretrain_blend


def zero(stage: int, bf16: bool = False) -> Json:
    """Give a DeepSpeed config; at stage 3 it divides parameters of any size, since all of these are small."""
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage, **more}}


def common(home: Path, name: str, model: str, layout: Json, deepspeed: Json, data: Json) -> Json:
    """Give a run file: what differs, and what is the same in all."""
    train = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2}
    return {
        "model": {"path": f"{home}/models/{model}"},
        "parallel": layout,
        "deepspeed": deepspeed,
        "data": data,
        "optimizer": {"lr": 0.003, "grad_clip": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr": 0.0003},
        "train": {**train, "eval_every": RESUMED_FROM if "valid" in data else 0},
        "checkpoint": {"every": RESUMED_FROM},
        "export": {"path": f"{home}/runs/{name}/export"},
        "output": f"{home}/runs/{name}/output",
    }


def run_specs(home: Path) -> dict[str, tuple[int, Json]]:
    """Give each run's number of ranks and its run file."""
    data = home / "data"
    text = {"format": "text", "train": [f"{data}/train.jsonl", f"{data}/book.txt"], "seq_length": 32}
    text |= {"valid": [f"{data}/valid.jsonl"]}
    chat = {"format": "chat", "train": [f"{data}/chat.jsonl"], "valid": [f"{data}/chat_valid.jsonl"], "packing": True}
    chat |= {"seq_length": 128, "overlong": "drop"}
    ids = {"format": "tokenized", "train": [f"{data}/ids.jsonl"], "seq_length": 32}
    pairs = {"format": "tokenized", "train": [f"{data}/pairs.jsonl"], "seq_length": 32, "target_length": 24}
    made = home / "prepared"
    blend = [{"path": f"{made}/book", "weight": 0.7}, {"path": f"{made}/speeches", "weight": 0.3}]
    indexed = {"format": "indexed", "train": blend, "valid": [f"{made}/valid"], "seq_length": 32}
    rows: list[tuple[str, int, str, Json, Json, Json]] = [
        ("gpt2", 1, "gpt2", {}, zero(0), text),
        ("llama_tp4", 4, "llama", {"tensor": 4}, zero(1), ids),
        ("llama_chat", 4, "llama", {"tensor": 2}, zero(3), chat),
        ("llama_lora", 2, "llama", {"tensor": 2, "sequence": True}, zero(1), chat),
        ("gemma3_3d", 4, "gemma3_text", {"tensor": 2, "pipeline": 2, "sequence": True}, zero(1), text),
        ("bloom_bf16", 2, "bloom", {}, zero(2, bf16=True), text),
        ("opt_tp2", 2, "opt", {"tensor": 2}, zero(1), text),
        ("qwen3_blend", 2, "qwen3", {"tensor": 2, "sequence": True}, zero(1, bf16=True), indexed),
        ("bert_pairs", 2, "bert", {}, zero(1), text),
        ("roberta", 2, "roberta", {}, zero(3), {**text, "whole_words": True}),
        ("t5_spans", 2, "t5", {"pipeline": 2}, zero(1), text),
        ("t5_pairs", 2, "t5", {"tensor": 2, "sequence": True}, zero(1), pairs),
    ]
    specs = {name: (ranks, common(home, name, model, *rest)) for name, ranks, model, *rest in rows}
    specs["llama_lora"][1]["peft"] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    specs["gemma3_3d"][1]["train"]["recompute"] = "full"
    specs["opt_tp2"][1]["train"]["recompute"] = "selective"
    return specs


def make_models(home: Path, examples: Path) -> None:
    """Save every model with its tokenizer, in fp32, from one seed."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, (class_name, fields) in MODELS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **fields)
        getattr(transformers, class_name)(config).save_pretrained(home / "models" / name)
        tokenizer = examples / TOKENIZERS.get(name, "pretrain_blend") / "tokenizer"
        shutil.copytree(tokenizer, home / "models" / name, dirs_exist_ok=True)


def make_data(home: Path, examples: Path) -> None:
    """Write speeches, a piece of a novel, conversations, and examples of token ids."""
    from tokenizers import Tokenizer

    data = home / "data"
    data.mkdir()
    speeches = examples / "continue_pretraining" / "data"
    shutil.copy(speeches / "train.jsonl", data / "train.jsonl")
    valid = json.loads((speeches / "valid.jsonl").read_text(encoding="utf-8").splitlines()[0])
    write_lines(data / "valid.jsonl", [{"text": valid["text"][:3000]}])
    novel = (examples / "pretrain_moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")[:100_000]
    (data / "book.txt").write_text(novel, encoding="utf-8")
    write_lines(data / "book.jsonl", [{"text": part} for part in novel.split("\n\n") if part.strip()])
    for source, name, number in (("train", "chat", 300), ("valid", "chat_valid", 20)):
        lines = (examples / "finetune_chat" / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        (data / f"{name}.jsonl").write_text("\n".join(lines[:number]) + "\n", encoding="utf-8")
    words = novel.split()
    pieces = [" ".join(words[at : at + 8 + at % 5]) for at in range(2000, 3000, 10)]  # of 8 to 12 words
    decoders, t5 = (Tokenizer.from_file(str(home / "models" / name / "tokenizer.json")) for name in ("llama", "t5"))
    ids = [decoders.encode(piece).ids[:32] for piece in pieces]  # of uneven length, after a prompt that carries no loss
    labels = [[-100] * (number % 4) + row[number % 4 :] for number, row in enumerate(ids)]
    write_lines(data / "ids.jsonl", [{"input_ids": row, "labels": aligned} for row, aligned in zip(ids, labels)])
    pairs = [(t5.encode(piece.lower()).ids[:23] + [1], t5.encode(piece).ids[:23] + [1]) for piece in pieces]
    write_lines(data / "pairs.jsonl", [{"input_ids": source, "labels": target} for source, target in pairs])


def write_lines(path: Path, rows: list[Json]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bring(part: str, home: Path, source: Path) -> None:
    """Copy a part of another recording, times too; what is there already stays."""
    if not (home / part).exists() and (source / part).exists():
        shutil.copytree(source / part, home / part)


def call(arguments: list[str], home: Path, checkout: Path, log: Path) -> bool:
    """Run a command of megatron_ds on the checkout's package; on failure show the end of its log."""
    own = {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_ds", *arguments]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            problem = f"exit status {process.wait(TIME_LIMIT)}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {TIME_LIMIT} s"
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too
            process.wait()
    if problem == "exit status 0":
        return True
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
    print(f"FAILED {log.parent.name}: {problem}: {' '.join(arguments)}", *tail, sep="\n    ", flush=True)
    return False


def prepare(home: Path, checkout: Path) -> bool:
    """Write the corpora of the blend; `prepare` itself leaves whole ones as they are."""
    (home / "prepared").mkdir(exist_ok=True)
    log = home / "prepared" / "log.txt"
    tokenizer = str(home / "models" / "qwen3")
    for source, target in (("book", "book"), ("train", "speeches"), ("valid", "valid")):
        arguments = [f"{home}/data/{source}.jsonl", "--tokenizer", tokenizer, "--output", f"{home}/prepared/{target}"]
        if not call(["prepare", *arguments, "--workers", "1"], home, checkout, log):
            return False
    return True


def train(name: str, home: Path, checkout: Path) -> bool:
    """Write a run's file and train it."""
    ranks, run_file = run_specs(home)[name]
    directory = home / "runs" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.yaml").write_text(json.dumps(run_file, indent=2), encoding="utf-8")  # JSON is YAML
    arguments = ["train", str(directory / "run.yaml"), "--nproc", str(ranks)]
    return call(arguments, home, checkout, directory / "log.txt")


def digest(path: Path, home: Path) -> str:
    """Hash a file; in JSON the path of the recordings, which is another in each, is replaced by a word."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = content.replace(str(home).encode(), b"RECORDINGS")
    return hashlib.sha256(content).hexdigest()


def hashes(home: Path, files: list[Path], start: Path) -> dict[str, str]:
    """Hash files, named by their path from `start` on."""
    return {str(path.relative_to(start)): digest(path, home) for path in sorted(files)}


def recorded(name: str, home: Path) -> Json:
    """Read what a finished run left: numbers as they stand in metrics.jsonl, and hashes of files; of the inputs too."""
    directory = home / "runs" / name
    lines = (directory / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key in COMPARED} for line in lines]
    last = directory / "output" / "checkpoints" / LAST
    files = [path for path in (directory / "export").rglob("[!.]*") if path.is_file()]  # the mark holds times
    files += [*last.glob("*.safetensors"), *(last / "training_state").glob("*.safetensors")]
    model = Path(run_specs(home)[name][1]["model"]["path"])
    inputs = [*model.iterdir(), *(home / "data").iterdir()]
    if name == "qwen3_blend":
        inputs += [path for path in (home / "prepared").iterdir() if path.suffix in (".bin", ".idx")]
    return {"inputs": hashes(home, inputs, home), "metrics": metrics, "files": hashes(home, files, directory)}


def read_record(home: Path) -> Json:
    """Read record.json, which is empty at first."""
    path = home / "record.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def flat(result: Json) -> dict[str, str]:
    """Give each value its name, in the order of steps: `step 2 loss` and so on; inputs first, files last."""
    values = {}
    for line in result["metrics"]:
        for key, value in line.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            values.update({f"step {line['step']} {key} {part}".strip(): repr(entry) for part, entry in entries})
    return {**result["inputs"], **values, **result["files"]}


def difference(before: Json | None, after: Json | None) -> str:
    """Say what differs first; empty if nothing does."""
    if before is None or after is None:
        return "not recorded " + ("before" if before is None else "after")
    old, new = flat(before), flat(after)
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            return f"{name}: {old.get(name, 'absent')} before, {new.get(name, 'absent')} after"
    return ""


def record(home: Path, checkout: Path, source: Path | None, names: list[str]) -> bool:
    """Train the runs and write down what they left; what is recorded is never replaced."""
    if done := [name for name in names if name in read_record(home)]:
        print(f"recorded already in {home}: {', '.join(done)}; take another directory, or --only with others")
        return False
    for part, make in (("models", make_models), ("data", make_data)):
        if source:
            bring(part, home, source)
        elif not (home / part).exists():
            make(home, checkout / "examples")
    good = True
    for name in names:
        start = time.monotonic()
        shutil.rmtree(home / "runs" / name, ignore_errors=True)
        if (name == "qwen3_blend" and not prepare(home, checkout)) or not train(name, home, checkout):
            good = False
            continue
        result = recorded(name, home)
        text = json.dumps({**read_record(home), name: result}, indent=1)  # floats read back exactly
        (home / "record.json").write_text(text + "\n", encoding="utf-8")
        losses = [line["loss"] for line in result["metrics"] if "loss" in line]
        print(f"{name:12} {time.monotonic() - start:5.1f} s  loss {losses[0]:.4f} .. {losses[-1]:.4f}", flush=True)
    return good


def compare(before: Path, after: Path, names: list[str]) -> bool:
    """Print a line a run: equal, or what differs first."""
    old, new = read_record(before), read_record(after)
    found = {name: difference(old.get(name), new.get(name)) for name in names}
    for name, text in found.items():
        count = f"equal: {len(flat(new[name]))} values" if not text else f"DIFFERS  {text}"
        print(f"{name:12} {count}")
    return not any(found.values())


def times(directory: Path) -> dict[str, int]:
    """Give each file under a directory the moment of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


def go_back(before: Path, home: Path, name: str) -> bytes:
    """Copy a run's output as it was after its first checkpoint; give the lines of metrics that stay."""
    output = home / "runs" / name / "output"
    shutil.rmtree(output.parent, ignore_errors=True)
    shutil.copytree(before / "runs" / name / "output", output, symlinks=True)
    shutil.rmtree(output / "checkpoints" / LAST)
    latest = output / "checkpoints" / "latest"
    if latest.is_symlink():
        latest.unlink()
        latest.symlink_to(FIRST)
    else:
        latest.write_text(latest.read_text(encoding="utf-8").replace(LAST, FIRST), encoding="utf-8")
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= RESUMED_FROM), encoding="utf-8")
    return metrics.read_bytes()


def resume(before: Path, home: Path, checkout: Path, names: list[str]) -> bool:
    """Go on from the checkpoints of a recording, with its caches; the end must be the recording's."""
    if any(home.iterdir()):  # a recording, or a cache that an earlier try has changed
        print(f"{home} is not empty; take another directory")
        return False
    for part in ("models", "data", "prepared", "cache"):
        bring(part, home, before)
    good = True
    for name in names:
        start, text, cache = time.monotonic(), "not recorded before", times(home / "cache" / "megatron_ds")
        if name in read_record(before):
            kept = go_back(before, home, name)
            text = "FAILED" if not train(name, home, checkout) else gone_on(before, home, name, kept, cache)
        good = good and not text
        outcome = (
            f"DIFFERS  {text}" if text else f"equal from step {RESUMED_FROM} on, {len(cache)} cached files as before"
        )
        print(f"{name:12} {time.monotonic() - start:5.1f} s  {outcome}", flush=True)
    return good


def gone_on(before: Path, home: Path, name: str, kept: bytes, cache: dict[str, int]) -> str:
    """Say what shows that a run did not go on, with the old cache, as the recorded one did; empty if nothing does."""
    if not (home / "runs" / name / "output" / "metrics.jsonl").read_bytes().startswith(kept):
        return "trained from the beginning: the lines of the first steps are others"
    if made := set(times(home / "cache" / "megatron_ds").items()) - set(cache.items()):
        return f"the old cache was not used: {min(made)[0]} is new"
    return difference(read_record(before)[name], recorded(name, home))


def main() -> int:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, directories in {
        "record": ["DIR"],
        "compare": ["BEFORE", "AFTER"],
        "resume": ["BEFORE", "AFTER"],
    }.items():
        one = commands.add_parser(command)
        for directory in directories:
            one.add_argument(directory, type=Path)
        one.add_argument("--only", action="append", choices=list(run_specs(Path())), help="one run; may be repeated")
        one.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent, help="default: this one")
        if command == "record":
            one.add_argument("--inputs", type=Path, help="a recording whose models and data are copied")
    options = parser.parse_args()
    names = options.only or list(run_specs(Path()))
    checkout = options.checkout.resolve()
    if options.command == "compare":
        return 0 if compare(options.BEFORE, options.AFTER, names) else 1
    if not (checkout / "megatron_ds" / "__main__.py").exists():  # else Python would take an installed one unseen
        parser.error(f"{checkout} is no checkout of megatron_ds; say --checkout DIR")
    home = (options.DIR if options.command == "record" else options.AFTER).resolve()
    home.mkdir(parents=True, exist_ok=True)
    if options.command == "record":
        return 0 if record(home, checkout, options.inputs, names) else 1
    return 0 if resume(options.BEFORE, home, checkout, names) else 1


if __name__ == "__main__":
    sys.exit(main())
