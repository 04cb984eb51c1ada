"""How a model is called and what it returns: example inputs, signatures, and outputs as their leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roastify.isolation import state_kept
from roastify.kernels.torch_internals import pytree


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as `(args, kwargs)`: a mapping is keyword arguments, a sequence positional ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of a model's forward, with resolved annotations if possible; None if there is none."""
    try:
        return inspect.signature(model.forward, eval_str=True)
    except Exception:  # an annotation that only a type checker can resolve; names then compare as text
        with contextlib.suppress(TypeError, ValueError):
            return inspect.signature(model.forward)
    return None


def run_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    then: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a model's output in `eval` or `train` mode; the model and the inputs are left unchanged.

    Args:
        model: the model to run.
        args: positional inputs.
        kwargs: keyword inputs.
        mode: `eval` or `train`.
        then: a function of the output, or None. If given, the forward runs with gradients, the function is called
            before the model's state is restored, and its result is returned.
    """
    with state_kept(model), torch.set_grad_enabled(then is not None):
        output = model.train(mode == "train")(*_copied_inputs(args), **_copied_inputs(kwargs))
        return output if then is None else then(output)


def _copied_inputs(inputs: Any) -> Any:
    """Return inputs whose tensors are copies, because a forward may write to its inputs."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, leaf)` for everything in an output: tuples, dicts, transformers' outputs, plain dataclasses."""
    for key_path, leaf in pytree.tree_flatten_with_path(value)[0]:
        where = path + pytree.keystr(key_path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            # A plain dataclass is a leaf to pytree, but a caller reads its fields.
            for name, field in vars(leaf).items():
                yield from leaves(field, f"{where}.{name}")
        else:
            yield where or "output", leaf


def describe(leaf: Any) -> str:
    """Return a tensor's dtype, shape and device, or else the type's name."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
    return type(leaf).__name__


def describe_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return what a model is called with, each argument as `describe` has it."""
    parts = [describe(value) for value in args]
    parts += [f"{name}={describe(value)}" for name, value in kwargs.items()]
    return ", ".join(parts) or "nothing"
