r"""`RoastPool`: the module with the shared Parameter, its initial values and its preconditioner."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.kernels import reference
from roastify.kernels.gathered_weights import WeightGroup, make_groups
from roastify.kernels.reference import summed_in
from roastify.kernels.torch_internals import is_exporting, with_static_sizes
from roastify.kernels.view import TileView, WeightView
from roastify.pool import compiled_read
from roastify.pool.mapping import TileMap
from roastify.pool.pass_cache import cache_of, is_watched_by_modes, unseen
from roastify.pool.plan import RoastPlan
from roastify.pool.preconditioner import divide_, inverse_gamma
from roastify.pool.state import encode, plan_with


class RoastPool(nn.Module):
    r"""The pool: one Parameter `weight` of `[num_slots · tile_rows, tile_cols]`. A slot is `tile_rows` rows of it.

    The Parameter is two-dimensional because common parameter groups (timm, nanoGPT) exempt one-dimensional parameters
    from weight decay, and the weights that the pool replaces were not exempt.

    `read` divides the pool's gradient, element by element, by

    .. math:: \Gamma_e = \sum_{w\ \text{reads}\ e} \lambda_w^2,

    so that an SGD step on the pool is the dense SGD step projected onto the weights that the pool can express (Desai
    and Shrivastava, ICLR 2024, section 4.1, with λ added). Weight decay must not be divided: the projection of the
    dense weights' decay is the pool's decay.

    The pool module also owns the basis kernels of convolutions (`basis`). Each layer with a basis has a Parameter
    `basis_…` of `[count, positions]`. A step on a basis kernel moves as many weights as the layer has kernels, so the
    gradient of a basis is divided too.

    Args:
        num_slots: slots in the pool.
        tile: `(rows, cols)` of a tile.
        maps: the mappings of the pool's regions: one mapping, or one for each tensor.
        shared: view and λ of every shared tensor; a tied tensor is listed once.
        unread_rows: view, λ and row of every row that is zero instead of read from the pool (an embedding's padding
            row).
        bases: shape of every basis, and the divisor of its gradient.
        dtype: dtype of the Parameters.
        device: device of the Parameters.
        trainable: whether the Parameters require a gradient.
        precondition: whether the gradients of the pool and of the bases are divided.
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
        bases: Sequence[tuple[tuple[int, int], float]] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trainable: bool = True,
        precondition: bool = True,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.tile = tile
        self.precondition = precondition
        # The plan that the pool was built from. Saving and densifying need it; `rewrite` sets it.
        self.plan: Any = None
        # The shared tensors as their layers hold them, in the plan's order, and those that their layers may keep during
        # a training pass; `rewrite` sets both.
        self.weights: tuple[Any, ...] = ()
        self.retained: tuple[WeightView, ...] = ()
        self._groups: dict[WeightView, WeightGroup] | None = None
        # The dtype that the Parameter is stored in. While a forward pass runs, sharding may show it in another dtype.
        self.stored_dtype = dtype
        shape = (num_slots * tile[0], tile[1])
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=trainable)
        # Not in a ParameterList: `nn.DataParallel` leaves that empty in its replicas.
        for index, (basis_shape, _) in enumerate(bases):
            basis = nn.Parameter(torch.empty(basis_shape, dtype=dtype, device=device), requires_grad=trainable)
            self.register_parameter(_basis_name(index), basis)
        self._basis_energy = tuple(energy for _, energy in bases)
        # The chunk table and 1/Γ follow from the plan. They are no buffers: averages of models (EMA), casts and
        # broadcasts change buffers, and a table that was averaged leads to other slots. The masters stay on the CPU,
        # whatever the default device is; where the pool is, there are copies of them.
        with torch.device("cpu"):
            rows = [row for tile_map in maps for row in tile_map.chunk_table()]
            self._masters = {"table": torch.tensor(rows, dtype=torch.int64).view(-1, 3)}
            self._masters |= inverse_gamma(num_slots, tile, self._masters["table"], shared, unread_rows)
        self._place_constants(self.weight.device)

    @property
    def slot_size(self) -> int:
        """Elements in a slot."""
        return self.tile[0] * self.tile[1]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the pool's values for a forward pass, in a dtype (default: the pool's own).

        The pool's gradient is summed over all readers of the pass in float32 (float64 for a float64 pool), and divided
        by Γ. Within the model's forward (`RootForward`) the pool is cast once. Outside of it, each read casts the pool
        again.

        Raises:
            RoastError: the pool is sharded and its values are not gathered now.
        """
        weight = self._whole()
        dtype = dtype or weight.dtype
        tracked = torch.is_grad_enabled() and weight.requires_grad
        if not tracked and dtype == weight.dtype:
            return weight
        # Not for an exported graph: that has no backward pass, and may run where the operator `read` does not exist.
        if tracked and torch.compiler.is_dynamo_compiling() and not is_exporting():
            return compiled_read.read(self, dtype)
        if is_watched_by_modes():
            with unseen(self):
                return cache_of(self).read(dtype, tracked)
        return cache_of(self).read(dtype, tracked)

    def gathered_weight(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return a dense weight in a dtype, in a graph, for a forward pass that autograd records.

        Within the model's forward, the weight is gathered once, together with the weights of its group. Outside of it,
        each read gathers the weight again.

        Raises:
            RoastError: the pool is sharded and its values are not gathered now.
        """
        self._whole()
        if is_watched_by_modes():
            with unseen(self):
                return cache_of(self).dense(weight, dtype)
        return cache_of(self).dense(weight, dtype)

    def bases(self) -> list[nn.Parameter]:
        """Return the Parameters of all basis kernels."""
        return [getattr(self, _basis_name(index)) for index in range(len(self._basis_energy))]

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return a layer's basis kernels, and the factor for their gradient; see the class."""
        return getattr(self, _basis_name(index)), 1 / self._basis_energy[index] if self.precondition else 1.0

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter of a layer's basis, or None if the basis is computed (as by a parametrization)."""
        # Read from the dictionary: attribute access would run the computation.
        basis = self.__dict__["_parameters"].get(_basis_name(index))
        return basis if type(basis) is nn.Parameter else None

    def group_of(self, weight: WeightView) -> WeightGroup:
        """Return the group of weights that a pass gathers together with this one."""
        if self._groups is None:
            self._groups = make_groups(self.retained)
        return self._groups.get(weight) or WeightGroup([weight])

    def parameter(self) -> nn.Parameter:
        """Return `weight` in a tenth of the time of an attribute lookup; each layer needs it several times a call."""
        weight = self.__dict__["_parameters"].get("weight")
        # A replica of `nn.DataParallel` has no Parameters: its `weight` is a plain attribute.
        return self.weight if weight is None else weight

    def _whole(self) -> nn.Parameter:
        weight = self.parameter()
        if is_sharded(weight):
            raise RoastError(
                "the pool is sharded over processes and is not gathered now; FSDP2 gathers it only while the forward "
                "of the module that it was sharded with runs. Shard the whole model last, with fully_shard(model), and "
                "call the whole model. To read weights or to call a part of the model, call model.unshard() first and "
                "model.reshard() afterwards"
            )
        # Sharding and offloading move a Parameter without `_apply`.
        if weight.device != self._constants_device:
            self._place_constants(weight.device)
        return weight

    def forward(self, x: Any) -> Any:
        """Return `x`, because some models' forward calls every child in turn, and the pool is one of the children."""
        return x

    def initialise_random(self, std: float, seed: int) -> None:
        """Fill the pool with N(0, std²): the same numbers on every device, without use of the global generators."""
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        values = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu").normal_(
            0.0, std, generator=generator
        )
        with torch.no_grad():
            self.weight.copy_(values)

    def initialise_projection(self, tensors: Iterable[tuple[TileView, float, Tensor]]) -> None:
        r"""Set the pool to the least-squares fit of dense tensors: :math:`pool_e = \sum \lambda\,sign\,w / \Gamma_e`.

        Args:
            tensors: view, λ and dense matrix `[rows, cols]` of every shared tensor; a tied tensor is given once.
        """
        dtype = summed_in(self.weight.dtype)
        with torch.no_grad():
            direct = self.weight.dtype == dtype
            total = self.weight.data.zero_() if direct else torch.zeros_like(self.weight, dtype=dtype)
            for view, scale, matrix in tensors:
                reference.reduce_(total, matrix.to(dtype), self.table, view, scale)
            divide_(total, self.per_slot, self.uneven_slots, self.uneven)
            if not direct:
                self.weight.copy_(total)

    def _replicate_for_data_parallel(self) -> RoastPool:
        replica = super()._replicate_for_data_parallel()
        _replicas.setdefault(self, weakref.WeakSet()).add(replica)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastPool:
        super()._apply(fn, recurse)
        self.stored_dtype = self.weight.dtype
        self._place_constants(self.weight.device)
        return self

    def _place_constants(self, device: torch.device) -> None:
        """Copy the chunk table and 1/Γ from their masters to a device, 1/Γ in the dtype of summed gradients."""
        for name, master in self._masters.items():
            dtype = summed_in(self.stored_dtype) if master.is_floating_point() else master.dtype
            # Past `nn.Module`, which would look for a Parameter or a buffer of the name.
            self.__dict__[name] = with_static_sizes(master.to(device, dtype, copy=True))
        self._constants_device = device

    def get_extra_state(self) -> Tensor:
        """Return what the pool's values mean: the plan's fingerprint, λ, centers and zero rows, as bytes."""
        return torch.empty(0, dtype=torch.uint8) if self.plan is None else encode(self.plan)

    def set_extra_state(self, state: Any) -> None:
        """Leave it: `_load_from_state_dict` takes it before the pool's values."""

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "_extra_state"
        if self.plan is not None and prefix + "weight" in state_dict:
            if key not in state_dict:
                warnings.warn(
                    f"the state dict holds {prefix}weight and no {key}: an older roastify saved it, or something left "
                    f"the key out. It cannot be checked whether the values were made under this model's seed, plan and "
                    f"λ; if they were not, the model's outputs are wrong",
                    stacklevel=2,
                )
                state_dict[key] = self.get_extra_state()
            try:
                plan = plan_with(self.plan, state_dict[key])
            except ValueError as error:
                error_msgs.append(f"{prefix}weight cannot be loaded: {error}")
                return
            if plan is not self.plan:
                self._set_plan(plan)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _set_plan(self, plan: RoastPlan) -> None:
        """Take another plan of the same fingerprint: its λ, centers and zero rows."""
        self.plan = plan
        for tensor, weight in zip(plan.shared, self.weights, strict=True):
            weight.scale, weight.center, weight.zero_row = tensor.scale, tensor.center, tensor.zero_row
            weight.__post_init__()
        shared = [(plan.view(tensor), tensor.scale or 0.0) for tensor in plan.shared]
        unread = [
            (plan.view(tensor), tensor.scale or 0.0, tensor.zero_row)
            for tensor in plan.shared
            if tensor.zero_row is not None
        ]
        with torch.device("cpu"):
            self._masters |= inverse_gamma(self.num_slots, self.tile, self._masters["table"], shared, unread)
        self._basis_energy = tuple(plan.basis_energy(tensor) for tensor in plan.with_basis)
        self._groups = None
        self._place_constants(self.weight.device)

    def extra_repr(self) -> str:
        """Describe the pool's size."""
        rows, cols = self.tile
        return f"{self.weight.numel():,} parameters, {self.num_slots} slots of {rows}×{cols}"


def _basis_name(index: int) -> str:
    return f"basis_{index}"


# The replicas of every pool, one for each device. `nn.DataParallel` makes new replicas for every forward.
_replicas: weakref.WeakKeyDictionary[RoastPool, weakref.WeakSet[RoastPool]] = weakref.WeakKeyDictionary()


class ReplicatedPool:
    """Replaces the pool in replicas of the modules that read it, and forwards to the pool's replica on their device.

    Modules hold their pool outside of the module tree, so replicating the tree does not give them the pool's replica.
    `nn.DataParallel` runs each replica with its device current, so the current device selects the pool's replica.
    """

    def __init__(self, pool: RoastPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        device = current_device()
        return getattr(next(pool for pool in _replicas[self._pool] if pool.weight.device == device), name)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes (a `DTensor`), so that this process holds a part of its values."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "placements")


def current_device() -> torch.device:
    """Return the device of the replica that is running."""
    return torch.device("cuda", torch.cuda.current_device())
