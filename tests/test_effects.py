"""Effects on a read weight are refused or happen, none is lost: writes by any operator, hooks, gradients, freezing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify
from roastify.errors import RoastError, WriteRefused


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.last = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*(self.last(self.first(x).relu())[None],) * 3)[0]


def converted(trained: bool = True) -> Any:
    torch.manual_seed(0)
    return roastify.convert(Net().requires_grad_(trained), 4)


# Each is given a read weight; afterwards the weight is as before.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "eye": nn.init.eye_,
    "dirac": lambda w: nn.init.dirac_(w.view(*w.shape, 1)),
    "orthogonal": nn.init.orthogonal_,
    "normal": nn.init.normal_,
    "method": lambda w: w.zero_(),
    "function": torch.zero_,
    "method of the class": lambda w: Tensor.copy_(w, torch.zeros_like(w)),
    "data": lambda w: torch.clamp_(w.data, -1e-3, 1e-3),
    "out": lambda w: torch.mul(w.detach(), 0, out=w.data),
    "several outs": lambda w: torch.max(w.detach(), 0, out=(w[0], torch.zeros(w.shape[1], dtype=torch.int64))),
    "foreach": lambda w: torch._foreach_mul_([w], 0.0),
    "foreach beside another": lambda w: torch._foreach_add_([torch.zeros_like(w), w], 1.0),
    "inplace argument": lambda w: F.relu(w, inplace=True),
    "inplace function": lambda w: F.threshold_(w, 0.0, 1.0),
    "reshape": lambda w: w.reshape(-1).zero_(),
    "reshaped data": lambda w: w.data.reshape(-1)[:].fill_(0),
    "ravel": lambda w: w.ravel().zero_(),
    "unfold": lambda w: w.unfold(0, 2, 2).zero_(),
    "item": lambda w: w.data.__setitem__(0, 1.0),
    "index": lambda w: w.index_fill_(0, torch.tensor([0]), 1.0),
    "split": lambda w: torch.split(w, 2)[0].zero_(),
    "real": lambda w: torch.real(w).zero_(),
    "as_strided": lambda w: w.as_strided((2,), (1,)).zero_(),
    "set_": lambda w: w.set_(torch.zeros(1)),
    "overload": lambda w: torch.ops.aten.mul_.Tensor(w.detach(), torch.zeros(())),
    "lookup that renormalises": lambda w: F.embedding(torch.tensor([0]), w, max_norm=1e-3),
    "swap": lambda w: w.data.copy_(w.data.flip(0)),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused(name: str, trained: bool) -> None:
    model = converted(trained)
    before = model.last.weight.detach().clone()
    with torch.no_grad(), pytest.raises(WriteRefused):
        WRITES[name](model.last.weight)
    assert torch.equal(model.last.weight, before)


def test_a_numpy_array_of_a_weight_is_read_only() -> None:
    model = converted()
    for array in (model.last.weight.detach().numpy(), np.asarray(model.last.weight.detach())):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook", "retain_grad"])
def test_hooks_are_refused(name: str) -> None:
    arguments = () if name == "retain_grad" else (lambda *_: None,)
    with pytest.raises(WriteRefused, match="the next read gives another tensor"):
        getattr(converted().last.weight, name)(*arguments)


def test_a_gradient_cannot_be_set() -> None:
    model = converted()
    with pytest.raises(WriteRefused, match="grad ="):
        model.last.weight.grad = torch.ones(64, 128)
    model.last.weight.grad = None


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_one_weight_cannot_be_frozen_or_trained_apart(trained: bool, recorded: bool) -> None:
    model = converted(trained)
    with torch.set_grad_enabled(recorded):
        with pytest.raises(RoastError, match=r"the shared pool, which is (trained|frozen) as a whole"):
            model.last.weight.requires_grad_(not trained)
        with pytest.raises(RoastError, match=r"the shared pool, which is (trained|frozen) as a whole"):
            model.last.weight.requires_grad = not trained
        model.last.weight.requires_grad_(trained)


def test_no_optimizer_takes_a_read_weight() -> None:
    for trained in (True, False):
        with pytest.raises(ValueError, match="non-leaf"):
            torch.optim.SGD([converted(trained).last.weight], lr=0.1)


@pytest.mark.parametrize("ask", [torch.autograd.grad, lambda loss, w: torch.autograd.backward(loss, inputs=[w]),
                                 lambda loss, w: loss.backward(inputs=[w])])  # fmt: skip
def test_a_gradient_for_a_weight_that_is_read_anew_says_how_to_ask(ask: Callable[..., Any]) -> None:
    model = converted()
    with pytest.raises(RuntimeError, match=r"the loss was computed from the pool, not from this.*roast_pool\.weight"):
        ask(model(torch.ones(3, 64)).sum(), model.last.weight)
    weight = model.last.weight
    (gradient,) = torch.autograd.grad(weight.square().sum(), weight)
    torch.testing.assert_close(gradient, 2 * weight.detach())


def test_reading_works_as_before() -> None:
    """Whatever has no effect on the weight gives plain results."""
    model = converted()
    weight = model.last.weight
    dense = roastify.densify(model).last.weight
    assert type(weight * 2) is Tensor and type(weight.clone()) is Tensor and type(weight.mean()) is Tensor
    torch.testing.assert_close(weight.float().norm(), dense.norm())
    assert isinstance(weight, nn.Parameter) and weight.shape == dense.shape and weight.tolist() == dense.tolist()
    other = torch.zeros_like(dense)
    with torch.no_grad():
        other.copy_(weight)
        torch.mul(weight, 2, out=other)
    torch.testing.assert_close(other, 2 * dense.detach())
    assert [part.shape for part in torch.split(weight, 32)] == [torch.Size((32, 128))] * 2
    weight.square().sum().backward()
    assert model.roast_pool.weight.grad.any()


class Tagged(Tensor):
    """A user's class of tensors, whose operations give tensors of the class."""


def test_tensors_of_another_class_decide_what_an_operation_on_both_gives() -> None:
    weight = converted().last.weight
    tagged = torch.ones(64, 128).as_subclass(Tagged)
    for result in (weight + tagged, tagged + weight, torch.stack([weight, tagged]), torch.where(tagged > 0, weight, 0)):
        assert type(result) is Tagged
    assert torch.equal((weight * tagged).as_subclass(Tensor), weight.detach())
    with pytest.raises(WriteRefused):
        weight.detach().add_(tagged)
    with pytest.raises(WriteRefused):
        torch.add(tagged, 1, out=weight.detach())


@pytest.mark.parametrize("change", [Tensor.to_sparse, Tensor.to_sparse_csr, lambda w: w.detach().to_mkldnn()])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_weight_can_be_copied_into_another_layout(change: Callable[[Tensor], Tensor]) -> None:
    weight = converted().last.weight
    assert torch.equal(change(weight).to_dense(), weight.detach())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_function_takes_a_read_weight(trained: bool, recorded: bool) -> None:
    def penalty(weight: Tensor, x: Tensor) -> Tensor:
        return (x @ weight.t()).relu().sum() + weight.square().sum()

    model = converted(trained)
    compiled = torch.compile(penalty, backend="eager", fullgraph=True)
    x = torch.ones(3, 128)
    with torch.set_grad_enabled(recorded):
        # Torch compares whether a tensor is a leaf with its own copy of it, and a frozen weight says that it is none.
        frozen = recorded and not trained
        for weight in (model.last.weight.detach() if frozen else model.last.weight, model.last.weight.t().t()):
            torch.testing.assert_close(compiled(weight, x), penalty(weight, x))
        if trained and recorded:
            compiled(model.last.weight, x).backward()
            assert model.roast_pool.weight.grad.any()


def test_the_models_own_code_is_given_tensors_without_guards() -> None:
    """Torch's fused layers ask whether an argument overrides functions, and are off if one does."""
    seen = []

    class Looking(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(torch.overrides.has_torch_function((self.in_proj_weight,)))
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    net = Net()
    net.attention = Looking(64, 4, batch_first=True)
    model: Any = roastify.convert(net, 4)
    seen.clear()
    model(torch.ones(3, 64)).sum().backward()
    assert seen and not any(seen) and torch.overrides.has_torch_function((model.attention.in_proj_weight,))
