"""A model before its engine is built: its config, the source of its weights, and the parameters that are trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ds.checkpoint.directory import resolve_checkpoint
from megatron_ds.checkpoint.wide_weights import WeightSource
from megatron_ds.config import ModelSection, build_section
from megatron_ds.engine import ShardReader
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import HFModel, read_model, with_new_head
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hf.peft.initial import InitialValues
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.rope import with_rope
from megatron_ds.hf.weights import HFWeights
from megatron_ds.hub import fetch, local_directory
from megatron_ds.layers.param_spec import ParamSpec, initial_shard
from megatron_ds.log import log_once
from megatron_ds.models.adapters import with_adapters
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import ChangeLayers, LayerSpec, own_layers
from megatron_ds.parallel.consensus import run_long_on_all_ranks
from megatron_ds.parallel.grid import Axes
from megatron_ds.paths import expanded_text
from megatron_ds.runtime.adapters import open_adapters, refuse_adapters
from megatron_ds.runtime.freeze import frozen_parameters


@dataclass(frozen=True)
class LoadedModel:
    """A model with the source of its weights. Nothing is allocated yet, and nothing in it depends on a layout.

    Attributes:
        hf: the Hugging Face model that is trained; `tied` is read from the weights if there are any.
        section: the run file's `model` section, or the same from keywords.
        weights: reader of its weights; None = random initialization.
        seed: seed of randomly initialized parameters.
        frozen: native names of the parameters that are not trained.
        adapters: adapters that are trained instead of the model; None = none.
        adapter_weights: reader of their weights; None = they start from their initialization.
        initial: values of adapters and of base weights that follow from the base weights before training.
        change_layers: (the model's own layers, build context) -> the layers to train, such as with another head.
    """

    hf: HFModel
    section: ModelSection
    weights: HFWeights | None = None
    seed: int = 1234
    frozen: frozenset[str] = frozenset()
    adapters: Adapters | None = None
    adapter_weights: AdapterReader | None = None
    initial: InitialValues | None = None
    change_layers: ChangeLayers = own_layers

    def layers(self, ctx: BuildContext) -> list[LayerSpec]:
        """Return the specs of the model's layers with their adapters; nothing is built."""
        layers = self.change_layers(self.hf.core.build_layers(ctx), ctx)
        return layers if self.adapters is None else with_adapters(layers, self.adapters.places)

    @property
    def places(self) -> dict[str, Path]:
        """Text for a message -> directory that the model is read from."""
        paths = [Path(path) for path in (self.section.path, self.section.tokenizer) if path is not None]
        paths += [reader.directory for reader in (self.weights, self.adapter_weights) if reader is not None]
        return {f"{path}, which is read": path for path in paths}

    @property
    def source(self) -> WeightSource:
        """The weights that are read, and what is not trained of them."""
        return WeightSource(self.weights, self.frozen)

    @property
    def read_shard(self) -> ShardReader | None:
        """The reader of parameter values for `build_engine`; None = random initialization."""
        return self._read_shard if self.weights is not None else None

    def prepare(self, names: Collection[str]) -> None:
        """Download the files of a model on the hub that hold these parameters. Collective over the world.

        All are, if weights are read again when the model is saved: those that are not trained.
        """
        if self.weights is None:
            return
        saves_unread = self.hf.passed_through or (self.frozen and self.adapters is None)
        files = self.weights.files if saves_unread else self.weights.files_of(names)
        run_long_on_all_ranks(lambda: fetch(files))

    def _read_shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        if self.adapter_weights is not None and name in self.adapter_weights.adapters.table:
            return self.adapter_weights.shard(name, spec, axes)
        if self.initial is not None and self.initial.has(name):
            return self.initial.shard(name, spec, axes)
        assert self.weights is not None
        if name in self.hf.table and name not in self.weights.new:
            return self.weights.shard(name, spec, axes)
        return initial_shard(name, spec, self.seed, axes)


def load_model(
    source: str | Path | Mapping[str, Any],
    *,
    init: str | None = None,
    tokenizer: str | None = None,
    head: Mapping[str, Any] | None = None,
    rope: Mapping[str, Any] | None = None,
    peft: str | Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
    seed: int = 1234,
) -> LoadedModel:
    """Open a model: read its config and the headers of its weight files. Called on every rank; does not communicate.

    Args:
        source: a Hugging Face directory; the id of a model on the hub, `org/name` or `org/name@revision`; a checkpoint
            or a folder of checkpoints, of which the latest is used; or the fields of a Hugging Face config, for a model
            with random weights.
        init: "pretrained" or "random"; None = "pretrained" for a directory.
        tokenizer: directory or id of the tokenizer that exports carry; None = that of `source`.
        head: a new head for labels, by the keys of `model.head`; None = the model's own head.
        rope: another rotation of positions, by the keys of `model.rope`; None = the model's own.
        peft: fields of a peft config, or a directory or an id with one; its adapters are trained instead of the model.
        freeze: patterns of Hugging Face tensor names that are not trained.
        seed: seed of randomly initialized parameters.

    Raises:
        ConfigError: `init`, `freeze` or `source` is invalid.
        ConversionError: the directory cannot be read, or its model is not supported.
        HubError: a model on the hub cannot be downloaded.
    """
    fields = {"config": dict(source)} if isinstance(source, Mapping) else {"path": str(source)}
    sections = {"head": dict(head) if head is not None else None, "rope": dict(rope) if rope is not None else None}
    given = {**fields, "init": init, "tokenizer": tokenizer, **sections}
    section = name_directories(build_section(ModelSection, given, "model"))
    plain = dict(peft) if isinstance(peft, Mapping) else peft
    if isinstance(plain, str):
        plain = name_directory("peft", expanded_text(plain))
    return open_model(read_model_section(section), section, peft=plain, freeze=freeze, seed=seed)


def name_directory(field: str, path: str) -> str:
    """Return the directory that a key of the run file names.

    That of an id is the snapshot of the model on the hub in the client's cache, which then has all files but weights;
    that of a folder of checkpoints, or of a run's output, the latest checkpoint in it.

    Raises:
        HubError: see `local_directory`.
    """
    return str(resolve_checkpoint(local_directory(path, f"{field}={path}", with_state=False)))


def name_directories(section: ModelSection) -> ModelSection:
    """Replace the paths of a section; see `name_directory`."""
    named = {
        field: name_directory(f"model.{field}", path)
        for field, path in (("path", section.path), ("tokenizer", section.tokenizer))
        if path is not None
    }
    return section.model_copy(update=named)


def read_model_section(section: ModelSection) -> HFModel:
    """Read the config that a `model` section names.

    Raises:
        ConfigError: the path is a directory of adapters; or see `with_rope` and `with_new_head`.
        ConversionError: see `read_model`.
    """
    model = _read_own(section)
    model = model if section.rope is None else with_rope(model, section.rope)
    return model if section.head is None else with_new_head(model, section.head)


def _read_own(section: ModelSection) -> HFModel:
    path = section.path
    if path is not None and (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file():
        base = named_base(Path(path))
        raise ConfigError(f"model.path={path} is an adapter; try model.path={base} and peft={path}")
    return read_model(section.config or {}) if path is None else read_model(path, "model.path")


def open_model(
    hf: HFModel,
    section: ModelSection,
    *,
    peft: str | dict[str, Any] | None = None,
    freeze: Sequence[str] = (),
    seed: int = 1234,
    checkpoint: Path | None = None,
) -> LoadedModel:
    """Open the weights of a model whose config was read, and its adapters.

    Args:
        hf: from `read_model_section`.
        section: the same section.
        peft, freeze, seed: see `load_model`.
        checkpoint: the checkpoint that a run resumes, whose weights replace those of `section`; None = the run starts.

    Raises:
        ConfigError: a pattern of `freeze` matches nothing.
        ConversionError: weights or adapters cannot be read.
        CheckpointError: the checkpoint has different adapters, or a full model where adapters are trained.
    """
    weights = None
    if section.init != "pretrained" and hf.family.passes_through:
        raise ConversionError(
            f"model.init={section.init} makes no vision tower, which a {hf.family.model_type} has; try a directory "
            "with its weights as model.path, and no model.init"
        )
    if section.init == "pretrained":
        assert section.path is not None
        weights = HFWeights(section.path, hf).with_pooling()
        hf = weights.model
        if hf.replaced is not None and checkpoint is None:
            _note_new_head(weights)
    if peft is not None:
        assert weights is not None, "adapters need a model with weights"
        adapters, adapter_weights = open_adapters(peft, section.path, hf, checkpoint)
        hf = adapters.model
        frozen, initial = frozenset(hf.table) - adapters.saved, InitialValues(adapters, weights, seed)
        return LoadedModel(hf, section, weights.for_model(hf), seed, frozen, adapters, adapter_weights, initial)
    if checkpoint is not None:
        refuse_adapters(checkpoint)
        weights = HFWeights(checkpoint, read_model(checkpoint))
    return LoadedModel(hf, section, weights, seed, frozen_parameters(hf, freeze))


def describe_model(
    hf: HFModel, section: ModelSection, *, peft: str | dict[str, Any] | None = None, freeze: Sequence[str] = ()
) -> LoadedModel:
    """Return a model with its adapters and what is frozen, without its weights, of which no file is read.

    Its layers are those that a run trains, and its parameters can only be initialized randomly.

    Args:
        hf: from `read_model_section`.
        section: the same section.
        peft, freeze: see `load_model`.

    Raises:
        ConfigError: a pattern of `freeze` matches nothing.
        ConversionError: the config of the adapters is invalid.
    """
    if peft is None:
        return LoadedModel(hf, section, frozen=frozen_parameters(hf, freeze))
    adapters, _ = open_adapters(peft, section.path, hf, None)
    return LoadedModel(adapters.model, section, frozen=frozenset(hf.table) - adapters.saved, adapters=adapters)


def _note_new_head(weights: HFWeights) -> None:
    new = [name for native in sorted(weights.new) for name in weights.model.table[native].names]
    what = f"new, with random values: {', '.join(new)}" if new else "all its tensors are in the directory"
    log_once(f"model.head: a {weights.model.architecture} with {_labels(weights.model)}; {what}")


def _labels(model: HFModel) -> str:
    names = list(model.config.id2label.values())
    shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} label{'s' * (len(names) > 1)} ({shown})"
