"""The README: its quickstart runs as it stands, its figures are those of the committed rows, and it stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import documents, front_page, pretrained, rows, tiles_picture

README = front_page.README
MOST_LINES = 150


@pytest.mark.long
def test_the_quickstart_trains_both_models_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    code = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)[0]
    # One thread: on a machine with other work, threads that wait for each other take most of the time.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    dense, small = (
        (name, int(count.replace(",", "")), int(right))
        for name, count, right in re.findall(r"^(.*): ([\d,]+) parameters, (\d+)% right$", result.stdout, re.MULTILINE)
    )
    assert dense[:2] == ("dense", 265_730) and small[:2] == ("ratio 10", 26_114)
    for _, count, _ in (dense, small):
        assert f": {count:,} parameters, " in README.read_text()
    assert min(dense[2], small[2]) >= 75 and small[2] >= dense[2] - 5
    assert {file.name for file in (tmp_path / "out" / "first").iterdir()} == {"roast.json", "model.safetensors"}


def test_the_readmes_figures_are_the_committed_results() -> None:
    text = README.read_text()
    assert front_page.page(text, front_page.Figures()) == text
    page = pretrained.DOCUMENT.read_text()
    assert documents.insert(page, pretrained.BEGIN, pretrained.markdown(rows.load(pretrained.RESULTS))) == page
    assert tiles_picture.svg() == tiles_picture.PICTURE.read_text()


def test_sizes_in_the_tables_follow_the_rows() -> None:
    found = front_page.Figures()
    for row in found.pretrained:
        if row["case"] in ("int8", "int4"):
            row["ratio"] *= 2
    shown = front_page.choices(found)
    assert "(int8, ÷ 7.93)" in shown and "(int4, ÷ 14.9)" in shown
    assert 80 < found.share_of_table() < 84


def test_the_readme_is_short_and_its_first_screen_says_when_not() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    first = "\n".join(lines[:35])
    for answer in ("**Use it**", "**Do not use it**", "At ratio 10", "pretrained model", "pip install ."):
        assert answer in first
