"""Modules that read from the pool: each class a subclass of the layer that it replaces, or joined to any class.

`kinds` says which class stands for which, and turns modules into them and back.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.layers.lazy_weight import Operand
from roastify.layers.pooled_weight import SharedTensor
from roastify.layers.read_weight import SharedWeight
from roastify.pool.forward_pass import RootForward, made_of
from roastify.pool.pool import ReplicatedPool, RoastPool


class RoastModule(nn.Module):
    """What every module on the pool has: its shared attributes read as dense, differentiable tensors.

    `_roast` names them. The class made for the module has a property for each, and a `None` stays in the Parameter's
    place among `_parameters`, which keeps the order of a state dict's keys for the way back.
    """

    _roast: dict[str, SharedTensor]
    # Set on classes made for a module's class; one that stands in this file is named after its last base.
    _roast_original: ClassVar[type[nn.Module]]
    # Takes an attribute out of the pool; `kinds` makes the classes and knows the way back.
    _leave_pool: Callable[[str], None]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter; one in the place of a shared attribute takes that out of the pool."""
        if name in self.__dict__.get("_roast", ()):
            self._assign_shared(name, param)
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_roast", ()):
            self._leave_pool(name)
            # Not super(): the class may no longer be this one.
            delattr(self, name)
        else:
            super().__delattr__(name)

    def _assign_shared(self, name: str, value: Any) -> None:
        """Take what is assigned to a shared attribute: what it reads already, or a Parameter of the module's own."""
        if isinstance(value, SharedWeight):
            # Tying again what is tied already, as transformers' `tie_weights` does.
            if value.source is not None and value.source[2] is self._roast[name]:
                return
        elif isinstance(value, nn.Parameter):
            self._leave_pool(name)
            setattr(self, name, value)
            return
        raise RoastError(
            f"{name!r} of this {type(self).__name__} lives in the shared pool and cannot be assigned a "
            f"{type(value).__name__}; train the pool, assign a new nn.Parameter to take it out of the pool, or call "
            f"roastify.densify(model) to get a model whose weights can be set"
        )

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the module's Parameters; where sharing left none, what it reads instead.

        Code asks `next(self.parameters())` for a dtype or a device. What is read answers that, and an optimizer, or
        `requires_grad = False`, refuses it with an error of its own: neither can be had for a part of the pool.
        """
        count = 0
        for parameter in super().parameters(recurse):
            count += 1
            yield parameter
        if count == 0:
            for module in self.modules() if recurse else [self]:
                if isinstance(module, RoastModule):
                    for name in module._roast:
                        yield cast(nn.Parameter, read_shared(module, name))

    def _replicate_for_data_parallel(self) -> RoastModule:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_roast"] = {
            name: dataclasses.replace(shared, pool=cast(RoastPool, ReplicatedPool(shared.pool)))
            for name, shared in self._roast.items()
        }
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastModule:
        super()._apply(fn, recurse)
        for shared in self._roast.values():
            # What `fn` (half, to, …) makes of a tensor of this dtype, asked of an empty one.
            shared.dtype = fn(torch.empty(0, dtype=shared.dtype)).dtype
        return self


def describe_shared(module: RoastModule) -> str:
    """Return what a module reads from the pool."""
    parts = []
    for name, shared in module.__dict__.get("_roast", {}).items():
        view = shared.view
        what = "strips" if view.strips else "tiles"
        kernels = "" if shared.basis_index is None else f", kernels of basis_{shared.basis_index}"
        parts.append(
            f"{name}: {view.num_tiles} {what} of {view.tile_rows}×{view.tile_cols} in {view.num_slots} shared slots, "
            f"scale={shared.scale:.4g}{kernels}"
        )
    return ", ".join(parts)


# Who wants to know of reads instead of having them done: a tracer, while it traces.
readers: list[Callable[[RoastModule, str], Any]] = []


def read_shared(module: RoastModule, name: str) -> Tensor:
    """Return a shared attribute as the dense, differentiable tensor."""
    if readers:
        return readers[-1](module, name)
    shared = module._roast[name]
    dense = shared.dense()
    # A tensor without values is of a class already, and what records operators (`make_fx`) knows no class of ours.
    if torch.compiler.is_compiling() or type(dense) is not Tensor or _is_recording():
        return dense
    weight = dense.as_subclass(SharedWeight)
    weight.source = (module, name, shared)
    return weight


def _is_recording() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


class _Call:
    """One call of a module: what its code has read, and whether it is given operands.

    Both hold only while what is saved for backward is looked after as it was when the call began. What the module's
    code checkpoints is run again without the call around it, and must read then as it read before.
    """

    def __init__(self, operands: bool) -> None:
        self.operands = operands
        self.saving = _saving()
        self.held: dict[tuple[str, bool], tuple[Any, Tensor]] = {}


def _saving() -> Any:
    """Return the hook that packs what is saved for backward, such as a checkpoint's, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


class _Running(threading.local):
    """The calls of modules that this thread is in."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, _Call] = {}


_running = _Running()


def reading(name: str) -> property:
    """Return the property through which a shared attribute is read as a tensor."""
    return property(
        lambda module: _read_once(module, name),
        doc="Materialised from the pool; gradients flow back to it, and writes are refused.",
    )


def operand(name: str, of_parts: bool) -> property:
    """Return the property of a shared attribute that the module's own code reads by operations on the pool alone.

    Within a call of the module that code is given an `Operand`; everyone else reads a tensor.
    """

    def read(module: RoastModule) -> Any:
        shared = module._roast[name]
        if readers or shared.view.strips:
            return _read_once(module, name)
        if not torch.compiler.is_compiling():
            call = _running.calls.get(module)
            if call is None or not call.operands or call.saving is not _saving():
                return _read_once(module, name)
        return Operand(shared, lambda: _read_once(module, name), of_parts=of_parts)

    return property(read, doc="Read from the pool by the operations of the module's code; elsewhere materialised.")


def _read_once(module: RoastModule, name: str) -> Tensor:
    """Return a shared attribute as a tensor, the same throughout a call of the module while the pool is the same."""
    if readers or torch.compiler.is_compiling():
        return read_shared(module, name)
    call = _running.calls.get(module)
    if call is None or call.saving is not _saving():
        return read_shared(module, name)
    made = made_of(module._roast[name].pool)
    key = name, torch.is_grad_enabled()
    if key not in call.held or call.held[key][0] is not made:
        call.held[key] = made, read_shared(module, name)
    return call.held[key][1]


class RoastReader(RoastModule):
    """A module whose own code reads shared attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; within the call, its code is given operands, or the same tensors throughout."""
        if readers or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        calls = _running.calls
        outer = calls.get(self)
        calls[self] = _Call(self._runs_its_own_code())
        try:
            return super().__call__(*args, **kwargs)
        finally:
            if outer is None:
                del calls[self]
            else:
                calls[self] = outer

    def _runs_its_own_code(self) -> bool:
        """Whether nothing but the class's code runs in a call: no hooks, and no other forward."""
        forward = self.__dict__.get("forward")
        return (
            (forward is None or (isinstance(forward, RootForward) and forward.inner is None))
            and not self._forward_hooks
            and not self._forward_pre_hooks
        )


class RoastLookup(RoastModule):
    """Joined to classes that look their attributes up themselves and may ask for a shared one by another name."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_roast", ()):
            return _read_once(self, name)
        return super().__getattr__(name)


class RoastLayer(RoastModule):
    """A layer whose `weight` is in the pool."""

    # A property under a type that lets it stand where the dense layers declare a Tensor.
    weight: Any = reading("weight")


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
        if readers:
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
        weight = self.weight if readers else self._roast["weight"].whole(input)
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
