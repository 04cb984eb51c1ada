"""The batches of a recovery: how `forward` gets each batch, and the position of a run in its data."""

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

    The result of `inputs` is read like example inputs: a mapping holds keyword arguments, a sequence holds positional
    arguments, and anything else is the only argument. Without `inputs`, the batch itself is read in this way, with one
    exception: if forward takes a single argument, a sequence is inputs and targets, and its first element is passed.
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
            f"a batch is a {type(batch).__name__} of {len(batch)} elements, and it is not clear which of them "
            f"forward{signature} takes; pass inputs=, a function from a batch to the arguments, for example "
            f"inputs=lambda batch: batch[0]"
        )

    return split


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; mappings of every kind become dicts."""
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, non_blocking=True), batch)


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask `[batch, tokens]` among keyword arguments, or None; padding is left out of losses."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Feed:
    """Batches without end: epoch after epoch of the data, drawn with a random stream of their own.

    A position consists of an epoch's number, the random states at its beginning, and the number of batches drawn since.
    A resumed run begins the epoch again with those states and draws as many batches. Shuffling and augmentation then
    repeat, whatever other code has drawn random numbers.

    Args:
        data: an iterable of batches, or a function that returns one. The function takes no argument, or the epoch's
            number.
        stream: the random stream that iterating draws from.
        resumed: a position that `state` returned; the first epoch begins with its random states.
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
        # Batches that were drawn but not taken yet.
        self._peeked: deque[Any] = deque()
        self._begin(resumed and resumed["first"])
        self._first = self._began

    def peek(self, count: int) -> list[Any]:
        """Return up to `count` next batches of this epoch, without taking them."""
        with self.stream.active():
            self._peeked.extend(itertools.islice(self._iterator, count - len(self._peeked)))
        if not self._peeked:
            raise RecoveryError("data holds no batch; give an iterable of at least one")
        return list(self._peeked)[:count]

    def next(self) -> Any:
        """Return the next batch; after the last one of an epoch, the first of the next epoch."""
        if not self._peeked:
            with self.stream.active():
                self._peeked.extend(itertools.islice(self._iterator, 1))
        if not self._peeked:
            if isinstance(self.data, Iterator):
                raise RecoveryError(
                    f"data ended after {self.taken} batches and cannot be iterated again; give a list, a DataLoader or "
                    f"a function that returns an iterable"
                )
            if not self.taken:
                raise RecoveryError(
                    f"data holds no batch in epoch {self.epoch}; give an iterable that yields batches in every epoch"
                )
            self.epoch += 1
            self.taken = 0
            self._begin()
            return self.next()
        self.taken += 1
        return self._peeked.popleft()

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "ahead": len(self._peeked),
            "began": self._began,
            "first": self._first,
            "stream": self.stream.state,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go to a position that `state` returned, from the beginning of the same data.

        Raises:
            CheckpointError: the epoch holds fewer batches than the position needs.
        """
        self.epoch, self.taken = state["epoch"], state["taken"]
        if not isinstance(self.data, Iterator):
            self._peeked.clear()
            self._begin(state["began"])
        num_needed = self.taken + state["ahead"]
        num_drawn = 0
        peeked: deque[Any] = deque(maxlen=state["ahead"])
        with self.stream.active():
            for batch in itertools.islice(itertools.chain(list(self._peeked), self._iterator), num_needed):
                peeked.append(batch)
                num_drawn += 1
        if num_drawn < num_needed:
            raise CheckpointError(
                f"the data holds {num_drawn} batches in epoch {self.epoch}, and the checkpoint was written after "
                f"{num_needed}; resume with the same data"
            )
        self._peeked = deque(peeked)
        self.stream.state = state["stream"]

    def _begin(self, states: dict[str, Any] | None = None) -> None:
        """Begin the epoch, with the random states of an earlier run if they are given."""
        generators = generators_of(self.data)
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
    batches = function(epoch) if takes_epoch else function()
    if not isinstance(batches, Iterable):
        found = type(batches).__name__
        raise ConfigError(f"data is a function that returned a {found}; expected an iterable of batches")
    return batches


def generators_of(data: Any) -> list[torch.Generator]:
    """Return the random generators of a DataLoader and of its samplers."""
    holders = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def digest_of(batches: Sequence[Any]) -> str:
    """Return a digest of batches' tensors, by which a resumed run recognises its data."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves([on_device(batch, torch.device("cpu")) for batch in batches]):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
