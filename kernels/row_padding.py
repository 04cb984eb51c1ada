"""Rows that are added to a weight whose number of rows is no multiple of 8, so that cuBLAS can use wide loads.

The head of GPT-2 is such a weight, with 50,257 words: a step of GPT-2 medium took 119 ms, and 102 ms with padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from roastify.kernels.view import TileView

# From this many rows of activations on, a weight whose rows are no multiple of 8 is padded.
_PADDED_ROWS = 512


def row_padding(view: TileView, x: Tensor) -> int:
    """Return how many rows to add to a weight and its output, for rows of activations `[num_rows, …]`."""
    return -view.rows % 8 if x.element_size() == 2 and x.shape[0] >= _PADDED_ROWS else 0


def _runs_on_cublas(x: Tensor) -> bool:
    return x.is_cuda


def padded_gradient(grad: Tensor, view: TileView) -> tuple[Tensor, TileView]:
    """Return a product's gradient with zero columns, and the weight with as many rows more; or both as they are.

    So both products of a backward pass share one padded gradient, which a compiler writes where it computes it. The
    added rows lie in the last row of tiles; whatever they hold is multiplied by zeros.

    Args:
        grad: the output's gradient, `[..., view.rows]`.
        view: where the weight lies.
    """
    pad = -view.rows % 8
    if not pad or not _runs_on_cublas(grad) or view.strips or view.groups > 1:
        return grad, view
    # A compiler would specialise a graph of any size by a comparison of it.
    if isinstance(grad.numel(), torch.SymInt) or not row_padding(view, grad.reshape(-1, view.rows)):
        return grad, view
    wide = view._replace(rows=view.rows + pad)
    return (F.pad(grad, (0, pad)), wide) if wide.grid_rows == view.grid_rows else (grad, view)
