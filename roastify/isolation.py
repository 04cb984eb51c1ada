"""Contexts that undo what running a model changes: random states, modes, buffers and attributes."""

from __future__ import annotations

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def put_back(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, whatever happens, and twice: an interrupt may come just before it does its work.

    Args:
        undo: a function that puts back what the context changes; a second call must do no harm.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


def capture_random_states(gpu: torch.device | None = None) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's random generators, and of a GPU's."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": None if gpu is None else torch.cuda.get_rng_state(gpu),
    }


def restore_random_states(states: dict[str, Any], gpu: torch.device | None = None) -> None:
    """Restore the states that `capture_random_states` returned, for the same GPU."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if gpu is not None:
        torch.cuda.set_rng_state(states["cuda"], gpu)


def seed_generators(seed: int, gpus: Iterable[torch.device] = ()) -> None:
    """Seed all generators on the CPU and those of `gpus`; `torch.manual_seed` would seed every GPU."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.default_generator.manual_seed(seed % (1 << 63))
    for gpu in gpus:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed % (1 << 63))


@contextlib.contextmanager
def random_states_kept(seed: int | None = None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore all random generators at the end, those of GPUs among `devices` too.

    Python's, numpy's and torch's generators are restored, because models use all three: transformers' speech models
    choose masks with numpy.

    Args:
        seed: the seed with which the generators start; None: they go on from their states.
        devices: devices in use; those that are not GPUs are ignored.
    """
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    states = capture_random_states()
    on_gpus = [torch.cuda.get_rng_state(gpu) for gpu in gpus]

    def restore() -> None:
        restore_random_states(states)
        for gpu, state in zip(gpus, on_gpus, strict=True):
            torch.cuda.set_rng_state(state, gpu)

    with put_back(restore):
        if seed is not None:
            seed_generators(seed, gpus)
        yield


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore every module's train or eval mode at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    with put_back(restore):
        yield


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Restore the settings of torch that a model's code may change: gradients, the default dtype, autocast."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}

    def restore() -> None:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)

    with put_back(restore):
        yield


class _Quiet(threading.local):
    depth = 0


_quiet = _Quiet()


class _WhereQuiet(type):
    def __subclasscheck__(cls, category: type) -> bool:
        return _quiet.depth > 0


class _AnyWarningHere(Warning, metaclass=_WhereQuiet):
    """What a filter takes for the class of every warning of a thread that is inside `without_warnings`."""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress this thread's warnings, because they would be about roastify's work and not about the user's code.

    `warnings.catch_warnings` would suppress those of all threads, and if two threads leave it in another order than
    they entered it, for good. The filter that is set here stays, and matches nothing outside of this context.
    """
    warnings.simplefilter("ignore", _AnyWarningHere)
    before = _quiet.depth
    with put_back(lambda: setattr(_quiet, "depth", before)):
        _quiet.depth = before + 1
        yield


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass changes: buffers, attributes, modes and random generators, which start with seed 0."""
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    # Only values that changed are written back: a buffer may be an expanded view, which refuses writes.
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [tensor.device for tensor in [*model.parameters(), *model.buffers()]]

    def restore() -> None:
        # At every line, what is restored already stays whole: an interrupt may come in the second call.
        for module, own, buffers in attributes:
            for now, before in ((module._buffers, buffers), (module.__dict__, own)):
                now.update(before)
                for name in now.keys() - before.keys():
                    del now[name]
        for buffer, value in values:
            if not torch.equal(buffer, value):
                # Not under `no_grad`, which an interrupt may leave on.
                buffer.detach().copy_(value)

    with put_back(restore), random_states_kept(seed=0, devices=devices):
        yield


class RandomStream:
    """A set of random generators: code inside `active` draws from them and leaves the generators outside untouched.

    Args:
        seed: the seed with which the generators start.
        device: if it is a GPU, its generator is one of the set.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        outside = capture_random_states(self._gpu)
        seed_generators(seed, [] if self._gpu is None else [self._gpu])
        self.state = capture_random_states(self._gpu)
        restore_random_states(outside, self._gpu)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Return the context in which code draws from this stream."""
        outside = capture_random_states(self._gpu)
        restore_random_states(self.state, self._gpu)
        try:
            yield
        finally:
            self.state = capture_random_states(self._gpu)
            restore_random_states(outside, self._gpu)
