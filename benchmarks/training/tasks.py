"""What the training benchmark trains: models with random weights, batches of random data, losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.models import llama
from benchmarks.training.decoder import LeanDecoder
from roastify import RoastConfig

Batch = dict[str, Tensor]
# How a step is run. A graph first: its time is the GPU's own, where small models' steps are otherwise bound by Python.
GRAPHED, EAGER, COMPILED, REDUCED = MODES = ("graphed", "eager", "compiled", "reduce-overhead")
MASKED_SHARE = 0.15
NOT_ASKED = -100  # the label that torch's cross-entropy passes over


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on.

    Args:
        build: returns the dense model with random weights.
        batch: returns a batch on the CPU, of the given generator's random numbers.
        size: sequences, images or rows in a batch.
        shape: a batch in words.
        ratios: to convert at.
        time_aims: converted step time ÷ dense step time that the project set itself, for each mode that has an aim.
        blocks: the path of the list of blocks that FSDP2 shards one by one.
        channels_last: whether the model is laid out so.
        settings: of the conversion; default: convert's.
        dtype: of the parameters; their optimizer state has it too. Everything runs under bfloat16 autocast.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    size: int
    shape: str
    ratios: tuple[int, ...] = (10, 50)
    time_aims: Mapping[str, float] = field(default_factory=dict)
    blocks: str = ""
    channels_last: bool = False
    settings: RoastConfig | None = None
    dtype: torch.dtype = torch.float32

    def model(self, device: torch.device) -> nn.Module:
        """Build the model on the device, with the same weights every time."""
        torch.manual_seed(0)
        with torch.device(device):
            model = self.build().train().to(self.dtype)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def data(self, device: torch.device, seed: int = 0) -> Batch:
        """Return a batch on the device."""
        return {name: value.to(device) for name, value in self.batch(torch.Generator().manual_seed(seed)).items()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a model answers with."""
    found: Any = model(**batch)
    return found if isinstance(found, Tensor) else found.loss


class Bottleneck(nn.Module):
    """ResNet's 1×1, 3×3, 1×1 and a shortcut, projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.body = nn.Sequential(
            *_convolution(in_channels, channels, 1, 1),
            nn.ReLU(inplace=True),
            *_convolution(channels, channels, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(channels, out_channels, 1, 1),
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Sequential(*([] if same else _convolution(in_channels, out_channels, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


class ResNet(nn.Module):
    """A ResNet of bottlenecks with its loss; the default is ResNet-50."""

    def __init__(self, stages: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        blocks, in_channels = [], width
        for stage, depth in enumerate(stages):
            for index in range(depth):
                blocks.append(Bottleneck(in_channels, width << stage, 2 if stage and not index else 1))
                in_channels = 4 * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(in_channels, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.blocks(self.stem(images)).mean(dim=(2, 3))), labels)


class Residual(nn.Module):
    """x + GELU(W · norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


class DeepStack(nn.Module):
    """Many equal layers, one loss: what grows with layers × pool would show here."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(layers)))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.blocks(x), target)


def _transformer(model_class: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        found = getattr(transformers, model_class)
        return found(found.config_class(**config))

    return build


def _masked_words(vocabulary: int, size: int, length: int) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        words = torch.randint(0, vocabulary, (size, length), generator=generator)
        # As many in every sequence: the mean over two batches is then the mean of their means.
        order = torch.rand(size, length, generator=generator).argsort(1)
        asked = order < max(1, int(MASKED_SHARE * length))
        return {"input_ids": words.masked_fill(asked, 3), "labels": words.masked_fill(~asked, NOT_ASKED)}

    return batch


def _next_words(vocabulary: int, size: int, length: int) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        words = torch.randint(0, vocabulary, (size, length), generator=generator)
        return {"input_ids": words, "labels": words}

    return batch


def _images(size: int, side: int, classes: int) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        images = torch.randn(size, 3, side, side, generator=generator)
        labels = torch.randint(0, classes, (size,), generator=generator)
        return {"images": images.contiguous(memory_format=torch.channels_last), "labels": labels}

    return batch


def _vectors(size: int, width: int) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        return {name: torch.randn(size, width, generator=generator) for name in ("x", "target")}

    return batch


# In the order in which they are measured. Dropout is the models' own.
TASKS = {
    "bert-base": Task(
        _transformer("BertForMaskedLM"),
        _masked_words(30522, 32, 128),
        32,
        "32 sequences of 128 words",
        time_aims={GRAPHED: 0.85, EAGER: 1.0, COMPILED: 1.0, REDUCED: 1.1},
    ),
    "deep-stack": Task(
        lambda: DeepStack(96, 2048),
        _vectors(4096, 2048),
        4096,
        "4,096 rows of 2,048",
        (4,),
        time_aims={GRAPHED: 1.15, EAGER: 1.15},
    ),
    "gpt2-medium": Task(
        _transformer("GPT2LMHeadModel", n_embd=1024, n_layer=24, n_head=16),
        _next_words(50257, 8, 1024),
        8,
        "8 sequences of 1,024 words",
        time_aims={GRAPHED: 0.70},
    ),
    "llama-1.1b": Task(
        _transformer("LlamaForCausalLM", use_cache=False, **llama(2048, 5632, 22, 32, 4)),
        _next_words(32000, 8, 1024),
        8,
        "8 sequences of 1,024 words",
        time_aims={GRAPHED: 0.52, EAGER: 0.6, COMPILED: 0.6},
    ),
    "llama-4096": Task(
        _transformer("LlamaForCausalLM", use_cache=False, **llama(4096, 11008, 8, 32, 32)),
        _next_words(32000, 4, 2048),
        4,
        "4 sequences of 2,048 words",
        time_aims={GRAPHED: 0.40},
    ),
    "resnet-50": Task(ResNet, _images(64, 224, 1000), 64, "64 images of 224×224", channels_last=True),
}


def _lean(name: str, size: int, length: int, aim: float, *sizes: int) -> None:
    """Add a decoder of torch's own operations, with parameters in bfloat16, in which products take most of a step."""
    TASKS[name] = Task(
        lambda: LeanDecoder(32000, *sizes),
        _next_words(32000, size, length),
        size,
        f"{size} sequences of {length:,} words",
        time_aims={GRAPHED: aim},
        dtype=torch.bfloat16,
    )


_lean("lean, 22 layers of 2048", 8, 1024, 0.52, 2048, 5632, 22, 32, 4)
_lean("lean, 8 layers of 4096", 4, 2048, 0.40, 4096, 11008, 8, 32, 32)
_lean("lean, 24 layers of 1024", 8, 1024, 0.70, 1024, 4096, 24, 16, 16)
# What a setting that is not convert's costs or saves: the same model and batch with it. The aims are the defaults'.
_VARIANTS = {
    "bert-base, no folds": RoastConfig(fold="none"),
    "resnet-50, whole kernels": RoastConfig(kernel_basis="none"),
    "bert-base, learned scales": RoastConfig(learned_scales=True),
    "gpt2-medium, learned scales": RoastConfig(learned_scales=True),
    "llama-1.1b, learned scales": RoastConfig(learned_scales=True),
    "llama-4096, learned scales": RoastConfig(learned_scales=True),
}
for name, settings in _VARIANTS.items():
    TASKS[name] = replace(TASKS[name.split(",")[0]], settings=settings, time_aims={})
# Without dropout: the losses of several GPUs must be those of one.
DISTRIBUTED_TASKS = {
    "bert-base": Task(
        _transformer("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        _masked_words(30522, 32, 128),
        32,
        "32 sequences of 128 words",
        blocks="bert.encoder.layer",
    ),
    "llama-1.1b": Task(
        _transformer("LlamaForCausalLM", use_cache=False, **llama(2048, 5632, 22, 32, 4)),
        _next_words(32000, 4, 1024),
        4,
        "4 sequences of 1,024 words",
        blocks="model.layers",
    ),
    "llama-4096": Task(
        _transformer("LlamaForCausalLM", use_cache=False, **llama(4096, 11008, 8, 32, 32)),
        _next_words(32000, 4, 2048),
        4,
        "4 sequences of 2,048 words",
        blocks="model.layers",
    ),
}
# The same code in seconds, on a CPU as well.
_SMALL_BERT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_BERT |= {"vocab_size": 512, "max_position_embeddings": 64}
SMOKE_TASKS = {
    "bert-base": Task(
        _transformer("BertForMaskedLM", **_SMALL_BERT),
        _masked_words(512, 2, 16),
        2,
        "2 sequences of 16 words",
        (4, 2),
    ),
    "deep-stack": Task(
        lambda: DeepStack(4, 64), _vectors(16, 64), 16, "16 rows of 64", (4,), time_aims={GRAPHED: 1.0, EAGER: 1.15}
    ),
    "resnet-50": Task(
        lambda: ResNet((1, 1), 16, 10), _images(2, 32, 10), 2, "2 images of 32×32", (4,), channels_last=True
    ),
}
DISTRIBUTED_SMOKE_TASKS = {
    "bert-base": Task(
        _transformer("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL_BERT),
        _masked_words(512, 2, 16),
        2,
        "2 sequences of 16 words",
        (4,),
        blocks="bert.encoder.layer",
    ),
    "llama-1.1b": Task(
        _transformer("LlamaForCausalLM", use_cache=False, **llama(64, 128, 2, 4, 2, 512)),
        _next_words(512, 2, 16),
        2,
        "2 sequences of 16 words",
        (4,),
        blocks="model.layers",
    ),
}
