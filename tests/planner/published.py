"""Published training runs as the planner predicts them: `python -m tests.planner.published FILE.yaml`.

Every row of a file in the format of `published-runs.yaml` is predicted from its model's sizes, its layout, its device and
the settings of its system. Only iteration seconds and tokens per second are compared, never printed TFLOP/s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.operations import Collective, LayerTrace, Message, Work
from megatron_ds.planner.pass_time import Machine
from megatron_ds.planner.placement import Placement, place
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.step_time import StepTime, time_step
from megatron_ds.planner.step_work import EndWork, StageWork, StepWork
from megatron_ds.planner.systems import System, apply, attention_speed, gathered, gradient_work, update_work
from tests.planner.published_model import Sizes, trace
from tests.planner.published_systems import Setting, setting_of

ROWS = Path(__file__).with_name("published-runs.yaml")
Row = Mapping[str, Any]
Weights = dict[str, tuple[int, int]]
"""Axis -> number of elements of a rank that it divides or copies, and its ranks."""

DEVICES: tuple[tuple[str, str], ...] = (
    ("a100-40gb", "a100-40"),
    ("a100", "a100-80"),
    ("h100-96gb", "h100-96"),
    ("h100-80gb-pcie", "h100-pcie"),
    ("h100-nvl", "h100-nvl"),
    *((name, name) for name in ("h100", "h200", "h800", "gh200", "gb200", "gb300", "b200", "b300", "mi300x", "l40s")),
)
"""Beginning of a row's device in small letters -> profile; the first that fits."""
DEVICES_OF_NODE = 8


@dataclass(frozen=True)
class Prediction:
    """A row, predicted.

    Attributes:
        row: of the file.
        system: name of its system.
        time: its step.
        published_s: seconds of a step as published, by iteration time or by tokens per second.
    """

    row: Row
    system: str
    time: StepTime
    published_s: float

    @property
    def error(self) -> float:
        """Relative error of the predicted seconds."""
        return self.time.total_s / self.published_s - 1


def why_left_out(row: Row) -> str | None:
    """Return why a row cannot be compared, or None."""
    model, note = row["model"], str(row.get("note"))
    if published_s(row) is None:
        return "no iteration time or tokens/s, or they are not certain"
    if "mla" in model:
        return "latent attention, which this package's layers do not have"
    if profile_of(row) is None:
        return f"no profile of {row['device']}"
    if row["tp"] is None or row["pp"] is None:
        return "its layout is not published"
    if "parallel block" in note or "sliding" in note:
        return "a model with other layers than its sizes describe"
    if str(row["precision"]).startswith(("nvfp4", "fp4", "mxfp4")):
        return "products in 4 bits"
    return None


def profile_of(row: Row) -> str | None:
    """Return the name of the profile of a row's device."""
    device = str(row["device"]).lower()
    return next((profile for beginning, profile in DEVICES if device.startswith(beginning)), None)


def published_s(row: Row) -> float | None:
    """Return the published seconds of a step; None if they are not certain."""
    measured, certain = row["measured"], row.get("certain") or {}
    if measured.get("iter_s") and certain.get("measured.iter_s") != "no":
        return float(measured["iter_s"])
    if measured.get("tok_s_gpu") and certain.get("measured.tok_s_gpu") != "no" and row["global_batch"]:
        return float(row["global_batch"] * row["model"]["seq"] / measured["tok_s_gpu"] / row["gpus"])
    return None


def predict(row: Row) -> StepTime:
    """Return the planner's prediction of a row's step."""
    profile, setting, layout = profile_of(row), setting_of(row), layout_of(row)
    assert profile is not None, row["device"]
    device, per_node = find_device(profile), min(DEVICES_OF_NODE, row["gpus"])
    network = find_network(setting.network, device, per_node)
    stages = place(layout, network.island, expert_ranks(row, layout))["pipeline"]
    placed = place(layout, network.island, expert_ranks(row, layout))
    placed["tied"] = Placement(2, min(2, stages.islands), 2 if stages.islands == 1 else 1)
    machine = Machine(device, network, placed, attention_speed(setting.system, device))
    return time_step(step_of(row, setting, layout), machine)


def step_of(row: Row, setting: Setting, layout: Layout) -> StepWork:
    """Return the work of a row's step."""
    system, sizes = setting.system, Sizes.of(row["model"])
    micro_batch, sequence = micro_batch_of(row, setting, layout), is_sequence(row, setting, layout)
    chunks = row["vp"] or (setting.chunks if layout.pipeline > 1 else 1)
    expert = expert_ranks(row, layout)
    traced = trace(
        sizes,
        micro_batch=micro_batch,
        tensor=layout.tensor,
        sequence=sequence,
        context=layout.context,
        expert=expert,
    )
    weights = [block_weights(sizes, layout, expert, index < sizes.dense) for index in range(sizes.layers)]
    end = {"shard": (sizes.embedding_params // layout.tensor, layout.data * layout.context)}
    again = recompute_of(row, setting)
    kinds = [gathered(system, apply(system, one, again), weights[-index]) for index, one in enumerate(traced.blocks)]
    before, after = ([gathered(system, apply(system, one), {}) for one in some] for some in (traced.before, traced.after))
    counts = blocks_of_stages(sizes.layers, layout.pipeline * chunks)
    stages, held, begin = [], [], 0
    for index, count in enumerate(counts):
        first, last = index == 0, index == len(counts) - 1
        numbers = range(begin, begin + count)
        layers = [kinds[0] if number < sizes.dense else kinds[-1] for number in numbers]
        held.append(total([*(weights[number] for number in numbers), *[end] * (first + last)]))
        ends = [*(before if first else []), *layers, *(after if last else [])]
        sends = Work() if last else message(system, kinds[-1], layout, sequence)
        num_elements = sum(num for num, _ in held[-1].values())
        stages.append(StageWork(ends, gradient_work(system, num_elements), sends))
        begin += count
    tied = sizes.embedding_params // layout.tensor if sizes.tied and layout.pipeline > 1 else 0
    rank_ends = {}
    for rank in range(layout.pipeline):
        sent, update = update_work(system, total(held[rank :: layout.pipeline]))
        if tied and rank in (0, layout.pipeline - 1):
            sent[Collective("all_reduce", "tied", system.gradient_bytes * tied, 2)] += 1
        rank_ends[rank] = EndWork(sent, 1, update)
    interleaved = chunks > 1 and layout.pipeline > 1
    return StepWork(
        stages,
        rank_ends,
        layout.pipeline,
        row["global_batch"] // (layout.data * micro_batch),
        row["global_batch"] * sizes.seq,
        row["gpus"],
        nodes=ceil(row["gpus"] / DEVICES_OF_NODE),
        schedule="interleaved" if interleaved else system.schedule,
        blocks=not (interleaved and system.hides_messages),
    )


def block_weights(sizes: Sizes, layout: Layout, expert: int, is_dense: bool) -> Weights:
    """Return the elements of a block on a rank, by the axis whose ranks hold the same."""
    shards = layout.data * layout.context
    if sizes.moe is None or is_dense:
        return {"shard": ((sizes.attention_params + sizes.mlp_params) // layout.tensor, shards)}
    return {
        "shard": (sizes.attention_params // layout.tensor + sizes.shared_params, shards),
        "expert_shard": (sizes.expert_params // expert, shards * layout.tensor // expert),
    }


def total(each: Iterable[Weights]) -> Weights:
    """Return the sums of elements by axis."""
    found: Weights = {}
    for one in each:
        for axis, (number, ranks) in one.items():
            found[axis] = found.get(axis, (0, ranks))[0] + number, ranks
    return found


def message(system: System, block: LayerTrace, layout: Layout, sequence: bool) -> Work:
    """Return the message of a boundary: with sequence parallelism a rank's part, else all, or a part to gather."""
    num_bytes = block.output_bytes
    if sequence or layout.tensor == 1 or not system.splits_messages:
        return Work({Message("pipeline", num_bytes): 1})
    gather = Collective("all_gather", "tensor", num_bytes, layout.tensor)
    return Work({Message("pipeline", num_bytes // layout.tensor): 1, gather: 1})


def layout_of(row: Row) -> Layout:
    """Return the layout of a row; data ranks that it does not name are the rest."""
    tensor, pipeline, context = row["tp"], row["pp"], row["cp"] or 1
    data = row["dp"] or row["gpus"] // (tensor * pipeline * context)
    return Layout(tensor=tensor, pipeline=pipeline, context=context, data=data)


def expert_ranks(row: Row, layout: Layout) -> int:
    """Return the ranks that divide the experts of a layer: those that a row names, or the tensor ranks."""
    named = row.get("ep") or 1
    return named if named > 1 else layout.tensor


def is_sequence(row: Row, setting: Setting, layout: Layout) -> bool:
    """Return whether a row divides sequences over tensor ranks."""
    given = row["sequence_parallel"]
    return layout.tensor > 1 and bool(setting.sequence if given is None else given)


def micro_batch_of(row: Row, setting: Setting, layout: Layout) -> int:
    """Return the rows of a micro-batch."""
    if row["micro_batch"]:
        return int(row["micro_batch"])
    if not setting.fills_stages:
        return 1
    return max(1, row["global_batch"] // (layout.data * layout.pipeline))


def recompute_of(row: Row, setting: Setting) -> str:
    """Return what a row recomputes, in the words of `systems.apply`."""
    given = row["recompute"]
    if given is None:
        return setting.recompute
    if str(given).startswith("selective("):
        return "half"
    return str(given) if given in ("none", "full", "selective") else "none"


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


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return list(yaml.safe_load(path.read_text())["runs"])


def predictions(rows: Iterable[Row]) -> list[Prediction]:
    """Return predictions of all rows that can be compared."""
    found = []
    for row in rows:
        seconds = published_s(row)
        if seconds is not None and why_left_out(row) is None:
            found.append(Prediction(row, setting_of(row).system.name, predict(row), seconds))
    return found


def summary(found: Sequence[Prediction]) -> str:
    """Return the median of the errors, and how many are at most 15 %."""
    errors = [abs(one.error) for one in found]
    near = sum(error <= 0.15 for error in errors)
    return f"{len(errors)} rows: median error {median(errors):.1%}, {near} of them ({near / len(errors):.0%}) within 15 %"


def table(found: Sequence[Prediction], *, parts: bool = False) -> str:
    """Return a table in Markdown."""
    head = ["run", "predicted s", "published s", "error", *(["parts"] if parts else [])]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: |" + (" --- |" if parts else "")]
    for one in found:
        cells = [one.row["id"], f"{one.time.total_s:.2f}", f"{one.published_s:.2f}", f"{one.error:+.1%}"]
        if parts:
            cells.append(", ".join(f"{name} {value:.2f}" for name, value in one.time.parts.items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(path: Path) -> None:
    """Print predicted and published seconds of a file's rows, and why others are left out."""
    rows = read_rows(path)
    found = predictions(rows)
    print(table(found, parts=True))
    print()
    groups: dict[str, list[Prediction]] = {}
    for one in found:
        groups.setdefault(one.system, []).append(one)
    for name, some in groups.items():
        print(f"{name}: {summary(some)}")
    print(f"all: {summary(found)}")
    left_out = [(row["id"], why) for row in rows if (why := why_left_out(row)) is not None]
    print(f"\n{len(left_out)} rows are left out:")
    for name, why in left_out:
        print(f"- {name}: {why}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
