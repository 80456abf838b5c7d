"""The input of a plan, from a run file: the checks of a run that need no weights, no data and no device."""

from __future__ import annotations

from dataclasses import replace

from megatron_ds.columns import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    INPUT_IDS,
    NEXT_SENTENCE_LABEL,
    POSITION_IDS,
    TARGETS,
    TOKEN_TYPE_IDS,
)
from megatron_ds.config import RunConfig, check_target_length
from megatron_ds.data import FORMATS, Causal, Labelled, Masked, Seq2Seq, check_format
from megatron_ds.data.objective import DataObjective
from megatron_ds.data.text.span_corruption import target_length
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.runtime.loaded_model import LoadedModel, describe_model, read_model_section
from megatron_ds.runtime.objective import find_objective
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import EnginePlan
from megatron_ds.training.model_paths import with_directories
from megatron_ds.training.registered_names import check_registered_names
from megatron_ds.training.resolve import plan_engine_of


def plan_input(run: RunConfig, machines: Machines) -> PlanInput:
    """Return everything that a plan of a run needs. Of the model its config alone is read.

    Args:
        run: the run file.
        machines: that it is planned for.

    Raises:
        MegatronDSError: the run is invalid, as `train` would say; the message names field, value, rule and fix.
    """
    check_format(run.data, run.model.tokenizer_path)
    check_registered_names(run, resumes=False)
    run = with_directories(run, None)
    hf = read_model_section(run.model)
    engine = plan_engine_of(run, hf, machines.world_size, machines.device_type)
    model = describe_model(hf, run.model, peft=run.peft, freeze=run.train.freeze)
    return input_of_model(run, model, engine, machines)


def input_of_model(run: RunConfig, model: LoadedModel, engine: EnginePlan, machines: Machines) -> PlanInput:
    """Return the same for a model and an engine that were checked, such as those of a run that is about to start."""
    groups = grouped_parameters(model, run.optimizer)
    objective = find_objective(run.train.objective, model, run.data, run.train.seed)
    rows = rows_of(run, objective.data)
    check_target_length(run.parallel, rows.target_length)
    return PlanInput(
        replace(model, change_layers=objective.layers).layers,
        model.hf.core,
        engine,
        rows,
        machines,
        frozen=model.frozen,
        groups=groups,
        saves_asynchronously=run.checkpoint.asynchronous,
        save_every=run.checkpoint.every,
    )


def rows_of(run: RunConfig, objective: DataObjective) -> Rows:
    """Return the rows that the data of a run have; columns that only some files have are left out."""
    data, length = run.data, None
    types = (TOKEN_TYPE_IDS.name,) if isinstance(objective, Masked | Labelled) and objective.token_types else ()
    columns: tuple[str, ...] = (INPUT_IDS.name, TARGETS.name, *types)
    if isinstance(objective, Causal) and data.packing:
        columns += (POSITION_IDS.name,)
    if isinstance(objective, Masked) and objective.next_sentence:
        columns = (INPUT_IDS.name, TARGETS.name, ATTENTION_MASK.name, *types, NEXT_SENTENCE_LABEL.name)
    if isinstance(objective, Labelled):
        columns = (INPUT_IDS.name, ATTENTION_MASK.name, *types, objective.label_column.name)
    if isinstance(objective, Seq2Seq):
        columns = (INPUT_IDS.name, DECODER_INPUT_IDS.name, TARGETS.name)
        cuts_spans = FORMATS.get(data.format, "data.format").cuts_spans
        length = target_length(data.seq_length, objective) if cuts_spans else data.target_length or data.seq_length
    labelled = objective.mask_rate if isinstance(objective, Masked) else 1.0
    return Rows(data.seq_length, length, columns, labelled)
