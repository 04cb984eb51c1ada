"""Which differences verification finds, and which it allows; it leaves models as they were."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roastify
from roastify.errors import OutputMismatch, RoastError, SignatureMismatch
from roastify.layers.modules import RoastLinear

X = torch.arange(12.0).view(3, 4)


def _with_forward(forward: Callable[..., Any]) -> nn.Module:
    """Return a module of a class of its own, whose forward is this function (without `self` in its arguments)."""
    return type("Model", (nn.Module,), {"forward": forward})()


class _Mode(enum.Enum):
    FAST = 1


SIGNATURES: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "missing": (lambda self, x, mask: x, lambda self, x: x, "parameter 'mask' is missing"),
    "new": (lambda self, x: x, lambda self, x, mask: x, "parameter 'mask' is new"),
    "renamed": (lambda self, x: x, lambda self, y: y, "parameter 'x' is missing; parameter 'y' is new"),
    "kind": (
        lambda self, x, mask=None: x,
        lambda self, x, *, mask=None: x,
        "parameter 'mask': kind expected .*POSITIONAL_OR_KEYWORD.*, found .*KEYWORD_ONLY",
    ),
    "positional only": (lambda self, x: x, lambda self, x, /: x, "parameter 'x': kind expected"),
    "variadic": (lambda self, *args: args, lambda self, **args: args, "parameter 'args': kind expected"),
    "default": (
        lambda self, x, scale=1.0: x,
        lambda self, x, scale=2.0: x,
        r"parameter 'scale': default expected 1\.0, found 2\.0",
    ),
    "default's type": (
        lambda self, x, scale=1: x,
        lambda self, x, scale=1.0: x,
        r"parameter 'scale': default expected 1, found 1\.0",
    ),
    "default lost": (lambda self, x, mask=None: x, lambda self, x, mask: x, "parameter 'mask': default expected None"),
    "order": (lambda self, x, y: x, lambda self, y, x: x, "the parameters are in another order"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_difference_in_the_signature_is_found(name: str) -> None:
    before, after, message = SIGNATURES[name]
    for first, second in ((before, after), (after, before)):
        pattern = message if first is before else "the converted model's forward"
        with pytest.raises(SignatureMismatch, match=pattern):
            roastify.verify(_with_forward(first), _with_forward(second))


def test_a_difference_in_an_annotation_is_found() -> None:
    def tensor(self: Any, x: Tensor) -> Tensor:
        return x

    def other(self: Any, x: list[Tensor]) -> Tensor:
        return x[0]

    def returns_other(self: Any, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def returns_nothing(self: Any, x: Tensor):  # type: ignore[no-untyped-def]
        return x

    with pytest.raises(SignatureMismatch, match=r"parameter 'x': annotation expected .*Tensor.*, found list"):
        roastify.verify(_with_forward(tensor), _with_forward(other))
    with pytest.raises(SignatureMismatch, match=r"it returns tuple\[torch\.Tensor\], expected <class 'torch\.Tensor'>"):
        roastify.verify(_with_forward(tensor), _with_forward(returns_other))
    with pytest.raises(SignatureMismatch, match=r"it returns .*empty.*, expected .*Tensor"):
        roastify.verify(_with_forward(tensor), _with_forward(returns_nothing))


def test_the_message_shows_both_signatures() -> None:
    with pytest.raises(SignatureMismatch, match=r"forward\(y\) differs from the original's forward\(x, mask=None\)"):
        roastify.verify(_with_forward(lambda self, x, mask=None: x), _with_forward(lambda self, y: y))


def test_a_signature_that_differs_on_the_object_is_found() -> None:
    # forward is set on the instance, as accelerate's hooks do; a caller then calls the instance's.
    original, converted = nn.Linear(4, 4), nn.Linear(4, 4)
    converted.forward = lambda x: x
    with pytest.raises(SignatureMismatch, match="parameter 'input' is missing"):
        roastify.verify(original, converted)


def test_equal_signatures_pass() -> None:
    def plain(self: Any, x: Tensor, mode: _Mode = _Mode.FAST, scale: float = float("nan"), *rest: int) -> Tensor:
        return x

    def again(self: Any, x: Tensor, mode: _Mode = _Mode.FAST, scale: float = float("nan"), *rest: int) -> Tensor:
        return 2 * x

    report = roastify.verify(_with_forward(plain), _with_forward(again))
    assert report.signature.startswith("(x: torch.Tensor, mode:") and report.modes == () and report.outputs == ()


def test_annotations_that_cannot_be_evaluated_compare_as_text() -> None:
    def unknown(self: Any, x: Nowhere) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return x

    def same(self: Any, x: Nowhere) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return x

    def other(self: Any, x: Elsewhere) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return x

    roastify.verify(_with_forward(unknown), _with_forward(same))
    with pytest.raises(SignatureMismatch, match="annotation expected 'Nowhere', found 'Elsewhere'"):
        roastify.verify(_with_forward(unknown), _with_forward(other))


class Returns(nn.Module):
    """Returns what a given function makes of its input and mode."""

    def __init__(self, make: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x, self.training)


@dataclasses.dataclass
class _Result:
    logits: Tensor
    state: Any = None


class _Point(collections.namedtuple("_Point", "x y")):
    __slots__ = ()


DIFFERENCES: dict[str, tuple[Callable[[Tensor, bool], Any], Callable[[Tensor, bool], Any], str]] = {
    "type": (lambda x, _: (x, x), lambda x, _: [x, x], "in eval mode .* returns a list; expected a tuple"),
    "named tuple": (lambda x, _: _Point(x, x), lambda x, _: (x, x), "returns a tuple; expected a _Point"),
    "nothing": (lambda x, _: x, lambda x, _: None, "returns a NoneType; expected a Tensor"),
    "length": (lambda x, _: (x, x), lambda x, _: (x,), r"outputs are \['\[0\]'\]; expected \['\[0\]', '\[1\]'\]"),
    "key": (lambda x, _: {"a": x}, lambda x, _: {"b": x}, r"outputs are .*'b'.*; expected .*'a'"),
    "depth": (lambda x, _: {"a": (x,)}, lambda x, _: {"a": x}, r"outputs are .*'a'\]\"?\]; expected .*'a'\]\[0\]"),
    "shape": (lambda x, _: x, lambda x, _: x[:, :3], r"is float32\[3, 3\] on cpu; expected float32\[3, 4\] on cpu"),
    "rank": (lambda x, _: x, lambda x, _: x[None], r"is float32\[1, 3, 4\]"),
    "dtype": (lambda x, _: x, lambda x, _: x.double(), r"is float64\[3, 4\] on cpu; expected float32"),
    "shape inside": (
        lambda x, _: {"a": [x, x]},
        lambda x, _: {"a": [x, x[:1]]},
        r"output \['a'\]\[1\] of the converted model is float32\[1, 4\]",
    ),
    "leaf": (lambda x, _: (x, None), lambda x, _: (x, 3), r"\[1\]"),
    "number": (lambda x, _: (x, 3), lambda x, _: (x, 3.0), r"output \[1\] .* is float; expected int"),
    "device": (lambda x, _: x, lambda x, _: x.to("meta"), r"on meta; expected float32\[3, 4\] on cpu"),
    "dataclass": (lambda x, _: _Result(x), lambda x, _: _Result(x[:2]), r"logits.*float32\[2, 4\]"),
    "dataclass field": (lambda x, _: _Result(x, x), lambda x, _: _Result(x, 3), "state.* is int; expected float32"),
    "train only": (
        lambda x, _: x,
        lambda x, training: x[:2] if training else x,
        r"in train mode output .* is float32\[2, 4\] on cpu; expected float32\[3, 4\]",
    ),
    "train only, structure": (
        lambda x, training: (x, x) if training else x,
        lambda x, _: x,
        "in train mode the converted model returns a Tensor; expected a tuple",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_in_the_outputs_is_found(name: str) -> None:
    before, after, message = DIFFERENCES[name]
    with pytest.raises(OutputMismatch, match=message):
        roastify.verify(Returns(before), Returns(after), X)
    # Equal outputs of the same structures pass.
    roastify.verify(Returns(before), Returns(before), X)
    roastify.verify(Returns(after), Returns(after), X)


@pytest.mark.parametrize(
    "wrap", [lambda result: (result,), lambda result: {"a": result}, lambda result: _Result(X, result)]
)
def test_a_difference_in_a_dataclass_inside_is_found(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(OutputMismatch, match="logits"):
        roastify.verify(Returns(lambda x, _: wrap(_Result(x))), Returns(lambda x, _: wrap(_Result(x[:2]))), X)


def test_values_may_differ() -> None:
    report = roastify.verify(Returns(lambda x, _: (x, 3)), Returns(lambda x, _: (-x, 4)), X)
    assert report.modes == ("eval", "train")
    assert report.outputs == (("[0]", "float32[3, 4] on cpu"), ("[1]", "int"))


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (lambda x, _: x, ["output"]),
        (lambda x, _: (x, [x, None]), ["[0]", "[1][0]"]),
        (lambda x, _: {"a": x, "b": {"c": x}}, ["['a']", "['b']['c']"]),
        (lambda x, _: collections.OrderedDict(a=x), ["['a']"]),
        (
            lambda x, _: _Result(x, (x, x)),
            [".logits", ".state[0]", ".state[1]"],
        ),
        (lambda x, training: (x, x) if training else x, ["output"]),
    ],
)
def test_equal_outputs_of_every_structure_pass_and_are_reported(
    make: Callable[[Tensor, bool], Any], paths: list[str]
) -> None:
    report = roastify.verify(Returns(make), Returns(make), X)
    tensors = [path for path, description in report.outputs if description == "float32[3, 4] on cpu"]
    assert tensors == paths


def _tiny(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**settings))


@pytest.mark.parametrize(
    ("name", "settings", "outputs"),
    [
        (
            "BertModel",
            {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"intermediate_size": 64, "max_position_embeddings": 16},
            {"float32[2, 5, 32] on cpu", "float32[2, 32] on cpu"},
        ),
        (
            "GPT2LMHeadModel",
            {"vocab_size": 90, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
            | {"bos_token_id": 0, "eos_token_id": 0},
            {"float32[2, 5, 90] on cpu"},
        ),
    ],
)
def test_transformers_outputs_are_compared_field_by_field(
    name: str, settings: dict[str, Any], outputs: set[str]
) -> None:
    model = _tiny(name, **settings)
    inputs = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    converted = roastify.convert(model, 4, example_inputs=inputs)
    report = roastify.verify(model, converted, inputs)
    assert report.modes == ("eval", "train")
    assert outputs <= {description for _, description in report.outputs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"hidden_states": None}, r"last_hidden_state'\]\"\]; expected .*'hidden_states'\]\[0\]"),
        (lambda x: {"hidden_states": (x, x)}, "expected .*hidden_states"),
        (lambda x: {"last_hidden_state": x.half()}, r"last_hidden_state.* is float16\[3, 4\]"),
    ],
)
def test_a_field_of_a_transformers_output_that_differs_is_found(
    change: Callable[[Tensor], dict[str, Any]], message: str
) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def make(x: Tensor, _: bool) -> Any:
        return outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x,))

    def changed(x: Tensor, _: bool) -> Any:
        return outputs.BaseModelOutput(**{"last_hidden_state": x, "hidden_states": (x,)} | change(x))

    report = roastify.verify(Returns(make), Returns(make), X)
    assert [description for _, description in report.outputs] == ["float32[3, 4] on cpu"] * 2
    with pytest.raises(OutputMismatch, match=message):
        roastify.verify(Returns(make), Returns(changed), X)
    with pytest.raises(OutputMismatch, match="returns a tuple; expected a BaseModelOutput"):
        roastify.verify(Returns(make), Returns(lambda x, _: (x, (x,))), X)


class Stateful(nn.Module):
    """Has everything that a forward pass changes, or that a comparison might change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 48)
        self.norm = nn.BatchNorm1d(48)
        self.drop = nn.Dropout(0.5)
        self.late = nn.Linear(48, 48)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.late(self.drop(self.norm(self.fc(x) + torch.rand(48))))


def _traces(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "seen": model.seen.tolist(),
        "buffers": [id(buffer) for buffer in model.buffers()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("training", [True, False])
def test_both_models_and_the_random_generator_are_left_as_they_were(training: bool) -> None:
    original, converted = Stateful(), Stateful()
    for model in (original, converted):
        model.train(training)
        model.norm.train(not training)
    before = _traces(original), _traces(converted)
    roastify.verify(original, converted, X)
    assert (_traces(original), _traces(converted)) == before


def test_a_failed_comparison_leaves_both_models_as_they_were() -> None:
    class Failing(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("late")

    for original, converted, error in (
        (Stateful(), Failing(), OutputMismatch),
        (Failing(), Stateful(), RoastError),
    ):
        before = _traces(original), _traces(converted)
        with pytest.raises(error, match="fails on the example inputs in eval mode: ValueError: late"):
            roastify.verify(original, converted, X)
        assert (_traces(original), _traces(converted)) == before


def test_convert_leaves_the_original_and_the_random_generator_as_they_were() -> None:
    model = Stateful()
    before = _traces(model)
    converted = roastify.convert(model, 1.5, example_inputs=X)
    assert _traces(model) == before
    assert converted.seen.tolist() == 0
    assert converted.norm.num_batches_tracked.tolist() == 0
    modes = [module.training for name, module in converted.named_modules() if name != "roast_pool"]
    assert modes == before["modes"]


def test_a_buffer_that_forward_assigns_anew_is_restored() -> None:
    class Assigning(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.late(self.fc(x))

    model = Assigning()
    roastify.convert(model, 1.5, example_inputs=X)
    assert model.seen.tolist() == 0


def test_a_buffer_whose_elements_share_memory_is_accepted() -> None:
    class Expanded(Stateful):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("repeated", torch.ones(1).expand(4))

    model = Expanded()
    roastify.verify(model, model, X)


def test_example_inputs_are_left_as_they_were() -> None:
    model = Returns(lambda x, _: x.add_(1))
    x = X.clone()
    roastify.verify(model, model, x)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "example_inputs", [{"x": X, "scale": 2.0}, collections.OrderedDict(x=X), {"x": X, "scale": torch.ones(4)}]
)
def test_forwards_of_keyword_arguments_only_are_called_with_them(example_inputs: dict[str, Any]) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 512)

        def forward(self, *, x: Tensor, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
            return {"y": self.fc(x * scale)}

    model = Keywords()
    converted = roastify.convert(model, 1.5, example_inputs=example_inputs)
    report = roastify.verify(model, converted, example_inputs)
    assert report.outputs == (("['y']", "float32[3, 512] on cpu"),)
    assert report.signature.startswith("(*, x: torch.Tensor, scale: ")


@pytest.mark.parametrize("example_inputs", [(X, X[:2]), [X, X[:2]]])
def test_a_sequence_holds_positional_arguments(example_inputs: Any) -> None:
    model = _with_forward(lambda self, x, y: (x, y))
    report = roastify.verify(model, model, example_inputs)
    assert [description for _, description in report.outputs] == ["float32[3, 4] on cpu", "float32[2, 4] on cpu"]


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 512)
        self.last = nn.Linear(512, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda output: output[..., :-1], "mat1 and mat2|expected float32|fails on the example inputs"),
        (lambda output: output.double(), "float64|dtype"),
        (lambda output: (output, output), "fails on the example inputs in eval mode|returns a tuple"),
        (lambda output: None, "fails on the example inputs in eval mode|NoneType"),
    ],
)
def test_a_broken_layer_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[Tensor], Any], message: str
) -> None:
    model = _Dense()
    converted = roastify.convert(model, 2, example_inputs=X)
    right = RoastLinear.forward
    monkeypatch.setattr(RoastLinear, "forward", lambda self, input: broken(right(self, input)))
    with pytest.raises(OutputMismatch, match=message):
        roastify.verify(model, converted, X)
    with pytest.raises(OutputMismatch, match=message):
        roastify.convert(model, 2, example_inputs=X)
    # Without example inputs only signatures are compared, and the report says so.
    assert roastify.verify(model, converted).modes == ()
