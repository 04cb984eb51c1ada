"""Options that several commands have, and the settings of a conversion that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from roastify.config import Init, RoastConfig, Share
from roastify.errors import ConfigError
from roastify.source import Source


def complete_source(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a source as a file."""
    return [CompletionItem(incomplete, type="file")]


# What `settings_options` adds besides SOURCE.
SETTINGS = ("ratio", "config", "include", "exclude", "share", "init", "fold", "seed")


def settings_options(command: Callable[..., None], *, with_ratio: bool = True) -> Callable[..., None]:
    """Add the options that every command with a model has."""
    ratio = click.option(
        "--ratio", metavar="NUMBER", help="Store this many times fewer parameters, of the whole model (default: 10)."
    )
    options = [
        click.argument("source", shell_complete=complete_source),
        *([ratio] if with_ratio else []),
        click.option(
            "--config",
            type=click.Path(dir_okay=False),
            help="Read settings from this TOML file; roastify settings prints one.",
        ),
        click.option(
            "--include", multiple=True, metavar="PATTERN", help="Share only these tensors or modules. Repeatable."
        ),
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Keep these tensors or modules dense. Repeatable."
        ),
        click.option(
            "--share",
            type=click.Choice(get_args(Share)),
            help="Share vectors too (all), or not (weights); auto shares them where the ratio needs it.",
        ),
        click.option(
            "--init",
            type=click.Choice(get_args(Init)),
            help="Start at random to train from scratch (match), or from the model's weights (project). The default is "
            "project for pretrained sources, and match for others.",
        ),
        click.option(
            "--fold",
            metavar="FACTOR",
            help="Save arithmetic in large linear layers by this factor: 2, 4, 8, 16, auto or none.",
        ),
        click.option("--seed", type=int, help="Draw the mapping and the initial values with this seed."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def artifact_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for a source that is an artifact."""
    dense = click.option(
        "--dense", metavar="SOURCE", help="Take the dense model from here, if an artifact does not name its code."
    )
    return dense(
        click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")(
            command
        )
    )


def refuse_settings(settings: dict[str, Any], source: str) -> None:
    """Raise `ConfigError` if settings of a conversion are given for what is converted."""
    given = ", ".join(f"--{name}" for name, value in settings.items() if value not in (None, ()))
    if given:
        raise ConfigError(f"{given} cannot be given with {source}, which is converted already; leave out {given}")


def config_of(
    ratio: str | None,
    config: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    fold: str | None = None,
    **rest: Any,
) -> RoastConfig:
    """Return the settings that the options of `settings_options` give, over those of the file that --config names."""
    settings = RoastConfig() if config is None else RoastConfig.from_toml(config)
    return settings.replace(
        ratio=None if ratio is None else _parse_ratio(ratio),
        include=include or None,
        exclude=exclude or None,
        fold=int(fold) if fold is not None and fold.isdecimal() else fold,
        **rest,
    )


def for_source(config: RoastConfig, found: Source) -> RoastConfig:
    """Return the settings for a source: pretrained weights are kept, unless the user says otherwise."""
    return config.replace(init="project") if config.init == "auto" and found.pretrained else config


def ratio_in(text: str) -> float:
    """Return a ratio that is written as `50`, or as `50x`."""
    return float(text.removesuffix("x").removesuffix("×"))


def _parse_ratio(text: str) -> float:
    try:
        return ratio_in(text)
    except ValueError:
        wanted = "expected one as 50, which stores a fiftieth of the parameters"
        raise click.BadParameter(f"{text!r} is not a number; {wanted}", param_hint="'--ratio'") from None
