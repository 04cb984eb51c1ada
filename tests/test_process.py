"""What a conversion does to the process around it: to other threads, and after an interrupt."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace
from trust import interrupts, threads

import roastify
from roastify import isolation
from roastify.isolation import without_warnings


def test_conversions_beside_dense_models_harm_nobody_and_plan_the_same() -> None:
    conversions, passes, failures = threads.run(1.5)
    assert not failures, failures[0]
    assert conversions >= 4 and passes >= 4


def test_an_interrupt_leaves_the_old_or_the_new_model() -> None:
    assert list(interrupts.run(6)) == []


class _Meeting(nn.Module):
    """Does something while torch.fx traces its forward."""

    def __init__(self, meanwhile: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.meanwhile = [meanwhile]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return _Meeting(self.meanwhile[0])

    def forward(self, x: Tensor) -> Tensor:
        self.meanwhile[0]()
        return self.layer(x)


def _state() -> tuple[Any, ...]:
    return nn.Module.__call__, nn.Module.__getattr__, _symbolic_trace.is_fx_symbolic_tracing(), sys.stdout


def test_other_threads_see_neither_patches_nor_the_flag_nor_silence(capsys: pytest.CaptureFixture[str]) -> None:
    dense, found = nn.Linear(4, 4), {}

    def elsewhere() -> None:
        found["parameter"] = dense.weight
        found["output"] = dense(torch.ones(1, 4))
        found["flag"] = bool(_symbolic_trace.is_fx_symbolic_tracing())
        sys.stdout.write("from elsewhere\n")

    def meanwhile() -> None:
        found["here"] = bool(_symbolic_trace.is_fx_symbolic_tracing())
        sys.stdout.write("from the traced code\n")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    before = _state()
    roastify.plan(_Meeting(meanwhile), 10)
    assert found["parameter"] is dense.weight and type(found["output"]) is Tensor
    assert (found["here"], found["flag"]) == (True, False)
    assert capsys.readouterr().out == "from elsewhere\n"
    assert _state() == before


def test_an_interrupt_at_any_line_that_changes_the_process_puts_it_back() -> None:
    code = ("conversion/isolated_trace", "roastify/isolation")
    model, lines = _Meeting(lambda: None), interrupts.Lines(None, code)
    lines.run(lambda: roastify.plan(model, 10))
    assert lines.count > 50
    before, settings = _state(), (torch.get_default_dtype(), torch.is_grad_enabled())
    for at in range(1, lines.count + 1):
        generator, interrupted = torch.get_rng_state(), interrupts.Lines(at, code)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(lambda: roastify.plan(model, 10))
        assert _state() == before, interrupted.where
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == settings, interrupted.where
        assert torch.equal(torch.get_rng_state(), generator), interrupted.where
        with pytest.raises(UserWarning):
            warnings.warn(f"heard after {interrupted.where}", stacklevel=1)


class _Changed:
    """A model whose modes, buffers and attributes a run changes."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

    def state(self) -> tuple[Any, ...]:
        norm = self.model[0]
        return [module.training for module in self.model.modules()], norm.num_batches_tracked.item(), vars(norm).keys()

    def run(self) -> None:
        with isolation.state_kept(self.model), isolation.modes_kept(self.model):
            self.model.eval()
            self.model[0].num_batches_tracked += 1  # type: ignore[operator]
            self.model[0].new = 1


def test_an_interrupt_at_any_line_puts_a_model_back() -> None:
    code = ("roastify/isolation",)
    changed, lines = _Changed(), interrupts.Lines(None, code)
    before = changed.state()
    before = before[0], before[1], set(before[2])
    lines.run(changed.run)
    for at in range(1, lines.count + 1):
        interrupted = interrupts.Lines(at, code)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(changed.run)
        found = changed.state()
        assert (found[0], found[1], set(found[2])) == before, interrupted.where


def _warns(text: str) -> bool:
    """Warn in another thread; this suite makes errors of warnings."""
    found = []

    def run() -> None:
        try:
            warnings.warn(text, stacklevel=1)
        except UserWarning:
            found.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return bool(found)


def test_warnings_of_traced_code_are_dropped_and_those_of_other_threads_are_not() -> None:
    heard = []

    def meanwhile() -> None:
        warnings.warn("from the traced code", stacklevel=1)
        heard.append(_warns("from elsewhere"))

    roastify.plan(_Meeting(meanwhile), 10)
    assert heard and all(heard) and _warns("afterwards")


def test_threads_that_leave_in_another_order_leave_warnings_as_they_were() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with without_warnings():
            entered.set()
            left.wait()
            warnings.warn("dropped", stacklevel=1)

    thread = threading.Thread(target=other)
    with without_warnings():
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_nothing_is_left_patched_after_an_interrupt_in_traced_code() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    before = _state()
    with pytest.raises(KeyboardInterrupt):
        roastify.plan(_Meeting(fail), 10)
    assert _state() == before
