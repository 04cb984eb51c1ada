"""The preconditioner 1/Γ: computed from the mapping, tile by tile, and applied to a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.view import MappingKind, SignKind, TileView

# Number of tiles whose elements are counted at a time, which bounds the memory for it.
_TILES = 4096

Shared = Sequence[tuple[TileView, float]]
UnreadRows = Sequence[tuple[TileView, float, int]]


def inverse_gamma(
    num_slots: int,
    tile: tuple[int, int],
    table: Tensor,
    shared: Shared,
    unread_rows: UnreadRows,
    scales: Sequence[float] = (),
) -> dict[str, Tensor]:
    """Return 1/Γ: one number for each slot, and one for each element of the slots whose elements differ.

    The elements of a slot differ if a tensor that reads the slot is padded there, or begins inside a tile. An element
    that no tensor reads gets its slot's number, because no gradient reaches the element. The slots of the learned
    scales come last; `scales` has Γ of each scale.
    """
    of_tiles = _of_tiles(num_slots, tile, table, shared, unread_rows)
    size = tile[0] * tile[1]
    count = -(-len(scales) // size)
    by_slot = torch.ones(count * size, dtype=torch.float64)
    by_slot[: len(scales)] = torch.tensor(scales, dtype=torch.float64)
    return {
        "per_slot": torch.cat([of_tiles["per_slot"], torch.ones(count, dtype=torch.float64)]),
        "uneven_slots": torch.cat([of_tiles["uneven_slots"], num_slots + torch.arange(count)]),
        "uneven": torch.cat([of_tiles["uneven"], by_slot.reciprocal().view(count, size)]),
    }


def _of_tiles(
    num_slots: int, tile: tuple[int, int], table: Tensor, shared: Shared, unread_rows: UnreadRows
) -> dict[str, Tensor]:
    """Return 1/Γ of the slots that tiles are mapped to."""
    size = tile[0] * tile[1]
    if _nothing_shared(num_slots, shared):
        per_slot = torch.ones(num_slots, dtype=torch.float64)
        for view, scale in shared:
            per_slot[view.first_slot + view.first_tile : view.first_slot + view.first_tile + view.num_tiles] = scale**2
        return {
            "per_slot": per_slot.reciprocal(),
            "uneven_slots": torch.empty(0, dtype=torch.int64),
            "uneven": torch.empty(0, size, dtype=torch.float64),
        }
    # In float64, because zero rows are subtracted and the λ of tensors may differ by orders of magnitude.
    if any(view.mapping == MappingKind.UNALIGNED for view, _ in shared):
        gamma, slots = torch.empty(num_slots, dtype=torch.float64), torch.arange(num_slots)
        by_slot = _of_every_element(num_slots, size, table, shared, unread_rows)
    else:
        gamma, slots = _of_whole_tiles(num_slots, table, shared, unread_rows)
        by_slot = _of_slots(slots, num_slots, size, table, shared, unread_rows)
    gamma[slots] = by_slot.amax(1)
    gamma[gamma == 0] = 1.0
    largest = gamma[slots, None]
    by_slot = torch.where(by_slot == 0, largest, by_slot)
    uneven = (by_slot != largest).any(1)
    return {
        "per_slot": gamma.reciprocal(),
        "uneven_slots": slots[uneven],
        "uneven": by_slot[uneven].reciprocal(),
    }


def _of_whole_tiles(num_slots: int, table: Tensor, shared: Shared, unread_rows: UnreadRows) -> tuple[Tensor, Tensor]:
    """Return Γ of each slot, as if all tiles were whole, and the slots that a partly filled tile reads."""
    gamma = torch.zeros(num_slots, dtype=torch.float64)
    in_part = torch.zeros(num_slots, dtype=torch.bool)
    for view, scale in shared:
        tiles = _tiles(view)
        slots = reference.tile_offsets(table, view, tiles) // view.slot_size
        gamma.index_add_(0, slots, torch.full(slots.shape, scale * scale, dtype=torch.float64))
        in_part[slots[_num_elements(view, tiles) < view.slot_size]] = True
    for view, _, row in unread_rows:
        in_part[reference.tile_offsets(table, view, _tiles_of_row(view, row)) // view.slot_size] = True
    return gamma, in_part.nonzero().flatten()


def _of_slots(
    slots: Tensor, num_slots: int, size: int, table: Tensor, shared: Shared, unread_rows: UnreadRows
) -> Tensor:
    """Return Γ of every element of the given slots, `[len(slots), size]`."""
    gamma = torch.zeros(len(slots), size, dtype=torch.float64)
    place = torch.full((num_slots,), -1)
    place[slots] = torch.arange(len(slots))

    def add(view: TileView, tiles: Tensor, value: float, row: int | None = None) -> None:
        places = place[reference.tile_offsets(table, view, tiles) // view.slot_size]
        inside = places >= 0
        for some, where in zip(tiles[inside].split(_TILES), places[inside].split(_TILES), strict=True):
            gamma.index_add_(0, where, _elements(view, some, row) * value)

    for view, scale in shared:
        add(view, _tiles(view), scale * scale)
    for view, scale, row in unread_rows:
        add(view, _tiles_of_row(view, row), -scale * scale, row)
    return gamma


def _of_every_element(num_slots: int, size: int, table: Tensor, shared: Shared, unread_rows: UnreadRows) -> Tensor:
    """Return Γ, `[num_slots, size]`, by reading every weight, for mappings whose tiles may begin at any element."""
    gamma = torch.zeros(num_slots * size, dtype=torch.float64)
    for view, scale in shared:
        unsigned = view._replace(sign=int(SignKind.NONE))
        readers = torch.full((), scale, dtype=torch.float64).expand(view.rows, view.cols)
        reference.reduce_into(gamma, readers, table, unsigned, scale)
    for view, scale, row in unread_rows:
        unsigned = view._replace(sign=int(SignKind.NONE))
        readers = torch.full((1, view.cols), scale, dtype=torch.float64)
        read = reference.embedding_reduce(readers, torch.tensor([row]), table, unsigned, scale, [num_slots, size])
        gamma -= read.view(-1)
    return gamma.view(num_slots, size)


def _tiles(view: TileView) -> Tensor:
    return view.first_tile + torch.arange(view.num_tiles)


def _tiles_of_row(view: TileView, row: int) -> Tensor:
    if view.strips:
        first, last = (view.base + row * view.cols) // view.slot_size, view.base + (row + 1) * view.cols - 1
        return torch.arange(first, last // view.slot_size + 1)
    return view.first_tile + row // view.tile_rows * view.grid_cols + torch.arange(view.grid_cols)


def _num_elements(view: TileView, tiles: Tensor) -> Tensor:
    """Return how many elements of each tile belong to the tensor (the others are padding)."""
    if view.strips:
        begin, end = (tiles * view.slot_size - view.base).clamp(min=0), (tiles + 1) * view.slot_size - view.base
        return end.clamp(max=view.numel) - begin
    grid_row, grid_col = _grid_place(view, tiles)
    rows = (view.rows - grid_row * view.tile_rows).clamp(max=view.tile_rows)
    return rows * (view.cols - grid_col * view.tile_cols).clamp(max=view.tile_cols)


def _elements(view: TileView, tiles: Tensor, row: int | None = None) -> Tensor:
    """Return 1 for each element that belongs to the tensor (or to one row of it), else 0: `[len(tiles), slot size]`."""
    if view.strips:
        address = tiles[:, None] * view.slot_size - view.base + torch.arange(view.slot_size)
        first, last = (0, view.numel) if row is None else (row * view.cols, (row + 1) * view.cols)
        return ((address >= first) & (address < last)).double()
    grid_row, grid_col = _grid_place(view, tiles)
    rows = grid_row[:, None] * view.tile_rows + torch.arange(view.tile_rows)
    cols = grid_col[:, None] * view.tile_cols + torch.arange(view.tile_cols)
    in_rows = rows < view.rows if row is None else rows == row
    return (in_rows[:, :, None] & (cols < view.cols)[:, None, :]).double().flatten(1)


def _grid_place(view: TileView, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the column of tiles in a tensor's grid of tiles."""
    index = tiles - view.first_tile
    return index // view.grid_cols, index % view.grid_cols


def _nothing_shared(num_slots: int, shared: Shared) -> bool:
    """Whether every tile has a slot to itself, in order, and no slot serves two tensors."""
    if any(view.mapping != MappingKind.PERMUTATION for view, _ in shared):
        return False
    spans = sorted((view.first_slot + view.first_tile, view.num_tiles, view.num_slots) for view, _ in shared)
    if any(view.first_tile + view.num_tiles > view.num_slots for view, _ in shared):
        return False
    return all(start + length <= following for (start, length, _), (following, _, _) in itertools.pairwise(spans))


def divided(grad: Tensor, per_slot: Tensor, uneven_slots: Tensor, uneven: Tensor) -> Tensor:
    """Return a gradient divided by Γ."""
    by_slot = grad.reshape(per_slot.shape[0], -1)
    factors = per_slot[:, None].to(grad.dtype)
    if uneven_slots.numel():
        # The factors of all elements are computed apart from the gradient: if a graph has several gates, a compiler
        # computes the factors once.
        factors = factors.expand_as(by_slot).index_copy(0, uneven_slots, uneven.to(grad.dtype))
    return (by_slot * factors).view_as(grad)


# Number of elements of uneven slots that are divided at a time, so that no second tensor of the pool's size is needed.
_UNEVEN_ELEMENTS = 1 << 22


def divide_(grad: Tensor, per_slot: Tensor, uneven_slots: Tensor, uneven: Tensor) -> None:
    """Divide a contiguous gradient by Γ in place."""
    by_slot = grad.view(per_slot.shape[0], -1)
    by_slot.mul_(per_slot.index_fill(0, uneven_slots, 1.0)[:, None])
    # Torch 2.11 cannot split an empty tensor while it records a graph.
    if uneven_slots.numel():
        step = max(1, _UNEVEN_ELEMENTS // by_slot.shape[1])
        for slots, factors in zip(uneven_slots.split(step), uneven.split(step), strict=True):
            by_slot.index_copy_(0, slots, by_slot.index_select(0, slots).mul_(factors))
