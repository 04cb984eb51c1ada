"""Several weights gathered by one kernel, and their gradients added to the pool's by one.

A launch for each weight would take longer on the host than on the GPU. The numbers that differ between the weights are
in tables on the GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from roastify.kernels import reference
from roastify.kernels.gpu import tuning
from roastify.kernels.gpu.combine import is_small_basis
from roastify.kernels.gpu.gather import gather, gather_tiles, place_of
from roastify.kernels.gpu.group_combine import GroupCombine
from roastify.kernels.gpu.launch import PLAIN_ARGUMENTS, Launch
from roastify.kernels.gpu.mapping import apply_sign, effective_sign, supported
from roastify.kernels.gpu.reduce import reduce_, sum_chunks
from roastify.kernels.gpu.tuning import cdiv, power_of_2
from roastify.kernels.group_view import aligned_offsets, group_of_text
from roastify.kernels.torch_internals import is_captured
from roastify.kernels.view import MappingKind, SignKind, WeightView, alike

# How many numbers the kernels read for each weight.
_FIELDS = tl.constexpr(10)
# The least share of the pool that the weights of a group must read for `reduce_group_` to call one kernel for all of
# them. That kernel visits every slot, so in a large pool with few weights most visits are in vain.
_LEAST_SHARE = 1 / 8


@triton.jit
def _numbers(p_tensors, i, MULTIPLE: tl.constexpr):
    """Return a weight's rows, columns, base, first tile, number of tiles and columns of tiles."""
    p = p_tensors + i * _FIELDS
    cols = tl.multiple_of(tl.load(p + 1), MULTIPLE)
    return tl.load(p), cols, tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)


@triton.jit(do_not_specialize=PLAIN_ARGUMENTS)
def _gather_group_kernel(
    p_pool, p_table, p_out, p_tensors, p_scales, p_blocks, key, num_slots, first_slot, first_chunk,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, MAPPING: tl.constexpr,
    SIGN: tl.constexpr, STRIPS: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (TILE_ROWS * TILE_COLS + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    p_block = p_blocks + program // PARTS * 2
    i = tl.load(p_block)
    rows, cols, base, first_tile, num_tiles, grid_cols = _numbers(p_tensors, i, MULTIPLE)
    p_begin = p_out + tl.multiple_of(tl.load(p_tensors + i * _FIELDS + 8), 64)
    i_tile = tl.load(p_block + 1) + tl.arange(0, BT)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    gather_tiles(p_pool, p_table, p_begin, tl.load(p_scales + i), i_tile, element, key, rows, cols, base, first_tile,
                 num_tiles, grid_cols, num_slots, first_slot, first_chunk, TILE_ROWS, TILE_COLS, MAPPING, SIGN,
                 STRIPS)  # fmt: skip


@triton.jit
def _sum_owned(
    p_grads, p_table, p_tensors, p_scales, p_owners, chunk, slot, element, exists, key, num_slots, first_chunk,
    first_tile, num_tiles, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, MAPPING: tl.constexpr, SIGN: tl.constexpr,
    MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the signed gradients of each slot's tile in a chunk, times the λ of the weight that has it.

    The second result is 1 for each slot whose tile in this chunk belongs to a weight, and 0 for the others.
    """
    p_chunk = p_table + (chunk + first_chunk) * 3
    position = tl.load(p_chunk + 2) * ((slot + num_slots - tl.load(p_chunk + 1)) % num_slots) % num_slots
    tile = chunk * num_slots + position
    known = (tile >= first_tile) & (tile - first_tile < num_tiles) & (slot < num_slots)
    owner = tl.load(p_owners + (tile - first_tile), mask=known, other=-1)
    i = tl.maximum(owner, 0)
    p = p_tensors + i * _FIELDS
    rows, grid_cols, first = tl.load(p), tl.load(p + 5), tl.load(p + 3)
    cols = tl.multiple_of(tl.load(p + 1), [MULTIPLE])
    begin = tl.multiple_of(tl.load(p + 8), [64]) if ALIGNED else tl.multiple_of(tl.load(p + 9), [MULTIPLE])
    place, inside = place_of(tile, element, 0, rows[:, None], cols[:, None], first, grid_cols, TILE_ROWS, TILE_COLS, 0)
    inside = inside & exists & (owner >= 0)[:, None]
    grad = tl.load(p_grads + begin[:, None] + place, mask=inside, other=0.0).to(tl.float32)
    grad = apply_sign(
        grad, tile[:, None], element[None, :], key, num_slots, first[:, None], grid_cols[:, None], MAPPING, SIGN
    )
    return grad * tl.load(p_scales + i)[:, None], (owner >= 0).to(tl.int32)


@triton.jit(do_not_specialize=[*PLAIN_ARGUMENTS, "count"])
def _reduce_group_kernel(
    p_grads, p_table, p_total, p_tensors, p_scales, p_owners, p_chunks, count, key, num_slots, first_slot, first_chunk,
    first_tile, num_tiles, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
    MAPPING: tl.constexpr, SIGN: tl.constexpr, STRIPS: tl.constexpr, MULTIPLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = TILE_ROWS * TILE_COLS
    PARTS: tl.constexpr = (SIZE + BE - 1) // BE
    program = tl.program_id(0).to(tl.int64)
    slot = program // PARTS * BS + tl.arange(0, BS)
    element = (program % PARTS * BE).to(tl.int32) + tl.arange(0, BE)
    exists = (slot < num_slots)[:, None] & (element < SIZE)[None, :]
    total = tl.zeros([BS, BE], dtype=tl.float32)
    # Slots that no weight reads are neither read nor written, so a group may have few of a large pool's tiles.
    touched = tl.full([BS], STRIPS, dtype=tl.int32)
    for n in range(count):
        if STRIPS:
            # A tile may hold the end of one weight and the beginning of the next, so each weight has its turn.
            rows, cols, base, first, tiles, grid_cols = _numbers(p_tensors, n, MULTIPLE)
            p = p_tensors + n * _FIELDS
            begin = tl.multiple_of(tl.load(p + 8), 64) if ALIGNED else tl.multiple_of(tl.load(p + 9), MULTIPLE)
            total += tl.load(p_scales + n) * sum_chunks(
                p_grads + begin, p_table, slot, element, exists, tl.load(p + 6), tl.load(p + 7), key, rows, cols, base,
                first, tiles, grid_cols, num_slots, first_chunk, TILE_ROWS, TILE_COLS, BS, BE, MAPPING, SIGN, STRIPS,
            )  # fmt: skip
        else:
            part, owned = _sum_owned(
                p_grads, p_table, p_tensors, p_scales, p_owners, tl.load(p_chunks + n), slot, element, exists, key,
                num_slots, first_chunk, first_tile, num_tiles, TILE_ROWS, TILE_COLS, MAPPING, SIGN, MULTIPLE, ALIGNED,
            )  # fmt: skip
            total += part
            touched = tl.maximum(touched, owned)
    exists = exists & (touched > 0)[:, None]
    p_slot = p_total + (first_slot + slot)[:, None] * SIZE + element[None, :]
    tl.store(p_slot, tl.load(p_slot, mask=exists, other=0.0) + total, mask=exists)


@dataclass
class _Tables:
    """The tables on a device: a row of numbers and λ for each weight, and a block of tiles for each program.

    `owners` has the number of the weight that each tile of the group's range belongs to, or -1, and `chunks` the chunks
    that have such tiles. So `reduce_` visits a slot's tiles once for each chunk, however many weights there are.
    """

    tensors: Tensor
    scales: Tensor
    blocks: Tensor
    owners: Tensor
    chunks: Tensor


class Group:
    """Weights that are alike, and the kernels that gather them and sum their gradients.

    Args:
        weights: the weights. Their views are `alike`, and their bases, if any, have one size.
    """

    def __init__(self, weights: Sequence[WeightView]) -> None:
        self.weights = tuple(weights)
        self._tables: dict[torch.device, _Tables] = {}
        views = [weight.view for weight in self.weights]
        view = self._view = views[0]
        assert len({alike(other) for other in views}) == 1, "the weights of a group differ in more than their sizes"
        # How many of the weights' tiles a slot holds on average.
        self.share = sum(other.num_tiles for other in views) / view.num_slots
        sizes = [other.numel for other in views]
        self._offsets, self._begins = aligned_offsets(sizes), _offsets(sizes)
        # Whether gradients can be concatenated along their rows without being flattened first.
        self._stackable = len({other.cols for other in views}) == 1 and all(len(w.shape) == 2 for w in self.weights)
        self._strides = [_stride(weight) for weight in self.weights]
        self._combine: GroupCombine | None = None
        # The offsets at which the dense tensors begin, and their gradients.
        self._dense_offsets, self._dense_begins = self._offsets, self._begins
        if (basis := self.weights[0].basis_shape) is not None:
            dense_sizes = [math.prod(weight.read_shape) for weight in self.weights]
            self._dense_offsets, self._dense_begins = aligned_offsets(dense_sizes), _offsets(dense_sizes)
            offsets = self._offsets, self._begins, self._dense_offsets, self._dense_begins
            # The last offset of each list is the end of the last weight, so it is left out.
            places = zip(*(each[:-1] for each in offsets), strict=True)
            self._combine = GroupCombine([size // basis[0] for size in sizes], *basis, list(places))
        signs = {effective_sign(other) for other in views}
        fixed = {
            "key": view.key,
            "num_slots": view.num_slots,
            "first_slot": view.first_slot,
            "first_chunk": view.first_chunk,
            "TILE_ROWS": view.tile_rows,
            "TILE_COLS": view.tile_cols,
            "MAPPING": view.mapping,
            # A weight without signs has all its tiles in chunk 0, which every sign kind leaves positive. So the group
            # can use the sign kind of its other weights.
            "SIGN": int(max(signs, key=lambda sign: sign != SignKind.NONE)),
            "STRIPS": view.strips,
            "MULTIPLE": 16 if all(other.cols % 16 == 0 for other in views) else 1,
        }
        block_elements = min(power_of_2(view.slot_size), tuning.MOST_ELEMENTS)
        block_tiles = max(1, tuning.GATHER_ELEMENTS // block_elements)
        self._blocks = [
            (index, first) for index, other in enumerate(views) for first in range(0, other.num_tiles, block_tiles)
        ]
        self._gather = Launch(
            _gather_group_kernel,
            (len(self._blocks) * cdiv(view.slot_size, block_elements),),
            BE=block_elements,
            BT=block_tiles,
            num_warps=tuning.GATHER_WARPS,
            **fixed,
        )
        block_elements = min(power_of_2(view.slot_size), tuning.REDUCE_ELEMENTS)
        block_slots = max(1, tuning.REDUCE_ELEMENTS // block_elements)
        self._first_tile = min(other.first_tile for other in views)
        self._num_tiles = max(other.first_tile + other.num_tiles for other in views) - self._first_tile
        self._chunks = sorted({chunk for other in views for chunk in range(other.chunks[0], sum(other.chunks))})
        # For gradients that lie as the gathered weights do, and for those that follow one another without gaps.
        self._reduce_aligned, self._reduce = (
            Launch(
                _reduce_group_kernel,
                (cdiv(view.num_slots, block_slots) * cdiv(view.slot_size, block_elements),),
                count=len(views) if view.strips else len(self._chunks),
                first_tile=self._first_tile,
                num_tiles=self._num_tiles,
                BS=block_slots,
                BE=block_elements,
                ALIGNED=aligned,
                num_warps=tuning.REDUCE_WARPS,
                **fixed,
            )
            for aligned in (True, False)
        )

    def gather(self, pool: Tensor, table: Tensor) -> list[Tensor]:
        """Return the dense tensors, or the coefficients of weights with bases; they share one piece of memory."""
        out = self.gather_flat(pool, table)
        return [
            out.as_strided(weight.gathered_shape, stride, offset)
            for weight, stride, offset in zip(self.weights, self._strides, self._offsets, strict=False)
        ]

    def gather_flat(self, pool: Tensor, table: Tensor) -> Tensor:
        """Return the matrices that the pool holds in one flat tensor; see `GroupView`."""
        tables = self._on(pool.device)
        out = torch.empty(self._offsets[-1], dtype=pool.dtype, device=pool.device)
        self._gather(
            p_pool=pool.contiguous(),
            p_table=table,
            p_out=out,
            p_tensors=tables.tensors,
            p_scales=tables.scales,
            p_blocks=tables.blocks,
        )
        return out

    def are_together(self, gathered: Sequence[Tensor]) -> bool:
        """Whether tensors were returned by one call of `gather`: each lies at its offset from the first."""
        first = gathered[0].data_ptr()
        begins = (first + offset * gathered[0].element_size() for offset in self._offsets)
        return all(tensor.data_ptr() == begin for tensor, begin in zip(gathered, begins, strict=False))

    def combine(self, coefficients: Sequence[Tensor], bases: Tensor) -> list[Tensor]:
        """Return the dense tensors of weights with bases; they share one piece of memory.

        Args:
            coefficients: the tensors that `gather` returned (`are_together`).
            bases: the weights' bases, concatenated along their rows.
        """
        assert self._combine is not None, "the weights have no bases"
        first = coefficients[0]
        self._on(first.device)
        out = first.new_empty(self._dense_offsets[-1])
        # The other coefficients follow the first in memory.
        self._combine.combine(first, bases, out)
        return [
            out[offset : offset + math.prod(weight.read_shape)].view(weight.read_shape)
            for weight, offset in zip(self.weights, self._dense_offsets, strict=False)
        ]

    def reduce_(self, total: Tensor, grads: Sequence[Tensor], table: Tensor, bases: Tensor | None = None) -> None:
        """Add the pool's gradient from all weights to `total`.

        Args:
            total: a contiguous float32 tensor of the pool's shape.
            grads: the gradients of the dense tensors, in one dtype; without `bases`, of the tensors from `gather`.
            table: the pool's chunk table.
            bases: the weights' bases, concatenated along their rows.
        """
        tables = self._on(total.device)
        joined = self._joined(grads)
        if bases is not None:
            assert self._combine is not None, "the weights have no bases"
            dense, joined = joined, joined.new_empty(self._begins[-1])
            self._combine.coefficient_grads(dense, bases, joined)
            del dense
        self._add(self._reduce, total, joined, table, tables)

    def reduce_flat_(self, total: Tensor, grad_flat: Tensor, table: Tensor) -> None:
        """Add the pool's gradient from all weights to `total`, of gradients that lie as `gather_flat`'s result."""
        self._add(self._reduce_aligned, total, grad_flat.contiguous(), table, self._on(total.device))

    def _add(self, launch: Launch, total: Tensor, grads: Tensor, table: Tensor, tables: _Tables) -> None:
        launch(
            p_grads=grads,
            p_table=table,
            p_total=total,
            p_tensors=tables.tensors,
            p_scales=tables.scales,
            p_owners=tables.owners,
            p_chunks=tables.chunks,
        )

    def _joined(self, grads: Sequence[Tensor]) -> Tensor:
        """Return all gradients in one tensor, each in the element order of its matrix in the pool."""
        matrices = [grad.t() if weight.transposed else grad for grad, weight in zip(grads, self.weights, strict=True)]
        return torch.cat(matrices if self._stackable else [matrix.reshape(-1) for matrix in matrices])

    def is_ready(self, device: torch.device) -> bool:
        """Whether the tables are on a device, or can be copied there now: a CUDA graph cannot capture the copy."""
        return device in self._tables or device.type != "cuda" or not torch.cuda.is_current_stream_capturing()

    def _on(self, device: torch.device) -> _Tables:
        tables = self._tables.get(device)
        if tables is None:
            # The tables outlive this call, so they must not lie in a memory pool that this thread allocates from:
            # `torch.compile(mode="reduce-overhead")` refuses a call that leaves tensors in its pool. Another thread
            # allocates from no such pool.
            with ThreadPoolExecutor(1) as other_thread:
                tables = other_thread.submit(self._bring_to, device).result()
        return tables

    def _bring_to(self, device: torch.device) -> _Tables:
        """Copy the tables that the kernels read to a device."""
        views = [weight.view for weight in self.weights]
        rows = [
            (*view[:3], view.first_tile, view.num_tiles, view.grid_cols, view.chunks[0], sum(view.chunks), *begins)
            for view, *begins in zip(views, self._offsets, self._begins, strict=False)
        ]
        if self._combine is not None:
            self._combine.bring_to(device)
        # This entry is set last, so that another thread that finds it finds all tables.
        tables = self._tables[device] = _Tables(
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor([weight.scale for weight in self.weights], dtype=torch.float32, device=device),
            torch.tensor(self._blocks, dtype=torch.int32, device=device),
            self._owners().to(device),
            torch.tensor(self._chunks, dtype=torch.int64, device=device),
        )
        return tables

    def _owners(self) -> Tensor:
        owners = torch.full((self._num_tiles,), -1, dtype=torch.int32)
        for number, weight in enumerate(self.weights):
            first = weight.view.first_tile - self._first_tile
            part = owners[first : first + weight.view.num_tiles]
            assert self._view.strips or bool((part < 0).all()), "two weights of a group have the same tile"
            part.fill_(number)
        return owners


def fits(pool: Tensor, weight: WeightView) -> bool:
    """Whether these kernels support a pool's dtype, and a weight's mapping and basis."""
    if weight.basis_shape is not None and not is_small_basis(*weight.basis_shape):
        return False
    return supported(pool) and weight.view.mapping == MappingKind.PERMUTATION


def gather_group(pool: Tensor, table: Tensor, group: str) -> Tensor:
    """Return the dense tensors of a group in one flat tensor, by one kernel if one fits."""
    found, kernels = group_of_text(group), _kernels_of(group, pool)
    if fits(pool, kernels.weights[0]) and kernels.is_ready(pool.device):
        return kernels.gather_flat(pool, table)
    flat = pool.new_empty(found.offsets[-1])
    for number, (view, scale) in enumerate(zip(found.views, found.scales, strict=True)):
        found.part(flat, number).copy_(gather(pool, table, view, scale))
    return flat


def reduce_group(grad_flat: Tensor, table: Tensor, group: str, pool_shape: list[int]) -> Tensor:
    """Return the adjoint of `gather_group`."""
    total = torch.zeros(pool_shape, dtype=reference.summed_in(grad_flat.dtype), device=grad_flat.device)
    reduce_group_(total, grad_flat, table, group)
    return total.to(grad_flat.dtype)


def reduce_group_(total: Tensor, grad_flat: Tensor, table: Tensor, group: str) -> None:
    """Add what `reduce_group` returns to `total`, by one kernel if one fits and the weights read enough of the pool."""
    found, kernels = group_of_text(group), _kernels_of(group, total)
    fitting = fits(grad_flat, kernels.weights[0]) and total.dtype == torch.float32 and total.is_contiguous()
    # The kernel for strips visits every slot once for each weight.
    least = 1 if found.views[0].strips else _LEAST_SHARE
    if fitting and kernels.share >= least and kernels.is_ready(total.device):
        kernels.reduce_flat_(total, grad_flat, table)
        return
    for number, (view, scale) in enumerate(zip(found.views, found.scales, strict=True)):
        reduce_(total, found.part(grad_flat, number), table, view, scale)


# The groups that CUDA graphs have captured. They are kept as long as the process runs: a replay reads their tables even
# after `_group` has forgotten them.
_captured: set[Group] = set()


def _kernels_of(group: str, tensor: Tensor) -> Group:
    """Return the kernels of an operator's group, which are about to run on a tensor."""
    kernels = _group(group)
    if is_captured(tensor):
        _captured.add(kernels)
    return kernels


@functools.lru_cache(maxsize=1 << 8)
def _group(text: str) -> Group:
    """Return the kernels of an operator's group, whose tensors are the matrices that the pool holds."""
    group = group_of_text(text)
    return Group(
        [
            WeightView(view, scale, (view.rows, view.cols), transposed=False)
            for view, scale in zip(group.views, group.scales, strict=True)
        ]
    )


def _stride(weight: WeightView) -> tuple[int, ...]:
    """Return the strides of a gathered weight, whose matrix is row-major in memory."""
    if weight.transposed:
        return 1, weight.view.cols
    shape = weight.gathered_shape
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _offsets(sizes: Iterable[int]) -> list[int]:
    """Return the offset at which each piece begins, and the end of the last."""
    return list(itertools.accumulate(sizes, initial=0))
