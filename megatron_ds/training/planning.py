"""The input of a plan, from a run file: the checks of a run that need no weights, no data and no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_ds.columns import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    INPUT_IDS,
    NEXT_SENTENCE_LABEL,
    POSITION_IDS,
    TARGETS,
    TOKEN_TYPE_IDS,
)
from megatron_ds.config import RunConfig, check_target_length, load_deepspeed
from megatron_ds.data import FORMATS, Causal, Labelled, Masked, Seq2Seq, check_format
from megatron_ds.data.objective import DataObjective
from megatron_ds.data.text.span_corruption import target_length
from megatron_ds.errors import MegatronDSError
from megatron_ds.planner.pipeline.stragglers import RandomSlowness
from megatron_ds.planner.plan import Plan, make_plan
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.search.branch_and_bound import first_legal
from megatron_ds.planner.search.find_layouts import SearchInput
from megatron_ds.planner.search.space import Candidate, Space, candidate_of, with_candidate
from megatron_ds.runtime.loaded_model import LoadedModel, describe_model, read_model_section
from megatron_ds.runtime.objective import find_objective
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import EnginePlan
from megatron_ds.training.model_paths import with_directories
from megatron_ds.training.registered_names import check_registered_names
from megatron_ds.training.resolve import plan_engine_of


class RunInputs:
    """Inputs of plans of a run. Its model is read once, and each layout is checked as `train` would.

    Args:
        run: the run file.
        machines: that it is planned for.

    Raises:
        MegatronDSError: the model cannot be read, or the run names something that is not registered.
    """

    def __init__(self, run: RunConfig, machines: Machines) -> None:
        check_format(run.data, run.model.tokenizer_path)
        check_registered_names(run, resumes=False)
        self.run, self.machines = with_directories(run, None), machines
        self.hf = read_model_section(self.run.model)
        self._model = describe_model(self.hf, self.run.model, peft=self.run.peft, freeze=self.run.train.freeze)

    def of(self, run: RunConfig) -> PlanInput:
        """Return the input of the plan of the run, or of one with other settings of the same model and data.

        Raises:
            MegatronDSError: it is invalid; the message names field, value, rule and fix.
        """
        engine = plan_engine_of(run, self.hf, self.machines.world_size, self.machines.device_type)
        return input_of_model(run, self._model, engine, self.machines)


def plan_input(run: RunConfig, machines: Machines) -> PlanInput:
    """Return everything that a plan of a run needs. Of the model its config alone is read.

    Raises:
        MegatronDSError: see `RunInputs`.
    """
    inputs = RunInputs(run, machines)
    return inputs.of(inputs.run)


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


class RunPlanner:
    """Plans of a run on machines, as it is and with other settings.

    Args:
        run: a run file that leaves nothing to the planner.
        machines: that it is planned for.
        device: profile of their devices.
        network: that joins them.
        limit_bytes: memory of a device that the run may use; None = all.
        stragglers: random slowness of the devices; None = the usual one of nodes.

    Raises:
        MegatronDSError: see `RunInputs`.
    """

    def __init__(
        self,
        run: RunConfig,
        machines: Machines,
        device: Device,
        network: Network,
        limit_bytes: int | None = None,
        stragglers: RandomSlowness | None = None,
    ) -> None:
        self.inputs = RunInputs(run, machines)
        self.device, self.network, self.stragglers = device, network, stragglers
        self.limit_bytes = device.memory_bytes if limit_bytes is None else limit_bytes

    @property
    def run(self) -> RunConfig:
        """The run, with the directories of its models."""
        return self.inputs.run

    @property
    def machines(self) -> Machines:
        """The machines."""
        return self.inputs.machines

    @property
    def candidate(self) -> Candidate:
        """The settings of the run that other plans change."""
        return candidate_of(self.run)

    def plan(self) -> Plan:
        """Plan the run.

        Raises:
            MegatronDSError: it is invalid, as `train` would say.
        """
        return make_plan(self.inputs.of(self.run), self.device, self.network, self.limit_bytes, self.stragglers)

    def replan(self, candidate: Candidate, zero: Mapping[str, Any]) -> Plan | None:
        """Plan the run with other settings; None = `train` would refuse them.

        Args:
            candidate: layout and settings.
            zero: keys of DeepSpeed's section `zero_optimization` that replace those of the run.
        """
        try:
            run = with_candidate(self.run, candidate)
            deepspeed = load_deepspeed(run.deepspeed)
            section = {**deepspeed.get("zero_optimization", {}), **zero}
            given = self.inputs.of(run.model_copy(update={"deepspeed": {**deepspeed, "zero_optimization": section}}))
        except MegatronDSError:
            return None
        return make_plan(given, self.device, self.network, self.limit_bytes, self.stragglers)

    def searched(self) -> SearchInput:
        """Return the input of a search of layouts, which begins at one that is legal.

        Raises:
            ConfigError, TopologyError: no layout is legal.
        """
        space = Space(self.run, self.inputs.hf.core.shape(), self.machines.world_size, self.machines.ranks_per_node)
        run = first_legal(space, self.inputs.hf, self.machines.device_type)
        return SearchInput(run, self.inputs.hf, self.inputs.of(run), self.device, self.network)

    def tokens_of_run(self, plan: Plan) -> int | None:
        """Return the positions of all steps; None = they follow from the data, as `train.epochs` does."""
        if self.run.train.steps is None:
            return None
        return self.run.train.num_samples * plan.given.rows.positions
