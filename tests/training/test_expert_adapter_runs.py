"""LoRA on experts and routers by the real run: resumed with experts on other ranks, exported for peft and merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.checkpoint.convert import export_hf
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig
from tests.ranks import preload, run_alone
from tests.training.test_runs import losses
from tests.training.tiny import MODEL, write_tokenizer

EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}


def _save_base(directory: Path) -> None:
    from transformers import AutoConfig, MixtralForCausalLM

    torch.manual_seed(0)
    MixtralForCausalLM(AutoConfig.for_model(**{**MODEL, **EXPERTS})).save_pretrained(directory)


@pytest.fixture
def make_lora(make_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    base = tmp_path / "base"
    run_alone(_save_base, base)
    write_tokenizer(base)

    def make(name: str, *overrides: str, **sections: Any) -> RunConfig:
        run = make_run(name, **{"checkpoint": {"every": 2}, **sections})
        content = {**run.model_dump(exclude_none=True), "model": {"path": str(base)}, "peft": PEFT}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(content))  # which is YAML
        return mds.load_run(path, ["schedule.name=constant", *overrides])

    return make


def _largest_differences(base: Path, adapter: Path, merged: Path) -> tuple[float, float]:
    """Differences of logits: of the adapted model from the base, and of the merged one from the adapted one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()

    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        plain, after = load(base)(ids).logits, load(merged)(ids).logits
        adapted = PeftModel.from_pretrained(load(base), str(adapter)).eval()(ids).logits
    return float((adapted - plain).abs().max()), float((after - adapted).abs().max())


def test_adapters_of_experts_go_on_at_another_layout_and_leave_for_peft(
    make_lora: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preload()
    mds.train(make_lora("straight"))
    folded = ["train.steps=2", "parallel.expert=2", "deepspeed.zero_optimization.stage=3"]
    mds.train(make_lora("cut", *folded), nproc=2)
    export = {"path": str(tmp_path / "adapter"), "check": True}
    run = make_lora("cut", "parallel.tensor=2", "parallel.sequence=true", "train.steps=5", export=export)
    mds.train(run, nproc=2)
    assert losses(run.output, "loss") == pytest.approx(losses(tmp_path / "straight", "loss"), rel=2e-5)
    export_hf(run.output, tmp_path / "merged", merge=True)
    assert _run(["inspect", run.output]) == 0
    assert "LoRA, r 4, on 8 modules" in capsys.readouterr().out
    changed, apart = run_alone(_largest_differences, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert changed > 1e-3 and apart < 1e-5
