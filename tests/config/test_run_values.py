"""Wrong values in the run file: each gives one line naming field, value, rule and nearest fix."""

import pytest

from megatron_ds.config import ExportSection, RunConfig, TrainSection, load_run
from megatron_ds.config.deepspeed_keys import SECTION_KEYS
from megatron_ds.config.unknown_keys import FOREIGN_NAMES
from megatron_ds.errors import ConfigError

TOP = (
    "callbacks, checkpoint, data, deepspeed, export, imports, model, monitor, optimizer, output, parallel, peft, "
    "schedule, train"
)
TRAIN = ", ".join(sorted(TrainSection.model_fields))
EXPORT = ", ".join(sorted(ExportSection.model_fields))
LLAMA = "model={config: {model_type: llama}"

REFUSALS = [
    # unknown keys
    ("trian={}", "trian: unknown key; did you mean train?"),
    ("foo.bar=1", f"foo: unknown key; legal here: {TOP}"),
    ("1=2", f"1: unknown key; legal here: {TOP}"),
    ("steps=3", "steps: unknown key; did you mean train.steps?"),
    ("steps=[3, 4]", "steps: unknown key; did you mean train.profile.steps?"),
    ("train.lr=3", "train.lr: unknown key; did you mean optimizer.lr?"),
    ("lr=3", "lr: unknown key; did you mean optimizer.lr?"),
    ("lr=fast", f"lr: unknown key; legal here: {TOP}"),  # no place takes it
    ("path=x", "path: unknown key; did you mean model.path or export.path?"),
    ("tokenizer=x", "tokenizer: unknown key; did you mean model.tokenizer?"),  # and not optimizer
    ("train.tokenizer=x", "train.tokenizer: unknown key; did you mean model.tokenizer?"),
    ("train.ema=0.99", "train.ema=0.99 is not a mapping; write train: {ema: {decay: 0.999}}"),
    ("train.path=x", f"train.path: unknown key; legal here: {TRAIN}"),
    ("train.name=x", f"train.name: unknown key; legal here: {TRAIN}"),
    (
        "data.train=[{path: x, lr: 1}]",
        "data.train[0].lr: unknown key; legal here: column, name, path, set, split, streaming, weight",
    ),
    ("learning_rate=1e-4", "learning_rate: unknown key; did you mean optimizer.lr?"),
    ("train.save_steps=10", "train.save_steps: unknown key; did you mean checkpoint.every?"),
    ("train.save_steps=x", f"train.save_steps: unknown key; legal here: {TRAIN}"),
    (
        "schedule.warmup_ratio=0.03",
        "schedule.warmup_ratio: unknown key; write schedule.warmup_steps, a number of steps",
    ),
    (
        "train.gradient_accumulation_steps=4",
        "train.gradient_accumulation_steps: unknown key; set train.global_batch_size: it counts the samples of all "
        "ranks and micro batches of a step",
    ),
    (
        "model.torch_dtype=bfloat16",
        "model.torch_dtype: unknown key; write deepspeed: {bf16: {enabled: true}}, or fp16; the default is float32",
    ),
    (
        "model.dtype=bfloat16",  # and not export.dtype
        "model.dtype: unknown key; write deepspeed: {bf16: {enabled: true}}, or fp16; the default is float32",
    ),
    (
        "parallel.data=2",
        "parallel.data: unknown key; it follows: ranks / (parallel.tensor * parallel.pipeline * parallel.context)",
    ),
    ("val_set_size=0.05", "val_set_size: unknown key; did you mean data.valid_share?"),
    ("train.gradient_checkpointing=true", "train.gradient_checkpointing: unknown key; write train.recompute: full"),
    (
        "train.activation_offloading=true",
        "train.activation_offloading: unknown key; write train.offload_activations: true",
    ),
    ("train.tiled_mlp=true", "train.tiled_mlp: unknown key; write train.mlp_tile_tokens, such as 4096"),
    ("bf16=true", "bf16: unknown key; did you mean deepspeed.bf16.enabled?"),
    ("lora={r: 8}", "lora: unknown key; did you mean peft?"),
    ("lora=8", f"lora: unknown key; legal here: {TOP}"),
    ("dataset=c.txt", "dataset: unknown key; did you mean data.train?"),
    ("parallel.tp=2", "parallel.tp: unknown key; did you mean parallel.tensor?"),
    ("export.format=x", f"export.format: unknown key; legal here: {EXPORT}"),  # and not data.format
    ("nproc=2", "nproc: unknown key; did you mean --nproc?"),
    ("trian={steps: 3}", "trian: unknown key; did you mean train?"),
    ("Model={path: x}", "Model: unknown key; did you mean model?"),
    ("train={steps=3: }", "train.steps=3: unknown key; write steps: 3, with a colon instead of ="),
    ("data.split=0.9", "data.split=0.9 is not a list; write [a, b]"),
    ("train.max_time=-5", "train.max_time=-5 must be more than 0.0"),
    ("train.max_time=0:00", "train.max_time=0.0 must be more than 0.0"),
    ("trian=3", f"trian: unknown key; legal here: {TOP}"),
    (
        "parallel.qqqq=1",
        "parallel.qqqq: unknown key; legal here: auto, context, expert, pipeline, sequence, shared_memory, tensor",
    ),
    ("export={pth: x}", "export.pth: unknown key; did you mean export.path?"),
    ("data.train=[{path: a, wieght: 1}]", "data.train[0].wieght: unknown key; did you mean data.train[0].weight?"),
    ("data.bad_rows=ignore", "data.bad_rows=ignore is not one of refuse, skip"),
    ("data.columns=text", "data.columns=text is not a mapping; write {key: value}"),
    ("data.columns={text: 3}", "data.columns.text=3 is not text; put it in quotes"),
    ("data.train=[{path: a, split: ''}]", 'data.train[0].split="" is empty'),
    # types
    ("train.steps=abc", "train.steps=abc is not an integer"),
    ("train.steps=1.5", "train.steps=1.5 is not an integer; nearest: 1 or 2"),
    ("train.steps=[5]", "train.steps=[5] is a list, not an integer"),
    ("train.steps={a: 5}", 'train.steps={"a": 5} is a mapping, not an integer'),
    ("train.steps=.inf", "train.steps=inf is not an integer"),
    ("train.steps=1,000", "train.steps=1,000 is not an integer; write 1000"),
    ("train.steps=12,345,678", "train.steps=12,345,678 is not an integer; write 12345678"),
    ("train.steps=1,5", "train.steps=1,5 is not an integer"),
    ("train.steps=5k", "train.steps=5k is not an integer; write 5000"),
    ("train.steps=1:30", "train.steps=1:30 is not an integer"),
    ("train.steps=2_0", "train.steps=2_0 is not an integer"),
    ("train.steps=true", "train.steps=true is not an integer"),
    ("train.steps='5'", "train.steps=5 is text, not an integer; remove the quotes"),
    ("train.steps='1e3'", "train.steps=1e3 is text, not an integer; remove the quotes"),
    ("train.steps='0x10'", "train.steps=0x10 is text, not an integer; remove the quotes"),
    ("train.steps=", "train.steps is empty; give it an integer, for example train: {steps: 1000}"),
    ("train.steps=null", "train.steps is empty; give it an integer, for example train: {steps: 1000}"),
    ("train.seed=~", "train.seed is empty; give it an integer, or remove the key"),
    ("data.shuffle=", "data.shuffle is empty; give it true or false, or remove the key"),
    ("data.format=", "data.format is empty; give it a text, or remove the key"),
    ("train.recompute=null", "train.recompute is empty; give it a value, or remove the key"),
    ("train.freeze=null", "train.freeze is empty; give it a list, or remove the key"),
    ("optimizer.lr=fast", "optimizer.lr=fast is not a number"),
    (
        "optimizer.groups=[{match: a.*}]",
        "optimizer.groups: a.* changes nothing; give lr, lr_factor or weight_decay",
    ),
    (
        "optimizer.groups=[{match: [a, b], lr: 1e-4, lr_factor: 2}]",
        "optimizer.groups: a, b has lr=0.0001 and lr_factor=2, which both set its learning rate; keep one",
    ),
    (
        "optimizer={lr: 0, groups: [{match: a, lr: 1e-4}]}",
        "optimizer.groups: lr=0.0001 of a follows the schedule in proportion to optimizer.lr=0; try a positive "
        "optimizer.lr, and lr_factor: 0 for all that it is not for",
    ),
    ("optimizer.groups=[{match: a, lr: -1}]", "optimizer.groups[0].lr=-1 must be at least 0.0; nearest: 0.0"),
    ("optimizer.lr='3e-4'", "optimizer.lr=3e-4 is text, not a number; remove the quotes"),
    ("optimizer.lr='.5'", "optimizer.lr=.5 is text, not a number; remove the quotes"),
    ("optimizer.lr='-1'", "optimizer.lr=-1 is text, not a number; remove the quotes"),
    ("optimizer.lr='1_000'", "optimizer.lr=1_000 is text, not a number; remove the quotes"),
    ("optimizer.lr=3,0e-4", "optimizer.lr=3,0e-4 is not a number; write 3.0e-4, with a decimal point"),
    ("optimizer.lr=0,001", "optimizer.lr=0,001 is not a number; write 0.001, with a decimal point"),
    (
        "optimizer={lr: 3,0e-4}",
        "override optimizer line 1: lr: 3,0e-4 has a decimal comma; write 3.0e-4",
    ),
    ("optimizer={0: 1}", "optimizer has the key 0, which is not a name; write key: value"),
    ("peft={r: 8, 3: 4}", "peft has the key 3, which is not a name; put it in quotes"),
    ("deepspeed={1: 2}", "deepspeed has the key 1, which is not a name; put it in quotes"),
    ("data.options={no: 1, 3: 4}", "data.options has the key 3, which is not a name; put it in quotes"),
    ("optimizer={true: 1}", "optimizer has the key true, which is not a name; write key: value"),
    ("optimizer.lr=.inf", "optimizer.lr=inf is not finite"),
    ("optimizer.lr=.nan", "optimizer.lr=nan is not finite"),
    ("parallel.sequence=1", "parallel.sequence=1 is not true or false; nearest: true"),
    ("parallel.sequence=0", "parallel.sequence=0 is not true or false; nearest: false"),
    ("parallel.sequence=yes", "parallel.sequence=yes is not true or false; nearest: true"),
    ("data.shuffle=no", "data.shuffle=no is not true or false; nearest: false"),
    ("data.shuffle=Off", "data.shuffle=Off is not true or false; nearest: false"),
    ("data.shuffle='true'", "data.shuffle=true is text, not true or false; remove the quotes"),
    ("data.shuffle=tRUE", "data.shuffle=tRUE is text, not true or false; write true"),
    ("output=007", "output=7 is not text; put it in quotes"),
    ("output=[a]", 'output=["a"] is not text'),
    ("train=5", "train=5 is not a mapping; write {key: value}"),
    (
        "train=[{steps: 5}]",
        'train=[{"steps": 5}] is a list, not a mapping; remove the dashes or brackets around its keys',
    ),
    ("model=hf_dir", "model=hf_dir is not a mapping; write model: {path: hf_dir}"),
    ("export=out/hf", "export=out/hf is not a mapping; write export: {path: out/hf}"),
    ("optimizer=adamw", "optimizer=adamw is not a mapping; write optimizer: {name: adamw}"),
    ("model.config=5", "model.config=5 is not a mapping; write {key: value}"),
    ("data.train=[3]", "data.train[0].path=3 is not text; put it in quotes"),
    ("deepspeed=3", "deepspeed=3 is neither the path of a DeepSpeed JSON nor a mapping"),
    # missing
    ("train=", "train.steps is missing; add it, for example train: {steps: 1000}, or train: {epochs: 1}"),
    ("data={}", "data.train is missing; add it, for example data: {train: [corpus.txt]}"),
    ("output=", "output is missing; add it, for example output: out/run"),
    ("export={}", "export.path is missing; add it, for example export: {path: out/hf}"),
    ("data.train=[]", "data.train=[] is empty; give at least one"),
    ('output=""', 'output="" is empty'),
    # words
    # registered things
    ("monitor=tensorboard", "monitor=tensorboard is not a list; write [tensorboard]"),
    ("callbacks=[{patience: 3}]", "callbacks[0].name is missing"),
    ("callbacks=[3]", "callbacks[0]=3 is not a mapping; write {key: value}"),
    ("imports=my_package", "imports=my_package is not a list; write [my_package]"),
    ('imports=[""]', 'imports[0]="" is empty'),
    ("train.kernels=3", "train.kernels=3 is neither auto, torch nor a mapping, such as {attention: torch}"),
    ("train.recompute=all", "train.recompute=all is not one of none, selective, full"),
    (
        "checkpoint.resume=no",
        "checkpoint.resume=no is neither auto, never nor the path of a checkpoint; nearest: never",
    ),
    (
        "checkpoint.resume=true",
        "checkpoint.resume=true is neither auto, never nor the path of a checkpoint; nearest: auto",
    ),
    (
        "export={path: x, dtype: fp16}",
        "export.dtype=fp16 is not one of float32, bfloat16, float16",
    ),
    # ranges
    ("parallel.tensor=0", "parallel.tensor=0 must be at least 1; nearest: 1"),
    ("parallel.pipeline=-1", "parallel.pipeline=-1 must be at least 1; nearest: 1"),
    ("train.mlp_tile_tokens=0", "train.mlp_tile_tokens=0 must be at least 1; nearest: 1"),
    ("train.steps=0", "train.steps=0 must be at least 1; nearest: 1"),
    ("train.global_batch_size=0", "train.global_batch_size=0 must be at least 1; nearest: 1"),
    ("train.micro_batch_size=0", "train.micro_batch_size=0 must be at least 1; nearest: 1"),
    ("train.seed=-1", "train.seed=-1 must be at least 0; nearest: 0"),
    ("train.seed=4294967296", "train.seed=4294967296 must be less than 4294967296"),
    ("train.eval_every=-1", "train.eval_every=-1 must be at least 0; nearest: 0"),
    ("train.log_every=0", "train.log_every=0 must be at least 1; nearest: 1"),
    ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1; nearest: 1"),
    ("data.seq_length=0", "data.seq_length=0 must be at least 1; nearest: 1"),
    ("data.mask_rate=0.0", "data.mask_rate=0.0 must be more than 0.0"),
    ("data.mask_rate=1.0", "data.mask_rate=1.0 must be less than 1.0"),
    ("data.mask_rate=15 %", "data.mask_rate=15 % is not a number; write 0.15"),
    ("data.whole_words=1", "data.whole_words=1 is not true or false; nearest: true"),
    ("data.mean_span=0.5", "data.mean_span=0.5 must be at least 1.0; nearest: 1.0"),
    ("data.target_length=0", "data.target_length=0 must be at least 1; nearest: 1"),
    ("optimizer.lr=-1.0", "optimizer.lr=-1.0 must be at least 0.0; nearest: 0.0"),
    ("optimizer.eps=0.0", "optimizer.eps=0.0 must be more than 0.0"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1 must be at least 0.0; nearest: 0.0"),
    ("optimizer.grad_clip=-0.1", "optimizer.grad_clip=-0.1 must be at least 0.0; nearest: 0.0"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas[1]=1.0 must be less than 1.0"),
    ("optimizer.betas=[-0.1,0.9]", "optimizer.betas[0]=-0.1 must be at least 0.0; nearest: 0.0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] is not two numbers; write optimizer.betas=[0.9, 0.95]"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9 is not two numbers; write optimizer.betas=[0.9, 0.95]"),
    ("data.train=[{path: a, weight: 0.0}]", "data.train[0].weight=0.0 must be more than 0.0"),
    (
        "export={path: x, max_shard_size: big}",
        "export.max_shard_size=big is not a size; write for example 5GB or 500MB",
    ),
    # fields that contradict each other
    ("schedule.min_lr=1", "schedule.min_lr=1.0 is above optimizer.lr=0.0003; nearest: 0.0003"),
    ("schedule.warmup_steps=1001", "schedule.warmup_steps=1001 is more than train.steps=1000; nearest: 1000"),
    ("model.config={model_type: llama}", "model.path and model.config are both given; keep one"),
    ("model.path=", "model.path and model.config are both missing; give one"),
    ("model=", "model.path and model.config are both missing; give one"),
    (
        LLAMA + ", init: pretrained}",
        "model.init=pretrained needs weights, and model.config has none; use model.path, or model.init=random",
    ),
    (
        "model={config: {hidden_size: 8}}",
        "model.config.model_type is missing; name the Hugging Face model type, for example llama",
    ),
    # another rotation of positions
    ("model.rope=yarn", "model.rope=yarn is not a mapping; write {key: value}"),
    ("model.rope={factor: 4}", "model.rope.type is missing"),
    (
        "model.rope={type: ntk, factor: 4}",
        "model.rope.type=ntk is not one of default, linear, dynamic, yarn, llama3, longrope",
    ),
    ("model.rope={type: yarn}", "model.rope.factor is missing, which model.rope.type=yarn needs; add it"),
    ("model.rope={type: yarn, factor: 0.5}", "model.rope.factor=0.5 must be at least 1.0; nearest: 1.0"),
    (
        "model.rope={type: linear, factor: 4, beta_fast: 16}",
        "model.rope.beta_fast=16.0 does nothing with model.rope.type=linear; legal with it: factor, rope_theta, "
        "original_max_position_embeddings, max_position_embeddings",
    ),
    (
        "model.rope={type: longrope, short_factor: [1.0], long_factor: [2.0]}",
        "model.rope.factor is missing, and model.rope.max_position_embeddings too; add one",
    ),
    (
        "model.rope={type: dynamic, factor: 4, max_position_embeddings: 64}",
        "model.rope.max_position_embeddings=64 does nothing with model.rope.type=dynamic, which stretches positions "
        "from the original length on; try model.rope.original_max_position_embeddings",
    ),
    ("model.rope.rope_type=yarn", "model.rope.rope_type: unknown key; did you mean model.rope.type?"),
    ("rope_scaling={type: yarn, factor: 4}", "rope_scaling: unknown key; did you mean model.rope?"),
    # fields of data that contradict each other
    (
        "data.train=[a, {path: b, weight: 0.5}]",
        "data.train[0].weight is missing, and other sources have one; give all of them one, or none",
    ),
    (
        "data.valid=[{path: b, weight: 2}]",
        "data.valid[0].weight=2.0 does nothing: validation reads every sample once; remove it",
    ),
    (
        "data={format: indexed, train: [a], valid: [b], split: [9, 1]}",
        "data.split=[9.0, 1.0] takes validation data from data.train, and data.valid names others; keep one",
    ),
    (
        "data={format: indexed, train: [a], split: [9]}",
        "data.split=[9.0] is not two or three fractions: training, validation, unused; write data.split=[0.97, 0.03]",
    ),
    (
        "data={format: chat, train: [a], loss_on: all, loss_turns: last}",
        "data.loss_on=all puts loss on every token, data.loss_turns=last on the assistant's last turn; "
        "remove one of them",
    ),
    ("data.date=tomorrow", "data.date=tomorrow is not a date; write it as 2024-07-26"),
    ("data.date=26.7.2024", "data.date=26.7.2024 is not a date; write it as 2024-07-26"),
    ("data.valid={share: 2}", "data.valid_share=2 must be less than 1.0"),
    (
        "data.valid=0.1",
        "data.valid=0.1 names no data; to hold out a share of data.train, write data.valid={share: 0.1}",
    ),
    (
        "data.valid={split: 5}",
        "data.valid.split=5 names no data; to hold out a share of data.train, write data.valid={share: 0.01}",
    ),
    (
        "data.valid=true",
        "data.valid=true names no data; to hold out a share of data.train, write data.valid={share: 0.01}",
    ),
    ("data.valid=[{share: 0.2}]", "data.valid[0].share=0.2 is in a list; write data.valid={share: 0.2}"),
    (
        "data.valid={share: null}",
        "data.valid.share is empty; give it a number, for example data: {valid: {share: 0.01}}",
    ),
    ("train.start_timeout=5m", "train.start_timeout=5m is not a number of seconds; write 300"),
    ("train.step_timeout=1.5h", "train.step_timeout=1.5h is not a number of seconds; write 5400"),
    ("train.start_timeout=0:05:00", "train.start_timeout=0:05:00 is not a number of seconds; write 300"),
    ("export={path: x, max_shard_size: 5}", "export.max_shard_size=5 is not a size; write for example 5GB or 500MB"),
    ("export=true", "export=true is not a mapping; write export: {path: ...}"),
    ("data.valid={share: few}", "data.valid_share=few is not a number"),
    ("data.valid={share: 0.1, path: a}", "data.valid.share=0.1 and data.valid.path are both set; keep one"),
    (
        "data={train: [a], valid: [b], valid_share: 0.1}",
        "data.valid_share=0.1 holds out a share of data.train, and data.valid names other data; keep one",
    ),
    (
        "data={format: indexed, train: [a], split: [9, 1], valid: {share: 0.1}}",
        "data.valid_share=0.1 holds out a share of data.train, and data.split=[9.0, 1.0] does too; keep one",
    ),
    ("train.max_time=soon", "train.max_time=soon is not a time; write seconds, or HH:MM:SS as 3:50:00"),
    (
        "train.epochs=2",
        "train.steps=1000 and train.epochs=2 both set the length of the run; try train.steps= train.epochs=2, or "
        "remove one from the file",
    ),
    ("train={epochs: 0}", "train.epochs=0 must be more than 0.0"),
    ("train={epochs: two}", "train.epochs=two is not a number"),
    ("train.max_bad_steps=0", "train.max_bad_steps=0 must be at least 1; nearest: 1"),
]


@pytest.mark.parametrize(("override", "expected"), REFUSALS, ids=[override for override, _ in REFUSALS])
def test_refused_in_one_line(run_file, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(), [override])
    assert str(caught.value) == expected


ACCEPTED = [
    ("callbacks=[a, {name: b, x: 2}]", lambda run: [e.plain for e in run.callbacks] == ["a", {"name": "b", "x": 2}]),
    ("train.kernels={attention: torch}", lambda run: run.train.kernels == {"attention": "torch"}),
    ("optimizer.betas=[0, 0]", lambda run: run.optimizer.betas == (0.0, 0.0)),
    ("optimizer.lr=1", lambda run: run.optimizer.lr == 1.0),
    ("optimizer.grad_clip=0", lambda run: run.optimizer.grad_clip == 0.0),
    ("schedule.min_lr=3e-4", lambda run: run.schedule.min_lr == run.optimizer.lr),
    ("schedule.warmup_steps=1000", lambda run: run.schedule.warmup_steps == run.train.steps),
    ("parallel=", lambda run: run.parallel.tensor == 1),
    ("export=", lambda run: run.export is None),
    ("deepspeed=", lambda run: run.deepspeed == {}),
    ("data.valid=", lambda run: run.data.valid == []),
    ("train={steps: null, epochs: 0.5}", lambda run: (run.train.steps, run.train.epochs) == (None, 0.5)),
    ("data.valid={share: 0.1}", lambda run: (run.data.valid, run.data.valid_share) == ([], 0.1)),
    ("data.valid={share: 0.1}", lambda run: run.data.model_dump()["valid_share"] == 0.1),
    ("data.train=lone.txt", lambda run: [source.path for source in run.data.train] == ["lone.txt"]),
    ("data.mask_rate=0.001", lambda run: run.data.mask_rate == 0.001),
    ("data.mean_span=1", lambda run: run.data.mean_span == 1.0),
    ("data.target_length=1", lambda run: run.data.target_length == 1),
    ("data.target_length=", lambda run: run.data.target_length is None),
    ("data.format=tokenized", lambda run: run.data.format == "tokenized"),
    ("train.recompute=none", lambda run: run.train.recompute == "none"),
    ("train.deterministic=true", lambda run: run.train.deterministic and not run.train.tf32),
    ("train.tf32=true", lambda run: run.train.tf32 and not run.train.deterministic),
    ("model.init=random", lambda run: run.model.init == "random"),
    (LLAMA + ", tokenizer: t}", lambda run: (run.model.init, run.model.tokenizer_path) == ("random", "t")),
    ("export={path: x, max_shard_size: 1.5GiB}", lambda run: run.export.max_shard_size == "1.5GiB"),
    ("checkpoint.resume=never", lambda run: run.checkpoint.resume == "never"),
    ("checkpoint.resume=out/run/checkpoints", lambda run: run.checkpoint.resume == "out/run/checkpoints"),
    ("train.max_time=90", lambda run: run.train.max_time == 90.0),
    ("train.max_time='03:50:00'", lambda run: run.train.max_time == 13800.0),
    ("train.max_time='1-02:30'", lambda run: run.train.max_time == 95400.0),
    ("train.max_time='10:30'", lambda run: run.train.max_time == 630.0),
    ("train.max_time=3:50:00", lambda run: run.train.max_time == 13800.0),
    ("train.max_time=1:30", lambda run: run.train.max_time == 90.0),
    ("train.steps=010", lambda run: run.train.steps == 10),
    ("train.steps=0o10", lambda run: run.train.steps == 8),
    ("train.steps=1_000", lambda run: run.train.steps == 1000),
    ("output=2024-07-26", lambda run: run.output == "2024-07-26"),
    ("data.train=no", lambda run: run.data.train[0].path == "no"),
    ("optimizer.lr=.5", lambda run: run.optimizer.lr == 0.5),
]


@pytest.mark.parametrize(("override", "holds"), ACCEPTED, ids=[override for override, _ in ACCEPTED])
def test_accepted_at_the_edge(run_file, override, holds):
    assert holds(load_run(run_file(), [override]))


def test_config_without_tokenizer_needs_tokenized_data(run_file):
    run = load_run(run_file(), [LLAMA + "}", "data.format=tokenized"])
    assert run.model.tokenizer_path is None


def test_long_values_are_shortened(run_file):
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(), ["train.steps=" + "x" * 500])
    assert len(str(caught.value)) < 150


def test_names_of_other_trainers_lead_to_keys_that_exist():
    for name, meant in FOREIGN_NAMES.items():
        section, _, key = meant.partition(".")
        kind = RunConfig.model_fields[section].annotation
        if section == "deepspeed":
            block, _, last = key.rpartition(".")
            assert last in SECTION_KEYS[block], name
        elif key:
            assert key in kind.model_fields, name
