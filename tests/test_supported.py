"""What convert refuses and with which message; a refused or failed conversion leaves the model unchanged."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify import RoastConfig
from roastify.conversion import rewrite
from roastify.errors import ConfigError, ConversionError, OutputMismatch, PlanError, RoastError
from roastify.layers.class_swap import to_roast


class Net(nn.Module):
    """Three shared layers, two of them tied, a running statistic, a child in another mode, and a hook."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.out = nn.Linear(width, 30, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(width), persistent=False)
        self.block[2].eval()
        self.block[0].register_forward_hook(_nothing)
        self.note = ["kept"]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.block(self.embed(tokens) + self.offset))


def _nothing(*_: Any) -> None:
    return None


TOKENS = torch.arange(12) % 30


class _Frozen:
    """Records a model, to check later that nothing in it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = self._modules()
        self.tensors = self._tensors()
        self.values = [None if _without_values(tensor) else tensor.detach().clone() for _, tensor in self.tensors]
        self.generator = torch.get_rng_state()

    def _modules(self) -> list[tuple[Any, ...]]:
        return [
            (name, module, type(module), module.training, list(vars(module)), list(module._forward_hooks.values()))
            for name, module in self.model.named_modules(remove_duplicate=False)
        ]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]

    def assert_unchanged(self) -> None:
        assert self._modules() == self.modules
        tensors = self._tensors()
        assert [name for name, _ in tensors] == [name for name, _ in self.tensors]
        for (name, tensor), (_, original), value in zip(tensors, self.tensors, self.values, strict=True):
            # The parameter is still the same object, so an optimizer created before still trains this model.
            assert tensor is original, name
            assert tensor.requires_grad == original.requires_grad and tensor.grad is None, name
            if value is not None:
                torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(torch.get_rng_state(), self.generator)


def _without_values(tensor: Tensor) -> bool:
    return tensor.is_meta or nn.parameter.is_lazy(tensor)


def _assert_refused(
    model: nn.Module, error: type[RoastError], message: str, inplace: bool = False, ratio: Any = 3, **arguments: Any
) -> None:
    before = _Frozen(model)
    with pytest.raises(error, match=message) as caught:
        roastify.convert(model, ratio, inplace=inplace, **arguments)
    assert type(caught.value) is error
    before.assert_unchanged()


both_ways = pytest.mark.parametrize("inplace", [False, True])


def _trained() -> nn.Module:
    """Return a model whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    model = Net()
    model(TOKENS)
    return model


@pytest.mark.parametrize("thing", [3, None, nn.Linear, {"weight": torch.zeros(2)}, "model.py"])
@pytest.mark.parametrize("function", [roastify.convert, roastify.plan])
def test_an_object_that_is_no_module_is_refused(function: Callable[..., Any], thing: Any) -> None:
    with pytest.raises(ConversionError, match=rf"expected a torch\.nn\.Module; found {type(thing).__name__}"):
        function(thing, 3)


@both_ways
@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.5, r"ratio must be at least 1 \(1 stores every parameter, 50 stores a fiftieth\); found 0\.5"),
        (0, "ratio must be at least 1 .*; found 0"),
        (-10, "ratio must be at least 1 .*; found -10"),
        (float("nan"), "ratio must be a finite number of at least 1; found nan"),
        (float("inf"), "ratio must be a finite number of at least 1; found inf"),
        ("10", "ratio must be a finite number of at least 1; found '10'"),
        (True, "ratio must be a finite number of at least 1; found True"),
        ([10], r"ratio must be a finite number of at least 1; found \[10\]"),
    ],
)
def test_an_invalid_ratio_is_refused(inplace: bool, ratio: Any, message: str) -> None:
    _assert_refused(_trained(), ConfigError, message, inplace, ratio)


def test_a_ratio_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(RoastError, match="ratio"):
        roastify.convert(Net(), 10**400)


@both_ways
def test_the_error_of_an_unreachable_ratio_names_the_largest_one_and_the_biggest_kept_tensors(inplace: bool) -> None:
    model = _trained()
    before = _Frozen(model)
    weights = RoastConfig(share="weights")
    with pytest.raises(PlanError, match=r"ratio 500 is unreachable: .*The biggest kept: block\.0\.bias 48") as caught:
        roastify.convert(model, 500, config=weights, inplace=inplace)
    before.assert_unchanged()
    found = re.search(r"The largest reachable ratio is ([\d.]+)\.", str(caught.value))
    assert found is not None
    largest = float(found[1])
    # The named ratio is reachable, and a slightly larger one is not.
    assert roastify.convert(model, largest, config=weights).roast_pool.plan.achieved_ratio >= largest
    _assert_refused(model, PlanError, "is unreachable", inplace, largest + 0.02, config=weights)


class _OwnPool(Net):
    def __init__(self) -> None:
        super().__init__()
        self.roast_pool = "mine"


def _lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = Net()
        model.late = nn.LazyLinear(5)
    return model


def _scripted(root: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit")
        scripted = torch.jit.script(nn.Linear(48, 48))
    model = Net()
    model.block[0] = scripted
    return scripted if root else model


def _on_two_devices() -> nn.Module:
    model = Net()
    model.block.to("meta")
    return model


def _with_nan(name: str, value: float = float("nan")) -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], type[RoastError], str]] = {
    "no eligible weight": (
        lambda: nn.Sequential(nn.Embedding(64, 32, max_norm=1.0), nn.Embedding(20, 20, max_norm=1.0)),
        PlanError,
        r"no weight of the model is eligible for sharing; the biggest kept: 0\.weight 2,048 \(max_norm rewrites rows "
        r"in place.*Lower min_numel, widen include or narrow exclude",
    ),
    "no parameters": (nn.ReLU, PlanError, "the model has no parameters, so there is nothing to share"),
    "a lazy module": (
        _lazy,
        ConversionError,
        r"late\.weight is not initialised yet \(a lazy module\); run one forward pass on real inputs first",
    ),
    "converted": (
        lambda: roastify.convert(Net(), 3),
        ConversionError,
        r"already converted; convert the dense model, or go back with roastify\.densify\(model\) first",
    ),
    "a part of a converted one": (lambda: roastify.convert(Net(), 3).block, ConversionError, "already converted"),
    "around a converted one": (lambda: nn.Sequential(roastify.convert(Net(), 3)), ConversionError, "already converted"),
    "a TorchScript root": (
        lambda: _scripted(root=True),
        ConversionError,
        "^the model is a TorchScript module, whose code cannot be rewritten; convert the eager model",
    ),
    "a TorchScript child": (lambda: _scripted(root=False), ConversionError, r"^block\.0 is a TorchScript module"),
    "compiled": (
        lambda: torch.compile(Net(), backend="eager"),
        ConversionError,
        r"torch\.compile's wrapper; pass the model inside it \(its \._orig_mod\), and wrap what comes back",
    ),
    "in DataParallel": (
        lambda: nn.DataParallel(Net()),
        ConversionError,
        r"is the wrapper DataParallel; pass the model inside it \(its \.module\), and wrap what comes back",
    ),
    "two devices": (
        _on_two_devices,
        ConversionError,
        r"several devices \(embed\.weight on cpu, block\.0\.weight on meta\).*move the model to one of them",
    ),
    "the meta device": (
        lambda: Net().to("meta"),
        ConversionError,
        r"the model is on the meta device and has no values .*roastify\.plan .*roastify\.load",
    ),
    "NaN": (
        lambda: _with_nan("block.0.weight"),
        ConversionError,
        r"block\.0\.weight holds NaN or infinite values; repair the weights or exclude the tensor",
    ),
    "infinity": (lambda: _with_nan("embed.weight", float("inf")), ConversionError, r"embed\.weight holds NaN or inf"),
    "an attribute roast_pool": (
        _OwnPool,
        ConversionError,
        "the model has an attribute 'roast_pool' of its own; rename it",
    ),
}


@both_ways
@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_that_cannot_be_converted_is_refused_and_left_alone(inplace: bool, name: str) -> None:
    build, error, message = REFUSALS[name]
    _assert_refused(build(), error, message, inplace)


@pytest.mark.parametrize("name", [name for name in REFUSALS if name != "the meta device"])
def test_plan_refuses_the_same_models_with_the_same_messages(name: str) -> None:
    build, error, message = REFUSALS[name]
    model = build()
    before = _Frozen(model)
    with pytest.raises(error, match=message):
        roastify.plan(model, 3)
    before.assert_unchanged()


def test_a_refused_model_converts_if_the_user_follows_the_errors_advice() -> None:
    lazy = _lazy()
    lazy.late(torch.zeros(2, 48))
    roastify.convert(lazy, 3)
    roastify.convert(torch.compile(Net(), backend="eager")._orig_mod, 3)
    roastify.convert(nn.DataParallel(Net()).module, 3)
    roastify.convert(_with_nan("block.0.weight"), 1.5, exclude="block.0.weight")
    roastify.convert(nn.Sequential(nn.LayerNorm(64), nn.Linear(20, 20)), 1.2, include="1")
    roastify.convert(roastify.densify(roastify.convert(Net(), 3)), 3)
    assert roastify.plan(Net().to("meta"), 3).achieved_ratio >= 3


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _nested(depth: int) -> nn.Module:
    model: nn.Module = nn.Linear(64, 64)
    for _ in range(depth - 1):
        model = _Around(model)
    return model


@both_ways
def test_modules_nested_too_deeply_for_python_are_refused(inplace: bool) -> None:
    message = r"^its modules are nested 3,000 levels deep, .* limit of \d,\d+ is enough for \d+; .*setrecursionlimit$"
    model = _nested(3000)
    for work in (lambda: roastify.convert(model, 2, inplace=inplace), lambda: roastify.plan(model, 2)):
        with pytest.raises(ConversionError, match=message):
            work()
    assert type(model) is _Around and type(model.inner) is _Around


def test_modules_nested_deeply_convert_if_python_allows_it() -> None:
    limit, model = sys.getrecursionlimit(), _nested(400)
    try:
        sys.setrecursionlimit(20_000)
        x = torch.randn(2, 64)
        converted = roastify.convert(model, 2)
        torch.testing.assert_close(converted(x), roastify.densify(converted)(x))
    finally:
        sys.setrecursionlimit(limit)


@both_ways
def test_a_child_that_would_own_the_pool_is_refused_if_it_has_an_attribute_of_that_name(inplace: bool) -> None:
    # A Sequential root calls its children in turn, so the pool belongs to a child.
    first = nn.Linear(48, 48)
    first.roast_pool = "mine"
    model = nn.Sequential(first, nn.Linear(48, 48))
    _assert_refused(model, ConversionError, "^0 has an attribute 'roast_pool' of its own; rename it", inplace)


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "blok.*"}, r"include pattern 'blok\.\*' matched no parameter and no module .*closest: 'block"),
        ({"exclude": ["out", "embd"]}, "exclude pattern 'embd' matched no parameter.*closest: 'embed'"),
        ({"include": "re:.*attention"}, r"include pattern 're:\.\*attention' matched no parameter"),
        # A module without parameters is no match either.
        ({"exclude": "block.2"}, r"exclude pattern 'block\.2' matched no parameter and no module that has any"),
        ({"exclude": "*"}, "no weight of the model is eligible for sharing.*excluded by '\\*'"),
    ],
)
def test_patterns_that_match_nothing_or_leave_nothing_to_share_are_refused(
    inplace: bool, arguments: dict[str, Any], message: str
) -> None:
    _assert_refused(_trained(), PlanError, message, inplace, **arguments)


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": 3}, r"include must be a pattern or a list of patterns \(strings\); found 3"),
        ({"exclude": ["embed", ""]}, r"exclude must be a pattern or a list of patterns .*found \['embed', ''\]"),
        ({"include": "re:("}, r"include: 're:\(' is not a valid regular expression"),
        ({"init": "random"}, "init must be one of auto, match, project; found 'random'"),
        ({"init": "projct"}, "found 'projct'; closest: 'project'"),
        ({"seed": 1.5}, r"seed must be an integer; found 1\.5"),
        ({"config": {"ratio": 3}}, "config must be a RoastConfig or the path of a TOML file; found dict"),
        ({"config": "nowhere.toml"}, r"cannot read the config file nowhere\.toml: No such file or directory"),
    ],
)
def test_settings_that_make_no_sense_are_refused(inplace: bool, arguments: dict[str, Any], message: str) -> None:
    _assert_refused(_trained(), ConfigError, message, inplace, **arguments)


@both_ways
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratoi = 4", r"my\.toml: unknown setting 'ratoi'; closest: 'ratio'.*; the settings are ratio, init, seed"),
        ("[roast]\nratio = 4", r"my\.toml: unknown setting 'roast'"),
        ("ratio = 'ten'", r"my\.toml: ratio must be a finite number of at least 1; found 'ten'"),
        ("tile = '64'", r"my\.toml: tile must be 'auto' or ROWSxCOLS such as '64x64'; found '64'"),
        ("min_numel = -1", r"my\.toml: min_numel must be an integer of at least 0; found -1"),
        ("precondition = 1", r"my\.toml: precondition must be true or false; found 1"),
        ("ratio = \nseed = 1", r"the config file .*my\.toml is not valid TOML: .*line 1"),
    ],
)
def test_a_config_file_that_makes_no_sense_is_refused(inplace: bool, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    _assert_refused(_trained(), ConfigError, message, inplace, ratio=None, config=path)


@both_ways
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_of_rewriting_leaves_the_model_unchanged(
    monkeypatch: pytest.MonkeyPatch, inplace: bool, when: str, error: type[BaseException]
) -> None:
    model = _trained()
    before = _Frozen(model)
    swapped = []

    def failing(module: nn.Module, *arguments: Any) -> None:
        swapped.append(module)
        if len(swapped) < 2 or when == "after":
            to_roast(module, *arguments)
        if len(swapped) == 2:
            raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "to_roast", failing)
        with pytest.raises(error, match="in the middle"):
            roastify.convert(model, 3, inplace=inplace)
    assert len(swapped) == 2
    before.assert_unchanged()
    assert model.out.weight is model.embed.weight
    # The failed attempt left nothing behind that stops the next one.
    assert roastify.convert(model, 3, inplace=inplace, example_inputs=TOKENS).roast_pool.plan.achieved_ratio >= 3


class _Minding(Net):
    """Behaves differently if its layer's class is not exactly `nn.Linear`."""

    what = "raise"

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor]:
        output = super().forward(tokens)
        if type(self.block[0]) is nn.Linear:
            return output
        if self.what == "raise":
            raise TypeError("this is no Linear")
        return {"shape": output[:, :7], "dtype": output.double(), "structure": (output,)}[self.what]


@both_ways
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", "the converted model fails on the example inputs in eval mode: TypeError: this is no Linear"),
        ("shape", r"in eval mode output .*is float32\[12, 7\] on cpu; expected float32\[12, 30\] on cpu"),
        ("dtype", r"in eval mode output .*is float64\[12, 30\] on cpu; expected float32\[12, 30\] on cpu"),
        ("structure", "in eval mode the converted model returns a tuple; expected a Tensor"),
    ],
)
def test_a_model_that_behaves_differently_after_conversion_is_refused(inplace: bool, what: str, message: str) -> None:
    model = _Minding()
    model.what = what
    _assert_refused(model, OutputMismatch, message, inplace, example_inputs=TOKENS)
    assert model(TOKENS).shape == (12, 30)


@both_ways
@pytest.mark.parametrize(
    "example_inputs", [torch.zeros(3, 4, 5), (TOKENS, TOKENS), {"token": TOKENS}, torch.tensor([31]), "text"]
)
def test_the_error_blames_example_inputs_on_which_the_original_fails(inplace: bool, example_inputs: Any) -> None:
    message = "^the original model fails on the example inputs in eval mode: [A-Z][A-Za-z]*Error"
    _assert_refused(_trained(), RoastError, message, inplace, example_inputs=example_inputs)


@both_ways
def test_an_interrupt_during_verification_leaves_the_model_unchanged(inplace: bool) -> None:
    class Interrupted(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            if type(self.out) is not nn.Linear:
                raise KeyboardInterrupt
            return super().forward(tokens)

    model = Interrupted()
    before = _Frozen(model)
    with pytest.raises(KeyboardInterrupt):
        roastify.convert(model, 3, inplace=inplace, example_inputs=TOKENS)
    before.assert_unchanged()


def test_an_optimizer_created_before_a_failed_conversion_still_trains_the_model() -> None:
    model = _Minding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(OutputMismatch):
        roastify.convert(model, 3, inplace=True, example_inputs=TOKENS)
    weight = model.block[0].weight.detach().clone()
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model.block[0].weight)


def test_the_error_of_a_model_that_cannot_be_copied_suggests_inplace() -> None:
    class Uncopyable(Net):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("holds a lock")

    model = Uncopyable()
    message = r"cannot be deep-copied \(RuntimeError: holds a lock\); pass inplace=True to convert the model itself"
    _assert_refused(model, ConversionError, message)
    assert roastify.convert(model, 3, inplace=True, example_inputs=TOKENS) is model
