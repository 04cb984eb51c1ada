"""The pattern matcher: exact names, globs, regular expressions, and what it says of patterns that select nothing."""

from __future__ import annotations

import pytest

from roastify.errors import ConfigError, PlanError
from roastify.names import invalid, matches, select

NAMES = ["encoder.0.dense", "encoder.1.dense", "Encoder.2.dense", "head", "a[1].b"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head"]),
        ("encoder.*.dense", ["encoder.0.dense", "encoder.1.dense"]),
        ("encoder.?.dense", ["encoder.0.dense", "encoder.1.dense"]),
        ("[Ee]ncoder.*", ["encoder.0.dense", "encoder.1.dense", "Encoder.2.dense"]),
        ("re:encoder\\.\\d.*", ["encoder.0.dense", "encoder.1.dense"]),
        ("re:encoder", []),
        # A name with brackets names itself, though as a glob it would not.
        ("a[1].b", ["a[1].b"]),
    ],
)
def test_patterns_match_whole_names(pattern: str, expected: list[str]) -> None:
    assert [name for name in NAMES if matches(pattern, name)] == expected


def test_names_keep_their_order_and_say_which_pattern_selected_them() -> None:
    found = select("include", ["head", "*.dense"], NAMES, "module", PlanError)
    assert list(found) == ["encoder.0.dense", "encoder.1.dense", "Encoder.2.dense", "head"]
    assert found["head"] == "head" and found["encoder.0.dense"] == "*.dense"
    assert select("include", [], NAMES, "module", PlanError) == {}


def test_a_pattern_that_matches_nothing_is_named_with_its_closest() -> None:
    with pytest.raises(
        PlanError, match=r"exclude pattern 'heads' matched no module; closest: 'head'.*patterns are exact"
    ):
        select("exclude", ["head", "heads"], NAMES, "module", PlanError)


def test_a_regular_expression_that_is_not_valid_is_refused() -> None:
    assert invalid("re:(") is not None and invalid("(") is None
    with pytest.raises(ConfigError, match=r"logits: 're:\(' is not a valid regular expression: missing \)"):
        select("logits", ["re:("], NAMES, "output", ConfigError)
