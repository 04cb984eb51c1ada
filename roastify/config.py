"""`RoastConfig`: every setting of a conversion, its default, and how it is read from TOML."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast, get_args

from roastify import names
from roastify.errors import ConfigError, closest
from roastify.pool.mapping import MappingName, SignName

Sharing = Literal["global", "local"]
Init = Literal["auto", "match", "project"]
Share = Literal["auto", "weights", "all"]
SignSetting = Literal["auto", SignName]
# Pairs of a pattern and its settings, which are pairs of name and value: a config can be hashed.
ModuleSettings = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

# More than any model has parameters.
_LARGEST_RATIO = 10**18
_LARGEST_FOLD = 16
# What a module may have for itself; everything else is of the one pool.
_OF_MODULES = ("fold", "fold_hashes", "kernel_basis")


@dataclass(frozen=True)
class RoastConfig:
    """Settings of a conversion. `configs/default.toml` has the same keys and values, with an explanation of each.

    The command `roastify settings` prints that file.

    Args:
        ratio: parameters of the whole model ÷ parameters stored, at least 1.
        init: `match` (training from scratch), `project` (pretrained weights), or `auto`. `auto` is `match`, except on
            the command line for a source with pretrained weights, where it is `project`.
        seed: the seed of the mapping and of the pool's initial values; any integer.
        include: patterns of tensors or modules that may be shared; empty: everything eligible. `adapters` alone: the
            adapters of a PEFT model, whose base stays as it is and is not counted.
        exclude: patterns of tensors or modules that stay dense.
        min_numel: tensors with fewer elements stay dense, unless `include` names them or `share` is `all`.
        share: `weights` (tensors of two or more dimensions), `all` (vectors, constant and small tensors too), or
            `auto`, which is `all` if those other tensors would take too much of the parameters that may be stored.
        tile: `auto`, or `ROWSxCOLS`.
        sign: `auto`, `none`, `row`, `tile` or `element`.
        mapping: `permutation`, or for comparison `cyclic`, `roast`, `hashednet`.
        sharing: `global` (one pool for all), or for comparison `local` (a region of the pool for each tensor).
        precondition: divide the pool's gradient by Γ, so that dense learning rates carry over.
        kernel_basis: how many learned kernels (the basis) a convolution's kernels are combinations of: a number, `none`
            or `auto`. `auto` is two thirds of a kernel's positions, and one third from ratio 30 on. It applies to
            kernels of at least two dimensions and nine positions, in tensors so large that the basis costs little.
        fold: how many input features of a linear layer, or input channels of a convolution, are summed first, so that
            the layer takes as many times less arithmetic: a power of 2 from 1 (none) to 16 and at most the ratio,
            `none` or `auto`. `auto` is the largest of 8, 4 and 2 that fits, for linear layers of at least a million
            weights and convolutions of at least 640 input channels.
        fold_hashes: how many combinations of the features a folded layer reads, each by as many of its outputs: a power
            of 2; at most the fold.
        learned_scales: whether folded layers learn a scale for each group of features of each hash.
        modules: `fold`, `fold_hashes` and `kernel_basis` for the tensors and modules that a pattern names:
            `{"*.mlp.*": {"fold": 4}}`. Of several patterns that name a tensor, the first counts.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    ratio: float = 10.0
    init: Init = "auto"
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_numel: int = 1024
    share: Share = "auto"
    tile: str = "auto"
    sign: SignSetting = "auto"
    mapping: MappingName = "permutation"
    sharing: Sharing = "global"
    precondition: bool = True
    kernel_basis: str | int = "auto"
    fold: str | int = "auto"
    fold_hashes: int = 2
    learned_scales: bool = False
    modules: ModuleSettings | Mapping[str, Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        object.__setattr__(self, "ratio", float(self.ratio))
        choices = {"init": Init, "sign": SignSetting, "mapping": MappingName, "share": Share, "sharing": Sharing}
        for name, literal in choices.items():
            _check_choice(name, getattr(self, name), get_args(literal))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name, minimum in (("seed", None), ("min_numel", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (minimum is not None and value < minimum):
                wanted = "an integer" if minimum is None else f"an integer of at least {minimum}"
                raise ConfigError(f"{name} must be {wanted}; found {value!r}")
        for name in ("precondition", "learned_scales"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false; found {getattr(self, name)!r}")
        self._check_fold()
        self.tile_shape()
        self._check_basis()
        object.__setattr__(self, "modules", self._module_settings())

    def _check_basis(self) -> None:
        count = self.kernel_basis
        if count not in ("auto", "none") and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(
                f"kernel_basis must be 'auto', 'none' or a number of basis kernels of at least 1; found {count!r}"
            )

    def _check_fold(self) -> None:
        fold = self.fold
        if fold not in ("auto", "none") and not _is_power_of_2(fold, _LARGEST_FOLD):
            raise ConfigError(f"fold must be 'auto', 'none' or a power of 2 up to {_LARGEST_FOLD}; found {fold!r}")
        if isinstance(fold, int) and fold > self.ratio:
            raise ConfigError(f"fold must not exceed the ratio, {self.ratio:g}; found {fold}. Choose a smaller fold")
        if not _is_power_of_2(self.fold_hashes, _LARGEST_FOLD):
            raise ConfigError(f"fold_hashes must be a power of 2 up to {_LARGEST_FOLD}; found {self.fold_hashes!r}")

    def _module_settings(self) -> ModuleSettings:
        pairs: Any = self.modules.items() if isinstance(self.modules, Mapping) else self.modules
        try:
            found = {pattern: dict(settings) for pattern, settings in pairs}
        except (TypeError, ValueError):
            raise ConfigError(
                f"modules must be patterns with settings, such as {{'*.mlp.*': {{'fold': 4}}}}; found {self.modules!r}"
            ) from None
        _patterns("modules", list(found))
        for pattern, settings in found.items():
            for name in settings:
                if name not in _OF_MODULES:
                    raise ConfigError(
                        f"modules, {pattern!r}: {name!r} cannot be set for a module{closest(str(name), _OF_MODULES)}; "
                        f"{', '.join(_OF_MODULES)} can, exclude keeps tensors dense, and all else is of the one pool"
                    )
            try:
                dataclasses.replace(self, modules=(), **settings)
            except ConfigError as error:
                raise ConfigError(f"modules, {pattern!r}: {error}") from None
        return tuple((pattern, tuple(settings.items())) for pattern, settings in found.items())

    def of_modules(self) -> dict[str, RoastConfig]:
        """Return, for each pattern in `modules`, all settings of what it names."""
        pairs = cast(ModuleSettings, self.modules)
        return {pattern: dataclasses.replace(self, modules=(), **dict(settings)) for pattern, settings in pairs}

    def tile_shape(self) -> tuple[int, int] | None:
        """Return the tile asked for as `(rows, cols)`, or None for `auto`."""
        if self.tile == "auto":
            return None
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.tile) if isinstance(self.tile, str) else None
        if match is None:
            raise ConfigError(f"tile must be 'auto' or ROWSxCOLS such as '64x64'; found {self.tile!r}")
        return int(match[1]), int(match[2])

    def replace(self, **changes: Any) -> RoastConfig:
        """Return a copy with these settings; a setting that is given as None stays.

        Raises:
            ConfigError: a name is not a setting, or a value is of the wrong type or out of range.
        """
        _check_settings(changes, "argument")
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        } | {"modules": {pattern: dict(settings) for pattern, settings in cast(ModuleSettings, self.modules)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> RoastConfig:
        """Return the settings that plain values hold.

        Raises:
            ConfigError: a key is unknown, or a value is of the wrong type or out of range; the message names `where`.
        """
        _check_settings(values, where)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> RoastConfig:
        """Read a TOML file whose top-level keys are settings; a key that is left out takes its default.

        Raises:
            ConfigError: the file is missing or is not TOML, a key is unknown, or a value is of the wrong type or out of
                range.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:  # errors of TOML and of UTF-8, and NUL in the file's name
            raise ConfigError(f"the config file {path} is not valid TOML: {error}") from None
        return cls.from_dict(values, str(path))


def check_ratio(ratio: object) -> Fraction:
    """Return a compression ratio as an exact fraction.

    Raises:
        ConfigError: it is not a finite number of at least 1.
    """
    number = ratio if isinstance(ratio, int | float | Fraction) and not isinstance(ratio, bool) else math.nan
    if not number < _LARGEST_RATIO:
        raise ConfigError(f"ratio must be a finite number of at least 1; found {reprlib.repr(ratio)}")
    if number < 1:
        raise ConfigError(
            f"ratio must be at least 1 (1 stores every parameter, 50 stores a fiftieth); found {reprlib.repr(ratio)}"
        )
    return Fraction(number).limit_denominator(10**9)


def _is_power_of_2(value: object, largest: int) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return 1 <= value <= largest and value & (value - 1) == 0


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = closest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; found {value!r}{hint}")


def _check_settings(values: dict[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(RoastConfig)]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{where}: unknown setting {name!r}{closest(name, known)}; the settings are {', '.join(known)}"
            )


def _patterns(name: str, value: object) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(item, str) and item for item in patterns):
        raise ConfigError(f"{name} must be a pattern or a list of patterns (strings); found {value!r}")
    for pattern in patterns:
        if problem := names.invalid(pattern):
            raise ConfigError(f"{name}: {problem}")
    return tuple(patterns)
