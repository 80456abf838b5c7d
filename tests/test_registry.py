"""Registries: taken names, unknown names, decorators."""

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.registry import Registry


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
