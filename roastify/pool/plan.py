"""`RoastPlan`: every decision of a conversion, the figures that follow from it, and its JSON form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from roastify.kernels.view import FoldView, TileView, to_signed64
from roastify.pool.mapping import TileMap, fold_key
from roastify.shown import ShownAsTable
from roastify.typed_values import typed

# What the reason of a tensor begins with that a pattern of the user keeps dense.
EXCLUDED = "excluded by "
# The reason of a tensor that is shared because nothing speaks against it.
ELIGIBLE = "eligible"


@dataclass(frozen=True)
class TensorPlan:
    """The verdict on one tensor. For a tensor that stays dense, the fields from `through` on keep their defaults.

    Args:
        name: the tensor's first name in `named_parameters`.
        aliases: all names of the tensor; a tied tensor has several. A shared tensor that the model no longer reads,
            because its layer was replaced, has none.
        shape: shape of the dense tensor.
        dtype: dtype of the dense tensor, such as `float32`.
        op: the operations that consume the tensor.
        shared: whether the tensor goes into the pool.
        reason: why the tensor is shared or stays dense.
        through: how modules read the tensor, one or several of: `layer` (the layer's own operation reads the pool),
            `operation` (the operations in the module's code read the pool), `attribute` (the tensor is materialised on
            access).
        rows: rows of the tensor's matrix in the pool.
        cols: columns of the tensor's matrix in the pool.
        transposed: whether that matrix is the dense tensor's transpose.
        strips: whether the tensor is cut into strips in memory order instead of two-dimensional tiles.
        base: the tensor's first address in its region.
        region: index of the pool region (map) that holds the tensor.
        num_tiles: number of tiles that hold elements of the tensor.
        scale: λ; None until the model's values are known.
        zero_row: a row that is zero and stays zero (an embedding's padding row), or None.
        center: number that is added to every element read from the pool.
        whole: why the tensor is materialised; empty if it is not.
        diagonal: signs (`+` and `-`) of the ones that stand on the matrix's diagonal in place of pool values; empty if
            pool values do. Householder reflectors keep the signs of an orthogonal weight there.
        fold: number of the plan's fold through which the inputs go, or None. The matrix then has `cols / fold` columns.
        start: the tensor starts from seeded random numbers between `-start` and `start`, and the pool holds the
            difference from them; see `start_values`.
        basis_count: number of basis kernels that the tensor's kernels are combinations of. If it is not 0, the matrix
            holds the coefficients; if it is 0, the matrix holds the tensor.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    op: str
    shared: bool
    reason: str
    through: str = ""
    rows: int = 0
    cols: int = 0
    transposed: bool = False
    strips: bool = False
    base: int = 0
    region: int = 0
    num_tiles: int = 0
    scale: float | None = None
    zero_row: int | None = None
    center: float = 0.0
    whole: str = ""
    basis_count: int = 0
    diagonal: str = ""
    fold: int | None = None
    start: float = 0.0

    @property
    def excluded(self) -> bool:
        """Whether a pattern of the user keeps the tensor dense."""
        return self.reason.startswith(EXCLUDED)

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)

    @property
    def matrix_numel(self) -> int:
        """Elements of the tensor's matrix in the pool."""
        return self.rows * self.cols

    @property
    def basis_shape(self) -> tuple[int, int]:
        """`(basis kernels, positions of a kernel)`."""
        return self.basis_count, math.prod(self.shape[2:])

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class PoolRegion:
    """Consecutive pool slots with one mapping: the whole pool, or with `sharing="local"` the part of one tensor."""

    num_tiles: int
    num_slots: int
    first_slot: int
    first_chunk: int


@dataclass(frozen=True)
class FoldPlan:
    """How the inputs of some layers are folded; see `FoldView`. Layers that read the same input share a fold.

    Args:
        cols: columns of the inputs.
        fold: columns that share a bucket.
        hashes: number of hashes, among which the rows of each weight are divided.
        span: buckets that share signs and learned scales.
        first_scale: the first learned scale's number among those of the plan, or None if the fold learns none.
    """

    cols: int
    fold: int
    hashes: int
    span: int
    first_scale: int | None

    def view(self, key: int, scales_from: int) -> FoldView:
        """Return the view that operations take.

        Args:
            key: the key of the signs.
            scales_from: the pool's element that holds the plan's first learned scale.
        """
        first = -1 if self.first_scale is None else scales_from + self.first_scale
        return FoldView(self.cols, self.fold, self.hashes, self.span, to_signed64(key), first)


@dataclass(frozen=True, repr=False)
class RoastPlan(ShownAsTable):
    """Every decision of a conversion. It prints as the table of `roastify plan`.

    Args:
        model: name of the model's class.
        ratio: the ratio that was asked for.
        seed: seed of the mapping and the initial values.
        tile: `(rows, cols)` of a tile.
        sign: `none`, `row`, `tile` or `element`.
        mapping: name of the mapping.
        mapping_version: version of the mapping's formulas.
        sharing: `global` or `local`.
        precondition: whether the pool's gradient is divided by Γ.
        num_slots: slots in the pool that tiles are mapped to. The slots that hold learned scales follow them.
        dtype: dtype of the pool.
        trainable: whether the pool requires a gradient.
        owner: path of the module that the pool is registered in; empty for the root.
        init: what the pool starts as: `match` (random numbers) or `project` (the fit of the dense weights).
        root: path of the module whose forward is a pass; not the root if a converted model stands inside another.
        regions: regions of the pool.
        tensors: the verdict on every parameter, in `named_parameters` order.
        pool_std: standard deviation of a random pool; None until the model's values are known.
        share: `weights`, or `all` if vectors, constant and small tensors are shared too.
        folds: how layers' inputs are folded.
        scope: `model`, or `adapters`: then `tensors` are the adapters' alone, and the frozen base is neither counted
            nor saved.
        base_numel: parameters of that base.
    """

    model: str
    ratio: float
    seed: int
    tile: tuple[int, int]
    sign: str
    mapping: str
    mapping_version: int
    sharing: str
    precondition: bool
    num_slots: int
    dtype: str
    trainable: bool
    owner: str
    regions: tuple[PoolRegion, ...]
    tensors: tuple[TensorPlan, ...]
    pool_std: float | None = None
    share: str = "weights"
    root: str = ""
    init: str = "match"
    folds: tuple[FoldPlan, ...] = ()
    scope: str = "model"
    base_numel: int = 0

    def _headline(self) -> str:
        numbers = f"{self.total_numel:,} → {self.stored_numel:,} parameters, ratio {self.achieved_ratio:.2f}"
        return f"{self.model}, {numbers} (asked {self.ratio:g})"

    @property
    def slot_size(self) -> int:
        """Elements in a slot."""
        return self.tile[0] * self.tile[1]

    @property
    def shared(self) -> list[TensorPlan]:
        """The tensors that are stored in the pool."""
        return [tensor for tensor in self.tensors if tensor.shared]

    @property
    def kept(self) -> list[TensorPlan]:
        """The tensors that stay dense."""
        return [tensor for tensor in self.tensors if not tensor.shared]

    @property
    def total_numel(self) -> int:
        """Parameters of the dense model."""
        return sum(tensor.numel for tensor in self.tensors if tensor.aliases)

    @property
    def kept_numel(self) -> int:
        """Parameters that stay dense."""
        return sum(tensor.numel for tensor in self.kept)

    @property
    def scale_numel(self) -> int:
        """Learned scales of all folds."""
        return sum(fold.view(0, 0).num_scales for fold in self.folds)

    @property
    def scale_slots(self) -> int:
        """Slots that hold the learned scales, the last one perhaps padded."""
        return -(-self.scale_numel // self.slot_size)

    @property
    def pool_numel(self) -> int:
        """Parameters of the pool: the slots of the tiles, and those of the learned scales."""
        return (self.num_slots + self.scale_slots) * self.slot_size

    @property
    def of_adapters(self) -> bool:
        """Whether the plan is of a model's adapters alone."""
        return self.scope == "adapters"

    @property
    def has_starts(self) -> bool:
        """Whether the pool starts at zero, and holds the difference of each tensor from where it starts."""
        return self.of_adapters and self.init == "match"

    @property
    def multiplied_numel(self) -> int:
        """Multiply-adds of one row, or one output place, of activations with folded weights, as they are computed."""
        return sum(tensor.numel // self.folds[tensor.fold].fold for tensor in self.shared if tensor.fold is not None)

    @property
    def folded_numel(self) -> int:
        """Elements of the dense weights that are folded: the multiply-adds of a row in the dense products."""
        return sum(tensor.numel for tensor in self.shared if tensor.fold is not None)

    @property
    def with_basis(self) -> list[TensorPlan]:
        """The shared tensors whose kernels are combinations of basis kernels."""
        return [tensor for tensor in self.tensors if tensor.basis_count]

    @property
    def basis_numel(self) -> int:
        """Parameters of all basis kernels."""
        return sum(math.prod(tensor.basis_shape) for tensor in self.with_basis)

    @property
    def stored_numel(self) -> int:
        """Parameters that the converted model stores: the pool, basis kernels and everything kept."""
        return self.pool_numel + self.basis_numel + self.kept_numel

    @property
    def achieved_ratio(self) -> float:
        """Parameters of the dense model ÷ parameters stored."""
        return self.total_numel / self.stored_numel

    @property
    def total_nbytes(self) -> int:
        """Bytes of the dense model's parameters."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.aliases)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the converted model's parameters."""
        kept = sum(tensor.nbytes for tensor in self.kept)
        return (self.pool_numel + self.basis_numel) * getattr(torch, self.dtype).itemsize + kept

    @property
    def no_sharing(self) -> bool:
        """Whether every tile has a slot to itself, as at ratio 1."""
        return all(region.num_slots >= region.num_tiles for region in self.regions)

    def maps(self) -> list[TileMap]:
        """Return the mapping of every region."""
        return [self._map(region) for region in self.regions]

    def _map(self, region: PoolRegion) -> TileMap:
        return TileMap(
            num_tiles=region.num_tiles,
            num_slots=region.num_slots,
            tile=self.tile,
            seed=self.seed,
            kind=self.mapping,
            sign=self.sign,
            first_slot=region.first_slot,
            first_chunk=region.first_chunk,
        )

    def view(self, tensor: TensorPlan) -> TileView:
        """Return the view of a shared tensor, which says where in the pool the operations read it."""
        view = self._map(self.regions[tensor.region]).view(tensor.rows, tensor.cols, tensor.base, tensor.strips)
        return view if tensor.fold is None else view._replace(groups=self.folds[tensor.fold].hashes)

    def fold_view(self, index: int) -> FoldView:
        """Return the view of a fold, which says how an input is folded."""
        return self.folds[index].view(fold_key(self.seed, index), self.num_slots * self.slot_size)

    def readings(self) -> tuple[list[tuple[TileView, float]], list[tuple[TileView, float, int]]]:
        r"""Return what 1/Γ follows from, for every shared tensor, and for every row that is zero instead of read.

        For a tensor, the view and :math:`\sqrt{\sum \lambda^2}` over the weights that read one element of its matrix;
        for a row, the same and the row.
        """
        roots = [
            (tensor.scale or 0.0) * (1.0 if tensor.fold is None else math.sqrt(self.folds[tensor.fold].fold))
            for tensor in self.shared
        ]
        views = [self.view(tensor) for tensor in self.shared]
        unread = [
            (view, root, tensor.zero_row)
            for tensor, view, root in zip(self.shared, views, roots, strict=True)
            if tensor.zero_row is not None
        ]
        return list(zip(views, roots, strict=True)), unread

    def scale_energies(self) -> list[float]:
        """Return, for each learned scale, the expected sum of the squared weights that it scales, for a random pool.

        If the gradient of a scale is divided by this sum, an SGD step on it is the projected dense step.
        """
        energies = []
        for index, fold in enumerate(self.folds):
            view = self.fold_view(index)
            readers = (tensor for tensor in self.shared if tensor.fold == index)
            # An element of a bucket is one, or for each position of a convolution's kernel or each of its coefficients.
            rows = (
                sum(tensor.rows * (tensor.cols // view.width) * (tensor.scale or 0.0) ** 2 for tensor in readers)
                / fold.hashes
            )
            # The last span may be shorter than the others.
            columns = [min(fold.span, view.width - span * fold.span) for span in range(view.num_spans)]
            of_spans = [max(rows * count * (self.pool_std or 0.0) ** 2, 1e-12) for count in columns]
            energies += of_spans * (view.num_scales // view.num_spans)
        return energies

    def basis_energy(self, tensor: TensorPlan) -> float:
        """Return the expected sum of squared coefficients of a basis kernel, for a random pool.

        If the gradient of a basis is divided by this sum, an SGD step on the basis is the projected dense step.
        """
        assert self.pool_std is not None and tensor.scale is not None, "the plan was not measured"
        kernels = tensor.numel / tensor.basis_shape[1]
        return max(kernels * (tensor.scale * self.pool_std) ** 2, 1e-12)

    def with_values(
        self,
        scales: dict[str, float],
        centers: dict[str, float],
        zero_rows: dict[str, int],
        pool_std: float,
        diagonals: dict[str, str] | None = None,
        starts: dict[str, float] | None = None,
    ) -> RoastPlan:
        """Return the plan with the figures that need the model's values.

        Args:
            scales: λ of every shared tensor, by name.
            centers: centers of the shared tensors that have one, by name.
            zero_rows: zero rows of the shared tensors that have one, by name.
            pool_std: standard deviation of a random pool.
            diagonals: diagonals of the shared tensors that have one, by name; None leaves them as they are.
            starts: bounds of the start values of the shared tensors that have some, by name.
        """
        tensors = (
            dataclasses.replace(
                tensor,
                scale=scales[tensor.name],
                center=centers.get(tensor.name, 0.0),
                zero_row=zero_rows.get(tensor.name),
                diagonal=tensor.diagonal if diagonals is None else diagonals.get(tensor.name, ""),
                start=(starts or {}).get(tensor.name, 0.0),
            )
            if tensor.shared
            else tensor
            for tensor in self.tensors
        )
        return dataclasses.replace(self, tensors=tuple(tensors), pool_std=pool_std)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold. `summary` has the figures that follow from the plan."""
        summary: dict[str, float] = {
            "total_parameters": self.total_numel,
            "stored_parameters": self.stored_numel,
            "pool_parameters": self.pool_numel,
            "basis_parameters": self.basis_numel,
            "kept_parameters": self.kept_numel,
            "shared_parameters": self.total_numel - self.kept_numel,
            "total_bytes": self.total_nbytes,
            "stored_bytes": self.stored_nbytes,
            "achieved_ratio": self.achieved_ratio,
        }
        if self.folds:
            summary |= {
                "scale_parameters": self.scale_numel,
                "folded_multiply_adds": self.multiplied_numel,
                "dense_multiply_adds": self.folded_numel,
            }
        values = dataclasses.asdict(self)
        for tensor in values["tensors"]:
            if not tensor["diagonal"]:
                del tensor["diagonal"]
            if tensor["fold"] is None:
                del tensor["fold"]
            if not tensor["start"]:
                del tensor["start"]
        if not self.folds:
            del values["folds"]
        if self.of_adapters:
            values["tensors"] = [_compact(tensor) for tensor in values["tensors"]]
        else:
            del values["scope"], values["base_numel"]
        return {**values, "summary": summary}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoastPlan:
        """Rebuild a plan from `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is of another type. `check_plan` compares the values.
        """
        if not isinstance(values, dict):
            raise ValueError(f"the plan is a {type(values).__name__}; expected an object")
        values = {key: value for key, value in values.items() if key != "summary"}
        if values.get("scope", "model") != "model" and isinstance(values.get("tensors"), list):
            values["tensors"] = [_full(tensor) for tensor in values["tensors"]]
        return typed(cls, values, "plan")


# What most tensors of adapters are, beside the fields' own defaults: a manifest leaves it out.
_OF_FACTORS = {
    **{field.name: field.default for field in dataclasses.fields(TensorPlan)},
    "dtype": "float32",
    "op": "linear",
    "shared": True,
    "reason": ELIGIBLE,
    "through": "layer",
    "scale": 1.0,
}


def _compact(tensor: dict[str, Any]) -> dict[str, Any]:
    """Return a tensor's values without what is usual: adapters have many tensors and few values."""
    values = {key: value for key, value in tensor.items() if value != _OF_FACTORS[key]}
    if list(values["aliases"]) == [values["name"]]:
        del values["aliases"]
    if [values.get("rows"), values.get("cols")] == list(values["shape"]):
        del values["rows"], values["cols"]
    return values


def _full(tensor: Any) -> Any:
    """Return what `_compact` was given, or anything else as it is."""
    if not isinstance(tensor, dict) or not {"name", "shape"} <= tensor.keys():
        return tensor
    usual = {key: value for key, value in _OF_FACTORS.items() if value is not dataclasses.MISSING}
    values = {**usual, "aliases": [tensor["name"]], **tensor}
    if (
        values["shared"] is True
        and "rows" not in tensor
        and isinstance(values["shape"], list)
        and len(values["shape"]) == 2
    ):
        values["rows"], values["cols"] = values["shape"]
    return values
