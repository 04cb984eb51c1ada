"""Initial values from the dense model's weights: each tensor's scale λ, the pool and the bases."""

from __future__ import annotations

import math

import torch
from torch import nn

from roastify.conversion.converted import basis_of, matrix, owners
from roastify.errors import ConversionError
from roastify.layers.kinds import is_reflectors, is_vector
from roastify.pool.fold import folded
from roastify.pool.kernel_basis import coefficient_matrix, cosine_basis, principal_basis
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool
from roastify.progress import track

# Added to the seed for the pool's random values, so that they are independent of the mapping's streams.
_POOL_SEED_OFFSET = 0x5EED

# A constant tensor has a standard deviation of 0, so it gets this one (times its value, if that is above 1). It is the
# standard deviation of most transformers models' initial weights, and small compared with the ones of a norm.
_CONSTANT_SPREAD = 0.02


# A tensor whose mean is at least this part of its standard deviation is spread around its mean. Layers' initial values
# have a mean of about std/√numel; Mamba's `A_log` has one of 2.5 std.
_OFF_CENTER = 0.5


def complete_plan(model: nn.Module, plan: RoastPlan, init: str) -> RoastPlan:
    r"""Return the plan with λ and center of every shared tensor, and the padding rows that are zero.

    .. math:: \lambda_j = std_j / \sigma

    σ is the parameter-weighted root mean square of all shared tensors' standard deviations. So every layer starts with
    the standard deviation that its author gave it. And λ is near 1, so that a step of Adam moves a weight about as far
    as in the dense model. The center is the mean of vectors, of constant tensors and of tensors whose mean is not small
    beside their spread (Mamba's `A_log`, norms of several dimensions); for all others it is 0.

    If no slot is shared and `init` is "project", λ is 1 and there are no centers. Then the weights come back bit for
    bit, except for tensors with a basis, which are approximated.

    Raises:
        ConversionError: a tensor holds NaN or infinite values.
    """
    deviations, centers, zero_rows, diagonals = {}, {}, {}, {}
    for tensor in track(plan.shared, "measuring weights"):
        dense = model.get_parameter(tensor.name).detach()
        if any(is_reflectors(module) for module, _ in owners(model, tensor)):
            # A random pool stands for random reflectors: their signs are as good as others.
            signs = ["-" if init == "project" and value < 0 else "+" for value in dense.diagonal().tolist()]
            diagonals[tensor.name] = "".join(signs)
            dense = _off_diagonal(dense)
        mean, deviations[tensor.name] = _mean_and_deviation(tensor, dense)
        vector = any(is_vector(module, name, dense.shape) for module, name in owners(model, tensor))
        if (vector or abs(mean) >= _OFF_CENTER * deviations[tensor.name]) and tensor.name not in diagonals:
            centers[tensor.name] = mean
        if deviations[tensor.name] == 0:
            deviations[tensor.name] = _CONSTANT_SPREAD * max(1.0, abs(mean))
        if tensor.basis_count:
            # The deviation of the coefficients: the basis is orthonormal.
            count, positions = tensor.basis_shape
            deviations[tensor.name] *= math.sqrt(positions / count)
        row = _zero_row(model, tensor, dense)
        if row is not None:
            zero_rows[tensor.name] = row
    spread = _pool_deviation(plan, deviations)
    scales = {name: deviation / spread for name, deviation in deviations.items()}
    if init == "project" and plan.no_sharing:
        # Tensors with a basis keep their λ: they are approximated in any case.
        whole = {tensor.name for tensor in plan.shared if not tensor.basis_count}
        scales, centers = {name: 1.0 if name in whole else scale for name, scale in scales.items()}, {}
    return plan.with_values(scales, centers, zero_rows, spread, diagonals)


def fill_pool(pool: RoastPool, model: nn.Module, plan: RoastPlan, init: str) -> None:
    """Set the pool's initial values: random with `match`, the least-squares fit of the weights with `project`.

    Basis kernels start as the lowest frequencies of a cosine transform; with `project`, as the weight's principal
    kernels.
    """
    with torch.no_grad():
        for tensor, basis in zip(plan.with_basis, pool.bases(), strict=True):
            if init == "project":
                basis.copy_(principal_basis(model.get_parameter(tensor.name), tensor.basis_count))
            else:
                basis.copy_(cosine_basis(tensor.shape[2:], tensor.basis_count))
    if init == "project":
        pool.initialise_projection(
            (
                plan.view(tensor),
                tensor.scale or 0.0,
                _target_matrix(pool, tensor, model.get_parameter(tensor.name).detach()),
            )
            for tensor in track(plan.shared, "projecting weights")
        )
        return
    assert plan.pool_std is not None, "the plan was not measured"
    pool.initialise_random(plan.pool_std, plan.seed + _POOL_SEED_OFFSET)


def _target_matrix(pool: RoastPool, tensor: TensorPlan, dense: torch.Tensor) -> torch.Tensor:
    """Return the matrix that the pool should hold for a dense tensor."""
    if tensor.diagonal:
        dense = _off_diagonal(dense)
    whole = matrix(tensor, dense - tensor.center if tensor.center else dense)
    if tensor.fold is not None:
        # Before any training, when every learned scale is 1.
        wide = whole if whole.dtype == torch.float64 else whole.float()
        view = pool.plan.fold_view(tensor.fold)
        return folded(wide, None, view._replace(first_scale=-1))
    basis = basis_of(pool, tensor)
    if basis is None:
        return whole
    wide = whole if whole.dtype == torch.float64 else whole.float()
    return coefficient_matrix(wide, basis.detach().to(wide.dtype))


def _off_diagonal(dense: torch.Tensor) -> torch.Tensor:
    return dense.clone().fill_diagonal_(0)


def _mean_and_deviation(tensor: TensorPlan, dense: torch.Tensor) -> tuple[float, float]:
    wide = dense if dense.dtype in (torch.float32, torch.float64) else dense.float()
    deviation, mean = (float(value) for value in torch.std_mean(wide, correction=0))
    if not math.isfinite(deviation):
        raise ConversionError(f"{tensor.name} holds NaN or infinite values; repair the weights or exclude the tensor")
    if bool((dense == dense.reshape(-1)[0]).all()):
        # Rounding would give a constant tensor a mean that differs from its value, and a deviation above zero.
        return float(dense.reshape(-1)[0]), 0.0
    return mean, deviation


def _pool_deviation(plan: RoastPlan, deviations: dict[str, float]) -> float:
    total = sum(tensor.matrix_numel for tensor in plan.shared)
    return math.sqrt(sum(tensor.matrix_numel * deviations[tensor.name] ** 2 for tensor in plan.shared) / total)


def _zero_row(model: nn.Module, tensor: TensorPlan, dense: torch.Tensor) -> int | None:
    """Return the padding row if it is zero and every owner treats it as padding.

    If the table is tied to an output layer, the output layer reads and trains that row as any other, as it does in the
    dense model.
    """
    tables = nn.Embedding | nn.EmbeddingBag
    rows = {module.padding_idx if isinstance(module, tables) else None for module, _ in owners(model, tensor)}
    row = rows.pop() if len(rows) == 1 else None
    return row if row is not None and not bool(dense[row].any()) else None
