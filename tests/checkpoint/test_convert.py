"""Import and export: no bit changes, masters where more precision is asked for, and nothing is half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.cli.main import _run
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.monitor import read_metrics
from tests.checkpoint.runs import CUT, saved_at
from tests.checkpoint.test_faults import go_on
from tests.hf.models import SMALL, build, changed, hashes
from tests.hf.test_convert import rise_of_peak
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.ours import Place
from tests.parity.sampling import sampled
from tests.ranks import run_alone

BF16 = Recipe(precision="bf16")
CASES = [
    *((case, dtype) for case in CONFIGS for dtype in ("float32",)),
    ("gpt2", "bfloat16"),
    ("llama", "float16"),
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_decoders_come_out_as_they_went_in(case: str, dtype: str, saved: Path, tmp_path: Path) -> None:
    source = saved / case / dtype
    mds.import_hf(source, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "checkpoint") == hashes(source)
    assert first_damage(tmp_path / "checkpoint") is None
    assert not (tmp_path / "hf" / "training_state").exists()


@pytest.mark.parametrize("case", sampled(ENCODER_CASES))
def test_encoders_too(case: str, encoders: Path, tmp_path: Path) -> None:
    rewrite(encoders / case, tmp_path / "clean")
    mds.import_hf(encoders / case, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf", max_shard_size="20KB")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "checkpoint") == hashes(tmp_path / "clean")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


def test_an_old_directory_is_imported(saved: Path, tmp_path: Path) -> None:
    """.bin, without the base model's prefix."""
    old = tmp_path / "old"
    shutil.copytree(saved / "gpt2" / "float32", old)
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, old / "pytorch_model.bin"
    )
    mds.import_hf(old, tmp_path / "checkpoint")
    assert hashes(tmp_path / "checkpoint") == hashes(saved / "gpt2" / "float32")


def test_a_run_goes_on_from_an_imported_model(corpus: Path, tmp_path: Path) -> None:
    """By its path, or as what it resumes: the same first step."""
    go_on(corpus, tmp_path / "first", train={"steps": 2}, checkpoint={"every": 2})
    mds.export_hf(tmp_path / "first", tmp_path / "hf")
    mds.import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    model = {"config": None, "path": str(tmp_path / "checkpoint"), "init": "pretrained"}
    go_on(corpus, tmp_path / "by_path", train={"steps": 3}, checkpoint={"every": 0}, model=model)
    resume = {"every": 0, "resume": str(tmp_path / "checkpoint")}
    go_on(corpus, tmp_path / "by_resume", train={"steps": 3}, checkpoint=resume)
    seen = [
        [step.loss for step in read_metrics(tmp_path / name / "metrics.jsonl")[0]] for name in ("by_path", "by_resume")
    ]
    assert seen[0] == seen[1] and len(seen[0]) == 3


@pytest.fixture(scope="module")
def trained(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that two ranks trained in bf16; tied, with a padded vocabulary."""
    directory, _ = references("qwen2-tied", Recipe())
    folder = tmp_path_factory.mktemp("bf16")
    saved_at(directory, Place(2, 1, 2, 3), BF16, folder)
    return folder


def _masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """In Hugging Face's words."""
    model, reader = HFWeights(checkpoint, read_model(checkpoint)).model, StateReader(checkpoint)
    to_hf, found = ToHF(model), dict[str, torch.Tensor]()
    for name, row in model.table.items():
        whole = reader.read_full("master", name, row.op.native_shape(model.axis_sizes))
        found.update({theirs: tensor.clone() for theirs, tensor in to_hf.add(name, whole)})
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_more_precision_comes_from_the_masters(dtype: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / name_of(CUT)
    mds.export_hf(trained, tmp_path / "hf", dtype)
    masters, weights = _masters(checkpoint), load_file(checkpoint / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == masters.keys() == weights.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, masters[name].to(getattr(torch, dtype))), name
        assert torch.equal(weights[name], masters[name].bfloat16()), name
    assert any(not torch.equal(weights[name].float(), masters[name]) for name in masters)


COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM

def logits(directory):
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model(torch.arange(2, 30)[None]).logits

first, second = map(logits, sys.argv[1:])
assert torch.equal(first, second) and bool(first.isfinite().all())
"""


def _same_logits(source: Path, others: list[Path]) -> None:
    from transformers import AutoModelForCausalLM

    def logits(directory: Path) -> torch.Tensor:
        model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
        assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        return torch.as_tensor(model.eval()(torch.arange(2, 18)[None]).logits)

    expected = logits(source)
    assert bool(expected.isfinite().all())
    for directory in others:
        assert torch.equal(logits(directory), expected), directory


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_loads_what_was_imported_and_exported(case: str, saved: Path, tmp_path: Path) -> None:
    source = saved / case / "float32"
    mds.import_hf(source, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf", max_shard_size="30KB")
    run_alone(_same_logits, source, [tmp_path / "checkpoint", tmp_path / "hf"])


def test_transformers_loads_a_checkpoint_as_it_stands(trained: Path, tmp_path: Path) -> None:
    mds.export_hf(trained, tmp_path / "hf")
    directories = [str(trained / name_of(CUT)), str(tmp_path / "hf")]
    subprocess.run([sys.executable, "-c", COMPARE, *directories], check=True, timeout=120)


# ---- refused, and nothing left ---------------------------------------------------------------------------------------


def _one_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert _run([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    return told.err


def test_a_flipped_byte_is_named_and_the_whole_one_beside_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "checkpoints"))
    newer = Path(shutil.copytree(folder / name_of(CUT), folder / name_of(9)))
    file = newer / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = _one_line(capsys, "export", newer, tmp_path / "hf")
    assert (
        f"{file} does not match its checksum" in said and f"nearest: {folder / name_of(CUT)}, which is intact" in said
    )
    assert not (tmp_path / "hf").exists()
    assert _run(["inspect", str(newer)]) == 1
    assert f"DAMAGED     {file} does not match its checksum" in capsys.readouterr().out
    assert _run(["inspect", str(folder)]) == 1
    told = capsys.readouterr().out
    assert f"{name_of(9)}  DAMAGED (1 file)" in told and f"{name_of(CUT)}  intact, all checksums match" in told
    assert _run(["inspect", "--fast", str(newer)]) == 0, "the length is right"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "nothing", "hf"), "nothing does not exist; there is no nothing in"),
        (("export", "ck", "ck"), "ck would replace ck, which is read"),
        (("export", "ck", "hf", "--dtype", "int8"), "--dtype=int8 is not one of float32, bfloat16, float16"),
        (("export", "ck", "hf", "--max-shard-size", "big"), "max_shard_size='big' is not a size"),
        (("export", "ck", "mine"), "mine would be replaced, and holds notes.txt, which is no file of a model"),
        (("export", "model", "ck"), "ck would be replaced, and holds training_state"),
        (("import", "model", "trained"), "trained would be replaced, and is a checkpoint of step 2"),
        (("import", "nothing", "other"), "nothing does not exist; there is no nothing in"),
        (
            ("import", "model", "theirs"),
            "theirs would be replaced, and holds training_state/notes.txt, which no import writes",
        ),
        (("export", "ck", "mine/notes.txt/hf"), "mine/notes.txt/hf could not be written: Not a directory"),
        (("inspect", "mine"), "mine is no checkpoint, folder of checkpoints, run output or Hugging Face directory"),
        (("inspect", "."), ". is no checkpoint, folder of checkpoints, run output or Hugging Face directory"),
        (("inspect", "/"), "/ is no checkpoint, folder of checkpoints, run output or Hugging Face directory"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...],
    says: str,
    saved: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "llama" / "float32", "model")
    shutil.copytree(trained / name_of(CUT), "trained")
    mds.import_hf("model", "ck")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    shutil.copytree("ck", "theirs")
    Path("theirs/training_state/notes.txt").write_text("mine")
    before = sorted(Path(".").rglob("*"))
    assert says in _one_line(capsys, *words)
    assert sorted(Path(".").rglob("*")) == before


def test_a_failure_in_the_middle_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ds.checkpoint import convert

    mds.import_hf(saved / "llama" / "float32", tmp_path / "ck")
    rewrite(saved / "llama" / "float32", tmp_path / "export")
    before = sorted(tmp_path.rglob("*"))

    def fail(*given: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(convert, "write_manifest", fail)
    with pytest.raises(CheckpointError, match="export could not be written: the disk is gone"):
        mds.import_hf(saved / "gpt2" / "float32", tmp_path / "export")
    with pytest.raises(ConversionError, match="float16 cannot hold"):
        big = changed(
            saved / "llama" / "float32", tmp_path / "big", lambda tensors: {n: t * 1e6 for n, t in tensors.items()}
        )
        mds.export_hf(big, tmp_path / "hf", "float16")
    shutil.rmtree(tmp_path / "big")
    assert sorted(tmp_path.rglob("*")) == before
    assert first_damage(tmp_path / "ck") is None


# ---- what is replaced ------------------------------------------------------------------------------------------------


@pytest.fixture
def places(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, a checkpoint, and one in a run's output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    shutil.copytree(saved / "llama" / "float32", "models/base")
    shutil.copytree("models/base", "other")
    mds.import_hf("models/base", "ck")
    shutil.copytree("ck", "run/checkpoints/step_00000002")
    Path("run/checkpoints/latest").write_text("step_00000002\n")
    Path("run/config.yaml").touch()
    Path("run/metrics.jsonl").touch()
    Path("me").mkdir()
    Path("me/thesis.tex").write_text("mine")
    Path("link").symlink_to("models")
    return tmp_path


DOORS = {
    "export": ("export", "models/base"),
    "import": ("import", "models/base"),
    "export_hf": (mds.export_hf, "models/base"),
    "import_hf": (mds.import_hf, "models/base"),
    "rewrite": (rewrite, "models/base"),
    "export of a checkpoint": ("export", "run"),
}
NEVER = (
    "models/base",
    "models",
    "link",
    "link/base",
    "ck",
    "run/checkpoints/step_00000002",
    "run",
    "me",
    ".",
    "..",
    "/",
)


def _bytes(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_leads_over_what_must_stay(door: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act, source = DOORS[door]
    before = _bytes(places)
    for target in NEVER:
        if source == "run" and "models" in str(Path(target).resolve()):
            continue  # it is not read
        if isinstance(act, str):
            _one_line(capsys, act, source, target, "--overwrite")
        else:
            with pytest.raises((ConversionError, CheckpointError)):
                act(source, target, overwrite=True)
        assert _bytes(places) == before, target


@pytest.mark.parametrize("door", DOORS)
def test_another_model_is_replaced_on_demand(door: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act, source = DOORS[door]
    before = _bytes(places)
    if isinstance(act, str):
        said = _one_line(capsys, act, source, "other")
    else:
        with pytest.raises(ConversionError) as caught:
            act(source, "other")
        said = f"error: {caught.value}\n"
    assert said == (
        "error: other would be replaced, and has no mark of an export (earlier versions wrote no "
        ".megatron_ds_export.json); choose another directory, or try --overwrite\n"
    )
    assert _bytes(places) == before
    for flags in ([True], [False]) if "import" not in door else ([True],):
        if isinstance(act, str):
            assert _run([act, source, "other", *["--overwrite"] * flags[0]]) == 0
        else:
            act(source, "other", overwrite=flags[0])
    assert hashes(Path("other")) == hashes(Path("models/base"))
    assert Path("other/.megatron_ds_export.json").is_file() is ("import" not in door)


def test_what_the_run_of_a_checkpoint_reads_is_never_replaced(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = {"model": {"path": "models/base", "tokenizer": "link/../other"}, "peft": "me"}
    Path("run/config.yaml").write_text(json.dumps(read))
    before = _bytes(places)
    for target, field in (("link/base", "model.path=models/base"), ("other", "model.tokenizer=link/../other")):
        said = _one_line(capsys, "export", "run", target, "--overwrite")
        assert f"{target} would replace {field}, which the run of run/checkpoints/step_00000002 reads" in said
    assert _bytes(places) == before
    Path("run/config.yaml").write_text("model: [")
    assert _run(["export", "run", "other", "--overwrite"]) == 0


def test_a_base_model_of_adapters_is_never_replaced(
    places: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    before = _bytes(places)
    for base in ([], ["--base", "other"]):
        target = base[-1] if base else "link/base"
        said = _one_line(capsys, "export", "lora", target, "--overwrite", *base)
        assert f"{target} would replace {'other' if base else 'models/base'}, the base of lora" in said
    assert _bytes(places) == before


def test_a_change_in_the_last_moment_is_told_in_one_line(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ds.hf.export import DirectoryExport

    original = DirectoryExport.finish

    def finish(self: DirectoryExport, *given: Any) -> None:
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")
        original(self, *given)

    monkeypatch.setattr(DirectoryExport, "finish", finish)
    said = _one_line(capsys, "export", "ck", "out")
    assert "out would be replaced, and holds notes.txt, which is no file of a model" in said
    assert said.endswith(f"; the new files are in {places}/out.1\n")
    assert hashes(Path("out.1")) == hashes(Path("models/base"))
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


# ---- what it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_nothing_of_deepspeed_is_needed(saved: Path, tmp_path: Path) -> None:
    """Conversion is files in, files out."""
    code = (
        "import sys, megatron_ds as mds\n"
        f"mds.import_hf({str(saved / 'llama' / 'float32')!r}, {str(tmp_path / 'ck')!r})\n"
        f"mds.export_hf({str(tmp_path / 'ck')!r}, {str(tmp_path / 'hf')!r})\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _peaks(large: Path, tiny: Path, place: Path) -> dict[str, int]:
    mds.import_hf(tiny, place / "warm-ck")
    mds.export_hf(place / "warm-ck", place / "warm-hf", "float32")
    return {
        "import": rise_of_peak(tiny, lambda: mds.import_hf(large, place / "ck")),
        "export": rise_of_peak(tiny, lambda: mds.export_hf(place / "ck", place / "hf", "float16")),
    }


def test_memory_is_bounded(saved: Path, tmp_path: Path) -> None:
    """Of 430 MB in fp32: the largest parameter (gate and up of a layer) on disk, in memory, in the new type, as it is
    written; and blocks that the C library keeps."""
    config = {**SMALL, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8000}
    run_alone(_save_large, config, tmp_path / "large")
    largest = 2 * 4096 * 1024 * 4
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 12 * largest
    tiny = Path(shutil.copytree(saved / "llama" / "bfloat16", tmp_path / "tiny"))
    found = run_alone(_peaks, tmp_path / "large", tiny, tmp_path)
    print({name: f"{size / 2**20:.1f} MB" for name, size in found.items()})
    assert max(found.values()) < 5 * largest


def _save_large(config: dict[str, Any], directory: Path) -> None:
    build(config).save_pretrained(directory)
