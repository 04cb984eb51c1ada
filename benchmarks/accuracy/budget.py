"""Sizes that meet a number of stored parameters: widths of a smaller model, ranks of a factored one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a rival may miss its number by.
TOLERANCE = 0.01


class UnreachableError(Exception):
    """No model of this kind has so few parameters."""


def largest(
    count: Callable[[tuple[int, ...]], int], full: Sequence[int], target: int, equal: bool = False
) -> tuple[int, ...]:
    """Return sizes in proportion to `full`, at least 1 each, whose count is the closest from below to `target`.

    With `equal` all sizes are the same, but for those whose most is less.

    The common factor is found by bisection; what is then left goes to single sizes, the dearest that fits first.

    Raises:
        UnreachableError: even with every size 1 the count is above the target, or it stays far below.
    """

    def sizes(factor: float) -> tuple[int, ...]:
        return tuple(min(most, max(1, round(factor * (max(full) if equal else most)))) for most in full)

    least = count(sizes(0.0))
    if least > target:
        raise UnreachableError(f"at least {least:,} parameters, and {target:,} are allowed")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if count(sizes(middle)) <= target else (low, middle)
    found = sizes(low)
    while True:
        room = target - count(found)
        smaller = [index for index in range(len(found)) if found[index] < full[index]]
        steps = [(*found[:index], found[index] + 1, *found[index + 1 :]) for index in smaller]
        costs = {step: count(step) - count(found) for step in steps}
        fitting = [step for step in steps if 0 < costs[step] <= room]
        if not fitting:
            break
        found = max(fitting, key=costs.__getitem__)
    stored = count(found)
    if target - stored > TOLERANCE * target:
        raise UnreachableError(f"{stored:,} parameters are the most below {target:,}; the next size is above")
    return found
