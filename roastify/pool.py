r"""`RoastPool`: the owner of the one shared Parameter, its initial values and the preconditioning of its gradient."""

from __future__ import annotations

import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roastify.kernels import reference
from roastify.kernels.view import MappingKind, SignKind, TileView
from roastify.mapping import TileMap


class _Gate(torch.autograd.Function):
    """The one door from a forward pass to the pool's Parameter: autograd runs its backward once, after every layer's.

    It hands out a token, a tensor of the pool's shape that takes no memory and holds no value, for gradients to arrive
    at: autograd adds them up in the token's dtype, float32 even where the pool is narrower (float64 if it is that).

    Γ is kept as attributes, not saved for backward: a node that saves nothing may run in a region that is checkpointed
    when the forward pass has made it before, and may run again after its graph was freed.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        made: weakref.ref[_Made] | None,
        per_slot: Tensor | None,
        uneven_slots: Tensor | None,
        uneven: Tensor | None,
    ) -> Tensor:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return weight.new_empty((), dtype=wide).expand(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.made, *ctx.inverse_gamma = inputs
        ctx.dtype = weight.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Who has a gradient may step; a fused optimizer would do so without a trace.
        if ctx.made is not None and (made := ctx.made()) is not None:
            made.over = True
        grad = grads[0]
        per_slot, uneven_slots, uneven = ctx.inverse_gamma
        if per_slot is not None:
            by_slot = grad.reshape(per_slot.shape[0], -1)
            factors = per_slot[:, None].to(grad.dtype)
            if uneven_slots.numel():
                # Of all elements, by themselves: a compiler that meets several gates computes them once.
                factors = factors.expand_as(by_slot).index_copy(0, uneven_slots, uneven.to(grad.dtype))
            grad = (by_slot * factors).view_as(grad)
        return grad.to(ctx.dtype), None, None, None, None


class _Read(torch.autograd.Function):
    """A layer's read: the values of a copy of the pool, whose gradient goes to the gate's token."""

    @staticmethod
    def forward(token: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None


class _Made:
    """What was made of the pool's present content: the gate, and a copy for each compute dtype."""

    def __init__(self, pool: RoastPool) -> None:
        self.pool = pool
        # Held, not only looked at: while this exists, no other tensor can take the Parameter's identity or memory.
        self.weight = pool.weight
        self.values = pool.weight.detach()
        self.copies: dict[torch.dtype, Tensor] = {}
        self.token: Tensor | None = None
        self.over = False

    def copy(self, dtype: torch.dtype) -> Tensor:
        """Return the pool's values in a dtype, outside of any graph."""
        if dtype == self.values.dtype:
            return self.values
        if dtype not in self.copies:
            self.copies[dtype] = self.values.to(dtype)
        return self.copies[dtype]

    def gate(self) -> Tensor:
        """Return the gate's token."""
        if self.token is None:
            pool = self.pool
            gamma = (pool.per_slot, pool.uneven_slots, pool.uneven) if pool.precondition else (None, None, None)
            # Weak: the gate's node belongs to the token, and the two would keep each other alive.
            made = None if torch.compiler.is_compiling() else weakref.ref(self)
            self.token = _Gate.apply(self.weight, made, *gamma)
        return self.token


class _Pass:
    """One forward pass of a converted model."""

    def __init__(self, capturing: bool) -> None:
        self.capturing = capturing
        self.made: dict[tuple[Any, ...], _Made] = {}


class _Passes(threading.local):
    """The forward passes that this thread is in, by the pool they read."""

    def __init__(self) -> None:
        self.running: dict[RoastPool, _Pass] = {}


_passes = _Passes()


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor is an ordinary one, of which it is known when it changes and who may use what is made of it.

    Not so: subclasses (fake and distributed tensors), those in a `torch.func` transform, which are wrapped for its
    duration, and those made in inference mode, which count no versions.
    """
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type in ("cpu", "cuda")
        and not weight.is_inference()
        and not torch._C._are_functorch_transforms_active()
    )


def _seen(weight: Tensor) -> tuple[Any, ...]:
    """Return what a change of a plain tensor shows in, and where its copies are good.

    A copy made on one stream is not ready on another, and one made in inference mode is of no use to autograd.
    """
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    content = (id(weight), weight._version, weight.data_ptr(), weight.dtype)
    return *content, stream, torch.is_inference_mode_enabled()


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


class RootForward:
    """The `forward` of a converted model: within it, the pool is cast once and has one gate.

    A copy of the pool is only right for as long as the pool is unchanged, and nothing tells for certain that it is:
    fused optimizers and writes through `.data` count no version, and a replayed CUDA graph writes without Python. So no
    copy outlives the call in which it was made, and writes within it are seen but for one kind: one that leaves no
    trace, made by the model's own forward between two of its layers. (Torch's autocast assumes as much of its whole
    context.) Layers that are called outside (by themselves, by another thread, or again in backward by checkpointing)
    make copies of their own.

    It stands in the instance's `forward`, where a `finally` always ends what it began. Hooks do not run when the user
    interrupts, can be cleared one without the other, and keep torch from its fused transformer layers and from
    `torch.cuda.make_graphed_callables`.

    Args:
        model: the model.
        pool: its pool.
        inner: the forward that the instance had of its own, or None for the class's.
    """

    __name__ = "forward"

    def __init__(self, model: nn.Module, pool: RoastPool, inner: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.pool = pool
        self.inner = inner

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that runs, whose signature this one has."""
        if self.inner is not None:
            return self.inner
        return types.MethodType(type(self.model).forward, self.model)

    @property
    def __code__(self) -> types.CodeType:
        """The code of the forward that runs, which `torch.export` asks for."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward as one pass."""
        if torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        running, pool = _passes.running, self.pool
        outer = running.get(pool)
        running[pool] = _Pass(_is_capturing(pool.weight))
        try:
            return self._run(*args, **kwargs)
        finally:
            if outer is None:
                del running[pool]
            else:
                running[pool] = outer

    def replicate(self) -> nn.Module:
        """Return the model's replica for `nn.DataParallel`, whose forward is its own: this one runs the original's.

        It stands in the instance's `_replicate_for_data_parallel`, which is what `DataParallel` calls. In a replica
        every layer casts for itself.
        """
        replica = type(self.model)._replicate_for_data_parallel(self.model)
        del replica.__dict__["forward"], replica.__dict__["_replicate_for_data_parallel"]
        if self.inner is not None:
            replica.__dict__["forward"] = self.inner
        return replica

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Not through `__wrapped__`: torch.compile traces this, but not the making of a bound method.
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


class RoastPool(nn.Module):
    r"""The pool: one Parameter `weight` of `[num_slots · tile_rows, tile_cols]`, a slot being `tile_rows` rows.

    It is two-dimensional because optimizers' usual parameter groups exempt one-dimensional parameters from weight
    decay (timm, nanoGPT), which the weights it stands for were not.

    Through `read` its gradient is divided, element by element, by

    .. math:: \Gamma_e = \sum_{w\ \text{reads}\ e} \lambda_w^2,

    so that an SGD step on the pool is the dense SGD step projected onto what the pool can express, and learning rates
    carry over from the dense recipe (Desai and Shrivastava, ICLR 2024, section 4.1, with λ added).

    Args:
        num_slots: slots in the pool.
        tile: `(rows, cols)` of a tile.
        maps: the mappings of its regions; one, or one for each tensor.
        shared: view and λ of every shared tensor; tied tensors once.
        unread_rows: view, λ and row of every row that is zero instead of read (an embedding's padding row).
        dtype: of the Parameter.
        device: of the Parameter.
        trainable: whether the Parameter requires a gradient.
        precondition: whether `read` divides the gradient by Γ.
    """

    table: Tensor
    per_slot: Tensor
    uneven_slots: Tensor
    uneven: Tensor

    def __init__(
        self,
        num_slots: int,
        tile: tuple[int, int],
        maps: Sequence[TileMap],
        shared: Sequence[tuple[TileView, float]],
        *,
        unread_rows: Sequence[tuple[TileView, float, int]] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trainable: bool = True,
        precondition: bool = True,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.tile = tile
        self.precondition = precondition
        # The plan that the pool was built from, for saving and the way back; `rewrite` sets it.
        self.plan: Any = None
        shape = (num_slots * tile[0], tile[1])
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=trainable)
        # Derived from the plan, so never part of a state dict. The masters stay on the CPU whatever the default device
        # is: `_apply` copies from them, which keeps the buffers right through `to_empty` and exact through `half`.
        with torch.device("cpu"):
            rows = [row for tile_map in maps for row in tile_map.chunk_table()]
            self._masters = {"table": torch.tensor(rows, dtype=torch.int64).view(-1, 3)}
            self._masters |= _inverse_gamma(num_slots, tile, self._masters["table"], shared, unread_rows)
        for name, master in self._masters.items():
            self.register_buffer(name, master.to(device), persistent=False)

    @property
    def slot_size(self) -> int:
        """Elements in a slot."""
        return self.tile[0] * self.tile[1]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the pool for use in a forward pass, in a dtype (default: its own).

        Its gradient arrives summed over all readers of the pass, in float32, and divided by Γ. Within its
        model's forward (`RootForward`) the cast is made once, and so is the node that divides; elsewhere, each time.
        """
        weight = self.weight
        dtype = dtype or weight.dtype
        tracked = torch.is_grad_enabled() and weight.requires_grad
        if not tracked and dtype == weight.dtype:
            return weight
        made = self._made()
        return _Read.apply(made.gate(), made.copy(dtype)) if tracked else made.copy(dtype)

    def _made(self) -> _Made:
        """Return what the running pass has made of the pool as it is now, which may be nothing yet."""
        # What comes and goes is in a compiler's way. Inductor itself merges the casts of a graph with gradients, and
        # makes those of one without in one kernel.
        running = None if torch.compiler.is_compiling() else _passes.running.get(self)
        if running is None or not _is_plain(self.weight):
            return _Made(self)
        seen = _seen(self.weight)
        if _is_capturing(self.weight) != running.capturing:
            # A captured graph must make its own copy: it is replayed when this pass is long over.
            return _Made(self)
        if seen not in running.made or running.made[seen].over:
            running.made[seen] = _Made(self)
        return running.made[seen]

    def forward(self, x: Any) -> Any:
        """Return `x`: a model whose forward runs through its children meets its pool among them."""
        return x

    def initialise_random(self, std: float, seed: int) -> None:
        """Fill the pool with N(0, std²), the same numbers on every device; the global generators are not touched."""
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        values = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu").normal_(
            0.0, std, generator=generator
        )
        with torch.no_grad():
            self.weight.copy_(values)

    def initialise_projection(self, tensors: Iterable[tuple[TileView, float, Tensor]]) -> None:
        r"""Set the pool to the least-squares fit of dense tensors: :math:`pool_e = \sum \lambda\,sign\,w / \Gamma_e`.

        Args:
            tensors: view, λ and dense matrix `[rows, cols]` of every shared tensor; tied tensors once.
        """
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            direct = self.weight.dtype == wide
            total = self.weight.data.zero_().view(-1) if direct else self.weight.new_zeros(self.weight.numel()).to(wide)
            for view, scale, matrix in tensors:
                reference.reduce_into(total, matrix.to(wide), self.table, view, scale)
            by_slot = total.view(self.num_slots, -1)
            # Uneven slots first: their elements' factors replace the slot's.
            uneven = by_slot[self.uneven_slots] * self.uneven.to(wide)
            by_slot.mul_(self.per_slot[:, None].to(wide))
            by_slot[self.uneven_slots] = uneven
            if not direct:
                self.weight.copy_(total.view_as(self.weight))

    def _replicate_for_data_parallel(self) -> RoastPool:
        replica = super()._replicate_for_data_parallel()
        _replicas.setdefault(self, weakref.WeakSet()).add(replica)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastPool:
        super()._apply(fn, recurse)
        for name, master in self._masters.items():
            setattr(self, name, master.to(self.weight.device))
        return self

    def extra_repr(self) -> str:
        """Describe the pool's size."""
        rows, cols = self.tile
        return f"{self.weight.numel():,} parameters, {self.num_slots} slots of {rows}×{cols}"


# Of every pool, what `nn.DataParallel` made of it for each device; it makes them anew for every forward.
_replicas: weakref.WeakKeyDictionary[RoastPool, weakref.WeakSet[RoastPool]] = weakref.WeakKeyDictionary()


class ReplicatedPool:
    """Stands for a pool in replicas of the modules that read it: `nn.DataParallel` runs each with its device current.

    Modules hold their pool outside the tree of modules, so replicating the tree does not lead them to its replica.
    """

    def __init__(self, pool: RoastPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        device = current_device()
        return getattr(next(pool for pool in _replicas[self._pool] if pool.weight.device == device), name)


def current_device() -> torch.device:
    """Return the device whose replica is running."""
    return torch.device("cuda", torch.cuda.current_device())


def _inverse_gamma(
    num_slots: int,
    tile: tuple[int, int],
    table: Tensor,
    shared: Sequence[tuple[TileView, float]],
    unread_rows: Sequence[tuple[TileView, float, int]],
) -> dict[str, Tensor]:
    """Return 1/Γ as a number for each slot, and element by element for the slots whose elements differ.

    They differ where a reader is padded or begins inside a tile. Elements that nothing reads get the slot's number: no
    gradient reaches them.
    """
    size = tile[0] * tile[1]
    if _nothing_shared(num_slots, shared):
        per_slot = torch.ones(num_slots)
        for view, scale in shared:
            per_slot[view.first_slot + view.first_tile : view.first_slot + view.first_tile + view.num_tiles] = scale**2
        return {
            "per_slot": per_slot.reciprocal(),
            "uneven_slots": torch.empty(0, dtype=torch.int64),
            "uneven": torch.empty(0, size),
        }
    # In float64: rows are subtracted below, and λ may differ by orders of magnitude.
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
    by_slot = gamma.view(num_slots, size)
    per_slot = by_slot.amax(1)
    per_slot[per_slot == 0] = 1.0
    by_slot = torch.where(by_slot == 0, per_slot[:, None], by_slot)
    uneven_slots = (by_slot != per_slot[:, None]).any(1).nonzero().flatten()
    return {
        "per_slot": per_slot.reciprocal().float(),
        "uneven_slots": uneven_slots,
        "uneven": by_slot[uneven_slots].reciprocal().float(),
    }


def _nothing_shared(num_slots: int, shared: Sequence[tuple[TileView, float]]) -> bool:
    """Whether every tile has a slot to itself, in order, and no slot serves two tensors."""
    if any(view.mapping != MappingKind.PERMUTATION for view, _ in shared):
        return False
    spans = sorted((view.first_slot + view.first_tile, view.num_tiles, view.num_slots) for view, _ in shared)
    if any(view.first_tile + view.num_tiles > view.num_slots for view, _ in shared):
        return False
    return all(start + length <= following for (start, length, _), (following, _, _) in itertools.pairwise(spans))
