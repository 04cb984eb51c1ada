"""Convolutions with folded input channels, beside their dense weights: values, gradients, layouts, plans, files."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import roastify
from roastify import RoastConfig
from roastify.conversion.converted import pool_of
from roastify.conversion.fx_pass import trace
from roastify.conversion.planner import make_plan
from roastify.deployment import plain_operators
from roastify.errors import PlanError
from roastify.kernels import ops
from roastify.kernels.view import FoldView
from roastify.pool.fold import folded, folded_input, folded_squares, unfolded
from roastify.pool.plan import RoastPlan, TensorPlan
from roastify.pool.plan_checks import check_plan


def settings(**changes: Any) -> RoastConfig:
    return RoastConfig(**{"ratio": 8.0, "fold": 4, "tile": "8x8", "init": "match", **changes})


CONVERSIONS = {
    "two hashes": settings(),
    "whole kernels": settings(kernel_basis="none"),
    "one hash": settings(fold_hashes=1),
    "all hashes": settings(fold_hashes=4, kernel_basis="none"),
    "scales": settings(learned_scales=True),
    "scales of whole kernels": settings(learned_scales=True, kernel_basis="none"),
    "element signs": settings(sign="element"),
    "local": settings(sharing="local"),
}
each_conversion = pytest.mark.parametrize("config", CONVERSIONS.values(), ids=CONVERSIONS.keys())


class Net(nn.Module):
    """Two branches that read one value, as in Inception, and a convolution behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 24, 3, padding=1)
        self.beside = nn.Conv2d(32, 24, 5, padding=2, bias=False)
        self.last = nn.Conv2d(24, 16, 3, stride=2, dilation=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # Smooth, so that no rounding turns a gradient off.
        return self.last(F.silu(self.first(x)) * self.beside(x).sigmoid())


def a_net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (3, 32, 9, 7)), generator=torch.Generator().manual_seed(3), dtype=dtype)


def moved(model: nn.Module) -> nn.Module:
    """Give learned scales and bases values that tell them apart."""
    pool = pool_of(model)
    with torch.no_grad():
        pool.weight[pool.num_slots * pool.tile[0] :].normal_(0.0, 0.3)
        for basis in pool.bases():
            basis.add_(torch.randn_like(basis) * 0.1)
    return model


def plan_of(model: nn.Module, **changes: Any) -> RoastPlan:
    return make_plan(model, trace(model), settings(**changes))


def planned(plan: RoastPlan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.shared}


# Values and gradients.


@each_conversion
def test_values_and_gradients_are_those_of_the_dense_weights(config: RoastConfig) -> None:
    model = moved(roastify.convert(a_net(), config=config)).double()
    assert all(tensor.fold is not None for tensor in pool_of(model).plan.shared)
    x = images(dtype=torch.float64).requires_grad_()
    dense = roastify.densify(copy.deepcopy(model))
    y = model(x)
    torch.testing.assert_close(y, dense(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
    wanted = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *model.parameters()], wanted)
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in ("first", "beside", "last")}
    kept = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    expected = torch.func.functional_call(dense, {**weights, **kept}, (x,))
    for one, other in zip(found, torch.autograd.grad(expected, [x, *model.parameters()], wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("basis", ["none", 6], ids=["whole kernels", "basis kernels"])
def test_every_weight_is_a_signed_sum_of_pool_elements_of_its_bucket(basis: str | int) -> None:
    model = roastify.convert(a_net(), config=settings(kernel_basis=basis)).double()
    pool, shared = pool_of(model), model.first._roast["weight"]
    view = shared.fold
    narrow = ops.gather(pool.weight.detach(), pool.table, shared.view, shared.scale).view(24, 8, -1)
    if basis != "none":
        narrow = narrow @ pool.bases()[0].detach()
    dense = model.first.weight.detach().flatten(2)
    # What the first row of each hash says of the signs, every other row of it and every position says too.
    for channel in range(32):
        i, p = divmod(channel, view.width)
        for g, rows in enumerate(torch.arange(24).chunk(view.hashes)):
            factor = dense[rows, channel] / narrow[rows, p]
            torch.testing.assert_close(factor, factor[0, 0].sign().expand_as(factor), rtol=1e-9, atol=1e-9)
            assert (factor[0, 0] > 0) == (ops.fold(_one_hot(channel), None, view)[g * view.width + p] > 0), i


def _one_hot(channel: int) -> Tensor:
    return F.one_hot(torch.tensor(channel), 32).double()


CONVOLUTIONS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "1-d": lambda: (nn.Conv1d(32, 16, 5, stride=2, padding=2), (2, 32, 11)),
    "3-d": lambda: (nn.Conv3d(16, 8, 3, padding=1, bias=False), (2, 16, 3, 4, 5)),
    "one position": lambda: (nn.Conv2d(64, 32, 1), (2, 64, 3, 5)),
    "same": lambda: (nn.Conv2d(16, 16, 3, padding="same", dilation=2), (2, 16, 6, 5)),
    "reflect": lambda: (nn.Conv2d(16, 16, 3, padding=(1, 2), padding_mode="reflect"), (2, 16, 6, 5)),
    "circular": lambda: (nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular"), (2, 16, 6)),
    "replicate": lambda: (nn.Conv3d(16, 8, 3, padding=1, padding_mode="replicate"), (1, 16, 3, 3, 3)),
    "no batch": lambda: (nn.Conv2d(16, 16, 3), (16, 6, 5)),
    "empty batch": lambda: (nn.Conv2d(16, 16, 3), (0, 16, 6, 5)),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_every_kind_of_convolution(make: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
    torch.manual_seed(0)
    layer, shape = make()
    model = roastify.convert(nn.Sequential(layer), config=settings(min_numel=0, tile="8x4")).double()
    assert pool_of(model).plan.shared[0].fold is not None
    dense = roastify.densify(copy.deepcopy(model))
    x = images(*shape, dtype=torch.float64).requires_grad_()
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "slice": lambda x: x[:, :, 1:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "one place": lambda x: x[:, :, :1, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_of_inputs(layout: Callable[[Tensor], Tensor]) -> None:
    model = roastify.convert(nn.Sequential(nn.Conv2d(32, 24, 3, padding=1)), config=settings())
    x = layout(images())
    dense = roastify.densify(copy.deepcopy(model))
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    # Code behind a convolution may call `view`, which the layout decides about.
    view = FoldView(32, 4, 2, 64, 11)
    z = folded_input(x, None, view, 2)
    torch.testing.assert_close(z, ops.fold(x.movedim(1, -1), None, view).movedim(-1, 1))
    assert z.is_contiguous() == (x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(2, 30, 9, 7), (0, 30, 9, 7), (9, 7)], ids=str)
def test_an_input_of_other_channels_is_refused(shape: tuple[int, ...]) -> None:
    model = roastify.convert(nn.Sequential(nn.Conv2d(32, 24, 3)), config=settings())
    with pytest.raises(RuntimeError, match="the input must have 32 channels; found the shape"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_convolution_method_that_a_program_replaced_gets_the_whole_weight(when: str) -> None:
    def doubled(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight * 2, bias, self.stride, self.padding)

    def replace(model: Any) -> None:
        model.first._conv_forward = doubled.__get__(model.first)

    model = a_net()
    if when == "before":
        replace(model)
    model = roastify.convert(model, config=settings())
    if when == "after":
        replace(model)
    names = {name for name, tensor in planned(pool_of(model).plan).items() if tensor.fold is not None}
    assert names == {"beside.weight", "last.weight"} | ({"first.weight"} if when == "after" else set())
    x, layer = images(), model.first
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight * 2, layer.bias, padding=1))


@pytest.mark.parametrize("positions", [1, 6])
def test_the_adjoint_and_the_squares_over_positions(positions: int) -> None:
    view = FoldView(24, 4, 2, 4, 77)
    matrix, other = torch.randn(6, 6 * positions).double(), torch.randn(6, 24 * positions).double()
    dense = unfolded(matrix, None, view)
    torch.testing.assert_close((folded(other, None, view) * matrix).sum(), (other * dense).sum())
    by_position = dense.view(6, 24, positions)
    for position in range(positions):
        torch.testing.assert_close(by_position[:, :, position], unfolded(matrix[:, position::positions], None, view))
    torch.testing.assert_close(
        folded_squares(other**2, None, view), other.square().view(6, 4, 6, positions).sum(1).flatten(1)
    )


@pytest.mark.parametrize("learned", [False, True], ids=["signs", "scales"])
def test_gamma_and_energies_are_those_of_the_weights_that_read_each_element(learned: bool) -> None:
    config = settings(ratio=6.0, learned_scales=learned, min_numel=0, kernel_basis=6)
    model = roastify.convert(nn.Sequential(nn.Conv2d(16, 8, 3)), config=config).double()
    pool, weight = pool_of(model), model[0]._roast["weight"]
    parameters = [pool.weight.detach().clone().requires_grad_(), pool.bases()[0].detach().clone().requires_grad_()]
    matrix = ops.gather(parameters[0], pool.table, weight.view, weight.scale)
    kernels = (matrix.view(-1, 6) @ parameters[1]).view(8, -1)
    dense = unfolded(kernels, parameters[0], weight.fold).flatten()
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    for number in range(dense.numel()):
        grads = torch.autograd.grad(dense[number], parameters, retain_graph=True)
        squares = [total + grad.square() for total, grad in zip(squares, grads, strict=True)]
    stored = pool.num_slots
    gamma = 1 / pool.per_slot[:, None].expand(-1, pool.slot_size).clone()
    gamma[pool.uneven_slots] = 1 / pool.uneven
    found = squares[0].view(-1, pool.slot_size)[:stored]
    # A basis's rows are orthonormal, so a coefficient's energy does not depend on its kernel.
    torch.testing.assert_close(found.where(found > 0, 1.0), gamma[:stored])
    plan = pool.plan
    energy = torch.tensor(plan.basis_energy(plan.shared[0])).double()
    assert (squares[1].mean() / energy - 1).abs() < 0.3
    if learned:
        of_scales = squares[0].flatten()[stored * pool.slot_size :][: plan.scale_numel]
        assert (of_scales.mean() / torch.tensor(plan.scale_energies()).mean() - 1).abs() < 0.3


@pytest.mark.parametrize("basis", ["none", 6], ids=["whole kernels", "basis kernels"])
def test_a_projected_pool_is_the_nearest_to_the_dense_weights(basis: str | int) -> None:
    dense = a_net()
    model = roastify.convert(dense, config=settings(init="project", kernel_basis=basis)).double()
    names = ("first", "beside", "last")
    pairs = [(model.get_submodule(name).weight, dense.get_submodule(name).weight.double()) for name in names]
    error = sum(((one - other).square().sum() for one, other in pairs), torch.zeros(()))
    error.backward()
    grad = pool_of(model).weight.grad
    assert grad is not None and float(error.detach()) > 0 and grad.abs().max() < 1e-5


def test_recovery_aligns_folded_convolutions() -> None:
    teacher = a_net()
    mixture = torch.randn(4, 32)
    batches = [torch.einsum("bnhw,nc->bchw", torch.randn(8, 4, 6, 6), mixture) for _ in range(3)]
    model = roastify.convert(teacher, config=settings(ratio=5.0, init="project"))
    before = (model(batches[0]) - teacher(batches[0])).square().mean()
    roastify.recover(model, teacher, batches, steps=0)
    assert (model(batches[0]) - teacher(batches[0])).square().mean() < 0.9 * before


# Plans.


def test_auto_folds_convolutions_of_many_channels() -> None:
    class Wide(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight * 2, bias)

    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(640, 768, 3), nn.Conv2d(768, 640, 3), nn.Conv2d(512, 1024, 3), nn.Conv2d(640, 640, 1),
            nn.Conv2d(1280, 1280, 3, groups=2), Wide(640, 640, 3), nn.ConvTranspose2d(640, 640, 3),
            nn.Conv1d(1280, 640, 3),
        )  # fmt: skip
    for ratio, fold in ((2, None), (4, 2), (10, 4), (11, 4), (12, 8), (20, 8), (30, 8), (100, 8)):
        plan = plan_of(model, ratio=ratio, fold="auto", tile="auto")
        found = {name: plan.folds[each.fold].fold for name, each in planned(plan).items() if each.fold is not None}
        assert found == ({} if fold is None else {"0.weight": fold, "1.weight": fold}), ratio
        assert plan.achieved_ratio == pytest.approx(ratio, rel=0.01)
    whole = plan_of(model, ratio=8, fold="auto", tile="auto", kernel_basis="none")
    assert {fold.fold for fold in whole.folds} == {8}
    assert whole.multiplied_numel * 8 == whole.folded_numel == 2 * 640 * 768 * 9
    assert "a token or output place in 2 folded layers" in str(roastify_table(whole))


def roastify_table(plan: RoastPlan) -> str:
    from rich.console import Console

    from roastify.plan_table import plan_table

    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(plan, full=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "fold 8" in text
    return " ".join(text.split())


def test_convolutions_that_read_one_value_fold_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = roastify.convert(a_net(), config=settings())
    plan = planned(pool_of(model).plan)
    assert plan["first.weight"].fold == plan["beside.weight"].fold != plan["last.weight"].fold
    calls = []
    fold = ops.fold
    monkeypatch.setattr(ops, "fold", lambda *arguments: calls.append(1) or fold(*arguments))
    model(images())
    assert len(calls) == 2
    # An input that changed in between is folded again.
    x = images()
    with torch.no_grad():
        model(x)
        before = len(calls)
        model(x.add_(1))
    assert len(calls) - before == 2


def test_what_cannot_be_folded_is_named() -> None:
    with pytest.raises(PlanError, match="a convolution of one group with a multiple of 4 input and of 2 output"):
        plan_of(nn.Sequential(nn.Conv2d(30, 64, 3)))
    plan = plan_of(nn.Sequential(nn.Conv2d(32, 64, 3, groups=2), nn.Conv2d(32, 64, 3)))
    assert planned(plan)["0.weight"].fold is None and planned(plan)["1.weight"].fold == 0
    by_module = plan_of(a_net(), fold="none", modules={"last": {"fold": 2}})
    assert [name for name, tensor in planned(by_module).items() if tensor.fold is not None] == ["last.weight"]


def test_damaged_plans_are_refused() -> None:
    plan = roastify.convert(a_net(), config=settings()).roast_pool.plan
    assert RoastPlan.from_dict(plan.to_dict()) == plan
    place = next(index for index, tensor in enumerate(plan.tensors) if tensor.fold is not None)
    for change in ({"strips": False}, {"cols": 32 * 6}, {"fold": None}, {"basis_count": 5}):
        tensors = list(plan.tensors)
        tensors[place] = dataclasses.replace(tensors[place], **change)
        with pytest.raises(ValueError, match=r"first\.weight"):
            check_plan(dataclasses.replace(plan, tensors=tuple(tensors)))


# Everything around a model.


def test_saved_loaded_and_densified(tmp_path: Any) -> None:
    model = moved(roastify.convert(a_net(), config=settings(learned_scales=True)))
    x = images()
    roastify.save(model, tmp_path / "out")
    loaded = roastify.load(tmp_path / "out", model=a_net())
    assert torch.equal(loaded(x), model(x))
    again = roastify.convert(a_net(), config=settings(learned_scales=True))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(roastify.densify(loaded)(x), model(x), rtol=1e-4, atol=1e-5)
    other = roastify.convert(a_net(), config=settings(learned_scales=True, fold=2))
    with pytest.raises(RuntimeError, match="another plan"):
        other.load_state_dict(model.state_dict())


def test_training_lowers_the_loss_and_checkpoints_give_the_same_gradients() -> None:
    model, x = roastify.convert(a_net(), config=settings(learned_scales=True)), images()
    target = torch.randn(3, 16, 4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.zero_grad()
    F.mse_loss(model(x), target).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    F.mse_loss(checkpoint(model, x, use_reentrant=False), target).backward()
    for one, other in zip(expected, (parameter.grad for parameter in model.parameters()), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_and_counted_operations() -> None:
    model = roastify.convert(a_net(), config=settings())
    dense, x = roastify.densify(copy.deepcopy(model)), images()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), dense(x), rtol=0.1, atol=0.1)
    counts = []
    for each in (model[0] if isinstance(model, nn.Sequential) else model.last, dense.last):
        with FlopCounterMode(display=False) as counter:
            each(torch.randn(1, 24, 9, 7))
        counts.append(counter.get_total_flops())
    combined, fold = 2 * 16 * 6 * 6 * 9, 2 * 2 * 24 * 63
    assert counts[0] == counts[1] // 4 + combined + fold


@pytest.mark.long
@pytest.mark.compiled
def test_compiled_for_images_of_several_sizes() -> None:
    torch.compiler.reset()
    model = roastify.convert(a_net(), config=settings())
    # Inductor of torch 2.13 fails on grouped convolutions of any size in this layout, dense ones too.
    last = torch.compile(model, dynamic=False), images().to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    for call, x in ((compiled, images()), (compiled, images(2, 32, 6, 5)), (compiled, images(2, 32, 8, 6)), last):
        y, expected = call(x), model(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(y.sum(), list(model.parameters()))
        for one, other in zip(found, torch.autograd.grad(expected.sum(), list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_exported_in_plain_operators() -> None:
    model = roastify.convert(a_net(), config=settings()).eval()
    with plain_operators(model):
        program = torch.export.export(model, (images(),))
    assert not any("roastify" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_programs_for_images_of_any_size() -> None:
    model, x, other = roastify.convert(a_net(), config=settings()).eval(), images(), images(2, 32, 12, 8)
    size = {2: torch.export.Dim("height", min=5, max=64), 3: torch.export.Dim("width", min=5, max=64)}
    with plain_operators(model):
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=8), **size},))
    with warnings.catch_warnings():
        # Of torch 2.13: torch.jit.trace is deprecated.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    for program in (exported.module(), traced):
        for each in (x, other, other.to(memory_format=torch.channels_last)):
            if program is traced or each.is_contiguous():
                torch.testing.assert_close(program(each), model(each), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONVERSIONS["two hashes"], CONVERSIONS["scales"]], ids=["signs", "scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gpu_computes_what_the_cpu_computes(
    config: RoastConfig, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Eager, and then as a captured step that is replayed."""
    model = moved(roastify.convert(a_net(), config=config)).to(dtype).double()
    x = images().to(dtype).double()
    wanted = torch.randn(3, 16, 4, 3, generator=torch.Generator().manual_seed(5)).to(dtype).double()
    twin = copy.deepcopy(model).to(dtype).cuda().to(memory_format=memory_format)
    there, gradient = (value.to(dtype).cuda().to(memory_format=memory_format) for value in (x, wanted))
    model(x).backward(wanted)
    limit = 1e-2 if dtype == torch.float32 else 6e-2

    def step() -> Tensor:
        twin.zero_grad()
        y = twin(there)
        y.backward(gradient)
        return y.detach()

    def check(y: Tensor) -> None:
        pairs = [(y, model(x).detach())]
        pairs += [
            (found.grad, expected.grad) for found, expected in zip(twin.parameters(), model.parameters(), strict=True)
        ]
        for found, expected in pairs:
            error = (found.detach().double().cpu() - expected).abs().max() / expected.abs().max()
            assert error < limit

    check(step())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    torch.cuda.synchronize()
    check(y)
