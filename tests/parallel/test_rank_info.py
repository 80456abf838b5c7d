"""Which rank am I: torchrun's words, srun's words, and words that make no sense."""

import pytest

from megatron_ds.errors import TopologyError
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo, RankSource, rank_from_environment, rank_source

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "host",
}


def test_alone() -> None:
    assert rank_from_environment({}) is None


def test_torchrun() -> None:
    assert rank_from_environment(dict(TORCHRUN)) == RankInfo(5, 8, 1)


def test_a_rank_of_run_local_needs_no_master() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", RENDEZVOUS_FILE: "/tmp/x"}
    assert rank_from_environment(environ) == RankInfo(0, 1, 0)


def test_srun_gets_a_port_that_all_tasks_agree_on() -> None:
    environ = dict(SRUN)
    assert rank_from_environment(environ) == RankInfo(3, 4, 1)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("host", str(20000 + 123456 % 10000))


def test_torchrun_under_srun_is_torchrun() -> None:
    assert rank_from_environment({**SRUN, **TORCHRUN}) == RankInfo(5, 8, 1)


@pytest.mark.parametrize("changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}])
def test_an_interactive_step_and_a_batch_script_are_alone(changes: dict[str, str | None]) -> None:
    environ = {name: value for name, value in {**SRUN, **changes}.items() if value is not None}
    assert rank_from_environment(environ) is None


def test_srun_without_scontrol_asks_for_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    environ = {**SRUN, "SLURM_JOB_NODELIST": "node[1-2]"}
    del environ["MASTER_ADDR"]
    with pytest.raises(TopologyError, match=r"MASTER_ADDR is not set.*node\[1-2\].*export MASTER_ADDR=HOST"):
        rank_from_environment(environ)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(missing: str) -> None:
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(TopologyError, match=f"but not {missing}; start with torchrun") as caught:
        rank_from_environment(environ)
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name != missing]
    assert all(f"{name}={environ[name]}" in str(caught.value) for name in given)
    assert str(caught.value).endswith(f"to start alone, unset {' '.join(given)}")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_single_variable_that_a_shell_has_kept(name: str) -> None:
    with pytest.raises(TopologyError, match=rf"sets {name}=1 but not .*; to start alone, unset {name}$"):
        rank_from_environment({name: "1"})


def test_the_variables_that_make_a_process_a_rank() -> None:
    assert rank_source(TORCHRUN) == RankSource(("RANK=5", "WORLD_SIZE=8"), ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    assert rank_source(SRUN) == RankSource(("SLURM_PROCID=3", "SLURM_STEP_NUM_TASKS=4"), ("SLURM_STEP_ID",), "srun")
    for environ in (TORCHRUN, SRUN):
        unset = rank_source(environ).unset
        assert rank_from_environment({name: value for name, value in environ.items() if name not in unset}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "8"}, r"RANK=8 in the environment is not below WORLD_SIZE=8; nearest: 7"),
        ({"RANK": "one"}, r"RANK=one in the environment is not an integer of at least 0"),
        ({"WORLD_SIZE": "-1"}, r"WORLD_SIZE=-1 in the environment is not an integer of at least 0"),
        (
            {"WORLD_SIZE": ""},
            r"WORLD_SIZE= in the environment is not an integer of at least 0; .*unset RANK WORLD_SIZE",
        ),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"WORLD_SIZE=0 in the environment is not at least 1; nearest: 1"),
        ({"WORLD_SIZE": "99999999"}, r"WORLD_SIZE=99999999 in the environment is more than 1000000 ranks"),
        ({"WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE=9* in the environment is not an integer"),
        ({"LOCAL_RANK": "x"}, r"LOCAL_RANK=x in the environment is not an integer of at least 0"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT=http in the environment is not a port, an integer from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, r"MASTER_PORT=65536 in the environment is not a port"),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT=0 in the environment is not a port"),
        ({"MASTER_ADDR": " "}, r"MASTER_ADDR=  in the environment is empty; set it to the name of rank 0's machine"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        rank_from_environment({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("environ", "by"),
    [
        (TORCHRUN, "given by RANK=5, "),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "a", "SLURM_PROCID": "1"}, "given by torchrun: RANK=5, "),
        ({**TORCHRUN, "CROSS_RANK": "5"}, "given by deepspeed: RANK=5, "),
        ({**TORCHRUN, "SLURM_PROCID": "1"}, "given by RANK=5, "),
        (SRUN, "given by srun: SLURM_PROCID=3, "),
    ],
)
def test_the_launcher_that_gave_the_rank_is_named(environ: dict[str, str], by: str) -> None:
    assert rank_source(environ).describe().startswith(by)
