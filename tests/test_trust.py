"""Short runs of the programs in `tests/trust` that no other test runs; `make trust` runs all at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
from trust import code_audit, recoveries


def test_no_code_is_run_while_artifacts_are_read() -> None:
    assert code_audit.run() == []


def test_the_audit_sees_what_it_looks_for() -> None:
    audit = code_audit.Audit()
    events = audit.during(lambda: eval("1 + 1"))
    assert events["compile"] and events["exec"]


@pytest.mark.long
def test_a_recovery_that_is_killed_again_and_again_loses_no_step(tmp_path: Path) -> None:
    seen = recoveries.killed_recoveries(tmp_path, 3)
    assert seen.keys() <= recoveries.FINE and seen["further on"] >= 2
