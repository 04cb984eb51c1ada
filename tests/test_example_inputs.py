"""Guessed example inputs run and fit the model's first layer; guessing leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from roastify.checks.example_inputs import find_inputs, how_to_give

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Two(nn.Module):
    """Takes two inputs, counts its calls, and has a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)
        self.norm = nn.BatchNorm1d(5)
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        self.calls += 1
        return self.norm(self.layer(x) + self.layer(y)) * scale


class Nothing(nn.Module):
    def forward(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Sequential(nn.Flatten(0, 0), nn.Linear(12, 5)), [(2, 12)]),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), [(2, 3, 32, 32)]),
        (nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(4 * 28 * 28, 3)), [(2, 3, 224, 224)]),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(62, 5)), [(2, 3, 64)]),
        (nn.Embedding(7, 5), [(2, 8)]),
        (nn.Sequential(nn.EmbeddingBag(7, 5)), [(2, 8)]),
        (nn.LSTM(6, 5), [(2, 8, 6)]),
        (nn.GRUCell(6, 5), [(2, 6)]),
        (nn.MultiheadAttention(8, 2), [(2, 8, 8)] * 3),
        (nn.Sequential(nn.Linear(9, 9).double()), [(2, 9)]),
        (Two(), [(2, 12), (2, 12)]),
        (Nothing(), []),
    ],
)
def test_inputs_fit_the_first_layer(model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    inputs = find_inputs(model)
    assert [tuple(tensor.shape) for tensor in inputs] == shapes
    model(*inputs)


def test_guessing_leaves_the_model_and_the_random_generators_alone() -> None:
    model = Two()
    state, generator = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    assert find_inputs(model) is not None
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES)), {"input_ids"}),
        (
            lambda: transformers.BartModel(
                transformers.BartConfig(
                    vocab_size=50,
                    d_model=32,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_ffn_dim=32,
                    decoder_ffn_dim=32,
                )
            ),
            {"input_ids", "decoder_input_ids"},
        ),
        (
            lambda: transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)),
            {"pixel_values"},
        ),
    ],
)
def test_inputs_of_transformers_models_follow_their_config(build: Any, names: set[str]) -> None:
    model = build().eval()
    inputs = find_inputs(model)
    assert set(inputs) == names
    model(**inputs)


def test_without_a_guess_the_message_says_how_to_give_inputs() -> None:
    class Odd(nn.Module):
        def forward(self, table: dict[str, Tensor]) -> Tensor:
            return table["x"]

    assert find_inputs(Odd()) is None
    assert find_inputs(nn.Linear(3, 3, device="meta")) is None
    assert "define `example_inputs` in my.py" in how_to_give("my.py")
