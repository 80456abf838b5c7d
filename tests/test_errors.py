"""Parts of messages: a hint is another name than the one that was given, and a value stays on one line."""

import pytest

from megatron_ds.errors import nearest_names, not_one_of, show, suggest


def test_a_name_is_never_its_own_nearest() -> None:
    assert nearest_names("prompt", ["prompt", "completion"]) == []
    assert nearest_names("prompt", ["prompt", "prompts"]) == ["prompts"]
    assert suggest("steps", ["steps", "seed"]) == "legal here: seed, steps"
    assert not_one_of("full", ["full", "none"]) == "is not one of full, none"
    assert not_one_of("ful", ["full", "none"]) == "is not one of full, none; did you mean full?"
    assert not_one_of(3, ["full"]) == "is not one of full"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("", '""'),
        (" a", '" a"'),
        ("a\nb", "a\\nb"),
        (1e-5, "1e-05"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ("x" * 100, "x" * 77 + "..."),
    ],
)
def test_values_are_shown_as_they_are_written(value: object, text: str) -> None:
    assert show(value) == text
