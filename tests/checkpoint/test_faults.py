"""What can happen to a run and its files: the last whole checkpoint stays, and the run goes on from it by itself.

Every run here is of ten steps and saves after each third. One is never cut; the others must end with its losses, bit
for bit.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint import saver
from megatron_ds.checkpoint.directory import LATEST, name_of
from megatron_ds.checkpoint.reader import first_damage, newest_intact
from megatron_ds.config import RunConfig, build_run
from megatron_ds.errors import CheckpointError, ConfigError, LaunchError
from megatron_ds.monitor import SilentReporter
from megatron_ds.training import loop, resume
from tests.ranks import preload, run_alone
from tests.training.tiny import MODEL, run_mapping

STEPS = 10
NEWEST, BEFORE = name_of(6), name_of(3)


def tiny_run(corpus: Path, output: Path, **sections: dict[str, Any]) -> RunConfig:
    mapping = run_mapping(corpus, output)
    mapping["train"].update(steps=STEPS)
    mapping["data"].update(valid=[])
    mapping["checkpoint"] = {"every": 3, "keep": 3, "asynchronous": False}
    for name, changes in sections.items():
        mapping[name] = {**mapping.get(name, {}), **changes}
    return build_run(mapping)


def losses(output: Path) -> list[float]:
    """Of each step once, in order; a validation may follow the last one."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "valid_loss" not in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def die_at(step: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a rank killed where it begins a step."""
    begin = loop.TrainingLoop._step

    def step_or_die(self: Any, number: int) -> None:
        if number == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, number)

    monkeypatch.setattr(loop.TrainingLoop, "_step", step_or_die)


@pytest.fixture(scope="module")
def uncut(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing happened to; it saved nothing."""
    preload()
    output = tmp_path_factory.mktemp("uncut") / "run"
    mds.train(tiny_run(corpus, output, checkpoint={"every": 0}), 2)
    found = losses(output)
    assert len(set(found)) == STEPS
    return found


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run whose rank 1 was killed at step 8: checkpoints after 3 and 6."""
    preload()
    output = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        die_at(8, 1, patch)
        with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL"):
            mds.train(tiny_run(corpus, output), 2)
    assert [path.name for path in naming.checkpoints_in(output / "checkpoints")] == [NEWEST, BEFORE]
    return output


@pytest.fixture
def cut(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


class Listener(SilentReporter):
    """Keeps what rank 0 says, in a file: it is another process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *problem: object) -> None:
        """Nothing to close."""

    def note(self, text: str) -> None:
        with open(self.file, "a") as file:
            file.write(text + "\n")


def go_on(corpus: Path, output: Path, ranks: int = 2, **sections: dict[str, Any]) -> str:
    """Start the run again; gives what it said."""
    said = output.parent / "said.txt"
    mds.train(tiny_run(corpus, output, **sections), ranks, lambda: Listener(said))
    return said.read_text() if said.is_file() else ""


def test_a_killed_run_goes_on(cut: Path, corpus: Path, uncut: list[float]) -> None:
    said = go_on(corpus, cut)
    assert f"resuming from step 6, checkpoint {cut}/checkpoints/{NEWEST}" in said
    assert losses(cut) == uncut
    assert (cut / "checkpoints" / LATEST).read_text().strip() == name_of(STEPS)


def test_a_whole_run_does_not_train_again(cut: Path, corpus: Path, uncut: list[float]) -> None:
    go_on(corpus, cut)
    went_on = losses(cut)
    go_on(corpus, cut)
    assert losses(cut) == went_on == uncut


# ---- damaged files ---------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _remove(file: Path) -> None:
    file.unlink()


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


STATE_FILE = "training_state/state-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("harm", "file", "says"),
    [
        (_truncate, STATE_FILE, "bytes instead of"),
        (_truncate, "model.safetensors", "bytes instead of"),
        (_flip, STATE_FILE, "does not match its checksum"),
        (_flip, "model.safetensors", "does not match its checksum"),
        (_flip, "config.json", "does not match its checksum"),
        (_flip, "training_state/progress.json", "does not match its checksum"),
        (_remove, STATE_FILE, "is missing"),
        (_remove, "tokenizer.json", "is missing"),
        (_remove, "training_state/manifest.json", "is missing"),
        (_halve, "training_state/manifest.json", "is damaged"),
        (_write(b""), "training_state/manifest.json", "is damaged"),
        (_write(b"\xff\xfe\x00"), "training_state/manifest.json", "is damaged"),
        (_write(b"[]"), "training_state/manifest.json", "is damaged"),
        (_write(b"[" * 9999), "training_state/manifest.json", "is damaged"),
        (_write(b'{"files": {}}'), "training_state/manifest.json", "is damaged (it does not list"),
        (_write(b'{"files": {"config.json": null}}'), "training_state/manifest.json", "is damaged"),
        (_write(b"{}"), "training_state/progress.json", "bytes instead of"),
    ],
)
def test_damage_is_found_named_and_passed_over(harm: Callable[[Path], object], file: str, says: str, cut: Path) -> None:
    """By every rank's share of the checking, whatever their number."""
    folder = cut / "checkpoints"
    harm(folder / NEWEST / file)
    found = newest_intact(folder)
    assert found.path == folder / BEFORE
    assert len(found.damaged) == 1 and f"{folder / NEWEST / file} " in found.damaged[0] and says in found.damaged[0]


def test_a_run_goes_on_from_the_one_before_a_damaged_one(cut: Path, corpus: Path, uncut: list[float]) -> None:
    _flip(cut / "checkpoints" / NEWEST / STATE_FILE)
    said = go_on(corpus, cut)
    assert f"skipped damaged checkpoint: {cut}/checkpoints/{NEWEST}/{STATE_FILE} does not match its checksum" in said
    assert f"resuming from step 3, checkpoint {cut}/checkpoints/{BEFORE}" in said
    assert losses(cut) == uncut
    assert (cut / "checkpoints.1" / NEWEST / STATE_FILE).is_file(), "the damaged one is kept, out of the way"
    assert first_damage(cut / "checkpoints" / NEWEST) is None, "a whole one is in its place"


def test_where_none_is_whole_nothing_is_begun_and_nothing_touched(cut: Path, corpus: Path) -> None:
    for name in (NEWEST, BEFORE):
        _flip(cut / "checkpoints" / name / "model.safetensors")
    before = sorted(cut.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"none of 2 checkpoints is intact; checkpoint.resume=never starts from step 0$"
    ):
        go_on(corpus, cut)
    assert sorted(cut.rglob("*")) == before


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_any_damage_of_any_file_is_found_and_named(cut: Path, tmp_path: Path) -> None:
    """300 times a random file is cut off, flipped in a random bit, or removed."""
    chance, folder, found_by = random.Random(11), cut / "checkpoints", Counter[str]()
    files = sorted(file for file in (folder / NEWEST).rglob("*") if file.is_file())
    for _ in range(300):
        file, kind = chance.choice(files), chance.choice(["cut", "flipped", "removed"])
        content = file.read_bytes()
        if kind == "removed":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(content[: chance.randrange(len(content) - 1)])
        else:
            damaged, at = bytearray(content), chance.randrange(len(content))
            damaged[at] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
        found = newest_intact(folder)
        in_manifest = file.name == "manifest.json" and kind == "flipped"
        if found.path == folder / NEWEST:
            assert in_manifest, (file, kind)  # a blank or a name's case may change without changing what is said
        else:
            assert found.path == folder / BEFORE
            assert in_manifest or str(file) in found.damaged[0], (file, kind, found)
        found_by[kind] += 1
        file.write_bytes(content)
    assert newest_intact(folder).path == folder / NEWEST
    print(f"\n{sum(found_by.values())} files damaged ({dict(found_by)}): the last whole checkpoint was taken each time")


@pytest.mark.parametrize(
    "latest", [BEFORE, "step_00099999", "", None, "\0", "\udcff\udcfe", f"../checkpoints/{BEFORE}", "s" * 9999]
)
def test_a_stale_latest_misleads_nobody(latest: str | None, cut: Path) -> None:
    file = cut / "checkpoints" / LATEST
    file.unlink() if latest is None else file.write_bytes(latest.encode("utf-8", "surrogateescape"))
    assert newest_intact(cut / "checkpoints").path == cut / "checkpoints" / NEWEST
    if latest not in (None, BEFORE):
        assert naming.resolve_checkpoint(cut) == cut / "checkpoints" / NEWEST


def test_records_that_a_crash_has_damaged_do_not_keep_a_run_from_its_checkpoint(
    cut: Path, corpus: Path, uncut: list[float]
) -> None:
    for name in ("metrics.jsonl", "sessions.jsonl", "checkpoints/saves.jsonl", "data.json", "config.yaml"):
        with open(cut / name, "ab") as file:
            file.write(b"\xff\x00junk\n" + b"\x00" * 40)
    (cut / "checkpoints" / LATEST).write_bytes(b"\xff\xfe\n")
    said = go_on(corpus, cut)
    assert "resuming from step 6" in said
    assert losses(cut) == uncut and (cut / "report.html").is_file()
    assert (cut / "checkpoints" / LATEST).read_text() == f"{name_of(STEPS)}\n"


def test_latest_names_a_whole_one_before_the_first_step(cut: Path, corpus: Path) -> None:
    run, folder = tiny_run(corpus, cut), cut / "checkpoints"
    _flip(folder / NEWEST / "config.json")
    held = resume.lock_output(run)
    _, notes = resume.prepare_output(run, newest_intact(folder.resolve()), held)
    assert (folder / LATEST).read_text().strip() == BEFORE and f"{cut}/checkpoints.1" in notes[-1]
    resume.prepare_output(run, resume.ResumePoint(), held)  # checkpoint.resume=never
    assert not (folder / LATEST).exists() and naming.checkpoints_in(folder) == []


# ---- a save that does not come to its end ----------------------------------------------------------------------------


def _in_the_save_of(step: int, rank: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen on a rank when it has written half of its part."""
    write = saver.write_chunks

    def write_half(directory: Path, files: Any, chunks: Any) -> Any:
        if directory.name != f".{name_of(step)}.tmp" or os.environ["RANK"] != str(rank):
            return write(directory, files, chunks)

        def half() -> Any:
            for number, chunk in enumerate(chunks):
                if number == 3:
                    act()
                yield chunk

        return write(directory, files, half())

    monkeypatch.setattr(saver, "write_chunks", write_half)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _file_size_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "asynchronous"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_it_saves(
    rank: int, asynchronous: bool, corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checkpoint = tmp_path / "run", {"asynchronous": asynchronous}
    with monkeypatch.context() as patch:
        _in_the_save_of(6, rank, _kill, patch)
        with pytest.raises(LaunchError, match=f"rank {rank} was killed by SIGKILL"):
            go_on(corpus, output, checkpoint=checkpoint)
    folder = output / "checkpoints"
    assert [path.name for path in naming.checkpoints_in(folder)] == [BEFORE]
    assert (folder / LATEST).read_text().strip() == BEFORE
    go_on(corpus, output, checkpoint=checkpoint)
    assert losses(output) == uncut
    assert not list(folder.glob(".step*")), "leftovers are gone"


EXPERTS = {
    "model_type": "minimax_m2",
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}


def test_a_mixture_of_experts_is_saved_and_goes_on_like_any_model(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has half of the experts; the biases of the choice, which change every step, are those of the save."""
    config: dict[str, Any] = {"model": {"config": {**MODEL, **EXPERTS}}, "parallel": {"expert": 2}}
    go_on(corpus, tmp_path / "uncut", checkpoint={"every": 0}, train={"moe_bias_rate": 0.02}, **config)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        _in_the_save_of(6, 1, _kill, patch)
        with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL"):
            go_on(corpus, output, checkpoint={"asynchronous": True}, train={"moe_bias_rate": 0.02}, **config)
    assert [path.name for path in naming.checkpoints_in(output / "checkpoints")] == [BEFORE]
    go_on(corpus, output, train={"moe_bias_rate": 0.02}, **config)
    assert losses(output) == losses(tmp_path / "uncut")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "asynchronous"])
@pytest.mark.parametrize(("act", "rank"), [(_no_space, 1), (_file_size_limit, 0)], ids=["full", "limit"])
def test_a_rank_that_cannot_write(
    act: Callable[[], None],
    rank: int,
    asynchronous: bool,
    corpus: Path,
    tmp_path: Path,
    uncut: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line on every rank, no hang, no half of a checkpoint; once there is room the run goes on."""
    output, checkpoint = tmp_path / "run", {"asynchronous": asynchronous}
    with monkeypatch.context() as patch:
        _in_the_save_of(6, rank, act, patch)
        with pytest.raises(CheckpointError) as caught:
            go_on(corpus, output, checkpoint=checkpoint)
    words = str(caught.value)
    assert f"{NEWEST} could not be saved: rank {rank}: " in words and f"{BEFORE} is the newest intact one" in words
    assert "\n" not in words
    folder = output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == sorted([BEFORE, LATEST, "saves.jsonl"])
    go_on(corpus, output, checkpoint=checkpoint)
    assert losses(output) == uncut


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_full_disks_at_random_moments(
    corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 runs whose files may not grow beyond a random length, from a random save on, on a random rank."""
    chance, refused = random.Random(3), 0
    for number in range(20):
        output, step, rank = tmp_path / f"run{number}", chance.choice([3, 6, 9]), chance.randrange(2)
        limit, asynchronous = chance.randrange(500, 140_000), chance.random() < 0.5

        def lower(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with monkeypatch.context() as patch:
            _in_the_save_of(step, rank, lower, patch)
            with pytest.raises(
                CheckpointError, match=f"{name_of(step)} could not be saved: rank {rank}: File too large"
            ):
                go_on(corpus, output, checkpoint={"asynchronous": asynchronous})
        names = [path.name for path in naming.checkpoints_in(output / "checkpoints")]
        assert names == [name_of(earlier) for earlier in (6, 3) if earlier < step]
        assert all(first_damage(output / "checkpoints" / name) is None for name in names)
        go_on(corpus, output, checkpoint={"asynchronous": asynchronous})
        assert losses(output) == uncut
        refused += 1
    print(f"\n{refused} full disks: each was told in one line, and the run went on bit for bit")


@pytest.mark.parametrize("where", ["write_manifest", "put_in_place", "point_to"])
def test_a_disk_that_is_full_at_the_very_end(
    where: str, corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank's last writes: the manifest, the name, latest."""
    output, real = tmp_path / "run", getattr(naming, where)

    def full(place: Path, which: Any) -> Any:
        if NEWEST in (place.name.strip(".").removesuffix(".tmp"), which) or which == 6:
            _no_space()
        return real(place, which)

    with monkeypatch.context() as patch:
        patch.setattr(naming, where, full)
        with pytest.raises(CheckpointError, match=f"{NEWEST} could not be saved: rank 0: No space left on device"):
            go_on(corpus, output)
    assert not list((output / "checkpoints").glob(".step*"))
    go_on(corpus, output)
    assert losses(output) == uncut


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(
    corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, *given: Any, real: Any = shutil.rmtree, **how: Any) -> None:
        if str(path).endswith(".old") and not how:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(path, *given, **how)

    monkeypatch.setattr(naming.shutil, "rmtree", busy)
    go_on(corpus, tmp_path / "run", checkpoint={"keep": 1})
    assert losses(tmp_path / "run") == uncut


def test_killed_between_the_name_and_latest(
    corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def die(folder: Path, name: str, point: Any = naming.point_to) -> None:
        if name == NEWEST:
            _kill()
        point(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(naming, "point_to", die)
        with pytest.raises(LaunchError):
            go_on(corpus, output)
    assert (output / "checkpoints" / LATEST).read_text().strip() == BEFORE
    assert "resuming from step 6, checkpoint" in go_on(corpus, output)
    assert losses(output) == uncut


def test_a_defect_while_saving_is_told_with_its_traceback(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("a defect of ours")

    _in_the_save_of(3, 1, fail, monkeypatch)
    with pytest.raises(LaunchError, match=r"(?s)rank 1 failed.*Traceback.*a defect of ours"):
        go_on(corpus, tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_refused_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"^\S+/run/checkpoints cannot be written \(File exists\)$"):
        go_on(corpus, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints"]


def test_a_read_only_folder(corpus: Path, tmp_path: Path) -> None:
    """As a user without privileges."""
    output = tmp_path / "run"
    output.mkdir()
    os.chmod(output, 0o555)
    for place in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(place, 0o755)

    def clear() -> None:
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            resume.prepare_output(tiny_run(corpus, output), resume.ResumePoint(), None)
        finally:
            os.seteuid(user)

    with pytest.raises(CheckpointError, match=r"run\S* cannot be written \(Permission denied\)$"):
        run_alone(clear)


def test_two_runs_do_not_write_to_one_output(cut: Path, corpus: Path) -> None:
    with naming.lock(cut):
        before = sorted(cut.rglob("*"))
        with pytest.raises(CheckpointError, match=r"run is being written by another run; wait for its end, or choose"):
            go_on(corpus, cut)
        assert sorted(cut.rglob("*")) == before
    go_on(corpus, cut)


# ---- slow storage ----------------------------------------------------------------------------------------------------


def _slow_by(seconds: float, monkeypatch: pytest.MonkeyPatch, seen: Path) -> None:
    """Writing takes long; how many saves are under way is noted when each begins and ends."""
    write = saver.write_chunks

    def write_slowly(directory: Path, files: Any, chunks: Any) -> Any:
        under_way = len(list(directory.parent.glob(".*.tmp")))
        with open(seen, "a") as file:
            file.write(f"{under_way}\n")
        time.sleep(seconds)
        return write(directory, files, chunks)

    monkeypatch.setattr(saver, "write_chunks", write_slowly)


def test_saves_wait_for_one_another_and_training_does_not_wait_for_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "run", tmp_path / "seen"
    _slow_by(1.0, monkeypatch, seen)
    go_on(corpus, output, train={"steps": 4}, checkpoint={"every": 2, "asynchronous": True})
    saves = [json.loads(line) for line in (output / "checkpoints/saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves] == [2, 4]
    assert saves[0]["written_s"] > 1.0 > saves[0]["paused_s"], "two steps were done meanwhile"
    assert saves[1]["waited_s"] > 0.3, "the second waited for the first"
    assert set(seen.read_text().split()) == {"1"}, "never two at once"
    assert [first_damage(output / "checkpoints" / name_of(step)) for step in (2, 4)] == [None, None]


# ---- what stays and what is refused ----------------------------------------------------------------------------------


def test_keep_counts_but_spares_what_the_run_went_on_from(cut: Path, corpus: Path) -> None:
    go_on(corpus, cut, checkpoint={"every": 1, "keep": 2})
    names = {path.name for path in naming.checkpoints_in(cut / "checkpoints")}
    assert names == {name_of(10), name_of(9), NEWEST}


def test_never_starts_anew_and_loses_nothing(cut: Path, corpus: Path, uncut: list[float]) -> None:
    said = go_on(corpus, cut, checkpoint={"resume": "never"})
    assert "moved checkpoints that this run does not continue to" in said
    assert losses(cut) == uncut
    assert {path.name for path in (cut / "checkpoints.1").iterdir()} == {NEWEST, BEFORE}
    assert (cut / "metrics.1.jsonl").is_file()


def test_an_earlier_checkpoint_can_be_named(cut: Path, corpus: Path, uncut: list[float]) -> None:
    said = go_on(corpus, cut, checkpoint={"resume": str(cut / "checkpoints" / BEFORE)})
    assert "resuming from step 3, checkpoint" in said and (cut / "checkpoints.1" / NEWEST).is_dir()
    assert losses(cut) == uncut


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"steps": 5}}, r"^train.steps=5 is less than the 6 steps that .* has; nearest: 6$"),
        ({"train": {"seed": 7}}, r"^train.seed=7 is not what .* was trained on: 1234; change it back, or set data.res"),
        ({"data": {"seq_length": 16}}, r"^data.seq_length=16 is not what .* was trained on: 32"),
        ({"data": {"shuffle": False}}, r"^data.shuffle=false is not what .* was trained on: true"),
        ({"data": {"train": ["valid.txt"]}}, r"^data.train=\S.* is not what .* was trained on: \S"),
        (
            {"model": {"config": {"hidden_size": 64}}},
            r"has a different model: hidden_size=32, the run has 64; choose",
        ),
    ],
)
def test_another_run_is_refused(
    sections: dict[str, Any], says: str, cut: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    if "model" in sections:
        from tests.training.tiny import MODEL

        sections = {"model": {"config": {**MODEL, **sections["model"]["config"]}}}
    before = sorted(cut.rglob("*"))
    with pytest.raises(CheckpointError, match=says):
        go_on(corpus, cut, **sections)
    assert sorted(cut.rglob("*")) == before


def test_a_run_does_not_move_what_it_reads(cut: Path, corpus: Path) -> None:
    before = sorted(cut.rglob("*"))
    model = {"config": None, "path": str(cut), "init": "pretrained"}
    with pytest.raises(
        CheckpointError, match=r"^model.path=.* is one of the checkpoints under output=.* choose another"
    ):
        go_on(corpus, cut, checkpoint={"resume": "never"}, model=model)
    with pytest.raises(
        ConfigError, match=r"^export.path=.* is inside the run's checkpoint directory; choose another, such as"
    ):
        go_on(corpus, cut, export={"path": str(cut / "checkpoints" / NEWEST)})
    assert sorted(cut.rglob("*")) == before


def test_a_link_to_a_checkpoint_is_that_checkpoint(cut: Path, corpus: Path, uncut: list[float]) -> None:
    link = cut.parent / "best"
    link.symlink_to(cut / "checkpoints" / BEFORE)
    go_on(corpus, cut, checkpoint={"resume": str(link)})
    assert losses(cut) == uncut and (cut / "checkpoints" / BEFORE).is_dir()


def test_restart_takes_the_new_data_from_their_beginning(cut: Path, corpus: Path, uncut: list[float]) -> None:
    said = go_on(corpus, cut, train={"seed": 7}, data={"restart": True})
    assert "data.restart=true: data position reset" in said
    found = losses(cut)
    assert found[:6] == uncut[:6] and found[6:] != uncut[6:]
    progress = json.loads((cut / "checkpoints" / name_of(STEPS) / "training_state/progress.json").read_text())
    assert progress["progress"]["data"]["samples"] == 4 * 8


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (1, {"train": {"micro_batch_size": 8}}),
        (4, {"parallel": {"tensor": 2, "sequence": True}, "deepspeed": {"zero_optimization": {"stage": 3}}}),
        (2, {"parallel": {"pipeline": 2}}),
    ],
    ids=["fewer", "more-tp-z3", "pp"],
)
def test_a_run_goes_on_with_other_ranks(
    ranks: int, sections: dict[str, Any], cut: Path, corpus: Path, uncut: list[float]
) -> None:
    go_on(corpus, cut, ranks, **sections)
    assert losses(cut)[6:] == pytest.approx(uncut[6:], rel=2e-5)


def test_the_batch_may_change_without_losing_the_place(cut: Path, corpus: Path) -> None:
    go_on(corpus, cut, train={"global_batch_size": 16})
    progress = json.loads((cut / "checkpoints" / name_of(STEPS) / "training_state/progress.json").read_text())
    assert progress["progress"]["data"]["samples"] == 6 * 8 + 4 * 16
