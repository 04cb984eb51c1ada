"""What files of raw rows have in common: where a row was measured, and writing that a killed run survives."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import roastify


def machine(device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "numpy": np.__version__,
        "roastify": roastify.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a killed run leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
