"""Runs a recovery: aligns the student's layers, then trains the student on the teacher's outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roastify.calls import describe, describe_call, run_model
from roastify.checks.interface import compare_interfaces, observe
from roastify.conversion.converted import current_plans, pool_of
from roastify.conversion.digests import digest_of_model, digest_of_plan
from roastify.errors import CheckpointError, ConfigError, RecoveryError
from roastify.isolation import RandomStream, modes_kept
from roastify.kernels.torch_internals import pytree
from roastify.progress import JsonLines, track
from roastify.recovery.align import align_layers
from roastify.recovery.batches import Feed, digest_of, mask_of, on_device, passing
from roastify.recovery.checkpoint import holds_checkpoint, read_checkpoint, write_checkpoint
from roastify.recovery.losses import (
    Recorder,
    check_comparable,
    class_dim,
    feature_loss,
    find_features,
    find_logits,
    finite,
    floats_of,
    output_loss,
    relative_error,
)
from roastify.recovery.options import RecoverOptions
from roastify.recovery.processes import Processes, joined
from roastify.recovery.report import Likeness, LossPoint, RecoveryReport
from roastify.recovery.resume_checks import check_state

# Batches on which the report compares the two models.
_LIKENESS_BATCHES = 4


class _NotFinite(RecoveryError):
    """A loss or parameter is not finite, so the student is restored to its state before the recovery."""


def run_recovery(student: nn.Module, teacher: nn.Module, data: Any, options: RecoverOptions) -> RecoveryReport:
    """Recover a student in place; see `roastify.recover`."""
    _check_models(student, teacher)
    device = pool_of(student).weight.device
    with modes_kept(student, teacher), _gradients_cleared(student), joined(device) as processes:
        given = copy.deepcopy(student.state_dict())
        theirs = options.optimizer if isinstance(options.optimizer, torch.optim.Optimizer) else None
        optimizer_given = copy.deepcopy(theirs.state_dict()) if theirs is not None else None
        try:
            run = _Run(student, teacher, data, options, processes)
            with run.rates_put_back():
                run.start()
                run.train()
            return run.finish()
        except _NotFinite:
            student.load_state_dict(given)
            if theirs is not None and optimizer_given is not None:
                theirs.load_state_dict(optimizer_given)
            raise


def evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Any], seed: int, device: torch.device) -> Any:
    """Return what the user's function finds for a model in eval mode, with numbers that JSON can hold.

    Args:
        model: the model.
        evaluate: the function.
        seed: the seed of the random numbers that it draws, which are the same at each evaluation.
        device: the model's device.
    """
    with RandomStream(seed, device).active(), torch.no_grad():
        return pytree.tree_map(_plain_number, evaluate(model.eval()))


def _check_models(student: nn.Module, teacher: nn.Module) -> None:
    pool = pool_of(student)
    if not isinstance(teacher, nn.Module):
        raise ConfigError(f"teacher must be a torch.nn.Module; found a {type(teacher).__name__}")
    ours = {id(parameter): name for name, parameter in student.named_parameters()}
    both = next((ours[id(parameter)] for parameter in teacher.parameters() if id(parameter) in ours), None)
    if teacher is student or both is not None:
        what = "are one model" if teacher is student else f"share the parameter {both}"
        raise ConfigError(
            f"student and teacher {what}, so training one would change the other; convert a copy of the dense model "
            f"(inplace=False) and keep the dense model as the teacher"
        )
    theirs = {name: tuple(parameter.shape) for name, parameter in teacher.named_parameters(remove_duplicate=False)}
    for tensor in pool.plan.shared:
        if theirs.get(tensor.name) != tensor.shape:
            shape = theirs.get(tensor.name)
            what = f"has shape {list(shape)}, expected {list(tensor.shape)}" if shape else "is missing"
            raise ConfigError(
                f"the teacher's parameter {tensor.name} {what}; pass the dense model that the student was converted "
                f"from"
            )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            "no parameter of the student requires a gradient; make the pool trainable: student.requires_grad_(True)"
        )
    devices = {tensor.device for model in (student, teacher) for tensor in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        raise ConfigError(f"student and teacher must be on one real device; found {found}; move them with .to(device)")
    compare_interfaces(observe(teacher), observe(student, who="converted"))


@contextlib.contextmanager
def _gradients_cleared(student: nn.Module) -> Iterator[None]:
    """Remove the student's gradients at the end."""
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)


class _Run:
    """One recovery, from the first batch to the report.

    All random numbers come from two streams of the run's own, one for the data and one for the models. They depend on
    `seed` alone, so a run can be resumed.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, data: Any, options: RecoverOptions, processes: Processes
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.options = options
        self.processes = processes
        self.folder = None if options.folder is None else Path(options.folder)
        self.device = processes.device
        self.split = passing(teacher, options.inputs)
        self.optimizer = _optimizer(student, options, self.device)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # Parameters that must stay finite. Others may be infinite by design.
        self.finite = {
            name: parameter
            for name, parameter in student.named_parameters()
            if parameter.requires_grad and bool(parameter.isfinite().all())
        }
        self.stream = RandomStream(options.seed, self.device)
        made_by = self._made_by()
        stored = self._stored(made_by)
        self.feed = Feed(data, RandomStream(options.seed + 1, self.device), stored and stored["feed"])
        self.held = self.feed.peek(max(_LIKENESS_BATCHES, options.align_batches))
        self.logits = self._check_outputs(self.held[0])
        wanted = options.feature_weight > 0
        self.features = find_features(student, teacher, options.features) if wanted else ()
        digest = digest_of(self.held)
        if stored is not None and stored["data"] != digest:
            raise CheckpointError(
                f"the checkpoint {self.folder} was made with other data: its first batches differ; resume with the "
                f"same data, or give another folder"
            )
        processes.check_equal({"data": digest, "teacher": made_by["teacher"], "conversion": made_by["conversion"]})
        self.made_by = made_by
        self.data = digest
        self.lines = JsonLines("recover", options.steps, every_point=options.log_every > 0)
        self.step = self.resumed_at = 0
        self.seconds = self.align_seconds = 0.0
        self.align_error: tuple[float, float] | None = None
        self.before: Likeness | None = None
        self.aligned: Likeness | None = None
        self.losses: list[LossPoint] = []
        self.evaluations: list[tuple[int, Any]] = []
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        if stored is not None:
            self._resume(stored)

    def start(self) -> None:
        """Compare the two models and align the student's layers; a resumed run has done both."""
        if self._is_taught():
            _warn_of_untrained_statistics(self.teacher)
        self.processes.copy_first(self.student)
        if self.before is not None:
            return
        self.before = self._likeness()
        if not self.options.align:
            return
        begun = self._now()
        batches = self.held[: self.options.align_batches]
        self.teacher.eval()
        with self.stream.active():
            forwards = [functools.partial(self._call_cast, self.teacher, batch) for batch in batches]
            self.align_error = align_layers(self.student, self.teacher, forwards, self.options.align)
        self.processes.copy_first(self.student)
        self.align_seconds = self.seconds = self._now() - begun
        self.aligned = self._likeness()
        self._save()

    def train(self) -> None:
        """Take the remaining steps of the optimizer."""
        options = self.options
        self.teacher.eval()
        self.student.train()
        recorders = Recorder(self.student, self.features), Recorder(self.teacher, self.features)
        begun = self._now()
        with recorders[0].recording(), recorders[1].recording():
            if self.resumed_at and self._evaluates():
                self._save_and_evaluate(recorders, saving=True)
                begun = self._now()
            left = range(self.step, options.steps)
            shown = track(left, "recovering", note=self._last_loss, unit="steps")
            for _ in shown if self.processes.is_first else left:
                with self.stream.active():
                    self._take_step(*recorders)
                self.step += 1
                if self.step % options.every() == 0 or self.step == options.steps:
                    self._log(self.seconds + self._now() - begun)
                saving = self.step == options.steps or self.step % options.save_every == 0
                if saving or self._evaluates():
                    self.seconds += self._now() - begun
                    self._save_and_evaluate(recorders, saving)
                    begun = self._now()

    def _save_and_evaluate(self, recorders: Sequence[Recorder], saving: bool) -> None:
        """Save, then evaluate if it is time; in this order, because an evaluation is the user's code and may fail."""
        if saving:
            self._save()
        if not self._evaluates():
            return
        self._evaluate()
        if saving:
            self._save()
        for recorder in recorders:
            recorder.take()
        self.student.train()

    @contextlib.contextmanager
    def rates_put_back(self) -> Iterator[None]:
        """Restore the optimizer's learning rates at the end, because the optimizer may be the user's."""
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                _set_rate(group, rate)

    def finish(self) -> RecoveryReport:
        """Return the report, and warn if the student is worse than before."""
        assert self.before is not None
        self.processes.copy_first(self.student)
        after = self._likeness()
        if self.processes.is_first:
            self._warn_if_worse(after)
        return RecoveryReport(
            steps=self.step,
            seconds=self.seconds,
            align_seconds=self.align_seconds,
            align_error=self.align_error,
            before=self.before,
            aligned=self.aligned,
            after=after,
            losses=tuple(self.losses),
            evaluations=tuple(self.evaluations),
            features=self.features,
            logits=self.logits,
            resumed_at=self.resumed_at,
        )

    def _take_step(self, ours: Recorder, theirs: Recorder) -> None:
        options = self.options
        factor = options.rate(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            _set_rate(group, rate * factor)
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(options.accumulate):
            batches = [self.feed.next() for _ in range(self.processes.count)]
            batch = on_device(batches[self.processes.rank], self.device)
            args, kwargs = self.split(batch)
            mask = mask_of(kwargs)
            parts: dict[str, Tensor] = {}
            with self._autocast():
                if self._is_taught():
                    with torch.no_grad():
                        expected = self.teacher(*args, **kwargs)
                found = self.student(*args, **kwargs)
                if options.output_weight:
                    parts["outputs"] = output_loss(found, expected, self.logits, options.temperature, mask)
                if options.feature_weight:
                    parts["features"] = feature_loss(ours.take(), theirs.take(), mask)
                if options.loss_fn is not None:
                    parts["task"] = _task_loss(options.loss_fn, found, batch)
            weights = {
                "outputs": options.output_weight,
                "features": options.feature_weight,
                "task": options.task_weight,
            }
            loss = torch.stack([weights[name] * part.float() for name, part in parts.items()]).sum()
            (loss / options.accumulate).backward()
            for name, value in {"loss": loss, **parts}.items():
                value = value.detach().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.summed += 1
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.processes.share_gradients(parameters)
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        self.optimizer.step()

    def _is_taught(self) -> bool:
        """Whether the student learns from the teacher, and not from the task's loss alone."""
        return bool(self.options.output_weight or self.options.feature_weight)

    def _log(self, seconds: float) -> None:
        """Add a point to the loss curve, and tell whoever wants to know."""
        self.sums = self.processes.mean(self.sums)
        self._check_finite()
        means = self._means()
        rate = self.rates[0] * self.options.rate(self.step - 1)
        self.losses.append(LossPoint(self.step, means.pop("loss"), means, rate))
        self.sums, self.summed = {}, 0
        self._tell({"loss": self.losses[-1].loss, **means, "lr": rate, "seconds": seconds})

    def _tell(self, numbers: dict[str, Any]) -> None:
        """Give the numbers of a step to `on_log`, or else write them as a line of JSON if nobody sees the bar."""
        numbers = {"step": self.step, **numbers}
        if not self.processes.is_first:
            return
        if self.options.on_log is not None:
            self.options.on_log(numbers)
        else:
            self.lines.write(numbers)

    def _last_loss(self) -> str:
        return f"loss {self.losses[-1].loss:.4g}" if self.losses else ""

    def _warn_if_worse(self, after: Likeness) -> None:
        """Warn if training has taken the student away from the teacher."""
        assert self.before is not None
        began = self.aligned or self.before
        # Rounding alone may change an error that training did not.
        if not self._is_taught() or self.step == self.resumed_at or after.error <= 1.01 * began.error:
            return
        untrained = _untrained_statistics(self.teacher)
        cause = (
            f"the batch norm {untrained} has never been trained, so the student normalises otherwise in training than "
            f"the teacher does; run the teacher over data in train mode first, or pass a trained one"
            if untrained
            else "try a lower learning rate, more steps, or batches like those that the teacher was trained on"
        )
        warnings.warn(
            f"recovery has made the student worse: its outputs' error was {began.error:.3g} and is {after.error:.3g} "
            f"(in eval mode, on the first batches); {cause}",
            stacklevel=5,
        )

    def _means(self) -> dict[str, float]:
        """Return the mean losses since the last point of the curve."""
        return {name: float(total) / self.summed for name, total in self.sums.items()}

    def _check_finite(self) -> None:
        """Raise `_NotFinite` if a loss since the last point of the curve, or a parameter that was finite, is not."""
        means = self._means()
        each = [parameter.isfinite().all() for parameter in self.finite.values()]
        fine = torch.stack(each).tolist() if each else []
        if not math.isfinite(means.get("loss", 0.0)):
            what = "the loss"
        elif not all(fine):
            what = f"the parameter {list(self.finite)[fine.index(False)]}"
        else:
            return
        folder = self.folder
        kept = f"; the checkpoint in {folder} was saved before that" if folder and holds_checkpoint(folder) else ""
        parts = ", ".join(f"{name} {value:g}" for name, value in means.items())
        raise _NotFinite(
            f"{what} is not finite by step {self.step}{f' ({parts})' if parts else ''}; lower the learning rate, clip "
            f"gradients, or look for NaN and infinite values in the data; the student was restored{kept}"
        )

    def _evaluates(self) -> bool:
        """Whether an evaluation is due at this step and has not been done yet."""
        options = self.options
        if options.evaluate is None or (self.evaluations and self.evaluations[-1][0] == self.step):
            return False
        return self.step == options.steps or bool(options.evaluate_every and self.step % options.evaluate_every == 0)

    def _evaluate(self) -> None:
        assert self.options.evaluate is not None
        self.student.eval()
        self.processes.copy_first(self.student)
        found = None
        if self.processes.is_first:
            found = evaluated(self.student, self.options.evaluate, self.options.seed, self.device)
        found = self.processes.of_first(found)
        self.evaluations.append((self.step, found))
        self._tell(_evaluation_numbers(found))

    def _likeness(self) -> Likeness:
        """Compare the two models in eval mode on the first batches."""
        self.student.eval()
        self.teacher.eval()
        errors: list[float] = []
        same = count = 0
        held: Iterable[Any] = self.held[:_LIKENESS_BATCHES]
        if self.processes.is_first:
            held = track(self.held[:_LIKENESS_BATCHES], "comparing student and teacher", unit="batches")
        with RandomStream(self.options.seed, self.device).active(), torch.no_grad(), self._autocast():
            for batch in held:
                expected, found = floats_of(self._call(self.teacher, batch)), floats_of(self._call(self.student, batch))
                _check_teacher(expected)
                each = [relative_error(*finite(found[path], output)) for path, output in expected.items()]
                errors.append(float(torch.stack(each).mean()))
                for path in self.logits:
                    dim = class_dim(expected[path])
                    equal = found[path].argmax(dim) == expected[path].argmax(dim)
                    same, count = same + int(equal.sum()), count + equal.numel()
        return Likeness(sum(errors) / len(errors), same / count if count else None)

    def _call(self, model: nn.Module, batch: Any) -> Any:
        args, kwargs = self.split(on_device(batch, self.device))
        return model(*args, **kwargs)

    def _call_cast(self, model: nn.Module, batch: Any) -> Any:
        with self._autocast():
            return self._call(model, batch)

    def _autocast(self) -> Any:
        enabled = self.options.autocast is not None
        return torch.autocast(self.device.type, self.options.autocast, enabled=enabled)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check_outputs(self, batch: Any) -> tuple[str, ...]:
        """Run both models on a batch and return the outputs to match as logits."""
        args, kwargs = self.split(on_device(batch, self.device))
        outputs = {}
        for who, model in (("teacher", self.teacher), ("student", self.student)):
            try:
                with self._autocast():
                    outputs[who] = run_model(model, args, kwargs, "eval")
            except Exception as error:  # whatever a model raises on inputs that do not fit it
                raise RecoveryError(
                    f"the {who} fails on the first batch, called with {describe_call(args, kwargs)}: "
                    f"{type(error).__name__}: {error}; if the model takes other arguments, pass inputs=, a function "
                    f"from a batch to the arguments"
                ) from error
        check_comparable(outputs["student"], outputs["teacher"])
        return find_logits(outputs["teacher"], self.options.logits)

    def _made_by(self) -> dict[str, Any]:
        """Return what a checkpoint's run must have in common with one that resumes it."""
        options: dict[str, Any] = dataclasses.asdict(self.options)
        for name in ("folder", "save_every", "resume", "inputs", "evaluate", "optimizer", "on_log"):
            del options[name]
        if self.processes.count > 1:
            options["processes"] = self.processes.count
        task = self.options.loss_fn
        return {
            "student": type(self.student).__name__,
            "conversion": digest_of_plan(current_plans(self.student)[0]),
            "teacher": f"{type(self.teacher).__name__} {digest_of_model(self.teacher)}",
            "optimizer": type(self.optimizer).__name__,
            "learning rates": self.rates,
            **json.loads(json.dumps({**options, "autocast": str(options["autocast"]), "loss_fn": _named(task)})),
        }

    def _stored(self, made_by: dict[str, Any]) -> dict[str, Any] | None:
        """Return the checkpoint to resume, or None to begin."""
        folder = self.folder
        if folder is None or not holds_checkpoint(folder):
            return None
        if not self.options.resume:
            raise ConfigError(f"{folder} holds a checkpoint of a recovery; resume it, or give another folder")
        stored: dict[str, Any] = read_checkpoint(folder, made_by)
        options = self.options
        most = options.steps * options.accumulate * self.processes.count + max(_LIKENESS_BATCHES, options.align_batches)
        try:
            check_state(stored, self.student, self.optimizer, self.stream, most)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged ({error}); remove the folder to start anew"
            ) from error
        return stored

    def _save(self) -> None:
        folder = self.folder
        if folder is None:
            return
        self.sums = self.processes.mean(self.sums)
        self._check_finite()
        if not self.processes.is_first:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "align_seconds": self.align_seconds,
            "align_error": self.align_error,
            "before": _plain(self.before),
            "aligned": _plain(self.aligned),
            "losses": [dataclasses.asdict(point) for point in self.losses],
            "evaluations": self.evaluations,
            "sums": self.sums,
            "summed": self.summed,
            "student": dict(self.student.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state,
            "feed": self.feed.state(),
            "data": self.data,
        }
        write_checkpoint(folder, self.made_by, state)

    def _resume(self, stored: dict[str, Any]) -> None:
        self.step = self.resumed_at = stored["step"]
        self.seconds, self.align_seconds = stored["seconds"], stored["align_seconds"]
        self.align_error = stored["align_error"]
        self.before = Likeness(**stored["before"])
        self.aligned = Likeness(**stored["aligned"]) if stored["aligned"] else None
        self.losses = [LossPoint(**point) for point in stored["losses"]]
        self.evaluations = stored["evaluations"]
        self.sums = {name: total.to(self.device) for name, total in stored["sums"].items()}
        self.summed = stored["summed"]
        try:
            self.student.load_state_dict(stored["student"])
            self.optimizer.load_state_dict(stored["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {self.folder} does not fit this run: {error}") from error
        self.stream.state = stored["stream"]
        self.feed.resume(stored["feed"])


def _untrained_statistics(model: nn.Module) -> str | None:
    """Return the name of a batch norm whose statistics are those that it was made with, or None."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            if not bool(module.running_mean.any()) and bool((module.running_var == 1).all()):
                return name
    return None


def _warn_of_untrained_statistics(teacher: nn.Module) -> None:
    name = _untrained_statistics(teacher)
    if name is not None:
        warnings.warn(
            f"the teacher's batch norm {name} has never been trained (its running mean is 0 and its variance 1): the "
            f"student, which normalises by its batches in training, cannot learn what the teacher computes; run the "
            f"teacher over data in train mode first, or pass a trained one",
            stacklevel=5,
        )


def _evaluation_numbers(found: Any) -> dict[str, Any]:
    """Return what `evaluate` found as numbers with flat names."""
    if isinstance(found, dict):
        return {f"evaluation/{name}": value for name, value in found.items() if isinstance(value, int | float)}
    return {"evaluation": found} if isinstance(found, int | float) else {}


def _optimizer(student: nn.Module, options: RecoverOptions, device: torch.device) -> torch.optim.Optimizer:
    of_pool = set(map(id, pool_of(student).parameters()))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # A checkpoint counts parameters in this order: the pool's are last.
    trained.sort(key=lambda parameter: id(parameter) in of_pool)
    asked = options.optimizer
    if asked is None:
        # No weight decay: the weights are the teacher's, whose training has already decayed them.
        return torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0, fused=device.type == "cuda")
    if not isinstance(asked, torch.optim.Optimizer):
        if not callable(asked):
            raise ConfigError(
                f"optimizer must be a torch.optim.Optimizer of the student's parameters, or a function that builds one "
                f"from them; found a {type(asked).__name__}"
            )
        asked = asked(trained)
        if not isinstance(asked, torch.optim.Optimizer):
            raise ConfigError(f"optimizer is a function that returned a {type(asked).__name__}; expected an Optimizer")
    known = set(map(id, student.parameters()))
    if any(id(parameter) not in known for group in asked.param_groups for parameter in group["params"]):
        raise ConfigError(
            "the optimizer holds parameters that are not the student's; build it after the conversion, from "
            "student.parameters()"
        )
    return asked


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _task_loss(loss_fn: Callable[[Any, Any], Tensor] | str, outputs: Any, batch: Any) -> Tensor:
    """Return the task's loss.

    Raises:
        ConfigError: no output has that name, or the loss is not one number with a gradient.
    """
    if callable(loss_fn):
        loss: Any = loss_fn(outputs, batch)
        what = "loss_fn returned"
    else:
        loss = outputs.get(loss_fn) if isinstance(outputs, dict) else getattr(outputs, loss_fn, None)
        what = f"the student's output {loss_fn!r} is"
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = describe(loss) + ("" if not isinstance(loss, Tensor) or loss.requires_grad else " without a gradient")
        raise ConfigError(f"{what} {found}; expected a tensor of one element that has a gradient")
    return loss.reshape(())


def _named(loss_fn: Any) -> str | None:
    return loss_fn if loss_fn is None or isinstance(loss_fn, str) else getattr(loss_fn, "__qualname__", "a function")


def _plain_number(value: Any) -> Any:
    """Return a number of numpy or torch as a Python number, which JSON can hold; anything else unchanged."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    return value


def _check_teacher(outputs: dict[str, Tensor]) -> None:
    for path, output in outputs.items():
        # Some values may be infinite or NaN by design, for example masked scores.
        if not bool(output.isfinite().any()):
            raise RecoveryError(
                f"the teacher's output {path} has no finite value on the first batches, so the student cannot learn "
                f"from it; look for NaN and infinite values in the data; the student is unchanged"
            )


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)
