"""Decides a plan by arithmetic on shapes: which tensors are shared, how they are tiled, how large the pool is.

Nothing here changes a weight, and shapes are enough, so plans are made on the meta device as well. `rewrite` executes a
plan and decides nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from roastify.config import RoastConfig, check_ratio
from roastify.conversion.fx_pass import Forest, ParameterInfo, WeightUse, matrix_of
from roastify.errors import ConfigError, PlanError
from roastify.layers.kinds import kind_of, read_path_of, refusal_of
from roastify.names import select
from roastify.pool.mapping import MAPPING_VERSION, TileMap
from roastify.pool.plan import PoolRegion, RoastPlan, TensorPlan

# Largest first. In a prototype, tile size made no difference to accuracy beyond noise down to 17 slots (ResNet-9 on
# CIFAR-10), and larger tiles run faster.
_TILES = ((128, 64), (64, 64), (32, 32), (16, 16), (8, 8))
_ENOUGH_SLOTS = 16
_LITTLE_PADDING = Fraction(1, 10)
# With fewer slots than this, a sign for each tile leaves too many tiles as copies of each other (a prototype on IMDB at
# ratio 100, one slot: 71.9 % with a sign a tile, 84.1 % with a sign an element). Later, held out, means of three seeds
# (docs/accuracy.md), an element's against a row's on IMDB: +0.8 and +0.6 in tiles of 16×16 and 32×32 with 89 and 83
# slots at ratios 300 and 100, +0.3 and +0.2 with 74 and 112 slots of 128×64 at 15 and 10, +0.5, +0.2 and 0.0 with 295,
# 332 and 357 smaller ones, and 0.0 to -0.3 with 1,182 and more. The line stays where it is because from it on tiles are
# 128×64 ones, and a sign for each row of them costs a product nothing.
# Coefficients of small bases are the other way in few slots too: their rows are many tiles long, a word's are four.
# ResNet-9 on CIFAR-10, three basis kernels, a sign a row and an element: 84.0 and 83.8 at ratio 100, 78.6 and 77.5 at
# 300; VGG-11 at 100: 82.1 and 81.7. With larger bases, at lower ratios, it is all the same: ResNet-20 84.5 and 84.5 at
# ratio 10, 87.2 and 87.3 at 3; ResNet-9 at 10, 79 slots: 88.5 and 88.1 (docs/accuracy.md). How large their share must
# be is not measured.
_FEW_SLOTS, _MOSTLY = 64, Fraction(3, 4)
# Vectors stay dense up to a fifth of the budget, and beyond that up to three quarters of it as long as they are not
# over 2 % of the model (98 % of a model's parameters are shared at ratio 10, as they are by the fifth). ResNet-9 on
# CIFAR-10, its vectors dense and in the pool: 70.7 and 62.6 % at ratio 300, where they are a fifth of the budget, 62.7
# and 54.7 at 500, 45.0 and 43.6 at 1,000, where they are two thirds; a transformer on IMDB: 84.1 and 84.6 at 300, and
# 75.8 and 82.6 at 1,000, where they would leave the pool a tenth of the budget and are shared (docs/accuracy.md).
_KEPT_OF_BUDGET, _KEPT_OF_MODEL, _MOST_KEPT_OF_BUDGET = Fraction(1, 5), Fraction(1, 50), Fraction(3, 4)
# Kernels made of a basis: ResNet-9 on CIFAR-10, 12 epochs, held out, means of three seeds (docs/accuracy.md). At ratio
# 10 4 to 8 basis kernels of nine positions are alike (88.2 to 88.7; whole kernels 87.8). At 30 3 to 6 are alike, above
# few are best: 3, 5 and 8 give 87.0, 86.7 and 86.2 at 30 (whole: 85.6), 83.8, 83.6 and 83.1 at 100 (81.1), 77.5, 76.6
# and 76.0 at 300 (70.6), and 2 are too few everywhere. Other kernels were not measured: larger ones, which have more
# frequencies to leave out, get a basis, those along one dimension and smaller ones do not. Nor were ratios under 3.
_LEAST_KERNEL_DIMS, _LEAST_POSITIONS, _LEAST_RATIO_OF_BASIS = 2, 9, 2
_BASIS_OF_POSITIONS, _SMALL_BASIS_OF_POSITIONS, _LEAST_RATIO_OF_SMALL_BASIS = Fraction(2, 3), Fraction(1, 3), 30
# Of what a tensor has of the pool by its size, its basis kernels take at most this.
_BASIS_OF_TENSOR = Fraction(1, 8)


def make_plan(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, held: Mapping[str, str] | None = None
) -> RoastPlan:
    """Decide a conversion.

    Args:
        model: shapes and modules are what counts.
        forest: what tracing found in it.
        config: the settings.
        held: tensors that are known not to bear sharing, each with the reason.

    Raises:
        PlanError: a pattern matches nothing, no tensor is eligible, or the ratio cannot be reached.
    """
    held = held or {}
    if config.share != "auto":
        return _make_plan(model, forest, config, held, everything=config.share == "all")
    try:
        plan = _make_plan(model, forest, config, held, everything=False)
    except PlanError as error:
        try:
            return _make_plan(model, forest, config, held, everything=True)
        except PlanError as last:
            # The error that names the larger of the two reachable ratios; they differ with a region for each tensor.
            raise (last if last.largest_ratio > error.largest_ratio else error) from None
    budget = plan.total_numel / check_ratio(config.ratio)
    if plan.ratio == 1 or plan.kept_numel <= _most_kept(budget, plan.total_numel):
        return plan
    try:
        everything = _make_plan(model, forest, config, held, everything=True)
    except PlanError:  # with a region for each tensor, more tensors need more slots than there are
        return plan
    # What is kept either way leaves that much less to vectors and the pool.
    bound = _most_kept(budget - everything.kept_numel, plan.total_numel)
    return everything if plan.kept_numel - everything.kept_numel > bound else plan


def _most_kept(budget: Fraction, total: int) -> Fraction:
    """Return up to how many elements vectors stay dense, where they and the pool have `budget`."""
    return max(_KEPT_OF_BUDGET * budget, min(_KEPT_OF_MODEL * total, _MOST_KEPT_OF_BUDGET * budget))


def _make_plan(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, held: Mapping[str, str], everything: bool
) -> RoastPlan:
    verdicts, trainable = _verdicts(model, forest, config, held, everything)
    eligible = [info for info in forest.parameters if verdicts[info.name].shared]
    ratio = check_ratio(config.ratio)
    if not eligible:
        raise PlanError(_nothing_eligible(verdicts.values()))
    total = sum(tensor.numel for tensor in verdicts.values())
    kept = sum(tensor.numel for tensor in verdicts.values() if not tensor.shared)
    shared = [verdicts[info.name] for info in eligible]
    least_slots = len(shared) if config.sharing == "local" else 1
    bases = sum(math.prod(tensor.basis_shape) for tensor in shared if tensor.basis_count)
    room = (total if ratio == 1 else int(total / ratio)) - kept - bases
    tile = _choose_tile(shared, room, config, ratio)
    size = tile[0] * tile[1]
    placed, region_tiles = _lay_out(shared, tile, local=config.sharing == "local")
    # Coefficients of few basis kernels may be fewer than what may be stored.
    num_slots = sum(region_tiles) if ratio == 1 else min(room // size, sum(region_tiles))
    if num_slots < least_slots and bases and config.kernel_basis == "auto":
        return _make_plan(model, forest, config.replace(kernel_basis="none"), held, everything)
    if num_slots < least_slots:
        raise _unreachable(total, kept, bases, least_slots * size, ratio, verdicts.values())
    regions = _regions(region_tiles, num_slots, tile, config)
    by_name = {tensor.name: tensor for tensor in placed}
    return RoastPlan(
        model=type(model).__name__,
        ratio=float(ratio),
        seed=config.seed,
        tile=tile,
        sign=_choose_sign(config, num_slots, shared),
        mapping=config.mapping,
        mapping_version=MAPPING_VERSION,
        sharing=config.sharing,
        precondition=config.precondition,
        num_slots=num_slots,
        dtype=_widest(info.parameter.dtype for info in eligible),
        trainable=trainable,
        owner=_owner(model, shared),
        regions=regions,
        tensors=tuple(by_name.get(tensor.name, tensor) for tensor in verdicts.values()),
        share="all" if everything else "weights",
    )


def _verdicts(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, held: Mapping[str, str], everything: bool
) -> tuple[dict[str, TensorPlan], bool]:
    """Return the verdict on every tensor, and whether the pool is trained."""
    included = _match("include", config.include, model, forest)
    excluded = _match("exclude", config.exclude, model, forest)
    reasons: dict[str, str | None] = {}
    for info in forest.parameters:
        reason = _reason_to_keep(model, info, everything) or held.get(info.name)
        if reason is None and info.name in excluded:
            reason = f"excluded by {excluded[info.name]!r}"
        elif reason is None and included and info.name not in included:
            reason = "not named by include"
        elif reason is None and info.name not in included and not everything:
            reason = f"small: under {config.min_numel} elements" if info.parameter.numel() < config.min_numel else None
        reasons[info.name] = reason
    trainable = _trainable([info for info in forest.parameters if reasons[info.name] is None])
    for info in forest.parameters:
        if reasons[info.name] is None and info.parameter.requires_grad != trainable:
            reasons[info.name] = "frozen, and the pool is trained" if trainable else "trained, and the pool is frozen"
    verdicts = {}
    for info in forest.parameters:
        reason = reasons[info.name]
        verdicts[info.name] = TensorPlan(
            name=info.name,
            aliases=info.aliases,
            shape=tuple(info.parameter.shape),
            dtype=str(info.parameter.dtype).removeprefix("torch."),
            op=_op(info.uses),
            shared=reason is None,
            reason=reason or ("tied: " + ", ".join(info.aliases[1:]) if len(info.aliases) > 1 else "eligible"),
            **(_matrix(model, info, config) if reason is None else {}),
        )
    return verdicts, trainable


def _trainable(candidates: Sequence[ParameterInfo]) -> bool:
    """Return whether at least half of what may be shared is trained: a pool is trained or frozen as a whole.

    A model that is adapted (LoRA) has nearly all of its weights frozen, and those are what there is to share.
    """
    balance = sum(
        info.parameter.numel() if info.parameter.requires_grad else -info.parameter.numel() for info in candidates
    )
    return balance >= 0


def _reason_to_keep(model: torch.nn.Module, info: ParameterInfo, everything: bool) -> str | None:
    """Return why a tensor cannot be shared, or None."""
    parameter = info.parameter
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"its dtype {str(parameter.dtype).removeprefix('torch.')} cannot be trained in a pool"
    if type(parameter) is not torch.nn.Parameter or parameter.layout is not torch.strided:
        return f"a {type(parameter).__name__} of layout {str(parameter.layout).removeprefix('torch.')}"
    for alias in info.aliases:
        path, _, attribute = alias.rpartition(".")
        module = model.get_submodule(path)
        refusal = refusal_of(module, attribute)
        if refusal:
            return refusal
        if parameter.dim() <= 1 and not everything:
            return f"vector of {type(module).__name__}"
    if parameter.numel() == 0:
        return "empty"
    if everything:
        return "a single number" if parameter.numel() == 1 else None
    if info.constant:
        return "constant: no spread to start a pool from"
    return None


def _op(uses: Sequence[WeightUse]) -> str:
    return ", ".join(dict.fromkeys(use.op for use in uses))


def _matrix(model: torch.nn.Module, info: ParameterInfo, config: RoastConfig) -> dict[str, Any]:
    """Return how a tensor becomes a matrix of tiles, or strips where every consumer wants it whole."""
    kinds, ways = [], []
    for alias in info.aliases:
        path, _, attribute = alias.rpartition(".")
        module = model.get_submodule(path)
        kinds.append(kind_of(type(module), attribute))
        ways.append(read_path_of(module, attribute, info.parameter.shape))
    rows, cols = matrix_of(info.parameter)
    if not any(kinds) and info.parameter.dim() > 1:
        # Rows in the sense of lookups, slices and stacked matrices: all but the last size.
        rows, cols = info.parameter.shape[:-1].numel(), info.parameter.shape[-1]
    transposed = all(kind is not None and kind.transposed for kind in kinds) or (
        not any(kinds)
        and info.parameter.dim() == 2
        and all(way.tiles and way.orientations == {"in×out"} for way in ways)
    )
    if transposed:
        rows, cols = cols, rows
    elif info.parameter.dim() <= 1:
        rows, cols = 1, rows
    basis_count = 0
    if all(kind is not None and kind.kernels for kind in kinds):
        basis_count = _basis_count(info.parameter.shape, config)
    if basis_count:
        cols = info.parameter.shape[1] * basis_count
    return {
        "rows": rows,
        "cols": cols,
        "transposed": transposed,
        "strips": not any(way.tiles for way in ways),
        "through": ", ".join(dict.fromkeys(way.through for way in ways)),
        "whole": next((way.whole for way in ways if way.whole), ""),
        "basis_count": basis_count,
    }


def _basis_count(shape: Sequence[int], config: RoastConfig) -> int:
    """Return how many basis kernels a convolution's weight is made of; 0 for none."""
    kernel, positions, ratio = shape[2:], math.prod(shape[2:]), check_ratio(config.ratio)
    if config.kernel_basis == "none" or ratio == 1:
        return 0
    if isinstance(config.kernel_basis, int):
        saves = config.kernel_basis * (math.prod(shape[:2]) + positions) < math.prod(shape)
        return config.kernel_basis if saves else 0
    if len(kernel) < _LEAST_KERNEL_DIMS or positions < _LEAST_POSITIONS or ratio < _LEAST_RATIO_OF_BASIS:
        return 0
    share = _BASIS_OF_POSITIONS if ratio < _LEAST_RATIO_OF_SMALL_BASIS else _SMALL_BASIS_OF_POSITIONS
    count = round(share * positions)
    return count if count * positions <= _BASIS_OF_TENSOR * math.prod(shape) / ratio else 0


def _match(setting: str, patterns: tuple[str, ...], model: torch.nn.Module, forest: Forest) -> dict[str, str]:
    """Return the tensors that patterns select, by their own names or a module's around them, each with its pattern."""
    names = {name: None for name, _ in model.named_modules(remove_duplicate=False) if name}
    names |= dict.fromkeys(name for info in forest.parameters for name in info.aliases)
    holding = {part for info in forest.parameters for name in info.aliases for part in _parts(name)}
    known = [name for name in names if name in holding]
    chosen = {pattern: set(select(setting, [pattern], known, _WHAT, PlanError)) for pattern in patterns}
    selected: dict[str, str] = {}
    for pattern, hits in chosen.items():
        for info in forest.parameters:
            if any(part in hits for name in info.aliases for part in _parts(name)):
                selected.setdefault(info.name, pattern)
    return selected


_WHAT = "parameter and no module that has any"


def _parts(parameter: str) -> Iterator[str]:
    """Yield a parameter's name, and those of the modules around it."""
    while parameter:
        yield parameter
        parameter = parameter.rpartition(".")[0]


def _choose_tile(shared: Sequence[TensorPlan], room: int, config: RoastConfig, ratio: Fraction) -> tuple[int, int]:
    if config.mapping == "hashednet":
        if config.tile not in ("auto", "1x1"):
            raise ConfigError(f"mapping 'hashednet' is element by element: tile must be 'auto'; found {config.tile!r}")
        return 1, 1
    asked = config.tile_shape()
    if asked is not None:
        return asked
    numel = sum(tensor.matrix_numel for tensor in shared)
    enough = _ENOUGH_SLOTS * (len(shared) if config.sharing == "local" else 1)
    for tile in _TILES:
        size = tile[0] * tile[1]
        tiles = sum(_lay_out(shared, tile, local=False)[1])
        slots = tiles if ratio == 1 else room // size
        if slots >= min(enough, tiles) and tiles * size - numel <= _LITTLE_PADDING * numel:
            return tile
    return _TILES[-1]


def _choose_sign(config: RoastConfig, num_slots: int, shared: Sequence[TensorPlan]) -> str:
    if config.sign != "auto":
        return config.sign
    if config.mapping == "hashednet":
        return "tile"
    if num_slots >= _FEW_SLOTS:
        return "row"
    of_bases = sum(tensor.matrix_numel for tensor in shared if tensor.basis_count)
    mostly = of_bases >= _MOSTLY * sum(tensor.matrix_numel for tensor in shared)
    return "row" if mostly and check_ratio(config.ratio) >= _LEAST_RATIO_OF_SMALL_BASIS else "element"


def _lay_out(shared: Sequence[TensorPlan], tile: tuple[int, int], local: bool) -> tuple[list[TensorPlan], list[int]]:
    """Give every tensor its address; return them with the number of tiles in each region.

    Tiled tensors come first, aligned to tiles, then strips, packed: so there is padding between strips nowhere and
    between the two kinds once.
    """
    size = tile[0] * tile[1]
    placed: list[TensorPlan] = []
    region_ends: list[int] = []
    for tensor in sorted(shared, key=lambda tensor: tensor.strips):
        if local or not region_ends:
            region_ends.append(0)
        base = region_ends[-1]
        if tensor.strips:
            end = base + tensor.matrix_numel
            num_tiles = -(-end // size) - base // size
        else:
            num_tiles = -(-tensor.rows // tile[0]) * -(-tensor.cols // tile[1])
            end = base + num_tiles * size
        region_ends[-1] = end
        placed.append(dataclasses.replace(tensor, base=base, region=len(region_ends) - 1, num_tiles=num_tiles))
    return placed, [-(-end // size) for end in region_ends]


def _regions(
    region_tiles: Sequence[int], num_slots: int, tile: tuple[int, int], config: RoastConfig
) -> tuple[PoolRegion, ...]:
    """Share the slots out in proportion to tiles, at least one a region, by largest remainder."""
    total = sum(region_tiles)
    shares = [Fraction(tiles * num_slots, total) for tiles in region_tiles]
    slots = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(slots)), key=lambda index: shares[index] - slots[index], reverse=True)
    position = 0
    while (missing := num_slots - sum(slots)) != 0:
        index = by_remainder[position % len(slots)] if missing > 0 else max(range(len(slots)), key=slots.__getitem__)
        slots[index] += 1 if missing > 0 else -1
        position += 1
    regions: list[PoolRegion] = []
    first_slot = first_chunk = 0
    for tiles, count in zip(region_tiles, slots, strict=True):
        regions.append(PoolRegion(tiles, count, first_slot, first_chunk))
        first_slot += count
        first_chunk += TileMap(tiles, count, tile, config.seed, config.mapping, "none").num_chunks
    return tuple(regions)


def _owner(model: torch.nn.Module, shared: Sequence[TensorPlan]) -> str:
    """Return the module to register the pool in: the root, unless its children are what its forward iterates over."""
    containers = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
    if not isinstance(model, containers):
        return ""
    return shared[0].name.rpartition(".")[0]


def _widest(dtypes: Iterable[torch.dtype]) -> str:
    widest: torch.dtype | None = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return str(widest).removeprefix("torch.")


def _biggest_kept(tensors: Iterable[TensorPlan]) -> str:
    kept = sorted((tensor for tensor in tensors if not tensor.shared), key=lambda tensor: -tensor.numel)
    return "; ".join(f"{tensor.name} {tensor.numel:,} ({tensor.reason})" for tensor in kept[:3])


def _nothing_eligible(tensors: Iterable[TensorPlan]) -> str:
    tensors = list(tensors)
    if not tensors:
        return "the model has no parameters, so there is nothing to share"
    return (
        f"no weight of the model is eligible for sharing; the biggest kept: {_biggest_kept(tensors)}. Lower min_numel, "
        f"widen include or narrow exclude"
    )


def _unreachable(
    total: int, kept: int, bases: int, least: int, ratio: Fraction, tensors: Iterable[TensorPlan]
) -> PlanError:
    # Rounded down, so that it can be reached; ratio 1, which shares nothing, always can.
    largest = max(1.0, math.floor(100 * total / (kept + bases + least)) / 100)
    # Only those of a number that was asked for; by themselves they would have given way.
    of_bases = f", the basis kernels that kernel_basis asks for ({bases:,})" if bases else ""
    message = (
        f"ratio {float(ratio):g} is unreachable: it allows {int(total / ratio):,} stored parameters of {total:,}, and "
        f"what must stay dense ({kept:,}){of_bases} and the smallest pool ({least:,}) take more. The largest reachable "
        f"ratio is {largest:.2f}. The biggest kept: {_biggest_kept(tensors) or 'none'}"
    )
    return PlanError(message, largest)
