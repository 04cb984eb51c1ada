"""What test_distributed.py runs of other kinds of parallel training: optimizer, pipeline, tensor, sequence, context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import distributed_cases as cases
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import roastify
from roastify.errors import RoastError

Values = dict[str, Tensor]


def zero1() -> tuple[Values, Values, int]:
    """Return the weights of one process and of two whose optimizer states are split, and this process's state bytes."""
    # Imported here: torch warns of its own code, and in the process of the tests warnings are errors.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(cases.converted())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    cases.train_together(model, optimizer=optimizer)
    states = [value for state in optimizer.optim.state.values() for value in state.values()]
    alone = cases.train_alone(cases.converted()).state_dict()
    return alone, model.module.state_dict(), sum(value.nbytes for value in states)


class Stage(nn.Module):
    """A part of a model of words; the first one has the table, and the last one the head."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(cases.WORDS, cases.WIDTH) if first else None
        self.block = cases.Block()
        self.head = nn.Linear(cases.WIDTH, cases.WORDS, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.words(x) if self.words is not None else x)
        return x if self.head is None else self.head(x)


def _stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [roastify.convert(Stage(index == 0, index == count - 1), 2, inplace=True) for index in range(count)]


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def pipeline_of_converted_stages(schedule: str, count: int) -> tuple[Values, Values]:
    """Return this process's stages after training in one process, and after training in a pipeline.

    Args:
        schedule: the name of one in torch.distributed.pipelining.
        count: how many stages; if there are more than processes, each process has several.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, count, world))
    alone, split = _stages(count), _stages(count)
    optimizers = [
        torch.optim.AdamW([each for stage in stages for each in stage.parameters()], lr=1e-2)
        for stages in (alone, [split[index] for index in mine])
    ]
    device = torch.device("cpu")
    stages = [pipelining.PipelineStage(split[index], index, count, device) for index in mine]
    runner = getattr(pipelining, schedule)(stages if count > world else stages[0], 4, loss_fn=_loss)
    for step in range(cases.STEPS):
        words = torch.cat(cases.batches(step))
        target = words.roll(1, 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        x = words
        for stage in alone:
            x = stage(x)
        _loss(x, target).backward()
        runner.step(*([words] if rank == 0 else []), **({"target": target} if count - 1 in mine else {}))
        for optimizer in optimizers:
            optimizer.step()

    def values(stages: list[nn.Module]) -> Values:
        named = {index: stages[index].state_dict() for index in mine}
        return {f"{index}.{name}": value for index in mine for name, value in named[index].items()}

    return values(alone), values(split)


def pipeline_of_a_converted_model() -> str:
    """Cut a converted model with torch's tracer; return the cause of its refusal."""
    try:
        spec = {"blocks.1": pipelining.SplitPoint.BEGINNING}
        pipelining.pipeline(cases.converted(), mb_args=(cases.batches(0)[0],), split_spec=spec)
    except RuntimeError as error:
        return str(error.__cause__)
    return "no refusal"


def _feed_forward(index: int) -> dict[str, ParallelStyle]:
    return {f"blocks.{index}.up": ColwiseParallel(), f"blocks.{index}.down": RowwiseParallel()}


def tensor_parallel_of_dense_layers() -> tuple[Values, Values]:
    """Return the weights of one process, and of two that split the layers which are not converted."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return roastify.convert(cases.Net(), 1.2, exclude="blocks", inplace=True)

    def train(model: nn.Module) -> Values:
        # One by one, without clipping: torch's functions of many tensors do not take plain ones and DTensors together.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for step in range(cases.STEPS):
            # Both processes have the joint batch: layers are split, and no batch.
            words = torch.cat(cases.batches(step))
            optimizer.zero_grad()
            _loss(model(words), words.roll(1, 1)).backward()
            optimizer.step()
        values = {name: value.detach() for name, value in model.named_parameters()}
        return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in values.items()}

    plan = _feed_forward(0) | _feed_forward(1)
    return train(model()), train(parallelize_module(model(), init_device_mesh("cpu", (2,)), plan))


def _split(plan: dict[str, ParallelStyle]) -> Callable[[], Any]:
    return lambda: parallelize_module(cases.converted(), init_device_mesh("cpu", (2,)), plan)(cases.batches(0)[0])


def _replicated() -> None:
    model = cases.converted()
    distribute_module(model, init_device_mesh("cpu", (2,)))
    model(cases.batches(0)[0])


REFUSED: dict[str, Callable[[], Any]] = {
    "tensor parallel": _split(_feed_forward(0)),
    "a table by rows": _split({"words": RowwiseParallel(input_layouts=Replicate())}),
    "sequence parallel": _split({"blocks.0.norm": SequenceParallel()}),
    "distributed input": _split(
        {"words": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=False)}
    ),
    "replicated": _replicated,
}


def refusal(name: str) -> str:
    """Return what the error says of a kind of parallel training that is not supported."""
    try:
        REFUSED[name]()
    except RoastError as error:
        return str(error)
    return "no refusal"


class Attention(nn.Module):
    """Causal attention between an embedding and a head, on whole sequences or on this process's part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(cases.WORDS, cases.WIDTH)
        # Without a bias: the gradient of the keys' bias is zero but for rounding, which AdamW would make a step of.
        self.project = nn.Linear(cases.WIDTH, 3 * cases.WIDTH, bias=False)
        self.head = nn.Linear(cases.WIDTH, cases.WORDS)

    def forward(self, words: Tensor, first: int = 0) -> Tensor:
        x = self.words(words)
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        if words.shape[1] < cases.LENGTH:
            # Torch 2.11 gathers contiguous tensors alone.
            key, value = (all_gather_tensor_autograd(each.contiguous(), 2, dist.group.WORLD) for each in (key, value))
        seen = torch.ones(words.shape[1], key.shape[2], dtype=torch.bool).tril(first)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.head(x + attended.transpose(1, 2).flatten(2))


def context_parallel() -> tuple[Values, Values]:
    """Return the weights of one process, and of two with half of every sequence each, which gather keys and values."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return roastify.convert(Attention(), 2, inplace=True)

    alone, split = model(), DistributedDataParallel(model())
    optimizers = [cases.optimizer_of(each) for each in (alone, split)]
    half = cases.LENGTH // 2
    first = dist.get_rank() * half
    for step in range(cases.STEPS):
        words = torch.cat(cases.batches(step))
        target = words.roll(1, 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(alone(words), target).backward()
        own = slice(first, first + half)
        _loss(split(words[:, own], first), target[:, own]).backward()
        for optimizer in optimizers:
            optimizer.step()
    return alone.state_dict(), split.module.state_dict()
