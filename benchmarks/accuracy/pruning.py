"""Pruning at initialisation: which weights a model keeps is decided before training and stays.

What is stored are the weights that are kept, and whatever is not pruned (vectors). The mask is not counted, in the
rivals' favour: a bitmap of it would take one 32nd of the dense model's bytes, 3 % where ratio 100 leaves 1 %.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.accuracy import nets
from benchmarks.accuracy.budget import UnreachableError

# Gives the batch that SNIP takes its gradients from: inputs as the model takes them, and labels.
Batch = tuple[Tensor, Tensor]
Batches = Callable[[], Batch]


class Mask(nn.Module):
    """Multiplies a weight by its fixed mask: what is pruned reads as zero and gets no gradient."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}


def random_scores(model: nn.Module, batch: Batches, seed: int) -> dict[str, Tensor]:
    """Every weight of a layer is as good as any other."""
    generator = torch.Generator().manual_seed(seed)
    return _by_layer({name: torch.rand(weight.shape, generator=generator) for name, weight in prunable(model).items()})


def magnitude_scores(model: nn.Module, batch: Batches, seed: int) -> dict[str, Tensor]:
    """A layer's largest initial weights are kept."""
    return _by_layer({name: weight.detach().abs() for name, weight in prunable(model).items()})


def _by_layer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scores whose best ones, over all layers, are each layer's best values, small layers pruned less.

    Densities are in proportion to `(sum of sizes) / (product of sizes)` (ERK: Evci et al., ICML 2020). With one density
    for all, or values compared across layers, the first convolution loses everything at ratio 100 and nothing passes.
    """
    scores = {}
    for name, value in values.items():
        flat = value.flatten().cpu()
        place = torch.empty(len(flat))
        place[flat.argsort(descending=True)] = torch.arange(len(flat), dtype=torch.float32)
        density = sum(value.shape) / value.numel()
        scores[name] = (density / ((place + 0.5) / len(flat))).view(value.shape)
    return scores


def snip_scores(model: nn.Module, batch: Batches, seed: int) -> dict[str, Tensor]:
    """|weight · gradient| on one batch (Lee, Ajanthan, Torr, ICLR 2019), compared across all layers."""
    inputs, labels = batch()
    weights = prunable(model)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = F.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    return {
        name: torch.zeros_like(weight) if gradient is None else (weight * gradient).detach().abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


SCORES: dict[str, Callable[[nn.Module, Batches, int], dict[str, Tensor]]] = {
    "random": random_scores,
    "magnitude": magnitude_scores,
    "snip": snip_scores,
}


def prune(model: nn.Module, target: int, scores: dict[str, Tensor]) -> int:
    """Mask all but the best weights, in place; return the stored parameters, exactly `target`.

    Raises:
        UnreachableError: what is not pruned is already more.
    """
    weights = prunable(model)
    vectors = nets.size(model) - sum(weight.numel() for weight in weights.values())
    count = target - vectors
    if count < 1:
        raise UnreachableError(f"{vectors:,} parameters are vectors, which are not pruned, and {target:,} are allowed")
    flat = torch.cat([scores[name].detach().float().flatten() for name in weights])
    best = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    best[flat.topk(count).indices] = True
    for (name, weight), mask in zip(weights.items(), best.split([w.numel() for w in weights.values()]), strict=True):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        kept = mask.view(weight.shape).to(weight.device, weight.dtype)
        parametrize.register_parametrization(module, attribute, Mask(kept))
    return vectors + count
