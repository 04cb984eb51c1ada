r"""`RoastPool`: the module with the shared Parameter, its initial values and its preconditioner."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from roastify.errors import RoastError
from roastify.kernels import reference
from roastify.kernels.flops import teach_flop_counters
from roastify.kernels.gathered_weights import WeightGroup, make_groups
from roastify.kernels.reference import summed_in
from roastify.kernels.torch_internals import (
    in_func_transform,
    is_exporting,
    is_jit_tracing,
    requires_grad_below,
    with_static_sizes,
)
from roastify.kernels.view import TileView, WeightView
from roastify.pool import compiled_read
from roastify.pool.mapping import TileMap
from roastify.pool.pass_cache import cache_of, is_watched_by_modes, unseen
from roastify.pool.plan import RoastPlan
from roastify.pool.preconditioner import divide_, divided, inverse_gamma
from roastify.pool.state import encode, plan_with

# The name of the pool: of the child that a converted model has, and in the names of its Parameters elsewhere.
POOL_NAME = "roast_pool"


class RoastPool(nn.Module):
    r"""The pool: one Parameter `weight` of `[num_slots · tile_rows, tile_cols]`. A slot is `tile_rows` rows of it.

    The Parameter is two-dimensional because common parameter groups (timm, nanoGPT) exempt one-dimensional parameters
    from weight decay, and the weights that the pool replaces were not exempt.

    `read` divides the pool's gradient, element by element, by

    .. math:: \Gamma_e = \sum_{w\ \text{reads}\ e} \lambda_w^2,

    so that an SGD step on the pool is the dense SGD step projected onto the weights that the pool can express (Desai
    and Shrivastava, ICLR 2024, section 4.1, with λ added). Weight decay must not be divided: the projection of the
    dense weights' decay is the pool's decay.

    The Parameters are also tied members of every module that reads the pool (`add_reader`), so a part of a model owns
    what it reads: its `parameters()`, its state dict and its copies hold the pool. Whatever replaces a Parameter of
    the pool (sharding, an assignment) replaces it in these modules too.

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

    _readers: weakref.WeakSet[nn.Module]
    _root: weakref.ref[nn.Module] | None
    _owner: weakref.ref[nn.Module] | None
    _sharded_reader: bool
    _given: dict[str, dict[int, Tensor]]
    _saved: threading.local
    _loading: tuple[list[str] | None, tuple[str, ...]]
    _tied: dict[str, nn.Parameter]
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
        self._forget_modules()
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
        # Whether the pool was frozen or trained by itself, and not with a part of a model.
        self.meant: bool | None = None
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

    def bases(self) -> list[nn.Parameter]:
        """Return the Parameters of all basis kernels."""
        return [getattr(self, _basis_name(index)) for index in range(len(self._basis_energy))]

    def basis(self, index: int) -> tuple[Tensor, float]:
        """Return a layer's basis kernels, and the factor for their gradient; see the class."""
        name = _basis_name(index)
        basis = self.present(name) if name in self._given else getattr(self, name)
        return basis, 1 / self._basis_energy[index] if self.precondition else 1.0

    def plain_basis(self, index: int) -> nn.Parameter | None:
        """Return the Parameter of a layer's basis, or None if the basis is computed (as by a parametrization)."""
        # Read from the dictionary: attribute access would run the computation.
        name = _basis_name(index)
        basis = self.present(name) if name in self._given else self.__dict__["_parameters"].get(name)
        return basis if type(basis) is nn.Parameter else None

    def group_of(self, weight: WeightView) -> WeightGroup:
        """Return the group of weights that a pass gathers together with this one."""
        if self._groups is None:
            self._groups = make_groups(self.retained)
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
        if weight is not self._tied["weight"] and type(weight) is nn.Parameter and not self._given:
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

    def _forget_modules(self) -> None:
        # The modules with the pool's Parameters, the model whose forward is a pass, and the module that has the pool as
        # a child. Weakly: they hold the pool.
        self.__dict__["_readers"] = weakref.WeakSet[nn.Module]()
        self.__dict__["_root"] = self.__dict__["_owner"] = None
        # Whether FSDP2 has been given a module that reads the pool.
        self.__dict__["_sharded_reader"] = False
        # Tensors that stand for Parameters for a while, by the `MemberPool` through which they came.
        self.__dict__["_given"] = {}
        # Where this pool was last written in a state dict, and the load that last read it or missed it.
        self.__dict__["_saved"] = threading.local()
        self.__dict__["_loading"] = (None, ())

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_MODULES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_modules()
        super().__setstate__(state)

    def become_child_of(self, owner: nn.Module) -> None:
        """Become a module's first child, `roast_pool`.

        The first, so that the Parameters have these names: `named_parameters` and the state dict name a tied Parameter
        where they meet it first. And `list(model.children())[:-1]` leaves out the model's own last child.
        """
        children = {name: child for name, child in owner._modules.items() if name != POOL_NAME}
        owner._modules.clear()
        owner._modules.update({POOL_NAME: self, **children})
        self.__dict__["_owner"] = weakref.ref(owner)

    def set_root(self, root: nn.Module) -> None:
        """Note the model that reads the pool. Names in a state dict's fingerprint begin there."""
        self.__dict__["_root"] = weakref.ref(root)

    def is_read_by(self, root: nn.Module) -> bool:
        """Whether this is the model whose forward is a pass."""
        return self._root is not None and self._root() is root

    def add_reader(self, module: nn.Module, bases: Iterable[int] = ()) -> dict[str, nn.Parameter]:
        """Make the pool's Parameter, and those of its bases, members of a module that reads them.

        Their names there are those that they would have if the pool were the module's child: `roast_pool.weight`.
        """
        if module._modules.get(POOL_NAME) is self:
            self.__dict__["_owner"] = weakref.ref(module)
            return {}
        self._readers.add(module)
        return {MEMBER + name: self.tied[name] for name in ["weight", *map(_basis_name, bases)]}

    def remove_reader(self, module: nn.Module) -> None:
        """Forget a module that no longer reads the pool."""
        self._readers.discard(module)

    @property
    def tied(self) -> dict[str, nn.Parameter]:
        """The Parameters that the readers have as members."""
        return self._tied

    def present(self, name: str) -> Any:
        """Return the tensor that is read in the place of a Parameter: what was given for it, or the Parameter."""
        given = self._given.get(name)
        return next(reversed(given.values())) if given else self.tied[name]

    def _tie_readers(self) -> None:
        """Give every reader the Parameters that the pool has now."""
        own = self.__dict__["_tied"] = dict(self._parameters)
        for module in self._readers:
            for key in module._parameters:
                if key.startswith(MEMBER) and (parameter := own.get(key.removeprefix(MEMBER))) is not None:
                    module._parameters[key] = parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter, here and in every module that reads it.

        Raises:
            RoastError: it is none of the pool's, as what pruning keeps: layers read the pool without running it.
        """
        if name != "weight" and not name.startswith(_BASIS):
            raise RoastError(
                f"a pool has no Parameter {name!r}: layers read the pool without running its hooks, so it cannot be "
                f"pruned or normalised; do that in roastify.densify(model)"
            )
        super().register_parameter(name, param)
        self._tie_readers()

    def __setattr__(self, name: str, value: Any) -> None:
        # Defined so that FSDP2, which writes past `register_parameter` where it can, comes through it.
        super().__setattr__(name, value)

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

    def is_owned(self) -> bool:
        """Whether a module that is in use has the pool as a child."""
        modules = [reference() for reference in (self._owner, self._root) if reference is not None]
        return any(module is not None and module._modules.get(POOL_NAME) is self for module in modules)

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

    def save_in(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write the pool to a state dict under a prefix, unless it is in there already."""
        last = getattr(self._saved, "last", None)
        if last is not None:
            key, value = last
            if key in destination and destination[key] is value():
                return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight"
        self._saved.last = (key, weakref.ref(destination[key])) if key in destination else None

    def load_from(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Read the pool from a state dict that has it under a prefix.

        A whole model and each of its parts hold the pool once, so only one of the modules that read it finds it.
        """
        missing, unexpected, errors = lists
        load, reported = self._loading
        if load is missing and prefix + "weight" not in state_dict:
            return
        for key in reported if load is missing else ():
            missing.remove(key)
        key = prefix + "weight"
        if load is missing and not reported and not self._holds(state_dict[key]):
            errors.append(
                f"{key} has other values than the same pool under another name in this state dict, and both are one "
                f"Parameter here: the state dict was put together from several models"
            )
            return
        before = len(missing)
        self._read_state(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.__dict__["_loading"] = missing, tuple(missing[before:])

    def _holds(self, value: Any) -> bool:
        """Whether the pool has these values. Sharded ones and those of a meta tensor are not looked at."""
        if not isinstance(value, Tensor) or is_sharded(self.weight) or is_sharded(value) or self.weight.is_meta:
            return True
        return value.shape == self.weight.shape and torch.equal(value.to(self.weight), self.weight.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.save_in(destination, prefix, keep_vars)

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
        self.load_from(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # With `assign=True`, the pool may now be on another device, which compiled code does not check.
        if self.weight.device != self._constants_device:
            self._place_constants(self.weight.device)

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


# What the names of the pool's Parameters begin with in a module that reads them.
MEMBER = POOL_NAME + "."
# Attributes that belong to the modules around a pool, and not to its copies.
_OF_MODULES = {"_sharded_reader", "_readers", "_root", "_owner", "_given", "_saved", "_loading"}


_BASIS = "basis_"


def _basis_name(index: int) -> str:
    return f"{_BASIS}{index}"


class MemberPool(nn.Module):
    """A pool as a member of one module that reads it: what `layer.roast_pool` is, for tools that walk along names.

    It has the pool's Parameters. `torch.func.functional_call` puts other tensors in their places for one call, under
    every name of a tied Parameter, and puts back what it found under each. So each name has a place of its own: in the
    pool for the whole model's name, and here for a part's.
    """

    def __init__(self, pool: RoastPool) -> None:
        super().__init__()
        self.__dict__["pool"] = pool
        self.__dict__["_parameters"] = _Places(pool)

    def __getattr__(self, name: str) -> Any:
        places = self.__dict__["_parameters"]
        return places[name] if name in places else getattr(self.pool, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter in the pool."""
        self.pool.register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemberPool:
        self.pool._apply(fn, recurse)
        return self

    def forward(self, x: Any) -> Any:
        """Return `x`, as the pool does."""
        return x


class _Places(dict[str, Any]):
    """The Parameters of a `MemberPool`. The pool reads a tensor that is put here, until its Parameter is put back."""

    def __init__(self, pool: RoastPool) -> None:
        # What the pool reads now: in a nested call, what the outer call has put there.
        super().__init__({name: pool.present(name) for name in pool.tied})
        self.pool = pool
        self.found = dict(self)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        given = self.pool._given.setdefault(name, {})
        given.pop(id(self), None)
        if value is not self.found.get(name):
            given[id(self)] = value
        elif not given:
            del self.pool._given[name]

    def __del__(self) -> None:
        # What nobody can put back any more was meant to stay: Accelerate sets Parameters in this way.
        for name, given in list(self.pool._given.items()):
            if id(self) in given:
                value = given.pop(id(self))
                if not given:
                    del self.pool._given[name]
                self.pool.register_parameter(name, cast(nn.Parameter, value))


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
