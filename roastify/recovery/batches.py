"""The batches of a recovery: how each is passed to `forward`, and where in the data a run stands."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roastify.calls import signature_of, split_inputs
from roastify.errors import CheckpointError, ConfigError, RecoveryError
from roastify.isolation import RandomStream
from roastify.kernels.torch_internals import pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def passing(model: nn.Module, inputs: Callable[[Any], Any] | None) -> Callable[[Any], Inputs]:
    """Return the function from a batch to the `(args, kwargs)` that a model is called with.

    What `inputs` returns is taken as example inputs are: a mapping is keyword arguments, a sequence positional ones,
    anything else the one argument. Without it a batch is taken the same way, but where forward takes a single argument
    a sequence is inputs and targets, and its first element is passed.
    """
    if inputs is not None:
        return lambda batch: split_inputs(inputs(batch))
    signature = signature_of(model)
    parameters = list(signature.parameters.values()) if signature else []
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    required = sum(parameter.default is parameter.empty for parameter in positional)
    open_ended = signature is None or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    def split(batch: Any) -> Inputs:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) == 1:
            return split_inputs(batch)
        if not open_ended and len(positional) == 1:
            return split_inputs(batch[0])
        if not open_ended and len(batch) == required:
            return tuple(batch), {}
        raise ConfigError(
            f"a batch is a {type(batch).__name__} of {len(batch)}, and it is not clear which of it {signature} takes; "
            f"pass inputs=, a function from a batch to the arguments, such as inputs=lambda batch: batch[0]"
        )

    return split


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; mappings of every kind become dicts."""
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, non_blocking=True), batch)


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask `[batch, tokens]` among keyword arguments, if there is one: padding teaches nothing."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Feed:
    """Batches without end: epoch after epoch of the data, drawn under a random stream of their own.

    A position is an epoch's number, the random states at its beginning, and the batches drawn since. Whoever resumes
    begins the epoch again with those states and draws as many batches, so that shuffling and augmentation come out as
    they did, whatever else has drawn random numbers.

    Args:
        data: an iterable of batches, or a function that returns one, without arguments or of the epoch's number.
        stream: that iterating draws from.
        resumed: a position that `state` returned, of which the random states at the data's beginning are taken.
    """

    def __init__(self, data: Any, stream: RandomStream, resumed: dict[str, Any] | None = None) -> None:
        if not callable(data) and not isinstance(data, Iterable):
            raise ConfigError(
                f"data must be an iterable of batches (a DataLoader, a list) or a function that returns one; found a "
                f"{type(data).__name__}"
            )
        self.data = data
        self.stream = stream
        self.epoch = 0
        self.taken = 0
        self._iterator: Iterator[Any] = iter(())
        # Drawn, and not taken yet.
        self._ahead: deque[Any] = deque()
        self._begin(resumed and resumed["first"])
        self._first = self._began

    def peek(self, count: int) -> list[Any]:
        """Return the next batches of this epoch, at most so many, without moving on."""
        with self.stream.active():
            self._ahead.extend(itertools.islice(self._iterator, count - len(self._ahead)))
        if not self._ahead:
            raise RecoveryError("data holds no batch; give an iterable of at least one")
        return list(self._ahead)[:count]

    def next(self) -> Any:
        """Return the next batch, of the next epoch where this one is at its end."""
        if not self._ahead:
            with self.stream.active():
                self._ahead.extend(itertools.islice(self._iterator, 1))
        if not self._ahead:
            if isinstance(self.data, Iterator):
                raise RecoveryError(
                    f"data ended after {self.taken} batches and cannot be iterated again; give a list, a DataLoader or "
                    f"a function that returns an iterable"
                )
            if not self.taken:
                raise RecoveryError(f"data holds no batch in epoch {self.epoch}")
            self.epoch += 1
            self.taken = 0
            self._begin()
            return self.next()
        self.taken += 1
        return self._ahead.popleft()

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "ahead": len(self._ahead),
            "began": self._began,
            "first": self._first,
            "stream": self.stream.state,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned, from the beginning of the same data.

        Raises:
            CheckpointError: the epoch is shorter than it was.
        """
        self.epoch, self.taken = state["epoch"], state["taken"]
        if not isinstance(self.data, Iterator):
            self._ahead.clear()
            self._begin(state["began"])
        drawn = self.taken + state["ahead"]
        passed = 0
        ahead: deque[Any] = deque(maxlen=state["ahead"])
        with self.stream.active():
            for batch in itertools.islice(itertools.chain(list(self._ahead), self._iterator), drawn):
                ahead.append(batch)
                passed += 1
        if passed < drawn:
            raise CheckpointError(
                f"the data holds {passed} batches in epoch {self.epoch}, and the checkpoint was written after "
                f"{drawn}; resume with the same data"
            )
        self._ahead = deque(ahead)
        self.stream.state = state["stream"]

    def _begin(self, states: dict[str, Any] | None = None) -> None:
        """Begin the epoch, with random states from an earlier run if given."""
        generators = _generators(self.data)
        if states is not None:
            self.stream.state = states["stream"]
            for generator, own in zip(generators, states["generators"], strict=True):
                generator.set_state(own)
        self._began = {
            "stream": self.stream.state,
            "generators": [generator.get_state() for generator in generators],
        }
        with self.stream.active():
            for sampler in (getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None)):
                if sampler is not None and hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(self.epoch)
            source: Iterable[Any] = _batches_of_epoch(self.data, self.epoch) if callable(self.data) else self.data
            self._iterator = iter(source)


def _batches_of_epoch(function: Callable[..., Any], epoch: int) -> Iterable[Any]:
    takes_epoch = any(
        parameter.default is parameter.empty and parameter.kind in _POSITIONAL
        for parameter in inspect.signature(function).parameters.values()
    )
    made = function(epoch) if takes_epoch else function()
    if not isinstance(made, Iterable):
        raise ConfigError(f"data is a function that returned a {type(made).__name__}; expected an iterable of batches")
    return made


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader was given, itself or through its samplers."""
    holders = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def digest_of(batches: Sequence[Any]) -> str:
    """Return a digest of batches' tensors, by which a resumed run knows its data again."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves([on_device(batch, torch.device("cpu")) for batch in batches]):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
