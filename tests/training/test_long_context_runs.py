"""Runs on a mix of document lengths: the same at every layout and after a resume, shown by `inspect`, and refused."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig, dump_run
from megatron_ds.errors import CheckpointError, ConfigError
from tests.ranks import preload
from tests.training.test_runs import losses
from tests.training.tiny import WORDS

MIX = {0: 0.25, 33: 0.75}


@pytest.fixture
def make_mixed(tmp_path: Path, make_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Runs on 30 documents of 2 to 100 tokens; keyword arguments are entries of sections."""
    chance = random.Random(1)
    texts = [" ".join(chance.choice(WORDS) for _ in range(chance.randrange(1, 100))) for _ in range(30)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(name: str = "run", data: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        found = {"train": [str(tmp_path / "docs.jsonl")], "valid": [], "valid_share": 0.1, "long_context": MIX}
        return make_run(name, data={**found, **(data or {})}, **sections)

    return make


def test_losses_do_not_depend_on_the_layout(make_mixed: Callable[..., RunConfig]) -> None:
    """Five steps of packed documents in fp32, sums in another order: 2e-5 relative."""
    preload()
    seen = {}
    for name, parallel in {"alone": {}, "dp2": {}, "tp2": {"tensor": 2}, "cp2": {"context": 2}}.items():
        run = make_mixed(name, {"packing": True}, parallel=parallel)
        mds.train(run, nproc=1 if name == "alone" else 2)
        seen[name] = [*losses(run.output, "loss"), *losses(run.output, "valid_loss")]
        usage = json.loads((Path(run.output) / "data.json").read_text())
        assert [one["samples"] for one in usage["sources"]] == [10, 30] and usage["samples"] == 40
    for name in seen:
        assert seen[name] == pytest.approx(seen["alone"], rel=2e-5), name


def test_a_resumed_run_reads_on(make_mixed: Callable[..., RunConfig]) -> None:
    """The checkpoint of step 2 continues to step 5, and not with other shares."""
    preload()
    settings = {"checkpoint": {"every": 2}, "schedule": {"name": "constant"}}
    whole = make_mixed("whole", **settings)
    mds.train(whole)
    mds.train(make_mixed("resumed", train={"steps": 2, "eval_every": 0}, **settings))
    with pytest.raises(CheckpointError, match=r'^data.long_context=\{"0": 0.5, "33": 0.5\} is not what .* was trained'):
        mds.train(make_mixed("resumed", {"long_context": {0: 0.5, 33: 0.5}}, **settings))
    resumed = make_mixed("resumed", **settings)
    mds.train(resumed)
    assert losses(whole.output, "loss") == losses(resumed.output, "loss")


def test_inspect_counts_the_bands(
    make_mixed: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str, data: dict[str, Any] | None = None) -> str:
        (tmp_path / "run.yaml").write_text(dump_run(make_mixed(data=data)))
        capsys.readouterr()
        assert _run(["inspect", str(tmp_path / "run.yaml"), *arguments]) == 0
        return capsys.readouterr().out

    facts = json.loads(shown("--json"))
    short, long = facts["mix"]
    assert (short["name"], long["name"]) == ("documents of less than 33 tokens", "documents of 33 tokens or more")
    assert (short["share"], long["share"], short["taken"], long["taken"]) == (0.25, 0.75, 10, 30)
    assert short["documents"] + long["documents"] == 30 == facts["lengths"]["count"]
    assert short["tokens"] + long["tokens"] == facts["lengths"]["total"]
    assert short["whole"] == 0 < long["whole"] and long["epochs"] == 30 / long["samples"]
    said = shown(data={"packing": True, "valid_share": None})
    assert re.search(rf"^mix +75.0% from documents of 33 tokens or more: {long['documents']} documents, ", said, re.M)
    assert re.search(r"^columns +input_ids, targets, position_ids$", said, re.M) and "valid       none" in said
    twice = {"train": [{"path": str(tmp_path / "docs.jsonl"), "weight": weight} for weight in (1, 3)]}
    assert [one["taken"] for one in json.loads(shown("--json", data=twice))["mix"]] == [3, 7, 8, 22]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"long_context": {0: 0.3, 4096: 0.6}}, 'data.long_context={"0": 0.3, "4096": 0.6}: the shares add up to 0.9'),
        ({"long_context": {"4k": 1}}, "data.long_context has the key 4k, which is no length in tokens; write {0: 0.3,"),
        ({"long_context": {-1: 1}}, "data.long_context has the key -1, which is no length in tokens"),
        ({"long_context": {True: 1}}, "data.long_context has the key true, which is no length in tokens"),
        ({"long_context": {0: 0, 5: 1}}, "data.long_context.0=0 must be more than 0"),
        ({"long_context": {}}, "data.long_context={} is empty; give at least one"),
        ({"long_context": 4096}, "data.long_context=4096 is not a mapping; write {key: value}"),
        (
            {"long_context": {0: 1}, "format": "tokenized"},
            'data.long_context={"0": 1.0} does nothing with data.format=tokenized; remove it, or use data.format=text',
        ),
    ],
)
def test_what_is_refused(data: dict[str, Any], expected: str, make_mixed: Callable[..., RunConfig]) -> None:
    from megatron_ds.training.resolve import resolve_run

    with pytest.raises(ConfigError) as caught:
        resolve_run(make_mixed(data=data), 1, "cpu")
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_shares_of_an_override_and_epochs(make_mixed: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_run(make_mixed()))
    run = mds.load_run(tmp_path / "run.yaml", ["data.long_context.64=0.5", "data.long_context.33=0.25"])
    assert run.data.long_context is not None and list(run.data.long_context.items()) == [
        (0, 0.25),
        (33, 0.25),
        (64, 0.5),
    ]
    assert mds.load_run(tmp_path / "run.yaml", ["data.long_context={4e3: 1}"]).data.long_context == {4000: 1.0}
    with pytest.raises(ConfigError, match=r"^train.epochs=2 is not defined with data.long_context: documents of"):
        make_mixed(train={"steps": None, "epochs": 2})
