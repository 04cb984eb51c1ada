"""The commands `recover` and `sweep`, and the options that they share."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch
from torch import nn

import roastify
from roastify import api
from roastify.artifact import check_replaceable
from roastify.checks.model_bench import parse_device
from roastify.commands.models import loaded, loaded_dense, saved
from roastify.commands.options import SETTINGS, config_of, for_source, ratio_in, refuse_settings, settings_options
from roastify.commands.output import Output, check_file, check_folder, json_option
from roastify.errors import ConfigError, RoastError
from roastify.help_text import HelpfulCommand
from roastify.ratio_sweep import RATIOS, STEPS, check_plot
from roastify.recovery.options import RecoverOptions, Schedule
from roastify.source import Source, is_artifact, load_data, pretrained_folder


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


@click.command(
    cls=HelpfulCommand,
    examples=(
        (
            "Convert a pretrained model and train it for 1,000 steps.",
            "roastify recover hf:folder --ratio 10 --data data.py -o out/",
        ),
        ("Go on after an interrupt.", "roastify recover hf:folder --ratio 10 --data data.py -o out/ --resume"),
        ("Train an artifact further.", "roastify recover out/ --dense hf:folder --data data.py -o better/"),
    ),
)
@settings_options
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
@json_option
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
    settings = {name: options.pop(name) for name in SETTINGS}
    source, artifact = _dense_and_artifact(source, dense, artifact)
    # torchrun gives each process its numbers, and each its own GPU.
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")
    place = parse_device(f"cuda:{local}" if device is None and local and torch.cuda.is_available() else device)
    out = Output(json_file, source, settings["config"], data)
    check_folder(output, source)
    batches = load_data(data)
    found = loaded(source)
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
    saved(student, output, found, files, out)
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
        config = config_of(**{**settings, "init": settings["init"] or "project"})
        return api.convert(found.model, config=config)
    refuse_settings(settings, artifact)
    if pretrained_folder(artifact) is not None:
        return loaded(artifact, digest=digest).model
    return api.load(artifact, model=found.model, digest=digest)


@click.command(
    cls=HelpfulCommand,
    examples=(
        (
            "Recover a pretrained model briefly at three ratios.",
            "roastify sweep hf:folder --data data.py --ratios 3,10,30",
        ),
        (
            "Name the highest ratio within 1 % of the dense model, and draw all.",
            "roastify sweep model.py --data data.py --within 1% --plot sweep.png",
        ),
    ),
)
@functools.partial(settings_options, with_ratio=False)
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
@json_option
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
    settings = {name: options.pop(name) for name in SETTINGS if name != "ratio"}
    asked, part = _parse_ratios(ratios), None if within is None else _parse_part(within)
    config = config_of(ratio=str(max(asked)), **settings)
    out = Output(json_file, source, settings["config"], data)
    if plot_file is not None:
        check_file(plot_file, source, settings["config"], data)
        check_plot(plot_file)
    place = parse_device(device)
    batches = load_data(data)
    found = loaded_dense(source)
    pretrained = for_source(config, found).init == "project"
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
        return [ratio_in(ratio.strip()) for ratio in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers such as 3,10,30", param_hint="'--ratios'"
        ) from None


def _parse_part(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a percentage such as 1%", param_hint="'--within'")
    return float(found[1]) / 100
