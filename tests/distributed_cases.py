"""What test_distributed.py runs in two processes: training, checkpoints and artifacts of a small converted model."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import roastify
from roastify.conversion.converted import find_pool
from roastify.errors import RoastError

WORDS, WIDTH, LENGTH, BATCH = 96, 64, 8, 4
STEPS = 4
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
Values = dict[str, Tensor]
STATE = "roast_pool._extra_state"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Words → scores of words; `skip` leaves out the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor, skip: bool = False) -> Tensor:
        x = self.words(words)
        for block in self.blocks[: 1 if skip else 2]:
            x = block(x)
        return self.head(x)


class Checkpointed(Net):
    """The same model with checkpointed blocks; reentrant checkpointing runs a backward pass for each block."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, words: Tensor, skip: bool = False) -> Tensor:
        x = self.words(words)
        for block in self.blocks[: 1 if skip else 2]:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


class Experts(nn.Module):
    """A model in which a batch may use none of the shared tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WORDS))
        self.layer = nn.Linear(WORDS, WORDS, bias=False)

    def forward(self, words: Tensor, skip: bool = False) -> Tensor:
        x = F.one_hot(words, WORDS).float() * self.scale
        return x if skip else x + self.layer(x)


class Convolutions(nn.Module):
    """Words as the pixels of an image, through two convolutions whose kernels have a basis."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor, skip: bool = False) -> Tensor:
        x = self.words(words).transpose(1, 2).unflatten(2, (2, LENGTH // 2))
        for block in self.blocks[: 1 if skip else 2]:
            x = x + F.gelu(block(x))
        return self.head(x.flatten(2).transpose(1, 2))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.Linear(WIDTH, WORDS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "sequential": sequential,
    "convolutions": Convolutions,
    "checkpointed": lambda: Checkpointed(False),
    "reentrant": lambda: Checkpointed(True),
    "experts": Experts,
}


def converted(name: str = "net") -> nn.Module:
    """Return a converted model, the same in every process."""
    torch.manual_seed(0)
    return roastify.convert(MODELS[name](), 4 if name != "experts" else 2, inplace=True)


def batches(step: int) -> list[Tensor]:
    """Return the two processes' batches of a step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator) for _ in range(2)]


def loss_of(model: nn.Module, words: Tensor, *settings: Any) -> Tensor:
    return F.cross_entropy(model(words, *settings).float().flatten(0, 1), words.roll(1, 1).flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train_alone(model: nn.Module, steps: range = range(STEPS), skips: tuple[Any, ...] = ((), ())) -> nn.Module:
    """Train on the joint batches in one process."""
    optimizer = optimizer_of(model)
    for step in steps:
        optimizer.zero_grad()
        losses = [loss_of(model, words, *skip) for words, skip in zip(batches(step), skips, strict=True)]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def train_together(
    model: nn.Module,
    steps: range = range(STEPS),
    skips: tuple[Any, ...] = ((), ()),
    parts: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Train on this process's batches; each batch is cut into `parts`, whose gradients accumulate."""
    rank = dist.get_rank()
    optimizer = optimizer or optimizer_of(model)
    for step in steps:
        optimizer.zero_grad()
        pieces = batches(step)[rank].chunk(parts)
        for index, words in enumerate(pieces):
            with contextlib.nullcontext() if index == parts - 1 else model.no_sync():
                (loss_of(model, words, *skips[rank]) / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


class Counted:
    """Counts how many elements were all-reduced, and how often the pool was among them."""

    def __init__(self, pool: nn.Parameter) -> None:
        self.pool = pool
        self.elements = 0
        self.pools = 0


def count_and_average(counted: Counted, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket, as DDP does without a hook, and count it."""
    counted.elements += bucket.buffer().numel()
    counted.pools += sum(parameter is counted.pool for parameter in bucket.parameters())
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)


def ddp(settings: dict[str, Any], name: str, skips: tuple[Any, ...], parts: int) -> tuple[Values, Values, Any]:
    """Return the weights of one process and of two, how often the pool was all-reduced, and how many elements were."""
    model = DistributedDataParallel(converted(name), **settings)
    counted = Counted(model.module.roast_pool.weight)
    model.register_comm_hook(counted, count_and_average)
    train_together(model, skips=skips, parts=parts)
    alone = train_alone(converted(name), skips=skips)
    numel = sum(parameter.numel() for parameter in alone.parameters())
    return alone.state_dict(), model.module.state_dict(), (counted.pools, counted.elements / numel)


def ddp_refusal(name: str) -> str:
    """Return the error that DDP without settings raises for a model that it refuses."""
    try:
        train_together(DistributedDataParallel(converted(name)))
    except RuntimeError as error:
        return str(error)
    raise AssertionError("DDP took the model")


def convert_wrapped() -> str:
    """Return the error of a conversion of a wrapped model."""
    try:
        roastify.convert(DistributedDataParallel(Net()), 4)
    except RoastError as error:
        return str(error)
    raise AssertionError("the wrapper was converted")


def ddp_narrow() -> tuple[Values, Values]:
    """Return the weights of one process, and of two that exchange gradients in float16 (bfloat16 needs NCCL)."""
    model = DistributedDataParallel(converted())
    model.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)
    return train_alone(converted()).state_dict(), train_together(model).module.state_dict()


def shard(model: nn.Module, by_block: bool, **settings: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [module for module in model.modules() if isinstance(module, Block)] if by_block else []:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def fsdp(name: str, by_block: bool, settings: dict[str, Any]) -> tuple[Values, Values, int]:
    """Return the weights of one process and of two, and how many elements of the pool this process holds."""
    model = train_together(shard(converted(name), by_block, **settings))
    alone = train_alone(converted(name)).state_dict()
    return alone, get_model_state_dict(model, options=FULL), find_pool(model).weight.to_local().numel()


def fsdp_accumulating(way: str) -> tuple[Values, Values, list[int]]:
    """Return the weights of one process and of two that accumulate gradients, and how many each backward pass sharded.

    Args:
        way: "sync": gradients stay whole until the last backward pass shards them; "last": each backward pass shards
            them, and the last one also waits for the communication of the others.
    """
    model = shard(converted(), True)
    optimizer = optimizer_of(model)
    shared_out = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pieces = batches(step)[dist.get_rank()].chunk(2)
        for index, words in enumerate(pieces):
            last = index == len(pieces) - 1
            model.set_is_last_backward(last)
            if way == "sync":
                model.set_requires_gradient_sync(last)
            (loss_of(model, words) / len(pieces)).backward()
            shared_out.append(sum(parameter.grad is not None for parameter in model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return train_alone(converted()).state_dict(), get_model_state_dict(model, options=FULL), shared_out


def fsdp_narrow() -> tuple[Values, Values, set[torch.dtype], set[torch.dtype]]:
    """Return what `fsdp` does, with mixed precision; then the dtypes of layers' outputs and those of parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(converted(), True, mp_policy=policy)
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train_together(model)
    kept = {tensor.dtype for parameter in model.parameters() for tensor in (parameter, parameter.grad)}
    return train_alone(converted()).state_dict(), get_model_state_dict(model, options=FULL), seen, kept


def resume(folder: str, wrapped: str) -> tuple[Values, Values, Tensor, Tensor]:
    """Save after two steps with torch.distributed.checkpoint, resume in a new model, and load into a plain model too.

    Returns:
        the weights of a run without a break and of the resumed run; the outputs of the saved model and of the plain
        model that loaded the checkpoint.
    """

    def wrap() -> nn.Module:
        model = converted()
        return shard(model, True) if wrapped == "fsdp" else DistributedDataParallel(model)

    model = wrap()
    optimizer = optimizer_of(model)
    train_together(model, range(2), optimizer=optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    other = wrap()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again = optimizer_of(other)
    weights, state = get_state_dict(other, again)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
    plain = converted()
    values = {"model": plain.state_dict()}
    dcp.load(values, checkpoint_id=folder)
    plain.load_state_dict(values["model"])
    words = batches(99)[0]
    with torch.no_grad():
        outputs = model(words), plain(words)
    train_together(model, range(2, STEPS), optimizer=optimizer)
    train_together(other, range(2, STEPS), optimizer=again)
    return get_model_state_dict(model, options=FULL), get_model_state_dict(other, options=FULL), *outputs


def artifact(folder: str, wrapped: str) -> tuple[Tensor, Tensor, list[str]]:
    """Write an artifact as documented; return both models' outputs, and the errors of undocumented attempts."""
    model = converted()
    model = shard(model, False) if wrapped == "fsdp" else DistributedDataParallel(model)
    train_together(model)
    refusals = []
    for attempt in (lambda: roastify.save(model, folder), lambda: roastify.densify(model)):
        try:
            attempt()
        except RoastError as error:
            refusals.append(str(error))
    assert not Path(folder).exists()
    dist.barrier()
    if wrapped == "fsdp":
        values = get_model_state_dict(model, options=FULL)
        if dist.get_rank() == 0:
            roastify.save(model, folder, state_dict=values)
    elif dist.get_rank() == 0:
        roastify.save(model.module, folder)
    dist.barrier()
    words = batches(99)[0]
    with torch.no_grad():
        return model(words), roastify.load(folder, MODELS["net"]())(words), refusals


def read_in_parts() -> tuple[list[str], Tensor, Tensor]:
    """Read a sharded model's weight outside of its forward; return the errors, the gathered weight and the expected."""
    model = shard(converted(), False)
    refusals = []
    for attempt in (lambda: model.head.weight, lambda: model.head(torch.zeros(1, WIDTH))):
        try:
            attempt()
        except RoastError as error:
            refusals.append(str(error))
    model.unshard()
    weight = model.head.weight.detach().clone()
    model.reshard()
    return refusals, weight, converted().head.weight.detach()
