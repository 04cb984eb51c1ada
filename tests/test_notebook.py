"""The notebook in examples/: it runs, and the outputs that are stored with it are those of its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import differences

run_notebook = pytest.importorskip(
    "run_notebook", reason="nbformat is not installed; it comes with nbclient, of the extra dev"
)


def _cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def _printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _shown(cell: Any) -> list[Any]:
    """Return the forms of each output beside printed lines: of a picture its kinds alone, of text without its width."""
    return [
        {
            kind: kind if "png" in kind or "image/png" in output.data else value.split()
            for kind, value in output.data.items()
        }
        for output in cell.outputs
        if output.output_type != "stream"
    ]


def test_the_cells_run_with_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for cell in _cells(run_notebook.stored()):
            source = cell.source.replace("STEPS = 200", "STEPS = 2").replace("plt.show()", "plt.close()")
            exec(compile(source, run_notebook.NOTEBOOK.name, "exec"), names)
    assert names["STEPS"] == 2 and Path("out/notebook/roast.json").is_file()


def test_it_is_stored_with_the_small_outputs_of_a_run_from_top_to_bottom() -> None:
    cells = _cells(run_notebook.stored())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert {"text/html", "text/plain", "image/png"} <= {
        kind for cell in cells for each in _shown(cell) for kind in each
    }
    text = run_notebook.NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000 and str(Path.home()) not in text


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_run_has_the_outputs_that_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed; it is of the extra dev")
    for stored, cell in zip(_cells(run_notebook.stored()), _cells(run_notebook.executed(tmp_path)), strict=True):
        assert not (wrong := differences(_printed(stored), _printed(cell))), "\n".join(wrong)
        assert _shown(cell) == _shown(stored), "run `make notebook`"
