"""Training on several GPUs, or CPU processes, with DDP or FSDP2.

torchrun --standalone --nproc-per-node 2 examples/distributed.py [--fsdp] [--steps 50] [--output out/distributed]
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import roastify

WORDS, WIDTH = 256, 128


class NextWord(nn.Module):
    """Scores of the next word, from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Sequential(nn.Linear(2 * WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.head(self.body(self.words(pairs).flatten(1)))


def build_model() -> NextWord:
    return NextWord()


def example_inputs() -> Tensor:
    return torch.randint(0, WORDS, (32, 2), generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="out/distributed")
    settings = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    # The same weights in every process, then the same conversion. Wrapping comes last.
    torch.manual_seed(0)
    converted = roastify.convert(build_model().to(device), ratio=10, inplace=True)
    if settings.fsdp:
        model = fully_shard(converted, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(converted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(settings.steps):
        pairs = torch.randint(0, WORDS, (512, 2), generator=generator).to(device)
        loss = F.cross_entropy(model(pairs), pairs[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    # Gathering takes every process; writing takes one.
    values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        roastify.save(converted, settings.output, state_dict=values)
        print(f"written to {settings.output}")
    # No process ends while another still works.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
