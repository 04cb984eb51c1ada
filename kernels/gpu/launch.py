"""How kernels are launched at little cost to the host, and what launchers decide alike.

That is integer widths, precision, and whether kernels may overlap.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from roastify.kernels.gpu.mapping import interpreted
from roastify.kernels.view import TileView

# Addresses and counts whose values must not make a kernel of their own. Row lengths are not among them: whether they
# are multiples of 16 decides how wide a load may be.
PLAIN_ARGUMENTS = [
    "key",
    "num_rows",
    "first_tile",
    "num_tiles",
    "grid_cols",
    "num_slots",
    "first_slot",
    "first_chunk",
    "chunk_begin",
    "num_chunks",
    "chunk_end",
    "begin_tile",
    "end_tile",
    "tiles_each",
    "num_lookups",
    "nowhere",
    "steps",
]


_TENSORS = (Tensor, torch.nn.Parameter)
# What a launch may say beside a kernel's parameters.
_OPTIONS = ("num_warps", "launch_pdl")


class Launch:
    """A kernel of which all is known but its tensors; a call with those costs the host a few microseconds.

    On every call of `kernel[grid](...)` Triton looks for the compiled kernel that fits, at a cost of tens of
    microseconds, which a short kernel cannot hide. What makes one fit is the values of its constants; of its integers,
    whether they are 1 or a multiple of 16 (not of those in `PLAIN_ARGUMENTS`), and their widths; of its tensors, the
    dtype and whether the address is a multiple of 16; of its tensor descriptors, the dtype and the box; and the device.
    Here all numbers are fixed, so the rest of these is the key by which compiled kernels are remembered. No tensor is.

    In Triton's interpreter, and on AMD's GPUs, whose kernels depend on more, every call is Triton's own.

    Args:
        kernel: a function under `triton.jit`. What each call brings comes first among its parameters.
        grid: the numbers of its programs.
        fixed: the kernel's other parameters, `num_warps` and `launch_pdl`.

    Raises:
        TypeError: a name is not the kernel's, or one that follows the first of `fixed` is missing.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **fixed: Any) -> None:
        parameters = list(inspect.signature(kernel.fn).parameters)
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._fixed = fixed
        self._names = tuple(name for name in parameters if name not in fixed)
        _check_parameters(kernel, parameters, self._names, fixed)
        # A compiled kernel takes all parameters in the order of its definition, constants too.
        self._rest = tuple(fixed[name] for name in parameters[len(self._names) :])
        self._by_triton = interpreted() or torch.version.hip is not None
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, **arguments: Any) -> None:
        """Launch the kernel on the current device and stream.

        Args:
            arguments: tensors, tensor descriptors and floats by name, in the order of the kernel's parameters.

        Raises:
            TypeError: these are not the names of what is not fixed, in their order. Like everything else about a
                kernel it is checked when the kernel is compiled, so on the first call with arguments of their kind.
        """
        if self._by_triton:
            self._check_arguments(arguments)
            self._kernel[self._grid](**arguments, **self._fixed)
            return
        active = driver.active
        device = active.get_current_device()
        values = arguments.values()
        key = (device, *map(_kind, values))
        run = self._compiled.get(key)
        if run is None:
            # Two threads may both come here: Triton compiles once or twice, and either result will do.
            self._check_arguments(arguments)
            compiled = self._kernel.warmup(grid=self._grid, **arguments, **self._fixed)
            run = self._compiled[key] = compiled[self._grid]
        run(*values, *self._rest, stream=active.get_current_stream(device))

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        if tuple(arguments) != self._names:
            raise TypeError(
                f"{self._kernel.fn.__name__} was called with {', '.join(arguments)}; it takes {', '.join(self._names)}"
            )


def _check_parameters(kernel: Any, parameters: list[str], changing: tuple[str, ...], fixed: dict[str, Any]) -> None:
    name = kernel.fn.__name__
    if unknown := [given for given in fixed if given not in parameters and given not in _OPTIONS]:
        raise TypeError(f"{name} has no parameters {', '.join(unknown)}; it has {', '.join(parameters)}")
    if changing != tuple(parameters[: len(changing)]):
        first = next(parameter for parameter in parameters if parameter in fixed)
        missing = [given for given in changing if parameters.index(given) > parameters.index(first)]
        raise TypeError(f"{name} needs values of {', '.join(missing)}, which come after {first}")


def _kind(value: Any) -> tuple[Any, ...] | type[float]:
    """Return all by which a kernel is compiled anew for an argument."""
    # By its class first: `isinstance(value, Tensor)` is a call of torch's, and there are 15 arguments a layer and step.
    kind = type(value)
    if kind in _TENSORS or (kind not in (float, TensorDescriptor) and isinstance(value, Tensor)):
        return value.dtype, value.data_ptr() % 16 == 0
    if kind is TensorDescriptor:
        # Its address is a multiple of 16, or it could not have been made.
        return value.base.dtype, *value.block_shape
    if kind is float:
        return float
    raise TypeError(f"a launch takes tensors, tensor descriptors and floats, not {value!r}: other numbers are fixed")


def address_type(pool_numel: int, view: TileView, num_rows: int) -> tl.dtype:
    """Return the integers in which a kernel may compute tiles, slots and places: 32 bits wherever they are enough.

    (64-bit remainders made a single-pass kernel take 10 µs where 32-bit ones take 6.)
    """
    largest = max(
        view.num_slots**2,
        view.first_tile + view.num_tiles + view.num_slots,
        pool_numel,
        num_rows * view.grid_cols * view.tile_cols,
    )
    return tl.int32 if largest < 1 << 31 else tl.int64


def precision(dtype: torch.dtype) -> str:
    """Return how a product in a dtype is computed: in float32 following torch's own setting, else in the one way."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Return the arguments that let a kernel start before the one ahead of it ends (Hopper and later)."""
    return {"DEPENDENT": True, "launch_pdl": True} if _may_overlap(device) else {"DEPENDENT": False}


@functools.cache
def _may_overlap(device: torch.device) -> bool:
    return not interpreted() and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take on a device, as Triton itself checks them."""
    if interpreted():
        return 227 << 10
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
