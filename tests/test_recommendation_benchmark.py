"""The recommendation benchmark: ids are as promised, and small tables run through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import recommendation

ROOT = Path(__file__).parents[1]


def test_ids_follow_a_power_law_and_lie_in_their_tables() -> None:
    sizes = recommendation.Sizes(rows=10_000, power=1.5)
    tables = sizes.tables()
    assert sum(tables) == 10_000 and len(tables) == recommendation.FIELDS and min(tables) >= 2
    (_, ids, _), *others = recommendation.batches(sizes, 20_000, torch.device("cpu"), seed=0)
    assert not torch.equal(ids, others[0][1])
    first = 0
    for field, rows in enumerate(tables):
        own = ids[:, field] - first
        assert 0 <= int(own.min()) and int(own.max()) < rows
        first += rows
    # The most frequent id is the first of its table; in a large table it has 1 - 2^-0.5 of all.
    counts = ids[:, 0].bincount()
    assert int(counts.argmax()) == 0 and counts[0] / 20_000 == pytest.approx(0.293, abs=0.02)


@pytest.mark.long
def test_rows_of_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["benchmarks.recommendation", "--smoke", "--steps", "5", "--device", "cpu", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        # The second run passes over what the first one measured.
        done = subprocess.run(
            [*command, "--missing"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "samples/s" not in done.stdout
    rows = {row["case"]: row for row in json.loads(output.read_text())["rows"]}
    assert not [row for row in rows.values() if "failure" in row]
    pool = rows["gpus=2/batch=64/pool/Adam/eager"]
    assert pool["achieved_ratio"] >= 20 and "all-to-all" not in pool["bytes"]
    unique, everything = (
        rows[f"gpus=2/batch=64/sharded/row-wise Adagrad/eager/{ids} ids"] for ids in ("unique", "all")
    )
    assert unique["bytes"]["all-to-all"] < everything["bytes"]["all-to-all"]
    assert unique["losses"] == pytest.approx(everything["losses"], abs=1e-4)
