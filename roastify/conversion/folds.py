"""Which weights are folded, how much, and which of them read their inputs through the same fold.

The torch.fx pass tells both: which operations consume a weight, and which weights multiply the same value. Such weights
get one fold, so their inputs are folded once. docs/training.md ("Choices of the planner") lists the measurements behind
the constants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from roastify.config import RoastConfig, check_ratio
from roastify.conversion.fx_pass import ParameterInfo
from roastify.errors import PlanError
from roastify.layers.kinds import kind_of, multiplies_inputs
from roastify.pool.plan import FoldPlan, TensorPlan

# The folds that `auto` chooses from, the largest first.
_FOLDS = (8, 4, 2)
# Weights with fewer elements are not folded by `auto`: their products take as long as a fold. If a larger weight folds
# the same input, this costs nothing, and smaller ones are folded too.
_LEAST_ELEMENTS, _LEAST_BESIDE_OTHERS = 1 << 20, 1 << 18
# The fewest columns of the narrow matrix with `auto`: those of two tiles.
_LEAST_WIDTH = 128
# Weights with more rows for each column are output heads, whose folding was not measured.
_MOST_ROWS_A_COLUMN = 8
# Convolutions with fewer input channels are not folded by `auto`: with images in the channels-last format some of them,
# with their backward pass, take longer than the dense ones. Smaller kernels are not either: those of one position do.
_LEAST_CHANNELS, _LEAST_POSITIONS = 640, 9
# The fewest channels that a convolution's groups read with `auto`.
_LEAST_CONVOLVED = 64
# Each hash's rows begin with a row of tiles. `auto` keeps to the largest tiles, so that no fold makes tiles smaller. A
# number folds what fits smaller tiles too, if it is more than this part of what it folds.
_TILE_ROWS, _MORE = (128, 64, 32, 16, 8), Fraction(1, 10)
# The functions that only multiply inputs with a weight, the weight's place among their arguments, and whether they
# multiply with it as it is (`x · weight`), not with its transpose.
_PRODUCTS = {("linear", 1): False, ("addmm", 2): True, ("matmul", 1): True, ("mm", 1): True}
# The most columns in a bucket's row that share signs and a learned scale.
_SPAN = 64


def with_folds(
    eligible: Sequence[ParameterInfo],
    shared: Mapping[str, TensorPlan],
    config: RoastConfig,
    settings: Mapping[str, RoastConfig],
) -> tuple[dict[str, TensorPlan], tuple[FoldPlan, ...]]:
    """Return the verdicts on the shared tensors with their folds, and the folds.

    Args:
        eligible: the tensors that will be shared, with the uses that the torch.fx pass saw.
        shared: the verdict on each of them, by name.
        config: the settings of the whole conversion.
        settings: those of each tensor, by name.

    Raises:
        PlanError: the settings ask for a fold that no tensor can have.
    """
    multiplied = [info for info in eligible if _only_multiplies(info, shared[info.name])]
    sizes = _sizes([shared[info.name] for info in multiplied], config, settings)
    for own in dict.fromkeys(settings.values()):
        folds_any = any(settings[name] == own for name in sizes)
        if isinstance(own.fold, int) and own.fold > 1 and not folds_any:
            hashes = min(own.fold_hashes, own.fold)
            raise PlanError(
                f"fold = {own.fold} fits no weight: it needs a linear layer whose inputs have a multiple of "
                f"{own.fold} features and whose outputs are a multiple of {hashes * _tile_rows(own)[-1]}, or a "
                f"convolution of one group with a multiple of {own.fold} input and of {hashes} output channels. Choose "
                f"a smaller fold, or fold='none'"
            )
    together: dict[tuple[str, int, int, int], list[TensorPlan]] = {}
    for name, reader in _readers([info for info in eligible if info.name in sizes]).items():
        fold, hashes = sizes[name]
        together.setdefault((reader, _features(shared[name]), fold, hashes), []).append(shared[name])
    folded = dict(shared)
    folds: list[FoldPlan] = []
    num_scales = 0
    for (_, cols, fold, hashes), tensors in together.items():
        is_auto = all(settings[tensor.name].fold == "auto" for tensor in tensors)
        if is_auto and max(tensor.numel for tensor in tensors) < _LEAST_ELEMENTS:
            continue
        plan = FoldPlan(cols, fold, hashes, _SPAN, num_scales if config.learned_scales else None)
        num_scales += plan.view(0, 0).num_scales
        for tensor in tensors:
            folded[tensor.name] = dataclasses.replace(tensor, cols=tensor.cols // fold, fold=len(folds))
        folds.append(plan)
    return folded, tuple(folds)


def _features(tensor: TensorPlan) -> int:
    """Return the features of the inputs that a tensor multiplies, or the channels that it convolves."""
    return tensor.shape[1] if _is_convolved(tensor) else tensor.cols


def _is_convolved(tensor: TensorPlan) -> bool:
    return len(tensor.shape) > 2


def _tile_rows(config: RoastConfig) -> tuple[int, ...]:
    """Return the rows that a tile may have, the most first."""
    asked = config.tile_shape()
    return _TILE_ROWS if asked is None else (asked[0],)


def _sizes(
    tensors: Sequence[TensorPlan], config: RoastConfig, settings: Mapping[str, RoastConfig]
) -> dict[str, tuple[int, int]]:
    """Return the fold and the number of hashes of every tensor that is folded, by name."""
    if check_ratio(config.ratio) == 1:
        return {}
    choices = _tile_rows(config)
    if all(settings[tensor.name].fold in ("auto", "none") for tensor in tensors):
        choices = choices[:1]
    sizes: dict[str, tuple[int, int]] = {}
    numel: float = 0
    for tile_rows in choices:
        fitting = {
            tensor.name: size for tensor in tensors if (size := _fold_of(tensor, settings[tensor.name], tile_rows))
        }
        more = sum(tensor.numel for tensor in tensors if tensor.name in fitting)
        if more > numel * (1 + _MORE):
            sizes, numel = fitting, more
    return sizes


def _fold_of(tensor: TensorPlan, config: RoastConfig, tile_rows: int) -> tuple[int, int] | None:
    """Return a tensor's fold and its number of hashes, or None if it is not folded."""
    if config.fold == "none" or tensor.strips != _is_convolved(tensor):
        return None
    if tensor.strips:
        # A convolution's weight is read whole, so its hashes may begin anywhere.
        tile_rows = 1
    if config.fold != "auto":
        fold = int(config.fold)
        hashes = min(config.fold_hashes, fold)
        fits = _features(tensor) % fold == 0 and tensor.rows % (hashes * tile_rows) == 0
        return (fold, hashes) if fits and fold > 1 else None
    # The other mappings and local sharing are there for comparisons, and stay what they were.
    if config.mapping != "permutation" or config.sharing != "global" or tensor.numel < _LEAST_BESIDE_OTHERS:
        return None
    features, ratio, least = _features(tensor), check_ratio(config.ratio), _LEAST_WIDTH
    if _is_convolved(tensor):
        positions = math.prod(tensor.shape[2:])
        if features < _LEAST_CHANNELS or positions < _LEAST_POSITIONS:
            return None
        least = _LEAST_CONVOLVED
        if tensor.basis_count:
            # Basis kernels leave fewer coefficients than weights, and so a smaller ratio to the fold.
            ratio *= Fraction(tensor.basis_count, positions)
    if tensor.rows > _MOST_ROWS_A_COLUMN * features:
        return None
    for fold in _FOLDS:
        hashes = min(config.fold_hashes, fold)
        fits = features % fold == 0 and features // fold >= least and tensor.rows % (hashes * tile_rows) == 0
        if fits and fold <= ratio:
            return fold, hashes
    return None


def _only_multiplies(info: ParameterInfo, tensor: TensorPlan) -> bool:
    """Whether a weight is only multiplied with inputs, so that these can be folded.

    A linear layer's or a convolution's own call multiplies. Everything else is known only if torch.fx saw it: what
    other code does with a layer's weight, and what a parameter without a layer is for.
    """
    functional = [use for use in info.uses if use.through == "function"]
    if any((use.op, use.position) not in _PRODUCTS for use in (*functional, *info.explored)):
        return False
    for alias, module in zip(info.aliases, info.holders, strict=True):
        path, _, attribute = alias.rpartition(".")
        if multiplies_inputs(module, attribute):
            continue
        seen = [use for use in functional if (use.module, use.attribute) == (path, attribute)]
        if kind_of(type(module), attribute) is not None or tensor.through != "operation" or len(tensor.shape) != 2:
            return False
        if not seen or any(_PRODUCTS[use.op, use.position or 0] != tensor.transposed for use in seen):
            return False
    return True


def _readers(infos: Sequence[ParameterInfo]) -> dict[str, str]:
    """Return for each tensor a name that tensors share if they were seen to multiply the same value."""
    first: dict[str, str] = {}
    leader = {info.name: info.name for info in infos}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for info in infos:
        for value in {value for use in info.uses for value in use.inputs}:
            leader[find(info.name)] = find(first.setdefault(value, info.name))
    return {info.name: find(info.name) for info in infos}
