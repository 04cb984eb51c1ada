"""Runs the notebook in examples/ from top to bottom. `make notebook` stores its outputs in it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "roastify.ipynb"


def stored() -> Any:
    """Return the notebook as it is stored."""
    return nbformat.read(NOTEBOOK, 4)


def executed(folder: str | Path) -> Any:
    """Return the notebook with the outputs of a run in a folder, and nothing of the machine or the time."""
    from nbclient import NotebookClient

    notebook = stored()
    metadata = dict(notebook.metadata)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", record_timing=False, resources=resources).execute()
    notebook.metadata = {name: metadata[name] for name in ("kernelspec", "language_info")}
    return notebook


if __name__ == "__main__":
    # The tables' width is the user's.
    os.environ.pop("COLUMNS", None)
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(executed(scratch), NOTEBOOK)
    sys.stdout.write(f"{NOTEBOOK.name} has the outputs of this run\n")
