"""What test_recover_loop.py recovers, alone and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import roastify
from roastify.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def batches(count: int = 8, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(8 * count, 16, generator=torch.Generator().manual_seed(seed)).split(8))


def teacher(trained: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net()
    if trained:
        for x in batches():
            model(x)
    return model.eval()


def student_of(model: Net) -> Net:
    config = roastify.RoastConfig(tile="8x8", share="weights", min_numel=64)
    return roastify.convert(model, 4, init="project", config=config)


def recover_together(folder: Path) -> tuple[dict[str, Tensor], list[Any], list[Any], list[str]]:
    """Return the student's values, the loss curve, the evaluations and what `on_log` got."""
    dense = teacher()
    student = student_of(dense)
    logged: list[str] = []
    report = roastify.recover(
        student,
        dense,
        batches(),
        3,
        log_every=1,
        folder=folder,
        evaluate=lambda model: 7.0,
        on_log=lambda numbers: logged.append(str(sorted(numbers))),
    )
    return student.state_dict(), [point.loss for point in report.losses], list(report.evaluations), logged


def recover_apart() -> str:
    """Return why a recovery is refused whose processes have other data."""
    dense = teacher()
    try:
        roastify.recover(student_of(dense), dense, batches(seed=dist.get_rank()), 3)
    except ConfigError as error:
        return str(error)
    return ""
