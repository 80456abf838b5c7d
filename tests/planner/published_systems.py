"""The systems of published runs, and what is assumed where a row does not say.

All runs of a system share its settings, which its papers, recipes and documentation describe. No setting is of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ds.planner.timing.systems import System


@dataclass(frozen=True)
class Setting:
    """A system, and what its runs usually have.

    Attributes:
        system: of the runs.
        network: of the machines, see `find_network`; None = what such devices usually have.
        sequence, recompute, chunks: where a row does not say.
        fused: norms and gated activations are single kernels.
        fills_stages: where a row names no micro-batch, there is one for each pipeline stage; else it has one row.
    """

    system: System
    network: str | None = None
    sequence: bool = False
    recompute: str = "none"
    chunks: int = 1
    fused: bool = True
    fills_stages: bool = False


MEGATRON_2021 = Setting(
    System(
        "megatron-2021",
        attention="unfused",
        drops_scores=True,
        fuses_gradients=False,
        gradient_bytes=2,
        hides_tensor="none",
    ),
    recompute="full",
)
"""Narayanan et al. 2021: scores in memory, fp16 gradients, communication that nothing hides."""

MEGATRON_2022 = Setting(
    System("megatron-2022", attention="unfused", drops_scores=True), sequence=True, recompute="selective"
)
"""Korthikanti et al. 2022: gradients are summed in fp32 by products, behind which a layer's reduction hides."""

MEGATRON_2023 = replace(MEGATRON_2022, system=replace(MEGATRON_2022.system, name="megatron-2023", state="distributed"))
"""The baseline of MegaScale (Jiang et al. 2024), which has added FlashAttention-2 to it: a distributed optimizer."""

MEGATRON_DEEPSPEED = Setting(
    replace(
        MEGATRON_2021.system, name="megatron-deepspeed", gradient_bytes=4, schedule="deepspeed", splits_messages=False
    ),
    recompute="full",
)
"""Smith et al. 2022 (MT-NLG): Megatron's layers of 2021 in DeepSpeed's pipeline."""

BIGSCIENCE = Setting(
    replace(
        MEGATRON_DEEPSPEED.system,
        name="bigscience megatron-deepspeed",
        drops_scores=False,
        gradient_bytes=2,
        state="zero1",
    ),
    network="omnipath 4x100Gb/s",
    recompute="full",
)
"""BigScience on Jean Zay: the same with ZeRO-1 and without dropout, on nodes of eight devices and four cards."""

MEGATRON_BRIDGE = Setting(
    System(
        "megatron-bridge",
        gradient_bytes=2,
        hides_tensor="chunks",
        hides_messages=True,
        state="distributed",
        hides_state=True,
    ),
    sequence=True,
)
"""Megatron-LM, NeMo and Megatron-Bridge since 2024: Transformer Engine, overlap of all axes.

Their recipes for performance reduce gradients in bf16 (`grad_sync_dtype`, `grad_reduce_in_fp32`).
"""

FSDP = Setting(
    System("fsdp", attention="flash2", fuses_gradients=False, gradient_bytes=2, state="sharded"), fused=False
)
"""torch's FSDP without a compiler, with gradients reduced in bf16."""

LLM_FOUNDRY = replace(FSDP, system=replace(FSDP.system, name="llm-foundry", attention="flash1"))
"""LLM Foundry with torch 1.13 and 2.0, of the time of FlashAttention-1."""

TORCHTITAN = Setting(
    replace(FSDP.system, name="torchtitan", gradient_bytes=4, hides_tensor="none"),
    sequence=True,
    chunks=2,
    fills_stages=True,
)
"""FSDP2 with gradients reduced in fp32; its looped schedules have two stages a rank by default."""

MAXTEXT = replace(FSDP, fused=True, system=replace(FSDP.system, name="maxtext", attention="newest"))
"""JAX with sharded weights, and cuDNN's attention."""

BY_SOURCE: tuple[tuple[str, Setting], ...] = (
    ("2104.04473", MEGATRON_2021),
    ("2205.05198", MEGATRON_2022),
    ("2201.11990", MEGATRON_DEEPSPEED),
    ("bigscience", BIGSCIENCE),
    ("foundry", LLM_FOUNDRY),
    ("torchtitan", TORCHTITAN),
    ("maxtext", MAXTEXT),
    ("2402.15627", MEGATRON_2023),
    ("nvidia", MEGATRON_BRIDGE),
)
"""Part of a source in small letters -> its system; the first that fits."""


def setting_of(row: Mapping[str, Any]) -> Setting:
    """Return the setting of a row, by its source, or else by how it divides state and by its device."""
    source = str(row["source"]).lower()
    sharding, precision = str(row.get("optimizer_sharding")).lower(), str(row["precision"]).lower()
    found = next((setting for part, setting in BY_SOURCE if part in source), None)
    if found is None and ("fsdp" in sharding or "zero3" in sharding):
        found = FSDP
    if found is None:
        found = MEGATRON_2023 if str(row["device"]).startswith(("A100", "V100")) else MEGATRON_BRIDGE
    system = found.system
    if "fsdp" in sharding and system.state != "sharded":
        system = replace(system, state="sharded")
    if precision.startswith(("fp8", "mxfp8")):
        system = replace(system, fp8=True)
    if "fp32 grad" in precision:
        system = replace(system, gradient_bytes=4)
    if system.state == "sharded" and (row["pp"] or 1) > 1:
        system = replace(system, state="distributed", hides_state=True)
    return replace(found, system=system)
