"""The notebook in examples/: it runs, and the outputs that are stored with it are those of its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, differences

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with nbclient, an extra of dev")

NOTEBOOK = ROOT / "examples" / "roastify.ipynb"


def _cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]


def _printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _kinds(cell: Any) -> list[list[str]]:
    """Return which forms each output has, beside printed lines."""
    return [sorted(output.data) for output in cell.outputs if output.output_type != "stream"]


def test_the_cells_run_with_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in _cells():
            source = cell.source.replace("STEPS = 200", "STEPS = 2").replace("plt.show()", "plt.close()")
            exec(compile(source, NOTEBOOK.name, "exec"), names)
    assert names["STEPS"] == 2 and Path("out/notebook/roast.json").is_file()


def test_it_is_stored_with_small_outputs_of_a_run_from_top_to_bottom() -> None:
    cells = _cells()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    forms = {form for cell in cells for kinds in _kinds(cell) for form in kinds}
    assert {"text/html", "text/plain", "image/png"} <= forms
    assert NOTEBOOK.stat().st_size < 100_000
    # What a run would also store: nothing of the machine.
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_it_runs_as_stored(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; it is an extra of dev")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for stored, cell in zip(_cells(), [cell for cell in notebook.cells if cell.cell_type == "code"], strict=True):
        assert _kinds(cell) == _kinds(stored)
        assert not (wrong := differences(_printed(stored), _printed(cell))), "\n".join(wrong)
        for ours, theirs in zip(cell.outputs, stored.outputs, strict=False):
            if ours.output_type == "execute_result":
                assert ours.data == theirs.data
