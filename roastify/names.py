"""The one pattern matcher: exact names, globs (`encoder.*.dense`) and expressions (`re:.*lm_head`)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from roastify.errors import RoastError, closest

SYNTAX = "patterns are exact names, globs ('encoder.*.dense') or 're:...'"
_REGEX = "re:"


def invalid(pattern: str) -> str | None:
    """Return why a pattern cannot be used, or None."""
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except re.error as error:
            return f"{pattern!r} is not a valid regular expression: {error}"
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of `name`; upper and lower case differ."""
    if pattern.startswith(_REGEX):
        return re.fullmatch(pattern.removeprefix(_REGEX), name) is not None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def select(
    setting: str, patterns: Sequence[str], names: Iterable[str], what: str, error: type[RoastError]
) -> dict[str, str]:
    """Return the names that patterns select, in the order of `names`, each with the first pattern that selects it.

    Args:
        setting: what messages call the patterns.
        patterns: the patterns.
        names: the names to choose from.
        what: what messages call a name.
        error: the class of the error to raise.

    Raises:
        RoastError: `error`, for a pattern that is not valid or matches nothing.
    """
    names = list(names)
    by: dict[str, str] = {}
    for pattern in patterns:
        problem = invalid(pattern)
        if problem:
            raise error(f"{setting}: {problem}")
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise error(f"{setting} pattern {pattern!r} matched no {what}{closest(pattern, names)}; {SYNTAX}")
        for name in hits:
            by.setdefault(name, pattern)
    return {name: by[name] for name in names if name in by}
