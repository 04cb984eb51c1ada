"""What blocks of pages take for granted: small models, data, files and folders, by the names that the pages give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import roastify

MODEL_FILE = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
example_inputs = torch.randn(8, 64)
"""
DATA_FILE = """
import torch

data = list(torch.randn(64, 64).split(16))
"""


class Net(nn.Module):
    """A small classifier in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def _images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _artifact(folder: str, model: Callable[[], nn.Module] = Net) -> None:
    roastify.save(roastify.convert(model(), ratio=4), folder)


def _digest() -> str:
    return hashlib.sha256(Path("out/roast.json").read_bytes()).hexdigest()


def _language_model() -> None:
    """Write a llama and its tokenizer where the name of one on the hub leads: a folder goes before the hub."""
    import tokenizers
    import transformers

    folder = "HuggingFaceTB/SmolLM2-135M"
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "the", "cat", "sat", "on", "mat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _classifier() -> nn.Module:
    import transformers

    # The same weights each time: adapters are of one base.
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes))


def _one_process() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=0, world_size=1)


def _x() -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def _batches() -> list[Tensor]:
    return list(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).split(16))


def _labelled() -> list[dict[str, Tensor]]:
    words = torch.randint(100, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each, "labels": torch.tensor([0, 1, 0, 1])} for each in words]


SETUPS: dict[str, Callable[[], Any]] = {
    "model": Net,
    "dense": lambda: Net().eval(),
    "teacher": lambda: Net().eval(),
    "fresh": Net,
    "Model": lambda: Net,
    "base": _classifier,
    "build_model": lambda: _images,
    "converted": lambda: roastify.convert(Net(), ratio=4),
    "x": _x,
    "y": lambda: torch.arange(16) % 10,
    "loader": _batches,
    "batches": _batches,
    "labelled": _labelled,
    "words": lambda: {"input_ids": torch.arange(32).view(2, 16)},
    "digest": _digest,
    "student": lambda: roastify.convert(Net(), ratio=4, init="project"),
    # Files, folders and processes: no name leads to them.
    "out/": lambda: _artifact("out/"),
    "out/ of transformers": lambda: _artifact("out/", _classifier),
    "model.py": lambda: Path("model.py").write_text(MODEL_FILE),
    "data.py": lambda: Path("data.py").write_text(DATA_FILE),
    "SmolLM2-135M": _language_model,
    "a process group": _one_process,
}
