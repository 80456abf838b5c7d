"""Evaluation of lm-eval's tasks with our model as the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_ds.data import load_tokenizer
from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError
from megatron_ds.evaluation.continuation import Continuer
from megatron_ds.evaluation.scorer import Scorer
from megatron_ds.evaluation.shared_calls import SharedCalls
from megatron_ds.evaluation.task_choice import Tasks
from megatron_ds.runtime.loaded_model import LoadedModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

KEPT = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples", "samples")
"""What is kept of lm-eval's results; the rest describes tasks, the environment, and times."""


def run_tasks(
    engine: Engine,
    model: LoadedModel,
    tasks: Tasks,
    manager: TaskManager | None,
    batch_size: int,
    note: Callable[[str], None],
) -> Mapping[str, Any] | None:
    """Evaluate tasks. Collective over the world.

    Args:
        engine: this rank's part of a model with a `LikelihoodHead`.
        model: the model.
        tasks: the tasks.
        manager: what finds them, on rank 0.
        batch_size: rows of a forward pass on one rank.
        note: called on rank 0 with lines of text.

    Returns:
        on rank 0 lm-eval's results, plain values; None elsewhere.
    """
    from lm_eval.models.utils import resolve_max_length

    path = model.section.tokenizer_path
    assert path is not None, "checked by `check_model`"
    tokenizer = load_tokenizer(path)
    max_length = resolve_max_length(model.hf.config, tokenizer)
    calls = SharedCalls()
    scorer = Scorer(engine, model.hf, max_length, batch_size, note, calls)
    continuer = Continuer(engine, model.hf, model.section.path, tokenizer, batch_size, calls)
    if engine.grid.rank != 0:
        calls.serve()
        return None
    assert manager is not None, "rank 0 has found the tasks"
    from lm_eval import simple_evaluate

    from megatron_ds.evaluation.lm_backend import MegatronLM

    backend = MegatronLM(scorer, continuer, tokenizer, max_length, has_decoder=model.hf.core.has_cross_attention)
    limit = int(tasks.limit) if tasks.limit is not None and tasks.limit >= 1 else tasks.limit
    try:
        found = simple_evaluate(
            model=backend,
            tasks=list(manager.match_tasks(list(tasks.names))),
            num_fewshot=tasks.num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=tasks.chat,
            log_samples=tasks.log_samples,
        )
    finally:
        calls.stop()
    return {key: _plain(found[key]) for key in KEPT if key in found}


def check_model(model: LoadedModel) -> None:
    """Check that a model predicts text, and has a tokenizer.

    Raises:
        ConfigError: it does not.
    """
    if not model.hf.core.generates:
        raise ConfigError(
            f"--tasks asks for likelihoods of texts, and a {model.hf.architecture} does not predict the next token"
        )
    if model.section.tokenizer_path is None:
        raise ConfigError("--tasks needs a tokenizer; set model.tokenizer")


def _plain(value: Any) -> Any:
    """Return a value of lm-eval's results as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
