"""Whether a converted model computes what the dense model with its weights does: outputs, and the pool's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roastify.errors import BenchError, OutputMismatch
from roastify.rewrite import pool_of, shared_tensor
from roastify.verify import compare_outputs, describe, leaves

# The largest difference that rounding explains, over the largest value: a wrong tile is off by about 1, and bfloat16
# through three transformer layers by 0.8 %, which grows with the root of the depth.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_TF32 = 1e-2


@dataclass(frozen=True)
class Agreement:
    """The largest difference over the largest value, of the worst output, and what it may be."""

    error: float
    tolerance: float


def check_agreement(dense: nn.Module, converted: nn.Module, expected: Any, found: Any) -> Agreement:
    """Compare two models' outputs and, where both have just run a backward pass in train mode, the pool's gradient.

    Args:
        dense: the model whose weights are those that the converted one stands for.
        converted: its twin.
        expected: what the dense model returned.
        found: what the converted model returned for the same inputs and random numbers.

    Raises:
        OutputMismatch: they differ in structure, or by more than rounding explains.
        BenchError: there is nothing to compare.
    """
    mode = "train" if dense.training else "eval"
    described = [
        (type(output), [(path, describe(leaf)) for path, leaf in leaves(output)]) for output in (expected, found)
    ]
    compare_outputs(mode, described[0], described[1])
    pairs = [
        (path, leaf, twin)
        for (path, leaf), (_, twin) in zip(leaves(expected), leaves(found), strict=True)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) and leaf.numel() > 0
    ]
    if not pairs:
        raise BenchError(
            "the models cannot be compared: no output is a floating-point tensor; wrap the model in one that returns "
            "such a tensor, its logits for example"
        )
    dtypes = {parameter.dtype for parameter in dense.parameters() if parameter.is_floating_point()}
    dtypes |= {leaf.dtype for _, leaf, _ in pairs}
    tolerance = max(_tolerance(dtype) for dtype in dtypes)
    errors = {path if path == "output" else f"output {path}": _error(path, leaf, twin) for path, leaf, twin in pairs}
    if dense.training:
        errors |= _gradient_error(dense, converted)
    for what, error in errors.items():
        if not error <= tolerance:
            raise OutputMismatch(
                f"in {mode} mode {what} of the converted model differs from the dense model's with the same weights by "
                f"{error:.2g} of the largest value; expected at most {tolerance:g}, so nothing was timed. If the model "
                f"draws random numbers of its own or amplifies rounding, leave that out or try float32"
            )
    return Agreement(max(errors.values()), tolerance)


def _described(output: Any) -> tuple[type, list[tuple[str, str]]]:
    return type(output), [(path, describe(leaf)) for path, leaf in leaves(output)]


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return _TOLERANCE_TF32
    return _TOLERANCE.get(dtype, max(_TOLERANCE.values()))


def _error(what: str, expected: Tensor, found: Tensor) -> float:
    """Return the largest difference over the largest value; infinite where one is finite and the other is not."""
    wide = torch.float64 if expected.dtype in (torch.float64, torch.complex128) else torch.float32
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    expected, found = expected.detach().to(wide), found.detach().to(wide)
    finite = expected.isfinite()
    if not finite.any():
        raise BenchError(f"the models cannot be compared: the dense model's {what} holds no finite number")
    if not torch.equal(finite, found.isfinite()):
        return math.inf
    # Masked scores are infinite on both sides.
    difference = float(torch.where(finite, expected - found, 0.0).abs().max())
    largest = float(torch.where(finite, expected, 0.0).abs().max())
    if difference == 0:
        return 0.0
    return difference / largest if largest else math.inf


def _gradient_error(dense: nn.Module, converted: nn.Module) -> dict[str, float]:
    """Return the error of the pool's gradient against the dense gradients, summed over the readers of each element."""
    pool = pool_of(converted)
    if not pool.weight.requires_grad:
        return {}
    found, pool.weight.grad = pool.weight.grad, None
    for tensor in pool.plan.shared:
        gradient = dense.get_parameter(tensor.name).grad
        if gradient is not None:
            shared_tensor(pool, tensor).dense().backward(gradient)
    nothing = torch.zeros_like(pool.weight)
    expected = nothing if pool.weight.grad is None else pool.weight.grad
    return {"the pool's gradient": _error("gradient", expected, nothing if found is None else found)}
