"""The preconditioner 1/Γ: computed from the mapping, tile by tile, and applied to a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.tile_hash import tile_offsets
from roastify.kernels.view import MappingKind, SignKind, TileView, alike

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
    for tiles in _batches(shared):
        slots = tiles.slots(table)
        gamma.index_add_(0, slots, tiles.values)
        in_part[slots[tiles.num_elements() < tiles.view.slot_size]] = True
    for tiles in _batches_of_rows(unread_rows):
        in_part[tiles.slots(table)] = True
    return gamma, in_part.nonzero().flatten()


def _of_slots(
    slots: Tensor, num_slots: int, size: int, table: Tensor, shared: Shared, unread_rows: UnreadRows
) -> Tensor:
    """Return Γ of every element of the given slots, `[len(slots), size]`."""
    gamma = torch.zeros(len(slots), size, dtype=torch.float64)
    place = torch.full((num_slots,), -1)
    place[slots] = torch.arange(len(slots))
    for tiles in itertools.chain(_batches(shared), _batches_of_rows(unread_rows)):
        places = place[tiles.slots(table)]
        inside = (places >= 0).nonzero().flatten()
        for some in inside.split(_TILES):
            taken = tiles.take(some)
            gamma.index_add_(0, places[some], taken.elements() * taken.values[:, None])
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


@dataclass
class _Tiles:
    """Tiles of tensors that the mapping treats alike, each tensor's in their order.

    A loop over the tensors took 2 ms for each of them; models of many small layers have thousands.

    Args:
        view: of one of the tensors.
        number: of each tile.
        tensor: `[len(number), 6]`: rows, cols, base and `strips` of its tensor, and the first and the last row that
            count.
        values: λ² of its tensor, negative where it is taken away.
    """

    view: TileView
    number: Tensor
    tensor: Tensor
    values: Tensor

    def take(self, index: Tensor) -> _Tiles:
        return _Tiles(self.view, self.number[index], self.tensor[index], self.values[index])

    def slots(self, table: Tensor) -> Tensor:
        """Return the slot of each tile."""
        return tile_offsets(table, self.view, self.number) // self.view.slot_size

    def _place(self) -> tuple[Tensor, Tensor]:
        """Return the first row and the first column of each tile in its tensor, if that is no strip."""
        view, cols, base = self.view, self.tensor[:, 1], self.tensor[:, 2]
        grid_cols = (cols + view.tile_cols - 1) // view.tile_cols
        index = self.number - base // view.slot_size
        return index // grid_cols * view.tile_rows, index % grid_cols * view.tile_cols

    def num_elements(self) -> Tensor:
        """Return how many elements of each tile belong to its tensor (the others are padding)."""
        view, (rows, cols, base, strips) = self.view, self.tensor[:, :4].unbind(1)
        begin, end = (self.number * view.slot_size - base).clamp(min=0), (self.number + 1) * view.slot_size - base
        row, col = self._place()
        of_matrix = (rows - row).clamp(max=view.tile_rows) * (cols - col).clamp(max=view.tile_cols)
        return torch.where(strips.bool(), end.minimum(rows * cols) - begin, of_matrix)

    def elements(self) -> Tensor:
        """Return 1 for each element of the rows that count, else 0: `[tiles, slot size]`."""
        strips = self.tensor[:, 3].bool()
        if not strips.any():
            return self._of_matrices()
        found = torch.empty(len(self.number), self.view.slot_size, dtype=torch.float64)
        for some, elements in ((strips, _Tiles._of_strips), (~strips, _Tiles._of_matrices)):
            found[some] = elements(self.take(some.nonzero().flatten()))
        return found

    def _of_strips(self) -> Tensor:
        _, cols, base, _, first, last = (column[:, None] for column in self.tensor.unbind(1))
        address = self.number[:, None] * self.view.slot_size - base + torch.arange(self.view.slot_size)
        return ((address >= first * cols) & (address < (last + 1) * cols)).double()

    def _of_matrices(self) -> Tensor:
        _, cols, _, _, first, last = (column[:, None] for column in self.tensor.unbind(1))
        row, col = (start[:, None] for start in self._place())
        rows, columns = row + torch.arange(self.view.tile_rows), col + torch.arange(self.view.tile_cols)
        in_rows = (rows >= first) & (rows <= last)
        return (in_rows[:, :, None] & (columns < cols)[:, None, :]).double().flatten(1)


# Tiles of several tensors that are looked at together; one tensor may have more.
_AT_ONCE = 1 << 16


def _batches(shared: Shared) -> Iterator[_Tiles]:
    """Yield the tiles of all shared tensors."""
    yield from _batched((view, 0, view.rows - 1, scale * scale, _whole(view)) for view, scale in shared)


def _batches_of_rows(unread_rows: UnreadRows) -> Iterator[_Tiles]:
    """Yield the tiles that hold elements of the rows that are not read, to be taken away."""
    yield from _batched((view, row, row, -scale * scale, _of_row(view, row)) for view, scale, row in unread_rows)


def _whole(view: TileView) -> range:
    return range(view.first_tile, view.first_tile + view.num_tiles)


def _of_row(view: TileView, row: int) -> range:
    if view.strips:
        first, last = (view.base + row * view.cols) // view.slot_size, view.base + (row + 1) * view.cols - 1
        return range(first, last // view.slot_size + 1)
    start = view.first_tile + row // view.tile_rows * view.grid_cols
    return range(start, start + view.grid_cols)


def _batched(parts: Iterable[tuple[TileView, int, int, float, range]]) -> Iterator[_Tiles]:
    batch: list[tuple[TileView, int, int, float, range]] = []
    count = 0
    for part in parts:
        if batch and (_kind(part[0]) != _kind(batch[0][0]) or count + len(part[4]) > _AT_ONCE):
            yield _together(batch)
            batch, count = [], 0
        batch.append(part)
        count += len(part[4])
    if batch:
        yield _together(batch)


def _kind(view: TileView) -> TileView:
    return alike(view)._replace(groups=1, strips=0)


def _together(parts: list[tuple[TileView, int, int, float, range]]) -> _Tiles:
    counts = torch.tensor([len(tiles) for *_, tiles in parts])
    starts = torch.tensor([tiles.start for *_, tiles in parts])
    tensors = torch.tensor(
        [(view.rows, view.cols, view.base, view.strips, first, last) for view, first, last, _, _ in parts]
    )
    values = torch.tensor([value for *_, value, _ in parts], dtype=torch.float64)
    # The number of a tile is its tensor's first one, and its place among its tensor's tiles.
    inside = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return _Tiles(
        parts[0][0],
        starts.repeat_interleave(counts) + inside,
        tensors.repeat_interleave(counts, 0),
        values.repeat_interleave(counts),
    )


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
