"""`ReadWeight`: the value of a shared attribute, a tensor that computes as usual and refuses writes.

A write to it would be lost in silence, since the next read materialises the tensor from the pool again. So every
in-place operation raises an error, through views and `.data` too: `nn.init.*_(layer.weight)`,
`layer.weight.data.normal_()`, `reset_parameters()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roastify.errors import WriteRefused
from roastify.kernels.torch_internals import disabled_torch_function


class ReadWeight(Tensor):
    """A tensor read from the pool. Operations and kernels treat it as a plain tensor, and return plain tensors."""

    # Disabled, as for `nn.Parameter`: operations see a plain tensor, so torch's fused kernels stay available.
    __torch_function__ = disabled_torch_function
    # With this, `isinstance(layer.weight, nn.Parameter)` is true, as in the dense model. `get_parameter` and code that
    # ties weights check it.
    _is_param = True
    # transformers' initialisers skip tensors with this mark. The pool has its values already.
    _is_hf_initialized = True

    # The attribute that the tensor was read from: `(module, name, PooledWeight)`. The last is None for a view.
    source: tuple[Any, str, Any] | None = None

    @property
    def data(self) -> Tensor:
        """The values without their autograd history. They refuse writes too."""
        return _read_only(Tensor.data.__get__(self), self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape == self.shape and torch.equal(value, self.detach()):
            return
        if self.source is None or self.source[2] is None or value.shape == self.shape:
            raise _write_refusal(self, "data")
        # With another shape (a resized vocabulary), the attribute leaves the pool, as if a Parameter were assigned.
        module, name, _ = self.source
        setattr(module, name, torch.nn.Parameter(value, requires_grad=self.requires_grad))

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The node that read the pool. Never None, so that no module registers the tensor as its own Parameter."""
        node = Tensor.grad_fn.__get__(self)  # type: ignore[union-attr]
        return node or "read from roastify's pool without gradients"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return self.as_subclass(Tensor).__repr__(**options)


def _write_refusal(weight: ReadWeight, operation: str) -> WriteRefused:
    name = f"{weight.source[1]!r} of this {type(weight.source[0]).__name__}" if weight.source else "this tensor"
    return WriteRefused(
        f"{operation} would write to {name}, which lives in the shared pool and has no memory of its own; train the "
        f"pool, exclude the tensor from the conversion, assign a new nn.Parameter to take the tensor out of the pool, "
        f"or call roastify.densify(model) to get a model whose weights can be set",
        weight.source and weight.source[:2],
    )


def _refusing(operation: str) -> Any:
    def refuse(self: ReadWeight, *args: Any, **kwargs: Any) -> Any:
        raise _write_refusal(self, operation)

    refuse.__name__ = operation
    return refuse


def _read_only(result: Any, weight: ReadWeight) -> Any:
    """Return a view of a shared tensor, or several, as tensors that refuse writes too."""
    if not isinstance(result, Tensor):
        return type(result)(_read_only(part, weight) for part in result)
    view = result.as_subclass(ReadWeight)
    if weight.source:
        module, name, _ = weight.source
        view.source = (module, name, None)
    return view


def _viewing(operation: str) -> Any:
    view = getattr(Tensor, operation)

    def read(self: ReadWeight, *args: Any, **kwargs: Any) -> Any:
        return _read_only(view(self, *args, **kwargs), self)

    read.__name__ = operation
    return read


def _viewing_property(attribute: str) -> property:
    view = getattr(Tensor, attribute)
    return property(lambda self: _read_only(view.__get__(self), self))


# The names of these methods end with an underscore, but the methods do not write values.
_HARMLESS = {"requires_grad_", "share_memory_"}
INPLACE_OPERATORS = [
    f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()
]
_WRITERS = [
    name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
] + ["__setitem__", *INPLACE_OPERATORS]
_VIEWS = (
    "__getitem__ detach view view_as t transpose swapaxes swapdims permute narrow select squeeze unsqueeze flatten "
    "unflatten movedim diagonal expand expand_as chunk split tensor_split unbind"
).split()

for _name in _WRITERS:
    setattr(ReadWeight, _name, _refusing(_name))
for _name in _VIEWS:
    setattr(ReadWeight, _name, _viewing(_name))
for _name in ("T", "mT", "H", "mH"):
    setattr(ReadWeight, _name, _viewing_property(_name))
