"""Verify a directory: run the reference, our ranks and the round trip, each in separate processes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from megatron_ds import hub
from megatron_ds.config import (
    ContextMethod,
    ContextNames,
    ContextSection,
    ExpertNames,
    ModelShape,
    ParallelSection,
    check_expert_layout,
    check_layout,
    plan_context,
)
from megatron_ds.config.checks import nearest
from megatron_ds.errors import ConfigError, ConversionError, TopologyError, not_one_of
from megatron_ds.hf.config import read_model, unread_fields
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.weight_files import TensorSource, open_directory
from megatron_ds.hf.weights import HFWeights
from megatron_ds.log import quiet_libraries
from megatron_ds.models.probe import Probe
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import rank_from_environment, rank_source
from megatron_ds.paths import expanded_text
from megatron_ds.verify.compare import Difference, relative_error
from megatron_ds.verify.loss import ReferenceLoss
from megatron_ds.verify.reference import run_reference
from megatron_ds.verify.report import InputReport, Report, RoundTrip
from megatron_ds.verify.rounding import NUM_SAMPLES, measure_rounding

if TYPE_CHECKING:
    from megatron_ds.verify.ours import Findings

Note = Callable[[str], None]


NAMES = ExpertNames("--ep", "--tp", "--cp")
CONTEXT_NAMES = ContextNames(size="--cp", method="--cp-method", tensor="--tp")


def verify_hf(
    hf_dir: str | Path,
    tp: int = 1,
    pp: int = 1,
    *,
    cp: int = 1,
    cp_method: ContextMethod = "auto",
    ep: int | None = None,
    sequence: bool = False,
    note: Note = lambda text: None,
) -> Report:
    """Compare our model on tp * pp * cp ranks with transformers: outputs, loss, every gradient, and the round trip.

    All is computed in fp32. If the tensor and context ranks are too few for `ep`, there are as many data ranks as it
    needs, which all get the same samples.

    It needs several times the memory of the model, its gradients and its activations, and disk space for two copies of
    the model in the temporary directory. If a difference exceeds its bound, transformers runs a few times more, which
    shows whether rounding explains it (`measure_rounding`).

    Args:
        hf_dir: config.json and weights of a supported family.
        tp, pp: tensor and pipeline ranks, started on this machine.
        cp: ranks that divide each sequence; `cp_method`: of their communication, see `ContextSection`.
        ep: ranks that divide the experts of a layer; None = the tensor ranks.
        sequence: Megatron's sequence parallelism over the tensor ranks.
        note: called with a line of text before each part.

    Raises:
        MegatronDSError: the directory cannot be read, or the model cannot be divided over so many ranks.
        LaunchError: a rank died; the message has its traceback.
    """
    quiet_libraries()
    if rank_from_environment() is not None:
        settings = " and ".join(rank_source().settings)
        raise TopologyError(
            f"verify starts its own ranks, and {settings} in the environment make it a launcher's; run it without "
            f"torchrun, deepspeed or srun; {rank_source().start_alone()}"
        )
    directory = Path(hub.local_directory(expanded_text(str(hf_dir))))
    weights = HFWeights(directory, read_model(directory)).with_pooling()
    if weights.model.unread:
        note(f"config.json: {unread_fields(weights.model)}")
    if weights.source.renaming:
        note(f"tensor names are read {weights.source.renaming}")
    core = weights.model.core
    check_layout(core.shape(), tp, pp, names=(NAMES.tensor, "--pp"))
    section = _context_section(cp, cp_method)
    parallel = ParallelSection(tensor=tp, pipeline=pp, context=section, sequence=sequence)
    parallel, data = _with_experts(parallel, ep, core.shape())
    context = plan_context(section, core.without_dropout().shape(), tp, CONTEXT_NAMES)
    inputs, not_reached = core.probes(context.multiple_of(tp if sequence else 1))
    hub.fetch(weights.files, note)
    _preload()
    from megatron_ds.verify.ours import run_rank

    world_size = parallel.least_ranks
    with tempfile.TemporaryDirectory(prefix="megatron_ds-verify-") as folder:
        results = Path(folder)
        note("transformers: outputs, loss and gradients")
        (losses,) = run_local(
            lambda info: run_reference(directory, weights.model, inputs, results, weights.state_dict()), 1
        )
        ranks_of = f"{world_size} ranks{f', context {context.describe()}' if context.size > 1 else ''}"
        note(f"megatron_ds on {ranks_of}: outputs, loss and gradients")
        ranks = run_local(lambda info: run_rank(info, weights, inputs, parallel, results), world_size)
        reports = [merge(probe, loss, found) for probe, loss, found in zip(inputs, losses, zip(*ranks))]
        reports = _with_rounding(reports, list(zip(inputs, losses)), directory, weights, results, note)
        note("round trip: every tensor through the tables and back")
        (round_trip,) = run_local(lambda info: check_round_trip(weights, directory, results / "rewritten"), 1)
    return Report(
        path=str(hf_dir),
        model_type=weights.model.family.model_type,
        num_params=weights.num_params,
        tp=tp,
        pp=pp,
        cp=cp,
        sequence=sequence,
        dp=data,
        ep=ep,
        inputs=reports,
        round_trip=round_trip,
        not_reached=not_reached,
    )


def _with_rounding(
    reports: Sequence[InputReport],
    references: Sequence[tuple[Probe, ReferenceLoss]],
    directory: Path,
    weights: HFWeights,
    results: Path,
    note: Note,
) -> list[InputReport]:
    """Return the reports; those with a difference above its bound have what rounding alone does."""
    exceeding = {i: references[i] for i, one in enumerate(reports) if one.exceeds}
    if not exceeding:
        return list(reports)
    note(f"transformers {NUM_SAMPLES} times more, as a difference exceeds its bound: how far rounding takes it")
    (rounding,) = run_local(
        lambda info: measure_rounding(directory, weights.model, exceeding, results, weights.state_dict()), 1
    )
    return [one.with_rounding(rounding[i]) if i in rounding else one for i, one in enumerate(reports)]


def _context_section(size: int, method: ContextMethod) -> ContextSection:
    if size < 1:
        raise TopologyError(f"{CONTEXT_NAMES.size}={size} is less than one rank; nearest: 1")
    if method not in get_args(ContextMethod):
        raise ConfigError(f"{CONTEXT_NAMES.method}={method} {not_one_of(method, get_args(ContextMethod))}")
    if size == 1 and method != "auto":
        raise ConfigError(
            f"{CONTEXT_NAMES.method}={method} does nothing with {CONTEXT_NAMES.size}=1; try {CONTEXT_NAMES.size}=2"
        )
    return ContextSection(size=size, method=method)


def _with_experts(parallel: ParallelSection, ep: int | None, shape: ModelShape) -> tuple[ParallelSection, int]:
    """Return the layout with expert ranks, and the number of data ranks that these need.

    Raises:
        ConfigError: expert ranks are given, and the model has no experts.
        TopologyError: the experts cannot be divided.
    """
    if not shape.num_experts:
        if ep not in (None, 1):
            raise ConfigError(f"{NAMES.expert}={ep} is for mixtures of experts, and this model has none; remove it")
        return parallel, 1
    if ep is not None and ep < 1:
        raise TopologyError(f"{NAMES.expert}={ep} is less than one rank; nearest: 1")
    if ep is not None and shape.num_experts % ep:
        legal = nearest(ep, (one for one in range(1, shape.num_experts + 1) if shape.num_experts % one == 0))
        raise TopologyError(
            f"{NAMES.expert}={ep} does not divide the model's {shape.num_experts} experts; "
            f"nearest: {NAMES.expert}={' or '.join(map(str, legal))}"
        )
    parallel = parallel.model_copy(update={"expert": ep})
    data = parallel.least_ranks // parallel.model_ranks
    check_expert_layout(parallel, shape, data, NAMES)
    return parallel, data


def _preload() -> None:
    """Import what the ranks need before they are forked, but nothing that starts a thread or an accelerator."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    from megatron_ds.engine import preload  # not before `quiet_libraries`

    preload()


def merge(probe: Probe, reference: ReferenceLoss, ranks: Sequence[Findings]) -> InputReport:
    """Merge the findings of all ranks for one input, in the order of the pipeline stages."""
    batch, length = probe.input_ids.shape
    decoder_ids = probe.columns.get("decoder_input_ids")
    losses = [reference.difference(rank.loss) for rank in ranks]
    return InputReport(
        name=probe.name,
        batch=batch,
        length=length,
        decoder_length=decoder_ids.shape[1] if decoder_ids is not None else None,
        outputs=_worst(rank.outputs for rank in ranks),
        loss=max(losses, key=relative_error),
        hidden=_worst(rank.hidden for rank in ranks),
        gradients=_worst(rank.gradients for rank in ranks),
        other_experts={name: found for rank in ranks for name, found in rank.other_experts.items()},
    )


def _worst(ranks: Iterable[Mapping[str, Difference]]) -> dict[str, Difference]:
    """Return the largest difference by name; data ranks have the same names."""
    found: dict[str, Difference] = {}
    for rank in ranks:
        for name, one in rank.items():
            found[name] = max(one, found.get(name, one), key=relative_error)
    return found


def check_round_trip(weights: HFWeights, directory: Path, target: Path) -> RoundTrip:
    """Rewrite a directory through the tables and compare the bytes of every tensor.

    Raises:
        ConversionError: a tensor cannot be rewritten.
    """
    rewrite(directory, target)
    before, after = weights.source, open_directory(target)
    written = set(after.names)
    hashes, changed, seen = {}, [], set()
    for name in after.names:
        source = name if name in weights.model.passed_through else weights.name_on_disk(name)
        seen.add(source)
        hashes[name] = digest(before, source)
        if digest(after, name) != hashes[name]:
            changed.append(name)
    missing = {*weights.model.tensors, *weights.model.passed_through} - written
    if missing:
        raise ConversionError(f"{directory}: {sorted(missing)[0]} was not written back; please report it")
    return RoundTrip(hashes, changed, sorted(set(before.names) - seen))


def digest(source: TensorSource, name: str) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    hashed = hashlib.sha256(f"{source.dtype(name)} {source.shape(name)}".encode())
    hashed.update(source.tensor(name, ahead=True).contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
