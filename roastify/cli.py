"""The command line: click commands that call the Python interface and print what it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch
from click.shell_completion import CompletionItem
from torch import nn

import roastify
from roastify import api, report
from roastify.artifact import check_no_part, check_replaceable, read_artifact, write_artifact
from roastify.checks.example_inputs import find_inputs, how_to_give, how_to_time
from roastify.checks.interface import compare_interfaces, observe
from roastify.checks.model_bench import DTYPES, parse_device
from roastify.config import Init, RoastConfig, Share
from roastify.conversion.converted import pool_of, pools_in
from roastify.errors import ConfigError, RoastError, SourceError, closest
from roastify.files import check_writable, digest_of_file, write_json
from roastify.help_text import HelpfulCommand, OneLineError, in_one_line, say_error, write_examples
from roastify.integrations.pretrained_folder import PLAN_FILE, read_plan_file
from roastify.kernels.backend import backend
from roastify.manifest import MANIFEST
from roastify.plan_table import plan_table
from roastify.printable import printable
from roastify.progress import working
from roastify.ratio_sweep import RATIOS, STEPS, check_plot
from roastify.recovery.checkpoint import remove_checkpoint
from roastify.recovery.options import RecoverOptions, Schedule
from roastify.source import Source, is_artifact, load_data, load_source, pretrained_folder
from roastify.text_layout import human_bytes, named_lines


def _complete_source(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a source as a file."""
    return [CompletionItem(incomplete, type="file")]


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


class _Output:
    """What a command shows: tables and lines for people, and with --json the same as JSON for programs.

    With `--json -`, standard output has the JSON alone, and what the command says goes to standard error.

    Args:
        file: what --json names.
        inputs: what the command reads, which the file must not replace.
    """

    def __init__(self, file: str | None, *inputs: str | None) -> None:
        self.file = file
        if file not in (None, "-"):
            _check_file(str(file), *inputs)

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


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that every command has for programs."""
    kind = click.Path(dir_okay=False, allow_dash=True)
    text = "Write the result as JSON to this file; without a file, or with -, to standard output instead of tables."
    return click.option("--json", "json_file", metavar="FILE", is_flag=False, flag_value="-", type=kind, help=text)(
        command
    )


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


# What `_settings_options` adds besides SOURCE.
_SETTINGS = ("ratio", "config", "include", "exclude", "share", "init", "fold", "seed")


def _settings_options(command: Callable[..., None], *, with_ratio: bool = True) -> Callable[..., None]:
    """Add the options that every command with a model has."""
    ratio = click.option(
        "--ratio", metavar="NUMBER", help="Store this many times fewer parameters, of the whole model (default: 10)."
    )
    options = [
        click.argument("source", shell_complete=_complete_source),
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


def _artifact_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for a source that is an artifact."""
    dense = click.option(
        "--dense", metavar="SOURCE", help="Take the dense model from here, if an artifact does not name its code."
    )
    return dense(
        click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")(
            command
        )
    )


def _refuse_settings(settings: dict[str, Any], source: str) -> None:
    """Raise `ConfigError` if settings of a conversion are given for what is converted."""
    given = ", ".join(f"--{name}" for name, value in settings.items() if value not in (None, ()))
    if given:
        raise ConfigError(f"{given} cannot be given with {source}, which is converted already; leave out {given}")


def _config(
    ratio: str | None,
    config: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    fold: str | None = None,
    **rest: Any,
) -> RoastConfig:
    settings = RoastConfig() if config is None else RoastConfig.from_toml(config)
    return settings.replace(
        ratio=None if ratio is None else _parse_ratio(ratio),
        include=include or None,
        exclude=exclude or None,
        fold=int(fold) if fold is not None and fold.isdecimal() else fold,
        **rest,
    )


def _for_source(config: RoastConfig, found: Source) -> RoastConfig:
    """Return the settings for a source: pretrained weights are kept, unless the user says otherwise."""
    return config.replace(init="project") if config.init == "auto" and found.pretrained else config


def _ratio_in(text: str) -> float:
    """Return a ratio that is written as `50`, or as `50x`."""
    return float(text.removesuffix("x").removesuffix("×"))


def _parse_ratio(text: str) -> float:
    try:
        return _ratio_in(text)
    except ValueError:
        wanted = "expected one as 50, which stores a fiftieth of the parameters"
        raise click.BadParameter(f"{text!r} is not a number; {wanted}", param_hint="'--ratio'") from None


@main.command(
    examples=(
        ("Convert at ratio 50, verify and report.", "roastify model.py --ratio 50"),
        ("Write the artifact of a pretrained model.", "roastify hf:folder --ratio 10 -o out/"),
        (
            "Keep one layer dense, and use a function that builds the model.",
            "roastify model.py:build_model --exclude head -o out/",
        ),
    )
)
@_settings_options
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Write the artifact to this folder.")
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
@click.option(
    "--signature-only",
    is_flag=True,
    help="Compare the forward signatures alone and run neither model, if memory holds one of them only.",
)
@_json_option
@click.option(
    "--resume",
    type=click.Path(file_okay=False),
    help="Keep progress in this folder, and go on from it after an interrupt; -o removes it in the end.",
)
def convert(
    source: str,
    output: str | None,
    full: bool,
    signature_only: bool,
    resume: str | None,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Convert, verify, report and write the artifact (the default).

    With example inputs, both models run, and their outputs must have the same structure, shapes and dtypes. The weights
    of the original stay as they are.
    """
    config, out = _config(**settings), _Output(json_file, source, settings["config"])
    if output is not None:
        _check_folder(output, source)
    found = _load_dense(source)
    config = _for_source(config, found)
    files = found.files() if output is not None else {}
    if output is not None:
        check_replaceable(Path(output), files)
    # Running both models needs both.
    before = observe(found.model)
    converted = api.convert(found.model, config=config, inplace=signature_only, resume=resume)
    planned = pool_of(converted).plan
    out.show(plan_table(planned, full))
    if signature_only:
        verified = compare_interfaces(before, observe(converted, who="converted"))
        out.show(verified)
    else:
        verified = _verify(found, converted, out)
    if output is not None:
        _save(converted, output, found, files, out)
        if resume is not None:
            remove_checkpoint(Path(resume))
    else:
        out.say("nothing written; give -o FOLDER for the artifact")
    out.finish({"artifact": output, "plan": planned.to_dict(), "verification": verified.to_dict()})


def _save(converted: nn.Module, output: str, found: Source, files: Mapping[str, bytes], out: _Output) -> None:
    """Write the artifact with the source's config and tokenizer, and say how it is loaded."""
    for pool in pools_in(converted):
        pool.builder = pool.builder or found.builder
    replaced = " in the place of the artifact that was there" if is_artifact(output) else ""
    builder = write_artifact(converted, Path(output), files=files)
    copied = f", with {', '.join(files)}" if files else ""
    out.say(f"written to {output}{replaced}{copied}")
    model = "" if builder else ", model=…"
    out.say(f'load it with roastify.load("{output}"{model})')


@main.command(
    examples=(
        ("Show what ratio 50 would share and keep.", "roastify plan model.py --ratio 50"),
        ("Show every tensor of a model that is built from its config.", "roastify plan hf:config.json --all"),
        ("Give the plan to another program.", "roastify plan model.py --json plan.json"),
    )
)
@_settings_options
@_json_option
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
def plan(source: str, json_file: str | None, full: bool, **settings: Any) -> None:
    """Show what would be shared, kept and tied, and why.

    Nothing is converted. For an artifact, show says what was shared.
    """
    config, out = _config(**settings), _Output(json_file, source, settings["config"])
    found = _load_dense(source)
    planned = api.plan(found.model, config=_for_source(config, found))
    out.show(plan_table(planned, full))
    out.finish(planned.to_dict())


@main.command(
    examples=(
        ("Show what is in an artifact.", "roastify show out/"),
        ("Show every tensor, if the artifact is the one that is meant.", "roastify show out/ --all --digest SHA256"),
    )
)
@click.argument("source", shell_complete=_complete_source)
@click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")
@_json_option
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
def show(source: str, digest: str | None, json_file: str | None, full: bool) -> None:
    """Show what is in an artifact.

    That is how its model is built, its files, versions and digest, and its tensors.

    SOURCE is the folder of an artifact, or the source of a model that is converted. The model's code is not run for an
    artifact, nor for a folder that save_pretrained wrote.
    """
    out = _Output(json_file, source)
    values: dict[str, Any] = {}
    lines = None
    if is_artifact(source):
        read = read_artifact(Path(source), digest)
        plans = list(read.plans)
        values = {"folder": source, "digest": digest_of_file(Path(source) / MANIFEST)}
        values |= {key: read.manifest.get(key) for key in ("format_version", "mapping_version", "builder", "files")}
        lines = report.artifact_lines(read, values["digest"])
    elif digest is None and (folder := pretrained_folder(source)) is not None:
        plans = list(read_plan_file(folder / PLAN_FILE).plans)
        values = {"folder": str(folder)}
    else:
        plans = [pool.plan for pool in pools_in(load_source(source, digest=digest).model)]
        if not plans:
            raise ConfigError(f"{source} is a dense model; roastify plan shows what a conversion would share and keep")
    tables = [plan_table(each, full) for each in plans]
    for part in [lines, *tables] if lines else tables:
        out.show(part)
        out.show("")
    out.finish({**values, "plans": [each.to_dict() for each in plans]})


@main.command(
    examples=(
        (
            "Check that a conversion at ratio 10 can replace the model.",
            "roastify check model.py:build_model --ratio 10",
        ),
        ("Check an artifact of a model of your own.", "roastify check out/ --dense model.py"),
    )
)
@_settings_options
@_artifact_options
@_json_option
def check(source: str, dense: str | None, digest: str | None, json_file: str | None, **settings: Any) -> None:
    """Convert, and compare with the original; for CI.

    The exit code is 0 if signature and outputs are those of the original, and 1 otherwise. An artifact is loaded and
    compared with its dense form.
    """
    config, out = _config(**settings), _Output(json_file, source, settings["config"])
    found = _load(source, dense, digest)
    if found.converted:
        _refuse_settings(settings, source)
        planned, original, converted = pool_of(found.model).plan, api.densify(found.model), found.model
    else:
        converted, original = api.convert(found.model, config=_for_source(config, found)), found.model
        planned = pool_of(converted).plan
    verified = _verify(found, converted, out, original)
    out.say(f"ok: {source}" + ("" if found.converted else f" at ratio {planned.ratio:g}"))
    out.finish({"source": source, "ratio": planned.ratio, "verification": verified.to_dict()})


def _check_file(output: str, *inputs: str | None) -> None:
    """Refuse a file that cannot be written, or that the command reads, before work that takes long."""
    check_writable(output, inputs)
    check_no_part(Path(output))


def _check_folder(output: str, source: str) -> None:
    """Refuse a folder in which a save would overwrite other files, before work that takes long."""
    folder = Path(output)
    scheme, _, directory = source.partition(":")
    if scheme == "hf" and folder.is_dir() and Path(directory).is_dir() and folder.samefile(directory):
        raise ConfigError(f"{output} is the folder of {source}, whose weights would be lost; name another folder")
    check_replaceable(folder)


def _verify(
    found: Source, converted: nn.Module, out: _Output, original: nn.Module | None = None
) -> roastify.VerifyReport:
    """Verify with the source's example inputs or, where it has none, with guessed ones; show and return the report."""
    original = found.model if original is None else original
    inputs = found.example_inputs if found.example_inputs is not None else find_inputs(original)
    with working("comparing both models"):
        verified = api.verify(original, converted, inputs)
    out.show(verified)
    if inputs is None:
        out.say(how_to_give(found.name))
    return verified


@main.command(
    examples=(
        ("Time the model at ratio 10 beside the dense one.", "roastify bench model.py"),
        (
            "Time an artifact at two batch sizes in bfloat16.",
            "roastify bench out/ --dense model.py --batch 1 --batch 64 --dtype bfloat16",
        ),
        ("Time training steps under torch.compile.", "roastify bench model.py --train --compile"),
    )
)
@_settings_options
@_artifact_options
@click.option("--device", metavar="DEVICE", help="Run on cpu, cuda or cuda:N (default: a GPU if there is one).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model and floating inputs to this dtype.")
@click.option(
    "--batch", "batches", type=int, multiple=True, help="Repeat or cut the inputs to this batch size. Repeatable."
)
@click.option("--compile", is_flag=True, help="Run both models under torch.compile.")
@click.option("--no-graph", is_flag=True, help="On a GPU, call the models from Python, without CUDA graphs.")
@click.option("--train", is_flag=True, help="Time a forward and a backward pass instead of inference.")
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Time each case for so long.")
@_json_option
def bench(
    source: str,
    dense: str | None,
    digest: str | None,
    device: str | None,
    dtype: str | None,
    batches: tuple[int, ...],
    compile: bool,
    no_graph: bool,
    train: bool,
    seconds: float,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Measure latency and memory beside the dense model.

    Outputs are compared first. An artifact is measured beside its dense form.
    """
    config, out = _config(**settings), _Output(json_file, source, settings["config"])
    found = _load(source, dense, digest)
    if found.converted:
        _refuse_settings(settings, source)
    if found.example_inputs is None:
        raise ConfigError(how_to_time(source, found.model))
    measured = api.bench(
        found.model,
        config=None if found.converted else config,
        example_inputs=found.example_inputs,
        device=device,
        dtype=dtype,
        batches=batches,
        compile=compile,
        graph=not no_graph,
        train=train,
        seconds=seconds,
        inplace=True,
    )
    out.show(measured)
    out.finish(measured.to_dict())


def _recover_options(
    command: Callable[..., None], *, leave_out: Sequence[str] = (), steps: int = RecoverOptions.steps
) -> Callable[..., None]:
    """Add an option for every setting of a recovery that has a flag, without those that a command does not have."""
    types = {"int": int, "float": float, "float | None": float}
    for setting in reversed(dataclasses.fields(RecoverOptions)):
        flag, meaning = setting.metadata["flag"], setting.metadata["meaning"]
        options: dict[str, Any] = {"help": meaning[0].upper() + meaning[1:].replace("`", "") + "."}
        if not flag or setting.name in leave_out:
            continue
        if setting.type == "bool":
            options |= {"is_flag": True}
        elif setting.type == "Schedule":
            options |= {"type": click.Choice(get_args(Schedule)), "default": setting.default, "show_default": True}
        elif setting.default is None:
            options |= {"multiple": True, "metavar": "PATTERN"}
        else:
            default = steps if setting.name == "steps" else setting.default
            options |= {"type": types[str(setting.type)], "default": default, "show_default": True}
        command = click.option(flag, setting.name, **options)(command)
    return command


@main.command(
    examples=(
        (
            "Convert a pretrained model and train it for 1,000 steps.",
            "roastify recover hf:folder --ratio 10 --data data.py -o out/",
        ),
        ("Go on after an interrupt.", "roastify recover hf:folder --ratio 10 --data data.py -o out/ --resume"),
        ("Train an artifact further.", "roastify recover out/ --dense hf:folder --data data.py -o better/"),
    )
)
@_settings_options
@click.option(
    "--data", required=True, metavar="FILE", help="Take batches from data in this Python file, or from file.py:NAME."
)
@click.option(
    "--artifact", type=click.Path(file_okay=False), help="Recover this converted model, not a new conversion."
)
@click.option("--dense", metavar="SOURCE", help="Learn from this dense pretrained model, if SOURCE is converted.")
@click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False),
    help="Write the artifact and checkpoints to this folder.",
)
@_recover_options
@click.option(
    "--align",
    type=int,
    help=f"Align layers first, in so many steps (default: {RecoverOptions.align}; 0 with --artifact).",
)
@click.option(
    "--loss", "loss_name", metavar="NAME", help="Add the output of this name, the task's loss, for example loss."
)
@click.option("--device", metavar="DEVICE", help="Run on cpu, cuda or cuda:N (default: a GPU if there is one).")
@click.option("--bfloat16", is_flag=True, help="Run both models under autocast.")
@_json_option
def recover(
    source: str,
    data: str,
    artifact: str | None,
    dense: str | None,
    digest: str | None,
    output: str,
    logits: tuple[str, ...],
    features: tuple[str, ...],
    loss_name: str | None,
    device: str | None,
    bfloat16: bool,
    json_file: str | None,
    align: int | None,
    **options: Any,
) -> None:
    """Bring a converted pretrained model back by training.

    Its layers are aligned first; then it learns the dense model's outputs. No labels are needed. SOURCE is the dense
    pretrained model, or the folder of a converted model, whose dense model --dense names: an artifact, or what
    save_pretrained wrote. The data file may also define inputs(batch), loss_fn(outputs, batch) and evaluate(model).
    """
    settings = {name: options.pop(name) for name in _SETTINGS}
    source, artifact = _dense_and_artifact(source, dense, artifact)
    # torchrun gives each process its numbers, and each its own GPU.
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")
    place = parse_device(f"cuda:{local}" if device is None and local and torch.cuda.is_available() else device)
    out = _Output(json_file, source, settings["config"], data)
    _check_folder(output, source)
    batches = load_data(data)
    found = _load(source)
    files = found.files()
    check_replaceable(Path(output), files)
    student = _student(found, artifact, digest, settings).to(place)
    recovered = api.recover(
        student,
        found.model.to(place),
        batches.data,
        logits=logits or None,
        features=features or None,
        loss_fn=loss_name or batches.loss_fn,
        inputs=batches.inputs,
        evaluate=batches.evaluate,
        autocast=torch.bfloat16 if bfloat16 else None,
        folder=Path(output) / "recovery",
        # An artifact may hold a trained pool, and alignment would discard the training.
        align=align if align is not None else RecoverOptions.align if artifact is None else 0,
        **options,
    )
    if rank != "0":
        return
    out.show(recovered)
    _save(student, output, found, files, out)
    out.finish(recovered.to_dict())


def _dense_and_artifact(source: str, dense: str | None, artifact: str | None) -> tuple[str, str | None]:
    """Return the source of the teacher, and the student's artifact: `SOURCE` may be the one or the other."""
    if not is_artifact(source) and pretrained_folder(source) is None:
        if dense is not None:
            raise ConfigError(
                f"--dense names the dense model of a folder with a converted one, and {source} is none; leave it out"
            )
        return source, artifact
    if artifact is not None:
        raise ConfigError(
            f"{source} is converted already, and --artifact names another converted model; give the dense model as "
            f"SOURCE"
        )
    if dense is None:
        raise ConfigError(
            f"{source} is converted already, and a recovery needs the dense pretrained model as its teacher; name it "
            f"with --dense, as in: roastify recover {source} --dense hf:DIRECTORY …"
        )
    return dense, source


def _student(found: Source, artifact: str | None, digest: str | None, settings: dict[str, Any]) -> nn.Module:
    """Return the artifact's model, or without an artifact the converted source."""
    if artifact is None:
        if digest is not None:
            raise ConfigError("--digest is the digest of an artifact; give --artifact too, or leave --digest out")
        config = _config(**{**settings, "init": settings["init"] or "project"})
        return api.convert(found.model, config=config)
    _refuse_settings(settings, artifact)
    if pretrained_folder(artifact) is not None:
        return _load(artifact, digest=digest).model
    return api.load(artifact, model=found.model, digest=digest)


@main.command(
    examples=(
        (
            "Recover a pretrained model briefly at three ratios.",
            "roastify sweep hf:folder --data data.py --ratios 3,10,30",
        ),
        (
            "Name the highest ratio within 1 % of the dense model, and draw all.",
            "roastify sweep model.py --data data.py --within 1% --plot sweep.png",
        ),
    )
)
@functools.partial(_settings_options, with_ratio=False)
@click.option(
    "--data", required=True, metavar="FILE", help="Take batches from data in this Python file, or from file.py:NAME."
)
@click.option(
    "--ratios",
    metavar="LIST",
    default=",".join(f"{ratio:g}" for ratio in RATIOS),
    show_default=True,
    help="Try these ratios, with commas between them.",
)
@click.option("--within", metavar="PERCENT", help="Name the highest ratio that is as near to the dense model, as 1%.")
@click.option("--metric", metavar="NAME", help="Compare this number, if evaluate returns several.")
@click.option("--lower-is-better", is_flag=True, help="Take what evaluate returns for a loss.")
@functools.partial(_recover_options, leave_out=("folder", "resume", "save_every", "evaluate_every"), steps=STEPS)
@click.option(
    "--align", type=int, default=RecoverOptions.align, show_default=True, help="Align layers first, in so many steps."
)
@click.option(
    "--loss", "loss_name", metavar="NAME", help="Add the output of this name, the task's loss, for example loss."
)
@click.option("--device", metavar="DEVICE", help="Run on cpu, cuda or cuda:N (default: a GPU if there is one).")
@click.option("--bfloat16", is_flag=True, help="Recover or train under autocast.")
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Time each ratio for so long.")
@click.option("--no-graph", is_flag=True, help="On a GPU, time calls from Python, without CUDA graphs.")
@_json_option
@click.option(
    "--plot", "plot_file", type=click.Path(dir_okay=False), help="Draw the report in this file, as sweep.png."
)
def sweep(
    source: str,
    data: str,
    ratios: str,
    within: str | None,
    metric: str | None,
    lower_is_better: bool,
    logits: tuple[str, ...],
    features: tuple[str, ...],
    loss_name: str | None,
    device: str | None,
    bfloat16: bool,
    seconds: float,
    no_graph: bool,
    json_file: str | None,
    plot_file: str | None,
    **options: Any,
) -> None:
    """Compare several ratios: quality, size, arithmetic, latency.

    At each ratio the model is recovered or trained briefly. A source with pretrained weights is recovered (with --init
    project, any source). Others are trained from scratch, and so is the dense model; then the data file must define
    loss_fn(outputs, batch) and evaluate(model). With --within the exit code is 1 if no ratio is as good.
    """
    settings = {name: options.pop(name) for name in _SETTINGS if name != "ratio"}
    asked, part = _parse_ratios(ratios), None if within is None else _parse_part(within)
    config = _config(ratio=str(max(asked)), **settings)
    out = _Output(json_file, source, settings["config"], data)
    if plot_file is not None:
        _check_file(plot_file, source, settings["config"], data)
        check_plot(plot_file)
    place = parse_device(device)
    batches = load_data(data)
    found = _load_dense(source)
    pretrained = _for_source(config, found).init == "project"
    loss_fn = loss_name or batches.loss_fn
    if not pretrained and (loss_fn is None or batches.evaluate is None):
        raise ConfigError(
            f"{source} has no pretrained weights, so it is trained from scratch, and {data} must define "
            f"loss_fn(outputs, batch) and evaluate(model) for that; with --init project its weights count as pretrained"
        )
    swept = roastify.sweep(
        found.model.to(place),
        batches.data,
        asked,
        config=config,
        init="project" if pretrained else "match",
        example_inputs=found.example_inputs,
        metric=metric,
        lower_is_better=lower_is_better,
        seconds=seconds,
        graph=not no_graph,
        logits=logits or None,
        features=features or None,
        loss_fn=loss_fn,
        inputs=batches.inputs,
        evaluate=batches.evaluate,
        autocast=torch.bfloat16 if bfloat16 else None,
        **options,
    )
    out.show(swept)
    out.finish(swept.to_dict())
    if plot_file is not None:
        swept.plot(plot_file)
        out.say(f"drawn in {plot_file}")
    if part is None:
        return
    best = swept.within(part)
    bound = f"within {within} of the dense model's {swept.quality}, {swept.dense.quality:.4g}"
    if batches.evaluate is None:
        bound = f"with an {swept.quality} of at most {within}"
    if best is None:
        near = swept.nearest()
        raise RoastError(
            f"no ratio of {ratios} is {bound}; the nearest, ratio {near.ratio:g}, has {near.quality:.4g}; try lower "
            f"ratios, more --steps or another --lr"
        )
    out.say(f"ratio {best.ratio:g} is the highest {bound}: it has {best.quality:.4g}")


def _parse_ratios(text: str) -> list[float]:
    try:
        return [_ratio_in(ratio.strip()) for ratio in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers such as 3,10,30", param_hint="'--ratios'"
        ) from None


def _parse_part(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a percentage such as 1%", param_hint="'--within'")
    return float(found[1]) / 100


@main.command(
    examples=(
        ("Write one file.", "roastify densify out/ -o dense.safetensors"),
        ("Write files of at most 5 GB that transformers reads.", "roastify densify out/ -o folder/ --shard-size 5GB"),
    )
)
@click.argument("source", shell_complete=_complete_source)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="Write to this .safetensors file, or folder of shards.",
)
@click.option("--shard-size", metavar="SIZE", help="Write shards of at most this size to a folder, as 5GB.")
@click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")
@_json_option
def densify(source: str, output: str, shard_size: str | None, digest: str | None, json_file: str | None) -> None:
    """Turn an artifact back into a plain state dict.

    Memory holds the pool and one dense tensor at a time. SOURCE is the folder of an artifact; or the source of a model
    that is converted (as what save_pretrained wrote), which needs a temporary artifact on the disk.
    """
    size, out = None if shard_size is None else _number_of_bytes(shard_size), _Output(json_file, source, output)
    with contextlib.ExitStack() as stack:
        artifact = source
        is_model = ":" in source or source.endswith(".py") or pretrained_folder(source) is not None
        if not is_artifact(source) and is_model:
            found = _load(source, digest=digest)
            artifact = stack.enter_context(tempfile.TemporaryDirectory())
            write_artifact(found.model, Path(artifact), files=found.files())
        count = api.densify_artifact(artifact, output, digest=digest, shard_size=size)
    out.say(f"{count} tensors written to {output}")
    out.finish({"output": output, "tensors": count})


def _number_of_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--shard-size must be a size as 500MB or 5GB; found {text!r}")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " "))


@main.command(
    examples=(
        ("Write a file of settings to edit.", "roastify settings > my.toml"),
        ("Convert with it.", "roastify model.py --config my.toml"),
    )
)
@_json_option
def settings(json_file: str | None) -> None:
    """Print every setting with its default and meaning, as TOML.

    What is printed is a file for --config.
    """
    out = _Output(json_file)
    if json_file != "-":
        click.echo((importlib.resources.files("roastify") / "configs" / "default.toml").read_text("utf-8"), nl=False)
    out.finish(RoastConfig().to_dict())


@main.command(
    examples=(
        ("See whether a GPU is used.", "roastify doctor"),
        ("Attach them to a report of a problem.", "roastify doctor --json doctor.json"),
    )
)
@_json_option
def doctor(json_file: str | None) -> None:
    """Show versions, devices and the backend in use."""
    out = _Output(json_file)
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


def _load(source: str, dense: str | None = None, digest: str | None = None) -> Source:
    with working(f"loading {source}"):
        return load_source(source, dense=dense, digest=digest)


def _load_dense(source: str) -> Source:
    """Load a model that is to be converted.

    Raises:
        ConfigError: it is converted already.
    """
    found = None if is_artifact(source) else _load(source)
    if found is None or found.converted:
        raise ConfigError(
            f"{source} is converted already, and a conversion begins with a dense model; roastify show {source} shows "
            f"what is in it"
        )
    return found
