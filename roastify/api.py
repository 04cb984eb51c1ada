"""The Python interface: convert, plan, verify, bench, recover, save, load and densify."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args, overload

import torch
from torch import Tensor, fx, nn

from roastify import artifact
from roastify.builders import builder_from
from roastify.checks.behaviour import check_behaviour
from roastify.checks.interface import VerifyReport, compare_interfaces, observe
from roastify.checks.model_bench import BenchOptions, BenchReport, check_inputs, measure, parse_device, parse_dtype
from roastify.config import Init, RoastConfig
from roastify.conversion.computed_weights import changed_sources, computed_weights, estimate_norms
from roastify.conversion.converted import pools_in, pools_of, refuse_sharded, refused_write, tensors_of_adapters
from roastify.conversion.digests import digest_of_model, digest_of_plan
from roastify.conversion.emitted_graph import emit_graph
from roastify.conversion.fx_pass import trace
from roastify.conversion.initial_values import complete_plan, fill_pool
from roastify.conversion.planner import make_plan
from roastify.conversion.progress_kept import KeptProgress
from roastify.conversion.rewrite import apply_plan, build_pool, copy_weights, copy_without, restore_dense
from roastify.conversion.supported import check_convertible, check_has_values, checked_module, device_of
from roastify.conversion.trained_weights import trained_norms
from roastify.errors import ConfigError, OutputMismatch, closest
from roastify.manifest import builder_in
from roastify.pool.plan import RoastPlan
from roastify.progress import working
from roastify.recovery.options import RecoverOptions
from roastify.recovery.report import RecoveryReport

_M = TypeVar("_M", bound=nn.Module)
_P = ParamSpec("_P")
_S = TypeVar("_S")
_R = TypeVar("_R")
Emit = Literal["model", "graph"]


@overload
def convert(
    model: _M,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    example_inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: Init | None = None,
    seed: int | None = None,
    inplace: bool = False,
    resume: str | Path | None = None,
    emit: Literal["model"] = "model",
    **settings: Any,
) -> _M: ...


@overload
def convert(
    model: nn.Module,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    example_inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: Init | None = None,
    seed: int | None = None,
    inplace: bool = False,
    resume: str | Path | None = None,
    emit: Literal["graph"],
    **settings: Any,
) -> fx.GraphModule: ...


def convert(
    model: nn.Module,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    example_inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: Init | None = None,
    seed: int | None = None,
    inplace: bool = False,
    resume: str | Path | None = None,
    emit: Emit = "model",
    **settings: Any,
) -> nn.Module:
    """Return the model with its large weights replaced by views into one small trainable pool.

    A shared tensor becomes `W = λ · sign · pool[slot(t)]` for each of its tiles `t`. For a large convolution, the pool
    holds the coefficients of a few learned kernels instead (`RoastConfig.kernel_basis`). The class, the forward
    signature, hooks, modes and attributes stay. A converted model must be trained. By default (`init="match"`) the pool
    starts at random, whatever the model's weights are. With `init="project"` it starts as the least-squares fit of the
    model's weights, which at high ratios is still far from them; `recover` trains it further.

    Args:
        model: any module with real weights on one device. It is left unchanged, whatever happens, unless `inplace`.
        ratio: parameters of the whole model ÷ parameters stored, at least 1; default: the config's, 10.
        config: a `RoastConfig`, or the path of a TOML file; the other arguments override it.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. If given, outputs are
            compared with the original's in train and eval mode, and weights that the model itself writes to are found
            and stay dense.
        include: patterns of tensors or modules that may be shared (exact name, glob or `re:…`); `adapters`: those of a
            PEFT model.
        exclude: patterns of tensors or modules that stay dense.
        init: `match` (training from scratch) or `project` (pretrained weights); default: the config's, where `auto` is
            `match`, with a warning if the model's norm layers show that it was trained.
        seed: the seed of the mapping and of the pool's initial values.
        inplace: convert the model itself instead of a copy.
        resume: for huge models with `init="project"`: a folder in which progress is kept every five minutes, and from
            which a conversion goes on that was interrupted, if model and settings are the same. The result has the same
            bits. Delete the folder when the result is saved.
        emit: `model`, or `graph` for one GraphModule if a graph can represent all that the model's code does.
        settings: every other setting of `RoastConfig` by its name: `fold`, `share`, `tile`, …; None: the config's.

    Returns:
        the converted model; its pool is the child `roast_pool`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        PlanError: the ratio is unreachable, nothing is eligible, or a pattern matches nothing.
        ConversionError: the model cannot be converted as it is, or no graph can represent it.
        SignatureMismatch: the converted model's forward signature differs.
        OutputMismatch: its outputs differ in structure, shape or dtype.
        CheckpointError: the folder to resume from is of another model or other settings, damaged, or not writable.
    """
    own = {"ratio": ratio, "include": include, "exclude": exclude, "init": init, "seed": seed}
    asked = _settings(convert, config, own, settings)
    chosen = _with_init(asked)
    if resume is not None and chosen.init != "project":
        raise ConfigError(f'only a conversion with init="project" can be resumed; found init={chosen.init!r}')
    if emit not in get_args(Emit):
        hint = closest(str(emit), get_args(Emit))
        raise ConfigError(f"emit must be one of {', '.join(get_args(Emit))}; found {emit!r}{hint}")
    check_convertible(model)
    check_has_values(model)
    with working("tracing the model"):
        forest = trace(model)
    before, computed = observe(model, example_inputs), computed_weights(model)
    # Tensors that turn out to be unshareable once the model is converted.
    unshareable: dict[str, str] = {}
    while True:
        with working("planning"):
            planned = make_plan(model, forest, chosen, unshareable)
        # If tensors turn out to be unshareable, the plan is another one, and what was kept is of no use.
        progress = None if resume is None or unshareable else _kept_progress(Path(resume), model, planned)
        planned = complete_plan(model, planned, chosen.init, progress)
        pool = build_pool(planned, device_of(model))
        fill_pool(pool, model, planned, chosen.init, progress)
        shared = {id(model.get_parameter(tensor.name)) for tensor in planned.shared}
        trained = trained_norms(model, planned) if asked.init == "auto" else []
        target = model if inplace else copy_without(model, shared)
        restore_dense_layers = apply_plan(target, planned, pool)
        exact = chosen.init == "project" and planned.no_sharing
        restore_norms = (lambda: None) if exact else estimate_norms(target)

        def undo(steps: tuple[Callable[[], None], ...] = (restore_norms, restore_dense_layers)) -> None:
            for step in steps:
                step()

        try:
            changed = changed_sources(computed, target, chosen.init)
            if changed.keys() - unshareable.keys():
                unshareable |= changed
                undo()
                continue
            compare_interfaces(before, observe(target, example_inputs, who="converted"))
            if trained:
                _warn_of_lost_training(trained[0])
            if emit == "model":
                return target
            graph = emit_graph(target)
            compare_interfaces(before, observe(graph, example_inputs, who="converted"))
            return graph
        except OutputMismatch as error:
            name = refused_write(target, planned, error.__cause__)
            undo()
            if name is None:
                raise
            unshareable[name] = "written to by the model's own code"
        except BaseException:
            undo()
            raise


def _warn_of_lost_training(norm: str) -> None:
    warnings.warn(
        f"the model was trained (its norm layer {norm} shows that), and its shared weights now start at random, as for "
        f'training from scratch; pass init="project" (--init project) to start from the model\'s weights, then '
        f'roastify.recover to train them; init="match" says that a random start is meant',
        stacklevel=3,
    )


def _kept_progress(folder: Path, model: nn.Module, planned: RoastPlan) -> KeptProgress:
    """Return what an interrupted conversion kept in the folder, or the beginning of another one."""
    # Here, because most conversions keep nothing.
    from roastify.recovery.checkpoint import holds_checkpoint, read_checkpoint, write_checkpoint

    made_by = {"work": "conversion", "conversion": digest_of_plan(planned), "model": digest_of_model(model)}
    state = read_checkpoint(folder, made_by) if holds_checkpoint(folder) else None
    return KeptProgress(lambda state: write_checkpoint(folder, made_by, state), state)


def plan(
    model: nn.Module,
    ratio: float | None = None,
    *,
    config: RoastConfig | str | Path | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: Init | None = None,
    seed: int | None = None,
    **settings: Any,
) -> RoastPlan:
    """Return what `convert` would do, without doing it; the model may be on the meta device.

    Arguments and errors are those of `convert`. If the model is not on the meta device, the plan holds λ as well.
    """
    own = {"ratio": ratio, "include": include, "exclude": exclude, "init": init, "seed": seed}
    chosen = _with_init(_settings(plan, config, own, settings))
    check_convertible(model)
    with working("tracing and planning"):
        planned = make_plan(model, trace(model), chosen)
    return planned if device_of(model).type == "meta" else complete_plan(model, planned, chosen.init)


def verify(original: nn.Module, converted: nn.Module, example_inputs: Any = None) -> VerifyReport:
    """Check that the converted model can stand in for the original.

    The forward signatures are compared (parameters, kinds, defaults, annotations). With example inputs, the outputs'
    structure, shapes, dtypes and devices are compared in eval and train mode. Then the function checks that a deep copy
    and the state dict hold all values, and that gradients reach the pool. Both models are left unchanged.

    Args:
        original: the dense model.
        converted: what `convert` returned for it.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments.

    Raises:
        SignatureMismatch: the forward signatures differ.
        OutputMismatch: the outputs differ, or the converted model fails.
        ConversionError: one of them is no model.
        RoastError: the original fails on the example inputs.
    """
    for model in (original, converted):
        checked_module(model)
    report = compare_interfaces(
        observe(original, example_inputs),
        observe(converted, example_inputs, who="converted"),
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
    init: Init | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batches: Sequence[int] = (),
    compile: bool = False,
    graph: bool = True,
    train: bool = False,
    seconds: float = 2.0,
    inplace: bool = False,
    **settings: Any,
) -> BenchReport:
    """Measure latency and memory of a model beside its converted twin, in the same run and in turn.

    The dense model is given the weights that the converted model represents, so both must return the same outputs up to
    rounding. If they do not, nothing is timed. Inference runs in eval mode without gradients. On a GPU both models are
    replayed from CUDA graphs.

    Args:
        model: as in `convert`, or what `convert` or `load` returned: then it is measured beside its dense form, and
            takes no settings. It is left unchanged unless `inplace`.
        ratio: as in `convert`.
        config: as in `convert`.
        include: as in `convert`.
        exclude: as in `convert`.
        init: as in `convert`; the time does not depend on it.
        seed: as in `convert`.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments, on any device.
        device: `cpu`, `cuda` or `cuda:N`; default: a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`, for the model and floating inputs; default: they are not cast.
        batches: batch sizes to which the example inputs are repeated or cut along their first dimension; default: they
            stay as they are.
        compile: run both models under `torch.compile`.
        graph: False: call the models on a GPU from Python, launches included, instead of replaying CUDA graphs.
        train: time a forward and a backward pass in train mode; the pool's gradient is checked too.
        seconds: the time for each case, both models together.
        inplace: use the model itself instead of a copy; it is then moved to the device and gets the converted model's
            weights.
        settings: as in `convert`.

    Raises:
        ConfigError: an option does not fit, or there are no example inputs.
        BenchError: a model fails, does not compile, or cannot be captured in a CUDA graph.
        OutputMismatch: the two models do not agree.
        PlanError: see `convert`.
        ConversionError: see `convert`.
    """
    own = {"ratio": ratio, "include": include, "exclude": exclude, "init": init, "seed": seed}
    chosen = _with_init(_settings(bench, config, own, settings))
    options = BenchOptions(
        device=parse_device(device),
        dtype=parse_dtype(dtype),
        batches=tuple(batches),
        compile=compile,
        graph=graph,
        train=train,
        seconds=seconds,
    )
    check_inputs(example_inputs, options)
    if isinstance(model, nn.Module) and pools_in(model):
        given = [name for name, value in {"config": config, **own, **settings}.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} cannot be given for a model that is converted already; leave it out, or pass the "
                f"dense model"
            )
        converted = model if inplace else copy_without(model, set())
        converted.to(device=options.device, dtype=options.dtype)
        return measure(densify(converted), converted, example_inputs, options)
    check_convertible(model)
    check_has_values(model)
    dense = model if inplace else copy_without(model, set())
    dense.to(device=options.device, dtype=options.dtype)
    converted = convert(dense, config=chosen)
    copy_weights(converted, dense)
    return measure(dense, converted, example_inputs, options)


def _with_settings(
    settings: Callable[_P, _S],
) -> Callable[
    [Callable[[nn.Module, nn.Module, Any, _S], _R]], Callable[Concatenate[nn.Module, nn.Module, Any, _P], _R]
]:
    """Return a decorator by which a function takes settings as its own arguments; their defaults stay in one place."""

    def decorate(
        function: Callable[[nn.Module, nn.Module, Any, _S], _R],
    ) -> Callable[Concatenate[nn.Module, nn.Module, Any, _P], _R]:
        own = inspect.signature(function)
        *arguments, _ = own.parameters.values()
        signature = own.replace(parameters=[*arguments, *inspect.signature(settings).parameters.values()])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> _R:
            given = signature.bind(*args, **kwargs).arguments
            leading = [given.pop(argument.name) for argument in arguments]
            return function(*leading, settings(**given))  # type: ignore[call-arg]

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{settings.__doc__}"
        return call

    return decorate


@_with_settings(RecoverOptions)
def recover(student: nn.Module, teacher: nn.Module, data: Any, options: RecoverOptions) -> RecoveryReport:
    r"""Recover a converted pretrained model in place: bring its outputs back to the dense model's.

    First every layer is aligned. Weights are linear in the pool, so conjugate gradients find the pool (and the biases)
    for which the outputs of all layers are nearest to the teacher's, on the teacher's inputs of a few batches. Then the
    student is trained on a weighted sum: its outputs' distance from the teacher's, its features' distance, and the
    task's loss if there is one. The teacher runs in eval mode without gradients and is left unchanged. Random numbers
    depend on `seed` alone and leave the caller's generators untouched.

    The settings are arguments of this function, by name; `RecoverOptions` describes them.

    Args:
        student: what `convert(teacher, ratio, init="project")` returned, on any device.
        teacher: the dense pretrained model, on the same device.
        data: an iterable of batches that can be iterated again (DataLoader, list), or a function that returns one. The
            function takes no argument, or the epoch's number. A batch that is a tensor is the only argument of forward,
            a mapping holds its keyword arguments, a sequence its positional ones. If forward takes a single argument, a
            sequence holds inputs and targets.
        options: the settings: `steps`, `align`, `lr`, …

    Raises:
        ConfigError: an option does not fit the models or the data.
        ConversionError: the student is not a converted model.
        SignatureMismatch: the models' forward signatures differ.
        RecoveryError: outputs cannot be compared, the data ended, or the loss is not finite.
        CheckpointError: the checkpoint is damaged, or of another run.
    """
    # Here, because `import roastify` would take a third longer.
    from roastify.recovery.run import run_recovery

    return run_recovery(student, teacher, data, options)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
    source: str | None = None,
) -> None:
    """Write a converted model as an artifact folder: `roast.json` and `model.safetensors`.

    The artifact names what builds its model if roastify knows it: for models of transformers, those that `load` built
    by name, and those whose `source` is given. Of a model whose adapters are in a pool, the base is left out, and
    PEFT's `adapter_config.json` is written too.

    If a save is killed, the previous artifact or the new one is complete, and the next save removes its temporary
    files. Of several processes that save to one folder, each leaves a whole artifact, and the last one's stays. New
    files have the permissions of those that they replace, or those of the umask.

    Args:
        model: what `convert` returned, trained or not.
        path: the folder. It is created if missing, and other files in it stay. An artifact that is there is replaced
            without a warning, as files are by `torch.save` and transformers' `save_pretrained`. Weights or a manifest
            that roastify did not write are refused.
        state_dict: values to write instead of the model's own, under the same keys. A sharded model needs it:
            `torch.distributed.checkpoint.state_dict.get_model_state_dict` gathers its values.
        allow_nonfinite: save NaN and infinite values too. Otherwise a pool that holds them is refused, and so is a kept
            Parameter that holds NaN (it may be infinite by design; buffers are not looked at).
        source: what built the dense model, as on the command line: `timm:NAME` or `torchvision:NAME`, with the keyword
            arguments that it was given (`timm:resnet18,num_classes=10`).

    Raises:
        ConfigError: `path` is no path.
        ConversionError: the model is not a converted one, or only a part or a wrapper of one.
        SourceError: `source` is not such a text, or the library is missing or does not know it.
        CheckpointError: the model holds state that is not a tensor or is sharded, or values that are not finite, the
            state dict is another model's, the source builds another model, or the folder cannot be written or holds
            other weights.
    """
    _check_path(path, 'roastify.save(model, "out/")')
    builder = None if source is None else builder_from(source)
    artifact.write_artifact(model, Path(path), state_dict, allow_nonfinite=allow_nonfinite, builder=builder)


@overload
def load(path: str | Path, model: _M, *, digest: str | None = None) -> _M: ...


@overload
def load(path: str | Path, model: None = None, *, digest: str | None = None) -> nn.Module: ...


def load(path: str | Path, model: nn.Module | None = None, *, digest: str | None = None) -> nn.Module:
    """Return the artifact's model: a copy of `model`'s structure with all values read from the artifact.

    Without a `model`, the structure is built by what the artifact names: a class of transformers with its config, or a
    model of timm or torchvision. Nothing in the artifact is executed, and no weights are downloaded. The result is on
    the CPU in eval mode.

    Plan and values are of one save, also while another process saves. The values are in memory of their own: the model
    does not depend on the files afterwards.

    Args:
        path: an artifact folder.
        model: the dense architecture on any device; for the meta device, the result is on the CPU. The model is left
            unchanged, and its weights are not used. None: the artifact names it. For adapters, a PEFT model of their
            configuration on their base, whose weights the result shares.
        digest: the SHA-256 of the artifact's `roast.json`, as `sha256sum` prints it, from a source that you trust. That
            file names the digest of the weights, so it stands for the whole artifact. None accepts any artifact.

    Raises:
        CheckpointError: the artifact is missing, damaged, newer than this version, of another architecture, of adapters
            of another base, or has another digest; or no model is given, and the artifact names none that can be built
            here.
        ConfigError: the digest is not one, or `path` is no path.
        ConversionError: the model itself cannot be converted (see `convert`).
    """
    _check_path(path, 'roastify.load("out/", model)')
    with working(f"reading {path}"):
        found = artifact.read_artifact(Path(path), digest)
    if model is None:
        model = artifact.dense_model_of(found).eval()
    check_convertible(model)
    if found.plans[0].of_adapters:
        check_has_values(model)
    artifact.check_architecture(found, model)
    every_tensor = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    left_out = tensors_of_adapters(model, found.plans) if found.plans[0].of_adapters else every_tensor
    # Many adapters share the tensors of one base.
    target = copy_without(model, left_out, shared=every_tensor - left_out)
    device = device_of(model)
    device = torch.device("cpu") if device.type == "meta" else device
    for plan in found.plans:
        pool = build_pool(plan, device)
        pool.builder = builder_in(found.manifest)
        apply_plan(target, plan, pool)
    with working(f"reading {path}"):
        artifact.fill_from(found, target, device)
    return target


def densify(model: _M, *, inplace: bool = False) -> _M:
    """Return a converted model as a dense one: original classes, original state-dict keys, equal outputs.

    Args:
        model: what `convert` returned, trained or not; it is left unchanged unless `inplace`.
        inplace: change the model itself instead of a copy.

    Raises:
        ConversionError: the model is not a converted one, or it is sharded.
    """
    pools_of(model)
    refuse_sharded(model)
    target = model if inplace else copy_without(model, set())
    restore_dense(target)
    return target


def densify_artifact(
    path: str | Path, output: str | Path, *, digest: str | None = None, shard_size: int | None = None
) -> int:
    """Write the dense state dict of an artifact as safetensors; the model's code is not needed.

    Tensors are made and written one by one: at any time, memory holds the pool and one dense tensor.

    Args:
        path: an artifact folder.
        output: the file to write; an existing file is replaced in one step, unless it is a part of an artifact
            or no regular file. With `shard_size`, a folder, which must not hold model files yet.
        digest: the SHA-256 that the artifact's `roast.json` must have; see `load`.
        shard_size: write several files (`model-00001-of-00007.safetensors`, …) and the index by which transformers
            finds their tensors; in each, so many bytes of tensors at most, unless a tensor alone has more. Config and
            tokenizer files that the artifact has are copied, unless the folder has files of these names.

    Returns:
        the number of tensors written; a tied tensor is written under each of its names.

    Raises:
        CheckpointError: the artifact is missing, damaged, newer than this version or has another digest, or the file
            cannot be written.
        ConfigError: the digest is not one, the size of shards is below 1, or the file's name is that of a pickle.
    """
    # Here, because most users of the package never need it.
    from roastify.dense_artifact import write_dense

    if shard_size is not None and shard_size < 1:
        raise ConfigError(f"shard_size must be at least 1 byte; found {shard_size}")
    if shard_size is None and Path(output).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(
            f"the dense state dict is written as safetensors, which torch.load does not read; found the name {output}; "
            f"name it {Path(output).with_suffix('.safetensors')}"
        )
    return write_dense(artifact.read_artifact(Path(path), digest), Path(output), shard_size)


def _settings(
    function: Callable[..., Any], config: RoastConfig | str | Path | None, own: dict[str, Any], more: dict[str, Any]
) -> RoastConfig:
    """Return the settings of a call: the config's, and those that its arguments name.

    Args:
        function: the function that was called.
        config: its argument of this name.
        own: its own arguments that are settings.
        more: what was given beside the function's own arguments.
    """
    names = [field.name for field in dataclasses.fields(RoastConfig)]
    for name in more:
        if name not in names:
            known = {*names, *inspect.signature(function).parameters} - {"settings"}
            hint = closest(name, sorted(known))
            raise ConfigError(f"{function.__name__} has no argument or setting {name!r}{hint}; all: {', '.join(names)}")
    return _merged(config, **own, **more)


def settings_from(config: RoastConfig | str | Path | None, **arguments: Any) -> RoastConfig:
    """Return the settings of a config, or of a TOML file, that arguments override; `init="auto"` is `match` here."""
    return _with_init(_merged(config, **arguments))


def _with_init(settings: RoastConfig) -> RoastConfig:
    """Return the settings with `match` for `auto`: what a model's weights are worth, only its user knows."""
    return settings.replace(init="match") if settings.init == "auto" else settings


def _merged(config: RoastConfig | str | Path | None, **arguments: Any) -> RoastConfig:
    if config is None:
        config = RoastConfig()
    elif isinstance(config, str | Path):
        config = RoastConfig.from_toml(config)
    elif not isinstance(config, RoastConfig):
        raise ConfigError(f"config must be a RoastConfig or the path of a TOML file; found {type(config).__name__}")
    return config.replace(**arguments)


def _check_path(path: object, call: str) -> None:
    """Refuse anything else than a path, such as a model that was given in its place."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"expected the path of an artifact folder; found {type(path).__name__}. The call is {call}")
