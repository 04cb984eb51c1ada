"""Whether a plan that was read from a file is one that describes a model: sizes and places that fit each other.

A plan decides how much memory is allocated and where values are read. So a forged one is refused before it is used.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import torch

from roastify.pool.mapping import MAPPING_VERSION, MAPPINGS, SIGNS, UNFOLDED_VERSION
from roastify.pool.plan import FoldPlan, RoastPlan, TensorPlan

# More elements than any model has. Below it, addresses are exact in every integer and floating type that holds them.
_MOST_ELEMENTS = 1 << 50
# The chunk table has a row for each time that the tiles fill the slots, which is about the ratio.
_MOST_CHUNKS = 1 << 20
_LONGEST_NAME = 1 << 16
# Γ holds squares of λ times the pool's spread, in float64.
_LARGEST_SCALE = 1e150

# What holds, and what is wrong if it does not. They are evaluated in turn, so each may rely on those before.
_Facts = Iterator[tuple[bool, str]]


def check_plan(plan: RoastPlan) -> None:
    """Check a complete plan (λ known).

    Raises:
        ValueError: two of its figures contradict each other, or one is out of range.
    """
    _check("the plan", _facts(plan))
    for index, fold in enumerate(plan.folds):
        _check(f"fold {index}", _facts_of_fold(plan, index, fold))
    for tensor in plan.tensors:
        _check(
            f"tensor {tensor.name[:200]!r}", _facts_of_shared(plan, tensor) if tensor.shared else _facts_of_kept(tensor)
        )
    _check_layout(plan)


def _check(what: str, facts: _Facts) -> None:
    for holds, problem in facts:
        if not holds:
            raise ValueError(f"{what}: {problem}")


def _facts(plan: RoastPlan) -> _Facts:
    yield plan.mapping in MAPPINGS, f"its mapping is none of {', '.join(MAPPINGS)}"
    yield plan.sign in SIGNS, f"its sign is none of {', '.join(SIGNS)}"
    yield plan.sharing in ("global", "local"), "its sharing is neither global nor local"
    yield plan.init in ("match", "project"), "its init is neither match nor project"
    yield plan.share in ("weights", "all"), "its share is neither weights nor all"
    version = MAPPING_VERSION if plan.folds else UNFOLDED_VERSION
    yield plan.mapping_version == version, f"its mapping_version is {plan.mapping_version}; expected {version}"
    yield plan.ratio >= 1, "its ratio is below 1"
    yield is_trainable(plan.dtype), "its dtype is not one that a pool can have"
    yield min(plan.tile) >= 1 and math.prod(plan.tile) < 1 << 31, "its tile has an impossible size"
    yield plan.mapping != "hashednet" or plan.tile == (1, 1), "its mapping is hashednet, and its tile is not 1×1"
    yield plan.pool_std is not None and 0 <= plan.pool_std < _LARGEST_SCALE, "its pool_std is missing or out of range"
    yield bool(plan.shared), "no tensor is shared"
    yield sum(tensor.numel for tensor in plan.tensors) <= _MOST_ELEMENTS, "it has more elements than any model"
    yield all(each.num_slots >= 1 for each in plan.regions), "a region has no slots"
    yield sum(each.num_slots for each in plan.regions) == plan.num_slots, "num_slots is not the sum of the regions'"
    yield plan.scope in ("model", "adapters"), "its scope is neither model nor adapters"
    yield 0 <= plan.base_numel <= (_MOST_ELEMENTS if plan.of_adapters else 0), "its base_numel is out of range"
    num_regions = len(plan.shared) if plan.sharing == "local" else 1
    yield len(plan.regions) == num_regions, f"it has {len(plan.regions)} regions; expected {num_regions}"


def _facts_of_fold(plan: RoastPlan, index: int, fold: FoldPlan) -> _Facts:
    yield _is_power_of_2(fold.fold), "its fold is no power of 2"
    yield _is_power_of_2(fold.hashes) and fold.hashes <= fold.fold, "its hashes are no power of 2 up to the fold"
    yield fold.cols >= 1 and fold.cols % fold.fold == 0, "its columns are no multiple of the fold"
    yield 1 <= fold.span < 1 << 31, "its span is out of range"
    yield any(tensor.fold == index for tensor in plan.shared), "no tensor uses it"
    before = sum(each.view(0, 0).num_scales for each in plan.folds[:index])
    yield fold.first_scale in (None, before), f"its first_scale is not {before}, where the learned scales before it end"


def _is_power_of_2(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


def is_trainable(dtype: str) -> bool:
    """Return whether a name is that of a dtype in which a pool can be trained."""
    found = getattr(torch, dtype, None)
    return isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2


def _facts_of_any(tensor: TensorPlan) -> _Facts:
    yield 0 < len(tensor.name) <= _LONGEST_NAME, "its name is empty or too long"
    yield all(0 < len(alias) <= _LONGEST_NAME for alias in tensor.aliases), "a name of it is empty or too long"
    yield not tensor.aliases or tensor.aliases[0] == tensor.name, "its name is not the first of its aliases"
    yield len(set(tensor.aliases)) == len(tensor.aliases), "an alias is there twice"
    yield all(size >= 0 for size in tensor.shape), "its shape has a negative size"


# The fields of a tensor that stays dense keep these values.
_OF_SHARED = ("rows", "cols", "transposed", "strips", "base", "region", "num_tiles", "zero_row", "center")
_UNSET = TensorPlan("", (), (), "", "", False, "")


def _facts_of_kept(tensor: TensorPlan) -> _Facts:
    yield from _facts_of_any(tensor)
    yield bool(tensor.aliases), "it has no aliases"
    yield isinstance(getattr(torch, tensor.dtype, None), torch.dtype), "its dtype is unknown"
    for name in (*_OF_SHARED, "scale", "diagonal", "fold", "basis_count", "start"):
        yield getattr(tensor, name) == getattr(_UNSET, name), f"it is not shared and has the value {name}"


def _facts_of_shared(plan: RoastPlan, tensor: TensorPlan) -> _Facts:
    yield from _facts_of_any(tensor)
    yield tensor.numel >= 1, "it is shared and empty"
    yield is_trainable(tensor.dtype), "its dtype is not one that can be shared"
    largest = torch.finfo(getattr(torch, tensor.dtype)).max
    yield tensor.scale is not None and 0 <= tensor.scale <= min(largest, _LARGEST_SCALE), "its scale is not in range"
    yield (tensor.scale or 0.0) * (plan.pool_std or 0.0) < _LARGEST_SCALE, "its scale is not in range"
    yield abs(tensor.center) <= largest, "its center does not fit its dtype"
    yield tensor.fold is None or 0 <= tensor.fold < len(plan.folds), "its fold is not one of the plan's"
    yield tensor.basis_count >= 0, "its basis_count is negative"
    yield (tensor.rows, tensor.cols) in _matrices(plan, tensor), "its rows and cols do not fit its shape"
    yield 0 <= tensor.start <= largest, "its start does not fit its dtype"
    yield plan.has_starts or not tensor.start, "it has a start, and its plan has none"
    if tensor.fold is not None:
        fold = plan.folds[tensor.fold]
        yield tensor.strips == (len(tensor.shape) > 2), "it is folded, and a matrix in strips or kernels in tiles"
        height = 1 if tensor.strips else plan.tile[0]
        yield tensor.rows % (fold.hashes * height) == 0, "its hashes do not begin with a row of tiles"
    if tensor.basis_count:
        yield tensor.basis_count < math.prod(tensor.shape[2:]), "its basis has more kernels than a kernel has positions"
    if tensor.zero_row is not None:
        yield 0 <= tensor.zero_row < min(tensor.rows, tensor.shape[0]), "its zero_row is not one of its rows"
    if tensor.diagonal:
        yield len(tensor.shape) == 2 and len(tensor.diagonal) == min(tensor.shape), "its diagonal has another length"
        yield set(tensor.diagonal) <= {"+", "-"}, "its diagonal is not made of + and -"
    yield 0 <= tensor.region < len(plan.regions), "its region is not one of the plan's"
    yield tensor.base >= 0, "its base is negative"


def _matrices(plan: RoastPlan, tensor: TensorPlan) -> list[tuple[int, int]]:
    """Return the sizes that the matrix of a shared tensor may have in the pool."""
    shape = tensor.shape
    if len(shape) < 2:
        return [] if tensor.transposed or tensor.basis_count or tensor.fold is not None else [(1, tensor.numel)]
    if len(shape) > 2 and (tensor.basis_count or tensor.fold is not None):
        channels = shape[1] if tensor.fold is None else _width(plan.folds[tensor.fold], shape[1])
        elements = tensor.basis_count or math.prod(shape[2:])
        return [] if tensor.transposed else [(shape[0], channels * elements)]
    if tensor.basis_count:
        return []
    dense = [(shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1])]
    if tensor.transposed:
        dense = [(cols, rows) for rows, cols in dense]
    if tensor.fold is None:
        return dense
    return [(rows, _width(plan.folds[tensor.fold], cols)) for rows, cols in dense]


def _width(fold: FoldPlan, cols: int) -> int:
    """Return how many columns a fold leaves of so many; none if it is a fold of another number of columns."""
    return cols // fold.fold if cols == fold.cols else 0


def _check_layout(plan: RoastPlan) -> None:
    """Check that the tensors of every region lie one after the other, and that slots and chunks follow from them."""
    size = plan.slot_size
    by_region: dict[int, list[TensorPlan]] = {}
    for tensor in plan.shared:
        by_region.setdefault(tensor.region, []).append(tensor)
    first_slot = first_chunk = 0
    for index, (region, tile_map) in enumerate(zip(plan.regions, plan.maps(), strict=True)):
        end = 0
        for tensor in sorted(by_region.get(index, []), key=lambda each: each.base):
            if tensor.base != end:
                raise ValueError(f"tensor {tensor.name!r}: its base is {tensor.base}; expected {end}")
            view = tile_map.view(tensor.rows, tensor.cols, tensor.base, tensor.strips)
            if tensor.num_tiles != view.num_tiles:
                raise ValueError(f"tensor {tensor.name!r}: it has {tensor.num_tiles} tiles; expected {view.num_tiles}")
            end += tensor.matrix_numel if tensor.strips else view.num_tiles * size
        expected = -(-end // size), first_slot, first_chunk
        if (region.num_tiles, region.first_slot, region.first_chunk) != expected:
            raise ValueError(
                f"region {index}: num_tiles, first_slot and first_chunk are {region.num_tiles}, {region.first_slot}, "
                f"{region.first_chunk}; expected {expected[0]}, {expected[1]}, {expected[2]}"
            )
        first_slot += region.num_slots
        first_chunk += tile_map.num_chunks
    if first_chunk > _MOST_CHUNKS:
        raise ValueError(f"its chunk table has {first_chunk:,} rows; at most {_MOST_CHUNKS:,} are read")


def check_names(plans: tuple[RoastPlan, ...]) -> None:
    """Check that no two tensors of a model's plans have one name, and that each pool has its own place.

    Raises:
        ValueError: a name or a place is there twice.
    """
    names = Counter(itertools.chain.from_iterable(tensor.aliases for plan in plans for tensor in plan.tensors))
    name, count = names.most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"two tensors have the name {name!r}")
    if len({plan.owner for plan in plans}) < len(plans):
        raise ValueError("two pools have the same owner")
