"""The mapping is the project's file format: golden values, its promised properties, and its twin on tensors."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roastify.kernels import reference
from roastify.pool.mapping import (
    MAPPING_VERSION,
    MAPPINGS,
    SIGNS,
    UNFOLDED_VERSION,
    TileMap,
    chunk_coefficients,
    mix32,
    mix64,
    stream_key,
)

# A seed is any Python integer.
SEEDS = st.one_of(st.integers(), st.integers(-(2**200), 2**200), st.sampled_from((0, -1, 2**63, 2**64 - 1)))
PERMUTATIONS = st.sampled_from(("permutation", "cyclic"))
# Primes, powers of two and numbers with many divisors: their sets of coprime numbers differ most.
POOLS = st.one_of(st.integers(1, 300), st.sampled_from((1, 2, 3, 64, 97, 210, 256, 1000)))


def _offsets_twin(tile_map: TileMap, table: Tensor, tiles: list[int]) -> list[int]:
    view = tile_map.view(1, 1, 0, strips=True)
    return reference.tile_offsets(table, view, torch.tensor(tiles)).tolist()


def _signs_twin(tile_map: TileMap, table: Tensor, first_tile: int, num_tiles: int) -> list[list[int]]:
    """Return the signs of a run of tiles, each as its row-major elements, as the torch implementation applies them."""
    rows, cols = tile_map.tile
    view = tile_map.view(num_tiles * rows, cols, first_tile * rows * cols)
    ones = torch.ones((tile_map.first_slot + tile_map.num_slots) * rows, cols)
    return reference.gather(ones, table, view, 1.0).view(num_tiles, -1).int().tolist()


def _pack(signs: list[int]) -> int:
    """Return one bit for each sign, set where it is negative, the first in the lowest place."""
    return sum((sign < 0) << place for place, sign in enumerate(signs))


# Version 1. A change here changes the weights that every saved artifact stands for.


def test_version() -> None:
    # Version 2 adds folds, whose golden values are in test_fold.py.
    assert (UNFOLDED_VERSION, MAPPING_VERSION) == (1, 2)


def test_mix64_is_splitmix64() -> None:
    """The published outputs of splitmix64 for the seed 1234567; a seed of 0 shows the first word's offset."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mix64(1234567, counter) for counter in range(5)] == published
    # The state advances before it is mixed, and mix64(0) is 0: the counter that brings the state back to 0 gives 0.
    assert mix64(2**64 - 0x9E3779B97F4A7C15, 0) == 0
    assert mix64(2**64 - 1, 10**12) == 16091484694707276405


def test_mix32_is_murmur3_fmix32() -> None:
    """The published outputs of MurmurHash3's finalizer."""
    words = (0, 1, 2, 0xDEADBEEF, 0xFFFFFFFF)
    assert [mix32(word) for word in words] == [0, 0x514E28B7, 0x30F4C306, 0x0DE5C6A9, 0x81F16F39]


def test_stream_keys() -> None:
    streams = {seed: [stream_key(seed, stream) for stream in (1, 2, 3)] for seed in (0, 1, -1, 10**30)}
    assert streams == {
        0: [7960286522194355700, 487617019471545679, 17909611376780542444],
        1: [13757245211066428519, 17911839290282890590, 8196980753821780235],
        -1: [16834447057089888969, 4048727598324417001, 7862637804313477842],
        10**30: [10790294437076938457, 12644376265952326436, 16995609094265791788],
    }


@pytest.mark.parametrize(
    ("kind", "seed", "num_slots", "coefficients"),
    [
        ("permutation", 0, 7, [(1, 0, 1), (1, 4, 1), (2, 2, 4), (3, 4, 5)]),
        ("permutation", 0, 1000, [(1, 0, 1), (481, 873, 921), (573, 229, 637), (377, 777, 313)]),
        ("permutation", -5, 4096, [(1, 0, 1), (1755, 2237, 1363), (495, 2413, 3343), (2747, 3200, 2675)]),
        (
            "permutation",
            10**40,
            2**31 - 1,
            [
                (1, 0, 1),
                (1962500722, 1349007925, 1363263799),
                (1140854456, 1997488766, 1033701216),
                (806676896, 416721354, 1239926372),
            ],
        ),
        (
            "permutation",
            3,
            2**31,
            [
                (1, 0, 1),
                (835499425, 2111121562, 1759800929),
                (313905017, 1950046738, 874015433),
                (1164734161, 561990646, 606644785),
            ],
        ),
        ("permutation", 12, 1, [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0)]),
        ("cyclic", 0, 1000, [(1, 0, 1), (1, 873, 1), (1, 229, 1), (1, 777, 1)]),
        ("cyclic", 10**40, 2**31 - 1, [(1, 0, 1), (1, 1349007925, 1), (1, 1997488766, 1), (1, 416721354, 1)]),
    ],
)
def test_golden_chunk_coefficients(
    kind: str, seed: int, num_slots: int, coefficients: list[tuple[int, int, int]]
) -> None:
    assert [chunk_coefficients(seed, num_slots, chunk, kind) for chunk in range(4)] == coefficients
    num_tiles = 3 * num_slots + 1
    assert TileMap(num_tiles, num_slots, (8, 8), seed, kind).chunk_table() == coefficients


@pytest.mark.parametrize(
    ("kind", "sign", "seed", "num_slots", "tile", "offsets", "tile_signs", "element_signs", "last_signs"),
    [
        (
            *("permutation", "tile", 0, 1000, (16, 16)),
            [0, 256, 255744, 223488, 90624, 135936, 59392],
            *(0x625F80FD7E9E7C00, 0x0, 0x0),
        ),
        (
            *("permutation", "element", -5, 37, (8, 8)),
            [0, 64, 2304, 0, 576, 0, 1152],
            *(0x5CCCE82552FBD400, 0xA983B72644EC4F9E, 0x5F657A2F775CC1B2),
        ),
        (
            *("permutation", "row", 0, 1000, (16, 16)),
            [0, 256, 255744, 223488, 90624, 135936, 59392],
            *(0x625F80FD7E9E7C00, 0x0, 0x0),
        ),
        (
            *("permutation", "none", 1, 2**31, (128, 64)),
            [0, 8192, 17592186036224, 8914231279616, 2228223631360, 10481745838080, 17407539380224],
            *(0x0, 0x0, 0x0),
        ),
        (
            *("cyclic", "tile", 2**64 + 3, 1000, (16, 16)),
            [0, 256, 255744, 211456, 211712, 92160, 139008],
            *(0xCA6A6A38010BC900, 0x0, 0xFFFFFFFFFFFFFFFF),
        ),
        (
            *("cyclic", "element", 7, 37, (64, 64)),
            [0, 4096, 147456, 20480, 24576, 45056, 110592],
            *(0xFC85225A6746C300, 0xDA54550A068980D1, 0x1E26F7272BA90201),
        ),
        (
            *("roast", "tile", 0, 1000, (16, 16)),
            [158502, 35202, 24391, 240460, 251459, 84395, 75669],
            *(0x625F80FD7E9E7C93, 0x0, 0x0),
        ),
        (
            *("roast", "element", -(10**30), 37, (8, 8)),
            [2069, 1348, 78, 1225, 1610, 78, 1487],
            *(0x14A8ACEF86A91288, 0x18FF9B746EE351E5, 0xC6707484B67DCD3E),
        ),
        (
            *("hashednet", "tile", 10**40, 100003, (1, 1)),
            [54626, 58303, 23105, 9935, 43370, 46227, 11491],
            *(0x94E8285DD2294F3C, 0xFFFFFFFFFFFFFFFF, 0x0),
        ),
        (
            *("hashednet", "none", 0, 37, (1, 1)),
            [6, 12, 31, 31, 25, 24, 5],
            *(0x0, 0x0, 0x0),
        ),
        (
            *("hashednet", "element", 1, 64, (8, 8)),
            [2816, 1344, 1408, 256, 2688, 2368, 3072],
            *(0xA714069DF5F9BDF0, 0x3D3576ACBF7D5AFC, 0xDC2C92B50227D7AB),
        ),
    ],
)
def test_golden_offsets_and_signs(
    kind: str,
    sign: str,
    seed: int,
    num_slots: int,
    tile: tuple[int, int],
    offsets: list[int],
    tile_signs: int,
    element_signs: int,
    last_signs: int,
) -> None:
    """Signs as bits: of 64 tiles' first elements from P - 8 on, of tile P + 1, and of a far tile's last 64 elements."""
    tile_map = TileMap(2**34, num_slots, tile, seed, kind, sign)
    far = 2**33 + 1
    tiles = (0, 1, num_slots - 1, num_slots, num_slots + 1, 3 * num_slots + 2, far)
    assert [tile_map.offset(number) for number in tiles] == offsets
    around_first_border = range(num_slots - 8, num_slots + 56)
    assert _pack([tile_map.sign_of(number, 0, number) for number in around_first_border]) == tile_signs
    assert _pack([tile_map.sign_of(num_slots + 1, element, num_slots + 1) for element in range(64)]) == element_signs
    last = range(max(tile_map.slot_size - 64, 0), tile_map.slot_size)
    assert _pack([tile_map.sign_of(far, element, far) for element in last]) == last_signs


# Properties that hold for every seed and size.


@given(SEEDS, POOLS, st.integers(0, 60), PERMUTATIONS)
def test_a_chunk_is_a_permutation_of_the_slots(seed: int, num_slots: int, chunk: int, kind: str) -> None:
    tile_map = TileMap((chunk + 1) * num_slots, num_slots, (8, 8), seed, kind)
    slots = [tile_map.slot(chunk * num_slots + position) for position in range(num_slots)]
    assert sorted(slots) == list(range(num_slots))


@given(SEEDS, POOLS, st.integers(1, 1500), PERMUTATIONS)
def test_loads_differ_by_at_most_one(seed: int, num_slots: int, num_tiles: int, kind: str) -> None:
    tile_map = TileMap(num_tiles, num_slots, (2, 4), seed, kind)
    loads = Counter(tile_map.slot(tile) for tile in range(num_tiles))
    assert sum(loads.values()) == num_tiles
    least = min(loads.values()) if len(loads) == num_slots else 0
    assert max(loads.values()) - least <= 1


@given(SEEDS, POOLS, PERMUTATIONS, st.sampled_from(SIGNS), st.integers(0, 5000))
def test_ratio_one_is_the_identity(seed: int, num_slots: int, kind: str, sign: str, element: int) -> None:
    tile_map = TileMap(num_slots, num_slots, (8, 8), seed, kind, sign)
    assert [tile_map.offset(tile) for tile in range(num_slots)] == [64 * tile for tile in range(num_slots)]
    assert all(tile_map.sign_of(tile, element, tile) == 1 for tile in range(num_slots))


@given(SEEDS, POOLS, st.integers(0, 2000), st.integers(1, 300))
def test_a_row_of_tiles_is_walked_by_addition(seed: int, num_slots: int, first_tile: int, length: int) -> None:
    """A kernel adds a[c] and subtracts P at most once; at a chunk's border it starts again from b[c]."""
    tile_map = TileMap(first_tile + length, num_slots, (8, 8), seed)
    table = tile_map.chunk_table()
    chunk, position = divmod(first_tile, num_slots)
    slot = (table[chunk][0] * position + table[chunk][1]) % num_slots
    for tile in range(first_tile, first_tile + length):
        assert slot == tile_map.slot(tile)
        position += 1
        if position == num_slots:
            chunk, position = chunk + 1, 0
            slot = table[chunk][1] if chunk < len(table) else -1
        else:
            slot += table[chunk][0]
            slot -= num_slots if slot >= num_slots else 0


@given(SEEDS, st.one_of(POOLS, st.integers(1, 2**31)), st.integers(0, 10**6), PERMUTATIONS, st.data())
def test_the_inverse_finds_the_position(seed: int, num_slots: int, chunk: int, kind: str, data: st.DataObject) -> None:
    """Gradients are summed without atomics, and need the reader of a slot in a chunk."""
    a, b, inverse = chunk_coefficients(seed, num_slots, chunk, kind)
    assert math.gcd(a, num_slots) == 1
    assert 0 <= a < num_slots or num_slots == 1
    assert all(0 <= value < num_slots for value in (b, inverse))
    position = data.draw(st.integers(0, num_slots - 1))
    slot = TileMap((chunk + 1) * num_slots, num_slots, (1, 1), seed, kind).slot(chunk * num_slots + position)
    assert inverse * (slot - b) % num_slots == position


@given(SEEDS, st.integers(2, 300), st.integers(0, 10**9), st.sampled_from(MAPPINGS))
def test_offsets_lie_in_the_region(seed: int, num_slots: int, tile: int, kind: str) -> None:
    tile_map = TileMap(tile + 1, num_slots, (4, 8), seed, kind, first_slot=11)
    offset = tile_map.offset(tile)
    # A whole tile must fit: an unaligned one may begin anywhere up to the last slot's first element.
    assert 11 * 32 <= offset <= (11 + num_slots - 1) * 32
    if kind != "roast":
        assert offset % 32 == 0
        assert tile_map.slot(tile) == offset // 32


def test_unaligned_tiles_reach_every_offset_and_no_other() -> None:
    tile_map = TileMap(2000, 3, (2, 4), kind="roast")
    assert {tile_map.offset(tile) for tile in range(2000)} == set(range(2 * 8 + 1))


@given(st.integers(-(2**70), 2**70), st.sampled_from(MAPPINGS), st.sampled_from(SIGNS))
@settings(max_examples=30)
def test_seeds_count_modulo_two_to_the_64(seed: int, kind: str, sign: str) -> None:
    ours, same, other = (
        TileMap(400, 50, (8, 8), value, kind, sign) for value in (seed, seed % 2**64, (seed + 1) % 2**64)
    )
    assert [ours.offset(tile) for tile in range(400)] == [same.offset(tile) for tile in range(400)]
    assert [ours.sign_of(tile, 5, tile) for tile in range(400)] == [same.sign_of(tile, 5, tile) for tile in range(400)]
    assert [ours.offset(tile) for tile in range(400)] != [other.offset(tile) for tile in range(400)]


def test_purposes_draw_from_streams_of_their_own() -> None:
    """A sign that followed from the slot, or an offset from the multiplier, would undo the other's purpose."""
    for kind in ("permutation", "cyclic", "hashednet"):
        tile_map = TileMap(20000, 64, (1, 1), 4, kind)
        signs = np.array([tile_map.sign_of(tile) for tile in range(64, 20000)])
        half = np.array([1 if tile_map.slot(tile) >= 32 else -1 for tile in range(64, 20000)])
        assert abs(np.mean(signs * half)) < 4 / math.sqrt(len(signs))
    pairs = {chunk_coefficients(4, 97, chunk, "permutation")[:2] for chunk in range(1, 200)}
    assert len(pairs) > 190


# Signs.


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("seed", [0, 1, -(10**20)])
def test_signs_per_tile_are_balanced(kind: str, seed: int) -> None:
    tile_map = TileMap(12000, 100, (8, 8), seed, kind, "tile")
    signs = np.array([tile_map.sign_of(tile) for tile in range(100, 12000)])
    assert set(signs) == {-1, 1}
    assert abs(signs.mean()) < 4 / math.sqrt(len(signs))
    # Signs of neighbours in a row, and of one slot's readers in neighbouring chunks of a rotation, are independent.
    for lag in (1, 2, 100):
        assert abs(np.mean(signs[lag:] * signs[:-lag])) < 4 / math.sqrt(len(signs) - lag)
    assert all(tile_map.sign_of(5000, element) == signs[4900] for element in (0, 1, 31, 32, 63))


@pytest.mark.parametrize(("kind", "seed"), [("permutation", 0), ("permutation", -7), ("cyclic", 2**65), ("roast", 5)])
def test_signs_per_element_are_balanced_and_uncorrelated(kind: str, seed: int) -> None:
    """With one slot every tile reads the same elements: only different patterns keep two tiles apart."""
    num_tiles, size = 64, 32 * 32
    tile_map = TileMap(num_tiles + 1, 1, (32, 32), seed, kind, "element")
    patterns = np.array(
        [[tile_map.sign_of(tile, element) for element in range(size)] for tile in range(1, num_tiles + 1)]
    )
    assert set(patterns.ravel()) == {-1, 1}
    assert abs(patterns.mean()) < 4 / math.sqrt(patterns.size)
    # Six standard deviations leave room for the largest of some thousand pairs.
    between_tiles = patterns @ patterns.T / size - np.eye(num_tiles)
    assert np.abs(between_tiles).max() < 6 / math.sqrt(size)
    bits = patterns.reshape(-1, 32)
    between_bits = bits.T @ bits / len(bits) - np.eye(32)
    assert np.abs(between_bits).max() < 6 / math.sqrt(len(bits))
    words = patterns.reshape(num_tiles, -1, 32)
    between_words = (words[:, 1:] * words[:, :-1]).mean((0, 2))
    assert np.abs(between_words).max() < 6 / math.sqrt(num_tiles * 32)


@pytest.mark.parametrize("sign", ["tile", "element"])
def test_seeds_give_unrelated_signs(sign: str) -> None:
    places = [(tile, element) for tile in range(10, 200) for element in range(0, 64, 3)]
    signs = np.array(
        [
            [TileMap(200, 10, (8, 8), seed, sign=sign).sign_of(tile, element) for tile, element in places]
            for seed in (0, 1, 2)
        ]
    )
    independent = len(places) if sign == "element" else 190
    off_diagonal = signs @ signs.T / len(places) - np.eye(3)
    assert np.abs(off_diagonal).max() < 4 / math.sqrt(independent)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_a_row_of_tiles_takes_the_sign_of_its_first_tile(kind: str, chunk_table: Callable[..., Tensor]) -> None:
    """The tensor has 6 × 5 tiles and begins at tile 4; its rows cross chunk borders."""
    by_row, by_tile = (TileMap(100, 7, (4, 8), 5, kind, sign) for sign in ("row", "tile"))
    view = by_row.view(6 * 4, 5 * 8, 4 * 32)
    expected = []
    for index in range(30):
        tile, first = 4 + index, 4 + index // 5 * 5
        assert view.row_tile(tile) == first
        # Chunk 0 of a permutation has no negative tile; elsewhere the row's first tile decides, negative or not.
        exempt = by_row.num_chunks > 0 and tile < 7
        negative = mix64(by_row.key, first) >> 63 == 1 and not exempt
        assert by_row.sign_of(tile, 3, first) == (-1 if negative else 1)
        assert exempt or first < 7 or by_row.sign_of(tile, 0, first) == by_tile.sign_of(first)
        expected.append(-1 if negative else 1)
    assert {-1, 1} == set(expected)
    ones = torch.ones(7 * 4, 8)
    dense = reference.gather(ones, chunk_table(by_row), view, 1.0)
    assert dense.view(6, 4, 5, 8)[:, 0, :, 0].flatten().int().tolist() == expected
    with pytest.raises(ValueError, match="row_tile"):
        by_row.sign_of(9)


def test_a_strip_is_a_row_of_its_own() -> None:
    view = TileMap(100, 7, (4, 8), 5, sign="row").view(3, 100, 40, strips=True)
    assert [view.row_tile(tile) for tile in range(1, 11)] == list(range(1, 11))


@pytest.mark.parametrize("kind", ["roast", "hashednet"])
@pytest.mark.parametrize("sign", ["tile", "element"])
def test_hashed_mappings_sign_their_first_tiles_too(kind: str, sign: str) -> None:
    tile_map = TileMap(100, 100, (8, 8), kind=kind, sign=sign)
    assert {tile_map.sign_of(tile) for tile in range(100)} == {-1, 1}


# The twin on tensors.


@given(
    SEEDS,
    st.integers(1, 400),
    st.sampled_from(MAPPINGS),
    st.integers(0, 50),
    st.integers(0, 4),
    st.lists(st.integers(0, 5000), min_size=1, max_size=50),
)
def test_the_twin_has_the_same_offsets(
    seed: int, num_slots: int, kind: str, first_slot: int, first_chunk: int, tiles: list[int]
) -> None:
    tile_map = TileMap(5001, num_slots, (4, 8), seed, kind, "tile", first_slot, first_chunk)
    # Other regions' chunks come first; their numbers would move every tile.
    strangers = torch.tensor([[3, 1 + 7 * row, 5] for row in range(first_chunk)], dtype=torch.int64).view(-1, 3)
    table = torch.cat([strangers, torch.tensor(tile_map.chunk_table(), dtype=torch.int64).view(-1, 3)])
    assert _offsets_twin(tile_map, table, tiles) == [tile_map.offset(tile) for tile in tiles]


@given(
    SEEDS,
    st.integers(1, 40),
    st.sampled_from(MAPPINGS),
    st.sampled_from(SIGNS),
    st.sampled_from(((1, 1), (8, 8), (3, 5), (1, 64), (4, 24), (16, 4), (2, 128))),
    st.integers(0, 300),
)
def test_the_twin_has_the_same_signs(
    seed: int, num_slots: int, kind: str, sign: str, tile: tuple[int, int], first_tile: int
) -> None:
    """Tiles have rows that are shorter than a word of 32 signs, longer, and no multiple of it."""
    tile_map = TileMap(first_tile + 5, num_slots, tile, seed, kind, sign)
    table = torch.tensor(tile_map.chunk_table(), dtype=torch.int64).view(-1, 3)
    expected = [
        [tile_map.sign_of(number, element, number) for element in range(tile_map.slot_size)]
        for number in range(first_tile, first_tile + 5)
    ]
    assert _signs_twin(tile_map, table, first_tile, 5) == expected


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("num_slots", [2**31, 2**31 - 1, 3**19, 1_000_003])
def test_beyond_two_to_the_31_elements(kind: str, num_slots: int, chunk_table: Callable[..., Tensor]) -> None:
    """Tile numbers, slots and addresses fit no 32-bit integer; `a·i` just fits 63 bits."""
    # A small pool still serves addresses above 2**33, through some hundred chunks.
    num_tiles = max(3 * num_slots, 300 * 1_000_003)
    tile_map = TileMap(num_tiles, num_slots, (8, 8), -3, kind)
    assert num_tiles * tile_map.slot_size > 2**33
    generator = random.Random(num_slots)
    tiles = [generator.randrange(num_tiles) for _ in range(2000)]
    borders = [chunk * num_slots + step for chunk in range(1, 3) for step in (-2, -1, 0, 1)]
    tiles += [*borders, 0, num_tiles - 1]
    expected = [tile_map.offset(tile) for tile in tiles]
    assert _offsets_twin(tile_map, chunk_table(tile_map), tiles) == expected
    assert max(expected) > min(2**33, num_slots * 32)
    if kind == "permutation":
        # The expected offset comes from the formula itself, in exact integers.
        for tile, offset in zip(tiles, expected, strict=True):
            a, b, _ = chunk_coefficients(-3, num_slots, tile // num_slots, kind)
            assert offset == (a * (tile % num_slots) + b) % num_slots * 64


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize(("sign", "tile"), [("tile", (1, 1)), ("element", (8, 8))])
def test_signs_beyond_two_to_the_33_elements(
    kind: str, sign: str, tile: tuple[int, int], chunk_table: Callable[..., Tensor]
) -> None:
    size = tile[0] * tile[1]
    # With this number of slots the chunk table is short, even at this address.
    num_slots, first_tile = 2**20 // size + 3, 2**34 // size + 17
    tile_map = TileMap(first_tile + 50, num_slots, tile, 9, kind, sign)
    signs = _signs_twin(tile_map, chunk_table(tile_map), first_tile, 50)
    expected = [[tile_map.sign_of(first_tile + step, element) for element in range(size)] for step in range(50)]
    assert signs == expected
    assert {-1, 1} == {value for values in signs for value in values}


# A region for each tensor (`sharing="local"`).


def test_regions_do_not_overlap_and_each_has_its_own_mapping(chunk_table: Callable[..., Tensor]) -> None:
    sizes = ((30, 7), (12, 12), (5, 1))
    alone = [TileMap(num_tiles, num_slots, (8, 8), 21) for num_tiles, num_slots in sizes]
    regions, first_slot, first_chunk = [], 0, 0
    for num_tiles, num_slots in sizes:
        region = TileMap(num_tiles, num_slots, (8, 8), 21, first_slot=first_slot, first_chunk=first_chunk)
        regions.append(region)
        first_slot, first_chunk = first_slot + num_slots, first_chunk + region.num_chunks
    table = chunk_table(*regions)
    assert len(table) == first_chunk == 5 + 1 + 5
    used = [{region.slot(tile) for tile in range(region.num_tiles)} for region in regions]
    assert used == [set(range(7)), set(range(7, 19)), {19}]
    for region, single in zip(regions, alone, strict=True):
        tiles = list(range(region.num_tiles))
        offsets = [region.offset(tile) for tile in tiles]
        assert offsets == [single.offset(tile) + 64 * region.first_slot for tile in tiles]
        assert _offsets_twin(region, table, tiles) == offsets
        assert [region.sign_of(tile) for tile in tiles] == [single.sign_of(tile) for tile in tiles]


# Edges.


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("sign", SIGNS)
def test_a_pool_of_one_slot(kind: str, sign: str, chunk_table: Callable[..., Tensor]) -> None:
    tile_map = TileMap(9, 1, (4, 8), 3, kind, sign)
    assert [tile_map.offset(tile) for tile in range(9)] == [0] * 9
    table = chunk_table(tile_map)
    assert len(table) == (9 if kind in ("permutation", "cyclic") else 0)
    assert _offsets_twin(tile_map, table, list(range(9))) == [0] * 9
    signs = [[tile_map.sign_of(tile, element, tile) for element in range(32)] for tile in range(9)]
    assert _signs_twin(tile_map, table, 0, 9) == signs
    assert len({tuple(pattern) for pattern in signs}) == {"none": 1, "row": 2, "tile": 2, "element": 9}[sign]


def test_chunks_are_counted() -> None:
    assert [TileMap(num_tiles, 10, (8, 8)).num_chunks for num_tiles in (1, 9, 10, 11, 20, 21)] == [1, 1, 1, 2, 2, 3]
    assert [TileMap(100, 10, (8, 8), kind=kind).num_chunks for kind in MAPPINGS] == [10, 10, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, r"num_slots must be from 1 to 2\*\*31, not 0"),
        ({"num_slots": -4}, r"num_slots must be from 1 to 2\*\*31, not -4"),
        ({"num_slots": 2**31 + 1}, r"num_slots must be from 1 to 2\*\*31, not 2147483649"),
        ({"kind": "random"}, "mapping must be one of permutation, cyclic, roast, hashednet, not 'random'"),
        ({"sign": "rows"}, "sign must be one of none, row, tile, element, not 'rows'"),
    ],
)
def test_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    valid = {"num_tiles": 10, "num_slots": 5, "tile": (8, 8)}
    TileMap(**valid)
    with pytest.raises(ValueError, match=message):
        TileMap(**(valid | arguments))


def test_unaligned_tiles_have_no_slot() -> None:
    with pytest.raises(ValueError, match=r"'roast' are not aligned to slots; ask for offset\(tile\)"):
        TileMap(10, 5, (8, 8), kind="roast").slot(3)
