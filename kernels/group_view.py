"""`GroupView`: several shared tensors that one operator gathers, and where they lie in its flat result."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roastify.kernels.view import TileView, alike

# Each tensor begins at a multiple of this, because cuBLAS and wide loads need aligned addresses.
_ALIGNED = 64


def aligned_offsets(sizes: Iterable[int]) -> list[int]:
    """Return where tensors of these sizes begin in a flat one, and the end of the last."""
    return list(itertools.accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))


@dataclass(frozen=True)
class GroupView:
    """Tensors whose views are `alike`.

    Args:
        views: where the tensors lie.
        scales: λ of each.
    """

    views: tuple[TileView, ...]
    scales: tuple[float, ...]

    @functools.cached_property
    def text(self) -> str:
        """What an operator takes: one string, because a compiler checks every argument of every layer at each call."""
        places = zip(self.views, self.scales, strict=True)
        return json.dumps([alike(self.views[0]), *((view.rows, view.cols, view.base, scale) for view, scale in places)])

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each tensor begins in the flat one, and the end of the last."""
        return aligned_offsets(view.numel for view in self.views)

    def part(self, flat: Tensor, number: int) -> Tensor:
        """Return a tensor of the group, as a view of the flat one."""
        view = self.views[number]
        return flat.narrow(0, self.offsets[number], view.numel).view(view.rows, view.cols)

    def joined(self, parts: Mapping[int, Tensor]) -> Tensor:
        """Return the flat tensor of some tensors of the group, by their numbers; all else in it is zero."""
        some = next(iter(parts.values()))
        pieces, end = [], 0
        for number, part in sorted(parts.items()):
            pieces += [some.new_zeros(self.offsets[number] - end), part.reshape(-1)]
            end = self.offsets[number] + part.numel()
        pieces.append(some.new_zeros(self.offsets[-1] - end))
        return torch.cat([piece for piece in pieces if piece.numel()])


@functools.lru_cache(maxsize=1 << 10)
def group_of_text(text: str) -> GroupView:
    """Return the group that a `GroupView.text` describes."""
    same, *places = json.loads(text)
    view = TileView(*same)
    return GroupView(
        tuple(view._replace(rows=rows, cols=cols, base=base) for rows, cols, base, _ in places),
        tuple(scale for *_, scale in places),
    )
