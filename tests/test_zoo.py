"""The fast part of the zoo, and that its examination can fail. `make zoo` runs all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import awkward, pretrained, torch_nn
from zoo.examine import Entry, Unbuilt, examine
from zoo.outside import examine_all
from zoo.page import OUTSIDE, load, outside, own_part

from roastify.layers.base import RoastModule

ROOT = Path(__file__).parents[1]
transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # models and packages that are not ours warn

# One model of every family, chosen because it once broke something.
_FAST = (
    "bert deberta-v2 longformer ctrl gemma2 gpt2 t5 led mixtral llama4_text nllb-moe falcon_mamba rwkv beit segformer "
    "sew-d wavlm whisper clip groupvit patchtst"
).split()
# Those that take longest.
_LONG = {"groupvit", "led", "longformer", "sew-d", "wavlm", "nllb-moe"}
_BY_TYPE = {name: family for family, types in pretrained.FAMILIES.items() for name in types.split()}


def assert_passes(entry: Entry | None) -> None:
    assert entry is not None
    row = examine(entry)
    assert not row.failure, row


@pytest.mark.parametrize("entry", [*torch_nn.entries(), *awkward.entries()], ids=lambda entry: entry.name)
def test_modules_of_torch_and_awkward_models(entry: Entry) -> None:
    assert_passes(entry)


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.long if name in _LONG else ()) for name in _FAST]
)
def test_an_architecture_of_every_family(model_type: str) -> None:
    assert_passes(pretrained.base_model(model_type, _BY_TYPE[model_type]))


class Failing(nn.Module):
    """Fails a promise in its converted form only."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.layer = nn.Linear(64, 64)
        if what == "keeps much":
            self.table = nn.Embedding(1200, 1000, max_norm=1.0)
            self.wide = nn.Linear(4000, 4000)

    def forward(self, x: Tensor) -> Any:
        converted = isinstance(self.layer, RoastModule)
        if self.what == "shape" and converted:
            return self.layer(x)[:1]
        if self.what == "values" and converted and self.training:
            return self.layer(x) + 1
        return self.layer(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", "in eval mode output output of the converted model"),
        ("values", "Tensor-likes are not close"),
        ("keeps much", "promised 98%: kept max_norm rewrites rows"),
        ("nothing", ""),
    ],
)
def test_the_examination_can_fail(what: str, message: str) -> None:
    row = examine(Entry(what, "failing", lambda: Failing(what), lambda: (torch.randn(3, 64),)))
    assert message in row.failure and bool(row.failure) == bool(message)
    assert row.traced + row.opaque > 0


def test_a_model_that_does_not_run_unconverted_is_reported_as_such() -> None:
    with pytest.raises(Unbuilt, match="RuntimeError"):
        examine(Entry("wrong", "failing", lambda: nn.Linear(3, 3), lambda: (torch.zeros(2, 4),)))


def test_every_listed_type_is_known_to_the_newest_transformers_and_the_page_names_it() -> None:
    page = (ROOT / "docs" / "coverage.md").read_text()
    for name in [*_BY_TYPE, *pretrained.HEADS, *awkward.MODELS, *awkward.MORE]:
        assert f"| {name} |" in page, name
    assert "**fails**" not in own_part(page)
    if OUTSIDE.exists():
        assert page == own_part(page).rstrip("\n") + "\n" + outside(load(OUTSIDE))


@pytest.mark.long
def test_the_program_runs_one_model() -> None:
    command = [sys.executable, "-m", "zoo", "--processes", "1", "nn.Bilinear"]
    result = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "1 of 1 pass, 0 not run"


def run_outside(output: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run the program for other packages on transformers' models, and return its last line and its raw results."""
    command = [sys.executable, "-m", "zoo.outside", "--list", "transformers", "--output", str(output), *options]
    result = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert output.exists(), result.stderr
    return result.stdout.splitlines()[-1], json.loads(output.read_text())


@pytest.mark.long
def test_the_program_for_other_packages(tmp_path: Path) -> None:
    last, results = run_outside(tmp_path / "one.json", "--processes", "1", "bert", "gpt2")
    assert last == "2 of 2 pass, 0 not run" and [row["name"] for row in results["rows"]] == ["bert", "gpt2"]
    text = outside(load(tmp_path / "one.json"))
    assert "**2 of 2 models pass** with torch" in text and "| bert | encoder |" in text


@pytest.mark.long
def test_a_model_that_takes_too_long_is_a_row_and_models_not_run_are_named(tmp_path: Path) -> None:
    last, results = run_outside(tmp_path / "late.json", "--processes", "1", "--timeout", "0.001", "bert")
    assert last == "0 of 1 pass, 0 not run" and results["rows"][0]["failure"] == "took over 0.001 s"
    last, results = run_outside(tmp_path / "none.json", "--processes", "1", "--minutes", "0", "bert", "gpt2")
    assert last == "0 of 0 pass, 2 not run" and results["unbuilt"][0] == "bert: no time was left"


@pytest.mark.long
def test_a_process_that_dies_is_a_row() -> None:
    """The worker gets a number that is not in its list, and that ends it."""
    entry = Entry("dying", "failing", lambda: Failing("nothing"))
    (row,) = examine_all("transformers", [(10**9, entry)], 1, 60, 60)
    assert row.name == "dying" and row.failure == "its process ended with exit code 1"
