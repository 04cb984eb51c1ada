"""The command line: the group of all commands, and how it takes arguments and shows errors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import roastify
from roastify.commands.about import doctor, settings
from roastify.commands.bench import bench
from roastify.commands.conversion import check, convert, densify, plan, show
from roastify.commands.training import recover, sweep
from roastify.errors import ConfigError, RoastError, SourceError, closest
from roastify.help_text import HelpfulCommand, OneLineError, in_one_line, say_error, write_examples


class _DefaultCommand(click.Group):
    """A group whose first argument may be a source: `roastify model.py` is `roastify convert model.py`."""

    command_class = HelpfulCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they are used."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, _EXAMPLES)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        front = [argument for argument in args if argument in ("--traceback", "--version")]
        rest = [argument for argument in args if argument not in front]
        with _printable_messages():
            if rest and rest[0] not in self.commands and rest[0] not in ctx.help_option_names:
                self._refuse_misspelling(ctx, rest)
                rest = ["convert", *rest]
            return super().parse_args(ctx, [*front, *rest])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command, or what may be a source."""
        found = super().shell_complete(ctx, incomplete)
        return found or [CompletionItem(incomplete, type="file")]

    def _refuse_misspelling(self, ctx: click.Context, args: list[str]) -> None:
        # A file without its suffix is no command, and its error says more.
        hint = "" if Path(f"{args[0]}.py").is_file() else closest(args[0], self.commands)
        # A shell that completes a line wants no error.
        if hint and args[0].isalpha() and not ctx.resilient_parsing:
            ctx.fail(f"no command {args[0]!r}{hint}; a model is named as file.py, file.py:NAME or hf:DIRECTORY")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _printable_messages():
                return super().invoke(ctx)
        except RoastError as error:
            if ctx.params.get("traceback"):
                raise
            say_error(str(error))
            ctx.exit(2 if isinstance(error, ConfigError | SourceError) else 1)


@contextlib.contextmanager
def _printable_messages() -> Iterator[None]:
    """Let wrong usage and warnings be lines without control characters, whatever paths and names they quote."""
    own = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> str:
        text = in_one_line(str(message))
        # Where in roastify's code a warning to users was raised tells them nothing.
        return f"warning: {text}\n" if category is UserWarning else own(text, category, *rest, **more)

    warnings.formatwarning = formatted
    try:
        yield
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            raise
        raise OneLineError(error) from None
    finally:
        warnings.formatwarning = own


_EXAMPLES = (
    ("Convert at ratio 50, verify and report; with -o, write the artifact.", "roastify model.py --ratio 50 -o out/"),
    ("See first what would be shared.", "roastify plan hf:folder --ratio 10"),
    ("Measure the converted model beside the dense one.", "roastify bench model.py --ratio 10"),
)


@click.group(cls=_DefaultCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(roastify.__version__, prog_name="roastify")
@click.option("--traceback", is_flag=True, help="Show Python's traceback with an error.")
def main(traceback: bool) -> None:
    """Convert a PyTorch model into one whose large weights share a small trainable pool.

    SOURCE is file.py, file.py:NAME (a module, a class or a function), hf:DIRECTORY, hf:CONFIG.json, hf:HUB-NAME,
    timm:NAME or torchvision:NAME. A NAME in a file, of timm or of torchvision may have keyword arguments after
    commas, as file.py:build,width=64 or timm:resnet18,pretrained=true. Where a converted model is wanted, SOURCE is the
    folder of an artifact, or one that save_pretrained wrote. Without a command, a source is converted.
    """


# In the order in which help shows them.
for _command in (convert, plan, show, check, bench, recover, sweep, densify, settings, doctor):
    main.add_command(_command)
