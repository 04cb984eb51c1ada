"""A training step replayed from a CUDA graph beside its eager twin, for the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


def losses_of_replays_and_of_steps(
    step_of: Callable[[nn.Module], Step], model: nn.Module, twin: nn.Module, xs: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """Return the losses of a model whose whole step is replayed for each batch, and of its twin, which steps eagerly.

    Both take three steps on the first batch before that, because a capture needs warm-up steps.
    """
    run, eager = step_of(model), step_of(twin)
    static = xs[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager(xs[0])
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    found, expected = [], []
    for x in xs:
        static.copy_(x)
        graph.replay()
        found.append(out.item())
        expected.append(eager(x).item())
    return found, expected
