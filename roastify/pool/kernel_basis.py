r"""Kernels of convolutions as combinations of a few learned ones, the basis; the pool then holds the coefficients.

For output channel `o` and input channel `i`, with a kernel of `k` positions and `r < k` basis kernels,

.. math:: W_{o,i,:} = \sum_{j<r} C_{o,i,j}\,B_j,

where `C` is read from the pool as any shared tensor is, and `B`, `[r, k]`, is a Parameter of the layer's own: a pool
element serves every position of every kernel alike, which says nothing of what tells them apart, and few basis kernels
leave fewer coefficients to share (Qiu et al., "DCFNet", ICML 2018; Li et al., "Learning filter basis for convolutional
neural network compression", ICCV 2019; accuracy with and without: docs/accuracy.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_basis(kernel: Sequence[int], count: int) -> Tensor:
    """Return the `count` lowest frequencies of the kernel's discrete cosine transform, `[count, positions]`.

    Rows are orthonormal, so coefficients of spread `s` make kernels of spread `s · sqrt(count / positions)`. They are
    made on the CPU whatever the default device is.
    """
    waves = [_cosines(size) for size in kernel]
    # By their sum, then the largest: a frequency along one axis goes after as much along two.
    frequencies = sorted(
        itertools.product(*(range(size) for size in kernel)),
        key=lambda each: (
            sum(wave / size for wave, size in zip(each, kernel, strict=True)),
            max(wave / size for wave, size in zip(each, kernel, strict=True)),
        ),
    )
    basis = []
    for each in frequencies[:count]:
        product = torch.ones(1, dtype=torch.float64, device="cpu")
        for wave, table in zip(each, waves, strict=True):
            product = torch.outer(product, table[wave]).flatten()
        basis.append(product)
    return torch.stack(basis)


def _cosines(size: int) -> Tensor:
    wave = torch.arange(size, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi / size * (wave + 0.5) * wave[:, None])
    return waves / waves.norm(dim=1, keepdim=True)


def principal_basis(dense: Tensor, count: int) -> Tensor:
    """Return the orthonormal basis, `[count, positions]`, in which a weight's kernels lose least.

    Of all bases of that space it is the one nearest to `cosine_basis` (orthogonal Procrustes), which does not hang on
    the signs and the order of eigenvectors, and finds the coefficients of a densified model about as they were.
    """
    kernels = dense.flatten(2).flatten(0, 1)
    kernels = kernels if kernels.dtype == torch.float64 else kernels.float()
    # In ascending order of what they carry.
    _, directions = torch.linalg.eigh((kernels.t() @ kernels).double())
    space = directions.flip(1)[:, :count].t()
    left, _, right = torch.linalg.svd(cosine_basis(dense.shape[2:], count).to(space.device) @ space.t())
    return left @ right @ space


def combined_matrix(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return the weight, `[rows, channels · positions]`, of a matrix of coefficients `[rows, channels · count]`."""
    return (matrix.reshape(-1, basis.shape[0]) @ basis).view(matrix.shape[0], -1)


def coefficient_matrix(weight: Tensor, basis: Tensor) -> Tensor:
    """Return `combined_matrix`'s adjoint, which is its inverse too for a weight that an orthonormal basis spans."""
    return (weight.reshape(-1, basis.shape[1]) @ basis.t()).view(weight.shape[0], -1)
