"""The Python interface: each function reads as the story of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roastify import bench as benchmark
from roastify import checkpoint, rewrite
from roastify import verify as verification
from roastify.admission import check_convertible, check_has_values, device_of
from roastify.behaviour import check_behaviour
from roastify.bench import BenchOptions, BenchReport
from roastify.config import RoastConfig
from roastify.errors import ConfigError, OutputMismatch, closest
from roastify.graph import emit_graph
from roastify.initial import fill, measure
from roastify.plan import RoastPlan
from roastify.planner import make_plan
from roastify.trace import trace
from roastify.verify import VerifyReport

EMITS = ("model", "graph")


def convert(
    model: nn.Module,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    example_inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str | None = None,
    seed: int | None = None,
    inplace: bool = False,
    emit: str = "model",
) -> nn.Module:
    r"""Return the model with its large weights replaced by views into one small trainable pool.

    A shared tensor becomes :math:`W = \lambda \cdot sign \cdot pool[slot(t)]`, tile `t` by tile. The class, the forward
    signature, hooks, modes and attributes stay. Compression is trained, not free: with `init="match"` the pool starts
    at random; with `init="project"` it starts as the least-squares fit of the model's weights, which at high ratios is
    still far from them.

    Args:
        model: any module with real weights on one device. It is left unchanged, whatever happens, unless `inplace`.
        ratio: parameters of the whole model ÷ parameters stored, at least 1; default: the config's, 10.
        config: a `RoastConfig`, or the path of a TOML file; the other arguments go before it.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments; if given, outputs are
            compared with the original's in train and eval mode, and weights that the model itself writes to are found
            and stay dense.
        include: patterns of tensors or modules that may be shared (exact name, glob or `re:…`).
        exclude: patterns of tensors or modules that stay dense.
        init: `match` (training from scratch) or `project` (pretrained weights).
        seed: of the mapping and of the pool's initial values.
        inplace: convert the model itself instead of a copy.
        emit: `model`, or `graph` for one GraphModule, where that says all that the model's code does.

    Returns:
        the converted model; its pool is the child `roast_pool`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        PlanError: the ratio is unreachable, nothing is eligible, or a pattern matches nothing.
        ConversionError: the model is of a kind that cannot be converted as it stands, or no graph can stand for it.
        SignatureMismatch: the converted model's forward signature differs.
        OutputMismatch: its outputs differ in structure, shape or dtype.
    """
    settings = _settings(config, ratio=ratio, include=include, exclude=exclude, init=init, seed=seed)
    if emit not in EMITS:
        raise ConfigError(f"emit must be one of {', '.join(EMITS)}; found {emit!r}{closest(str(emit), EMITS)}")
    check_convertible(model)
    check_has_values(model)
    forest = trace(model)
    before = verification.observe(model, example_inputs)
    written: dict[str, str] = {}
    while True:
        planned = measure(model, make_plan(model, forest, settings, written), settings.init)
        pool = rewrite.build_pool(planned, device_of(model))
        fill(pool, model, planned, settings.init)
        shared = {id(model.get_parameter(tensor.name)) for tensor in planned.shared}
        target = model if inplace else rewrite.copy_without(model, shared)
        undo = rewrite.apply(target, planned, pool)
        try:
            verification.compare(before, verification.observe(target, example_inputs, who="converted"))
            if emit == "model":
                return target
            graph = emit_graph(target)
            verification.compare(before, verification.observe(graph, example_inputs, who="converted"))
            return graph
        except OutputMismatch as error:
            name = rewrite.refused_write(target, planned, error.__cause__)
            undo()
            if name is None:
                raise
            written[name] = "written to by the model's own code"
        except BaseException:
            undo()
            raise


def plan(
    model: nn.Module,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str | None = None,
    seed: int | None = None,
) -> RoastPlan:
    """Return what `convert` would do, without doing it; the model may be on the meta device.

    Arguments and errors are those of `convert`. On a real model the plan holds λ as well.
    """
    settings = _settings(config, ratio=ratio, include=include, exclude=exclude, init=init, seed=seed)
    check_convertible(model)
    planned = make_plan(model, trace(model), settings)
    return planned if device_of(model).type == "meta" else measure(model, planned, settings.init)


def verify(original: nn.Module, converted: nn.Module, example_inputs: Any = None) -> VerifyReport:
    """Check that the converted model can stand in for the original.

    Compares the forward signatures (parameters, kinds, defaults, annotations) and, given example inputs, the outputs'
    structure, shapes, dtypes and devices in eval and train mode. Then checks that a deep copy and the state dict carry
    everything, and that gradients reach the pool. Both models are left as they were.

    Args:
        original: the dense model.
        converted: what `convert` made of it.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments.

    Raises:
        SignatureMismatch: the forward signatures differ.
        OutputMismatch: the outputs differ, or the converted model fails.
        RoastError: the original fails on the example inputs.
    """
    report = verification.compare(
        verification.observe(original, example_inputs),
        verification.observe(converted, example_inputs, who="converted"),
    )
    return dataclasses.replace(report, behaviour=check_behaviour(original, converted, example_inputs))


def bench(
    model: nn.Module,
    ratio: float | None = None,
    *,
    example_inputs: Any,
    config: RoastConfig | str | Path | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batches: Sequence[int] = (),
    compile: bool = False,
    graph: bool = True,
    train: bool = False,
    seconds: float = 2.0,
    inplace: bool = False,
) -> BenchReport:
    """Measure latency and memory of a model beside its converted twin, in the same run and in turn.

    The dense side is given the weights that the converted model stands for, so both must return the same, within what
    rounding explains; nothing is timed if they do not. Inference runs in eval mode without gradients. On a GPU both are
    replayed from CUDA graphs.

    Args:
        model: as in `convert`; it is left unchanged unless `inplace`.
        ratio: as in `convert`, like `config`, `include`, `exclude`, `init` and `seed`.
        config: settings.
        include: may be shared.
        exclude: stay dense.
        init: `match` or `project`; the time does not depend on it.
        seed: of the conversion.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments, on any device.
        device: `cpu`, `cuda` or `cuda:N`; default: a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`, for the model and floating inputs; default: as they are.
        batches: sizes to bring the example inputs to along their first dimension; default: as they are.
        compile: run both sides under `torch.compile`.
        graph: False: call the models on a GPU from Python, launches included, instead of replaying CUDA graphs.
        train: time a forward and a backward pass in train mode; the pool's gradient is checked too.
        seconds: how long each case is timed, both sides together.
        inplace: use up the model itself instead of a copy: it ends on the device with the converted model's weights.

    Raises:
        ConfigError: an option does not fit, or there are no example inputs.
        BenchError: a model fails, does not compile, or cannot be captured in a CUDA graph.
        OutputMismatch: the two models do not agree.
        PlanError: see `convert`.
        ConversionError: see `convert`.
    """
    settings = _settings(config, ratio=ratio, include=include, exclude=exclude, init=init, seed=seed)
    options = BenchOptions(
        device=benchmark.parse_device(device),
        dtype=benchmark.parse_dtype(dtype),
        batches=tuple(batches),
        compile=compile,
        graph=graph,
        train=train,
        seconds=seconds,
    )
    benchmark.check_inputs(example_inputs, options)
    check_convertible(model)
    check_has_values(model)
    dense = model if inplace else rewrite.copy_without(model, set())
    dense.to(device=options.device, dtype=options.dtype)
    converted = convert(dense, config=settings)
    rewrite.copy_weights(converted, dense)
    return benchmark.measure(dense, converted, example_inputs, options)


def save(model: nn.Module, path: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a converted model as an artifact folder: `roast.json` and `model.safetensors`.

    A save that is killed leaves what was there before whole.

    Args:
        model: what `convert` returned, trained or not.
        path: the folder; made if missing, other files in it stay.
        state_dict: values to write instead of the model's own, under the same keys: those of a sharded model, gathered
            by `torch.distributed.checkpoint.state_dict.get_model_state_dict`.

    Raises:
        ConversionError: the model is not a converted one, or only a part or a wrapper of one.
        CheckpointError: the model holds state that is not a tensor or is sharded, the state dict is another model's, or
            the folder cannot be written.
    """
    checkpoint.write(model, Path(path), state_dict)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Return the artifact's model: a copy of `model`'s structure with everything it stores read from the artifact.

    Args:
        path: an artifact folder.
        model: the dense architecture, on any device, meta included (then the result is on the CPU); it is left as it
            is, and its weights are not used.

    Raises:
        CheckpointError: the artifact is missing, damaged, newer than this version, or of another architecture.
        ConversionError: the model itself cannot be converted (see `convert`).
    """
    artifact = checkpoint.read(Path(path))
    check_convertible(model)
    checkpoint.check_architecture(artifact, model)
    every_tensor = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    target = rewrite.copy_without(model, every_tensor)
    device = device_of(model)
    pool = rewrite.build_pool(artifact.plan, "cpu" if device.type == "meta" else device)
    rewrite.apply(target, artifact.plan, pool)
    checkpoint.fill(artifact, target, pool.weight.device)
    return target


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return a converted model as a dense one: original classes, original state-dict keys, equal outputs.

    Args:
        model: what `convert` returned, trained or not; left as it is unless `inplace`.
        inplace: change the model itself instead of a copy.

    Raises:
        ConversionError: the model is not a converted one, or it is sharded.
    """
    rewrite.pool_of(model)
    rewrite.refuse_sharded(model)
    target = model if inplace else rewrite.copy_without(model, set())
    rewrite.restore(target)
    return target


def densify_artifact(path: str | Path, output: str | Path) -> int:
    """Write the dense state dict of an artifact as one safetensors file; the model's code is not needed.

    Args:
        path: an artifact folder.
        output: the file to write; one that is there is replaced whole.

    Returns:
        the number of tensors written; tied tensors are written under each of their names.

    Raises:
        CheckpointError: the artifact is missing, damaged or newer than this version, or the file cannot be written.
    """
    return checkpoint.write_dense(checkpoint.read(Path(path)), Path(output))


def _settings(config: RoastConfig | str | Path | None, **arguments: Any) -> RoastConfig:
    if config is None:
        config = RoastConfig()
    elif isinstance(config, str | Path):
        config = RoastConfig.from_toml(config)
    elif not isinstance(config, RoastConfig):
        raise ConfigError(f"config must be a RoastConfig or the path of a TOML file; found {type(config).__name__}")
    return config.replace(**arguments)
