"""The systems of published runs, and what is assumed where a row does not say.

All runs of a system share its settings, which its papers, recipes and documentation describe.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ds.planner.systems import System


@dataclass(frozen=True)
class Setting:
    """A system, and what its runs usually have.

    Attributes:
        system: of the runs.
        network: of the machines, see `find_network`; None = what such devices usually have.
        sequence, recompute, chunks: where a row does not say.
        micro_batches: micro-batches of a step as a multiple of the stages, where a row names no size; None = rows of one.
        drops_out: the model has dropout.
        experts_in_tensor: where a row has no expert ranks.
    """

    system: System
    network: str | None = None
    sequence: bool = False
    recompute: str = "none"
    chunks: int = 1
    micro_batches: int | None = None
    drops_out: bool = False


MEGATRON_2021 = Setting(
    System("megatron-2021", attention="unfused", fuses_gradients=False, gradient_bytes=2, hides_tensor="none"),
    recompute="full",
    drops_out=True,
)
MEGATRON_2022 = Setting(
    System("megatron-2022", attention="unfused"), sequence=True, recompute="selective", drops_out=True
)
MEGATRON_2023 = Setting(
    replace(MEGATRON_2022.system, name="megatron-2023", state="distributed"),
    sequence=True,
    recompute="selective",
    drops_out=True,
)
MEGATRON_DEEPSPEED = Setting(
    replace(
        MEGATRON_2021.system,
        name="megatron-deepspeed",
        gradient_bytes=4,
        schedule="deepspeed",
        splits_messages=False,
    ),
    recompute="full",
    drops_out=True,
)
BIGSCIENCE = replace(
    MEGATRON_DEEPSPEED,
    system=replace(MEGATRON_DEEPSPEED.system, name="bigscience megatron-deepspeed", gradient_bytes=2, state="zero1"),
    network="omnipath 4x100Gb/s",
    drops_out=False,
)
MEGATRON_BRIDGE = Setting(
    System("megatron-bridge", hides_tensor="chunks", hides_messages=True, state="distributed", hides_state=True),
    sequence=True,
)
FSDP = Setting(
    System("fsdp", attention="flash2", fuses_gradients=False, gradient_bytes=2, hides_tensor="backward", state="sharded")
)
LLM_FOUNDRY = replace(FSDP, system=replace(FSDP.system, name="llm-foundry"))
TORCHTITAN = Setting(
    replace(FSDP.system, name="torchtitan", gradient_bytes=4, hides_tensor="none"),
    sequence=True,
    chunks=2,
    micro_batches=1,
)
MAXTEXT = replace(FSDP, system=replace(FSDP.system, name="maxtext", attention="newest"))

BY_SOURCE: tuple[tuple[str, Setting], ...] = (
    ("2104.04473", MEGATRON_2021),
    ("2205.05198", MEGATRON_2022),
    ("2201.11990", MEGATRON_DEEPSPEED),
    ("bigscience", BIGSCIENCE),
    ("llm-foundry", LLM_FOUNDRY),
    ("torchtitan", TORCHTITAN),
    ("maxtext", MAXTEXT),
    ("2402.15627", MEGATRON_2023),
    ("nvidia", MEGATRON_BRIDGE),
)
"""Part of a source in small letters -> its system; the first that fits."""


def setting_of(row: dict[str, Any]) -> Setting:
    """Return the setting of a row by its source, or else by how it divides state and by its device."""
    source = row["source"].lower()
    found = next((setting for part, setting in BY_SOURCE if part in source), None)
    if found is None and "fsdp" in str(row.get("optimizer_sharding")):
        found = FSDP
    if found is None:
        found = MEGATRON_2023 if row["device"].startswith("A100") else MEGATRON_BRIDGE
    if _is_fp8(row["precision"]):
        found = replace(found, system=replace(found.system, fp8=True))
    if "fp32 grad" in row["precision"]:
        found = replace(found, system=replace(found.system, gradient_bytes=4))
    return found


def _is_fp8(precision: str) -> bool:
    return precision.startswith(("fp8", "mxfp8"))
