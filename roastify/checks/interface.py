"""Checks that a converted model can stand in for the original: forward signature, output structure, shapes, dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roastify.errors import OutputMismatch, RoastError, SignatureMismatch


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and found equal.

    Args:
        signature: the forward signature.
        modes: in which outputs were compared: `eval`, `train`; empty without example inputs.
        outputs: `(path, description)` of every output.
        behaviour: what else was checked: `deepcopy`, `state dict`, `gradients`.
    """

    signature: str
    modes: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    behaviour: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What a caller sees of a model.

    Args:
        signature: of the bound forward; None where Python cannot tell.
        outputs: for each mode run, the output's type and `(path, description)` of its leaves.
    """

    signature: inspect.Signature | None
    outputs: dict[str, tuple[type, list[tuple[str, str]]]]


def observe(model: nn.Module, example_inputs: Any = None, who: str = "original") -> Observation:
    """Look at a model as a caller would; it is left as it was.

    Raises:
        OutputMismatch: the converted model fails on the example inputs.
        RoastError: the original fails on them.
    """
    outputs = {}
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        for mode in ("eval", "train"):
            try:
                result = run(model, args, kwargs, mode)
            except Exception as error:  # whatever a model raises on inputs that do not fit it
                kind = OutputMismatch if who == "converted" else RoastError
                raise kind(
                    f"the {who} model fails on the example inputs in {mode} mode: {type(error).__name__}: {error}"
                ) from error
            outputs[mode] = type(result), [(path, describe(leaf)) for path, leaf in leaves(result)]
    return Observation(signature_of(model), outputs)


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: str,
    then: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a model's output in `eval` or `train` mode; the model and the inputs are left as they were.

    Args:
        model: to run.
        args: positional inputs.
        kwargs: keyword inputs.
        mode: `eval` or `train`.
        then: if given, the forward runs with gradients, and this takes its output before the model's state is put back.
    """
    with _preserved(model), torch.set_grad_enabled(then is not None):
        output = model.train(mode == "train")(*_copied(args), **_copied(kwargs))
        return output if then is None else then(output)


def compare(expected: Observation, found: Observation) -> VerifyReport:
    """Compare what was seen of the original with what was seen of the converted model.

    Raises:
        SignatureMismatch: the forward signatures differ.
        OutputMismatch: the outputs differ in structure, shape, dtype or device.
    """
    if expected.signature is not None and found.signature is not None:
        _compare_signatures(expected.signature, found.signature)
    for mode, (expected_type, before) in expected.outputs.items():
        compare_outputs(mode, (expected_type, before), found.outputs[mode])
    leaves = expected.outputs["eval"][1] if expected.outputs else []
    return VerifyReport(str(expected.signature or "(unknown)"), tuple(expected.outputs), tuple(leaves))


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as `(args, kwargs)`: a mapping is keyword arguments, a sequence positional ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _compare_signatures(expected: inspect.Signature, found: inspect.Signature) -> None:
    differences = []
    for name in dict.fromkeys([*expected.parameters, *found.parameters]):
        before, after = expected.parameters.get(name), found.parameters.get(name)
        if before is None or after is None:
            differences.append(f"parameter {name!r} is {'missing' if after is None else 'new'}")
            continue
        for field in ("kind", "default", "annotation"):
            same_type = field != "default" or type(before.default) is type(after.default)
            if not same_type or not _same(getattr(before, field), getattr(after, field)):
                values = f"{getattr(before, field)!r}, found {getattr(after, field)!r}"
                differences.append(f"parameter {name!r}: {field} expected {values}")
    if list(expected.parameters) != list(found.parameters) and not differences:
        differences.append("the parameters are in another order")
    if not _same(expected.return_annotation, found.return_annotation):
        differences.append(f"it returns {found.return_annotation!r}, expected {expected.return_annotation!r}")
    if differences:
        raise SignatureMismatch(
            f"the converted model's forward{found} differs from the original's forward{expected}: "
            + "; ".join(differences)
        )


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of a model's forward, its annotations resolved where they can be; None if there is none."""
    try:
        return inspect.signature(model.forward, eval_str=True)
    except Exception:  # an annotation that only a type checker can resolve; names then compare as text
        with contextlib.suppress(TypeError, ValueError):
            return inspect.signature(model.forward)
    return None


def _same(left: object, right: object) -> bool:
    if left is right or repr(left) == repr(right):
        return True
    try:
        return bool(left == right)
    except (RuntimeError, ValueError):  # tensors and arrays, whose comparison is not one truth value
        return False


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass changes: buffers, attributes, modes, random generators."""
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    # Values are written back only where they were written to: a buffer may be an expanded view.
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            # All three, since models draw from each: transformers' speech models mask what numpy tells them.
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, own, buffers in attributes:
            module.__dict__.clear()
            module.__dict__.update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _copied(inputs: Any) -> Any:
    """Return inputs whose tensors are copies: a forward may write to what it is given."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(path, leaf)` for everything in an output: tuples, dicts, transformers' outputs, plain dataclasses."""
    for key_path, leaf in pytree.tree_flatten_with_path(value)[0]:
        where = path + pytree.keystr(key_path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            # A plain dataclass is a leaf to pytree; its fields are what a caller reads.
            for name, field in vars(leaf).items():
                yield from leaves(field, f"{where}.{name}")
        else:
            yield where or "output", leaf


def describe(leaf: Any) -> str:
    """Return a tensor's dtype, shape and device, or else the type's name."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
    return type(leaf).__name__


def compare_outputs(
    mode: str, expected: tuple[type, list[tuple[str, str]]], found: tuple[type, list[tuple[str, str]]]
) -> None:
    """Compare two outputs' types and described leaves.

    Raises:
        OutputMismatch: they differ.
    """
    (expected_type, before), (found_type, after) = expected, found
    if expected_type is not found_type:
        raise OutputMismatch(
            f"in {mode} mode the converted model returns a {found_type.__name__}; expected a {expected_type.__name__}"
        )
    if [path for path, _ in before] != [path for path, _ in after]:
        raise OutputMismatch(
            f"in {mode} mode the converted model's outputs are {[path for path, _ in after]}; expected "
            f"{[path for path, _ in before]}"
        )
    for (path, wanted), (_, got) in zip(before, after, strict=True):
        if wanted != got:
            raise OutputMismatch(f"in {mode} mode output {path} of the converted model is {got}; expected {wanted}")
