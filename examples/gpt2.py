"""GPT-2 small with its language-model head (124 M parameters), from its configuration."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config())


def example_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 50257, (2, 16), generator=torch.Generator().manual_seed(0))}
