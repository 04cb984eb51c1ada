"""A training step whose inputs lie on the device, so that one CUDA graph holds all of it."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.inputs import Epoch, Examples, augmented
from benchmarks.accuracy.teacher import Teacher

_WARM_UP = 3


class CaptureError(RuntimeError):
    """The step could not be captured; the process's CUDA state is not to be trusted any more."""


class CapturedStep(abc.ABC):
    """A training step that can be one CUDA graph: `run` takes everything it needs from tensors that it advances.

    Args:
        model: what is trained.
        optimizer: its learning rates are tensors.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None

    @abc.abstractmethod
    def run(self) -> None:
        """Take a step without the graph."""

    @abc.abstractmethod
    def counters(self) -> list[Tensor]:
        """Return what a step advances beside model and optimizer."""

    def __call__(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def capture(self) -> None:
        """Make the CUDA graph; model, optimizer and counters are left as they were.

        Raises:
            CaptureError: something in the step cannot be captured.
        """
        try:
            # Only here: each net's other shapes, in evaluation, are not worth a search.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                self.graph = self._captured()
        except torch.OutOfMemoryError:
            # Without a graph it would take as much.
            raise
        except RuntimeError as error:
            raise CaptureError(str(error)) from error

    def _captured(self) -> torch.cuda.CUDAGraph:
        with self._retained():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    @contextlib.contextmanager
    def _retained(self) -> Iterator[None]:
        """Put back all that steps change: a fresh optimizer's state is zeros."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.counters()]
        saved = [tensor.detach().clone() for tensor in tensors]
        yield
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()


class Step(CapturedStep):
    """One step: the next batch, forward, backward, optimizer, and the step size of the next.

    Args:
        model: what is trained.
        optimizer: its learning rates are tensors.
        factors: for each of its parameter groups, what the schedule is multiplied by.
        schedule: learning rates, one a step.
        examples: what is trained on.
        epoch: order and augmentation; drawn anew before each epoch.
        batch: examples in a step.
        hole: side of the square that is cut out of images, or 0.
        smoothing: of the labels.
        autocast: makes the context of the forward passes.
        teacher: what the model learns from beside labels, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        factors: Sequence[float],
        schedule: Tensor,
        examples: Examples,
        epoch: Epoch,
        batch: int,
        hole: int,
        smoothing: float,
        autocast: Callable[[], contextlib.AbstractContextManager],
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        self.factors, self.schedule = factors, schedule
        self.examples, self.epoch, self.batch = examples, epoch, batch
        self.hole, self.smoothing, self.autocast, self.teacher = hole, smoothing, autocast, teacher
        device = schedule.device
        self.along = torch.arange(batch, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def begin_epoch(self) -> None:
        self.position.zero_()
        self.loss.zero_()

    def counters(self) -> list[Tensor]:
        return [self.position, self.done, self.loss]

    def run(self) -> None:
        rate = self.schedule.index_select(0, self.done).squeeze(0)
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"].copy_(rate * factor)
        places = self.position + self.along
        chosen = self.epoch.order[places]
        examples = self.examples
        if examples.x.dim() == 4:
            x = augmented(examples.x, chosen, self.epoch, places, self.hole)
        else:
            x = examples.x[chosen]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, examples.y[chosen], label_smoothing=self.smoothing)
            if self.teacher is not None:
                loss = self.teacher.mixed(loss, logits, x)
        loss.backward()
        self.optimizer.step()
        self.loss += loss.detach()
        self.done += 1
        self.position += self.batch
