"""Sweeps over ratios: each is recovered or trained briefly, and measured, so that a user can choose one."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from roastify import api
from roastify.calls import run_model, split_inputs
from roastify.config import Init, RoastConfig, check_ratio
from roastify.conversion.converted import pool_of
from roastify.conversion.supported import check_convertible, check_has_values, device_of
from roastify.errors import ConfigError, RecoveryError, closest
from roastify.files import replace_file
from roastify.isolation import RandomStream, modes_kept
from roastify.progress import JsonLines, stage, working
from roastify.shown import ShownAsTable

if TYPE_CHECKING:
    from roastify.recovery.options import RecoverOptions
    from roastify.recovery.report import RecoveryReport

RATIOS = (3.0, 10.0, 30.0)
# Steps at each ratio: enough to tell ratios apart, too few for the best that a ratio can reach.
STEPS = 200
_ERROR = "error of outputs"
# A sweep has many runs, and these settings belong to one.
_OF_ONE_RUN = ("folder", "resume", "save_every", "evaluate_every")


@dataclass(frozen=True)
class SweepRow:
    """The dense model, or a converted one.

    Args:
        ratio: the ratio asked for; 1 for the dense model.
        parameters: stored parameters.
        bytes: the bytes of the stored parameters.
        multiply_adds: those of the forward pass that was timed, as torch's `FlopCounterMode` counts them.
        quality: the number by which ratios are compared.
        evaluation: all that `evaluate` returned; None without one.
        ms: the median time of a forward pass.
        dense_over_converted: the time of the dense model in the same run ÷ this one's; above 1 the model is faster.
        seconds: how long its recovery or training took.
    """

    ratio: float
    parameters: int
    bytes: int
    multiply_adds: int
    quality: float
    evaluation: Any
    ms: float
    dense_over_converted: float
    seconds: float


@dataclass(frozen=True, repr=False)
class SweepReport(ShownAsTable):
    """A sweep over ratios. It prints as the table of `roastify sweep`.

    Args:
        model: the name of the model's class.
        how: `recovered` (from pretrained weights) or `trained` (from scratch, the dense model too).
        steps: the steps of the optimizer at each ratio.
        quality: what the rows' quality is: `evaluate`, a metric of it, or the error of outputs against the dense model.
        lower_is_better: whether a smaller quality is better.
        dense: the dense model.
        rows: the converted models, the lowest ratio first.
        machine: device, versions and date.
    """

    model: str
    how: Literal["recovered", "trained"]
    steps: int
    quality: str
    lower_is_better: bool
    dense: SweepRow
    rows: tuple[SweepRow, ...]
    machine: dict[str, Any]

    def _headline(self) -> str:
        found = ", ".join(f"{row.quality:.4g} at ratio {row.ratio:g}" for row in (*self.rows, self.dense))
        return f"{self.model}, {self.how} for {self.steps:,} steps: {self.quality} {found}"

    def within(self, part: float) -> SweepRow | None:
        """Return the row of the highest ratio whose quality is as good as the dense model's or nearly so, or None.

        Args:
            part: how much worse it may be, as a part of the dense model's quality (0.01 is 1 %). The error of outputs
                is relative already, and may be that large.

        Raises:
            ConfigError: `part` is not a number of at least 0.
        """
        if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part < math.inf:
            raise ConfigError(f"within must be a number of at least 0, for example 0.01 for 1 %; found {part!r}")
        allowed = part if self.quality == _ERROR else part * abs(self.dense.quality)
        return max((row for row in self.rows if self._loss(row) <= allowed), key=lambda row: row.ratio, default=None)

    def nearest(self) -> SweepRow:
        """Return the row whose quality is best."""
        # What is not a number is worse than any number.
        return min(self.rows, key=lambda row: (math.isnan(row.quality), self._loss(row)))

    def _loss(self, row: SweepRow) -> float:
        difference = row.quality - self.dense.quality
        return difference if self.lower_is_better else -difference

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, if what `evaluate` returned is."""
        return dataclasses.asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw quality and time against the ratio, with matplotlib.

        Args:
            path: the file; its ending says the format, as in `sweep.png`.

        Raises:
            ConfigError: matplotlib is not installed, or does not know the format.
        """
        check_plot(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        ratios = [row.ratio for row in self.rows]
        dense = {"color": "gray", "linestyle": "--", "label": "dense"}
        left.plot(ratios, [row.quality for row in self.rows], marker="o", label=self.how)
        left.axhline(self.dense.quality, **dense)
        left.set_ylabel(self.quality)
        right.plot(ratios, [row.dense_over_converted for row in self.rows], marker="o", label="converted")
        right.axhline(1.0, **dense)
        right.set_ylabel("time of the dense model ÷ converted")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
            axes.minorticks_off()
            axes.set_xlabel("ratio")
            axes.legend()
        figure.suptitle(f"{self.model}, {self.how} for {self.steps:,} steps")
        kind = Path(path).suffix[1:]
        replace_file(Path(path), lambda part: figure.savefig(part, format=kind))


def check_plot(path: str | Path) -> None:
    """Raise `ConfigError` unless `SweepReport.plot` can draw such a file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed; install it with: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    kind = Path(path).suffix[1:]
    if kind not in kinds:
        raise ConfigError(f"matplotlib draws no file like {path}; the name's ending must be one of {', '.join(kinds)}")


def sweep(
    model: nn.Module,
    data: Any,
    ratios: Sequence[float] = RATIOS,
    *,
    config: RoastConfig | str | Path | None = None,
    init: Init = "project",
    example_inputs: Any = None,
    metric: str | None = None,
    lower_is_better: bool = False,
    seconds: float = 1.0,
    graph: bool = True,
    steps: int = STEPS,
    **recovery: Any,
) -> SweepReport:
    """Recover or train a model briefly at each ratio, and measure what each costs and what it is worth.

    A pretrained model is recovered, as `recover` does it, and compared with the dense model as it is. With
    `init="match"` each model is trained from scratch instead, on the task's `loss_fn`, and so is the dense model, by a
    conversion that shares nothing. All runs have the same steps, batches and random numbers. Latency is what `bench`
    measures. The model is left unchanged.

    Args:
        model: the dense model, on the device on which everything runs.
        data: as in `recover`; it must be possible to iterate it again.
        ratios: the ratios to try.
        config: a `RoastConfig`, or the path of a TOML file; its ratio and init are not used.
        init: `project` recovers, `match` trains from scratch.
        example_inputs: what is timed: a tensor, a sequence of positional or a mapping of keyword arguments; default:
            the first batch.
        metric: the number to compare, if `evaluate` returns a dict of several.
        lower_is_better: whether `evaluate` returns something like a loss. Without `evaluate`, ratios are compared by
            the error of outputs.
        seconds: the time for the measurement at each ratio.
        graph: as in `bench`: False times calls on a GPU from Python, for models that a CUDA graph cannot capture.
        steps: the steps of the optimizer at each ratio.
        recovery: other settings of `recover`: `evaluate`, `lr`, `loss_fn`, `inputs`, …

    Raises:
        ConfigError: a setting does not fit the model or the data, or `evaluate` returns no number.
        PlanError: a ratio is unreachable; no work has begun then.
        RoastError: see `convert`, `recover` and `bench`.
    """
    # Here, because `import roastify` would take a third longer.
    from roastify.recovery.options import RecoverOptions

    if wrong := [name for name in recovery if name in _OF_ONE_RUN]:
        raise ConfigError(
            f"{', '.join(wrong)} cannot be given for a sweep, which has a run for each ratio; leave it out"
        )
    check_convertible(model)
    check_has_values(model)
    if isinstance(data, Iterator):
        raise ConfigError(
            f"data is a {type(data).__name__}, which can be iterated once, and a sweep needs it for each ratio; give a "
            f"list, a DataLoader or a function that returns an iterable"
        )
    settings = api.settings_from(config, init=init)
    configs = [settings.replace(ratio=ratio) for ratio in _in_order(ratios)]
    trained = settings.init == "match"
    if trained:
        # From scratch there is nothing to learn from a teacher, and no start to align with.
        recovery |= {"output_weight": 0.0, "feature_weight": 0.0, "align": 0}
    options = RecoverOptions(steps, **recovery)
    if trained and options.evaluate is None:
        raise ConfigError("models that are trained from scratch are compared by what evaluate returns; give evaluate")
    for each in configs:
        api.plan(model, config=each)
    return _Sweep(model, data, options, example_inputs, metric, lower_is_better, seconds, graph).run(configs, trained)


def _in_order(ratios: Sequence[float]) -> list[float]:
    for ratio in ratios:
        check_ratio(ratio)
    if not ratios:
        raise ConfigError("ratios is empty; give at least one ratio, for example 10")
    return sorted(set(map(float, ratios)))


class _Sweep:
    """One sweep: the dense model is evaluated first, because a wrong `evaluate` is found out by that."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        options: RecoverOptions,
        example_inputs: Any,
        metric: str | None,
        lower_is_better: bool,
        seconds: float,
        graph: bool,
    ) -> None:
        from roastify.recovery.batches import generators_of, on_device

        self.model = model
        self.data = data
        self.options = options
        self.metric = metric
        self.lower_is_better = lower_is_better or options.evaluate is None
        self.seconds = seconds
        self.graph = graph
        self.device = device_of(model)
        self.generators = [(each, each.get_state()) for each in generators_of(data)]
        self.inputs = on_device(self._first_batch() if example_inputs is None else example_inputs, self.device)
        self.lines = JsonLines("sweep", options.steps, every_point=options.log_every > 0)

    def run(self, configs: Sequence[RoastConfig], trained: bool) -> SweepReport:
        evaluation = self._evaluation_of_dense()
        quality = self._quality(evaluation) if self.options.evaluate else 0.0
        rows: list[SweepRow] = []
        dense_ms, machine = math.nan, dict[str, Any]()
        for number, config in enumerate(configs, 1):
            with stage(f"ratio {config.ratio:g}, {number} of {len(configs)}"):
                student = api.convert(self.model, config=config)
                plan = pool_of(student).plan
                multiply_adds = self._multiply_adds(student)
                # Measured before the training, because it may fail, and the time does not depend on the weights.
                measured = api.bench(
                    student,
                    example_inputs=self.inputs,
                    device=self.device,
                    graph=self.graph,
                    seconds=self.seconds,
                    inplace=True,
                )
                report = self._train(student, config.ratio)
            case = measured.cases[0]
            # The dense model has the same code each time; the first measurement is as good as any.
            dense_ms = case.dense.time.median_ms if not rows else dense_ms
            machine = {"device": measured.device, **measured.machine}
            found = report.evaluations[-1][1] if report.evaluations else None
            row = SweepRow(
                ratio=config.ratio,
                parameters=plan.stored_numel,
                bytes=plan.stored_nbytes,
                multiply_adds=multiply_adds,
                quality=report.after.error if self.options.evaluate is None else self._quality(found),
                evaluation=found,
                ms=case.converted.time.median_ms,
                dense_over_converted=case.dense_over_converted,
                seconds=report.seconds,
            )
            rows.append(row)
        seconds = 0.0
        if trained:
            unshared = dataclasses.replace(
                configs[0], ratio=1.0, init="project", fold="none", kernel_basis="none", sharing="global"
            )
            with stage("the dense model"):
                report = self._train(api.convert(self.model, config=unshared), 1.0)
            evaluation, seconds = report.evaluations[-1][1], report.seconds
            quality = self._quality(evaluation)
        return SweepReport(
            model=type(self.model).__name__,
            how="trained" if trained else "recovered",
            steps=self.options.steps,
            quality=_ERROR if self.options.evaluate is None else self.metric or "evaluate",
            lower_is_better=self.lower_is_better,
            dense=SweepRow(
                ratio=1.0,
                parameters=plan.total_numel,
                bytes=plan.total_nbytes,
                multiply_adds=self._multiply_adds(self.model),
                quality=quality,
                evaluation=evaluation,
                ms=dense_ms,
                dense_over_converted=1.0,
                seconds=seconds,
            ),
            rows=tuple(rows),
            machine=machine,
        )

    def _train(self, student: nn.Module, ratio: float) -> RecoveryReport:
        """Recover or train a converted model, and return how that went."""
        on_log = self.options.on_log or self.lines.write
        own = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        own["on_log"] = lambda numbers: on_log({"ratio": ratio, **numbers})
        self._rewind()
        return api.recover(student, self.model, self.data, **own)

    def _rewind(self) -> None:
        """Let a DataLoader with a generator shuffle in the same way at every ratio."""
        for generator, state in self.generators:
            generator.set_state(state)

    def _first_batch(self) -> Any:
        """Return the arguments that forward gets from the first batch."""
        from roastify.recovery.batches import Feed, passing

        feed = Feed(self.data, RandomStream(self.options.seed, self.device))
        args, kwargs = passing(self.model, self.options.inputs)(feed.peek(1)[0])
        return kwargs or args

    def _evaluation_of_dense(self) -> Any:
        if self.options.evaluate is None:
            return None
        from roastify.recovery.run import evaluated

        with modes_kept(self.model), working("evaluating the dense model"):
            return evaluated(self.model, self.options.evaluate, self.options.seed, self.device)

    def _quality(self, evaluation: Any) -> float:
        """Return the number to compare in what `evaluate` returned."""
        numbers = evaluation if isinstance(evaluation, Mapping) else {"evaluate": evaluation}
        numbers = {
            name: value
            for name, value in numbers.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if not numbers:
            raise ConfigError(f"evaluate returned {evaluation!r:.80}; expected a number, or a dict with numbers")
        if self.metric is None and len(numbers) == 1:
            (self.metric,) = numbers
        if self.metric not in numbers:
            what = "several numbers" if self.metric is None else f"no number {self.metric!r}"
            hint = "" if self.metric is None else closest(self.metric, numbers)
            raise ConfigError(f"evaluate returned {what}{hint}; choose a metric of {', '.join(map(str, numbers))}")
        return float(numbers[self.metric])

    def _multiply_adds(self, model: nn.Module) -> int:
        # Here, because it takes long to import.
        from torch.utils.flop_counter import FlopCounterMode

        args, kwargs = split_inputs(self.inputs)
        with FlopCounterMode(display=False) as counter:
            try:
                run_model(model, args, kwargs, "eval")
            except Exception as error:  # whatever a model raises on inputs that do not fit it
                raise RecoveryError(
                    f"the model fails on its example inputs: {type(error).__name__}: {error}; give example inputs that "
                    f"it takes"
                ) from error
        # The counter counts a multiply-add as two operations.
        return counter.get_total_flops() // 2
