"""One training run, from its initial values to its row."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.budget import UnreachableError
from benchmarks.accuracy.language import methods, tokens
from benchmarks.accuracy.language.runs import Recipe, Run, as_row
from benchmarks.accuracy.step import CapturedStep
from benchmarks.accuracy.training import MACHINE, Autocast, autocast_on, release
from benchmarks.rows import machine
from benchmarks.stats import quartiles
from roastify.checks.clocks import wait

# Steps that are not timed, and that are.
_UNTIMED, _TIMED = 20, 200
# Points of a row's curve of the training loss.
_CURVE = 20


@functools.lru_cache(maxsize=2)
def on_device(path: Path, device: str) -> tuple[dict[str, Tensor], str, int]:
    """Return the parts' tokens, `int32 [tokens]` on the device, their digest and the words of the vocabulary."""
    found = tokens.read(path)
    parts = {part: torch.from_numpy(array.astype(np.int32)).to(device) for part, array in found.parts.items()}
    return parts, found.digest, found.words


def starts(count: int, context: int, wanted: int, seed: int) -> Tensor:
    """Return where the sequences of a run begin: epoch by epoch all that fit, from a random shift, in a random order.

    Args:
        count: tokens; a sequence takes one more than the context, the last target.
        context: inputs of a sequence.
        wanted: sequences.
        seed: of the order alone, so that every method sees the same.
    """
    generator = torch.Generator().manual_seed(seed)
    found, total = [], 0
    while total < wanted:
        shift = int(torch.randint(context, (), generator=generator))
        fitting = (count - 1 - shift) // context
        if fitting < 1:
            raise ValueError(f"{count:,} tokens hold no sequence of {context} and its last target from token {shift}")
        found.append(shift + context * torch.randperm(fitting, generator=generator))
        total += fitting
    return torch.cat(found)[:wanted]


def schedule(peak: float, steps: int, warm_up: float) -> Tensor:
    """Return the learning rate of every step: up in a line, then down along half a cosine."""
    position = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    falling = 0.5 * (1 + torch.cos(math.pi * (position - warm_up) / (1 - warm_up)))
    return (peak * torch.where(position < warm_up, position / warm_up, falling)).float()


def make_optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    """Return AdamW whose rates are tensors; vectors do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if (each.dim() >= 2) is matrices], "weight_decay": decay}
        for matrices, decay in ((True, recipe.decay), (False, 0.0))
    ]
    named = [{**group, "lr": torch.zeros((), device=device)} for group in groups if group["params"]]
    on_gpu = torch.device(device).type == "cuda"
    fused = {"fused": True} if on_gpu else {}
    return torch.optim.AdamW(named, betas=recipe.betas, capturable=on_gpu, **fused)


class LanguageStep(CapturedStep):
    """One step: the next batch, forward, backward, clipping, AdamW at the step's rate.

    Args:
        model: what is trained.
        optimizer: its learning rates are tensors.
        rates: the learning rate of every step.
        text: what is trained on, `int32 [tokens]`.
        order: where every sequence begins, `[steps, batch]`.
        recipe: of the run.
        autocast: makes the context of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rates: Tensor,
        text: Tensor,
        order: Tensor,
        recipe: Recipe,
        autocast: Autocast,
    ) -> None:
        super().__init__(model, optimizer)
        self.rates, self.text, self.order, self.recipe, self.autocast = rates, text, order, recipe, autocast
        self.along = torch.arange(recipe.context + 1, device=text.device)
        self.done = torch.zeros(1, dtype=torch.int64, device=text.device)
        self.losses = torch.zeros(len(rates), device=text.device)

    def counters(self) -> list[Tensor]:
        return [self.done, self.losses]

    def run(self) -> None:
        rate = self.rates.index_select(0, self.done).squeeze(0)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        begin = self.order.index_select(0, self.done).squeeze(0)
        sequences = self.text[begin[:, None] + self.along]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = mean_loss(self.model, sequences)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.done, loss.detach().float()[None])
        self.done += 1


def mean_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the mean over all targets of -ln p(next token), in nats; sequences are `[batch, context + 1]`."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten().long())


def held_out_loss(model: nn.Module, text: Tensor, recipe: Recipe, autocast: Autocast) -> float:
    """Return the mean loss of a text cut into sequences that follow one another, in eval mode; its mode is put back.

    A token's context begins with its sequence. What does not fill a sequence at the end is left out.
    """
    was_training = model.training
    model.eval()
    count = min(recipe.judged, (len(text) - 1) // recipe.context)
    if not count:
        raise ValueError(f"{len(text)} tokens hold no sequence of {recipe.context} and its last target")
    begin = recipe.context * torch.arange(count, device=text.device)
    along = torch.arange(recipe.context + 1, device=text.device)
    total = torch.zeros((), dtype=torch.float64, device=text.device)
    with torch.no_grad():
        for some in begin.split(recipe.batch):
            with autocast():
                loss = mean_loss(model, text[some[:, None] + along])
            total += len(some) * loss.double()
    model.train(was_training)
    return float(total) / count


class Clock:
    """Times of steps in a row, without waiting for the GPU in between."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the time from each mark to the next; all of them must have passed."""
        pairs = itertools.pairwise(self.marks)
        return [begin.elapsed_time(end) if self.on_gpu else 1e3 * (end - begin) for begin, end in pairs]


def loop(step: Callable[[], None], steps: int, device: str) -> Clock:
    """Take all steps; return the clock of those that are timed: some after the first few, of a short run the last."""
    clock = Clock(device)
    first = min(_UNTIMED, steps - 1)
    for index in range(steps):
        if first <= index <= first + _TIMED:
            clock.mark()
        step()
    if steps <= first + _TIMED:
        clock.mark()
    return clock


def train(run: Run, recipe: Recipe, path: Path, device: str, graph: bool = True) -> dict[str, Any]:
    """Train one model.

    Args:
        run: with its rate and sizes.
        recipe: how.
        path: of the tokens.
        device: `cpu` or `cuda`.
        graph: on a GPU, replay steps from a CUDA graph.

    Returns:
        the row: the run, what is stored, the loss in nats a token on reviews that were held out (a trial's on the
        validation reviews), multiply-adds a token, and the time of a step; or why so few parameters cannot be stored.

    Raises:
        CaptureError: the step cannot be captured.
    """
    methods.check(run)
    begun = time.perf_counter()
    assert run.rate is not None, "a run is trained when its rate is chosen"
    text, digest, words = on_device(path, device)
    if words != recipe.shape.words:
        raise ValueError(f"{path} has {words:,} words, and the model {recipe.shape.words:,}")
    row = {
        **as_row(run),
        "allowed": methods.target(recipe, run.ratio),
        "tokens": digest,
        "machine": machine(device, *MACHINE),
    }
    try:
        built = methods.build(run, recipe, device)
    except UnreachableError as error:
        return {**row, "unreachable": str(error), "seconds": round(time.perf_counter() - begun, 2)}
    model, autocast = built.model.train(), autocast_on(device)
    order = starts(len(text["train"]), recipe.context, run.steps * recipe.batch, run.seed)
    step = LanguageStep(
        model,
        make_optimizer(model, recipe, device),
        schedule(run.rate, run.steps, recipe.warm_up).to(device),
        text["train"],
        order.view(run.steps, recipe.batch).to(device),
        recipe,
        autocast,
    )
    if graph and torch.device(device).type == "cuda":
        step.capture()
    setup = time.perf_counter() - begun
    clock = loop(step, run.steps, device)
    wait(torch.device(device))
    loss = held_out_loss(model, text["validation" if run.trial else "held_out"], recipe, autocast)
    curve = [float(part.mean()) for part in step.losses.cpu().tensor_split(min(_CURVE, run.steps))]
    row |= {
        "stored": built.stored,
        "note": built.note,
        "loss": finite(loss),
        "training_loss": [finite(value) for value in curve],
        "multiply_adds": built.products,
        "step": {name: round(value, 4) for name, value in quartiles(clock.milliseconds(), count="steps").items()},
        "captured": step.graph is not None,
        "setup": round(setup, 2),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    del built, model, step
    release(device)
    return row


def finite(value: float) -> float | None:
    """Return a rounded loss, or None of a run that diverged: JSON has no infinity."""
    return round(value, 5) if math.isfinite(value) else None
