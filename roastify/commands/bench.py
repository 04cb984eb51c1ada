"""The command `bench`."""

from __future__ import annotations

from typing import Any

import click

from roastify import api
from roastify.checks.example_inputs import how_to_time
from roastify.checks.model_bench import DTYPES
from roastify.commands.models import loaded
from roastify.commands.options import artifact_options, config_of, refuse_settings, settings_options
from roastify.commands.output import Output, json_option
from roastify.errors import ConfigError
from roastify.help_text import HelpfulCommand


@click.command(
    cls=HelpfulCommand,
    examples=(
        ("Time the model at ratio 10 beside the dense one.", "roastify bench model.py"),
        (
            "Time an artifact at two batch sizes in bfloat16.",
            "roastify bench out/ --dense model.py --batch 1 --batch 64 --dtype bfloat16",
        ),
        ("Time training steps under torch.compile.", "roastify bench model.py --train --compile"),
    ),
)
@settings_options
@artifact_options
@click.option("--device", metavar="DEVICE", help="Run on cpu, cuda or cuda:N (default: a GPU if there is one).")
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model and floating inputs to this dtype.")
@click.option(
    "--batch", "batches", type=int, multiple=True, help="Repeat or cut the inputs to this batch size. Repeatable."
)
@click.option("--compile", is_flag=True, help="Run both models under torch.compile.")
@click.option("--no-graph", is_flag=True, help="On a GPU, call the models from Python, without CUDA graphs.")
@click.option("--train", is_flag=True, help="Time a forward and a backward pass instead of inference.")
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Time each case for so long.")
@json_option
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
    config, out = config_of(**settings), Output(json_file, source, settings["config"])
    found = loaded(source, dense, digest)
    if found.converted:
        refuse_settings(settings, source)
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
