"""The Kubernetes manifest: as JobSet's published schema wants it, and its numbers and names fit each other.

No cluster runs it here. `jobset_schema.json` names the version that it was reduced from.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_ds.config import load_run
from megatron_ds.training.supervisor import JOB

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
VOLUME, JOBSET = yaml.safe_load_all((ROOT / "examples/multi_node/kubernetes.yaml").read_text())
JOB_SPEC = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB_SPEC["template"]["spec"]
(CONTAINER,) = POD["containers"]


def problems(jobset: dict[str, Any]) -> list[str]:
    return [problem.message for problem in jsonschema.Draft202012Validator(SCHEMA).iter_errors(jobset)]


def test_the_jobset_is_as_published() -> None:
    assert problems(JOBSET) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.update(failurePolicies=spec.pop("failurePolicy")),
        lambda spec: spec["failurePolicy"].update(maxRestarts="20"),
        lambda spec: spec["replicatedJobs"][0].pop("name"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].update(
            args="x"
        ),
        lambda spec: spec["network"].update(enableDnsHostnames=True),
    ],
)
def test_a_mistake_in_it_would_be_seen(damage: Callable[[dict[str, Any]], Any]) -> None:
    wrong = copy.deepcopy(JOBSET)
    damage(wrong["spec"])
    assert problems(wrong)


def test_its_parts_fit_each_other() -> None:
    name, node = JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"][0]["name"]
    launcher = get_args_parser().parse_args(CONTAINER["command"][1:])
    assert JOB_SPEC["parallelism"] == JOB_SPEC["completions"] == int(launcher.nnodes)
    assert int(launcher.nproc_per_node) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    port = CONTAINER["ports"][0]["containerPort"]
    assert launcher.rdzv_endpoint == f"{name}-{node}-0-0.{name}:{port}" and launcher.rdzv_backend == "c10d"
    assert JOB in [variable["name"] for variable in CONTAINER["env"]] and launcher.rdzv_id == f"$({JOB})"
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in POD["volumes"] if "emptyDir" not in volume]
    assert claims == [VOLUME["metadata"]["name"]] and VOLUME["spec"]["accessModes"] == ["ReadWriteMany"]
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in POD["volumes"]} and mounted["memory"] == "/dev/shm"


def test_its_command_is_one_of_this_package() -> None:
    launcher = get_args_parser().parse_args(CONTAINER["command"][1:])
    assert launcher.module and launcher.training_script == "megatron_ds"
    command, run_file, *overrides = launcher.training_script_args
    run = load_run(ROOT / "examples/parallel_3d/run.yaml", overrides)
    assert command == "train" and run_file.startswith("/shared/") and run.output == "/shared/out"
    assert run.checkpoint.every > 0 < launcher.max_restarts
