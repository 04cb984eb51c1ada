"""A table whose rows lie in several processes: ids go to where their rows are, and rows come back, by all-to-all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Exchange(torch.autograd.Function):
    """Send rows to the processes that asked for them; their gradients come back the same way, as a mean over all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        # Each process descends the mean loss of its own batch; the joint loss is the mean of these.
        gradient = gradients[0] / dist.get_world_size(ctx.group)
        return _all_to_all(gradient, received, sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class ShardedTable(nn.Module):
    """An embedding table of which every process holds each n-th row.

    Args:
        rows: of the whole table.
        width: of a row.
        unique: whether an id that a batch has many times is sent once.
        wire: the dtype in which rows and their gradients travel.
        device: of the rows.
        group: of processes; default: all.
    """

    def __init__(
        self, rows: int, width: int, unique: bool, wire: torch.dtype, device: torch.device, group: Any = None
    ) -> None:
        super().__init__()
        self.group, self.unique, self.wire = group, unique, wire
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        own = len(range(self.rank, rows, self.world))
        self.weight = nn.Parameter(torch.empty(own, width, device=device).normal_())

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of some ids, `[*ids.shape, width]`, in float32."""
        asked = ids.flatten()
        if self.unique:
            asked, place = torch.unique(asked, return_inverse=True)
        owner = asked % self.world
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=self.world)
        counts_of_others = torch.empty_like(counts)
        dist.all_to_all_single(counts_of_others, counts, group=self.group)
        # The one wait for the GPU: the host must know how much to exchange.
        sent, received = torch.stack((counts, counts_of_others)).tolist()
        wanted = _all_to_all(asked[order] // self.world, sent, received, self.group)
        rows = F.embedding(wanted, self.weight, sparse=True).to(self.wire)
        found = _Exchange.apply(rows, received, sent, self.group).float()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return found.index_select(0, inverse[place] if self.unique else inverse).view(*ids.shape, -1)


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state for each row, for sparse gradients: what large tables are usually trained with.

    Args:
        parameters: tables.
        lr: the step size.
        eps: added to the root of a row's sum of squares.
    """

    def __init__(self, parameters: Any, lr: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for table in group["params"]:
                gradient = table.grad.coalesce()
                index, values = gradient.indices()[0], gradient.values()
                state = self.state[table]
                if not state:
                    state["squares"] = torch.zeros(len(table), device=table.device)
                squares = state["squares"].index_select(0, index) + values.square().mean(1)
                state["squares"].index_copy_(0, index, squares)
                table.index_add_(0, index, values / (squares.sqrt() + group["eps"])[:, None], alpha=-group["lr"])
