"""Groups of the optimizer: patterns of Hugging Face tensor names -> native parameter names."""

from __future__ import annotations

from megatron_ds.config import OptimizerSection
from megatron_ds.errors import ConfigError
from megatron_ds.layers.param_spec import is_untrained
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.tensor_patterns import PatternKey, assign_parameters

_GROUPS = PatternKey("optimizer.groups", "put both into one group", "tensor that is trained")


def grouped_parameters(model: LoadedModel, section: OptimizerSection | None) -> dict[str, int]:
    """Return native name -> index of its entry in `optimizer.groups`; parameters of no entry are left out.

    The tensors of adapters have peft's names, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.

    Raises:
        ConfigError: a pattern matches no trained tensor, entries divide the tensors of a parameter, or an entry is left
            without any because earlier ones match them.
    """
    if section is None or not section.groups:
        return {}
    adapters = model.adapters.table if model.adapters is not None else {}
    kept = model.frozen | (model.adapters.replaced if model.adapters is not None else frozenset())
    table = {
        native: row
        for native, row in {**model.hf.table, **adapters}.items()
        if native not in kept and not is_untrained(native)
    }
    assigned = assign_parameters(table, [group.match for group in section.groups], _GROUPS, "[{}].match")
    for index, group in enumerate(section.groups):
        if index not in assigned.values():
            raise ConfigError(
                f"optimizer.groups[{index}].match={group.label} matches only tensors of earlier entries, and the first "
                "match counts; try moving it before them, or remove it"
            )
    return assigned
