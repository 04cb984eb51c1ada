r"""`RoastPool`: the module with the shared Parameter, its initial values and its preconditioner."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.kernels import reference
from roastify.kernels.flops import teach_flop_counters
from roastify.kernels.gathered_weights import WeightGroup, compiled_groups, make_groups
from roastify.kernels.reference import summed_in
from roastify.kernels.torch_internals import (
    in_func_transform,
    is_exporting,
    is_jit_tracing,
    requires_grad_below,
    with_static_sizes,
)
from roastify.kernels.view import FoldView, TileView, WeightView
from roastify.pool import compiled_read
from roastify.pool.fold import folded_input
from roastify.pool.mapping import TileMap
from roastify.pool.members import TiedModule, is_sharded
from roastify.pool.pass_cache import cache_of, is_watched_by_modes, unseen
from roastify.pool.plan import RoastPlan
from roastify.pool.preconditioner import divide_, divided, inverse_gamma
from roastify.pool.start_values import start_values
from roastify.pool.state import encode, plan_with


class RoastPool(TiedModule):
    r"""The pool: one Parameter `weight` of `[num_slots · tile_rows, tile_cols]`. A slot is `tile_rows` rows of it.

    The Parameter is two-dimensional because common parameter groups (timm, nanoGPT) exempt one-dimensional parameters
    from weight decay, and the weights that the pool replaces were not exempt.

    `read` divides the pool's gradient, element by element, by

    .. math:: \Gamma_e = \sum_{w\ \text{reads}\ e} \lambda_w^2,

    so that an SGD step on the pool is the dense SGD step projected onto the weights that the pool can express (Desai
    and Shrivastava, ICLR 2024, section 4.1, with λ added). Weight decay must not be divided: the projection of the
    dense weights' decay is the pool's decay.

    The Parameters are also tied members of every module that reads the pool; see `TiedModule`.

    The pool module also owns the basis kernels of convolutions (`basis`). Each layer with a basis has a Parameter
    `basis_…` of `[count, positions]`. A step on a basis kernel moves as many weights as the layer has kernels, so the
    gradient of a basis is divided too.

    Args:
        num_slots: slots that tiles are mapped to. Slots that hold the learned scales of folds follow them.
        tile: `(rows, cols)` of a tile.
        maps: the mappings of the pool's regions: one mapping, or one for each tensor.
        shared: view and λ of every shared tensor; a tied tensor is listed once.
        unread_rows: view, λ and row of every row that is zero instead of read from the pool (an embedding's padding
            row).
        bases: shape of every basis, and the divisor of its gradient.
        scales: the divisor of the gradient of every learned scale, in the order of their places.
        starts: start values of the tensors that have some; see `start_values`.
        dtype: dtype of the Parameters.
        device: device of the Parameters.
        trainable: whether the Parameters require a gradient.
        precondition: whether the gradients of the pool and of the bases are divided.
    """

    table: Tensor
    per_slot: Tensor
    uneven_slots: Tensor
    uneven: Tensor
    starts: Tensor

    def __init__(
        self,
        num_slots: int,
        tile: tuple[int, int],
        maps: Sequence[TileMap],
        shared: Sequence[tuple[TileView, float]],
        *,
        unread_rows: Sequence[tuple[TileView, float, int]] = (),
        bases: Sequence[tuple[tuple[int, int], float]] = (),
        scales: Sequence[float] = (),
        starts: Tensor | None = None,
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
        # What builds the dense model, if that is known; saving writes it.
        self.builder: Any = None
        # The shared tensors as their layers hold them, in the plan's order, and those that `retain` was given.
        self.weights: tuple[Any, ...] = ()
        self.retained: tuple[WeightView, ...] = ()
        self._groups: dict[WeightView, WeightGroup] = {}
        # Whether the pool was frozen or trained by itself, and not with a part of a model.
        self.meant: bool | None = None
        # The dtype that the Parameter is stored in. While a forward pass runs, sharding may show it in another dtype.
        self.stored_dtype = dtype
        # A learned scale is an element of the pool, so that whatever works on the pool works on scales too.
        self.scale_slots = -(-len(scales) // (tile[0] * tile[1]))
        self._scale_energy = tuple(scales)
        shape = ((num_slots + self.scale_slots) * tile[0], tile[1])
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=trainable)
        # Not in a ParameterList: `nn.DataParallel` leaves that empty in its replicas.
        for index, (basis_shape, _) in enumerate(bases):
            basis = nn.Parameter(torch.empty(basis_shape, dtype=dtype, device=device), requires_grad=trainable)
            self.register_parameter(basis_name(index), basis)
        self._basis_energy = tuple(energy for _, energy in bases)
        # The chunk table and 1/Γ follow from the plan. They are no buffers: averages of models (EMA), casts and
        # broadcasts change buffers, and a table that was averaged leads to other slots. The masters stay on the CPU,
        # whatever the default device is; where the pool is, there are copies of them.
        with torch.device("cpu"):
            rows = [row for tile_map in maps for row in tile_map.chunk_table()]
            self._masters = {"table": torch.tensor(rows, dtype=torch.int64).view(-1, 3)}
            self._masters |= inverse_gamma(num_slots, tile, self._masters["table"], shared, unread_rows, scales)
            self._masters["starts"] = torch.empty(0) if starts is None else starts
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
        if not tracked and torch.is_grad_enabled() and in_func_transform() and requires_grad_below(weight):
            # Several pools at once, under `vmap`.
            return self._read_by_plain_operators(weight, dtype)
        if not tracked and dtype == weight.dtype:
            if is_watched_by_modes():
                teach_flop_counters()
            return weight
        if tracked and torch.compiler.is_compiling():
            # An exported graph may run where the operator `read` does not exist.
            if is_exporting():
                return self._read_by_plain_operators(weight, dtype)
            if torch.compiler.is_dynamo_compiling():
                return compiled_read.read(self, dtype)
        elif tracked and is_jit_tracing():
            return self._read_traced(weight, dtype)
        if is_watched_by_modes():
            teach_flop_counters()
            with unseen(self):
                return cache_of(self).read(dtype, tracked)
        return cache_of(self).read(dtype, tracked)

    def _read_by_plain_operators(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Read the pool for a graph without a gate, in which autograd sums the gradients of all readers."""
        if self.precondition:
            # The second term is zero. The pool's gradient comes through it, divided by Γ.
            nothing = divided(weight - weight.detach(), self.per_slot, self.uneven_slots, self.uneven)
            return (weight.detach() + nothing.to(weight.dtype)).to(dtype)
        return weight.to(dtype)

    def _read_traced(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Read the pool as without gradients: `torch.jit.trace` traces again without them, and compares."""
        if self.precondition:
            warnings.warn(
                "torch.jit.trace leaves out the preconditioner: the traced module does not divide the pool's gradient "
                "by Γ. Use the traced module for inference, and train the converted model",
                stacklevel=2,
            )
        return weight if weight.dtype == dtype else weight.to(dtype)

    def gathered_weight(self, weight: WeightView, dtype: torch.dtype) -> Tensor:
        """Return a dense weight in a dtype, in a graph, for a forward pass that autograd records.

        Within the model's forward, the weight is gathered once, together with the weights of its group. Outside of it,
        each read gathers the weight again.

        Raises:
            RoastError: the pool is sharded and its values are not gathered now.
        """
        self._whole()
        if is_watched_by_modes():
            teach_flop_counters()
            with unseen(self):
                return cache_of(self).dense(weight, dtype)
        return cache_of(self).dense(weight, dtype)

    def folded(self, x: Tensor, fold: FoldView, dtype: torch.dtype, dims: int = 0) -> Tensor:
        """Return the folded input of a product, or of a convolution of `dims` dimensions, in a dtype.

        Within the model's forward, layers that fold the same input alike share the result. A compiler merges equal
        operations itself.
        """
        pool = self.read(dtype) if fold.first_scale >= 0 else None
        watched = is_watched_by_modes()
        if watched:
            teach_flop_counters()
        if watched or torch.compiler.is_compiling() or is_jit_tracing():
            return folded_input(x, pool, fold, dims)
        return cache_of(self).folded(x, pool, fold, dtype, dims)

    def bases(self) -> list[nn.Parameter]:
        """Return the Parameters of all basis kernels."""
        return [getattr(self, basis_name(index)) for index in range(len(self._basis_energy))]

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return a layer's basis kernels, and the factor for their gradient; see the class."""
        name = basis_name(index)
        basis = self.present(name) if name in self._given else getattr(self, name)
        return basis, 1 / self._basis_energy[index] if self.precondition else 1.0

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter of a layer's basis, or None if the basis is computed (as by a parametrization)."""
        # Read from the dictionary: attribute access would run the computation.
        name = basis_name(index)
        basis = self.present(name) if name in self._given else self.__dict__["_parameters"].get(name)
        return basis if type(basis) is nn.Parameter else None

    def retain(self, weights: Iterable[WeightView]) -> None:
        """Say which weights their layers may keep during a training pass: those are gathered in groups."""
        self.retained = tuple(weights)
        self._groups = make_groups(self.retained)
        for weight in self.retained:
            weight.group = None
        for together, group in compiled_groups(dict.fromkeys(self._groups.values())):
            for number, weight in enumerate(together):
                weight.group, weight.number = group.text, number

    def group_of(self, weight: WeightView) -> WeightGroup:
        """Return the group of weights that a pass gathers together with this one."""
        return self._groups.get(weight) or WeightGroup([weight])

    def parameter(self) -> nn.Parameter:
        """Return `weight` in a tenth of the time of an attribute lookup; each layer needs it several times a call."""
        if "weight" in self.__dict__["_given"]:
            return self.present("weight")
        weight = self.__dict__["_parameters"].get("weight")
        # A replica of `nn.DataParallel` has no Parameters: its `weight` is a plain attribute.
        return self.weight if weight is None else weight

    def _whole(self) -> nn.Parameter:
        weight = self.parameter()
        if is_sharded(weight):
            if all(placement.is_replicate() for placement in cast(Any, weight).placements):
                raise RoastError(
                    "the pool is a replicated DTensor, as distribute_module makes it, and layers on the pool take "
                    "plain tensors; for a copy in every process, wrap the model in DistributedDataParallel instead"
                )
            raise RoastError(
                "the pool is sharded over processes and is not gathered now; FSDP2 gathers it only while the forward "
                "of the module that it was sharded with runs. Shard the whole model last, with fully_shard(model), and "
                "call the whole model. To read weights or to call a part of the model, call model.unshard() first and "
                "model.reshard() afterwards"
            )
        if self._sharded_reader and not self.__dict__.get("_is_fsdp_managed_module"):
            raise RoastError(
                "fully_shard (FSDP2) was given modules that read the pool, but not a module that has it as a child, so "
                "each process would train a pool of its own. Shard the whole model last, with fully_shard(model). If "
                "you build a model of converted layers, give it the pool too: new.roast_pool = model.roast_pool"
            )
        if weight.is_meta and "_hf_hook" in self.__dict__:
            raise RoastError(
                "Accelerate has offloaded the pool, and loads what it offloads only while the module that has it runs; "
                "the pool's readers are other modules. Keep the pool on a device, as dispatch_model does with a device "
                "map that has an entry roast_pool, or offload roastify.densify(model)"
            )
        if weight is not self.tied["weight"] and type(weight) is nn.Parameter and not self._given:
            # It was replaced past `register_parameter`, as Accelerate does.
            self._tie_readers()
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
        values = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
        if self.weight.dtype == torch.float64:
            values = values.double()
        values *= std
        with torch.no_grad():
            self.weight.copy_(values)
            self._reset_scales()

    def _reset_scales(self) -> None:
        """Set the learned scales to 1: what is stored is their difference from 1, which weight decay may shrink."""
        self.weight[self.num_slots * self.tile[0] :] = 0.0

    def initialise_projection(
        self,
        tensors: Iterable[Iterable[tuple[TileView, float, Tensor]]],
        *,
        begun: Tensor | None = None,
        after_each: Callable[[Tensor], None] | None = None,
    ) -> None:
        r"""Set the pool to the least-squares fit of dense tensors: :math:`pool_e = \sum \lambda\,sign\,w / \Gamma_e`.

        Args:
            tensors: view, λ and dense matrix `[rows, cols]` of every shared tensor, whole or in parts; a tied tensor is
                given once.
            begun: the sums over tensors that are not given again.
            after_each: is called with the sums, which it must not change, after every tensor.
        """
        dtype = summed_in(self.weight.dtype)
        with torch.no_grad():
            direct = self.weight.dtype == dtype
            total = self.weight.data.zero_() if direct else torch.zeros_like(self.weight, dtype=dtype)
            if begun is not None:
                total.copy_(begun)
            for parts in tensors:
                for view, scale, matrix in parts:
                    reference.reduce_(total, matrix, self.table, view, scale)
                if after_each is not None:
                    after_each(total)
            divide_(total, self.per_slot, self.uneven_slots, self.uneven)
            self._reset_scales()
            if not direct:
                self.weight.copy_(total)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter.

        Raises:
            RoastError: it is none of the pool's, as what pruning keeps: layers read the pool without running it.
        """
        if name != "weight" and not name.startswith(_BASIS):
            raise RoastError(
                f"a pool has no Parameter {name!r}: layers read the pool without running its hooks, so it cannot be "
                f"pruned or normalised; do that in roastify.densify(model)"
            )
        super().register_parameter(name, param)

    def _replicate_for_data_parallel(self) -> RoastPool:
        replica = super()._replicate_for_data_parallel()
        _replicas.setdefault(self, weakref.WeakSet()).add(replica)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoastPool:
        super()._apply(fn, recurse)
        self._tie_readers()
        if (self.weight.dtype, self.weight.device) != (self.stored_dtype, self._constants_device):
            self.stored_dtype = self.weight.dtype
            self._place_constants(self.weight.device)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> RoastPool:
        """Train or freeze the pool, and all weights that are in it, on purpose: no forward pass warns of it."""
        super().requires_grad_(requires_grad)
        self.meant = requires_grad
        return self

    def apply_of_reader(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do what is done to the tensors of one module that reads the pool (`.to()`, `.half()`, `.share_memory()`).

        A cast of one layer is no cast of the pool, from which other layers read in their own dtypes: the pool would
        lose precision or take more memory. A pool without an owner, of a copied layer or in a new model, is cast.
        """
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        if probe.dtype == self.weight.dtype or not self.is_owned():
            self._apply(fn)
        elif probe.device != self.weight.device:
            self._apply(lambda tensor: tensor.to(probe.device))

    def _place_constants(self, device: torch.device) -> None:
        """Copy the chunk table and 1/Γ from their masters to a device, 1/Γ in the dtype of summed gradients."""
        for name, master in self._masters.items():
            dtype = summed_in(self.stored_dtype) if master.is_floating_point() else master.dtype
            # Past `nn.Module`, which would look for a Parameter or a buffer of the name.
            self.__dict__[name] = with_static_sizes(master.to(device, dtype, copy=True))
        self._constants_device = device

    def get_extra_state(self) -> Tensor:
        """Return what the pool's values mean: the plan's fingerprint, λ, centers and zero rows, as bytes."""
        return torch.empty(0, dtype=torch.uint8) if self.plan is None else encode(self.plan, self.present_names())

    def present_names(self) -> list[str]:
        """Return where the model reads every shared tensor now.

        The name is empty for a tensor that the model no longer reads. All are empty for the pool of a copied layer, or
        of a part whose model is gone: it has no model in which tensors could have a name.
        """
        root = None if self._root is None else self._root()
        if root is None:
            return ["" for _ in self.plan.shared]
        names: dict[int, str] = {}
        for path, module in root.named_modules():
            for attribute, weight in module.__dict__.get("_roast", {}).items():
                names.setdefault(id(weight), f"{path}.{attribute}" if path else attribute)
        return [names.get(id(weight), "") for weight in self.weights]

    def set_extra_state(self, state: Any) -> None:
        """Leave it: `_load_from_state_dict` takes it before the pool's values."""

    def _read_state(
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
                plan = plan_with(self.plan, self.present_names(), state_dict[key])
            except ValueError as error:
                error_msgs.append(f"{prefix}weight cannot be loaded: {error}")
                return
            if plan is not self.plan:
                self._set_plan(plan)
        super()._read_state(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # With `assign=True`, the pool may now be on another device, which compiled code does not check.
        if self.weight.device != self._constants_device:
            self._place_constants(self.weight.device)

    def _set_plan(self, plan: RoastPlan) -> None:
        """Take another plan of the same fingerprint: its λ, centers and zero rows."""
        self.plan = plan
        for tensor, weight in zip(plan.shared, self.weights, strict=True):
            weight.scale, weight.center, weight.zero_row = tensor.scale, tensor.center, tensor.zero_row
            weight.__post_init__()
        with torch.device("cpu"):
            self._masters["starts"] = start_values(plan)
            self._masters |= inverse_gamma(
                self.num_slots, self.tile, self._masters["table"], *plan.readings(), plan.scale_energies()
            )
        self._basis_energy = tuple(plan.basis_energy(tensor) for tensor in plan.with_basis)
        self.retain(self.retained)
        self._place_constants(self.weight.device)

    def extra_repr(self) -> str:
        """Describe the pool's size."""
        rows, cols = self.tile
        scales = f", {len(self._scale_energy)} learned scales" if self._scale_energy else ""
        return f"{self.weight.numel():,} parameters, {self.num_slots} slots of {rows}×{cols}{scales}"


_BASIS = "basis_"


def basis_name(index: int) -> str:
    """Return the name of a basis among the pool's Parameters."""
    return f"{_BASIS}{index}"


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


def current_device() -> torch.device:
    """Return the device of the replica that is running."""
    return torch.device("cuda", torch.cuda.current_device())
