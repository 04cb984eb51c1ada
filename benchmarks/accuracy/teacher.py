"""The trained dense model, from which a run may learn beside labels and may start.

Learning from it is distillation (Hinton, Vinyals, Dean, 2015).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.accuracy import nets
from benchmarks.accuracy.runs import Run, as_row
from benchmarks.accuracy.tasks import Task

# What both models' logits are divided by where a run does not say.
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Teacher:
    """A trained model whose outputs another learns.

    Args:
        model: in eval mode and frozen.
        share: of the loss that its outputs make; labels make the rest.
        temperature: what logits are divided by.
    """

    model: nn.Module
    share: float
    temperature: float

    def mixed(self, label_loss: Tensor, logits: Tensor, x: Tensor) -> Tensor:
        """Return the loss of a batch: (1 - share) · label_loss + share · temperature² · KL(teacher ‖ student).

        Args:
            label_loss: of the same batch.
            logits: the student's.
            x: the batch, as the student got it.
        """
        with torch.no_grad():
            theirs = F.log_softmax(self.model(x).float() / self.temperature, -1)
        ours = F.log_softmax(logits.float() / self.temperature, -1)
        # Gradients of softened outputs are smaller by the square of the temperature.
        apart = self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - self.share) * label_loss + self.share * apart


def dense_run(run: Run, task: Task) -> Run:
    """Return the run that trains the dense model which a run wants: by its own recipe, from the same seed.

    Its rate and epochs are the first of the task's grid (0.4 for 24 epochs on ResNet-9, 2e-3 for 1 on IMDB), which is
    what the dense model's trials chose for every task. A trial's never sees the examples that judge the trial.
    """
    rate, epochs = task.grid[0]
    return Run(run.task, "dense", 1.0, run.seed, rate, epochs, run.trial)


def path_of(dense: Run, task: Task, folder: Path, device: str) -> Path:
    """Return where a teacher is kept, by all that it depends on; the folder is by the data."""
    what = [as_row(dense), dataclasses.asdict(task), torch.device(device).type]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    held_out = "-trial" if dense.trial else ""
    return folder / f"teacher-{dense.task}-{dense.seed}{held_out}-{digest}.safetensors"


def dense_weights(
    run: Run, task: Task, folder: Path, device: str, trained: Callable[[Run], nn.Module]
) -> dict[str, Tensor]:
    """Return the trained dense model's state dict, from its file; the first run that needs it makes that.

    Args:
        run: the run that wants it.
        task: its task.
        folder: of the task's arrays, and of its dense models.
        device: where both are trained.
        trained: trains the model of a run.
    """
    dense = dense_run(run, task)
    path = path_of(dense, task, folder, device)
    if not path.exists():
        _write(path, trained(dense))
    return load_file(path)


def teacher_of(run: Run, task: Task, weights: Mapping[str, Tensor], device: str) -> Teacher:
    """Return a distilled run's teacher, of the trained dense model's weights."""
    model = nets.dense_net(task)
    model.load_state_dict(weights)
    model = nets.laid_out(model.to(device), task).eval().requires_grad_(False)
    return Teacher(model, run.change("distill"), run.change("temperature", TEMPERATURE))


def _write(path: Path, model: nn.Module) -> None:
    # Each process by a name of its own: several may make the same teacher, and readers see a whole file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, part)
    os.replace(part, path)
