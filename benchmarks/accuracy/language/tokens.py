"""The reviews' text as tokens of a byte-pair vocabulary, and their file, for machines that lack `tokenizers`.

python -m benchmarks.accuracy.language.tokens --data DIR
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks import data as data_sets

# Git ignores this folder.
FILE = Path(__file__).parents[3] / "data" / "imdb-tokens.npz"
WORDS = 4096
# Reviews that no model trains on: those that choose rates and sizes, and those that a row's loss is of.
VALIDATION, HELD_OUT = 1_000, 2_000
PARTS = ("train", "validation", "held_out")
# It stands in front of every review.
BEGIN = "<|begin|>"


@dataclass(frozen=True)
class Tokens:
    """Every part's reviews, one after the other, each behind the token 0.

    Args:
        parts: `uint16 [tokens]` by part.
        words: of the vocabulary.
    """

    parts: Mapping[str, np.ndarray]
    words: int

    @property
    def digest(self) -> str:
        """What tells these tokens from others: losses of different tokens are not comparable."""
        found = hashlib.sha256(str(self.words).encode())
        for part in PARTS:
            found.update(self.parts[part].astype("<u2").tobytes())
        return found.hexdigest()[:16]


def split(texts: Sequence[str], validation: int = VALIDATION, held_out: int = HELD_OUT) -> dict[str, list[str]]:
    """Return the texts of each part: those of both of the data set's splits, shuffled, each text once.

    A language model has no use for labels, so the data set's own test split trains it too: twice as much text. Some
    reviews occur twice there, and a repeated one could be trained on and held out.

    Raises:
        click.ClickException: no text is left to train on.
    """
    once = list(dict.fromkeys(text.replace("<br />", " ") for text in texts))
    if len(once) <= validation + held_out:
        raise click.ClickException(
            f"there are {len(once):,} different reviews, and {validation + held_out:,} are kept from training: give "
            f"more"
        )
    order = data_sets.shuffled(len(once))
    ends = {"held_out": (0, held_out), "validation": (held_out, held_out + validation),
            "train": (held_out + validation, None)}  # fmt: skip
    return {part: [once[index] for index in order[slice(*ends[part])]] for part in PARTS}


def encode(parts: Mapping[str, Sequence[str]], words: int = WORDS) -> Tokens:
    """Return the parts' texts as tokens of a byte-pair vocabulary that is learned from the training text alone.

    Raises:
        click.ClickException: the library is missing.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise click.ClickException(
            "a byte-pair vocabulary takes: pip install tokenizers; a machine without it reads the file that "
            "`python -m benchmarks.accuracy.language.tokens` writes on another"
        ) from None
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=[BEGIN], initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(parts["train"], trainer)
    begin = learned.token_to_id(BEGIN)

    def encoded(texts: Sequence[str]) -> np.ndarray:
        reviews = learned.encode_batch(list(texts), add_special_tokens=False)
        return np.concatenate([np.array([begin, *review.ids], dtype=np.uint16) for review in reviews])

    return Tokens({part: encoded(parts[part]) for part in PARTS}, learned.get_vocab_size())


def write(path: Path, tokens: Tokens) -> None:
    """Write the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, words=np.array(tokens.words), **tokens.parts)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(packed.getvalue())
    part.replace(path)


def read(path: Path) -> Tokens:
    """Return what `write` wrote.

    Raises:
        click.ClickException: there is no file, or it holds something else.
    """
    if not path.exists():
        raise click.ClickException(
            f"no tokens in {path}: write them by `python -m benchmarks.accuracy.language.tokens --data DIR --out "
            f"{path}`, on any machine that has the reviews and the package tokenizers"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Tokens({part: stored[part] for part in PARTS}, int(stored["words"]))
    except Exception as error:  # whatever numpy and zip raise of a damaged file
        raise click.ClickException(
            f"{path} holds no tokens ({type(error).__name__}: {error}); write it again by "
            f"`python -m benchmarks.accuracy.language.tokens`"
        ) from error


def facts(tokens: Tokens) -> str:
    counts = ", ".join(f"{len(tokens.parts[part]):,} {part.replace('_', ' ')}" for part in PARTS)
    return f"{counts} tokens of {tokens.words:,} words, digest {tokens.digest}"


@click.command(help=__doc__)
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with the IMDB reviews, packed or in their usual format.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=FILE, show_default=True)
def main(data: Path, out: Path) -> None:
    reviews = data_sets.read_reviews(data)
    tokens = encode(split([text for name in data_sets.SPLITS for text in reviews[name][0]]))
    write(out, tokens)
    click.echo(f"{facts(tokens)}; written to {out}")


if __name__ == "__main__":
    main()
