"""Compares two models as a caller sees them: forward signature, and structure and dtypes of outputs."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from roastify.calls import describe, leaves, run_model, signature_of, split_inputs
from roastify.errors import OutputMismatch, RoastError, SignatureMismatch
from roastify.shown import ShownAsTable


@dataclass(frozen=True, repr=False)
class VerifyReport(ShownAsTable):
    """What was compared and found equal. It prints as `roastify check` shows it.

    Args:
        signature: the forward signature.
        modes: the modes in which outputs were compared: `eval`, `train`; empty without example inputs.
        outputs: `(path, description)` of every output.
        behaviour: the other checks that passed: `deepcopy`, `state dict`, `gradients`.
    """

    signature: str
    modes: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    behaviour: tuple[str, ...] = ()

    def _headline(self) -> str:
        outputs = f"same outputs in {' and '.join(self.modes)}" if self.modes else "outputs not compared"
        return ", ".join(["same signature", outputs, *(f"{check} ok" for check in self.behaviour)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Observation:
    """What a caller sees of a model.

    Args:
        signature: the signature of the bound forward; None if Python cannot tell.
        outputs: for each mode that was run, the output's type and `(path, description)` of its leaves.
    """

    signature: inspect.Signature | None
    outputs: dict[str, tuple[type, list[tuple[str, str]]]]


def observe(model: nn.Module, example_inputs: Any = None, who: str = "original") -> Observation:
    """Return what a caller sees of a model; the model is left unchanged.

    Raises:
        OutputMismatch: the converted model fails on the example inputs.
        RoastError: the original fails on them.
    """
    outputs = {}
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        for mode in ("eval", "train"):
            try:
                result = run_model(model, args, kwargs, mode)
            except Exception as error:  # whatever a model raises on inputs that do not fit it
                kind = OutputMismatch if who == "converted" else RoastError
                raise kind(
                    f"the {who} model fails on the example inputs in {mode} mode: {type(error).__name__}: {error}"
                ) from error
            outputs[mode] = type(result), [(path, describe(leaf)) for path, leaf in leaves(result)]
    return Observation(signature_of(model), outputs)


def compare_interfaces(expected: Observation, found: Observation) -> VerifyReport:
    """Compare the observations of the original and of the converted model.

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


def _same(left: object, right: object) -> bool:
    if left is right or repr(left) == repr(right):
        return True
    try:
        return bool(left == right)
    except (RuntimeError, ValueError):  # tensors and arrays, whose comparison is not one truth value
        return False


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
