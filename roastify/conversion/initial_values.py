"""Initial values from the dense model's weights: each tensor's scale λ, the pool and the bases."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from roastify.conversion.adapters import check_at_start
from roastify.conversion.converted import basis_of, matrix, owners, pooled_weight
from roastify.conversion.progress_kept import KeptProgress
from roastify.errors import ConversionError
from roastify.kernels.reference import summed_in
from roastify.kernels.view import TileView
from roastify.layers.kinds import is_reflectors, is_vector
from roastify.pool.fold import folded
from roastify.pool.kernel_basis import coefficient_matrix, cosine_basis, principal_basis
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.pool import RoastPool
from roastify.progress import track
from roastify.tensor_values import Moments, is_finite, moments

# Added to the seed for the pool's random values, so that they are independent of the mapping's streams.
_POOL_SEED_OFFSET = 0x5EED

# A constant tensor has a standard deviation of 0, so it gets this one (times its value, if that is above 1), or that of
# the tensor which has most, if that is less: a constant of a million must not take the pool's range from the others. It
# is the standard deviation of most transformers models' initial weights, and small compared with the ones of a norm.
_CONSTANT_SPREAD = 0.02
# Elements of a tensor that are copied at once.
_PART = 1 << 22
# Bound of a uniform distribution around zero ÷ its standard deviation.
_UNIFORM = math.sqrt(3)
# The least λ: Γ sums the squares of λ, and Γ and 1/Γ are numbers of the dtype in which gradients are summed.
_LEAST_SCALE = {torch.float32: 2.0**-60, torch.float64: 2.0**-500}


# A tensor whose mean is at least this part of its standard deviation is spread around its mean. Layers' initial values
# have a mean of about std/√numel; Mamba's `A_log` has one of 2.5 std.
_OFF_CENTER = 0.5


def complete_plan(model: nn.Module, plan: RoastPlan, init: str, progress: KeptProgress | None = None) -> RoastPlan:
    r"""Return the plan with λ and center of every shared tensor, and the padding rows that are zero.

    .. math:: \lambda_j = std_j / \sigma

    σ is the parameter-weighted root mean square of all shared tensors' standard deviations. So every layer starts with
    the standard deviation that its author gave it. And λ is near 1, so that a step of Adam moves a weight about as far
    as in the dense model. The center is the mean of vectors, of constant tensors and of tensors whose mean is not small
    beside their spread (Mamba's `A_log`, norms of several dimensions); for all others it is 0.

    If no slot is shared and `init` is "project", λ is 1 and there are no centers. Then the weights come back bit for
    bit, except for tensors with a basis, which are approximated.

    With `init="match"`, the pool of adapters starts at zero; see `start_values`. Then λ is 1, as a step of Adam moves
    both factors as far as in the dense model, and a tensor starts with the standard deviation that its author gave it.

    Raises:
        ConversionError: a tensor holds NaN or infinite values, or spreads so much less than others that λ² vanishes; or
            adapters were trained and would start anew.
    """
    for tensor in plan.kept:
        # Scores of what is impossible are infinite by design.
        if not (is_finite(model.get_parameter(tensor.name), or_infinite=True) or tensor.excluded):
            raise ConversionError(f"{tensor.name} holds NaN; repair the weights or exclude the tensor")
    if plan.has_starts:
        return _with_starts(model, plan)
    constants: dict[str, float] = {}
    deviations, centers, zero_rows, diagonals = {}, {}, {}, {}
    for tensor in track(plan.shared, "measuring weights", size=lambda tensor: tensor.numel, unit="weights"):
        dense = model.get_parameter(tensor.name).detach()
        if any(is_reflectors(module) for module, _ in owners(model, tensor)):
            # A random pool stands for random reflectors: their signs are as good as others.
            signs = ["-" if init == "project" and value < 0 else "+" for value in dense.diagonal().tolist()]
            diagonals[tensor.name] = "".join(signs)
            dense = _off_diagonal(dense)
        mean, deviations[tensor.name] = _mean_and_deviation(tensor, dense, progress)
        vector = any(is_vector(module, name, dense.shape) for module, name in owners(model, tensor))
        if (vector or abs(mean) >= _OFF_CENTER * deviations[tensor.name]) and tensor.name not in diagonals:
            centers[tensor.name] = mean
        if deviations[tensor.name] == 0:
            constants[tensor.name] = _CONSTANT_SPREAD * max(1.0, abs(mean))
        row = _zero_row(model, tensor, dense)
        if row is not None:
            zero_rows[tensor.name] = row
    most = max(deviations.values(), default=0.0) or math.inf
    deviations |= {name: min(deviation, most) for name, deviation in constants.items()}
    for tensor in plan.with_basis:
        # The deviation of the coefficients: the basis is orthonormal.
        count, positions = tensor.basis_shape
        deviations[tensor.name] *= math.sqrt(positions / count)
    spread = _pool_deviation(plan, deviations)
    scales = {name: deviation / spread for name, deviation in deviations.items()}
    _check_scales(plan, scales, deviations)
    if init == "project" and plan.no_sharing:
        # Tensors with a basis keep their λ: they are approximated in any case.
        whole = {tensor.name for tensor in plan.shared if not tensor.basis_count}
        scales, centers = {name: 1.0 if name in whole else scale for name, scale in scales.items()}, {}
    return plan.with_values(scales, centers, zero_rows, spread, diagonals)


def _with_starts(model: nn.Module, plan: RoastPlan) -> RoastPlan:
    check_at_start(model)
    centers, starts = {}, {}
    for tensor in plan.shared:
        mean, deviation = _mean_and_deviation(tensor, model.get_parameter(tensor.name).detach(), None)
        if deviation == 0 and mean != 0:
            centers[tensor.name] = mean
        elif deviation > 0:
            starts[tensor.name] = _UNIFORM * deviation
    scales = {tensor.name: 1.0 for tensor in plan.shared}
    return plan.with_values(scales, centers, {}, 0.0, {}, starts)


def fill_pool(
    pool: RoastPool, model: nn.Module, plan: RoastPlan, init: str, progress: KeptProgress | None = None
) -> None:
    """Set the pool's initial values: random with `match`, the least-squares fit of the weights with `project`.

    Basis kernels start as the lowest frequencies of a cosine transform; with `project`, as the weight's principal
    kernels.

    Raises:
        ConversionError: the pool's dtype cannot hold the values.
    """
    with torch.no_grad():
        for tensor, basis in zip(plan.with_basis, pool.bases(), strict=True):
            if init == "project":
                basis.copy_(principal_basis(model.get_parameter(tensor.name), tensor.basis_count))
            else:
                basis.copy_(cosine_basis(tensor.shape[2:], tensor.basis_count))
    if init == "project":
        project_into(pool, model, plan, progress)
    else:
        assert plan.pool_std is not None, "the plan was not measured"
        pool.initialise_random(plan.pool_std, plan.seed + _POOL_SEED_OFFSET)
    _check_filled(pool, plan)


def project_into(pool: RoastPool, model: nn.Module, plan: RoastPlan, progress: KeptProgress | None = None) -> None:
    """Set the pool to the least-squares fit of a dense model's weights."""
    left = plan.shared if progress is None else plan.shared[progress.projected :]
    pool.initialise_projection(
        (
            _targets(pool, tensor, model.get_parameter(tensor.name).detach())
            for tensor in track(left, "projecting weights", size=lambda tensor: tensor.numel, unit="weights")
        ),
        begun=None if progress is None else progress.sums,
        after_each=None if progress is None else progress.add_projected,
    )


def _check_filled(pool: RoastPool, plan: RoastPlan) -> None:
    if all(map(is_finite, pool.parameters())):
        return
    names = (tensor.name for tensor in plan.shared if not is_finite(pooled_weight(pool, tensor).dense()))
    raise ConversionError(
        f"{next(names, 'a tensor')} has values so large that {plan.dtype} cannot hold them in a pool; convert the "
        f"model in a wider dtype, exclude the tensor, or scale its weights"
    )


def _targets(
    pool: RoastPool, tensor: TensorPlan, dense: torch.Tensor
) -> Iterator[tuple[TileView, float, torch.Tensor]]:
    """Yield view, λ and the matrix that the pool should hold for a dense tensor, whole or in parts."""
    scale = tensor.scale or 0.0
    if not tensor.center:
        yield pool.plan.view(tensor), scale, _target_matrix(pool, tensor, dense)
        return
    # In parts, because to subtract the center is to copy, and a table may be most of the model.
    parts = list(pooled_weight(pool, tensor).split(_PART))
    if len(parts) == 1:
        yield parts[0].view, scale, _target_matrix(pool, tensor, dense)
        return
    whole, start = matrix(tensor, dense), 0
    for part in parts:
        stop = start + part.view.rows
        yield part.view, scale, whole[start:stop] - tensor.center
        start = stop


def _target_matrix(pool: RoastPool, tensor: TensorPlan, dense: torch.Tensor) -> torch.Tensor:
    """Return the matrix that the pool should hold for a dense tensor."""
    if tensor.diagonal:
        dense = _off_diagonal(dense)
    if tensor.start:
        dense = dense - pooled_weight(pool, tensor).starts(dense.dtype)
    whole = matrix(tensor, dense - tensor.center if tensor.center else dense)
    basis = basis_of(pool, tensor)
    if tensor.fold is None and basis is None:
        return whole
    wide = whole if whole.dtype == torch.float64 else whole.float()
    if tensor.fold is not None:
        # Before any training, when every learned scale is 1.
        wide = folded(wide, None, pool.plan.fold_view(tensor.fold)._replace(first_scale=-1))
    return wide if basis is None else coefficient_matrix(wide, basis.detach().to(wide.dtype))


def _off_diagonal(dense: torch.Tensor) -> torch.Tensor:
    return dense.clone().fill_diagonal_(0)


def _mean_and_deviation(tensor: TensorPlan, dense: torch.Tensor, progress: KeptProgress | None) -> Moments:
    if progress is not None and tensor.name in progress.measured:
        return progress.measured[tensor.name]
    found = moments(dense)
    if found is None:
        raise ConversionError(f"{tensor.name} holds NaN or infinite values; repair the weights or exclude the tensor")
    if progress is not None:
        progress.add_measured(tensor.name, found)
    return found


def _pool_deviation(plan: RoastPlan, deviations: dict[str, float]) -> float:
    # Relative to the largest, whose square may be too large for a number.
    most = max(deviations.values())
    total = sum(tensor.matrix_numel for tensor in plan.shared)
    squares = sum(tensor.matrix_numel * (deviations[tensor.name] / most) ** 2 for tensor in plan.shared)
    return most * math.sqrt(squares / total)


def _check_scales(plan: RoastPlan, scales: dict[str, float], deviations: dict[str, float]) -> None:
    dtype = summed_in(getattr(torch, plan.dtype))
    least, most = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
    if scales[least] < _LEAST_SCALE[dtype]:
        raise ConversionError(
            f"{least} has a standard deviation of {deviations[least]:.1e}, and {most} one of {deviations[most]:.1e}: "
            f"{str(dtype).removeprefix('torch.')} cannot hold the square of what relates them in one pool; exclude one "
            f"of them, or scale its weights"
        )


def _zero_row(model: nn.Module, tensor: TensorPlan, dense: torch.Tensor) -> int | None:
    """Return the padding row if it is zero and every owner treats it as padding.

    If the table is tied to an output layer, the output layer reads and trains that row as any other, as it does in the
    dense model.
    """
    tables = nn.Embedding | nn.EmbeddingBag
    rows = {module.padding_idx if isinstance(module, tables) else None for module, _ in owners(model, tensor)}
    row = rows.pop() if len(rows) == 1 else None
    return row if row is not None and not bool(dense[row].any()) else None
