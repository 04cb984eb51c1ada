"""The commands `convert`, `plan`, `check`, `show` and `densify`: a model, its artifact, and what is in both."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from roastify import api, report
from roastify.artifact import check_replaceable, read_artifact, write_artifact
from roastify.checks.interface import compare_interfaces, observe
from roastify.commands.models import compared, loaded, loaded_dense, saved
from roastify.commands.options import (
    artifact_options,
    complete_source,
    config_of,
    for_source,
    refuse_settings,
    settings_options,
)
from roastify.commands.output import Output, check_folder, json_option
from roastify.conversion.converted import pool_of, pools_in
from roastify.errors import ConfigError
from roastify.files import digest_of_file
from roastify.help_text import HelpfulCommand
from roastify.integrations.pretrained_folder import PLAN_FILE, read_plan_file
from roastify.manifest import MANIFEST
from roastify.plan_table import plan_table
from roastify.recovery.checkpoint import remove_checkpoint
from roastify.source import is_artifact, load_source, pretrained_folder


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Convert at ratio 50, verify and report.", "roastify model.py --ratio 50"),
        ("Write the artifact of a pretrained model.", "roastify hf:folder --ratio 10 -o out/"),
        (
            "Keep one layer dense, and use a function that builds the model.",
            "roastify model.py:build_model --exclude head -o out/",
        ),
    ),
)
@settings_options
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Write the artifact to this folder.")
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
@click.option(
    "--signature-only",
    is_flag=True,
    help="Compare the forward signatures alone and run neither model, if memory holds one of them only.",
)
@json_option
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
    config, out = config_of(**settings), Output(json_file, source, settings["config"])
    if output is not None:
        check_folder(output, source)
    found = loaded_dense(source)
    config = for_source(config, found)
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
        verified = compared(found, converted, out)
    if output is not None:
        saved(converted, output, found, files, out)
        if resume is not None:
            remove_checkpoint(Path(resume))
    else:
        out.say("nothing written; give -o FOLDER for the artifact")
    out.finish({"artifact": output, "plan": planned.to_dict(), "verification": verified.to_dict()})


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Show what ratio 50 would share and keep.", "roastify plan model.py --ratio 50"),
        ("Show every tensor of a model that is built from its config.", "roastify plan hf:config.json --all"),
        ("Give the plan to another program.", "roastify plan model.py --json plan.json"),
    ),
)
@settings_options
@json_option
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
def plan(source: str, json_file: str | None, full: bool, **settings: Any) -> None:
    """Show what would be shared, kept and tied, and why.

    Nothing is converted. For an artifact, show says what was shared.
    """
    config, out = config_of(**settings), Output(json_file, source, settings["config"])
    found = loaded_dense(source)
    planned = api.plan(found.model, config=for_source(config, found))
    out.show(plan_table(planned, full))
    out.finish(planned.to_dict())


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Show what is in an artifact.", "roastify show out/"),
        ("Show every tensor, if the artifact is the one that is meant.", "roastify show out/ --all --digest SHA256"),
    ),
)
@click.argument("source", shell_complete=complete_source)
@click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")
@json_option
@click.option("--all", "full", is_flag=True, help="Show a line for every tensor.")
def show(source: str, digest: str | None, json_file: str | None, full: bool) -> None:
    """Show what is in an artifact.

    That is how its model is built, its files, versions and digest, and its tensors.

    SOURCE is the folder of an artifact, or the source of a model that is converted. The model's code is not run for an
    artifact, nor for a folder that save_pretrained wrote.
    """
    out = Output(json_file, source)
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


@click.command(
    cls=HelpfulCommand,
    examples=(
        (
            "Check that a conversion at ratio 10 can replace the model.",
            "roastify check model.py:build_model --ratio 10",
        ),
        ("Check an artifact of a model of your own.", "roastify check out/ --dense model.py"),
    ),
)
@settings_options
@artifact_options
@json_option
def check(source: str, dense: str | None, digest: str | None, json_file: str | None, **settings: Any) -> None:
    """Convert, and compare with the original; for CI.

    The exit code is 0 if signature and outputs are those of the original, and 1 otherwise. An artifact is loaded and
    compared with its dense form.
    """
    config, out = config_of(**settings), Output(json_file, source, settings["config"])
    found = loaded(source, dense, digest)
    if found.converted:
        refuse_settings(settings, source)
        planned, original, converted = pool_of(found.model).plan, api.densify(found.model), found.model
    else:
        converted, original = api.convert(found.model, config=for_source(config, found)), found.model
        planned = pool_of(converted).plan
    verified = compared(found, converted, out, original)
    out.say(f"ok: {source}" + ("" if found.converted else f" at ratio {planned.ratio:g}"))
    out.finish({"source": source, "ratio": planned.ratio, "verification": verified.to_dict()})


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Write one file.", "roastify densify out/ -o dense.safetensors"),
        ("Write files of at most 5 GB that transformers reads.", "roastify densify out/ -o folder/ --shard-size 5GB"),
    ),
)
@click.argument("source", shell_complete=complete_source)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="Write to this .safetensors file, or folder of shards.",
)
@click.option("--shard-size", metavar="SIZE", help="Write shards of at most this size to a folder, as 5GB.")
@click.option("--digest", metavar="SHA256", help="Refuse an artifact whose roast.json has another SHA-256.")
@json_option
def densify(source: str, output: str, shard_size: str | None, digest: str | None, json_file: str | None) -> None:
    """Turn an artifact back into a plain state dict.

    Memory holds the pool and one dense tensor at a time. SOURCE is the folder of an artifact; or the source of a model
    that is converted (as what save_pretrained wrote), which needs a temporary artifact on the disk.
    """
    size, out = None if shard_size is None else _number_of_bytes(shard_size), Output(json_file, source, output)
    with contextlib.ExitStack() as stack:
        artifact = source
        is_model = ":" in source or source.endswith(".py") or pretrained_folder(source) is not None
        if not is_artifact(source) and is_model:
            found = loaded(source, digest=digest)
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
