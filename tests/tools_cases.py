"""What test_tools.py runs in two processes: wraps of a small converted model that must work, or must say no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import (
    FULL,
    STEPS,
    Values,
    batches,
    converted,
    optimizer_of,
    shard,
    train_alone,
    train_together,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from roastify.conversion.converted import find_pool
from roastify.errors import RoastError

WIDTH = 64


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def pool_gradient(model: nn.Module) -> list[Tensor]:
    """Return the pool's gradients of all processes."""
    pool = find_pool(model)
    assert pool is not None
    gradient = pool.weight.grad
    assert gradient is not None
    found = [torch.zeros_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(found, gradient)
    return found


def zero_redundancy() -> tuple[Values, Values]:
    """Return the weights of one process, and of two that split the optimizer's state (ZeRO-1)."""
    # Here, because this import warns, which is an error in the tests' own process.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(converted())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    train_together(model, optimizer=optimizer)
    return train_alone(converted()).state_dict(), model.module.state_dict()


def _blocks_without_root() -> tuple[nn.Module, Tensor]:
    model = converted()
    for block in model.blocks:
        fully_shard(block, mesh=mesh())
    return model, batches(0)[dist.get_rank()]


def _part_of_a_model() -> tuple[nn.Module, Tensor]:
    part = converted().blocks[0]
    fully_shard(part, mesh=mesh())
    return part, torch.ones(2, WIDTH) * (1 + dist.get_rank())


def _copy_of_a_part() -> tuple[nn.Module, Tensor]:
    part = copy.deepcopy(converted().blocks[0])
    fully_shard(part, mesh=mesh())
    return part, torch.ones(2, WIDTH) * (1 + dist.get_rank())


def _new_model_of_converted_layers() -> tuple[nn.Module, Tensor]:
    model = converted()
    new = nn.Sequential(model.words, *model.blocks, model.head)
    fully_shard(new, mesh=mesh())
    return new, batches(0)[dist.get_rank()]


WRAPS = {
    "blocks": _blocks_without_root,
    "part": _part_of_a_model,
    "copy": _copy_of_a_part,
    "new model": _new_model_of_converted_layers,
}


def wrapped_without_pool(way: str) -> tuple[str, bool]:
    """Shard modules that read the pool, but not the pool.

    Returns:
        the error of the first forward, and whether the processes have the pool's same gradient if there was none.
    """
    try:
        model, x = WRAPS[way]()
        model(x).float().square().mean().backward()
    except RoastError as error:
        return str(error), True
    first, second = pool_gradient(model)
    return "", torch.equal(first, second)


def new_model_with_the_pool() -> tuple[Values, Values]:
    """Return the weights of one process, and of two that shard a new model, which has the pool as its first child."""
    model = converted()
    new = nn.Sequential(model.roast_pool, model.words, *model.blocks, model.head)
    together = get_model_state_dict(train_together(shard(new, True)), options=FULL)
    alone = converted()
    plain = nn.Sequential(alone.roast_pool, alone.words, *alone.blocks, alone.head)
    return train_alone(plain).state_dict(), together


def every_layer_then_root() -> tuple[Values, Values]:
    """Return the weights of one process, and of two that shard every layer on its own and the model last."""
    model = converted()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            fully_shard(module, mesh=mesh())
    train_together(fully_shard(model, mesh=mesh()))
    return train_alone(converted()).state_dict(), get_model_state_dict(model, options=FULL)


def state_dicts() -> tuple[list[str], list[Values]]:
    """Hand weights and optimizer's state of a sharded model to a fresh one, and weights of a plain model to another.

    Returns:
        the names in the sharded state dict; then, in pairs that should be equal, weights given and weights found.
    """
    model = shard(converted(), True)
    optimizer = optimizer_of(model)
    train_together(model, range(2), optimizer=optimizer)
    weights, state = get_model_state_dict(model), copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = shard(converted(), True)
    again = optimizer_of(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    set_model_state_dict(other, weights)
    set_optimizer_state_dict(other, again, state)
    train_together(model, range(2, STEPS), optimizer=optimizer)
    train_together(other, range(2, STEPS), optimizer=again)
    pairs = [get_model_state_dict(each, options=FULL) for each in (model, other)]

    plain, third = train_alone(converted(), range(1)), shard(converted(), True)
    own = plain.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(third, own, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    pairs += [plain.state_dict(), get_model_state_dict(third, options=FULL)]
    return list(weights), pairs


def tensor_parallel() -> tuple[list[str], bool]:
    """Try to split single layers over the processes; return the errors, and whether the model is as it was."""
    model = converted()
    words = batches(0)[0]
    before = model(words).detach()
    errors = []

    def assign() -> None:
        weight = distribute_tensor(model.head.weight.detach().clone(), mesh(), [Shard(0)])
        model.head.weight = nn.Parameter(weight)

    attempts: list[Callable[[], Any]] = [
        lambda: parallelize_module(model, mesh(), {"blocks.0.up": ColwiseParallel()}),
        lambda: parallelize_module(model, mesh(), {"words": RowwiseParallel()}),
        assign,
        lambda: parallelize_module(model, mesh(), {"blocks.1.down": RowwiseParallel()}),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (RoastError, RuntimeError) as error:
            errors.append(str(error))
        else:
            errors.append("")
    return errors, torch.equal(model(words), before)


def stages() -> tuple[Tensor, Tensor]:
    """Return the pool's gradient of one process, and the sum of those of two stages of a pipeline."""
    rank, words = dist.get_rank(), batches(0)[0]
    model = converted()
    parts = [nn.Sequential(model.words, model.blocks[0]), nn.Sequential(model.blocks[1], model.head)]
    stage = PipelineStage(parts[rank], rank, 2, torch.device("cpu"))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    schedule = ScheduleGPipe(stage, 2, loss_fn=loss)
    if rank == 0:
        schedule.step(words)
    else:
        schedule.step(target=words.roll(1, 1))
    own = [each.grad for name, each in stage.submod.named_parameters() if name.endswith("roast_pool.weight")]
    gradient = torch.stack([each for each in own if each is not None]).sum(0)
    dist.all_reduce(gradient)

    alone = converted()
    for piece, target in zip(words.chunk(2), words.roll(1, 1).chunk(2), strict=True):
        (loss(alone(piece), target) / 2).backward()
    return alone.roast_pool.weight.grad, gradient
