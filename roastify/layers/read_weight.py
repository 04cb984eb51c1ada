"""`ReadWeight`: the value of a shared attribute, a tensor that computes as usual and refuses effects.

An effect on it would be lost in silence, since the next read materialises the tensor from the pool again. So methods
that write raise an error, through views and `.data` too: `layer.weight.data.normal_()`, `reset_parameters()`. Code
outside of the model's forward gets a `GuardedWeight`. It also refuses functions that write (`nn.init.eye_`, `out=`,
`torch._foreach_mul_`), hooks, gradients that are set, and changes of `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roastify.errors import WriteRefused
from roastify.kernels.torch_internals import disabled_torch_function, pytree, without_subclasses


class ReadWeight(Tensor):
    """A tensor read from the pool. Operations and kernels treat it as a plain tensor, and return plain tensors."""

    # Disabled, as for `nn.Parameter`: operations see a plain tensor, so torch's fused kernels stay available.
    __torch_function__: Any = disabled_torch_function
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
    view = result if isinstance(result, ReadWeight) else result.as_subclass(type(weight))
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


class GuardedWeight(ReadWeight):
    """What code outside of the model's forward reads. Every function of torch asks it first, which takes longer."""

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """False for a weight, so that no optimizer takes it, as it would one of a frozen pool.

        Not without gradients, where no optimizer is made, and `torch.compile` compares it with a fake tensor's.
        """
        leaf: bool = Tensor.is_leaf.__get__(self)  # type: ignore[attr-defined]
        return leaf and (_read_before(self) is None or not torch.is_grad_enabled())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what would have an effect on a read weight; do anything else, and guard views of the weight."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # A weight that a compiled function was given. Methods that write are refused there too.
            with without_subclasses():
                return function(*args, **kwargs)
        with without_subclasses():
            _refuse_effects(function, args, kwargs)
            if function is torch.autograd.grad:
                return _gradients(args, kwargs)
        if not all(issubclass(each, ReadWeight) for each in types):
            # Another class of tensors, or a tracer's, decides what it does with a plain tensor.
            return function(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs))
        with without_subclasses():
            result = function(*args, **kwargs)
            if getattr(function, "__name__", "") in _UNGUARDED or getattr(function, "__self__", None) is Tensor._base:
                return result
            weight = next((arg for arg in [*args, *kwargs.values()] if isinstance(arg, ReadWeight)), None)
            return result if weight is None else _guarded(result, weight)


def _plain(value: Any) -> Any:
    with without_subclasses():
        return value.as_subclass(Tensor) if isinstance(value, ReadWeight) else value


# What gives the same memory on purpose.
_UNGUARDED = {"as_subclass", "__deepcopy__", "__reduce_ex__"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}


def _refuse_effects(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    # An overload's name is `mul_.Tensor`.
    name = getattr(function, "__name__", "").partition(".")[0]
    first = args[0] if args else next(iter(kwargs.values()), None)
    if name == "__set__":
        name = function.__self__.__name__
        if name == "grad" and args[1] is not None:
            raise _write_refusal(args[0], "grad =")
        if name == "requires_grad":
            _check_requires_grad(args[0], args[1])
    elif name == "requires_grad_":
        _check_requires_grad(args[0], kwargs.get("requires_grad", args[1] if len(args) > 1 else True))
    elif name in _HOOKS and isinstance(first, ReadWeight):
        raise _write_refusal(first, f"{name} is lost, as the next read gives another tensor, and")
    elif function in (torch.autograd.backward, Tensor.backward):
        weight = _read_before(kwargs.get("inputs"))
        if weight is not None:
            raise _no_gradient(weight)
    else:
        inplace = (name.endswith("_") and not name.endswith("__")) or name in _WRITERS or kwargs.get("inplace") is True
        written = [kwargs.get("out"), first if inplace and name not in _HARMLESS else None]
        if kwargs.get("max_norm") is not None:
            # A lookup that renormalises rows of its table.
            written += args[1:2]
        for each in written:
            weights = each if isinstance(each, list | tuple) else [each]
            weight = next((weight for weight in weights if isinstance(weight, ReadWeight)), None)
            if weight is not None:
                raise _write_refusal(weight, name)


def _check_requires_grad(weight: Any, wanted: bool) -> None:
    """Refuse to freeze or train one weight: a pool is trained or frozen as a whole."""
    if not isinstance(weight, ReadWeight) or weight.source is None or weight.source[2] is None:
        return
    pool = weight.source[2].pool.parameter()
    if wanted != pool.requires_grad:
        state = "trained" if pool.requires_grad else "frozen"
        raise WriteRefused(
            f"requires_grad of {weight.source[1]!r} of this {type(weight.source[0]).__name__} cannot be set to "
            f"{wanted}: it lives in the shared pool, which is {state} as a whole. Set roast_pool.weight.requires_grad, "
            f"exclude the tensor from the conversion, or call roastify.densify(model)",
            weight.source[:2],
        )


def _read_before(inputs: Any) -> ReadWeight | None:
    """Return a read weight among what gradients are asked for, or None."""
    each = inputs if isinstance(inputs, list | tuple) else [inputs]
    return next((one for one in each if isinstance(one, ReadWeight) and one.source and one.source[2]), None)


def _no_gradient(weight: ReadWeight) -> RuntimeError:
    assert weight.source is not None
    return RuntimeError(
        f"there is no gradient for {weight.source[1]!r} of this {type(weight.source[0]).__name__}: it was read from "
        f"the shared pool, and the loss was computed from the pool, not from this tensor. Ask for the pool's gradient "
        f"(roast_pool.weight), or for the weight's of roastify.densify(model)"
    )


def _gradients(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return `torch.autograd.grad` of read weights, which exists where the outputs were computed from these tensors."""
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    inputs = inputs if isinstance(inputs, list | tuple) else [inputs]
    gradients = torch.autograd.grad(*args, **{**kwargs, "allow_unused": True})
    for one, gradient in zip(inputs, gradients, strict=True):
        if gradient is None and (weight := _read_before(one)) is not None:
            raise _no_gradient(weight)
    if any(gradient is None for gradient in gradients) and not kwargs.get("allow_unused"):
        raise RuntimeError(
            "one of the tensors was not used in the graph; pass allow_unused=True to get None for its gradient"
        )
    return gradients


def _guarded(result: Any, weight: ReadWeight) -> Any:
    """Return views of a read weight as tensors that refuse effects, and its numpy array as one that is read-only."""
    if isinstance(result, list | tuple) and not isinstance(result, torch.Size):
        parts = [_guarded(part, weight) for part in result]
        return result if all(one is other for one, other in zip(parts, result, strict=True)) else type(result)(parts)
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    elif type(result) is Tensor and result.layout is torch.strided and not result.is_meta:
        if result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() and result.numel():
            return _read_only(result, weight)
    return result
