"""LoRA by the real run: the same at every layout, gone on with at another, exported for peft and merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig
from megatron_ds.errors import MegatronDSError
from tests.halves import swept
from tests.ranks import preload, run_alone
from tests.training.test_runs import losses
from tests.training.tiny import MODEL, write_tokenizer

PEFT = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "alone": (1, {}, 1),
    "tp2-zero3": (2, {"tensor": 2, "sequence": True}, 3),
    "pp2": (2, {"pipeline": 2}, 1),
    "dp2-zero2": (2, {}, 2),
}


def _save_base(directory: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL)
    LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model, so to say, and its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    run_alone(_save_base, directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def make_lora(make_run: Callable[..., RunConfig], base: Path) -> Callable[..., RunConfig]:
    def make(name: str, *overrides: str, **sections: Any) -> RunConfig:
        run = make_run(name, **{"checkpoint": {"every": 2}, **sections})
        content = run.model_dump(exclude_none=True)
        content["model"] = {"path": str(base)}
        content["peft"] = PEFT
        return mds.load_run(_written(content, Path(run.output).parent / f"{name}.yaml"), list(overrides))

    return make


def _written(content: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(content))  # which is YAML
    return path


@pytest.mark.parametrize("names", [("tp2-zero3", "pp2"), *swept((("dp2-zero2",),))], ids="-".join)
def test_losses_do_not_depend_on_the_layout_and_only_adapters_are_saved(make_lora: Any, names: tuple[str, ...]) -> None:
    preload()
    seen = {}
    for name in ("alone", *names):
        ranks, parallel, stage = LAYOUTS[name]
        run = make_lora(name, f"deepspeed.zero_optimization.stage={stage}", parallel=parallel)
        mds.train(run, nproc=ranks)
        seen[name] = losses(run.output, "loss"), losses(run.output, "valid_loss")
        saved = Path(run.output) / "checkpoints" / name_of(4)
        assert {path.name for path in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not list(saved.glob("model*.safetensors"))
    for name in names:
        assert seen[name][0] == pytest.approx(seen["alone"][0], rel=2e-5), name
        assert seen[name][1] == pytest.approx(seen["alone"][1], rel=2e-5), name
    assert len(set(seen["alone"][0])) == 5


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        ("alone", "tp2-zero3", ["peft.use_dora=true"]),
        pytest.param("tp2-zero3", "pp2", ["peft.modules_to_save=[embed_tokens, lm_head]"], marks=pytest.mark.sweep),
        ("pp2", "dp2-zero2", ["peft.modules_to_save=[embed_tokens]", "peft.init_lora_weights=olora"]),
    ],
)
def test_a_run_goes_on_at_another_layout(make_lora: Any, first: str, second: str, more: list[str]) -> None:
    preload()
    for name, steps in ((first, 2), (second, 5)):
        ranks, parallel, stage = LAYOUTS[name]
        overrides = [f"train.steps={steps}", "schedule.name=constant", f"deepspeed.zero_optimization.stage={stage}"]
        mds.train(make_lora("cut", *overrides, *more, parallel=parallel), nproc=ranks)
    straight = make_lora("straight", "schedule.name=constant", *more)
    mds.train(straight)
    assert losses(Path(straight.output).parent / "cut", "loss") == pytest.approx(
        losses(straight.output, "loss"), rel=2e-5
    )


def _logits(directory: Path, merged: Path, base: Path, other: Path) -> None:
    """What peft makes of the directory, and transformers of the merged one; and that peft changes something."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(2, 34)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits.detach()
    found = [
        PeftModel.from_pretrained(plain, str(directory)).eval()(ids).logits,
        AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits,
        AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits,  # by the base that it names
        AutoModelForCausalLM.from_pretrained(other).eval()(ids).logits,
    ]
    assert float((found[0] - before).abs().max()) > 1e-3
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<eos>"


def test_exports_for_peft_and_merged(
    make_lora: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run, checked by it, and by the command from its checkpoint."""
    preload()
    export = {"path": str(tmp_path / "adapter"), "check": True}
    more = ["peft.modules_to_save=[embed_tokens, lm_head]", "peft.init_lora_weights=pissa"]
    run = make_lora("run", *more, parallel={"tensor": 2, "pipeline": 2, "sequence": True}, export=export)
    mds.train(run, nproc=4)
    again = make_lora("second", *more, "export.merge=true", export={"path": str(tmp_path / "merged"), "check": True})
    mds.train(again)
    assert _run(["export", run.output, str(tmp_path / "from_command"), "--merge"]) == 0
    assert _run(["export", run.output, str(tmp_path / "adapter_from_command")]) == 0
    run_alone(_logits, tmp_path / "adapter", tmp_path / "merged", base, tmp_path / "from_command")
    for place in (run.output, str(tmp_path / "adapter")):
        assert _run(["inspect", place]) == 0
        shown = capsys.readouterr().out
        assert "LoRA, r 4, on 14 modules" in shown and f"base        {base}" in shown
    mine, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "adapter_from_command")
    )
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_new_run_begins_with_given_adapters(make_lora: Any, tmp_path: Path) -> None:
    """What one run left is where another begins: its first loss is lower than the first one's."""
    preload()
    first = make_lora("first", export={"path": str(tmp_path / "adapter")})
    mds.train(first)
    second = make_lora("second", f"peft={tmp_path / 'adapter'}")
    mds.train(second)
    third = make_lora("third", f"peft={first.output}")
    mds.train(third)
    assert losses(second.output, "loss")[0] < losses(first.output, "loss")[0]
    assert losses(second.output, "loss") == losses(third.output, "loss")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["peft={r: 0}"], "peft.r=0 must be at least 1"),
        (["peft={rank_pattern: {q_proj: 0}}"], "peft.rank_pattern.q_proj=0 must be at least 1"),
        (["peft={rank: 8}"], "peft.rank is not a field of peft's LoraConfig"),
        (["peft={peft_type: VERA}"], "peft.peft_type=VERA is not supported; supported: LORA, IA3"),
        (
            ["peft={init_lora_weights: loftq}"],
            "gaussian, pissa, olora, orthogonal; nearest: true",
        ),
        (["peft={lora_bias: true}"], "peft.lora_bias=True is not supported; nearest: False"),
        (["peft={bias: all}"], "peft.bias=all is not supported; nearest: none"),
        (["peft={target_modules: [q]}"], "matches nothing in a llama; supported: down_proj, gate_proj, k_proj"),
        (
            ["peft={target_modules: [q_proj, lm_head]}"],
            "target_modules matches lm_head, which cannot have an adapter",
        ),
        (
            ["peft={peft_type: IA3, target_modules: [up_proj], feedforward_modules: [up_proj]}"],
            "peft.feedforward_modules matches model.layers.0.mlp.up_proj, whose input others take too",
        ),
        (["peft={peft_type: IA3, r: 4}"], "peft.r is not a field of peft's IA3Config"),
        (["peft=nowhere"], "peft=nowhere does not exist; there is no nowhere in"),
        (["peft=3"], "peft=3 is neither fields of a peft config"),
        (["train.freeze=[model.norm.weight]"], "train.freeze does nothing with peft"),
        (
            ["train.moe_bias_rate=1e-3"],
            "train.moe_bias_rate=0.001 does nothing with peft, which freezes routers; remove it",
        ),
        (["model.init=random"], "peft needs a model to adapt, and model.init=random has none"),
        (["peft=null", "export={path: x, merge: true}"], "export.merge=true does nothing without peft"),
    ],
)
def test_mistakes_are_one_line(make_lora: Any, overrides: list[str], says: str, tmp_path: Path) -> None:
    preload()
    with pytest.raises(MegatronDSError) as caught:
        mds.train(make_lora("run", *overrides))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_adapters_are_not_gone_on_with(make_lora: Any, base: Path, tmp_path: Path) -> None:
    preload()
    run = make_lora("run", "train.steps=2")
    mds.train(run)
    for overrides, says in (
        (["peft.r=2"], "is r 2, scale 4.0, and"),
        (["peft.use_dora=true"], "is r 4, scale 2.0, DoRA, and"),
        (["peft.target_modules=[q_proj]"], "is none, and"),
        (["peft.modules_to_save=[lm_head]"], r"peft\.modules_to_save trains lm_head\.weight, unlike"),
        (["peft=null"], "holds adapters, and the run has no peft"),
    ):
        with pytest.raises(MegatronDSError, match=says):
            mds.train(make_lora("run", *overrides))
    own = f"peft={run.output}/checkpoints/{name_of(2)}"
    with pytest.raises(MegatronDSError, match=r"peft=.* is one of the checkpoints under output=.* that would be moved"):
        mds.train(make_lora("run", own, "checkpoint.resume=never"))
    with pytest.raises(MegatronDSError, match=r"export\.path=.* would replace peft="):
        mds.train(make_lora("other", own, f"export={{path: {run.output}/checkpoints/{name_of(2)}}}"))
    with pytest.raises(MegatronDSError, match=r"is an adapter; try model\.path="):
        mds.train(make_lora("other", f"model.path={run.output}", "peft=null"))
    shutil.copytree(run.output, tmp_path / "moved")
    content = tmp_path / "moved" / "checkpoints" / name_of(2)
    assert _run(["export", str(content), str(tmp_path / "hf"), "--merge", "--base", str(tmp_path / "gone")]) == 2
    assert _run(["export", str(base), str(tmp_path / "hf"), "--merge"]) == 2
    assert not (tmp_path / "hf").exists()


def test_half_precision_keeps_its_masters(make_lora: Any, tmp_path: Path) -> None:
    """Cut and gone on with in bf16, bit for bit; exported in fp32 from the masters."""
    preload()
    half = ["deepspeed.bf16={enabled: true}", "schedule.name=constant"]
    whole = make_lora("whole", *half)
    mds.train(whole)
    mds.train(make_lora("cut", *half, "train.steps=2"))
    cut = make_lora("cut", *half)
    mds.train(cut)
    assert losses(cut.output, "loss") == losses(whole.output, "loss")
    assert _run(["export", cut.output, str(tmp_path / "fp32"), "--dtype", "float32"]) == 0
    assert _run(["export", cut.output, str(tmp_path / "bf16")]) == 0
    fp32, bf16 = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fp32", "bf16"))
    assert all(torch.equal(fp32[name].bfloat16(), bf16[name]) for name in bf16)
    assert any(not torch.equal(fp32[name], bf16[name].float()) for name in bf16)


def test_scalings_too(make_lora: Any, base: Path, tmp_path: Path) -> None:
    """(IA)^3, gone on with at another layout, exported for peft and merged."""
    preload()
    scalings = "peft={peft_type: IA3}"  # peft's usual ones of a Llama
    more = ["schedule.name=constant", "optimizer.lr=0.05"]
    straight = make_lora("straight", scalings, *more)
    mds.train(straight)
    mds.train(make_lora("cut", scalings, *more, "train.steps=2", parallel={"tensor": 2, "sequence": True}), nproc=2)
    export = {"path": str(tmp_path / "adapter"), "check": True}
    cut = make_lora("cut", scalings, *more, export=export, parallel={"pipeline": 2})
    mds.train(cut, nproc=2)
    assert losses(cut.output, "loss") == pytest.approx(losses(straight.output, "loss"), rel=2e-5)
    assert _run(["export", cut.output, str(tmp_path / "merged"), "--merge"]) == 0
    run_alone(_logits, tmp_path / "adapter", tmp_path / "merged", base, tmp_path / "merged")
