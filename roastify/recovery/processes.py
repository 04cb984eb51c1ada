"""The processes of a recovery under torchrun: each takes its share of the batches, and the first one writes."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from roastify.errors import ConfigError


class Processes:
    """The processes that run one recovery together; a process that runs alone is one of these too.

    All processes draw the same batches, and each trains on every `count`-th of them. Gradients and losses are means
    over the processes, so all of them make the same steps and the same decisions.

    Args:
        device: the device of this process's models.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, logs and the progress bar, and runs `evaluate`."""
        return self.rank == 0

    def check_equal(self, what: dict[str, str]) -> None:
        """Raise `ConfigError` in every process if something that all must have in common differs between them.

        Args:
            what: digests by what they are of.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, what)
        for name in what:
            other = next((rank for rank, each in enumerate(found) if each[name] != found[0][name]), None)
            if other is not None:
                raise ConfigError(
                    f"process {other} has another {name} than process 0; all processes must be given the same {name}: "
                    f"recover itself gives each process its share of the batches, so leave out DistributedSampler, and "
                    f"seed what draws random numbers alike"
                )

    def share_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace gradients by their means over the processes; one that no process has stays None."""
        if self.count == 1:
            return
        has = torch.tensor([float(each.grad is not None) for each in parameters], device=self.device)
        dist.all_reduce(has)
        wanted = [each for each, number in zip(parameters, has.tolist(), strict=True) if number]
        # One message for each dtype: most of a converted model's gradients are tiny beside the pool's.
        for dtype in dict.fromkeys(each.dtype for each in wanted):
            alike = [each for each in wanted if each.dtype == dtype]
            flat = torch.cat([_or_zeros(each.grad, each).reshape(-1) for each in alike])
            dist.all_reduce(flat)
            flat /= self.count
            for each, part in zip(alike, flat.split([each.numel() for each in alike]), strict=True):
                if each.grad is None:
                    each.grad = torch.empty_like(each)
                each.grad.copy_(part.view_as(each))

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of numbers over the processes."""
        if self.count == 1 or not values:
            return values
        total = torch.stack([value.reshape(()) for value in values.values()])
        dist.all_reduce(total)
        return dict(zip(values, (total / self.count).unbind(), strict=True))

    def copy_first(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, such as the statistics of batch norms."""
        if self.count > 1:
            with torch.no_grad():
                for tensor in itertools.chain(model.parameters(), model.buffers()):
                    sent = tensor.detach().contiguous()
                    dist.broadcast(sent, 0)
                    tensor.copy_(sent)

    def of_first(self, value: Any) -> Any:
        """Return the value that the first process has."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]


def _or_zeros(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad.detach()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Open the process group that torchrun describes, unless the program has opened it, and close it again."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1 or not dist.is_available() or dist.is_initialized()
    if not alone:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device)
    finally:
        if not alone:
            dist.destroy_process_group()
