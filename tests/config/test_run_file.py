"""The run file: YAML, overrides, defaults, and the text written back."""

import json

import pytest

from megatron_ds.config import (
    DataSection,
    RunConfig,
    build_run,
    build_section,
    dump_run,
    load_deepspeed,
    load_run,
    summarize_deepspeed,
)
from megatron_ds.errors import ConfigError

DOCUMENTED = """\
model:
  path: path/to/hf_dir
  init: pretrained
  tokenizer: path
parallel: {tensor: 2, pipeline: 1, sequence: true}
deepspeed: {bf16: {enabled: true}, zero_optimization: {stage: 1}}
data:
  format: text
  train: [corpus.txt, {path: more.txt}]
  valid: []
  seq_length: 512
  shuffle: true
optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, grad_clip: 1.0}
schedule: {name: cosine, warmup_steps: 100, min_lr: 3.0e-5}
train: {steps: 1000, global_batch_size: 64, micro_batch_size: 4, seed: 1234, eval_every: 100, log_every: 1,
  recompute: none}
checkpoint: {every: 0, keep: 3, resume: auto}
export: {path: out/hf}
output: out/run
"""


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults(run_file):
    run = load_run(run_file())
    assert (run.parallel.tensor, run.parallel.pipeline, run.parallel.sequence) == (1, 1, False)
    assert (run.model.path, run.model.init, run.model.tokenizer, run.model.tokenizer_path) == (
        "hf_dir",
        "pretrained",
        None,
        "hf_dir",
    )
    assert run.deepspeed == {}
    assert run.data.model_dump() == {
        "format": "text",
        "train": ["corpus.txt"],
        "valid": [],
        "valid_share": None,
        "columns": {},
        "bad_rows": "refuse",
        "seq_length": 512,
        "bos": "auto",
        "shuffle": True,
        "cache_dir": None,
        "mask_rate": 0.15,
        "whole_words": False,
        "mean_span": 3.0,
        "target_length": None,
        "restart": False,
        "split": None,
        "loss_on": "assistant",
        "loss_turns": "all",
        "date": "2024-07-26",
        "overlong": "refuse",
        "packing": False,
        "long_context": None,
        "prefetch": 2,
        "options": {},
    }
    assert run.optimizer.model_dump() == {
        "name": "adamw",
        "lr": 3e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "decay_all": False,
        "groups": [],
        "options": {},
    }
    assert run.schedule.model_dump() == {"name": "cosine", "warmup_steps": 0, "min_lr": 0.0, "options": {}}
    assert run.train.model_dump() == {
        "steps": 1000,
        "epochs": None,
        "objective": "auto",
        "global_batch_size": 8,
        "batch_ramp": None,
        "length_ramp": None,
        "micro_batch_size": 1,
        "auto_micro_batch_size": False,
        "seed": 1234,
        "eval_every": 0,
        "log_every": 1,
        "log_system": False,
        "recompute": "none",
        "offload_activations": False,
        "keep_attention": False,
        "mlp_tile_tokens": None,
        "compile": False,
        "kernels": "auto",
        "moe_aux_loss": None,
        "moe_z_loss": 0.0,
        "moe_bias_rate": 0.0,
        "deterministic": False,
        "tf32": False,
        "profile": None,
        "samples": None,
        "ema": None,
        "max_time": None,
        "max_bad_steps": 10,
        "step_timeout": 1800.0,
        "start_timeout": 300.0,
        "max_no_progress_restarts": 3,
        "stragglers": {"every": 100, "threshold": 0.1, "windows": 3},
        "check_replicas": 0,
        "check_repeats": 0,
        "device_test": False,
        "freeze": [],
    }
    assert run.checkpoint.model_dump() == {
        "every": 0,
        "keep": 3,
        "resume": "auto",
        "asynchronous": True,
        "optimizer": "resume",
        "copy_to": None,
        "local": None,
        "local_copies": 1,
    }
    assert run.export is None
    assert (run.monitor, run.callbacks, run.imports) == ([], [], [])


def test_documented_file(run_file):
    run = load_run(run_file(DOCUMENTED))
    assert run.model.tokenizer_path == "path"
    assert [(source.path, source.weight) for source in run.data.train] == [("corpus.txt", None), ("more.txt", None)]
    assert run.optimizer.betas == (0.9, 0.95)
    assert run.export is not None
    assert (run.export.path, run.export.dtype, run.export.max_shard_size) == ("out/hf", None, "5GB")


def test_sources_are_written_as_they_were_given(run_file):
    sources = ["a.txt", {"path": "user/set", "name": "en", "split": "train[:10%]"}, {"path": "b.csv", "column": "body"}]
    run = load_run(run_file(), [f"data.train={json.dumps(sources)}", "data.bad_rows=drop", "data.columns={text: body}"])
    assert run.data.model_dump()["train"] == sources
    assert run.data.bad_rows == "skip" and run.data.columns == {"text": "body"}
    labels = ["a.txt", "user/set (name en, split train[:10%])", "b.csv (column body)"]
    assert [source.label for source in run.data.train] == labels


def test_runs_are_frozen(run_file):
    run = load_run(run_file())
    with pytest.raises(ValueError, match="frozen"):
        run.train.steps = 5


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.e-4", ".3e-3", "+3e-4", "3.0e-4", "0.0003", "30e-5"])
def test_floats_without_a_dot(run_file, text):
    run = load_run(run_file(), [f"optimizer.lr={text}"])
    assert run.optimizer.lr == pytest.approx(3e-4, rel=1e-15)


def test_overrides_reach_every_depth(run_file, tmp_path):
    path = run_file(
        "model: {config: {model_type: llama, hidden_size: 32}, tokenizer: t}\n"
        "deepspeed: {zero_optimization: {stage: 1}}\n"
        "data: {train: [a.txt]}\ntrain: {steps: 5}\noutput: o\n"
    )
    run = load_run(
        path,
        [
            "model.config.hidden_size=64",
            "model.config.rope_parameters.rope_theta=1e4",
            "deepspeed.zero_optimization.stage=2",
            "deepspeed.bf16.enabled=true",
            "train.steps=1",
            "train.steps=1e3",
            "data.train=[b.txt, c.txt]",
            "data.valid=v.txt",
            "export.path=a=b",
            "schedule={name: linear, warmup_steps: 7}",
        ],
    )
    assert run.model.config == {"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 10000.0}}
    assert run.deepspeed == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    assert run.train.steps == 1000
    assert isinstance(run.train.steps, int)
    assert [source.path for source in run.data.train] == ["b.txt", "c.txt"]
    assert [source.path for source in run.data.valid] == ["v.txt"]
    assert run.export.path == "a=b"
    assert (run.schedule.name, run.schedule.warmup_steps) == ("linear", 7)


@pytest.mark.parametrize("given", ["4", "{size: 4}"])
def test_overrides_reach_a_number_of_context_ranks_as_its_mapping(run_file, given):
    path, context = run_file(), f"parallel.context={given}"
    section = load_run(path, [context, "parallel.context.method=ring", "parallel.context.ulysses=2"]).parallel.context
    assert (section.size, section.method, section.ulysses) == (4, "ring", 2)
    assert load_run(path, [context, "parallel.context.size=1"]).parallel.context.size == 1
    assert refusal(path, "parallel.context=true", "parallel.context.size=1") == (
        "override parallel.context.size: parallel.context=true is not a mapping, so nothing can be set in it"
    )


def test_override_into_a_deepspeed_file_reads_it_first(run_file, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    run = load_run(run_file(), [f"deepspeed={file}", "deepspeed.zero_optimization.stage=3"])
    assert run.deepspeed == {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    assert json.loads(file.read_text())["zero_optimization"]["stage"] == 1
    assert load_run(run_file(), [f"deepspeed={file}"]).deepspeed == str(file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nothing", "override nothing is not key.sub=value, for example train.steps=100"),
        ("=3", "override =3 is not key.sub=value, for example train.steps=100"),
        ("a..b=3", "override a..b=3 is not key.sub=value, for example train.steps=100"),
        (
            "data.train.0=x",
            "override data.train.0: data.train is a list; give the complete list, data.train=[...]",
        ),
        (
            "train.steps.x=1",
            "override train.steps.x: train.steps=1000 is not a mapping, so nothing can be set in it",
        ),
        (
            "train.steps=[",
            "override train.steps line 1: not valid YAML: expected the node content, but found '<stream end>'",
        ),
        ("train.stepz=5", "train.stepz: unknown key; did you mean train.steps?"),
    ],
)
def test_bad_overrides(run_file, override, expected):
    assert refusal(run_file(), override) == expected


def test_missing_file(tmp_path):
    message = refusal(tmp_path / "none.yaml")
    assert message.startswith(f"run file {tmp_path / 'none.yaml'} does not exist (looked from ")


def test_unreadable_files(tmp_path, run_file):
    assert refusal(tmp_path) == f"run file {tmp_path} is a directory; name a YAML file"
    binary = tmp_path / "bin.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert refusal(binary) == f"run file {binary} is not UTF-8 text"
    binary.write_bytes(b"PK\0\3")
    assert refusal(binary) == f"{binary}: character 2 is not text; is it a YAML file?"
    assert refusal(tmp_path) == f"run file {tmp_path} is a directory; name a YAML file, such as {binary}"
    other = run_file('{"architectures": ["LlamaForCausalLM"], "vocab_size": 3}')
    assert refusal(other).startswith("architectures: unknown key; legal here: callbacks, ")
    assert refusal(run_file("model:{path: x}")) == (
        "model:{path: unknown key; write model: {path, with a space after the colon"
    )
    empty = run_file("# only a comment\n")
    assert refusal(empty) == (f"{empty} is empty; a run file needs at least model, data.train, train.steps and output")
    listed = run_file("- a\n- b\n")
    assert refusal(listed) == f'{listed} is not a mapping of sections; it holds ["a", "b"]'


def test_bad_yaml_names_the_line(run_file):
    path = run_file("model: {path: x}\ntrain:\n  steps: 5\n\tseed: 3\n")
    message = refusal(path)
    assert message.startswith(f"{path} line 4: not valid YAML: found character '\\t'")
    path = run_file("model: {path: x}\n---\ntrain: {steps: 5}\n")
    assert refusal(path).startswith(f"{path} line 2: not valid YAML: but found another document")
    path = run_file("model: !!python/object:os.system {}\n")
    assert "line 1: not valid YAML: could not determine a constructor" in refusal(path)


def test_duplicate_keys_are_refused(run_file):
    path = run_file("model: {path: x}\ntrain:\n  steps: 5\n  seed: 3\n  steps: 6\n")
    assert refusal(path) == f"{path} line 5: key steps was already given on line 3; keep one"
    path = run_file("model: {path: x}\ndeepspeed: {a: [{b: 1, b: 2}]}\n")
    assert refusal(path) == f"{path} line 2: key b was already given on line 2; keep one"


def test_merge_keys_are_no_duplicates(run_file):
    path = run_file(
        "model: {path: x}\noutput: o\ndata: {train: [a]}\n"
        "train: {steps: 5}\n"
        "deepspeed:\n  fp16: &off {enabled: false, hysteresis: 2}\n  bf16: {<<: *off, enabled: true}\n"
    )
    assert load_run(path).deepspeed["bf16"] == {"enabled": True, "hysteresis": 2}


@pytest.mark.parametrize("text", [DOCUMENTED, DOCUMENTED.replace("export: {path: out/hf}\n", "")])
def test_dump_reads_back_equal(run_file, text):
    run = load_run(run_file(text))
    assert load_run(run_file(dump_run(run))) == run
    assert dump_run(load_run(run_file(dump_run(run)))) == dump_run(run)


def test_dump_of_awkward_values(run_file):
    run = build_run(
        {
            "model": {
                "config": {"model_type": "gpt2", "id2label": {0: "A"}, "eos": None, "eps": 1e-5, "note": "1e-5"},
                "tokenizer": "3e4",
            },
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}, "fp16": {"enabled": False}},
            "data": {"train": ["yes", "1e3", "ü b.txt"], "cache_dir": "no"},
            "optimizer": {"lr": 1e-22},
            "schedule": {"min_lr": 0},
            "train": {"steps": 3},
            "export": {"path": "null", "dtype": "float16"},
            "output": "007",
        }
    )
    again = load_run(run_file(dump_run(run)))
    assert again == run
    assert again.model.config["eps"] == 1e-5
    assert again.model.config["note"] == "1e-5"
    assert "eos" in again.model.config


def test_dump_inlines_the_deepspeed_file_with_its_autos(run_file, tmp_path):
    file = tmp_path / "ds.json"
    mapping = {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    file.write_text(json.dumps(mapping))
    run = load_run(run_file(), [f"deepspeed={file}"])
    text = dump_run(run)
    file.unlink()
    again = load_run(run_file(text), ["train.global_batch_size=16"])
    assert again.deepspeed == mapping
    assert again.train.global_batch_size == 16
    assert load_run(run_file(text)) == run.model_copy(update={"deepspeed": mapping})
    assert load_deepspeed(again.deepspeed) == mapping


def test_build_run_leaves_its_argument_alone():
    mapping = {"model": {"path": "x"}, "data": {"train": "a"}, "train": {"steps": 3}, "output": "o"}
    mapping["deepspeed"] = {"bf16": {"enabled": True}}
    before = json.dumps(mapping)
    run = build_run(mapping)
    run.deepspeed["bf16"]["enabled"] = False
    assert json.dumps(mapping) == before


def test_default_mappings_are_not_shared(run_file):
    load_run(run_file()).deepspeed["bf16"] = {}
    assert load_run(run_file()).deepspeed == {}


# ---- paths -----------------------------------------------------------------------------------------------------------

PATHS = {
    "model.path": lambda run: run.model.path,
    "model.tokenizer": lambda run: run.model.tokenizer,
    "peft": lambda run: run.peft,
    "deepspeed": lambda run: run.deepspeed,
    "data.cache_dir": lambda run: run.data.cache_dir,
    "data.train": lambda run: run.data.train[0].path,
    "data.valid": lambda run: run.data.valid[0].path,
    "checkpoint.resume": lambda run: run.checkpoint.resume,
    "export.path": lambda run: run.export.path,
    "output": lambda run: run.output,
}


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_replaced_in_every_path(run_file, key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "big disk"))
    for text, expected in (
        ("~/a", tmp_path / "home/a"),
        ("$HOME/a", tmp_path / "home/a"),
        ("${PLACE}/b/$PLACE_", None),
        ("${PLACE}/b", tmp_path / "big disk/b"),
        ("a/~/$", "a/~/$"),
        ("~root/a", "/root/a"),
    ):
        if expected is None:
            assert refusal(run_file(), f"{key}={text}").endswith(
                f"={text} uses the environment variable PLACE_, which is not set; set it, or write the path out"
            )
            continue
        assert PATHS[key](load_run(run_file(), [f"{key}={text}"])) == str(expected)
    assert refusal(run_file(), f"{key}=~nobody_here/x").endswith(
        "=~nobody_here/x begins with ~nobody_here, and there is no user nobody_here; write the path out, or "
        "./~nobody_here if that is its name"
    )


def test_every_path_of_the_schema_is_tested():
    """A field whose name says that it is a path is one of `PATHS`, under some name."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    named = {f"{name}.{key}" for name, kind in sections.items() for key in getattr(kind, "model_fields", {})}
    assert {key for key in named if key.endswith(("path", "_dir", "tokenizer"))} <= PATHS.keys()


def test_the_written_file_has_the_replaced_paths(run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    overrides = ["output=~/run", "data.train=[{path: ~/a, weight: 1}]", "deepspeed=~/ds.json"]
    text = dump_run(load_run(run_file(), overrides))
    assert "~" not in text and f"{tmp_path}/run" in text
    assert load_run(run_file(), [*overrides, "deepspeed.zero_optimization.stage=3"]).deepspeed == {
        "zero_optimization": {"stage": 3}
    }
    assert refusal(run_file(), "deepspeed=$NOT_SET/ds.json", "deepspeed.bf16.enabled=true") == (
        "deepspeed=$NOT_SET/ds.json uses the environment variable NOT_SET, which is not set; set it, or write the path "
        "out"
    )
    with pytest.raises(ConfigError, match=r"data.cache_dir=\$NOT_SET uses the environment variable NOT_SET"):
        build_section(DataSection, {"train": "a", "cache_dir": "$NOT_SET"}, "data")


# ---- overrides of a DeepSpeed JSON that is not there -----------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["deepspeed={}"], ["deepspeed="]])
def test_one_key_of_an_absent_deepspeed_json_keeps_the_default_stage(run_file, overrides):
    run = load_run(run_file(), [*overrides, "deepspeed.zero_optimization.overlap_comm=true"])
    assert run.deepspeed == {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    run = load_run(run_file(), [*overrides, "deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=2"])
    assert run.deepspeed == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    assert summarize_deepspeed(load_run(run_file(), ["deepspeed.bf16.enabled=true"]).deepspeed).zero_stage == 1
