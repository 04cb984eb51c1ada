"""Kernel launches that cost the host little, and the decisions that all launchers share.

The shared decisions are integer widths, precision, and whether kernels may overlap.
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

# Addresses and counts for whose values Triton must not compile another kernel. Row lengths are not among them: whether
# they are multiples of 16 decides how wide a load may be.
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
    "blocks",
    "first_scale",
    "fold_key",
]


_TENSORS = (Tensor, torch.nn.Parameter)
# Launch options, which are not parameters of the kernel.
_OPTIONS = ("num_warps", "launch_pdl")


class Launch:
    """A kernel whose arguments are fixed, except tensors and floats; a call costs the host a few microseconds.

    On every call of `kernel[grid](...)`, Triton looks for the compiled kernel that fits. This takes tens of
    microseconds, which a short kernel cannot hide. A compiled kernel fits one device and one set of:

    - values of the constants;
    - widths of the integers, and whether each is 1 or a multiple of 16 (except those in `PLAIN_ARGUMENTS`);
    - dtypes of the tensors, and whether each address is a multiple of 16;
    - dtypes and boxes of the tensor descriptors.

    Here all integers are fixed, so the device and the properties of tensors and descriptors are the key of a compiled
    kernel. No tensor is stored.

    In Triton's interpreter every call goes through Triton. So it does on AMD's GPUs, where a compiled kernel depends on
    more.

    Args:
        kernel: a `triton.jit` function; the arguments of each call come first among its parameters.
        grid: the number of programs along each axis.
        fixed: the kernel's other parameters, `num_warps` and `launch_pdl`.

    Raises:
        TypeError: a name is no parameter of the kernel, or a parameter after the first fixed one is missing.
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
            TypeError: the names or their order differ from the parameters that are not fixed. This is checked when the
                kernel is compiled, on the first call with arguments of this kind.
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
            # If two threads get here at once, Triton compiles once or twice, and either result is right.
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
        raise TypeError(f"{name} needs fixed values of {', '.join(missing)}, because {first} before them is fixed")


def _kind(value: Any) -> tuple[Any, ...] | type[float]:
    """Return the properties of an argument for which Triton compiles another kernel."""
    # The class is checked first: `isinstance(value, Tensor)` calls torch code, and a layer has 15 arguments in a step.
    kind = type(value)
    if kind in _TENSORS or (kind not in (float, TensorDescriptor) and isinstance(value, Tensor)):
        return value.dtype, value.data_ptr() % 16 == 0
    if kind is TensorDescriptor:
        # A descriptor's address is always a multiple of 16, which its constructor checks.
        return value.base.dtype, *value.block_shape
    if kind is float:
        return float
    raise TypeError(f"a launch takes tensors, tensor descriptors and floats; found {value!r}; pass it to Launch(…)")


def address_type(pool_numel: int, view: TileView, num_rows: int) -> tl.dtype:
    """Return the integer type in which a kernel computes tiles, slots and places: 32 bits if they suffice.

    With 64-bit remainders a single-pass kernel took 10 µs, with 32-bit ones 6 µs.
    """
    largest = max(
        view.num_slots**2,
        view.first_tile + view.num_tiles + view.num_slots,
        pool_numel,
        num_rows * view.groups * view.grid_cols * view.tile_cols,
    )
    return tl.int32 if largest < 1 << 31 else tl.int64


def precision(dtype: torch.dtype) -> str:
    """Return a product's `input_precision`: for float32 as torch is set to, for every other dtype `ieee`."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Return the arguments that let a kernel start before the previous kernel ends (Hopper and later)."""
    return {"DEPENDENT": True, "launch_pdl": True} if _may_overlap(device) else {"DEPENDENT": False}


@functools.cache
def _may_overlap(device: torch.device) -> bool:
    return not interpreted() and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may use on a device, which is the limit that Triton checks."""
    if interpreted():
        return 227 << 10
    return _shared_memory(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
