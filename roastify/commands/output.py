"""What a command shows and writes: tables, lines, JSON, and refusals of places that it must not write to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from roastify import report
from roastify.artifact import check_no_part, check_replaceable
from roastify.errors import ConfigError
from roastify.files import check_writable, write_json
from roastify.printable import printable


class Output:
    """What a command shows: tables and lines for people, and with --json the same as JSON for programs.

    With `--json -`, standard output has the JSON alone, and what the command says goes to standard error.

    Args:
        file: what --json names.
        inputs: what the command reads, which the file must not replace.
    """

    def __init__(self, file: str | None, *inputs: str | None) -> None:
        self.file = file
        if file not in (None, "-"):
            check_file(str(file), *inputs)

    def show(self, result: object) -> None:
        """Print a table."""
        if self.file != "-":
            report.print_result(result)

    def say(self, line: str) -> None:
        """Print one line: rich would read markup in a file's name."""
        click.echo(printable(line), err=self.file == "-")

    def finish(self, values: dict[str, Any]) -> None:
        """Write the JSON."""
        if self.file == "-":
            click.echo(json.dumps(values, indent=1))
        elif self.file is not None:
            write_json(values, self.file)
            self.say(f"written to {self.file}")


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that every command has for programs."""
    kind = click.Path(dir_okay=False, allow_dash=True)
    text = "Write the result as JSON to this file; without a file, or with -, to standard output instead of tables."
    return click.option("--json", "json_file", metavar="FILE", is_flag=False, flag_value="-", type=kind, help=text)(
        command
    )


def check_file(output: str, *inputs: str | None) -> None:
    """Refuse a file that cannot be written, or that the command reads, before work that takes long."""
    check_writable(output, inputs)
    check_no_part(Path(output))


def check_folder(output: str, source: str) -> None:
    """Refuse a folder in which a save would overwrite other files, before work that takes long."""
    folder = Path(output)
    scheme, _, directory = source.partition(":")
    if scheme == "hf" and folder.is_dir() and Path(directory).is_dir() and folder.samefile(directory):
        raise ConfigError(f"{output} is the folder of {source}, whose weights would be lost; name another folder")
    check_replaceable(folder)
