"""The layers on the pool: subclasses of torch.nn's layers, recurrent layers, transformers' `Conv1D`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.kernels.view import FoldView
from roastify.layers.base import RoastLayer, RoastModule
from roastify.layers.pooled_weight import PooledWeight
from roastify.layers.reading import tracers


class RoastRNN(RoastModule):
    """`nn.RNN`, `nn.LSTM` and `nn.GRU` on the pool: every shared attribute is materialised once for each call.

    The dense layers keep a list of their Parameters, and weak references to them, to notice when one was replaced. Here
    the list is read from the attributes each time, so the methods that update it do nothing.
    """

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        cached = self.__dict__.get("_roast_flat_weights")
        return cached if cached is not None else [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Do nothing: the list is read from the attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. The dense tensors are cached during the call, because its forward reads them three times."""
        if tracers:
            return super().__call__(*args, **kwargs)
        self.__dict__["_roast_flat_weights"] = self._flat_weights
        try:
            with warnings.catch_warnings():
                # cuDNN warns that the weights are not in one piece of memory. Materialised weights never are.
                warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
                return super().__call__(*args, **kwargs)
        finally:
            self.__dict__.pop("_roast_flat_weights", None)

    def flatten_parameters(self) -> None:
        """Do nothing: a tensor that is materialised for one call is not worth moving."""

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        """Do nothing: the weights are read again in every call."""


class RoastLinear(RoastLayer, nn.Linear):
    """`nn.Linear` on the pool. For a small batch, the dense weight is not materialised."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input · weightᵀ + bias`."""
        return self._roast["weight"].linear(input, self.bias)


class RoastBilinear(RoastLayer, nn.Bilinear):
    """`nn.Bilinear` on the pool, its weight materialised for the call."""


class RoastEmbedding(RoastLayer, nn.Embedding):
    """`nn.Embedding` on the pool: only the rows of the given indices are read."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows at the indices `input`. The row at `padding_idx` gets no gradient, as in the dense layer."""
        rows = self._roast["weight"].rows(input)
        if self.padding_idx is None or self._roast["weight"].zero_row is not None or not torch.is_grad_enabled():
            return rows
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


class RoastEmbeddingBag(RoastLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` on the pool: only the rows of the given indices are read, then reduced."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the reduced bags. All modes and arguments of the dense layer are supported."""
        shared = self._roast["weight"]
        if input.dim() not in (1, 2):
            raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
        if input.dim() == 2 and input.shape[1] and offsets is None and self._are_plain(per_sample_weights, input):
            return self._reduce(shared.rows(input), input, per_sample_weights)
        flat = input.reshape(-1)
        rows = shared.rows(flat)
        position = torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype)
        padding_idx = None
        if self.padding_idx is not None:
            # The bag operator skips one index, so all padding entries point to one additional row.
            padding_idx = flat.numel()
            position = torch.where(flat == self.padding_idx, padding_idx, position)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        return F.embedding_bag(
            position.view(input.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    def _are_plain(self, weights: Tensor | None, input: Tensor) -> bool:
        """Whether the bag operator would accept these weights."""
        return weights is None or (self.mode == "sum" and weights.shape == input.shape)

    def _reduce(self, rows: Tensor, input: Tensor, weights: Tensor | None) -> Tensor:
        """Return bags of equal length, from their rows `[bags, entries, dim]`.

        The bag operator would be correct too. But a compiler treats its number of rows as a constant, and here that
        number depends on the batch.
        """
        padding = None if self.padding_idx is None else input == self.padding_idx
        if weights is not None:
            rows = rows * weights[..., None]
        if padding is not None:
            rows = rows.masked_fill(padding[..., None], -torch.inf if self.mode == "max" else 0.0)
        if self.mode == "max":
            bags = rows.max(1).values
            return bags if padding is None else bags.masked_fill(padding.all(1)[:, None], 0.0)
        # In the rows' dtype: autocast would sum in float32.
        total = rows.sum(1, dtype=rows.dtype)
        if self.mode != "mean":
            return total
        if padding is None:
            return total / input.shape[1]
        return total / (~padding).sum(1)[:, None].clamp(min=1)


class _RoastConv(RoastLayer):
    """The base class of convolutions on the pool."""

    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: Any
    dilation: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`."""
        shared = self._roast["weight"]
        if shared.fold is not None and shared.can_multiply and not tracers:
            # Programs replace the method of one layer, to pad in their own way for example. They get the whole weight.
            if "_conv_forward" not in self.__dict__:
                return self._convolve_folded(input, shared)
        weight = self.weight if tracers else shared.whole(input)
        return self._conv_forward(input, weight, self.bias)

    def _convolve_folded(self, input: Tensor, shared: PooledWeight) -> Tensor:
        """Return the convolution, of the input whose channels are folded with the narrow weight, a group a hash."""
        dims = len(self.kernel_size)
        folded, padding = shared.folded(input, dims), self.padding
        if self.padding_mode != "zeros":
            folded = F.pad(folded, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * dims
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        weight, groups = shared.narrow(folded), cast(FoldView, shared.fold).hashes
        return convolution(folded, weight, self.bias, self.stride, padding, self.dilation, groups)


class RoastConv1d(_RoastConv, nn.Conv1d):
    """`nn.Conv1d` on the pool, its weight materialised for the call."""


class RoastConv2d(_RoastConv, nn.Conv2d):
    """`nn.Conv2d` on the pool, its weight materialised for the call."""


class RoastConv3d(_RoastConv, nn.Conv3d):
    """`nn.Conv3d` on the pool, its weight materialised for the call."""


class RoastConvTranspose1d(RoastLayer, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on the pool, its weight materialised for the call."""


class RoastConvTranspose2d(RoastLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on the pool, its weight materialised for the call."""


class RoastConvTranspose3d(RoastLayer, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on the pool, its weight materialised for the call."""


class RoastTransformersConv1D(RoastLayer):
    """transformers' `Conv1D` on the pool: a linear layer whose weight is `[in, out]`."""

    # transformers' own `__repr__` would leave out `extra_repr`, which describes the pool.
    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor) -> Tensor:
        """Return `x · weight + bias`."""
        return self._roast["weight"].linear_t(x, cast(Tensor, self.bias))
