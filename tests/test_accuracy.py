"""The accuracy benchmark: counts, rivals, the step, the queue of runs, and what the page concludes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify
from benchmarks import documents
from benchmarks import rows as files
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import (
    campaign,
    groups,
    inputs,
    methods,
    nets,
    page,
    picture,
    pruning,
    readme,
    rivals,
    runs,
    step,
    table,
    tables_page,
    tasks,
    teacher,
    training,
    trials,
    verdicts,
)
from benchmarks.accuracy.budget import UnreachableError, largest
from benchmarks.accuracy.runs import Run

ROOT = Path(__file__).parents[1]

PIL = pytest.importorskip("PIL.Image", reason="the data is made of image files, which Pillow writes")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and on a busy machine wait for it most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images whose brightness tells the label, and of reviews whose words do, in the usual formats."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in range(10):
            path = folder / split / f"class{label}"
            path.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(25 * label + rng.integers(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
                PIL.fromarray(pixels).save(path / f"{index}.{'png' if index % 2 else 'jpg'}")
        for word, name in (("fine", "pos"), ("dull", "neg")):
            path = folder / "aclImdb" / split / name
            path.mkdir(parents=True)
            for index in range(5 * count):
                (path / f"{index}_7.txt").write_text(f"A {word}<br />film, {word} number {index}!")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


SMOKE = {name: tasks.smoke(task) for name, task in tasks.TASKS.items()}
IMAGES = SMOKE["resnet9"]


def prepared(task: tasks.Task, data: Path, cache: Path) -> Path:
    inputs.prepare(task, data, cache)
    return inputs.cache_folder(task, data, cache)


@pytest.mark.parametrize(("name", "millions"), [("resnet9", 6.57), ("resnet20", 0.27), ("vgg11", 9.23), ("imdb", 9.33)])
def test_the_dense_models_have_their_known_sizes(name: str, millions: float) -> None:
    assert methods.target(tasks.TASKS[name], 1.0) / 1e6 == pytest.approx(millions, abs=0.005)


RATIOS = (3.0, 10.0, 30.0, 100.0, 300.0)
UNREACHABLE = {("resnet9", "lowrank", 300.0), ("imdb", "lowrank", 300.0)}


@pytest.mark.parametrize("name", ["resnet9", "imdb"])
@pytest.mark.parametrize("method", ["smaller", "lowrank", "random"])
def test_rivals_store_what_is_allowed(name: str, method: str) -> None:
    task = tasks.TASKS[name]
    for ratio in {"smaller": RATIOS, "lowrank": (10.0, 100.0, 300.0), "random": (10.0, 300.0)}[method]:
        allowed = methods.target(task, ratio)
        run = Run(name, method, ratio)
        if (name, method, ratio) in UNREACHABLE:
            with pytest.raises(UnreachableError, match=r"at least .* are allowed"):
                methods.build(run, task, "cpu", no_batch)
            continue
        built = methods.build(run, task, "cpu", no_batch)
        assert 0.99 * allowed <= built.stored <= allowed, (ratio, built)
        counted = sum(int(mask.count_nonzero()) for name, mask in built.model.named_buffers() if name.endswith("kept"))
        vectors = sum(p.numel() for p in built.model.parameters() if p.dim() < 2)
        alone = nets.size(built.model)
        assert built.stored == (counted + vectors if method == "random" else alone)


@pytest.mark.parametrize("name", ["resnet9", "imdb"])
def test_hashed_models_stay_below_the_target_by_less_than_a_slot(name: str) -> None:
    task = tasks.TASKS[name]
    with torch.device("meta"):
        model = nets.dense_net(task)
    for ratio, method in itertools.product(RATIOS, methods.METHODS):
        if not methods.METHODS[method].converts:
            continue
        plan = roastify.plan(model, ratio, config=methods.conversion(Run(name, method, ratio)))
        missing = methods.target(task, ratio) - plan.stored_numel
        assert 0 <= missing < plan.tile[0] * plan.tile[1], (ratio, method)


def no_batch() -> pruning.Batch:
    raise AssertionError("this method looks at no data")


def test_the_largest_size_below_a_target_is_found_or_the_error_says_why_not() -> None:
    def count(sizes: tuple[int, ...]) -> int:
        return 3 * sizes[0] + sizes[0] * sizes[1] + 5

    found = largest(count, (40, 60), 1010)
    assert 1000 <= count(found) <= 1010
    assert largest(count, (40, 60), count((40, 60))) == (40, 60)
    with pytest.raises(UnreachableError, match="at least 9 parameters, and 8 are allowed"):
        largest(count, (40, 60), 8)


def test_low_rank_factors_are_the_truncated_decomposition() -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(12, 30), torch.randn(30, 12)):
        left, right = rivals.factors(weight, 5)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(left @ right, (u[:, :5] * s[:5]) @ v[:5], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.norm(), right.norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 16, 3, 2, 1, bias=False), nn.Linear(30, 20)])
def test_low_rank_layers_compute_with_the_product_of_their_factors(layer: nn.Module) -> None:
    found = rivals.LowRank(layer, 3)
    if isinstance(layer, nn.Conv2d):
        x, weight = torch.randn(2, 4, 8, 8), (found.left @ found.right.flatten(1)).view_as(layer.weight)
        expected = F.conv2d(x, weight, None, 2, 1)
    else:
        x, weight = torch.randn(2, 30), found.left @ found.right
        expected = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.norm(), layer.weight.norm(), rtol=1e-4, atol=0)


def test_a_smaller_vocabulary_maps_all_other_words_to_unknown() -> None:
    model = rivals.FewerWords(nn.Embedding(5, 3), 5)
    assert torch.equal(model(torch.tensor([4, 5, 99])), model(torch.tensor([4, 0, 0])))


def test_snip_is_weight_times_gradient_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nets.image_net(IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    scores = pruning.snip_scores(model, lambda: batch, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for name, weight in pruning.prunable(model).items():
        torch.testing.assert_close(scores[name], (weight * weight.grad).detach().abs(), msg=name)


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_small_layers_are_pruned_less(name: str) -> None:
    """Kept weights ÷ the sum of a layer's sizes is the same in every pruned layer: no channel is pruned whole."""
    torch.manual_seed(0)
    model = nets.image_net(tasks.TASKS["resnet9"])
    weights = {path: weight.detach().clone() for path, weight in pruning.prunable(model).items()}
    assert pruning.prune(model, 66_000, pruning.SCORES[name](model, no_batch, 0)) == 66_000
    shares = []
    for path, weight in weights.items():
        module, _, attribute = path.rpartition(".")
        mask = model.get_buffer(f"{module}.parametrizations.{attribute}.0.kept") > 0
        if mask.all():
            continue
        shares.append(float(mask.float().mean()) * weight.numel() / sum(weight.shape))
        if name == "magnitude":
            assert weight[mask].abs().min() >= weight[~mask].abs().max()
    assert len(shares) > 5
    assert max(shares) < 1.01 * min(shares)


def a_step(
    model: nn.Module,
    run: Run,
    folder: Path,
    task: tasks.Task = IMAGES,
    steps: int = 8,
    learned: teacher.Teacher | None = None,
) -> step.Step:
    examples, _ = inputs.load(task, folder, "cpu", False)
    optimizer, factors = training.make_optimizer(model, task, run, "cpu")
    epoch = inputs.Epoch.empty(len(examples), "cpu")
    epoch.draw(0, 0)
    rates = training.schedule(0.1, steps)
    return step.Step(model, optimizer, factors, rates, examples, epoch, task.batch, 0, 0.0, torch.enable_grad, learned)


def test_a_training_step_equals_that_of_a_plain_loop(data: Path, cache: Path) -> None:
    """The plain loop is written out here, with a number as its learning rate."""
    folder = prepared(IMAGES, data, cache)
    torch.manual_seed(0)
    ours, theirs = nets.image_net(IMAGES), nets.image_net(IMAGES)
    theirs.load_state_dict(ours.state_dict())
    taken = a_step(ours, Run("resnet9", "dense", 1.0), folder, steps=3)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    named = [{"params": matrices, "weight_decay": IMAGES.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(named, lr=0.0, momentum=0.9, nesterov=True)
    x, y, epoch = taken.examples.x, taken.examples.y, taken.epoch
    total = 0.0
    for index, rate in enumerate((0.1 * (1 / 6) / 0.2, 0.1 * (1 / 2) / 0.8, 0.1 * (1 / 6) / 0.8)):
        taken()
        chosen = epoch.order[16 * index : 16 * index + 16]
        images = []
        for place, image in zip(range(16 * index, 16 * index + 16), x[chosen], strict=True):
            top, left = int(epoch.top[place]), int(epoch.left[place])
            cropped = image[top : top + 32, left : left + 32]
            images.append((cropped.flip(1) if epoch.flip[place] else cropped).permute(2, 0, 1) / 64 - 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        # The memory format is the step's: in another one convolutions round differently, and three steps magnify that.
        batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(theirs(batch), y[chosen])
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    assert float(taken.loss) == pytest.approx(total, rel=1e-4)
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_warm_up_steps_change_no_later_step(data: Path, cache: Path, optimizer: str) -> None:
    """A capture takes warm-up steps first: a run after them equals a run without them."""
    folder = prepared(IMAGES, data, cache)
    task = dataclasses.replace(IMAGES, optimizer=optimizer)
    found = []
    for warm in (False, True):
        torch.manual_seed(0)
        model = roastify.convert(nets.image_net(task), 10)
        taken = a_step(model, Run("resnet9", "ours", 10.0), folder, task)
        if warm:
            with taken._retained():
                for _ in range(3):
                    taken()
            assert int(taken.done) == 0 and int(taken.position) == 0 and float(taken.loss) == 0
        for _ in range(3):
            taken()
        found.append([value.clone() for value in (taken.loss, *model.state_dict().values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pruned_weights_stay_zero_under_momentum_and_decay(data: Path, cache: Path) -> None:
    folder = prepared(IMAGES, data, cache)
    run = Run("resnet9", "random", 10.0, changes=(("decay", 0.1),))
    built = methods.build(run, IMAGES, "cpu", no_batch)
    weights = ("head.weight", "three_residual.first.0.weight")
    before = {name: read(built.model, name).detach().clone() for name in weights}
    taken = a_step(built.model, run, folder)
    for _ in range(4):
        taken()
    for name in weights:
        after, mask = read(built.model, name), before[name] != 0
        assert int(mask.count_nonzero()) and not after[~mask].any(), name
        assert not torch.equal(after[mask], before[name][mask]), name


def test_the_distilled_loss_is_the_formula() -> None:
    """(1 - a) · cross entropy + a · T² · Σ p (ln p - ln q), by hand for two examples of three classes."""
    ours, theirs = [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [[4.0, 1.0, -3.0], [2.0, 2.5, 0.0]]
    labels, share, temperature = [2, 1], 0.7, 2.5

    def softened(logits: list[float], by: float) -> list[float]:
        total = sum(math.exp(logit / by) for logit in logits)
        return [math.exp(logit / by) / total for logit in logits]

    expected = 0.0
    for student, dense, label in zip(ours, theirs, labels, strict=True):
        expected -= (1 - share) * math.log(softened(student, 1.0)[label]) / 2
        pairs = zip(softened(dense, temperature), softened(student, temperature), strict=True)
        expected += share * temperature**2 * sum(p * (math.log(p) - math.log(q)) for p, q in pairs) / 2
    logits = torch.tensor(ours)
    label_loss = F.cross_entropy(logits, torch.tensor(labels))
    learned = teacher.Teacher(nn.Identity(), share, temperature)
    assert float(learned.mixed(label_loss, logits, torch.tensor(theirs))) == pytest.approx(expected, rel=1e-5)


def test_a_distilled_step_asks_the_teacher_about_the_augmented_batch_and_leaves_it_as_it_was(
    data: Path, cache: Path
) -> None:
    folder = prepared(IMAGES, data, cache)
    torch.manual_seed(0)
    dense = nets.image_net(IMAGES).eval()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    seen: list[Tensor] = []
    model = nets.image_net(IMAGES)
    for net in (model, dense):
        net.register_forward_hook(lambda net, args, logits: seen.extend([args[0], logits]))
    taken = a_step(model, Run("resnet9", "dense", 1.0), folder, learned=teacher.Teacher(dense, 0.5, 3.0))
    taken()
    assert seen[1].requires_grad and not seen[3].requires_grad
    x, student, same, theirs = (tensor.detach() for tensor in seen)
    assert torch.equal(x, same)
    assert not dense.training and all(parameter.grad is None for parameter in dense.parameters())
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name
    labels = F.cross_entropy(student, taken.examples.y[taken.epoch.order[:16]])
    apart = F.kl_div(F.log_softmax(student / 3, -1), F.softmax(theirs / 3, -1), reduction="batchmean")
    assert float(taken.loss) == pytest.approx(float(0.5 * labels + 0.5 * 9 * apart), rel=1e-5)
    assert float(apart) > 1e-3


DISTILLED = (("distill", 0.9),)
DISTILLED_RUN = Run("resnet9", "ours", 10.0, 1, 0.01, 1, changes=DISTILLED)


def test_a_teacher_is_the_dense_run_and_is_trained_once(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(IMAGES, data, cache)
    fitted: list[Run] = []

    def fit(run: Run, *arguments: Any) -> training.Trained:
        fitted.append(run)
        learned = arguments[-2] if run.changes else None
        if learned is not None:
            assert (learned.share, learned.temperature) == (0.9, teacher.TEMPERATURE) and not learned.model.training
            assert not any(parameter.requires_grad for parameter in learned.model.parameters())
        return real(run, *arguments)

    def clock() -> float:
        # On this clock each dense run takes a thousand seconds.
        return time.perf_counter() + 1000 * sum(run.method == "dense" for run in fitted)

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock))
    run = DISTILLED_RUN
    first, again = (training.train(run, IMAGES, folder, "cpu") for _ in range(2))
    dense = Run("resnet9", "dense", 1.0, 1, *IMAGES.grid[0])
    assert fitted == [dense, run, run]
    assert first["setup"] <= first["seconds"] < 1000
    assert first["loss"] == again["loss"] and first["teacher_accuracy"] == again["teacher_accuracy"]
    row = training.train(dense, IMAGES, folder, "cpu")
    assert row["accuracy"][-1] == first["teacher_accuracy"] and "teacher_accuracy" not in row
    plain = training.train(dataclasses.replace(run, changes=()), IMAGES, folder, "cpu")
    assert plain["loss"] != first["loss"] and plain["stored"] == first["stored"]
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("method", ["ours", "magnitude", "lowrank", "dense"])
def test_a_warm_run_starts_from_the_trained_dense_model(method: str, data: Path, cache: Path) -> None:
    folder = prepared(IMAGES, data, cache)
    run = Run("resnet9", method, 1.0 if method == "dense" else 2.0, 1, 0.0, 1, changes=(("warm", True),))
    # At rate 0 only running statistics change, and the dense model's were updated as often.
    row = training.train(run, IMAGES, folder, "cpu")
    start = load_file(teacher.path_of(teacher.dense_run(run, IMAGES), IMAGES, folder, "cpu"))
    built = methods.build(run, IMAGES, "cpu", lambda: (torch.zeros(1), torch.zeros(1)), start)
    assert built.stored == row["stored"]
    weight = start["three_residual.first.0.weight"]

    def found(made: methods.Built) -> Tensor:
        return made.model.three_residual.first[0].weight.detach()

    if method == "dense":
        assert torch.equal(found(built), weight)
    elif method == "magnitude":
        kept = found(built) != 0
        assert torch.equal(found(built)[kept], weight[kept]) and 0 < kept.sum() < kept.numel()
    elif method == "ours":
        # A warm pool is the least-squares fit, so its weights are near the dense ones; a random pool's weights are not.
        cold = methods.build(dataclasses.replace(run, changes=()), IMAGES, "cpu", lambda: None)
        far = [float((found(made) - weight).norm() / weight.norm()) for made in (built, cold)]
        assert far[0] < 0.9 and far[1] > 1.1
    with pytest.raises(ValueError, match="no use for the dense"):
        methods.check_changes(dataclasses.replace(run, method="smaller"))


def test_a_teachers_file_depends_on_every_setting_of_its_training(tmp_path: Path) -> None:
    """A trial's teacher matters most: it must not have seen the examples that the trial is judged on."""
    run = DISTILLED_RUN
    larger = dataclasses.replace(IMAGES, scale=0.5)
    other_rate, longer = (dataclasses.replace(IMAGES, grid=(first,)) for first in ((0.2, 1), (0.4, 2)))
    cases = [(run, IMAGES, "cpu"), (run, IMAGES, "cuda"), (run, larger, "cpu"), (run, other_rate, "cpu"),
             (run, longer, "cpu"), (dataclasses.replace(run, trial=True), IMAGES, "cpu"),
             (dataclasses.replace(run, seed=2), IMAGES, "cpu"),
             (dataclasses.replace(run, task="vgg11"), SMOKE["vgg11"], "cpu")]  # fmt: skip
    paths = [teacher.path_of(teacher.dense_run(run, task), task, tmp_path, device) for run, task, device in cases]
    assert len(set(paths)) == len(cases)
    assert teacher.dense_run(dataclasses.replace(run, trial=True), IMAGES).trial
    # Settings of the student alone do not change the teacher, and all GPUs of a machine share one teacher.
    longer_run = dataclasses.replace(run, method="snip", ratio=100.0, rate=1.0, epochs=96)
    otherwise = dataclasses.replace(run, changes=(("cutout", 8), ("distill", 0.5), ("temperature", 2.0)))
    for other in (longer_run, otherwise):
        assert teacher.path_of(teacher.dense_run(other, IMAGES), IMAGES, tmp_path, "cpu") == paths[0]
    assert teacher.path_of(teacher.dense_run(run, IMAGES), IMAGES, tmp_path, "cuda:1") == paths[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"distill": 0.0}, "above 0 and at most 1, not 0.0"), ({"distill": 1.5}, "above 0 and at most 1, not 1.5"),
     ({"temperature": 4.0}, "add distill"), ({"distill": 0.5, "temperature": 0.0}, "must be above 0, not 0.0")],
)  # fmt: skip
def test_distillation_settings_that_make_no_sense_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.check_changes(Run("resnet9", "ours", 10.0, changes=tuple(changes.items())))
    methods.check_changes(Run("resnet9", "ours", 10.0, changes=(("distill", 1.0), ("temperature", 0.5))))


def read(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def test_evaluation_uses_running_statistics_and_does_not_change_them() -> None:
    torch.manual_seed(0)
    model = nets.image_net(IMAGES)
    model(torch.randn(16, 3, 32, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = inputs.Examples(torch.randint(256, (20, 40, 40, 3), dtype=torch.uint8), torch.randint(10, (20,)))
    together = training.accuracy(model, examples, torch.enable_grad)
    alone = [training.accuracy(model, examples.part(i, i + 1), torch.enable_grad) for i in range(20)]
    assert together == pytest.approx(sum(alone) / 20)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_cutout_holes_are_grey_squares_that_wrap_around_the_image() -> None:
    images = torch.full((2, 40, 40, 3), 255, dtype=torch.uint8)
    epoch = inputs.Epoch.empty(2, "cpu")
    epoch.hole_top.copy_(torch.tensor([10, 0]))
    epoch.hole_left.copy_(torch.tensor([20, 31]))
    found = inputs.augmented(images, torch.arange(2), epoch, torch.arange(2), 8)[:, 0] == 0
    assert found.sum((1, 2)).tolist() == [64, 64]
    assert found[0, 6:14, 16:24].all() and found[1, 28:, 27:].all() and found[1, :4, :3].all()


def test_order_and_augmentation_depend_on_seed_and_epoch_alone() -> None:
    drawn = [inputs.Epoch.empty(50, "cpu") for _ in range(3)]
    for epoch, (seed, number) in zip(drawn, ((1, 2), (1, 2), (1, 3)), strict=True):
        torch.rand(1)
        epoch.draw(seed, number)
    for first, same, other in zip(*(dataclasses.astuple(epoch) for epoch in drawn), strict=True):
        assert torch.equal(first, same) and not torch.equal(first, other)
    assert sorted(drawn[0].order.tolist()) == list(range(50))


def test_the_schedule_rises_and_falls() -> None:
    rates = training.schedule(2.0, 100)
    assert rates.argmax() in (19, 20) and float(rates.max()) == pytest.approx(2.0, rel=0.05)
    assert float(rates[0]) == pytest.approx(2.0 * 0.005 / 0.2) and float(rates[-1]) == pytest.approx(2.0 * 0.005 / 0.8)


def test_trials_are_judged_on_examples_held_out_of_training(data: Path, cache: Path) -> None:
    folder = prepared(IMAGES, data, cache)
    whole, test = inputs.load(IMAGES, folder, "cpu", False)
    train, judged = inputs.load(IMAGES, folder, "cpu", True)
    assert len(train) + len(judged) == len(whole) == IMAGES.train and len(judged) == IMAGES.held_out
    assert torch.equal(torch.cat([train.x, judged.x]), whole.x) and not torch.equal(judged.x, test.x[: len(judged)])


def smoke(data: Path, cache: Path, out: Path, *arguments: str) -> Result:
    fixed = ["--data", str(data), "--cache", str(cache), "--out", str(out), "--smoke", "--device", "cpu"]
    return CliRunner().invoke(command.main, [*fixed, "--workers", "0", *arguments])


@pytest.mark.long
def test_smoke_run_chooses_trains_records_and_resumes(data: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    cells = ["--task", "resnet9", "--task", "imdb", "--ratio", "10"]
    cells += [part for method in ("ours", "smaller", "snip", "lowrank") for part in ("--method", method)]
    found = smoke(data, cache, out, *cells, "--seeds", "1")
    assert found.exit_code == 0, found.output
    rows = files.load(out)["rows"]
    trained = [row for row in rows if not row["trial"]]
    assert {(row["task"], row["method"]) for row in trained} == set(
        itertools.product(("resnet9", "imdb"), ("ours", "smaller", "snip", "lowrank"))
    )
    for row in trained:
        of_cell = [trial for trial in rows if trial["trial"] and runs.of_row(trial).cell == runs.of_row(row).cell]
        assert len(of_cell) == len(trials.grid(row["method"], tasks.smoke(tasks.TASKS[row["task"]])))
        if "unreachable" in row:
            continue
        assert row["tuned"] and row["smoke"] and row["stored"] <= row["allowed"]
        assert len(row["accuracy"]) == len(row["loss"]) == row["epochs"] == 1
        best = min(of_cell, key=lambda trial: (-trial["accuracy"][-1], trial["rate"]))
        assert row["rate"] == best["rate"]
    assert sum("accuracy" in row for row in trained) >= 6

    again = smoke(data, cache, out, *cells, "--seeds", "1")
    assert again.exit_code == 0 and "nothing to do: every run asked for has a row in" in again.output
    more = smoke(data, cache, out, *cells, "--seeds", "2", "--minutes", "0")
    assert more.exit_code == 0 and f"{len(trained)} did not fit in the time" in more.output
    assert files.load(out)["rows"][: len(rows)] == rows

    document = tmp_path / "docs" / "accuracy.md"
    document.parent.mkdir()
    written = CliRunner().invoke(page.main, ["--rows", str(out), "--document", str(document)])
    assert written.exit_code == 0, written.output
    tables = (document.parent / "results" / "accuracy-tables.md").read_text()
    assert "SNIP" in tables and "not measured" in tables and "(1)" in tables
    text = document.read_text()
    for task in ("resnet9", "imdb"):
        assert f"images/accuracy-{task}.svg" in text
        assert (document.parent / "images" / f"accuracy-{task}.svg").stat().st_size > 10_000
    refused = CliRunner().invoke(page.main, ["--rows", str(out)])
    assert refused.exit_code == 1 and "smoke test, which say nothing" in refused.output


def test_distilled_runs_use_the_methods_choice_and_record_their_teachers_accuracy(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (("distill", 0.9), ("temperature", 2.0))
    asked = [Run("resnet9", "ours", 10.0, epochs=2, changes=changes), Run("imdb", "smaller", 10.0, changes=changes)]
    monkeypatch.setitem(groups.GROUPS, "distillation", lambda: iter(asked))
    out = tmp_path / "rows.json"
    found = smoke(data, cache, out, "--group", "distillation")
    assert found.exit_code == 0, found.output
    rows = files.load(out)["rows"]
    trained = {row["task"]: row for row in rows if not row["trial"]}
    assert [runs.of_row(row).changes for row in trained.values()] == [changes] * 2
    for row in rows:
        assert ("teacher_accuracy" in row) == (not row["trial"]) and not (row["trial"] and row["changes"])
    for task, row in trained.items():
        of_task = [trial for trial in rows if trial["trial"] and trial["task"] == task]
        assert row["rate"] == max(of_task, key=lambda trial: trial["accuracy"][-1])["rate"]
    assert [trained[task]["epochs"] for task in ("resnet9", "imdb")] == [2, 1]
    again = smoke(data, cache, out, "--group", "distillation")
    assert again.exit_code == 0 and "nothing to do: every run asked for has a row in" in again.output


@pytest.mark.long
def test_worker_processes_give_the_losses_of_this_process(data: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--task", "resnet9", "--method", "random", "--ratio", "10", "--rate", "0.4", "--seeds", "2"]
    fixed = ["--data", str(data), "--cache", str(cache), "--out", str(out), "--smoke", "--device", "cpu"]
    full = [sys.executable, "-m", "benchmarks.accuracy", *fixed, *arguments, "--workers", "1"]
    # Threads that wait without work would keep the others from theirs.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {row["seed"] for row in files.load(out)["rows"]} == {0, 1}
    other = tmp_path / "other.json"
    assert smoke(data, cache, other, *arguments).exit_code == 0
    for one, two in zip(files.load(out)["rows"], files.load(other)["rows"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[campaign.Worker]:
    """Run workers as threads, so that a test can replace what a run does."""
    made: list[campaign.Worker] = []

    class Thread(campaign.Worker):
        def _start(self) -> None:
            self.executor: Any = ThreadPoolExecutor(1)
            made.append(self)

        def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
            return self.executor.submit(function, *arguments)

    monkeypatch.setattr(campaign, "Worker", Thread)
    monkeypatch.setattr(inputs, "prepare", lambda *_: None)
    return made


def a_campaign(data: Path, tmp_path: Path, workers: int = 2, **settings: Any) -> campaign.Campaign:
    return campaign.Campaign(SMOKE, data, tmp_path, ["cpu"] * workers, [], **settings)


def a_row(run: Run, value: float, seconds: float = 1.0) -> dict[str, Any]:
    return {**runs.as_row(run), "accuracy": [value], "stored": 1, "setup": 0.0, "seconds": seconds, "captured": True,
            "loss": [1.0], "allowed": 1, "note": "", "machine": {"device": "x", "torch": "y", "date": "z"}}  # fmt: skip


def test_runs_wait_for_their_trials_and_use_the_best_candidate(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def attempt(run: Run, *_: object) -> dict[str, Any]:
        order.append(run)
        if run.trial:
            time.sleep(0.05)
        return a_row(run, 0.9 if run.rate == 1.0 else 0.5)

    monkeypatch.setattr(campaign, "attempt", attempt)
    found = a_campaign(data, tmp_path)
    asked = [Run("resnet9", "ours", 100.0, seed) for seed in range(2)] + [Run("resnet9", "dense", 1.0, rate=0.3)]
    outcomes = dict(found.outcomes(found.missing(asked)))
    assert [run.trial for run in order] == [True, True, False, False, False]
    assert {run.rate for run in outcomes if run.method == "ours" and not run.trial} == {1.0}
    assert {run.rate for run in outcomes if run.method == "dense"} == {0.3}
    assert not found.missing(asked)


def test_new_candidates_are_tried_and_only_runs_whose_choice_changes_are_repeated(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a row of an old choice stayed, it would be taken for its method's accuracy."""
    monkeypatch.setattr(
        campaign, "attempt", lambda run, *_: a_row(run, 0.9 if run.rate == {"ours": 3.0}.get(run.method, 0.4) else 0.5)
    )
    asked = [Run("resnet9", method, 10.0, seed, epochs=epochs)
             for method in ("ours", "snip") for seed, epochs in ((0, None), (1, None), (0, 7))]  # fmt: skip
    found = a_campaign(data, tmp_path)
    dict(found.outcomes(found.missing(asked)))
    other = Run("resnet9", "ours", 10.0, 0, 0.4, 5)
    dict(found.outcomes([other]))
    assert len(found.rows) == 4 + 6 + 1

    wider = dataclasses.replace(IMAGES, grid=(*IMAGES.grid, (3.0, 1)))
    found = campaign.Campaign({**SMOKE, "resnet9": wider}, data, tmp_path, ["cpu"] * 2, found.rows)
    # Rows of other campaigns: other lengths, and rates that no trial chose.
    others = [{**row, "scale": 0.5, "epochs": 3} for row in found.rows if row["tuned"]]
    others += [{**row, "tuned": False, "rate": 0.7} for row in found.rows if row["tuned"]]
    found = campaign.Campaign({**SMOKE, "resnet9": wider}, data, tmp_path, ["cpu"] * 2, [*found.rows, *others])
    missing = found.missing(asked)
    assert {(run.method, run.rate) for run in missing if run.trial} == {("ours", 3.0), ("snip", 3.0)}
    made = dict(found.outcomes(missing))
    assert {(run.method, run.rate) for run in made if not run.trial} == {("ours", 3.0)}
    assert [run.method for run in found.unchanged] == ["snip"] * 3 and not found.missing(asked)
    assert all(any(row is kept for kept in found.rows) for row in others)
    assert set(found.by_run) == set(map(runs.of_row, found.rows))
    kept = [runs.of_row(row) for row in found.rows if not row["trial"] and not any(row is other for other in others)]
    assert {run.rate for run in kept if run.method == "ours" and run != other} == {3.0}
    assert len(kept) == 7 and other in kept


def test_a_step_that_cannot_be_captured_runs_again_without_a_graph(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def attempt(run: Run, task: object, folder: object, device: str, graph: bool) -> Any:
        seen.append((run.method, graph))
        if run.method == "snip" and graph:
            return campaign.Failure("Traceback\nCaptureError: not permitted", in_capture=True)
        if run.method == "random":
            return campaign.Failure("Traceback\nValueError: no")
        return a_row(run, 0.5)

    monkeypatch.setattr(campaign, "attempt", attempt)
    found = a_campaign(data, tmp_path, workers=1)
    asked = [Run("resnet9", method, 10.0, seed, 0.4, 1) for method in ("snip", "random", "ours") for seed in (0, 1)]
    outcomes = dict(found.outcomes(asked))
    assert seen == [("snip", True), ("snip", False), ("snip", False), ("random", True), ("random", True),
                    ("ours", True), ("ours", True)]  # fmt: skip
    assert sum(isinstance(outcome, campaign.Failure) for outcome in outcomes.values()) == 2
    assert {row["method"]: row["not_captured"] for row in found.rows} == {
        "snip": "CaptureError: not permitted",
        "ours": None,
    }
    # A new process starts after each failure: the first one, one after the capture, two after the failed runs.
    assert len(threads) == 4


def failing(*rates: float) -> Callable[..., dict[str, Any] | campaign.Failure]:
    """Return a replacement of `attempt` in which runs of the given rates fail."""
    return lambda run, *_: campaign.Failure("on purpose") if run.rate in rates else a_row(run, 0.5)


@pytest.mark.parametrize("rates", [(0.4,), (0.4, 1.0)])
def test_a_run_waits_until_all_of_its_trials_succeed(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    monkeypatch.setattr(campaign, "attempt", failing(*rates))
    found = a_campaign(data, tmp_path, workers=1)
    asked = Run("resnet9", "ours", 10.0)
    came = dict(found.outcomes(found.missing([asked])))
    assert "A trial of it gave no row" in came[asked].text and len(found.rows) == 2 - len(rates)
    # The same command tries the failed trials again.
    again = found.missing([asked])
    assert asked in again and len(again) == 1 + len(rates)
    monkeypatch.setattr(campaign, "attempt", failing())
    found.untried.clear()
    assert all(not isinstance(outcome, campaign.Failure) for _, outcome in found.outcomes(again))
    assert len(found.rows) == 3 and not found.missing([asked])


def test_a_run_is_skipped_if_time_is_too_short_for_one_of_its_trials(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "attempt", failing())
    monkeypatch.setattr(campaign.Durations, "expected", lambda self, run: 1e3 if run.rate == 1.0 else 0.0)
    found = a_campaign(data, tmp_path, workers=1, deadline=time.time() + 100)
    asked = Run("resnet9", "ours", 10.0)
    came = dict(found.outcomes(found.missing([asked])))
    assert [run.rate for run in came] == [0.4] and asked in found.skipped and len(found.skipped) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "-1"), "'--workers': -1 is not in the range"),
        (("--minutes", "-1"), "'--minutes': -1.0 is not in the range"),
        (("--seeds", "0"), "'--seeds': 0 is not in the range"),
        (("--ratio", "0"), "'--ratio': 0.0 is not in the range"),
        (("--ratio", "nan"), "'--ratio': nan is not a number"),
        (("--rate", "inf"), "'--rate': inf is not in the range"),
        (("--epochs-scale", "-2"), "'--epochs-scale': -2.0 is not in the range"),
        (("--group", "main", "--ratio", "7"), "the groups have no run of that task, method, ratio and seed"),
        (("--group", "main", "--rate", "1"), "--rate is for the cells that --task and --method name"),
    ],
)
def test_invalid_arguments_are_refused(
    data: Path, cache: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "rows.json"
    found = smoke(data, cache, out, "--task", "resnet9", "--method", "ours", *arguments)
    assert found.exit_code == 2 and message in found.output and not out.exists()


def test_a_file_that_holds_no_rows_is_refused_and_left_alone(data: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    for content in ("{", "[1]", "{}", '{"rows": 5}', '{"rows": [1]}', '{"rows": [{}]}'):
        out.write_text(content)
        found = smoke(data, cache, out, "--task", "resnet9", "--method", "dense")
        assert found.exit_code == 1 and "is no file of rows" in found.output and out.read_text() == content


def test_smoke_rows_are_not_added_to_rows_of_real_runs(data: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = "--task", "resnet9", "--method", "dense", "--rate", "0.4", "--seeds", "1"
    assert smoke(data, cache, out, *arguments).exit_code == 0
    content = out.read_text().replace('"smoke": true', '"smoke": false')
    out.write_text(content)
    found = smoke(data, cache, out, *arguments)
    assert found.exit_code == 1 and "has rows of real runs" in found.output and out.read_text() == content


def test_runs_whose_choice_stays_the_same_are_reported_and_not_repeated(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    arguments = "--task", "resnet9", "--method", "dense", "--seeds", "2"
    assert "4 of 4 runs done" in smoke(data, cache, out, *arguments).output
    monkeypatch.setattr(campaign, "attempt", lambda run, *_: a_row(run, 0.0))
    wider = dataclasses.replace(tasks.TASKS["resnet9"], grid=(*tasks.TASKS["resnet9"].grid, (3.0, 24)))
    monkeypatch.setitem(tasks.TASKS, "resnet9", wider)
    again = smoke(data, cache, out, *arguments)
    assert again.exit_code == 0, again.output
    assert "1 of 3 runs done" in again.output and "2 have a row with what the new trials chose" in again.output


def test_ties_go_to_the_smaller_rate_and_the_shorter_run() -> None:
    text = tasks.TASKS["imdb"]
    tried = trials.trials(Run("imdb", "ours", 10.0), text)
    rows = {trial: a_row(trial, 0.8) for trial in tried}
    chosen = trials.choose(Run("imdb", "ours", 30.0, 1), text, rows)
    assert (chosen.rate, chosen.epochs) == (min(rate for rate, _ in text.grid), min(epochs for _, epochs in text.grid))


@pytest.mark.parametrize("name", ["resnet9", "resnet20", "vgg11", "imdb"])
def test_the_first_candidate_of_a_grid_is_the_dense_models_choice(name: str) -> None:
    """Teachers are trained with that candidate."""
    task, made = tasks.TASKS[name], table.Table(files.load(table.RESULTS)["rows"]).trials()
    chosen = trials.choose(Run(name, "dense", 1.0), task, made)
    assert (chosen.rate, chosen.epochs) == task.grid[0]


def test_two_campaigns_do_not_write_the_same_rows(data: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    arguments = "--task", "resnet9", "--method", "dense", "--rate", "0.4", "--seeds", "1"
    with command.alone(out):
        found = smoke(data, cache, out, *arguments)
        assert found.exit_code == 1 and "another campaign is writing" in found.output and not out.exists()
    assert smoke(data, cache, out, *arguments).exit_code == 0 and out.exists()


def test_a_changed_picture_is_read_again(data: Path, cache: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    before = inputs.cache_folder(IMAGES, copied, cache)
    for split in ("train", "test"):
        path = copied / split / "class3" / "1.png"
        path.write_bytes((copied / split / "class4" / "1.png").read_bytes())
        os.utime(path, ns=(1, 1))
        inputs.cache_folder.cache_clear()
        after = inputs.cache_folder(IMAGES, copied, cache)
        assert after != before
        before = after


def test_data_that_does_not_fit_the_task(data: Path, cache: Path, tmp_path: Path) -> None:
    few = dataclasses.replace(IMAGES, held_out=64)
    folder = prepared(few, data, cache)
    with pytest.raises(click.ClickException, match="64 training examples, and 64 are held out to choose step sizes"):
        inputs.load(few, folder, "cpu", True)
    assert len(inputs.load(few, folder, "cpu", False)[0]) == 64
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    for split in ("train", "test"):
        shutil.copytree(copied / split / "class3", copied / split / "more")
    with pytest.raises(click.ClickException, match="has 11 classes, and the task ResNet-9 on CIFAR-10 10"):
        inputs.prepare(dataclasses.replace(IMAGES, train=88), copied, cache)


def test_a_run_that_cannot_end_in_time_is_not_started(
    data: Path, tmp_path: Path, threads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "attempt", lambda run, *_: a_row(run, 0.5, seconds=100.0 * run.epochs))
    found = a_campaign(data, tmp_path, workers=1, deadline=time.time() + 150)
    asked = [Run("resnet9", "ours", 10.0, 0, 0.4, 1), Run("resnet9", "ours", 10.0, 1, 0.4, 2)]
    asked.append(Run("resnet9", "ours", 10.0, 2, 0.4, 1))
    assert set(dict(found.outcomes(asked))) == {asked[0], asked[2]} and found.skipped == [asked[1]]


def test_every_group_names_valid_runs() -> None:
    for name, group in groups.GROUPS.items():
        made = list(group())
        assert made and len(set(made)) == len(made), name
        for run in made:
            methods.check_changes(run)
            assert run.task in tasks.TASKS and run.method in methods.METHODS
            assert runs.of_row(json.loads(json.dumps(runs.as_row(run)))) == run
    with pytest.raises(ValueError, match="nothing reads colour"):
        methods.check_changes(Run("imdb", "ours", 10.0, changes=(("colour", "red"),)))
    first = trials.with_trials(groups.main(), tasks.TASKS)
    assert [run.trial for run in first[:3]] == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [("spread", 2.0), ("tied_spread", True), ("row_scales", True), ("exclude", "positions"), ("share", "all"),
     ("sign", "none"), ("init", "project"), ("pool_rate", 3.0), ("width", 20)],
)  # fmt: skip
def test_every_change_changes_what_is_trained(change: tuple[str, Any]) -> None:
    task = SMOKE["imdb"]
    method = "smaller" if change[0] == "width" else "ours"
    found = []
    for changes in ((), (change,)):
        run = Run("imdb", method, 10.0, changes=changes)
        model = methods.build(run, task, "cpu", no_batch).model
        _, factors = training.make_optimizer(model, task, run, "cpu")
        torch.manual_seed(0)
        model.eval()
        with torch.no_grad():
            logits = model(torch.randint(task.words, (4, task.length), generator=torch.Generator().manual_seed(0)))
        found.append((logits, sorted(factors), nets.size(model)))
    (logits, factors, size), (other, other_factors, other_size) = found
    assert not torch.equal(logits, other) or factors != other_factors or size != other_size


def test_tied_spread_makes_every_scale_one() -> None:
    # The coefficients of basis kernels spread more than the weights.
    changes = (("tied_spread", True), ("share", "weights"), ("kernel_basis", "none"))
    run = Run("resnet9", "ours", 10.0, changes=changes)
    plan = methods.build(run, IMAGES, "cpu", no_batch).model.roast_pool.plan
    assert [tensor.scale for tensor in plan.shared] == pytest.approx([1.0] * len(plan.shared), rel=0.02)


def comparison_rows(gains: dict[tuple[str, str, float], float]) -> list[dict[str, Any]]:
    """Return rows in which each cell's accuracy is 80 % plus its gain, a little more or less for each seed."""
    rows = []
    for (task, method, ratio), gain in gains.items():
        for seed, wobble in enumerate((-0.1, 0.0, 0.1)):
            # Each method has another wobble, so that paired differences have a spread.
            value = 80 + gain + wobble * (1 + list(methods.METHODS).index(method))
            row = a_row(Run(task, method, ratio, seed, 0.4, 24), value / 100)
            rows.append({**row, "tuned": True, "epochs_asked": False, "scale": 1.0, "smoke": False})
    return rows


def test_verdicts_follow_the_numbers() -> None:
    gains = {
        ("resnet9", "dense", 1.0): 10.0, ("resnet9", "ours", 1.0): 10.0, ("resnet9", "ours", 10.0): 9.1,
        ("resnet9", "ours", 100.0): 4.5, ("resnet9", "smaller", 100.0): 2.0, ("resnet9", "snip", 100.0): 1.0,
        ("resnet9", "cyclic", 100.0): 6.0, ("resnet9", "local", 10.0): 8.0, ("resnet9", "local", 100.0): 3.0,
        ("imdb", "dense", 1.0): 6.0, ("imdb", "ours", 10.0): 7.0, ("imdb", "ours", 100.0): 5.0,
    }  # fmt: skip
    found = {verdict.aim: verdict for verdict in verdicts.verdicts(table.Table(comparison_rows(gains)))}
    met = [found[aim].met for aim in found]
    #       10 vs dense, 100 vs dense, vs rivals, ratio 1, text 10, text 100, smaller text, sharing, preconditioner
    assert met == [True, False, False, True, True, True, None, True, None]
    rival = next(verdict for aim, verdict in found.items() if "best rival" in aim)
    assert "+2.50" in rival.found and "smaller dense model" in rival.found
    sharing = next(verdict for aim, verdict in found.items() if "one pool" in aim)
    assert "p = 0.031 over 6 pairs" in sharing.found
    # If longer training was begun, the page shows what is missing; if it was not, the page has no aim for it.
    assert not any("epochs" in aim for aim in found)
    rows = comparison_rows({("resnet9", "dense", 1.0): 10, ("resnet9", "ours", 10.0): 9.5})
    longer = [{**row, "epochs": 96} for row in rows]
    begun = {each.aim: each.met for each in verdicts.verdicts(table.Table([*rows, *longer])) if "epochs" in each.aim}
    assert len(begun) == 3 and sorted(begun.values(), key=str) == [None, None, True]
    # Text keeps the length that its trials chose.
    rows = comparison_rows({("imdb", "dense", 1.0): 6, ("imdb", "ours", 10.0): 4})
    taught = [{**row, "changes": {"distill": 0.9}, "accuracy": [row["accuracy"][0] + 0.03]} for row in rows[3:]]
    asked = [{**row, "epochs_asked": True, "accuracy": [0.5]} for row in taught]
    found = {each.aim: each for each in verdicts.verdicts(table.Table([*rows, *taught, *asked])) if "IMDB" in each.aim}
    assert [each.met for each in found.values()] == [False, None, None, True, None, None]
    assert found["transformer on IMDB, distilled: ratio 10 no worse than dense"].found.startswith("+1.00")
    worse = verdicts.verdicts(table.Table(comparison_rows({**gains, ("resnet9", "local", 100.0): 4.6})))
    assert worse[-2].met is False and "not above: ResNet-9 on CIFAR-10 at ratio 100" in worse[-2].found


def test_the_page_shows_losses_experiments_and_unreachable_ratios() -> None:
    rows = comparison_rows(
        {("resnet9", "dense", 1.0): 10, ("resnet9", "ours", 100.0): 3, ("resnet9", "snip", 100.0): 15}
    )
    unreachable = {**rows[0], **runs.as_row(Run("resnet9", "lowrank", 100.0, 0, 0.4, 24)), "unreachable": "why"}
    del unreachable["accuracy"]
    changed = {**rows[3], "changes": {"sign": "none"}, "accuracy": [0.80]}
    trial = {**rows[3], "trial": True, "epochs": 8, "accuracy": [0.70]}
    slower = {**rows[3], "scale": 0.5, "epochs": 12, "accuracy": [0.10]}
    text = tables_page.markdown([*rows, unreachable, changed, trial, slower])
    assert "pruned by SNIP is 12.00 points above roastify, p < 0.001." in text
    assert "| roastify | 100 | sign none | 0.4 | 24 | 1 | 80.00 (1) | -2.80 |" in text
    assert "| low rank | not reachable |" in text and "**95.00 ± 0.4" in text
    assert "0.4, 8 epochs: 70.00" in text and "3.12" not in text


def test_the_page_command_writes_the_readme_beside_the_page_in_docs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = comparison_rows({("imdb", "dense", 1.0): 7, ("imdb", "ours", 10.0): 6})
    path, document, front = (tmp_path / name for name in ("rows.json", "docs/accuracy.md", "README.md"))
    document.parent.mkdir()
    files.dump_lines(path, rows)
    before = f"Mine.\n{readme.BEGIN}\n<!-- end -->\n"
    front.write_text(before)
    monkeypatch.setattr(readme, "README", front)
    arguments = ["--rows", str(path), "--document", str(document), "--language-rows", str(tmp_path / "none.json")]
    assert CliRunner().invoke(page.main, arguments).exit_code == 0
    assert document.exists() and front.read_text() == before
    monkeypatch.setattr(page, "DOCUMENT", document)
    assert CliRunner().invoke(page.main, arguments).exit_code == 0
    assert front.read_text() == before.replace("<!-- end -->", readme.markdown(rows) + "<!-- end -->")


def test_the_readme_shows_means_and_marks_missing_results() -> None:
    cells = {
        ("imdb", "dense", 1.0): 7,
        ("imdb", "ours", 10.0): 6,
        ("imdb", "snip", 10.0): 3,
        ("imdb", "random", 10.0): 5,
    }
    rows = comparison_rows(cells)
    taught = [{**row, "changes": {"distill": 0.9}, "accuracy": [0.9]} for row in rows if row["method"] == "ours"]
    unreachable = {**rows[0], **runs.as_row(Run("imdb", "lowrank", 10.0, 0, 0.4, 24)), "unreachable": "why"}
    del unreachable["accuracy"]
    text = readme.markdown([*rows, *taught, unreachable])
    assert "| transformer on IMDB | 10 | 87.0 | 86.0 | 90.0 | – | not reachable | 85.0 | – |" in text
    assert text.count("\n") == 2 + len(readme.CELLS) and text.endswith("|\n")


def test_an_experiment_of_several_seeds_is_one_line_and_shows_a_difference_only_if_a_baseline_exists() -> None:
    rows = comparison_rows({("resnet9", "ours", 100.0): 3})
    changed = [{**row, "changes": {"sign": "none"}, "accuracy": [row["accuracy"][0] - 0.02]} for row in rows]
    alone = [{**row, "changes": {"decay": 0.1}, "trial": True, "rate": 7.0, "accuracy": [0.6]} for row in rows]
    text = tables_page.markdown([*rows, *changed, *alone])
    assert "| roastify | 100 | sign none | 0.4 | 24 | 1 | 81.00 ± 0.12 | -2.00 ± 0.00 (p < 0.001) |" in text
    assert "| roastify | 100 | decay 0.1 | 7 | 24 | 1 | 60.00 ± 0.00 | – |" in text
    assert text.count("sign none") == text.count("decay 0.1") == 1


def test_the_page_compares_basis_kernels_with_whole_ones() -> None:
    at_one = {("resnet9", "ours", 1.0): 9, ("resnet9", "whole", 1.0): 6.75}
    rows = comparison_rows({("resnet9", "ours", 100.0): 4, ("resnet9", "whole", 100.0): 2.5, **at_one})
    text = tables_page.markdown(rows)
    assert "| task | ratio | seeds | roastify − roastify, kernels without a basis |" in text and "| +1.50 " in text
    # At ratio 1 both are the same model, trained twice.
    assert "+2.25" not in text


def test_the_page_says_where_longer_trials_choose_another_rate() -> None:
    """Short trials choose for every method alike, but a short trial's choice is not always the best."""
    rows = comparison_rows({("resnet9", "ours", 100.0): 3, ("resnet9", "snip", 100.0): 2})
    # By method and rate: after the trial's 8 epochs, and after all 24.
    tried = {("ours", 0.4): (0.70, 0.86), ("ours", 1.0): (0.72, 0.84), ("snip", 0.4): (0.60, 0.70),
             ("snip", 1.0): (0.65, 0.80)}  # fmt: skip
    for (method, rate), values in tried.items():
        for epochs, value in zip((8, 24), values, strict=True):
            row = a_row(Run("resnet9", method, 100.0, 0, rate, epochs, True), value)
            rows.append({**row, "tuned": False, "epochs_asked": False, "scale": 1.0, "smoke": False})
    text = tables_page.markdown(rows)
    assert "- ResNet-9 on CIFAR-10, roastify, ratio 100: 0.4, 2.00 points above 1." in text
    assert text.count("- ResNet-9 on CIFAR-10, ") == 1
    # A row with a change belongs to another model.
    changed = [{**row, "changes": {"sign": "none"}} if row["trial"] and row["epochs"] == 24 else row for row in rows]
    assert "Longer runs, of one seed" not in tables_page.markdown(changed)
    # A single rate at full length allows no comparison.
    assert "Longer runs, of one seed" not in tables_page.markdown(
        [row for row in rows if (row["rate"], row["epochs"]) != (1.0, 24)]
    )


def test_a_method_that_learned_nothing_does_not_stretch_a_plots_axis() -> None:
    cells = {("resnet9", "ours", 100.0): 4, ("resnet9", "smaller", 100.0): 3}
    for worst, cut in ((2, False), (-60, True)):
        figure = picture.compare(table.Table(comparison_rows({**cells, ("resnet9", "snip", 100.0): worst})), "resnet9")
        lowest = figure.axes[0].get_ylim()[0]
        picture.plt.close(figure)
        assert lowest > 70 and ("in the table" in figure.axes[0].get_xlabel()) is cut


def test_the_page_compares_distilled_runs_with_the_same_runs_on_labels_alone() -> None:
    rows = comparison_rows({("resnet9", "dense", 1.0): 10, ("resnet9", "ours", 100.0): 3})
    ours = [row for row in rows if row["method"] == "ours"]
    plain = tables_page.markdown(rows)
    assert "istill" not in plain
    learned = [{**row, "changes": {"distill": 0.9}, "epochs_asked": True, "accuracy": [row["accuracy"][0] + 0.02],
                "teacher_accuracy": 0.91} for row in ours]  # fmt: skip
    # One of the longer runs has a counterpart on labels alone; the shorter runs are no counterpart of longer ones.
    longer = [{**row, "epochs": 96, "accuracy": [0.9]} for row in learned[:2]]
    alone = {**ours[1], "epochs": 96, "epochs_asked": True, "accuracy": [0.88]}
    tried = {"trial": True, "epochs": 12, "epochs_asked": False}
    trial = {**ours[0], **tried, "accuracy": [0.70]}
    softer = {**learned[0], **tried, "changes": {"distill": 0.5, "temperature": 2.0}, "accuracy": [0.71]}
    text = tables_page.markdown([*rows, *learned, *longer, alone, trial, softer])
    name = "| ResNet-9 on CIFAR-10 | roastify | 100 | distilled 0.9 at temperature 4 | 0.4 |"
    assert f"{name} 24 | 85.00 ± 0.12 | 83.00 ± 0.12 | 91.00 ± 0.00 | +2.00 ± 0.00 (p < 0.001) |" in text
    assert f"{name} 96 | 90.00 ± 0.00 (2) | 88.00 (1) | 91.00 ± 0.00 (2) | +2.00 |" in text
    assert "| roastify | 100 | distilled 0.5 at temperature 2 | 0.4 | 12 | 1 | 71.00 (1) | +1.00 |" in text
    assert text.count("distilled 0.9") == 2
    rival = [{**row, "method": "snip", "accuracy": [row["accuracy"][0] + 0.01]} for row in learned]
    above = "- ResNet-9 on CIFAR-10, 24 epochs, distilled, ratio 100, no hashing: pruned by SNIP is 1.00 points above"
    assert above in tables_page.markdown([*rows, *learned, *rival]) and above not in text
    # Distilled runs do not change the comparison of methods.
    of_task = [each.partition("## ResNet-9")[2].partition("\n## ")[0] for each in (plain, text)]
    assert of_task[0] == of_task[1] and "| roastify |" in of_task[0]


CAPTURED = ("dense", "ours", "plain", "local", "elementwise", "roast", "cyclic", "snip", "lowrank")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet9", "imdb"])
@pytest.mark.parametrize(
    ("method", "changes"),
    [*((method, ()) for method in CAPTURED), *((method, DISTILLED) for method in ("dense", "ours", "snip"))],
)
def test_a_captured_run_gives_the_losses_of_the_run_without_a_graph(
    data: Path, cache: Path, name: str, method: str, changes: tuple[tuple[str, Any], ...]
) -> None:
    task = dataclasses.replace(SMOKE[name], scale=0.5, words=min(SMOKE[name].words, 2_000))
    inputs.prepare(task, data, cache)
    folder = inputs.cache_folder(task, data, cache)
    run = Run(name, method, 1.0 if method == "dense" else 10.0, 0, 1e-3, 2, changes=changes)
    found = [training.train(run, task, folder, "cuda", graph) for graph in (True, False)]
    assert [row["captured"] for row in found] == [True, False]
    # The runs differ by bfloat16's rounding, by the order of sums and, on text, by the random draws of dropout.
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.1 if name == "imdb" else 0.03)
    assert found[0]["stored"] == found[1]["stored"]


def test_the_page_says_who_is_ahead_behind_and_neither() -> None:
    cells = {
        ("resnet9", "dense", 1.0): 10, ("resnet9", "ours", 3.0): 9, ("resnet9", "ours", 10.0): 8,
        ("resnet9", "ours", 100.0): 4, ("resnet9", "snip", 3.0): 8.99, ("resnet9", "smaller", 10.0): 6,
        ("resnet9", "roast", 100.0): 9, ("resnet9", "local", 10.0): 7, ("resnet9", "plain", 10.0): 10,
    }  # fmt: skip
    rows = comparison_rows(cells)
    text = " ".join(page.markdown(rows).split())
    assert (
        "- ResNet-9 on CIFAR-10: roastify is not clearly different from the best rival at ratio 3, is ahead of every "
        "rival measured at ratio 10 and is behind ROAST's unaligned tiles at ratio 100."
    ) in text
    assert "| ResNet-9 on CIFAR-10 | dense | **-1.00** | **-2.00** | **-6.00** |" in text
    assert "| | best without hashing | +0.01 pruned by SNIP | **+2.00** smaller dense model | – |" in text
    assert "| one pool for all tensors, not one for each | +1.00 (p = 0.25, 3 pairs) | – |" in text
    assert "| the preconditioner | -2.00 (p = 0.25, 3 pairs) | ResNet-9 10 |" in text
    assert "Language model" not in text and "from a trained model" not in text
    begun = [{**row, "changes": {"warm": True}} for row in rows if row["method"] != "dense" and row["ratio"] == 10]
    begun = [{**row, "accuracy": [row["accuracy"][0] + 0.01], "epochs_asked": True} for row in begun]
    begun += [{**row, "method": "magnitude"} for row in begun if row["method"] == "smaller"]
    text = page.markdown([*rows, *begun])
    assert "| ResNet-9, 24 epochs, from the trained dense model | 10 | 89.00 | **-1.00** | **+2.00** " in text
    # What is measured from the dense model's weights does not change the comparison from random ones.
    assert page.wins(table.Table([*rows, *begun]), []) == page.wins(table.Table(rows), [])


def test_the_pages_are_the_committed_results() -> None:
    rows = files.load(table.RESULTS)["rows"]
    language_rows = files.load(page.LANGUAGE_RESULTS)["rows"]
    assert page.markdown(rows, language_rows) == page.DOCUMENT.read_text()
    assert tables_page.markdown(rows, language_rows) == (page.DOCUMENT.parent / page.TABLES).read_text()
    text = readme.README.read_text()
    assert documents.insert(text, readme.BEGIN, readme.markdown(rows)) == text
