"""Writes the README's tables and its two plots from the committed rows of every measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from benchmarks import adapters, cpu, plots, pretrained, recovery_page, scale
from benchmarks.accuracy import table
from benchmarks.accuracy.language.table import RESULTS as LANGUAGE
from benchmarks.accuracy.language.table import Table as LanguageTable
from benchmarks.accuracy.nets import size, text_net
from benchmarks.accuracy.pruning import SCORES
from benchmarks.accuracy.readme import README
from benchmarks.accuracy.tasks import TASKS
from benchmarks.documents import insert
from benchmarks.documents import table as table_lines
from benchmarks.rows import FOLDER, Row, load, write
from benchmarks.stats import mean_and_error

IMAGES = README.parent / "docs" / "images"
MARK = "<!-- {}: written by `python -m benchmarks.front_page` -->"
MODELS, TRAINING = FOLDER / "models.json", FOLDER / "training.json"
# Of the plot: one line a method, and the best of several.
LINES: dict[str, Callable[[str], bool]] = {
    "roastify": "ours".__eq__,
    "smaller dense model": "smaller".__eq__,
    "low rank": "lowrank".__eq__,
    "best pruned": SCORES.__contains__,
}
# One for each line of the plot of accuracy.
MARKERS = "osD^vPX"
PANELS = ("resnet9", "vgg11", "imdb")


class Figures:
    """The numbers of the README, each looked up in the rows that were committed."""

    def __init__(self) -> None:
        self.accuracy = table.Table(load(table.RESULTS)["rows"])
        self.language = LanguageTable(load(LANGUAGE)["rows"])
        self.recovery = load(recovery_page.RESULTS)["rows"]
        self.adapters = load(adapters.RESULTS)["rows"]
        self.pretrained = load(pretrained.RESULTS)["rows"]
        self.models = load(MODELS)["rows"]
        self.training = load(TRAINING)["rows"]
        self.cpu = load(cpu.RESULTS)["rows"]
        self.scale = load(scale.RESULTS)["rows"]

    def points(self, task: str, ratio: float, method: str = "ours") -> float:
        """Accuracy of a method trained from scratch, in percent."""
        found = self.accuracy.mean(task, method, ratio)
        assert found is not None, (task, ratio, method)
        return found

    def lost(self, task: str, ratio: float) -> float:
        """Points that roastify loses to the dense model; below zero where it gains."""
        return self.points(task, 1.0, "dense") - self.points(task, ratio)

    def recovered(self, task: str, ratio: float, arm: str, name: str = "accuracy") -> float:
        return mean_and_error(recovery_page.Side(self.recovery, task, ratio, arm).percent(name).values())[0]

    def adapter(self, name: str) -> tuple[float, float]:
        """Return test accuracy and kilobytes of a way to train adapters."""
        (method,) = (each for each in adapters.METHODS if each.name == name)
        rows = adapters.of_method(self.adapters, method)
        rate = adapters.chosen_rate(method, self.adapters)
        chosen = [row for row in rows if row["rate"] == rate]
        return mean_and_error(row["test"] for row in chosen)[0], chosen[0]["bytes"] / 1000

    def untrained(self, case: str) -> str:
        """Cosine to a pretrained model's embeddings, without training."""
        return f"{_only(self.pretrained, case=case)['cosine']:.2f}"

    def smaller(self, case: str) -> str:
        """How many times fewer bytes that model takes."""
        return f"÷ {_only(self.pretrained, case=case)['ratio']:.3g}"

    def share_of_table(self) -> float:
        """Share of a text model's parameters that lie in its table of words, in percent."""
        with torch.device("meta"):
            model = text_net(TASKS["imdb"])
        measured = {row["stored"] for row in self.accuracy.rows if (row["task"], row["method"]) == ("imdb", "dense")}
        assert measured == {size(model)}, "the rows are of another model"
        return 100 * size(model.words) / size(model)

    def decoding(self, case: str) -> float:
        """Dense time over converted time of a whole model on a GPU."""
        return _only(self.models, case=case)["dense_over_converted"]

    def step(self, case: str) -> float:
        """Converted time over dense time of a training step on a GPU."""
        return _only(self.training, case=case)["step_ratio"]

    def on_cpu(self, shape: Sequence[int], ratio: float, num_rows: int, layers: int = 1) -> float:
        """Pool time over dense time of linear layers on a CPU."""
        found = _only(self.cpu, case="linear", shape=list(shape), ratio=ratio, rows=num_rows, layers=layers)
        return found["pool_over_dense"]

    def loss(self, method: str, ratio: float) -> float:
        """Held-out loss of a language model, in nats a token."""
        return mean_and_error(self.language.losses(method, ratio).values())[0]


def _only(found: Sequence[Row], **wanted: Any) -> Row:
    (row,) = (each for each in found if all(each.get(name) == value for name, value in wanted.items()))
    return row


def short(found: Figures) -> str:
    """Return the first screen: when to use it, and when not."""
    resnet, vgg, imdb = (f"{-found.lost(task, 10.0):+.1f}".replace("-", "−") for task in ("resnet9", "vgg11", "imdb"))
    dense, projected, recovered = (
        found.recovered("cifar10", 1.0, "dense"),
        found.recovered("cifar10", 10.0, "recovered", "projected"),
        found.recovered("cifar10", 10.0, "recovered"),
    )
    return (
        f"- **Use it** to train with less memory, smaller checkpoints and less gradient traffic. At ratio 10, trained "
        f"from scratch, accuracy changes by {resnet} points (ResNet-9 on CIFAR-10), {vgg} (VGG-11) and {imdb} "
        f"(a transformer on IMDB).\n"
        f'- **A pretrained model needs further training.** `convert` starts the pool at random; `init="project"` '
        f"starts it from the weights, and `roastify.recover` then trains it on the dense model's outputs. An MLP-mixer "
        f"on CIFAR-10 falls from {dense:.0f} % to {projected:.0f} % at ratio 10, and two seconds on a GPU bring it "
        f"back to {recovered:.0f} %.\n"
        f"- **Do not use it** where you cannot train: round a pretrained model's weights to int8 or int4 instead. Do "
        f"not use it where a smaller dense model is as good. It does not make small layers faster.\n"
    )


def choices(found: Figures) -> str:
    """Return what to do with what one has, what that gives, and what else may serve better."""
    lora, pool, rank_1 = (found.adapter(name) for name in ("LoRA", "LoRA in a pool ÷ 50", "LoRA, rank 1"))
    imdb = {method: found.points("imdb", 100.0, method) for method in ("ours", "smaller")}
    lines = [
        [
            "a model to train from scratch",
            "`convert(model, ratio=10)`, then your own loop",
            f"÷ 10 parameters, gradients, optimizer state, checkpoint; accuracy "
            f"{-found.lost('resnet9', 10.0):+.1f} (ResNet-9), {-found.lost('vgg11', 10.0):+.1f} (VGG-11), "
            f"{-found.lost('imdb', 10.0):+.1f} points (IMDB)",
            f"a smaller dense model for language models: {found.loss('smaller', 10.0):.2f} nats a token, "
            f"roastify {found.loss('folded', 10.0):.2f}",
        ],
        [
            "a pretrained model, and inputs to train on",
            '`convert(…, init="project")`, then [`recover`](docs/recovery.md)',
            f"MLP-mixer of {found.recovered('cifar10', 1.0, 'dense'):.1f} %: "
            f"{found.recovered('cifar10', 3.0, 'recovered'):.1f} % at ratio 3, "
            f"{found.recovered('cifar10', 10.0, 'recovered'):.1f} % at 10",
            "rounding to 8, 4 or 3 bits",
        ],
        [
            "a pretrained model, no training",
            "do not convert it: its outputs are nonsense",
            f"MLP-mixer: {found.recovered('cifar10', 3.0, 'recovered', 'projected'):.1f} % at ratio 3; MiniLM: a "
            f"cosine of {found.untrained('aligned, 2')} to the dense embeddings at 2",
            f"rounding: cosine {found.untrained('int8')} (int8, {found.smaller('int8')}), {found.untrained('int4')} "
            f"(int4, {found.smaller('int4')}); low rank: {found.untrained('low rank, 2')} "
            f"({found.smaller('low rank, 2')})",
        ],
        [
            "many adapters on one base",
            '`convert(…, ratio=50, include="adapters")`: [adapters](docs/adapters.md)',
            f"{pool[0]:.1f} % in {pool[1]:.0f} kB; LoRA of rank 8 {lora[0]:.1f} % in {lora[1]:,.0f} kB",
            f"LoRA of rank 1: {rank_1[0]:.1f} % in {rank_1[1]:.0f} kB",
        ],
        [
            "embedding tables",
            "`convert(model, ratio=10)`: [example](examples/recommender.py)",
            f"IMDB, {found.share_of_table():.0f} % of it a table: {found.points('imdb', 10.0):.1f} %, dense "
            f"{found.points('imdb', 1.0, 'dense'):.1f} %",
            f"a narrower table of fewer words at high ratios: {imdb['smaller']:.1f} % at 100, roastify "
            f"{imdb['ours']:.1f} %",
        ],
        [
            "decoding at a small batch",
            "convert, train, then [deploy](docs/deployment.md)",
            f"{found.decoding('llama-7b/ratio=50/batch=1'):.1f} times as fast (Llama 7 B, H200, ratio 50, batch 1), "
            f"{found.decoding('llama-7b/ratio=50/batch=4'):.1f} at batch 4",
            "`densify` for servers with kernels of their own (vLLM, SGLang); int4 weights",
        ],
        [
            "large linear layers, large batches",
            "the default: they are [folded](docs/folding.md)",
            f"training step of a Llama of 1.1 B × {found.step('llama-1.1b/graphed/ratio=10'):.2f} (H200, CUDA graph); "
            f"4096×4096 on a CPU, 1,024 rows × {found.on_cpu((4096, 4096), 10, 1024):.2f}",
            "the dense model, if its layers have under a million weights",
        ],
    ]
    return "\n".join(table_lines(["you have", "do", "expect", "rather use"], lines)) + "\n"


def losses(found: Figures) -> str:
    """Return where something else is better, or roastify slower."""
    small_layers = _only(found.scale, case="step: 2,000 layers, 32 wide, 16 rows")["pool_over_dense"]
    lines = [
        [
            "language model of 27 M, ratio 10, loss",
            f"{found.loss('folded', 10.0):.3f} nats",
            f"smaller dense model: {found.loss('smaller', 10.0):.3f}",
        ],
        [
            "transformer on IMDB, ratio 100",
            f"{found.points('imdb', 100.0):.1f} %",
            f"ROAST's tiles: {found.points('imdb', 100.0, 'roast'):.1f} %; smaller dense model: "
            f"{found.points('imdb', 100.0, 'smaller'):.1f} %",
        ],
        [
            "ResNet-9 on CIFAR-10, ratio 300",
            f"{found.points('resnet9', 300.0):.1f} %",
            f"without the preconditioner: {found.points('resnet9', 300.0, 'plain'):.1f} %",
        ],
        [
            "IMDB, recovered from pretrained, ratio 3",
            f"{found.recovered('imdb', 3.0, 'recovered'):.1f} %",
            f"from scratch in as many seconds: {found.recovered('imdb', 3.0, 'scratch'):.1f} %",
        ],
        [
            "eager training step on a slow host, BERT-base and ResNet-50, ratio 10",
            f"× {found.step('bert-base/eager/ratio=10'):.2f} and × {found.step('resnet-50/eager/ratio=10'):.2f}",
            f"as CUDA graphs × {found.step('bert-base/graphed/ratio=10'):.2f} and × "
            f"{found.step('resnet-50/graphed/ratio=10'):.2f}",
        ],
        [
            "compiled training step, BERT-base, ratio 10",
            f"× {found.step('bert-base/compiled/ratio=10'):.2f}",
            f'with `mode="reduce-overhead"` × {found.step("bert-base/reduce-overhead/ratio=10"):.2f}',
        ],
        [
            "BERT-base on 32 sequences, H200, ratio 10",
            f"× {1 / found.decoding('bert-base/ratio=10/batch=32'):.2f}",
            "dense",
        ],
        [
            "one linear layer of 768×768 alone, CPU, 1 row",
            f"× {found.on_cpu((768, 768), 10, 1):.1f}",
            f"48 of them × {found.on_cpu((768, 768), 10, 1, 48):.1f}; dense",
        ],
        ["2,000 layers of 32×32, CPU, eager training step", f"× {small_layers:.1f}", "dense"],
    ]
    return "\n".join(table_lines(["case (×: time beside dense)", "roastify", "better"], lines)) + "\n"


def accuracy_plot(found: Figures) -> Figure:
    """Accuracy by ratio, trained from scratch, beside what else stores as many parameters."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.6))
    for axes, task in zip(panels, PANELS, strict=True):
        ratios = [ratio for ratio in found.accuracy.ratios(task) if ratio > 1]
        dense = found.points(task, 1.0, "dense")
        axes.axhline(dense, color="#444444", linewidth=1.2, linestyle="--", label="dense")
        for (name, wanted), colour, marker in zip(LINES.items(), plots.COLOURS, MARKERS, strict=False):
            line = [(ratio, best[1]) for ratio in ratios if (best := found.accuracy.best(task, ratio, wanted))]
            if line:
                width = 2.4 if name == "roastify" else 1.4
                axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linewidth=width, label=name)
        axes.set_ylim(min(found.points(task, max(ratios)), dense - 6) - 4, dense + 1)
        axes.set_xscale("log")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_title(TASKS[task].title, loc="left", fontsize=11)
        axes.set_xlabel("ratio")
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def speed_plot(found: Figures) -> Figure:
    """Dense time over converted time, of inference and training, gains and losses."""
    cases = [
        *((f"decoding, {name}, ratio 50, batch {batch}", found.decoding(f"{key}/ratio=50/batch={batch}"))
          for name, key, batches in (
              ("Llama 7 B", "llama-7b", (1, 4)), ("Llama 1.1 B", "llama-1.1b", (1, 16)), ("GPT-2", "gpt2", (1, 16)),
          )
          for batch in batches),
        ("encoding, BERT-base, ratio 10, batch 32", found.decoding("bert-base/ratio=10/batch=32")),
        *((f"training, {name}, ratio 10, {mode}", 1 / found.step(f"{key}/{kind}/ratio=10"))
          for name, key, kind, mode in (
              ("Llama 1.1 B", "llama-1.1b", "graphed", "CUDA graph"), ("Llama 1.1 B", "llama-1.1b", "eager", "eager"),
              ("GPT-2 medium", "gpt2-medium", "graphed", "CUDA graph"),
              ("BERT-base", "bert-base", "graphed", "CUDA graph"), ("BERT-base", "bert-base", "eager", "eager"),
              ("ResNet-50", "resnet-50", "graphed", "CUDA graph"), ("ResNet-50", "resnet-50", "eager", "eager"),
          )),
        *((f"CPU, linear {rows}×{columns}, ratio 10, {batch:,} row{'s' * (batch > 1)}",
           1 / found.on_cpu((rows, columns), 10, batch))
          for rows, columns, batch in ((4096, 4096, 1024), (4096, 4096, 1), (768, 768, 1))),
    ]  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(cases) + 1.2))
    names, values = zip(*cases, strict=True)
    plots.bars(axes, names, values, [value >= 1 for value in values])
    axes.set_xlim(0, max(values) * 1.08)
    axes.set_xlabel("time of the dense model ÷ time of the converted one")
    axes.set_title("Above 1 the converted model is faster", loc="left")
    return figure


BLOCKS = {"first": short, "choices": choices, "losses": losses}


def page(text: str, found: Figures) -> str:
    """Return the README with its blocks written anew."""
    for name, block in BLOCKS.items():
        text = insert(text, MARK.format(name), block(found))
    return text


def main() -> None:
    found = Figures()
    write(README, page(README.read_text(encoding="utf-8"), found))
    drawn = {"readme-accuracy": lambda: accuracy_plot(found), "readme-speed": lambda: speed_plot(found)}
    written = plots.save(drawn, IMAGES)
    print(f"written to {README}, {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
