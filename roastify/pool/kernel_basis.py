r"""Convolution kernels as combinations of a few learned basis kernels; the pool holds the coefficients.

For output channel `o` and input channel `i`, with a kernel of `k` positions and `r < k` basis kernels,

.. math:: W_{o,i,:} = \sum_{j<r} C_{o,i,j}\,B_j,

where `C` is read from the pool as any shared tensor is, and `B`, `[r, k]`, is a Parameter of the layer's own.

A basis helps for two reasons. Without a basis, one pool element is read at every position of kernels in every layer, so
a layer cannot learn how the positions of a kernel differ. And with few basis kernels there are fewer coefficients to
share than there are weights. docs/accuracy.md has the accuracy with a basis and without.

Source: Qiu et al., "DCFNet", ICML 2018; Li et al., "Learning filter basis for convolutional neural network
compression", ICCV 2019.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_basis(kernel: Sequence[int], count: int) -> Tensor:
    """Return the `count` lowest frequencies of the kernel's discrete cosine transform, `[count, positions]`.

    The rows are orthonormal, so coefficients with standard deviation `s` give kernels with standard deviation
    `s · sqrt(count / positions)`. The result is on the CPU, whatever the default device is.
    """
    waves = [_cosines(size) for size in kernel]
    # Sorted by the sum over axes, then by the largest axis: of two equal sums, the one spread over axes comes first.
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
    """Return the orthonormal basis, `[count, positions]`, that approximates a weight's kernels with the least error.

    Many orthonormal bases span that space. This one is the nearest to `cosine_basis` (orthogonal Procrustes), so it
    does not depend on the signs and the order of eigenvectors. If a densified model is converted again, its
    coefficients come out nearly as they were.
    """
    kernels = dense.flatten(2).flatten(0, 1)
    kernels = kernels if kernels.dtype == torch.float64 else kernels.float()
    # `eigh` returns eigenvalues in ascending order, so the principal directions are the last.
    _, directions = torch.linalg.eigh((kernels.t() @ kernels).double())
    space = directions.flip(1)[:, :count].t()
    left, _, right = torch.linalg.svd(cosine_basis(dense.shape[2:], count).to(space.device) @ space.t())
    return left @ right @ space


def combined_matrix(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return the weight, `[rows, channels · positions]`, of a matrix of coefficients `[rows, channels · count]`."""
    return (matrix.reshape(-1, basis.shape[0]) @ basis).view(matrix.shape[0], -1)


def coefficient_matrix(weight: Tensor, basis: Tensor) -> Tensor:
    """Return the adjoint of `combined_matrix`; for a weight in the span of an orthonormal basis, also the inverse."""
    return (weight.reshape(-1, basis.shape[1]) @ basis.t()).view(weight.shape[0], -1)
