"""The losses of a recovery: how far the student's outputs and features are from the teacher's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roastify.calls import describe, leaves
from roastify.errors import ConfigError, RecoveryError, closest
from roastify.kernels.torch_internals import pytree
from roastify.layers.base import RoastModule
from roastify.names import select

_EPSILON = 1e-12


def floats_of(output: Any) -> dict[str, Tensor]:
    """Return an output's floating tensors by path; tensors of one element, for example a loss, are left out."""
    return {
        path.strip(".[]'"): leaf
        for path, leaf in leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1
    }


def check_comparable(student: Any, teacher: Any) -> None:
    """Raise `RecoveryError` unless two models' outputs for one batch have the same floating tensors."""
    ours, theirs = floats_of(student), floats_of(teacher)
    if not theirs:
        raise RecoveryError(
            "no output of the teacher is a floating-point tensor of several elements, so the student cannot learn from "
            "it; wrap both models in a module that returns such a tensor, for example the logits"
        )
    if ours.keys() != theirs.keys():
        raise RecoveryError(
            f"the student's floating outputs are {list(ours)}, the teacher's {list(theirs)}; pass the dense model that "
            f"the student was converted from"
        )
    for path, output in theirs.items():
        if ours[path].shape != output.shape:
            raise RecoveryError(
                f"output {path} of the student is {describe(ours[path])}, the teacher's {describe(output)}; pass the "
                f"dense model that the student was converted from"
            )


def find_logits(output: Any, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the outputs to match as logits: those that patterns select; without patterns, those named `…logits`.

    Raises:
        ConfigError: a pattern matches no output.
    """
    paths = list(floats_of(output))
    if patterns is None:
        return tuple(path for path in paths if re.split(r"\W+", path)[-1].endswith("logits"))
    return tuple(select("logits", patterns, paths, "floating output", ConfigError))


def output_loss(
    student: Any, teacher: Any, logits: Sequence[str], temperature: float, mask: Tensor | None = None
) -> Tensor:
    r"""Return the distance of a student's outputs from the teacher's, in the mean over outputs.

    The distance of logits is :math:`T^2\,KL(softmax(t/T) \,\Vert\, softmax(s/T))` (Hinton, Vinyals, Dean, 2015). The
    classes lie along the last dimension, or along the second of four (images). The distance of other outputs is
    :math:`\lVert s - t \rVert^2 / \lVert t - mean(t) \rVert^2`.
    """
    ours, theirs = floats_of(student), floats_of(teacher)
    losses = []
    for path, target in theirs.items():
        if path in logits:
            losses.append(temperature**2 * _divergence(ours[path], target, temperature, mask))
        else:
            losses.append(relative_error(*finite(ours[path], target), mask))
    return torch.stack(losses).mean()


def class_dim(logits: Tensor) -> int:
    """Return the dimension of the classes: the last; for images the second, as in `cross_entropy`."""
    return 1 if logits.dim() == 4 else -1


def _divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    dim = class_dim(teacher)
    ours = F.log_softmax(student.float() / temperature, dim)
    theirs = F.log_softmax(teacher.float() / temperature, dim)
    # A class of teacher probability 0 (a masked score) adds nothing.
    terms = torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - ours)).sum(dim)
    return _mean(terms, mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the tokens that the mask `[batch, tokens]` keeps; over all values if it does not fit."""
    if mask is None or values.shape[:2] != mask.shape:
        return values.mean()
    kept = mask.to(values.dtype)
    by_token = values.flatten(2).mean(-1) if values.dim() > 2 else values
    return (by_token * kept).sum() / kept.sum()


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference, relative to the teacher's variance."""
    ours, theirs = student.float(), teacher.float()
    if mask is None or theirs.shape[:2] != mask.shape:
        return F.mse_loss(ours, theirs) / (theirs.var(correction=0) + _EPSILON)
    spread = _mean((theirs - theirs.mean()).square(), mask)
    return _mean((ours - theirs).square(), mask) / (spread + _EPSILON)


def finite(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two outputs with 0 where the teacher's is not finite, so that masked scores do not count."""
    known = teacher.isfinite()
    return torch.where(known, student, 0.0), torch.where(known, teacher, 0.0)


def find_features(student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the modules whose outputs are matched.

    With patterns, these are the modules that the patterns select. Without, they are the modules that have layers on the
    pool as children (blocks and sublayers). If only the model itself has such children, they are the layers on the
    pool.

    Raises:
        ConfigError: a pattern matches no module, or the teacher lacks a module.
    """
    names = [name for name, module in student.named_modules() if name and not _is_list(module)]
    if patterns is not None:
        found = tuple(select("features", patterns, names, "module", ConfigError))
    else:
        layers = [name for name in names if isinstance(student.get_submodule(name), RoastModule)]
        parents = {name.rpartition(".")[0] for name in layers}
        found = tuple(name for name in names if name in parents) or tuple(layers)
    theirs = dict(teacher.named_modules())
    for name in found:
        if name not in theirs:
            raise ConfigError(
                f"the teacher has no module {name!r}{closest(name, theirs)}; pass the dense model that the student was "
                f"converted from, or other features"
            )
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


class Recorder:
    """Records the outputs of a model's modules, call by call.

    Args:
        model: the model.
        names: the names of the modules.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = names
        self.outputs: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record until the end of the context."""
        hooks = []
        try:
            for name in self.names:
                hooks.append(self.model.get_submodule(name).register_forward_hook(self._hook(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.outputs = {}

    def take(self) -> dict[str, list[Tensor]]:
        """Return the outputs recorded since the last call of `take`."""
        taken, self.outputs = self.outputs, {}
        return taken

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            self.outputs.setdefault(name, []).extend(leaf for leaf in tensors if leaf.is_floating_point())

        return hook


def feature_loss(
    student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], mask: Tensor | None = None
) -> Tensor:
    """Return the relative error of the features, in the mean over modules and their calls.

    Raises:
        RecoveryError: no feature was recorded, or a module returned tensors of other shapes in the student.
    """
    if not teacher:
        raise RecoveryError(
            "no module chosen as a feature was called and returned a floating-point tensor; choose other modules with "
            "features=, or none with feature_weight=0"
        )
    losses = []
    for name, theirs in teacher.items():
        ours = student.get(name, [])
        if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
            raise RecoveryError(
                f"module {name!r} returned tensors of shapes {[list(tensor.shape) for tensor in ours]} in the student "
                f"and {[list(tensor.shape) for tensor in theirs]} in the teacher, so its features cannot be matched; "
                f"choose other modules with features=, or none with feature_weight=0"
            )
        pairs = zip(ours, theirs, strict=True)
        losses.append(torch.stack([relative_error(one, other, mask) for one, other in pairs]).mean())
    return torch.stack(losses).mean()
