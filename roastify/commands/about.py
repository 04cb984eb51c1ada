"""The commands `settings` and `doctor`: what can be set, and what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import platform

import click
import torch

import roastify
from roastify.commands.output import Output, json_option
from roastify.config import RoastConfig
from roastify.help_text import HelpfulCommand
from roastify.kernels.backend import backend
from roastify.text_layout import human_bytes, named_lines


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Write a file of settings to edit.", "roastify settings > my.toml"),
        ("Convert with it.", "roastify model.py --config my.toml"),
    ),
)
@json_option
def settings(json_file: str | None) -> None:
    """Print every setting with its default and meaning, as TOML.

    What is printed is a file for --config.
    """
    out = Output(json_file)
    if json_file != "-":
        click.echo((importlib.resources.files("roastify") / "configs" / "default.toml").read_text("utf-8"), nl=False)
    out.finish(RoastConfig().to_dict())


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("See whether a GPU is used.", "roastify doctor"),
        ("Attach them to a report of a problem.", "roastify doctor --json doctor.json"),
    ),
)
@json_option
def doctor(json_file: str | None) -> None:
    """Show versions, devices and the backend in use."""
    out = Output(json_file)
    out.show(named_lines(diagnosis()))
    out.finish(dict(diagnosis()))


def diagnosis() -> list[tuple[str, str]]:
    """Return versions, devices and the backend of each device."""
    rows = [
        ("roastify", roastify.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for package in ("torch", "triton", "transformers", "timm", "torchvision", "safetensors"):
        rows.append((package, _version(package)))
    rows.append(("cpu", f"{torch.get_num_threads()} threads; {backend(torch.device('cpu'))}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = human_bytes(properties.total_memory)
            rows.append((f"cuda:{index}", f"{properties.name}, {memory}; {backend(torch.device('cuda', index))}"))
    else:
        rows.append(("cuda", "none found"))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
