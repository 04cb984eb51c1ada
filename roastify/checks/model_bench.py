"""A model beside its converted twin: checked against each other, then timed in turn, in one run.

The dense model is given the weights that the converted model represents, so both compute the same function. The calls
that are timed are also the calls that are compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roastify.calls import describe, leaves, split_inputs
from roastify.checks import clocks
from roastify.checks.clocks import Timing
from roastify.checks.numerics import Agreement, check_agreement
from roastify.conversion.converted import pool_of
from roastify.errors import BenchError, ConfigError, RoastError, closest
from roastify.isolation import random_states_kept
from roastify.kernels.torch_internals import compile_settings, pytree
from roastify.progress import working
from roastify.shown import ShownAsTable

DTYPES = ("float32", "bfloat16", "float16")
# After 8 compilations of a function, `torch.compile` silently runs it uncompiled. The layers of a converted model need
# more, because each has another place in the pool. Without a limit, a model that is reported as compiled is compiled.
_COMPILE_LIMITS = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}


@dataclass(frozen=True)
class BenchOptions:
    """How two models are timed.

    Args:
        device: the device; see `parse_device`.
        dtype: the dtype that the model and floating inputs are cast to; None: they are not cast.
        batches: batch sizes to which the example inputs are repeated or cut along their first dimension; empty: they
            stay as they are.
        compile: run both models under `torch.compile`.
        graph: on a GPU, replay both models from CUDA graphs.
        train: time a forward and a backward pass in train mode instead of inference.
        seconds: the time for each case, both models together; each model runs at least five times.
        fullgraph: fail if a model does not compile as one graph.

    Raises:
        ConfigError: a value is out of range.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    batches: tuple[int, ...] = ()
    compile: bool = False
    graph: bool = True
    train: bool = False
    seconds: float = 2.0
    fullgraph: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))
        object.__setattr__(self, "graph", self.graph and self.device.type == "cuda")
        for batch in self.batches:
            if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
                raise ConfigError(f"a batch must be an integer of at least 1; found {batch!r}")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds must be a positive number; found {self.seconds!r}")


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return an available device: `cpu`, `cuda` or `cuda:N`; None: a GPU if there is one.

    Raises:
        ConfigError: the device is of another kind, or not available.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; found {str(device)!r}")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise ConfigError(f"device {str(device)!r} is not available: torch sees {count} CUDA devices; name another")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype for a dtype or its name; None stays None.

    Raises:
        ConfigError: the dtype is none of `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; found {name!r}{closest(name, DTYPES)}")
    return None if dtype is None else getattr(torch, name)


@dataclass(frozen=True)
class Side:
    """The measurements of one of the two models.

    Args:
        time: the time of one call.
        parameters: the number of stored parameters.
        parameter_bytes: the bytes of the stored parameters.
        peak_bytes: on a GPU, the bytes of weights, buffers and inputs, plus the most that a call without a CUDA graph
            allocates beside them; the other model does not count. None on a CPU, whose allocator does not separate the
            two models.
    """

    time: Timing
    parameters: int
    parameter_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchCase:
    """Both sides at one batch size.

    Args:
        batch: the batch size asked for; None: the example inputs as they are.
        inputs: `(path, description)` of every input.
        agreement: how far the two models differ, and the difference allowed.
        dense: the dense model.
        converted: its converted twin.
    """

    batch: int | None
    inputs: tuple[tuple[str, str], ...]
    agreement: Agreement
    dense: Side
    converted: Side

    @property
    def dense_over_converted(self) -> float:
        """Time of the dense model ÷ time of the converted model; below 1 the converted model is slower."""
        return self.dense.time.median_ms / self.converted.time.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the case as JSON-ready values."""
        return {**dataclasses.asdict(self), "dense_over_converted": self.dense_over_converted}


@dataclass(frozen=True, repr=False)
class BenchReport(ShownAsTable):
    """A benchmark of one model. It prints as the table of `roastify bench`.

    Args:
        model: the name of the model's class.
        ratio: the ratio asked for.
        achieved_ratio: parameters of the dense model ÷ parameters stored.
        device: the device, for example `cuda:0`.
        dtype: the dtype asked for; None: the model's own.
        compile: whether both models ran under `torch.compile`.
        graph: whether both models were replayed from CUDA graphs.
        train: whether a forward and a backward pass were timed, instead of inference.
        machine: device, versions and date.
        cases: a case for each batch size.
    """

    model: str
    ratio: float
    achieved_ratio: float
    device: str
    dtype: str | None
    compile: bool
    graph: bool
    train: bool
    machine: dict[str, Any]
    cases: tuple[BenchCase, ...]

    def _headline(self) -> str:
        speeds = ", ".join(f"{case.dense_over_converted:.2f}" for case in self.cases)
        return f"{self.model} at ratio {self.achieved_ratio:.2f} on {self.device}, time dense ÷ converted {speeds}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {**dataclasses.asdict(self), "cases": [case.to_dict() for case in self.cases]}


@dataclass(frozen=True)
class Subject:
    """One of the two models, ready to be timed.

    Args:
        name: `dense` or `converted`.
        model: the model, in the mode that is timed.
        inputs: the model's own copy of the inputs, on the device.
        check: a call whose outputs are compared.
        run: the call that is timed.
        peak_bytes: see `Side`.
    """

    name: str
    model: nn.Module
    inputs: Any
    check: Callable[[], Any]
    run: Callable[[], Any]
    peak_bytes: int | None


def measure(dense: nn.Module, converted: nn.Module, example_inputs: Any, options: BenchOptions) -> BenchReport:
    """Check and time a dense model beside its converted twin, at every batch size.

    Args:
        dense: the dense model on the options' device, with the converted model's weights (`rewrite.copy_weights`).
        converted: the converted model.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments, on any device.
        options: how the models are timed.

    Raises:
        ConfigError: the example inputs cannot be brought to a batch size.
        BenchError: a model fails, does not compile, or cannot be captured in a CUDA graph.
        OutputMismatch: the two models do not agree; the case is then not timed.
    """
    cases = [(batch, rebatch(example_inputs, batch)) for batch in options.batches or (None,)]
    plan = pool_of(converted).plan
    return BenchReport(
        model=plan.model,
        ratio=plan.ratio,
        achieved_ratio=plan.achieved_ratio,
        device=str(options.device),
        dtype=None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        compile=options.compile,
        graph=options.graph,
        train=options.train,
        machine=clocks.machine(options.device),
        cases=tuple(
            check_and_time(
                prepare("dense", dense, inputs, options),
                prepare("converted", converted, inputs, options),
                options,
                batch,
            )
            for batch, inputs in cases
        ),
    )


def check_inputs(example_inputs: Any, options: BenchOptions) -> None:
    """Raise `ConfigError` unless there are example inputs that can be brought to every batch size."""
    if example_inputs is None:
        raise ConfigError(
            "timing needs example inputs; pass example_inputs: a tensor, a tuple of positional or a dict of keyword "
            "arguments, as example_inputs=torch.randn(8, 64)"
        )
    for batch in options.batches:
        rebatch(example_inputs, batch)


def rebatch(example_inputs: Any, batch: int | None) -> Any:
    """Return example inputs repeated or cut to `batch` along the first dimension of every tensor that has one.

    Raises:
        ConfigError: the first dimensions differ, so it is not known which of them is the batch.
    """
    if batch is None:
        return example_inputs
    tensors = [
        (path, leaf) for path, leaf in leaves(example_inputs, "inputs") if isinstance(leaf, Tensor) and leaf.dim() > 0
    ]
    if len({leaf.shape[0] for _, leaf in tensors} - {0}) != 1 or not all(leaf.shape[0] for _, leaf in tensors):
        # The message names one tensor of each size.
        first = {leaf.shape[0]: f"{path} of {list(leaf.shape)}" for path, leaf in reversed(tensors)}
        found = ", ".join(reversed(first.values())) or "no tensor with a dimension"
        raise ConfigError(
            f"the example inputs cannot be brought to batch {batch}: expected every tensor to have the same first "
            f"size, the batch; found {found}. Define example inputs of the batch that you want, and leave the batch out"
        )

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        return leaf.index_select(0, torch.arange(batch, device=leaf.device) % leaf.shape[0])

    return pytree.tree_map(resized, example_inputs)


def prepare(name: str, model: nn.Module, inputs: Any, options: BenchOptions) -> Subject:
    """Compile, warm up and capture a model on inputs of its own, and measure its peak memory.

    Raises:
        BenchError: the model fails, does not compile, or cannot be captured; there is no fallback.
    """
    model.train(options.train)
    inputs = _placed(inputs, options)
    args, kwargs = split_inputs(inputs)
    call: Callable[..., Any] = model
    if options.compile:
        call = torch.compile(model, dynamic=False, fullgraph=options.fullgraph)
    make_step = _training_step if options.train else _inference_step
    step = make_step(model, call, args, kwargs)
    with _on(options.device), working(f"preparing the {name} model"):
        with _stated(
            f"the {name} model fails on the example inputs{' under torch.compile' if options.compile else ''}"
        ):
            with compile_settings(**_COMPILE_LIMITS):
                for _ in range(clocks.WARM_UP_CALLS):
                    step()
            peak = _peak_bytes(model, step, inputs) if options.device.type == "cuda" else None
        run = clocks.captured(step, f"the {name} model") if options.graph else step
    # Training passes are compared uncompiled, because a compiled model may draw dropout's masks in another order.
    check = _training_step(model, model, args, kwargs) if options.train else run
    return Subject(name, model, inputs, check, run, peak)


def check_and_time(dense: Subject, converted: Subject, options: BenchOptions, batch: int | None = None) -> BenchCase:
    """Check that two models agree, then time them in turn.

    Raises:
        OutputMismatch: the models do not agree; then nothing is timed.
        BenchError: there is nothing to compare.
    """
    with _on(options.device):
        with working("comparing outputs"):
            agreement = _check(dense, converted, options)
        clock = clocks.event_clock if options.graph else clocks.wall_clock(options.device)
        times = clocks.alternate({"dense": dense.run, "converted": converted.run}, clock, options.seconds)
    sides = {
        subject.name: Side(
            times[subject.name],
            sum(parameter.numel() for parameter in subject.model.parameters()),
            sum(parameter.nbytes for parameter in subject.model.parameters()),
            subject.peak_bytes,
        )
        for subject in (dense, converted)
    }
    described = tuple((path, describe(leaf)) for path, leaf in leaves(dense.inputs, "inputs"))
    return BenchCase(batch, described, agreement, sides["dense"], sides["converted"])


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _stated(what: str) -> Iterator[None]:
    """Turn any error of a user's model into a `BenchError` whose message begins with `what`."""
    try:
        yield
    except RoastError:
        raise
    except Exception as error:
        raise BenchError(f"{what}: {clocks.reason(error)}") from error


def _placed(inputs: Any, options: BenchOptions) -> Any:
    """Return copies of the inputs (a forward may write to them) on the device, floating ones in the dtype asked for."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (
            leaf.detach().clone().to(device=options.device, dtype=options.dtype if leaf.is_floating_point() else None)
        )

    return pytree.tree_map(place, inputs)


def _inference_step(
    model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return step


def _training_step(
    model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """Return a step whose backward pass starts from fixed gradients of the outputs, so that no loss is timed."""
    gradients: list[Tensor] = []

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        outputs = call(*args, **kwargs)
        differentiable = [leaf for _, leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not differentiable:
            raise BenchError("there is nothing to train: no output requires a gradient; time inference instead")
        if not gradients:
            generator = torch.Generator(differentiable[0].device).manual_seed(0)
            gradients.extend(torch.empty_like(leaf).normal_(generator=generator) for leaf in differentiable)
        torch.autograd.backward(differentiable, gradients)
        # A captured step keeps its outputs, but not the graph that computed them.
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)

    return step


def _peak_bytes(model: nn.Module, step: Callable[[], Any], inputs: Any) -> int:
    given = [leaf for _, leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), *given]]
    own = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    # Gradients of an earlier step must not count as memory that was allocated before this step.
    model.zero_grad(set_to_none=True)
    return own + clocks.peak_bytes_of(step)


def _check(dense: Subject, converted: Subject, options: BenchOptions) -> Agreement:
    """Run both models with the same random numbers and compare their outputs."""
    outputs = []
    for subject in (dense, converted):
        with _stated(f"the {subject.name} model fails on the example inputs"):
            with random_states_kept(seed=0, devices=[options.device]):
                outputs.append(subject.check())
    is_narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in dense.model.parameters())
    precise = (lambda: _in_float32(dense)) if is_narrow and not options.train else None
    return check_agreement(dense.model, converted.model, outputs[0], outputs[1], precise)


def _in_float32(subject: Subject) -> Any:
    """Return what a model of a narrow dtype computes from the same weights and inputs in float32; None if it cannot."""
    try:
        return _called_in_float32(subject)
    except Exception:
        # Too little memory, or a model with a dtype in its code: then the narrow dtype's tolerance decides.
        return None


def _called_in_float32(subject: Subject) -> Any:
    model = copy.deepcopy(subject.model).float()
    inputs = pytree.tree_map(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, subject.inputs
    )
    args, kwargs = split_inputs(inputs)
    with torch.no_grad():
        return model(*args, **kwargs)
