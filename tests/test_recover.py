"""Recovery: what it improves, how it aligns and distils, how it resumes, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import roastify
from roastify.conversion.converted import pool_of, pooled_weight
from roastify.errors import CheckpointError, ConfigError, ConversionError, RecoveryError, SignatureMismatch
from roastify.isolation import RandomStream
from roastify.recovery import checkpoint
from roastify.recovery.align import align_layers
from roastify.recovery.batches import Feed, mask_of, on_device, passing
from roastify.recovery.losses import find_features, find_logits, output_loss, relative_error
from roastify.recovery.options import RecoverOptions
from roastify.report import recovery_lines

CPU = torch.device("cpu")

# A few steps of a model with random weights.
WORSE = pytest.mark.filterwarnings("ignore:recovery has made the student worse:UserWarning")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A small residual classifier with dropout and running statistics."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return correlated inputs, and labels that a fixed random network gives them."""
    generator = torch.Generator().manual_seed(0)
    mix, first = (torch.randn(16, 16, generator=generator) * 2.0 ** -torch.arange(16.0)[:, None] for _ in range(2))
    second = torch.randn(16, 5, generator=generator)
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) @ mix
    return x, ((x @ first).tanh() @ second).argmax(1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x, y = samples(2048, 1)
    for _ in range(6):
        for part, labels in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(part), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def teacher(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def converted(teacher: nn.Module, ratio: float = 8) -> nn.Module:
    config = roastify.RoastConfig(tile="8x8", share="weights", min_numel=64)
    return roastify.convert(teacher, ratio, init="project", config=config)


def batches(count: int = 32, size: int = 32) -> list[Tensor]:
    return list(samples(count * size, 2)[0].split(size))


def accuracy(model: nn.Module) -> float:
    x, y = samples(1000, 3)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def options(**changes: Any) -> RecoverOptions:
    return RecoverOptions(**changes)


# What recovery improves


@pytest.mark.long
def test_recovery_brings_the_student_near_the_teachers_accuracy(teacher: nn.Module) -> None:
    student = converted(teacher, 12)
    before = accuracy(student)
    report = roastify.recover(
        student, teacher, batches(), 120, lr=5e-3, logits="output", evaluate=accuracy, evaluate_every=60
    )
    assert accuracy(teacher) > 0.85
    assert before < accuracy(teacher) - 0.08
    assert accuracy(teacher) - accuracy(student) < 0.4 * (accuracy(teacher) - before)
    assert report.aligned is not None and report.align_error is not None
    assert report.before.error > report.aligned.error > report.after.error
    assert report.before.top is not None and report.after.top is not None
    assert report.before.top < report.after.top
    assert report.align_error[1] < 0.5 * report.align_error[0]
    assert report.losses[-1].loss < 0.5 * report.losses[0].loss
    assert report.steps == 120 and report.seconds > report.align_seconds > 0
    assert [step for step, _ in report.evaluations] == [60, 120]
    assert report.evaluations[-1][1] == pytest.approx(accuracy(student))
    assert report.features == ("blocks.0", "blocks.1")
    assert report.logits == ("output",)


@pytest.mark.long
def test_training_after_alignment_ends_better(teacher: nn.Module) -> None:
    errors = []
    for steps in (0, 30):
        student = converted(teacher)
        errors.append(roastify.recover(student, teacher, batches(), 30, align=steps, lr=2e-3).after.error)
    assert errors[1] < 0.8 * errors[0]


def test_the_report_is_shown_and_written(teacher: nn.Module) -> None:
    report = roastify.recover(converted(teacher), teacher, batches(), 4, evaluate=accuracy)
    text = io.StringIO()
    Console(file=text, width=120).print(recovery_lines(report))
    for expected in ("as it came", "layers aligned", "after 4 steps", "evaluated", "2 modules; logits: none"):
        assert expected in text.getvalue()
    assert "top" not in text.getvalue()
    values = json.loads(json.dumps(report.to_dict()))
    assert [point["step"] for point in values["losses"]] == [1, 2, 3, 4]
    assert values["losses"][0]["parts"].keys() == {"outputs", "features"}
    assert values["evaluations"] == [[4, accuracy_of(report)]]


def accuracy_of(report: roastify.RecoveryReport) -> float:
    return report.evaluations[0][1]


# Alignment


def layer_error(student: nn.Module, teacher: nn.Module, x: Tensor, names: list[str]) -> float:
    """Return the mean relative error of layers' outputs on the teacher's inputs, around the outputs' means."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        teacher.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, (args[0], output))
        )
        for name in names
    ]
    with torch.no_grad():
        teacher(x)
        errors = []
        for name, (given, expected) in seen.items():
            difference = student.get_submodule(name)(given) - expected
            errors.append(difference.square().sum() / (expected - expected.flatten(0, -2).mean(0)).square().sum())
    for hook in hooks:
        hook.remove()
    return float(torch.stack(errors).mean())


def test_alignment_finds_the_least_squares_solution() -> None:
    """Dense linear algebra gives the expected pool: every layer's error is rows of one linear system in the pool."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 24, bias=False)).double().eval()
    student = converted(teacher, 3)
    x = torch.randn(64, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    align_layers(student, teacher, [lambda: teacher(x)], 500)
    pool = pool_of(student)
    with torch.no_grad():
        given = {"0.weight": x - x.mean(0), "2.weight": torch.tanh(teacher[0](x))}
        numel = pool.weight.numel()
        found = pool.weight.clone()
        rows, wanted = [], []
        for tensor in pool.plan.shared:
            inputs, dense = given[tensor.name], teacher.get_parameter(tensor.name)
            second = inputs.T @ inputs / len(inputs)
            # The ridge that alignment adds, as further rows.
            ridge = 1e-2 + len(second) / len(inputs)
            second += ridge * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
            factor = torch.linalg.cholesky(second) / ((dense @ second) * dense).sum().sqrt()
            columns = []
            for element in range(numel):
                pool.weight.zero_()
                pool.weight.view(-1)[element] = 1
                columns.append((pooled_weight(pool, tensor).dense() @ factor).flatten())
            rows.append(torch.stack(columns, 1))
            wanted.append((dense @ factor).flatten())
        expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None]).solution
    torch.testing.assert_close(found.view(-1), expected.view(-1), rtol=1e-3, atol=3e-5)


def test_alignment_moves_biases_so_that_output_means_are_the_teachers(teacher: nn.Module) -> None:
    student = converted(teacher)
    x = torch.cat(batches(4))
    before = layer_error(student, teacher, x, ["embed", "blocks.0.up", "blocks.1.down"])
    align_layers(student, teacher, [lambda: teacher(x)], 30)
    after = layer_error(student, teacher, x, ["embed", "blocks.0.up", "blocks.1.down"])
    assert after < 0.5 * before
    with torch.no_grad():
        torch.testing.assert_close(student.embed(x).mean(0), teacher.embed(x).mean(0), rtol=1e-4, atol=1e-4)


class Convolutions(nn.Module):
    """Every kind of convolution that is aligned: strides, dilation, groups, padding by value and by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 32, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(32, 32, 3, stride=2, padding=2, dilation=2, groups=4)
        self.along = nn.Conv1d(32, 32, 5, padding="same")
        self.back = nn.ConvTranspose1d(32, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.along(self.grouped(self.first(x).relu()).relu().flatten(2)).relu())


def test_alignment_of_convolutions() -> None:
    torch.manual_seed(0)
    teacher = Convolutions().eval()
    student = converted(teacher, 4)
    x = torch.randn(16, 4, 9, 9).cumsum(2).cumsum(3)
    before = convolution_errors(student, teacher, x)
    align_layers(student, teacher, [lambda: teacher(x)], 40)
    after = convolution_errors(student, teacher, x)
    assert sum(after) < 0.7 * sum(before)
    assert all(ours < theirs for ours, theirs in zip(after, before, strict=True))


def convolution_errors(student: nn.Module, teacher: nn.Module, x: Tensor) -> list[float]:
    errors = []
    for name in ("first", "grouped", "along"):
        seen: list[tuple[Tensor, Tensor]] = []
        hook = teacher.get_submodule(name).register_forward_hook(lambda m, a, o, s=seen: s.append((a[0], o)))
        with torch.no_grad():
            teacher(x)
            hook.remove()
            given, expected = seen[0]
            found = student.get_submodule(name)(given)
        places = [dim for dim in range(expected.dim()) if dim != 1]
        errors.append(float((found - expected).square().sum()
                            / (expected - expected.mean(places, keepdim=True)).square().sum()))  # fmt: skip
    return errors


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=16, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("build", [gpt2, bert])
def test_alignment_of_transformers(build: Callable[[], Any]) -> None:
    """Lookups, tied tables, weights kept as `[in, out]`, fused projections."""
    teacher = build()
    student = converted(teacher, 3)
    tokens = torch.randint(99, (8, 12), generator=torch.Generator().manual_seed(0))
    before, after = align_layers(student, teacher, [lambda: teacher(tokens)], 40)
    assert after < 0.8 * before
    again, _ = align_layers(student, teacher, [lambda: teacher(tokens)], 0)
    assert again == pytest.approx(after, rel=1e-4)


def test_constant_tensors_do_not_spoil_the_alignment() -> None:
    """If the pool shares biases of zeros and fresh norms, their error is huge compared with their own size."""
    torch.manual_seed(0)
    layers = (nn.Linear(32, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(*layers).eval()
    nn.init.zeros_(model[3].bias)
    config = roastify.RoastConfig(share="all", init="project", ratio=10)
    student: Any = roastify.convert(model, config=config)
    assert any(tensor.center == 1 for tensor in pool_of(student).plan.shared)
    data = [torch.randn(64, 32) for _ in range(8)]
    report = roastify.recover(student, model, data, 0)
    assert report.align_error is not None and report.aligned is not None
    before, after = report.align_error
    assert before < 2 and after < 0.5 * before
    assert report.aligned.error < report.before.error


def test_nothing_is_left_to_align_at_ratio_1(teacher: nn.Module) -> None:
    student = roastify.convert(teacher, 1, init="project")
    weights = {name: value.clone() for name, value in roastify.densify(student).state_dict().items()}
    x = torch.cat(batches(2))
    assert align_layers(student, teacher, [lambda: teacher(x)], 30) == (0.0, 0.0)
    for name, value in roastify.densify(student).state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_few_samples_do_not_spoil_directions_that_they_do_not_cover() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    student = converted(teacher, 4)
    unseen = torch.randn(500, 64)
    before = layer_error(student, teacher, unseen, ["0", "2"])
    few = torch.randn(16, 64)
    align_layers(student, teacher, [lambda: teacher(few)], 40)
    assert layer_error(student, teacher, unseen, ["0", "2"]) < 1.1 * before


# Losses and training settings


def test_divergence_of_logits_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(4, 3, 7, generator=generator), torch.randn(4, 3, 7, generator=generator)
    temperature = 3.0
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    each = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(output_loss(ours, theirs, ("output",), temperature), each.mean())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    expected = (each * mask).sum() / mask.sum()
    torch.testing.assert_close(output_loss(ours, theirs, ("output",), temperature, mask), expected)
    images = ours.permute(0, 2, 1)[..., None], theirs.permute(0, 2, 1)[..., None]
    torch.testing.assert_close(output_loss(*images, ("output",), temperature), each.mean())


def test_classes_of_probability_zero_leave_loss_and_gradient_finite() -> None:
    ours = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = torch.zeros(4, 5)
    theirs[:, 2] = -torch.inf
    for logits in (("output",), ()):
        loss = output_loss(
            ours.masked_fill(theirs == -torch.inf, -torch.inf), theirs + 0.1 * ours.detach(), logits, 1.0
        )
        (gradient,) = torch.autograd.grad(loss, ours)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


def test_relative_error_is_over_the_spread_and_the_mask() -> None:
    theirs = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)) + 5
    torch.testing.assert_close(relative_error(theirs.mean().expand_as(theirs), theirs), torch.tensor(1.0))
    mask = torch.ones(6, 4)
    mask[:, 2:] = 0
    spoiled = theirs.clone()
    spoiled[:, 2:] = 100.0
    assert relative_error(spoiled, theirs, mask) == 0
    assert relative_error(spoiled, theirs) > 1


def test_default_features_are_the_modules_around_shared_layers(teacher: nn.Module) -> None:
    assert find_features(converted(teacher), teacher, None) == ("blocks.0", "blocks.1")
    flat = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert find_features(converted(flat), flat, None) == ("0", "2")
    found = find_features(converted(model := bert(), 3), model, None)
    assert "bert.encoder.layer.0.attention.self" in found and "bert.encoder.layer.1.output" in found


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("blocks.1",), ("blocks.1",)),
        (("blocks.*.norm", "head"), ("blocks.0.norm", "blocks.1.norm", "head")),
        (("re:blocks\\.\\d",), ("blocks.0", "blocks.1")),
    ],
)
def test_features_by_patterns(teacher: nn.Module, patterns: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert find_features(converted(teacher), teacher, patterns) == expected
    report = roastify.recover(converted(teacher), teacher, batches(2), 1, align=0, features=patterns)
    assert report.features == expected


def test_logits_are_found_by_name_or_pattern() -> None:
    output = {"start_logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 3), "loss": torch.zeros(())}
    assert find_logits(output, None) == ("start_logits",)
    assert find_logits(output, ("hid*",)) == ("hidden",)
    assert find_logits(torch.zeros(2, 3), None) == ()
    with pytest.raises(ConfigError, match=r"logits pattern 'hiden' matched no floating output; closest: 'hidden'"):
        find_logits(output, ("hiden",))


@pytest.mark.long
def test_each_loss_can_stand_alone(teacher: nn.Module) -> None:
    data = [(x, y) for x, y in zip(*(part.split(32) for part in samples(512, 2)), strict=True)]
    for changes, parts in (
        ({"feature_weight": 0}, {"outputs"}),
        ({"output_weight": 0}, {"features"}),
        (
            {"output_weight": 0, "feature_weight": 0, "loss_fn": lambda out, batch: F.cross_entropy(out, batch[1])},
            {"task"},
        ),
    ):
        report = roastify.recover(converted(teacher), teacher, data, 30, align=0, lr=5e-3, log_every=10, **changes)
        assert {name for point in report.losses for name in point.parts} == parts
        assert report.losses[-1].loss < report.losses[0].loss


def test_loss_weights_scale_their_terms(teacher: nn.Module) -> None:
    weights = {"output_weight": 2.0, "feature_weight": 0.5, "task_weight": 3.0}
    report = roastify.recover(
        converted(teacher), teacher, batches(2), 1, loss_fn=lambda out, batch: out.square().mean(), **weights
    )
    parts = report.losses[0].parts
    assert report.losses[0].loss == pytest.approx(2 * parts["outputs"] + 0.5 * parts["features"] + 3 * parts["task"])


def test_accumulated_batches_are_one_large_batch(teacher: nn.Module) -> None:
    teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).eval()
    found = []
    for size, accumulate in ((64, 1), (16, 4)):
        student = converted(teacher)
        # The relative squared error is not linear in the batch; the task's loss is.
        settings = {
            "output_weight": 0,
            "feature_weight": 0,
            "loss_fn": lambda out, batch: (out - batch).square().mean(),
        }
        roastify.recover(
            student, teacher, batches(4, 64)[:1] if size == 64 else list(batches(4, 64)[0].split(16)), 1, align=0,
            accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), clip=None, **settings,
        )  # fmt: skip
        found.append(pool_of(student).weight.detach().clone())
    torch.testing.assert_close(*found)


def test_gradients_are_clipped(teacher: nn.Module) -> None:
    moved = []
    for clip in (None, 1e-3):
        student = converted(teacher)
        before = pool_of(student).weight.detach().clone()
        roastify.recover(
            student,
            teacher,
            batches(2),
            1,
            align=0,
            warmup=0,
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            clip=clip,
        )
        moved.append(float((pool_of(student).weight - before).detach().norm()))
    assert moved[1] <= 1.01e-3 < moved[0]


def test_the_rate_warms_up_and_falls() -> None:
    rates = [options(steps=100, warmup=0.1).rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and rates[-1] < 0.01
    assert {options(schedule="constant", warmup=0).rate(step) for step in range(1000)} == {1.0}


def test_a_users_optimizer_keeps_its_learning_rates(teacher: nn.Module) -> None:
    student: Any = converted(teacher)
    groups = [{"params": [pool_of(student).weight], "lr": 0.02}, {"params": [student.head.bias], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    norm = student.blocks[0].norm.weight.detach().clone()
    report = roastify.recover(student, teacher, batches(), 10, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.5]
    assert report.losses[0].lr == pytest.approx(0.02 * options(steps=10).rate(0))
    assert torch.equal(student.blocks[0].norm.weight, norm)


def test_frozen_parameters_stay(teacher: nn.Module) -> None:
    student = converted(teacher)
    for block in student.blocks:
        block.norm.requires_grad_(False)
        block.norm.weight.data.fill_(2.0)
    roastify.recover(student, teacher, batches(4), 5)
    assert all(bool((block.norm.weight == 2).all()) for block in student.blocks)


@pytest.mark.long
def test_bfloat16(teacher: nn.Module) -> None:
    student = converted(teacher)
    report = roastify.recover(student, teacher, batches(), 60, lr=5e-3, autocast=torch.bfloat16)
    assert report.aligned is not None and report.after.error < 0.6 * report.aligned.error
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    exact = roastify.recover(converted(teacher), teacher, batches(), 0).align_error
    assert exact is not None and report.align_error is not None
    assert report.align_error[1] == pytest.approx(exact[1], rel=0.02)


# Batches


def one(x: Tensor) -> Tensor:
    return x


def one_and_more(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return x


def two(x: Tensor, y: Tensor) -> Tensor:
    return x


def any_number(*x: Tensor) -> Tensor:
    return x[0]


class Calls(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward


X, Y = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("forward", "batch", "expected"),
    [
        (one, X, ((X,), {})),
        (one, (X,), ((X,), {})),
        (one, [X, Y], ((X,), {})),
        (two, (X, Y), ((X, Y), {})),
        (one_and_more, {"x": X, "mask": Y}, ((), {"x": X, "mask": Y})),
        (one, ({"x": X}, Y), ((), {"x": X})),
        (one_and_more, [X], ((X,), {})),
        (one, transformers.BatchEncoding({"x": X}), ((), {"x": X})),
    ],
)
def test_how_a_batch_is_passed(forward: Callable[..., Any], batch: Any, expected: Any) -> None:
    args, kwargs = passing(Calls(forward), None)(on_device(batch, CPU))
    assert len(args) == len(expected[0]) and all(a is b for a, b in zip(args, expected[0], strict=True))
    assert kwargs.keys() == expected[1].keys() and all(kwargs[key] is expected[1][key] for key in kwargs)


@pytest.mark.parametrize(("forward", "batch"), [(one_and_more, (X, Y)), (two, (X, Y, Y)), (any_number, (X, Y))])
def test_an_unclear_batch_is_refused(forward: Callable[..., Any], batch: Any) -> None:
    with pytest.raises(ConfigError, match=rf"a batch is a tuple of {len(batch)}.* takes; pass inputs=, a function"):
        passing(Calls(forward), None)(batch)
    assert passing(Calls(forward), lambda batch: batch[0])(batch) == ((X,), {})


@pytest.mark.long
def test_batches_of_every_kind_recover_alike(teacher: nn.Module) -> None:
    x, y = samples(256, 2)
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (list(x.split(32)), {}),
        (list(zip(x.split(32), y.split(32), strict=True)), {}),
        ([{"x": part} for part in x.split(32)], {}),
        ([{"pixels": part} for part in x.split(32)], {"inputs": lambda batch: batch["pixels"]}),
        (DataLoader(TensorDataset(x, y), 32), {}),
        (lambda: x.split(32), {}),
        (lambda epoch: iter(x.split(32)), {}),
        (iter(x.repeat(2, 1).split(32)), {}),
    ]
    pools = []
    for data, changes in kinds:
        student = converted(teacher)
        roastify.recover(student, teacher, data, 10, **changes)
        pools.append(pool_of(student).weight.detach())
    assert all(torch.equal(pools[0], pool) for pool in pools[1:])


@WORSE
def test_transformers_models_with_labels_and_padding() -> None:
    teacher = bert()
    student = converted(teacher, 3)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(12)[None] < torch.randint(4, 13, (8, 1), generator=generator)
    data = [
        transformers.BatchEncoding(
            {
                "input_ids": torch.randint(99, (8, 12), generator=generator),
                "attention_mask": lengths.long(),
                "labels": torch.randint(3, (8,), generator=generator),
            }
        )
        for _ in range(4)
    ]
    report = roastify.recover(
        student, teacher, data, 12, lr=3e-3, loss_fn="loss", features=r"re:bert\.encoder\.layer\.\d\.output"
    )
    assert report.logits == ("logits",) and report.after.top is not None
    assert report.features == ("bert.encoder.layer.0.output", "bert.encoder.layer.1.output")
    assert report.losses[0].parts.keys() == {"outputs", "features", "task"}
    assert report.losses[-1].loss < report.losses[0].loss
    assert mask_of(data[0]) is data[0]["attention_mask"]


@WORSE
def test_language_models() -> None:
    teacher = gpt2()
    data = [{"input_ids": part} for part in torch.randint(99, (32, 12)).split(8)]
    report = roastify.recover(converted(teacher, 3), teacher, data, 12, lr=3e-3)
    assert "logits" in report.logits
    assert report.after.error < report.before.error


# Models and random states are left as they were


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    values, before = found.pop("values"), expected.pop("values")
    assert found == expected
    assert all(torch.equal(values[name], before[name]) for name in before)


@pytest.mark.parametrize("failing", [False, True])
def test_models_and_random_numbers_are_left_as_found(teacher: nn.Module, failing: bool) -> None:
    teacher.train()
    teacher.blocks[1].eval()
    teacher.embed.weight.requires_grad_(False)
    teacher.blocks[0].register_forward_hook(lambda module, args, output: None)
    student = converted(teacher.requires_grad_(True)).eval()
    student.blocks[0].train()
    teacher.embed.bias.requires_grad_(False)
    before, modes = state_of(teacher), state_of(student)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]

    def broken(outputs: Tensor, batch: Tensor) -> Tensor:
        raise KeyError("broken on purpose")

    if failing:
        with pytest.raises(KeyError, match="broken on purpose"):
            roastify.recover(student, teacher, batches(), 3, loss_fn=broken)
    else:
        roastify.recover(student, teacher, batches(), 3, evaluate=lambda model: float(torch.rand(())))
    assert_same(state_of(teacher), before)
    after = state_of(student)
    assert {key: after[key] for key in ("modes", "hooks", "gradients")} == {
        key: modes[key] for key in ("modes", "hooks", "gradients")
    }
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])  # type: ignore[index]


@pytest.mark.long
def test_the_result_depends_on_the_seed_alone(teacher: nn.Module) -> None:
    pools = []
    for outside, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(outside)
        student = converted(teacher)
        roastify.recover(student, teacher, DataLoader(samples(256, 2)[0], 32, shuffle=True), 5, seed=seed)
        pools.append(pool_of(student).weight.detach())
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])


# Resuming


class Augmented(Dataset):
    """Samples that draw from every random generator when they are read."""

    def __init__(self) -> None:
        self.x = samples(200, 2)[0]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(16) + random.random() + np.random.rand()
        return self.x[index] + 0.01 * noise


def loader(kind: str) -> Any:
    generator = torch.Generator().manual_seed(7) if kind == "generator" else None
    made = DataLoader(Augmented(), 32, shuffle=True, drop_last=True, generator=generator)
    return {"function": lambda epoch: made, "generator": made, "loader": made}[kind]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "kind", ["loader", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("generator", "function"))]
)
@pytest.mark.parametrize("killed_at", [3, pytest.param(11, marks=pytest.mark.long)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    teacher: nn.Module, tmp_path: Path, kind: str, killed_at: int
) -> None:
    settings: dict[str, Any] = {"lr": 3e-3, "save_every": 5, "log_every": 4, "accumulate": 2, "evaluate_every": 10}
    settings |= {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True)}
    calls = 0

    def kill(outputs: Tensor, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * killed_at:
            raise Killed
        return 0 * outputs.sum()

    def harmless(outputs: Tensor, batch: Tensor) -> Tensor:
        return 0 * outputs.sum()

    kill.__qualname__ = harmless.__qualname__
    whole = converted(teacher)
    expected = roastify.recover(
        whole, teacher, loader(kind), 14, folder=tmp_path / "again", evaluate=accuracy, loss_fn=harmless, **settings
    )
    settings |= {"folder": tmp_path / "part", "evaluate": accuracy, "resume": True}
    with pytest.raises(Killed):
        roastify.recover(converted(teacher), teacher, loader(kind), 14, loss_fn=kill, **settings)
    torch.manual_seed(99)
    random.seed(99)
    resumed = converted(teacher)
    found = roastify.recover(resumed, teacher, loader(kind), 14, loss_fn=harmless, **settings)
    assert found.resumed_at == killed_at // 5 * 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert found.losses == expected.losses
    assert found.evaluations == expected.evaluations
    assert (found.before, found.aligned, found.after) == (expected.before, expected.aligned, expected.after)


def test_a_finished_run_is_resumed_at_its_end(teacher: nn.Module, tmp_path: Path) -> None:
    first = converted(teacher)
    report = roastify.recover(first, teacher, batches(), 4, folder=tmp_path)
    second = converted(teacher)
    again = roastify.recover(second, teacher, batches(), 4, folder=tmp_path, resume=True)
    assert again.resumed_at == 4 and again.losses == report.losses and again.seconds == report.seconds
    assert torch.equal(pool_of(first).weight, pool_of(second).weight)


@WORSE
def test_a_one_shot_iterator_is_resumed_from_its_beginning(teacher: nn.Module, tmp_path: Path) -> None:
    def endless() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(32, 16, generator=generator)

    pools = []
    for steps in ((8,), (4, 8)):
        for stop in steps:
            student = converted(teacher)
            folder = tmp_path / str(len(steps))

            def loss(outputs: Tensor, batch: Tensor, stop: int = stop, done: list[int] = []) -> Tensor:  # noqa: B006
                done.append(1)
                if len(done) > stop and stop < 8:
                    raise Killed
                return 0 * outputs.sum()

            loss.__defaults__ = (stop, [])
            try:
                roastify.recover(student, teacher, endless(), 8, folder=folder, save_every=2, resume=True, loss_fn=loss)
            except Killed:
                assert stop == 4
        pools.append(pool_of(student).weight.detach())
    assert torch.equal(*pools)


def test_samplers_are_told_the_epoch() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    told: list[int] = []
    data = list(range(4))
    feed = Feed(DataLoader(data, 2, sampler=Sampler(data)), RandomStream(0, CPU))  # type: ignore[arg-type]
    for _ in range(5):
        feed.next()
    assert told == [0, 1, 2]


KILLED_SAVE = """
import os, sys
import torch
from roastify.recovery import checkpoint
made, real, count = {"run": 1}, os.replace, 0

def replace(*names):
    global count
    count += 1
    if count > 2 + int(sys.argv[2]):
        os._exit(9)
    real(*names)

from pathlib import Path
os.replace = replace
for step in (1, 2):
    checkpoint.write_checkpoint(Path(sys.argv[1]), made, {"step": step, "values": torch.full((3,), float(step))})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_save_leaves_the_old_checkpoint_whole(tmp_path: Path, renames: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_SAVE, str(tmp_path), str(renames)])
    assert done.returncode == 9
    state = checkpoint.read_checkpoint(tmp_path, {"run": 1})
    assert state["step"] == 1 and state["values"].tolist() == [1.0] * 3
    checkpoint.write_checkpoint(tmp_path, {"run": 1}, {"step": 3})
    assert checkpoint.read_checkpoint(tmp_path, {"run": 1}) == {"step": 3}
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_checkpoint_returns_the_values_that_were_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {
        "numbers": (1, 2.5, None, True, "text", float("inf")),
        3: [{"a": torch.ones(2, dtype=torch.bfloat16)}, shared, shared[1:]],
        "empty": {},
    }
    checkpoint.write_checkpoint(tmp_path, {}, state)
    found = checkpoint.read_checkpoint(tmp_path, {})
    assert found["numbers"] == state["numbers"] and found["empty"] == {}
    assert found[3][0]["a"].dtype == torch.bfloat16
    assert torch.equal(found[3][1], shared) and torch.equal(found[3][2], shared[1:])
    with pytest.raises(CheckpointError, match=r"state\.x\.0 is a object, which a checkpoint cannot hold"):
        checkpoint.write_checkpoint(tmp_path, {}, {"x": [object()]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3.0}, r"belongs to another run: temperature was 2\.0, now 3\.0; resume with the same"),
        pytest.param({"steps": 9}, r"steps was 4, now 9", marks=pytest.mark.long),
        ({"lr": 5e-4}, r"learning rates was \[0\.001\], now \[0\.0005\]"),
        pytest.param(
            {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)},
            r"optimizer was 'AdamW', now 'SGD'",
            marks=pytest.mark.long,
        ),
        pytest.param({"ratio": 5}, r"conversion was '\w+', now '\w+'", marks=pytest.mark.long),
        pytest.param(
            {"data": [torch.ones(4, 16)]}, r"was made with other data: its first batches differ", marks=pytest.mark.long
        ),
        ({"data": [*batches()[:7], *batches()[8:]]}, r"was made with other data: its first batches differ"),
        ({"teacher": 1.01}, r"teacher was 'Net \w+', now 'Net \w+'"),
        ({"resume": False}, r"holds a checkpoint of a recovery; resume it, or give another folder"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    teacher: nn.Module, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    roastify.recover(converted(teacher), teacher, batches(), 4, folder=tmp_path)
    settings = {"steps": 4, "ratio": 8, "data": batches(), "resume": True, **change}
    student = converted(teacher, settings.pop("ratio"))
    with torch.no_grad():
        teacher.head.weight.mul_(settings.pop("teacher", 1.0))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        roastify.recover(student, teacher, settings.pop("data"), folder=tmp_path, **settings)


def test_a_damaged_checkpoint_is_refused(teacher: nn.Module, tmp_path: Path) -> None:
    roastify.recover(converted(teacher), teacher, batches(), 2, folder=tmp_path)

    def resume() -> Any:
        return roastify.recover(converted(teacher), teacher, batches(), 2, folder=tmp_path, resume=True)

    manifest = tmp_path / checkpoint.MANIFEST
    text = manifest.read_text()
    (weights,) = tmp_path.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is missing or was changed; remove the folder"):
        resume()
    weights.write_bytes(content)
    manifest.write_text(text[:50])
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        resume()
    manifest.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(CheckpointError, match="has format version 3, and this roastify reads up to 2"):
        resume()
    manifest.write_text(text)
    assert resume().resumed_at == 2


def test_a_resumed_run_refuses_data_that_ends_sooner(teacher: nn.Module, tmp_path: Path) -> None:
    roastify.recover(converted(teacher), teacher, batches(8), 6, folder=tmp_path, align_batches=1)
    with pytest.raises(CheckpointError, match="holds 4 batches in epoch 0, and the checkpoint was written after 6"):
        roastify.recover(converted(teacher), teacher, batches(8)[:4], 6, folder=tmp_path, align_batches=1, resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_reported(teacher: nn.Module, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*: Permission denied"):
        roastify.recover(converted(teacher), teacher, batches(), 2, folder=tmp_path / "x")


# Refusals


def test_models_that_do_not_belong_together_are_refused(teacher: nn.Module) -> None:
    student = converted(teacher)
    with pytest.raises(ConversionError, match="this Net holds no roastify pool"):
        roastify.recover(teacher, teacher, batches())
    with pytest.raises(ConfigError, match=r"teacher must be a torch.nn.Module; found a str"):
        roastify.recover(student, "teacher", batches())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="student and teacher are one model, so training one would change the other"):
        roastify.recover(student, student, batches())
    half = copy.deepcopy(teacher)
    half.head.bias = student.head.bias
    with pytest.raises(ConfigError, match=r"student and teacher share the parameter head\.bias"):
        roastify.recover(student, half, batches())
    with pytest.raises(ConfigError, match=r"parameter embed\.weight has shape \[64, 16\], expected \[32, 16\]"):
        roastify.recover(student, Net(64), batches())
    with pytest.raises(ConfigError, match=r"parameter embed\.weight is missing; pass the dense model"):
        roastify.recover(student, nn.Linear(16, 5), batches())
    with pytest.raises(ConfigError, match="no parameter of the student requires a gradient"):
        roastify.recover(converted(teacher).requires_grad_(False), teacher, batches())
    with pytest.raises(ConfigError, match="must be on one real device; found cpu, meta; move them"):
        roastify.recover(student, Net().to("meta"), batches())

    class Other(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    with pytest.raises(SignatureMismatch, match="parameter 'scale' is missing"):
        roastify.recover(student, Other(), batches())


class Outputs(nn.Module):
    """One layer, and a function that makes the model's output of the layer's."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self, self.layer(x))


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    data = [torch.randn(4, 64)]
    dense = Outputs(lambda module, y: y.argmax(-1))
    with pytest.raises(RecoveryError, match="no output of the teacher is a floating-point tensor of several elements"):
        roastify.recover(converted(dense), dense, data)
    dense, other = Outputs(lambda module, y: (y, y)), Outputs(lambda module, y: y)
    with pytest.raises(RecoveryError, match=r"floating outputs are \['0', '1'\], the teacher's \['output'\]"):
        roastify.recover(converted(dense), other, data)
    dense = Outputs(lambda module, y: y[:, :3])
    with pytest.raises(
        RecoveryError, match=r"output output of the student is float32\[4, 3\].* teacher's float32\[4, 64\]"
    ):
        roastify.recover(converted(dense), other, data)
    student = converted(other)
    with pytest.raises(
        RecoveryError, match=r"the teacher fails on the first batch, called with float32\[4, 5\].*inputs="
    ):
        roastify.recover(student, other, [torch.randn(4, 5)])
    with pytest.raises(RecoveryError, match="module 'layer' returned tensors of shapes"):
        dense = Outputs(lambda module, y: module.layer(y) * 0 + y if type(module.layer) is nn.Linear else y)
        roastify.recover(converted(dense), dense, data, align=0)


def test_outputs_of_several_kinds() -> None:
    dense = Outputs(lambda module, y: {"logits": y, "hidden": (y.tanh(), y.argmax(-1)), "loss": y.mean()})
    report = roastify.recover(converted(dense), dense, [torch.randn(16, 64)], 5)
    assert report.logits == ("logits",)


def test_unusable_data_is_refused(teacher: nn.Module) -> None:
    student = converted(teacher)
    with pytest.raises(ConfigError, match=r"data must be an iterable of batches .*; found a int"):
        roastify.recover(student, teacher, 3)
    with pytest.raises(ConfigError, match="data is a function that returned a int"):
        roastify.recover(student, teacher, lambda: 3)
    with pytest.raises(RecoveryError, match="data holds no batch"):
        roastify.recover(student, teacher, [])
    with pytest.raises(RecoveryError, match="data ended after 3 batches and cannot be iterated again"):
        roastify.recover(student, teacher, iter(batches(3)), 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be an integer of at least 0; found -1"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1; found 0"),
        ({"lr": 0}, "lr must be a number above 0; found 0"),
        ({"lr": "fast"}, "lr must be a number above 0; found 'fast'"),
        ({"feature_weight": -1}, "feature_weight must be a number of at least 0; found -1"),
        ({"seed": "x"}, "seed must be an integer; found 'x'"),
        ({"features": "re:["}, r"features: 're:\[' is not a valid regular expression: unterminated"),
        ({"clip": 0}, "clip must be a number above 0"),
        ({"warmup": 1.0}, "warmup is a share of the steps and must be below 1"),
        ({"schedule": "cosin"}, "schedule must be one of cosine, constant; found 'cosin'; closest: 'cosine'"),
        ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None; found torch.float16"),
        ({"loss_fn": 3}, "loss_fn must be a function of outputs and batch, or the name of an output"),
        ({"evaluate": 3}, "evaluate must be a function; found a int"),
        ({"inputs": "x"}, "inputs must be a function; found a str"),
        ({"resume": True}, "resume needs the folder that the checkpoints are in; pass folder="),
        ({"output_weight": 0, "feature_weight": 0}, "nothing to train on"),
        ({"features": "blocks.9"}, "features pattern 'blocks.9' matched no module; closest: 'blocks"),
        ({"logits": "output9"}, "logits pattern 'output9' matched no floating output; closest: 'output'"),
        ({"optimizer": 3}, "optimizer must be a torch.optim.Optimizer .*; found a int"),
        ({"optimizer": lambda p: p}, "optimizer is a function that returned a list; expected an Optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "holds parameters that are not the student's"),
        ({"loss_fn": "loss"}, "the student's output 'loss' is NoneType; expected a tensor of one element"),
        ({"loss_fn": lambda out, batch: out}, r"loss_fn returned float32\[32, 5\] on cpu; expected"),
        ({"loss_fn": lambda out, batch: out.sum().detach()}, "loss_fn returned float32.* without a gradient; expected"),
    ],
)
def test_invalid_settings_are_refused(teacher: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        roastify.recover(converted(teacher), teacher, batches(2), **settings)


def test_a_loss_that_is_not_finite_ends_the_run(teacher: nn.Module, tmp_path: Path) -> None:
    seen = 0

    def explode(outputs: Tensor, batch: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return outputs.sum() * (torch.nan if seen == 4 else 0)

    student = converted(teacher)
    before = state_of(student)
    message = (
        r"the loss is not finite by step 4 \(.*task nan\); lower the learning rate.*checkpoint in .* was saved before"
    )
    # This holds whether or not the loss curve has a point there.
    for every in (1, 50):
        seen = 0
        folder = tmp_path / str(every)
        settings: dict[str, Any] = {"loss_fn": explode, "folder": folder, "save_every": 2, "log_every": every}
        with pytest.raises(RecoveryError, match=message):
            roastify.recover(student, teacher, batches(), 6, **settings)
        found = json.loads((folder / checkpoint.MANIFEST).read_text())
        assert ["step", 2] in found["state"]["dict"]
        assert_same(state_of(student), dict(before))


def test_a_gradient_that_is_not_finite_ends_the_run(teacher: nn.Module, tmp_path: Path) -> None:
    """The loss of that step is finite, but a checkpoint of its parameters would be useless."""
    seen = 0

    def explode(outputs: Tensor, batch: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        total = outputs.sum() * 0
        return total.abs().sqrt() if seen == 4 else total

    student = converted(teacher)
    before = state_of(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    with pytest.raises(RecoveryError, match=r"the parameter .* is not finite by step 4 \(.*task 0\).*was saved before"):
        roastify.recover(
            student, teacher, batches(), 8, loss_fn=explode, folder=tmp_path, save_every=2, log_every=50,
            optimizer=optimizer,
        )  # fmt: skip
    found = json.loads((tmp_path / checkpoint.MANIFEST).read_text())
    assert ["step", 2] in found["state"]["dict"]
    assert_same(state_of(student), before)
    assert optimizer.param_groups[0]["lr"] == 0.01
    # The optimizer holds nothing of the failed run either.
    roastify.recover(student, teacher, batches(), 4, optimizer=optimizer)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("align", [0, 30])
def test_data_that_is_not_finite_is_refused(teacher: nn.Module, tmp_path: Path, steps: int, align: int) -> None:
    student = converted(teacher)
    before = state_of(student)
    data = [batch * torch.nan for batch in batches()]
    with pytest.raises(RecoveryError, match="the teacher's output output has no finite value on the first batches"):
        roastify.recover(student, teacher, data, steps, align=align, folder=tmp_path)
    assert_same(state_of(student), before)
    assert not checkpoint.holds_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_is_found(teacher: nn.Module, tmp_path: Path, value: float) -> None:
    student = converted(teacher)
    before = state_of(student)
    data = batches()
    data[1][3, 2] = value
    for conjugate_steps, message in (
        (30, "inputs of the teacher's layer embed are not finite"),
        (0, "the loss is not finite by"),
    ):
        with pytest.raises(RecoveryError, match=message):
            roastify.recover(student, teacher, data, 4, align=conjugate_steps, folder=tmp_path)
        assert_same(state_of(student), dict(before))
        assert not checkpoint.holds_checkpoint(tmp_path)


def test_a_parameter_that_is_infinite_by_design_is_no_failure(teacher: nn.Module, tmp_path: Path) -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher
            self.impossible = nn.Parameter(torch.tensor(-torch.inf))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Marked()
    report = roastify.recover(converted(model), model, batches(), 4, folder=tmp_path)
    assert report.steps == 4


def test_alignment_checks_inputs_of_batches_that_the_report_does_not_compare(teacher: nn.Module) -> None:
    data = batches()
    data[6][3, 2] = torch.nan
    student = converted(teacher)
    before = state_of(student)
    with pytest.raises(RecoveryError, match=r"inputs of the teacher's layer embed are not finite"):
        roastify.recover(student, teacher, data, 4)
    assert_same(state_of(student), before)


def test_a_resumed_run_repeats_an_evaluation_that_failed(teacher: nn.Module, tmp_path: Path) -> None:
    """The run then continues as if it had never stopped: no feature of the evaluation enters the next step's loss."""

    def evaluate(model: nn.Module) -> Any:
        if failing:
            raise ValueError("on purpose")
        return accuracy(model)

    settings: dict[str, Any] = {"steps": 6, "evaluate": evaluate, "evaluate_every": 2, "save_every": 2}
    failing = True
    resumed, whole = converted(teacher), converted(teacher)
    with pytest.raises(ValueError, match="on purpose"):
        roastify.recover(resumed, teacher, batches(), folder=tmp_path, **settings)
    failing = False
    found = roastify.recover(resumed, teacher, batches(), folder=tmp_path, resume=True, **settings)
    expected = roastify.recover(whole, teacher, batches(), **settings)
    assert found.resumed_at == 2 and found.evaluations == expected.evaluations and len(found.evaluations) == 3
    assert torch.equal(pool_of(resumed).weight, pool_of(whole).weight)


def test_a_failed_evaluation_loses_no_training(teacher: nn.Module, tmp_path: Path) -> None:
    called = 0

    def evaluate(model: nn.Module) -> Any:
        nonlocal called
        called += 1
        if failing:
            raise ValueError("on purpose")
        return {"accuracy": np.float32(0.5), "loss": torch.tensor(2.0)}

    failing = True
    first, second = converted(teacher), converted(teacher)
    with pytest.raises(ValueError, match="on purpose"):
        roastify.recover(first, teacher, batches(), 4, evaluate=evaluate, folder=tmp_path)
    failing = False
    for _ in range(2):
        report = roastify.recover(second, teacher, batches(), 4, evaluate=evaluate, folder=tmp_path, resume=True)
        assert report.resumed_at == 4 and called == 2
        # The report has one evaluation, in numbers that JSON can hold.
        assert json.loads(json.dumps(report.to_dict()))["evaluations"] == [[4, {"accuracy": 0.5, "loss": 2.0}]]
    assert torch.equal(pool_of(first).weight, pool_of(second).weight)


@pytest.mark.gpu
def test_on_a_gpu(teacher: nn.Module) -> None:
    teacher.cuda()
    student = converted(teacher)
    report = roastify.recover(student, teacher, batches(), 80, lr=5e-3, autocast=torch.bfloat16)
    assert report.aligned is not None and report.align_error is not None
    assert report.align_error[1] < 0.6 * report.align_error[0]
    assert report.after.error < 0.5 * report.aligned.error
