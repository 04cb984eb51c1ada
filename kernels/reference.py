"""Every operator in plain torch: the implementation on a CPU, and the reference for every kernel.

The unit of access is a *segment*: one row of one tile, `tile_cols` contiguous pool elements. Matrices are processed in
panels of whole tile rows, so that a gathered panel stays in cache and no whole weight is materialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from roastify.kernels import by_tile
from roastify.kernels.group_view import group_of_text
from roastify.kernels.tile_hash import element_factors, hash64, signed, tile_factors, tile_offsets
from roastify.kernels.view import FoldView, MappingKind, SignKind, TileView

# Bytes of a gathered panel. With few rows of activations, the panel must stay in the core's own cache. With many, the
# activations are read once for each panel, so panels are larger. A new buffer for the whole weight would cost page
# faults: gathering 67 MB took 110 ms, against 4 ms of arithmetic.
_PANEL_BYTES_FEW_ROWS = 1 << 20
_PANEL_BYTES_MANY_ROWS = 8 << 20
_FEW_ROWS = 64
# Above this many rows of activations, reading each pool slot once no longer saves anything: the product is bound by
# arithmetic, and one large product runs faster than many small ones.
_MAX_ROWS_BY_SLOT = 16
# The places of a weight's tiles are kept if it has at most so many elements. Those of larger ones are found a panel at
# a time, which takes little beside reading them.
_MOST_ELEMENTS_PLACED = 1 << 18
# A tensor is read run by run if each of its tiles is one run of its elements, as those of a bias are, or of a small
# layer that is as wide as a tile; and if there are at most so many.
_MOST_RUNS = 8
# Up to this many rows of activations, a fold multiplies all columns at once, in a tensor larger than its input.
_MAX_ROWS_AT_ONCE = 16


def summed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype for a dtype: of products, and of the gradient of a pool."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _segment_factors(
    view: TileView, scale: float, tiles: Tensor, tile_rows: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if view.sign == SignKind.ELEMENT and not view.all_positive:
        return element_factors(view, scale, tiles, tile_rows, dtype)
    factors = tile_factors(view, scale, tiles, dtype)
    return factors if factors is None or factors.dim() == 0 else factors[..., None]


def _segment_source(pool: Tensor, view: TileView) -> Tensor:
    """Return the pool as a 2-D tensor with one row for each place where a segment may begin."""
    if view.mapping == MappingKind.UNALIGNED:
        return pool.reshape(-1).unfold(0, view.tile_cols, 1)
    return pool.reshape(-1, view.tile_cols)


def _segment_rows(table: Tensor, view: TileView, tiles: Tensor, tile_rows: Tensor) -> Tensor:
    """Return the row of `_segment_source` of each segment."""
    offsets = tile_offsets(table, view, tiles)
    if view.mapping == MappingKind.UNALIGNED:
        return offsets + tile_rows * view.tile_cols
    return offsets // view.tile_cols + tile_rows


class _Place(NamedTuple):
    """Where a small weight lies, and its factors; found once, because hashing took longer than reading the weight.

    Args:
        rows: the row of `_segment_source` at which each tile begins, `[grid rows, 1, grid cols]`.
        factors: `scale · sign` of each tile, `[grid rows, 1, grid cols, 1]`, one for all, or None: it is 1 everywhere.
        inside: the rows in a tile, `[tile rows, 1]`.
    """

    rows: Tensor
    factors: Tensor | None
    inside: Tensor

    def segments(self) -> Tensor:
        """Return the row of `_segment_source` of each segment, in the weight's order."""
        return (self.rows + self.inside).view(-1)


class _Run(NamedTuple):
    """Consecutive elements of a tensor that lie together in one tile: `factor · pool[start:start + length]`."""

    start: int
    length: int
    factor: float


# By the pool's chunk table, and in it by view, λ and dtype.
_places = WeakTensorKeyDictionary()


def _kept_for(table: Tensor) -> dict[Any, Any]:
    kept = _places.get(table)
    if kept is None:
        kept = _places[table] = {}
    return kept


def _runs_of(table: Tensor, view: TileView, scale: float) -> list[_Run] | None:
    """Return the runs of a tensor, in order; None if it is not made of a few, or has signs of elements."""
    kept, key = _kept_for(table), (view, scale)
    if key not in kept:
        in_runs = view.strips or (view.cols == view.tile_cols and view.groups == 1)
        signs_of_elements = view.sign == SignKind.ELEMENT and not view.all_positive
        if not in_runs or view.num_tiles > _MOST_RUNS or signs_of_elements:
            kept[key] = None
            return None
        size, found, done = view.slot_size, [], 0
        tiles = torch.arange(view.first_tile, view.first_tile + view.num_tiles, device=table.device)
        offsets = tile_offsets(table, view, tiles).tolist()
        signs = tile_factors(view, 1.0, tiles, torch.float64)
        factors = [scale] * len(offsets) if signs is None else [scale * sign for sign in signs.tolist()]
        for offset, factor in zip(offsets, factors, strict=True):
            skipped = (view.base + done) % size
            length = min(size - skipped, view.numel - done)
            found.append(_Run(offset + skipped, length, factor))
            done += length
        kept[key] = found
    return kept[key]


def _place_of(table: Tensor, view: TileView, scale: float, dtype: torch.dtype) -> _Place | None:
    """Return where a weight lies, with factors in a dtype; None if the weight is large, or has no factors of tiles."""
    if (
        view.strips
        or view.num_tiles * view.slot_size > _MOST_ELEMENTS_PLACED
        or view.mapping == MappingKind.UNALIGNED
        or (view.sign == SignKind.ELEMENT and not view.all_positive)
    ):
        return None
    kept, key = _kept_for(table), (view, scale, dtype)
    place = kept.get(key)
    if place is None:
        inside = torch.arange(view.tile_rows, device=table.device)[:, None]
        tiles = torch.arange(view.first_tile, view.first_tile + view.num_tiles, device=table.device)
        tiles = tiles.view(view.grid_rows, 1, view.grid_cols)
        factors = _segment_factors(view, scale, tiles, inside, dtype)
        place = kept[key] = _Place(_segment_rows(table, view, tiles, torch.zeros_like(inside[:1])), factors, inside)
    return place


def _read_runs(pool: Tensor, view: TileView, runs: list[_Run]) -> Tensor:
    flat = pool.reshape(-1)
    parts = [flat[run.start : run.start + run.length] * run.factor for run in runs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(view.rows, view.cols)


def _add_runs(total: Tensor, runs: list[_Run], grad: Tensor) -> None:
    flat = grad.reshape(-1).to(total.dtype)
    for run, part in zip(runs, flat.split([run.length for run in runs]), strict=True):
        total[run.start : run.start + run.length].add_(part, alpha=run.factor)


def _small_weight(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor | None:
    """Return a weight whose place is kept; None for a large one."""
    if (runs := _runs_of(table, view, scale)) is not None:
        return _read_runs(pool, view, runs)
    place = _place_of(table, view, scale, summed_in(pool.dtype))
    return None if place is None else _read_placed(pool, view, place)


def _read_placed(pool: Tensor, view: TileView, place: _Place) -> Tensor:
    """Return a small weight, as `_panels` does."""
    values = _segment_source(pool, view).index_select(0, place.segments())
    if place.factors is not None:
        by_segment = values.view(view.grid_rows, view.tile_rows, view.grid_cols, view.tile_cols)
        if place.factors.dtype == values.dtype:
            by_segment.mul_(place.factors)
        else:
            by_segment.copy_(by_segment.to(place.factors.dtype) * place.factors)
    return values.view(-1, view.grid_cols * view.tile_cols)[: view.rows, : view.cols]


def _read_segments(
    pool: Tensor, table: Tensor, view: TileView, scale: float, tiles: Tensor, tile_rows: Tensor, out: Tensor | None
) -> Tensor:
    """Return `scale · sign · pool` of the segments, `[*broadcast(tiles, tile_rows), tile_cols]`."""
    rows = _segment_rows(table, view, tiles, tile_rows)
    source = _segment_source(pool, view)
    shape = (*rows.shape, view.tile_cols)
    if out is None:
        values = source.index_select(0, rows.reshape(-1)).view(shape)
    else:
        torch.index_select(source, 0, rows.reshape(-1), out=out)
        values = out.view(shape)
    # A narrow dtype would round λ itself, and a small one to zero.
    factors = _segment_factors(view, scale, tiles, tile_rows, summed_in(pool.dtype))
    if factors is None:
        return values
    return values.mul_(factors) if factors.dtype == values.dtype else values.copy_(values.to(factors.dtype) * factors)


def _add_segments(
    total: Tensor, table: Tensor, view: TileView, scale: float, tiles: Tensor, tile_rows: Tensor, values: Tensor
) -> None:
    """Add `scale · sign · values` at the segments' places of the flat `total`, in a fixed order."""
    factors = _segment_factors(view, scale, tiles, tile_rows, total.dtype)
    _add_at(total, view, _segment_rows(table, view, tiles, tile_rows), factors, values)


def _add_at(total: Tensor, view: TileView, rows: Tensor, factors: Tensor | None, values: Tensor) -> None:
    """Add `factors · values` at rows of `_segment_source` of the flat `total`, in a fixed order."""
    values = values.to(total.dtype) if factors is None else values.to(total.dtype) * factors
    if view.mapping == MappingKind.UNALIGNED:
        places = (rows[..., None] + torch.arange(view.tile_cols, device=rows.device)).reshape(-1)
        target, values = total, values.reshape(-1)
    else:
        places = rows.reshape(-1)
        target, values = total.view(-1, view.tile_cols), values.reshape(-1, view.tile_cols)
    # Sums must have the same order on every run and for any number of threads. On a GPU only index_put does that, by
    # sorting; the other operators use atomics. On a CPU index_put uses atomics.
    if total.is_cuda:
        target.index_put_((places,), values, accumulate=True)
    elif view.mapping == MappingKind.UNALIGNED:
        target.index_add_(0, places, values)
    else:
        # With an index expanded along the columns, scatter_add sorts the rows first. index_add is slow for short rows.
        target.scatter_add_(0, places[:, None].expand(-1, view.tile_cols), values)


def _accumulator(like: Tensor, shape: list[int]) -> Tensor:
    """Return a zeroed buffer in which sums over `like` are kept: float32, or float64 for float64."""
    return torch.zeros(shape, dtype=summed_in(like.dtype), device=like.device)


class _Panels:
    """The panels of a tiled matrix: each a run of whole tile rows."""

    def __init__(self, view: TileView, itemsize: int, max_bytes: int, device: torch.device) -> None:
        self.view = view
        width = view.grid_cols * view.tile_cols * itemsize
        self.step = max(1, max_bytes // (width * view.tile_rows))
        self.segment_row = torch.arange(view.tile_rows, device=device)[:, None]
        self.column = torch.arange(view.grid_cols, device=device)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(first row, last row + 1, tiles [grid rows, 1, grid cols])`."""
        view = self.view
        for start in range(0, view.grid_rows, self.step):
            stop = min(start + self.step, view.grid_rows)
            grid_row = torch.arange(start, stop, device=self.column.device)[:, None, None]
            tiles = view.first_tile + grid_row * view.grid_cols + self.column
            yield start * view.tile_rows, min(stop * view.tile_rows, view.rows), tiles


def _panels(
    pool: Tensor, table: Tensor, view: TileView, scale: float, max_bytes: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(first row, last row + 1, weight[first:last + 1])`; each panel overwrites the previous one."""
    place = _place_of(table, view, scale, summed_in(pool.dtype))
    if place is not None:
        yield 0, view.rows, _read_placed(pool, view, place)
        return
    panels = _Panels(view, pool.element_size(), max_bytes, pool.device)
    buffer: Tensor | None = None
    for start, stop, tiles in panels:
        segments = tiles.numel() * view.tile_rows
        if buffer is None:
            buffer = pool.new_empty(segments, view.tile_cols)
        values = _read_segments(pool, table, view, scale, tiles, panels.segment_row, buffer[:segments])
        yield start, stop, values.view(-1, view.grid_cols * view.tile_cols)[: stop - start, : view.cols]


def _strip_tiles(view: TileView, device: torch.device) -> tuple[Tensor, Tensor, slice]:
    """Return the tiles a strip tensor touches, the rows in a tile, and the tensor's place among their elements."""
    tiles = torch.arange(view.first_tile, view.first_tile + view.num_tiles, device=device)[:, None]
    start = view.base - view.first_tile * view.slot_size
    return tiles, torch.arange(view.tile_rows, device=device), slice(start, start + view.numel)


def gather(pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the dense tensor `W = scale · sign · pool[slot]`, `[rows, cols]`."""
    if (runs := _runs_of(table, view, scale)) is not None:
        return _read_runs(pool, view, runs)
    if view.strips:
        tiles, tile_rows, inside = _strip_tiles(view, pool.device)
        values = _read_segments(pool, table, view, scale, tiles, tile_rows, None).view(-1)[inside]
        # A copy, so that the result keeps no padded buffer alive and never aliases the operator's input.
        return values.clone().view(view.rows, view.cols)
    weight = pool.new_empty(view.rows, view.cols)
    for start, stop, panel in _panels(pool, table, view, scale, _PANEL_BYTES_FEW_ROWS):
        weight[start:stop] = panel
    return weight


def reduce(grad_weight: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]) -> Tensor:
    """Return the adjoint of `gather`: `scale · sign · grad_weight` summed over the readers of each pool element."""
    total = _accumulator(grad_weight, pool_shape)
    reduce_(total, grad_weight, table, view, scale)
    return total.to(grad_weight.dtype)


def reduce_(total: Tensor, grad_weight: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add what `reduce` returns to `total`, in `total`'s dtype."""
    reduce_into(total.view(-1), grad_weight, table, view, scale)


def reduce_into(total: Tensor, grad_weight: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add the adjoint of `gather` to the flat `total`, in place; `grad_weight` may be an expanded scalar."""
    if (runs := _runs_of(table, view, scale)) is not None:
        _add_runs(total, runs, grad_weight)
    elif view.strips:
        tiles, tile_rows, inside = _strip_tiles(view, total.device)
        values = grad_weight.new_zeros(view.num_tiles * view.slot_size)
        values[inside] = grad_weight.reshape(-1)
        shape = (view.num_tiles, view.tile_rows, view.tile_cols)
        _add_segments(total, table, view, scale, tiles, tile_rows, values.view(shape))
    elif (place := _place_of(table, view, scale, total.dtype)) is not None:
        _add_placed(total, view, place, grad_weight)
    else:
        panels = _Panels(view, total.element_size(), _PANEL_BYTES_MANY_ROWS, total.device)
        for start, stop, tiles in panels:
            _add_panel(total, table, view, scale, panels, tiles, grad_weight[start:stop])


def gather_group(pool: Tensor, table: Tensor, group: str) -> Tensor:
    """Return the dense tensors of a group in one flat tensor; see `GroupView`."""
    found = group_of_text(group)
    flat = pool.new_zeros(found.offsets[-1])
    for number, (view, scale) in enumerate(zip(found.views, found.scales, strict=True)):
        found.part(flat, number).copy_(gather(pool, table, view, scale))
    return flat


def reduce_group(grad_flat: Tensor, table: Tensor, group: str, pool_shape: list[int]) -> Tensor:
    """Return the adjoint of `gather_group`."""
    total = _accumulator(grad_flat, pool_shape)
    reduce_group_(total, grad_flat, table, group)
    return total.to(grad_flat.dtype)


def reduce_group_(total: Tensor, grad_flat: Tensor, table: Tensor, group: str) -> None:
    """Add what `reduce_group` returns to `total`, in `total`'s dtype."""
    found = group_of_text(group)
    for number, (view, scale) in enumerate(zip(found.views, found.scales, strict=True)):
        reduce_(total, found.part(grad_flat, number), table, view, scale)


def _add_panel(
    total: Tensor, table: Tensor, view: TileView, scale: float, panels: _Panels, tiles: Tensor, grad: Tensor
) -> None:
    values = _in_segments(view, tiles.shape[0], grad)
    _add_segments(total, table, view, scale, tiles, panels.segment_row, values)


def _add_placed(total: Tensor, view: TileView, place: _Place, grad: Tensor) -> None:
    _add_at(total, view, place.segments(), place.factors, _in_segments(view, view.grid_rows, grad))


def _in_segments(view: TileView, grid_rows: int, grad: Tensor) -> Tensor:
    """Return a weight's gradient with zeros where tiles are padded, `[grid rows, tile rows, grid cols, tile cols]`."""
    pad_cols = view.grid_cols * view.tile_cols - view.cols
    pad_rows = grid_rows * view.tile_rows - grad.shape[0]
    if pad_cols or pad_rows:
        grad = F.pad(grad, (0, pad_cols, 0, pad_rows))
    return grad.reshape(grid_rows, view.tile_rows, view.grid_cols, view.tile_cols)


def linear(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ + bias`, `[..., groups·cols] → [..., rows]`."""
    bias = None if bias is None else bias.expand(view.rows)
    if view.groups > 1:
        columns = x.reshape(-1, view.groups, view.cols).unbind(1)
        biases = [None] * view.groups if bias is None else bias.chunk(view.groups)
        parts = (
            linear(part, pool, part_bias, table, block, scale)
            for part, part_bias, block in zip(columns, biases, view.blocks(), strict=True)
        )
        return torch.cat(list(parts), -1).view(*x.shape[:-1], view.rows)
    flat = x.reshape(-1, view.cols)
    if _worth_reading_by_slot(flat.shape[0], flat.dtype, view):
        out = _linear_by_slot(flat, pool, table, view, scale)
        out = out if bias is None else out.add_(bias)
    elif by_tile.is_worth_it(flat, view):
        out = by_tile.product(flat, pool, table, view, scale)
        out = out if bias is None else out.add_(bias)
    elif view.strips:
        out = F.linear(flat, gather(pool, table, view, scale), bias)
    elif (weight := _small_weight(pool, table, view, scale)) is not None:
        out = F.linear(flat, weight, bias)
    else:
        out = x.new_empty(flat.shape[0], view.rows)
        for start, stop, panel in _panels(pool, table, view, scale, _panel_bytes(flat.shape[0])):
            out[:, start:stop] = F.linear(flat, panel, None if bias is None else bias[start:stop])
    return out.view(*x.shape[:-1], view.rows)


def _panel_bytes(num_rows: int) -> int:
    return _PANEL_BYTES_FEW_ROWS if num_rows <= _FEW_ROWS else _PANEL_BYTES_MANY_ROWS


def _worth_reading_by_slot(num_rows: int, dtype: torch.dtype, view: TileView) -> bool:
    """Whether to read by slot: the weight uses every slot at least twice, x has few rows, a tile has one factor."""
    return (
        not view.strips
        and view.mapping == MappingKind.PERMUTATION
        and (view.sign != SignKind.ELEMENT or view.all_positive)
        and 0 < num_rows <= _MAX_ROWS_BY_SLOT
        # Sums of products that λ has not scaled yet may be too large for it.
        and dtype != torch.float16
        and view.slot_size >= 256
        and view.num_tiles >= 2 * view.num_slots
    )


def _linear_by_slot(x: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · Wᵀ`; every slot is read once for all its tiles, and the pool is never copied.

    A chunk has at most one tile in each slot, known in closed form: `i = a⁻¹·(slot - b) mod P`. (4096² at ratio 10, one
    row, two cores: 1.0 ms of products against 3.5 ms for the dense layer, which must read all its weights.)
    """
    num_rows, dtype = x.shape[0], x.dtype
    first_chunk = view.first_tile // view.num_slots
    last_chunk = (view.first_tile + view.num_tiles - 1) // view.num_slots
    chunks = torch.arange(first_chunk, last_chunk + 1, device=x.device)
    coefficients = table[chunks + view.first_chunk]
    slots = torch.arange(view.num_slots, device=x.device)[:, None]
    position = coefficients[:, 2] * ((slots - coefficients[:, 1]) % view.num_slots) % view.num_slots
    tiles = chunks * view.num_slots + position
    inside = (tiles >= view.first_tile) & (tiles < view.first_tile + view.num_tiles)
    place = torch.where(inside, tiles - view.first_tile, 0)

    pad = view.grid_cols * view.tile_cols - view.cols
    columns = (F.pad(x, (0, pad)) if pad else x).view(num_rows, view.grid_cols, view.tile_cols).transpose(0, 1)
    signs = tile_factors(view, 1.0, tiles, dtype)
    # [slots, chunks · rows, tile_cols]: for each slot, the activations that its tiles multiply, with the tiles' signs.
    activations = columns[place % view.grid_cols]
    if signs is not None:
        activations = activations * signs[..., None, None]
    activations = activations.reshape(view.num_slots, -1, view.tile_cols)
    region = pool.reshape(-1, view.tile_rows, view.tile_cols)[view.first_slot : view.first_slot + view.num_slots]
    products = torch.bmm(activations, region.transpose(1, 2))

    accumulate = summed_in(dtype)
    out = torch.zeros(view.grid_rows + 1, num_rows * view.tile_rows, dtype=accumulate, device=x.device)
    # The first and last chunk may hold tiles of other tensors. Products of those tiles go to an extra row, which is
    # dropped.
    rows = torch.where(inside, place // view.grid_cols, view.grid_rows)
    index = rows.reshape(-1, 1).expand(-1, out.shape[1])
    out.scatter_add_(0, index, products.to(accumulate).reshape(-1, out.shape[1]))
    out = out[:-1].view(view.grid_rows, num_rows, view.tile_rows).transpose(0, 1).reshape(num_rows, -1)
    if scale != 1.0:
        out *= scale
    return out[:, : view.rows].to(dtype).contiguous()


def linear_t(x: Tensor, pool: Tensor, bias: Tensor | None, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return `x · W + bias`, `[..., rows] → [..., groups·cols]`: the input gradient of `linear`, `Conv1D`'s product."""
    if view.groups > 1:
        columns = x.reshape(-1, view.groups, view.rows // view.groups).unbind(1)
        parts = (
            linear_t(part, pool, None, table, block, scale) for part, block in zip(columns, view.blocks(), strict=True)
        )
        out = torch.cat(list(parts), -1)
        out = out if bias is None else out.add_(bias)
        return out.view(*x.shape[:-1], view.input_cols)
    flat = x.reshape(-1, view.rows)
    if view.strips:
        out = flat @ gather(pool, table, view, scale)
        out = out if bias is None else out.add_(bias)
    elif (weight := _small_weight(pool, table, view, scale)) is not None:
        out = flat @ weight
        out = out if bias is None else out.add_(bias)
    else:
        # Panels are partial sums here, so a narrow dtype accumulates in float32.
        accumulate = summed_in(x.dtype)
        out = torch.zeros(flat.shape[0], view.cols, dtype=accumulate, device=x.device)
        if bias is not None:
            out += bias
        for start, stop, panel in _panels(pool, table, view, scale, _panel_bytes(flat.shape[0])):
            if x.dtype == accumulate:
                out.addmm_(flat[:, start:stop], panel)
            else:
                out += flat[:, start:stop] @ panel
        out = out.to(x.dtype)
    return out.view(*x.shape[:-1], view.cols)


def linear_reduce(
    grad: Tensor, x: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]
) -> Tensor:
    """Return `reduce(gradᵀ · x)`, the pool's gradient of `linear`."""
    total = _accumulator(x, pool_shape)
    linear_reduce_(total, grad, x, table, view, scale)
    return total.to(x.dtype)


def linear_reduce_(total: Tensor, grad: Tensor, x: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add what `linear_reduce` returns to `total`, a panel of the weight's gradient at a time."""
    if view.groups > 1:
        grads = grad.reshape(-1, view.groups, view.rows // view.groups).unbind(1)
        columns = x.reshape(-1, view.groups, view.cols).unbind(1)
        for part_grad, part, block in zip(grads, columns, view.blocks(), strict=True):
            linear_reduce_(total, part_grad, part, table, block, scale)
        return
    grad, x = grad.reshape(-1, view.rows), x.reshape(-1, view.cols)
    if view.strips:
        reduce_(total, grad.t() @ x, table, view, scale)
        return
    if (runs := _runs_of(table, view, scale)) is not None:
        _add_runs(total.view(-1), runs, grad.t() @ x)
        return
    place = _place_of(table, view, scale, total.dtype)
    if place is not None:
        _add_placed(total.view(-1), view, place, grad.t() @ x)
        return
    panels = _Panels(view, total.element_size(), _PANEL_BYTES_MANY_ROWS, x.device)
    for start, stop, tiles in panels:
        _add_panel(total.view(-1), table, view, scale, panels, tiles, grad[:, start:stop].t() @ x)


def _lookup_segments(view: TileView, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tiles `[tokens, grid cols]` of each looked-up row, and the row inside those tiles `[tokens, 1]`."""
    tiles = view.first_tile + (index // view.tile_rows)[:, None] * view.grid_cols
    tiles = tiles + torch.arange(view.grid_cols, device=index.device)
    return tiles, (index % view.tile_rows)[:, None]


def check_lookup(index: Tensor, view: TileView) -> None:
    """Raise `IndexError` for an index outside the table: the pool would silently give another tensor's weights."""
    if not index.is_cuda and index.numel() and (int(index.min()) < 0 or int(index.max()) >= view.rows):
        raise IndexError(
            f"embedding index out of range: found {int(index.min())} to {int(index.max())}, the table has rows 0 to "
            f"{view.rows - 1}"
        )


def embedding(index: Tensor, pool: Tensor, table: Tensor, view: TileView, scale: float) -> Tensor:
    """Return the rows `W[index]`, `[...] → [..., cols]`; only those rows' pool elements are read."""
    check_lookup(index, view)
    if view.strips:
        return F.embedding(index, gather(pool, table, view, scale))
    tiles, tile_rows = _lookup_segments(view, index.reshape(-1).long())
    values = _read_segments(pool, table, view, scale, tiles, tile_rows, None)
    rows = values.view(-1, view.grid_cols * view.tile_cols)[:, : view.cols]
    return rows.contiguous().view(*index.shape, view.cols)


def embedding_reduce(
    grad: Tensor, index: Tensor, table: Tensor, view: TileView, scale: float, pool_shape: list[int]
) -> Tensor:
    """Return the pool's gradient of `embedding`."""
    total = _accumulator(grad, pool_shape)
    embedding_reduce_(total, grad, index, table, view, scale)
    return total.to(grad.dtype)


def embedding_reduce_(total: Tensor, grad: Tensor, index: Tensor, table: Tensor, view: TileView, scale: float) -> None:
    """Add what `embedding_reduce` returns to `total`; the cost grows with the tokens, not with the table."""
    grad, index = grad.reshape(-1, view.cols), index.reshape(-1).long()
    if view.strips:
        dense = _accumulator(grad, [view.rows, view.cols])
        # On a GPU index_add uses atomics, see `_add_segments`.
        if dense.is_cuda:
            dense.index_put_((index,), grad.to(dense.dtype), accumulate=True)
        else:
            dense.index_add_(0, index, grad.to(dense.dtype))
        reduce_(total, dense, table, view, scale)
        return
    tiles, tile_rows = _lookup_segments(view, index)
    pad = view.grid_cols * view.tile_cols - view.cols
    values = (F.pad(grad, (0, pad)) if pad else grad).reshape(*tiles.shape, view.tile_cols)
    _add_segments(total.view(-1), table, view, scale, tiles, tile_rows, values)


def fold_signs(view: FoldView, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `b · (-1)^popcount(g & i)`, `[hashes, fold, spans]`."""
    position = torch.arange(view.fold, device=device)
    counter = position[:, None] * view.num_spans + torch.arange(view.num_spans, device=device)
    parity = torch.tensor([[(g & i).bit_count() & 1 for i in range(view.fold)] for g in range(view.hashes)])
    negative = (hash64(view.key, counter) < 0) ^ parity.to(device).bool()[:, :, None]
    return signed(1.0, negative, dtype)


def fold_factors(pool: Tensor | None, view: FoldView, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `s`, the factor of every column of an input, `[hashes, fold, width]`."""
    factors = fold_signs(view, dtype, device)
    if pool is not None and view.num_scales:
        learned = pool.reshape(-1)[view.first_scale : view.first_scale + view.num_scales]
        factors = factors * (learned.to(dtype).view_as(factors) + view.unit)
    return factors.repeat_interleave(view.span, -1)[..., : view.width]


def fold(x: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the folded inputs `z` in a dtype, `[..., cols] → [..., hashes·width]`, summed as `summed_in` says."""
    wide = summed_in(x.dtype)
    factors = fold_factors(pool, view, wide, x.device)
    columns = x.contiguous().view(-1, 1, view.fold, view.width)
    if columns.shape[0] <= _MAX_ROWS_AT_ONCE:
        folded = (columns * factors).sum(2)
    else:
        folded = columns.new_zeros(columns.shape[0], view.hashes, view.width, dtype=wide)
        for i in range(view.fold):
            folded.addcmul_(columns[:, :, i].to(wide), factors[:, i])
    return folded.to(dtype).view(*x.shape[:-1], view.folded_cols)


def unfold(z: Tensor, pool: Tensor | None, view: FoldView, dtype: torch.dtype) -> Tensor:
    """Return the adjoint of `fold` in a dtype, `[..., hashes·width] → [..., cols]`."""
    wide = summed_in(z.dtype)
    factors = fold_factors(pool, view, wide, z.device)
    buckets = z.contiguous().view(-1, view.hashes, 1, view.width).to(wide)
    columns = buckets[:, 0] * factors[0]
    for g in range(1, view.hashes):
        columns.addcmul_(buckets[:, g], factors[g])
    return columns.to(dtype).view(*z.shape[:-1], view.cols)


def folded_linear(
    x: Tensor,
    pool: Tensor,
    bias: Tensor | None,
    table: Tensor,
    view: TileView,
    fold_view: FoldView,
    scale: float,
) -> Tensor:
    """Return `fold(x) · Wᵀ + bias`, `[..., fold_view.cols] → [..., rows]`, in the pool's dtype."""
    return linear(fold(x, pool, fold_view, pool.dtype), pool, bias, table, view, scale)


def fold_reduce(grad: Tensor, x: Tensor, view: FoldView, pool_shape: list[int]) -> Tensor:
    """Return the pool's gradient of `fold`, which is zero but for the learned scales."""
    total = _accumulator(grad, pool_shape)
    fold_reduce_(total, grad, x, view)
    return total.to(grad.dtype)


def fold_reduce_(total: Tensor, grad: Tensor, x: Tensor, view: FoldView) -> None:
    """Add what `fold_reduce` returns to `total`."""
    if not view.num_scales:
        return
    wide = total.dtype
    buckets = grad.reshape(-1, view.hashes, 1, view.width).to(wide)
    columns = x.reshape(-1, 1, view.fold, view.width).to(wide)
    # A position at a time, so that no product with as many elements as all hashes' inputs is made.
    by_column = torch.stack([(buckets[:, :, 0] * columns[:, :, i]).sum(0) for i in range(view.fold)], 1)
    pad = view.num_spans * view.span - view.width
    by_span = F.pad(by_column, (0, pad)).view(view.hashes, view.fold, view.num_spans, view.span).sum(-1)
    learned = total.view(-1)[view.first_scale : view.first_scale + view.num_scales]
    learned += (by_span * fold_signs(view, wide, total.device)).view(-1).to(total.dtype)


def combine(coefficients: Tensor, basis: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `coefficients · basis`, of the coefficients' dtype; `grad_scale` affects only the basis's gradient."""
    wide = summed_in(coefficients.dtype)
    with torch.autocast(coefficients.device.type, enabled=False):
        return (coefficients.to(wide) @ basis.to(wide)).to(coefficients.dtype)


def combine_reduce(coefficients: Tensor, grad: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return `grad_scale · coefficientsᵀ · grad`, in the accumulation dtype."""
    wide = summed_in(coefficients.dtype)
    with torch.autocast(coefficients.device.type, enabled=False):
        return (coefficients.to(wide).t() @ grad.to(wide)).mul_(grad_scale)
