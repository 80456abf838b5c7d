"""Fine-tuning on conversations by the real run: the same at every layout, packed or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig, build_run
from tests.halves import swept
from tests.ranks import preload
from tests.training.test_runs import losses
from tests.training.tiny import MODEL, WORDS

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <eos> ' }}{% endfor %}"
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "alone": (1, {}, 1),
    "tp2-sp-zero3": (2, {"tensor": 2, "sequence": True}, 3),
    "pp2": (2, {"pipeline": 2}, 1),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 1),
    "dp2-zero2": (2, {}, 2),
}


@pytest.fixture
def make_chat(tmp_path: Path) -> Callable[..., RunConfig]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1, "user": 2, "assistant": 3, **{word: i + 4 for i, word in enumerate(WORDS[:57])}}
    backend = Tokenizer(WordLevel(words, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    for name, count in (("train", 40), ("valid", 13)):
        rows = []
        for row in range(count):
            said = [" ".join(WORDS[(row + turn) % 9 : (row + turn) % 9 + 1 + row % 5]) for turn in range(2)]
            roles = zip(("user", "assistant"), said)
            rows.append({"messages": [{"role": role, "content": text} for role, text in roles]})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, parallel: dict[str, Any], stage: int, packing: bool, lr: float = 3e-3) -> RunConfig:
        return build_run(
            {
                "model": {"config": MODEL, "tokenizer": str(tmp_path / "tokenizer")},
                "parallel": parallel,
                "deepspeed": {"zero_optimization": {"stage": stage}},
                "data": {
                    "format": "chat",
                    "train": [str(tmp_path / "train.jsonl")],
                    "valid": [str(tmp_path / "valid.jsonl")],
                    "seq_length": 32,
                    "packing": packing,
                    "cache_dir": str(tmp_path / "cache"),
                },
                "optimizer": {"lr": lr},
                "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "eval_every": 2},
                "output": str(tmp_path / name),
            }
        )

    return make


@pytest.mark.parametrize("names", [("tp2-pp2-sp", "dp2-zero2"), *swept((("tp2-sp-zero3", "pp2"),))], ids="-".join)
def test_losses_do_not_depend_on_the_layout(make_chat: Any, names: tuple[str, ...]) -> None:
    preload()
    seen = {}
    for name in ("alone", *names):
        ranks, parallel, stage = LAYOUTS[name]
        run = make_chat(name, parallel, stage, packing=True)
        mds.train(run, nproc=ranks)
        seen[name] = losses(run.output, "loss"), losses(run.output, "valid_loss")
    for name in names:
        assert seen[name][0] == pytest.approx(seen["alone"][0], rel=2e-5), name
        assert seen[name][1] == pytest.approx(seen["alone"][1], rel=2e-5), name
    assert seen["alone"][0][-1] < seen["alone"][0][0]


@pytest.mark.parametrize("name", ["tp2-pp2-sp", *swept("alone")])
def test_the_whole_validation_set_has_the_same_loss_packed_and_not(make_chat: Any, name: str) -> None:
    preload()
    ranks, parallel, stage = LAYOUTS[name]
    found = []
    for packing in (False, True):
        run = make_chat(f"packing-{packing}", parallel, stage, packing, lr=0.0)
        mds.train(run, nproc=ranks)
        found.append(losses(run.output, "valid_loss")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
