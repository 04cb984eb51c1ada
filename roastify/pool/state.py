"""What travels with a state dict beside the pool: a fingerprint of the plan, and the numbers that the plan took.

A pool's values mean something only together with the mapping, the addresses and λ of every tensor. So a state dict
holds them too, as one tensor of bytes (`torch.uint8`): a header with what differs most often, a SHA-256 of everything
that decides where a weight lies, then λ, center, zero row and name of every shared tensor, and the bounds of start
values if the plan has some. Names are those of today: a
state dict of a model whose layers were exchanged fits only a model whose layers were exchanged alike. A tensor that
one of two models no longer reads (its layer was replaced) is not compared. Its size depends on the number of
tensors alone: a distributed checkpoint is loaded into a tensor of the same size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roastify.pool.mapping import MAPPINGS, SIGNS
from roastify.pool.plan import RoastPlan

_MAGIC = b"ROAST\x00\x00\x01"
# Magic, seed modulo 2**64, slots, tile, mapping, its version, sign, tensors; then the digest and the pool's spread.
_HEADER = struct.Struct("<8sQQIIBBBI32sd")
# λ, center, zero row (-1: none), hash of the name (0: no longer read); behind them the starts of plans that have some.
_TENSOR = struct.Struct("<ddqQ")
_START = struct.Struct("<d")
_FIELDS = ("seed", "number of slots", "tile", "mapping", "mapping version", "sign", "number of shared tensors")


@dataclass(frozen=True)
class PoolState:
    """A plan's fingerprint, and the numbers that it takes from a model's values.

    Args:
        header: seed, slots, tile, mapping, version, sign and number of tensors, in words.
        digest: of everything that decides where a weight lies.
        pool_std: the pool's initial standard deviation.
        values: `(λ, center, zero row or None)` of every shared tensor, in the plan's order.
        names: hash of the name of every shared tensor; 0 for a tensor that the model no longer reads.
        starts: the bound of the start values of every shared tensor; empty if the plan has none.
    """

    header: tuple[str, ...]
    digest: bytes
    pool_std: float
    values: tuple[tuple[float, float, int | None], ...]
    names: tuple[int, ...]
    starts: tuple[float, ...] = ()


def encode(plan: RoastPlan, names: Sequence[str]) -> Tensor:
    """Return a plan's state as bytes.

    Args:
        plan: a complete plan (λ known).
        names: where the model reads every shared tensor now; empty if it does not.
    """
    shared = plan.shared
    head = _HEADER.pack(
        _MAGIC,
        plan.seed % (1 << 64),
        plan.num_slots,
        *plan.tile,
        MAPPINGS.index(plan.mapping),
        plan.mapping_version,
        SIGNS.index(plan.sign),
        len(shared),
        _digest(plan),
        plan.pool_std or 0.0,
    )
    rest = b"".join(
        _TENSOR.pack(
            tensor.scale or 0.0, tensor.center, -1 if tensor.zero_row is None else tensor.zero_row, _hash_of(name)
        )
        for tensor, name in zip(shared, names, strict=True)
    )
    starts = b"".join(_START.pack(tensor.start) for tensor in shared) if plan.has_starts else b""
    return torch.frombuffer(bytearray(head + rest + starts), dtype=torch.uint8).clone()


def decode(state: object) -> PoolState | None:
    """Return what `encode` wrote, or None if it is something else.

    Averages of equal states count as equal: federated training and moving averages turn them into floating numbers.
    """
    if not isinstance(state, Tensor) or state.dim() != 1 or state.is_meta or state.is_complex():
        return None
    numbers = state.detach().cpu().double().round()
    if not bool(((numbers >= 0) & (numbers <= 255)).all()):
        return None
    data = bytes(numbers.to(torch.uint8).tolist())
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        return None
    _, seed, slots, rows, cols, mapping, version, sign, count, digest, spread = _HEADER.unpack_from(data)
    end = _HEADER.size + count * _TENSOR.size
    if len(data) not in (end, end + count * _START.size) or mapping >= len(MAPPINGS) or sign >= len(SIGNS):
        return None
    header = seed, slots, f"{rows}×{cols}", MAPPINGS[mapping], version, SIGNS[sign], count
    rows = list(_TENSOR.iter_unpack(data[_HEADER.size : end]))
    starts = tuple(start for (start,) in _START.iter_unpack(data[end:]))
    values = tuple((scale, center, None if row < 0 else row) for scale, center, row, _ in rows)
    return PoolState(tuple(map(str, header)), digest, spread, values, tuple(row[-1] for row in rows), starts)


def difference(expected: PoolState, found: PoolState, names: Sequence[str]) -> str | None:
    """Return in words why values saved under one plan mean something else under another; None if they do not.

    Args:
        expected: the model's own state.
        found: the state that was saved.
        names: where the model reads every shared tensor.
    """
    named = [
        f"its {field} is {theirs}, this model's is {ours}"
        for field, ours, theirs in zip(_FIELDS, expected.header, found.header, strict=True)
        if ours != theirs
    ]
    if named:
        return "; ".join(named)
    if expected.digest != found.digest:
        return "its tensors lie elsewhere in the pool"
    moved = [
        name
        for name, ours, theirs in zip(names, expected.names, found.names, strict=True)
        if ours and theirs and ours != theirs
    ]
    if moved:
        return f"there, another layer read what {moved[0]} reads here: layers were moved or renamed"
    return None


def plan_with(plan: RoastPlan, names: Sequence[str], value: object) -> RoastPlan:
    """Return a plan with the numbers of a state that was saved under it; the same object if they are its own.

    Args:
        plan: the plan.
        names: where the model reads every shared tensor now; see `encode`.
        value: the state.

    Raises:
        ValueError: the state is damaged, or of another plan.
    """
    own, given = decode(encode(plan, names)), decode(value)
    assert own is not None
    if given is None:
        raise ValueError(
            "the state dict's _extra_state is not what roastify writes; something changed its bytes. Load a state dict "
            "as it was saved"
        )
    if reason := difference(own, given, names):
        raise ValueError(
            f"the state dict was saved by a model of another plan ({reason}), so its pool means other weights here. "
            f"Convert with the same settings, or use roastify.save and roastify.load"
        )
    numbers = [(state.values, state.pool_std, state.starts) for state in (own, given)]
    return plan if numbers[0] == numbers[1] else with_state(plan, given)


def with_state(plan: RoastPlan, state: PoolState) -> RoastPlan:
    """Return a plan with the numbers of a state that has the plan's fingerprint."""
    names = [tensor.name for tensor in plan.shared]
    scales, centers, zero_rows = (dict(zip(names, column, strict=True)) for column in zip(*state.values, strict=True))
    return plan.with_values(
        scales,
        centers,
        {name: row for name, row in zero_rows.items() if row is not None},
        state.pool_std,
        starts=dict(zip(names, state.starts, strict=False)),
    )


def _digest(plan: RoastPlan) -> bytes:
    """Return the SHA-256 of everything that decides where a weight lies and how it is read, but for numbers."""
    folds = [[list(vars(fold).values()) for fold in plan.folds]] if plan.folds else []
    starts = ["starts"] if plan.has_starts else []
    regions = [list(map(int, vars(region).values())) for region in plan.regions]
    text = json.dumps([list(_facts(plan)), regions, *folds, *starts])
    return hashlib.sha256(text.encode()).digest()


def _facts(plan: RoastPlan) -> Iterator[list[object]]:
    for tensor in plan.shared:
        yield [
            *tensor.shape,
            tensor.rows,
            tensor.cols,
            tensor.transposed,
            tensor.strips,
            tensor.base,
            tensor.region,
            tensor.basis_count,
            *([tensor.diagonal] if tensor.diagonal else []),
            *([] if tensor.fold is None else [["fold", tensor.fold]]),
        ]


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") if name else 0
