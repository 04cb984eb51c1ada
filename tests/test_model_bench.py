"""Benchmarks: what is compared before anything is timed, what is reported, every option, and the refusals."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import roastify
from roastify.checks import clocks
from roastify.checks.model_bench import BenchOptions, check_and_time, parse_device, prepare, rebatch
from roastify.checks.numerics import check_agreement
from roastify.conversion.rewrite import copy_weights
from roastify.errors import BenchError, ConfigError, ConversionError, OutputMismatch, PlanError

ROOT = Path(__file__).parents[1]

# torch's compiler warns of torch's own code when it is imported, and when it meets an autograd function.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what was compiled, and which functions are not to be compiled again."""
    torch.compiler.reset()


class Net(nn.Module):
    """Two layers, dropout and a buffer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(96, 64)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.last(self.drop(self.norm(self.first(x)).relu())) * scale


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is timed."""

    def alternate(*args: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(clocks, "alternate", alternate)


def bench(model: nn.Module, inputs: Any, ratio: float = 4, **options: Any) -> roastify.BenchReport:
    return roastify.bench(model, ratio, example_inputs=inputs, **{"device": "cpu", "seconds": 1e-3, **options})


def test_a_report_has_both_sides_and_how_they_were_measured(net: Net, inputs: Tensor) -> None:
    report = bench(net, inputs)
    plan = roastify.plan(net, 4)
    assert (report.model, report.ratio, report.achieved_ratio) == ("Net", 4, plan.achieved_ratio)
    assert (report.device, report.dtype, report.compile, report.graph, report.train) == (
        "cpu",
        None,
        False,
        False,
        False,
    )
    (case,) = report.cases
    assert (case.batch, case.inputs) == (None, (("inputs", "float32[6, 64] on cpu"),))
    assert (case.dense.parameters, case.dense.parameter_bytes) == (plan.total_numel, plan.total_nbytes)
    assert (case.converted.parameters, case.converted.parameter_bytes) == (plan.stored_numel, plan.stored_nbytes)
    assert case.dense.peak_bytes is None and case.converted.peak_bytes is None
    assert case.agreement.error <= case.agreement.tolerance == 1e-3 and case.agreement.gradient_error is None
    for side in (case.dense, case.converted):
        assert 0 < side.time.q1_ms <= side.time.median_ms <= side.time.q3_ms and side.time.runs >= 5
    assert case.dense_over_converted == case.dense.time.median_ms / case.converted.time.median_ms
    assert report.machine["torch"] == torch.__version__ and report.machine["roastify"] == roastify.__version__
    assert "gpu" not in report.machine and report.machine["cpu"] and report.machine["date"].count("-") == 2


def test_a_report_as_json_is_the_report(net: Net, inputs: Tensor) -> None:
    report = bench(net, inputs, batches=[1, 3], dtype="bfloat16")
    values = json.loads(json.dumps(report.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(report)}
    assert values["dtype"] == "bfloat16"
    for case, plain in zip(report.cases, values["cases"], strict=True):
        assert plain["dense"]["time"] == dataclasses.asdict(case.dense.time)
        assert plain["converted"]["parameter_bytes"] == case.converted.parameter_bytes
        assert plain["dense_over_converted"] == case.dense_over_converted
        assert plain["batch"] == case.batch and plain["agreement"] == dataclasses.asdict(case.agreement)


class Returning(nn.Module):
    """A layer whose output is put into some structure."""

    def __init__(self, structure: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.structure = structure

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        y = self.layer(x)
        return self.structure(y if shift is None else y + shift)


@dataclasses.dataclass
class Plain:
    scores: Tensor
    label: str


STRUCTURES = {
    "tuple": lambda y: (y, {"deep": [y + 1, None]}),
    "ModelOutput": lambda y: BaseModelOutput(last_hidden_state=y, hidden_states=(y, y * 2)),
    "dataclass": lambda y: Plain(y, "name"),
    "masked": lambda y: y.masked_fill(torch.arange(64) % 2 == 0, -torch.inf),
    "complex": lambda y: torch.complex(y, y + 1),
    "with integers": lambda y: (y, y.argmax(-1)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_nested_outputs_are_compared(structure: str, train: bool, inputs: Tensor) -> None:
    (case,) = bench(Returning(STRUCTURES[structure]), inputs, ratio=2, train=train).cases
    assert case.agreement.error < 1e-5
    assert not train or case.agreement.gradient_error < 1e-5


def test_inputs_may_be_positional_or_named(inputs: Tensor) -> None:
    for given in ((inputs,), [inputs, inputs], {"x": inputs, "shift": inputs}):
        bench(Returning(STRUCTURES["tuple"]), given, ratio=2)


def test_the_example_inputs_are_described(inputs: Tensor) -> None:
    (case,) = bench(Returning(STRUCTURES["tuple"]), {"x": inputs, "shift": inputs[0]}, 2, dtype="float16").cases
    assert case.inputs == (("inputs['x']", "float16[6, 64] on cpu"), ("inputs['shift']", "float16[64] on cpu"))


@pytest.mark.parametrize("train", [False, True])
def test_a_model_is_left_as_it_was(net: Net, inputs: Tensor, train: bool) -> None:
    net.first.weight.requires_grad_(True)
    state, mode, given = copy.deepcopy(net.state_dict()), net.training, inputs.clone()
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    bench(net, inputs, train=train, dtype="bfloat16", batches=[2])
    assert net.training is mode and all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(inputs, given)
    if not train:
        assert torch.equal(torch.get_rng_state(), generator)


def test_inplace_converts_the_given_model(net: Net, inputs: Tensor) -> None:
    expected = roastify.densify(roastify.convert(net, 4, seed=3)).state_dict()
    bench(net, inputs, seed=3, inplace=True)
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("inplace", "copies"), [(True, 1), (False, 2)])
def test_at_most_the_dense_and_the_converted_model_are_held(
    monkeypatch: pytest.MonkeyPatch, inplace: bool, copies: int
) -> None:
    # No other tensor in this process has this shape.
    shape, found = (333, 777), []
    alternate = clocks.alternate

    def counting(*args: Any) -> Any:
        gc.collect()
        tensors = {
            id(item) for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter) and item.shape == shape
        }
        found.append(len(tensors))
        return alternate(*args)

    monkeypatch.setattr(clocks, "alternate", counting)
    bench(nn.Linear(shape[1], shape[0]), torch.randn(2, shape[1]), inplace=inplace)
    assert found == [copies]


def test_batches_repeat_or_cut_the_example_inputs(net: Net, inputs: Tensor) -> None:
    report = bench(net, inputs, batches=(1, 8))
    assert [(case.batch, case.inputs[0][1]) for case in report.cases] == [
        (1, "float32[1, 64] on cpu"),
        (8, "float32[8, 64] on cpu"),
    ]
    nested = {"x": inputs, "pair": [inputs[:, :2], torch.tensor(3.0)], "flag": True}
    resized = rebatch(nested, 8)
    assert torch.equal(resized["x"], torch.cat([inputs, inputs[:2]]))
    assert torch.equal(resized["pair"][0], resized["x"][:, :2])
    assert resized["pair"][1] is nested["pair"][1] and resized["flag"] is True


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((torch.ones(4, 3), torch.ones(7)), r"found inputs\[0\] of \[4, 3\], inputs\[1\] of \[7\]"),
        (torch.tensor(1.0), "found no tensor with a dimension"),
        (torch.ones(0, 3), r"found inputs of \[0, 3\]"),
    ],
)
def test_inputs_without_one_batch_size_are_refused(given: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be brought to batch 2: expected .*; {found}. Define example inputs"):
        rebatch(given, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2), (torch.float16, 1e-2)])
def test_a_dtype_casts_the_model_and_the_inputs(net: Net, inputs: Tensor, dtype: Any, tolerance: float) -> None:
    report = bench(net, (inputs,), dtype=dtype)
    (case,) = report.cases
    name = str(dtype).removeprefix("torch.")
    assert report.dtype == name and case.inputs[0][1].startswith(name)
    assert case.agreement.tolerance == tolerance
    itemsize = getattr(torch, name).itemsize
    assert case.dense.parameter_bytes == itemsize * case.dense.parameters
    assert case.converted.parameter_bytes == itemsize * case.converted.parameters


def test_tensor_cores_have_a_tolerance_of_their_own(net: Net, inputs: Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert bench(net, inputs).cases[0].agreement.tolerance == 1e-2
    finally:
        torch.set_float32_matmul_precision(before)


def test_tensor_cores_enabled_by_the_newer_setting(net: Net, inputs: Tensor) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert bench(net, inputs).cases[0].agreement.tolerance == 1e-2
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Watching(nn.Module):
    """Records the modes in which it was called."""

    seen: tuple[tuple[bool, bool], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # tracing calls it too
            Watching.seen += ((self.training, torch.is_grad_enabled()),)
        return self.layer(x)


@pytest.mark.parametrize("train", [False, True])
def test_inference_is_in_eval_mode_without_gradients_and_training_is_not(
    monkeypatch: pytest.MonkeyPatch, inputs: Tensor, train: bool
) -> None:
    monkeypatch.setattr(Watching, "seen", ())
    report = bench(Watching(), inputs, ratio=2, train=train)
    assert report.train is train
    assert set(Watching.seen) == {(train, train)}


def test_a_model_that_draws_random_numbers_draws_the_same_on_both_sides(inputs: Tensor) -> None:
    for train in (False, True):
        bench(Returning(lambda y: F.dropout(y, 0.5, training=True)), inputs, ratio=2, train=train)


class Minding(nn.Module):
    """Behaves differently if its layer's class is not exactly `nn.Linear`."""

    def __init__(self, otherwise: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return y if type(self.layer) is nn.Linear else self.otherwise(y)


WRONG = {
    "one element": (
        lambda y: torch.cat([y[:, :1] + 0.02, y[:, 1:]], 1),
        r"in eval mode output of the converted model differs from .* expected at most 0.001, so nothing was timed",
    ),
    "not finite": (lambda y: torch.cat([y[:, :1] / 0, y[:, 1:]], 1), "by inf of the largest value"),
    "shape": (lambda y: y[:, :7], r"is float32\[6, 7\] on cpu; expected float32\[6, 64\] on cpu"),
    "structure": (lambda y: (y,), "returns a tuple; expected a Tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_converted_model_that_disagrees_is_not_timed(never_timed: None, inputs: Tensor, wrong: str) -> None:
    otherwise, message = WRONG[wrong]
    with pytest.raises(OutputMismatch, match=message):
        bench(Minding(otherwise), inputs, ratio=2)


def test_weights_that_are_not_the_converted_models_are_not_timed(never_timed: None, net: Net, inputs: Tensor) -> None:
    options = BenchOptions(torch.device("cpu"))
    converted = roastify.convert(net, 4)
    sides = prepare("dense", net, inputs, options), prepare("converted", converted, inputs, options)
    with pytest.raises(OutputMismatch, match="differs from the dense model's with the same weights"):
        check_and_time(*sides, options)
    copy_weights(converted, net)
    with pytest.raises(AssertionError, match="timed"):
        check_and_time(*sides, options)


def test_a_gradient_that_disagrees_is_not_timed(never_timed: None, inputs: Tensor) -> None:
    model = Minding(lambda y: 0.9 * y + 0.1 * y.detach())
    with pytest.raises(AssertionError, match="timed"):
        bench(model, inputs, ratio=2)
    message = r"^the pool's gradient of the converted model differs .* 0.1 of its norm; expected at most 0.02, so"
    with pytest.raises(OutputMismatch, match=message):
        bench(model, inputs, ratio=2, train=True)
    detached = Minding(lambda y: y.detach() + 0 * torch.zeros(1, requires_grad=True))
    with pytest.raises(OutputMismatch, match=r"the pool's gradient of the converted model differs .* by 1 of its norm"):
        bench(detached, inputs, ratio=2, train=True)


def test_the_gradient_of_every_layer_is_in_the_check(inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 64, padding_idx=0), nn.Conv1d(8, 64, 3), nn.Flatten(), nn.Linear(64 * 62, 9))
    (case,) = bench(model, torch.arange(16).view(2, 8), ratio=3, train=True).cases
    assert case.agreement.gradient_error < 1e-5


def test_frozen_weights_have_no_gradient_to_compare(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight.requires_grad_(False)
    assert bench(model, inputs, ratio=1.2, train=True).cases[0].agreement.gradient_error < 1e-5
    model[1].weight.requires_grad_(False)
    assert bench(model, inputs, ratio=2, train=True).cases[0].agreement.gradient_error is None


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (lambda y: y.argmax(-1), "no output is a floating-point tensor; wrap the model in a module"),
        (lambda y: [], "no output is a floating-point tensor"),
        (lambda y: (y, y * torch.nan), r"the dense model's \[1\] holds no finite number"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(
    never_timed: None, inputs: Tensor, structure: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(BenchError, match=f"the models cannot be compared: .*{message}".replace(": .*the", ": the")):
        bench(Returning(structure), inputs, ratio=2)


class Amplifying(nn.Module):
    """Turns a last bit of bfloat16 into another output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return (300 * self.linear(x)).sin()


def test_a_model_that_amplifies_rounding_is_held_to_float32(inputs: Tensor) -> None:
    # A folded input is rounded once more than a dense one.
    config = roastify.RoastConfig(ratio=4, fold=4, tile="8x8", min_numel=0)
    (case,) = bench(Amplifying(), inputs, dtype="bfloat16", config=config).cases
    dense_error, error = case.agreement.from_float32
    assert case.agreement.error > case.agreement.tolerance and 0 < error <= 2 * dense_error
    exact = torch.linspace(-1, 1, 9)
    dense, model = (exact + 0.1).bfloat16(), nn.Linear(2, 2).bfloat16().eval()
    found = check_agreement(model, model, dense, (exact - 0.15).bfloat16(), lambda: exact)
    assert found.from_float32 == pytest.approx((0.1, 0.15), abs=0.01)
    for wrong, precise in ((exact - 0.3, exact), (exact - 0.15, None)):
        with pytest.raises(OutputMismatch, match="differs from the dense model's"):
            check_agreement(model, model, dense, wrong.bfloat16(), lambda precise=precise: precise)


def test_agreement_is_that_of_the_worst_output() -> None:
    model = nn.Linear(2, 2).eval()
    expected = (torch.tensor([1.0, 2.0]), torch.tensor([10.0, -100.0]), torch.zeros(3), torch.empty(0))
    found = (torch.tensor([1.0, 2.0]), torch.tensor([10.05, -100.0]), torch.zeros(3), torch.empty(0))
    assert check_agreement(model, model, expected, found).error == pytest.approx(5e-4, rel=1e-3)
    with pytest.raises(OutputMismatch, match=r"output \[2\] of the converted model differs .* by inf"):
        check_agreement(model, model, expected, (*found[:2], torch.full((3,), 1e-9), found[3]))
    doubled = [tuple(tensor.double() for tensor in output) for output in (expected, found)]
    with pytest.raises(OutputMismatch, match=r"by 0.0005 of the largest value; expected at most 1e-09"):
        check_agreement(model.double(), model, *doubled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N; found 'gpu'"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N; found 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available: torch sees [0-9]+ CUDA devices; name"),
        ({"dtype": "bfloat"}, "dtype must be one of float32, bfloat16, float16; found 'bfloat'; closest: 'bfloat16'"),
        ({"dtype": torch.int8}, "found 'int8'"),
        ({"batches": [0]}, "a batch must be an integer of at least 1; found 0"),
        ({"batches": [2.0]}, "found 2.0"),
        ({"batches": [True]}, "found True"),
        ({"batches": [2], "inputs": (torch.ones(1, 64), 0)}, "timed"),
        ({"batches": [2], "inputs": (torch.ones(1, 64), torch.ones(3))}, "cannot be brought to batch 2"),
        ({"seconds": 0}, "seconds must be a positive number; found 0"),
        ({"seconds": float("inf")}, "found inf"),
        ({"seconds": float("nan")}, "found nan"),
        ({"inputs": None}, "timing needs example inputs; pass example_inputs: a tensor, a tuple of positional"),
        ({"ratio": 0.5}, "ratio must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    never_timed: None, net: Net, inputs: Tensor, options: dict[str, Any], message: str
) -> None:
    given = options.pop("inputs", inputs)
    with pytest.raises(AssertionError if message == "timed" else ConfigError, match=message):
        bench(net, given, **options)


def test_a_model_that_cannot_be_converted_is_refused_before_it_is_copied(net: Net, inputs: Tensor) -> None:
    with pytest.raises(PlanError, match="is unreachable"):
        bench(net, inputs, ratio=5000)
    with pytest.raises(ConfigError, match="ratio cannot be given for a model that is converted already"):
        bench(roastify.convert(net, 4), inputs)
    with pytest.raises(ConversionError, match="on the meta device"):
        bench(copy.deepcopy(net).to("meta"), inputs)
    net.lock = (item for item in ())  # a generator cannot be copied
    with pytest.raises(ConversionError, match=r"cannot be deep-copied.*inplace=True"):
        bench(net, inputs)


def test_a_model_that_fails_is_reported_with_its_error(never_timed: None, net: Net, inputs: Tensor) -> None:
    with pytest.raises(BenchError, match=r"the dense model fails on the example inputs: RuntimeError: mat1 and mat2"):
        bench(net, inputs[:, :63])

    def fail(y: Tensor) -> Tensor:
        raise ValueError("not a Linear\nand more")

    message = r"^the converted model fails on the example inputs: ValueError: not a Linear$"
    with pytest.raises(BenchError, match=message):
        bench(Minding(fail), inputs, ratio=2)


def test_a_model_with_nothing_to_train_is_refused(never_timed: None, inputs: Tensor) -> None:
    model = nn.Linear(64, 64).requires_grad_(False)
    with pytest.raises(BenchError, match="nothing to train: no output requires a gradient"):
        bench(model, inputs, ratio=2, train=True)


@compiling
@pytest.mark.parametrize("train", [False, True])
def test_both_sides_are_compiled(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, net: Net, inputs: Tensor, train: bool
) -> None:
    compiled = []
    original = torch.compile

    def counting(model: nn.Module, **options: Any) -> Any:
        def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
            compiled.append(type(model.get_submodule("first")).__name__)
            return graph.forward

        assert options.pop("dynamic") is False and options.pop("fullgraph") is False
        return original(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    report = bench(net, inputs, compile=True, train=train)
    assert report.compile and set(compiled) == {"Linear", "RoastLinear"}


class Broken(nn.Module):
    """Layers of one class with a break in the graph before each, so that each is compiled by itself."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Broken.Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


@compiling
def test_every_layer_is_compiled_however_many_there_are(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend=backend, **options))
    options = BenchOptions(torch.device("cpu"), compile=True)
    layers = 12  # torch's own limit is 8
    converted = roastify.convert(Broken(layers), 2)
    prepare("converted", converted, torch.randn(3, 32), options)
    assert len(compiled) >= layers


@compiling
def test_a_failed_compilation_is_reported(fresh_compiler: None, never_timed: None) -> None:
    options = BenchOptions(torch.device("cpu"), compile=True, fullgraph=True)
    with pytest.raises(
        BenchError, match=r"the dense model fails on the example inputs under torch.compile: Unsupported"
    ):
        prepare("dense", Broken(2), torch.randn(3, 32), options)


def test_calls_alternate_and_each_timed_call_follows_an_untimed_one_of_its_model() -> None:
    order: list[str] = []
    clocked = iter(range(100))

    def clock(call: Callable[[], Any]) -> float:
        order.append("timed:")
        call()
        return float(next(clocked))

    calls = {"dense": lambda: order.append("dense"), "converted": lambda: order.append("converted")}
    times = clocks.alternate(calls, clock, seconds=1e-9)
    assert order == ["dense", "timed:", "dense", "converted", "timed:", "converted"] * 5
    assert times["dense"] == clocks.Timing(4.0, 1.0, 7.0, 5) and times["converted"] == clocks.Timing(5.0, 2.0, 8.0, 5)


def test_the_budget_is_spent_and_the_clock_is_in_milliseconds() -> None:
    import time

    clock = clocks.wall_clock(torch.device("cpu"))
    begun = time.perf_counter()
    times = clocks.alternate({"sleep": lambda: time.sleep(0.004)}, clock, seconds=0.2)
    assert 0.2 <= time.perf_counter() - begun < 2
    assert 4 <= times["sleep"].median_ms < 100 and times["sleep"].runs > 5


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert parse_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse_device(torch.device("cpu")) == torch.device("cpu")


def _models(folder: Path, *arguments: str, code: str | None = None, compiled: bool = False) -> dict[str, Any]:
    """Run the benchmark of whole models on narrow ones and return what it wrote."""
    output = folder / "models.json"
    command = ["-m", "benchmarks.models"] if code is None else ["-c", code, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "0" if compiled else "1"}
    subprocess.run(
        [sys.executable, *command, "--smoke", "--output", str(output), "--seconds", "0.05", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=environment,
    )
    return json.loads(output.read_text())


@pytest.mark.long
def test_the_benchmark_of_whole_models_runs(tmp_path: Path) -> None:
    values = _models(tmp_path, "--quick", "--only", "llama", compiled=True)
    assert values["machine"]["transformers"] and values["machine"]["date"]
    (row,) = values["rows"]
    assert "failure" not in row and row["case"] == "llama-smoke/ratio=8/batch=1"
    assert row["kind"] == "decoding step" and row["fullgraph"] == {"dense": True, "converted": True}
    assert row["compile"] and row["graph"] == torch.cuda.is_available()
    assert row["dense"]["parameters"] / row["converted"]["parameters"] == row["achieved_ratio"] >= 8
    assert 0 < row["agreement"]["error"] <= row["agreement"]["tolerance"] == 0.05
    assert (row["dense"]["peak_bytes"] is not None) == torch.cuda.is_available()
    # A second run adds its rows to the first one's.
    again = _models(tmp_path, "--only", "gpt2-smoke/.*/batch=2")
    assert again["rows"][0] == row and again["rows"][1]["case"] == "gpt2-smoke/ratio=8/batch=2"


FAILING = """
import dataclasses
from benchmarks import models
models.SMOKE_SHAPES = {
    "gone": dataclasses.replace(models.SMOKE_SHAPES["llama-smoke"], model_class="Gone"),
    "narrow": dataclasses.replace(models.SMOKE_SHAPES["llama-smoke"], ratios=(10**6,)),
}
def broken(*args, **kwargs):
    raise RuntimeError("no such kernel")
models.DecodingStep.forward = broken
models.SMOKE_SHAPES["failing"] = models.SMOKE_SHAPES["gone"].__class__(
    **{**dataclasses.asdict(models.SMOKE_SHAPES["narrow"]), "ratios": (8,)}
)
models.main()
"""


@pytest.mark.long
def test_a_failing_case_is_a_row_of_the_benchmark_of_whole_models(tmp_path: Path) -> None:
    rows = _models(tmp_path, code=FAILING)["rows"]
    assert [row["case"] for row in rows] == [
        f"{model}/ratio={ratio}/batch={batch}"
        for model, ratio in (("gone", 8), ("narrow", 10**6), ("failing", 8))
        for batch in (1, 2)
    ]
    failures = [row["failure"] for row in rows]
    assert all("has no attribute Gone" in failure for failure in failures[:2])
    assert all(failure.startswith("PlanError: ratio 1e+06 is unreachable") for failure in failures[2:4])
    assert all("the dense model fails on the example inputs under torch.compile" in failure for failure in failures[4:])


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_both_models_are_checked_and_timed(
    net: Net, inputs: Tensor, train: bool, graph: bool, dtype: str
) -> None:
    report = bench(net, inputs, device="cuda", train=train, graph=graph, dtype=dtype, batches=[8, 32])
    assert report.graph is graph and report.device == f"cuda:{torch.cuda.current_device()}" and report.machine["gpu"]
    assert next(net.parameters()).device.type == "cpu"
    for case in report.cases:
        assert case.agreement.error <= case.agreement.tolerance
        assert (case.agreement.gradient_error is not None) is train
        assert case.inputs[0][1] == f"{dtype}[{case.batch}, 64] on {report.device}"
        for side in (case.dense, case.converted):
            assert side.time.median_ms > 0 and side.peak_bytes > side.parameter_bytes


@pytest.mark.gpu
def test_on_a_gpu_each_models_peak_memory_is_measured_alone() -> None:
    # The weights are large compared with cuBLAS's workspace.
    size, rows = 8192, 64
    model = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
    x, weights, activations = torch.randn(rows, size), 2 * 2 * size * size, 2 * rows * size
    (case,) = bench(model, x, ratio=50, device="cuda", dtype="bfloat16").cases
    assert weights + 3 * activations <= case.dense.peak_bytes < 1.5 * weights
    assert case.converted.parameter_bytes + 3 * activations <= case.converted.peak_bytes < 0.5 * weights
    # In training a gradient of every weight is held as well.
    (training,) = bench(model, x, ratio=50, device="cuda", dtype="bfloat16", train=True).cases
    assert training.dense.peak_bytes > 2 * weights


@pytest.mark.gpu
@pytest.mark.parametrize("converted_only", [False, True])
def test_on_a_gpu_a_model_that_cannot_be_captured_is_an_error(
    never_timed: None, inputs: Tensor, converted_only: bool
) -> None:
    def waits(y: Tensor) -> Tensor:
        return y * float(y.sum().item() > 0)

    model: nn.Module = Minding(waits) if converted_only else Returning(waits)
    who = "converted" if converted_only else "dense"
    with pytest.raises(BenchError, match=f"the {who} model cannot be captured in a CUDA graph: .*--no-graph"):
        bench(model, inputs, ratio=2, device="cuda")
    # The GPU can be used afterwards.
    with pytest.raises(AssertionError, match="timed"):
        bench(Returning(lambda y: y), inputs, ratio=2, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu_a_graph_that_disagrees_is_not_timed(never_timed: None, inputs: Tensor) -> None:
    with pytest.raises(OutputMismatch, match="so nothing was timed"):
        bench(Minding(lambda y: y * 1.01), inputs, ratio=2, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu_random_numbers_are_the_same_on_both_sides(inputs: Tensor) -> None:
    for graph in (True, False):
        bench(Returning(lambda y: F.dropout(y, 0.5, training=True)), inputs, ratio=2, device="cuda", graph=graph)


@pytest.mark.gpu
def test_on_a_gpu_running_out_of_memory_is_reported(net: Net, inputs: Tensor) -> None:
    with pytest.raises(BenchError, match="the dense model fails on the example inputs: OutOfMemoryError"):
        bench(Returning(lambda y: (y, y.new_empty(1 << 50))), inputs, ratio=2, device="cuda")
