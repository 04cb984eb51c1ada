"""The planner: decides which tensors are shared, how they are tiled, and how large the pool is.

A plan needs shapes only and changes no weight, so it can be made on the meta device too. `rewrite` executes a plan and
decides nothing. docs/training.md ("Choices of the planner") lists the measurements behind the constants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from roastify.config import RoastConfig, check_ratio
from roastify.conversion.adapters import WORD, adapter_tensors, has_adapters
from roastify.conversion.folds import with_folds
from roastify.conversion.fx_pass import Forest, ParameterInfo, WeightUse, matrix_of
from roastify.errors import ConfigError, PlanError
from roastify.layers.kinds import is_reflectors, is_vector, kind_of, read_path_of, refusal_of
from roastify.names import select
from roastify.pool.mapping import MAPPING_VERSION, UNFOLDED_VERSION, TileMap
from roastify.pool.plan import ELIGIBLE, EXCLUDED, FoldPlan, PoolRegion, RoastPlan, TensorPlan

# Tiles, largest first, because larger tiles run faster and tile size made little difference to accuracy. See
# docs/results/accuracy-tables.md, "The recipe".
_TILES = ((128, 64), (64, 64), (32, 32), (16, 16), (8, 8))
_ENOUGH_SLOTS = 16
_LITTLE_PADDING = Fraction(1, 10)
# Pools with fewer slots than this use element signs: with tile or row signs, too many tiles are copies of each other
# (IMDB, ratio 100, 20 slots: 86.3 % with element signs, 83.5 % with row signs). Pools with more slots use row signs,
# because their tiles are large, and row signs cost a product nothing. Exception: if three quarters of the shared
# elements are coefficients of small bases, row signs are at least as accurate (ResNet-9, ratio 300: 78.6 % against
# 77.5 %). See docs/training.md, "Choices of the planner".
_FEW_SLOTS, _MOSTLY = 64, Fraction(3, 4)
# Vectors stay dense up to a fifth of the budget. They also stay dense up to three quarters of the budget if they are at
# most 2 % of the model. ResNet-9 loses 8 points at ratio 300 if its vectors are shared; a transformer at ratio 1,000
# gains 7, because its dense vectors would leave the pool a tenth of the budget. See docs/training.md, "Choices of the
# planner".
_KEPT_OF_BUDGET, _KEPT_OF_MODEL, _MOST_KEPT_OF_BUDGET = Fraction(1, 5), Fraction(1, 50), Fraction(3, 4)
# 3×3 kernels get six basis kernels, and three from ratio 30 on: ResNet-9 gains 1.3 points at ratio 30, 2.1 at 100 and
# 3.9 at 300 (docs/results/accuracy-tables.md). Larger kernels get a basis too, because they have more frequencies to
# leave out. Kernels along one dimension and smaller kernels do not. Neither was measured, nor were ratios under 3. See
# docs/training.md, "Choices of the planner".
_LEAST_KERNEL_DIMS, _LEAST_POSITIONS, _LEAST_RATIO_OF_BASIS = 2, 9, 2
_BASIS_OF_POSITIONS, _SMALL_BASIS_OF_POSITIONS, _LEAST_RATIO_OF_SMALL_BASIS = Fraction(2, 3), Fraction(1, 3), 30
# A tensor's basis kernels may take at most this fraction of the tensor's part of the budget.
_BASIS_OF_TENSOR = Fraction(1, 8)


def make_plan(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, unshareable: Mapping[str, str] | None = None
) -> RoastPlan:
    """Decide a conversion.

    Args:
        model: the model. Only its modules and its tensors' shapes matter; for constant tensors, their values too.
        forest: the result of tracing the model.
        config: the settings.
        unshareable: tensors that must stay dense, each with the reason.

    Raises:
        PlanError: a pattern matches nothing, no tensor is eligible, or the ratio cannot be reached.
    """
    unshareable = unshareable or {}
    if config.include == (WORD,) and has_adapters(model):
        return _plan_adapters(model, forest, config, unshareable)
    if config.share != "auto":
        return _make_plan(model, forest, config, unshareable, everything=config.share == "all")
    try:
        plan = _make_plan(model, forest, config, unshareable, everything=False)
    except PlanError as error:
        try:
            return _make_plan(model, forest, config, unshareable, everything=True)
        except PlanError as last:
            # Raise the error with the larger reachable ratio. With a region for each tensor, either may be the larger.
            raise (last if last.largest_ratio > error.largest_ratio else error) from None
    budget = plan.total_numel / check_ratio(config.ratio)
    if plan.ratio == 1 or plan.kept_numel <= _most_kept(budget, plan.total_numel):
        return plan
    try:
        everything = _make_plan(model, forest, config, unshareable, everything=True)
    except PlanError:  # with a region for each tensor, there may be too few slots for all tensors
        return plan
    # The tensors that stay dense in both plans reduce the budget for vectors and the pool.
    bound = _most_kept(budget - everything.kept_numel, plan.total_numel)
    return everything if plan.kept_numel - everything.kept_numel > bound else plan


def _plan_adapters(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, unshareable: Mapping[str, str]
) -> RoastPlan:
    """Decide the conversion of a model's adapters: the base stays as it is, and is not counted."""
    found = adapter_tensors(model)
    of_adapters, base_numel = [], 0
    for info in forest.parameters:
        if id(info.parameter) in found:
            of_adapters.append(info)
        else:
            base_numel += info.parameter.numel()
    dense = {info.name: found[id(info.parameter)] for info in of_adapters if found[id(info.parameter)]}
    if len(dense) == len(of_adapters):
        raise PlanError(
            f"include={WORD!r} found no low-rank factors to share, only {_some(dense)}; such adapters are small: save "
            f"them with PEFT"
        )
    # Factors are thin, with 8 rows or columns, and few: elements are shared one by one, each with a sign. A basis or
    # folds are for large layers.
    tile = "1x1" if config.tile == "auto" else config.tile
    sign = ("tile" if tile == "1x1" else "element") if config.sign == "auto" else config.sign
    settings = dataclasses.replace(config, include=(), tile=tile, sign=sign, kernel_basis="none", fold="none")
    part = dataclasses.replace(forest, parameters=tuple(of_adapters))
    plan = _make_plan(model, part, settings, {**dense, **unshareable}, everything=True)
    return dataclasses.replace(plan, scope=WORD, base_numel=base_numel, share="weights")


def _some(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:2])


def _most_kept(budget: Fraction, total: int) -> Fraction:
    """Return how many elements of vectors may stay dense, given the budget for vectors and the pool."""
    return max(_KEPT_OF_BUDGET * budget, min(_KEPT_OF_MODEL * total, _MOST_KEPT_OF_BUDGET * budget))


def _make_plan(
    model: torch.nn.Module, forest: Forest, config: RoastConfig, unshareable: Mapping[str, str], everything: bool
) -> RoastPlan:
    named = _match("modules", tuple(config.of_modules()), model, forest)
    by_pattern = config.of_modules()
    settings = {info.name: by_pattern.get(named.get(info.name, ""), config) for info in forest.parameters}
    verdicts, trainable = _verdicts(model, forest, config, settings, unshareable, everything)
    eligible = [info for info in forest.parameters if verdicts[info.name].shared]
    ratio = check_ratio(config.ratio)
    if not eligible:
        raise PlanError(_nothing_eligible(verdicts.values()))
    total = sum(tensor.numel for tensor in verdicts.values())
    kept = sum(tensor.numel for tensor in verdicts.values() if not tensor.shared)
    verdicts, folds = with_folds(eligible, verdicts, config, settings)
    shared = [verdicts[info.name] for info in eligible]
    least_slots = len(shared) if config.sharing == "local" else 1
    bases = sum(math.prod(tensor.basis_shape) for tensor in shared if tensor.basis_count)
    room = (total if ratio == 1 else int(total / ratio)) - kept - bases
    tile = _choose_tile(shared, folds, room, config, ratio)
    size = tile[0] * tile[1]
    scales = sum(fold.view(0, 0).num_scales for fold in folds)
    room -= -(-scales // size) * size
    placed, region_tiles = _lay_out(shared, tile, local=config.sharing == "local")
    # At most one slot for each tile: with few basis kernels, the coefficients may need less than the budget.
    num_slots = sum(region_tiles) if ratio == 1 else min(room // size, sum(region_tiles))
    if num_slots < least_slots and bases and config.kernel_basis == "auto":
        return _make_plan(model, forest, config.replace(kernel_basis="none"), unshareable, everything)
    if num_slots < least_slots:
        least = least_slots * size + -(-scales // size) * size
        raise _unreachable(total, kept, bases, least, ratio, verdicts.values())
    regions = _regions(region_tiles, num_slots, tile, config)
    by_name = {tensor.name: tensor for tensor in placed}
    return RoastPlan(
        model=type(model).__name__,
        ratio=float(ratio),
        seed=config.seed,
        tile=tile,
        sign=_choose_sign(config, num_slots, shared),
        mapping=config.mapping,
        mapping_version=MAPPING_VERSION if folds else UNFOLDED_VERSION,
        sharing=config.sharing,
        precondition=config.precondition,
        num_slots=num_slots,
        dtype=_widest(info.parameter.dtype for info in eligible),
        trainable=trainable,
        owner=_owner(model, shared),
        regions=regions,
        tensors=tuple(by_name.get(tensor.name, tensor) for tensor in verdicts.values()),
        share="all" if everything else "weights",
        init=config.init,
        folds=folds,
    )


def _verdicts(
    model: torch.nn.Module,
    forest: Forest,
    config: RoastConfig,
    settings: Mapping[str, RoastConfig],
    unshareable: Mapping[str, str],
    everything: bool,
) -> tuple[dict[str, TensorPlan], bool]:
    """Return the verdict on every tensor, and whether the pool is trained; `settings` are those of each tensor."""
    included = _match("include", config.include, model, forest)
    excluded = _match("exclude", config.exclude, model, forest)
    reasons: dict[str, str | None] = {}
    for info in forest.parameters:
        reason = _reason_to_keep(info, everything) or unshareable.get(info.name)
        if reason is None and info.name in excluded:
            reason = f"{EXCLUDED}{excluded[info.name]!r}"
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
            reason=reason or _why_shared(info),
            **(_matrix(info, settings[info.name]) if reason is None else {}),
        )
    return verdicts, trainable


def _trainable(candidates: Sequence[ParameterInfo]) -> bool:
    """Return whether at least half of the candidates' elements are trained. A pool is trained or frozen as a whole.

    In a model with adapters (LoRA), nearly all weights are frozen, so the frozen weights are shared.
    """
    balance = sum(
        info.parameter.numel() if info.parameter.requires_grad else -info.parameter.numel() for info in candidates
    )
    return balance >= 0


def _why_shared(info: ParameterInfo) -> str:
    why = "tied: " + ", ".join(info.aliases[1:]) if len(info.aliases) > 1 else ELIGIBLE
    sparse = any(isinstance(each, torch.nn.Embedding | torch.nn.EmbeddingBag) and each.sparse for each in info.holders)
    return why + ("; its gradient becomes dense, not sparse" if sparse else "")


def _reason_to_keep(info: ParameterInfo, everything: bool) -> str | None:
    """Return why a tensor cannot be shared, or None."""
    parameter = info.parameter
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"its dtype {str(parameter.dtype).removeprefix('torch.')} cannot be trained in a pool"
    if type(parameter) is not torch.nn.Parameter or parameter.layout is not torch.strided:
        return f"a {type(parameter).__name__} of layout {str(parameter.layout).removeprefix('torch.')}"
    for alias, module in zip(info.aliases, info.holders, strict=True):
        attribute = alias.rpartition(".")[2]
        refusal = refusal_of(module, attribute)
        if refusal:
            return refusal
        if is_reflectors(module) and parameter.dim() > 2:
            return "its Householder reflectors must be exact: their diagonal of ±1 gives the weight its signs"
        if is_vector(module, attribute, parameter.shape) and not everything:
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


def _matrix(info: ParameterInfo, config: RoastConfig) -> dict[str, Any]:
    """Return the `TensorPlan` fields that say how a tensor becomes a matrix, and how modules read it.

    The matrix is cut into tiles. If every consumer needs the dense tensor, it is cut into strips instead.
    """
    kinds, ways = [], []
    for alias, module in zip(info.aliases, info.holders, strict=True):
        attribute = alias.rpartition(".")[2]
        kinds.append(kind_of(type(module), attribute))
        ways.append(read_path_of(module, attribute, info.parameter.shape))
    rows, cols = matrix_of(info.parameter)
    if not any(kinds) and info.parameter.dim() > 1:
        # Lookups, slices and stacked matrices take rows along all dimensions but the last.
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
    """Return the number of basis kernels for a convolution's weight; 0 for no basis."""
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
    """Return the tensors that patterns select, by their names or by modules around them, each with its pattern."""
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
    """Yield a parameter's name, and the names of the modules around it."""
    while parameter:
        yield parameter
        parameter = parameter.rpartition(".")[0]


def _choose_tile(
    shared: Sequence[TensorPlan], folds: Sequence[FoldPlan], room: int, config: RoastConfig, ratio: Fraction
) -> tuple[int, int]:
    if config.mapping == "hashednet":
        if config.tile not in ("auto", "1x1"):
            raise ConfigError(f"mapping 'hashednet' is element by element: tile must be 'auto'; found {config.tile!r}")
        return 1, 1
    asked = config.tile_shape()
    if asked is not None:
        return asked
    numel = sum(tensor.matrix_numel for tensor in shared)
    enough = _ENOUGH_SLOTS * (len(shared) if config.sharing == "local" else 1)
    # The rows of each hash begin with a row of tiles.
    hash_rows = [
        tensor.rows // folds[tensor.fold].hashes for tensor in shared if tensor.fold is not None and not tensor.strips
    ]
    for tile in _TILES:
        if any(rows % tile[0] for rows in hash_rows):
            continue
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

    Tensors in tiles come first and are aligned to tiles. Tensors in strips follow without padding between them. So the
    only padding besides the tiles' own is at the end of a region.
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
    """Distribute the slots over regions in proportion to tiles, by largest remainder; each region gets at least one."""
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
    """Return the path of the module that gets the pool: the root, unless the root's forward iterates over children."""
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
    # Rounded down, so that this ratio is reachable. Ratio 1 shares nothing and is always reachable.
    largest = max(1.0, math.floor(100 * total / (kept + bases + least)) / 100)
    # Only bases that the user asked for get here: with kernel_basis="auto", the plan was made again without bases.
    of_bases = f", the basis kernels that kernel_basis asks for ({bases:,})" if bases else ""
    biggest = _biggest_kept(tensors)
    message = (
        f"ratio {float(ratio):g} is unreachable: it allows {int(total / ratio):,} stored parameters of {total:,}, and "
        f"the tensors that must stay dense ({kept:,}){of_bases} and the smallest pool ({least:,}) take more. The "
        f"largest reachable ratio is {largest:.2f}." + (f" The biggest kept: {biggest}" if biggest else "")
    )
    return PlanError(message, largest)
