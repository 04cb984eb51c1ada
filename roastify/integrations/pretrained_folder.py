"""What a folder of transformers with a converted model holds beside its usual files: the plan, and how it is checked.

The weights' files hold the model's state dict, so the pool once, and a placeholder: some bytes under the name of a
tensor that is in the pool. Without roastify, transformers finds no weight under the names of such tensors, and would
fill them with random numbers. The placeholder has another shape, which transformers refuses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from roastify.artifact import seal
from roastify.errors import CheckpointError
from roastify.files import reason_of, replace_file
from roastify.manifest import pool_prefix
from roastify.plain_json import parse_limited, read_limited
from roastify.pool.mapping import MAPPING_VERSION
from roastify.pool.members import placeholder
from roastify.pool.plan import RoastPlan
from roastify.pool.plan_checks import check_names, check_plan
from roastify.pool.pool import basis_name
from roastify.pool.state import decode, difference, encode
from roastify.tensor_file import TensorFile

PLAN_FILE = "roastify_plan.json"
_FORMAT = 1
_KEYS = {"format_version", "mapping_version", "plans", "tensors", "dtype", "sha256"}


@dataclass(frozen=True)
class SavedPlan:
    """A plan file that was read and checked.

    Args:
        path: the file.
        plans: a plan for each pool.
        tensors: the names of all tensors in the files of weights.
        dtype: the model's dtype as transformers sees it. Single tensors may have others.
    """

    path: Path
    plans: tuple[RoastPlan, ...]
    tensors: tuple[str, ...]
    dtype: torch.dtype


def placeholders(plans: Iterable[RoastPlan], backbone: str) -> dict[str, Tensor]:
    """Return the placeholder under the name of a shared tensor, of the backbone if there is one in it.

    Args:
        plans: the model's plans.
        backbone: the attribute of the model without its head, as transformers names it.
    """
    value = placeholder()
    names = [
        tensor.aliases[0] for plan in plans for tensor in plan.shared if tensor.aliases and tensor.shape != value.shape
    ]
    names.sort(key=lambda name: not name.startswith(f"{backbone}."))
    return {name: value for name in names[:1]}


def write_plan_file(folder: Path, plans: Sequence[RoastPlan], tensors: Iterable[str], dtype: torch.dtype) -> SavedPlan:
    """Write a model's plans beside its weights.

    Raises:
        CheckpointError: the file cannot be written.
    """
    values = {
        "format_version": _FORMAT,
        "mapping_version": max(plan.mapping_version for plan in plans),
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": sorted(tensors),
        "plans": [plan.to_dict() for plan in plans],
    }
    path, text = folder / PLAN_FILE, json.dumps(seal(values), indent=1, ensure_ascii=False) + "\n"
    # What is written can be read.
    saved = _parsed(text.encode(), path)
    try:
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}") from error
    return saved


def read_plan_file(path: Path) -> SavedPlan:
    """Read a plan file and check all of it.

    Raises:
        CheckpointError: it is missing, damaged, or newer than this version.
    """
    try:
        content = read_limited(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path}, in which the plan of a model converted by roastify is; copy the whole folder that "
            f"save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; restore it from a whole copy") from error
    return _parsed(content, path)


def _parsed(content: bytes, path: Path) -> SavedPlan:
    try:
        values = parse_limited(content)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        for key, supported in (("format_version", _FORMAT), ("mapping_version", MAPPING_VERSION)):
            if type(values.get(key)) is not int or values[key] < 1:
                raise ValueError(f"it has no {key}")
            if values[key] > supported:
                raise CheckpointError(
                    f"{path} has {key} {values[key]:.9g}, and this roastify reads up to {supported}; install a newer "
                    f"roastify"
                )
        if values.keys() != _KEYS or not isinstance(values["plans"], list) or not values["plans"]:
            raise ValueError(f"its keys are not {', '.join(sorted(_KEYS))}")
        tensors = values["tensors"]
        if not isinstance(tensors, list) or not all(isinstance(name, str) for name in tensors):
            raise ValueError("tensors are no names")
        dtype = getattr(torch, str(values["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError("dtype is none of torch")
        plans = tuple(map(RoastPlan.from_dict, values["plans"]))
        for plan in plans:
            check_plan(plan)
        check_names(plans)
        if any(plan.kept for plan in plans[1:]):
            raise ValueError("a plan after the first has tensors that are not shared")
        if values["sha256"] != seal(values)["sha256"]:
            raise ValueError("it was changed after it was saved: its digest is wrong")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a whole copy") from error
    return SavedPlan(path, plans, tuple(tensors), dtype)


def check_weights(saved: SavedPlan, files: Sequence[Path]) -> dict[str, torch.dtype]:
    """Check that files of weights are those of a plan; return the dtype of every tensor in them.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the pool's values were saved under another plan.
    """
    opened = [TensorFile(path) for path in files]
    of = {name: file for file in opened for name in file.stored()}
    missing = [name for name in saved.tensors if name not in of]
    if missing:
        raise CheckpointError(
            f"{files[0].parent} lacks {len(missing)} of the tensors that {saved.path.name} names: "
            f"{', '.join(missing[:3])}; copy the whole folder that save_pretrained wrote"
        )
    for plan in saved.plans:
        prefix = pool_prefix(plan)
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}weight": (plan.pool_numel // plan.tile[1], plan.tile[1]),
            **{prefix + basis_name(index): tensor.basis_shape for index, tensor in enumerate(plan.with_basis)},
        }
        for name, shape in shapes.items():
            found = of[name].stored()[name].shape if name in of else None
            if found != shape:
                what = "is missing" if found is None else f"has shape {found}"
                raise CheckpointError(f"{name} {what} in {files[0].parent}; {saved.path.name} expects shape {shape}")
        key = f"{prefix}_extra_state"
        if key not in of:
            raise CheckpointError(f"{key} is missing in {files[0].parent}; copy the whole folder that was saved")
        unnamed = [""] * len(plan.shared)
        own, given = decode(encode(plan, unnamed)), decode(of[key].read(key))
        assert own is not None
        reason = "it is damaged" if given is None else difference(own, given, unnamed)
        if given is not None and not reason and (given.values, given.pool_std) != (own.values, own.pool_std):
            reason = "another λ"
        if reason:
            raise CheckpointError(
                f"{prefix}weight in {files[0].parent} was not saved with the {saved.path.name} beside it ({reason}); "
                f"restore all files from one save"
            )
    dtypes = {name: file.stored()[name].dtype for name, file in of.items()}
    return {name: dtype for name, dtype in dtypes.items() if dtype is not None}


def check_written(files: Sequence[Path], state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors in files of weights, each of which has the bits that it has in a state dict.

    Raises:
        CheckpointError: one has not, or tensors of the pool are missing.
    """
    names: list[str] = []
    for path in files:
        file = TensorFile(path)
        for name in file.stored():
            expected, found = state.get(name), file.read(name)
            if expected is None or not _same_bits(found, expected):
                raise CheckpointError(
                    f"{path} was written and does not hold the model's {name}; save to a new folder, and look at the "
                    f"disk"
                )
            names.append(name)
    return names


def _same_bits(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu().contiguous()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def fit_plans(saved: SavedPlan, model: nn.Module, backbone: str) -> list[RoastPlan]:
    """Return the plans with the names that their tensors have in a model, which may have another head.

    transformers loads a model with a head into one without or with another head: the names then lose or get the name
    of the backbone in front. Tensors of a head that the model does not have keep their place in the pool.

    Args:
        saved: the plans of the saved model.
        model: the dense model.
        backbone: the attribute of a model without its head, as transformers names it.

    Raises:
        CheckpointError: the model, but for its head, has another architecture.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    start = f"{backbone}."
    known = [alias for plan in saved.plans for tensor in plan.tensors for alias in tensor.aliases]
    with_head = any(name.startswith(start) for name in known)
    has_head = bool(backbone) and backbone in modules

    def present(name: str) -> str | None:
        others = (name.removeprefix(start), start + name) if backbone else ()
        return next((each for each in (name, *others) if each in parameters), None)

    def place(path: str) -> str:
        return next((each for each in (path, path.removeprefix(start), start + path) if each in modules), "")

    differences, found, plans = [], set(), []
    for plan in saved.plans:
        tensors = []
        for tensor in plan.tensors:
            names = [present(alias) for alias in tensor.aliases]
            for alias, name in zip(tensor.aliases, names, strict=True):
                if name is None and (not with_head or alias.startswith(start)):
                    differences.append(f"{alias} is missing")
                elif name is not None and parameters[name].shape != tensor.shape and tensor.shared:
                    differences.append(f"{name} has shape {tuple(parameters[name].shape)}, expected {tensor.shape}")
            aliases = tuple(name for name in names if name is not None)
            found |= set(aliases)
            tensors.append(dataclasses.replace(tensor, name=aliases[0] if aliases else tensor.name, aliases=aliases))
        plans.append(dataclasses.replace(plan, tensors=tuple(tensors), owner=place(plan.owner), root=place(plan.root)))
    differences += [
        f"{name} is not in the saved model"
        for name in parameters
        if name not in found and (not has_head or name.startswith(start))
    ]
    if differences:
        count = "1 difference" if len(differences) == 1 else f"{len(differences)} differences"
        raise CheckpointError(
            f"{saved.path.parent} was saved from another architecture than this {type(model).__name__} ({count}): "
            f"{'; '.join(differences[:3])}; load the class that was saved, with its config"
        )
    return plans


def with_dtypes(plan: RoastPlan, dtypes: Mapping[str, torch.dtype]) -> RoastPlan:
    """Return a plan whose tensors have other dtypes, and its pool the widest of them.

    Args:
        plan: the plan.
        dtypes: the dtypes by name; a tensor without one keeps its own.
    """
    tensors = tuple(
        dataclasses.replace(tensor, dtype=str(dtypes[tensor.name]).removeprefix("torch."))
        if tensor.name in dtypes
        else tensor
        for tensor in plan.tensors
    )
    widest: torch.dtype | None = None
    for tensor in tensors:
        if tensor.shared and tensor.aliases:
            dtype = getattr(torch, tensor.dtype)
            widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return dataclasses.replace(plan, tensors=tensors, dtype=str(widest or plan.dtype).removeprefix("torch."))
