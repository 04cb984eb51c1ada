"""Mutates small artifacts, half of them with all digests forged, loads each under a time limit, and counts the ends.

    python tests/trust/mutations.py --count 3000

Each mutated artifact is loaded, run forward, and turned into a dense state dict. Right ends are a `RoastError`, and the
saved values. With forged digests other values are right too, as long as the model runs: whoever can forge digests can
write a whole artifact. Everything else is wrong, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify
from roastify import api
from roastify.errors import RoastError

MANIFEST, WEIGHTS = "roast.json", "model.safetensors"
RIGHT = ("refused", "equal", "different, digests forged")
SECONDS = 20


class Many(nn.Module):
    """Tied and padded tables, a convolution, a norm with buffers, a buffer outside the state dict, a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32, padding_idx=3)
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.mix = nn.Parameter(torch.randn(32, 32))
        self.head = nn.Linear(32, 48)
        self.head.weight = self.table.weight
        self.again = nn.LayerNorm(32)
        self.other = nn.LayerNorm(32)
        self.other.weight = self.again.weight
        self.register_buffer("shift", torch.randn(32), persistent=False)

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        seen = self.norm(self.conv(image).mean((2, 3)))
        return self.head(self.other(self.again(self.table(words) @ self.mix + seen)) + self.shift)


class Linears(nn.Module):
    def __init__(self, width: int = 64, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Both(nn.Module):
    """Two models, each of which gets a pool of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Linears(32, 2), Linears(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


def _both_converted() -> nn.Module:
    model = Both()
    model.left, model.right = roastify.convert(model.left, 2), roastify.convert(model.right, 3)
    return model


def _adapted() -> nn.Module:
    """Return a PEFT model, on the base that its adapters know again."""
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["0", "1", "2"], bias="lora_only", init_lora_weights="gaussian")
    return peft.get_peft_model(Linears(), settings)


def _many() -> tuple[Tensor, Tensor]:
    return torch.arange(6), torch.linspace(-1, 1, 6 * 4 * 25).view(6, 4, 5, 5)


def _row(width: int) -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 3 * width).view(3, width),)


def _config(**settings: Any) -> roastify.RoastConfig:
    return roastify.RoastConfig(min_numel=64, **settings)


# Each kind of artifact: the dense model, the converted one, and inputs.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "plain": (Many, lambda: roastify.convert(Many(), 4, config=_config(share="weights", tile="8x8")), _many()),
    "element signs": (Linears, lambda: roastify.convert(Linears(), 6, config=_config(sign="element")), _row(64)),
    "basis": (Many, lambda: roastify.convert(Many(), 3, config=_config(kernel_basis=4, share="weights")), _many()),
    "folded, learned scales": (
        Linears,
        lambda: roastify.convert(Linears(), 4, config=_config(fold=4, tile="8x8", learned_scales=True)),
        _row(64),
    ),
    "local": (
        Many,
        lambda: roastify.convert(Many(), 2, config=_config(sharing="local", tile="8x8", share="weights")),
        _many(),
    ),
    "two pools": (Both, _both_converted, _row(32)),
    "vectors too": (Many, lambda: roastify.convert(Many(), 8, config=_config(share="all", tile="8x8")), _many()),
    "adapters": (_adapted, lambda: roastify.convert(_adapted(), 2, include="adapters"), _row(64)),
    "unaligned": (Linears, lambda: roastify.convert(Linears(), 4, config=_config(mapping="roast")), _row(64)),
}


class TookTooLong(BaseException):
    """Not an `Exception`, so that nothing on the way takes it for an error of its own."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Original:
    """An artifact, and what a load of it gives."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.kind, self.folder = kind, folder
        self.build, converted, self.inputs = KINDS[kind]
        roastify.save(converted().eval(), folder)
        self.values = values_of(self, folder)
        self.manifest = json.loads((folder / MANIFEST).read_text())
        self.weights = (folder / WEIGHTS).read_bytes()


def values_of(original: Original, folder: Path) -> list[Tensor]:
    """Return all that a load of an artifact gives: the model's tensors, its output, and the dense state dict."""
    model = roastify.load(folder, original.build().eval()).eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        with torch.no_grad():
            output = model(*original.inputs)
    except Exception as error:
        raise FailedForward(traceback.format_exc()) from error
    dense = folder.with_suffix(".safetensors")
    api.densify_artifact(folder, dense)
    tensors = load_file(dense)
    return [*(state[name] for name in sorted(state)), output, *(tensors[name] for name in sorted(tensors))]


class FailedForward(Exception):
    """A model was loaded and does not run."""


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.detach().view(-1).equal(b.detach().view(-1))
        for a, b in zip(left, right, strict=True)
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested lists and dicts."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _at(manifest: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        manifest = manifest[key]
    return manifest


STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 0.5, -0.5, 1e-320, 1e300, -1e300, float("inf"), float("nan"), 10**12,
    2**31, 2**31 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400, "", "x", "\x00", "a" * 70_000, "\x1b[31m", "[/]",
    "..", "../../x", "\ud800", "float16", "float64", "bfloat16", "int64", "complex64", "uint8", "float8_e4m3fn", "relu",
    [], {}, [[]], [1], [8, 8], [1, 1], [0], {"x": 1}, "permutation", "roast", "hashednet", "none", "row", "tile",
    "element", "local", "global", "+", "layers.0", "table",
]  # fmt: skip


def mutate_manifest(manifest: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = [place for place in _places(manifest) if place[:2] != ("plan", "summary") and place[0] != "sha256"]
        path = chance.choice(places)
        holder, value = _at(manifest, path[:-1]), _at(manifest, path)
        how = chance.choice(("delete", "strange", "strange", "near", "swap", "copy", "rename", "repeat"))
        if how == "delete":
            del holder[path[-1]]
        elif how == "strange":
            holder[path[-1]] = copy.deepcopy(chance.choice(STRANGE))
        elif how == "near" and isinstance(value, bool):
            holder[path[-1]] = not value
        elif how == "near" and isinstance(value, int | float):
            near = (value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value))
            holder[path[-1]] = chance.choice(near)
        elif how == "near" and isinstance(value, str):
            holder[path[-1]] = chance.choice((value + "x", value[:-1], value.upper(), value + "\n"))
        elif how in ("swap", "copy"):
            # With the same field elsewhere, so that types and ranges fit.
            alike = [place for place in places if place[-1] == path[-1] and place != path]
            if alike:
                other = chance.choice(alike)
                theirs = copy.deepcopy(_at(manifest, other))
                if how == "swap":
                    _at(manifest, other[:-1])[other[-1]] = copy.deepcopy(value)
                try:
                    _at(manifest, path[:-1])[path[-1]] = theirs
                except (KeyError, IndexError, TypeError):
                    pass
        elif how == "rename" and isinstance(holder, dict):
            holder[str(path[-1]) + chance.choice(("", "x", ".weight"))] = holder.pop(path[-1])
        elif how == "repeat" and isinstance(holder, list):
            holder.insert(chance.randrange(len(holder) + 1), copy.deepcopy(value))
    return manifest


def mutate_text(text: bytes, chance: random.Random) -> bytes:
    how = chance.choice(("flip", "cut", "deep", "twice", "constant", "insert", "empty"))
    at = chance.randrange(len(text))
    if how == "flip":
        return text[:at] + bytes([text[at] ^ (1 << chance.randrange(8))]) + text[at + 1 :]
    if how == "cut":
        return text[:at]
    if how == "deep":
        depth = chance.choice((90, 120, 2_000, 200_000))
        return text.replace(b'"ties": {', b'"deep": ' + b"[" * depth + b"]" * depth + b', "ties": {', 1)
    if how == "twice":
        return text.replace(b'"plan"', b'"plan": {}, "plan"', 1)
    if how == "constant":
        number = chance.choice((b"1e400", b"NaN", b"-Infinity", b"9" * 5000, b"1" * 400))
        return text.replace(b'"seed": 0', b'"seed": ' + number, 1).replace(b'"center": 0.0', b'"center": ' + number, 1)
    return text[:at] + chance.randbytes(5) + text[at:] if how == "insert" else b""


def mutate_weights(content: bytes, chance: random.Random) -> bytes:
    how = chance.choice(("flip", "flip", "cut", "append", "header", "header", "header", "length"))
    at = chance.randrange(len(content))
    if how == "flip":
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "append":
        return content + chance.randbytes(8)
    if how == "length":
        return struct.pack("<Q", chance.choice((0, 1, 2**20, 2**40, 2**63))) + content[8:]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    places = list(_places(header))
    path = chance.choice(places)
    name = chance.choice([key for key in header if key != "__metadata__"])
    what = chance.choice(("strange", "dtype", "shape", "rename", "delete", "exchange"))
    if what == "strange":
        _at(header, path[:-1])[path[-1]] = copy.deepcopy(chance.choice(STRANGE[:-9]))
    elif what == "dtype":
        header[name]["dtype"] = chance.choice(("I32", "U32", "F32", "F16", "BF16", "F64", "I64", "BOOL", "C64", "X"))
    elif what == "shape":
        header[name]["shape"] = chance.choice((header[name]["shape"][::-1], [*header[name]["shape"], 1], []))
    elif what == "rename":
        header[name + "x"] = header.pop(name)
    elif what == "delete":
        del header[name]
    else:
        other = chance.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header, default=str).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def seal(manifest: dict[str, Any]) -> None:
    """Give a manifest the digest of its other entries, as whoever forges one would."""
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()


def write_mutated(original: Original, folder: Path, chance: random.Random, forged: bool) -> None:
    folder.mkdir()
    manifest, weights, text = copy.deepcopy(original.manifest), original.weights, None
    what = chance.choices(("manifest", "text", "weights", "both"), (6, 1, 2, 1))[0]
    if what in ("weights", "both"):
        weights = mutate_weights(weights, chance)
    if what in ("manifest", "both"):
        manifest = mutate_manifest(manifest, chance)
    if forged:
        if isinstance(manifest.get("weights"), dict) and "sha256" in manifest["weights"]:
            manifest["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
        seal(manifest)
    text = json.dumps(manifest, indent=1).encode()
    if what == "text":
        text = mutate_text(text, chance)
    (folder / MANIFEST).write_bytes(text)
    (folder / WEIGHTS).write_bytes(weights)


def end_of(original: Original, folder: Path, forged: bool) -> tuple[str, str]:
    """Return how a load ends, and details if that is wrong."""
    try:
        with limited(SECONDS):
            values = values_of(original, folder)
    except RoastError as error:
        lines = str(error).splitlines()
        return ("refused", "") if len(lines) == 1 and str(error).isprintable() else ("unprintable message", repr(error))
    except TookTooLong:
        return "hang", traceback.format_exc()
    except FailedForward as error:
        return "failed at forward", str(error)
    except Exception:
        return "other exception", traceback.format_exc()
    if same(values, original.values):
        return "equal", ""
    return ("different, digests forged", "") if forged else ("different, digests right", "")


def run(count: int, seed: int, folder: Path, report: Callable[[str, str], object]) -> Counter[str]:
    """Return how many mutated artifacts ended in which way.

    Args:
        count: how many.
        seed: of the mutations.
        folder: an empty folder to work in.
        report: is called with each wrong end, and the details.
    """
    originals = [Original(kind, folder / f"original {index}") for index, kind in enumerate(KINDS)]
    ends: Counter[str] = Counter()
    for index in range(count):
        chance = random.Random(seed * 1_000_003 + index)
        original, forged = originals[index % len(originals)], index // len(originals) % 2 == 1
        mutated = folder / "mutated"
        write_mutated(original, mutated, chance, forged)
        end, details = end_of(original, mutated, forged)
        ends[end] += 1
        if end not in RIGHT:
            report(f"{index} ({original.kind}, {'forged' if forged else 'unforged'}): {end}", details)
        shutil.rmtree(mutated)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ends = run(arguments.count, arguments.seed, Path(folder), lambda *lines: print("\n".join(lines)))  # noqa: T201
    for end, number in sorted(ends.items()):
        print(f"{number:6} {end}")  # noqa: T201
    sys.exit(bool(ends.keys() - set(RIGHT)))


if __name__ == "__main__":
    main()
