"""Files that earlier versions wrote still load, and give what they gave: an artifact, and a recovery's checkpoint.

tests/golden/ was written by version 0.1.0 with the models below: on 2026-11-29, before modules moved into sub-packages;
`artifact_5` and `artifact_6`, of these formats, on 2026-11-30.
The models' weights follow from arithmetic, not from a random generator, so that every version of torch makes the same.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import roastify

GOLDEN = Path(__file__).parent / "golden"


def fill_by_arithmetic(model: nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            flat = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((torch.sin(flat * (0.7 + 0.1 * index) + index) * 0.1).view(parameter.shape))


class Mixed(nn.Module):
    """A tied table with padding, a convolution with a basis, a norm, and a matrix that the code multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 64, padding_idx=0)
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.mix = nn.Parameter(torch.empty(64, 64))
        self.head = nn.Linear(64, 96)
        self.head.weight = self.table.weight
        fill_by_arithmetic(self)
        with torch.no_grad():
            self.table.weight[0] = 0

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        x = self.norm(self.table(words)) @ self.mix
        y = self.conv(image).flatten(2).mean(2)
        return self.head(x + y.repeat(1, 2)[:, None])


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 32)
        fill_by_arithmetic(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("artifact", ["artifact", "artifact_5"])
def test_an_artifact_gives_the_outputs_that_it_gave(artifact: str) -> None:
    words = torch.arange(12).view(2, 6) * 7 % 96
    image = torch.cos(torch.arange(2 * 8 * 25, dtype=torch.float32)).view(2, 8, 5, 5)
    expected = load_file(GOLDEN / "artifact_output.safetensors")["output"]
    model = roastify.load(GOLDEN / artifact, Mixed()).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(words, image), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(roastify.densify(model)(words, image), expected, rtol=1e-5, atol=1e-6)


def test_an_artifact_that_names_its_code_gives_the_outputs_that_it_gave() -> None:
    pytest.importorskip("transformers")
    expected = load_file(GOLDEN / "artifact_6_output.safetensors")["output"]
    with torch.no_grad():
        found = roastify.load(GOLDEN / "artifact_6")(torch.arange(12).view(2, 6) * 7 % 40).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_conversion_gives_the_pool_that_it_gave() -> None:
    """The same plan and the same least-squares fit come of the same model, ratio and seed."""
    stored = load_file(GOLDEN / "artifact" / "model.safetensors")
    converted = roastify.convert(Mixed(), 4, init="project", seed=3)
    found = converted.state_dict()
    assert found.keys() >= stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_recovery_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "recovery"
    shutil.copytree(GOLDEN / "recovery", folder)
    teacher = Teacher()
    student = roastify.convert(teacher, 4, init="project", seed=3)
    batches = [torch.sin(torch.arange(8 * 32, dtype=torch.float32) * (index + 1)).view(8, 32) for index in range(4)]
    with (
        pytest.warns(UserWarning, match="it cannot be checked whether the student was converted by the same plan"),
        pytest.warns(UserWarning, match="cannot be checked whether the values were made under this model's seed"),
    ):
        report = roastify.recover(student, teacher, batches, 10, save_every=5, folder=folder, align=3, resume=True)
    assert report.resumed_at == 5 and report.steps == 10
    for name, value in load_file(GOLDEN / "recovery_final.safetensors").items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-6)
