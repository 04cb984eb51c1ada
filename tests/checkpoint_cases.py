"""What test_distributed.py runs with checkpoints: saved on some processes, resumed on others, killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

SAVED_AFTER = 2


class Run:
    """A converted model in training on the first processes; the joint batch of a step is the same on any number.

    Args:
        wrapped: `ddp` or `fsdp`.
        size: how many processes train.
    """

    def __init__(self, wrapped: str, size: int) -> None:
        self.size = size
        # All processes make the group, also those outside of it.
        self.group = dist.new_group(list(range(size)))
        self.takes_part = dist.get_rank() < size
        if self.takes_part:
            self.model = self._wrapped(cases.converted(), wrapped)
            self.optimizer = cases.optimizer_of(self.model)

    def _wrapped(self, model: nn.Module, wrapped: str) -> nn.Module:
        if wrapped == "ddp":
            return DistributedDataParallel(model, process_group=self.group)
        mesh = DeviceMesh.from_group(self.group, "cpu")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def steps(self, steps: range) -> list[float]:
        """Take some steps; return the loss of each on the joint batch."""
        losses = []
        for step in steps:
            self.optimizer.zero_grad()
            loss = cases.loss_of(self.model, torch.cat(cases.batches(step)).chunk(self.size)[dist.get_rank()])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            joint = loss.detach().clone()
            dist.all_reduce(joint, group=self.group)
            losses.append(float(joint) / self.size)
        return losses

    def save(self, folder: str | Path, **settings: Any) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        values = {"model": weights, "optimizer": state}
        dcp.save(values, checkpoint_id=None if settings else folder, process_group=self.group, **settings)

    def load(self, folder: str | Path) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=self.group)
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=state)

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights, in the first process."""
        return get_model_state_dict(self.model, options=cases.FULL)


def without_break() -> tuple[list[float], dict[str, Tensor]]:
    """Return losses and weights of one process that takes all steps on the joint batches."""
    model = cases.converted()
    losses = []
    for step in range(cases.STEPS):
        with torch.no_grad():
            losses.append(float(torch.stack([cases.loss_of(model, words) for words in cases.batches(step)]).mean()))
        if step == 0:
            optimizer = cases.optimizer_of(model)
        optimizer.zero_grad()
        torch.stack([cases.loss_of(model, words) for words in cases.batches(step)]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses, model.state_dict()


def resumed_elsewhere(
    folder: str, saved: tuple[str, int], loaded: tuple[str, int]
) -> tuple[list[float], dict[str, Tensor]] | None:
    """Train and save on some processes, and resume on another number of them; return losses and weights.

    Args:
        folder: of the checkpoint.
        saved: the wrapper, and the number of processes, of the run that saves.
        loaded: those of the run that resumes.

    Returns:
        the losses of all steps and the weights after them, in the first process; None in the others.
    """
    losses = []
    for (wrapped, size), steps in ((saved, range(SAVED_AFTER)), (loaded, range(SAVED_AFTER, cases.STEPS))):
        run = Run(wrapped, size)
        if run.takes_part:
            if steps.start:
                run.load(folder)
            losses += run.steps(steps)
            if not steps.start:
                run.save(folder)
            weights = run.weights()
        dist.barrier()
    return (losses, weights) if dist.get_rank() == 0 else None


class _Killed(dcp.FileSystemWriter):
    """Kills its process when all values are written and what makes a checkpoint of them is not."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def last_whole(folder: Path) -> Path:
    """Return the last checkpoint that was saved to its end: `.metadata` is written last, and appears whole."""
    return max((each for each in folder.iterdir() if (each / ".metadata").exists()), key=lambda each: int(each.name))


def trained_until_killed(folder: str, wrapped: str) -> None:
    """Save after every step, until the first process is killed while it saves the third step."""
    run = Run(wrapped, dist.get_world_size())
    for step in range(cases.STEPS):
        run.steps(range(step, step + 1))
        place = Path(folder) / str(step + 1)
        run.save(place, **({"storage_writer": _Killed(place)} if step == SAVED_AFTER else {}))


def resumed_after_the_kill(folder: str, wrapped: str) -> tuple[str, list[float], dict[str, Tensor]]:
    """Resume from the last whole checkpoint; return its name, the losses since, and the weights."""
    run = Run(wrapped, dist.get_world_size())
    place = last_whole(Path(folder))
    run.load(place)
    losses = run.steps(range(int(place.name), cases.STEPS))
    return place.name, losses, run.weights()
