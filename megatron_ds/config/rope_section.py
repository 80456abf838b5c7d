"""The section `model.rope`: a rotation of positions in place of the model's own, in the words of `rope_parameters`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_ds.config.schema_base import Count, Section
from megatron_ds.errors import ConfigError, show

NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor"),
}
DEFAULTS: Mapping[str, Mapping[str, float]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
"""Values of Llama 3.1, whose config has to name them."""
_LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")

Positive = Annotated[float, Field(gt=0)]


class RopeSection(Section):
    """A rotation of positions in place of the model's own. The keys are those of transformers' `rope_parameters`.

    `factor`: how far positions are stretched. `original_max_position_embeddings`: the length that is stretched; None:
    the model's. `max_position_embeddings`: the length afterwards; None: factor * original, or the original length with
    `default`, which stretches nothing, and `dynamic`, which stretches sequences beyond it. `rope_theta`: None: the
    model's.
    """

    type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: Annotated[float, Field(ge=1)] | None = None
    rope_theta: Positive | None = None
    original_max_position_embeddings: Count | None = None
    max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None

    @model_validator(mode="after")
    def _keys_of_its_type(self) -> "RopeSection":
        legal = [*NEEDED[self.type], *OPTIONAL.get(self.type, ()), "rope_theta", *_LENGTHS]
        for key, value in self.given.items():
            if key not in legal:
                raise ConfigError(
                    f"model.rope.{key}={show(value)} does nothing with model.rope.type={self.type}; legal with it: "
                    f"{', '.join(legal)}"
                )
        for key in NEEDED[self.type]:
            if getattr(self, key) is None:
                raise ConfigError(f"model.rope.{key} is missing, which model.rope.type={self.type} needs; add it")
        if self.type == "longrope" and self.factor is None and self.max_position_embeddings is None:
            raise ConfigError("model.rope.factor is missing, and model.rope.max_position_embeddings too; add one")
        if self.type == "dynamic" and self.max_position_embeddings is not None:
            raise ConfigError(
                f"model.rope.max_position_embeddings={self.max_position_embeddings} does nothing with "
                "model.rope.type=dynamic, which stretches positions from the original length on; try "
                "model.rope.original_max_position_embeddings"
            )
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys that have a value, but for `type`."""
        return self.model_dump(exclude_none=True, exclude={"type"})

    @property
    def parameters(self) -> dict[str, Any]:
        """The entries of `rope_parameters` that say how positions are stretched."""
        own = {key: value for key, value in self.given.items() if key not in ("rope_theta", *_LENGTHS)}
        return {"rope_type": self.type, **DEFAULTS.get(self.type, {}), **own}
