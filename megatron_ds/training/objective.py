"""What a model is trained to do on the run's data: decided by the model, with rates from the run file."""

from __future__ import annotations

from megatron_ds.config import RunConfig
from megatron_ds.data import Causal, Masked, Objective, Seq2Seq
from megatron_ds.errors import ConfigError, show
from megatron_ds.hf.config import HFModel
from megatron_ds.models.config import DecoderConfig, EncoderConfig

# Keys of `data` that only some kinds of models heed.
_NOISE_KEYS = ("mask_rate", "whole_words", "mean_span", "target_length")
_HEEDED = {Causal: (), Masked: ("mask_rate", "whole_words"), Seq2Seq: ("mask_rate", "mean_span", "target_length")}
# Those of text alone: examples of pairs have been made. Of BERT's, those without `labels` are masked; the data tells.
_OF_TEXT = {Causal: (), Masked: (), Seq2Seq: ("mask_rate", "mean_span")}


def objective_of(model: HFModel, run: RunConfig) -> Objective:
    """The objective of a model in a run.

    Raises:
        ConfigError: the model has no head to train, or a key of `data` is set that this kind of model does not heed,
            or not in this format.
    """
    objective = _objective(model, run)
    kind = type(objective)
    heeded = set(_HEEDED[kind]) - (set() if run.data.format == "text" else set(_OF_TEXT[kind]))
    for key in _NOISE_KEYS:
        value, default = getattr(run.data, key), type(run.data).model_fields[key].default
        if value != default and key not in heeded:
            where = f" with data.format={run.data.format}" if key in _HEEDED[kind] else ""
            raise ConfigError(
                f"data.{key}={show(value)} does nothing for a {model.family.model_type} model{where}; remove it"
            )
    return objective


def _objective(model: HFModel, run: RunConfig) -> Objective:
    core, data, seed = model.core, run.data, run.train.seed
    if isinstance(core, DecoderConfig):
        return Causal()
    if isinstance(core, EncoderConfig):
        if not core.masked_lm:
            raise ConfigError(
                f"{'model.config' if run.model.path is None else f'model.path={run.model.path}'} is a "
                f"{model.architecture}, without a head to train; nearest: {model.family.architecture}"
            )
        return Masked(
            seed=seed,
            next_sentence=core.next_sentence,
            num_token_types=core.num_token_types,
            padding_id=core.padding_id or 0,
            mask_rate=data.mask_rate,
            whole_words=data.whole_words,
        )
    return Seq2Seq(
        seed=seed,
        decoder_start_id=core.decoder_start_id,
        padding_id=core.padding_id,
        target_length=data.target_length,
        mask_rate=data.mask_rate,
        mean_span=data.mean_span,
    )
