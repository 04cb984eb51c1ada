"""Help and errors of the command line: options under headings, examples in every command, errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import click

from roastify.printable import printable

# Options by their parameters' names, in the order in which help shows the headings.
_GROUPS = {
    "Conversion": ("ratio", "ratios", "config", "include", "exclude", "share", "init", "fold", "seed"),
    "Artifacts": ("artifact", "dense", "digest"),
    "Data and quality": ("data", "logits", "features", "loss_name", "metric", "lower_is_better", "within"),
    "Training": (
        *("steps", "align", "align_batches", "lr", "warmup", "schedule", "clip", "accumulate", "temperature"),
        *("output_weight", "feature_weight", "task_weight", "evaluate_every", "bfloat16"),
    ),
    "Measuring": ("batches", "dtype", "train", "compile", "no_graph", "seconds"),
    "Output": ("output", "shard_size", "resume", "save_every", "log_every", "full", "json_file", "plot_file"),
}
# Wider options have their text on the next line.
_OPTION_WIDTH = 26


class HelpfulCommand(click.Command):
    """A command whose help has its options under headings and ends with examples.

    Args:
        examples: what each example does, and its command line.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under headings; those of no heading come last."""
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*_GROUPS, "Options")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            heading = next((each for each, names in _GROUPS.items() if parameter.name in names), "Options")
            if isinstance(parameter, click.Option) and record is not None:
                found[heading].append(record)
        for heading, records in found.items():
            if records:
                with formatter.section(_heading(heading)):
                    formatter.write_dl(records, col_max=_OPTION_WIDTH)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each below what it does."""
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Write command lines, each below a comment that says what it does."""
    with formatter.section(_heading("Examples")):
        for does, line in examples:
            formatter.write(f"{'':>{formatter.current_indent}}# {does}\n{'':>{formatter.current_indent}}{line}\n")


def _heading(text: str) -> str:
    """Return a heading in bold; click takes the codes away unless a terminal reads them."""
    return text if os.environ.get("NO_COLOR") else click.style(text, bold=True)


class OneLineError(click.ClickException):
    """Wrong usage, in one line as all other errors."""

    exit_code = 2

    def __init__(self, error: click.UsageError) -> None:
        path = error.ctx.command_path if error.ctx is not None else "roastify"
        super().__init__(f"{in_one_line(error.format_message()).rstrip('.')}; see {path} --help")

    def show(self, file: Any = None) -> None:
        """Write the error to standard error."""
        say_error(self.message)


def say_error(message: str) -> None:
    """Write an error to standard error in one line, however long, with colour on a terminal."""
    begin = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red", bold=True)
    click.echo(f"{begin} {in_one_line(message)}", err=True)


def in_one_line(text: str) -> str:
    """Return a text without line breaks and control characters."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))
