"""Compares a converted model's outputs and pool gradient with those of a dense model of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roastify.calls import describe, leaves
from roastify.checks.interface import compare_outputs
from roastify.conversion.converted import pool_of, pooled_weight
from roastify.errors import BenchError, OutputMismatch

# The largest difference that rounding explains, relative to the largest value. A wrong tile gives about 1. The kernels
# apply λ to sums, while a dense bfloat16 weight is rounded after λ is applied. Between the two there is 0.7 % after 2
# Llama layers and 2.1 % after 32.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE_TF32 = 1e-2
# The largest norm of the gradient's difference, relative to the gradient's norm. Rounding by ε turns a share ε of the
# ReLUs on or off and so changes a share ε of the gradient's terms. The norm of the difference then grows with √ε.
_GRADIENT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2, torch.float16: 1e-1, torch.bfloat16: 2e-1}
_GRADIENT_TOLERANCE_TF32 = 1e-1
# A deep model amplifies rounding. Where its outputs differ by more than the above, the converted model may be as far
# from the dense model in float32 as this many times the dense model itself is.
_AS_ROUNDED = 2.0


@dataclass(frozen=True)
class Agreement:
    """How far two models differ.

    Args:
        error: the largest difference of an output, relative to the output's largest value; of the worst output.
        tolerance: the largest error allowed.
        gradient_error: in training, the norm of the difference between the pool's gradient and the dense gradients
            summed over the readers of each element, relative to the norm of the latter; None in inference and if the
            pool is frozen.
        gradient_tolerance: the largest gradient error allowed.
        from_float32: the dense and the converted model's errors against the dense model in float32, of the worst
            output; None unless `error` is above what rounding explains in most models.
    """

    error: float
    tolerance: float
    gradient_error: float | None
    gradient_tolerance: float
    from_float32: tuple[float, float] | None = None


def check_agreement(
    dense: nn.Module,
    converted: nn.Module,
    expected: Any,
    found: Any,
    precise: Callable[[], Any] | None = None,
) -> Agreement:
    """Compare two models' outputs and, in train mode after a backward pass of both, the pool's gradient.

    Args:
        dense: the dense model with the weights that the converted model represents.
        converted: the converted model.
        expected: the dense model's outputs.
        found: the converted model's outputs for the same inputs and random numbers.
        precise: returns the dense model's outputs in float32, or None if it cannot run so; called only if the two
            differ by more than rounding explains in most models.

    Raises:
        OutputMismatch: the models differ in structure, or by more than rounding explains.
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
            "the models cannot be compared: no output is a floating-point tensor; wrap the model in a module that "
            "returns such a tensor, for example its logits"
        )
    dtypes = {parameter.dtype for parameter in dense.parameters() if parameter.is_floating_point()}
    dtypes |= {leaf.dtype for _, leaf, _ in pairs}
    tolerance, gradient_tolerance = (max(column) for column in zip(*map(_tolerances, dtypes), strict=True))
    errors = {path if path == "output" else f"output {path}": _error(path, leaf, twin) for path, leaf, twin in pairs}
    from_float32 = None
    if precise is not None and tolerance < max(errors.values()) < math.inf:
        outputs = precise()
        from_float32 = None if outputs is None else _errors_of_rounding(pairs, outputs)
    if from_float32 is None or from_float32[1] > _AS_ROUNDED * from_float32[0]:
        for what, error in errors.items():
            _refuse_beyond(tolerance, error, f"in {mode} mode {what}", "the largest value")
    gradient_error = _gradient_error(dense, converted) if dense.training else None
    if gradient_error is not None:
        _refuse_beyond(gradient_tolerance, gradient_error, "the pool's gradient", "its norm")
    return Agreement(max(errors.values()), tolerance, gradient_error, gradient_tolerance, from_float32)


def _errors_of_rounding(pairs: list[tuple[str, Tensor, Tensor]], precise: Any) -> tuple[float, float]:
    """Return the two models' errors against outputs in float32: of the output in which the second is the worst."""
    by_path = dict(leaves(precise))
    errors = [
        (_error(path, by_path[path], leaf), _error(path, by_path[path], twin))
        for path, leaf, twin in pairs
        if isinstance(by_path.get(path), Tensor)
    ]
    return max(errors, key=lambda pair: pair[1] / pair[0] if pair[0] else math.inf)


def _refuse_beyond(tolerance: float, error: float, what: str, measure: str) -> None:
    if not error <= tolerance:
        raise OutputMismatch(
            f"{what} of the converted model differs from the dense model's with the same weights by {error:.2g} of "
            f"{measure}; expected at most {tolerance:g}, so nothing was timed. If the model has a random generator of "
            f"its own or amplifies rounding errors, remove that part or try float32"
        )


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _TOLERANCE_TF32, _GRADIENT_TOLERANCE_TF32
    known = dtype if dtype in _TOLERANCE else torch.bfloat16
    return _TOLERANCE[known], _GRADIENT_TOLERANCE[known]


def _error(what: str, expected: Tensor, found: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite if only one side of a pair is finite."""
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


def _gradient_error(dense: nn.Module, converted: nn.Module) -> float | None:
    """Return the error of the pool's gradient against the dense gradients, summed over the readers of each element.

    The gradients of basis kernels are compared too, and the largest error is returned.
    """
    pool = pool_of(converted)
    if not pool.weight.requires_grad:
        return None
    parameters = [pool.weight, *pool.bases()]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for tensor in pool.plan.shared:
        gradient = dense.get_parameter(tensor.name).grad
        if gradient is not None:
            pooled_weight(pool, tensor).dense().backward(gradient)
    return max(_distance(grad, parameter) for grad, parameter in zip(found, parameters, strict=True))


def _distance(found: Tensor | None, parameter: Tensor) -> float:
    """Return the norm of a gradient's difference from the parameter's own, relative to the norm of the latter.

    None counts as zeros. The result is infinite instead of NaN, because `max` may skip a NaN.
    """
    nothing = torch.zeros_like(parameter)
    expected = (nothing if parameter.grad is None else parameter.grad).double()
    difference = float(((nothing if found is None else found).double() - expected).norm())
    norm = float(expected.norm())
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else (math.inf if difference else 0.0)
