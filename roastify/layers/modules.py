"""The layers on the pool: each class a subclass of the layer of `torch.nn` that it replaces, or joined to any class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.layers.base import RoastLayer, RoastModule
from roastify.layers.reading import tracers


class RoastRNN(RoastModule):
    """`nn.RNN`, `nn.LSTM` and `nn.GRU` on the pool: all that is shared is materialised once a call.

    The dense layers keep a list of their Parameters, and weak references to them, to see when one was replaced.
    """

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        held = self.__dict__.get("_roast_flat_weights")
        return held if held is not None else [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Leave it: there is nothing to keep up to date."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with what it reads held for the time of the call: its forward asks for it three times."""
        if tracers:
            return super().__call__(*args, **kwargs)
        self.__dict__["_roast_flat_weights"] = self._flat_weights
        try:
            with warnings.catch_warnings():
                # cuDNN would rather have the weights in one piece of memory; there is no such piece to be had.
                warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
                return super().__call__(*args, **kwargs)
        finally:
            self.__dict__.pop("_roast_flat_weights", None)

    def flatten_parameters(self) -> None:
        """Leave it: what is materialised for a call is not worth moving."""

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_flat_weights", None)
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        """Leave it: weights are read anew at every call."""


class RoastLinear(RoastLayer, nn.Linear):
    """`nn.Linear` on the pool; no whole weight is materialised for a small batch."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input · weightᵀ + bias`."""
        return self._roast["weight"].linear(input, self.bias)


class RoastBilinear(RoastLayer, nn.Bilinear):
    """`nn.Bilinear` on the pool, its weight materialised for the call."""


class RoastEmbedding(RoastLayer, nn.Embedding):
    """`nn.Embedding` on the pool: only the rows asked for are read, and cost goes with the tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of `input`; the gradient of `padding_idx` is blocked, as in the dense layer."""
        rows = self._roast["weight"].rows(input)
        if self.padding_idx is None or self._roast["weight"].zero_row is not None or not torch.is_grad_enabled():
            return rows
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


class RoastEmbeddingBag(RoastLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` on the pool: the rows asked for are read, then reduced."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the reduced bags; all modes and arguments of the dense layer."""
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
            # The bag operator skips one index, so all padding entries point at one more row.
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
        """Whether there is nothing about these weights that the bag operator would refuse."""
        return weights is None or (self.mode == "sum" and weights.shape == input.shape)

    def _reduce(self, rows: Tensor, input: Tensor, weights: Tensor | None) -> Tensor:
        """Return bags of one length, from their rows `[bags, entries, dim]`.

        The bag operator would do, but a compiler makes a constant of its number of rows, which is the batch's here.
        """
        padding = None if self.padding_idx is None else input == self.padding_idx
        if weights is not None:
            rows = rows * weights[..., None]
        if padding is not None:
            rows = rows.masked_fill(padding[..., None], -torch.inf if self.mode == "max" else 0.0)
        if self.mode == "max":
            bags = rows.max(1).values
            return bags if padding is None else bags.masked_fill(padding.all(1)[:, None], 0.0)
        # In the rows' dtype, which autocast would widen.
        total = rows.sum(1, dtype=rows.dtype)
        if self.mode != "mean":
            return total
        if padding is None:
            return total / input.shape[1]
        return total / (~padding).sum(1)[:, None].clamp(min=1)


class _RoastConv(RoastLayer):
    """What convolutions on the pool have in common."""

    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`."""
        weight = self.weight if tracers else self._roast["weight"].whole(input)
        return self._conv_forward(input, weight, self.bias)


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
    """transformers' `Conv1D` (a linear layer that keeps its weight as `[in, out]`) on the pool."""

    # transformers' own would leave out what the pool adds.
    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor) -> Tensor:
        """Return `x · weight + bias`."""
        return self._roast["weight"].linear_t(x, cast(Tensor, self.bias))
