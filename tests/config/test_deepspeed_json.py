"""The DeepSpeed JSON: read, checked, filled; contradictions with the run file refused naming both places."""

import json
import sys
from pathlib import Path

import pytest

from megatron_ds.config import (
    DeepSpeedSummary,
    EngineConfig,
    adapt_to_device,
    check_run,
    fill_deepspeed,
    load_deepspeed,
    summarize_deepspeed,
)
from megatron_ds.config.checks import ModelShape
from megatron_ds.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
TRAIN = {"steps": 100, "global_batch_size": 64, "micro_batch_size": 4}

EXPECTED_FACTS = {
    "zero0_fp32": DeepSpeedSummary(0, "fp32", False, False),
    "zero1_fp32": DeepSpeedSummary(1, "fp32", False, False),
    "zero1_bf16": DeepSpeedSummary(1, "bf16", False, False),
    "zero1_fp16": DeepSpeedSummary(1, "fp16", False, False),
    "zero2_bf16": DeepSpeedSummary(2, "bf16", False, False),
    "zero2_offload_bf16": DeepSpeedSummary(2, "bf16", True, False),
    "zero3_fp32": DeepSpeedSummary(3, "fp32", False, False),
    "zero3_bf16": DeepSpeedSummary(3, "bf16", False, False),
    "zero3_offload_bf16": DeepSpeedSummary(3, "bf16", True, True),
    "pipeline_bf16": DeepSpeedSummary(1, "bf16", False, False),
    "recompute_partitioned_bf16": DeepSpeedSummary(1, "bf16", False, False),
}


def fill(make_run, mapping, data_size=2, **sections):
    run = make_run(deepspeed=mapping, train=TRAIN, **sections)
    return fill_deepspeed(load_deepspeed(mapping), EngineConfig.of_run(run), data_size, hidden_size=64)


def refusal(make_run, mapping, **sections):
    with pytest.raises(ConfigError) as caught:
        fill(make_run, mapping, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def ds_file(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_every_expected_config_is_shipped():
    assert {path.stem for path in SHIPPED} == set(EXPECTED_FACTS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_fill_and_run(make_run, path):
    run = make_run(deepspeed=str(path), train=TRAIN)
    mapping = load_deepspeed(run.deepspeed)
    assert not {"optimizer", "scheduler", "gradient_clipping"} & set(mapping)
    facts = summarize_deepspeed(mapping)
    assert facts == EXPECTED_FACTS[path.stem]
    filled = fill_deepspeed(mapping, EngineConfig.of_run(run), data_size=2, hidden_size=64)
    assert summarize_deepspeed(filled) == facts
    assert '"auto"' not in json.dumps(filled)
    assert (filled["train_batch_size"], filled["gradient_accumulation_steps"]) == (64, 8)
    shape = ModelShape(4, 8, 128, 64, 100, None)
    assert check_run(run, shape, facts, world_size=2, device_type="cuda") == 2


def test_empty_mapping_becomes_zero_1_in_fp32(make_run):
    assert summarize_deepspeed({}) == DeepSpeedSummary(1, "fp32", False, False)
    assert fill(make_run, {}, data_size=4) == {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }


def test_stage_is_deepspeeds_own_default_where_anything_is_said():
    assert summarize_deepspeed({"wall_clock_breakdown": True}).zero_stage == 0
    assert summarize_deepspeed({"zero_optimization": {}}).zero_stage == 0


def test_what_the_user_says_stays(make_run):
    stated = {"steps_per_print": 5, "wall_clock_breakdown": True, "zero_force_ds_cpu_optimizer": True}
    filled = fill(make_run, {"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": True}, **stated})
    assert {key: filled[key] for key in stated} == stated
    assert filled["tensorboard"] == {"enabled": True}


def test_autos_are_filled_and_the_mapping_is_left_alone(make_run):
    mapping = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "data_types": {"keep_in_fp32_modules": "auto"},
        "pipeline": {"stages": "auto"},
    }
    before = json.dumps(mapping)
    run = make_run(deepspeed=mapping, train=TRAIN, optimizer={"grad_clip": 0.5})
    filled = fill_deepspeed(mapping, EngineConfig.of_run(run), data_size=2, hidden_size=64)
    assert json.dumps(mapping) == before
    assert filled["train_batch_size"] == 64
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 8
    assert filled["gradient_clipping"] == 0.5
    zero = filled["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096
    assert zero["stage3_prefetch_bucket_size"] == 3686
    assert zero["stage3_param_persistence_threshold"] == 640
    assert all(isinstance(zero[key], int) for key in zero)
    assert filled["data_types"] == {"keep_in_fp32_modules": "auto"}


def test_bf16_accumulates_in_fp32_unless_said(make_run):
    assert fill(make_run, {"bf16": {"enabled": True}})["data_types"] == {"grad_accum_dtype": "fp32"}
    assert fill(make_run, {"bfloat16": {"enabled": True}})["data_types"] == {"grad_accum_dtype": "fp32"}
    said = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}
    assert fill(make_run, said)["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "data_types" not in fill(make_run, {"bf16": {"enabled": False}})
    assert "data_types" not in fill(make_run, {"fp16": {"enabled": True}})


def test_same_values_said_twice_are_fine(make_run):
    mapping = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1,
    }
    assert fill(make_run, mapping)["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    ("key", "value", "run_says"),
    [
        ("train_batch_size", 32, "train.global_batch_size=64"),
        ("train_micro_batch_size_per_gpu", 2, "train.micro_batch_size=4"),
        (
            "gradient_accumulation_steps",
            2,
            "train.global_batch_size / (train.micro_batch_size * data ranks) = 64 / (4 * 2) = 8",
        ),
        ("gradient_clipping", 0.5, "optimizer.grad_clip=1.0"),
        ("gradient_clipping", True, "optimizer.grad_clip=1.0"),
    ],
)
def test_other_values_said_twice_name_both_places(make_run, ds_file, key, value, run_says):
    shown = json.dumps(value)
    path = ds_file({key: value})
    assert refusal(make_run, path) == (
        f'{run_says} (run file) and {key}={shown} ({path}) disagree; remove it from the JSON or set "auto"'
    )
    assert refusal(make_run, {key: value}) == (
        f"{run_says} (run file) and deepspeed.{key}={shown} (run file) disagree; "
        'remove it from the deepspeed mapping or set "auto"'
    )


ADAMW = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True, "adam_w_mode": True}
COSINE = {"warmup_num_steps": 10, "total_num_steps": 100, "warmup_type": "linear", "cos_min_ratio": 0.1}


@pytest.mark.parametrize(
    "mapping",
    [
        {"optimizer": "auto", "scheduler": "auto"},
        {"optimizer": None, "scheduler": None},
        {"optimizer": {"type": "AdamW", "params": "auto"}, "scheduler": {"type": "auto"}},
        {"optimizer": {"type": "AdamW", "params": ADAMW}},
        {"optimizer": {"type": "Adam", "params": dict.fromkeys(ADAMW, "auto")}},
        {"scheduler": {"type": "WarmupCosineLR", "params": COSINE}},
        {"scheduler": {"params": {"warmup_min_lr": 0, "warmup_max_lr": "auto"}}},
    ],
)
def test_agreeing_optimizer_and_scheduler_are_dropped(make_run, mapping):
    filled = fill(make_run, mapping, schedule={"warmup_steps": 10, "min_lr": 3e-5})
    assert "optimizer" not in filled
    assert "scheduler" not in filled


@pytest.mark.parametrize(
    ("mapping", "run_says", "json_says"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.name=adamw", "optimizer.type=Lamb"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.lr=0.0003", "optimizer.params.lr=0.001"),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.params.betas=[0.9, 0.999]",
        ),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "optimizer.eps=1e-08", "optimizer.params.eps=1e-06"),
        (
            {"optimizer": {"params": {"weight_decay": 0}}},
            "optimizer.weight_decay=0.1",
            "optimizer.params.weight_decay=0",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "optimizer.name=adamw",
            "optimizer.params.adam_w_mode=false",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule.name=cosine", "scheduler.type=WarmupLR"),
        (
            {"scheduler": {"params": {"warmup_num_steps": 9}}},
            "schedule.warmup_steps=10",
            "scheduler.params.warmup_num_steps=9",
        ),
        (
            {"scheduler": {"params": {"total_num_steps": 9}}},
            "train.steps=100",
            "scheduler.params.total_num_steps=9",
        ),
        (
            {"scheduler": {"params": {"warmup_type": "log"}}},
            "schedule warm-up is linear and starts at 0",
            "scheduler.params.warmup_type=log",
        ),
    ],
)
def test_disagreeing_optimizer_and_scheduler(make_run, ds_file, mapping, run_says, json_says):
    path = ds_file(mapping)
    assert refusal(make_run, path, schedule={"warmup_steps": 10}) == (
        f'{run_says} (run file) and {json_says} ({path}) disagree; remove it from the JSON or set "auto"'
    )


def test_optimizer_values_without_counterpart(make_run, ds_file):
    path = ds_file({"optimizer": {"params": {"freeze_step": 100}}})
    assert refusal(make_run, path) == (
        f"optimizer.params.freeze_step=100 ({path}) has no counterpart in the run file's optimizer section; remove it"
    )
    path = ds_file({"scheduler": {"legacy": 1}})
    assert refusal(make_run, path) == (
        f"scheduler.legacy=1 ({path}) has no counterpart in the run file's schedule section; remove it"
    )


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation (ds): unknown DeepSpeed key; did you mean zero_optimization?"),
        (
            {"qwerty": 1},
            "qwerty (ds): unknown DeepSpeed key; remove it, or see DeepSpeed's configuration reference",
        ),
        (
            {"zero_optimization": {"stge": 1}},
            "zero_optimization.stge (ds): unknown DeepSpeed key; did you mean zero_optimization.stage?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise (ds): unknown DeepSpeed key; "
            "did you mean zero_optimization.offload_optimizer.device?",
        ),
        ({"bf16": True}, 'bf16=true (ds) is not a mapping; write {"enabled": true}'),
        ({"amp": {"enabled": True}}, "amp (ds): DeepSpeed 0.19 has removed this; use bf16 or fp16"),
        (
            {"zero_optimization": {"mics_shard_size": 4}},
            "zero_optimization.mics_shard_size (ds): DeepSpeed 0.19 has removed this; remove it",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel (ds): megatron_ds does not run with it: set parallel.tensor in the run file",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            "gradient_allreduce_op=sum (ds) cannot be used: the loss is scaled for a mean over data ranks; "
            "remove it, or set mean",
        ),
        (
            {"zero_allow_untested_optimizer": False},
            "zero_allow_untested_optimizer=false (ds) cannot be used: "
            "the optimizer is a torch one that megatron_ds builds; remove it, or set true",
        ),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            "bf16.enabled and fp16.enabled (ds) are both true; keep one",
        ),
        (
            {"bf16": {"enabled": "auto"}},
            "bf16.enabled=auto (ds) is not true or false: no other setting decides the precision",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4 (ds) is not one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true (ds) is not one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage=auto (ds) is not one of 0, 1, 2, 3"),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            "zero_optimization.offload_param.device=gpu (ds) is not one of none, cpu, nvme",
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads=true (ds) cannot be used: weights that are trained, and their "
            "optimizer state, are kept in fp32, as checkpoints hold them; remove it, or set false",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio=0.5 (ds) cannot be used: offload of a part needs DeepSpeed's "
            "own Adam on the CPU; remove it, or set 1.0",
        ),
        (
            {"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp32"}},
            "data_types.param_dtype=fp32 (ds) disagrees with the precision bf16, which bf16.enabled and fp16.enabled "
            "set; remove it",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "zero_optimization.reduce_bucket_size=big (ds) is not a whole number of at least 0",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameters": -1}},
            "zero_optimization.stage3_max_live_parameters=-1 (ds) is not a whole number of at least 0",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": "maybe"}}},
            "zero_optimization.offload_optimizer.pin_memory=maybe (ds) is not true or false",
        ),
        (
            {"zero_optimization": {"stage": "2"}},
            "zero_optimization.stage=2 (ds) is not one of 0, 1, 2, 3 as a number without quotes",
        ),
        (
            {"overlap_comm": True},
            "overlap_comm (ds): unknown DeepSpeed key; did you mean zero_optimization.overlap_comm?",
        ),
        (
            {"datastates_ckpt": {"host_cache_size": 1}},
            "datastates_ckpt (ds): megatron_ds does not run with it: checkpoints are written in megatron_ds's own "
            "form; remove it",
        ),
    ],
)
def test_refused_keys_and_values(ds_file, mapping, expected):
    path = ds_file(mapping)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed(path)
    assert str(caught.value) == expected.replace("(ds)", f"({path})")


def test_places_in_an_inlined_mapping():
    with pytest.raises(ConfigError) as caught:
        load_deepspeed({"zero_optimization": {"stage": 7}})
    assert str(caught.value) == "deepspeed.zero_optimization.stage=7 (run file) is not one of 0, 1, 2, 3"


@pytest.mark.parametrize("key", ["autotuning", "data_efficiency", "hybrid_engine", "torch_autocast"])
def test_disabled_blocks_are_let_through(make_run, key):
    assert fill(make_run, {key: {"enabled": False}})[key] == {"enabled": False}
    assert f"deepspeed.{key} (run file): megatron_ds does not run with it" in refusal(
        make_run, {key: {"enabled": True}}
    )


@pytest.mark.parametrize(
    ("mapping", "place"),
    [
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
            "zero_optimization.allgather_bucket_size",
        ),
        ({"fp16": {"enabled": True, "loss_scale": "auto"}}, "fp16.loss_scale"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"wandb": {"tags": ["auto"]}}, "wandb.tags[0]"),
    ],
)
def test_other_autos_are_refused_by_place(make_run, mapping, place):
    assert refusal(make_run, mapping) == (
        f"deepspeed.{place}=auto (run file) cannot be filled; write a value or remove it"
    )


def test_facts_of_offload():
    assert summarize_deepspeed({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}).offload_param
    assert not summarize_deepspeed(
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}
    ).offload_param
    assert not summarize_deepspeed({"zero_optimization": {"stage": 3, "offload_param": None}}).offload_param
    assert summarize_deepspeed({"zero_optimization": {"stage": 2, "cpu_offload": True}}).offload_optimizer


def test_shipped_files_are_found_from_anywhere_and_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in SHIPPED:
        assert load_deepspeed(f"ds_configs/{path.name}") == json.loads(path.read_text(encoding="utf-8"))
    mine = tmp_path / "ds_configs" / "zero1_bf16.json"
    mine.parent.mkdir()
    mine.write_text('{"zero_optimization": {"stage": 2}}')
    assert load_deepspeed("ds_configs/zero1_bf16.json") == {"zero_optimization": {"stage": 2}}
    for absent in ("ds_configs/none.json", "zero1_bf16.json", "other/zero1_bf16.json", f"{tmp_path}/zero1_bf16.json"):
        with pytest.raises(ConfigError, match=rf"^deepspeed={absent}: no such file"):
            load_deepspeed(absent)
    with pytest.raises(ConfigError, match=r"\(looked from .*\); nearest: ds_configs/zero3_bf16\.json$"):
        load_deepspeed("zero3_bf16.json")


AFTER_A_COMMA = "line 2 column 13" if sys.version_info >= (3, 13) else "line 3 column 1"
"""The place of a comma before the end of a mapping; Python 3.12 and older report the end."""


def test_unreadable_files(ds_file, tmp_path):
    with pytest.raises(ConfigError, match=r"^deepspeed=none\.json: no such file \(looked from /"):
        load_deepspeed("none.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_deepspeed(str(tmp_path))
    for text, expected in (
        ('{\n  "bf16": {},\n}', f" {AFTER_A_COMMA}: not valid JSON: "),
        ("", " line 1 column 1: not valid JSON: "),
        ("[1]", " is not a mapping; it holds [1]"),
        ('{"bf16": {"enabled": true, "enabled": false}}', ": key enabled is given twice in one mapping; keep one"),
    ):
        path = ds_file(text)
        with pytest.raises(ConfigError) as caught:
            load_deepspeed(path)
        assert str(caught.value).startswith(path + expected), str(caught.value)


def test_home_and_variables_in_the_paths_of_the_json(ds_file, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    given = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "~/fast"}},
        "tensorboard": {"enabled": True, "output_path": "$HOME/tb"},
    }
    before = json.dumps(given)
    for source in (given, ds_file(given)):
        loaded = load_deepspeed(source)
        assert loaded["zero_optimization"]["offload_param"]["nvme_path"] == "/h/fast"
        assert loaded["tensorboard"]["output_path"] == "/h/tb"
    assert json.dumps(given) == before
    with pytest.raises(ConfigError, match=r"csv_monitor.output_path=\$NOT_SET .run file. uses the environment"):
        load_deepspeed({"csv_monitor": {"output_path": "$NOT_SET"}})


@pytest.mark.parametrize(
    ("device", "stage", "data_size", "stated", "expected"),
    [
        ("cuda", 0, 1, {}, {"reduce_bucket_size": 50_000_000}),
        ("cuda", 1, 1, {}, {"reduce_bucket_size": 50_000_000, "contiguous_gradients": False}),
        ("cuda", 1, 8, {}, {"reduce_bucket_size": 50_000_000}),
        ("cuda", 2, 1, {}, {"reduce_bucket_size": 50_000_000}),
        ("cuda", 3, 8, {}, {"reduce_bucket_size": 50_000_000}),
        ("cpu", 1, 1, {}, {"reduce_bucket_size": 5_000_000, "contiguous_gradients": False}),
        ("cpu", 2, 2, {}, {"reduce_bucket_size": 5_000_000}),
        ("cuda", 2, 8, {"reduce_bucket_size": 500_000_000}, {"reduce_bucket_size": 500_000_000}),
        (
            "cuda",
            1,
            1,
            {"contiguous_gradients": True, "reduce_bucket_size": 7},
            {"contiguous_gradients": True, "reduce_bucket_size": 7},
        ),
    ],
)
def test_buckets_fit_the_device_and_the_data_ranks(device, stage, data_size, stated, expected):
    filled = {"zero_optimization": {"stage": stage, **stated}, "gradient_clipping": 1.0}
    adapted = adapt_to_device(filled, device, data_size)
    assert adapted["zero_optimization"] == {"stage": stage, **expected}
    assert adapted["gradient_clipping"] == (0.0 if stage == 0 else 1.0)
    assert filled["zero_optimization"] == {"stage": stage, **stated}
