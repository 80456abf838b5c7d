"""Registries: taken names, unknown names, decorators."""

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.registry import Registry, check_options


class Sgd:
    pass


@pytest.fixture
def optimizers() -> Registry[type]:
    registry: Registry[type] = Registry("optimizer")
    registry.register("adamw", int)
    registry.register("lion", float)
    return registry


def test_entries_are_found_in_the_order_of_registration(optimizers: Registry[type]) -> None:
    assert optimizers.register("sgd")(Sgd) is Sgd
    assert optimizers.get("sgd") is Sgd
    assert optimizers.names == tuple(optimizers) == ("adamw", "lion", "sgd")
    assert dict(optimizers.items()) == {"adamw": int, "lion": float, "sgd": Sgd}
    assert "sgd" in optimizers and "muon" not in optimizers and [] not in optimizers


def test_a_name_belongs_to_one_entry(optimizers: Registry[type]) -> None:
    assert optimizers.register("lion", float) is float  # a module that is imported twice
    with pytest.raises(ConfigError) as caught:
        optimizers.register("lion", Sgd)
    assert str(caught.value) == "optimizer lion is already registered, by builtins.float; rename one"
    assert optimizers.get("lion") is float
    with pytest.raises(ConfigError, match=r"^optimizer name 3 is not text; give the name that a run file uses for it$"):
        optimizers.register(3, Sgd)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "optimizer.name=adam is not one of adamw, lion; did you mean adamw?"),
        ("muon", "optimizer.name=muon is not one of adamw, lion"),
        (["lion"], 'optimizer.name=["lion"] is not one of adamw, lion'),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(optimizers: Registry[type], name: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizers.get(name, field="optimizer.name")
    assert str(caught.value) == message


def test_without_a_field_the_kind_is_named(optimizers: Registry[type]) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer=lio is not one of"):
        optimizers.get("lio")


def test_an_empty_registry_names_the_way_to_fill_it() -> None:
    sinks: Registry[type] = Registry("metric sink")
    with pytest.raises(ConfigError) as caught:
        sinks.get("wandb", "monitor[0]")
    assert str(caught.value) == (
        "monitor[0]=wandb is not registered, nor is any metric sink; name its module under imports"
    )


def stop_below(engine: object, loss: float, *, patience: int = 1) -> None:
    pass


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        (stop_below, {"loss": 1.0, "patience": 2}, None),
        (
            stop_below,
            {"loss": 1.0, "patiance": 2},
            "callbacks[0].patiance: unknown option; did you mean callbacks[0].patience?",
        ),
        (stop_below, {"loss": 1.0, "engine": 2}, "callbacks[0].engine: unknown option; legal here: loss, patience"),
        (stop_below, {}, "callbacks[0].loss is missing; add it"),
        (lambda engine: None, {"loss": 1.0}, "callbacks[0].loss: unknown option; it takes none"),
        (lambda engine, **options: None, {"loss": 1.0}, None),
    ],
)
def test_options_are_checked_against_the_signature(entry: object, options: dict, message: str | None) -> None:
    if message is None:
        check_options(entry, 1, options, "callbacks[0]")
        return
    with pytest.raises(ConfigError) as caught:
        check_options(entry, 1, options, "callbacks[0]")
    assert str(caught.value) == message
