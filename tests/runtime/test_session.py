"""The Python interface: engines without a run file, on one process and on several, with files written and read."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.config import EngineConfig
from megatron_ds.errors import ConfigError, ConversionError, DataError, MegatronDSError, TopologyError
from megatron_ds.monitor import read_metrics
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.runtime import Session
from tests.parallel.test_rendezvous import environment, free_port
from tests.parity.cases import CONFIGS, SEQ, VOCAB
from tests.ranks import preload, run_alone, run_ranks
from tests.training.tiny import MODEL as TINY
from tests.training.tiny import run_mapping

LLAMA = CONFIGS["qwen2-tied"]
STEPS = 4
ALONE: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 4, "optimizer": {"lr": 3e-3, "eps": 1e-6}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, {"parallel": {"pipeline": 2}, "micro_batch_size": 2}),
    "dp2-zero3": (2, {"deepspeed": {"zero_optimization": {"stage": 3}}}),
}
CLOSE = {"rel": 2e-5}  # fp32 sums in another order, over four steps


def batch(step: int) -> dict[str, torch.Tensor]:
    """A global batch of eight samples, one of them without labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (8, SEQ), generator=generator)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = targets[3] = -100
    return {"input_ids": ids, "targets": targets}


def _session(info: RankInfo) -> Session:
    return Session(info, torch.device("cpu"))


def _losses(info: RankInfo, fields: dict[str, Any], folder: Path | None = None) -> list[float]:
    """Losses of four steps; with a folder, a checkpoint after the second and an export at the end."""
    engine = _session(info).build_engine(mds.load_model(LLAMA), **{**ALONE, **fields})
    losses = []
    for step in range(STEPS):
        losses.append(engine.train_step(engine.split(batch(step))).loss)
        if folder is not None and step == 1:
            engine.save(folder / "checkpoints")
    if folder is not None:
        engine.export_hf(folder / "hf", dtype="bfloat16")
    return losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """Losses on one rank, and the folder with its checkpoint and export."""
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(_losses, 1, {}, folder)[0], folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(name: str, alone: tuple[list[float], Path]) -> None:
    ranks, fields = LAYOUTS[name]
    losses = run_ranks(_losses, ranks, fields)
    assert all(one == losses[0] for one in losses)
    assert losses[0] == pytest.approx(alone[0], **CLOSE)
    assert len(set(alone[0])) == STEPS


def _resumed(info: RankInfo, fields: dict[str, Any], checkpoint: Path) -> list[float]:
    engine = _session(info).build_engine(mds.load_model(checkpoint), **{**ALONE, **fields})
    assert engine.load(checkpoint).step == 2
    return [engine.train_step(engine.split(batch(step))).loss for step in range(2, STEPS)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_continues_at_another_layout(name: str, alone: tuple[list[float], Path]) -> None:
    ranks, fields = LAYOUTS[name]
    losses, folder = alone
    assert run_ranks(_resumed, ranks, fields, folder / "checkpoints")[0] == pytest.approx(losses[2:], **CLOSE)


def _loaded_by_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).dtype


def test_an_export_is_what_transformers_loads(alone: tuple[list[float], Path]) -> None:
    directory = alone[1] / "hf"
    assert run_alone(_loaded_by_transformers, directory) == torch.bfloat16
    weights = load_file(directory / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def _exported_over(info: RankInfo, folder: Path) -> str:
    """The end of the second of two exports to one directory, between which a file was put there."""
    engine = _session(info).build_engine(mds.load_model(LLAMA), **{**ALONE, "parallel": {"tensor": 2}})
    engine.export_hf(folder / "hf")
    if info.rank == 0:
        (folder / "hf" / "notes.txt").write_text("mine")
    try:
        engine.export_hf(folder / "hf")
    except (ConversionError, SystemExit) as problem:
        return str(problem)
    return "replaced"


def test_a_finished_export_that_may_not_be_put_is_kept_beside(tmp_path: Path) -> None:
    """Rank 0 names its place, and the other rank leaves at once."""
    told, other = run_ranks(_exported_over, 2, tmp_path)
    assert "holds notes.txt, which was added after the export; choose another directory, or try overwrite=True" in told
    assert told.endswith(f"; the new files are in {tmp_path / 'hf.1'}") and other == "2"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf.1"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def _saved_often(info: RankInfo, folder: Path) -> tuple[list[str], int]:
    """The checkpoints of three saves, and the process groups that the last two made."""
    engine = _session(info).build_engine(mds.load_model(LLAMA), **{**ALONE, "parallel": {"tensor": 2}})
    groups = []
    for step in range(3):
        engine.train_step(engine.split(batch(step)))
        engine.save(folder, keep=2)
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
    return sorted(path.name for path in folder.iterdir() if path.is_dir()), groups[-1] - groups[0]


def _saved_next_to_its_model(info: RankInfo, folder: Path) -> list[str]:
    """The checkpoints after two saves that keep one, next to the checkpoint that the model was read from."""
    engine = _session(info).build_engine(mds.load_model(LLAMA), **ALONE)
    first = engine.save(folder, keep=1)
    engine = _session(info).build_engine(mds.load_model(first), **ALONE)
    for step in range(2):
        engine.train_step(engine.split(batch(step)))
        engine.save(folder, keep=1)
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_checkpoint_that_a_model_was_read_from_is_kept(tmp_path: Path) -> None:
    assert run_ranks(_saved_next_to_its_model, 1, tmp_path) == [["step_00000000", "step_00000002"]]


def test_saving_again_makes_no_further_process_group(tmp_path: Path) -> None:
    for found in run_ranks(_saved_often, 2, tmp_path):
        assert found == (["step_00000002", "step_00000003"], 0)


def _without_an_optimizer(info: RankInfo) -> tuple[float, float]:
    engine = _session(info).build_engine(mds.load_model(LLAMA), **{**ALONE, "optimizer": None})
    first, second = (engine.train_step(engine.split(batch(0))).loss for _ in range(2))
    return first, second


def test_without_an_optimizer_no_weight_changes() -> None:
    first, second = run_ranks(_without_an_optimizer, 1)[0]
    assert first == second


def _evaluated(info: RankInfo) -> tuple[float, float, Any]:
    engine = _session(info).build_engine(mds.load_model(LLAMA), **ALONE)
    before = engine.evaluate(engine.split(batch(0))).mean
    outputs = engine.outputs({"input_ids": batch(0)["input_ids"][:2]})
    return before, engine.train_step(engine.split(batch(0))).loss, outputs["logits"].shape if outputs else None


def test_evaluation_and_outputs() -> None:
    before, loss, shape = run_ranks(_evaluated, 1)[0]
    assert before == pytest.approx(loss, rel=1e-6)
    assert tuple(shape) == (2, SEQ, VOCAB)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"micro_batch": 2}, ConfigError, "micro_batch: unknown key; did you mean micro_batch_size?"),
        ({"parallel": {"tensor": 3}}, TopologyError, "parallel.tensor=3 does not divide num_attention_heads=8"),
        ({"global_batch_size": 7}, TopologyError, "train.global_batch_size=7 is not divisible"),
        ({"deepspeed": {"zero_optimizer": {}}}, ConfigError, "zero_optimizer (run file): unknown DeepSpeed key"),
        ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, ConfigError, "decides the scheduler; remove it"),
    ],
)
def test_a_wrong_field_is_one_line(fields: dict[str, Any], kind: type[MegatronDSError], message: str) -> None:
    session = Session(RankInfo(), torch.device("cpu"))  # refused before any process group is needed
    with pytest.raises(kind) as caught:
        session.build_engine(mds.load_model(LLAMA), **{**ALONE, **fields})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _wrong_batch(info: RankInfo) -> str:
    engine = _session(info).build_engine(mds.load_model(LLAMA), **ALONE)
    try:
        engine.split({name: column[:6] for name, column in batch(0).items()})
    except DataError as problem:
        return str(problem)
    return ""


def test_a_batch_of_another_size_is_refused() -> None:
    expected = "column input_ids has 6 samples, and global_batch_size is 8"
    assert run_ranks(_wrong_batch, 1)[0] == expected


def test_the_engine_config_of_a_run_keeps_every_field() -> None:
    run = mds.build_run(
        {
            "model": {"config": LLAMA},
            "data": {"format": "tokenized", "train": ["a.jsonl"]},
            "parallel": {"tensor": 2},
            "train": {"steps": 7, "seed": 5, "recompute": "full", "micro_batch_size": 2, "compile": True},
            "output": "out",
        }
    )
    config = EngineConfig.of_run(run)
    shared = set(EngineConfig.model_fields) & set(type(run.train).model_fields)
    assert shared >= {"steps", "seed", "recompute", "compile", "kernels", "micro_batch_size", "global_batch_size"}
    assert all(getattr(config, name) == getattr(run.train, name) for name in shared)
    assert (config.parallel, config.optimizer, config.schedule) == (run.parallel, run.optimizer, run.schedule)


def _loop(info: RankInfo, corpus: Path, steps: int) -> list[float]:
    """The same as a run file with a constant learning rate, as a loop."""
    model = mds.load_model(TINY, tokenizer=str(corpus / "tokenizer"))
    dataset = mds.open_dataset(model, str(corpus / "train.txt"), seq_length=32, cache_dir=str(corpus / "cache"))
    engine = _session(info).build_engine(model, parallel={"tensor": 2}, optimizer={"lr": 1e-3}, micro_batch_size=2)
    batches = engine.batches(dataset)
    return [engine.train_step(next(batches)).loss for _ in range(steps)]


def test_a_loop_and_a_run_file_take_the_same_steps_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    mapping = run_mapping(corpus, tmp_path / "run")
    mapping["parallel"] = {"tensor": 2}
    mapping["optimizer"] = {"lr": 1e-3}
    mapping["schedule"] = {"name": "constant"}
    mapping["train"] = {"steps": 4, "micro_batch_size": 2}
    mapping["model"] = {"config": TINY, "tokenizer": str(corpus / "tokenizer")}
    mapping["data"] = {"train": [str(corpus / "train.txt")], "seq_length": 32, "cache_dir": str(corpus / "cache")}
    result = mds.train(mds.build_run(mapping), 2)
    losses = [one.loss for one in read_metrics(result.metrics)[0]]
    assert run_ranks(_loop, 2, corpus, 4)[0] == losses
    assert (result.steps, result.last_loss, result.best_loss) == (4, losses[-1], min(losses))
    assert result.checkpoint is None and result.export is None and result.last_valid_loss is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": "txt"},
            "data.format=txt is not one of text, chat, tokenized, indexed, labelled; did you mean text?",
        ),
        ({"packing": True}, "data.packing=true does nothing with data.format=text"),
        ({"seq_len": 8}, "data.seq_len: unknown key; did you mean seq_length?"),
        ({"objective": "autos"}, "train.objective=autos"),
    ],
)
def test_wrong_data_is_one_line(fields: dict[str, Any], message: str, corpus: Path) -> None:
    model = mds.load_model(TINY, tokenizer=str(corpus / "tokenizer"))
    with pytest.raises(ConfigError) as caught:
        mds.open_dataset(model, str(corpus / "train.txt"), **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


NOTEBOOK = """
import os, torch, megatron_ds as mds
from tests.listening import listening_addresses
try:
    with mds.session():
        1 / 0
except ZeroDivisionError:
    left = sorted({{"RANK", "LOCAL_RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"}} & set(os.environ))
with mds.session() as ranks:
    model = mds.load_model({config!r})
    engine = ranks.build_engine(model, global_batch_size=2)
    ids = torch.arange(16).reshape(2, 8)
    losses = [engine.train_step(engine.split({{"input_ids": ids, "targets": ids}})).loss for _ in range(3)]
    print(ranks.rank, ranks.world_size, losses[0] > losses[-1], *listening_addresses(), left)
"""


def test_public_names_stay_what_they_are() -> None:
    """A name of the interface that is also a module's would become the module once it is imported."""
    for name in mds.__all__:
        for _ in range(2):
            assert not isinstance(getattr(mds, name), ModuleType), name


def test_a_process_without_a_launcher_is_the_only_rank(tmp_path: Path) -> None:
    """As in a notebook: an interpreter that nothing was imported into, and a cell that is run again after an error."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK.format(config=LLAMA)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 True 127.0.0.1 []\n", "no port is open to other machines, and no variable is left"


def test_ranks_that_this_program_forked_can_open_a_session() -> None:
    def rank(info: RankInfo) -> tuple[int, int]:
        with mds.session() as ranks:
            return ranks.rank, ranks.world_size

    preload()
    assert run_local(rank, 2, 60.0) == [(0, 2), (1, 2)]


def test_a_launchers_ranks_can_open_one_session_after_another() -> None:
    port = free_port()

    def rank(info: RankInfo) -> list[float]:
        del os.environ[RENDEZVOUS_FILE]
        os.environ.update(environment(info.rank, 2, port))
        sums = []
        for _ in range(2):
            with mds.session():
                ones = torch.ones(())
                torch.distributed.all_reduce(ones)
                sums.append(ones.item())
        return sums

    preload()
    assert run_local(rank, 2, 60.0) == [[2.0, 2.0]] * 2
