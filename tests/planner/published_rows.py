"""Rows of published training runs: which can be compared, their seconds, and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_ds.parallel.grid import Layout
from tests.planner.published_model import Sizes
from tests.planner.published_systems import Setting

ROWS = Path(__file__).with_name("published-runs.yaml")
Row = Mapping[str, Any]

DEVICES: tuple[tuple[str, str], ...] = (
    ("a100-40gb", "a100-40"),
    ("a100", "a100-80"),
    ("h100-96gb", "h100-96"),
    ("h100-80gb-pcie", "h100-pcie"),
    ("h100-nvl", "h100-nvl"),
    ("h100-sxm", "h100"),
    ("v100", "v100-32"),
    *((name, name) for name in ("h100", "h200", "h800", "gh200", "gb200", "gb300", "b200", "b300")),
    *((name, name) for name in ("mi300x", "l40s", "l4", "a10")),
)
"""Beginning of a row's device in small letters -> profile; the first that fits."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return list(yaml.safe_load(path.read_text())["runs"])


def why_left_out(row: Row, *, timed: bool = True) -> str | None:
    """Return why a row cannot be compared, or None; `timed`: it needs seconds or tokens per second."""
    model, note = row["model"], str(row.get("note"))
    if timed and published_s(row) is None:
        return "no iteration time or tokens/s, or they are not certain"
    if "mla" in model:
        return "latent attention, which this package's layers do not have"
    if profile_of(row) is None:
        return f"no profile of {row['device']}"
    if row["tp"] is None or row["pp"] is None:
        return "its layout is not published"
    if not row["global_batch"]:
        return "its batch is not published"
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


def derived_s(row: Row) -> float | None:
    """Return the seconds of a step that follow from a row's printed FLOP/s, for information; None if it has none.

    The FLOPs are counted as the row's source counts them.
    """
    measured, sizes = row["measured"], Sizes.of(row["model"])
    share = measured.get("mfu_pct") or measured.get("hfu_pct")
    speed = measured.get("tflops_gpu") or (share and share / 100 * row["peak_tflops"])
    if not speed or not row["global_batch"] or "mla" in row["model"]:
        return None
    return float(row["global_batch"] * sizes.seq * flops_per_token(row) / (speed * 1e12 * row["gpus"]))


def flops_per_token(row: Row) -> float:
    """Return the FLOPs of a token as a row's source counts them."""
    sizes, counted = Sizes.of(row["model"]), row["flops_convention"]
    chosen = sizes.expert_params * sizes.moe[1] / sizes.moe[0] + sizes.shared_params if sizes.moe else sizes.mlp_params
    scores = {"full": 1.0, "half": 0.5, "none": 0.0}[counted["attn"]] * 4 * sizes.seq * sizes.head_dim * sizes.heads
    mlps = sizes.dense * sizes.mlp_params + (sizes.layers - sizes.dense) * chosen
    body = sizes.layers * (2 * sizes.attention_params + scores) + 2 * mlps
    head = 2 * sizes.embedding_params * counted["logits"]
    again = {"none": 0.0, "selective": sizes.layers * scores, "full": body}[counted["recompute"]]
    return 3 * (body + head) + again


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
    if str(given).startswith("selective(op"):  # torchtitan: every other product
        return "half"
    return next((kind for kind in ("full", "selective") if str(given).startswith(kind)), "none")
