"""Benchmark of whole transformers models on a GPU, dense and on a pool.

`roastify bench` measures in the same way. BERT-base encodes a batch; GPT-2 and Llama shapes take one decoding step with
a static key-value cache. Both sides run in bfloat16 under `torch.compile` and CUDA graphs, are checked against each
other, and are timed in turn. Weights are random and built on the device. Each row goes to
benchmarks/results/models.json as soon as it is there; a case that fails is a row with its failure.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

import roastify
from benchmarks.rows import FOLDER, Cases, Row, largest_fold
from roastify.checks import clocks
from roastify.checks.model_bench import BenchOptions, Subject, check_and_time, parse_device, prepare
from roastify.conversion.converted import pool_of
from roastify.conversion.rewrite import copy_weights
from roastify.errors import BenchError

RESULTS = FOLDER / "models.json"
DTYPE = torch.bfloat16
TOKENS = 128
POSITIONS = 256
DECODING = (1, 4, 16)


@dataclass(frozen=True)
class Shape:
    """A model's class and configuration, and the cases to measure it in."""

    model_class: str
    config: dict[str, Any]
    batches: tuple[int, ...]
    ratios: tuple[int, ...] = (50,)
    decode: bool = True

    def build(self, device: torch.device) -> nn.Module:
        """Build it with random weights, on the device from the start: 7 B parameters take minutes on a CPU."""
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        with torch.device(device):
            return model_class._from_config(model_class.config_class(**self.config), dtype=DTYPE).eval()


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


# In the order in which they are measured. The pool of the 7 B shape no longer fits an H200's level-2 cache of 50 MB.
SHAPES = {
    "llama-1.1b": Shape("LlamaForCausalLM", llama(2048, 5632, 22, 32, 4), DECODING),
    "bert-base": Shape("BertForMaskedLM", {}, (1, 8, 32), (50, 10), decode=False),
    "gpt2": Shape("GPT2LMHeadModel", {}, DECODING),
    "llama-7b": Shape("LlamaForCausalLM", llama(4096, 11008, 32, 32, 32), DECODING),
    "llama-0.4b": Shape("LlamaForCausalLM", llama(1024, 4096, 24, 16, 4), DECODING),
}
# The same code in seconds, on a CPU as well.
SMOKE_SHAPES = {
    "bert-smoke": Shape(
        "BertForMaskedLM",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 512,
        },
        (1, 2),
        (8, 4),
        decode=False,
    ),
    "gpt2-smoke": Shape(
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0},
        (1, 2),
        (8,),
    ),
    "llama-smoke": Shape("LlamaForCausalLM", llama(128, 256, 2, 4, 2, 512), (1, 2), (8,)),
}


class LastPosition(StaticLayer):
    """A full cache whose last position is written again at every step, so that a step can be repeated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        position = self.cumulative_length.view(1)
        self.keys.index_copy_(2, position, key_states)
        self.values.index_copy_(2, position, value_states)
        return self.keys, self.values


class DecodingStep(nn.Module):
    """One new token for each sequence of a batch: token ids → logits, over a cache of `POSITIONS` random positions."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__()
        self.model = model
        config = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.cache = Cache(layers=[LastPosition(POSITIONS) for _ in range(config.num_hidden_layers)])
        self.cache.early_initialization(
            batch, heads, config.hidden_size // config.num_attention_heads, DTYPE, model.device
        )
        generator = torch.Generator(model.device).manual_seed(0)
        for index, layer in enumerate(self.cache.layers):
            layer.cumulative_length.fill_(POSITIONS - 1)
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
            # As buffers they count as the step's memory.
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> DecodingStep:
        super()._apply(*args, **kwargs)
        # A cast makes new tensors of the buffers, and the cache must use these.
        for index, layer in enumerate(self.cache.layers):
            layer.keys, layer.values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits


class Encoding(nn.Module):
    """A whole batch at once: token ids → logits."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


@dataclass(frozen=True)
class Ready:
    """A subject, whether its graph is whole, and how long compiling, warming up and capturing took."""

    subject: Subject
    fullgraph: bool
    seconds: float


def ready(name: str, model: nn.Module, shape: Shape, batch: int, inputs: Tensor, options: BenchOptions) -> Ready:
    """Prepare one side; where the model's graph cannot be whole, with breaks in it."""
    begun = time.perf_counter()
    step = (DecodingStep if shape.decode else Encoding)(model, batch)
    try:
        subject = prepare(name, step, inputs, options)
    except BenchError as error:
        if not (options.fullgraph and isinstance(error.__cause__, torch._dynamo.exc.Unsupported)):
            raise
        return ready(name, model, shape, batch, inputs, dataclasses.replace(options, fullgraph=False))
    return Ready(subject, options.fullgraph, time.perf_counter() - begun)


class Run(Cases):
    """The rows of one run, and its options."""

    def __init__(self, options: BenchOptions, output: Path, pattern: str, minutes: float) -> None:
        super().__init__(output, pattern, minutes, clocks.machine(options.device))
        self.options = options

    def keep(self, case: str, ratio: int, fields: Row, found: Row) -> None:
        """Add the row of a case, be it of its failure."""
        assert self.machine is not None
        row = {"case": case, **fields, "ratio": ratio, **found, "date": self.machine["date"]}
        self.add(row, f"dense ÷ converted {row.get('dense_over_converted', 0):.2f}")


def measure(run: Run, name: str, shape: Shape) -> None:
    """Measure a model's cases; one conversion for a ratio and one dense side for a batch serve them all."""
    cases = {
        (batch, ratio): case
        for batch in shape.batches
        for ratio in shape.ratios
        if run.wanted(case := f"{name}/ratio={ratio}/batch={batch}")
    }
    if not cases:
        return
    fields = {"model": name, "kind": "decoding step" if shape.decode else "encoding"}
    try:
        dense = shape.build(run.options.device)
        begun = time.perf_counter()
        # All of them before the dense model is given a converted one's weights: λ comes from its own.
        converted = {ratio: roastify.convert(dense, ratio) for ratio in dict.fromkeys(ratio for _, ratio in cases)}
        fields["conversion_s"] = (time.perf_counter() - begun) / len(converted)
    except Exception as error:  # out of memory, or a model that this transformers does not have
        for (_, ratio), case in cases.items():
            run.keep(case, ratio, fields, _failed(error))
        return
    for batch in dict.fromkeys(batch for batch, _ in cases):
        of_batch = {ratio: case for (other, ratio), case in cases.items() if other == batch and run.wanted(case)}
        if of_batch:
            measure_batch(run, shape, dense, converted, batch, of_batch, fields)
        torch.compiler.reset()
        free()


def measure_batch(
    run: Run,
    shape: Shape,
    dense: Any,
    converted: dict[int, nn.Module],
    batch: int,
    cases: dict[int, str],
    fields: Row,
) -> None:
    """Measure the cases, by ratio, of one batch size."""
    length = 1 if shape.decode else TOKENS
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, dense.config.vocab_size, (batch, length), generator=generator)
    try:
        dense_side = ready("dense", dense, shape, batch, inputs, run.options)
    except Exception as error:  # a failure is a result too
        for ratio, case in cases.items():
            run.keep(case, ratio, fields, _failed(error))
        return
    for ratio, case in cases.items():
        try:
            # In place, so that the dense side's compiled code and graph read the new weights.
            copy_weights(converted[ratio], dense)
            # Not whole where the dense side is not: what was skipped once, torch skips without a word.
            options = dataclasses.replace(run.options, fullgraph=dense_side.fullgraph)
            side = ready("converted", converted[ratio], shape, batch, inputs, options)
            found = check_and_time(dense_side.subject, side.subject, run.options, batch)
        except Exception as error:
            run.keep(case, ratio, fields, _failed(error))
            continue
        plan = pool_of(converted[ratio]).plan
        run.keep(
            case,
            ratio,
            fields,
            {
                "achieved_ratio": plan.achieved_ratio,
                "tokens": length,
                "positions": POSITIONS if shape.decode else None,
                "dtype": str(DTYPE).removeprefix("torch."),
                "compile": run.options.compile,
                "fullgraph": {"dense": dense_side.fullgraph, "converted": side.fullgraph},
                "graph": run.options.graph,
                "tile": list(plan.tile),
                "sign": plan.sign,
                "fold": largest_fold(plan),
                "pool_bytes": plan.pool_numel * DTYPE.itemsize,
                "prepared_s": {"dense": dense_side.seconds, "converted": side.seconds},
                **found.to_dict(),
            },
        )
        del side
        free()


def free() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failed(error: Exception) -> Row:
    return {"failure": clocks.reason(error)}


@click.command()
@click.option(
    "--only", default="", metavar="PATTERN", help="Regular expression of cases, as llama-7b/ratio=50/batch=1."
)
@click.option("--quick", is_flag=True, help="Each model's first batch only, timed for a fifth of the time.")
@click.option("--smoke", is_flag=True, help="Narrow models instead: shows in seconds whether everything runs.")
@click.option("--device", help="Default: a GPU if there is one.")
@click.option("--seconds", default=1.5, show_default=True, help="How long each case is timed.")
@click.option("--minutes", default=5.0, show_default=True, help="Begin no case after so long; what is left is named.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="The JSON file.")
def main(only: str, quick: bool, smoke: bool, device: str | None, seconds: float, minutes: float, output: Path) -> None:
    """Measure whole models on this machine's GPU."""
    shapes = SMOKE_SHAPES if smoke else SHAPES
    if smoke and output == RESULTS:
        raise click.UsageError("--smoke measures nothing of interest; name another file for it with --output")
    if quick:
        shapes = {name: dataclasses.replace(shape, batches=shape.batches[:1]) for name, shape in shapes.items()}
    options = BenchOptions(
        device=parse_device(device), compile=True, fullgraph=True, seconds=seconds / 5 if quick else seconds
    )
    run = Run(options, output, only, minutes)
    for name, shape in shapes.items():
        measure(run, name, shape)
        free()
    run.close()


if __name__ == "__main__":
    main()
