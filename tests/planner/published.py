"""Published training runs as the planner predicts them: `python -m tests.planner.published FILE.yaml`.

Every row of a file in the format of `published-runs.yaml` is predicted from its model's sizes, its layout, its device and
the settings of its system. Only iteration seconds and tokens per second are compared, never printed TFLOP/s.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import yaml

sys.path.insert(0, "/tmp/h/steptime-notes")
import standin
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.operations import Collective, LayerTrace, Message, Work
from megatron_ds.planner.pass_time import Machine
from megatron_ds.planner.placement import Placement, place
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.step_time import StageWork, StepTime, StepWork, time_step
from megatron_ds.planner.systems import System, apply, attention_speed, gathered, gradient_work, update_work
from tests.planner.published_systems import Setting, setting_of

ROWS = Path(__file__).with_name("published-runs.yaml")
Row = dict[str, Any]
DEVICES = {
    "A100-40GB": "a100-40",
    "A100": "a100-80",
    "H100-96GB-HBM2e-500W": "h100-96",
    "H100": "h100",
    "H200": "h200",
    "H800": "h800",
    "GB200": "gb200",
    "GB300": "gb300",
    "B200": "b200",
    "B300": "b300",
    "GH200": "gh200",
    "MI300X": "mi300x",
    "L40S": "l40s",
}


@dataclass(frozen=True)
class Prediction:
    """A row, predicted.

    Attributes:
        row: of the file.
        time: its step.
        published_s: seconds of a step as published, by iteration time or tokens per second.
    """

    row: Row
    time: StepTime
    published_s: float | None

    @property
    def error(self) -> float:
        """Relative error of the predicted seconds."""
        assert self.published_s is not None
        return self.time.total_s / self.published_s - 1


def why_left_out(row: Row) -> str | None:
    """Return why a row cannot be compared, or None."""
    certain, measured, model = row.get("certain", {}), row["measured"], row["model"]
    times = [name for name in ("iter_s", "tok_s_gpu") if measured.get(name) is not None]
    if not times:
        return "no iteration time and no tokens/s"
    if all(certain.get(f"measured.{name}") == "no" for name in times):
        return "its time is not certain"
    if "mla" in model:
        return "latent attention, which this package's layers do not have"
    if not any(row["device"].startswith(name) for name in DEVICES):
        return f"no profile of {row['device']}"
    if row["tp"] is None or row["pp"] is None:
        return "layout not published"
    if "sliding" in str(row.get("note")) or "parallel block" in str(row.get("note")):
        return "another model than its sizes describe"
    return None


def published_s(row: Row) -> float | None:
    """Return the published seconds of a step."""
    measured = row["measured"]
    if measured.get("iter_s"):
        return float(measured["iter_s"])
    if measured.get("tok_s_gpu"):
        return float(row["global_batch"] * row["model"]["seq"] / measured["tok_s_gpu"] / row["gpus"])
    return None


def predict(row: Row) -> Prediction:
    """Return the planner's prediction of a row."""
    setting, model = setting_of(row), row["model"]
    system, layout = setting.system, layout_of(row)
    if layout.pipeline > 1 and system.state == "sharded":
        system = replace(system, state="distributed", hides_state=True)
    device = find_device(next(name for part, name in DEVICES.items() if row["device"].startswith(part)))
    per_node = min(8, row["gpus"])
    expert = row.get("ep") or 1
    if expert == 1:
        expert = layout.tensor
    placements = place(layout, per_node, expert)
    network = find_network(setting.network, device, per_node)
    p = layout.pipeline
    placements = {**placements, "tied": Placement(2, 2, 1)}
    machine = Machine(device, network, placements, attention_speed(system, device))
    micro_batch = micro_batch_of(row, setting, layout)
    num_micro_batches = row["global_batch"] // (layout.data * micro_batch)
    sequence = row["sequence_parallel"] if row["sequence_parallel"] is not None else setting.sequence
    recompute = recompute_of(row, setting)
    chunks = row["vp"] or (setting.chunks if p > 1 else 1)
    emb, block, head, num_block, num_ends = standin.traces(
        model, b=micro_batch, t=layout.tensor, c=layout.context, sp=sequence and layout.tensor > 1, e=row.get("ep"),
        dropout=setting.drops_out,
    )
    experts = 0
    if "experts" in model:
        experts = model["experts"] // expert * (3 if model["glu"] else 2) * model["hidden"] * model["moe_ffn"]
    shard = layout.data * layout.context
    of_block = {"shard": (num_block - experts, shard)}
    if experts:
        of_block["expert_shard"] = (experts, shard * layout.tensor // expert)
    of_ends = {"shard": (num_ends, shard)}
    block = gathered(system, apply(system, block, recompute), of_block)
    emb, head = (gathered(system, apply(system, one), of_ends) for one in (emb, head))
    counts = blocks_of_stages(model["layers"], p * chunks)
    stages = []
    message = block.output_bytes
    whole_message = message * (layout.tensor if sequence and layout.tensor > 1 else 1)
    for index, count in enumerate(counts):
        layers = [block] * count
        num = num_block * count
        if index == 0:
            layers = [emb, *layers]
            num += num_ends
        if index == len(counts) - 1:
            layers = [*layers, head]
            num += num_ends
        stages.append(StageWork(layers, gradient_work(system, num), sends(system, message, layout, sequence)))
    sent, updates = [], []
    for rank in range(p):
        number = sum(counts[rank::p])
        weights = {axis: (num * number, ranks) for axis, (num, ranks) in of_block.items()}
        ends = num_ends * ((rank == 0) + (rank == p - 1))
        weights["shard"] = (weights["shard"][0] + ends, shard)
        one, two = update_work(system, weights)
        if p > 1 and not model["glu"] and rank in (0, p - 1):
            one[Collective("all_reduce", "tied", num_ends * system.gradient_bytes, 2)] += 1
        sent.append(one)
        updates.append(two)
    interleaved = chunks > 1
    step = StepWork(
        stages, p, num_micro_batches, "interleaved" if interleaved else system.schedule,
        not (interleaved and system.hides_messages), sent, updates,
        row["global_batch"] * model["seq"], 0.0, row["gpus"], ceil(row["gpus"] / per_node),
    )
    return Prediction(row, time_step(step, machine), published_s(row))


def sends(system: System, num_bytes: int, layout: Layout, sequence: bool) -> Work:
    """Return the message of a boundary: with sequence parallelism a rank's part, else all, or a part to gather."""
    if sequence and layout.tensor > 1 or layout.tensor == 1 or not system.splits_messages:
        return Work({Message("pipeline", num_bytes): 1})
    gather = Collective("all_gather", "tensor", num_bytes, layout.tensor)
    return Work({Message("pipeline", num_bytes // layout.tensor): 1, gather: 1})


def layout_of(row: Row) -> Layout:
    """Return the layout of a row; data ranks that it does not name are the rest."""
    tensor, pipeline, context = row["tp"], row["pp"], row["cp"] or 1
    data = row["dp"] or row["gpus"] // (tensor * pipeline * context)
    return Layout(tensor=tensor, pipeline=pipeline, context=context, data=data)


def micro_batch_of(row: Row, setting: Setting, layout: Layout) -> int:
    """Return the rows of a micro-batch."""
    if row["micro_batch"]:
        return int(row["micro_batch"])
    if setting.micro_batches is None:
        return 1
    return max(1, row["global_batch"] // (layout.data * setting.micro_batches * layout.pipeline))


def recompute_of(row: Row, setting: Setting) -> str:
    """Return what a row recomputes."""
    given = row["recompute"]
    if given is None:
        return setting.recompute
    return "half" if given.startswith("selective(op)") else given


def blocks_of_stages(num_blocks: int, num_stages: int) -> list[int]:
    """Return the number of blocks of each virtual stage.

    Embedding and head take the place of a block each if only then all stages have equally many. Else all have as many
    as the largest needs, and the last ones what is left.
    """
    if num_blocks % num_stages and (num_blocks + 2) % num_stages == 0:
        each = (num_blocks + 2) // num_stages
        return [each - (index in (0, num_stages - 1)) for index in range(num_stages)]
    each = ceil(num_blocks / num_stages)
    return [max(0, min(each, num_blocks - index * each)) for index in range(num_stages)]


def main(path: str) -> None:
    """Print the table of a file."""
    rows = yaml.safe_load(Path(path).read_text())["runs"]
    found = []
    for row in rows:
        why = why_left_out(row)
        if why:
            continue
        one = predict(row)
        found.append(one)
        t = one.time
        print(f"{row['id']:40s} {t.total_s:8.2f} {one.published_s:8.2f} {100 * one.error:+6.1f}%  comp={t.compute_s:.2f} "
              f"rec={t.recompute_s:.2f} bub={t.bubble_s:.2f} opt={t.optimizer_s:.3f} strag={t.straggling_s:.2f} "
              + " ".join(f"{k}={v:.2f}" for k, v in t.exposed_s.items() if v))
    errors = sorted(abs(one.error) for one in found)
    groups = {}
    for one in found:
        groups.setdefault(one.row["id"].split("-")[0], []).append(one.error)
    for name, each in groups.items():
        print(f"{name:20s} {len(each):3d} median {100 * median(map(abs, each)):5.1f}% mean {100 * sum(each) / len(each):+5.1f}%")
    print(f"{len(found)} rows, median {100 * median(errors):.1f}%, within 15%: {sum(e <= 0.15 for e in errors)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(ROWS))
