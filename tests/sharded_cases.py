"""What test_distributed.py runs in two processes: a table that is sharded by rows, beside a whole one."""

from __future__ import annotations

import conftest  # noqa: F401  benchmarks is found through it
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.sharded_table import RowAdagrad, ShardedTable

ROWS, WIDTH, STEPS = 101, 5, 3


def trained(unique: bool, optimizer: str) -> tuple[Tensor, Tensor]:
    """Train a sharded table on this process's ids, and a whole one on everyone's.

    Returns:
        this process's rows, and the whole table's rows with the same ids.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, WIDTH, generator=generator)
    # Few ids, so that many are the same, and one process asks for rows of the other alone.
    ids = torch.randint(0, 20, (STEPS, world, 4, 6), generator=generator)
    ids[0, 0] = ids[0, 0] // 2 * 2 + 1
    wanted = torch.randn(STEPS, world, 4, 6, WIDTH, generator=generator)
    sharded = ShardedTable(ROWS, WIDTH, unique, torch.float32, torch.device("cpu"))
    whole = nn.Embedding(ROWS, WIDTH, sparse=True)
    with torch.no_grad():
        sharded.weight.copy_(values[rank::world])
        whole.weight.copy_(values)
    make = {"adam": torch.optim.SparseAdam, "adagrad": RowAdagrad}[optimizer]
    optimizers = [make(table.parameters(), lr=0.1) for table in (sharded, whole)]
    for step in range(STEPS):
        for of_table in optimizers:
            of_table.zero_grad()
        own = sharded(ids[step, rank])
        torch.testing.assert_close(own, whole(ids[step, rank]), rtol=0.0, atol=1e-6)
        (own - wanted[step, rank]).square().mean().backward()
        (whole(ids[step]) - wanted[step]).square().mean().backward()
        for of_table in optimizers:
            of_table.step()
    return sharded.weight.detach(), whole.weight.detach()[rank::world]
