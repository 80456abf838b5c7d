"""Upload of a run's export to the hub, and the model card that goes with it."""

from __future__ import annotations

from pathlib import Path

from megatron_ds.config import DataSource, ExportSection
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.model_card import model_card
from megatron_ds.hub import HubId, hub_id, name_of, parse_id, prepare_push, push
from megatron_ds.parallel.consensus import run_long_on_all_ranks
from megatron_ds.remote import as_url, prepare_upload_to, upload_model
from megatron_ds.training.resolve import ResolvedRun


def prepare_upload(section: ExportSection | None) -> None:
    """Check that the repository of `export.push_to` can be written; it is made if need be. Rank 0 only.

    Raises:
        HubError, RemoteError: it cannot be written.
    """
    if section is None or section.push_to is None:
        return
    named = f"export.push_to={section.push_to}"
    if (url := as_url(section.push_to)) is not None:
        prepare_upload_to(url, named)
    else:
        prepare_push(_target(section), f"export.push_to={section.push_to}", private=section.private)


def upload(resolved: ResolvedRun, rank: int) -> str | None:
    """Upload the export from rank 0. Collective over the world.

    Returns:
        the address of the commit, or the URL, on rank 0; None on other ranks, or if the run does not upload it.

    Raises:
        HubError, RemoteError: the upload fails, also after some more tries.
    """
    section = resolved.run.export
    if section is None or section.push_to is None:
        return None
    named, url = f"export.push_to={section.push_to}", as_url(section.push_to)

    def send() -> str | None:
        if rank > 0:
            return None
        if url is not None:
            return upload_model(Path(section.path), url, named, {MARK})
        return push(Path(section.path), _target(section), named, run_card(resolved), {MARK})

    return run_long_on_all_ranks(send)


def _target(section: ExportSection) -> HubId:
    target = parse_id(section.push_to or "")
    assert target is not None, section.push_to
    return target


def run_card(resolved: ResolvedRun) -> str:
    """Return the model card of a run's export."""
    run, model = resolved.run, resolved.model
    assert run.export is not None
    path, is_adapter = run.model.path, model.adapters is not None and not run.export.merge
    base = parse_id(name_of(path)) if path is not None and run.model.init == "pretrained" else None
    facts = {
        "steps": f"{run.train.num_steps:,}",
        "samples a step": f"{run.train.global_batch_size:,}",
        "tokens a sample": f"{run.data.seq_length:,}",
        "optimizer": f"{run.optimizer.name}, learning rate {run.optimizer.lr:g}, schedule {run.schedule.name}",
        "precision": resolved.plan.summary.precision,
    }
    if model.adapters is not None:
        facts["method"] = "adapters" if is_adapter else "adapters, merged"
    elif model.weights is None:
        facts["method"] = "pretraining from random weights"
    name = _target(run.export).repo.partition("/")[2]
    datasets = [source.path for source in run.data.train if _is_on_hub(source)]
    return model_card(name, model.hf, base, facts, is_adapter=is_adapter, datasets=datasets)


def _is_on_hub(source: DataSource) -> bool:
    return hub_id(source.path) is not None
